//! What a transfer tells while it runs.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use davit_oci::image::Descriptor;

/// How often bytes are told of.
const NEWS: Duration = Duration::from_millis(100);

/// How far something has come; the words are those that `ctr` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is known that something is to be moved, but it has not begun.
    Waiting,
    /// Bytes come in.
    Downloading,
    /// Bytes go out.
    Uploading,
    /// Nothing has to be moved: it is there.
    Exists,
    /// The registry took it from another of its repositories.
    Mounted,
    /// All of it was moved.
    Done,
}

impl State {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Waiting => "waiting",
            State::Downloading => "downloading",
            State::Uploading => "uploading",
            State::Exists => "exists",
            State::Mounted => "mounted",
            State::Done => "done",
        }
    }
}

/// One piece of news.
#[derive(Debug, Clone)]
pub struct Progress {
    /// What has happened.
    pub state: State,
    /// The name of what is moved, such as `layer-sha256:…`, by which containerd's clients know the ingest.
    pub reference: String,
    /// What is moved.
    pub descriptor: Descriptor,
    /// The name of the document that names it; none for the outermost one.
    pub parent: Option<String>,
    /// Bytes moved.
    pub offset: u64,
    /// Bytes to move; 0 if unknown.
    pub total: u64,
}

/// Who is told. The calls come from several tasks and must be quick; those of one thing come in order, and bytes are
/// told of at most ten times a second.
pub trait Observer: Send + Sync {
    /// Takes one piece of news.
    fn progress(&self, progress: Progress);
}

/// Nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn progress(&self, _: Progress) {}
}

/// The pace at which bytes are told of.
pub(crate) struct Pace(Mutex<Instant>);

impl Pace {
    /// A pace that begins now.
    pub(crate) fn new() -> Pace {
        Pace(Mutex::new(Instant::now()))
    }

    /// Whether it is time for news.
    pub(crate) fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.elapsed() >= NEWS;
        if is_due {
            *last = Instant::now();
        }
        is_due
    }
}
