//! What a client hears of a transfer, on the stream that it has opened for it.

use std::sync::Arc;
use std::time::Duration;

use davit_proto::any;
use davit_proto::containerd::types::Descriptor;
use davit_proto::containerd::types::transfer::Progress;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::grpc::convert::any_from_wire;
use crate::streams::Stream;
use crate::transfer::{Listener, News};

/// How much may wait for a client that does not read; what comes then is not told.
const QUEUE: usize = 1024;
/// How long the end of a transfer waits for a client to read what it was told.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends news to a stream, which it closes in the end.
pub(super) struct Reporter {
    running: Option<Running>,
}

struct Running {
    /// `None` is the end.
    sender: mpsc::Sender<Option<News>>,
    task: JoinHandle<()>,
    stream: Stream,
}

impl Reporter {
    /// Reports to `stream`, or to nobody.
    pub(super) fn new(stream: Option<Stream>) -> Reporter {
        let running = stream.map(|stream| {
            let (sender, news) = mpsc::channel(QUEUE);
            let task = tokio::spawn(report(stream.clone(), news));
            Running { sender, task, stream }
        });
        Reporter { running }
    }

    /// Whom a transfer tells.
    pub(super) fn listener(&self) -> Listener {
        match &self.running {
            None => Arc::new(|_| ()),
            Some(running) => {
                let sender = running.sender.clone();
                Arc::new(move |news| drop(sender.try_send(Some(news))))
            }
        }
    }

    /// Waits until the client has been told everything.
    pub(super) async fn finish(mut self) {
        if let Some(running) = &mut self.running {
            let told = async {
                let _ = running.sender.send(None).await;
                let _ = (&mut running.task).await;
            };
            let _ = timeout(PATIENCE, told).await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        self.stream.close();
    }
}

async fn report(stream: Stream, mut news: mpsc::Receiver<Option<News>>) {
    while let Some(Some(news)) = news.recv().await {
        if stream.send(any_from_wire(any::pack(&to_wire(news)))).await.is_err() {
            return;
        }
    }
}

fn to_wire(news: News) -> Progress {
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    Progress {
        event: news.event,
        name: news.name,
        parents: news.parents,
        progress: number(news.progress),
        total: number(news.total),
        desc: news.descriptor.map(|descriptor| Descriptor {
            media_type: descriptor.media_type,
            digest: descriptor.digest.to_string(),
            size: number(descriptor.size),
            annotations: descriptor.annotations,
        }),
    }
}
