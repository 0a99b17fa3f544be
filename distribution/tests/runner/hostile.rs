//! Registries that lie, send without end, send nothing, or lead astray.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use davit_distribution::{Error, Options};
use davit_model::{Coded, ErrorCode};
use davit_oci::media_type;
use http::Method;

use crate::fake::{Fake, Piece, Reply};
use crate::setup::*;

fn quick() -> Options {
    Options { timeouts: QUICK, ..options() }
}

/// A registry with an image whose layer is answered by a reply of the test.
async fn layer_answered(image: &Image, reply: impl Fn(&Image) -> Reply + Send + 'static) -> Fake {
    let fake = Fake::start().await;
    image.serve(&fake, "a", "v1");
    let end = digest_of(&image.layers[0]).to_string();
    let copy = Image {
        config: image.config.clone(),
        layers: image.layers.clone(),
        manifest: image.manifest.clone(),
    };
    fake.rule(move |seen, _| (seen.method == Method::GET && seen.path.ends_with(&end)).then(|| reply(&copy)));
    fake
}

async fn pull_error(fake: &Fake, image: &Image) -> Error {
    let (_root, store) = store();
    let repository = repository(quick(), &format!("{}/a:v1", fake.name())).await;
    let error = pull_from(&repository, &store).await.unwrap_err();
    text(&error);
    assert!(store.info(&digest_of(&image.layers[0])).is_err(), "a wrong layer is in the store");
    for status in store.statuses().unwrap() {
        assert!(status.offset <= 1_000, "more than the layer has was kept: {status:?}");
    }
    error
}

#[tokio::test]
async fn a_body_without_end_is_cut_at_the_size() {
    let image = Image::new(1, &[1_000]);
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let fake = layer_answered(&image, move |_| Reply::new(200).piece(Piece::Endless(counted.clone()))).await;
    let error = pull_error(&fake, &image).await;
    assert!(matches!(error, Error::WrongSize { actual: None, .. }), "{error:?}");
    // What fits into the buffers of a connection was sent, and no more.
    assert!(count.load(Ordering::Relaxed) < 64, "{count:?} MiB were sent");
}

#[tokio::test]
async fn a_declared_length_that_is_wrong_is_refused_at_once() {
    let image = Image::new(2, &[1_000]);
    for size in [999_usize, 1_001, 1 << 30] {
        let reply = move |_: &Image| Reply::new(200).header("content-length", size).piece(Piece::Silence);
        let fake = layer_answered(&image, reply).await;
        let error = pull_error(&fake, &image).await;
        assert!(matches!(error, Error::WrongSize { actual: None, .. }), "{error:?}");
        assert_eq!(error.code(), ErrorCode::FailedPrecondition);
    }
}

#[tokio::test]
async fn a_body_that_ends_early_is_an_error_in_the_end() {
    let image = Image::new(3, &[1_000]);
    // Without a declared length the end looks regular.
    let short = |image: &Image| {
        Reply::new(200).header("transfer-encoding", "chunked").body(image.layers[0].slice(..900))
    };
    let fake = layer_answered(&image, short).await;
    let error = pull_error(&fake, &image).await;
    assert!(matches!(error, Error::WrongSize { actual: Some(900), .. }), "{error:?}");
}

#[tokio::test]
async fn other_bytes_than_asked_for_are_not_taken() {
    let image = Image::new(4, &[1_000]);
    let fake = layer_answered(&image, |_| Reply::new(200).body(noise(99, 1_000))).await;
    let error = pull_error(&fake, &image).await;
    assert!(matches!(error, Error::WrongDigest { .. }), "{error:?}");
    assert_eq!(fake.count(Method::GET, digest_of(&image.layers[0]).as_str()), 1, "asking again is no use");
}

#[tokio::test]
async fn an_encoding_is_neither_asked_for_nor_undone() {
    let image = Image::new(5, &[1_000]);
    // What is labelled as encoded is taken as it is: it is a gzip file itself.
    let fake = layer_answered(&image, |image| {
        Reply::new(200).header("content-encoding", "gzip").body(image.layers[0].clone())
    })
    .await;
    let (_root, store) = store();
    let name = format!("{}/a:v1", fake.name());
    pull_from(&repository(quick(), &name).await, &store).await.unwrap();
    image.assert_in(&store);
    assert!(fake.seen().iter().all(|seen| seen.header("accept-encoding") == "identity"));
}

#[tokio::test]
async fn a_digest_header_that_differs_is_believed_before_anything_is_read() {
    let image = Image::new(12, &[1_000]);
    let fake = layer_answered(&image, |_| {
        let reply = Reply::new(200).header("content-length", 1_000).piece(Piece::Silence);
        reply.header("docker-content-digest", digest_of(b"other"))
    })
    .await;
    let error = pull_error(&fake, &image).await;
    assert!(matches!(error, Error::WrongDigest { .. }), "{error:?}");
}

#[tokio::test]
async fn silence_and_dripping_are_given_up() {
    let image = Image::new(6, &[1_000_000]);
    let piece = |piece: fn() -> Piece| {
        move |_: &Image| Reply::new(200).header("content-length", 1_000_000).piece(piece())
    };
    let fake = layer_answered(&image, piece(|| Piece::Silence)).await;
    let error = pull_error(&fake, &image).await;
    assert!(text(&error).contains("Idle"), "{error:?}");
    // The bytes are the right ones, so that each attempt gets a few further.
    let fake = layer_answered(&image, piece(|| Piece::Drip(Duration::from_millis(40)))).await;
    let error = pull_error(&fake, &image).await;
    assert!(text(&error).contains("Slow"), "{error:?}");
    assert!(error.code() == ErrorCode::Unavailable);
}

#[tokio::test]
async fn a_host_that_takes_the_request_and_says_nothing_is_given_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let (_root, options) = with_hosts(quick(), &name, &format!("server = \"http://{name}\""));
    let repository = repository(options, &format!("{name}/a:v1")).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert!(text(&error).contains("NoResponse"), "{error:?}");
}

#[tokio::test]
async fn manifests_are_bounded_and_hashed() {
    let large = "x".repeat(5 << 20);
    for head in [true, false] {
        let fake = Fake::start().await;
        let body = large.clone();
        fake.rule(move |seen, _| {
            if seen.method == Method::HEAD && !head {
                return Some(Reply::new(405));
            }
            let reply = Reply::new(200).header("content-type", media_type::OCI_MANIFEST);
            let reply =
                if head { reply.header("docker-content-digest", digest_of(body.as_bytes())) } else { reply };
            Some(reply.body(body.clone()))
        });
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        let error = patiently(repository.resolve()).await.unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
    }
    // One without end and without a length.
    let fake = Fake::start().await;
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    fake.rule(move |seen, _| {
        let head = seen.method == Method::HEAD;
        let endless = Piece::Endless(counted.clone());
        Some(if head { Reply::new(405) } else { Reply::new(200).piece(endless) })
    });
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
    assert!(count.load(Ordering::Relaxed) < 64, "{count:?} MiB were sent");
    // One that is not what its header says.
    let fake = Fake::start().await;
    fake.rule(|seen, _| {
        let head = seen.method == Method::HEAD;
        let reply = Reply::new(200).header("docker-content-digest", digest_of(b"other"));
        Some(if head { Reply::new(405) } else { reply.body("{}") })
    });
    let repository = crate::setup::repository(options(), &format!("{}/a:v1", fake.name())).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert!(matches!(error, Error::WrongDigest { .. }), "{error:?}");
    // And one that is another than asked for by its digest.
    let repository =
        crate::setup::repository(options(), &format!("{}/a@{}", fake.name(), digest_of(b"wanted"))).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert!(matches!(error, Error::WrongDigest { .. }), "{error:?}");
}

#[tokio::test]
async fn documents_that_never_end_in_others() {
    let (_root, store) = store();
    // An index that names itself cannot be made, but a chain of them can.
    let fake = Fake::start().await;
    let mut inner = Image::new(7, &[10]);
    inner.serve(&fake, "a", "leaf");
    let mut media = media_type::OCI_MANIFEST;
    for _ in 0..6 {
        let size = inner.manifest.len();
        let entry = format!(r#"{{"mediaType":"{media}","digest":"{}","size":{size}}}"#, inner.digest());
        inner.manifest = format!(r#"{{"schemaVersion":2,"manifests":[{entry}]}}"#).into();
        media = media_type::OCI_INDEX;
        fake.put_manifest("a", "v1", media, inner.manifest.clone());
    }
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let error = pull_from(&repository, &store).await.unwrap_err();
    assert!(matches!(error, Error::TooMany { .. }), "{error:?}");

    // More layers than anything can stack.
    let fake = Fake::start().await;
    let part =
        format!(r#"{{"mediaType":"{}","digest":"{}","size":1}}"#, media_type::OCI_LAYER, digest_of(b"x"));
    let layers = vec![part.as_str(); 2000].join(",");
    let manifest = format!(r#"{{"schemaVersion":2,"config":{part},"layers":[{layers}]}}"#);
    fake.put_manifest("a", "v1", media_type::OCI_MANIFEST, manifest.into());
    let repository = crate::setup::repository(options(), &format!("{}/a:v1", fake.name())).await;
    let error = pull_from(&repository, &store).await.unwrap_err();
    assert!(matches!(error, Error::TooMany { parts: "layers", .. }), "{error:?}");

    // A document that is two, and an empty layer.
    let both = format!(r#"{{"schemaVersion":2,"config":{part},"layers":[],"manifests":[]}}"#);
    let empty = part.replace("\"size\":1", "\"size\":0");
    let empty = format!(r#"{{"schemaVersion":2,"config":{empty},"layers":[]}}"#);
    for manifest in [both, empty] {
        fake.put_manifest("a", "v1", media_type::OCI_MANIFEST, manifest.into());
        let error = pull_from(&repository, &store).await.unwrap_err();
        assert!(matches!(error, Error::Document { .. } | Error::Descriptor { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn redirects_are_counted_and_looked_at() {
    let fake = Fake::start().await;
    let own = fake.address;
    for (location, reason) in [
        (format!("http://{own}/v2/a/manifests/v1"), "ten before"),
        ("/v2/a/manifests/v1".to_owned(), "ten before"),
        ("ftp://x/".to_owned(), "no address of HTTP"),
        ("http://user:hunter2@x/".to_owned(), "no address of HTTP"),
        (String::new(), "no address of HTTP"),
        ("http://169.254.169.254/latest/meta-data/".to_owned(), "may not send its clients"),
        ("http://[fe80::1]/".to_owned(), "may not send its clients"),
        ("http://[::ffff:169.254.169.254]/".to_owned(), "may not send its clients"),
        ("http://0.0.0.0/".to_owned(), "may not send its clients"),
    ] {
        let fake = Fake::start().await;
        let to = location.replace(&own.to_string(), &fake.name());
        fake.rule(move |_, _| Some(Reply::new(302).header("location", &to)));
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        let error = patiently(repository.resolve()).await.unwrap_err();
        assert!(text(&error).contains(reason), "{location}: {}", text(&error));
        assert!(fake.seen().len() <= 11, "{location}: {}", fake.seen().len());
    }
}

#[tokio::test]
async fn heads_of_responses_are_bounded() {
    for many in [true, false] {
        let fake = Fake::start().await;
        fake.rule(move |_, _| {
            let mut reply = Reply::new(200);
            if many {
                for number in 0..1000 {
                    reply = reply.header(&format!("x-{number}"), "1");
                }
            } else {
                reply = reply.header("x", "y".repeat(300 << 10));
            }
            Some(reply)
        });
        let (_root, options) =
            with_hosts(options(), &fake.name(), &format!("server = \"http://{}\"", fake.name()));
        let repository = repository(options, &format!("{}/a:v1", fake.name())).await;
        let error = patiently(repository.resolve()).await.unwrap_err();
        assert!(matches!(error, Error::Transport { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn errors_of_registries_are_shown_and_bounded() {
    let fake = Fake::start().await;
    fake.rule(|seen, _| {
        let body = r#"{"errors":[{"code":"DENIED","message":"your address is not welcome\n\u001b[31m"}]}"#;
        Some(Reply::new(403).body(if seen.method == Method::HEAD { "" } else { body }))
    });
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::PermissionDenied);
    let shown = error.to_string();
    let wanted = format!(
        "unexpected status from GET request to http://{}/v2/a/manifests/v1: 403 Forbidden: denied: your address is not \
         welcome[31m",
        fake.name()
    );
    assert_eq!(shown, wanted);
}

#[tokio::test]
async fn a_store_that_fails_ends_the_pull() {
    use davit_distribution::{Opened, Sink, SinkError, SinkWriter};
    use davit_model::{Digest, Labels};

    struct Full;
    struct FullWriter;
    fn full() -> SinkError {
        SinkError { code: ErrorCode::ResourceExhausted, text: "no space left on device".to_owned() }
    }
    impl Sink for Full {
        fn size(&self, _: &Digest) -> Result<Option<u64>, SinkError> {
            Ok(None)
        }
        fn read(&self, _: &Digest, _: u64) -> Result<Vec<u8>, SinkError> {
            Err(full())
        }
        fn writer(&self, _: &str, _: u64, _: &Digest) -> Result<Opened, SinkError> {
            Ok(Opened::Writer(Box::new(FullWriter)))
        }
    }
    impl SinkWriter for FullWriter {
        fn offset(&self) -> u64 {
            0
        }
        fn digest(&self) -> Digest {
            digest_of(b"")
        }
        fn write(&mut self, _: &[u8]) -> Result<(), SinkError> {
            Err(full())
        }
        fn truncate(&mut self) -> Result<(), SinkError> {
            Ok(())
        }
        fn commit(self: Box<Self>, _: u64, _: &Digest, _: &Labels) -> Result<(), SinkError> {
            Err(full())
        }
    }
    let fake = Fake::start().await;
    let image = Image::new(8, &[5_000_000]);
    image.serve(&fake, "a", "v1");
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let news = Arc::new(News::default());
    let options = pull_options();
    let root = repository.resolve().await.unwrap();
    let pulled = davit_distribution::pull(&repository, &root, Arc::new(Full), &options, news, None);
    let error = patiently(pulled).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ResourceExhausted, "{error:?}");
}
