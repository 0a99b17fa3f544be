//! The calls of the Content service.

use anyhow::Result;
use davit_proto::containerd::services::content::v1 as wire;
use davit_proto::containerd::services::content::v1::WriteAction;
use davit_proto::containerd::services::content::v1::content_client::ContentClient;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Conn, Reply, all, mask, misplaced};
use crate::model::call::{Action, Call, Message};
use crate::model::world::{digest_of, labels, text};

fn info(info: wire::Info) -> Value {
    json!({ "digest": info.digest, "size": info.size, "labels": info.labels })
}

fn status(status: wire::Status) -> Value {
    json!({ "ref": status.r#ref, "offset": status.offset, "total": status.total })
}

pub(super) async fn answer(mut client: ContentClient<Conn>, call: &Call) -> Reply {
    match call {
        Call::Info { digest } => {
            let answer = client.info(wire::InfoRequest { digest: digest.clone() }).await?.into_inner();
            Ok(info(answer.info.unwrap_or_default()))
        }
        Call::UpdateInfo(change) => {
            let (digest, labels) = (text(&change.record, "digest"), labels(&change.record));
            let request = wire::UpdateRequest {
                info: Some(wire::Info { digest, labels, ..wire::Info::default() }),
                update_mask: mask(&change.mask),
            };
            Ok(info(client.update(request).await?.into_inner().info.unwrap_or_default()))
        }
        Call::ListContent { filters } => {
            let request = wire::ListContentRequest { filters: filters.texts() };
            let pages = all(client.list(request).await?.into_inner()).await?;
            Ok(pages.into_iter().flat_map(|page| page.info).map(info).collect())
        }
        Call::DeleteContent { digest } => {
            client.delete(wire::DeleteContentRequest { digest: digest.clone() }).await?;
            Ok(Value::Null)
        }
        Call::Read { digest, offset, size } => {
            let request = wire::ReadContentRequest { digest: digest.clone(), offset: *offset, size: *size };
            let mut data = Vec::new();
            for piece in all(client.read(request).await?.into_inner()).await? {
                // The offsets count from 0, wherever the reading began.
                if piece.offset != data.len() as i64 {
                    return Ok(json!({ "offset": piece.offset, "after": data.len() }));
                }
                data.extend(piece.data);
            }
            Ok(json!({ "digest": digest_of(&data), "length": data.len() }))
        }
        Call::Status { reference } => {
            let answer = client.status(wire::StatusRequest { r#ref: reference.clone() }).await?.into_inner();
            Ok(status(answer.status.unwrap_or_default()))
        }
        Call::ListStatuses { filters } => {
            let request = wire::ListStatusesRequest { filters: filters.texts() };
            let mut statuses = client.list_statuses(request).await?.into_inner().statuses;
            // containerd has them in no order.
            statuses.sort_by(|one, other| one.r#ref.cmp(&other.r#ref));
            Ok(statuses.into_iter().map(status).collect())
        }
        Call::Abort { reference } => {
            client.abort(wire::AbortRequest { r#ref: reference.clone() }).await?;
            Ok(Value::Null)
        }
        Call::Write { reference, messages, second } => write(client, reference, messages, *second).await,
        _ => misplaced(call),
    }
}

fn request(reference: &str, message: &Message) -> wire::WriteContentRequest {
    let action = match message.action {
        Action::Stat => WriteAction::Stat,
        Action::Write => WriteAction::Write,
        Action::Commit => WriteAction::Commit,
    };
    wire::WriteContentRequest {
        action: action.into(),
        r#ref: reference.to_owned(),
        total: message.total,
        expected: message.expected.clone(),
        offset: message.offset,
        data: message.data.clone().into(),
        labels: message.labels.clone(),
    }
}

fn answer_document(answer: &wire::WriteContentResponse) -> Value {
    json!({
        "action": answer.action().as_str_name(),
        "offset": answer.offset,
        "digest": answer.digest,
        "total": answer.total,
    })
}

/// A session: each message is sent when the one before is answered. It is over when the daemon has closed its side, so that
/// the reference is free for the next call.
async fn write(client: ContentClient<Conn>, reference: &str, messages: &[Message], second: bool) -> Reply {
    let mut answers = Vec::new();
    match session(client, reference, messages, second, &mut answers).await {
        Err(status) if answers.is_empty() => Err(status),
        end => {
            let code = end.err().map(|status| format!("{:?}", status.code()));
            Ok(json!({ "answers": answers, "end": code }))
        }
    }
}

async fn open(
    mut client: ContentClient<Conn>,
    first: wire::WriteContentRequest,
) -> Result<(mpsc::Sender<wire::WriteContentRequest>, Streaming<wire::WriteContentResponse>), Status> {
    let (sender, receiver) = mpsc::channel(1);
    // The daemon may answer to a session only when it has its first message.
    let _ = sender.send(first).await;
    let answers = client.write(ReceiverStream::new(receiver)).await?.into_inner();
    Ok((sender, answers))
}

async fn session(
    client: ContentClient<Conn>,
    reference: &str,
    messages: &[Message],
    second: bool,
    answers: &mut Vec<Value>,
) -> Result<(), Status> {
    let Some((first, rest)) = messages.split_first() else { return Ok(()) };
    let (sender, mut stream) = open(client.clone(), request(reference, first)).await?;
    let mut rest = rest.iter();
    let mut sender = Some(sender);
    while let Some(answer) = stream.message().await? {
        answers.push(answer_document(&answer));
        if second && answers.len() == 1 {
            answers.push(second_writer(client.clone(), reference).await);
        }
        match (rest.next(), &sender) {
            (Some(message), Some(sender)) => {
                // Into a session that has ended nothing can be sent; its error is what comes out.
                let _ = sender.send(request(reference, message)).await;
            }
            _ => sender = None,
        }
    }
    Ok(())
}

/// What another session on the same reference meets.
async fn second_writer(client: ContentClient<Conn>, reference: &str) -> Value {
    let attempt = async {
        let (sender, mut stream) = open(client, request(reference, &Message::default())).await?;
        drop(sender);
        while stream.message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    match attempt.await {
        Ok(()) => json!({ "second": "open" }),
        Err(status) => json!({ "second": format!("{:?}", status.code()) }),
    }
}
