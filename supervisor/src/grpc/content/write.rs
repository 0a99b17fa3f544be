//! Writing a blob: one stream is one session with one ingest, which is locked until the stream ends.

use davit_model::{Digest, ErrorCode};
use davit_proto::containerd::services::content::v1::{
    WriteAction, WriteContentRequest, WriteContentResponse,
};
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{bytes, digest};
use crate::grpc::status::{from, invalid, status};
use crate::metadata::{Content, NsWriter};

type Answer = Result<WriteContentResponse, Status>;

/// Serves a session until a commit, an error, or the end of the client's messages.
///
/// The last answer is sent once more at the end, as containerd does: its client reads it after closing its side.
pub(super) fn session(
    content: Content,
    requests: Streaming<WriteContentRequest>,
) -> BoxStream<'static, Answer> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let last = match serve(&content, requests, &sender).await {
            Ok(None) => return,
            Ok(Some(last)) => Ok(last),
            Err(error) => Err(error),
        };
        // A client that is gone needs no answer.
        let _ = sender.send(last).await;
    });
    ReceiverStream::new(receiver).boxed()
}

/// Gives the last answer, or nothing when the client went away before the first message.
async fn serve(
    content: &Content,
    mut requests: Streaming<WriteContentRequest>,
    answers: &mpsc::Sender<Answer>,
) -> Result<Option<WriteContentResponse>, Status> {
    let Some(mut request) = requests.message().await? else { return Ok(None) };
    if request.r#ref.is_empty() {
        return Err(status(ErrorCode::InvalidArgument, "first message must have a reference"));
    }
    let reference = request.r#ref.clone();
    let mut session = Session { total: size(request.total), expected: expected(&request)?, previous: None };
    let writer = content.writer(&reference, session.total, session.expected.as_ref()).await;
    let mut writer = writer.map_err(from)?;
    loop {
        if let Some(digest) = expected(&request)? {
            if content.info(&digest).is_ok() {
                // The ingest is of no use any more; that it may be gone already is no error.
                drop(writer);
                let _ = content.abort(&reference).await;
                let text = format!("blob with expected digest {digest} exists");
                return Err(status(ErrorCode::AlreadyExists, &text));
            }
            session.expected = Some(digest);
        }
        if request.total > 0 {
            session.total = size(request.total);
        }
        let commit = request.action == WriteAction::Commit as i32;
        // The writer blocks: it works in the lane of the content and comes back.
        let step = session.clone();
        let work = move || {
            let answer = step.carry_out(&mut writer, request);
            (writer, answer)
        };
        let (back, answer) =
            content.lane().run(work).await.map_err(|error| {
                status(ErrorCode::Internal, &format!("the write was interrupted: {error}"))
            })?;
        writer = back;
        let answer = answer?;
        session.previous = Some(answer.clone());
        if answers.send(Ok(answer.clone())).await.is_err() {
            return Ok(None);
        }
        if commit {
            return Ok(Some(answer));
        }
        match requests.message().await? {
            Some(next) => request = next,
            None => return Ok(Some(answer)),
        }
    }
}

/// What the messages have declared so far; the last one wins.
#[derive(Clone)]
struct Session {
    total: u64,
    expected: Option<Digest>,
    /// The answer before: what a STAT says of times and total is repeated in every later answer, as containerd does.
    previous: Option<WriteContentResponse>,
}

impl Session {
    fn carry_out(&self, writer: &mut NsWriter, request: WriteContentRequest) -> Answer {
        let before = writer.status();
        let mut answer = WriteContentResponse {
            action: request.action,
            offset: bytes(before.offset),
            ..self.previous.clone().unwrap_or_default()
        };
        match WriteAction::try_from(request.action) {
            Ok(WriteAction::Stat) => {
                answer.started_at = Some(before.started_at.into());
                answer.updated_at = Some(before.updated_at.into());
                answer.total = bytes(self.total);
            }
            Ok(action @ (WriteAction::Write | WriteAction::Commit)) => {
                // A negative offset stands for the current one.
                let offset = request.offset;
                if offset > 0 && offset != answer.offset {
                    let text = format!("write @{offset} must occur at current offset {}", before.offset);
                    return Err(status(ErrorCode::OutOfRange, &text));
                }
                if offset == 0 && before.offset > 0 {
                    writer.truncate(0).map_err(from)?;
                    answer.offset = 0;
                }
                writer.write(&request.data).map_err(from)?;
                answer.offset += bytes(request.data.len() as u64);
                if action == WriteAction::Commit {
                    writer.commit(self.total, self.expected.as_ref(), request.labels).map_err(from)?;
                }
            }
            Err(_) => return Err(invalid(format!("unknown action {}", request.action))),
        }
        answer.digest = writer.digest().to_string();
        Ok(answer)
    }
}

/// The size that a client has declared; 0, for none, where it is negative.
fn size(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0)
}

fn expected(request: &WriteContentRequest) -> Result<Option<Digest>, Status> {
    if request.expected.is_empty() { Ok(None) } else { digest(&request.expected).map(Some) }
}
