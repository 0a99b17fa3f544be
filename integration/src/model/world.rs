//! The state of a daemon as its clients know it, and what it answers: maps of names, and rules that look at them.
//!
//! Written from the facts of containerd's API, not from our daemon, and too simple to be wrong: a call is carried out by
//! looking, a collection (`collect.rs`) goes over everything until nothing is added any more.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};
use tonic::Code;

use super::call::{Call, Change, Labels, Resource, Step};
use super::filter::{Filters, field};
use super::rule::Rule;

/// What a call is answered with: a document in the form of `wire.rs`, or the code of an error.
pub type Answer = Result<Value, Code>;

/// The snapshotters that the calls use.
pub const SNAPSHOTTERS: [&str; 2] = ["native", "overlayfs"];

/// Label and value together have this many bytes at most.
const LONGEST_LABEL: usize = 4096;

/// An unfinished blob.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ingest {
    /// What was written, and the size that was told when it began. None while the blob of another namespace is shared.
    pub(super) data: Option<(Vec<u8>, i64)>,
    /// The blob that it shares.
    pub(super) shares: Option<String>,
    /// Once opened without a lease, it is kept for a day.
    pub(super) kept: bool,
}

/// What a lease holds: types and ids.
pub(super) type Held = BTreeSet<(String, String)>;

/// What is in one namespace. Every record is a document in the form of `wire.rs`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Space {
    pub(super) labels: Labels,
    pub(super) containers: BTreeMap<String, Value>,
    pub(super) images: BTreeMap<String, Value>,
    pub(super) blobs: BTreeMap<String, Value>,
    pub(super) ingests: BTreeMap<String, Ingest>,
    pub(super) leases: BTreeMap<String, (Value, Held)>,
    /// By snapshotter and name.
    pub(super) snapshots: BTreeMap<(String, String), Value>,
    pub(super) sandboxes: BTreeMap<String, Value>,
    /// Snapshots that count as parents of ones that were collected, with a daemon that forgets to say so.
    pub(super) bereft: BTreeSet<(String, String, String)>,
}

/// All of a daemon.
#[derive(Debug, Clone, Default)]
pub struct World {
    pub(super) spaces: BTreeMap<String, Space>,
    /// The blobs that the store has, whoever may see them.
    pub(super) store: BTreeMap<String, Vec<u8>>,
    /// The blobs that it ever had.
    pub(super) seen: BTreeSet<String>,
    /// The rules that do not hold.
    pub(super) broken: BTreeSet<Rule>,
}

/// The bytes of a digest as the API writes it.
pub fn digest_of(data: &[u8]) -> String {
    use sha2::Digest;
    let hash = sha2::Sha256::digest(data);
    hash.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

impl World {
    /// An empty daemon in which these rules do not hold.
    pub fn new(broken: impl IntoIterator<Item = Rule>) -> World {
        World { broken: broken.into_iter().collect(), ..World::default() }
    }

    pub(super) fn holds(&self, rule: Rule) -> bool {
        !self.broken.contains(&rule)
    }

    /// What is in a namespace; nothing if there is no such one.
    pub(super) fn space(&self, name: &str) -> Space {
        self.spaces.get(name).cloned().unwrap_or_default()
    }

    /// The names of the namespaces.
    pub fn namespaces(&self) -> Vec<String> {
        self.spaces.keys().cloned().collect()
    }

    /// The leases of a namespace.
    pub fn leases(&self, namespace: &str) -> Vec<String> {
        self.space(namespace).leases.into_keys().collect()
    }

    /// Whether another world holds the same.
    pub fn is_like(&self, other: &World) -> bool {
        let shown = |world: &World| {
            let mut spaces = world.spaces.clone();
            spaces.values_mut().for_each(|space| space.bereft.clear());
            spaces
        };
        shown(self) == shown(other) && self.store == other.store
    }

    /// What a restart of the daemon changes: nothing.
    pub fn restart(&mut self) {
        if !self.holds(Rule::RestartKeepsLeases) {
            self.spaces.values_mut().for_each(|space| space.leases.clear());
        }
    }

    /// Carries out a call.
    pub fn answer(&mut self, step: &Step) -> Answer {
        if step.call.method().starts_with("Namespaces.") {
            return self.of_namespaces(&step.call);
        }
        let name = step.namespace.as_deref().ok_or(Code::FailedPrecondition)?;
        if !is_identifier(name) {
            return Err(Code::InvalidArgument);
        }
        let known = self.spaces.contains_key(name);
        let space = self.space(name);
        let scope = Scope { world: self, space, lease: step.lease.as_deref(), name, touched: known };
        let (answer, after) = scope.carry_out(&step.call);
        if let Some(space) = after
            && (known || self.holds(Rule::NamespaceSpringsIntoBeing))
        {
            self.spaces.insert(name.to_owned(), space);
        }
        if answer.is_ok() && step.call.collects() && self.holds(Rule::SyncWaitsForTheCollection) {
            self.collect();
        }
        answer
    }

    fn of_namespaces(&mut self, call: &Call) -> Answer {
        let document = |name: &str, labels: &Labels| json!({ "name": name, "labels": labels });
        match call {
            Call::GetNamespace { name } => Ok(document(name, &self.space(name).labels)),
            Call::ListNamespaces => {
                let all = self.spaces.iter().map(|(name, space)| document(name, &space.labels));
                Ok(all.collect())
            }
            Call::CreateNamespace { name, labels } => {
                if !is_identifier(name) {
                    return Err(Code::InvalidArgument);
                }
                let labels = self.checked(labels)?;
                if self.spaces.contains_key(name) && self.holds(Rule::SecondCreateIsRefused) {
                    return Err(Code::AlreadyExists);
                }
                let space = self.spaces.entry(name.clone()).or_default();
                space.labels = labels;
                Ok(document(name, &space.labels))
            }
            Call::UpdateNamespace { name, labels, mask } => {
                let mut space = self.space(name);
                let mut result = space.labels.clone();
                if mask.is_empty() {
                    result = self.checked(labels)?;
                }
                for path in mask {
                    let key = path.strip_prefix("labels.").ok_or(Code::InvalidArgument)?;
                    let value = labels.get(key).cloned().unwrap_or_default();
                    self.checked(&Labels::from([(key.to_owned(), value.clone())]))?;
                    result.insert(key.to_owned(), value);
                }
                space.labels = self.checked(&result)?;
                // To set a label makes the namespace; to delete one that is not there does too.
                if self.spaces.contains_key(name) || !mask.is_empty() || !labels.is_empty() {
                    self.spaces.insert(name.clone(), space);
                }
                Ok(Value::Null)
            }
            Call::DeleteNamespace { name } => {
                let space = self.spaces.get(name).ok_or(Code::NotFound)?;
                let in_use = !space.images.is_empty()
                    || !space.blobs.is_empty()
                    || !space.containers.is_empty()
                    || !space.snapshots.is_empty();
                if in_use && self.holds(Rule::NamespaceInUseStays) {
                    return Err(Code::FailedPrecondition);
                }
                let left = self.spaces.remove(name).unwrap_or_default();
                if !self.holds(Rule::NamespaceTakesItsIngests) && !left.ingests.is_empty() {
                    self.spaces.insert(name.clone(), Space { ingests: left.ingests, ..Space::default() });
                }
                Ok(Value::Null)
            }
            _ => Err(Code::Unimplemented),
        }
    }

    /// The labels as they are kept.
    pub(super) fn checked(&self, labels: &Labels) -> Result<Labels, Code> {
        let long = labels.iter().any(|(key, value)| key.len() + value.len() > LONGEST_LABEL);
        if long && self.holds(Rule::LongLabelIsRefused) {
            return Err(Code::InvalidArgument);
        }
        let keep_empty = !self.holds(Rule::EmptyLabelIsNone);
        Ok(labels.clone().into_iter().filter(|(_, value)| keep_empty || !value.is_empty()).collect())
    }
}

/// One call, in its namespace and with its lease.
pub(super) struct Scope<'a> {
    pub(super) world: &'a mut World,
    /// The namespace, as the call leaves it.
    pub(super) space: Space,
    pub(super) lease: Option<&'a str>,
    name: &'a str,
    /// The namespace is there from now on.
    pub(super) touched: bool,
}

impl Scope<'_> {
    pub(super) fn holds(&self, rule: Rule) -> bool {
        self.world.holds(rule)
    }

    /// The answer, and the namespace after it if it exists then. A refused call changes nothing, unless it says so.
    fn carry_out(mut self, call: &Call) -> (Answer, Option<Space>) {
        let mut kept = false;
        let answer = match call {
            Call::GetContainer { id } => find(&self.space.containers, id),
            Call::ListContainers { filters } | Call::StreamContainers { filters } => {
                self.list(|space| values(&space.containers), filters)
            }
            Call::CreateContainer { record } => self.create_container(record),
            Call::UpdateContainer(change) => self.update_container(change),
            Call::DeleteContainer { id } => {
                let lenient = !self.holds(Rule::SecondDeleteIsNotFound);
                match self.space.containers.remove(id) {
                    None if !lenient => Err(Code::NotFound),
                    _ => Ok(Value::Null),
                }
            }
            Call::GetImage { name } => find(&self.space.images, name),
            Call::ListImages { filters } => self.list(|space| values(&space.images), filters),
            Call::CreateImage { record } => self.create_image(record),
            Call::UpdateImage(change) => self.update_image(change),
            Call::DeleteImage { name, target, .. } => self.delete_image(name, target.as_deref()),
            Call::CreateLease { id, labels } => self.create_lease(id, labels),
            Call::DeleteLease { id, .. } => match self.space.leases.remove(id) {
                None => Err(Code::NotFound),
                Some(_) => Ok(Value::Null),
            },
            Call::ListLeases { filters } => {
                self.list(|space| space.leases.values().map(|(record, _)| record.clone()).collect(), filters)
            }
            Call::AddResource(resource) => self.change_resource(resource, true),
            Call::DeleteResource(resource) => self.change_resource(resource, false),
            Call::ListResources { lease } => match self.space.leases.get(lease) {
                None => Err(Code::NotFound),
                Some((_, held)) => Ok(held.iter().map(|(kind, id)| json!([kind, id])).collect()),
            },
            Call::GetSandbox { id } => find(&self.space.sandboxes, id),
            Call::ListSandboxes { filters } => self.list(|space| values(&space.sandboxes), filters),
            Call::CreateSandbox { record } => self.create_sandbox(record),
            Call::UpdateSandbox(change) => self.update_sandbox(change),
            Call::DeleteSandbox { id } => {
                self.space.sandboxes.remove(id).map(|_| Value::Null).ok_or(Code::NotFound)
            }
            Call::Info { .. }
            | Call::UpdateInfo(_)
            | Call::ListContent { .. }
            | Call::DeleteContent { .. }
            | Call::Read { .. }
            | Call::Status { .. }
            | Call::ListStatuses { .. }
            | Call::Write { .. }
            | Call::Abort { .. } => self.of_content(call, &mut kept),
            _ => self.of_snapshots(call, &mut kept),
        };
        let changed = self.touched && (answer.is_ok() || kept);
        (answer, changed.then_some(self.space))
    }

    /// The records that match, in the order of their names.
    pub(super) fn list(&self, records: impl Fn(&Space) -> Vec<Value>, filters: &Filters) -> Answer {
        if !filters.are_valid() {
            return Err(Code::InvalidArgument);
        }
        let mut all = records(&self.space);
        if !self.holds(Rule::NamespacesAreApart) {
            all.extend(
                self.world
                    .spaces
                    .iter()
                    .filter(|(name, _)| *name != self.name)
                    .flat_map(|(_, space)| records(space)),
            );
        }
        let absent_differs = self.holds(Rule::AbsentFieldDiffers);
        Ok(all
            .into_iter()
            .filter(|record| filters.match_by(|path| field(record, path), absent_differs))
            .collect())
    }

    /// Has the lease of the call hold something.
    pub(super) fn attach(&mut self, kind: &str, id: &str) -> Result<(), Code> {
        let Some(lease) = self.lease else { return Ok(()) };
        let must_exist = self.holds(Rule::LeaseMustExist);
        let holds = self.holds(Rule::LeaseHoldsWhatIsMade);
        match self.space.leases.get_mut(lease) {
            None if must_exist => Err(Code::NotFound),
            Some((_, held)) if holds => {
                held.insert((kind.to_owned(), id.to_owned()));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Has the lease of the call let something go; other leases keep it.
    pub(super) fn detach(&mut self, kind: &str, id: &str) {
        if let Some((_, held)) = self.lease.and_then(|lease| self.space.leases.get_mut(lease)) {
            held.remove(&(kind.to_owned(), id.to_owned()));
        }
    }

    /// Takes over the fields that a mask names; `whole` are those that can be named, each a map or a value.
    pub(super) fn apply(&self, record: &mut Value, change: &Change, whole: &[&str]) -> Result<(), Code> {
        for path in &change.mask {
            let (name, key) = match path.split_once('.') {
                Some((name, key)) => (name, Some(key)),
                None => (path.as_str(), None),
            };
            let is_map = ["labels", "annotations", "extensions"].contains(&name);
            if !whole.contains(&name) || (key.is_some() && !is_map) {
                if self.holds(Rule::UnknownPathIsRefused) {
                    return Err(Code::InvalidArgument);
                }
                continue;
            }
            let wanted = change.record.get(name).cloned().unwrap_or_default();
            match key {
                Some(key) => {
                    if !self.holds(Rule::MaskOfOneLabelKeepsOthers) {
                        record[name] = json!({});
                    }
                    let value = wanted.get(key).cloned().unwrap_or(json!(""));
                    if let Some(map) = record[name].as_object_mut() {
                        map.insert(key.to_owned(), value);
                    }
                }
                None => record[name] = wanted,
            }
        }
        Ok(())
    }

    /// Checks the labels of a record, and drops the empty ones, of its annotations too.
    pub(super) fn settle(&self, record: &mut Value) -> Result<(), Code> {
        record["labels"] = json!(self.world.checked(&labels(record))?);
        if let Some(Value::Object(annotations)) = record.get_mut("annotations") {
            annotations.retain(|_, value| value != "");
        }
        Ok(())
    }

    fn create_container(&mut self, record: &Value) -> Answer {
        let mut record = record.clone();
        self.check_container(&record, true)?;
        self.settle(&mut record)?;
        let id = text(&record, "id");
        if self.space.containers.contains_key(&id) && self.holds(Rule::SecondCreateIsRefused) {
            return Err(Code::AlreadyExists);
        }
        if !self.holds(Rule::ContainerNamesItsSandbox) {
            record["sandbox"] = json!("");
        }
        self.touched = true;
        self.space.containers.insert(id, record.clone());
        Ok(record)
    }

    fn check_container(&self, record: &Value, new: bool) -> Result<(), Code> {
        let no_spec = record["spec"].is_null() && (!new || self.holds(Rule::SpecIsRequired));
        let no_snapshotter =
            text(record, "snapshotter").is_empty() && !text(record, "snapshotkey").is_empty();
        let no_runtime = text(&record["runtime"], "name").is_empty();
        if !is_identifier(&text(record, "id")) || no_spec || no_snapshotter || no_runtime {
            return Err(Code::InvalidArgument);
        }
        Ok(())
    }

    fn update_container(&mut self, change: &Change) -> Answer {
        let id = text(&change.record, "id");
        if id.is_empty() {
            return Err(Code::InvalidArgument);
        }
        let mut record = find(&self.space.containers, &id)?;
        let fields = ["labels", "spec", "extensions", "image", "snapshotkey"];
        let before = record["extensions"].clone();
        let change = self.whole(change, &record, &fields, &["snapshotter"])?;
        self.apply(&mut record, &change, &fields)?;
        self.check_container(&record, false)?;
        self.settle(&mut record)?;
        let kept = self.with_extensions(record.clone(), before);
        self.space.containers.insert(id, kept);
        Ok(record)
    }

    /// Without a mask all fields are replaced that can be, and those that cannot must be the same.
    fn whole(&self, change: &Change, record: &Value, fields: &[&str], same: &[&str]) -> Result<Change, Code> {
        let mut change = change.clone();
        if change.mask.is_empty() {
            let other_runtime = text(&record["runtime"], "name") != text(&change.record["runtime"], "name");
            let differs = |name: &&str| text(record, name) != text(&change.record, name);
            if (other_runtime || same.iter().any(differs)) && self.holds(Rule::RuntimeIsImmutable) {
                return Err(Code::InvalidArgument);
            }
            change.mask = fields.iter().map(|field| (*field).to_owned()).collect();
        }
        Ok(change)
    }

    fn create_image(&mut self, record: &Value) -> Answer {
        let mut record = record.clone();
        let name = check_image(&record)?;
        // The lease is looked at before anything else, with the labels as the client sent them.
        let leased = has_expiry(&record);
        self.settle(&mut record)?;
        self.lease_image(leased, &name)?;
        if self.space.images.contains_key(&name) && self.holds(Rule::SecondCreateIsRefused) {
            return Err(Code::AlreadyExists);
        }
        self.touched = true;
        self.space.images.insert(name, record.clone());
        Ok(record)
    }

    fn update_image(&mut self, change: &Change) -> Answer {
        let name = text(&change.record, "name");
        if name.is_empty() {
            return Err(Code::InvalidArgument);
        }
        let mut record = find(&self.space.images, &name)?;
        if change.mask.is_empty() {
            record = change.record.clone();
        } else {
            self.apply(&mut record, change, &["labels", "target", "annotations"])?;
            // The annotations are a part of the target.
            if change.mask.iter().any(|path| path == "target") {
                record["annotations"] = change.record["annotations"].clone();
            }
        }
        check_image(&record)?;
        let leased = has_expiry(&record);
        self.settle(&mut record)?;
        self.lease_image(leased, &name)?;
        self.space.images.insert(name, record.clone());
        Ok(record)
    }

    fn lease_image(&mut self, expires: bool, name: &str) -> Result<(), Code> {
        if expires && self.holds(Rule::ExpiringImageIsLeased) { self.attach("images", name) } else { Ok(()) }
    }

    fn delete_image(&mut self, name: &str, target: Option<&str>) -> Answer {
        let record = find(&self.space.images, name)?;
        if target.is_some_and(|target| text(&record["target"], "digest") != target)
            && self.holds(Rule::ImageIsDeletedForItsTargetOnly)
        {
            return Err(Code::NotFound);
        }
        self.space.images.remove(name);
        self.detach("images", name);
        Ok(Value::Null)
    }

    fn create_lease(&mut self, id: &str, labels: &Labels) -> Answer {
        if self.space.leases.contains_key(id) {
            return Err(Code::AlreadyExists);
        }
        let kept: Labels = labels.clone().into_iter().filter(|(_, value)| !value.is_empty()).collect();
        let record = json!({ "id": id, "labels": kept });
        self.touched = true;
        self.space.leases.insert(id.to_owned(), (record.clone(), Held::new()));
        Ok(record)
    }

    fn change_resource(&mut self, resource: &Resource, add: bool) -> Answer {
        let strict = self.holds(Rule::TypesOfResourcesAreKnown);
        let images = self.holds(Rule::LeasesHoldImages);
        let (_, held) = self.space.leases.get_mut(&resource.lease).ok_or(Code::NotFound)?;
        let parts: Vec<&str> = resource.kind.split('/').collect();
        match parts.as_slice() {
            ["content"] if !resource.id.starts_with("sha256:") => return Err(Code::InvalidArgument),
            ["images", ..] if !images => return Err(Code::Unimplemented),
            ["content" | "ingests" | "images"] | ["snapshots", _] => {}
            ["content" | "ingests" | "images" | "snapshots", ..] => return Err(Code::InvalidArgument),
            _ if strict => return Err(Code::Unimplemented),
            _ => {}
        }
        let entry = (resource.kind.clone(), resource.id.clone());
        if add {
            held.insert(entry);
        } else {
            held.remove(&entry);
        }
        Ok(Value::Null)
    }

    fn create_sandbox(&mut self, record: &Value) -> Answer {
        let mut record = record.clone();
        let id = text(&record, "id");
        if !is_identifier(&id) {
            return Err(Code::InvalidArgument);
        }
        self.settle_sandbox(&mut record)?;
        if self.space.sandboxes.contains_key(&id) {
            return Err(Code::AlreadyExists);
        }
        self.touched = true;
        self.space.sandboxes.insert(id, record.clone());
        Ok(record)
    }

    fn update_sandbox(&mut self, change: &Change) -> Answer {
        let id = text(&change.record, "id");
        let mut record = find(&self.space.sandboxes, &id)?;
        let fields = ["labels", "extensions", "spec", "runtime"];
        let before = record["extensions"].clone();
        let change = self.whole(change, &record, &fields, &[])?;
        self.apply(&mut record, &change, &fields)?;
        self.settle_sandbox(&mut record)?;
        let kept = self.with_extensions(record.clone(), before);
        self.space.sandboxes.insert(id, kept);
        Ok(record)
    }

    /// What is kept of a record whose update has left out some of the extensions from before.
    fn with_extensions(&self, mut record: Value, before: Value) -> Value {
        if let (Value::Object(mut kept), false) = (before, self.holds(Rule::ExtensionsAreReplaced)) {
            kept.extend(record["extensions"].as_object().cloned().unwrap_or_default());
            record["extensions"] = Value::Object(kept);
        }
        record
    }

    fn settle_sandbox(&self, record: &mut Value) -> Result<(), Code> {
        if self.holds(Rule::SandboxLabelsAreChecked) {
            return self.settle(record);
        }
        let kept: Labels = labels(record).into_iter().filter(|(_, value)| !value.is_empty()).collect();
        record["labels"] = json!(kept);
        Ok(())
    }
}

fn check_image(record: &Value) -> Result<String, Code> {
    let name = text(record, "name");
    let target = &record["target"];
    let size = target["size"].as_i64().unwrap_or_default();
    let no_digest = !text(target, "digest").starts_with("sha256:");
    if name.is_empty() || no_digest || size <= 0 || text(target, "mediatype").is_empty() {
        return Err(Code::InvalidArgument);
    }
    Ok(name)
}

fn has_expiry(record: &Value) -> bool {
    record["labels"].get("containerd.io/gc.expire").is_some()
}

/// One to 76 characters: words of letters and digits, with single dots, dashes or underscores between them.
fn is_identifier(text: &str) -> bool {
    let separator = |char: char| ".-_".contains(char);
    let word = |word: &str| !word.is_empty() && word.chars().all(|char| char.is_ascii_alphanumeric());
    (1..=76).contains(&text.len()) && text.split(separator).all(word)
}

/// The labels of a record.
pub(super) fn labels(record: &Value) -> Labels {
    let map = record["labels"].as_object().cloned().unwrap_or_default();
    let text = |value: Value| value.as_str().unwrap_or_default().to_owned();
    map.into_iter().map(|(key, value)| (key, text(value))).collect()
}

/// The text of a member.
pub(super) fn text(record: &Value, member: &str) -> String {
    record.get(member).and_then(Value::as_str).unwrap_or_default().to_owned()
}

pub(super) fn find(records: &BTreeMap<String, Value>, name: &str) -> Answer {
    records.get(name).cloned().ok_or(Code::NotFound)
}

pub(super) fn values(records: &BTreeMap<String, Value>) -> Vec<Value> {
    records.values().cloned().collect()
}

/// A document with these members.
pub(super) fn document<const N: usize>(members: [(&str, Value); N]) -> Value {
    Value::Object(members.map(|(name, value)| (name.to_owned(), value)).into_iter().collect::<Map<_, _>>())
}
