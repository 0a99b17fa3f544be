//! The content store of a daemon, through its Content service.

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Result;
use davit_content_store::testsuite::{ContentStore, ContentWriter, Failure};
use davit_content_store::{Info, Status};
use davit_integration::Daemon;
use davit_integration::client::{Conn, InNamespace, connect};
use davit_model::{Digest, ErrorCode};
use davit_proto::containerd::services::content::v1 as wire;
use davit_proto::containerd::services::content::v1::WriteAction;
use davit_proto::containerd::services::content::v1::content_client::ContentClient;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use davit_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::service::interceptor::InterceptedService;

/// A daemon of its own, and a client whose lease keeps what nothing refers to.
pub(super) struct Remote {
    client: ContentClient<Conn>,
    leases: LeasesClient<Conn>,
    runtime: Arc<Runtime>,
    /// The last fields: the client goes before the daemon does, and that before its plugin.
    _daemon: Daemon,
    _plugin: Option<Daemon>,
}

impl Remote {
    pub(super) fn start() -> Result<Remote> {
        Remote::connect(Daemon::start()?, None)
    }

    /// With the store of a second daemon in place of its own.
    pub(super) fn start_on_proxy() -> Result<Remote> {
        let plugin = Daemon::start()?;
        let address = plugin.address();
        let config = format!("[proxy_plugins.store]\ntype = \"content\"\naddress = {address:?}\n");
        Remote::connect(Daemon::start_with(&[], &config)?, Some(plugin))
    }

    fn connect(daemon: Daemon, plugin: Option<Daemon>) -> Result<Remote> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (client, leases) = runtime.block_on(async {
            let channel = connect(&daemon.address()).await?;
            let plain = InNamespace::new(&daemon.namespace(), None)?;
            let mut leases = LeasesClient::new(InterceptedService::new(channel.clone(), plain));
            leases.create(CreateRequest { id: "suite".into(), ..Default::default() }).await?;
            let leased = InNamespace::new(&daemon.namespace(), Some("suite"))?;
            anyhow::Ok((ContentClient::new(InterceptedService::new(channel, leased)), leases))
        })?;
        Ok(Remote { client, leases, runtime: Arc::new(runtime), _daemon: daemon, _plugin: plugin })
    }
}

fn failure(status: tonic::Status) -> Failure {
    let code = ErrorCode::from_number(status.code() as i32);
    Failure { code, text: status.message().to_owned() }
}

fn time(time: Option<prost_types::Timestamp>) -> SystemTime {
    let time = time.expect("the daemon sends the time");
    SystemTime::try_from(time).expect("the time is one that this host can hold")
}

fn info(info: wire::Info) -> Info {
    Info {
        digest: info.digest.parse().expect("the daemon sends digests"),
        size: info.size as u64,
        created_at: time(info.created_at),
        updated_at: time(info.updated_at),
    }
}

fn status(status: wire::Status) -> Status {
    Status {
        reference: status.r#ref,
        offset: status.offset as u64,
        total: status.total as u64,
        expected: status.expected.parse().ok(),
        started_at: time(status.started_at),
        updated_at: time(status.updated_at),
    }
}

/// What all messages of a stream hold.
async fn all<T>(mut stream: Streaming<T>) -> Result<Vec<T>, tonic::Status> {
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

impl ContentStore for Remote {
    fn info(&self, digest: &Digest) -> Result<Info, Failure> {
        let request = wire::InfoRequest { digest: digest.to_string() };
        let answer = self.runtime.block_on(self.client.clone().info(request)).map_err(failure)?;
        Ok(info(answer.into_inner().info.expect("an answer has an info")))
    }

    fn read(&self, digest: &Digest, offset: u64, limit: usize) -> Result<Vec<u8>, Failure> {
        let request = wire::ReadContentRequest {
            digest: digest.to_string(),
            offset: offset as i64,
            size: limit as i64,
        };
        let mut client = self.client.clone();
        let read = async { all(client.read(request).await?.into_inner()).await };
        let pieces = self.runtime.block_on(read).map_err(failure)?;
        Ok(pieces.into_iter().flat_map(|piece| piece.data).collect())
    }

    fn writer(
        &self,
        reference: &str,
        total: u64,
        expected: Option<&Digest>,
    ) -> Result<Box<dyn ContentWriter>, Failure> {
        Ok(Box::new(Writer::open(self, reference, total, expected)?))
    }

    fn status(&self, reference: &str) -> Result<Status, Failure> {
        let request = wire::StatusRequest { r#ref: reference.into() };
        let answer = self.runtime.block_on(self.client.clone().status(request)).map_err(failure)?;
        Ok(status(answer.into_inner().status.expect("an answer has a status")))
    }

    fn statuses(&self) -> Result<Vec<Status>, Failure> {
        let request = wire::ListStatusesRequest::default();
        let answer = self.runtime.block_on(self.client.clone().list_statuses(request)).map_err(failure)?;
        Ok(answer.into_inner().statuses.into_iter().map(status).collect())
    }

    fn abort(&self, reference: &str) -> Result<(), Failure> {
        let request = wire::AbortRequest { r#ref: reference.into() };
        self.runtime.block_on(self.client.clone().abort(request)).map_err(failure)?;
        Ok(())
    }

    fn delete(&self, digest: &Digest) -> Result<(), Failure> {
        let request = wire::DeleteContentRequest { digest: digest.to_string() };
        self.runtime.block_on(self.client.clone().delete(request)).map_err(failure)?;
        // The daemon forgets a blob at once and deletes it later; until then who announces its digest is told that all
        // of it is there already, as if another namespace had it. A lease that is deleted in step with the collector
        // waits for that.
        let mut leases = self.leases.clone();
        let collect = async {
            leases.create(CreateRequest { id: "collect".into(), ..Default::default() }).await?;
            leases.delete(DeleteRequest { id: "collect".into(), sync: true }).await
        };
        self.runtime.block_on(collect).map_err(failure)?;
        Ok(())
    }

    fn walk(&self) -> Result<Vec<Info>, Failure> {
        let mut client = self.client.clone();
        let list = async { all(client.list(wire::ListContentRequest::default()).await?.into_inner()).await };
        let pages = self.runtime.block_on(list).map_err(failure)?;
        Ok(pages.into_iter().flat_map(|page| page.info).map(info).collect())
    }
}

/// A write session, as containerd's Go client holds it: it asks for the state first, keeps the offset itself and names
/// it in every message.
struct Writer {
    client: ContentClient<Conn>,
    runtime: Arc<Runtime>,
    reference: String,
    total: u64,
    expected: Option<Digest>,
    offset: u64,
    /// None once the client has closed its side.
    requests: Option<mpsc::Sender<wire::WriteContentRequest>>,
    answers: Streaming<wire::WriteContentResponse>,
}

impl Writer {
    fn open(
        store: &Remote,
        reference: &str,
        total: u64,
        expected: Option<&Digest>,
    ) -> Result<Writer, Failure> {
        let (requests, receiver) = mpsc::channel(1);
        let mut client = store.client.clone();
        let session = client.write(ReceiverStream::new(receiver));
        let answers = store.runtime.block_on(session).map_err(failure)?.into_inner();
        let mut writer = Writer {
            client: store.client.clone(),
            runtime: store.runtime.clone(),
            reference: reference.to_owned(),
            total,
            expected: expected.cloned(),
            offset: 0,
            requests: Some(requests),
            answers,
        };
        writer.offset = writer.stat()?.offset as u64;
        Ok(writer)
    }

    fn request(&self, action: WriteAction) -> wire::WriteContentRequest {
        wire::WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            total: self.total as i64,
            expected: self.expected.as_ref().map(ToString::to_string).unwrap_or_default(),
            offset: self.offset as i64,
            ..Default::default()
        }
    }

    fn call(&mut self, request: wire::WriteContentRequest) -> Result<wire::WriteContentResponse, Failure> {
        let requests = self.requests.clone().expect("only the end of the writer closes its side");
        let answers = &mut self.answers;
        let answer = self.runtime.block_on(async {
            // Into a session that has ended nothing can be sent; its error is what comes out.
            let _ = requests.send(request).await;
            answers.message().await
        });
        answer
            .map_err(failure)?
            .ok_or_else(|| Failure { code: ErrorCode::Unknown, text: "the session has ended".into() })
    }

    fn stat(&mut self) -> Result<wire::WriteContentResponse, Failure> {
        self.call(self.request(WriteAction::Stat))
    }
}

impl ContentWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let mut request = self.request(WriteAction::Write);
        request.data = bytes.to_vec().into();
        self.offset = self.call(request)?.offset as u64;
        Ok(())
    }

    fn truncate(&mut self) -> Result<(), Failure> {
        // A write at 0 begins anew: the only truncation that the wire has.
        self.offset = 0;
        self.write(b"")
    }

    fn status(&mut self) -> Result<Status, Failure> {
        let answer = self.stat()?;
        // A session knows the total that its own messages told; what an earlier one told is in the ingest's status.
        let mut total = answer.total as u64;
        if total == 0 {
            let request = wire::StatusRequest { r#ref: self.reference.clone() };
            let answer = self.runtime.block_on(self.client.status(request)).map_err(failure)?;
            total = answer.into_inner().status.map_or(0, |status| status.total as u64);
        }
        Ok(Status {
            reference: self.reference.clone(),
            offset: answer.offset as u64,
            total,
            expected: self.expected.clone(),
            started_at: time(answer.started_at),
            updated_at: time(answer.updated_at),
        })
    }

    fn digest(&mut self) -> Result<Digest, Failure> {
        Ok(self.stat()?.digest.parse().expect("the daemon sends digests"))
    }

    fn commit(mut self: Box<Self>, size: u64, expected: Option<&Digest>) -> Result<Digest, Failure> {
        let mut request = self.request(WriteAction::Commit);
        if size > 0 {
            request.total = size as i64;
        }
        if let Some(expected) = expected {
            request.expected = expected.to_string();
        }
        Ok(self.call(request)?.digest.parse().expect("the daemon sends digests"))
    }
}

impl Drop for Writer {
    /// Closes its side and waits until the daemon has closed the other: by then the reference is free.
    fn drop(&mut self) {
        self.requests = None;
        let answers = &mut self.answers;
        self.runtime.block_on(async { while let Ok(Some(_)) = answers.message().await {} });
    }
}
