use std::path::PathBuf;

use davit_model::Mount;

use super::*;

/// A bind mount of a new folder with a file named `mark` in it.
fn bind(fixture: &Fixture, name: &str) -> Mount {
    let folder = fixture.folder.path().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("mark"), name).unwrap();
    let source = folder.display().to_string();
    Mount { kind: "bind".into(), source, target: String::new(), options: vec!["bind".into()] }
}

fn root() -> bool {
    let root = nix::unistd::getuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// The activations of which anything is there.
fn there(fixture: &Fixture) -> Vec<u64> {
    let mut numbers = fixture.metadata.inner.mount_targets.numbers().unwrap();
    numbers.sort_unstable();
    numbers
}

/// Takes away what a test has mounted, so that its folder can be removed.
struct Clean<'a>(&'a Fixture);

impl Drop for Clean<'_> {
    fn drop(&mut self) {
        let targets = &self.0.metadata.inner.mount_targets;
        for number in targets.numbers().unwrap_or_default() {
            let _ = targets.remove(number);
        }
    }
}

#[tokio::test]
async fn live_from_activate_to_deactivate() {
    if !root() {
        return;
    }
    let fixture = Fixture::new();
    let _clean = Clean(&fixture);
    let mounts = fixture.metadata.mounts(&scope("a"));
    let list = vec![bind(&fixture, "one"), bind(&fixture, "two")];
    let activated = mounts.activate("m", list.clone(), labels(&[("k", "v")]), true).await.unwrap();
    assert_eq!(activated.active.len(), 2);
    for (active, name) in activated.active.iter().zip(["one", "two"]) {
        assert_eq!(std::fs::read_to_string(active.point.join("mark")).unwrap(), name);
    }
    let [system] = activated.system.as_slice() else { panic!("{activated:?}") };
    assert_eq!((system.kind.as_str(), system.options.as_slice()), ("bind", &["rbind".to_owned()][..]));
    assert_eq!(PathBuf::from(&system.source), activated.active[1].point);

    let again = mounts.activate("m", list.clone(), Labels::new(), true).await;
    refused(again, ErrorCode::AlreadyExists, "mount \"m\": already exists");
    assert_eq!(mounts.get("m").unwrap(), activated);
    assert_eq!(mounts.list().unwrap(), [activated]);
    assert_eq!(fixture.metadata.mounts(&scope("b")).list().unwrap(), []);

    mounts.deactivate("m").await.unwrap();
    for outcome in [mounts.deactivate("m").await, mounts.get("m").map(drop)] {
        refused(outcome, ErrorCode::NotFound, "mount \"m\": not found");
    }
    assert_eq!(there(&fixture), [] as [u64; 0]);
    // The folders that were bound are not touched.
    assert!(fixture.folder.path().join("two/mark").exists());
}

#[tokio::test]
async fn leave_to_the_client_what_it_can_do() {
    if !root() {
        return;
    }
    let fixture = Fixture::new();
    let _clean = Clean(&fixture);
    let mounts = fixture.metadata.mounts(&scope("a"));
    let plain = mounts.activate("m", vec![bind(&fixture, "one")], Labels::new(), false).await;
    refused(plain, ErrorCode::Unimplemented, "not implemented");

    let upper = fixture.folder.path().join("upper");
    let overlay = Mount {
        kind: "format/mkdir/overlay".into(),
        source: "overlay".into(),
        target: String::new(),
        options: vec![
            format!("X-containerd.mkdir.path={}:0755", upper.display()),
            "lowerdir={{ overlay 1 0 }}".into(),
            format!("upperdir={}", upper.display()),
        ],
    };
    let list = vec![bind(&fixture, "one"), bind(&fixture, "two"), overlay];
    let activated = mounts.activate("m", list, Labels::new(), false).await.unwrap();
    let points: Vec<_> = activated.active.iter().map(|active| active.point.display().to_string()).collect();
    let [system] = activated.system.as_slice() else { panic!("{activated:?}") };
    assert_eq!(system.kind, "overlay");
    let options = [format!("lowerdir={}:{}", points[1], points[0]), format!("upperdir={}", upper.display())];
    assert_eq!(system.options, options);
    assert!(upper.is_dir());
}

#[tokio::test]
async fn leave_nothing_when_they_fail() {
    if !root() {
        return;
    }
    let fixture = Fixture::new();
    let mounts = fixture.metadata.mounts(&scope("a"));
    let absent = Mount { source: "/no/such/folder".into(), ..bind(&fixture, "one") };
    let list = vec![bind(&fixture, "one"), absent];
    let error = mounts.activate("m", list, Labels::new(), true).await.unwrap_err();
    assert!(chain(&error).starts_with("mount failed bind /no/such/folder"), "{}", chain(&error));
    assert_eq!(there(&fixture), [] as [u64; 0]);
    assert_eq!(mounts.list().unwrap(), []);
    let bad = Mount { kind: "format/bind".into(), source: "{{ mount 7 }}".into(), ..bind(&fixture, "one") };
    let error = mounts.activate("m", vec![bad], Labels::new(), false).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
    assert_eq!(there(&fixture), [] as [u64; 0]);
}

#[tokio::test]
async fn last_as_long_as_something_keeps_them() {
    if !root() {
        return;
    }
    let fixture = Fixture::new();
    let _clean = Clean(&fixture);
    let metadata = &fixture.metadata;
    metadata.leases(&scope("a")).create(Some("l"), Labels::new()).await.unwrap();
    let activate = async |scope: &Scope, name: &str, labels: Labels| {
        metadata.mounts(scope).activate(name, vec![bind(&fixture, "one")], labels, true).await.unwrap();
    };
    activate(&scope("a"), "free", Labels::new()).await;
    activate(&leased("a", "l"), "leased", Labels::new()).await;
    activate(&leased("a", "no such lease"), "orphan", Labels::new()).await;
    activate(&scope("a"), "child", labels(&[("containerd.io/gc.bref.container", "c")])).await;
    activate(&scope("a"), "named", Labels::new()).await;
    let by_label = labels(&[("containerd.io/gc.ref.mount.0", "named")]);
    metadata.containers(&scope("a")).create(Container { labels: by_label, ..container("c") }).await.unwrap();

    let names = || -> Vec<_> {
        let found = metadata.mounts(&scope("a")).list().unwrap();
        found.into_iter().map(|activation| activation.name).collect()
    };
    metadata.collect().await.unwrap();
    assert_eq!(names(), ["child", "leased", "named"]);
    assert_eq!(there(&fixture).len(), 3);
    metadata.leases(&scope("a")).delete("l", false).await.unwrap();
    metadata.collect().await.unwrap();
    assert_eq!(names(), ["child", "named"]);
    metadata.containers(&scope("a")).delete("c").await.unwrap();
    metadata.collect().await.unwrap();
    assert_eq!((names().len(), there(&fixture).len()), (0, 0));
}

#[tokio::test]
async fn are_known_to_the_next_daemon_if_they_are_still_there() {
    if !root() {
        return;
    }
    let fixture = Fixture::new();
    let labels = labels(&[("containerd.io/gc.bref.container", "c")]);
    for name in ["kept", "lost"] {
        let list = vec![bind(&fixture, "one")];
        fixture.metadata.mounts(&scope("a")).activate(name, list, labels.clone(), true).await.unwrap();
    }
    fixture.metadata.containers(&scope("a")).create(container("c")).await.unwrap();
    let lost = fixture.metadata.mounts(&scope("a")).get("lost").unwrap();
    davit_sys::mount::unmount_all(&lost.active[0].point).unwrap();
    let fixture = fixture.reopen();
    let _clean = Clean(&fixture);
    let mounts = fixture.metadata.mounts(&scope("a"));
    assert_eq!(mounts.list().unwrap().len(), 1);
    mounts.get("kept").unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(there(&fixture).len(), 1);
    mounts.deactivate("kept").await.unwrap();
    assert_eq!(there(&fixture).len(), 0);
}

#[tokio::test]
async fn a_container_keeps_what_its_root_filesystem_needs() {
    if !root() {
        return;
    }
    let fixture = Fixture::new();
    let _clean = Clean(&fixture);
    let (scope, mounts) = (scope("a"), fixture.metadata.mounts(&scope("a")));
    let plain = vec![bind(&fixture, "plain")];
    let nothing = || async { Vec::new() };
    let unasked = async { panic!("a shim is asked only when there is something to do") };
    let rootfs = mounts.activate_rootfs("c", plain.clone(), unasked).await.unwrap();
    assert_eq!(rootfs.mounts, plain);
    assert!(rootfs.hold.is_none());
    refused(mounts.get("c"), ErrorCode::NotFound, "mount \"c\": not found");

    let referring = Mount { kind: "format/bind".into(), source: "{{ mount 0 }}".into(), ..plain[0].clone() };
    let list = vec![plain[0].clone(), referring];
    let all = async { vec!["format/*".to_owned()] };
    let rootfs = mounts.activate_rootfs("c", list.clone(), all).await.unwrap();
    assert_eq!(rootfs.mounts, list);
    assert!(rootfs.hold.is_none());
    let rootfs = mounts.activate_rootfs("c", list.clone(), nothing()).await.unwrap();
    let point = mounts.get("c").unwrap().active[0].point.clone();
    assert_eq!(rootfs.mounts[0].source, point.display().to_string());
    // The next task of the container takes what is there, and nobody takes it away until there is that task, nor then.
    let again = mounts.activate_rootfs("c", list.clone(), nothing()).await.unwrap();
    assert_eq!(again.mounts, rootfs.mounts);
    drop(rootfs);
    mounts.deactivate_rootfs("c", || false).await;
    assert!(point.join("mark").exists());
    drop(again);
    mounts.deactivate_rootfs("c", || true).await;
    assert!(point.join("mark").exists());

    // The container's record keeps it, and nothing else does.
    let container = Container {
        id: "c".into(),
        runtime: Runtime { name: "r".into(), options: None },
        spec: Some(davit_model::Any::default()),
        ..Container::default()
    };
    let containers = fixture.metadata.containers(&scope);
    containers.create(container).await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert!(point.join("mark").exists());
    containers.delete("c").await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(there(&fixture), [] as [u64; 0]);

    drop(mounts.activate_rootfs("c", list.clone(), nothing()).await.unwrap());
    mounts.deactivate_rootfs("c", || false).await;
    mounts.deactivate_rootfs("c", || false).await;
    assert_eq!(there(&fixture), [] as [u64; 0]);

    // What a client holds under the same name is the client's.
    mounts.activate("c", list.clone(), Labels::new(), false).await.unwrap();
    let refusal = mounts.activate_rootfs("c", list, nothing()).await;
    refused(refusal, ErrorCode::AlreadyExists, "mount \"c\": already exists");
    mounts.deactivate_rootfs("c", || false).await;
    mounts.get("c").unwrap();
}
