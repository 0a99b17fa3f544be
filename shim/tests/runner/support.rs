//! A daemon of a few lines: bundles, the start of a shim, a blocking ttrpc client, and a receiver of events.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use davit_model::Any;
use davit_proto::any;
use davit_proto::containerd::events::{TaskExecStarted, TaskExit, TaskStart};
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use davit_proto::containerd::task::v3::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse,
    ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, WaitRequest, WaitResponse,
};
use davit_proto::containerd::types::{Envelope, Mount};
use davit_shim_protocol::address;
use davit_shim_protocol::bootstrap::{Generation, RUNC_OPTIONS, StartInput, StartResult};
use davit_shim_protocol::frame::{self, Decoder, Received, RpcError};
use prost::Message;

pub(crate) const NAMESPACE: &str = "shimtest";
/// The service of most calls.
pub(crate) const TASK: &str = "containerd.task.v3.Task";
/// Longer than anything takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-davit-v2");

/// Says so and returns true if the test cannot run here.
pub(crate) fn cannot_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    !root
}

/// Waits until `holds`, and fails after [`PATIENCE`].
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The processes that a shim has not buried, dead or alive.
pub(crate) fn children(shim: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Opens a FIFO for reading, whether there is a writer or not.
pub(crate) fn reader(path: &str) -> File {
    File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path).unwrap()
}

/// A folder for a test, with a root filesystem in it, and what runs in it: on drop everything is cleaned up.
pub(crate) struct Host {
    folder: tempfile::TempDir,
    unique: String,
    shims: Mutex<Vec<u32>>,
    ids: Mutex<Vec<String>>,
}

impl Host {
    pub(crate) fn new() -> Host {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let folder = tempfile::Builder::new().prefix("shim").tempdir().unwrap();
        let root = folder.path().join("image");
        for name in ["bin", "proc", "dev", "sys", "tmp", "host"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in
            ["sh", "echo", "cat", "sleep", "true", "false", "head", "tail", "tty", "stty", "yes", "dd"]
        {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        let unique = format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        Host { folder, unique, shims: Mutex::default(), ids: Mutex::default() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An id that no other test has.
    pub(crate) fn id(&self, name: &str) -> String {
        let id = format!("{name}-{}", self.unique);
        self.ids.lock().unwrap().push(id.clone());
        id
    }

    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    /// An executable script.
    pub(crate) fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A bundle whose init runs a shell script. `change` may edit `config.json`.
    pub(crate) fn bundle(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Bundle {
        let id = self.id(name);
        let path = self.path("bundles").join(&id);
        std::fs::create_dir_all(&path).unwrap();
        let mut config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/",
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
                {"destination": "/host", "type": "bind", "source": self.folder.path(), "options": ["rbind", "rw"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{id}"),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            },
        });
        change(&mut config);
        std::fs::write(path.join("config.json"), config.to_string()).unwrap();
        Bundle { id, path }
    }

    pub(crate) fn options(&self) -> Options {
        Options { root: self.path("runc").display().to_string(), ..Options::default() }
    }

    /// What a daemon of this generation tells a shim that it starts.
    pub(crate) fn start_input(&self, generation: Generation) -> StartInput {
        let grpc_address = self.path("c.sock").display().to_string();
        StartInput {
            generation,
            options: Some(Any { type_url: RUNC_OPTIONS.to_owned(), value: self.options().encode_to_vec() }),
            debug: true,
            ttrpc_address: format!("{grpc_address}.ttrpc"),
            grpc_address,
            socket_dir: Some(self.path("s")),
        }
    }

    /// Runs `start` in a bundle, as a daemon of this generation does. Returns what was printed.
    pub(crate) fn run_start(&self, bundle: &Bundle, generation: Generation) -> Vec<u8> {
        let output = self.try_start(bundle, &self.start_input(generation), Command::new(SHIM));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        output.stdout
    }

    /// Runs `start` by a command whose last word so far is the shim, whatever comes of it.
    pub(crate) fn try_start(&self, bundle: &Bundle, input: &StartInput, mut command: Command) -> Output {
        let grpc_address = &input.grpc_address;
        command
            .args(["-namespace", NAMESPACE, "-address", grpc_address, "-publish-binary", "/bin/true"])
            .args(["-id", &bundle.id, "start"])
            .current_dir(&bundle.path)
            .env("TTRPC_ADDRESS", &input.ttrpc_address)
            .env("MAX_SHIM_VERSION", "2")
            .env_remove("GRPC_ADDRESS")
            .env_remove("NAMESPACE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if input.generation != Generation::Plain {
            command.env("GRPC_ADDRESS", grpc_address).env("NAMESPACE", NAMESPACE);
        }
        let mut child = command.spawn().unwrap();
        let stdin = input.encode(&bundle.id, NAMESPACE, "2.3.4", "/bin/true");
        child.stdin.take().unwrap().write_all(&stdin).unwrap();
        // Returns only when nobody has the pipes any more: the serving process must not.
        child.wait_with_output().unwrap()
    }

    /// Starts a shim and connects to it.
    pub(crate) fn start(&self, bundle: &Bundle) -> Client {
        self.connect_to(bundle, &self.run_start(bundle, Generation::Bootstrap))
    }

    /// The same by the words of a shell before the shim, which are the surroundings that a daemon gives it.
    pub(crate) fn start_in(&self, bundle: &Bundle, surroundings: &str) -> Client {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("{surroundings}; exec \"$0\" \"$@\""), SHIM]);
        let output = self.try_start(bundle, &self.start_input(Generation::Bootstrap), command);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.connect_to(bundle, &output.stdout)
    }

    fn connect_to(&self, bundle: &Bundle, printed: &[u8]) -> Client {
        let result = StartResult::parse(printed).unwrap();
        let client = Client::connect(&address::parse(&result.address).unwrap());
        let connected = client.connect_call(&bundle.id);
        self.shims.lock().unwrap().push(connected.shim_pid);
        client
    }

    /// A request that creates the bundle's container, its root filesystem being mounted from the image.
    pub(crate) fn create_request(&self, bundle: &Bundle) -> CreateTaskRequest {
        CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs: vec![Mount {
                r#type: "bind".to_owned(),
                source: self.path("image").display().to_string(),
                target: String::new(),
                options: vec!["rbind".to_owned(), "ro".to_owned()],
            }],
            options: Some(any::pack(&self.options())),
            ..CreateTaskRequest::default()
        }
    }

    /// The same by another runtime.
    pub(crate) fn create_request_by(&self, bundle: &Bundle, runtime: &Path) -> CreateTaskRequest {
        let options = Options { binary_name: runtime.display().to_string(), ..self.options() };
        CreateTaskRequest { options: Some(any::pack(&options)), ..self.create_request(bundle) }
    }

    /// Starts a shim, and in it the container that the request describes.
    pub(crate) fn launch(&self, bundle: &Bundle, request: &CreateTaskRequest) -> Client {
        let client = self.start(bundle);
        client.create(request).unwrap();
        client.start(&bundle.id, "").unwrap();
        client
    }

    /// Starts a receiver of events where shims of this host send them.
    pub(crate) fn receive_events(&self) -> Receiver {
        Receiver::listen(&self.path("c.sock.ttrpc"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for id in self.ids.lock().unwrap().iter() {
            let root = self.path("runc").join(NAMESPACE);
            let _ = Command::new("runc")
                .arg("--root")
                .arg(root)
                .args(["delete", "--force", id])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            let _ = davit_sys::mount::unmount_all(&self.path("bundles").join(id).join("rootfs"));
        }
        for pid in self.shims.lock().unwrap().iter() {
            let pid = nix::unistd::Pid::from_raw(*pid as i32);
            // Only if it is still ours: a pid may have been given to somebody else.
            let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            if exe.to_string_lossy().contains("containerd-shim-davit-v2") {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}

/// A container that is to be.
pub(crate) struct Bundle {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
}

/// A connection to a shim.
pub(crate) struct Client {
    path: PathBuf,
    inner: Mutex<Connection>,
}

struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    /// The number of the next call.
    next: u32,
    /// Answers that nobody has asked for yet.
    answers: BTreeMap<u32, Vec<u8>>,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let inner = Connection { stream, decoder: Decoder::new(), next: 1, answers: BTreeMap::new() };
        Client { path: path.to_owned(), inner: Mutex::new(inner) }
    }

    /// Another connection to the same shim.
    pub(crate) fn again(&self) -> Client {
        Client::connect(&self.path)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.path
    }

    /// Calls a method of the service in this version.
    pub(crate) fn call_version<R: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &impl Message,
        timeout: Option<Duration>,
    ) -> Result<R, RpcError> {
        let number = self.send(service, method, request, timeout);
        self.receive(number)
    }

    /// Begins a call, and gives its number for [`Client::receive`].
    pub(crate) fn send(
        &self,
        service: &str,
        method: &str,
        request: &impl Message,
        timeout: Option<Duration>,
    ) -> u32 {
        let connection = &mut *self.inner.lock().unwrap();
        let number = connection.next;
        connection.next += 2;
        let request = frame::request(service, method, request.encode_to_vec(), timeout, &[]);
        connection.stream.write_all(&frame::encode_request(number, &request).unwrap()).unwrap();
        number
    }

    /// The answer to a call.
    pub(crate) fn receive<R: Message + Default>(&self, number: u32) -> Result<R, RpcError> {
        let connection = &mut *self.inner.lock().unwrap();
        let mut buffer = [0; 4096];
        loop {
            if let Some(answer) = connection.answers.remove(&number) {
                return frame::decode_response(&answer).map(|reply| R::decode(&*reply).unwrap());
            }
            if let Some(received) = connection.decoder.next_frame() {
                let Received::Frame(frame) = received else { panic!("{received:?}") };
                connection.answers.insert(frame.stream, frame.payload);
                continue;
            }
            let count =
                connection.stream.read(&mut buffer).unwrap_or_else(|error| panic!("{number}: {error}"));
            assert_ne!(count, 0, "call {number}: the shim closed the connection");
            connection.decoder.feed(&buffer[..count]);
        }
    }

    pub(crate) fn call<R: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<R, RpcError> {
        self.call_version(TASK, method, request, None)
    }

    /// A call that replies with nothing.
    pub(crate) fn act(&self, method: &str, request: &impl Message) -> Result<(), RpcError> {
        self.call::<()>(method, request)
    }

    pub(crate) fn create(&self, request: &CreateTaskRequest) -> Result<u32, RpcError> {
        self.call::<CreateTaskResponse>("Create", request).map(|reply| reply.pid)
    }

    pub(crate) fn start(&self, id: &str, exec_id: &str) -> Result<u32, RpcError> {
        let request = StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        self.call::<StartResponse>("Start", &request).map(|reply| reply.pid)
    }

    pub(crate) fn state(&self, id: &str, exec_id: &str) -> Result<StateResponse, RpcError> {
        self.call("State", &StateRequest { id: id.to_owned(), exec_id: exec_id.to_owned() })
    }

    pub(crate) fn wait(&self, id: &str, exec_id: &str) -> Result<WaitResponse, RpcError> {
        self.call("Wait", &WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned() })
    }

    pub(crate) fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Result<(), RpcError> {
        let request = KillRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), signal, all: false };
        self.act("Kill", &request)
    }

    pub(crate) fn delete(&self, id: &str, exec_id: &str) -> Result<DeleteResponse, RpcError> {
        self.call("Delete", &DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned() })
    }

    pub(crate) fn connect_call(&self, id: &str) -> ConnectResponse {
        self.call("Connect", &ConnectRequest { id: id.to_owned() }).unwrap()
    }

    /// A request that runs a shell script in the container.
    pub(crate) fn exec_request(id: &str, exec_id: &str, script: &str) -> ExecProcessRequest {
        let process = serde_json::json!({
            "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        });
        ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            spec: Some(prost_types::Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.to_string().into_bytes(),
            }),
            ..ExecProcessRequest::default()
        }
    }

    pub(crate) fn exec(&self, id: &str, exec_id: &str, script: &str) -> Result<(), RpcError> {
        self.act("Exec", &Client::exec_request(id, exec_id, script))
    }

    /// Kills a container if it lives, deletes it, and asks the shim to end.
    pub(crate) fn finish(&self, id: &str) {
        let _ = self.kill(id, "", 9);
        self.wait(id, "").unwrap();
        self.delete(id, "").unwrap();
        self.shutdown();
    }

    pub(crate) fn shutdown(&self) {
        self.act("Shutdown", &ShutdownRequest::default()).unwrap();
    }
}

/// A receiver of events. While it is stopped nobody listens at its address.
pub(crate) struct Receiver {
    received: Arc<Mutex<Vec<Envelope>>>,
    stop: Arc<AtomicBool>,
    path: PathBuf,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Receiver {
    fn listen(path: &Path) -> Receiver {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (sink, stopped) = (received.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                serve_events(stream.unwrap(), &sink, &stopped);
            }
        });
        Receiver { received, stop, path: path.to_owned(), thread: Some(thread) }
    }

    pub(crate) fn envelopes(&self) -> Vec<Envelope> {
        self.received.lock().unwrap().clone()
    }

    /// What has been received, each as its topic and what tells it from others of the topic.
    pub(crate) fn list(&self) -> Vec<String> {
        self.envelopes().iter().map(describe).collect()
    }

    /// Waits until the last event received is `last`, and returns all.
    #[track_caller]
    pub(crate) fn until(&self, last: &str) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        while !self.list().iter().any(|event| event == last) {
            assert!(Instant::now() < deadline, "no {last} in {:?}", self.list());
            std::thread::sleep(Duration::from_millis(2));
        }
        self.list()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.path);
        self.thread.take().unwrap().join().unwrap();
        let _ = std::fs::remove_file(&self.path);
    }
}

fn serve_events(mut stream: UnixStream, sink: &Mutex<Vec<Envelope>>, stopped: &AtomicBool) {
    stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let mut decoder = Decoder::new();
    let mut buffer = [0; 4096];
    while !stopped.load(Ordering::SeqCst) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => decoder.feed(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        }
        while let Some(Received::Frame(frame)) = decoder.next_frame() {
            let request = frame::decode_request(&frame.payload).unwrap();
            assert_eq!(request.service, "containerd.services.events.ttrpc.v1.Events");
            assert_eq!(request.method, "Forward");
            assert_eq!(frame::metadata(&request, frame::NAMESPACE_KEY), Some(NAMESPACE));
            let forwarded = ForwardRequest::decode(&*request.payload).unwrap();
            sink.lock().unwrap().push(forwarded.envelope.unwrap());
            let _ = stream.write_all(&frame::encode_response(frame.stream, &Ok(Vec::new())));
        }
    }
}

/// `topic` or `topic exec-id` or `topic id status`, ids without the unique part.
fn describe(envelope: &Envelope) -> String {
    let short = |id: &str| id.split('-').next().unwrap().to_owned();
    let event = envelope.event.as_ref().unwrap();
    let topic = envelope.topic.strip_prefix("/tasks/").unwrap();
    assert_eq!(envelope.namespace, NAMESPACE);
    if let Some(exit) = any::unpack::<TaskExit>(event).unwrap() {
        return format!("{topic} {} {}", short(&exit.id), exit.exit_status);
    }
    if let Some(started) = any::unpack::<TaskExecStarted>(event).unwrap() {
        return format!("{topic} {}", short(&started.exec_id));
    }
    if let Some(started) = any::unpack::<TaskStart>(event).unwrap() {
        return format!("{topic} {}", short(&started.container_id));
    }
    topic.to_owned()
}
