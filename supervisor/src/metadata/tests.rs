//! Tests of the services together, on a real database, a real blob store and a real snapshotter.

mod containers;
mod content;
mod gc;
mod images;
mod leases;
mod model;
mod mounts;
mod namespaces;
mod sandboxes;
mod snapshots;

use std::sync::Mutex;
use std::time::SystemTime;

use davit_metadata::EngineKind;
use davit_model::error::chain;
use davit_model::{Any, Coded, Digest, ErrorCode, Labels};
use davit_snapshotter::native::Native;

use super::*;

/// The snapshotter of these tests.
const NATIVE: &str = "native";

pub(crate) struct Fixture {
    pub(crate) metadata: Metadata,
    events: Arc<Mutex<Vec<(String, Event)>>>,
    folder: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        Fixture::with(Sharing::Shared)
    }

    fn with(sharing: Sharing) -> Fixture {
        Fixture::open(tempfile::tempdir().unwrap(), sharing)
    }

    fn open(folder: tempfile::TempDir, sharing: Sharing) -> Fixture {
        let path = folder.path();
        let db = Db::open(&path.join("metadata"), EngineKind::Redb).unwrap();
        let store = davit_content_store::Store::open(&path.join("content")).unwrap();
        let native: Arc<dyn Snapshotter> = Arc::new(Native::open(&path.join(NATIVE), db.clone()).unwrap());
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = events.clone();
        let metadata = Metadata::open(Parts {
            db,
            store: store.into(),
            snapshotters: BTreeMap::from([(NATIVE.to_owned(), native)]),
            mounts: Targets::open(&path.join("mounts"), path).unwrap(),
            sharing,
            events: Arc::new(move |namespace, event| {
                sink.lock().unwrap().push((namespace.to_owned(), event))
            }),
        })
        .unwrap();
        Fixture { metadata, events, folder }
    }

    /// As after a restart of the daemon.
    fn reopen(self) -> Fixture {
        let Fixture { metadata, folder, .. } = self;
        let db = metadata.inner.db.clone();
        drop(metadata);
        db.close().unwrap();
        Fixture::open(folder, Sharing::Shared)
    }

    /// What was told since the last time.
    fn events(&self) -> Vec<(String, Event)> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// Writes a blob, and returns its digest.
    async fn blob(&self, scope: &Scope, reference: &str, data: &[u8], labels: Labels) -> Digest {
        let writer = self.metadata.content(scope).writer(reference, 0, None).await.unwrap();
        let (digest, outcome) = commit(writer, data, None, labels).await;
        outcome.unwrap();
        digest
    }

    /// The names of all that the blob store and the snapshotter hold.
    pub(crate) fn backends(&self) -> (Vec<String>, Vec<String>, Vec<String>) {
        let inner = &self.metadata.inner;
        let mut blobs: Vec<_> =
            inner.store.walk().unwrap().into_iter().map(|info| info.digest.to_string()).collect();
        let mut ingests: Vec<_> =
            inner.store.statuses().unwrap().into_iter().map(|status| status.reference).collect();
        let snapshots =
            inner.snapshotters[NATIVE].list().unwrap().into_iter().map(|info| info.name).collect();
        blobs.sort();
        ingests.sort();
        (blobs, ingests, snapshots)
    }
}

/// Appends and commits on a blocking thread; the digest is the writer's afterwards.
async fn commit(
    mut writer: NsWriter,
    data: &[u8],
    expected: Option<Digest>,
    labels: Labels,
) -> (Digest, Result<(), Error>) {
    let data = data.to_vec();
    let work = move || {
        let outcome = writer.write(&data).and_then(|()| writer.commit(0, expected.as_ref(), labels));
        (writer.digest(), outcome)
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn scope(namespace: &str) -> Scope {
    Scope::new(namespace, None).unwrap()
}

fn leased(namespace: &str, lease: &str) -> Scope {
    Scope::new(namespace, Some(lease)).unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn paths(paths: &[&str]) -> Vec<String> {
    paths.iter().map(|path| (*path).to_owned()).collect()
}

fn digest_of(data: &[u8]) -> Digest {
    let mut hasher = davit_content_store::Hasher::new(davit_model::Algorithm::Sha256);
    hasher.update(data);
    hasher.digest()
}

fn container(id: &str) -> Container {
    Container {
        id: id.to_owned(),
        runtime: Runtime { name: "io.containerd.runc.v2".to_owned(), options: None },
        spec: Some(Any {
            type_url: "types.containerd.io/spec".to_owned(),
            value: b"{ \"odd\" : 1}".to_vec(),
        }),
        ..Container::default()
    }
}

fn image(name: &str, digest: &Digest) -> Image {
    Image {
        name: name.to_owned(),
        target: Descriptor {
            media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
            digest: digest.to_string(),
            size: 7,
            annotations: BTreeMap::new(),
        },
        ..Image::default()
    }
}

/// Checks class and text of an error.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, code: ErrorCode, text: &str) {
    let error = result.unwrap_err();
    assert_eq!(chain(&error), text);
    assert_eq!(error.code(), code, "{text}");
}
