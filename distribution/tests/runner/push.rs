//! Pushes.

use std::io::Read;
use std::sync::Arc;

use davit_content_store::Store;
use davit_distribution::{Credentials, Error, Options, PushOptions, Secret, SinkError, Source, labels, push};
use davit_model::{Coded, Digest, ErrorCode, Labels};
use davit_oci::image::Descriptor;
use davit_oci::media_type;
use davit_oci::platform::Platform;
use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake::{Fake, Reply, Seen};
use crate::setup::*;

fn push_options() -> PushOptions {
    PushOptions { retry: RETRY, ..PushOptions::default() }
}

fn root_of(image: &Image) -> Descriptor {
    Descriptor::new(media_type::OCI_MANIFEST, image.digest(), image.manifest.len() as u64)
}

async fn push_to(
    options: Options,
    name: &str,
    source: Arc<dyn Source>,
    root: &Descriptor,
) -> (Result<(), Error>, Arc<News>) {
    let repository = repository(options, name).await;
    let news = Arc::new(News::default());
    let result = patiently(push(&repository, source, root, &push_options(), news.clone())).await;
    (result, news)
}

/// A store whose content has labels.
struct Labelled(Arc<Store>, Labels);

impl Source for Labelled {
    fn open(&self, digest: &Digest) -> Result<Box<dyn Read + Send>, SinkError> {
        Source::open(&*self.0, digest)
    }

    fn labels(&self, _: &Digest) -> Result<Labels, SinkError> {
        Ok(self.1.clone())
    }
}

#[tokio::test]
async fn an_image_arrives_and_a_second_time_nothing_is_sent() {
    let fake = Fake::start().await;
    let image = Image::new(1, &[700_000, 10]);
    let (_root, store) = store();
    image.keep(&store);
    let name = format!("{}/team/app:v1", fake.name());
    let (result, news) = push_to(options(), &name, store.clone(), &root_of(&image)).await;
    result.unwrap();
    let puts: Vec<String> =
        fake.seen().iter().filter(|seen| seen.method == Method::PUT).map(|seen| seen.path.clone()).collect();
    assert_eq!(puts.len(), 4);
    assert_eq!(puts[3], "/v2/team/app/manifests/v1", "the name comes last");
    let words = news.words(&format!("layer-{}", digest_of(&image.layers[0])));
    assert!(words == ["waiting", "done"] || words == ["waiting", "uploading", "done"], "{words:?}");

    let (result, news) = push_to(options(), &name, store.clone(), &root_of(&image)).await;
    result.unwrap();
    assert_eq!(fake.seen().iter().filter(|seen| seen.method == Method::PUT).count(), 4);
    assert_eq!(news.words(&format!("manifest-{}", image.digest())).last(), Some(&"exists"));

    // And it can be had again.
    let (_root, other) = crate::setup::store();
    pull_from(&repository(options(), &name).await, &other).await.unwrap();
    image.assert_in(&other);

    // A tag of another image is moved.
    let next = Image::new(2, &[20]);
    next.keep(&store);
    push_to(options(), &name, store.clone(), &root_of(&next)).await.0.unwrap();
    assert_eq!(patiently(repository(options(), &name).await.resolve()).await.unwrap().digest, next.digest());
    // A reference that names a digest pushes no tag.
    let by_digest = format!("{}/team/app@{}", fake.name(), image.digest());
    push_to(options(), &by_digest, store, &root_of(&image)).await.0.unwrap();
    assert_eq!(fake.count(Method::HEAD, image.digest().as_str()), 1);
}

#[tokio::test]
async fn what_the_registry_has_elsewhere_is_mounted() {
    let fake = Fake::start().await;
    let image = Image::new(3, &[5000]);
    image.serve(&fake, "team/base", "v1");
    // The registry has the blobs, but not in this repository.
    fake.rule(|seen, _| {
        (seen.method == Method::HEAD && seen.path.starts_with("/v2/team/app/blobs/")).then(|| Reply::new(404))
    });
    let (_root, store) = store();
    image.keep(&store);
    let name = format!("{}/team/app:v1", fake.name());
    let key = labels::source_key(&name.parse().unwrap());
    let source = Labelled(store, Labels::from([(key, "other,team/base".to_owned())]));
    let (result, news) = push_to(options(), &name, Arc::new(source), &root_of(&image)).await;
    result.unwrap();
    let mounts: Vec<Seen> = fake.seen().into_iter().filter(|seen| seen.method == Method::POST).collect();
    assert_eq!(mounts.len(), 2);
    assert!(mounts.iter().all(|seen| seen.parameter("from").as_deref() == Some("team/base")));
    assert_eq!(news.words(&format!("layer-{}", digest_of(&image.layers[0]))), ["waiting", "mounted"]);
    assert_eq!(fake.seen().iter().filter(|seen| seen.method == Method::PUT).count(), 1);
}

#[tokio::test]
async fn a_mount_that_is_refused_is_an_upload() {
    for status in [401, 403, 202] {
        let fake = Fake::start().await;
        let image = Image::new(4, &[5000]);
        fake.rule(move |seen, _| {
            let reply = Reply::new(status).header("location", "/v2/team/app/blobs/uploads/7");
            seen.parameter("mount").map(|_| reply)
        });
        let (_root, store) = store();
        image.keep(&store);
        let name = format!("{}/team/app:v1", fake.name());
        let key = labels::source_key(&name.parse().unwrap());
        let source = Labelled(store, Labels::from([(key, "secret/base".to_owned())]));
        push_to(options(), &name, Arc::new(source), &root_of(&image)).await.0.unwrap();
        assert_eq!(fake.with(|contents| contents.blobs.len()), 2, "{status}");
    }
}

#[tokio::test]
async fn uploads_that_fail_are_begun_anew() {
    let fake = Fake::start().await;
    let image = Image::new(5, &[600_000]);
    let (_root, store) = store();
    image.keep(&store);
    let mut left = 3;
    fake.rule(move |seen, _| {
        let fails = seen.method == Method::PUT && seen.path.contains("/uploads/") && left > 0;
        left -= usize::from(fails);
        fails.then(|| Reply::new([404, 500, 503][left % 3]))
    });
    let name = format!("{}/a:v1", fake.name());
    push_to(options(), &name, store, &root_of(&image)).await.0.unwrap();
    assert_eq!(fake.count(Method::POST, "/uploads/"), 5, "two blobs and three failures");
    assert_eq!(fake.with(|contents| contents.blobs.len()), 2);
}

#[tokio::test]
async fn an_upload_that_nobody_reads_is_given_up() {
    let image = Image::new(12, &[20_000_000]);
    let (_root, store) = store();
    image.keep(&store);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Looks and begins are answered; what is sent then is left in the connection.
    let server = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let mut head = Vec::new();
                loop {
                    head.push(stream.read_u8().await?);
                    if !head.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let reply = match head.split(|byte| *byte == b' ').next() {
                        Some(b"HEAD") => "404 Not Found\r\n",
                        Some(b"POST") => "202 Accepted\r\nLocation: /upload\r\n",
                        _ => std::future::pending().await,
                    };
                    head.clear();
                    let reply = format!("HTTP/1.1 {reply}Content-Length: 0\r\n\r\n");
                    stream.write_all(reply.as_bytes()).await?;
                }
                #[allow(unreachable_code)]
                Ok::<(), std::io::Error>(())
            });
        }
    });
    let (_hosts, mut options) =
        with_hosts(options(), &address.to_string(), &format!("server = \"http://{address}\""));
    options.timeouts = QUICK;
    let (result, _) = push_to(options, &format!("{address}/a:v1"), store, &root_of(&image)).await;
    let error = result.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unavailable);
    assert!(text(&error).contains("NoResponse"), "{error:?}");
    server.abort();
}

#[tokio::test]
async fn an_upload_may_be_asked_for_a_password_in_the_middle() {
    let fake = Fake::start().await;
    let image = Image::new(6, &[600_000]);
    let (_root, store) = store();
    image.keep(&store);
    fake.rule(|seen, _| {
        let known = seen.header("authorization") == BASIC || seen.method != Method::PUT;
        (!known).then(|| Reply::new(401).header("www-authenticate", "Basic realm=x"))
    });
    let options = Options { credentials: Some(Keys::password()), ..options() };
    push_to(options, &format!("{}/a:v1", fake.name()), store, &root_of(&image)).await.0.unwrap();
    assert_eq!(fake.with(|contents| contents.blobs.len()), 2);
}

#[tokio::test]
async fn an_upload_to_another_host_takes_no_secret_along() {
    let (fake, storage) = (Fake::start().await, Fake::start().await);
    let image = Image::new(7, &[5000]);
    let (_root, store) = store();
    image.keep(&store);
    let place = storage.address;
    fake.rule(move |seen, _| {
        if seen.header("authorization") != "Bearer hunter2" {
            return Some(Reply::new(401).header("www-authenticate", "Bearer realm=\"http://127.0.0.1:1/\""));
        }
        let to = format!("http://{place}{}1?X-Signature=abc", seen.path);
        (seen.method == Method::POST).then(|| Reply::new(202).header("location", to))
    });
    let keys = Keys::of(Credentials::Header(Secret::new("Bearer hunter2")));
    let options = Options { credentials: Some(keys), ..options() };
    push_to(options, &format!("{}/a:v1", fake.name()), store, &root_of(&image)).await.0.unwrap();
    assert_eq!(storage.with(|contents| contents.blobs.len()), 2);
    for seen in storage.seen() {
        assert!(seen.header("authorization").is_empty());
        assert_eq!(seen.parameter("X-Signature").as_deref(), Some("abc"));
    }
}

#[tokio::test]
async fn a_registry_that_takes_it_for_something_else_is_found_out() {
    let fake = Fake::start().await;
    let image = Image::new(8, &[10]);
    let (_root, store) = store();
    image.keep(&store);
    fake.rule(|seen, _| {
        let reply = Reply::new(201).header("docker-content-digest", digest_of(b"other"));
        (seen.method == Method::PUT).then_some(reply)
    });
    let name = format!("{}/a:v1", fake.name());
    let (result, _) = push_to(options(), &name, store, &root_of(&image)).await;
    assert!(matches!(result, Err(Error::WrongDigest { .. })), "{result:?}");
}

#[tokio::test]
async fn who_may_not_push_is_told() {
    let fake = Fake::start().await;
    let image = Image::new(9, &[10]);
    let (_root, store) = store();
    image.keep(&store);
    fake.rule(|seen, _| {
        let denied = Reply::new(401).header("www-authenticate", "Basic realm=x");
        (seen.method != Method::HEAD).then_some(denied)
    });
    let name = format!("{}/a:v1", fake.name());
    let error = push_to(options(), &name, store, &root_of(&image)).await.0.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
    assert!(text(&error).starts_with("push access denied"), "{error:?}");
}

#[tokio::test]
async fn an_index_comes_after_its_manifests_and_platforms_can_be_chosen() {
    let (one, other) = (Image::new(10, &[100]), Image::new(11, &[200]));
    let (_root, store) = store();
    one.keep(&store);
    let entry = |image: &Image, architecture: &str| {
        format!(
            r#"{{"mediaType":"{}","digest":"{}","size":{},"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#,
            media_type::OCI_MANIFEST,
            image.digest(),
            image.manifest.len()
        )
    };
    let index =
        format!(r#"{{"schemaVersion":2,"manifests":[{},{}]}}"#, entry(&one, "amd64"), entry(&other, "arm64"));
    let digest = digest_of(index.as_bytes());
    let mut writer = store.writer("index", 0, None).unwrap();
    writer.write(index.as_bytes()).unwrap();
    writer.commit(0, None).unwrap();
    let root = Descriptor::new(media_type::OCI_INDEX, digest, index.len() as u64);
    let fake = Fake::start().await;
    let name = format!("{}/a:v1", fake.name());
    // The other manifest is not in the store.
    let (result, _) = push_to(options(), &name, store.clone(), &root).await;
    assert_eq!(result.unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(fake.count(Method::PUT, "/manifests/v1"), 0);

    let options = PushOptions { platforms: vec![Platform::parse("linux/amd64").unwrap()], ..push_options() };
    let repository = repository(crate::setup::options(), &name).await;
    let news = || Arc::new(News::default());
    patiently(push(&repository, store.clone(), &root, &options, news())).await.unwrap();
    let puts: Vec<String> = fake
        .seen()
        .iter()
        .filter(|seen| seen.method == Method::PUT && seen.path.contains("/manifests/"))
        .map(|seen| seen.path.clone())
        .collect();
    assert_eq!(puts, [format!("/v2/a/manifests/{}", one.digest()), "/v2/a/manifests/v1".to_owned()]);

    // Most registries want all of an index.
    fake.with(|contents| contents.manifests.clear());
    fake.rule(|seen, _| {
        let is_index = seen.method == Method::PUT && seen.path.ends_with("/manifests/v1");
        is_index.then(|| Reply::new(400).body(r#"{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}"#))
    });
    let error = patiently(push(&repository, store, &root, &options, news())).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::FailedPrecondition);
    let missing =
        "manifest list/index references to blobs and/or manifests are missing in your target registry";
    assert!(text(&error).starts_with(missing) && text(&error).contains("400 Bad Request"), "{error:?}");
}
