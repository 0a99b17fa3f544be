use super::*;

fn namespace(name: &str, pairs: &[(&str, &str)]) -> Namespace {
    Namespace { name: name.to_owned(), labels: labels(pairs) }
}

#[tokio::test]
async fn live_from_create_to_delete() {
    let fixture = Fixture::new();
    let namespaces = fixture.metadata.namespaces();
    assert_eq!(namespaces.get("a").unwrap(), namespace("a", &[]));
    assert_eq!(namespaces.list().unwrap(), []);

    namespaces.create(namespace("b", &[])).await.unwrap();
    namespaces.create(namespace("a", &[("k", "v"), ("empty", "")])).await.unwrap();
    assert_eq!(namespaces.list().unwrap(), [namespace("a", &[("k", "v")]), namespace("b", &[])]);
    refused(
        namespaces.create(namespace("a", &[])).await,
        ErrorCode::AlreadyExists,
        "namespace \"a\": already exists",
    );
    assert_eq!(
        namespaces.create(namespace("a/b", &[])).await.unwrap_err().code(),
        ErrorCode::InvalidArgument
    );
    let long = namespace("c", &[("k", &"v".repeat(4096))]);
    assert_eq!(namespaces.create(long).await.unwrap_err().code(), ErrorCode::InvalidArgument);

    namespaces.delete("b").await.unwrap();
    refused(namespaces.delete("b").await, ErrorCode::NotFound, "namespace \"b\": not found");
    let created = |name: &str, pairs: &[(&str, &str)]| {
        (name.to_owned(), Event::NamespaceCreate { name: name.to_owned(), labels: labels(pairs) })
    };
    let deleted = ("b".to_owned(), Event::NamespaceDelete { name: "b".to_owned() });
    assert_eq!(fixture.events(), [created("b", &[]), created("a", &[("k", "v")]), deleted]);
}

#[tokio::test]
async fn labels_are_changed_one_by_one_or_all_at_once() {
    let fixture = Fixture::new();
    let namespaces = fixture.metadata.namespaces();
    namespaces.create(namespace("a", &[("x.y", "1"), ("z", "1")])).await.unwrap();
    let wanted = namespace("a", &[("x.y", "2"), ("z", "")]);
    let updated = namespaces.update(wanted.clone(), &paths(&["labels.x.y"])).await.unwrap();
    assert_eq!(updated, namespace("a", &[("x.y", "2"), ("z", "1")]));
    let updated = namespaces.update(wanted.clone(), &[]).await.unwrap();
    assert_eq!(updated, namespace("a", &[("x.y", "2")]));
    assert_eq!(namespaces.get("a").unwrap(), updated);
    for path in ["labels", "name"] {
        let code = namespaces.update(wanted.clone(), &paths(&[path])).await.unwrap_err().code();
        assert_eq!(code, ErrorCode::InvalidArgument);
    }
    namespaces.update(namespace("new", &[("k", "v")]), &[]).await.unwrap();
    assert_eq!(namespaces.list().unwrap().len(), 2);
}

#[tokio::test]
async fn begin_with_their_first_object_and_stay_while_anything_is_left() {
    let fixture = Fixture::new();
    let (metadata, scope) = (&fixture.metadata, scope("a"));
    let namespaces = metadata.namespaces();
    metadata.containers(&scope).create(container("c")).await.unwrap();
    assert_eq!(namespaces.list().unwrap(), [namespace("a", &[])]);
    let digest = fixture.blob(&scope, "ref", b"data", Labels::new()).await;
    metadata.images(&scope).create(image("i", &digest), None).await.unwrap();
    let snapshots = metadata.snapshots(&scope, NATIVE).unwrap();
    snapshots.prepare("s", None, Labels::new()).await.unwrap();
    let lease = metadata.leases(&scope).create(None, Labels::new()).await.unwrap();
    let held = Resource { id: "s".to_owned(), kind: "snapshots/native".to_owned() };
    metadata.leases(&scope).add_resource(&lease.id, &held).await.unwrap();

    refused(
        namespaces.delete("a").await,
        ErrorCode::FailedPrecondition,
        "namespace \"a\" must be empty, but it still has images, blobs, containers, \
         snapshots on \"native\" snapshotter: failed precondition",
    );
    snapshots.remove("s").await.unwrap();
    metadata.images(&scope).delete("i", None, false).await.unwrap();
    metadata.content(&scope).delete(&digest).await.unwrap();
    refused(
        namespaces.delete("a").await,
        ErrorCode::FailedPrecondition,
        "namespace \"a\" must be empty, but it still has containers: failed precondition",
    );
    metadata.containers(&scope).delete("c").await.unwrap();
    namespaces.delete("a").await.unwrap();
    assert_eq!(namespaces.list().unwrap(), []);
    assert_eq!(metadata.leases(&scope).list(&[]).unwrap(), []);
    assert_eq!(fixture.metadata.view().scan(b"md/leased/").count(), 0);
}
