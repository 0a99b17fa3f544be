//! Content in the model: blobs that are stored once for all namespaces, and the sessions that write them.

use serde_json::{Value, json};
use tonic::Code;

use super::call::{Action, Call, Change, Message, Step};
use super::rule::Rule;
use super::world::{Answer, Ingest, Scope, World, digest_of, document, find, text, values};

/// A write session.
struct Session<'a> {
    reference: &'a str,
    total: i64,
    expected: String,
    /// The digest and size of a blob that is had without sending it, as long as nothing is written.
    shared: Option<(String, Vec<u8>)>,
    /// There was data when it began, and all of it is still there.
    resumed: bool,
    /// What was asked for last stays in the answers that follow.
    told: i64,
}

impl Scope<'_> {
    /// A call of the Content service. `kept` is set when what was done stays although the answer is an error.
    pub(super) fn of_content(&mut self, call: &Call, kept: &mut bool) -> Answer {
        match call {
            Call::Info { digest } => find(&self.space.blobs, well_formed(digest)?),
            Call::UpdateInfo(change) => self.update_info(change),
            Call::ListContent { filters } => self.list(|space| values(&space.blobs), filters),
            Call::DeleteContent { digest } => {
                self.space.blobs.remove(well_formed(digest)?).ok_or(Code::NotFound)?;
                self.detach("content", digest);
                Ok(Value::Null)
            }
            Call::Read { digest, offset, size } => {
                find(&self.space.blobs, well_formed(digest)?)?;
                let data = self.world.store.get(digest).cloned().unwrap_or_default();
                let offset = usize::try_from(*offset).unwrap_or_default();
                let size = usize::try_from(*size).unwrap_or_default();
                if offset > data.len() && self.holds(Rule::ReadPastTheEndIsRefused) {
                    return Err(Code::OutOfRange);
                }
                let rest = data.get(offset..).unwrap_or_default();
                let wanted = if size == 0 { rest } else { &rest[..size.min(rest.len())] };
                Ok(json!({ "digest": digest_of(wanted), "length": wanted.len() }))
            }
            Call::Status { reference } => {
                let ingest = self.space.ingests.get(reference).ok_or(Code::NotFound)?;
                status(reference, ingest).ok_or(Code::NotFound)
            }
            Call::ListStatuses { filters } => self.list(
                |space| {
                    space.ingests.iter().filter_map(|(reference, ingest)| status(reference, ingest)).collect()
                },
                filters,
            ),
            Call::Abort { reference } => {
                self.space.ingests.remove(reference).ok_or(Code::NotFound)?;
                self.detach("ingests", reference);
                Ok(Value::Null)
            }
            Call::Write { reference, messages, second } => self.write(reference, messages, *second, kept),
            _ => Err(Code::Unimplemented),
        }
    }

    fn update_info(&mut self, change: &Change) -> Answer {
        let digest = text(&change.record, "digest");
        let mut record = find(&self.space.blobs, well_formed(&digest)?)?;
        let mut change = change.clone();
        if change.mask.is_empty() {
            change.mask = vec!["labels".into()];
        }
        self.apply(&mut record, &change, &["labels"])?;
        self.settle(&mut record)?;
        self.space.blobs.insert(digest, record.clone());
        Ok(record)
    }

    /// A session is answered by all its answers and the code it ends with, if it ends by an error.
    fn write(&mut self, reference: &str, messages: &[Message], second: bool, kept: &mut bool) -> Answer {
        let mut answers = Vec::new();
        let end = self.session(reference, messages, second, &mut answers, kept);
        if end.is_ok() && self.holds(Rule::LastAnswerComesTwice) {
            let own = |answer: &&Value| answer.get("second").is_none();
            answers.extend(answers.iter().rev().find(own).cloned());
        }
        let code = end.err();
        *kept |= code.is_none();
        match (answers.is_empty(), code) {
            (true, Some(code)) => Err(code),
            _ => Ok(json!({ "answers": answers, "end": code.map(|code| format!("{code:?}")) })),
        }
    }

    fn session(
        &mut self,
        reference: &str,
        messages: &[Message],
        second: bool,
        answers: &mut Vec<Value>,
        kept: &mut bool,
    ) -> Result<(), Code> {
        let Some(first) = messages.first().filter(|_| !reference.is_empty()) else {
            return Err(Code::InvalidArgument);
        };
        let mut session = self.open(reference, first, kept)?;
        *kept = true;
        for (at, message) in messages.iter().enumerate() {
            if !message.expected.is_empty() {
                session.expected.clone_from(&message.expected);
                if self.space.blobs.contains_key(&message.expected) && self.holds(Rule::KnownBlobIsRefused) {
                    self.forget(reference);
                    return Err(Code::AlreadyExists);
                }
            }
            if message.total > 0 {
                session.total = message.total;
            }
            let answer = self.message(&mut session, message)?;
            answers.push(answer);
            if message.action == Action::Commit {
                return Ok(());
            }
            if at == 0 && second {
                answers.push(self.second_writer(&session));
            }
        }
        Ok(())
    }

    /// What another session on the same reference meets.
    fn second_writer(&self, session: &Session<'_>) -> Value {
        let busy = session.shared.is_none() && self.holds(Rule::ReferenceHasOneWriter);
        json!({ "second": if busy { "Unavailable" } else { "open" } })
    }

    fn open<'b>(
        &mut self,
        reference: &'b str,
        first: &Message,
        kept: &mut bool,
    ) -> Result<Session<'b>, Code> {
        let expected = first.expected.as_str();
        if self.space.blobs.contains_key(expected) && self.holds(Rule::KnownBlobIsRefused) {
            if self.holds(Rule::KnownBlobIsLeased) {
                self.attach("content", expected)?;
            }
            *kept = true;
            return Err(Code::AlreadyExists);
        }
        let stored = self.world.store.get(expected).filter(|_| self.holds(Rule::BlobIsShared)).cloned();
        let shared = stored.filter(|data| first.total == 0 || first.total == data.len() as i64);
        self.attach("ingests", reference)?;
        self.touched = true;
        let leased = self.lease.is_some();
        let anew_by_total = self.holds(Rule::OtherTotalBeginsAnew);
        let learn = self.holds(Rule::LaterTotalIsKept);
        let ingest = self.space.ingests.entry(reference.to_owned()).or_default();
        ingest.kept |= !leased;
        ingest.shares = shared.as_ref().map(|_| expected.to_owned());
        if shared.is_none() {
            let (data, total) = ingest.data.get_or_insert((Vec::new(), first.total));
            if anew_by_total && first.total > 0 && *total > 0 && *total != first.total {
                (*data, *total) = (Vec::new(), first.total);
            }
            if *total == 0 && learn {
                *total = first.total;
            }
        }
        let resumed = shared.is_none() && ingest.data.as_ref().is_some_and(|(data, _)| !data.is_empty());
        let shared = shared.map(|data| (expected.to_owned(), data));
        Ok(Session { reference, total: first.total, expected: expected.to_owned(), shared, resumed, told: 0 })
    }

    /// Where the data of a session goes. What is had by sharing is had by copying from now on.
    fn data<'b>(ingest: &'b mut Ingest, session: &mut Session<'_>) -> &'b mut Vec<u8> {
        let copied = session.shared.take();
        let (data, total) =
            ingest.data.get_or_insert((Vec::new(), copied.as_ref().map_or(0, |(_, blob)| blob.len() as i64)));
        if let Some((_, blob)) = copied {
            (*data, *total) = (blob.clone(), blob.len() as i64);
        }
        data
    }

    fn message(&mut self, session: &mut Session<'_>, message: &Message) -> Answer {
        let repeated = self.holds(Rule::StatIsRepeated);
        let anew = self.holds(Rule::WriteAtZeroBeginsAnew);
        let strict = self.holds(Rule::WriteElsewhereIsRefused);
        let ingest = self.space.ingests.entry(session.reference.to_owned()).or_default();
        let offset = match &session.shared {
            Some((_, data)) => data.len(),
            None => ingest.data.as_ref().map_or(0, |(data, _)| data.len()),
        };
        let name = ["STAT", "WRITE", "COMMIT"][message.action as usize];
        if !repeated {
            session.told = 0;
        }
        if message.action == Action::Stat {
            session.told = session.total;
        } else {
            if message.offset > 0 && message.offset != offset as i64 && strict {
                return Err(Code::OutOfRange);
            }
            if message.offset == 0 && offset > 0 && anew {
                (session.shared, session.resumed) = (None, false);
                // The size that was told when it began stays.
                ingest.data.get_or_insert_default().0.clear();
            }
            if !message.data.is_empty() {
                Scope::data(ingest, session).extend(&message.data);
            }
        }
        let (offset, digest) = match &session.shared {
            Some((digest, data)) => (data.len(), digest.clone()),
            None => {
                let data = ingest.data.as_ref().map(|(data, _)| data.clone()).unwrap_or_default();
                (data.len(), digest_of(&data))
            }
        };
        if message.action == Action::Commit {
            self.commit(session, message, &digest)?;
        }
        Ok(document([
            ("action", json!(name)),
            ("offset", json!(offset)),
            ("digest", json!(digest)),
            ("total", json!(session.told)),
        ]))
    }

    fn commit(&mut self, session: &Session<'_>, message: &Message, digest: &str) -> Result<(), Code> {
        let labels = self.world.checked(&message.labels)?;
        let ingest = self.space.ingests.get(session.reference).cloned().unwrap_or_default();
        let data = match &session.shared {
            Some((_, data)) => data.clone(),
            None => ingest.data.map(|(data, _)| data).unwrap_or_default(),
        };
        let size = data.len() as i64;
        if session.total > 0 && session.total != size && self.holds(Rule::CommitChecksTheSize) {
            return Err(Code::FailedPrecondition);
        }
        let other = !session.expected.is_empty() && session.expected != digest;
        if other && self.holds(Rule::CommitChecksTheDigest) {
            let spoilt = session.resumed && self.holds(Rule::SpoiltIngestGoes);
            if let Some(ingest) = self.space.ingests.get_mut(session.reference).filter(|_| spoilt) {
                ingest.data = None;
            }
            return Err(Code::FailedPrecondition);
        }
        self.world.seen.insert(digest.to_owned());
        self.world.store.insert(digest.to_owned(), data);
        self.forget(session.reference);
        self.attach("content", digest)?;
        if self.space.blobs.contains_key(digest) && self.holds(Rule::SecondCreateIsRefused) {
            return Err(Code::AlreadyExists);
        }
        let record = json!({ "digest": digest, "size": size, "labels": labels });
        self.space.blobs.insert(digest.to_owned(), record);
        Ok(())
    }

    fn forget(&mut self, reference: &str) {
        self.space.ingests.remove(reference);
        self.detach("ingests", reference);
    }
}

impl World {
    /// Whether a step is one that the daemon makes no promise about, because it lacks a rule.
    pub fn leaves_open(&self, step: &Step) -> bool {
        if let Call::DeleteNamespace { name } = &step.call {
            return !self.space(name).ingests.is_empty() && !self.holds(Rule::NamespaceTakesItsIngests);
        }
        let (reference, messages) = match &step.call {
            Call::Write { reference, messages, .. } => (reference, messages.as_slice()),
            Call::Abort { reference } => (reference, &[][..]),
            _ => return false,
        };
        let ingests =
            step.namespace.as_ref().and_then(|name| self.spaces.get(name)).map(|space| &space.ingests);
        // What nobody has any more may be gone or not, where a collection sweeps only what it knows to be in disorder.
        let wanted = messages.first().map_or("", |first| first.expected.as_str());
        let nobodys =
            self.seen.contains(wanted) && !self.spaces.values().any(|space| space.blobs.contains_key(wanted));
        if nobodys && !self.holds(Rule::OtherTotalBeginsAnew) {
            return true;
        }
        let Some(ingest) = ingests.and_then(|ingests| ingests.get(reference)) else { return false };
        let told = ingest.data.as_ref().map_or(0, |(_, total)| *total);
        let first = messages.first().map_or(0, |first| first.total);
        // An older ingest comes through: of another total, or below a shared blob.
        let other = told > 0 && first > 0 && told != first;
        let below = ingest.data.is_some() && messages.iter().any(|message| !message.expected.is_empty());
        !self.holds(Rule::OtherTotalBeginsAnew) && (other || below || ingest.shares.is_some())
    }
}

/// How far an ingest has come; nothing can be said of one that has no data of its own.
fn status(reference: &str, ingest: &Ingest) -> Option<Value> {
    let (data, total) = ingest.data.as_ref()?;
    Some(json!({ "ref": reference, "offset": data.len(), "total": total }))
}

fn well_formed(digest: &str) -> Result<&str, Code> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() == 64 { Ok(digest) } else { Err(Code::InvalidArgument) }
}
