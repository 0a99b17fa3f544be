use super::*;
use tokio_util::sync::CancellationToken;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn resource(kind: &str, id: &str) -> Resource {
    Resource { id: id.to_owned(), kind: kind.to_owned() }
}

#[tokio::test]
async fn live_from_create_to_delete() {
    let fixture = Fixture::new();
    let leases = fixture.metadata.leases(&scope("a"));
    let odd = "any/text at all%2F";
    let created = leases.create(Some(odd), labels(&[("k", "v")])).await.unwrap();
    let generated = leases.create(None, Labels::new()).await.unwrap();
    assert_ne!(generated.id, leases.create(Some(""), Labels::new()).await.unwrap().id);
    refused(
        leases.create(Some(odd), Labels::new()).await,
        ErrorCode::AlreadyExists,
        "lease \"any/text at all%2F\": already exists",
    );
    drop(leases);
    let fixture = fixture.reopen();
    let leases = fixture.metadata.leases(&scope("a"));
    assert_eq!(leases.list(&paths(&["labels.k==v"])).unwrap(), [created]);
    assert_eq!(leases.list(&paths(&[&format!("id=={}", generated.id)])).unwrap(), [generated]);
    leases.delete(odd, false).await.unwrap();
    let text = "lease \"any/text at all%2F\": not found";
    refused(leases.delete(odd, false).await, ErrorCode::NotFound, text);
    refused(leases.resources(odd), ErrorCode::NotFound, text);
    assert_eq!(fixture.events(), []);
}

#[tokio::test]
async fn hold_resources_of_known_types() {
    let fixture = Fixture::new();
    let leases = fixture.metadata.leases(&scope("a"));
    // The one's resources must not be taken for the other's.
    for id in ["l", "l/content"] {
        leases.create(Some(id), Labels::new()).await.unwrap();
    }
    let all = [
        resource("content", DIGEST),
        resource("images", "docker.io/x:1"),
        resource("ingests", "a/b"),
        resource("snapshots/overlayfs", "k/1"),
    ];
    for held in all.iter().rev() {
        leases.add_resource("l", held).await.unwrap();
        leases.add_resource("l", held).await.unwrap();
    }
    assert_eq!(leases.resources("l").unwrap(), all);
    assert_eq!(leases.resources("l/content").unwrap(), []);
    for held in &all {
        leases.delete_resource("l", held).await.unwrap();
        leases.delete_resource("l", held).await.unwrap();
    }
    assert_eq!(leases.resources("l").unwrap(), []);

    let table = [
        (resource("streams", "x"), ErrorCode::Unimplemented),
        (resource("content/x", DIGEST), ErrorCode::InvalidArgument),
        (resource("content", "x"), ErrorCode::InvalidArgument),
        (resource("snapshots", "x"), ErrorCode::InvalidArgument),
    ];
    for (wrong, code) in table {
        assert_eq!(leases.add_resource("l", &wrong).await.unwrap_err().code(), code);
        assert_eq!(leases.delete_resource("l", &wrong).await.unwrap_err().code(), code);
        let text = "lease \"x\": not found";
        refused(leases.add_resource("x", &wrong).await, ErrorCode::NotFound, text);
    }
}

#[tokio::test]
async fn protect_nothing_when_they_are_gone() {
    let fixture = Fixture::new();
    let metadata = &fixture.metadata;
    metadata.leases(&scope("a")).create(Some("l"), Labels::new()).await.unwrap();
    let digest = fixture.blob(&leased("a", "l"), "ref", b"data", Labels::new()).await;
    metadata.collect().await.unwrap();
    metadata.content(&scope("a")).info(&digest).unwrap();

    let stop = CancellationToken::new();
    let collector =
        tokio::spawn(metadata.clone().run_collector(super::super::gc::Config::default(), stop.clone()));
    metadata.leases(&scope("a")).delete("l", true).await.unwrap();
    assert_eq!(fixture.backends().0, Vec::<String>::new());
    refused(
        metadata.content(&scope("a")).info(&digest),
        ErrorCode::NotFound,
        &format!("content digest {digest}: not found"),
    );
    stop.cancel();
    collector.await.unwrap();
    refused(metadata.collected().await, ErrorCode::Unknown, "garbage collection failed");
}

#[tokio::test]
async fn keep_the_streams_that_were_registered_with_them() {
    let fixture = Fixture::new();
    let metadata = &fixture.metadata;
    let streams = metadata.streams();
    let leases = metadata.leases(&scope("a"));
    leases.create(Some("l"), Labels::new()).await.unwrap();
    let _free = streams.register("a", None, "free").unwrap();
    let _kept = streams.register("a", Some("l"), "kept").unwrap();
    let _orphan = streams.register("a", Some("no such lease"), "orphan").unwrap();
    // A lease of the same name in another namespace is another lease.
    let _other = streams.register("b", Some("l"), "other").unwrap();
    let (_, named) = streams.register("a", Some("no such lease"), "named").unwrap().split();
    let by_label = labels(&[("containerd.io/gc.ref.stream.0", "named")]);
    let image = Image { labels: by_label, ..image("i", &digest_of(b"x")) };
    metadata.images(&scope("a")).create(image, None).await.unwrap();

    let alive = |namespace, id| {
        let stream = streams.get(namespace, id).unwrap();
        async move {
            let message = Any { type_url: String::new(), value: Vec::new() };
            stream.send(message).await.is_ok()
        }
    };
    metadata.collect().await.unwrap();
    assert!(alive("a", "free").await && alive("a", "kept").await && alive("a", "named").await);
    assert!(!alive("a", "orphan").await && !alive("b", "other").await);
    leases.delete("l", false).await.unwrap();
    metadata.collect().await.unwrap();
    assert!(alive("a", "free").await && !alive("a", "kept").await);
    drop(named);
}
