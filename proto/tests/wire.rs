//! Bytes written by hand from field numbers and types, against what the generated code reads and writes; and the
//! table of the wire against counts made by hand.

use std::collections::BTreeMap;
use std::fmt::Debug;

use davit_proto::containerd::runtime::bootstrap::v1::{BootstrapParams, BootstrapResult, LogLevel};
use davit_proto::containerd::services::content::v1::{ReadContentResponse, WriteAction, WriteContentRequest};
use davit_proto::containerd::services::diff::v1::DiffResponse;
use davit_proto::containerd::services::images::v1::DeleteImageRequest;
use davit_proto::containerd::services::sandbox::v1::{ControllerStartRequest, ControllerUpdateRequest};
use davit_proto::containerd::services::tasks::v1 as tasks;
use davit_proto::containerd::types::transfer::{AuthResponse, AuthType, ImageStore, UnpackConfiguration};
use davit_proto::containerd::types::{Descriptor, Envelope, Mount};
use davit_proto::containerd::v1::types::{Process, Status};
use davit_proto::containerd::{events, runc, task, ttrpc};
use davit_proto::davit::shim::v1 as shim;
use davit_proto::google;
use davit_proto::io::containerd::cgroups;
use prost::Message;
use prost_types::{Any, Timestamp};

/// Checks both directions: what the message is written as, and that it is read back as it was.
fn assert_wire<M: Message + Default + PartialEq + Debug>(message: &M, bytes: &[u8]) {
    assert_eq!(message.encode_to_vec(), bytes, "writing {message:?}");
    assert_eq!(&M::decode(bytes).expect("the bytes are an encoding"), message, "reading");
}

fn map<const N: usize>(entries: [(&str, &str); N]) -> BTreeMap<String, String> {
    entries.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

const AT: Timestamp = Timestamp { seconds: 1, nanos: 2 };

#[test]
fn ttrpc_calls() {
    let request = ttrpc::Request {
        service: "a".into(),
        method: "b".into(),
        payload: vec![0xff],
        timeout_nano: 1,
        metadata: vec![
            ttrpc::KeyValue { key: "k".into(), value: "v".into() },
            ttrpc::KeyValue { key: "k".into(), value: "w".into() },
        ],
    };
    assert_wire(
        &request,
        b"\x0a\x01a\x12\x01b\x1a\x01\xff\x20\x01\x2a\x06\x0a\x01k\x12\x01v\x2a\x06\x0a\x01k\x12\x01w",
    );
    let status = google::rpc::Status { code: 5, message: "x".into(), details: vec![] };
    let response = ttrpc::Response { status: Some(status), payload: vec![7] };
    assert_wire(&response, b"\x0a\x05\x08\x05\x12\x01x\x12\x01\x07");
}

#[test]
fn bootstrap() {
    let params = BootstrapParams {
        instance_id: "i".into(),
        namespace: "n".into(),
        log_level: LogLevel::Debug.into(),
        containerd_version: "2".into(),
        containerd_ttrpc_address: "t".into(),
        containerd_grpc_address: "g".into(),
        containerd_binary: "b".into(),
        extensions: vec![],
        socket_dir: Some(String::new()),
    };
    assert_wire(
        &params,
        b"\x0a\x01i\x12\x01n\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01\x22\x012\x2a\x01t\x32\x01g\x3a\x01b\x4a\x00",
    );
    let result = BootstrapResult {
        version: 3,
        address: "a".into(),
        protocol: "p".into(),
        capabilities: vec![],
        metadata: map([("k", "v")]),
    };
    assert_wire(&result, b"\x08\x03\x12\x01a\x1a\x01p\x2a\x06\x0a\x01k\x12\x01v");
}

#[test]
fn a_shim_can_take_options_for_bootstrap_params() {
    // Daemons before 2.3 write an `Any` where newer ones write parameters. Both are readable as the other.
    let options = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![] };
    let params =
        BootstrapParams::decode(options.encode_to_vec().as_slice()).expect("field 1 is text in both");
    assert_eq!(params.instance_id, "containerd.runc.v1.Options");
}

#[test]
fn events_in_their_envelope() {
    let exit = events::TaskExit {
        container_id: "c".into(),
        id: "e".into(),
        pid: 7,
        exit_status: 137,
        exited_at: Some(AT),
    };
    assert_wire(&exit, b"\x0a\x01c\x12\x01e\x18\x07\x20\x89\x01\x2a\x04\x08\x01\x10\x02");
    let delete = events::TaskDelete {
        container_id: "c".into(),
        pid: 7,
        exit_status: 137,
        exited_at: Some(AT),
        id: "e".into(),
    };
    assert_wire(&delete, b"\x0a\x01c\x10\x07\x18\x89\x01\x22\x04\x08\x01\x10\x02\x2a\x01e");
    let remove = events::SnapshotRemove { key: "k".into(), snapshotter: "s".into() };
    assert_wire(&remove, b"\x0a\x01k\x2a\x01s");
    let envelope = Envelope {
        timestamp: Some(AT),
        namespace: "n".into(),
        topic: "/t".into(),
        event: Some(Any { type_url: "u".into(), value: vec![] }),
    };
    assert_wire(&envelope, b"\x0a\x04\x08\x01\x10\x02\x12\x01n\x1a\x02/t\x22\x03\x0a\x01u");
}

#[test]
fn content() {
    let request = WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: "r".into(),
        total: 5,
        expected: "d".into(),
        offset: 3,
        data: bytes::Bytes::from_static(&[1, 2]),
        labels: map([("b", "2"), ("a", "1")]),
    };
    assert_wire(
        &request,
        b"\x08\x02\x12\x01r\x18\x05\x22\x01d\x28\x03\x32\x02\x01\x02\x3a\x06\x0a\x01a\x12\x011\x3a\x06\x0a\x01b\x12\x012",
    );
    let response = ReadContentResponse { offset: 1, data: bytes::Bytes::from_static(b"x") };
    assert_wire(&response, b"\x08\x01\x12\x01x");
}

#[test]
fn descriptors_and_images() {
    let descriptor =
        Descriptor { media_type: "m".into(), digest: "d".into(), size: 9, annotations: map([("k", "v")]) };
    let bytes = b"\x0a\x01m\x12\x01d\x18\x09\x2a\x06\x0a\x01k\x12\x01v";
    assert_wire(&descriptor, bytes);
    assert_wire(&DiffResponse { diff: Some(descriptor) }, &[b"\x1a\x10".as_slice(), bytes].concat());
    let delete = DeleteImageRequest { name: "n".into(), sync: true, target: Some(Descriptor::default()) };
    assert_wire(&delete, b"\x0a\x01n\x10\x01\x1a\x00");
}

#[test]
fn tasks_of_the_daemon() {
    let mount = Mount {
        r#type: "t".into(),
        source: "s".into(),
        target: "g".into(),
        options: vec!["o".into(), String::new()],
    };
    let bytes = b"\x0a\x01t\x12\x01s\x1a\x01g\x22\x01o\x22\x00";
    assert_wire(&mount, bytes);
    let create = tasks::CreateTaskRequest {
        container_id: "c".into(),
        rootfs: vec![mount],
        terminal: true,
        runtime_path: "p".into(),
        task_api_version: 3,
        ..Default::default()
    };
    assert_wire(
        &create,
        &[b"\x0a\x01c\x1a\x0e".as_slice(), bytes, b"\x38\x01\x52\x01p\x60\x03".as_slice()].concat(),
    );
    let process = Process {
        id: "c".into(),
        pid: 1,
        status: Status::Stopped.into(),
        exit_status: 2,
        exited_at: Some(AT),
        ..Default::default()
    };
    assert_wire(&process, b"\x12\x01c\x18\x01\x20\x03\x48\x02\x52\x04\x08\x01\x10\x02");
}

#[test]
fn tasks_of_the_shim() {
    let bytes = b"\x0a\x01c\x12\x01b\x20\x01\x2a\x01i\x32\x01o\x3a\x01e\x52\x03\x0a\x01u";
    let options = Some(Any { type_url: "u".into(), value: vec![] });
    let create = task::v2::CreateTaskRequest {
        id: "c".into(),
        bundle: "b".into(),
        terminal: true,
        stdin: "i".into(),
        stdout: "o".into(),
        stderr: "e".into(),
        options: options.clone(),
        ..Default::default()
    };
    assert_wire(&create, bytes);
    assert_eq!(task::v3::CreateTaskRequest::decode(bytes.as_slice()).expect("an encoding").options, options);
    let state =
        task::v3::StateResponse { id: "e".into(), exec_id: "e".into(), pid: 300, ..Default::default() };
    assert_wire(&state, b"\x0a\x01e\x18\xac\x02\x5a\x01e");
    let delete = task::v2::DeleteResponse { pid: 1, exit_status: 137, exited_at: Some(AT) };
    assert_wire(&delete, b"\x08\x01\x10\x89\x01\x1a\x04\x08\x01\x10\x02");
}

#[test]
fn options_of_runc() {
    let options = runc::v1::Options {
        binary_name: "r".into(),
        root: "/".into(),
        systemd_cgroup: true,
        criu_work_path: "w".into(),
        ..Default::default()
    };
    assert_wire(&options, b"\x32\x01r\x3a\x01/\x48\x01\x5a\x01w");
    assert_wire(&runc::v1::CheckpointOptions { image_path: "i".into(), ..Default::default() }, b"\x42\x01i");
}

#[test]
fn sandboxes_number_their_controller_in_two_ways() {
    assert_wire(
        &ControllerStartRequest { sandbox_id: "s".into(), sandboxer: "c".into() },
        b"\x0a\x01s\x52\x01c",
    );
    let update =
        ControllerUpdateRequest { sandbox_id: "s".into(), sandboxer: "c".into(), ..Default::default() };
    assert_wire(&update, b"\x0a\x01s\x12\x01c");
}

#[test]
fn transfers() {
    let unpack = UnpackConfiguration { platform: None, snapshotter: "s".into() };
    let store = ImageStore { name: "n".into(), unpacks: vec![unpack], ..Default::default() };
    assert_wire(&store, b"\x0a\x01n\x52\x03\x12\x01s");
    let answer = AuthResponse {
        auth_type: AuthType::Header.into(),
        secret: "s".into(),
        username: "u".into(),
        expire_at: Some(AT),
    };
    assert_wire(&answer, b"\x08\x03\x12\x01s\x1a\x01u\x22\x04\x08\x01\x10\x02");
}

#[test]
fn metrics() {
    let memory = cgroups::v2::MemoryStat { usage: 1, max_usage: 2, ..Default::default() };
    let metrics = cgroups::v2::Metrics { memory: Some(memory), ..Default::default() };
    assert_wire(&metrics, b"\x22\x06\x80\x02\x01\xa0\x02\x02");
    let usage = cgroups::v1::CpuUsage { total: 1, per_cpu: vec![1, 2], ..Default::default() };
    let cpu = cgroups::v1::CpuStat { usage: Some(usage), throttling: None };
    let metrics = cgroups::v1::Metrics { cpu: Some(cpu), ..Default::default() };
    assert_wire(&metrics, b"\x1a\x08\x0a\x06\x08\x01\x22\x02\x01\x02");
}

#[test]
fn upgrades_of_shims() {
    let before =
        shim::Program { version: "v".into(), build: "b".into(), path: "/p".into(), state_version: 1 };
    let bytes = b"\x0a\x01v\x12\x01b\x1a\x02/p\x20\x01";
    assert_wire(&before, bytes);
    let response = shim::UpgradeResponse { before: Some(before), after: None };
    assert_wire(&response, &[b"\x0a\x0c".as_slice(), bytes].concat());
    assert_wire(&shim::UpgradeRequest { binary: "/p".into() }, b"\x0a\x02/p");
}

#[test]
fn fields_of_newer_peers_are_ignored() {
    let bytes = b"\x08\x01\x10\x89\x01\x1a\x04\x08\x01\x10\x02\xfa\x07\x01z";
    let delete = task::v2::DeleteResponse::decode(bytes.as_slice()).expect("field 127 is unknown, not wrong");
    assert_eq!(delete.exit_status, 137);
}

const TABLE: &str = include_str!("../wire.txt");

#[test]
fn all_services_are_there() {
    let methods = |service: &str| {
        assert!(TABLE.lines().any(|line| line == format!("service {service}")), "{service} is missing");
        TABLE.lines().filter(|line| line.split(' ').next() == Some(service)).count()
    };
    let expected = [
        ("containers.v1.Containers", 6),
        ("content.v1.Content", 9),
        ("diff.v1.Diff", 2),
        ("events.v1.Events", 3),
        ("images.v1.Images", 5),
        ("introspection.v1.Introspection", 3),
        ("leases.v1.Leases", 6),
        ("mounts.v1.Mounts", 5),
        ("namespaces.v1.Namespaces", 5),
        ("sandbox.v1.Store", 5),
        ("sandbox.v1.Controller", 9),
        ("snapshots.v1.Snapshots", 10),
        ("streaming.v1.Streaming", 1),
        ("tasks.v1.Tasks", 17),
        ("transfer.v1.Transfer", 1),
        ("version.v1.Version", 1),
        ("events.ttrpc.v1.Events", 1),
    ]
    .map(|(name, count)| (format!("containerd.services.{name}"), count));
    for (name, count) in expected {
        assert_eq!(methods(&name), count, "{name}");
    }
    assert_eq!(methods("davit.shim.v1.Shim"), 2);
    assert_eq!(methods("davit.services.shims.v1.Shims"), 2);
    assert_eq!(methods("davit.services.events.v1.Events"), 2);
}

#[test]
fn both_task_services_are_the_same() {
    let of = |package: &str| -> Vec<String> {
        TABLE.lines().filter(|line| line.contains(package)).map(|line| line.replace(package, "")).collect()
    };
    let (v2, v3) = (of("containerd.task.v2."), of("containerd.task.v3."));
    assert!(v2.len() > 100, "{} lines", v2.len());
    assert_eq!(v2, v3);
}
