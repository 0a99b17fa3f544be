//! Connections that break, and stores that have a part already.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use davit_distribution::{Error, PullOptions, Retry};
use http::Method;

use crate::fake::{Fake, Piece, Reply, Seen, blob};
use crate::setup::*;

const SIZE: usize = 400_000;

fn is_layer(seen: &Seen, image: &Image) -> bool {
    seen.method == Method::GET && seen.path.ends_with(digest_of(&image.layers[0]).as_str())
}

/// A registry with one image of one layer, of which each response breaks off after so many bytes.
async fn breaking(image: &Arc<Image>, after: usize, times: usize) -> Fake {
    let fake = Fake::start().await;
    image.serve(&fake, "a", "v1");
    let (image, mut left) = (image.clone(), times);
    fake.rule(move |seen, _| {
        if !is_layer(seen, &image) || left == 0 {
            return None;
        }
        left -= 1;
        let reply = blob(seen, &image.layers[0]);
        let Piece::Whole(bytes) = reply.body else { return None };
        let cut = bytes.slice(..after.min(bytes.len()));
        let mut reply = Reply { body: Piece::Cut(cut), ..reply };
        reply.headers.push(("content-length".to_owned(), bytes.len().to_string()));
        Some(reply)
    });
    fake
}

#[tokio::test]
async fn what_broke_off_goes_on_where_it_was() {
    let image = Arc::new(Image::new(1, &[SIZE]));
    let fake = breaking(&image, 100_000, 2).await;
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    let ranges: Vec<String> = fake
        .seen()
        .iter()
        .filter(|seen| is_layer(seen, &image))
        .map(|seen| seen.header("range").to_owned())
        .collect();
    assert_eq!(ranges, ["", "bytes=100000-399999", "bytes=200000-399999"]);
}

#[tokio::test]
async fn another_process_goes_on_where_the_first_was() {
    let image = Arc::new(Image::new(2, &[SIZE]));
    let fake = breaking(&image, 150_000, 1).await;
    let (root, first) = store();
    let name = format!("{}/a:v1", fake.name());
    let once = PullOptions { retry: Retry { attempts: 1, ..RETRY }, ..pull_options() };
    let repository = repository(options(), &name).await;
    let error = pull_with(&repository, &first, &once, Arc::new(News::default())).await.unwrap_err();
    assert!(matches!(error, Error::Transport { .. }), "{error:?}");
    assert_eq!(first.statuses().unwrap()[0].offset, 150_000);
    drop(first);
    let second = Arc::new(davit_content_store::Store::open(root.path()).unwrap());
    pull_from(&repository, &second).await.unwrap();
    image.assert_in(&second);
    let last = fake.seen().into_iter().rfind(|seen| is_layer(seen, &image)).unwrap();
    assert_eq!(last.header("range"), "bytes=150000-399999");
}

#[tokio::test]
async fn a_dropped_pull_leaves_what_it_has_and_no_lock() {
    let image = Arc::new(Image::new(3, &[SIZE]));
    let fake = Fake::start().await;
    image.serve(&fake, "a", "v1");
    let (layers, mut first) = (image.clone(), true);
    let reached = Arc::new(tokio::sync::Notify::new());
    let notify = reached.clone();
    fake.rule(move |seen, _| {
        if !is_layer(seen, &layers) || !std::mem::take(&mut first) {
            return None;
        }
        notify.notify_one();
        Some(Reply::new(200).header("content-length", SIZE).piece(Piece::Silence))
    });
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let pulling = tokio::spawn({
        let (repository, store) = (repository.clone(), store.clone());
        async move { pull_from(&repository, &store).await }
    });
    patiently(reached.notified()).await;
    pulling.abort();
    assert!(pulling.await.unwrap_err().is_cancelled());
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
}

#[tokio::test]
async fn a_host_without_ranges_is_read_from_the_start() {
    // It answers with all, or refuses the range first.
    for refuses in [false, true] {
        let image = Arc::new(Image::new(4, &[SIZE]));
        let fake = Fake::start().await;
        image.serve(&fake, "a", "v1");
        let (served, mut broken) = (image.clone(), false);
        fake.rule(move |seen, _| {
            if !is_layer(seen, &served) {
                return None;
            }
            let layer = &served.layers[0];
            if !std::mem::replace(&mut broken, true) {
                let reply = Reply::new(200).header("content-length", SIZE);
                return Some(reply.piece(Piece::Cut(layer.slice(..123_456))));
            }
            if refuses && !seen.header("range").is_empty() {
                return Some(Reply::new(416));
            }
            Some(Reply::new(200).body(layer.clone()))
        });
        let (_root, store) = store();
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        pull_from(&repository, &store).await.unwrap();
        image.assert_in(&store);
    }
}

#[tokio::test]
async fn a_wrong_part_is_not_taken() {
    for wrong in
        ["bytes 5-399999/400000", "bytes 100000-399999/999999", "nonsense", "bytes 100000-399998/400000"]
    {
        let image = Arc::new(Image::new(5, &[SIZE]));
        let fake = Fake::start().await;
        image.serve(&fake, "a", "v1");
        let served = image.clone();
        fake.rule(move |seen, _| {
            if !is_layer(seen, &served) {
                return None;
            }
            let layer = &served.layers[0];
            if seen.header("range").is_empty() {
                let reply = Reply::new(200).header("content-length", SIZE);
                return Some(reply.piece(Piece::Cut(layer.slice(..100_000))));
            }
            Some(Reply::new(206).header("content-range", wrong).body(layer.slice(100_000..)))
        });
        let (_root, store) = store();
        let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
        assert!(pull_from(&repository, &store).await.is_err(), "{wrong}");
        assert!(store.info(&digest_of(&image.layers[0])).is_err());
    }
}

#[tokio::test]
async fn a_damaged_ingest_is_begun_anew() {
    let image = Arc::new(Image::new(6, &[SIZE]));
    let fake = Fake::start().await;
    image.serve(&fake, "a", "v1");
    let (_root, store) = store();
    let digest = digest_of(&image.layers[0]);
    let mut writer = store.writer(&format!("layer-{digest}"), SIZE as u64, None).unwrap();
    writer.write(&[0; 1000]).unwrap();
    drop(writer);
    // And one that was never committed although it is complete.
    let config = digest_of(&image.config);
    let mut writer = store.writer(&format!("config-{config}"), image.config.len() as u64, None).unwrap();
    writer.write(&image.config).unwrap();
    drop(writer);
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    assert_eq!(fake.count(Method::GET, config.as_str()), 0);
}

#[tokio::test]
async fn busy_registries_are_asked_again() {
    let image = Image::new(7, &[1000]);
    let fake = Fake::start().await;
    image.serve(&fake, "a", "v1");
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    // Each request is refused three times, in all the ways there are.
    let mut refused: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
    fake.rule(move |seen, _| {
        let times = refused.entry(seen.line()).or_default();
        *times += 1;
        if *times > 3 {
            return None;
        }
        let status = [429, 503, 408, 500, 502, 504][counted.fetch_add(1, Ordering::Relaxed) % 6];
        Some(Reply::new(status).header("retry-after", if status == 429 { "1" } else { "0" }))
    });
    let (_root, store) = store();
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    assert!(count.load(Ordering::Relaxed) >= 12);
}

#[tokio::test]
async fn who_asks_for_too_long_a_pause_is_not_waited_for() {
    let fake = Fake::start().await;
    fake.rule(|_, _| {
        Some(
            Reply::new(429).header("retry-after", "86400").body(r#"{"errors":[{"code":"TOOMANYREQUESTS"}]}"#),
        )
    });
    let repository = repository(options(), &format!("{}/a:v1", fake.name())).await;
    let error = patiently(repository.resolve()).await.unwrap_err();
    assert!(text(&error).contains("429"), "{error}");
    assert_eq!(fake.seen().len(), 1);
}
