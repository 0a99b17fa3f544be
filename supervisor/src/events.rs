//! The event hub: what happened, told in order to everyone who listens, and kept in the [`History`].
//!
//! containerd's `Subscribe` is live only: no replay, no acknowledgement, all namespaces unless filtered. The hub
//! keeps to that with one addition. Exits that shims recorded while no daemon ran arrive when the next daemon
//! reconnects, within the same moment in which clients reconnect; who comes first is chance. So events older than
//! the daemon itself are kept during a short window after start, and a subscriber that comes within the window is
//! given them first. Nothing is shown twice to one subscriber by this: it either was there when such an event
//! was published or it gets it from the window.
//!
//! A shim repeats an event until it is acknowledged; the hub knows the last [`RECENT`] of what came so and drops
//! what comes again ([`Hub::publish_once`]). What an earlier daemon has put into the history and a shim repeats, because
//! that daemon died before it could answer, is told to subscribers, for nobody knows whom it reached, but kept once.
//!
//! A subscriber that does not read is cut off when its queue is full ([`QUEUE`] events); it never slows the
//! publisher down and never grows the daemon without bound.

mod history;
mod query;
mod recent;
mod record;

use std::borrow::Cow;
use std::hash::{BuildHasher, DefaultHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use davit_model::filter::{Adaptor, Filter, label_field, text_field};
use davit_model::{Any, Labels};
use tokio::sync::mpsc;

pub use history::History;
pub use query::{Found, Query, Since};
use recent::Recent;

/// The events that a subscriber may lag behind before it is cut off.
pub const QUEUE: usize = 16 * 1024;

/// The most events kept for subscribers that come right after start.
const WINDOW_EVENTS: usize = 16 * 1024;

/// The events of shims that are remembered so that one that comes again is known. A shim sends one event at a time, so
/// that no more than one of each shim can ever come again.
pub const RECENT: usize = 16 * 1024;

/// One event with its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// When it happened, by the clock of who published it.
    pub timestamp: SystemTime,
    /// The namespace it happened in.
    pub namespace: String,
    /// `/tasks/exit` and the like.
    pub topic: String,
    /// The event's message.
    pub event: Any,
    /// Why the daemon says it, where no shim and no client did.
    pub cause: Cause,
}

/// Why the daemon reports an exit that no shim reported. containerd's messages have no place for it; the history has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cause {
    /// None: what happened was seen by who reported it.
    #[default]
    None,
    /// The shim was killed or crashed, and what it left of its container was killed; how the process would have ended
    /// nobody knows.
    ShimKilled,
}

impl Cause {
    /// The name, as clients see it; empty for [`Cause::None`].
    pub fn name(self) -> &'static str {
        match self {
            Cause::None => "",
            Cause::ShimKilled => "shim-killed",
        }
    }

    /// The cause of a name; [`Cause::None`] for one that only a later release knows.
    pub fn from_name(name: &str) -> Cause {
        if name == Cause::ShimKilled.name() { Cause::ShimKilled } else { Cause::None }
    }
}

/// What filters such as `event.container_id==web` may ask of an event's message: texts and labels, as with containerd. A
/// text that is empty counts as absent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields {
    /// Texts by the names of their fields.
    pub texts: Vec<(&'static str, String)>,
    /// The message's labels, if it has such.
    pub labels: Labels,
}

impl Adaptor for Fields {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        let (name, rest) = path.split_first()?;
        if name == "labels" {
            return label_field(&self.labels, rest);
        }
        let text = self.texts.iter().find(|(field, _)| field == name);
        text.and_then(|(_, text)| text_field(text))
    }
}

/// An event that may come again, and by what it is known then.
#[derive(Debug, Clone)]
pub struct Report {
    envelope: Envelope,
    occurrence: u64,
}

/// What only those can say of an event who know the protobuf types.
#[derive(Clone, Copy)]
pub struct Reading {
    /// The fields of an event's message.
    pub fields: fn(&Any) -> Fields,
    /// Hashes what makes an event one of its own: two reports with the same hash tell of the same occurrence.
    pub occurrence: fn(&Envelope, &mut DefaultHasher),
}

/// The hub. Clones are the same hub.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
}

struct Shared {
    started: SystemTime,
    reading: Reading,
    history: Option<History>,
    /// Hashes occurrences. Its seed is random, so that nobody can make events that are taken for others.
    hashes: Seeded,
    state: Mutex<State>,
}

/// The hasher of occurrences.
struct Seeded(RandomState);

impl Seeded {
    fn occurrence(&self, reading: &Reading, envelope: &Envelope) -> u64 {
        let mut hasher = self.0.build_hasher();
        (reading.occurrence)(envelope, &mut hasher);
        hasher.finish()
    }
}

struct State {
    subscribers: Vec<Subscriber>,
    /// What came from shims.
    recent: Recent<u64>,
    /// What earlier daemons have put into the history.
    earlier: Recent<u64>,
    /// Events older than the daemon, while the window is open.
    window: Option<Vec<Arc<Published>>>,
}

/// An event, read once for all filters.
struct Published {
    envelope: Arc<Envelope>,
    fields: Fields,
}

struct Subscriber {
    filter: Filter,
    queue: mpsc::Sender<Arc<Envelope>>,
}

/// The receiving end of a subscription. Dropping it ends the subscription.
pub type Subscription = mpsc::Receiver<Arc<Envelope>>;

impl Hub {
    /// A hub without a history. Its window is open.
    pub fn new(reading: Reading) -> Hub {
        Hub::open(reading, None)
    }

    /// A hub that keeps what it is told. It looks through the end of the history, and so blocks.
    pub fn with_history(reading: Reading, history: History) -> Hub {
        Hub::open(reading, Some(history))
    }

    fn open(reading: Reading, history: Option<History>) -> Hub {
        let hashes = Seeded(RandomState::new());
        let mut earlier = Recent::new(RECENT);
        if let Some(history) = &history {
            history.for_each_earlier(|envelope| {
                earlier.insert(hashes.occurrence(&reading, &envelope));
            });
        }
        let (recent, window) = (Recent::new(RECENT), Some(Vec::new()));
        let state = Mutex::new(State { subscribers: Vec::new(), recent, earlier, window });
        let started = SystemTime::now();
        Hub { shared: Arc::new(Shared { started, reading, history, hashes, state }) }
    }

    /// Closes the window: from now on a new subscriber sees live events only.
    pub fn close_window(&self) {
        self.state().window = None;
    }

    /// Tells every subscriber and the history, in the order of the calls. Never waits.
    pub fn publish(&self, envelope: Envelope) {
        let published = self.read(envelope);
        let mut state = self.state();
        self.keep(&published);
        self.tell(&mut state, published);
    }

    /// Looks at what makes an event that may come again one of its own.
    pub fn report(&self, envelope: Envelope) -> Report {
        let occurrence = self.shared.hashes.occurrence(&self.shared.reading, &envelope);
        Report { envelope, occurrence }
    }

    /// The same for an event that may come again: from a shim, or of what a shim may have told already. False when it
    /// has been told before.
    pub fn publish_once(&self, Report { envelope, occurrence }: Report) -> bool {
        let published = self.read(envelope);
        let mut state = self.state();
        if !state.recent.insert(occurrence) {
            return false;
        }
        if !state.earlier.contains(occurrence) {
            self.keep(&published);
        }
        self.tell(&mut state, published);
        true
    }

    /// Returns when everything that was published before the call survives the death of the daemon. See
    /// [`History::recorded`].
    pub async fn recorded(&self) {
        if let Some(history) = &self.shared.history {
            history.recorded().await;
        }
    }

    /// Whether [`publish_once`](Hub::publish_once) would drop it.
    pub fn has_told(&self, report: &Report) -> bool {
        self.state().recent.contains(report.occurrence)
    }

    /// Reads the event for all filters. To be done before the lock, behind which all publishers wait.
    fn read(&self, envelope: Envelope) -> Arc<Published> {
        let fields = (self.shared.reading.fields)(&envelope.event);
        Arc::new(Published { envelope: Arc::new(envelope), fields })
    }

    /// To be called under the lock, so that cursors rise as subscribers are told.
    fn keep(&self, published: &Published) {
        if let Some(history) = &self.shared.history {
            history.append(&published.envelope);
        }
    }

    fn tell(&self, state: &mut State, published: Arc<Published>) {
        if published.envelope.timestamp < self.shared.started
            && let Some(window) = &mut state.window
            && window.len() < WINDOW_EVENTS
        {
            window.push(published.clone());
        }
        state.subscribers.retain(|subscriber| subscriber.offer(&published));
    }

    /// A subscription to all events that match. The receiver ends when the hub is dropped or the subscriber
    /// has fallen [`QUEUE`] events behind.
    pub fn subscribe(&self, filter: Filter) -> Subscription {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let subscriber = Subscriber { filter, queue };
        let mut state = self.state();
        let kept = state.window.iter().flatten().all(|published| subscriber.offer(published));
        if kept {
            state.subscribers.push(subscriber);
        }
        receiver
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held cannot leave the lists half changed.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber {
    /// False when the subscriber is gone or too far behind.
    fn offer(&self, published: &Published) -> bool {
        let asked = Asked { envelope: &published.envelope, fields: &published.fields };
        if !self.filter.matches(&asked) {
            return !self.queue.is_closed();
        }
        match self.queue.try_send(published.envelope.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(lag = QUEUE, "event subscriber does not read and is cut off");
                false
            }
        }
    }
}

/// What a filter may ask: `namespace`, `topic`, `event.…`, and `cause`, which containerd does not have.
struct Asked<'a> {
    envelope: &'a Envelope,
    fields: &'a Fields,
}

impl Adaptor for Asked<'_> {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first().map(String::as_str)? {
            "namespace" => Some(Cow::Borrowed(&self.envelope.namespace)),
            "topic" => Some(Cow::Borrowed(&self.envelope.topic)),
            "event" => self.fields.field(&path[1..]),
            "cause" => text_field(self.envelope.cause.name()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
