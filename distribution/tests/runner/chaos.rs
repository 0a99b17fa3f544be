//! Whatever goes wrong on the way, in whatever order: an image arrives whole, and nothing else ever does.

use std::collections::HashMap;
use std::sync::Arc;

use http::Method;
use proptest::prelude::*;

use crate::fake::{Fake, Piece, Reply, Seen, blob};
use crate::setup::*;

/// What happens to a request.
#[derive(Debug, Clone, Copy)]
enum Fault {
    None,
    Status(u16),
    /// The body breaks off after this share of it, in 256ths.
    Cut(u8),
    /// All is sent although a part was asked for.
    NoRange,
    /// The connection ends before a response.
    Gone,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        3 => Just(Fault::None),
        2 => prop::sample::select(vec![408, 429, 500, 502, 503, 504]).prop_map(Fault::Status),
        4 => any::<u8>().prop_map(Fault::Cut),
        1 => Just(Fault::NoRange),
        1 => Just(Fault::Gone),
    ]
}

fn reply(fault: Fault, seen: &Seen, image: &Image) -> Option<Reply> {
    let served = image.blobs().into_iter().find(|bytes| seen.path.ends_with(digest_of(bytes).as_str()));
    let whole = |reply: Reply| match reply.body {
        Piece::Whole(bytes) => bytes,
        _ => unreachable!("the usual answer is whole"),
    };
    match (fault, served) {
        (Fault::Status(status), _) => Some(Reply::new(status)),
        (Fault::Gone, _) => Some(Reply::new(200).piece(Piece::Gone)),
        (Fault::Cut(share), Some(served)) if seen.method == Method::GET && seen.path.contains("/blobs/") => {
            let usual = blob(seen, served);
            let mut headers = usual.headers.clone();
            let status = usual.status;
            let bytes = whole(usual);
            headers.push(("content-length".to_owned(), bytes.len().to_string()));
            let cut = bytes.slice(..bytes.len() * usize::from(share) / 256);
            Some(Reply { status, headers, body: Piece::Cut(cut) })
        }
        (Fault::NoRange, Some(served)) if seen.path.contains("/blobs/") => {
            Some(Reply::new(200).body(served.clone()))
        }
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_image_arrives(
        sizes in prop::collection::vec(1_usize..300_000, 1..4),
        faults in prop::collection::vec(fault(), 0..40),
        seed in any::<u32>(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let fake = Fake::start().await;
            let image = Arc::new(Image::new(u64::from(seed), &sizes));
            image.serve(&fake, "a", "v1");
            let served = image.clone();
            let (mut faults, mut counts) = (faults.into_iter(), HashMap::<String, u32>::new());
            fake.rule(move |seen, _| {
                // No more on one thing than there are attempts.
                let count = counts.entry(seen.path.clone()).or_default();
                *count += 1;
                if *count > RETRY.attempts - 1 {
                    return None;
                }
                reply(faults.next()?, seen, &served)
            });
            let (_hosts, options) =
                with_hosts(options(), &fake.name(), &format!("server = \"http://{}\"", fake.name()));
            let (_root, store) = store();
            let repository = repository(options, &format!("{}/a:v1", fake.name())).await;
            let pulled = pull_with(&repository, &store, &pull_options(), Arc::default()).await;
            assert_eq!(pulled.unwrap().root.digest, image.digest());
            image.assert_in(&store);
            for info in store.walk().unwrap() {
                assert_eq!(digest_of(&read(&store, &info.digest)), info.digest);
            }
        });
    }
}
