//! Mounts: what a client cannot mount itself, held under a name across daemons.

use anyhow::{Context, Result, ensure};
use davit_integration::Daemon;
use davit_integration::census::Census;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use davit_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use davit_proto::containerd::services::mounts::v1 as wire;
use davit_proto::containerd::services::mounts::v1::mounts_client::MountsClient;
use davit_proto::containerd::types::Mount;
use nix::sys::signal::Signal;
use tonic::Code;

use super::{conn, plugins, refused, runtime};
use crate::root;

fn tmpfs() -> Mount {
    Mount {
        r#type: "tmpfs".into(),
        source: "tmpfs".into(),
        options: vec!["size=64k".into()],
        ..Default::default()
    }
}

#[test]
fn an_activation_outlives_the_daemon_and_ends_with_its_lease() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let census = Census::take(&daemon.path(""));
    let runtime = runtime()?;
    let activate = |name: &str, mounts: Vec<Mount>, temporary| wire::ActivateRequest {
        name: name.into(),
        mounts,
        temporary,
        labels: [("k".to_owned(), "v".to_owned())].into(),
    };
    let point = runtime.block_on(async {
        plugins(&daemon, &[("mount-manager.v1", "bolt"), ("grpc.v1", "mounts")]).await?;
        LeasesClient::new(conn(&daemon, None).await?)
            .create(CreateRequest { id: "l".into(), ..Default::default() })
            .await?;
        let mut mounts = MountsClient::new(conn(&daemon, Some("l")).await?);
        let plain = mounts.activate(activate("m", vec![tmpfs()], false)).await;
        refused(plain, Code::Unimplemented, "not implemented");
        let info = mounts.activate(activate("m", vec![tmpfs()], true)).await?.into_inner().info;
        let info = info.context("no activation")?;
        ensure!(info.labels["k"] == "v" && info.active.len() == 1 && info.system.len() == 1, "{info:?}");
        let point = info.active[0].mount_point.clone();
        ensure!(info.system[0].source == point && info.system[0].r#type == "bind", "{info:?}");
        std::fs::write(format!("{point}/mark"), "x")?;
        let again = mounts.activate(activate("m", vec![tmpfs()], true)).await;
        refused(again, Code::AlreadyExists, "mount \"m\": already exists");
        let update = mounts.update(wire::UpdateRequest::default()).await;
        refused(update, Code::Unimplemented, "not implemented");
        anyhow::Ok(point)
    })?;
    daemon.stop(Signal::SIGKILL)?;
    ensure!(std::fs::read_to_string(format!("{point}/mark"))? == "x");
    daemon.restart()?;
    runtime.block_on(async {
        let mut mounts = MountsClient::new(conn(&daemon, None).await?);
        let info = mounts.info(wire::InfoRequest { name: "m".into() }).await?.into_inner().info;
        ensure!(info.context("no activation")?.active[0].mount_point == point);
        let mut list = mounts.list(wire::ListRequest::default()).await?.into_inner();
        ensure!(list.message().await?.and_then(|message| message.info).is_some_and(|info| info.name == "m"));
        ensure!(list.message().await?.is_none());

        // Without a lease it is the caller's to deactivate.
        mounts.activate(activate("own", vec![tmpfs()], true)).await?;
        mounts.deactivate(wire::DeactivateRequest { name: "own".into() }).await?;
        let again = mounts.deactivate(wire::DeactivateRequest { name: "own".into() }).await;
        refused(again, Code::NotFound, "mount \"own\": not found");

        let delete = DeleteRequest { id: "l".into(), sync: true };
        LeasesClient::new(conn(&daemon, None).await?).delete(delete).await?;
        let gone = mounts.info(wire::InfoRequest { name: "m".into() }).await;
        refused(gone, Code::NotFound, "mount \"m\": not found");
        anyhow::Ok(())
    })?;
    let left = Census::take(&daemon.path("")).since(&census);
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}
