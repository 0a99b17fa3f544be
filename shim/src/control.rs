//! The private service `davit.shim.v1.Shim`: what this shim can do beyond containerd's task service.

use std::path::PathBuf;
use std::rc::Rc;

use davit_proto::containerd::ttrpc::Request;
use davit_proto::davit::shim::v1::{
    Container, Process, StatusRequest, StatusResponse, Stream, UpgradeRequest,
};
use prost::Message;

use crate::error::TaskError;
use crate::executor::spawn;
use crate::rpc::{Connection, Server};
use crate::shim::Shim;
use crate::upgrade::{Turn, UpgradeError};
use crate::{identity, process, upgrade};

/// The name of the service.
pub(crate) const SERVICE: &str = "davit.shim.v1.Shim";

/// Carries out the request that `connection` has sent on `stream`. `None` if the answer comes later.
///
/// Nothing is left to a task that an upgrade could end before it has begun.
///
/// # Errors
/// As the method says; `Unimplemented` for an unknown one.
pub(crate) fn call(
    server: &Rc<Server>,
    connection: &Rc<Connection>,
    stream: u32,
    request: Request,
) -> Option<Result<Vec<u8>, TaskError>> {
    let undecoded = |what, source| Some(Err(TaskError::Decode { what, source }));
    match request.method.as_str() {
        "Status" => match StatusRequest::decode(request.payload.as_slice()) {
            Ok(StatusRequest {}) => Some(Ok(status(&server.shim).encode_to_vec())),
            Err(source) => undecoded("StatusRequest", source),
        },
        "Upgrade" => match UpgradeRequest::decode(request.payload.as_slice()) {
            Ok(request) => upgrade(server, connection, stream, PathBuf::from(request.binary)),
            Err(source) => undecoded("UpgradeRequest", source),
        },
        _ => Some(Err(TaskError::Unimplemented { service: request.service, method: request.method })),
    }
}

fn upgrade(
    server: &Rc<Server>,
    connection: &Rc<Connection>,
    stream: u32,
    program: PathBuf,
) -> Option<Result<Vec<u8>, TaskError>> {
    let Some(turn) = Turn::take(server) else { return Some(Err(UpgradeError::UnderWay.into())) };
    let connection = connection.clone();
    spawn(async move {
        match upgrade::run(&turn, &connection, stream, &program).await {
            Ok(never) => match never {},
            Err(error) => connection.answer(stream, Err(TaskError::from(error).into())),
        }
    });
    None
}

fn status(shim: &Shim) -> StatusResponse {
    let container = |container: Rc<crate::container::Container>| Container {
        id: container.id.clone(),
        processes: container.all_processes().iter().map(|of| describe(&container.id, of)).collect(),
    };
    StatusResponse {
        program: Some(identity::program()),
        pid: std::process::id(),
        upgrades: shim.upgrades.get(),
        unsent_events: shim.outbox.length() as u64,
        containers: shim.containers().into_iter().map(container).collect(),
    }
}

fn describe(container_id: &str, process: &process::Process) -> Process {
    let counters = process.streams().map(|streams| streams.counters()).unwrap_or_default();
    let stream = |(name, counters): (&str, crate::stdio::Counters)| Stream {
        name: name.to_owned(),
        spooled: counters.spooled,
        dropped: counters.dropped,
        stalled_micros: u64::try_from(counters.stalled.as_micros()).unwrap_or(u64::MAX),
    };
    Process {
        // Init has the container's own id here, and none for clients.
        exec_id: if process.id == container_id { String::new() } else { process.id.clone() },
        pid: process.pid().unsigned_abs(),
        state: process.state().word().to_owned(),
        streams: counters.into_iter().map(stream).collect(),
    }
}
