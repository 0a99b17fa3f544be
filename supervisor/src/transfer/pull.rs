//! A pull: the content first, unpacked as it comes, then its labels, and the image's record last.

use std::sync::Arc;

use davit_distribution as distribution;
use davit_distribution::{Observer, Platforms, Progress, PullOptions, Registry, State, labels};
use davit_model::Labels;
use davit_oci::image::Descriptor;
use davit_oci::reference::Reference;
use tokio::sync::mpsc;

use super::store::NsSink;
use super::unpack::Unpacker;
use super::{Error, Listener, Local, News, Remote, Telling, Transfers};
use crate::metadata::{self, Content, Scope};

/// News of layers that wait to be unpacked.
const QUEUE: usize = 64;

/// Pulls into a scope that has a lease.
pub(super) async fn pull(
    transfers: &Transfers,
    scope: &Scope,
    from: &Remote,
    to: &Local,
    listener: &Listener,
) -> Result<(), Error> {
    listener(News { event: format!("Resolving from {from}"), ..News::default() });
    let content = transfers.metadata.content(scope);
    let leases = transfers.metadata.leases(scope);
    let sink = Arc::new(NsSink::new(content.clone(), leases, scope.lease().unwrap_or_default()));
    let platforms =
        if to.platforms.is_empty() { Platforms::All } else { Platforms::Each(to.platforms.clone()) };
    let options = PullOptions { platforms, all_metadata: to.all_metadata, ..PullOptions::default() };
    let telling = Telling { listener: listener.clone(), root: from.text.clone() };
    let observer = Arc::new(Resolving { telling, from: from.to_string() });

    let unpacker = Unpacker::new(transfers, scope, &to.unpacks, listener)?;
    let (news, ready) = mpsc::channel(QUEUE);
    let news = (!unpacker.is_idle()).then_some(news);
    let repository = Registry::new(from.options.clone()).repository(&from.reference).await?;
    let fetching = async { Ok(distribution::pull(&repository, sink, &options, observer, news).await?) };
    // Whichever fails first ends the other; what an unfinished unpacking leaves belongs to the lease.
    let (pulled, ()) = tokio::try_join!(fetching, unpacker.run(ready))?;

    for (descriptor, labels) in &pulled.contents {
        label(&content, &from.reference, descriptor, labels).await?;
    }
    let root = metadata::Descriptor {
        media_type: pulled.root.media_type.clone(),
        digest: pulled.root.digest.to_string(),
        size: i64::try_from(pulled.root.size).unwrap_or(i64::MAX),
        annotations: pulled.root.annotations.clone(),
    };
    for name in transfers.save(scope, to, &root).await? {
        let descriptor = Some(pulled.root.clone());
        listener(News { event: "saved".to_owned(), name, descriptor, ..News::default() });
    }
    listener(News { event: format!("Completed pull from {from}"), ..News::default() });
    Ok(())
}

/// Gives content the labels that it would have if it had been fetched just now.
async fn label(
    content: &Content,
    reference: &Reference,
    descriptor: &Descriptor,
    wanted: &Labels,
) -> Result<(), Error> {
    let found = content.info(&descriptor.digest)?.labels;
    let mut wanted = wanted.clone();
    let source = labels::source_key(reference);
    if let Some(value) = labels::with_source(found.get(&source).map(String::as_str), reference) {
        wanted.insert(source, value);
    }
    wanted.retain(|key, value| found.get(key) != Some(value));
    if wanted.is_empty() {
        return Ok(());
    }
    let paths: Vec<String> = wanted.keys().map(|key| format!("labels.{key}")).collect();
    content.update(&descriptor.digest, wanted, &paths).await?;
    Ok(())
}

/// Tells of the resolution in the words of a pull, and of the rest as [`Telling`] does.
struct Resolving {
    telling: Telling,
    from: String,
}

impl Observer for Resolving {
    fn progress(&self, progress: Progress) {
        if progress.state != State::Resolved {
            return self.telling.progress(progress);
        }
        let listener = &self.telling.listener;
        listener(News { event: format!("Pulling from {}", self.from), ..News::default() });
        listener(News {
            event: "fetching image content".to_owned(),
            name: self.telling.root.clone(),
            descriptor: progress.descriptor,
            ..News::default()
        });
    }
}
