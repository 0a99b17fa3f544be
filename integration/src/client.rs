//! A plain gRPC client of a daemon, ours or another, and the short life of one container through it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use davit_proto::containerd::services::containers::v1::container::Runtime;
use davit_proto::containerd::services::containers::v1::containers_client::ContainersClient;
use davit_proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest,
};
use davit_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use davit_proto::containerd::services::snapshots::v1::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use davit_proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use davit_proto::containerd::services::tasks::v1::{
    CreateTaskRequest, DeleteTaskRequest, KillRequest, StartRequest, WaitRequest,
};
use serde_json::json;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// Puts the namespace, and the lease if there is one, into every call.
#[derive(Clone)]
pub struct InNamespace {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl InNamespace {
    /// Calls in `namespace`; what they make is kept by `lease`.
    ///
    /// # Errors
    /// A name that no header can hold.
    pub fn new(namespace: &str, lease: Option<&str>) -> Result<InNamespace> {
        Ok(InNamespace { namespace: namespace.parse()?, lease: lease.map(str::parse).transpose()? })
    }
}

impl Interceptor for InNamespace {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

/// A channel whose calls are in a namespace.
pub type Conn = InterceptedService<Channel, InNamespace>;

/// A connection to a daemon in one namespace.
#[derive(Clone)]
pub struct Client {
    /// The Containers service.
    pub containers: ContainersClient<Conn>,
    /// The Snapshots service.
    pub snapshots: SnapshotsClient<Conn>,
    /// The Tasks service.
    pub tasks: TasksClient<Conn>,
    /// How long each kind of call took, in the order of the calls.
    pub laps: BTreeMap<&'static str, Vec<Duration>>,
    /// The runtime of the containers to come; at first containerd's default.
    pub runtime: String,
    /// The annotations of the specs of the containers to come.
    pub annotations: BTreeMap<String, String>,
    /// Where their standard error goes; at first nowhere.
    pub stderr: String,
    namespace: String,
}

/// A channel to the daemon on a unix socket.
///
/// # Errors
/// Nobody answers.
pub async fn connect(socket: &Path) -> Result<Channel> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("no daemon on {}", socket.display()))
}

impl Client {
    /// Connects to the daemon on `socket`.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn new(socket: &Path, namespace: &str) -> Result<Client> {
        let conn = InterceptedService::new(connect(socket).await?, InNamespace::new(namespace, None)?);
        Ok(Client {
            containers: ContainersClient::new(conn.clone()),
            snapshots: SnapshotsClient::new(conn.clone()),
            tasks: TasksClient::new(conn),
            runtime: "io.containerd.runc.v2".into(),
            laps: BTreeMap::new(),
            annotations: BTreeMap::new(),
            stderr: String::new(),
            namespace: namespace.to_owned(),
        })
    }

    /// Creates a container on the snapshot `parent` of overlayfs and starts `args` in it, with nothing on its stdio.
    ///
    /// # Errors
    /// The daemon refuses a step.
    pub async fn start(&mut self, id: &str, parent: &str, args: &[&str]) -> Result<u32> {
        self.start_on(id, parent, args, "", "").await
    }

    /// The same, with a FIFO or a URI for its standard output.
    ///
    /// # Errors
    /// The daemon refuses a step.
    pub async fn start_writing(
        &mut self,
        id: &str,
        parent: &str,
        args: &[&str],
        stdout: &str,
    ) -> Result<u32> {
        self.start_on(id, parent, args, "", stdout).await
    }

    /// The same, with a FIFO for its standard input as well.
    ///
    /// # Errors
    /// The daemon refuses a step.
    pub async fn start_on(
        &mut self,
        id: &str,
        parent: &str,
        args: &[&str],
        stdin: &str,
        stdout: &str,
    ) -> Result<u32> {
        // The container first: its record keeps the snapshot, which without one, or a lease, is garbage.
        let mut spec = spec(&format!("/{}/{id}", self.namespace), args);
        if !self.annotations.is_empty() {
            spec["annotations"] = json!(self.annotations);
        }
        let container = Container {
            id: id.into(),
            runtime: Some(Runtime { name: self.runtime.clone(), options: None }),
            spec: Some(prost_types::Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                value: serde_json::to_vec(&spec)?,
            }),
            snapshotter: "overlayfs".into(),
            snapshot_key: id.into(),
            ..Default::default()
        };
        let begun = Instant::now();
        self.containers.create(CreateContainerRequest { container: Some(container) }).await?;
        self.lap("Containers.Create", begun);
        let begun = Instant::now();
        let prepared = self
            .snapshots
            .prepare(PrepareSnapshotRequest {
                snapshotter: "overlayfs".into(),
                key: id.into(),
                parent: parent.into(),
                ..Default::default()
            })
            .await?
            .into_inner();
        self.lap("Snapshots.Prepare", begun);
        let request = CreateTaskRequest {
            container_id: id.into(),
            rootfs: prepared.mounts,
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: self.stderr.clone(),
            ..Default::default()
        };
        let begun = Instant::now();
        self.tasks.create(request).await?;
        let begun = self.lap("Tasks.Create", begun);
        let request = StartRequest { container_id: id.into(), ..Default::default() };
        let pid = self.tasks.start(request).await?.into_inner().pid;
        self.lap("Tasks.Start", begun);
        Ok(pid)
    }

    /// Waits for the end of a container and removes all of it; gives its exit status.
    ///
    /// # Errors
    /// The daemon refuses a step.
    pub async fn finish(&mut self, id: &str) -> Result<u32> {
        let begun = Instant::now();
        let wait = WaitRequest { container_id: id.into(), ..Default::default() };
        let status = self.tasks.wait(wait).await?.into_inner().exit_status;
        let begun = self.lap("Tasks.Wait", begun);
        self.tasks.delete(DeleteTaskRequest { container_id: id.into() }).await?;
        let begun = self.lap("Tasks.Delete", begun);
        // The snapshot first, as every client does: without its container it is garbage and may be gone at any moment.
        let remove = RemoveSnapshotRequest { snapshotter: "overlayfs".into(), key: id.into() };
        self.snapshots.remove(remove).await?;
        let begun = self.lap("Snapshots.Remove", begun);
        self.containers.delete(DeleteContainerRequest { id: id.into() }).await?;
        self.lap("Containers.Delete", begun);
        Ok(status)
    }

    /// Kills a container and removes all of it.
    ///
    /// # Errors
    /// The daemon refuses a step.
    pub async fn kill(&mut self, id: &str) -> Result<u32> {
        let kill = KillRequest { container_id: id.into(), signal: 9, all: true, ..Default::default() };
        self.tasks.kill(kill).await?;
        self.finish(id).await
    }

    /// Notes how long a call took; gives the time of its end.
    fn lap(&mut self, call: &'static str, begun: Instant) -> Instant {
        let now = Instant::now();
        self.laps.entry(call).or_default().push(now - begun);
        now
    }

    /// The time from the first call to the last of a container that ends at once.
    ///
    /// # Errors
    /// The daemon refuses a step, or the container fails.
    pub async fn run(&mut self, id: &str, parent: &str) -> Result<Duration> {
        let start = Instant::now();
        self.start(id, parent, &["/bin/true"]).await?;
        let status = self.finish(id).await?;
        ensure!(status == 0, "the container ended with {status}");
        Ok(start.elapsed())
    }
}

/// A small runtime spec: own namespaces, the usual mounts, a terminal-less process.
pub fn spec(cgroup: &str, args: &[&str]) -> serde_json::Value {
    let mount = |kind: &str, destination: &str, options: &[&str]| json!({ "type": kind, "source": kind, "destination": destination, "options": options });
    let namespaces: Vec<_> =
        ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({ "type": kind })).into_iter().collect();
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/bin:/usr/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs" },
        "mounts": [
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": { "cgroupsPath": cgroup, "namespaces": namespaces },
    })
}
