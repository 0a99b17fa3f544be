//! The registry of Debian's package `docker-registry`, with and without a password.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use davit_distribution::{Options, PushOptions, Retry, labels, push};
use davit_model::{Coded, ErrorCode, Labels};
use davit_oci::image::Descriptor;
use davit_oci::media_type;
use tempfile::TempDir;

use crate::setup::*;

/// `htpasswd` of the password `hunter2` for `user`.
const HTPASSWD: &str = "user:$2b$04$Jd9vDuXacgGIhgvxrxsOc.L5Vrpkbb.jMLAbMjBqQLK7aS/.2STAy\n";

struct Running {
    child: Child,
    name: String,
    _root: TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the registry; none if it is not installed.
async fn start(password: bool) -> Option<Running> {
    let program = Path::new("/usr/bin/docker-registry");
    if !program.is_file() {
        println!("skipped: needs the package docker-registry");
        return None;
    }
    let root = tempfile::tempdir().unwrap();
    // The port is free again when the registry asks for it; should somebody be faster, it ends and another is tried.
    for _ in 0..5 {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let folder = root.path().display();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n\
             http: {{addr: '{address}'}}\n"
        );
        if password {
            std::fs::write(root.path().join("htpasswd"), HTPASSWD).unwrap();
            config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n"));
        }
        let file = root.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let mut child = Command::new(program)
            .arg("serve")
            .arg(file)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        for _ in 0..600 {
            if child.try_wait().unwrap().is_some() {
                break;
            }
            if tokio::net::TcpStream::connect(address).await.is_ok() {
                return Some(Running { child, name: address.to_string(), _root: root });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    panic!("docker-registry does not start");
}

struct Labelled(Arc<davit_content_store::Store>, Labels);

impl davit_distribution::Source for Labelled {
    fn open(
        &self,
        digest: &davit_model::Digest,
    ) -> Result<Box<dyn std::io::Read + Send>, davit_distribution::SinkError> {
        davit_distribution::Source::open(&*self.0, digest)
    }

    fn labels(&self, _: &davit_model::Digest) -> Result<Labels, davit_distribution::SinkError> {
        Ok(self.1.clone())
    }
}

fn root_of(image: &Image) -> Descriptor {
    Descriptor::new(media_type::OCI_MANIFEST, image.digest(), image.manifest.len() as u64)
}

#[tokio::test]
async fn push_pull_mount_tags_and_resume() {
    let Some(registry) = start(false).await else { return };
    let (_root, kept) = store();
    let image = Image::new(1, &[3_000_000, 1_000, 500_000]);
    image.keep(&kept);
    let options = PushOptions { retry: RETRY, ..PushOptions::default() };
    let to = async |name: &str, labels: Labels| {
        let repository = repository(crate::setup::options(), name).await;
        let news = Arc::new(News::default());
        let source = Arc::new(Labelled(kept.clone(), labels));
        patiently(push(&repository, source, &root_of(&image), &options, news.clone())).await.unwrap();
        news.words(&format!("layer-{}", digest_of(&image.layers[0])))
    };
    let name = format!("{}/team/app:v1", registry.name);
    let words = to(&name, Labels::new()).await;
    assert_eq!(words.last(), Some(&"done"));
    assert_eq!(to(&name, Labels::new()).await.last(), Some(&"exists"));
    assert_eq!(to(&format!("{}/team/app:v2", registry.name), Labels::new()).await.last(), Some(&"exists"));
    let from = Labels::from([(labels::source_key(&name.parse().unwrap()), "team/app".to_owned())]);
    assert_eq!(to(&format!("{}/team/other:v1", registry.name), from).await.last(), Some(&"mounted"));

    let repository = repository(crate::setup::options(), &name).await;
    let mut tags = patiently(repository.tags()).await.unwrap();
    tags.sort();
    assert_eq!(tags, ["v1", "v2"]);
    assert!(patiently(repository.referrers(&image.digest())).await.unwrap().is_empty());

    // A part of a layer is there from an earlier process.
    let (_other_root, other) = store();
    let layer = &image.layers[0];
    let digest = digest_of(layer);
    let mut writer = other.writer(&format!("layer-{digest}"), layer.len() as u64, None).unwrap();
    writer.write(&layer[..1_234_567]).unwrap();
    drop(writer);
    let mut download = patiently(
        repository.open(&Descriptor::new(media_type::OCI_LAYER_GZIP, digest, layer.len() as u64), 2_999_990),
    )
    .await
    .unwrap();
    assert_eq!(patiently(download.chunk()).await.unwrap().unwrap(), layer[2_999_990..]);
    assert!(patiently(download.chunk()).await.unwrap().is_none());
    pull_from(&repository, &other).await.unwrap();
    image.assert_in(&other);

    let missing =
        crate::setup::repository(crate::setup::options(), &format!("{}/no/such:v1", registry.name)).await;
    assert_eq!(patiently(missing.resolve()).await.unwrap_err().code(), ErrorCode::NotFound);
}

#[tokio::test]
async fn with_a_password() {
    let Some(registry) = start(true).await else { return };
    let (_root, kept) = store();
    let image = Image::new(2, &[400_000]);
    image.keep(&kept);
    let name = format!("{}/team/app:v1", registry.name);
    let options = PushOptions { retry: Retry { attempts: 1, ..RETRY }, ..PushOptions::default() };
    let anonymous = repository(crate::setup::options(), &name).await;
    let root = root_of(&image);
    let pushed = push(&anonymous, kept.clone(), &root, &options, Arc::new(News::default()));
    assert_eq!(patiently(pushed).await.unwrap_err().code(), ErrorCode::Unauthenticated);
    let known = Options { credentials: Some(Keys::password()), ..crate::setup::options() };
    let repository = repository(known, &name).await;
    patiently(push(&repository, kept, &root_of(&image), &options, Arc::new(News::default()))).await.unwrap();
    let (_other_root, other) = store();
    pull_from(&repository, &other).await.unwrap();
    image.assert_in(&other);
    assert_eq!(patiently(anonymous.resolve()).await.unwrap_err().code(), ErrorCode::Unauthenticated);
}
