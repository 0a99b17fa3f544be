//! Hosts that stand in for others, and proxies.

use std::sync::Arc;

use davit_distribution::{Error, Options, Registry};
use davit_model::{Coded, ErrorCode};
use davit_oci::reference::Reference;
use http::Method;

use crate::fake::{Fake, Piece, Reply, blob};
use crate::setup::*;

const NAME: &str = "registry.example";

/// `hosts.toml` of mirrors and an upstream that all are in this process.
fn hosts(mirrors: &[(&Fake, &str)], upstream: &Fake) -> String {
    let mut text = format!("server = \"http://{}\"\n", upstream.name());
    for (mirror, rest) in mirrors {
        text.push_str(&format!("[host.\"http://{}\"]\n{rest}\n", mirror.name()));
    }
    text
}

#[tokio::test]
async fn a_mirror_serves_all_and_is_told_for_whom() {
    let (mirror, upstream) = (Fake::start().await, Fake::start().await);
    let image = Image::new(1, &[1000, 2000]);
    image.serve(&mirror, "a", "v1");
    let (_hosts, options) = with_hosts(options(), NAME, &hosts(&[(&mirror, "")], &upstream));
    let (_root, store) = store();
    let repository = repository(options, &format!("{NAME}/a:v1")).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    assert!(upstream.seen().is_empty(), "a mirror that is up leaves the origin in peace");
    assert!(mirror.seen().iter().all(|seen| seen.query == format!("ns={NAME}")));
}

#[tokio::test]
async fn the_next_host_is_asked_when_one_fails() {
    let gone = Fake::start().await;
    let gone_name = gone.name();
    drop(gone);
    let (empty, broken, upstream) = (Fake::start().await, Fake::start().await, Fake::start().await);
    let image = Image::new(2, &[1000]);
    image.serve(&upstream, "a", "v1");
    broken.rule(|_, _| Some(Reply::new(500)));
    let text = hosts(&[(&empty, ""), (&broken, "")], &upstream);
    let text = format!("{text}\n[host.\"http://{gone_name}\"]\n");
    let (_hosts, options) = with_hosts(options(), NAME, &text);
    let (_root, store) = store();
    let repository = repository(options, &format!("{NAME}/a:v1")).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    // A mirror is not asked again while there is somebody else to ask.
    assert_eq!(broken.count(Method::HEAD, "/manifests/v1"), 1);
    // The upstream is a host of another name, too.
    assert!(upstream.seen().iter().all(|seen| seen.query == format!("ns={NAME}")));
}

#[tokio::test]
async fn capabilities_are_obeyed() {
    let (pulls, resolves, upstream) = (Fake::start().await, Fake::start().await, Fake::start().await);
    let image = Image::new(3, &[1000]);
    // The mirror of content is not trusted with names.
    let liar = Image::new(4, &[1]);
    liar.serve(&pulls, "a", "v1");
    image.serve(&pulls, "a", "v2");
    image.serve(&resolves, "a", "v1");
    let both = "capabilities = [\"pull\", \"resolve\"]";
    let text = hosts(&[(&pulls, "capabilities = [\"pull\"]"), (&resolves, both)], &upstream);
    let (_hosts, options) = with_hosts(options(), NAME, &text);
    let (_root, store) = store();
    let repository = repository(options, &format!("{NAME}/a:v1")).await;
    let pulled = pull_from(&repository, &store).await.unwrap();
    assert_eq!(pulled.root.digest, image.digest());
    image.assert_in(&store);
    assert_eq!(pulls.count(Method::HEAD, "/manifests/v1"), 0);
    assert!(resolves.seen().iter().all(|seen| seen.method == Method::HEAD));
    assert!(upstream.seen().is_empty());
    // Nobody but the server may be pushed to.
    let error = patiently(davit_distribution::push(
        &repository,
        store.clone(),
        &pulled.root,
        &davit_distribution::PushOptions::default(),
        Arc::new(davit_distribution::Unobserved),
    ))
    .await;
    error.unwrap();
    assert!(upstream.count(Method::PUT, "/manifests/v1") == 1);
}

#[tokio::test]
async fn the_error_of_the_host_that_came_farthest_is_told() {
    let (empty, denied, upstream) = (Fake::start().await, Fake::start().await, Fake::start().await);
    denied.rule(|_, _| Some(Reply::new(403)));
    let (_hosts, options) = with_hosts(options(), NAME, &hosts(&[(&empty, ""), (&denied, "")], &upstream));
    let repository = repository(options, &format!("{NAME}/a:v1")).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::PermissionDenied, "{error:?}");
}

#[tokio::test]
async fn a_mirror_with_damaged_content_is_passed_by() {
    for damage in ["bytes", "length", "cuts"] {
        let (mirror, upstream) = (Fake::start().await, Fake::start().await);
        let image = Arc::new(Image::new(5, &[300_000]));
        image.serve(&mirror, "a", "v1");
        image.serve(&upstream, "a", "v1");
        let served = image.clone();
        let end = digest_of(&image.layers[0]).to_string();
        mirror.rule(move |seen, _| {
            if seen.method != Method::GET || !seen.path.ends_with(&end) {
                return None;
            }
            Some(match damage {
                "bytes" => blob(seen, &noise(77, 300_000)),
                "length" => Reply::new(200).body("short"),
                _ => Reply::new(200)
                    .header("content-length", 300_000)
                    .piece(Piece::Cut(served.layers[0].slice(..10_000))),
            })
        });
        let (_hosts, options) = with_hosts(options(), NAME, &hosts(&[(&mirror, "")], &upstream));
        let (_root, store) = store();
        let repository = repository(options, &format!("{NAME}/a:v1")).await;
        pull_from(&repository, &store).await.unwrap();
        image.assert_in(&store);
        assert_eq!(upstream.seen().len(), 1, "{damage}");
    }
}

#[tokio::test]
async fn a_configuration_that_is_no_good_fails() {
    let upstream = Fake::start().await;
    for text in
        ["[host", "server = \"https://x\"\nca = \"/no/such/file\"", "[host.x]\ncapabilities = [\"x\"]"]
    {
        let (_hosts, options) = with_hosts(options(), &upstream.name(), text);
        let reference: Reference = format!("{}/a:v1", upstream.name()).parse().unwrap();
        let error = client(options).repository(&reference).await.unwrap_err();
        assert!(matches!(error, Error::Hosts { .. }), "{error:?}");
        assert_eq!(error.code(), ErrorCode::FailedPrecondition);
    }
}

#[tokio::test]
async fn hosts_without_tls_go_through_a_proxy_and_this_machine_does_not() {
    let proxy = Fake::start().await;
    let image = Image::new(6, &[1000]);
    image.serve(&proxy, "a", "v1");
    let (_hosts, options) = with_hosts(options(), NAME, &format!("server = \"http://{NAME}\""));
    let address = format!("http://user:hunter2@{}", proxy.name());
    let through = |options: Options, none: &str| Registry::with_proxies(options, &address, &address, none);
    let reference: Reference = format!("{NAME}/a:v1").parse().unwrap();
    let registry = through(options.clone(), "other.example");
    let (_root, store) = store();
    pull_from(&registry.repository(&reference).await.unwrap(), &store).await.unwrap();
    image.assert_in(&store);
    for seen in proxy.seen() {
        assert!(seen.target.starts_with(&format!("http://{NAME}/v2/a/")), "{}", seen.target);
        assert_eq!(seen.header("proxy-authorization"), BASIC);
        assert_eq!(seen.header("host"), NAME);
    }
    // What the client is told by a host behind the proxy is looked at, too.
    proxy.rule(|_, _| Some(Reply::new(302).header("location", "http://169.254.169.254/")));
    let error = patiently(registry.repository(&reference).await.unwrap().resolve()).await.unwrap_err();
    assert!(text(&error).contains("may not send its clients"), "{error:?}");

    // `NO_PROXY`, with a name that has no address: it is looked up, and the proxy is left alone.
    let before = proxy.seen().len();
    let registry = through(options, NAME);
    let error = patiently(registry.repository(&reference).await.unwrap().resolve()).await.unwrap_err();
    text(&error);
    let local = Fake::start().await;
    image.serve(&local, "a", "v1");
    let reference: Reference = format!("{}/a:v1", local.name()).parse().unwrap();
    let registry = through(crate::setup::options(), "");
    patiently(registry.repository(&reference).await.unwrap().resolve()).await.unwrap();
    assert!(local.seen().iter().all(|seen| seen.header("proxy-authorization").is_empty()));
    assert_eq!(proxy.seen().len(), before);
}
