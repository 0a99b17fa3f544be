//! The hub alone, and with its history.

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
        let report = hub.report(envelope);
        assert_eq!(hub.has_told(&report), !new);
        assert_eq!(hub.publish_once(report), new);
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

mod history {
    use super::*;
    use davit_history::Limits;
    use std::path::Path;
    use tokio::time::timeout;

    const LIMIT: Duration = Duration::from_secs(30);

    fn reading() -> Reading {
        let fields =
            |event: &Any| Fields { texts: vec![("id", event.type_url.clone())], ..Fields::default() };
        Reading { fields, occurrence: |envelope, hasher| envelope.topic.hash(hasher) }
    }

    fn open(folder: &Path) -> (Hub, History) {
        let history = History::open(folder, Limits::default()).unwrap();
        (Hub::with_history(reading(), history.clone()), history)
    }

    fn numbered(number: u32) -> Envelope {
        let event = Any { type_url: format!("id{}", number % 3), value: number.to_le_bytes().to_vec() };
        Envelope { event, ..envelope("/n", SystemTime::UNIX_EPOCH + Duration::from_secs(number.into())) }
    }

    fn all() -> Query {
        Query { since: Since::Cursor(0), until: None, filter: filter(""), limit: None, follow: false }
    }

    async fn query(history: &History, query: Query) -> Vec<(u64, Found)> {
        let mut receiver = history.query(reading(), query).await;
        let mut found = Vec::new();
        while let Some(one) = timeout(LIMIT, receiver.recv()).await.unwrap() {
            found.push(one);
        }
        found
    }

    fn events(found: &[(u64, Found)]) -> Vec<Envelope> {
        assert!(found.windows(2).all(|pair| pair[0].0 < pair[1].0), "cursors rise");
        let events = found.iter().filter_map(|(_, found)| match found {
            Found::Event(envelope) => Some(envelope.clone()),
            Found::Gap { .. } => None,
        });
        events.collect()
    }

    #[tokio::test]
    async fn what_an_earlier_daemon_kept_is_kept_once_and_told_again() {
        let folder = tempfile::tempdir().unwrap();
        let (hub, _killed) = open(folder.path());
        let exit = envelope("/tasks/exit", SystemTime::now());
        assert!(hub.publish_once(hub.report(exit.clone())));
        hub.recorded().await;
        // The daemon is killed here, before its answer. The next one hears of it again, twice.
        let (hub, history) = open(folder.path());
        let mut subscriber = hub.subscribe(filter(""));
        assert!(!hub.has_told(&hub.report(exit.clone())), "its owner is told");
        assert!(hub.publish_once(hub.report(exit.clone())));
        assert!(!hub.publish_once(hub.report(exit.clone())));
        assert_eq!(*subscriber.try_recv().unwrap(), exit);
        assert!(subscriber.try_recv().is_err());
        assert_eq!(events(&query(&history, all()).await), [exit]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_follower_misses_nothing_and_gets_nothing_twice() {
        const EVENTS: u32 = 3000;
        let folder = tempfile::tempdir().unwrap();
        let (hub, history) = open(folder.path());
        let publisher = hub.clone();
        let publishing = tokio::task::spawn_blocking(move || {
            for number in 0..EVENTS {
                publisher.publish(numbered(number));
            }
        });
        let mut followers = Vec::new();
        for _ in 0..3 {
            let from_the_start = Query { follow: true, ..all() };
            let mut receiver = history.query(reading(), from_the_start).await;
            followers.push(tokio::spawn(async move {
                let mut found = Vec::new();
                while found.len() < EVENTS as usize {
                    found.push(timeout(LIMIT, receiver.recv()).await.unwrap().unwrap());
                }
                found
            }));
        }
        publishing.await.unwrap();
        let expected: Vec<_> = (0..EVENTS).map(numbered).collect();
        for follower in followers {
            assert_eq!(events(&follower.await.unwrap()), expected);
        }
        // One that comes back goes on where it was.
        let found = query(&history, all()).await;
        let since = Since::Cursor(found[1233].0);
        assert_eq!(events(&query(&history, Query { since, ..all() }).await), expected[1234..]);
        // One that asks for what comes gets that.
        let mut live = history.query(reading(), Query { since: Since::Now, follow: true, ..all() }).await;
        hub.publish(numbered(7));
        let (_, found) = timeout(LIMIT, live.recv()).await.unwrap().unwrap();
        assert_eq!(found, Found::Event(numbered(7)));
    }

    #[tokio::test]
    async fn times_filters_and_limits_choose() {
        let folder = tempfile::tempdir().unwrap();
        let (hub, history) = open(folder.path());
        (0..30).for_each(|number| hub.publish(numbered(number)));
        let killed = Envelope { cause: Cause::ShimKilled, ..numbered(30) };
        hub.publish(killed.clone());
        let numbers = async |wanted: Query| -> Vec<u32> {
            let found = query(&history, wanted).await;
            let number = |envelope: Envelope| u32::from_le_bytes(envelope.event.value.try_into().unwrap());
            events(&found).into_iter().map(number).collect()
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let between = Query { since: Since::Time(at(10)), until: Some(at(13)), ..all() };
        assert_eq!(numbers(between).await, [10, 11, 12]);
        let third = Query { filter: filter("event.id==id1"), limit: Some(3), ..all() };
        assert_eq!(numbers(third).await, [1, 4, 7]);
        let killed = Query { filter: filter("cause==shim-killed"), ..all() };
        assert_eq!(numbers(killed).await, [30]);
    }

    #[tokio::test]
    async fn a_disk_that_cannot_be_written_stops_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("history");
        let (hub, history) = open(&path);
        let mut subscriber = hub.subscribe(filter(""));
        std::fs::remove_dir(&path).unwrap();
        hub.publish(numbered(1));
        timeout(LIMIT, hub.recorded()).await.unwrap();
        assert_eq!(*subscriber.try_recv().unwrap(), numbered(1));
        // It is read from memory.
        let mut follower = history.query(reading(), Query { follow: true, ..all() }).await;
        let (first, found) = timeout(LIMIT, follower.recv()).await.unwrap().unwrap();
        assert_eq!(found, Found::Event(numbered(1)));
        // More than can be kept there.
        let large = Any { type_url: String::new(), value: vec![0; 3 << 20] };
        (0..8).for_each(|_| hub.publish(Envelope { event: large.clone(), ..numbered(2) }));
        std::fs::create_dir(&path).unwrap();
        let deadline = std::time::Instant::now() + LIMIT;
        while std::fs::read_dir(&path).unwrap().next().is_none() {
            assert!(std::time::Instant::now() < deadline, "it is never tried again");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        hub.publish(numbered(3));
        let (mut found, mut lost, mut cursor) = (1, 0, first);
        while found + lost < 10 {
            let (next, what) = timeout(LIMIT, follower.recv()).await.unwrap().unwrap();
            assert!(next > cursor);
            cursor = next;
            match what {
                Found::Event(_) => found += 1,
                Found::Gap { lost: more, .. } => lost += more,
            }
        }
        assert_eq!((found, lost), (7, 3), "five of the large ones find a place");
        history.close();
        let (_, history) = open(&path);
        let kept = query(&history, all()).await;
        let gaps: Vec<_> = kept.iter().filter(|(_, found)| matches!(found, Found::Gap { .. })).collect();
        assert_eq!((events(&kept).len(), gaps.len()), (7, 1));
    }

    #[tokio::test]
    async fn an_event_of_more_than_a_segment_takes_is_a_gap() {
        let folder = tempfile::tempdir().unwrap();
        let (hub, history) = open(folder.path());
        let event = Any { type_url: String::new(), value: vec![0; 5 << 20] };
        hub.publish(Envelope { event, ..numbered(1) });
        hub.publish(numbered(2));
        let found = query(&history, all()).await;
        assert!(matches!(found[0].1, Found::Gap { lost: 1, .. }), "{:?}", found[0]);
        assert_eq!(events(&found), [numbered(2)]);
    }

    #[tokio::test]
    async fn at_the_end_nobody_is_answered_whose_event_may_be_lost() {
        let folder = tempfile::tempdir().unwrap();
        let (hub, history) = open(folder.path());
        hub.publish(numbered(1));
        history.close();
        hub.publish(numbered(2));
        assert!(timeout(Duration::from_millis(50), hub.recorded()).await.is_err());
        let (_, history) = open(folder.path());
        assert_eq!(events(&query(&history, all()).await), [numbered(1)]);
    }
}
