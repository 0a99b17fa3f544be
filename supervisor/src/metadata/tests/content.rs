use super::*;
use std::sync::atomic::Ordering;

use davit_content_store::Error as StoreError;

async fn read(content: &Content, digest: &Digest) -> Vec<u8> {
    let mut data = Vec::new();
    std::io::Read::read_to_end(&mut content.reader(digest).await.unwrap(), &mut data).unwrap();
    data
}

async fn exists(content: &Content, digest: &Digest) {
    let outcome = content.writer("again", 0, Some(digest)).await;
    refused(outcome, ErrorCode::AlreadyExists, &format!("content {digest}: already exists"));
}

#[tokio::test]
async fn a_blob_is_written_in_pieces_and_read() {
    let fixture = Fixture::new();
    let content = fixture.metadata.content(&scope("a"));
    let digest = digest_of(b"foobar");

    let mut writer = content.writer("ref/1", 6, Some(&digest)).await.unwrap();
    writer.write(b"foo").unwrap();
    let busy = content.writer("ref/1", 6, None).await.unwrap_err();
    assert!(matches!(busy, Error::Store(StoreError::Locked { .. })));
    assert_eq!(busy.code(), ErrorCode::Unavailable);
    // The lock is the namespace's.
    drop(fixture.metadata.content(&scope("b")).writer("ref/1", 6, None).await.unwrap());
    drop(writer);

    let mut writer = content.writer("ref/1", 6, Some(&digest)).await.unwrap();
    let status = writer.status();
    assert_eq!((status.reference.as_str(), status.offset, status.total), ("ref/1", 3, 6));
    assert_eq!(writer.digest(), digest_of(b"foo"));
    assert_eq!(content.status("ref/1").await.unwrap().offset, 3);
    assert_eq!(content.statuses(&[]).await.unwrap().len(), 1);
    assert_eq!(content.statuses(&paths(&["ref==other"])).await.unwrap(), []);
    writer.write(b"xxx").unwrap();
    writer.truncate(0).unwrap();
    writer.write(b"foobar").unwrap();
    writer.commit(6, Some(&digest), labels(&[("k", "v"), ("empty", "")])).unwrap();
    assert_eq!(writer.digest(), digest);
    assert_eq!(writer.status().offset, 6);

    let info = content.info(&digest).unwrap();
    assert_eq!((info.size, &info.labels), (6, &labels(&[("k", "v")])));
    assert_eq!(read(&content, &digest).await, b"foobar");
    refused(content.status("ref/1").await, ErrorCode::NotFound, "reference ref/1: not found");
    assert_eq!(content.statuses(&[]).await.unwrap(), []);
    assert_eq!(fixture.backends(), (vec![digest.to_string()], vec!["b/2/ref/1".to_owned()], vec![]));
    let create = Event::ContentCreate { digest: digest.to_string(), size: 6 };
    assert_eq!(fixture.events(), [("a".to_owned(), create)]);
    exists(&content, &digest).await;
}

#[tokio::test]
async fn a_commit_must_be_what_was_announced() {
    let fixture = Fixture::new();
    let content = fixture.metadata.content(&scope("a"));
    let writer = |reference: &'static str| {
        let content = content.clone();
        async move {
            let mut writer = content.writer(reference, 0, None).await.unwrap();
            writer.write(b"data").unwrap();
            writer
        }
    };
    let outcome = writer("ref").await.commit(5, None, Labels::new());
    refused(
        outcome,
        ErrorCode::FailedPrecondition,
        "\"ref\" failed size validation: 4 != 5: failed precondition",
    );
    let mut again = content.writer("ref", 0, None).await.unwrap();
    assert_eq!(again.status().offset, 4);
    let wrong = again.commit(4, Some(&digest_of(b"other")), Labels::new()).unwrap_err();
    assert_eq!(wrong.code(), ErrorCode::FailedPrecondition);
    let long = labels(&[("k", &"v".repeat(4096))]);
    let wrong = writer("ref2").await.commit(4, None, long).unwrap_err();
    assert_eq!(wrong.code(), ErrorCode::InvalidArgument);
    assert_eq!(content.list(&[]).unwrap(), []);
    let text = "ref must not be empty: invalid argument";
    refused(content.writer("", 0, None).await, ErrorCode::InvalidArgument, text);
    let long = "x".repeat(davit_content_store::MAX_REFERENCE_SIZE);
    assert_eq!(content.writer(&long, 0, None).await.unwrap_err().code(), ErrorCode::InvalidArgument);
    assert_eq!(content.statuses(&paths(&["ref~=xxx"])).await.unwrap(), []);
    assert_eq!(fixture.metadata.view().scan(b"md/ingest/").count(), 2);
}

#[tokio::test]
async fn a_digest_of_another_algorithm_can_be_expected() {
    let fixture = Fixture::new();
    let content = fixture.metadata.content(&scope("a"));
    let mut hasher = davit_content_store::Hasher::new(davit_model::Algorithm::Sha512);
    hasher.update(b"data");
    let digest = hasher.digest();
    let writer = content.writer("ref", 0, Some(&digest)).await.unwrap();
    let (found, outcome) = commit(writer, b"data", Some(digest.clone()), Labels::new()).await;
    outcome.unwrap();
    assert_eq!(found, digest);
    content.info(&digest).unwrap();
}

#[tokio::test]
async fn a_blob_that_the_namespace_has_is_not_committed_twice() {
    let fixture = Fixture::new();
    let metadata = &fixture.metadata;
    let digest = fixture.blob(&scope("a"), "ref", b"data", labels(&[("k", "1")])).await;
    metadata.leases(&scope("a")).create(Some("l"), Labels::new()).await.unwrap();
    let content = metadata.content(&leased("a", "l"));
    let held = || metadata.leases(&scope("a")).resources("l").unwrap();
    let resource = |kind: &str, id: &str| Resource { id: id.to_owned(), kind: kind.to_owned() };

    let writer = content.writer("ref", 0, None).await.unwrap();
    assert_eq!(held(), [resource("ingests", "ref")]);
    let (found, outcome) = commit(writer, b"data", None, labels(&[("k", "2")])).await;
    refused(outcome, ErrorCode::AlreadyExists, &format!("content {digest}: already exists"));
    assert_eq!(found, digest);
    assert_eq!(held(), [resource("content", digest.as_str())]);
    assert_eq!(content.info(&digest).unwrap().labels, labels(&[("k", "1")]));
    assert_eq!(fixture.backends().1, Vec::<String>::new());

    metadata.leases(&scope("a")).delete_resource("l", &held()[0]).await.unwrap();
    exists(&content, &digest).await;
    assert_eq!(held(), [resource("content", digest.as_str())]);
    content.delete(&digest).await.unwrap();
    assert_eq!(held(), []);
    let unknown = metadata.content(&leased("a", "other"));
    let text = "lease does not exist: not found";
    refused(unknown.writer("new", 0, None).await, ErrorCode::NotFound, text);
    assert_eq!(content.statuses(&[]).await.unwrap(), []);
}

#[tokio::test]
async fn a_shared_blob_need_not_be_sent_again() {
    let fixture = Fixture::new();
    let (one, two) = (scope("a"), fixture.metadata.content(&scope("b")));
    let digest = fixture.blob(&one, "ref", b"data", labels(&[("k", "1")])).await;
    refused(two.info(&digest), ErrorCode::NotFound, &format!("content digest {digest}: not found"));
    assert_eq!(two.reader(&digest).await.unwrap_err().code(), ErrorCode::NotFound);

    let other_size = two.writer("ref", 5, Some(&digest)).await.unwrap();
    assert_eq!(other_size.status().offset, 0);
    drop(other_size);
    let mut writer = two.writer("ref2", 4, Some(&digest)).await.unwrap();
    assert_eq!((writer.status().offset, writer.digest()), (4, digest.clone()));
    // The ingest holds the blob even when the other namespace gives it up.
    fixture.metadata.content(&one).delete(&digest).await.unwrap();
    fixture.metadata.collect().await.unwrap();
    assert_eq!(fixture.backends().0, [digest.to_string()]);
    writer.commit(4, Some(&digest), labels(&[("k", "2")])).unwrap();
    assert_eq!(two.info(&digest).unwrap().labels, labels(&[("k", "2")]));
    assert_eq!(read(&two, &digest).await, b"data");

    let three = fixture.metadata.content(&scope("c"));
    let mut writer = three.writer("ref", 0, Some(&digest)).await.unwrap();
    let wrong = writer.commit(0, Some(&digest_of(b"x")), Labels::new());
    refused(wrong, ErrorCode::FailedPrecondition, "\"ref\" unexpected digest: failed precondition");
    let mut writer = three.writer("ref", 0, Some(&digest)).await.unwrap();
    writer.write(b"+more").unwrap();
    writer.commit(9, None, Labels::new()).unwrap();
    assert_eq!(read(&three, &digest_of(b"data+more")).await, b"data+more");
    let mut writer = three.writer("ref", 0, Some(&digest)).await.unwrap();
    writer.truncate(0).unwrap();
    assert_eq!(writer.status().offset, 0);
    writer.commit(0, None, Labels::new()).unwrap();
    assert_eq!(three.info(&digest_of(b"")).unwrap().size, 0);
}

#[tokio::test]
async fn an_ingest_that_is_finished_by_sharing_leaves_no_data() {
    let fixture = Fixture::new();
    let digest = fixture.blob(&scope("a"), "ref", b"data", Labels::new()).await;
    let content = fixture.metadata.content(&scope("b"));
    let mut writer = content.writer("ref", 0, None).await.unwrap();
    writer.write(b"da").unwrap();
    drop(writer);
    let mut writer = content.writer("ref", 0, Some(&digest)).await.unwrap();
    assert_eq!(writer.status().offset, 4);
    writer.commit(0, Some(&digest), Labels::new()).unwrap();
    assert_eq!(fixture.backends().1, Vec::<String>::new());
}

#[tokio::test]
async fn an_isolated_namespace_must_send_all_but_what_others_give_away() {
    let fixture = Fixture::with(Sharing::Isolated);
    let two = fixture.metadata.content(&scope("b"));
    let digest = fixture.blob(&scope("a"), "ref", b"data", Labels::new()).await;
    let writer = two.writer("ref", 4, Some(&digest)).await.unwrap();
    assert_eq!(writer.status().offset, 0);
    let (_, outcome) = commit(writer, b"data", Some(digest.clone()), Labels::new()).await;
    outcome.unwrap();
    two.info(&digest).unwrap();

    let shareable = labels(&[("containerd.io/namespace.shareable", "true")]);
    let namespace = Namespace { name: "a".to_owned(), labels: shareable };
    fixture.metadata.namespaces().update(namespace, &[]).await.unwrap();
    let three = fixture.metadata.content(&scope("c"));
    assert_eq!(three.writer("ref", 4, Some(&digest)).await.unwrap().status().offset, 4);
}

#[tokio::test]
async fn an_aborted_ingest_cannot_be_committed() {
    let fixture = Fixture::new();
    let content = fixture.metadata.content(&scope("a"));
    let mut writer = content.writer("ref", 0, None).await.unwrap();
    writer.write(b"data").unwrap();
    content.abort("ref").await.unwrap();
    refused(content.abort("ref").await, ErrorCode::NotFound, "reference ref: not found");
    assert_eq!(writer.commit(4, None, Labels::new()).unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(content.list(&[]).unwrap(), []);
    assert_eq!(fixture.backends(), Default::default());
    assert_eq!(content.writer("ref", 0, None).await.unwrap().status().offset, 0);
}

#[tokio::test]
async fn labels_change_by_field_mask_and_are_filtered() {
    let fixture = Fixture::new();
    let content = fixture.metadata.content(&scope("a"));
    let digest = fixture.blob(&scope("a"), "ref", b"1", labels(&[("a.b", "1"), ("c", "1")])).await;
    let other = fixture.blob(&scope("a"), "ref", b"2", Labels::new()).await;
    let before = content.info(&digest).unwrap();
    let wanted = labels(&[("a.b", "2"), ("c", "")]);
    let updated = content.update(&digest, wanted.clone(), &paths(&["labels.a.b"])).await.unwrap();
    assert_eq!(updated.labels, labels(&[("a.b", "2"), ("c", "1")]));
    assert!(updated.updated_at > before.updated_at && updated.created_at == before.created_at);
    assert_eq!(content.info(&digest).unwrap(), updated);
    let updated = content.update(&digest, wanted.clone(), &paths(&["labels"])).await.unwrap();
    assert_eq!(updated.labels, labels(&[("a.b", "2")]));
    refused(
        content.update(&digest, wanted.clone(), &paths(&["size"])).await,
        ErrorCode::InvalidArgument,
        &format!("cannot update \"size\" field on content info \"{digest}\": invalid argument"),
    );
    let absent = digest_of(b"3");
    assert_eq!(content.update(&absent, wanted, &[]).await.unwrap_err().code(), ErrorCode::NotFound);
    let found = |filter: &str| -> Vec<Digest> {
        content.list(&paths(&[filter])).unwrap().into_iter().map(|info| info.digest).collect()
    };
    assert_eq!(found("labels.a.b==2"), [digest]);
    assert_eq!(found(&format!("digest=={other}")), [other]);
}

/// The collector runs without pause while blobs are committed and given up: what a namespace has can be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_commit_loses_its_blob_to_the_collector() {
    let fixture = Fixture::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let collect = async {
        while !stop.load(Ordering::SeqCst) {
            fixture.metadata.inner.mark_dirty(Dirty { content: true, ..Dirty::default() });
            fixture.metadata.collect().await.unwrap();
        }
    };
    let write = async {
        let writers = (0..4).map(|number| {
            let fixture = &fixture;
            async move {
                let namespace = scope(&format!("n{number}"));
                let content = fixture.metadata.content(&namespace);
                // All of them write the same blobs.
                for round in 0..40u8 {
                    let (data, root) = ([round % 4], labels(&[("containerd.io/gc.root", "1")]));
                    let expected = (number % 2 == 0).then(|| digest_of(&data));
                    let writer = match content.writer("ref", 0, expected.as_ref()).await {
                        Ok(writer) => writer,
                        Err(error) => panic!("{error}"),
                    };
                    let data = if writer.status().offset > 0 { &[][..] } else { &data };
                    let (digest, outcome) = commit(writer, data, expected, root).await;
                    outcome.unwrap();
                    assert_eq!(read(&content, &digest).await, [round % 4]);
                    content.delete(&digest).await.unwrap();
                }
            }
        });
        futures::future::join_all(writers).await;
        stop.store(true, Ordering::SeqCst);
    };
    futures::join!(collect, write);
    fixture.metadata.collect().await.unwrap();
    assert_eq!(fixture.backends(), Default::default());
}

/// An ingest keeps the blob that it shares; one that turns to something else lets it go.
#[tokio::test]
async fn a_blob_that_is_shared_no_longer_is_collected() {
    for turns in ["opened for another", "written over"] {
        let fixture = Fixture::new();
        let content = fixture.metadata.content(&scope("a"));
        let blob = fixture.blob(&scope("a"), "first", b"blob", Labels::new()).await;
        let mut writer = fixture.metadata.content(&scope("b")).writer("ref", 0, Some(&blob)).await.unwrap();
        content.delete(&blob).await.unwrap();
        fixture.metadata.collect().await.unwrap();
        assert_eq!(fixture.backends().0, [blob.to_string()], "{turns}");
        if turns == "written over" {
            writer.truncate(0).unwrap();
            writer.write(b"other").unwrap();
        } else {
            drop(writer);
            writer = fixture.metadata.content(&scope("b")).writer("ref", 0, None).await.unwrap();
            writer.write(b"other").unwrap();
        }
        let root = labels(&[("containerd.io/gc.root", "1")]);
        writer.commit(0, None, root).unwrap();
        fixture.metadata.collect().await.unwrap();
        assert_eq!(fixture.backends().0, [digest_of(b"other").to_string()], "{turns}");
    }
}
