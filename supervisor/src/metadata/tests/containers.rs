use super::*;

#[tokio::test]
async fn come_back_as_they_were_stored() {
    let fixture = Fixture::new();
    let containers = fixture.metadata.containers(&scope("a"));
    let any = |name: &str| Any { type_url: name.to_owned(), value: vec![0, 1, 255] };
    let wanted = Container {
        labels: labels(&[("k", "v"), ("empty", "")]),
        image: "docker.io/library/x:1".to_owned(),
        runtime: Runtime { name: "r".to_owned(), options: Some(any("containerd.runc.v1.Options")) },
        spec: Some(any("spec")),
        snapshotter: "overlayfs".to_owned(),
        snapshot_key: "key".to_owned(),
        extensions: BTreeMap::from([("e.f".to_owned(), any("extension"))]),
        sandbox: "pod".to_owned(),
        ..container("c")
    };
    let created = containers.create(wanted.clone()).await.unwrap();
    assert!(created.created_at > SystemTime::UNIX_EPOCH);
    assert_eq!(created.created_at, created.updated_at);
    let expected = Container {
        labels: labels(&[("k", "v")]),
        created_at: created.created_at,
        updated_at: created.updated_at,
        ..wanted
    };
    assert_eq!(created, expected);
    assert_eq!(containers.get("c").unwrap(), expected);
    drop(containers);
    let fixture = fixture.reopen();
    let containers = fixture.metadata.containers(&scope("a"));
    assert_eq!(containers.get("c").unwrap(), expected);
    refused(
        fixture.metadata.containers(&scope("b")).get("c"),
        ErrorCode::NotFound,
        "container \"c\" in namespace \"b\": not found",
    );
    refused(
        containers.create(container("c")).await,
        ErrorCode::AlreadyExists,
        "container \"c\": already exists",
    );
    containers.delete("c").await.unwrap();
    refused(containers.delete("c").await, ErrorCode::NotFound, "container c: not found");
    assert_eq!(fixture.events(), [("a".to_owned(), Event::ContainerDelete { id: "c".to_owned() })]);
}

#[tokio::test]
async fn must_be_complete() {
    let fixture = Fixture::new();
    let containers = fixture.metadata.containers(&scope("a"));
    let table = [
        (Container { spec: None, ..container("c") }, "container.Spec must be set: invalid argument"),
        (
            Container { runtime: Runtime::default(), ..container("c") },
            "container.Runtime.Name must be set: invalid argument",
        ),
        (
            Container { snapshot_key: "k".to_owned(), ..container("c") },
            "container.Snapshotter must be set if container.SnapshotKey is set: invalid argument",
        ),
        (
            Container { extensions: BTreeMap::from([(String::new(), Any::default())]), ..container("c") },
            "container.Extension keys must not be zero-length: invalid argument",
        ),
        (container(""), "container.ID: identifier must not be empty"),
    ];
    for (wrong, text) in table {
        let text = format!("create container failed validation: {text}");
        refused(containers.create(wrong).await, ErrorCode::InvalidArgument, &text);
    }
    for id in ["../x", "a/b", &"x".repeat(77)] {
        assert_eq!(containers.create(container(id)).await.unwrap_err().code(), ErrorCode::InvalidArgument);
    }
    let long = Container { labels: labels(&[("k", &"v".repeat(4096))]), ..container("c") };
    assert_eq!(containers.create(long).await.unwrap_err().code(), ErrorCode::InvalidArgument);
    assert_eq!(containers.list(&[]).unwrap(), []);
    assert_eq!(fixture.metadata.namespaces().list().unwrap(), []);
}

#[tokio::test]
async fn change_by_field_mask() {
    let fixture = Fixture::new();
    let containers = fixture.metadata.containers(&scope("a"));
    let any = |value: &[u8]| Any { type_url: "t".to_owned(), value: value.to_vec() };
    let original = Container {
        labels: labels(&[("a.b", "1"), ("c", "1")]),
        snapshotter: "overlayfs".to_owned(),
        extensions: BTreeMap::from([("x.y".to_owned(), any(b"1")), ("z".to_owned(), any(b"1"))]),
        ..container("c")
    };
    let original = containers.create(original).await.unwrap();
    let wanted = Container {
        labels: labels(&[("a.b", "2"), ("c", "")]),
        image: "image".to_owned(),
        spec: Some(any(b"new")),
        snapshot_key: "key".to_owned(),
        extensions: BTreeMap::from([("x.y".to_owned(), any(b"2"))]),
        ..original.clone()
    };
    let mut expected = original.clone();
    type Change = fn(&mut Container, &Container);
    let masks: [(&str, Change); 7] = [
        ("labels.a.b", |expected, _| expected.labels = labels(&[("a.b", "2"), ("c", "1")])),
        ("labels.c", |expected, _| expected.labels = labels(&[("a.b", "2")])),
        ("extensions.x.y", |expected, wanted| {
            expected.extensions.insert("x.y".to_owned(), wanted.extensions["x.y"].clone());
        }),
        ("extensions.z", |expected, _| drop(expected.extensions.remove("z"))),
        ("spec", |expected, wanted| expected.spec.clone_from(&wanted.spec)),
        ("image", |expected, wanted| expected.image.clone_from(&wanted.image)),
        ("snapshotkey", |expected, wanted| expected.snapshot_key.clone_from(&wanted.snapshot_key)),
    ];
    for (mask, change) in masks {
        let updated = containers.update(wanted.clone(), &paths(&[mask])).await.unwrap();
        change(&mut expected, &wanted);
        assert!(updated.updated_at > expected.updated_at);
        expected.updated_at = updated.updated_at;
        assert_eq!(updated, expected, "{mask}");
        assert_eq!(containers.get("c").unwrap(), expected, "{mask}");
    }
    let back = containers.update(original.clone(), &[]).await.unwrap();
    assert_eq!(back, Container { updated_at: back.updated_at, ..original.clone() });

    let other = Container { snapshotter: "native".to_owned(), ..original.clone() };
    let text = "container.Snapshotter field is immutable: invalid argument";
    refused(containers.update(other.clone(), &[]).await, ErrorCode::InvalidArgument, text);
    containers.update(other, &paths(&["labels"])).await.unwrap();
    let other = Container { runtime: Runtime::default(), ..original.clone() };
    let text = "container.Runtime.Name field is immutable: invalid argument";
    refused(containers.update(other, &[]).await, ErrorCode::InvalidArgument, text);
    refused(
        containers.update(original.clone(), &paths(&["runtime"])).await,
        ErrorCode::InvalidArgument,
        "cannot update \"runtime\" field on \"c\": invalid argument",
    );
    let none = Container { spec: None, ..original };
    let text = "update failed validation: container.Spec must be set: invalid argument";
    refused(containers.update(none, &paths(&["spec"])).await, ErrorCode::InvalidArgument, text);
    let text = "container \"x\": not found";
    refused(containers.update(container("x"), &[]).await, ErrorCode::NotFound, text);
}

#[tokio::test]
async fn are_listed_by_filter() {
    let fixture = Fixture::new();
    let containers = fixture.metadata.containers(&scope("a"));
    for id in ["b", "a", "c"] {
        let labels = labels(&[("io.x/id", id)]);
        containers.create(Container { labels, image: format!("i-{id}"), ..container(id) }).await.unwrap();
    }
    fixture.metadata.containers(&scope("a-b")).create(container("d")).await.unwrap();
    let ids = |filters: &[&str]| -> Vec<String> {
        containers.list(&paths(filters)).unwrap().into_iter().map(|container| container.id).collect()
    };
    assert_eq!(ids(&[]), ["a", "b", "c"]);
    assert_eq!(ids(&["id==b", "image==i-c"]), ["b", "c"]);
    assert_eq!(ids(&["labels.\"io.x/id\"==a"]), ["a"]);
    assert_eq!(ids(&["runtime.name~=runc, id!=a"]), ["b", "c"]);
    assert_eq!(containers.list(&paths(&["id="])).unwrap_err().code(), ErrorCode::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_one_of_many_creates_wins() {
    let fixture = Fixture::new();
    let containers = fixture.metadata.containers(&scope("a"));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let containers = containers.clone();
            tokio::spawn(async move { containers.create(container("c")).await })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        won += usize::from(task.await.unwrap().is_ok());
    }
    assert_eq!(won, 1);
    assert_eq!(fixture.events().len(), 1);
}

#[tokio::test]
async fn a_caller_that_goes_away_undoes_nothing() {
    let fixture = Fixture::new();
    let containers = fixture.metadata.containers(&scope("a"));
    {
        let mut create = std::pin::pin!(containers.create(container("c")));
        // Polled once, then dropped.
        assert!(futures::poll!(create.as_mut()).is_pending());
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while fixture.events.lock().unwrap().is_empty() {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    containers.get("c").unwrap();
}
