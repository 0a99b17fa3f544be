use super::*;

fn sandbox(id: &str) -> Sandbox {
    let any = |name: &str| Some(Any { type_url: name.to_owned(), value: vec![0, 255] });
    Sandbox {
        id: id.to_owned(),
        labels: labels(&[("k", "v"), ("empty", "")]),
        runtime: Runtime { name: "r".to_owned(), options: any("options") },
        spec: any("spec"),
        sandboxer: "shim".to_owned(),
        extensions: BTreeMap::from([("e".to_owned(), any("extension").unwrap())]),
        ..Sandbox::default()
    }
}

#[tokio::test]
async fn live_from_create_to_delete() {
    let fixture = Fixture::new();
    let sandboxes = fixture.metadata.sandboxes(&scope("a"));
    let created = sandboxes.create(sandbox("s")).await.unwrap();
    let expected = Sandbox {
        labels: labels(&[("k", "v")]),
        created_at: created.created_at,
        updated_at: created.created_at,
        ..sandbox("s")
    };
    assert_eq!(created, expected);
    assert_eq!(sandboxes.get("s").unwrap(), expected);
    assert_eq!(sandboxes.list(&paths(&["labels.k==v"])).unwrap(), std::slice::from_ref(&expected));
    let outcome = sandboxes.create(sandbox("s")).await;
    refused(outcome, ErrorCode::AlreadyExists, "sandbox \"s\": already exists");
    assert_eq!(sandboxes.create(sandbox("a/b")).await.unwrap_err().code(), ErrorCode::InvalidArgument);

    let wanted = Sandbox { labels: labels(&[("k", "w")]), spec: None, ..sandbox("s") };
    let updated = sandboxes.update(wanted.clone(), &paths(&["labels.k"])).await.unwrap();
    assert_eq!((&updated.labels, &updated.spec), (&wanted.labels, &expected.spec));
    let updated = sandboxes.update(wanted.clone(), &[]).await.unwrap();
    assert_eq!(updated.spec, None);
    let other = Sandbox { runtime: Runtime::default(), ..wanted.clone() };
    let text = "sandbox.Runtime.Name field is immutable: invalid argument";
    refused(sandboxes.update(other, &[]).await, ErrorCode::InvalidArgument, text);
    let text = "cannot update \"sandboxer\" field on sandbox \"s\": invalid argument";
    refused(sandboxes.update(wanted, &paths(&["sandboxer"])).await, ErrorCode::InvalidArgument, text);

    sandboxes.delete("s").await.unwrap();
    for outcome in [sandboxes.delete("s").await, sandboxes.get("s").map(drop)] {
        refused(outcome, ErrorCode::NotFound, "sandbox \"s\": not found");
    }
}

#[tokio::test]
async fn keep_what_their_labels_name() {
    let fixture = Fixture::new();
    let digest = fixture.blob(&scope("a"), "ref", b"data", Labels::new()).await;
    let sandboxes = fixture.metadata.sandboxes(&scope("a"));
    let labels = labels(&[("containerd.io/gc.ref.content.0", digest.as_str())]);
    sandboxes.create(Sandbox { labels, ..sandbox("s") }).await.unwrap();
    fixture.metadata.collect().await.unwrap();
    fixture.metadata.content(&scope("a")).info(&digest).unwrap();
    sandboxes.delete("s").await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(fixture.backends(), Default::default());
}
