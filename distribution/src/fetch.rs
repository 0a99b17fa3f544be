//! Fetching content by its descriptor: from the hosts in turn, from an offset on, and never more than it has.
//!
//! The life of one blob, however often its connection breaks:
//!
//! ```text
//!           ┌──────────── broke off, too slow: the rest is asked for ─────────────┐
//!           ▼                                                                     │
//! open(offset) ── 206: goes on, 200: what is there is skipped ──▶ bytes ──▶ all there ──▶ digest right ──▶ done
//!           ▲                                                       │                        │
//!           └── from the next host, from the start ◀── too many ────┴──── digest wrong ◀─────┘
//! ```

use std::time::Duration;

use bytes::Bytes;
use davit_model::Digest;
use davit_oci::image::Descriptor;
use davit_oci::media_type;
use http::header::{CONTENT_RANGE, RANGE};
use http::{HeaderValue, Method};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::endpoint::{Ask, Endpoint, failure};
use crate::error::Error;
use crate::repository::{Operation, Repository, Worst, check_digest};
use crate::retry::Backoff;
use crate::store::{SinkError, SinkWriter};
use crate::transport::Response;

/// An attempt that brings as much is not counted as a failure when it breaks off.
const WORTHWHILE: u64 = 1 << 20;
/// How often a blob may break off at a host while there is another one.
const PATIENCE: usize = 2;
/// Pieces of a response that wait to be written.
const QUEUE: usize = 8;

/// Content on its way.
#[derive(Debug)]
pub struct Download {
    response: Response,
    /// The place of its host.
    host: usize,
    digest: Digest,
    /// Bytes to leave out: the host sends all although the rest was asked for.
    skip: u64,
    /// Bytes still to come.
    left: u64,
    size: u64,
}

impl Download {
    /// The next bytes; `None` when all have come.
    ///
    /// # Errors
    /// A broken connection, and a response that ends early or does not end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            let url = self.response.shown();
            let chunk = self.response.chunk().await;
            let mut bytes = match chunk {
                Ok(Some(bytes)) => bytes,
                Ok(None) if self.left == 0 => return Ok(None),
                Ok(None) => return Err(self.wrong_size(Some(self.size - self.left))),
                // All is here; how the connection ends is of no interest.
                Err(_) if self.left == 0 => return Ok(None),
                Err(source) => return Err(Error::Transport { method: Method::GET, url, source }),
            };
            let skipped = self.skip.min(bytes.len() as u64);
            self.skip -= skipped;
            // No more than the length of a piece, which is in memory.
            drop(bytes.split_to(skipped as usize));
            if bytes.is_empty() {
                continue;
            }
            let length = bytes.len() as u64;
            self.left = self.left.checked_sub(length).ok_or_else(|| self.wrong_size(None))?;
            return Ok(Some(bytes));
        }
    }

    fn wrong_size(&self, actual: Option<u64>) -> Error {
        let url = self.response.shown();
        Error::WrongSize { digest: self.digest.clone(), url, actual, expected: self.size }
    }
}

impl Repository {
    /// Begins to fetch content at an offset, from the first host that has it.
    ///
    /// # Errors
    /// [`Error::Descriptor`] for an offset at or behind the end; [`Error::NotFound`]; what the host that came farthest
    /// had to say.
    pub async fn open(&self, descriptor: &Descriptor, offset: u64) -> Result<Download, Error> {
        self.open_at(descriptor, offset, &[]).await
    }

    /// The same, from other hosts than those at the `excluded` places.
    async fn open_at(
        &self,
        descriptor: &Descriptor,
        offset: u64,
        excluded: &[usize],
    ) -> Result<Download, Error> {
        if offset >= descriptor.size {
            let reason = "there is nothing to fetch at this offset";
            return Err(Error::Descriptor { digest: descriptor.digest.clone(), reason });
        }
        let hosts = self.hosts(Operation::Pull, excluded)?;
        let scopes = self.scopes(Operation::Pull);
        let name = descriptor.media_type.as_str();
        let is_document = media_type::is_manifest(name) || media_type::is_index(name);
        let kind = if is_document { "manifests" } else { "blobs" };
        let path = self.path(&format!("{kind}/{}", descriptor.digest));
        let mut worst = Worst::default();
        for (index, (place, endpoint)) in hosts.iter().enumerate() {
            let mut ask = Ask::new(Method::GET, path.clone(), &scopes).accept(&[name, "*/*"]);
            ask.last = index + 1 == hosts.len();
            match fetch_at(endpoint, ask, descriptor, offset).await {
                Ok((response, skip)) => {
                    return Ok(Download {
                        response,
                        host: *place,
                        digest: descriptor.digest.clone(),
                        skip,
                        left: descriptor.size - offset,
                        size: descriptor.size,
                    });
                }
                Err(error) => worst.note(endpoint.name(), error),
            }
        }
        let missing = || Error::NotFound {
            what: format!("could not fetch content descriptor {} ({name}) from remote", descriptor.digest),
        };
        let error = worst.into_error(missing);
        Err(if error.is_not_found() { missing() } else { error })
    }

    /// Fetches what a writer lacks, and hands the writer back when it has all of it with the right digest. `told` is
    /// called with the number of bytes that are there.
    pub(crate) async fn fetch(
        &self,
        descriptor: &Descriptor,
        mut writer: Box<dyn SinkWriter>,
        backoff: &mut Backoff,
        told: &(dyn Fn(u64) + Sync),
    ) -> Result<Box<dyn SinkWriter>, Error> {
        if descriptor.size == 0 {
            // Registries that do not say a size make manifests of such. containerd refuses them, too.
            let reason = "it reports a content size of zero";
            return Err(Error::Descriptor { digest: descriptor.digest.clone(), reason });
        }
        let mut trouble = Trouble { backoff, excluded: Vec::new(), broken: vec![0; self.endpoints.len()] };
        loop {
            let before = writer.offset();
            let (mut host, mut result) = (None, Ok(()));
            if before < descriptor.size {
                let download = self.open_at(descriptor, before, &trouble.excluded).await?;
                host = Some(download.host);
                (writer, result) = pump(download, writer, told).await?;
            }
            let Err(error) = result.and_then(|()| self.verify(descriptor, &*writer, host)) else {
                return Ok(writer);
            };
            let gained = writer.offset().saturating_sub(before);
            let remedy = trouble.after(self, error, host, before > 0, gained)?;
            if remedy.from_the_start {
                writer = truncate(writer).await?;
                told(0);
            }
            debug!(digest = %descriptor.digest, offset = writer.offset(), "going on");
            tokio::time::sleep(remedy.pause).await;
        }
    }

    /// Whether a writer has what the descriptor says; `host` sent the last of it.
    fn verify(
        &self,
        descriptor: &Descriptor,
        writer: &dyn SinkWriter,
        host: Option<usize>,
    ) -> Result<(), Error> {
        let actual = writer.digest();
        if writer.offset() == descriptor.size && actual == descriptor.digest {
            return Ok(());
        }
        let url = host.map_or("the local ingest", |host| self.endpoints[host].name()).to_owned();
        warn!(expected = %descriptor.digest, %actual, from = url, "content has another digest");
        Err(Error::WrongDigest { url, actual: actual.to_string(), expected: descriptor.digest.clone() })
    }
}

/// What went wrong with a blob so far.
struct Trouble<'a> {
    backoff: &'a mut Backoff,
    /// The places of hosts that are not asked any more.
    excluded: Vec<usize>,
    /// For each host, how often its responses broke off.
    broken: Vec<usize>,
}

/// How to go on.
struct Remedy {
    /// What is there is not to be relied on.
    from_the_start: bool,
    pause: Duration,
}

impl Trouble<'_> {
    /// What to do after an error of `host`, which added `gained` bytes to what was there if it was `resumed`.
    ///
    /// # Errors
    /// The error itself, if nothing can be done.
    fn after(
        &mut self,
        repository: &Repository,
        error: Error,
        host: Option<usize>,
        resumed: bool,
        gained: u64,
    ) -> Result<Remedy, Error> {
        if resumed && matches!(error, Error::WrongDigest { .. }) {
            // The part that was there may be what is wrong, and not the host.
            let pause = self.backoff.after_failure(None).ok_or(error)?;
            return Ok(Remedy { from_the_start: true, pause });
        }
        let host = match host {
            Some(host) if !matches!(error, Error::Store { .. }) => host,
            _ => return Err(error),
        };
        let hosts_but =
            |excluded: &[usize]| repository.hosts(Operation::Pull, excluded).map_or(0, |left| left.len());
        // A response that ended too early is like one that broke off.
        let broke_off = error.is_transient() || matches!(error, Error::WrongSize { actual: Some(_), .. });
        if broke_off {
            self.broken[host] += 1;
            if gained >= WORTHWHILE {
                self.backoff.reset();
                self.broken[host] = 0;
            }
            if self.broken[host] < PATIENCE || hosts_but(&self.excluded) < 2 {
                let pause = self.backoff.after_failure(None).ok_or(error)?;
                return Ok(Remedy { from_the_start: false, pause });
            }
        }
        self.excluded.push(host);
        if hosts_but(&self.excluded) == 0 {
            return Err(error);
        }
        Ok(Remedy { from_the_start: !broke_off, pause: Duration::ZERO })
    }
}

async fn truncate(mut writer: Box<dyn SinkWriter>) -> Result<Box<dyn SinkWriter>, Error> {
    let task = tokio::task::spawn_blocking(move || (writer.truncate(), writer));
    let (result, writer) = task.await.map_err(|_| Error::Task { task: "truncating" })?;
    result.map_err(|source| Error::Store { action: "truncate", source })?;
    Ok(writer)
}

/// Asks one host; returns the response and how many of its bytes are to be left out.
async fn fetch_at(
    endpoint: &Endpoint,
    mut ask: Ask<'_>,
    descriptor: &Descriptor,
    offset: u64,
) -> Result<(Response, u64), Error> {
    if offset > 0 {
        // With its end: there are registries that refuse an open range.
        let range = format!("bytes={offset}-{}", descriptor.size - 1);
        ask.headers.insert(RANGE, HeaderValue::from_str(&range).expect("digits are a header's value"));
    }
    let mut response = endpoint.send(&ask).await?;
    if response.status.as_u16() == 416 && offset > 0 {
        // It does not know ranges, or has less than it should, which its whole answer will tell.
        ask.headers.remove(RANGE);
        response = endpoint.send(&ask).await?;
    }
    let url = response.shown();
    let malformed = |reason| Error::Malformed { url: url.clone(), reason };
    let partial = match response.status.as_u16() {
        200 => false,
        206 if offset > 0 => true,
        206 => return Err(malformed("a part of it although all was asked for")),
        _ => return Err(failure(response, Method::GET).await),
    };
    // A `Content-Encoding` is ignored: none was asked for, and storage services send what was once stored with a blob.
    // The digest tells whether the bytes are the right ones.
    check_digest(&response, &descriptor.digest)?;
    if partial {
        let range = response.header(CONTENT_RANGE.as_str()).and_then(content_range);
        let (first, last, total) = range.ok_or_else(|| malformed("it does not say which part it is"))?;
        if first != offset || last != descriptor.size - 1 {
            return Err(malformed("it is another part than the one asked for"));
        }
        if total.is_some_and(|total| total != descriptor.size) {
            let digest = descriptor.digest.clone();
            return Err(Error::WrongSize { digest, url, actual: None, expected: descriptor.size });
        }
    }
    let expected = if partial { descriptor.size - offset } else { descriptor.size };
    if let Some(length) = response.content_length()
        && length != expected
    {
        let digest = descriptor.digest.clone();
        // No `actual`: what a host declares will not change by asking again.
        debug!(%digest, length, expected, "the declared length is not that of the descriptor");
        return Err(Error::WrongSize { digest, url, actual: None, expected: descriptor.size });
    }
    Ok((response, if partial { 0 } else { offset }))
}

/// `bytes first-last/total` (RFC 9110, section 14.4).
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((first.parse().ok()?, last.parse().ok()?, total))
}

type Written = (Box<dyn SinkWriter>, Result<(), SinkError>);

/// Writes pieces as they come, on a thread that may block.
fn start_writing(mut writer: Box<dyn SinkWriter>) -> (mpsc::Sender<Bytes>, JoinHandle<Written>) {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(QUEUE);
    let task = tokio::task::spawn_blocking(move || {
        while let Some(bytes) = receiver.blocking_recv() {
            if let Err(error) = writer.write(&bytes) {
                return (writer, Err(error));
            }
        }
        (writer, Ok(()))
    });
    (sender, task)
}

/// Moves a download into a writer. The writer comes back with what it got, whatever happened.
async fn pump(
    mut download: Download,
    writer: Box<dyn SinkWriter>,
    told: &(dyn Fn(u64) + Sync),
) -> Result<(Box<dyn SinkWriter>, Result<(), Error>), Error> {
    let (sender, task) = start_writing(writer);
    let result = loop {
        match download.chunk().await {
            Ok(Some(bytes)) => {
                // The thread ends before its channel only with an error, which it hands back below.
                if sender.send(bytes).await.is_err() {
                    break Ok(());
                }
                told(download.size - download.left);
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    drop(sender);
    let (writer, written) = task.await.map_err(|_| Error::Task { task: "writing" })?;
    match written {
        Ok(()) => Ok((writer, result)),
        Err(source) => Ok((writer, Err(Error::Store { action: "write", source }))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_responses() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, 9, None)));
        for bad in ["", "bytes */10", "bytes 5-9", "items 5-9/10", "bytes 5-x/10", "bytes -5-9/10"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
