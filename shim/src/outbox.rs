//! Events on their way to the daemon: strictly in order, at least once, for as long as it takes.
//!
//! ```text
//! publish → journal of the container's bundle → queue (an offset per event) → Forward → journal: sent
//! ```
//! The queue holds no event, only where it lies in its journal; an event that the journal did not take, for
//! want of space, is kept in memory. While the daemon is away nothing is lost and nothing is reordered: the
//! shim tries again after 1, 2, 4, … 30 seconds, and at once when a client connects, for that is a daemon
//! that has come back.

mod saved;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use davit_model::ErrorCode;
use davit_model::error::chain;
use davit_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use davit_proto::containerd::types::Envelope;
use davit_shim_protocol::frame::RpcError;
use davit_shim_protocol::journal::{EventRecord, ExitRecord, Journal, JournalError, Record, StartRecord};
use prost::{Message, Name};
use prost_types::{Any, Timestamp};

use crate::executor::{Either, race};
use crate::log;
use crate::publisher::Publisher;
use crate::quiesce::Busy;
use crate::reactor::sleep;
use crate::sync::Condition;

pub(crate) use saved::Journals;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// A journal that nobody waits for is rewritten when it has grown to this many bytes.
const COMPACT_AT: u64 = 64 * 1024;

/// The journal of one container, and what must stay in it.
pub(crate) struct ContainerJournal {
    journal: RefCell<Journal>,
    exits: RefCell<BTreeMap<String, ExitRecord>>,
    /// The processes that have not ended.
    running: RefCell<BTreeMap<String, StartRecord>>,
    /// The events of this journal that are not sent yet.
    pending: Cell<usize>,
}

impl ContainerJournal {
    /// Makes the journal of a new container. One of an earlier life in this bundle is replaced: its exits are
    /// not those of the new one, and a handle that still sends its events keeps the file.
    pub(crate) fn create(path: &Path) -> Result<ContainerJournal, JournalError> {
        let _ = std::fs::remove_file(path);
        let (journal, _) = Journal::open(path)?;
        Ok(ContainerJournal {
            journal: RefCell::new(journal),
            exits: RefCell::default(),
            running: RefCell::default(),
            pending: Cell::new(0),
        })
    }

    /// Records that a process is there, for whoever has to clean up after this shim.
    pub(crate) fn start(&self, start: StartRecord) {
        self.append(&[Record::Start(start.clone())]);
        self.exits.borrow_mut().remove(&start.id);
        self.running.borrow_mut().insert(start.id.clone(), start);
    }

    /// The processes that have not ended.
    pub(crate) fn running(&self) -> Vec<StartRecord> {
        self.running.borrow().values().cloned().collect()
    }

    /// Records how a process ended. To be called before anybody is told.
    pub(crate) fn exit(&self, exit: ExitRecord) {
        self.append(&[Record::Exit(exit.clone())]);
        self.running.borrow_mut().remove(&exit.id);
        self.exits.borrow_mut().insert(exit.id.clone(), exit);
    }

    /// Forgets the exit of a deleted exec.
    pub(crate) fn forget(&self, exec_id: &str) {
        let running = self.running.borrow_mut().remove(exec_id).is_some();
        if self.exits.borrow_mut().remove(exec_id).is_some() || running {
            self.append(&[Record::Forgotten(exec_id.to_owned())]);
        }
        self.compact();
    }

    /// Appends; a failure costs durability alone, and is logged.
    fn append(&self, records: &[Record]) -> Option<u64> {
        match self.journal.borrow_mut().append(records) {
            Ok(offsets) => offsets.first().copied(),
            Err(error) => {
                log::error(chain(&error));
                None
            }
        }
    }

    fn compact(&self) {
        let mut journal = self.journal.borrow_mut();
        if self.pending.get() > 0 || journal.length() < COMPACT_AT {
            return;
        }
        let mut kept: Vec<Record> = self.running.borrow().values().cloned().map(Record::Start).collect();
        kept.extend(self.exits.borrow().values().cloned().map(Record::Exit));
        // The bundle may be gone already; then the file is too, as soon as nobody holds it.
        if let Err(error) = journal.rewrite(&kept) {
            log::debug(chain(&error));
        }
    }
}

enum Place {
    Journal(Rc<ContainerJournal>, u64),
    Memory(Box<EventRecord>),
}

struct Queued {
    sequence: u64,
    place: Place,
}

/// The queue of events of a shim.
pub(crate) struct Outbox {
    namespace: String,
    sequence: Cell<u64>,
    queue: RefCell<VecDeque<Queued>>,
    changed: Condition,
    poked: Cell<bool>,
}

impl Outbox {
    /// An empty queue. Its numbers begin with the time, so that they rise also from shim to shim of one
    /// bundle.
    pub(crate) fn new(namespace: String) -> Outbox {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Outbox {
            namespace,
            sequence: Cell::new(u64::try_from(now.as_nanos()).unwrap_or(1)),
            queue: RefCell::default(),
            changed: Condition::default(),
            poked: Cell::new(false),
        }
    }

    /// Records an event and queues it. Returns its number at once.
    pub(crate) fn publish<M: Name>(&self, journal: &Rc<ContainerJournal>, topic: &str, event: &M) -> u64 {
        let sequence = self.sequence.get() + 1;
        self.sequence.set(sequence);
        let now = Timestamp::from(SystemTime::now());
        let record = EventRecord {
            sequence,
            seconds: now.seconds,
            nanos: now.nanos,
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            type_url: M::full_name(),
            value: event.encode_to_vec(),
        };
        let record = Record::Event(record);
        let place = match (journal.append(std::slice::from_ref(&record)), record) {
            (Some(offset), _) => Place::Journal(journal.clone(), offset),
            (None, Record::Event(record)) => Place::Memory(Box::new(record)),
            (None, _) => return sequence,
        };
        if let Place::Journal(journal, _) = &place {
            journal.pending.set(journal.pending.get() + 1);
        }
        self.queue.borrow_mut().push_back(Queued { sequence, place });
        self.changed.changed();
        sequence
    }

    /// Whether the event of this number has not been sent yet.
    pub(crate) fn waits(&self, sequence: u64) -> bool {
        self.queue.borrow().front().is_some_and(|first| first.sequence <= sequence)
    }

    /// Has a waiting sender try again at once.
    pub(crate) fn poke(&self) {
        self.poked.set(true);
        self.changed.changed();
    }

    /// The number of events that have not been sent.
    pub(crate) fn length(&self) -> usize {
        self.queue.borrow().len()
    }

    /// Waits until every event is sent.
    pub(crate) async fn empty(&self) {
        self.changed.until(|| self.queue.borrow().is_empty()).await;
    }

    /// Sends events for ever.
    pub(crate) async fn run(self: Rc<Outbox>, mut publisher: Publisher) {
        let mut retry = FIRST_RETRY;
        loop {
            self.changed.until(|| !self.queue.borrow().is_empty()).await;
            // What the daemon is being told is not told again by the program after an upgrade.
            let busy = Busy::admitted().await;
            let Some(event) = self.first() else { continue };
            // Before the attempt: a daemon that comes while an old one keeps us waiting is a reason for another one.
            self.poked.set(false);
            let request = ForwardRequest { envelope: Some(envelope(event)) };
            let forwarded = publisher.forward(&request.encode_to_vec()).await;
            drop(busy);
            match forwarded {
                Ok(()) => {
                    self.sent(true);
                    retry = FIRST_RETRY;
                }
                Err(error) if refused(&error) => {
                    // It would be refused for ever, and with it all that come after it. It stays in the
                    // journal.
                    log::error(format_args!("daemon refuses event: {error}"));
                    self.sent(false);
                }
                Err(error) => {
                    log::debug(format_args!("forward event: {error}"));
                    let poked = self.changed.until(|| self.poked.get());
                    if let Either::First(()) = race(poked, sleep(retry)).await {
                        retry = FIRST_RETRY;
                    } else {
                        retry = (retry * 2).min(LAST_RETRY);
                    }
                }
            }
        }
    }

    /// The event at the head of the queue. One that cannot be read back is given up.
    fn first(&self) -> Option<EventRecord> {
        let read = match &self.queue.borrow().front()?.place {
            Place::Journal(journal, offset) => journal.journal.borrow().event(*offset),
            Place::Memory(event) => Ok(EventRecord::clone(event)),
        };
        match read {
            Ok(event) => Some(event),
            Err(error) => {
                log::error(chain(&error));
                self.sent(false);
                None
            }
        }
    }

    fn sent(&self, acknowledged: bool) {
        let Some(queued) = self.queue.borrow_mut().pop_front() else { return };
        if let Place::Journal(journal, _) = queued.place {
            if acknowledged {
                journal.append(&[Record::Sent(queued.sequence)]);
            }
            journal.pending.set(journal.pending.get() - 1);
            journal.compact();
        }
        self.changed.changed();
    }
}

/// Whether the daemon will never take the event, whenever it is sent.
fn refused(error: &RpcError) -> bool {
    matches!(error.code, ErrorCode::InvalidArgument | ErrorCode::ResourceExhausted)
}

fn envelope(event: EventRecord) -> Envelope {
    Envelope {
        timestamp: Some(Timestamp { seconds: event.seconds, nanos: event.nanos }),
        namespace: event.namespace,
        topic: event.topic,
        event: Some(Any { type_url: event.type_url, value: event.value }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    use davit_proto::containerd::events::TaskStart;
    use davit_shim_protocol::journal;

    use super::*;
    use crate::executor::{run, spawn};
    use crate::offload;

    /// A daemon that comes while the shim is still waiting for the answer of one that is going. If nobody noticed, eight
    /// rounds would take a minute and a half.
    #[test]
    fn a_daemon_that_comes_during_an_attempt_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("events");
        let listener = UnixListener::bind(&socket).unwrap();
        let (asked, attempts) = mpsc::channel();
        let (hang_up, wait) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                stream.read_exact(&mut [0; 10]).unwrap();
                if asked.send(()).is_err() || wait.recv().is_err() {
                    return;
                }
            }
        });
        let path = folder.path().join(journal::FILE_NAME);
        let address = socket.display().to_string();
        let begun = std::time::Instant::now();
        run(async move {
            let outbox = Rc::new(Outbox::new("ns".to_owned()));
            let journal = Rc::new(ContainerJournal::create(&path).unwrap());
            outbox.publish(&journal, "/tasks/start", &TaskStart::default());
            spawn(outbox.clone().run(Publisher::new(&address, "ns".to_owned())));
            let attempts = std::sync::Arc::new(std::sync::Mutex::new(attempts));
            for _ in 0..8 {
                let attempts = attempts.clone();
                offload::wait_for(move || attempts.lock().unwrap().recv().unwrap()).await;
                outbox.poke();
                hang_up.send(()).unwrap();
            }
        });
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    }
}
