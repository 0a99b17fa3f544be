//! The ttrpc client and server against each other, and each against peers that misbehave.
#![allow(clippy::unwrap_used)] // helpers of tests, too, fail by panicking

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use davit_model::ErrorCode;
use davit_proto::containerd::ttrpc::{KeyValue, Request};
use davit_shim_protocol::client::{CallError, Client, Target};
use davit_shim_protocol::frame::{self, RpcError};
use davit_shim_protocol::server::{self, Handler};
use nix::unistd::Uid;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Barrier;

/// What tests wait for at most; far more than it ever takes.
const PATIENCE: Duration = Duration::from_secs(60);

const LONG: Option<Duration> = Some(PATIENCE);

/// Messages of the tests: `KeyValue`, for its two strings.
fn text(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.to_owned(), value: value.to_owned() }
}

#[derive(Default)]
struct Echo {
    calls: AtomicUsize,
    /// Calls of `Meet` wait until so many are there.
    meeting: Option<Barrier>,
}

impl Handler for Echo {
    async fn call(&self, request: Request) -> Result<Vec<u8>, RpcError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        match request.method.as_str() {
            "Echo" => Ok(request.payload),
            "Namespace" => {
                let namespace = frame::metadata(&request, frame::NAMESPACE_KEY).unwrap_or_default();
                Ok(text(namespace, &format!("{:?}", frame::timeout(&request).is_some())).encode_to_vec())
            }
            "Meet" => {
                if let Some(meeting) = &self.meeting {
                    meeting.wait().await;
                }
                Ok(request.payload)
            }
            "Hang" => std::future::pending().await,
            other => Err(RpcError::new(ErrorCode::NotFound, format!("exec: \"{other}\": no such file"))),
        }
    }
}

struct Server {
    _folder: tempfile::TempDir,
    path: PathBuf,
    echo: Arc<Echo>,
    task: tokio::task::JoinHandle<()>,
}

fn serve(echo: Echo, uid: Uid) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let echo = Arc::new(echo);
    let task = tokio::spawn(server::serve(listener, uid, echo.clone()));
    Server { _folder: folder, path, echo, task }
}

fn target<'call>(method: &'call str, limit: Option<Duration>) -> Target<'call> {
    Target { service: "test", method, namespace: "space", limit }
}

async fn echo(client: &Client, message: &KeyValue) -> Result<KeyValue, CallError> {
    client.call(target("Echo", LONG), message).await
}

#[tokio::test]
async fn calls_are_answered_with_what_they_ask() {
    let server = serve(Echo::default(), Uid::effective());
    let client = Client::connect(&server.path).await.unwrap();
    for length in [0, 1, 10_000, 3_000_000] {
        let message = text("key", &"x".repeat(length));
        assert_eq!(echo(&client, &message).await.unwrap(), message);
    }
    let told: KeyValue = client.call(target("Namespace", LONG), &text("", "")).await.unwrap();
    assert_eq!(told, text("space", "true"));
    let told: KeyValue = client.call(target("Namespace", None), &text("", "")).await.unwrap();
    assert_eq!(told, text("space", "false"));
}

#[tokio::test]
async fn a_refusal_keeps_its_code_and_its_words() {
    let server = serve(Echo::default(), Uid::effective());
    let client = Client::connect(&server.path).await.unwrap();
    let error = client.call::<KeyValue>(target("/bin/x", LONG), &text("", "")).await.unwrap_err();
    let expected = RpcError::new(ErrorCode::NotFound, "exec: \"/bin/x\": no such file");
    assert_eq!(error, CallError::Refused { error: expected });
}

#[tokio::test]
async fn many_clients_and_many_calls_at_once() {
    let server = serve(Echo::default(), Uid::effective());
    let calls = (0..8).map(|number| {
        let path = server.path.clone();
        tokio::spawn(async move {
            let client = Client::connect(&path).await.unwrap();
            let calls = (0..50).map(|call| {
                let client = client.clone();
                async move {
                    let message = text(&number.to_string(), &call.to_string());
                    assert_eq!(echo(&client, &message).await.unwrap(), message);
                }
            });
            let tasks: Vec<_> = calls.map(tokio::spawn).collect();
            for task in tasks {
                task.await.unwrap();
            }
        })
    });
    for task in calls.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert_eq!(server.echo.calls.load(Ordering::SeqCst), 400);
}

#[tokio::test]
async fn connections_do_not_wait_for_each_other() {
    let server = serve(Echo { meeting: Some(Barrier::new(3)), ..Echo::default() }, Uid::effective());
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let path = server.path.clone();
            tokio::spawn(async move {
                let client = Client::connect(&path).await.unwrap();
                client.call::<KeyValue>(target("Meet", LONG), &text("", "")).await
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
}

/// A peer under the test's control at the other end of a client.
fn peer() -> (Client, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Client::new(ours), theirs)
}

async fn read_request(stream: &mut UnixStream) -> (u32, Request) {
    let mut header = [0; frame::HEADER_LENGTH];
    stream.read_exact(&mut header).await.unwrap();
    let length = u32::from_be_bytes(header[..4].try_into().unwrap());
    let number = u32::from_be_bytes(header[4..8].try_into().unwrap());
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.unwrap();
    (number, Request::decode(payload.as_slice()).unwrap())
}

#[tokio::test]
async fn answers_may_come_in_any_order_and_unasked() {
    let (client, mut stream) = peer();
    let first = tokio::spawn({
        let client = client.clone();
        async move { client.call::<KeyValue>(target("A", LONG), &text("", "")).await }
    });
    let (one, _) = read_request(&mut stream).await;
    let second = tokio::spawn({
        let client = client.clone();
        async move { client.call::<KeyValue>(target("B", LONG), &text("", "")).await }
    });
    let (two, _) = read_request(&mut stream).await;
    assert_eq!((one % 2, two), (1, one + 2), "odd and rising");
    let answer = |number, value: &str| frame::encode_response(number, &Ok(text("", value).encode_to_vec()));
    stream.write_all(&answer(77, "nobody asked")).await.unwrap();
    stream.write_all(&answer(two, "two")).await.unwrap();
    assert_eq!(second.await.unwrap().unwrap(), text("", "two"));
    stream.write_all(&answer(one, "one")).await.unwrap();
    assert_eq!(first.await.unwrap().unwrap(), text("", "one"));
}

#[tokio::test]
async fn a_deadline_ends_a_call_and_nothing_else() {
    let (client, mut stream) = peer();
    let limit = Duration::from_millis(20);
    let error = client.call::<KeyValue>(target("A", Some(limit)), &text("", "")).await.unwrap_err();
    assert_eq!(error, CallError::Deadline { limit });
    let (late, request) = read_request(&mut stream).await;
    assert_eq!(frame::timeout(&request), Some(limit));
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.call::<KeyValue>(target("B", LONG), &text("", "")).await }
    });
    let (number, _) = read_request(&mut stream).await;
    stream.write_all(&frame::encode_response(late, &Ok(Vec::new()))).await.unwrap();
    stream.write_all(&frame::encode_response(number, &Ok(text("b", "").encode_to_vec()))).await.unwrap();
    assert_eq!(call.await.unwrap().unwrap(), text("b", ""));
    assert!(!client.is_closed());
}

#[tokio::test]
async fn a_peer_that_does_not_read_delays_calls_to_their_deadline_only() {
    let (client, _stream) = peer();
    let message = text("", &"x".repeat(1 << 20));
    let calls: Vec<_> = (0..40)
        .map(|_| {
            let (client, message) = (client.clone(), message.clone());
            tokio::spawn(async move {
                client.call::<KeyValue>(target("A", Some(Duration::from_millis(50))), &message).await
            })
        })
        .collect();
    for call in calls {
        assert!(matches!(call.await.unwrap(), Err(CallError::Deadline { .. })));
    }
    assert!(!client.is_closed(), "slow is not dead");
}

#[tokio::test]
async fn the_end_of_the_connection_ends_every_call() {
    let (client, mut stream) = peer();
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.call::<KeyValue>(target("A", None), &text("", "")).await })
        })
        .collect();
    for _ in 0..3 {
        read_request(&mut stream).await;
    }
    let closed = client.closed();
    drop(stream);
    for call in calls {
        assert_eq!(call.await.unwrap(), Err(CallError::Closed));
    }
    tokio::time::timeout(PATIENCE, closed).await.unwrap();
    assert!(client.is_closed());
    assert_eq!(echo(&client, &text("", "")).await, Err(CallError::Closed));
}

#[tokio::test]
async fn an_answer_just_before_the_end_still_counts() {
    let (client, mut stream) = peer();
    let call = tokio::spawn(async move { client.call::<KeyValue>(target("A", None), &text("", "")).await });
    let (number, _) = read_request(&mut stream).await;
    stream.write_all(&frame::encode_response(number, &Ok(text("a", "").encode_to_vec()))).await.unwrap();
    drop(stream);
    assert_eq!(call.await.unwrap().unwrap(), text("a", ""));
}

#[tokio::test]
async fn closing_and_dropping_close_the_connection() {
    let (client, mut stream) = peer();
    let clone = client.clone();
    client.close();
    assert_eq!(tokio::time::timeout(PATIENCE, stream.read(&mut [0])).await.unwrap().unwrap(), 0);
    assert_eq!(echo(&clone, &text("", "")).await, Err(CallError::Closed));

    let (client, mut stream) = peer();
    let closed = client.closed();
    drop(client);
    assert_eq!(tokio::time::timeout(PATIENCE, stream.read(&mut [0])).await.unwrap().unwrap(), 0);
    tokio::time::timeout(PATIENCE, closed).await.unwrap();
}

#[tokio::test]
async fn what_is_too_long_is_refused_and_the_connection_goes_on() {
    let server = serve(Echo::default(), Uid::effective());
    let client = Client::connect(&server.path).await.unwrap();
    let error = echo(&client, &text("", &"x".repeat(frame::MAX_PAYLOAD))).await.unwrap_err();
    assert!(matches!(error, CallError::TooLong { .. }), "{error:?}");
    assert_eq!(echo(&client, &text("a", "")).await.unwrap(), text("a", ""));

    // The same from a peer that does not check.
    let mut stream = UnixStream::connect(&server.path).await.unwrap();
    let length = frame::MAX_PAYLOAD as u32 + 1;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(&1u32.to_be_bytes());
    bytes.extend_from_slice(&[frame::TYPE_REQUEST, 0]);
    bytes.resize(frame::HEADER_LENGTH + length as usize, 0);
    stream.write_all(&bytes).await.unwrap();
    let mut header = [0; frame::HEADER_LENGTH];
    stream.read_exact(&mut header).await.unwrap();
    let mut payload = vec![0; u32::from_be_bytes(header[..4].try_into().unwrap()) as usize];
    stream.read_exact(&mut payload).await.unwrap();
    assert_eq!(frame::decode_response(&payload).unwrap_err().code, ErrorCode::ResourceExhausted);
}

#[tokio::test]
async fn only_the_own_user_is_heard() {
    let server = serve(Echo::default(), Uid::from_raw(Uid::effective().as_raw() + 1));
    let client = Client::connect(&server.path).await.unwrap();
    assert_eq!(echo(&client, &text("", "")).await, Err(CallError::Closed));
    assert_eq!(server.echo.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn garbage_ends_at_most_its_own_connection() {
    let server = serve(Echo::default(), Uid::effective());
    let mut garbage = UnixStream::connect(&server.path).await.unwrap();
    garbage.write_all(&[0, 0, 0, 3, 0, 0, 0, 1, frame::TYPE_REQUEST, 0, 0xff, 0xff, 0xff]).await.unwrap();
    let client = Client::connect(&server.path).await.unwrap();
    assert_eq!(echo(&client, &text("a", "")).await.unwrap(), text("a", ""));
}

#[tokio::test]
async fn stopping_the_server_ends_its_connections() {
    let server = serve(Echo::default(), Uid::effective());
    let client = Client::connect(&server.path).await.unwrap();
    let hanging = tokio::spawn({
        let client = client.clone();
        async move { client.call::<KeyValue>(target("Hang", None), &text("", "")).await }
    });
    assert!(echo(&Client::connect(&server.path).await.unwrap(), &text("", "")).await.is_ok());
    server.task.abort();
    assert_eq!(tokio::time::timeout(PATIENCE, hanging).await.unwrap().unwrap(), Err(CallError::Closed));
}
