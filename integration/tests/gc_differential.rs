//! Garbage collection beside containerd: the same calls on both, and the same must be left, in the API and on disk.
//!
//! The peer is Debian's containerd, or the program that `DAVIT_PEER_CONTAINERD` names. What its version does not know yet is
//! checked of ours alone.

use anyhow::{Context, Result, ensure};
use davit_integration::bins;
use davit_integration::model::Subject;
use davit_integration::model::call::{
    Action, Call, Labels, Message, NewSnapshot, Resource, SnapshotKey, Step,
};
use davit_integration::model::filter::Filters;
use davit_integration::model::subject;
use davit_integration::model::together::Together;
use davit_integration::model::wire::Wire;
use davit_integration::model::world::digest_of;
use serde_json::{Value, json};

use crate::root;

/// True when containerd can be started; says so when it cannot.
fn peer() -> bool {
    let named = std::env::var_os("DAVIT_PEER_CONTAINERD").is_some();
    let found = named || bins::on_path("containerd").is_some();
    if !found {
        eprintln!("skipped: needs containerd (apt-get install containerd)");
    }
    root() && found
}

#[test]
fn random_calls_leave_the_same() -> Result<()> {
    if !peer() {
        return Ok(());
    }
    for seed in [11, 12, 13] {
        let (ours, peer) = (subject::ours()?, subject::peer()?);
        let lacking = peer.unknown_rules();
        let mut together = Together::new(&ours, &peer, &lacking)?;
        together.draw(seed, 700, &lacking).with_context(|| format!("seed {seed}"))?;
        eprintln!("seed {seed}: {:?}", together.summary);
        ensure!(together.summary.collections > 0, "no collection");
    }
    Ok(())
}

const PAST: &str = "2001-02-03T04:05:06Z";
const FUTURE: &str = "2999-01-01T00:00:00Z";
const EXPIRE: &str = "containerd.io/gc.expire";
const FLAT: &str = "containerd.io/gc.flat";
const ROOT: &str = "containerd.io/gc.root";

/// What a rule is tried on.
struct Case {
    name: &'static str,
    /// The version of containerd that has the rule.
    since: (u32, u32),
    /// Made under a lease that is deleted in the end.
    made: Vec<Call>,
    /// What is left then: blobs, images and snapshots by their short names.
    left: &'static [&'static str],
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// The digest of the blob of this name.
fn digest(name: &str) -> String {
    digest_of(name.as_bytes())
}

fn blob(name: &str, pairs: &[(&str, &str)]) -> Call {
    let message = Message {
        action: Action::Commit,
        data: name.as_bytes().to_vec(),
        labels: labels(pairs),
        ..Message::default()
    };
    Call::Write { reference: format!("ref-{name}"), messages: vec![message], second: false }
}

fn image(name: &str, target: &str, pairs: &[(&str, &str)]) -> Call {
    let target = json!({ "digest": digest(target), "size": 1, "mediatype": "application/x" });
    Call::CreateImage {
        record: json!({ "name": name, "labels": labels(pairs), "target": target, "annotations": {} }),
    }
}

fn snapshot(key: &str, parent: &str, pairs: &[(&str, &str)]) -> Call {
    let at = SnapshotKey { snapshotter: "native".into(), key: key.into() };
    Call::Prepare(NewSnapshot { at, parent: parent.into(), labels: labels(pairs) })
}

fn commit(key: &str, from: &str, pairs: &[(&str, &str)]) -> Call {
    let at = SnapshotKey { snapshotter: "native".into(), key: key.into() };
    Call::Commit { new: NewSnapshot { at, parent: String::new(), labels: labels(pairs) }, from: from.into() }
}

fn container(id: &str, key: &str, pairs: &[(&str, &str)]) -> Call {
    let snapshotter = if key.is_empty() { "" } else { "native" };
    let record = json!({
        "id": id, "labels": labels(pairs), "image": "", "runtime": { "name": "r", "options": null },
        "spec": "s {}", "snapshotter": snapshotter, "snapshotkey": key, "extensions": {}, "sandbox": "",
    });
    Call::CreateContainer { record }
}

fn sandbox(id: &str, pairs: &[(&str, &str)]) -> Call {
    let record = json!({
        "id": id, "labels": labels(pairs), "runtime": { "name": "r", "options": null },
        "spec": null, "extensions": {}, "sandboxer": "shim",
    });
    Call::CreateSandbox { record }
}

fn lease(id: &str, pairs: &[(&str, &str)]) -> Call {
    Call::CreateLease { id: id.into(), labels: labels(pairs) }
}

fn hold(lease: &str, kind: &str, id: &str) -> Call {
    Call::AddResource(Resource { lease: lease.into(), kind: kind.into(), id: id.into() })
}

/// A case with a blob `root` that is a root and has a label, and others that it may keep.
fn by_label(
    name: &'static str,
    since: (u32, u32),
    label: &str,
    value: &str,
    others: Vec<Call>,
    left: &'static [&'static str],
) -> Case {
    let mut made = others;
    made.push(blob("root", &[(ROOT, "1"), (label, value)]));
    Case { name, since, made, left }
}

fn references() -> Vec<Case> {
    let (a, b) = (digest("a"), digest("b"));
    let (a, b) = (a.as_str(), b.as_str());
    let root = digest("root");
    let root = root.as_str();
    let content = "containerd.io/gc.ref.content";
    let native = "containerd.io/gc.ref.snapshot.native";
    let both = || vec![blob("b", &[]), blob("a", &[(content, b)])];
    let named = |suffix: &str| format!("{content}{suffix}");
    let of = |suffix: &str| format!("{native}{suffix}");
    let back = |what: &str| format!("containerd.io/gc.bref.{what}");
    let condition = "containerd.io/gc.cond.snapshot.native";
    let used = "containerd.io/gc.cond.value-usedat";
    vec![
        by_label("a reference is followed", (1, 6), content, a, both(), &["a", "b", "root"]),
        by_label("a name after a dot", (1, 6), &named(".l.0"), a, both(), &["a", "b", "root"]),
        by_label("a name after a slash", (1, 6), &named("/x.y"), a, both(), &["a", "b", "root"]),
        by_label("a longer word is another label", (1, 6), &named("s"), a, both(), &["root"]),
        by_label("a snapshot", (1, 6), native, "s", vec![snapshot("s", "", &[])], &["root", "s"]),
        by_label(
            "a snapshot with a name",
            (1, 6),
            &of("/x"),
            "s",
            vec![snapshot("s", "", &[])],
            &["root", "s"],
        ),
        by_label(
            "a dot is of the snapshotter",
            (1, 6),
            &of(".x"),
            "s",
            vec![snapshot("s", "", &[])],
            &["root"],
        ),
        by_label(
            "a snapshot and its parent",
            (1, 6),
            native,
            "s",
            vec![snapshot("k", "", &[]), commit("p", "k", &[]), snapshot("s", "p", &[])],
            &["p", "root", "s"],
        ),
        by_label(
            "a label of a snapshot",
            (1, 6),
            native,
            "s",
            vec![blob("b", &[]), blob("a", &[(content, b)]), snapshot("s", "", &[(content, a)])],
            &["a", "b", "root", "s"],
        ),
        by_label(
            "an expired image by a label",
            (2, 0),
            "containerd.io/gc.ref.image",
            "i",
            vec![blob("a", &[]), image("i", "a", &[(EXPIRE, PAST)])],
            &["a", "i", "root"],
        ),
        by_label(
            "a back reference to content",
            (2, 2),
            "x",
            "y",
            vec![blob("a", &[(&back("content"), root)])],
            &["a", "root"],
        ),
        by_label(
            "one with a name",
            (2, 2),
            "x",
            "y",
            vec![blob("a", &[(&back("content.1"), root)])],
            &["a", "root"],
        ),
        by_label("one to nothing", (2, 2), "x", "y", vec![blob("a", &[(&back("content"), b)])], &["root"]),
        by_label(
            "a snapshot's back reference",
            (2, 2),
            "x",
            "y",
            vec![snapshot("s", "", &[(&back("content"), root)])],
            &["root", "s"],
        ),
        by_label(
            "a condition that holds",
            (2, 3),
            condition,
            "usedat<1h|s",
            vec![snapshot("s", "", &[(used, FUTURE)])],
            &["root", "s"],
        ),
        by_label(
            "one that does not",
            (2, 3),
            condition,
            "usedat<1h|s",
            vec![snapshot("s", "", &[(used, PAST)])],
            &["root"],
        ),
        by_label(
            "one of two",
            (2, 3),
            condition,
            "usedat<1h,usedat>1h|s",
            vec![snapshot("s", "", &[(used, PAST)])],
            &["root", "s"],
        ),
        by_label(
            "a condition that is none",
            (2, 3),
            condition,
            "usedat=1h|s",
            vec![snapshot("s", "", &[(used, PAST)])],
            &["root"],
        ),
    ]
}

fn roots() -> Vec<Case> {
    let (a, b) = (digest("a"), digest("b"));
    let (a, b) = (a.as_str(), b.as_str());
    let content = "containerd.io/gc.ref.content";
    let back = |what: &str| format!("containerd.io/gc.bref.{what}");
    let case = |name, since, made, left| Case { name, since, made, left };
    let both = || vec![blob("b", &[]), blob("a", &[(content, b)])];
    let with = |mut made: Vec<Call>, more: Vec<Call>| {
        made.extend(more);
        made
    };
    vec![
        case("nothing keeps them", (1, 6), with(both(), vec![snapshot("s", "", &[])]), &[]),
        case("a circle keeps nothing", (1, 6), vec![blob("a", &[(content, a)])], &[]),
        case(
            "an expiry makes no root",
            (1, 6),
            vec![blob("a", &[(EXPIRE, FUTURE)]), snapshot("s", "", &[(EXPIRE, FUTURE)])],
            &[],
        ),
        case(
            "a root by its label",
            (1, 6),
            vec![blob("a", &[(ROOT, "1")]), snapshot("s", "", &[(ROOT, "1")])],
            &["a", "s"],
        ),
        case("a label that begins so", (2, 2), vec![blob("a", &[("containerd.io/gc.root.x", "1")])], &["a"]),
        case("an image and its target", (1, 6), with(both(), vec![image("i", "a", &[])]), &["a", "b", "i"]),
        case(
            "a label of an image",
            (1, 6),
            with(both(), vec![image("i", "none", &[(content, a)])]),
            &["a", "b", "i"],
        ),
        case("an expired image", (2, 0), with(both(), vec![image("i", "a", &[(EXPIRE, PAST)])]), &[]),
        case(
            "an image that will expire",
            (2, 0),
            with(both(), vec![image("i", "a", &[(EXPIRE, FUTURE)])]),
            &["a", "b", "i"],
        ),
        case(
            "an expiry that is no time",
            (2, 0),
            with(both(), vec![image("i", "a", &[(EXPIRE, "tomorrow")])]),
            &["a", "b", "i"],
        ),
        case(
            "a container and its snapshot",
            (1, 6),
            vec![snapshot("s", "", &[]), container("c", "s", &[])],
            &["s"],
        ),
        case(
            "a label of a container",
            (1, 6),
            with(both(), vec![container("c", "", &[(content, a)])]),
            &["a", "b"],
        ),
        case(
            "a back reference to a container",
            (2, 2),
            vec![blob("a", &[(&back("container"), "c")]), container("c", "", &[])],
            &["a"],
        ),
        case(
            "a back reference to an image",
            (2, 2),
            vec![blob("a", &[(&back("image"), "i")]), image("i", "none", &[])],
            &["a", "i"],
        ),
        case(
            "a back reference to a snapshot",
            (2, 2),
            vec![blob("a", &[(&back("snapshot.native/x"), "s")]), snapshot("s", "", &[(ROOT, "1")])],
            &["a", "s"],
        ),
        case(
            "a label of a sandbox",
            (1, 7),
            with(both(), vec![sandbox("pod", &[(content, a)])]),
            &["a", "b"],
        ),
        case("a lease", (1, 6), with(both(), vec![lease("l", &[]), hold("l", "content", a)]), &["a", "b"]),
        case(
            "a flat lease",
            (1, 6),
            with(both(), vec![lease("l", &[(FLAT, "1")]), hold("l", "content", a)]),
            &["a"],
        ),
        case(
            "a flat lease of a snapshot",
            (1, 6),
            vec![
                blob("b", &[]),
                snapshot("k", "", &[]),
                commit("p", "k", &[(content, b)]),
                snapshot("s", "p", &[(content, b)]),
                lease("l", &[(FLAT, "1")]),
                hold("l", "snapshots/native", "s"),
            ],
            &["p", "s"],
        ),
        case(
            "a flat lease of an image",
            (2, 0),
            with(
                both(),
                vec![
                    image("i", "a", &[(EXPIRE, PAST)]),
                    lease("l", &[(FLAT, "1")]),
                    hold("l", "images", "i"),
                ],
            ),
            &["a", "i"],
        ),
        case(
            "a lease of an expired image",
            (2, 0),
            with(both(), vec![image("i", "a", &[(EXPIRE, PAST)]), lease("l", &[]), hold("l", "images", "i")]),
            &["a", "b", "i"],
        ),
        case(
            "an expired lease",
            (1, 6),
            with(both(), vec![lease("l", &[(EXPIRE, PAST)]), hold("l", "content", a)]),
            &[],
        ),
        case(
            "a lease that will expire",
            (1, 6),
            with(both(), vec![lease("l", &[(EXPIRE, FUTURE)]), hold("l", "content", a)]),
            &["a", "b"],
        ),
        case(
            "a lease whose expiry is no time",
            (1, 6),
            with(both(), vec![lease("l", &[(EXPIRE, "soon")]), hold("l", "content", a)]),
            &["a", "b"],
        ),
        case(
            "a lease of what is not there",
            (1, 6),
            with(both(), vec![lease("l", &[]), hold("l", "content", &digest("c"))]),
            &[],
        ),
        case(
            "a flat back reference",
            (2, 2),
            vec![
                blob("a", &[(&back("content"), b)]),
                blob("b", &[]),
                lease("l", &[(FLAT, "1")]),
                hold("l", "content", b),
            ],
            &["b"],
        ),
    ]
}

/// What is left of a case, by its short name.
async fn left(wire: &Wire, namespace: &str, names: &[&str]) -> Result<Vec<String>> {
    let none = Filters::default;
    let calls = [
        (Call::ListContent { filters: none() }, "digest"),
        (Call::ListImages { filters: none() }, "name"),
        (Call::ListSnapshots { snapshotter: "native".into(), filters: none() }, "name"),
    ];
    let mut found = Vec::new();
    for (call, member) in calls {
        let step = Step { namespace: Some(namespace.into()), lease: None, call };
        let list = wire.answer(&step).await?;
        found.extend(
            list.as_array()
                .into_iter()
                .flatten()
                .filter_map(|record| record[member].as_str().map(str::to_owned)),
        );
    }
    // Blobs have the names of what is in them.
    let short = |name: String| {
        names.iter().find(|short| digest(short) == name).map_or(name, |short| (*short).to_owned())
    };
    let mut found: Vec<String> = found.into_iter().map(short).collect();
    found.sort();
    Ok(found)
}

/// Makes all cases, each in a namespace of its own, and collects; gives what is left of each.
async fn carry_out(subject: &dyn Subject, cases: &[Case]) -> Result<Vec<Vec<String>>> {
    let wire = Wire::connect(&subject.address()).await?;
    let namespace = |at: usize| format!("case-{at}");
    for (at, case) in cases.iter().enumerate() {
        let call = |lease: Option<&str>, call| Step {
            namespace: Some(namespace(at)),
            lease: lease.map(str::to_owned),
            call,
        };
        wire.answer(&call(None, lease("making", &[]))).await?;
        for made in &case.made {
            let reply = wire.answer(&call(Some("making"), made.clone())).await;
            // What a version does not know it refuses, and so does not keep.
            let reply: Value = match reply {
                Err(status) if !matches!(made, Call::AddResource(_) | Call::CreateSandbox { .. }) => {
                    return Err(status).with_context(|| format!("{}: {made:?}", case.name));
                }
                reply => reply.unwrap_or_default(),
            };
            ensure!(reply["end"].is_null(), "{}: {reply}", case.name);
        }
        // The last one collects what all of them have let go.
        let sync = at + 1 == cases.len();
        wire.answer(&call(None, Call::DeleteLease { id: "making".into(), sync })).await?;
    }
    let mut all = Vec::new();
    for at in 0..cases.len() {
        all.push(left(&wire, &namespace(at), &["a", "b", "root", "none"]).await?);
    }
    Ok(all)
}

#[test]
fn every_rule_leaves_the_same() -> Result<()> {
    if !peer() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let cases: Vec<Case> = references().into_iter().chain(roots()).collect();
    let (ours, peer) = (subject::ours()?, subject::peer()?);
    let found = runtime.block_on(carry_out(&ours, &cases))?;
    let theirs = runtime.block_on(carry_out(&peer, &cases))?;
    let mut compared = 0;
    for ((case, found), theirs) in cases.iter().zip(&found).zip(&theirs) {
        ensure!(found == case.left, "{}: left is {found:?}, not {:?}", case.name, case.left);
        if peer.version() >= case.since {
            compared += 1;
            ensure!(found == theirs, "{}: ours leaves {found:?}, containerd {theirs:?}", case.name);
        }
    }
    // All blobs are in one store: what nobody has any more is gone from the disk.
    let kept = ["a", "b", "root"].map(digest).into();
    ensure!(ours.blobs()? == kept, "on disk: {:?}", ours.blobs()?);
    eprintln!("{} rules, {compared} of them compared with containerd {:?}", cases.len(), peer.version());
    Ok(())
}
