//! The Introspection service: what this daemon is and what it has.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use davit_model::{ErrorCode, Filter};
use davit_oci::platform;
use davit_proto::any;
use davit_proto::containerd::services::introspection::v1 as wire;
use davit_proto::containerd::services::introspection::v1::introspection_server::Introspection;
use davit_proto::containerd::types::{Platform, RuntimeInfo, RuntimeRequest};
use davit_proto::google::rpc;
use prost::Name;
use prost_types::Any;
use tonic::{Request, Response, Status};

use super::convert::any_from_wire;
use super::status::{from, invalid, status, unimplemented};
use crate::plugins::Plugin;
use crate::runtime::Tasks;

/// The plugin that stands for the runtime: type and id.
const RUNTIME: (&str, &str) = ("io.containerd.runtime.v2", "task");

/// Serves the plugin list and the identity of the daemon.
pub struct IntrospectionService {
    plugins: Arc<[Plugin]>,
    tasks: Tasks,
    uuid: String,
}

impl IntrospectionService {
    /// The service; the daemon's identity is read from `folder`, or made there on the first start.
    ///
    /// # Errors
    /// The file of the identity can be neither read nor written.
    pub fn open(folder: &Path, plugins: Arc<[Plugin]>, tasks: Tasks) -> io::Result<IntrospectionService> {
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
        Ok(IntrospectionService { plugins, tasks, uuid })
    }

    /// What a plugin tells when it is asked with `options`. Only the runtime tells anything: what the shim and the OCI
    /// runtime that a [`RuntimeRequest`] names can do.
    async fn extra(&self, plugin: &Plugin, options: Any) -> Result<Any, Status> {
        if plugin.init_error.is_some() {
            let text = "cannot get extra info, plugin not successfully loaded: failed precondition";
            return Err(status(ErrorCode::FailedPrecondition, text));
        }
        if (plugin.kind.as_str(), plugin.id.as_str()) != RUNTIME {
            return Err(unimplemented("plugin does not provide extra information"));
        }
        let request = any::unpack::<RuntimeRequest>(&options).map_err(invalid)?;
        let Some(request) = request else {
            return Err(unimplemented(&format!("unknown request type {}", options.type_url)));
        };
        let options = request.options.map(any_from_wire);
        let info = self.tasks.runtime_info(&request.runtime_path, options).await.map_err(from)?;
        // As the shim wrote it: fields of a later release reach the client.
        Ok(Any { type_url: RuntimeInfo::full_name(), value: info })
    }
}

fn to_wire(plugin: &Plugin) -> wire::Plugin {
    let platform = |platform: &platform::Platform| Platform {
        os: platform.os.clone(),
        architecture: platform.architecture.clone(),
        variant: platform.variant.clone(),
        ..Platform::default()
    };
    wire::Plugin {
        r#type: plugin.kind.clone(),
        id: plugin.id.clone(),
        requires: plugin.requires.clone(),
        platforms: plugin.platform.iter().map(platform).collect(),
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
        request: Request<wire::PluginInfoRequest>,
    ) -> Result<Response<wire::PluginInfoResponse>, Status> {
        let wire::PluginInfoRequest { r#type, id, options } = request.into_inner();
        let found = self.plugins.iter().find(|plugin| plugin.kind == r#type && plugin.id == id);
        let plugin = found.ok_or_else(|| {
            status(ErrorCode::NotFound, &format!("plugin {type}.{id} not found: not found"))
        })?;
        let extra = match options {
            Some(options) => Some(self.extra(plugin, options).await?),
            None => None,
        };
        Ok(Response::new(wire::PluginInfoResponse { plugin: Some(to_wire(plugin)), extra }))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use prost::Message as _;

    use tonic::Code;

    use super::*;
    use crate::events::Hub;
    use crate::plugins::{self, SnapshotterEntry};
    use crate::runtime;

    const OVERLAYFS: (&str, &str) = ("io.containerd.snapshotter.v1", "overlayfs");

    fn service(folder: &Path) -> IntrospectionService {
        let tasks =
            Tasks::open(runtime::Config::of_test(folder), Hub::new(crate::grpc::notice::READING)).unwrap();
        let broken = SnapshotterEntry { name: OVERLAYFS.1.into(), state: Err("no".into()) };
        let plugins = plugins::list("/r", "/l", true, vec![broken]);
        IntrospectionService::open(folder, plugins.into(), tasks).unwrap()
    }

    async fn ask(
        service: &IntrospectionService,
        (kind, id): (&str, &str),
        options: Option<Any>,
    ) -> Result<wire::PluginInfoResponse, Status> {
        let request = wire::PluginInfoRequest { r#type: kind.into(), id: id.into(), options };
        service.plugin_info(Request::new(request)).await.map(Response::into_inner)
    }

    #[tokio::test]
    async fn the_runtime_says_what_it_can_do() {
        let folder = tempfile::tempdir().unwrap();
        let service = service(folder.path());
        // A shim that gives its name, and then what it was given.
        let (text, shim) = (folder.path().join("text"), folder.path().join("shim"));
        fs::write(&text, "#!/bin/sh\n[ \"$*\" = -info ] || exit 1\nprintf '\\n\\004shim'\ncat\n").unwrap();
        // By another process: no child of a test beside this one has it open for writing, which would be ETXTBSY.
        let installed = Command::new("install").args(["-m", "0700"]).args([&text, &shim]).status().unwrap();
        assert!(installed.success());
        let options = Any { type_url: "x".into(), value: Vec::new() };
        let mut request = RuntimeRequest { runtime_path: shim.display().to_string(), options: None };
        let answer = ask(&service, RUNTIME, Some(any::pack(&request))).await.unwrap();
        assert_eq!(answer.plugin.unwrap().exports["logs"], "/l");
        let info: RuntimeInfo = any::unpack(&answer.extra.unwrap()).unwrap().unwrap();
        assert_eq!(info.name, "shim");
        request.options = Some(options);
        let answer = ask(&service, RUNTIME, Some(any::pack(&request))).await.unwrap();
        // The type of the options is field 1 as well, and the last one wins.
        let info: RuntimeInfo = any::unpack(&answer.extra.unwrap()).unwrap().unwrap();
        assert_eq!(info.name, "x");
    }

    #[tokio::test]
    async fn a_shim_says_which_mounts_it_accepts() {
        let folder = tempfile::tempdir().unwrap();
        let service = service(folder.path());
        let path = |name: &str| folder.path().join(name);
        let annotations =
            [("containerd.io/runtime-allow-mounts".to_owned(), "format/*,erofs".to_owned())].into();
        let info = RuntimeInfo { annotations, ..RuntimeInfo::default() };
        fs::write(path("info"), info.encode_to_vec()).unwrap();
        fs::write(path("text"), format!("#!/bin/sh\ncat {}\n", path("info").display())).unwrap();
        let installed =
            Command::new("install").args(["-m", "0700"]).args([path("text"), path("shim")]).status().unwrap();
        assert!(installed.success());
        let accepted = service.tasks.accepted_mounts(&path("shim").display().to_string()).await;
        assert_eq!(accepted, ["format/*", "erofs"]);
        assert!(service.tasks.accepted_mounts("/no/such/shim").await.is_empty());
    }

    #[tokio::test]
    async fn others_say_nothing_or_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let service = service(folder.path());
        let request = |path: &str| {
            let request = RuntimeRequest { runtime_path: path.into(), options: None };
            Some(any::pack(&request))
        };
        let refused = async |plugin, options| ask(&service, plugin, options).await.unwrap_err();
        let error = refused(("io.containerd.x.v1", "y"), None).await;
        assert_eq!(
            (error.code(), error.message()),
            (Code::NotFound, "plugin io.containerd.x.v1.y not found: not found")
        );
        assert!(ask(&service, RUNTIME, None).await.unwrap().extra.is_none());
        assert!(ask(&service, OVERLAYFS, None).await.unwrap().plugin.unwrap().init_err.is_some());
        let code = async |plugin, options| refused(plugin, options).await.code();
        assert_eq!(code(OVERLAYFS, request("x")).await, Code::FailedPrecondition);
        assert_eq!(code(("io.containerd.gc.v1", "scheduler"), request("x")).await, Code::Unimplemented);
        assert_eq!(code(RUNTIME, Some(Any::default())).await, Code::Unimplemented);
        assert_eq!(code(RUNTIME, request("/no/such/shim")).await, Code::InvalidArgument);
        let broken = Any { value: vec![0xff], ..request("x").unwrap() };
        assert_eq!(code(RUNTIME, Some(broken)).await, Code::InvalidArgument);
    }
}
