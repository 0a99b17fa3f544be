//! Challenges, tokens, and who is told what.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use davit_distribution::{CredentialSource, Credentials, Error, Options, Secret};
use davit_model::{Coded, ErrorCode};
use http::Method;

use crate::fake::{Fake, Piece, Reply, Seen, blob};
use crate::setup::*;

fn with_keys(keys: &Arc<Keys>) -> Options {
    let keys: Arc<dyn CredentialSource> = keys.clone();
    Options { credentials: Some(keys), ..options() }
}

fn basic_challenge(seen: &Seen) -> Option<Reply> {
    let known = seen.header("authorization") == BASIC;
    (!known).then(|| Reply::new(401).header("www-authenticate", r#"Basic realm="x""#))
}

/// A registry that wants tokens of a service, and the service.
struct Guarded {
    registry: Fake,
    service: Fake,
    tokens: Arc<Mutex<HashMap<String, String>>>,
}

/// Tokens are good for one scope each, and for as many uses as are given.
async fn guarded(image: &Image, uses: usize, answer: fn(&Seen) -> Option<Reply>) -> Guarded {
    let (registry, service) = (Fake::start().await, Fake::start().await);
    image.serve(&registry, "a", "v1");
    let tokens: Arc<Mutex<HashMap<String, String>>> = Arc::default();
    let made = tokens.clone();
    service.rule(move |seen, _| {
        if let Some(reply) = answer(seen) {
            return Some(reply);
        }
        let scope = seen.parameter("scope").or_else(|| {
            let form = form_urlencoded::parse(&seen.body).find(|(key, _)| key == "scope");
            form.map(|(_, value)| value.into_owned())
        });
        let mut tokens = made.lock().unwrap();
        let token = format!("token-{}", tokens.len());
        tokens.insert(token.clone(), scope.unwrap_or_default());
        Some(
            Reply::new(200)
                .body(format!(r#"{{"token":"{token}","access_token":"{token}","expires_in":300}}"#)),
        )
    });
    let realm = format!("http://{}/token", service.address);
    let (given, mut used) = (tokens.clone(), HashMap::<String, usize>::new());
    registry.rule(move |seen, _| {
        let token = seen.header("authorization").strip_prefix("Bearer ").unwrap_or_default().to_owned();
        let known =
            given.lock().unwrap().get(&token).is_some_and(|scope| scope.contains("repository:a:pull"));
        let count = used.entry(token).or_default();
        *count += 1;
        (!known || *count > uses).then(|| {
            let scope = "repository:a:pull";
            let challenge =
                format!(r#"Bearer realm="{realm}",service="reg",scope="{scope}",error="invalid_token""#);
            Reply::new(401).header("www-authenticate", challenge)
        })
    });
    Guarded { registry, service, tokens }
}

#[tokio::test]
async fn basic_authorization_is_sent_when_asked_for_and_kept() {
    let fake = Fake::start().await;
    let image = Image::new(1, &[1000]);
    image.serve(&fake, "a", "v1");
    fake.rule(|seen, _| basic_challenge(seen));
    let keys = Keys::password();
    let (_root, store) = store();
    let repository = repository(with_keys(&keys), &format!("{}/a:v1", fake.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    assert_eq!(*keys.asked.lock().unwrap(), [fake.name()], "asked once, with the name of the host");
    assert!(fake.seen()[0].header("authorization").is_empty());
    assert_eq!(fake.seen().iter().filter(|seen| seen.header("authorization").is_empty()).count(), 1);
}

#[tokio::test]
async fn a_wrong_password_is_sent_once() {
    let fake = Fake::start().await;
    fake.rule(|_, _| {
        Some(Reply::new(401).header("www-authenticate", "Basic realm=x, error=\"no such user\""))
    });
    let keys = Keys::password();
    let repository = repository(with_keys(&keys), &format!("{}/a:v1", fake.name())).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
    let text = text(&error);
    assert!(
        text.starts_with("pull access denied, repository does not exist or may require authorization: "),
        "{text}"
    );
    assert!(text.contains("server message: no such user"), "{text}");
    assert_eq!(fake.seen().iter().filter(|seen| !seen.header("authorization").is_empty()).count(), 1);
}

#[tokio::test]
async fn without_credentials_the_door_stays_closed() {
    for challenge in ["Basic realm=x", "Digest realm=x", "Bearer service=x", "", "Bearer realm=\"ftp://x\""] {
        let fake = Fake::start().await;
        fake.rule(move |_, _| Some(Reply::new(401).header("www-authenticate", challenge)));
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        let error = patiently(repository.resolve()).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unauthenticated, "{challenge}");
        assert_eq!(fake.seen().len(), 1, "{challenge}");
    }
}

#[tokio::test]
async fn anonymous_tokens_are_fetched_once_for_a_pull() {
    let image = Image::new(2, &[1000, 2000, 3000]);
    let guarded = guarded(&image, usize::MAX, |_| None).await;
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", guarded.registry.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    let asked = guarded.service.seen();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].line(), "GET /token");
    assert_eq!(asked[0].parameter("service").as_deref(), Some("reg"));
    assert_eq!(asked[0].parameter("scope").as_deref(), Some("repository:a:pull"));
    assert!(asked[0].header("authorization").is_empty());
}

#[tokio::test]
async fn a_token_that_runs_out_in_the_middle_is_replaced() {
    let image = Image::new(3, &[1000, 2000, 3000, 4000]);
    let guarded = guarded(&image, 2, |_| None).await;
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", guarded.registry.name())).await;
    // One after the other: tokens that several requests use up together could fail them all.
    let options = davit_distribution::PullOptions { parallel: 1, ..pull_options() };
    pull_with(&repository, &store, &options, Arc::new(News::default())).await.unwrap();
    image.assert_in(&store);
    assert!(guarded.tokens.lock().unwrap().len() >= 3);
}

#[tokio::test]
async fn a_blob_that_broke_off_goes_on_with_a_new_token() {
    let image = Image::new(12, &[200_000]);
    let guarded = guarded(&image, usize::MAX, |_| None).await;
    // The registry itself is behind: it forgets all tokens when it breaks off.
    let (tokens, layer, mut left) = (guarded.tokens.clone(), image.layers[0].clone(), 3);
    let end = digest_of(&layer).to_string();
    guarded.registry.rule(move |seen, _| {
        if !seen.path.ends_with(&end) || left == 0 {
            return None;
        }
        left -= 1;
        tokens.lock().unwrap().values_mut().for_each(String::clear);
        let reply = blob(seen, &layer);
        let Piece::Whole(bytes) = reply.body else { return None };
        let headers =
            reply.headers.into_iter().chain([("content-length".to_owned(), bytes.len().to_string())]);
        Some(Reply {
            status: reply.status,
            headers: headers.collect(),
            body: Piece::Cut(bytes.slice(..50_000)),
        })
    });
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", guarded.registry.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    assert_eq!(guarded.tokens.lock().unwrap().len(), 4);
    let last = guarded.registry.seen().into_iter().rfind(|seen| seen.path.contains("/blobs/")).unwrap();
    assert_eq!(last.header("range"), "bytes=150000-199999");
}

#[tokio::test]
async fn a_token_service_at_the_host_itself_shares_its_connections() {
    // One connection for all: whoever waits for a token must not hold it.
    let fake = Fake::start().await;
    let image = Image::new(11, &[1000, 2000, 3000, 4000, 5000]);
    image.serve(&fake, "a", "v1");
    let challenge = format!(r#"Bearer realm="http://{}/token""#, fake.address);
    let (mut served, mut used) = (0, HashSet::new());
    fake.rule(move |seen, _| {
        if seen.path == "/token" {
            served += 1;
            return Some(Reply::new(200).body(format!(r#"{{"token":"{served}"}}"#)));
        }
        // Each token is good for one request.
        let token = seen.header("authorization").strip_prefix("Bearer ").unwrap_or_default().to_owned();
        let known = used.insert(token.clone()) && !token.is_empty();
        (!known).then(|| Reply::new(401).header("www-authenticate", &challenge))
    });
    let mut options = options();
    options.limits.connections = 1;
    let (_root, store) = store();
    let repository = repository(options, &format!("{}/a:v1", fake.name())).await;
    // Some requests find their token used up twice, and fail; it must end in any case.
    for _ in 0..20 {
        if pull_from(&repository, &store).await.is_ok() {
            break;
        }
    }
    image.assert_in(&store);
}

#[tokio::test]
async fn with_a_password_the_oauth_form_comes_first() {
    let image = Image::new(4, &[1000]);
    let guarded = guarded(&image, usize::MAX, |_| None).await;
    let keys = Keys::password();
    let repository = repository(with_keys(&keys), &format!("{}/a:v1", guarded.registry.name())).await;
    patiently(repository.resolve()).await.unwrap();
    let asked = guarded.service.seen();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].line(), "POST /token");
    let form: HashMap<_, _> = form_urlencoded::parse(&asked[0].body).into_owned().collect();
    assert_eq!(form["grant_type"], "password");
    assert_eq!((form["username"].as_str(), form["password"].as_str()), ("user", "hunter2"));
    assert_eq!(form["scope"], "repository:a:pull");
    assert!(guarded.registry.seen().iter().all(|seen| !seen.header("authorization").contains("Basic")));
}

#[tokio::test]
async fn services_without_the_form_are_asked_with_get() {
    for status in [400, 401, 404, 405] {
        let image = Image::new(5, &[1000]);
        let answer = match status {
            400 => |seen: &Seen| (seen.method == Method::POST).then(|| Reply::new(400)),
            401 => |seen: &Seen| (seen.method == Method::POST).then(|| Reply::new(401)),
            404 => |seen: &Seen| (seen.method == Method::POST).then(|| Reply::new(404)),
            _ => |seen: &Seen| (seen.method == Method::POST).then(|| Reply::new(405)),
        };
        let guarded = guarded(&image, 1, answer).await;
        let keys = Keys::password();
        let repository = repository(with_keys(&keys), &format!("{}/a:v1", guarded.registry.name())).await;
        patiently(repository.resolve()).await.unwrap();
        patiently(repository.resolve()).await.unwrap();
        let lines: Vec<String> = guarded.service.seen().iter().map(Seen::line).collect();
        assert_eq!(lines, ["POST /token", "GET /token", "GET /token"], "{status}");
        assert_eq!(guarded.service.seen()[1].header("authorization"), BASIC);
    }
}

#[tokio::test]
async fn identity_tokens_and_headers() {
    let image = Image::new(6, &[1000]);
    let guarded = guarded(&image, usize::MAX, |_| None).await;
    let name = format!("{}/a:v1", guarded.registry.name());
    let keys = Keys::of(Credentials::IdentityToken(Secret::new("hunter2")));
    let repository = repository(with_keys(&keys), &name).await;
    patiently(repository.resolve()).await.unwrap();
    let form: HashMap<_, _> = form_urlencoded::parse(&guarded.service.seen()[0].body).into_owned().collect();
    assert_eq!((form["grant_type"].as_str(), form["refresh_token"].as_str()), ("refresh_token", "hunter2"));

    guarded.tokens.lock().unwrap().insert("given".to_owned(), "repository:a:pull".to_owned());
    let keys = Keys::of(Credentials::Header(Secret::new("Bearer given")));
    let repository = crate::setup::repository(with_keys(&keys), &name).await;
    patiently(repository.resolve()).await.unwrap();
    assert_eq!(guarded.service.seen().len(), 1, "the header needs no service");
}

#[tokio::test]
async fn a_service_that_fails_fails_the_pull_without_words_of_secrets() {
    let large = |_: &Seen| Some(Reply::new(200).body("x".repeat(2 << 20)));
    let cases: [fn(&Seen) -> Option<Reply>; 5] = [
        |_| Some(Reply::new(403).body(r#"{"errors":[{"code":"DENIED","message":"go away"}]}"#)),
        |_| Some(Reply::new(200).body("{}")),
        |_| Some(Reply::new(200).body("hunter2")),
        |_| Some(Reply::new(200).body(r#"{"token":"a\nb"}"#)),
        large,
    ];
    for (number, answer) in cases.into_iter().enumerate() {
        let image = Image::new(7, &[1000]);
        let guarded = guarded(&image, usize::MAX, answer).await;
        let keys = Keys::password();
        let repository = repository(with_keys(&keys), &format!("{}/a:v1", guarded.registry.name())).await;
        let error = patiently(repository.resolve()).await.unwrap_err();
        let text = text(&error);
        assert!(number > 0 || text.contains("denied: go away"), "{text}");
        assert!(matches!(error, Error::Token { .. } | Error::Status { .. }), "{number}: {text}");
        assert!(guarded.service.seen().len() <= 2, "{number}");
    }
}

#[tokio::test]
async fn a_token_service_cannot_pass_secrets_on() {
    let thief = Fake::start().await;
    let image = Image::new(8, &[1000]);
    let (registry, service) = (Fake::start().await, Fake::start().await);
    image.serve(&registry, "a", "v1");
    let target = format!("http://{}/steal", thief.address);
    service.rule(move |_, _| Some(Reply::new(307).header("location", &target)));
    let challenge = format!(r#"Bearer realm="http://{}/token""#, service.address);
    registry.rule(move |_, _| Some(Reply::new(401).header("www-authenticate", &challenge)));
    let repository = repository(with_keys(&Keys::password()), &format!("{}/a:v1", registry.name())).await;
    text(&patiently(repository.resolve()).await.unwrap_err());
    assert!(thief.seen().is_empty());
}

#[tokio::test]
async fn redirects_take_no_secret_along() {
    let (fake, storage) = (Fake::start().await, Fake::start().await);
    let image = Image::new(9, &[100_000]);
    image.serve(&fake, "a", "v1");
    image.serve(&storage, "a", "v1");
    let target = storage.address;
    fake.rule(move |seen, _| {
        basic_challenge(seen).or_else(|| {
            let place = format!("http://{target}{}?X-Signature=abc", seen.path);
            seen.path.contains("/blobs/").then(|| Reply::new(307).header("location", place))
        })
    });
    let (root, mut options) = with_hosts(
        with_keys(&Keys::password()),
        &fake.name(),
        &format!("server = \"http://{0}\"\n[header]\n\"x-key\" = \"hunter2\"", fake.name()),
    );
    options.headers.push(("x-client".parse().unwrap(), "1".parse().unwrap()));
    let (_store_root, store) = store();
    let repository = repository(options, &format!("{}/a:v1", fake.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    drop(root);
    assert!(
        fake.seen().iter().all(|seen| seen.header("x-key") == "hunter2" && seen.header("x-client") == "1")
    );
    assert_eq!(storage.seen().len(), 2);
    for seen in storage.seen() {
        for name in ["authorization", "x-key", "x-client", "cookie"] {
            assert!(seen.header(name).is_empty(), "{name}: {}", seen.header(name));
        }
    }
}

#[tokio::test]
async fn the_target_of_a_redirect_may_give_out_anonymous_tokens_only() {
    let (fake, other, service) = (Fake::start().await, Fake::start().await, Fake::start().await);
    let image = Image::new(10, &[1000]);
    image.serve(&other, "a", "v1");
    let target = other.address;
    fake.rule(move |seen, _| {
        let place = format!("http://{target}{}", seen.path);
        basic_challenge(seen).or_else(|| Some(Reply::new(302).header("location", place)))
    });
    let realm = format!("http://{}/token", service.address);
    other.rule(move |seen, _| {
        let challenge = format!(r#"Bearer realm="{realm}",service="other""#);
        (seen.header("authorization") != "Bearer anonymous")
            .then(|| Reply::new(401).header("www-authenticate", challenge))
    });
    service.rule(|seen, _| {
        let anonymous = seen.method == Method::GET && seen.header("authorization").is_empty();
        Some(if anonymous { Reply::new(200).body(r#"{"token":"anonymous"}"#) } else { Reply::new(500) })
    });
    let keys = Keys::password();
    let (_root, store) = store();
    let repository = repository(with_keys(&keys), &format!("{}/a:v1", fake.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    assert_eq!(*keys.asked.lock().unwrap(), [fake.name()]);
    assert!(other.seen().iter().all(|seen| !seen.header("authorization").starts_with("Basic")));

    // And no password at all.
    other.rule(|_, _| None);
    let basic = Fake::start().await;
    basic.rule(|_, _| Some(Reply::new(401).header("www-authenticate", "Basic realm=x")));
    let target = basic.address;
    let sender = Fake::start().await;
    sender.rule(move |_, _| Some(Reply::new(307).header("location", format!("http://{target}/x"))));
    let repository = crate::setup::repository(with_keys(&keys), &format!("{}/a:v1", sender.name())).await;
    assert!(patiently(repository.resolve()).await.is_err());
    assert!(basic.seen().iter().all(|seen| seen.header("authorization").is_empty()));
    assert_eq!(*keys.asked.lock().unwrap(), [fake.name()]);
}
