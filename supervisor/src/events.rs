//! The event hub: what happened, told in order to everyone who listens.
//!
//! containerd's `Subscribe` is live only: no replay, no acknowledgement, all namespaces unless filtered. The hub
//! keeps to that with one addition. Exits that shims recorded while no daemon ran arrive when the next daemon
//! reconnects, within the same moment in which clients reconnect; who comes first is chance. So events older than
//! the daemon itself are kept during a short window after start, and a subscriber that comes within the window is
//! given them first. Nothing is shown twice to one subscriber by this: it either was there when such an event
//! was published or it gets it from the window.
//!
//! A shim repeats an event until it is acknowledged; the hub knows the last [`RECENT`] of what came so and drops
//! what comes again ([`Hub::publish_once`]).
//!
//! A subscriber that does not read is cut off when its queue is full ([`QUEUE`] events); it never slows the
//! publisher down and never grows the daemon without bound.

mod recent;

use std::borrow::Cow;
use std::hash::{BuildHasher, DefaultHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use davit_model::filter::{Adaptor, Filter, label_field, text_field};
use davit_model::{Any, Labels};
use tokio::sync::mpsc;

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
    /// The shim lives but did not answer in its time.
    ShimUnreachable,
}

impl Cause {
    /// All but [`Cause::None`].
    const NAMED: [Cause; 2] = [Cause::ShimKilled, Cause::ShimUnreachable];

    /// The name, as clients see it; empty for [`Cause::None`].
    pub fn name(self) -> &'static str {
        match self {
            Cause::None => "",
            Cause::ShimKilled => "shim-killed",
            Cause::ShimUnreachable => "shim-unreachable",
        }
    }

    /// The cause of a name; [`Cause::None`] for one that only a later release knows.
    pub fn from_name(name: &str) -> Cause {
        Cause::NAMED.into_iter().find(|cause| cause.name() == name).unwrap_or_default()
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
    /// A hub whose window is open.
    pub fn new(reading: Reading) -> Hub {
        let state = State { subscribers: Vec::new(), recent: Recent::new(RECENT), window: Some(Vec::new()) };
        let shared = Shared {
            started: SystemTime::now(),
            reading,
            hashes: Seeded(RandomState::new()),
            state: Mutex::new(state),
        };
        Hub { shared: Arc::new(shared) }
    }

    /// Closes the window: from now on a new subscriber sees live events only.
    pub fn close_window(&self) {
        self.state().window = None;
    }

    /// Tells every subscriber, in the order of the calls. Never waits.
    pub fn publish(&self, envelope: Envelope) {
        let published = self.read(envelope);
        self.tell(&mut self.state(), published);
    }

    /// The same for an event that may come again: from a shim, or of what a shim may have told already. False when it
    /// has been told before.
    pub fn publish_once(&self, envelope: Envelope) -> bool {
        let occurrence = self.shared.hashes.occurrence(&self.shared.reading, &envelope);
        let published = self.read(envelope);
        let mut state = self.state();
        if !state.recent.insert(occurrence) {
            return false;
        }
        self.tell(&mut state, published);
        true
    }

    /// Whether [`publish_once`](Hub::publish_once) would drop it.
    pub fn has_told(&self, envelope: &Envelope) -> bool {
        let occurrence = self.shared.hashes.occurrence(&self.shared.reading, envelope);
        self.state().recent.contains(occurrence)
    }

    /// Reads the event for all filters. To be done before the lock, behind which all publishers wait.
    fn read(&self, envelope: Envelope) -> Arc<Published> {
        let fields = (self.shared.reading.fields)(&envelope.event);
        Arc::new(Published { envelope: Arc::new(envelope), fields })
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
        if !self.filter.matches(published) {
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

/// What a filter may ask: `namespace`, `topic`, `event.…`.
impl Adaptor for Published {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first().map(String::as_str)? {
            "namespace" => Some(Cow::Borrowed(&self.envelope.namespace)),
            "topic" => Some(Cow::Borrowed(&self.envelope.topic)),
            "event" => self.fields.field(&path[1..]),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hash::Hash;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    fn envelope(topic: &str, timestamp: SystemTime) -> Envelope {
        Envelope {
            timestamp,
            namespace: "n".into(),
            topic: topic.into(),
            event: Any::default(),
            cause: Cause::None,
        }
    }

    fn hub() -> Hub {
        hub_with(|_| Fields { texts: vec![("id", "x".to_owned())], ..Fields::default() })
    }

    fn hub_with(fields: fn(&Any) -> Fields) -> Hub {
        Hub::new(Reading { fields, occurrence: |envelope, hasher| envelope.topic.hash(hasher) })
    }

    fn filter(text: &str) -> Filter {
        Filter::parse(&[text.to_owned()]).unwrap()
    }

    #[test]
    fn filters_and_order() {
        let hub = hub();
        let mut all = hub.subscribe(filter(""));
        let mut some = hub.subscribe(filter(r#"topic=="/b",event.id==x"#));
        for topic in ["/a", "/b"] {
            hub.publish(envelope(topic, SystemTime::now()));
        }
        assert_eq!(all.try_recv().unwrap().topic, "/a");
        assert_eq!(all.try_recv().unwrap().topic, "/b");
        assert_eq!(some.try_recv().unwrap().topic, "/b");
        assert!(some.try_recv().is_err());
    }

    #[test]
    fn an_event_is_read_once_however_many_filters_ask() {
        static READ: AtomicUsize = AtomicUsize::new(0);
        let hub = hub_with(|_| {
            READ.fetch_add(1, Ordering::Relaxed);
            Fields { texts: vec![("id", "x".to_owned()), ("empty", String::new())], ..Fields::default() }
        });
        let wants = |text: &str| filter(text);
        let mut found = [hub.subscribe(wants("event.id==x,event.id")), hub.subscribe(wants("event.id!=y"))];
        let mut not = hub.subscribe(Filter::parse(&["event.empty".into(), "event".into()]).unwrap());
        hub.publish(envelope("/old", SystemTime::now() - Duration::from_secs(60)));
        for subscription in &mut found {
            assert_eq!(subscription.try_recv().unwrap().topic, "/old");
        }
        assert!(not.try_recv().is_err());
        assert!(hub.subscribe(wants("event.id==x")).try_recv().is_ok());
        assert_eq!(READ.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn what_comes_again_is_dropped() {
        let hub = hub();
        let mut all = hub.subscribe(filter(""));
        for (topic, new) in [("/a", true), ("/b", true), ("/a", false)] {
            let envelope = envelope(topic, SystemTime::now());
            assert_eq!(hub.has_told(&envelope), !new);
            assert_eq!(hub.publish_once(envelope), new);
        }
        // A client may say the same as often as it likes.
        hub.publish(envelope("/a", SystemTime::now()));
        let topics: Vec<_> =
            std::iter::from_fn(|| all.try_recv().ok()).map(|event| event.topic.clone()).collect();
        assert_eq!(topics, ["/a", "/b", "/a"]);
    }

    #[test]
    fn only_events_older_than_the_daemon_wait_for_a_late_subscriber() {
        let hub = hub();
        let before = SystemTime::now() - Duration::from_secs(60);
        hub.publish(envelope("/old", before));
        hub.publish(envelope("/live", SystemTime::now()));
        let mut late = hub.subscribe(filter(""));
        assert_eq!(late.try_recv().unwrap().topic, "/old");
        assert!(late.try_recv().is_err());
        hub.close_window();
        assert!(hub.subscribe(filter("")).try_recv().is_err());
    }

    #[test]
    fn a_subscriber_that_does_not_read_is_cut_off_and_others_go_on() {
        let hub = hub();
        let mut stuck = hub.subscribe(filter(""));
        for _ in 0..QUEUE + 1 {
            hub.publish(envelope("/a", SystemTime::now()));
        }
        let mut count = 0;
        while stuck.blocking_recv().is_some() {
            count += 1;
        }
        assert_eq!(count, QUEUE);
        let mut other = hub.subscribe(filter(""));
        hub.publish(envelope("/b", SystemTime::now()));
        assert_eq!(other.try_recv().unwrap().topic, "/b");
    }
}
