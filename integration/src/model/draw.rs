//! Draws steps from a seed: mostly calls that have something to find, and some that have not.
//!
//! What is drawn depends on the seed and on the model's state only, so that a seed is a sequence.

use serde_json::{Value, json};

use super::call::{Action, Call, Change, DEAL, Labels, Message, NewSnapshot, Resource, SnapshotKey, Step};
use super::collect::{FUTURE, PAST};
use super::filter::{Filter, Filters, Selector, Test};
use super::rule::Rule;
use super::world::{SNAPSHOTTERS, Space, World, digest_of, text};
use crate::soak::random::Random;

const NAMESPACES: [&str; 3] = ["one", "two", "third.space"];
const IDS: [&str; 4] = ["a", "b-1", "c.c", "d_d"];
const IMAGES: [&str; 4] = ["docker.io/library/a:1", "docker.io/library/b:1", "plain", "with blank"];
const REFERENCES: [&str; 3] = ["layer-1", "upload/2", "third ref"];
const LEASES: [&str; 4] = ["lease", "4711-AbCd", "with/slash", "spare"];
const KEYS: [&str; 7] = ["base", "sha256:abc", "a/b", "work", "extract-1 x", "top", "other"];
/// The numbers of blobs.
const BLOBS: u64 = 7;

/// The whole of a blob.
fn data(number: u64) -> Vec<u8> {
    let byte = u8::try_from(number).unwrap_or_default();
    vec![byte; usize::try_from(number * 1000 + 1).unwrap_or_default()]
}

fn digest(number: u64) -> String {
    digest_of(&data(number))
}

/// A source of steps.
pub struct Draw {
    random: Random,
    deal: Vec<&'static str>,
    avoided: Vec<Rule>,
}

impl Draw {
    /// Steps of this seed.
    pub fn new(seed: u64) -> Draw {
        Draw { random: Random::new(seed), deal: Vec::new(), avoided: Vec::new() }
    }

    /// The same, without labels that only these rules give a meaning to.
    pub fn avoiding(seed: u64, rules: &[Rule]) -> Draw {
        Draw { avoided: rules.to_vec(), ..Draw::new(seed) }
    }

    /// One of `count` times.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.random.below(count) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.random.below(from.len() as u64)).unwrap_or_default()]
    }

    fn some<T: Clone>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.random.below(from.len() as u64)).unwrap_or_default()].clone()
    }

    /// One of the names that are there, three times out of four, or any of `all`.
    fn name(&mut self, there: &[String], all: &[&str]) -> String {
        if !there.is_empty() && !self.one_in(4) { self.some(there) } else { self.pick(all).to_owned() }
    }

    /// One of `all` that is not there, three times out of four, or any.
    fn new_name(&mut self, there: &[String], all: &[&str]) -> String {
        let free: Vec<&str> =
            all.iter().copied().filter(|name| !there.iter().any(|other| other == name)).collect();
        if !free.is_empty() && !self.one_in(4) {
            self.pick(&free).to_owned()
        } else {
            self.pick(all).to_owned()
        }
    }

    /// The next step.
    pub fn step(&mut self, world: &World) -> Step {
        if self.deal.is_empty() {
            self.deal = DEAL.to_vec();
        }
        let at = usize::try_from(self.random.below(self.deal.len() as u64)).unwrap_or_default();
        let method = self.deal.swap_remove(at);
        // Half of all happens in the first namespace.
        let namespace = if self.one_in(2) { NAMESPACES[0] } else { self.pick(&NAMESPACES) };
        let space = world.space(namespace);
        let call = self.call(method, namespace, &space);
        let leases: Vec<String> = space.leases.keys().cloned().collect();
        let (namespace, lease) = match self.random.below(20) {
            // With a lease that is not there, in a namespace that may not be there either.
            0 if matches!(call, Call::Prepare(_) | Call::View(_) | Call::Write { .. }) => {
                ("empty", Some("no-such".to_owned()))
            }
            0 => (namespace, Some(self.pick(&LEASES).to_owned())),
            1..=8 if !leases.is_empty() => (namespace, Some(self.some(&leases))),
            _ => (namespace, None),
        };
        let plain_list =
            matches!(call, Call::ListContainers { .. } | Call::ListImages { .. } | Call::ListLeases { .. });
        let namespace = match self.random.below(12) {
            0 if plain_list => None,
            1 if plain_list => Some("no/namespace".to_owned()),
            _ => Some(namespace.to_owned()),
        };
        Step { namespace, lease, call }
    }

    fn call(&mut self, method: &str, namespace: &str, space: &Space) -> Call {
        let (service, verb) = method.split_once('.').unwrap_or_default();
        match service {
            "Namespaces" => self.of_namespaces(verb, namespace),
            "Containers" => self.of_containers(verb, space),
            "Images" => self.of_images(verb, space),
            "Content" => self.of_content(verb, space),
            "Leases" => self.of_leases(verb, space),
            "Store" => self.of_sandboxes(verb, space),
            _ => self.of_snapshots(verb, space),
        }
    }

    fn of_namespaces(&mut self, verb: &str, namespace: &str) -> Call {
        // One beside those that calls are made in: it is empty as long as nothing was put there.
        let name = match self.random.below(8) {
            0..3 => "empty",
            3 if verb == "Create" => "not/one",
            _ => namespace,
        };
        let name = name.to_owned();
        match verb {
            "Get" => Call::GetNamespace { name },
            "List" => Call::ListNamespaces,
            "Create" => Call::CreateNamespace { name, labels: self.plain_labels() },
            "Update" => {
                let labels = self.plain_labels();
                let mask = self.mask(&["labels."], &json!({ "labels": labels }));
                Call::UpdateNamespace { name, labels, mask }
            }
            _ => Call::DeleteNamespace { name },
        }
    }

    fn of_containers(&mut self, verb: &str, space: &Space) -> Call {
        let there: Vec<String> = space.containers.keys().cloned().collect();
        match verb {
            "Get" => Call::GetContainer { id: self.name(&there, &IDS) },
            "List" => Call::ListContainers { filters: self.container_filters() },
            "ListStream" => Call::StreamContainers { filters: self.container_filters() },
            "Create" => {
                let mut record = self.container(space);
                record["id"] = json!(self.new_name(&there, &IDS));
                match self.random.below(20) {
                    0 => record["id"] = json!("no/id"),
                    1 => record["spec"] = Value::Null,
                    2 => record["runtime"]["name"] = json!(""),
                    3 => record["snapshotter"] = json!(""),
                    _ => {}
                }
                Call::CreateContainer { record }
            }
            "Update" => {
                let mut record = self.container(space);
                let id = self.name(&there, &IDS);
                if let Some(known) = space.containers.get(&id)
                    && !self.one_in(6)
                {
                    for same in ["runtime", "snapshotter"] {
                        record[same] = known[same].clone();
                    }
                }
                record["id"] = json!(if self.one_in(20) { "" } else { id.as_str() });
                let fields = [
                    "labels",
                    "spec",
                    "extensions",
                    "image",
                    "snapshotkey",
                    "labels.",
                    "labels.",
                    "extensions.",
                ];
                let mask = self.mask(&fields, &record);
                Call::UpdateContainer(Change { record, mask })
            }
            _ => Call::DeleteContainer { id: self.name(&there, &IDS) },
        }
    }

    fn container(&mut self, space: &Space) -> Value {
        let SnapshotKey { snapshotter, key } = self.snapshot_there(space, "");
        let runtime = self.pick(&["io.containerd.runc.v2", "io.containerd.runc.v2", "example.other.v1"]);
        let any = |text: &str| format!("example.com/{text} {{\"value\":\"{text}\"}}");
        json!({
            "labels": self.labels(space, "containers"),
            "image": self.pick(&IMAGES),
            "runtime": { "name": runtime, "options": if self.one_in(2) { Value::Null } else { json!(any("Options")) } },
            "spec": any(self.pick(&["Spec", "Other"])),
            "snapshotter": snapshotter,
            "snapshotkey": key,
            "extensions": self.extensions(),
            "sandbox": self.pick(&["", "pod"]),
        })
    }

    fn extensions(&mut self) -> Value {
        let any = |text: &str| format!("example.com/{text} {{\"value\":\"{text}\"}}");
        let mut extensions = json!({ "second.part": any(self.pick(&["One", "Two"])) });
        if self.one_in(2) {
            extensions["first"] = json!(any("First"));
        }
        extensions
    }

    fn container_filters(&mut self) -> Filters {
        let runtime = ["io.containerd.runc.v2", "example.other.v1"];
        self.filters(&[(&["id"], &IDS), (&["image"], &IMAGES), (&["runtime", "name"], &runtime)])
    }

    fn of_images(&mut self, verb: &str, space: &Space) -> Call {
        let there: Vec<String> = space.images.keys().cloned().collect();
        let name = self.name(&there, &IMAGES);
        match verb {
            "Get" => Call::GetImage { name },
            "List" => {
                let types = ["application/a", "application/b+json"];
                let path: &[&str] = &["target", "mediatype"];
                Call::ListImages { filters: self.filters(&[(&["name"], &IMAGES), (path, &types)]) }
            }
            "Create" => {
                let mut record = self.image(space);
                record["name"] = json!(self.new_name(&there, &IMAGES));
                self.spoil_image(&mut record);
                Call::CreateImage { record }
            }
            "Update" => {
                let mut record = self.image(space);
                record["name"] = json!(name);
                self.spoil_image(&mut record);
                let mask =
                    self.mask(&["labels", "target", "annotations", "labels.", "annotations."], &record);
                Call::UpdateImage(Change { record, mask })
            }
            _ => {
                let own = space.images.get(&name).map(|record| text(&record["target"], "digest"));
                let target = match self.random.below(4) {
                    0 => Some(digest(self.random.below(BLOBS))),
                    1 => own,
                    _ => None,
                };
                Call::DeleteImage { name, target, sync: self.one_in(3) }
            }
        }
    }

    fn image(&mut self, space: &Space) -> Value {
        let size = 1 + self.random.below(1000);
        let blob = self.blob(space);
        json!({
            "labels": self.labels(space, "images"),
            "target": { "digest": blob, "size": size, "mediatype": self.pick(&["application/a", "application/b+json"]) },
            "annotations": self.plain_labels(),
        })
    }

    fn spoil_image(&mut self, record: &mut Value) {
        match self.random.below(24) {
            0 => record["name"] = json!(""),
            1 => record["target"]["size"] = json!(0),
            2 => record["target"]["digest"] = json!("no digest"),
            3 => record["target"]["mediatype"] = json!(""),
            _ => {}
        }
    }

    fn of_content(&mut self, verb: &str, space: &Space) -> Call {
        let references: Vec<String> = space.ingests.keys().cloned().collect();
        let digest = if self.one_in(20) { "no digest".to_owned() } else { self.blob(space) };
        match verb {
            "Info" => Call::Info { digest },
            "Update" => {
                let record = json!({ "digest": digest, "labels": self.labels(space, "content") });
                let mask = self.mask(&["labels", "labels."], &record);
                Call::UpdateInfo(Change { record, mask })
            }
            "List" => {
                let digests: Vec<String> = (0..BLOBS).map(self::digest).collect();
                let digests: Vec<&str> = digests.iter().map(String::as_str).collect();
                Call::ListContent { filters: self.filters(&[(&["digest"], &digests)]) }
            }
            "Delete" => Call::DeleteContent { digest },
            "Read" => {
                let offset = self.pick(&[0, 0, 1, 1000, 1001, 5000]);
                Call::Read { digest, offset, size: self.pick(&[0, 0, 1, 100, 100_000]) }
            }
            "Status" => Call::Status { reference: self.name(&references, &REFERENCES) },
            "ListStatuses" => Call::ListStatuses { filters: self.filters(&[(&["ref"], &REFERENCES)]) },
            "Abort" => Call::Abort { reference: self.name(&references, &REFERENCES) },
            _ => self.write(space),
        }
    }

    /// A blob that is there, mostly, or another.
    fn blob(&mut self, space: &Space) -> String {
        let there: Vec<String> = space.blobs.keys().cloned().collect();
        if !there.is_empty() && !self.one_in(4) {
            self.some(&there)
        } else {
            digest(self.random.below(BLOBS))
        }
    }

    /// A session: what clients do, and what they should not.
    fn write(&mut self, space: &Space) -> Call {
        let reference = self.pick(&REFERENCES).to_owned();
        let ingest = space.ingests.get(&reference).and_then(|ingest| ingest.data.as_ref());
        let begun = ingest.map_or(0, |(data, _)| data.len());
        let resumed = ingest.and_then(|(data, _)| data.first()).filter(|_| self.one_in(2));
        let number = resumed.map_or_else(|| self.random.below(BLOBS), |byte| u64::from(*byte) % BLOBS);
        let whole = data(number);
        let expected = digest(number);
        let announced = self.one_in(3);
        let total = if self.one_in(2) { whole.len() as i64 } else { 0 };
        let mut messages = vec![Message {
            total,
            expected: if announced { expected.clone() } else { String::new() },
            ..Message::default()
        }];
        let write = |action, offset: usize, data: &[u8]| Message {
            action,
            offset: offset as i64,
            data: data.to_vec(),
            ..Message::default()
        };
        let half = whole.len() / 2;
        let kind = if begun > 0 && self.one_in(2) { 4 } else { self.random.below(10) };
        match kind {
            // Only asks.
            0 => {}
            // Writes half, and leaves it at that.
            1 | 2 => messages.push(write(Action::Write, 0, &whole[..half])),
            // Writes where nothing is.
            3 => messages.push(write(Action::Write, begun + 77, b"elsewhere")),
            // Goes on where it was left: right if that was half of the same blob.
            4 => messages.push(write(Action::Commit, begun.max(half), &whole[half..])),
            // All at once, or in two.
            5 => messages.extend([
                write(Action::Write, 0, &whole[..half]),
                write(Action::Commit, half, &whole[half..]),
            ]),
            6 if announced => messages.push(write(Action::Commit, whole.len(), b"")),
            7 if announced => messages.push(write(Action::Commit, 0, b"")),
            _ => messages.push(write(Action::Commit, 0, &whole)),
        }
        if let Some(last) = messages.last_mut().filter(|last| last.action == Action::Commit) {
            last.labels = self.labels(space, "content");
            last.total = self.pick(&[0, 0, 0, 0, whole.len() as i64, whole.len() as i64, 3]);
            last.expected = match self.random.below(8) {
                0..3 => expected,
                3 => digest(self.random.below(BLOBS)),
                _ => String::new(),
            };
        }
        let second = !announced && self.one_in(12);
        Call::Write { reference, messages, second }
    }

    fn of_leases(&mut self, verb: &str, space: &Space) -> Call {
        let there: Vec<String> = space.leases.keys().cloned().collect();
        let lease = self.name(&there, &LEASES);
        match verb {
            "Create" => {
                let mut labels = self.plain_labels();
                if self.one_in(2) {
                    labels.insert("containerd.io/gc.flat".into(), "1".into());
                }
                if self.one_in(3) {
                    self.expire(&mut labels);
                }
                Call::CreateLease { id: self.new_name(&there, &LEASES), labels }
            }
            "Delete" => Call::DeleteLease { id: lease, sync: !self.one_in(3) },
            "List" => Call::ListLeases { filters: self.filters(&[(&["id"], &LEASES)]) },
            "AddResource" => Call::AddResource(self.resource(space, lease)),
            "DeleteResource" => {
                let mut resource = self.resource(space, lease);
                // One that it holds, mostly.
                let held = space
                    .leases
                    .get(&resource.lease)
                    .map(|(_, held)| held.iter().cloned().collect::<Vec<_>>());
                if let Some(held) = held.filter(|held| !held.is_empty())
                    && !self.one_in(3)
                {
                    let (kind, id) = self.some(&held);
                    resource = Resource { kind, id, ..resource };
                }
                Call::DeleteResource(resource)
            }
            _ => Call::ListResources { lease },
        }
    }

    fn resource(&mut self, space: &Space, lease: String) -> Resource {
        let (kind, id) = match self.random.below(16) {
            0 => ("content".into(), "no digest".into()),
            1 => ("content/part".into(), self.blob(space)),
            2 => ("snapshots".into(), "base".into()),
            3 => ("containers".into(), "a".into()),
            4..8 => ("content".into(), self.blob(space)),
            8..10 => ("images".into(), self.pick(&IMAGES).to_owned()),
            10 => ("ingests".into(), self.pick(&REFERENCES).to_owned()),
            _ => {
                let at = self.snapshot_there(space, "");
                (format!("snapshots/{}", at.snapshotter), at.key)
            }
        };
        Resource { lease, kind, id }
    }

    fn of_snapshots(&mut self, verb: &str, space: &Space) -> Call {
        let mut at = self.snapshot_there(space, if verb == "Mounts" { "active" } else { "" });
        if self.one_in(40) {
            at.snapshotter = "no-such".into();
        }
        match verb {
            "Prepare" => Call::Prepare(self.new_snapshot(space)),
            "View" => Call::View(self.new_snapshot(space)),
            "Mounts" => Call::Mounts(at),
            "Commit" => {
                let from = self.snapshot_there(space, "active");
                let there = keys(space, &from.snapshotter, "");
                let key = self.new_name(&there, &KEYS);
                let committed = keys(space, &from.snapshotter, "committed");
                // Onto a parent of the commit's choice: overlayfs alone can.
                let rebase = from.snapshotter == "overlayfs" && self.one_in(2) && !committed.is_empty();
                let parent = if rebase { self.some(&committed) } else { String::new() };
                let labels = self.labels(space, "snapshots");
                let at = SnapshotKey { snapshotter: from.snapshotter, key };
                Call::Commit { new: NewSnapshot { at, parent, labels }, from: from.key }
            }
            "Remove" => Call::Remove(at),
            "Stat" => Call::Stat(at),
            "Update" => {
                let name = if self.one_in(20) { String::new() } else { at.key };
                let record = json!({ "name": name, "labels": self.labels(space, "snapshots") });
                let mask = self.mask(&["labels", "labels."], &record);
                Call::UpdateSnapshot { snapshotter: at.snapshotter, change: Change { record, mask } }
            }
            "List" => {
                let kinds = ["active", "view", "committed"];
                let filters = self.filters(&[(&["kind"], &kinds), (&["name"], &KEYS), (&["parent"], &KEYS)]);
                Call::ListSnapshots { snapshotter: at.snapshotter, filters }
            }
            "Usage" => Call::Usage(at),
            _ => Call::Cleanup { snapshotter: at.snapshotter },
        }
    }

    /// A snapshot of this kind that is there, mostly, or any name.
    fn snapshot_there(&mut self, space: &Space, kind: &str) -> SnapshotKey {
        let snapshotter = self.pick(&SNAPSHOTTERS).to_owned();
        let key = self.name(&keys(space, &snapshotter, kind), &KEYS);
        SnapshotKey { snapshotter, key }
    }

    fn new_snapshot(&mut self, space: &Space) -> NewSnapshot {
        let snapshotter = self.pick(&SNAPSHOTTERS).to_owned();
        let key = self.new_name(&keys(space, &snapshotter, ""), &KEYS);
        let parent = match self.random.below(3) {
            0 => String::new(),
            _ => self.name(&keys(space, &snapshotter, "committed"), &KEYS),
        };
        let mut labels = self.labels(space, "snapshots");
        if self.one_in(6) {
            labels.insert("containerd.io/snapshot.ref".into(), self.pick(&KEYS).to_owned());
        }
        NewSnapshot { at: SnapshotKey { snapshotter, key }, parent, labels }
    }

    fn of_sandboxes(&mut self, verb: &str, space: &Space) -> Call {
        let there: Vec<String> = space.sandboxes.keys().cloned().collect();
        let id = self.name(&there, &IDS);
        let any = |text: &str| format!("example.com/{text} {{\"value\":\"{text}\"}}");
        let mut record = json!({
            "id": id,
            "labels": self.labels(space, "sandboxes"),
            "runtime": { "name": self.pick(&["one.v1", "one.v1", "other.v1"]), "options": any("Options") },
            "spec": any(self.pick(&["Spec", "Other"])),
            "extensions": self.extensions(),
            "sandboxer": self.pick(&["shim", "podsandbox"]),
        });
        match verb {
            "Get" => Call::GetSandbox { id },
            "List" => Call::ListSandboxes { filters: self.filters(&[(&["id"], &IDS)]) },
            "Create" => {
                record["id"] =
                    json!(if self.one_in(20) { "no/id".to_owned() } else { self.new_name(&there, &IDS) });
                Call::CreateSandbox { record }
            }
            "Update" => {
                if let Some(known) = space.sandboxes.get(&id)
                    && !self.one_in(4)
                {
                    record["runtime"]["name"] = known["runtime"]["name"].clone();
                }
                let mask = self
                    .mask(&["labels", "spec", "extensions", "runtime", "labels.", "extensions."], &record);
                Call::UpdateSandbox(Change { record, mask })
            }
            _ => Call::DeleteSandbox { id },
        }
    }

    /// None, one or two of the fields; one that ends with a dot is a map of which one entry is meant.
    fn mask(&mut self, fields: &[&str], record: &Value) -> Vec<String> {
        let mut mask = Vec::new();
        for _ in 0..self.random.below(3) {
            let field = self.pick(fields);
            let path = match field.strip_suffix('.') {
                None => field.to_owned(),
                Some(map) => {
                    let keys: Vec<String> =
                        record[map].as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect();
                    // A label that is not sent is one to delete.
                    let key = if keys.is_empty() || (map == "labels" && self.one_in(4)) {
                        "team".to_owned()
                    } else {
                        self.some(&keys)
                    };
                    if map == "extensions" && keys.is_empty() {
                        "labels".to_owned()
                    } else {
                        format!("{map}.{key}")
                    }
                }
            };
            mask.push(path);
        }
        if self.one_in(20) {
            mask.push(self.pick(&["name", "nothing", "created_at", "labelsx"]).to_owned());
        }
        mask
    }

    fn expire(&mut self, labels: &mut Labels) {
        let when = self.pick(&[PAST, PAST, FUTURE, "tomorrow"]);
        labels.insert("containerd.io/gc.expire".into(), when.into());
    }

    fn plain_labels(&mut self) -> Labels {
        let mut labels = Labels::new();
        for _ in 0..self.random.below(3) {
            let key = self.pick(&["team", "tier", "example.com/a.b"]);
            let value = self.pick(&["red", "blue", "light blue", "", "red"]);
            labels.insert(key.into(), value.into());
        }
        if self.one_in(40) {
            labels.insert("long".into(), "x".repeat(4093));
        }
        labels
    }

    /// Labels of which some mean something to the collector, for a record of this kind.
    fn labels(&mut self, space: &Space, kind: &str) -> Labels {
        let mut labels = self.plain_labels();
        for _ in 0..self.random.below(3) {
            let (label, value) = self.reference(space, kind);
            let of = |rule: &Rule| rule.label().is_some_and(|part| label.contains(part));
            if !self.avoided.iter().any(of) {
                labels.insert(label, value);
            }
        }
        match kind {
            "images" if self.avoided.contains(&Rule::ExpiredImageGoes) => {}
            "images" if self.one_in(2) => self.expire(&mut labels),
            "content" | "snapshots" if self.one_in(8) => {
                labels.insert("containerd.io/gc.root".into(), "2026-11-21".into());
            }
            _ => {}
        }
        if kind == "snapshots" {
            if self.one_in(2) {
                let time = self.pick(&[PAST, FUTURE, "never"]);
                labels.insert("containerd.io/gc.cond.value-usedat".into(), time.into());
            }
            if self.one_in(6) {
                let value = self.pick(&["kept", "", "other"]);
                labels.insert("containerd.io/snapshot/note".into(), value.into());
            }
        }
        labels
    }

    fn reference(&mut self, space: &Space, kind: &str) -> (String, String) {
        let direction = self.pick(&["ref", "ref", "bref"]);
        let suffix = self.pick(&["", "", ".0", "/x.y"]);
        let prefix = format!("containerd.io/gc.{direction}");
        let conditional = ["content", "images"].contains(&kind) && self.one_in(3);
        match if conditional { 7 } else { self.random.below(11) } {
            0 | 1 => (format!("{prefix}.content{suffix}"), self.blob(space)),
            2 | 10 => {
                let there: Vec<String> = space.images.keys().cloned().collect();
                (format!("{prefix}.image{suffix}"), self.name(&there, &IMAGES))
            }
            3..=5 => {
                let at = self.snapshot_there(space, "");
                let suffix = if suffix.starts_with('/') { suffix } else { "" };
                (format!("{prefix}.snapshot.{}{suffix}", at.snapshotter), at.key)
            }
            6 => {
                let there: Vec<String> = space.containers.keys().cloned().collect();
                (format!("containerd.io/gc.bref.container{suffix}"), self.name(&there, &IDS))
            }
            7 | 8 => {
                let at = self.snapshot_there(space, "");
                let condition = self.pick(&[
                    "usedat<1h",
                    "usedat>1h",
                    "usedat<soon,usedat>1h",
                    "usedat<1h,usedat>1h",
                    "used<1h",
                ]);
                (
                    format!(
                        "containerd.io/gc.cond.snapshot.{}{}",
                        at.snapshotter,
                        if self.one_in(2) { "/n" } else { "" }
                    ),
                    format!("{condition}|{}", at.key),
                )
            }
            // Close to a reference, and none.
            _ => match self.random.below(3) {
                0 => (format!("{prefix}.contents"), self.blob(space)),
                1 => (format!("{prefix}.snapshot.native.x"), "base".into()),
                _ => (format!("{prefix}.content-x"), self.blob(space)),
            },
        }
    }

    fn filters(&mut self, fields: &[(&[&str], &[&str])]) -> Filters {
        let mut filters = Vec::new();
        for _ in 0..self.random.below(3) {
            if self.one_in(16) {
                filters.push(Filter::Malformed(self.pick(&[
                    "id=x",
                    "name==",
                    ",",
                    "id==a,",
                    "labels.\"a",
                    "id>=1",
                ])));
                continue;
            }
            let mut selectors = Vec::new();
            for _ in 0..1 + self.random.below(2) {
                let (path, values): (Vec<String>, Vec<&str>) = if self.one_in(2) {
                    let key: &[&str] = self.pick(&[
                        &["labels", "team"] as &[&str],
                        &["labels", "example.com/a.b"],
                        &["labels", "tier"],
                    ]);
                    (key.iter().map(|part| (*part).to_owned()).collect(), vec!["red", "blue", "light blue"])
                } else {
                    let (path, values) = self.pick(fields);
                    (path.iter().map(|part| (*part).to_owned()).collect(), values.to_vec())
                };
                let value = self.pick(&values).to_owned();
                let test = match self.random.below(6) {
                    0 => Test::Present,
                    1 | 2 => Test::NotEqual(value),
                    3 => Test::Contains(self.pick(&["e", "blue", "a", "1"]).to_owned()),
                    4 => Test::Begins(self.pick(&["re", "l", "b", "sha"]).to_string()),
                    _ => Test::Equal(value),
                };
                selectors.push(Selector { path, test });
            }
            filters.push(Filter::All(selectors));
        }
        Filters(filters)
    }
}

/// The snapshots of this kind, or of all.
fn keys(space: &Space, snapshotter: &str, kind: &str) -> Vec<String> {
    let all = space.snapshots.iter().filter(|((name, _), record)| {
        name == snapshotter && (kind.is_empty() || text(record, "kind") == kind)
    });
    all.map(|((_, key), _)| key.clone()).collect()
}
