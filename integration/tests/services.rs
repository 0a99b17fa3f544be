//! The services beside the life of a container, as their clients see them on the socket.

mod archives;
mod configuration;
mod letter;
mod metrics;
mod mounts;
mod restart;
mod rootfs;
mod sandboxes;
mod streaming;
mod transfer;

use anyhow::Result;
use davit_integration::Daemon;
use davit_integration::client::{Conn, InNamespace, connect};
use davit_proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use davit_proto::containerd::services::introspection::v1::{Plugin, PluginsRequest};
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Status};

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

/// A connection in the daemon's namespace.
async fn conn(daemon: &Daemon, lease: Option<&str>) -> Result<Conn> {
    let channel = connect(&daemon.address()).await?;
    Ok(InterceptedService::new(channel, InNamespace::new(&daemon.namespace(), lease)?))
}

/// The entries of the plugin list with these types and ids, which must all be there and work.
async fn plugins(daemon: &Daemon, names: &[(&str, &str)]) -> Result<Vec<Plugin>> {
    let mut introspection = IntrospectionClient::new(connect(&daemon.address()).await?);
    let mut found = Vec::new();
    for (kind, id) in names {
        let filters = vec![format!("type==io.containerd.{kind}, id=={id}")];
        let plugins = introspection.plugins(PluginsRequest { filters }).await?.into_inner().plugins;
        let [plugin] = plugins.as_slice() else { anyhow::bail!("{} of {kind} {id}", plugins.len()) };
        anyhow::ensure!(plugin.init_err.is_none(), "{plugin:?}");
        found.push(plugin.clone());
    }
    Ok(found)
}

/// Checks the code and the text of a refused call.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, text: &str) {
    let status = result.expect_err("the call should be refused");
    assert_eq!((status.code(), status.message()), (code, text));
}
