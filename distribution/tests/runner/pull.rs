//! Pulls from a registry that does what it should.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use davit_distribution::{Platforms, PullOptions, Ready, pull};
use davit_model::{Coded, ErrorCode};
use davit_oci::media_type;
use davit_oci::platform::Platform;
use http::Method;
use tokio::sync::mpsc;

use crate::fake::{Fake, Reply};
use crate::setup::*;

#[tokio::test]
async fn an_image_comes_whole_with_news_and_labels() {
    let fake = Fake::start().await;
    let image = Image::new(1, &[300_000, 10, 700_000, 1]);
    image.serve(&fake, "team/app", "v1");
    let (_root, store) = store();
    let name = format!("{}/team/app:v1", fake.name());
    let repository = repository(options(), &name).await;
    let news = Arc::new(News::default());
    let pulled = pull_with(&repository, &store, &pull_options(), news.clone()).await.unwrap();
    image.assert_in(&store);
    assert_eq!(pulled.root.digest, image.digest());
    assert_eq!(pulled.root.media_type, media_type::OCI_MANIFEST);

    let labels: HashMap<_, _> =
        pulled.contents.iter().map(|(one, labels)| (one.digest.clone(), labels)).collect();
    assert_eq!(labels.len(), 6);
    let source = "containerd.io/distribution.source.127.0.0.1";
    assert!(labels.values().all(|labels| labels[source] == "team/app"));
    let manifest = labels[&image.digest()];
    assert_eq!(manifest["containerd.io/gc.ref.content.config"], digest_of(&image.config).as_str());
    assert_eq!(manifest["containerd.io/gc.ref.content.l.3"], digest_of(&image.layers[3]).as_str());

    let layer = format!("layer-{}", digest_of(&image.layers[0]));
    assert_eq!(news.words(&layer), ["waiting", "downloading", "done"]);
    assert_eq!(news.words(&format!("manifest-{}", image.digest())), ["waiting", "downloading", "done"]);

    let parent_of = |reference: &str| {
        let all = news.0.lock().unwrap();
        all.iter().find(|one| one.reference == reference).unwrap().parent.clone()
    };
    assert_eq!(parent_of(&layer), Some(format!("manifest-{}", image.digest())));
    assert_eq!(parent_of(&format!("manifest-{}", image.digest())), None);

    // Once more: nothing is fetched, and the labels are told all the same.
    let before = fake.seen().len();
    let news = Arc::new(News::default());
    let again = pull_with(&repository, &store, &pull_options(), news.clone()).await.unwrap();
    assert_eq!(fake.seen().len(), before + 1, "only the tag is asked for");
    assert_eq!(again.contents.len(), 6);
    assert_eq!(news.words(&layer), ["waiting", "exists"]);
}

#[tokio::test]
async fn layers_come_side_by_side_and_are_announced_in_order() {
    let fake = Fake::start().await;
    let image = Image::new(2, &[5_000, 6_000, 7_000, 8_000, 9_000]);
    image.serve(&fake, "a", "v1");
    // The lowest layer comes last.
    let slow = format!("/v2/a/blobs/{}", digest_of(&image.layers[0]));
    let mut left = 3;
    fake.rule(move |seen, _| {
        let refuse = seen.path == slow && left > 0;
        left -= usize::from(refuse);
        refuse.then(|| Reply::new(503).header("retry-after", "0"))
    });
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let (sender, mut receiver) = mpsc::channel(1);
    let news = Arc::new(News::default());
    let pulling = {
        let (store, options) = (store.clone(), pull_options());
        let root = repository.resolve().await.unwrap();
        tokio::spawn(async move { pull(&repository, &root, store, &options, news, Some(sender)).await })
    };
    let mut order = Vec::new();
    while let Some(ready) = patiently(receiver.recv()).await {
        match ready {
            Ready::Image { manifest, config, layers, .. } => {
                assert_eq!(manifest.digest, image.digest());
                assert_eq!(read(&store, &config.digest), image.config);
                assert_eq!(layers.len(), 5);
                assert!(order.is_empty());
            }
            Ready::Layer { index, layer, .. } => {
                assert_eq!(read(&store, &layer.digest), image.layers[index]);
                order.push(index);
            }
        }
    }
    assert_eq!(order, [0, 1, 2, 3, 4]);
    patiently(pulling).await.unwrap().unwrap();
}

#[tokio::test]
async fn layers_that_are_elsewhere_are_not_fetched() {
    let fake = Fake::start().await;
    let mut image = Image::new(2, &[5_000, 6_000, 7_000, 6_000]);
    // The second and the fourth are the same.
    let (second, fourth) = (digest_of(&image.layers[1]), digest_of(&image.layers[3]));
    let manifest = String::from_utf8(image.manifest.to_vec()).unwrap();
    image.manifest = manifest.replace(fourth.as_str(), second.as_str()).into();
    image.serve(&fake, "a", "v1");
    for (first, wanted) in
        [(Some(1), vec![1, 2]), (Some(2), vec![1, 2]), (Some(4), vec![]), (None, vec![0, 1, 2])]
    {
        let (_root, store) = store();
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        let (sender, mut receiver) = mpsc::channel(1);
        let pulling = {
            let (store, options) = (store.clone(), PullOptions { ask: true, ..pull_options() });
            let root = repository.resolve().await.unwrap();
            let news = Arc::new(News::default());
            tokio::spawn(async move { pull(&repository, &root, store, &options, news, Some(sender)).await })
        };
        let mut announced = 0;
        while let Some(ready) = patiently(receiver.recv()).await {
            match ready {
                // Who says nothing wants all.
                Ready::Image { wanted, .. } => drop(wanted.unwrap().send_replace(first)),
                Ready::Layer { .. } => announced += 1,
            }
        }
        patiently(pulling).await.unwrap().unwrap();
        assert_eq!(announced, 4, "those that are elsewhere are ready too");
        for place in [0, 1, 2] {
            let there = store.info(&digest_of(&image.layers[place])).is_ok();
            assert_eq!(there, wanted.contains(&place), "layer {place}, wanted from {first:?} on");
        }
    }
}

#[tokio::test]
async fn no_more_layers_at_once_than_asked_for() {
    let fake = Fake::start().await;
    let image = Image::new(3, &[1_000; 1]);
    image.serve(&fake, "a", "v1");
    let layers: Vec<usize> = (0..9).map(|n| 50_000 + n).collect();
    let image = Image::new(4, &layers);
    image.serve(&fake, "a", "v2");
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v2", fake.name())).await;
    let news = Arc::new(News::default());
    let options = PullOptions { parallel: 2, ..pull_options() };
    pull_with(&repository, &store, &options, news.clone()).await.unwrap();
    image.assert_in(&store);
    // News of one thing are in order, so that what is under way can be counted.
    let (mut now, mut most) = (0_usize, 0);
    let mut begun = std::collections::HashSet::new();
    for one in news.0.lock().unwrap().iter().filter(|one| one.reference.starts_with("layer-")) {
        match one.state.as_str() {
            "downloading" if begun.insert(one.reference.clone()) => now += 1,
            "done" => now -= 1,
            _ => {}
        }
        most = most.max(now);
    }
    // `done` is told after the place is free.
    assert!((1..=4).contains(&most), "{most} at once");
}

#[tokio::test]
async fn of_an_index_the_platform_is_pulled() {
    let fake = Fake::start().await;
    let (one, other) = (Image::new(5, &[100]), Image::new(6, &[200, 300]));
    one.serve(&fake, "a", "one");
    other.serve(&fake, "a", "other");
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
    fake.put_manifest("a", "v1", media_type::OCI_INDEX, index.clone().into());
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let pulled = async |platforms: Platforms, all_metadata: bool| {
        let (root, store) = store();
        let options = PullOptions { platforms, all_metadata, ..pull_options() };
        let pulled = pull_with(&repository, &store, &options, Arc::new(News::default())).await;
        (root, store, pulled)
    };
    let platform = |text: &str| Platform::parse(text).unwrap();

    let (_root, store, result) = pulled(Platforms::Best(platform("linux/arm64")), false).await;
    let labels = &result.unwrap().contents[0].1;
    assert_eq!(labels["containerd.io/gc.ref.content.m.1"], other.digest().as_str());
    other.assert_in(&store);
    assert!(store.info(&one.digest()).is_err());

    let (_root, store, result) = pulled(Platforms::Best(platform("linux/arm64")), true).await;
    result.unwrap();
    other.assert_in(&store);
    assert!(store.info(&one.digest()).is_ok() && store.info(&digest_of(&one.config)).is_ok());
    assert!(store.info(&digest_of(&one.layers[0])).is_err());

    let each = vec![platform("linux/arm64"), platform("linux/amd64")];
    for platforms in [Platforms::All, Platforms::Each(each)] {
        let (_root, store, result) = pulled(platforms, false).await;
        result.unwrap();
        one.assert_in(&store);
        other.assert_in(&store);
    }

    let limit = async |platforms: Platforms| {
        let (root, store) = crate::setup::store();
        let options = PullOptions { platforms, manifest_limit: 1, ..pull_options() };
        pull_with(&repository, &store, &options, Arc::new(News::default())).await.unwrap();
        (root, store)
    };
    for (platforms, wanted, left) in [
        (Platforms::All, &one, &other),
        (Platforms::Each(vec![platform("linux/arm64"), platform("linux/amd64")]), &other, &one),
    ] {
        let (_root, store) = limit(platforms).await;
        wanted.assert_in(&store);
        assert!(store.info(&left.digest()).is_err());
    }

    let (_root, _store, result) = pulled(Platforms::Best(platform("linux/s390x")), false).await;
    let error = result.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotFound);
    assert!(text(&error).contains("no match for platform in manifest"));
}

#[tokio::test]
async fn resolving_needs_neither_head_nor_the_digest_header() {
    let image = Image::new(7, &[10]);
    for missing in ["head", "digest", "digest of head", "length"] {
        let fake = Fake::start().await;
        image.serve(&fake, "a", "v1");
        let manifest = image.manifest.clone();
        fake.rule(move |seen, _| {
            let reply =
                Reply::new(200).header("content-type", media_type::OCI_MANIFEST).body(manifest.clone());
            let is_head = seen.method == Method::HEAD;
            match missing {
                _ if !seen.path.ends_with("/manifests/v1") => None,
                "head" => is_head.then(|| Reply::new(405)),
                "digest" => Some(reply),
                "digest of head" => is_head.then_some(reply),
                _ => is_head.then(|| Reply::new(200).header("transfer-encoding", "chunked")),
            }
        });
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        let descriptor = patiently(repository.resolve()).await.unwrap();
        assert_eq!(descriptor.digest, image.digest(), "{missing}");
        assert_eq!(descriptor.size, image.manifest.len() as u64, "{missing}");
        assert_eq!(descriptor.media_type, media_type::OCI_MANIFEST, "{missing}");
    }
}

#[tokio::test]
async fn digests_names_and_what_is_not_there() {
    let fake = Fake::start().await;
    let image = Image::new(8, &[10]);
    image.serve(&fake, "a", "v1");
    let at = async |rest: &str| {
        let repository = repository(options(), &format!("{}/{rest}", fake.name())).await;
        patiently(repository.resolve()).await
    };
    assert_eq!(at(&format!("a@{}", image.digest())).await.unwrap().digest, image.digest());
    // With both, the digest counts.
    assert_eq!(at(&format!("a:nonsense@{}", image.digest())).await.unwrap().digest, image.digest());
    let error = at("a:v2").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotFound);
    assert_eq!(error.to_string(), format!("{}/a:v2", fake.name()));
    let nothing = format!("a@{}", digest_of(b"nothing"));
    assert_eq!(at(&nothing).await.unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(at("a").await.unwrap_err().code(), ErrorCode::InvalidArgument);
    // Any content has a descriptor.
    let blob = at(&format!("a@{}", digest_of(&image.layers[0]))).await.unwrap();
    assert_eq!(blob.size, 10);
}

#[tokio::test]
async fn pulls_of_one_image_at_once_fetch_it_once() {
    let fake = Fake::start().await;
    let image = Image::new(9, &[2_000_000, 1_000_000]);
    image.serve(&fake, "a", "v1");
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let pulls = (0..8).map(|_| pull_from(&repository, &store));
    for pulled in futures::future::join_all(pulls).await {
        assert_eq!(pulled.unwrap().root.digest, image.digest());
    }
    image.assert_in(&store);
    for bytes in [&image.layers[0], &image.layers[1], &image.config] {
        assert_eq!(fake.count(Method::GET, digest_of(bytes).as_str()), 1);
    }
}

#[tokio::test]
async fn connections_are_bounded() {
    let fake = Fake::start().await;
    let sizes: Vec<usize> = (0..12).map(|n| 1000 + n).collect();
    let image = Image::new(10, &sizes);
    image.serve(&fake, "a", "v1");
    let (_root, store) = store();
    let mut options = options();
    options.limits.connections_per_host = 1;
    options.limits.connections = 1;
    let repository = repository(options, &format!("{}/a:v1", fake.name())).await;
    let options = PullOptions { parallel: 12, ..pull_options() };
    pull_with(&repository, &store, &options, Arc::new(News::default())).await.unwrap();
    image.assert_in(&store);
}

#[tokio::test]
async fn tags_are_listed_over_pages() {
    let fake = Fake::start().await;
    let pages = Arc::new(AtomicUsize::new(0));
    let counted = pages.clone();
    fake.rule(move |seen, _| {
        if !seen.path.ends_with("/tags/list") {
            return None;
        }
        counted.fetch_add(1, Ordering::Relaxed);
        Some(match seen.parameter("last").as_deref() {
            None => Reply::new(200)
                .header("link", "</v2/a/tags/list?last=b&n=2>; rel=\"next\"")
                .body(r#"{"name":"a","tags":["a","b"]}"#),
            Some("b") => Reply::new(200).body(r#"{"tags":["c"]}"#),
            Some(_) => Reply::new(500),
        })
    });
    let repository = repository(options(), &format!("{}/a", fake.name())).await;
    assert_eq!(patiently(repository.tags()).await.unwrap(), ["a", "b", "c"]);
    assert_eq!(pages.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn referrers_by_the_api_and_by_the_tag() {
    let subject = digest_of(b"subject");
    let entry = format!(r#"{{"mediaType":"{}","digest":"{subject}","size":3}}"#, media_type::OCI_MANIFEST);
    let index =
        format!(r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[{entry}]}}"#, media_type::OCI_INDEX);
    for by_tag in [false, true] {
        let fake = Fake::start().await;
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        assert!(patiently(repository.referrers(&subject)).await.unwrap().is_empty());
        let body = index.clone();
        if by_tag {
            let tag = subject.as_str().replace(':', "-");
            fake.put_manifest("a", &tag, media_type::OCI_INDEX, body.into());
        } else {
            fake.rule(move |seen, _| {
                seen.path.contains("/referrers/").then(|| Reply::new(200).body(body.clone()))
            });
        }
        assert_eq!(patiently(repository.referrers(&subject)).await.unwrap().len(), 1, "{by_tag}");
    }
}
