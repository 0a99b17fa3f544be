//! Limits, statistics, processes, and running out of memory.

use std::path::Path;

use davit_proto::any;
use davit_proto::containerd::runc::v1::ProcessDetails;
use davit_proto::containerd::task::v3::{
    PidsRequest, PidsResponse, StatsRequest, StatsResponse, UpdateTaskRequest,
};
use davit_proto::io::containerd::cgroups::{v1, v2};
use prost_types::Any;

use crate::support::{Host, cannot_run};

/// The limit of pids and the bytes of memory in use, in either version.
fn pids_limit_and_memory(stats: &Any) -> (u64, u64) {
    if let Some(metrics) = any::unpack::<v1::Metrics>(stats).unwrap() {
        return (metrics.pids.unwrap().limit, metrics.memory.unwrap().usage.unwrap().usage);
    }
    let metrics = any::unpack::<v2::Metrics>(stats).unwrap().unwrap();
    (metrics.pids.unwrap().limit, metrics.memory.unwrap().usage)
}

#[test]
fn statistics_and_limits_are_those_of_the_container() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |config| {
        config["linux"]["resources"] = serde_json::json!({"pids": {"limit": 50}});
    });
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let request = StatsRequest { id: bundle.id.clone() };
    let stats = || client.call::<StatsResponse>("Stats", &request).unwrap().stats.unwrap();
    let (limit, memory) = pids_limit_and_memory(&stats());
    assert_eq!(limit, 50);
    assert!(memory > 0);
    let update = UpdateTaskRequest {
        id: bundle.id.clone(),
        resources: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: br#"{"pids":{"limit":70}}"#.to_vec(),
        }),
        ..UpdateTaskRequest::default()
    };
    client.act("Update", &update).unwrap();
    assert_eq!(pids_limit_and_memory(&stats()).0, 70);
    client.finish(&bundle.id);
}

#[test]
fn processes_are_listed_with_their_execs() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let init = client.create(&host.create_request(&bundle)).unwrap();
    client.start(&bundle.id, "").unwrap();
    client.exec(&bundle.id, "e1", "exec sleep 1000").unwrap();
    let exec = client.start(&bundle.id, "e1").unwrap();
    let request = PidsRequest { id: bundle.id.clone() };
    let listed = client.call::<PidsResponse>("Pids", &request).unwrap().processes;
    let of = |pid: u32| listed.iter().find(|process| process.pid == pid).unwrap();
    assert_eq!(of(init).info, None);
    let details = any::unpack::<ProcessDetails>(of(exec).info.as_ref().unwrap()).unwrap().unwrap();
    assert_eq!(details.exec_id, "e1");
    client.finish(&bundle.id);
}

#[test]
fn running_out_of_memory_is_told_before_the_exit() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "exec tail /dev/zero", |config| {
        config["linux"]["resources"] = serde_json::json!({"memory": {"limit": 16 << 20}});
        config["mounts"].as_array_mut().unwrap().push(serde_json::json!(
            {"destination": "/dev/zero", "type": "bind", "source": "/dev/zero", "options": ["bind"]}
        ));
    });
    let client = host.launch(&bundle, &host.create_request(&bundle));
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 137);
    let events = events.until("exit box 137");
    let position = |wanted: &str| events.iter().position(|event| event == wanted);
    assert!(position("oom").is_some_and(|oom| oom < position("exit box 137").unwrap()), "{events:?}");
    client.finish(&bundle.id);
    assert!(!Path::new("/sys/fs/cgroup/memory").join(&bundle.id).exists());
}
