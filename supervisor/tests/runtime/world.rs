//! A daemon's runtime in a folder of its own, which can be stopped and started again, and a census of what is
//! left.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use davit_model::{Any, Filter, Mount};
use davit_proto::any;
use davit_proto::containerd::events::{TaskDelete, TaskExit};
use davit_proto::containerd::runc::v1::Options;
use davit_shim_protocol::address::{DEFAULT_SOCKET_DIR, socket_path};
use davit_supervisor::events::{Envelope, Hub, Subscription};
use davit_supervisor::grpc::notice;
use davit_supervisor::runtime::{
    Config, CreateOptions, Error, ExecOptions, Records, Status, Stdio, Tasks, Timeouts,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixListener;

/// What tests wait for at most; far more than it ever takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Debian's shim, as old as any that is still in use.
pub const GO_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

/// Our own shim, if it is built.
pub fn own_shim() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_BIN_EXE_davitd")).with_file_name("containerd-shim-davit-v2");
    built.exists().then_some(built)
}

/// One test's folder, namespace and shim.
pub struct World {
    pub folder: tempfile::TempDir,
    pub namespace: String,
    pub shim: PathBuf,
    pub timeouts: Timeouts,
    /// The names that shims' sockets are made of.
    groups: RefCell<BTreeSet<String>>,
}

/// True when containers can be run here; says so when not.
pub fn can_run(shim: &Path) -> bool {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: needs root");
        return false;
    }
    for needed in [shim, Path::new("/bin/busybox"), Path::new("/usr/sbin/runc")] {
        if !needed.exists() {
            eprintln!("skipped: needs {}", needed.display());
            return false;
        }
    }
    true
}

impl World {
    pub fn new(shim: &Path) -> World {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = tempfile::Builder::new().prefix("davit-runtime-").tempdir().unwrap();
        let rootfs = folder.path().join("busybox");
        for name in ["bin", "proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for name in ["sh", "sleep", "echo", "cat", "true"] {
            symlink("busybox", rootfs.join("bin").join(name)).unwrap();
        }
        let namespace = format!("test-{}-{number}", std::process::id());
        let (shim, groups) = (shim.to_owned(), RefCell::default());
        World { folder, namespace, shim, timeouts: Timeouts::default(), groups }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn config(&self) -> Config {
        let address = self.path("d.sock").display().to_string();
        Config {
            root: self.path("root"),
            state: self.path("state"),
            ttrpc_address: format!("{address}.ttrpc"),
            grpc_address: address,
            daemon_binary: PathBuf::from("/bin/true"),
            shim_directory: self.path("bin"),
            default_shim: Some(self.shim.clone()),
            default_runtime_binary: None,
            socket_directory: None,
            environment: Vec::new(),
            debug: false,
            timeouts: self.timeouts,
        }
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.path("state").join(&self.namespace).join(id)
    }

    /// A daemon that has not looked for shims.
    pub fn daemon(&self) -> Daemon {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let config = self.config();
        let socket = PathBuf::from(&config.ttrpc_address);
        let hub = Hub::new(notice::READING);
        let subscription = hub.subscribe(Filter::parse(&[]).unwrap());
        let events = Arc::new(Mutex::new(Collected { subscription, seen: Vec::new() }));
        let tasks = Tasks::open(config, hub).unwrap();
        let _ = fs::remove_file(&socket);
        let serving = tasks.clone();
        runtime.block_on(async {
            let listener = UnixListener::bind(&socket).unwrap();
            tokio::spawn(async move { serving.serve_events(listener).await });
        });
        Daemon { tasks, namespace: self.namespace.clone(), events, runtime: Some(runtime) }
    }

    /// A daemon that has found the shims of the one before.
    pub fn next_daemon(&self) -> Daemon {
        let daemon = self.daemon();
        daemon.block_on(async { daemon.tasks.load(every_record()).finished().await });
        daemon
    }

    /// A container that runs `script`.
    pub fn container(&self, id: &str, script: &str) -> CreateOptions {
        self.expect_group(id);
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
            },
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "cgroupsPath": format!("/{}-{id}", self.namespace),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}, {"type": "network"}],
            },
        });
        let options = Options { root: self.path("runc").display().to_string(), ..Options::default() };
        let options = any::pack(&options);
        CreateOptions {
            container_id: id.to_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                value: serde_json::to_vec(&spec).unwrap(),
            }),
            rootfs: vec![Mount {
                kind: "bind".into(),
                source: self.path("busybox").display().to_string(),
                target: String::new(),
                options: vec!["rbind".into(), "rw".into()],
            }],
            runtime: "io.containerd.runc.v2".into(),
            runtime_options: Some(Any { type_url: options.type_url, value: options.value }),
            ..CreateOptions::default()
        }
    }

    /// A shim may listen for a group of this name.
    pub fn expect_group(&self, name: &str) {
        self.groups.borrow_mut().insert(name.to_owned());
    }

    /// An exec that runs `script`.
    pub fn exec(&self, exec_id: &str, script: &str) -> ExecOptions {
        let process = serde_json::json!({
            "user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/",
        });
        ExecOptions {
            exec_id: exec_id.to_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: serde_json::to_vec(&process).unwrap(),
            }),
            stdio: Stdio::default(),
        }
    }

    /// The shims of this world, by their flags.
    pub fn shims(&self) -> Vec<Pid> {
        self.processes(|arguments| arguments.contains(&self.namespace))
    }

    /// The shims without what they have forked: a copy that unmounts outlives the answer of its shim, and what is to execute a
    /// runtime looks like its shim until it does.
    pub fn serving(&self) -> Vec<Pid> {
        let shims = self.shims();
        shims
            .iter()
            .copied()
            .filter(|pid| parent(*pid).is_some_and(|parent| !shims.contains(&parent)))
            .collect()
    }

    /// The shim of one container.
    pub fn shim_of(&self, id: &str) -> Pid {
        let named = self.processes(|arguments| arguments.contains(&self.namespace) && arguments.contains(id));
        let shims: Vec<Pid> = self.serving().into_iter().filter(|pid| named.contains(pid)).collect();
        assert_eq!(shims.len(), 1, "{shims:?}");
        shims[0]
    }

    fn processes(&self, wanted: impl Fn(&str) -> bool) -> Vec<Pid> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &i32| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            wanted(&String::from_utf8_lossy(&arguments).replace('\0', " "))
        })
        .map(Pid::from_raw)
        .collect()
    }

    /// What there is of this world on the host, in words.
    fn census(&self) -> Vec<String> {
        let mut found = Vec::new();
        for root in ["state", "root", "runc"] {
            let below = self.path(root).join(&self.namespace);
            let entries = fs::read_dir(&below).into_iter().flatten().flatten();
            found.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        found.extend(self.shims().into_iter().map(|pid| format!("process {pid}")));
        let address = self.config().grpc_address;
        for group in self.groups.borrow().iter() {
            let socket = socket_path(Path::new(DEFAULT_SOCKET_DIR), &address, &self.namespace, group);
            if socket.exists() {
                found.push(format!("socket {} of {group}", socket.display()));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let folder = self.folder.path().to_str().unwrap();
        found.extend(mounts.lines().filter(|line| line.contains(folder)).map(str::to_owned));
        for controllers in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let groups = fs::read_dir(controllers.path()).into_iter().flatten().flatten();
            let ours = groups.filter(|group| {
                group.file_name().to_string_lossy().starts_with(&format!("{}-", self.namespace))
            });
            found.extend(ours.map(|group| group.path().display().to_string()));
        }
        found
    }

    /// Waits until nothing of any container is left: bundles, work folders, runc's state, processes, mounts,
    /// cgroups.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        eventually("nothing is left", || {
            let found = self.census();
            if found.is_empty() { Ok(()) } else { Err(format!("{found:#?}")) }
        });
    }
}

impl Drop for World {
    /// A test that failed must not leave containers behind.
    fn drop(&mut self) {
        if self.census().is_empty() {
            return;
        }
        for pid in self.shims() {
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
        let daemon = self.daemon();
        daemon.block_on(async { daemon.tasks.load(every_record()).finished().await });
        let deadline = Instant::now() + PATIENCE;
        while !self.census().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// There is a record of every container.
pub fn every_record() -> Records {
    Arc::new(|_, _| true)
}

/// The events of a daemon.
pub struct Collected {
    subscription: Subscription,
    seen: Vec<Envelope>,
}

impl Collected {
    /// All until now.
    pub fn all(&mut self) -> Vec<Envelope> {
        while let Ok(envelope) = self.subscription.try_recv() {
            self.seen.push(Envelope::clone(&envelope));
        }
        self.seen.clone()
    }
}

/// A runtime on a tokio of its own, so that dropping it is the death of a daemon.
pub struct Daemon {
    pub tasks: Tasks,
    pub namespace: String,
    events: Arc<Mutex<Collected>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Daemon {
    #[track_caller]
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        let runtime = self.runtime.as_ref().unwrap();
        let done = runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await });
        done.expect("the work is done in time")
    }

    /// Runs something that needs to be inside of the daemon's tokio.
    pub fn inside<T>(&self, work: impl FnOnce() -> T) -> T {
        let _inside = self.runtime.as_ref().unwrap().enter();
        work()
    }

    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime.as_ref().unwrap().spawn(work)
    }

    #[track_caller]
    pub fn create(&self, options: CreateOptions) -> Result<u32, Error> {
        self.block_on(self.tasks.create(&self.namespace, options))
    }

    /// Creates and starts a container.
    #[track_caller]
    pub fn run(&self, options: CreateOptions) -> u32 {
        let id = options.container_id.clone();
        let pid = self.create(options).unwrap();
        assert_eq!(self.start(&id, "").unwrap(), pid);
        pid
    }

    #[track_caller]
    pub fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        self.block_on(self.tasks.start(&self.namespace, id, exec_id))
    }

    #[track_caller]
    pub fn kill(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        self.block_on(self.tasks.kill(&self.namespace, id, exec_id, Signal::SIGKILL as u32, false))
    }

    /// The exit code.
    #[track_caller]
    pub fn wait(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let exit = self.block_on(self.tasks.wait(&self.namespace, id, exec_id))?;
        Ok(exit.status)
    }

    /// The exit code.
    #[track_caller]
    pub fn delete(&self, id: &str) -> Result<u32, Error> {
        self.block_on(self.tasks.delete(&self.namespace, id)).map(|exit| exit.status)
    }

    #[track_caller]
    pub fn status(&self, id: &str) -> Result<Status, Error> {
        self.block_on(self.tasks.state(&self.namespace, id, "")).map(|process| process.status)
    }

    pub fn events(&self) -> Vec<Envelope> {
        self.events.lock().unwrap().all()
    }

    /// The topics that came for a container.
    pub fn topics(&self, id: &str) -> Vec<String> {
        let about = |event: &&Envelope| event.event.value.windows(id.len()).any(|part| part == id.as_bytes());
        self.events().iter().filter(about).map(|event| event.topic.clone()).collect()
    }

    /// The exits that were published of a container: process and code.
    pub fn exits(&self, id: &str) -> Vec<(String, u32)> {
        Daemon::exits_in(&self.events(), id)
    }

    pub fn exits_in(events: &[Envelope], id: &str) -> Vec<(String, u32)> {
        let exits = events.iter().filter_map(unpack::<TaskExit>);
        exits.filter(|exit| exit.container_id == id).map(|exit| (exit.id, exit.exit_status)).collect()
    }

    /// Where the events of this daemon are, also after its end.
    pub fn collected(&self) -> Arc<Mutex<Collected>> {
        self.events.clone()
    }

    /// How often the deletion of the task was published.
    pub fn deletions(&self, id: &str) -> usize {
        let events = self.events().into_iter().filter_map(|event| unpack::<TaskDelete>(&event));
        events.filter(|delete| delete.container_id == id && delete.id.is_empty()).count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Nothing is told goodbye: this is how a daemon dies. And when it is dead it does nothing any more, where a thread that
        // nobody waits for would go on beside the next daemon.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
    }
}

fn unpack<M: prost::Name + Default>(event: &Envelope) -> Option<M> {
    let event = prost_types::Any { type_url: event.event.type_url.clone(), value: event.event.value.clone() };
    any::unpack(&event).unwrap()
}

/// Waits until a condition holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match holds() {
            Ok(()) => return,
            Err(state) => assert!(Instant::now() < deadline, "never: {what}; at last: {state}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// As [`eventually`], of two values that are to be equal.
#[track_caller]
pub fn eventually_equal<T: PartialEq + std::fmt::Debug>(expected: &T, mut actual: impl FnMut() -> T) {
    eventually("two values are equal", || {
        let actual = actual();
        if actual == *expected { Ok(()) } else { Err(format!("{actual:?}, expected {expected:?}")) }
    });
}

/// Stops a process. The signal takes its time with a process of many threads: until the last one has stopped it answers.
pub fn stop(process: Pid) {
    kill(process, Signal::SIGSTOP).unwrap();
    eventually("every thread has stopped", || {
        for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
            let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
            let stopped = stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'));
            if !stopped {
                return Err(stat);
            }
        }
        Ok(())
    });
}

/// The parent of a process that is there.
fn parent(pid: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok().map(Pid::from_raw)
}

pub fn alive(pid: u32) -> bool {
    // A zombie is not alive.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}
