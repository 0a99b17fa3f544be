use super::*;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::super::schema::{IngestRecord, Table};

const PAST: &str = "2001-02-03T04:05:06Z";
const FUTURE: &str = "2999-01-01T00:00:00+01:00";

/// What a namespace has, as one list of words.
async fn left(fixture: &Fixture, namespace: &str) -> Vec<String> {
    let (metadata, scope) = (&fixture.metadata, scope(namespace));
    let mut left = Vec::new();
    for lease in metadata.leases(&scope).list(&[]).unwrap() {
        left.push(format!("lease {}", lease.id));
    }
    for image in metadata.images(&scope).list(&[]).unwrap() {
        left.push(format!("image {}", image.name));
    }
    for info in metadata.content(&scope).list(&[]).unwrap() {
        let reader = metadata.content(&scope).reader(&info.digest).await.unwrap();
        let mut data = vec![0; 64];
        let read = reader.read_at(&mut data, 0).unwrap();
        left.push(format!("blob {}", String::from_utf8_lossy(&data[..read])));
    }
    for status in metadata.content(&scope).statuses(&[]).await.unwrap() {
        left.push(format!("ingest {}", status.reference));
    }
    let snapshots = metadata.snapshots(&scope, NATIVE).unwrap();
    for info in snapshots.list(&[]).await.unwrap() {
        left.push(format!("snapshot {}", info.name));
    }
    left.sort();
    left
}

async fn committed(fixture: &Fixture, scope: &Scope, name: &str, parent: Option<&str>, labels: Labels) {
    let snapshots = fixture.metadata.snapshots(scope, NATIVE).unwrap();
    snapshots.prepare("work", parent, Labels::new()).await.unwrap();
    snapshots.commit(name, "work", labels, None).await.unwrap();
}

async fn expiring(fixture: &Fixture, name: &str, target: &Digest, extra: &[(&str, &str)], expiry: &str) {
    let mut image = image(name, target);
    image.labels = labels(extra);
    image.labels.insert("containerd.io/gc.expire".to_owned(), expiry.to_owned());
    fixture.metadata.images(&scope("a")).create(image, None).await.unwrap();
}

#[tokio::test]
async fn an_image_keeps_what_it_leads_to() {
    let fixture = Fixture::new();
    let scope = scope("a");
    committed(&fixture, &scope, "layer-1", None, Labels::new()).await;
    committed(&fixture, &scope, "layer-2", Some("layer-1"), Labels::new()).await;
    committed(&fixture, &scope, "unused", Some("layer-1"), Labels::new()).await;
    let config = labels(&[("containerd.io/gc.ref.snapshot.native", "layer-2")]);
    let config = fixture.blob(&scope, "config", b"config", config).await;
    let layer = fixture.blob(&scope, "layer", b"layer", Labels::new()).await;
    fixture.blob(&scope, "unused", b"unused", Labels::new()).await;
    let manifest = labels(&[
        ("containerd.io/gc.ref.content.config", config.as_str()),
        ("containerd.io/gc.ref.content.l.0", layer.as_str()),
        ("containerd.io/gc.ref.contents", digest_of(b"unused").as_str()),
    ]);
    let manifest = fixture.blob(&scope, "manifest", b"manifest", manifest).await;
    fixture.metadata.images(&scope).create(image("i", &manifest), None).await.unwrap();
    // Another namespace's blobs are its own.
    fixture.blob(&super::scope("b"), "layer", b"layer", Labels::new()).await;
    fixture.events();

    let stats = fixture.metadata.collect().await.unwrap();
    assert_eq!(stats.removed, 3);
    let kept =
        ["blob config", "blob layer", "blob manifest", "image i", "snapshot layer-1", "snapshot layer-2"];
    assert_eq!(left(&fixture, "a").await, kept);
    assert_eq!(left(&fixture, "b").await, Vec::<String>::new());
    let (blobs, _, snapshots) = fixture.backends();
    assert_eq!((blobs.len(), snapshots.len()), (3, 2));
    let removed = Event::SnapshotRemove { snapshotter: NATIVE.to_owned(), key: "unused".to_owned() };
    assert_eq!(fixture.events(), [("a".to_owned(), removed)]);

    fixture.metadata.images(&scope).delete("i", None, false).await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(left(&fixture, "a").await, Vec::<String>::new());
    assert_eq!(fixture.backends(), Default::default());
    // The folders as well, by the snapshotter's own cleanup.
    let folders = fixture.folder.path().join(NATIVE).join("snapshots");
    assert_eq!(std::fs::read_dir(folders).unwrap().count(), 0);
}

#[tokio::test]
async fn a_container_keeps_its_snapshot_and_what_its_labels_name() {
    let fixture = Fixture::new();
    let scope = scope("a");
    committed(&fixture, &scope, "base", None, Labels::new()).await;
    let snapshots = fixture.metadata.snapshots(&scope, NATIVE).unwrap();
    snapshots.prepare("root/fs", Some("base"), Labels::new()).await.unwrap();
    let data = fixture.blob(&scope, "1", b"data", Labels::new()).await;
    let back = labels(&[("containerd.io/gc.bref.container", "c")]);
    fixture.blob(&scope, "2", b"back", back).await;
    let wanted = Container {
        snapshotter: NATIVE.to_owned(),
        snapshot_key: "root/fs".to_owned(),
        labels: labels(&[("containerd.io/gc.ref.content", data.as_str())]),
        ..container("c")
    };
    fixture.metadata.containers(&scope).create(wanted).await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(left(&fixture, "a").await, ["blob back", "blob data", "snapshot base", "snapshot root/fs"]);
    fixture.metadata.containers(&scope).delete("c").await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(left(&fixture, "a").await, Vec::<String>::new());
}

#[tokio::test]
async fn roots_and_back_references() {
    let fixture = Fixture::new();
    let scope = scope("a");
    let root = labels(&[("containerd.io/gc.root", "1")]);
    committed(&fixture, &scope, "root", None, root.clone()).await;
    let blob = fixture.blob(&scope, "1", b"root", root).await;
    let by_blob = labels(&[("containerd.io/gc.bref.content.x", blob.as_str())]);
    fixture.blob(&scope, "2", b"by blob", by_blob).await;
    let by_snapshot = labels(&[("containerd.io/gc.bref.snapshot.native/1", "root")]);
    fixture.blob(&scope, "3", b"by snapshot", by_snapshot).await;
    committed(&fixture, &scope, "by blob", None, labels(&[("containerd.io/gc.bref.content", blob.as_str())]))
        .await;
    let by_nothing = labels(&[("containerd.io/gc.bref.image", "absent")]);
    fixture.blob(&scope, "4", b"by nothing", by_nothing).await;
    // Expired, but needed by one that is not; and one that nothing needs.
    fixture.metadata.images(&scope).create(image("kept", &blob), None).await.unwrap();
    expiring(&fixture, "expired", &blob, &[("containerd.io/gc.bref.image", "kept")], PAST).await;
    expiring(&fixture, "lost", &blob, &[], PAST).await;
    expiring(&fixture, "later", &blob, &[], FUTURE).await;
    expiring(&fixture, "never", &blob, &[], "soon").await;
    fixture.events();

    let stats = fixture.metadata.collect().await.unwrap();
    assert!(stats.next_expiry.unwrap() > SystemTime::now());
    let kept = [
        "blob by blob",
        "blob by snapshot",
        "blob root",
        "image expired",
        "image kept",
        "image later",
        "image never",
        "snapshot by blob",
        "snapshot root",
    ];
    assert_eq!(left(&fixture, "a").await, kept);
    assert_eq!(fixture.events(), [("a".to_owned(), Event::ImageDelete { name: "lost".to_owned() })]);
}

#[tokio::test]
async fn a_snapshot_that_was_used_lately_is_kept_on_condition() {
    let fixture = Fixture::new();
    let scope = scope("a");
    let used = |when: &str| labels(&[("containerd.io/gc.cond.value-usedat", when)]);
    let now = time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339).unwrap();
    for (name, when) in [("new", now.as_str()), ("old", PAST), ("never", "?")] {
        committed(&fixture, &scope, name, None, used(when)).await;
    }
    let conditions = labels(&[
        ("containerd.io/gc.root", "1"),
        ("containerd.io/gc.cond.snapshot.native/1", "usedat<1h|new"),
        ("containerd.io/gc.cond.snapshot.native/2", "usedat<1h|old"),
        ("containerd.io/gc.cond.snapshot.native/3", "usedat<1h|never"),
    ]);
    fixture.blob(&scope, "1", b"conditions", conditions).await;
    fixture.metadata.collect().await.unwrap();
    assert_eq!(left(&fixture, "a").await, ["blob conditions", "snapshot new"]);
}

#[tokio::test]
async fn leases_hold_deep_or_flat_until_they_expire() {
    let fixture = Fixture::new();
    let leases = fixture.metadata.leases(&scope("a"));
    let expiry = |when: &str, more: &[(&str, &str)]| {
        let mut labels = labels(more);
        labels.insert("containerd.io/gc.expire".to_owned(), when.to_owned());
        labels
    };
    leases.create(Some("deep"), expiry(FUTURE, &[])).await.unwrap();
    leases.create(Some("flat"), labels(&[("containerd.io/gc.flat", "1")])).await.unwrap();
    leases.create(Some("expired"), expiry(PAST, &[])).await.unwrap();
    for lease in ["deep", "flat", "expired"] {
        let scope = leased("a", lease);
        let inner =
            fixture.blob(&super::scope("a"), "x", format!("{lease} inner").as_bytes(), Labels::new()).await;
        let refers = labels(&[("containerd.io/gc.ref.content", inner.as_str())]);
        let outer = fixture.blob(&scope, "y", format!("{lease} outer").as_bytes(), refers.clone()).await;
        committed(&fixture, &super::scope("a"), &format!("{lease} base"), None, refers.clone()).await;
        committed(&fixture, &scope, &format!("{lease} top"), Some(&format!("{lease} base")), refers).await;
        drop(fixture.metadata.content(&scope).writer(&format!("{lease} ref"), 0, None).await.unwrap());
        // The image's target is held by the image alone.
        let target =
            fixture.blob(&super::scope("a"), "z", format!("{lease} target").as_bytes(), Labels::new()).await;
        expiring(&fixture, &format!("{lease} image"), &target, &[], PAST).await;
        let held = Resource { id: format!("{lease} image"), kind: "images".to_owned() };
        leases.add_resource(lease, &held).await.unwrap();
        let _ = outer;
    }
    // A lease may hold what does not exist.
    let nothing = Resource { id: "nothing".to_owned(), kind: "snapshots/zfs".to_owned() };
    leases.add_resource("deep", &nothing).await.unwrap();

    let stats = fixture.metadata.collect().await.unwrap();
    assert!(stats.next_expiry.unwrap() > SystemTime::now() + Duration::from_secs(365 * 86400));
    let mut kept = vec!["lease deep".to_owned(), "lease flat".to_owned(), "blob deep inner".to_owned()];
    for lease in ["deep", "flat"] {
        let names = [
            "blob # outer",
            "blob # target",
            "image # image",
            "ingest # ref",
            "snapshot # base",
            "snapshot # top",
        ];
        kept.extend(names.map(|name| name.replace('#', lease)));
    }
    kept.sort();
    assert_eq!(left(&fixture, "a").await, kept);
    let (blobs, ingests, snapshots) = fixture.backends();
    assert_eq!((blobs.len(), ingests.len(), snapshots.len()), (5, 2, 4));
    assert_eq!(leases.resources("deep").unwrap().len(), 5);
}

#[tokio::test]
async fn an_ingest_without_a_lease_is_kept_for_a_day() {
    let fixture = Fixture::new();
    let content = fixture.metadata.content(&scope("a"));
    for reference in ["today", "yesterday"] {
        let mut writer = content.writer(reference, 0, None).await.unwrap();
        writer.write(b"data").unwrap();
    }
    let key = Table::Ingest.key("a", "yesterday");
    let change = |txn: &mut Txn<'_>| {
        let mut record: IngestRecord = schema::load(txn, &key)?.unwrap();
        let expires = schema::time(record.expires);
        assert!(expires > SystemTime::now() + Duration::from_secs(86000));
        record.expires = schema::timestamp(expires - Duration::from_secs(86401));
        schema::store(txn, &key, &record);
        Ok::<_, Error>(())
    };
    fixture.metadata.inner.db.update(change).unwrap();
    let stats = fixture.metadata.collect().await.unwrap();
    assert!(stats.next_expiry.is_some());
    assert_eq!(left(&fixture, "a").await, ["ingest today"]);
    assert_eq!(fixture.backends().1, ["a/1/today"]);
}

#[tokio::test]
async fn what_a_crash_left_in_the_backends_is_taken_away_after_the_start() {
    let fixture = Fixture::new();
    let inner = &fixture.metadata.inner;
    let root = labels(&[("containerd.io/gc.root", "1")]);
    let kept = fixture.blob(&scope("a"), "ref", b"kept", root).await;
    let mut writer = inner.store.writer("a/99/lost", 0).unwrap();
    writer.write(b"lost").unwrap();
    writer.commit(4, None).unwrap();
    drop(inner.store.writer("a/98/lost", 0).unwrap());
    let native = &inner.snapshotters[NATIVE];
    native.prepare("a/97/lost", None, &Labels::new()).unwrap();
    native.commit("a/96/lost", "a/97/lost", &Labels::new(), None).unwrap();
    native.prepare("a/95/lost", Some("a/96/lost"), &Labels::new()).unwrap();

    let fixture = fixture.reopen();
    let stop = CancellationToken::new();
    let collector = fixture.metadata.clone().run_collector(super::super::gc::Config::default(), stop.clone());
    let collector = tokio::spawn(collector);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while fixture.backends() != (vec![kept.to_string()], vec![], vec![]) {
        assert!(std::time::Instant::now() < deadline, "{:?}", fixture.backends());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.cancel();
    collector.await.unwrap();
}

#[tokio::test]
async fn runs_by_itself_after_a_removal_and_an_expiry() {
    let fixture = Fixture::new();
    let stop = CancellationToken::new();
    let collector = fixture.metadata.clone().run_collector(super::super::gc::Config::default(), stop.clone());
    let collector = tokio::spawn(collector);
    let wait = async |what: &str| {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !left(&fixture, "a").await.is_empty() {
            assert!(std::time::Instant::now() < deadline, "{what}: {:?}", left(&fixture, "a").await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    fixture.metadata.collected().await.unwrap();
    let digest = fixture.blob(&scope("a"), "ref", b"1", Labels::new()).await;
    fixture.metadata.images(&scope("a")).create(image("i", &digest), None).await.unwrap();
    fixture.metadata.images(&scope("a")).delete("i", None, false).await.unwrap();
    wait("removal").await;

    // A lease that expires while nothing happens: the run after its creation learns of it.
    let expires = time::OffsetDateTime::now_utc() + Duration::from_millis(1500);
    let soon = expires.format(&time::format_description::well_known::Rfc3339).unwrap();
    let expiry = labels(&[("containerd.io/gc.expire", &soon)]);
    fixture.metadata.leases(&scope("a")).create(Some("l"), expiry).await.unwrap();
    fixture.blob(&leased("a", "l"), "ref", b"2", Labels::new()).await;
    fixture.metadata.collected().await.unwrap();
    let still = left(&fixture, "a").await;
    assert!(still == ["blob 2", "lease l"] || SystemTime::now() > SystemTime::from(expires), "{still:?}");
    wait("expiry").await;
    stop.cancel();
    collector.await.unwrap();
}

#[tokio::test]
async fn an_unreadable_record_costs_nothing_else() {
    let fixture = Fixture::new();
    let digest = fixture.blob(&scope("a"), "ref", b"data", Labels::new()).await;
    let key = Table::Blob.key("b", digest_of(b"other").as_str());
    let damage = |txn: &mut Txn<'_>| {
        txn.put(&key, b"\xff\xff");
        Ok::<_, Error>(())
    };
    fixture.metadata.inner.db.update(damage).unwrap();
    assert_eq!(fixture.metadata.collect().await.unwrap_err().code(), ErrorCode::DataLoss);
    assert_eq!(fixture.backends().0, [digest.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_hangs_does_not_keep_the_collector_from_ending() {
    const LIMIT: Duration = Duration::from_secs(60);
    let fixture = Fixture::new();
    let (metadata, shutdown) = (fixture.metadata.clone(), CancellationToken::new());
    // More than a lane lets begin.
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let hold = Arc::new(Mutex::new(hold));
    for _ in 0..100 {
        let (lane, hold) = (metadata.inner.content_lane.clone(), hold.clone());
        tokio::spawn(async move { lane.run(move || hold.lock().unwrap().recv()).await });
    }
    while tokio::time::timeout(Duration::from_millis(1), metadata.inner.content_lane.run(|| ())).await.is_ok()
    {
    }
    let config = super::super::gc::Config::default();
    let collector = tokio::spawn(metadata.clone().run_collector(config, shutdown.clone()));
    let has_begun = async {
        while metadata.inner.dirty.lock().unwrap().content {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, has_begun).await.unwrap();
    let waiting = tokio::spawn({
        let metadata = metadata.clone();
        async move { metadata.collected().await }
    });
    shutdown.cancel();
    tokio::time::timeout(LIMIT, collector).await.unwrap().unwrap();
    assert!(waiting.await.unwrap().is_err(), "whoever waits for a collection is told");
    drop(release);
}
