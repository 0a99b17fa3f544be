//! A pull: the content first, unpacked as it comes, then its labels, and the image's record last.

use std::sync::Arc;

use davit_distribution as distribution;
use davit_distribution::{Platforms, PullOptions, Registry, labels};
use davit_model::Labels;
use davit_oci::image::Descriptor;
use davit_oci::reference::Reference;
use futures::FutureExt;
use tokio::sync::mpsc;

use super::store::NsSink;
use super::unpack::Unpacker;
use super::{Error, Known, Listener, Local, News, Place, Remote, Telling, Transfers, names, set_labels};
use crate::metadata::{self, Content, Scope};

/// News of layers that wait to be unpacked.
const QUEUE: usize = 64;

/// Pulls into a scope that has a lease, and gives what is left to do when all is there.
#[tracing::instrument(name = "pull", level = "debug", skip_all, fields(reference = %from))]
pub(super) async fn pull(
    transfers: &Transfers,
    scope: &Scope,
    place: &Place,
    from: &Remote,
    to: &Local,
    listener: &Listener,
) -> Result<Known, Error> {
    listener(News { event: format!("Resolving from {from}"), ..News::default() });
    let repository = Registry::new(from.options.clone()).repository(&from.reference).await?;
    let root = repository.resolve().await.map_err(|source| Error::Resolve { source })?;
    listener(News { event: format!("Pulling from {from}"), ..News::default() });
    listener(News {
        event: "fetching image content".to_owned(),
        name: from.text.clone(),
        descriptor: Some(root.clone()),
        ..News::default()
    });
    let content = transfers.metadata.content(scope);
    let leases = transfers.metadata.leases(scope);
    let lease = scope.lease().unwrap_or_default();
    let sink = Arc::new(NsSink::new(content.clone(), leases, lease, place.clone()));
    let platforms =
        if to.platforms.is_empty() { Platforms::All } else { Platforms::Each(to.platforms.clone()) };
    let observer = Arc::new(Telling { listener: listener.clone(), root: from.text.clone() });

    let unpacker = Unpacker::new(transfers, scope, &to.unpacks, Some(&from.text), listener)?;
    let (all_metadata, ask) = (to.all_metadata, unpacker.knows_layers());
    let manifest_limit = to.manifest_limit;
    let options = PullOptions { platforms, all_metadata, manifest_limit, ask, ..PullOptions::default() };
    let (news, ready) = mpsc::channel(QUEUE);
    let news = (!unpacker.is_idle()).then_some(news);
    let fetching =
        async { Ok(distribution::pull(&repository, &root, sink, &options, observer, news).await?) };
    // Whichever fails first ends the other; what an unfinished unpacking leaves belongs to the lease.
    let (contents, ()) = tokio::try_join!(fetching, unpacker.run(ready))?;

    let names = names::required(to, root.digest.as_str())?;
    let (transfers, scope) = (transfers.clone(), scope.clone());
    let (from, listener) = (from.clone(), listener.clone());
    let known = async move {
        for (descriptor, labels) in &contents {
            label(&content, &from.reference, descriptor, labels).await?;
        }
        let names = transfers.save(&scope, names, &root).await?;
        // Of what has no name `ctr` shows the last before something named: so the names come last.
        listener(News { event: format!("Completed pull from {from}"), ..News::default() });
        for name in names {
            let descriptor = Some(root.clone());
            listener(News { event: "saved".to_owned(), name, descriptor, ..News::default() });
        }
        Ok(())
    };
    Ok(known.boxed())
}

/// Gives content the labels that it would have if it had been fetched just now.
async fn label(
    content: &Content,
    reference: &Reference,
    descriptor: &Descriptor,
    wanted: &Labels,
) -> Result<(), Error> {
    let found = match content.info(&descriptor.digest) {
        Ok(info) => info.labels,
        // A layer that a snapshotter of another process has by itself need not be here.
        Err(metadata::Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut wanted = wanted.clone();
    let source = labels::source_key(reference);
    if let Some(value) = labels::with_source(found.get(&source).map(String::as_str), reference) {
        wanted.insert(source, value);
    }
    set_labels(content, &descriptor.digest, wanted).await
}
