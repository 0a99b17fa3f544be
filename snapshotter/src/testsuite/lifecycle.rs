//! Cases about records: what exists when, and what is refused.

use std::sync::Barrier;
use std::time::SystemTime;

use davit_model::{ErrorCode, Labels};

use super::files::{assert_same, delete, file, folder, mode};
use super::{Case, assert_between, assert_code, labels};
use crate::Kind;

pub(super) fn basic(case: &Case<'_>) {
    let first = |root: &std::path::Path| {
        file(root, "foo", "foo\n", 0o777);
        folder(root, "a", 0o755);
        folder(root, "a/b", 0o755);
        folder(root, "a/b/c", 0o755);
    };
    let second = |root: &std::path::Path| {
        file(root, "bar", "bar\n", 0o777);
        file(root, "foo", "bar\n", 0o777);
        delete(root, "a/b");
    };
    let flat = case.folder();
    mode(&flat, "", 0o755);

    let mounted = case.mount(&case.prepare("preparing", None));
    first(&mounted);
    first(&flat);
    drop(mounted);
    case.commit("committed", "preparing");
    let info = case.snapshotter.stat(&case.key("committed")).unwrap();
    assert_eq!((info.parent.as_deref(), info.kind), (None, Kind::Committed));
    assert_code(case.snapshotter.stat(&case.key("preparing")), ErrorCode::NotFound);

    let mounted = case.mount(&case.prepare("next", Some("committed")));
    assert_same(&flat, &mounted, "the child before its change");
    second(&mounted);
    second(&flat);
    drop(mounted);
    let next = case.snapshotter.stat(&case.key("next")).unwrap();
    assert_eq!((next.parent, next.kind), (Some(case.key("committed")), Kind::Active));
    case.commit("committed-next", "next");
    let next = case.snapshotter.stat(&case.key("committed-next")).unwrap();
    assert_eq!((next.parent.clone(), next.kind), (Some(case.key("committed")), Kind::Committed));
    assert_code(case.snapshotter.stat(&case.key("next")), ErrorCode::NotFound);

    let listed = case.snapshotter.list().unwrap();
    assert!(listed.contains(&info) && listed.contains(&next));

    let mounted = case.mount(&case.view("view", Some("committed-next")));
    assert_same(&flat, &mounted, "the view");
    drop(mounted);
    case.snapshotter.remove(&case.key("view")).unwrap();
    assert_code(case.snapshotter.remove(&case.key("committed")), ErrorCode::FailedPrecondition);
    case.snapshotter.remove(&case.key("committed-next")).unwrap();
    case.snapshotter.remove(&case.key("committed")).unwrap();
    assert_eq!(case.names(), Vec::<String>::new());
}

pub(super) fn stat_active(case: &Case<'_>) {
    let before = SystemTime::now();
    drop(case.mount(&case.prepare("preparing", None)));
    let info = case.snapshotter.stat(&case.key("preparing")).unwrap();
    assert_eq!(info.name, case.key("preparing"));
    assert_eq!((info.kind, info.parent), (Kind::Active, None));
    assert_between(info.created, before, SystemTime::now());
    assert_eq!(info.created, info.updated);
}

pub(super) fn stat_committed(case: &Case<'_>) {
    case.prepare("preparing", None);
    let before = SystemTime::now();
    case.commit("committed", "preparing");
    let info = case.snapshotter.stat(&case.key("committed")).unwrap();
    assert_eq!(info.name, case.key("committed"));
    assert_eq!((info.kind, info.parent), (Kind::Committed, None));
    // The commit is what made it.
    assert_between(info.created, before, SystemTime::now());
}

pub(super) fn transitivity(case: &Case<'_>) {
    case.layer("a", None, &|root| file(root, "foo", "foo\n", 0o777));
    case.layer("b", Some("a"), &|root| file(root, "foo", "foo bar\n", 0o777));
    let b = case.snapshotter.stat(&case.key("b")).unwrap();
    let parent = case.snapshotter.stat(&b.parent.unwrap()).unwrap();
    assert_eq!((parent.name, parent.parent), (case.key("a"), None));
}

pub(super) fn create_refused(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    let parent = case.key("parent");
    case.prepare("active", None);
    case.layer("parent", None, &|_| {});
    case.view("viewed", Some("parent"));

    // A key is taken by every kind, for every kind, with a parent or without.
    for taken in ["active", "parent", "viewed"] {
        let taken = case.key(taken);
        for parent in [None, Some(parent.as_str())] {
            assert_code(snapshotter.prepare(&taken, parent, &labels(&[])), ErrorCode::AlreadyExists);
            assert_code(snapshotter.view(&taken, parent, &labels(&[])), ErrorCode::AlreadyExists);
        }
    }
    // A parent has to exist, and be committed.
    let new = case.key("new");
    let missing = case.key("missing");
    assert_code(snapshotter.prepare(&new, Some(&missing), &labels(&[])), ErrorCode::NotFound);
    assert_code(snapshotter.view(&new, Some(&missing), &labels(&[])), ErrorCode::NotFound);
    for wrong in ["active", "viewed"] {
        let wrong = case.key(wrong);
        assert_code(snapshotter.prepare(&new, Some(&wrong), &labels(&[])), ErrorCode::InvalidArgument);
        assert_code(snapshotter.view(&new, Some(&wrong), &labels(&[])), ErrorCode::InvalidArgument);
    }
    // Nothing of that was made.
    assert_eq!(case.names(), ["active", "parent", "viewed"]);
    assert_code(snapshotter.stat(&new), ErrorCode::NotFound);
}

pub(super) fn commit_refused(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    case.layer("one", None, &|_| {});
    case.layer("two", None, &|_| {});
    case.prepare("active", Some("one"));
    case.view("viewed", Some("one"));
    let commit = |name: &str, key: &str, parent: Option<&str>| {
        let parent = parent.map(|parent| case.key(parent));
        snapshotter.commit(&case.key(name), &case.key(key), &labels(&[]), parent.as_deref())
    };
    assert_code(commit("new", "missing", None), ErrorCode::NotFound);
    assert_code(commit("new", "viewed", None), ErrorCode::FailedPrecondition);
    assert_code(commit("new", "one", None), ErrorCode::FailedPrecondition);
    assert_code(commit("two", "active", None), ErrorCode::AlreadyExists);
    assert_code(commit("viewed", "active", None), ErrorCode::AlreadyExists);
    assert_code(commit("active", "active", None), ErrorCode::AlreadyExists);
    assert_code(commit("new", "active", Some("two")), ErrorCode::InvalidArgument);
    assert_eq!(case.names(), ["active", "one", "two", "viewed"]);
    // Naming the parent that it has is no change.
    commit("new", "active", Some("one")).unwrap();
    assert_eq!(snapshotter.stat(&case.key("new")).unwrap().parent, Some(case.key("one")));
}

pub(super) fn mounts_again(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    case.layer("base", None, &|root| file(root, "foo", "base", 0o644));
    case.layer("top", Some("base"), &|root| file(root, "bar", "top", 0o644));
    for parent in [None, Some("base"), Some("top")] {
        let prepared = case.prepare("active", parent);
        assert_eq!(snapshotter.mounts(&case.key("active")).unwrap(), prepared);
        let viewed = case.view("viewed", parent);
        assert_eq!(snapshotter.mounts(&case.key("viewed")).unwrap(), viewed);
        snapshotter.remove(&case.key("active")).unwrap();
        snapshotter.remove(&case.key("viewed")).unwrap();
    }
    assert_code(snapshotter.mounts(&case.key("base")), ErrorCode::FailedPrecondition);
    assert_code(snapshotter.mounts(&case.key("missing")), ErrorCode::NotFound);
}

pub(super) fn update(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    case.layer("c1", None, &|_| {});
    case.layer("c2", Some("c1"), &|_| {});
    case.prepare("a1", Some("c2"));
    case.prepare("a2", None);
    case.view("v1", Some("c2"));
    case.view("v2", None);
    let fields =
        |fields: &[&str]| -> Vec<String> { fields.iter().map(|field| (*field).to_owned()).collect() };
    for name in case.names() {
        let key = case.key(&name);
        let before = snapshotter.stat(&key).unwrap();
        let all = labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3")]);
        let start = SystemTime::now();
        let after = snapshotter.update(&key, &all, &[]).unwrap();
        assert_between(after.updated, start, SystemTime::now());
        assert_eq!(after.labels, all);
        assert_eq!(
            (&after.name, after.kind, &after.parent, after.created),
            (&before.name, before.kind, &before.parent, before.created)
        );
        assert_eq!(snapshotter.stat(&key).unwrap(), after);

        // Only what is named is taken, and what is named but missing is deleted.
        let some = Labels::from([("l1".into(), "updated".into()), ("l4".into(), "v4".into())]);
        let after = snapshotter.update(&key, &some, &fields(&["labels.l1", "labels.l2"])).unwrap();
        assert_eq!(after.labels, labels(&[("l1", "updated"), ("l3", "v3")]));

        // What follows the first dot is the key, dots and all; an empty value deletes.
        let dotted = Labels::from([("a.b/c".into(), "d".into()), ("l3".into(), String::new())]);
        let after = snapshotter.update(&key, &dotted, &fields(&["labels.a.b/c", "labels.l3"])).unwrap();
        assert_eq!(after.labels, labels(&[("l1", "updated"), ("a.b/c", "d")]));

        let other = labels(&[("l4", "v4")]);
        let after = snapshotter.update(&key, &other, &fields(&["labels"])).unwrap();
        assert_eq!(after.labels, other);

        for immutable in ["parent", "kind", "name", "nonsense"] {
            let result = snapshotter.update(&key, &all, &fields(&["labels.l1", immutable]));
            assert_code(result, ErrorCode::InvalidArgument);
        }
        assert_eq!(snapshotter.stat(&key).unwrap(), after, "a refused update changes nothing");
    }
    assert_code(snapshotter.update(&case.key("missing"), &labels(&[]), &[]), ErrorCode::NotFound);
}

pub(super) fn remove(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    case.layer("committed", None, &|root| file(root, "foo", "old", 0o644));
    // A name is free again as soon as its snapshot is removed, and whatever takes it begins anew.
    case.prepare("again", Some("committed"));
    snapshotter.remove(&case.key("again")).unwrap();
    case.view("again", Some("committed"));
    snapshotter.remove(&case.key("again")).unwrap();
    let mounts = case.prepare("again", None);
    let mounted = case.mount(&mounts);
    assert_eq!(std::fs::read_dir(&*mounted).unwrap().count(), 0);
    drop(mounted);
    snapshotter.remove(&case.key("committed")).unwrap();
    case.commit("committed", "again");
    let mounted = case.mount(&case.view("view", Some("committed")));
    assert!(!mounted.join("foo").exists());
    drop(mounted);
    assert_code(snapshotter.remove(&case.key("missing")), ErrorCode::NotFound);
    assert_code(snapshotter.usage(&case.key("missing")), ErrorCode::NotFound);
}

pub(super) fn remove_intermediate(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    case.layer("base", None, &|_| {});
    case.layer("middle", Some("base"), &|_| {});
    case.prepare("top", Some("middle"));
    for parent in ["middle", "base"] {
        assert_code(snapshotter.remove(&case.key(parent)), ErrorCode::FailedPrecondition);
    }
    for name in ["top", "middle", "base"] {
        snapshotter.remove(&case.key(name)).unwrap();
    }
}

pub(super) fn list(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    case.prepare("active", None);
    case.layer("committed", None, &|_| {});
    case.prepare("child", Some("committed"));
    let key = case.key("labelled");
    snapshotter.view(&key, Some(&case.key("committed")), &labels(&[("l", "1")])).unwrap();
    assert_eq!(case.names(), ["active", "child", "committed", "labelled"]);
    let all = snapshotter.list().unwrap();
    let find = |name: &str| all.iter().find(|info| info.name == case.key(name)).unwrap();
    assert_eq!(find("active").kind, Kind::Active);
    assert_eq!(find("committed").kind, Kind::Committed);
    assert_eq!(find("child").parent, Some(case.key("committed")));
    assert_eq!(find("labelled").kind, Kind::View);
    assert_eq!(find("labelled").labels, labels(&[("l", "1")]));
}

pub(super) fn stat_while_listing(case: &Case<'_>) {
    case.layer("c1", None, &|_| {});
    case.layer("c2", Some("c1"), &|_| {});
    case.prepare("a1", Some("c2"));
    case.view("v1", Some("c2"));
    for info in case.snapshotter.list().unwrap() {
        if info.name.starts_with(&case.key("")) {
            assert_eq!(case.snapshotter.stat(&info.name).unwrap(), info);
        }
    }
}

pub(super) fn labels_are_not_inherited(case: &Case<'_>) {
    let (key, name) = (case.key("active"), case.key("committed"));
    case.snapshotter.prepare(&key, None, &labels(&[("a", "1"), ("empty", "")])).unwrap();
    assert_eq!(case.snapshotter.stat(&key).unwrap().labels, labels(&[("a", "1")]));
    case.snapshotter.commit(&name, &key, &labels(&[("b", "2")]), None).unwrap();
    assert_eq!(case.snapshotter.stat(&name).unwrap().labels, labels(&[("b", "2")]));
}

/// Of several calls at the same time that want the same name, one succeeds, and the others leave nothing.
pub(super) fn one_of_many(case: &Case<'_>) {
    case.layer("parent", None, &|root| file(root, "foo", "foo", 0o644));
    let parent = case.key("parent");
    let barrier = Barrier::new(8);
    let made: usize = std::thread::scope(|scope| {
        let contenders: Vec<_> = (0..8)
            .map(|index| {
                let (barrier, parent) = (&barrier, parent.as_str());
                scope.spawn(move || {
                    barrier.wait();
                    let own = case.key(&format!("own-{index}"));
                    case.snapshotter.prepare(&own, Some(parent), &labels(&[])).unwrap();
                    match case.snapshotter.prepare(&case.key("same"), Some(parent), &labels(&[])) {
                        Ok(_) => 1,
                        result => {
                            assert_code(result, ErrorCode::AlreadyExists);
                            0
                        }
                    }
                })
            })
            .collect();
        contenders.into_iter().map(|contender| contender.join().unwrap()).sum()
    });
    assert_eq!(made, 1);
    assert_eq!(case.names().len(), 10);
    let sources: std::collections::BTreeSet<_> = (0..8)
        .map(|index| format!("{:?}", case.snapshotter.mounts(&case.key(&format!("own-{index}"))).unwrap()))
        .collect();
    assert_eq!(sources.len(), 8, "no two snapshots share a folder");
    drop(case.mount(&case.snapshotter.mounts(&case.key("same")).unwrap()));
}
