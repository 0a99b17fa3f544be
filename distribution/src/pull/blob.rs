//! One blob of an image: from the registry into the store, once.

use std::time::Duration;

use davit_model::Labels;
use davit_oci::image::Descriptor;

use super::Job;
use crate::error::Error;
use crate::labels;
use crate::progress::{Pace, State};
use crate::retry::Backoff;
use crate::store::{Opened, SinkError, SinkWriter};

/// The first and the longest pause between two looks at what another pull fetches.
const LOOKS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Fetches a configuration or a layer, unless it is there.
pub(super) async fn fetch(
    job: &Job,
    descriptor: &Descriptor,
    parent: Option<&str>,
    is_layer: bool,
) -> Result<(), Error> {
    job.tell(State::Waiting, descriptor, parent, 0);
    let place = if is_layer { job.layers.acquire().await.ok() } else { None };
    let Some(writer) = open(job, descriptor).await? else {
        job.tell(State::Exists, descriptor, parent, descriptor.size);
        return Ok(());
    };
    job.tell(State::Downloading, descriptor, parent, writer.offset());
    let pace = Pace::new();
    let told = |offset| {
        if pace.is_due() {
            job.tell(State::Downloading, descriptor, parent, offset);
        }
    };
    let mut backoff = Backoff::new(job.retry);
    let writer = job.repository.fetch(descriptor, writer, &mut backoff, &told).await?;
    commit(writer, descriptor, job.source_labels()).await?;
    drop(place);
    job.tell(State::Done, descriptor, parent, descriptor.size);
    Ok(())
}

/// Opens a writer, waiting while somebody else has one; none if the content is there.
pub(super) async fn open(job: &Job, descriptor: &Descriptor) -> Result<Option<Box<dyn SinkWriter>>, Error> {
    let mut pause = LOOKS.0;
    loop {
        let (sink, wanted) = (job.sink.clone(), descriptor.clone());
        let opened = blocking("opening a writer", "open", move || match sink.size(&wanted.digest)? {
            Some(size) => Ok((size, Opened::Exists)),
            None => {
                let reference = labels::ingest_reference(&wanted);
                Ok((wanted.size, sink.writer(&reference, wanted.size, &wanted.digest)?))
            }
        });
        match opened.await? {
            (_, Opened::Writer(writer)) => return Ok(Some(writer)),
            (size, Opened::Exists) if size != descriptor.size => {
                let digest = descriptor.digest.clone();
                let reason = "it says another size than that of the content, which is in the store";
                return Err(Error::Descriptor { digest, reason });
            }
            (_, Opened::Exists) => return Ok(None),
            (_, Opened::Busy) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOKS.1);
    }
}

/// Makes what was written content.
pub(super) async fn commit(
    writer: Box<dyn SinkWriter>,
    descriptor: &Descriptor,
    labels: Labels,
) -> Result<(), Error> {
    let descriptor = descriptor.clone();
    blocking("committing", "commit", move || writer.commit(descriptor.size, &descriptor.digest, &labels))
        .await
}

/// Runs a call of the store on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
    task: &'static str,
    action: &'static str,
    call: impl FnOnce() -> Result<T, SinkError> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(call)
        .await
        .map_err(|_| Error::Task { task })?
        .map_err(|source| Error::Store { action, source })
}
