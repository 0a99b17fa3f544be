use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

use davit_model::Mount;
use davit_snapshotter::Error as BackendError;

fn snapshots(fixture: &Fixture, scope: &Scope) -> Snapshots {
    fixture.metadata.snapshots(scope, NATIVE).unwrap()
}

/// The names below the mount's source, which is the snapshot's folder.
fn write_into(mounts: &[davit_model::Mount], name: &str) {
    std::fs::write(std::path::Path::new(&mounts[0].source).join(name), b"x").unwrap();
}

fn holds(mounts: &[davit_model::Mount], name: &str) -> bool {
    std::path::Path::new(&mounts[0].source).join(name).is_file()
}

#[tokio::test]
async fn a_chain_is_prepared_committed_and_taken_down() {
    let fixture = Fixture::new();
    let snapshots = snapshots(&fixture, &scope("a"));
    let mounts = snapshots.prepare("active", None, Labels::new()).await.unwrap();
    write_into(&mounts, "file");
    assert_eq!(snapshots.mounts("active").await.unwrap(), mounts);
    snapshots.commit("base", "active", labels(&[("k", "v")]), None).await.unwrap();
    let gone = "snapshot active does not exist: not found";
    refused(snapshots.stat("active").await, ErrorCode::NotFound, gone);
    refused(snapshots.mounts("active").await, ErrorCode::NotFound, gone);
    assert_eq!(snapshots.mounts("base").await.unwrap_err().code(), ErrorCode::FailedPrecondition);

    let view = snapshots.view("view", Some("base"), Labels::new()).await.unwrap();
    assert!(holds(&view, "file"));
    let info = snapshots.stat("view").await.unwrap();
    assert_eq!((info.kind, info.parent.as_deref()), (davit_snapshotter::Kind::View, Some("base")));
    assert_eq!(snapshots.stat("base").await.unwrap().labels, labels(&[("k", "v")]));
    assert!(snapshots.usage("base").await.unwrap().inodes >= 1);

    let child = "cannot remove snapshot with child: failed precondition";
    refused(snapshots.remove("base").await, ErrorCode::FailedPrecondition, child);
    snapshots.remove("view").await.unwrap();
    snapshots.remove("base").await.unwrap();
    refused(snapshots.remove("base").await, ErrorCode::NotFound, "snapshot base does not exist: not found");
    // The key is free at once, though the files are not collected yet.
    let mounts = snapshots.prepare("base", None, Labels::new()).await.unwrap();
    assert!(!holds(&mounts, "file"));

    let name = |text: &str| text.to_owned();
    let expected = [
        Event::SnapshotPrepare { snapshotter: name(NATIVE), key: name("active"), parent: String::new() },
        Event::SnapshotCommit { snapshotter: name(NATIVE), key: name("active"), name: name("base") },
        Event::SnapshotRemove { snapshotter: name(NATIVE), key: name("view") },
        Event::SnapshotRemove { snapshotter: name(NATIVE), key: name("base") },
        Event::SnapshotPrepare { snapshotter: name(NATIVE), key: name("base"), parent: String::new() },
    ];
    assert_eq!(fixture.events(), expected.map(|event| (name("a"), event)));
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let fixture = Fixture::new();
    let scope = scope("a");
    let snapshots = snapshots(&fixture, &scope);
    let unknown = fixture.metadata.snapshots(&scope, "zfs").map(|_| ());
    refused(unknown, ErrorCode::InvalidArgument, "snapshotter not loaded: zfs: invalid argument");
    let missing = fixture.metadata.snapshots(&scope, "").map(|_| ());
    refused(missing, ErrorCode::InvalidArgument, "snapshotter argument missing: invalid argument");

    snapshots.prepare("key", None, Labels::new()).await.unwrap();
    for outcome in [
        snapshots.prepare("key", None, Labels::new()).await,
        snapshots.view("key", None, Labels::new()).await,
    ] {
        refused(outcome, ErrorCode::AlreadyExists, "snapshot \"key\": already exists");
    }
    let outcome = snapshots.prepare("new", Some("absent"), Labels::new()).await;
    refused(outcome, ErrorCode::NotFound, "parent snapshot absent does not exist: not found");
    let outcome = snapshots.prepare("new", Some("key"), Labels::new()).await;
    assert_eq!(outcome.unwrap_err().code(), ErrorCode::InvalidArgument);
    let outcome = snapshots.commit("name", "absent", Labels::new(), None).await;
    refused(outcome, ErrorCode::NotFound, "snapshot absent does not exist: not found");
    let outcome = snapshots.commit("key", "key", Labels::new(), None).await;
    refused(outcome, ErrorCode::AlreadyExists, "snapshot \"key\": already exists");
    for key in ["", " "] {
        let long = labels(&[("k", &"v".repeat(4096))]);
        assert_eq!(snapshots.prepare(key, None, long).await.unwrap_err().code(), ErrorCode::InvalidArgument);
    }
    snapshots.view("view", None, Labels::new()).await.unwrap();
    let outcome = snapshots.commit("name", "view", Labels::new(), None).await;
    assert_eq!(outcome.unwrap_err().code(), ErrorCode::FailedPrecondition);
    assert_eq!(snapshots.list(&[]).await.unwrap().len(), 2);
    fixture.metadata.inner.mark_dirty(Dirty { snapshotters: [NATIVE.to_owned()].into(), ..Dirty::default() });
    assert_eq!(fixture.backends().2, ["a/1/key", "a/3/view"]);
}

#[tokio::test]
async fn namespaces_have_their_own_keys() {
    let fixture = Fixture::new();
    let (one, two) = (snapshots(&fixture, &scope("a")), snapshots(&fixture, &scope("b")));
    one.prepare("key", None, Labels::new()).await.unwrap();
    two.prepare("key", None, Labels::new()).await.unwrap();
    one.remove("key").await.unwrap();
    two.stat("key").await.unwrap();
    assert_eq!(one.list(&[]).await.unwrap(), []);
}

#[tokio::test]
async fn labels_go_down_only_if_they_are_meant_to() {
    let fixture = Fixture::new();
    let snapshots = snapshots(&fixture, &scope("a"));
    let backend = &fixture.metadata.inner.snapshotters[NATIVE];
    let all =
        labels(&[("mine", "1"), ("containerd.io/snapshot/x", "1"), ("containerd.io/snapshot.ref", "target")]);
    snapshots.prepare("key", None, all.clone()).await.unwrap();
    assert_eq!(snapshots.stat("key").await.unwrap().labels, all);
    let down = labels(&[("containerd.io/snapshot/x", "1"), ("containerd.io/snapshot.ref", "target")]);
    assert_eq!(backend.stat("a/1/key").unwrap().labels, down);

    let wanted = labels(&[("mine", "2"), ("containerd.io/snapshot/x", "2")]);
    let mask = paths(&["labels.mine", "labels.containerd.io/snapshot/x"]);
    let updated = snapshots.update("key", wanted, &mask).await.unwrap();
    let expected =
        labels(&[("mine", "2"), ("containerd.io/snapshot/x", "2"), ("containerd.io/snapshot.ref", "target")]);
    assert_eq!(updated.labels, expected);
    assert_eq!(snapshots.stat("key").await.unwrap(), updated);
    assert_eq!(backend.stat("a/1/key").unwrap().labels["containerd.io/snapshot/x"], "2");
    refused(
        snapshots.update("key", Labels::new(), &paths(&["parent"])).await,
        ErrorCode::InvalidArgument,
        "cannot update \"parent\" field on snapshot \"key\": invalid argument",
    );
    // Nothing is inherited.
    snapshots.commit("name", "key", labels(&[("k", "v")]), None).await.unwrap();
    assert_eq!(snapshots.stat("name").await.unwrap().labels, labels(&[("k", "v")]));
    let updated = snapshots.update("name", Labels::new(), &[]).await.unwrap();
    assert_eq!(updated.labels, Labels::new());
}

#[tokio::test]
async fn are_attached_to_the_lease_even_if_they_exist() {
    let fixture = Fixture::new();
    let leases = fixture.metadata.leases(&scope("a"));
    leases.create(Some("l"), Labels::new()).await.unwrap();
    let snapshots = snapshots(&fixture, &leased("a", "l"));
    let held = || -> Vec<String> {
        leases.resources("l").unwrap().into_iter().map(|held| format!("{} {}", held.kind, held.id)).collect()
    };
    snapshots.prepare("key", None, Labels::new()).await.unwrap();
    assert_eq!(held(), ["snapshots/native key"]);
    snapshots.commit("chain", "key", Labels::new(), None).await.unwrap();
    assert_eq!(held(), ["snapshots/native chain"]);
    let let_go = Resource { id: "chain".to_owned(), kind: "snapshots/native".to_owned() };
    leases.delete_resource("l", &let_go).await.unwrap();

    let target = labels(&[("containerd.io/snapshot.ref", "chain")]);
    let outcome = snapshots.prepare("extract-1 chain", None, target.clone()).await;
    refused(outcome, ErrorCode::AlreadyExists, "target snapshot \"chain\": already exists");
    assert_eq!(held(), ["snapshots/native chain"]);
    leases.delete_resource("l", &let_go).await.unwrap();
    let mounts = snapshots.prepare("other", None, Labels::new()).await;
    mounts.unwrap();
    let outcome = snapshots.commit("chain", "other", Labels::new(), None).await;
    refused(outcome, ErrorCode::AlreadyExists, "snapshot \"chain\": already exists");
    assert_eq!(held(), ["snapshots/native chain", "snapshots/native other"]);
    snapshots.remove("chain").await.unwrap();
    assert_eq!(held(), ["snapshots/native other"]);

    let unknown = super::snapshots::snapshots(&fixture, &leased("a", "x"));
    let text = "lease does not exist: not found";
    refused(unknown.prepare("new", None, Labels::new()).await, ErrorCode::NotFound, text);
    refused(unknown.commit("new", "other", Labels::new(), None).await, ErrorCode::NotFound, text);
    snapshots.stat("other").await.unwrap();
    // What was prepared for nothing is gone already.
    fixture.metadata.collect().await.unwrap();
    assert_eq!(fixture.backends().2.len(), 1);
}

#[tokio::test]
async fn a_parent_can_be_given_at_the_commit() {
    let fixture = Fixture::new();
    let snapshots = snapshots(&fixture, &scope("a"));
    snapshots.prepare("one", None, Labels::new()).await.unwrap();
    snapshots.commit("base", "one", Labels::new(), None).await.unwrap();
    snapshots.prepare("two", None, Labels::new()).await.unwrap();
    let outcome = snapshots.commit("top", "two", Labels::new(), Some("absent")).await;
    refused(outcome, ErrorCode::NotFound, "parent snapshot absent does not exist: not found");
    match snapshots.commit("top", "two", Labels::new(), Some("base")).await {
        Ok(()) => {
            assert_eq!(snapshots.stat("top").await.unwrap().parent.as_deref(), Some("base"));
            assert_eq!(snapshots.remove("base").await.unwrap_err().code(), ErrorCode::FailedPrecondition);
        }
        // It is a capability.
        Err(error) => assert_eq!(error.code(), ErrorCode::Unimplemented),
    }
}

#[tokio::test]
async fn are_listed_by_filter() {
    let fixture = Fixture::new();
    let snapshots = snapshots(&fixture, &scope("a"));
    snapshots.prepare("key", None, labels(&[("k", "v")])).await.unwrap();
    snapshots.commit("base", "key", labels(&[("k", "w")]), None).await.unwrap();
    snapshots.prepare("active", Some("base"), Labels::new()).await.unwrap();
    let names = async |filter: &str| -> Vec<String> {
        snapshots.list(&paths(&[filter])).await.unwrap().into_iter().map(|info| info.name).collect()
    };
    assert_eq!(names("").await, ["active", "base"]);
    assert_eq!(names("kind==committed").await, ["base"]);
    assert_eq!(names("parent==base").await, ["active"]);
    assert_eq!(names("labels.k==w").await, ["base"]);
    assert_eq!(snapshots.list(&paths(&["kind="])).await.unwrap_err().code(), ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn survive_a_restart() {
    let fixture = Fixture::new();
    let before = {
        let snapshots = snapshots(&fixture, &scope("a"));
        let mounts = snapshots.prepare("key", None, Labels::new()).await.unwrap();
        write_into(&mounts, "file");
        snapshots.stat("key").await.unwrap()
    };
    let fixture = fixture.reopen();
    let snapshots = snapshots(&fixture, &scope("a"));
    fixture.metadata.leases(&scope("a")).create(Some("l"), Labels::new()).await.unwrap();
    let held = Resource { id: "key".to_owned(), kind: "snapshots/native".to_owned() };
    fixture.metadata.leases(&scope("a")).add_resource("l", &held).await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(snapshots.stat("key").await.unwrap(), before);
    assert!(holds(&snapshots.mounts("key").await.unwrap(), "file"));
    // No key of the backend is given out twice.
    snapshots.prepare("other", None, Labels::new()).await.unwrap();
    assert_eq!(fixture.backends().2, ["a/1/key", "a/2/other"]);
}

/// Many work on one chain while the collector runs without pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_snapshot_is_lost_to_the_collector() {
    let fixture = Fixture::new();
    fixture.metadata.leases(&scope("a")).create(Some("l"), Labels::new()).await.unwrap();
    let snapshots = snapshots(&fixture, &leased("a", "l"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let collect = async {
        while !stop.load(Ordering::SeqCst) {
            let dirty = Dirty { snapshotters: [NATIVE.to_owned()].into(), ..Dirty::default() };
            fixture.metadata.inner.mark_dirty(dirty);
            fixture.metadata.collect().await.unwrap();
        }
    };
    let work = async {
        let workers = (0..4).map(|number| {
            let snapshots = snapshots.clone();
            async move {
                for round in 0..15 {
                    let (key, name) = (format!("key-{number}"), format!("layer-{round}"));
                    let parent = (round > 0).then(|| format!("layer-{}", round - 1));
                    let target = labels(&[("containerd.io/snapshot.ref", name.as_str())]);
                    match snapshots.prepare(&key, parent.as_deref(), target).await {
                        Ok(mounts) => {
                            assert!(round == 0 || holds(&mounts, &format!("file-{}", round - 1)));
                            write_into(&mounts, &format!("file-{round}"));
                        }
                        Err(error) => {
                            assert_eq!(error.code(), ErrorCode::AlreadyExists, "{error}");
                            continue;
                        }
                    }
                    if let Err(error) = snapshots.commit(&name, &key, Labels::new(), None).await {
                        assert_eq!(error.code(), ErrorCode::AlreadyExists, "{error}");
                        snapshots.remove(&key).await.unwrap();
                    }
                }
            }
        });
        futures::future::join_all(workers).await;
        stop.store(true, Ordering::SeqCst);
    };
    futures::join!(collect, work);
    assert_eq!(snapshots.list(&[]).await.unwrap().len(), 15);
    fixture.metadata.collect().await.unwrap();
    assert_eq!(fixture.backends().2.len(), 15);
}

/// As a snapshotter that fetches layers by itself: told what will be committed, it has it already.
struct Remote {
    inner: Arc<dyn Snapshotter>,
    /// How often it was asked for all that it has.
    lists: Arc<AtomicUsize>,
    /// What happens during the next commit.
    meanwhile: Meanwhile,
}

type Meanwhile = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// Metadata over a remote snapshotter, which has its snapshots where that of the fixture has them.
fn over_remote(fixture: &Fixture) -> (Metadata, Arc<AtomicUsize>, Meanwhile) {
    let inner = &fixture.metadata.inner;
    let (lists, meanwhile) = (Arc::<AtomicUsize>::default(), Meanwhile::default());
    let remote: Arc<dyn Snapshotter> = Arc::new(Remote {
        inner: inner.snapshotters[NATIVE].clone(),
        lists: lists.clone(),
        meanwhile: meanwhile.clone(),
    });
    let parts = Parts {
        db: inner.db.clone(),
        store: inner.store.clone(),
        snapshotters: BTreeMap::from([("remote".to_owned(), remote)]),
        mounts: inner.mount_targets.clone(),
        sharing: Sharing::Shared,
        events: fixture.metadata.inner.events.clone(),
    };
    (Metadata::open(parts).unwrap(), lists, meanwhile)
}

impl Snapshotter for Remote {
    fn stat(&self, key: &str) -> Result<SnapshotInfo, BackendError> {
        self.inner.stat(key)
    }

    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<SnapshotInfo, BackendError> {
        self.inner.update(name, labels, fields)
    }

    fn usage(&self, key: &str) -> Result<davit_snapshotter::Usage, BackendError> {
        self.inner.usage(key)
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, BackendError> {
        self.inner.mounts(key)
    }

    fn prepare(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, BackendError> {
        let mounts = self.inner.prepare(key, parent, labels)?;
        if !labels.contains_key("containerd.io/snapshot.ref") {
            return Ok(mounts);
        }
        let mut labels = labels.clone();
        labels.insert("containerd.io/snapshot/remote".to_owned(), "1".to_owned());
        self.inner.commit(&format!("{key} fetched"), key, &labels, None)?;
        Err(BackendError::AlreadyExists { key: key.to_owned() })
    }

    fn view(&self, key: &str, _: Option<&str>, _: &Labels) -> Result<Vec<Mount>, BackendError> {
        Err(BackendError::AlreadyExists { key: key.to_owned() })
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels, _: Option<&str>) -> Result<(), BackendError> {
        if let Some(meanwhile) = self.meanwhile.lock().unwrap().take() {
            meanwhile();
        }
        // Here a parent that comes late makes no difference.
        self.inner.commit(name, key, labels, None)
    }

    fn remove(&self, key: &str) -> Result<(), BackendError> {
        self.inner.remove(key)
    }

    fn list(&self) -> Result<Vec<SnapshotInfo>, BackendError> {
        self.lists.fetch_add(1, Ordering::SeqCst);
        self.inner.list()
    }

    fn find_target(&self, target: &str, parent: Option<&str>) -> Result<Option<SnapshotInfo>, BackendError> {
        self.inner.find_target(target, parent)
    }

    fn cleanup(&self) -> Result<(), BackendError> {
        self.inner.cleanup()
    }

    fn capabilities(&self) -> Vec<String> {
        self.inner.capabilities()
    }

    fn exports(&self) -> BTreeMap<String, String> {
        self.inner.exports()
    }
}

#[tokio::test]
async fn what_a_remote_snapshotter_has_is_adopted() {
    let fixture = Fixture::new();
    let (metadata, lists, _) = over_remote(&fixture);
    let leases = metadata.leases(&scope("a"));
    leases.create(Some("l"), Labels::new()).await.unwrap();
    let snapshots = metadata.snapshots(&leased("a", "l"), "remote").unwrap();
    let mut parent = None;
    for target in ["chain-1", "chain-2"] {
        let labels = labels(&[("containerd.io/snapshot.ref", target), ("mine", "1")]);
        for text in [
            "target snapshot \"#\" from snapshotter: already exists",
            "target snapshot \"#\": already exists",
        ] {
            let outcome = snapshots.prepare("extract", parent, labels.clone()).await;
            refused(outcome, ErrorCode::AlreadyExists, &text.replace('#', target));
        }
        let info = snapshots.stat(target).await.unwrap();
        assert_eq!((info.kind, info.parent.as_deref()), (davit_snapshotter::Kind::Committed, parent));
        assert_eq!(info.labels["mine"], "1");
        assert_eq!(info.labels["containerd.io/snapshot/remote"], "1");
        parent = Some(target);
    }
    assert_eq!(lists.load(Ordering::SeqCst), 0, "it was asked for the targets alone");
    assert!(fixture.events().is_empty(), "nothing was prepared");
    metadata.collect().await.unwrap();
    assert_eq!(snapshots.list(&[]).await.unwrap().len(), 2);
    assert_eq!(leases.resources("l").unwrap().len(), 2);
    // Without a target the same answer means nothing.
    let outcome = snapshots.view("view", None, Labels::new()).await;
    assert_eq!(outcome.unwrap_err().code(), ErrorCode::Unknown);
    leases.delete("l", false).await.unwrap();
    metadata.collect().await.unwrap();
    assert_eq!(fixture.backends().2, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_goes_during_a_commit_leaves_no_record_of_nothing() {
    let fixture = Fixture::new();
    let (metadata, _, meanwhile) = over_remote(&fixture);
    let snapshots = metadata.snapshots(&scope("a"), "remote").unwrap();
    for key in ["one", "two"] {
        snapshots.prepare(key, None, Labels::new()).await.unwrap();
    }
    snapshots.commit("base", "one", Labels::new(), None).await.unwrap();
    let (other, runtime) = (snapshots.clone(), tokio::runtime::Handle::current());
    *meanwhile.lock().unwrap() = Some(Box::new(move || runtime.block_on(other.remove("base")).unwrap()));
    let outcome = snapshots.commit("top", "two", Labels::new(), Some("base")).await;
    refused(outcome, ErrorCode::NotFound, "parent snapshot base does not exist: not found");
    // The snapshotter has made a snapshot of it that nobody needs.
    assert_eq!(snapshots.list(&[]).await.unwrap(), []);
    refused(snapshots.stat("two").await, ErrorCode::NotFound, "snapshot two does not exist: not found");
    snapshots.prepare("two", None, Labels::new()).await.unwrap();
    metadata.collect().await.unwrap();
    assert_eq!(fixture.backends().2, Vec::<String>::new());
}
