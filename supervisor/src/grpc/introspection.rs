//! The Introspection service: what this daemon is and what it has.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use davit_model::{ErrorCode, Filter};
use davit_proto::containerd::services::introspection::v1 as wire;
use davit_proto::containerd::services::introspection::v1::introspection_server::Introspection;
use davit_proto::containerd::types::Platform;
use davit_proto::google::rpc;
use tonic::{Request, Response, Status};

use super::status::{invalid, unimplemented};
use crate::plugins::Plugin;

/// Serves the plugin list and the identity of the daemon.
#[derive(Debug)]
pub struct IntrospectionService {
    plugins: Arc<[Plugin]>,
    uuid: String,
}

impl IntrospectionService {
    /// The service; the daemon's identity is read from `folder`, or made there on the first start.
    ///
    /// # Errors
    /// The file of the identity can be neither read nor written.
    pub fn open(folder: &Path, plugins: Arc<[Plugin]>) -> io::Result<IntrospectionService> {
        let path = folder.join("uuid");
        let uuid = match fs::read_to_string(&path) {
            Ok(uuid) if !uuid.trim().is_empty() => uuid.trim().to_owned(),
            _ => {
                // random(4): each read gives a new version 4 UUID.
                let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
                fs::write(&path, &uuid)?;
                uuid
            }
        };
        Ok(IntrospectionService { plugins, uuid })
    }
}

/// The name that Go, and so the wire, has for the architecture of this machine.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn to_wire(plugin: &Plugin) -> wire::Plugin {
    let platform =
        Platform { os: "linux".into(), architecture: architecture().into(), ..Platform::default() };
    wire::Plugin {
        r#type: plugin.kind.clone(),
        id: plugin.id.clone(),
        requires: plugin.requires.clone(),
        platforms: if plugin.on_platform { vec![platform] } else { Vec::new() },
        exports: plugin.exports.clone(),
        capabilities: plugin.capabilities.clone(),
        init_err: plugin.init_error.as_ref().map(|text| rpc::Status {
            code: ErrorCode::FailedPrecondition.number(),
            message: text.clone(),
            details: Vec::new(),
        }),
    }
}

#[tonic::async_trait]
impl Introspection for IntrospectionService {
    async fn plugins(
        &self,
        request: Request<wire::PluginsRequest>,
    ) -> Result<Response<wire::PluginsResponse>, Status> {
        let filter = Filter::parse(&request.into_inner().filters).map_err(invalid)?;
        let plugins = self.plugins.iter().filter(|plugin| filter.matches(*plugin)).map(to_wire).collect();
        Ok(Response::new(wire::PluginsResponse { plugins }))
    }

    async fn server(&self, _: Request<()>) -> Result<Response<wire::ServerResponse>, Status> {
        let pidns = fs::metadata("/proc/self/ns/pid").map_or(0, |metadata| metadata.ino());
        Ok(Response::new(wire::ServerResponse {
            uuid: self.uuid.clone(),
            pid: u64::from(std::process::id()),
            pidns,
            deprecations: Vec::new(),
        }))
    }

    async fn plugin_info(
        &self,
        _: Request<wire::PluginInfoRequest>,
    ) -> Result<Response<wire::PluginInfoResponse>, Status> {
        Err(unimplemented("plugin info"))
    }
}
