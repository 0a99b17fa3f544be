//! Random sequences of calls against a model that is too simple to be wrong.
//!
//! The model keeps sets of names, decides each outcome by looking at them, and collects by going over everything
//! until nothing is added any more. After each collection, and after each restart, the daemon's lists, the
//! backends and the events must say the same.

use super::*;
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use std::collections::BTreeSet;

const PAST: &str = "2001-02-03T04:05:06Z";
const FUTURE: &str = "2999-01-01T00:00:00Z";
const EXPIRE: &str = "containerd.io/gc.expire";

/// What a record is known by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Blob(u8),
    Image(u8),
    Snapshot(u8),
    Ingest(u8),
    Container(u8),
}

impl Name {
    fn text(&self) -> String {
        match self {
            Name::Blob(number) => blob(*number).to_string(),
            Name::Image(number) => format!("docker.io/image/{number}"),
            Name::Snapshot(number) => format!("key/{number}"),
            Name::Ingest(number) => format!("ref/{number}"),
            Name::Container(number) => format!("container-{number}"),
        }
    }

    fn resource(&self) -> Resource {
        let kind = match self {
            Name::Blob(_) => "content",
            Name::Image(_) => "images",
            Name::Snapshot(_) => "snapshots/native",
            Name::Ingest(_) => "ingests",
            Name::Container(_) => "containers",
        };
        Resource { id: self.text(), kind: kind.to_owned() }
    }
}

fn data(number: u8) -> Vec<u8> {
    vec![number; usize::from(number) + 1]
}

fn blob(number: u8) -> Digest {
    digest_of(&data(number))
}

fn lease_id(number: u8) -> String {
    format!("lease/{number}")
}

/// A label that means something to the collector.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Link {
    None,
    Root,
    To(Name),
    From(Name),
}

impl Link {
    fn labels(&self) -> Labels {
        let key = |word: &str, name: &Name| {
            let what = match name {
                Name::Blob(_) => "content",
                Name::Image(_) => "image.x",
                Name::Snapshot(_) => "snapshot.native/x",
                Name::Container(_) => "container",
                Name::Ingest(_) => "ingest",
            };
            format!("containerd.io/gc.{word}.{what}")
        };
        match self {
            Link::None => labels(&[("k", "v")]),
            Link::Root => labels(&[("containerd.io/gc.root", "1")]),
            Link::To(name) => Labels::from([(key("ref", name), name.text())]),
            Link::From(name) => Labels::from([(key("bref", name), name.text())]),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expiry {
    Never,
    Past,
    Future,
}

impl Expiry {
    fn add_to(self, labels: &mut Labels) {
        let when = match self {
            Expiry::Never => return,
            Expiry::Past => PAST,
            Expiry::Future => FUTURE,
        };
        labels.insert(EXPIRE.to_owned(), when.to_owned());
    }
}

#[derive(Debug, Clone)]
enum Call {
    CreateContainer { id: u8, snapshot: u8, link: Link },
    DeleteContainer { id: u8 },
    CreateImage { image: u8, target: u8, link: Link, expiry: Expiry },
    UpdateImage { image: u8, target: u8, link: Link, expiry: Expiry },
    DeleteImage { image: u8, target: Option<u8> },
    WriteBlob { reference: u8, blob: u8, link: Link, expected: bool },
    LabelBlob { blob: u8, link: Link },
    DeleteBlob { blob: u8 },
    OpenIngest { reference: u8 },
    Abort { reference: u8 },
    Prepare { key: u8, parent: Option<u8>, link: Link, view: bool, target: Option<u8> },
    Commit { name: u8, key: u8, link: Link },
    Remove { key: u8 },
    CreateLease { lease: u8, flat: bool, expiry: Expiry },
    DeleteLease { lease: u8 },
    AddResource { lease: u8, name: Name },
    DeleteResource { lease: u8, name: Name },
    DeleteNamespace,
    Collect,
    Restart,
}

#[derive(Debug, Clone)]
struct Step {
    namespace: usize,
    lease: Option<u8>,
    call: Call,
}

fn name() -> impl Strategy<Value = Name> {
    prop_oneof![
        (0..4u8).prop_map(Name::Blob),
        (0..3u8).prop_map(Name::Image),
        (0..5u8).prop_map(Name::Snapshot),
    ]
}

fn held() -> impl Strategy<Value = Name> {
    prop_oneof![5 => name(), 1 => (0..2u8).prop_map(Name::Ingest)]
}

fn link() -> impl Strategy<Value = Link> {
    prop_oneof![
        4 => Just(Link::None),
        1 => Just(Link::Root),
        3 => name().prop_map(Link::To),
        2 => prop_oneof![4 => name(), 1 => (0..2u8).prop_map(Name::Container)].prop_map(Link::From),
    ]
}

fn expiry() -> impl Strategy<Value = Expiry> {
    prop_oneof![3 => Just(Expiry::Never), 2 => Just(Expiry::Past), 1 => Just(Expiry::Future)]
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        2 => (0..2u8, 0..5u8, link()).prop_map(|(id, snapshot, link)| Call::CreateContainer { id, snapshot, link }),
        1 => (0..2u8).prop_map(|id| Call::DeleteContainer { id }),
        3 => (0..3u8, 0..4u8, link(), expiry())
            .prop_map(|(image, target, link, expiry)| Call::CreateImage { image, target, link, expiry }),
        1 => (0..3u8, 0..4u8, link(), expiry())
            .prop_map(|(image, target, link, expiry)| Call::UpdateImage { image, target, link, expiry }),
        2 => (0..3u8, of(0..4u8)).prop_map(|(image, target)| Call::DeleteImage { image, target }),
        6 => (0..2u8, 0..4u8, link(), any::<bool>())
            .prop_map(|(reference, blob, link, expected)| Call::WriteBlob { reference, blob, link, expected }),
        1 => (0..4u8, link()).prop_map(|(blob, link)| Call::LabelBlob { blob, link }),
        2 => (0..4u8).prop_map(|blob| Call::DeleteBlob { blob }),
        2 => (0..2u8).prop_map(|reference| Call::OpenIngest { reference }),
        1 => (0..2u8).prop_map(|reference| Call::Abort { reference }),
        6 => (0..5u8, of(0..5u8), link(), any::<bool>(), of(0..5u8)).prop_map(
            |(key, parent, link, view, target)| {
                let view = view && key == 4;
                Call::Prepare { key, parent, link, view, target: target.filter(|_| key == 0) }
            }
        ),
        5 => (0..5u8, 0..5u8, link()).prop_map(|(name, key, link)| Call::Commit { name, key, link }),
        2 => (0..5u8).prop_map(|key| Call::Remove { key }),
        3 => (0..2u8, any::<bool>(), expiry())
            .prop_map(|(lease, flat, expiry)| Call::CreateLease { lease, flat, expiry }),
        1 => (0..2u8).prop_map(|lease| Call::DeleteLease { lease }),
        3 => (0..2u8, held()).prop_map(|(lease, name)| Call::AddResource { lease, name }),
        1 => (0..2u8, held()).prop_map(|(lease, name)| Call::DeleteResource { lease, name }),
        1 => Just(Call::DeleteNamespace),
        4 => Just(Call::Collect),
        1 => Just(Call::Restart),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    (0..2usize, prop_oneof![2 => Just(None), 1 => (0..2u8).prop_map(Some)], call())
        .prop_map(|(namespace, lease, call)| Step { namespace, lease, call })
}

/// A record: what it needs by itself, and its label.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    needs: Option<Name>,
    link: Link,
    expiry: Expiry,
    /// Of a snapshot.
    committed: bool,
    view: bool,
}

impl Record {
    fn new(needs: Option<Name>, link: &Link) -> Record {
        Record { needs, link: link.clone(), expiry: Expiry::Never, committed: false, view: false }
    }
}

#[derive(Debug, Clone)]
struct ModelLease {
    flat: bool,
    expiry: Expiry,
    held: BTreeSet<Name>,
}

#[derive(Debug, Clone, Default)]
struct Space {
    exists: bool,
    records: BTreeMap<Name, Record>,
    /// Those of the records that are ingests and were opened without a lease.
    kept_ingests: BTreeSet<Name>,
    leases: BTreeMap<u8, ModelLease>,
}

impl Space {
    /// What a call answers; `Ok` if nothing is wrong.
    fn step(&mut self, lease: Option<u8>, call: &Call) -> Result<(), ErrorCode> {
        let no_lease = lease.is_some_and(|lease| !self.leases.contains_key(&lease));
        let need_lease = if no_lease { Err(ErrorCode::NotFound) } else { Ok(()) };
        let has = |space: &Space, name: &Name| space.records.contains_key(name);
        let must_have =
            |space: &Space, name: &Name| if has(space, name) { Ok(()) } else { Err(ErrorCode::NotFound) };
        match call {
            Call::CreateContainer { id, snapshot, link } => {
                let name = Name::Container(*id);
                if has(self, &name) {
                    return Err(ErrorCode::AlreadyExists);
                }
                self.records.insert(name, Record::new(Some(Name::Snapshot(*snapshot)), link));
            }
            Call::DeleteContainer { id } => {
                self.records.remove(&Name::Container(*id)).ok_or(ErrorCode::NotFound)?;
            }
            Call::CreateImage { image, target, link, expiry } => {
                let name = Name::Image(*image);
                if *expiry != Expiry::Never {
                    need_lease?;
                }
                if has(self, &name) {
                    return Err(ErrorCode::AlreadyExists);
                }
                self.put_image(lease, name, *target, link, *expiry, need_lease)?;
            }
            Call::UpdateImage { image, target, link, expiry } => {
                let name = Name::Image(*image);
                must_have(self, &name)?;
                self.put_image(lease, name, *target, link, *expiry, need_lease)?;
            }
            Call::DeleteImage { image, target } => {
                let name = Name::Image(*image);
                must_have(self, &name)?;
                if target.is_some_and(|target| self.records[&name].needs != Some(Name::Blob(target))) {
                    return Err(ErrorCode::NotFound);
                }
                self.records.remove(&name);
                self.detach(lease, &name);
            }
            Call::WriteBlob { reference, blob, link, expected } => {
                need_lease?;
                let (reference, name) = (Name::Ingest(*reference), Name::Blob(*blob));
                let exists = has(self, &name);
                self.attach(lease, &name);
                if exists && *expected {
                    return Err(ErrorCode::AlreadyExists);
                }
                self.records.remove(&reference);
                self.kept_ingests.remove(&reference);
                self.detach(lease, &reference);
                self.exists = true;
                if exists {
                    return Err(ErrorCode::AlreadyExists);
                }
                self.records.insert(name, Record::new(None, link));
            }
            Call::LabelBlob { blob, link } => {
                let name = Name::Blob(*blob);
                must_have(self, &name)?;
                self.records.insert(name, Record::new(None, link));
            }
            Call::DeleteBlob { blob } => {
                let name = Name::Blob(*blob);
                self.records.remove(&name).ok_or(ErrorCode::NotFound)?;
                self.detach(lease, &name);
            }
            Call::OpenIngest { reference } => {
                need_lease?;
                let name = Name::Ingest(*reference);
                self.records.entry(name.clone()).or_insert_with(|| Record::new(None, &Link::None));
                if lease.is_none() {
                    self.kept_ingests.insert(name.clone());
                }
                self.attach(lease, &name);
            }
            Call::Abort { reference } => {
                let name = Name::Ingest(*reference);
                self.records.remove(&name).ok_or(ErrorCode::NotFound)?;
                self.kept_ingests.remove(&name);
                self.detach(lease, &name);
            }
            Call::Prepare { key, parent, link, view, target } => {
                let name = Name::Snapshot(*key);
                for existing in [target.map(Name::Snapshot), Some(name.clone())].into_iter().flatten() {
                    if has(self, &existing) {
                        need_lease?;
                        self.attach(lease, &existing);
                        return Err(ErrorCode::AlreadyExists);
                    }
                }
                if let Some(parent) = parent {
                    let parent = self.records.get(&Name::Snapshot(*parent)).ok_or(ErrorCode::NotFound)?;
                    if !parent.committed {
                        return Err(ErrorCode::InvalidArgument);
                    }
                }
                need_lease?;
                self.attach(lease, &name);
                let record = Record::new(parent.map(Name::Snapshot), link);
                self.records.insert(name, Record { view: *view, ..record });
            }
            Call::Commit { name, key, link } => {
                need_lease?;
                let (name, key) = (Name::Snapshot(*name), Name::Snapshot(*key));
                if has(self, &name) {
                    self.attach(lease, &name);
                    return Err(ErrorCode::AlreadyExists);
                }
                let active = self.records.get(&key).ok_or(ErrorCode::NotFound)?;
                if active.committed || active.view {
                    return Err(ErrorCode::FailedPrecondition);
                }
                let record = Record { committed: true, ..Record::new(active.needs.clone(), link) };
                self.records.remove(&key);
                self.detach(lease, &key);
                self.attach(lease, &name);
                self.records.insert(name, record);
            }
            Call::Remove { key } => {
                let name = Name::Snapshot(*key);
                must_have(self, &name)?;
                let is_child = |(child, record): (&Name, &Record)| {
                    matches!(child, Name::Snapshot(_)) && record.needs.as_ref() == Some(&name)
                };
                if self.records.iter().any(is_child) {
                    return Err(ErrorCode::FailedPrecondition);
                }
                self.records.remove(&name);
                self.detach(lease, &name);
            }
            Call::CreateLease { lease, flat, expiry } => {
                if self.leases.contains_key(lease) {
                    return Err(ErrorCode::AlreadyExists);
                }
                let (flat, expiry) = (*flat, *expiry);
                self.leases.insert(*lease, ModelLease { flat, expiry, held: BTreeSet::new() });
            }
            Call::DeleteLease { lease } => {
                self.leases.remove(lease).ok_or(ErrorCode::NotFound)?;
            }
            Call::AddResource { lease, name } => {
                self.leases.get_mut(lease).ok_or(ErrorCode::NotFound)?.held.insert(name.clone());
            }
            Call::DeleteResource { lease, name } => {
                self.leases.get_mut(lease).ok_or(ErrorCode::NotFound)?.held.remove(name);
            }
            Call::DeleteNamespace => {
                if self.records.keys().any(|name| !matches!(name, Name::Ingest(_))) {
                    return Err(ErrorCode::FailedPrecondition);
                }
                if !self.exists {
                    return Err(ErrorCode::NotFound);
                }
                *self = Space::default();
                return Ok(());
            }
            Call::Collect | Call::Restart => return Ok(()),
        }
        self.exists = true;
        Ok(())
    }

    fn put_image(
        &mut self,
        lease: Option<u8>,
        name: Name,
        target: u8,
        link: &Link,
        expiry: Expiry,
        need_lease: Result<(), ErrorCode>,
    ) -> Result<(), ErrorCode> {
        if expiry != Expiry::Never {
            need_lease?;
            self.attach(lease, &name);
        }
        self.records.insert(name, Record { expiry, ..Record::new(Some(Name::Blob(target)), link) });
        Ok(())
    }

    fn attach(&mut self, lease: Option<u8>, name: &Name) {
        if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            lease.held.insert(name.clone());
        }
    }

    fn detach(&mut self, lease: Option<u8>, name: &Name) {
        if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            lease.held.remove(name);
        }
    }

    /// Forgets what is not needed; returns how many images and snapshots that were.
    fn collect(&mut self) -> usize {
        self.leases.retain(|_, lease| lease.expiry != Expiry::Past);
        let mut deep: BTreeSet<Name> = self.kept_ingests.clone();
        let mut flat = BTreeSet::new();
        for lease in self.leases.values() {
            if lease.flat { &mut flat } else { &mut deep }.extend(lease.held.iter().cloned());
        }
        // An ingest has nothing that a flat lease could keep it from following.
        for (name, record) in &self.records {
            let root = match name {
                Name::Container(_) => true,
                Name::Image(_) => record.expiry != Expiry::Past,
                Name::Blob(_) | Name::Snapshot(_) => record.link == Link::Root,
                Name::Ingest(_) => false,
            };
            if root {
                deep.insert(name.clone());
            }
        }
        loop {
            let before = (deep.len(), flat.len());
            for (name, record) in &self.records {
                if deep.contains(name) {
                    deep.extend(record.needs.clone());
                    if let Link::To(other) = &record.link {
                        deep.insert(other.clone());
                    }
                }
                if flat.contains(name) {
                    flat.extend(record.needs.clone());
                }
                if let Link::From(other) = &record.link
                    && deep.contains(other)
                    && !matches!(name, Name::Container(_))
                {
                    deep.insert(name.clone());
                }
            }
            if before == (deep.len(), flat.len()) {
                break;
            }
        }
        let count = |records: &BTreeMap<Name, Record>| {
            records.keys().filter(|name| matches!(name, Name::Image(_) | Name::Snapshot(_))).count()
        };
        let before = count(&self.records);
        self.records.retain(|name, _| deep.contains(name) || flat.contains(name));
        self.kept_ingests.retain(|name| self.records.contains_key(name));
        before - count(&self.records)
    }
}

const NAMESPACES: [&str; 2] = ["one", "two"];

/// Makes the call on the real services.
async fn call_real(fixture: &Fixture, step: &Step) -> Result<(), Error> {
    let lease = step.lease.map(lease_id);
    let scope = Scope::new(NAMESPACES[step.namespace], lease.as_deref())?;
    let metadata = &fixture.metadata;
    let (content, leases) = (metadata.content(&scope), metadata.leases(&scope));
    let snapshots = metadata.snapshots(&scope, NATIVE)?;
    let key = |number: u8| Name::Snapshot(number).text();
    match step.call.clone() {
        Call::CreateContainer { id, snapshot, link } => {
            let container = Container {
                snapshotter: NATIVE.to_owned(),
                snapshot_key: key(snapshot),
                labels: link.labels(),
                ..container(&Name::Container(id).text())
            };
            metadata.containers(&scope).create(container).await.map(drop)
        }
        Call::DeleteContainer { id } => metadata.containers(&scope).delete(&Name::Container(id).text()).await,
        Call::CreateImage { image: number, target, link, expiry }
        | Call::UpdateImage { image: number, target, link, expiry } => {
            let mut image = image(&Name::Image(number).text(), &blob(target));
            image.labels = link.labels();
            expiry.add_to(&mut image.labels);
            let images = metadata.images(&scope);
            match step.call {
                Call::CreateImage { .. } => images.create(image, None).await.map(drop),
                _ => images.update(image, &[], None).await.map(drop),
            }
        }
        Call::DeleteImage { image, target } => {
            let target = target.map(|target| blob(target).to_string());
            metadata.images(&scope).delete(&Name::Image(image).text(), target.as_deref(), false).await
        }
        Call::WriteBlob { reference, blob: number, link, expected } => {
            let expected = expected.then(|| blob(number));
            let writer = content.writer(&Name::Ingest(reference).text(), 0, expected.as_ref()).await?;
            let data = if writer.status().offset > 0 { Vec::new() } else { data(number) };
            commit(writer, &data, expected, link.labels()).await.1
        }
        Call::LabelBlob { blob: number, link } => {
            content.update(&blob(number), link.labels(), &[]).await.map(drop)
        }
        Call::DeleteBlob { blob: number } => content.delete(&blob(number)).await,
        Call::OpenIngest { reference } => {
            content.writer(&Name::Ingest(reference).text(), 0, None).await.map(drop)
        }
        Call::Abort { reference } => content.abort(&Name::Ingest(reference).text()).await,
        Call::Prepare { key: number, parent, link, view, target } => {
            let mut labels = link.labels();
            if let Some(target) = target {
                labels.insert("containerd.io/snapshot.ref".to_owned(), key(target));
            }
            let (key, parent) = (key(number), parent.map(key));
            if view {
                snapshots.view(&key, parent.as_deref(), labels).await.map(drop)
            } else {
                snapshots.prepare(&key, parent.as_deref(), labels).await.map(drop)
            }
        }
        Call::Commit { name, key: number, link } => {
            snapshots.commit(&key(name), &key(number), link.labels(), None).await
        }
        Call::Remove { key: number } => snapshots.remove(&key(number)).await,
        Call::CreateLease { lease, flat, expiry } => {
            let mut labels = Labels::new();
            if flat {
                labels.insert("containerd.io/gc.flat".to_owned(), "1".to_owned());
            }
            expiry.add_to(&mut labels);
            leases.create(Some(&lease_id(lease)), labels).await.map(drop)
        }
        Call::DeleteLease { lease } => leases.delete(&lease_id(lease), false).await,
        Call::AddResource { lease, name } => leases.add_resource(&lease_id(lease), &name.resource()).await,
        Call::DeleteResource { lease, name } => {
            leases.delete_resource(&lease_id(lease), &name.resource()).await
        }
        Call::DeleteNamespace => metadata.namespaces().delete(scope.namespace()).await,
        Call::Collect => metadata.collect().await.map(drop),
        Call::Restart => Ok(()),
    }
}

/// Compares the lists of a namespace.
async fn compare(fixture: &Fixture, namespace: &str, space: &Space) {
    let (metadata, scope) = (&fixture.metadata, scope(namespace));
    let mut found: Vec<String> = Vec::new();
    found.extend(metadata.containers(&scope).list(&[]).unwrap().into_iter().map(|container| container.id));
    found.extend(metadata.images(&scope).list(&[]).unwrap().into_iter().map(|image| image.name));
    let content = metadata.content(&scope);
    for info in content.list(&[]).unwrap() {
        assert_eq!(content.reader(&info.digest).await.unwrap().size(), info.size);
        found.push(info.digest.to_string());
    }
    found.extend(content.statuses(&[]).await.unwrap().into_iter().map(|status| status.reference));
    let snapshots = metadata.snapshots(&scope, NATIVE).unwrap();
    found.extend(snapshots.list(&[]).await.unwrap().into_iter().map(|info| info.name));
    found.sort();
    let mut expected: Vec<String> = space.records.keys().map(Name::text).collect();
    expected.sort();
    assert_eq!(found, expected, "{namespace}");
    let leases = metadata.leases(&scope);
    let found: Vec<String> = leases.list(&[]).unwrap().into_iter().map(|lease| lease.id).collect();
    let expected: Vec<String> = space.leases.keys().map(|lease| lease_id(*lease)).collect();
    assert_eq!(found, expected);
    for (lease, model) in &space.leases {
        let mut found: Vec<_> = leases.resources(&lease_id(*lease)).unwrap();
        let mut expected: Vec<_> = model.held.iter().map(Name::resource).collect();
        found.sort_by(|a, b| (&a.kind, &a.id).cmp(&(&b.kind, &b.id)));
        expected.sort_by(|a, b| (&a.kind, &a.id).cmp(&(&b.kind, &b.id)));
        assert_eq!(found, expected);
    }
}

async fn compare_backends(fixture: &Fixture, spaces: &[Space]) {
    let (blobs, ingests, snapshots) = fixture.backends();
    let names = |wanted: fn(&Name) -> bool| -> Vec<String> {
        let names = spaces.iter().flat_map(|space| space.records.keys());
        names.filter(|name| wanted(name)).map(Name::text).collect()
    };
    let expected: BTreeSet<String> = names(|name| matches!(name, Name::Blob(_))).into_iter().collect();
    assert_eq!(blobs, expected.into_iter().collect::<Vec<_>>());
    assert_eq!(ingests.len(), names(|name| matches!(name, Name::Ingest(_))).len());
    assert_eq!(snapshots.len(), names(|name| matches!(name, Name::Snapshot(_))).len());
}

async fn run(steps: Vec<Step>) {
    let mut fixture = Fixture::new();
    let mut spaces = vec![Space::default(); NAMESPACES.len()];
    for step in steps {
        let expected = spaces[step.namespace].step(step.lease, &step.call);
        fixture.events();
        let found = call_real(&fixture, &step).await;
        assert_eq!(found.as_ref().map_err(Coded::code), expected.as_ref().map_err(|code| *code), "{step:?}");
        let restarted = matches!(step.call, Call::Restart);
        if restarted {
            fixture = fixture.reopen();
        }
        if matches!(step.call, Call::Collect) {
            let removed: usize = spaces.iter_mut().map(Space::collect).sum();
            assert_eq!(fixture.events().len(), removed);
            compare_backends(&fixture, &spaces).await;
        }
        if restarted || matches!(step.call, Call::Collect) {
            for (namespace, space) in NAMESPACES.iter().zip(&spaces) {
                compare(&fixture, namespace, space).await;
            }
        }
    }
    fixture.metadata.collect().await.unwrap();
    for space in &mut spaces {
        space.collect();
    }
    compare_backends(&fixture, &spaces).await;
    // No link of a child or a lease outlives what it belongs to.
    let view = fixture.metadata.view();
    let children = |space: &Space| {
        space
            .records
            .iter()
            .filter(|(name, record)| matches!(name, Name::Snapshot(_)) && record.needs.is_some())
            .count()
    };
    assert_eq!(view.scan(b"md/child/").count(), spaces.iter().map(children).sum::<usize>());
    let held = |space: &Space| space.leases.values().map(|lease| lease.held.len()).sum::<usize>();
    assert_eq!(view.scan(b"md/leased/").count(), spaces.iter().map(held).sum::<usize>());
}

/// A few, unless the environment asks for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(32)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_daemon_does_what_the_model_does(steps in vec(step(), 1..90)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(steps));
    }
}
