use super::*;
use std::time::Duration;

#[tokio::test]
async fn live_from_create_to_delete() {
    let fixture = Fixture::new();
    let images = fixture.metadata.images(&scope("a"));
    let digest = digest_of(b"x");
    let mut wanted = image("docker.io/library/x:1", &digest);
    wanted.labels = labels(&[("k", "v"), ("empty", "")]);
    wanted.target.annotations = labels(&[("a", "b")]);
    let created = images.create(wanted.clone(), None).await.unwrap();
    assert!(created.created_at > SystemTime::UNIX_EPOCH);
    let expected = Image {
        labels: labels(&[("k", "v")]),
        created_at: created.created_at,
        updated_at: created.created_at,
        ..wanted.clone()
    };
    assert_eq!(created, expected);
    drop(images);
    let fixture = fixture.reopen();
    let images = fixture.metadata.images(&scope("a"));
    assert_eq!(images.get(&wanted.name).unwrap(), expected);
    refused(
        images.create(wanted.clone(), None).await,
        ErrorCode::AlreadyExists,
        "image \"docker.io/library/x:1\": already exists",
    );
    refused(images.get("y"), ErrorCode::NotFound, "image \"y\": not found");

    let other = digest_of(b"other");
    refused(
        images.delete(&wanted.name, Some(other.as_str()), false).await,
        ErrorCode::NotFound,
        &format!("image \"docker.io/library/x:1\" has target {digest}, not {other}: not found"),
    );
    images.delete(&wanted.name, Some(digest.as_str()), false).await.unwrap();
    refused(images.delete("y", None, false).await, ErrorCode::NotFound, "image \"y\": not found");
    assert_eq!(fixture.events(), [("a".to_owned(), Event::ImageDelete { name: wanted.name })]);
}

#[tokio::test]
async fn must_have_a_target() {
    let fixture = Fixture::new();
    let images = fixture.metadata.images(&scope("a"));
    let good = image("x", &digest_of(b"x"));
    let with = |change: fn(&mut Image)| {
        let mut image = good.clone();
        change(&mut image);
        image
    };
    let table = [
        (with(|image| image.name.clear()), "Image.Name required: invalid argument"),
        (with(|image| image.target.size = 0), "target.Size must be greater than zero: invalid argument"),
        (with(|image| image.target.media_type.clear()), "target.MediaType must be set: invalid argument"),
    ];
    for (wrong, text) in table {
        refused(images.create(wrong, None).await, ErrorCode::InvalidArgument, text);
    }
    for digest in ["", "sha256:", "md5:d41d8cd98f00b204e9800998ecf8427e"] {
        let mut wrong = good.clone();
        digest.clone_into(&mut wrong.target.digest);
        assert_eq!(images.create(wrong, None).await.unwrap_err().code(), ErrorCode::InvalidArgument);
    }
    assert_eq!(images.list(&[]).unwrap(), []);
}

#[tokio::test]
async fn change_by_field_mask() {
    let fixture = Fixture::new();
    let images = fixture.metadata.images(&scope("a"));
    let mut original = image("x", &digest_of(b"x"));
    original.labels = labels(&[("a.b", "1"), ("c", "1")]);
    original.target.annotations = labels(&[("d.e", "1")]);
    let original = images.create(original, None).await.unwrap();
    let mut wanted = image("x", &digest_of(b"y"));
    wanted.labels = labels(&[("a.b", "2")]);
    wanted.target.annotations = labels(&[("d.e", "2")]);

    let updated = images.update(wanted.clone(), &paths(&["labels.a.b", "labels.c"]), None).await.unwrap();
    assert_eq!((&updated.labels, &updated.target), (&wanted.labels, &original.target));
    let updated = images.update(wanted.clone(), &paths(&["annotations.d.e"]), None).await.unwrap();
    assert_eq!(updated.target.annotations, wanted.target.annotations);
    assert_eq!(updated.target.digest, original.target.digest);
    let updated = images.update(wanted.clone(), &paths(&["target"]), None).await.unwrap();
    assert_eq!(updated.target, wanted.target);
    let updated = images.update(original.clone(), &[], None).await.unwrap();
    assert_eq!(updated, Image { updated_at: updated.updated_at, ..original.clone() });
    refused(
        images.update(original.clone(), &paths(&["name"]), None).await,
        ErrorCode::InvalidArgument,
        "cannot update \"name\" field on image \"x\": invalid argument",
    );
    let absent = Image { name: "y".to_owned(), ..original };
    refused(images.update(absent, &[], None).await, ErrorCode::NotFound, "image \"y\": not found");
}

#[tokio::test]
async fn take_their_times_from_the_source_date() {
    let fixture = Fixture::new();
    let images = fixture.metadata.images(&scope("a"));
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let created = images.create(image("x", &digest_of(b"x")), Some(then)).await.unwrap();
    assert_eq!((created.created_at, created.updated_at), (then, then));
    let later = then + Duration::from_nanos(1);
    let updated = images.update(created, &paths(&["labels"]), Some(later)).await.unwrap();
    assert_eq!((updated.created_at, updated.updated_at), (then, later));
}

#[tokio::test]
async fn are_attached_to_the_lease_if_they_expire() {
    let fixture = Fixture::new();
    let metadata = &fixture.metadata;
    metadata.leases(&scope("a")).create(Some("l"), Labels::new()).await.unwrap();
    let images = metadata.images(&leased("a", "l"));
    images.create(image("kept", &digest_of(b"x")), None).await.unwrap();
    let mut expiring = image("expiring", &digest_of(b"x"));
    expiring.labels = labels(&[("containerd.io/gc.expire", "2999-01-01T00:00:00Z")]);
    images.create(expiring.clone(), None).await.unwrap();
    let held = || metadata.leases(&scope("a")).resources("l").unwrap();
    assert_eq!(held(), [Resource { id: "expiring".to_owned(), kind: "images".to_owned() }]);
    images.delete("expiring", None, false).await.unwrap();
    assert_eq!(held(), []);
    refused(
        metadata.images(&leased("a", "other")).create(expiring, None).await,
        ErrorCode::NotFound,
        "lease does not exist: not found",
    );
}

#[tokio::test]
async fn are_listed_by_filter() {
    let fixture = Fixture::new();
    let images = fixture.metadata.images(&scope("a"));
    for name in ["x", "y"] {
        let mut image = image(name, &digest_of(name.as_bytes()));
        image.target.annotations = labels(&[("org.x", name)]);
        images.create(image, None).await.unwrap();
    }
    let names = |filter: &str| -> Vec<String> {
        images.list(&paths(&[filter])).unwrap().into_iter().map(|image| image.name).collect()
    };
    assert_eq!(names("name~=^x$"), ["x"]);
    assert_eq!(names(&format!("target.digest=={}", digest_of(b"y"))), ["y"]);
    assert_eq!(names("target.mediatype~=manifest"), ["x", "y"]);
    assert_eq!(names("annotations.org.x==y"), ["y"]);
}
