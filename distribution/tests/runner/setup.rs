//! What tests begin with: images, clients, stores, credentials.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use davit_content_store::{Hasher, Store};
use davit_distribution::hosts::HostOptions;
use davit_distribution::{
    CredentialError, CredentialSource, Credentials, Error, Observer, Options, Progress, PullOptions,
    Registry, Repository, Retry, Secret, Timeouts, pull,
};
use davit_model::{Algorithm, Digest, Labels};
use davit_oci::image::Descriptor;
use davit_oci::media_type;
use davit_oci::reference::Reference;
use futures::future::BoxFuture;
use tempfile::TempDir;

use crate::fake::Fake;

/// Quick failures, for tests that want one.
pub(crate) const QUICK: Timeouts = Timeouts {
    connect: Duration::from_secs(10),
    handshake: Duration::from_secs(10),
    response: Duration::from_millis(500),
    idle: Duration::from_millis(500),
    window: Duration::from_millis(400),
    least: 4096,
};

/// Attempts without long pauses.
pub(crate) const RETRY: Retry = Retry {
    attempts: 5,
    first: Duration::from_millis(2),
    longest: Duration::from_millis(10),
    longest_asked: Duration::from_secs(2),
};

pub(crate) fn options() -> Options {
    Options { retry: RETRY, ..Options::default() }
}

pub(crate) fn pull_options() -> PullOptions {
    PullOptions { retry: RETRY, ..PullOptions::default() }
}

/// A client that no proxy of the machine stands before.
pub(crate) fn client(options: Options) -> Registry {
    Registry::with_proxies(options, "", "", "")
}

pub(crate) async fn repository(options: Options, reference: &str) -> Repository {
    client(options).repository(&reference.parse::<Reference>().unwrap()).await.unwrap()
}

/// A client with a `hosts.toml` for a registry.
pub(crate) fn with_hosts(mut options: Options, registry: &str, text: &str) -> (TempDir, Options) {
    let root = tempfile::tempdir().unwrap();
    write_hosts(root.path(), registry, text);
    options.hosts = HostOptions { directories: vec![root.path().to_owned()], ..HostOptions::default() };
    (root, options)
}

pub(crate) fn write_hosts(root: &Path, registry: &str, text: &str) {
    let folder = root.join(registry);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
}

pub(crate) fn store() -> (TempDir, Arc<Store>) {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    (root, Arc::new(store))
}

pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    Hasher::digest_of(Algorithm::Sha256, bytes)
}

/// Bytes that are the same each time and do not repeat soon.
pub(crate) fn noise(seed: u64, size: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes.into()
}

/// An image of layers.
pub(crate) struct Image {
    pub(crate) config: Bytes,
    pub(crate) layers: Vec<Bytes>,
    pub(crate) manifest: Bytes,
}

impl Image {
    pub(crate) fn new(seed: u64, sizes: &[usize]) -> Image {
        let layers: Vec<Bytes> =
            sizes.iter().enumerate().map(|(n, size)| noise(seed + n as u64, *size)).collect();
        let config =
            format!(r#"{{"os":"linux","architecture":"amd64","seed":{seed},"rootfs":{{"type":"layers"}}}}"#);
        let part = |media_type: &str, bytes: &[u8]| {
            format!(
                r#"{{"mediaType":"{media_type}","digest":"{}","size":{}}}"#,
                digest_of(bytes),
                bytes.len()
            )
        };
        let parts: Vec<String> = layers.iter().map(|layer| part(media_type::OCI_LAYER_GZIP, layer)).collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","config":{},"layers":[{}]}}"#,
            media_type::OCI_MANIFEST,
            part(media_type::OCI_CONFIG, config.as_bytes()),
            parts.join(",")
        );
        Image { config: config.into(), layers, manifest: manifest.into() }
    }

    pub(crate) fn digest(&self) -> Digest {
        digest_of(&self.manifest)
    }

    pub(crate) fn serve(&self, fake: &Fake, repository: &str, tag: &str) {
        fake.put_blob(self.config.clone());
        for layer in &self.layers {
            fake.put_blob(layer.clone());
        }
        fake.put_manifest(repository, tag, media_type::OCI_MANIFEST, self.manifest.clone());
    }

    pub(crate) fn blobs(&self) -> Vec<&Bytes> {
        std::iter::once(&self.config).chain(&self.layers).chain([&self.manifest]).collect()
    }

    /// Puts it into a store.
    pub(crate) fn keep(&self, store: &Store) {
        for bytes in self.blobs() {
            let digest = digest_of(bytes);
            let Ok(mut writer) = store.writer(digest.as_str(), 0, Some(&digest)) else { continue };
            writer.write(bytes).unwrap();
            writer.commit(0, Some(&digest)).unwrap();
        }
    }

    /// Asserts that a store has all of it.
    pub(crate) fn assert_in(&self, store: &Store) {
        for bytes in self.blobs() {
            assert_eq!(read(store, &digest_of(bytes)), *bytes);
        }
        assert!(store.statuses().unwrap().is_empty(), "{:?}", store.statuses());
    }
}

pub(crate) fn read(store: &Store, digest: &Digest) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut store.reader(digest).unwrap(), &mut bytes).unwrap();
    bytes
}

/// What was pulled.
#[derive(Debug)]
pub(crate) struct Pulled {
    pub(crate) root: Descriptor,
    pub(crate) contents: Vec<(Descriptor, Labels)>,
}

/// Resolves and pulls with patience: a test that hangs says so.
pub(crate) async fn pull_from(repository: &Repository, store: &Arc<Store>) -> Result<Pulled, Error> {
    pull_with(repository, store, &pull_options(), Arc::new(News::default())).await
}

pub(crate) async fn pull_with(
    repository: &Repository,
    store: &Arc<Store>,
    options: &PullOptions,
    news: Arc<News>,
) -> Result<Pulled, Error> {
    patiently(async {
        let root = repository.resolve().await?;
        let contents = pull(repository, &root, store.clone(), options, news, None).await?;
        Ok(Pulled { root, contents })
    })
    .await
}

pub(crate) async fn patiently<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it should have ended long ago")
}

/// Keeps all news.
#[derive(Default)]
pub(crate) struct News(pub(crate) Mutex<Vec<Progress>>);

impl Observer for News {
    fn progress(&self, progress: Progress) {
        self.0.lock().unwrap().push(progress);
    }
}

impl News {
    /// The words about one thing, each once in a row.
    pub(crate) fn words(&self, reference: &str) -> Vec<&'static str> {
        let all = self.0.lock().unwrap();
        let mut words: Vec<_> =
            all.iter().filter(|one| one.reference == reference).map(|one| one.state.as_str()).collect();
        words.dedup();
        words
    }
}

/// Knows one user, and notes for which hosts it is asked.
#[derive(Debug)]
pub(crate) struct Keys {
    pub(crate) credentials: Credentials,
    pub(crate) asked: Mutex<Vec<String>>,
}

impl Keys {
    pub(crate) fn password() -> Arc<Keys> {
        Keys::of(Credentials::Password { username: "user".to_owned(), password: Secret::new("hunter2") })
    }

    pub(crate) fn of(credentials: Credentials) -> Arc<Keys> {
        Arc::new(Keys { credentials, asked: Mutex::default() })
    }
}

impl CredentialSource for Keys {
    fn credentials<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Credentials, CredentialError>> {
        self.asked.lock().unwrap().push(host.to_owned());
        Box::pin(async { Ok(self.credentials.clone()) })
    }
}

/// `Basic` with the password of [`Keys::password`].
pub(crate) const BASIC: &str = "Basic dXNlcjpodW50ZXIy";

/// The whole text of an error, which must not have a secret in it.
pub(crate) fn text(error: &Error) -> String {
    let text = format!("{} {error:?}", davit_model::error::chain(error));
    assert!(!text.contains("hunter2") && !text.contains("dXNlcjpodW50ZXIy"), "a secret is in: {text}");
    text
}
