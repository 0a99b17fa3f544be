//! The Sandbox services: records, and a controller that leaves nothing of what a shim refuses.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use davit_integration::Daemon;
use davit_integration::census::Census;
use davit_proto::containerd::services::sandbox::v1 as wire;
use davit_proto::containerd::services::sandbox::v1::controller_client::ControllerClient;
use davit_proto::containerd::services::sandbox::v1::store_client::StoreClient;
use davit_proto::containerd::types::Sandbox;
use davit_proto::containerd::types::sandbox::Runtime;
use prost_types::Any;
use tonic::Code;

use super::{conn, plugins, refused, runtime};
use crate::root;

fn any(value: &[u8]) -> Any {
    Any { type_url: "example/odd".into(), value: value.to_vec() }
}

fn sandbox(id: &str) -> Sandbox {
    Sandbox {
        sandbox_id: id.into(),
        runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: Some(any(b"\xff")) }),
        spec: Some(any(b"{}")),
        labels: HashMap::from([("k".into(), "v".into())]).into_iter().collect(),
        extensions: HashMap::from([("e".into(), any(b"\0"))]).into_iter().collect(),
        sandboxer: "shim".into(),
        ..Default::default()
    }
}

#[test]
fn records_live_from_create_to_delete() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let runtime = runtime()?;
    let created = runtime.block_on(async {
        plugins(&daemon, &[("sandbox.store.v1", "local"), ("grpc.v1", "sandboxes")]).await?;
        let mut store = StoreClient::new(conn(&daemon, None).await?);
        let create = wire::StoreCreateRequest { sandbox: Some(sandbox("s")) };
        let created = store.create(create.clone()).await?.into_inner().sandbox.unwrap_or_default();
        ensure!(created.created_at.is_some() && created.created_at == created.updated_at, "{created:?}");
        let expected =
            Sandbox { created_at: created.created_at, updated_at: created.updated_at, ..sandbox("s") };
        ensure!(created == expected, "{created:?}");
        refused(store.create(create).await, Code::AlreadyExists, "sandbox \"s\": already exists");
        let nameless = store.create(wire::StoreCreateRequest { sandbox: None }).await;
        ensure!(nameless.unwrap_err().code() == Code::InvalidArgument);
        anyhow::Ok(created)
    })?;
    daemon.stop(nix::sys::signal::Signal::SIGKILL)?;
    daemon.restart()?;
    runtime.block_on(async {
        let mut store = StoreClient::new(conn(&daemon, None).await?);
        let get = wire::StoreGetRequest { sandbox_id: "s".into() };
        ensure!(store.get(get.clone()).await?.into_inner().sandbox == Some(created.clone()));
        let list = |filter: &str| wire::StoreListRequest { filters: vec![filter.into()] };
        ensure!(store.list(list("labels.k==v")).await?.into_inner().list == [created]);
        ensure!(store.list(list("id==t")).await?.into_inner().list.is_empty());
        ensure!(store.list(list("==")).await.unwrap_err().code() == Code::InvalidArgument);

        let changed = Sandbox { labels: [("k".into(), "w".into())].into(), spec: None, ..sandbox("s") };
        let fields = vec!["labels.k".into()];
        let update = wire::StoreUpdateRequest { sandbox: Some(changed.clone()), fields };
        let updated = store.update(update).await?.into_inner().sandbox.unwrap_or_default();
        ensure!(updated.labels["k"] == "w" && updated.spec == Some(any(b"{}")), "{updated:?}");
        let fields = vec!["sandboxer".into()];
        let update = wire::StoreUpdateRequest { sandbox: Some(changed), fields };
        let text = "cannot update \"sandboxer\" field on sandbox \"s\": invalid argument";
        refused(store.update(update).await, Code::InvalidArgument, text);

        store.delete(wire::StoreDeleteRequest { sandbox_id: "s".into() }).await?;
        refused(store.get(get).await, Code::NotFound, "sandbox \"s\": not found");
        anyhow::Ok(())
    })
}

/// Our shim serves no sandbox, as containerd's runc shim does not. The refusal is its own, and nothing stays.
#[test]
fn a_shim_without_sandboxes_refuses_and_leaves_nothing() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let census = Census::take(&daemon.path(""));
    runtime()?.block_on(async {
        plugins(&daemon, &[("sandbox.controller.v1", "shim"), ("grpc.v1", "sandbox-controllers")]).await?;
        let mut controller = ControllerClient::new(conn(&daemon, None).await?);
        let create = |sandboxer: &str| wire::ControllerCreateRequest {
            sandbox_id: "s".into(),
            sandboxer: sandboxer.into(),
            sandbox: Some(Sandbox {
                runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
                ..sandbox("s")
            }),
            ..Default::default()
        };
        let error = controller.create(create("shim")).await.unwrap_err();
        ensure!(error.code() == Code::Unimplemented, "{error:?}");
        ensure!(error.message().starts_with("failed to create sandbox s: "), "{error:?}");

        let text = "invalid argument: sandbox controller name can not be empty";
        refused(controller.create(create("")).await, Code::InvalidArgument, text);
        let text = "not found: failed to get sandbox controller by podsandbox";
        refused(controller.create(create("podsandbox")).await, Code::NotFound, text);

        let (sandbox_id, sandboxer) = ("s".to_owned(), "shim".to_owned());
        let start =
            wire::ControllerStartRequest { sandbox_id: sandbox_id.clone(), sandboxer: sandboxer.clone() };
        let text = "failed to start sandbox \"s\": unable to find sandbox \"s\": not found";
        refused(controller.start(start).await, Code::NotFound, text);
        let wait =
            wire::ControllerWaitRequest { sandbox_id: sandbox_id.clone(), sandboxer: sandboxer.clone() };
        refused(controller.wait(wait).await, Code::NotFound, "sandbox \"s\": not found");
        // What is gone is stopped, and has ended.
        let stop = wire::ControllerStopRequest {
            sandbox_id: sandbox_id.clone(),
            sandboxer: sandboxer.clone(),
            timeout_secs: 1,
        };
        controller.stop(stop).await?;
        let ask = wire::ControllerStatusRequest { sandbox_id, sandboxer, verbose: true };
        let status = controller.status(ask).await?.into_inner();
        ensure!(status.state.is_empty() && status.exited_at.is_some(), "{status:?}");
        anyhow::Ok(())
    })?;
    census.settle(&daemon.path(""))
}
