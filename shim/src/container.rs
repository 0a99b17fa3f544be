//! A container: what is done with it, and the order in which its processes' ends become known.
//!
//! The exit of a process passes these gates, each of which somebody relies on:
//! 1. it is written to the journal when it is seen;
//! 2. the start of the process has been published (its `announcing` lock);
//! 3. for init: what still runs is killed if the pid namespace is shared, and the exits of all execs are
//!    published; new ones are refused from the moment that init is dead;
//! 4. it is published, and whoever waits for the process is told.

mod exec;
mod saved;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use davit_model::Mount;
use davit_model::error::chain;
use davit_proto::containerd::events;
use davit_proto::containerd::task::v3::{CheckpointTaskRequest, CreateTaskRequest};
use davit_shim_protocol::journal::{self, ExitRecord, StartRecord};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cgroup::{Cgroup, oom};
use crate::checkpoint;
use crate::console::ConsoleSocket;
use crate::deadline::Deadline;
use crate::error::TaskError;
use crate::executor::{Either, race, spawn};
use crate::leftovers::Leftovers;
use crate::log;
use crate::options;
use crate::outbox::ContainerJournal;
use crate::process::{Ended, Process, State};
use crate::reactor::Async;
use crate::reaper::{Awaited, Starting};
use crate::rootfs;
use crate::runtime::{ChildStdio, Runtime, read_pid_file};
use crate::shim::Shim;
use crate::spec::Specification;
use crate::state;
use crate::stdio::{Owner, Request, Streams};
use crate::sync::{Condition, Lock};

/// The status of a process whose end could not be observed (containerd `UnknownExitStatus`).
const UNKNOWN_STATUS: u32 = 255;

const STREAMS_TIMED_OUT: TaskError = TaskError::TimedOut { what: "opening of the streams" };

/// The time for a call of the runtime that no client waits for, but the news of an exit.
const OWN_CALL: Duration = Duration::from_secs(10);
/// The time for what was killed to be gone. It is killed for certain; but a processor must be free for it to die on, and
/// what is in a call of the kernel that cannot be interrupted dies later.
const LAST_BREATH: Duration = Duration::from_secs(1);
/// The time for removing by force what a runtime has left.
const CLEAN_UP: Duration = Duration::from_secs(10);

/// A container and its processes.
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// Its init process.
    pub(crate) init: Rc<Process>,
    /// What its start restores it from. Until then it has no process, and the runtime does not know it.
    checkpoint: RefCell<Option<state::Checkpoint>>,
    shim: Rc<Shim>,
    runtime: Runtime,
    /// Its journal of exits and events.
    pub(crate) journal: Rc<ContainerJournal>,
    rootfs: Option<PathBuf>,
    cgroup: RefCell<Option<Cgroup>>,
    oom: RefCell<Option<Rc<oom::Watch>>>,
    execs: RefCell<BTreeMap<String, Rc<Process>>>,
    /// Execs that are running or being started.
    running_execs: Cell<usize>,
    init_dead: Cell<bool>,
    pausing: Cell<bool>,
    /// The number of the last event of running out of memory, 0 before the first.
    oom_event: Cell<u64>,
    changed: Condition,
    /// Held by what must not overlap: start, delete, pause, resume, update, checkpoint.
    lifecycle: Lock,
    io_owner: (u32, u32),
}

/// Waits until these processes, of which only the orphans are children of ours, have ended.
async fn ends(pidfds: Vec<OwnedFd>) {
    for pidfd in pidfds {
        let Ok(pidfd) = Async::new(pidfd) else { continue };
        let ended = |pidfd: &OwnedFd| {
            // It is readable from the end of its process on (pidfd_open(2)).
            let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut polled, PollTimeout::ZERO) {
                Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
                Ok(_) => Ok(()),
                Err(error) => Err(error.into()),
            }
        };
        // What cannot be seen is not waited for.
        let _ = pidfd.read_with(ended).await;
    }
}

impl Container {
    /// Creates a container as the request says. Its init process waits for [`Container::start`].
    pub(crate) async fn create(
        shim: &Rc<Shim>,
        request: &CreateTaskRequest,
        deadline: Deadline,
    ) -> Result<Rc<Container>, TaskError> {
        let options = options::from_request(request.options.as_ref())?;
        let bundle = PathBuf::from(&request.bundle);
        options::write(&bundle, &options).map_err(|source| TaskError::Io {
            step: "write options of",
            path: bundle.clone(),
            source,
        })?;
        let stdio = Request {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let rootfs = (!request.rootfs.is_empty()).then(|| bundle.join("rootfs"));
        let container = Rc::new(Container {
            id: request.id.clone(),
            init: Rc::new(Process::new(request.id.clone(), stdio, Vec::new())),
            checkpoint: RefCell::new(checkpoint::of_request(request, &options)),
            shim: shim.clone(),
            runtime: options::runtime(&options, &bundle, &shim.namespace, shim.oom_score_adj),
            journal: Rc::new(ContainerJournal::create(&bundle.join(journal::FILE_NAME))?),
            bundle,
            rootfs,
            cgroup: RefCell::default(),
            oom: RefCell::default(),
            execs: RefCell::default(),
            running_execs: Cell::new(0),
            init_dead: Cell::new(false),
            pausing: Cell::new(false),
            oom_event: Cell::new(0),
            changed: Condition::default(),
            lifecycle: Lock::default(),
            io_owner: (options.io_uid, options.io_gid),
        });
        if let Some(rootfs) = &container.rootfs {
            let mounted = deadline.bound(rootfs::mount(mounts(request), rootfs)).await;
            mounted.unwrap_or(Err(TaskError::TimedOut { what: "mount of rootfs" }))?;
        }
        if container.checkpoint.borrow().is_some() {
            return Ok(container);
        }
        let mut flags = Vec::new();
        if options.no_pivot_root {
            flags.push("--no-pivot");
        }
        if options.no_new_keyring {
            flags.push("--no-new-keyring");
        }
        if let Err(error) = container.create_init(&flags, deadline).await {
            if let Some(rootfs) = &container.rootfs
                && let Err(error) = rootfs::unmount(rootfs).await
            {
                log::warn(format_args!("failed to cleanup rootfs mount: {}", chain(&error)));
            }
            return Err(error);
        }
        Ok(container)
    }

    async fn create_init(self: &Rc<Container>, flags: &[&str], deadline: Deadline) -> Result<(), TaskError> {
        let runtime = self.runtime.until(deadline);
        let create = async |pid_file: &Path, socket: Option<&Path>, ends| {
            Ok(runtime.create(&self.id, pid_file, socket, flags, ends).await?)
        };
        self.make_init(create, deadline).await
    }

    /// Brings the container and its init process to life by `make`, a call of the runtime.
    async fn make_init(
        self: &Rc<Container>,
        make: impl AsyncFnOnce(&Path, Option<&Path>, ChildStdio) -> Result<(), TaskError>,
        deadline: Deadline,
    ) -> Result<(), TaskError> {
        let pid_file = self.bundle.join("init.pid");
        let (console, streams, ends) = self.open_streams(&self.init, deadline).await?;
        // Not before: a logger may take long to be ready, and orphans are not reaped meanwhile.
        let starting = Starting::begin();
        let socket = console.as_ref().map(ConsoleSocket::path);
        let made = make(&pid_file, socket, ends).await.and_then(|()| adopt(read_pid(&pid_file)?));
        let made = match made {
            Ok(awaited) => self.take_init(awaited, console, streams, deadline).await,
            Err(error) => {
                if let Some(streams) = streams {
                    streams.close();
                }
                Err(error)
            }
        };
        if let Err(error) = made {
            self.undo_create(&pid_file, &error).await;
            return Err(error);
        }
        drop(starting);
        self.watch_cgroup();
        Ok(())
    }

    async fn take_init(
        &self,
        awaited: Awaited,
        console: Option<ConsoleSocket>,
        streams: Option<Streams>,
        deadline: Deadline,
    ) -> Result<(), TaskError> {
        self.init.adopt(Rc::new(awaited));
        self.record_start(&self.init);
        self.take_streams(&self.init, console, streams, deadline).await
    }

    /// Removes what a failed creation has left. A runtime that fails by itself leaves nothing, and is not asked.
    async fn undo_create(&self, pid_file: &Path, error: &TaskError) {
        if self.init.pid() == 0
            && let Ok(pid) = read_pid_file(pid_file)
            && let Ok(awaited) = Awaited::adopted(pid)
        {
            // It waits for a start that never comes.
            let _ = awaited.signal(nix::libc::SIGKILL);
        }
        let began = self.init.pid() != 0;
        let left = Leftovers::of(&self.runtime, &self.id, self.journal.running(), began);
        let cut_short = match error {
            TaskError::Runtime(error) => error.cut_short(),
            _ => true,
        };
        if (cut_short || !left.is_empty()) && Deadline::within(CLEAN_UP).bound(left.remove()).await.is_none()
        {
            log::error(format_args!("something of {} is left that cannot be removed", self.id));
        }
    }

    /// Takes note of a process that the runtime has left to us, before anybody is told.
    fn record_start(&self, process: &Process) {
        // It is a child of ours that nobody has reaped, so it is there.
        let start_time = davit_sys::process::start_time(process.pid()).unwrap_or(0);
        let (id, pid) = (process.id.clone(), process.pid().unsigned_abs());
        self.journal.start(StartRecord { id, pid, start_time });
    }

    fn watch_cgroup(self: &Rc<Container>) {
        let cgroup = match Cgroup::of_process(self.init.pid()) {
            Ok(cgroup) => cgroup,
            Err(error) => return log::error(format_args!("load cgroup of {}: {error}", self.id)),
        };
        match oom::Watch::new(&cgroup) {
            Ok(Some(watch)) => self.watch_oom(watch),
            Ok(None) => {}
            Err(error) => log::error(format_args!("failed to watch oom events of {}: {error}", self.id)),
        }
        *self.cgroup.borrow_mut() = Some(cgroup);
    }

    fn watch_oom(self: &Rc<Container>, watch: oom::Watch) {
        let watch = Rc::new(watch);
        *self.oom.borrow_mut() = Some(watch.clone());
        let container = self.clone();
        spawn(async move {
            while let Either::First(()) = race(watch.changed(), container.init.wait()).await {
                container.report_oom();
            }
        });
    }

    fn report_oom(&self) {
        let happened = self.oom.borrow().as_ref().is_some_and(|watch| watch.happened());
        // A container can run out of memory as often as it likes, and the daemon may be away: one event that waits says as
        // much as many, and many would fill the host's memory, where the bundle is.
        if happened && !self.shim.outbox.waits(self.oom_event.get()) {
            let event = events::TaskOom { container_id: self.id.clone() };
            self.oom_event.set(self.shim.outbox.publish(&self.journal, "/tasks/oom", &event));
        }
    }

    /// Publishes an event of this container.
    pub(crate) fn publish<M: prost::Name>(&self, topic: &str, event: &M) {
        self.shim.outbox.publish(&self.journal, topic, event);
    }

    /// Begins to wait for the end of init. To be called when its creation has been published.
    pub(crate) fn watch_init(self: &Rc<Container>, awaited: Rc<Awaited>) {
        let container = self.clone();
        spawn(async move {
            let ended = observe(&awaited).await;
            drop(awaited);
            container.record(&container.init, ended);
            container.init_ended(ended).await;
        });
    }

    /// Leads the recorded exit of init through the other gates. An upgrade in between has this done again.
    async fn init_ended(&self, ended: Ended) {
        self.init_dead.set(true);
        self.changed.changed();
        self.report_oom();
        if self.init.state() == State::Paused {
            // What is frozen can neither be killed nor removed.
            let resume = ["resume", &self.id].map(OsStr::new);
            let runtime = self.runtime.until(Deadline::within(OWN_CALL));
            match runtime.simple("OCI runtime resume failed", &resume).await {
                // It was ended by a checkpoint, after which the runtime forgets it.
                Err(error) if error.to_string().contains("does not exist") => {}
                Err(error) => log::warn(chain(&error)),
                Ok(()) => {}
            }
        }
        self.kill_rest().await;
        self.changed.until(|| self.running_execs.get() == 0).await;
        let _announced = self.init.announcing.lock().await;
        self.finish(&self.init, ended);
    }

    /// Kills what init has left behind, if its end did not do that.
    async fn kill_rest(&self) {
        let shared = match Specification::read(&self.bundle) {
            Ok(specification) => specification.shares_pid_namespace(),
            Err(error) => {
                log::error(format_args!("read config.json of {}: {error}", self.id));
                true
            }
        };
        let Some(cgroup) = self.cgroup.borrow().clone() else { return };
        if !shared || cgroup.processes().is_empty() {
            return;
        }
        if cgroup.holds_us() {
            return log::warn(format_args!(
                "{} has no cgroup of its own; what is left of it goes on",
                self.id
            ));
        }
        let dying = cgroup.pidfds();
        let kill = ["kill", "--all", &self.id, "9"].map(OsStr::new);
        let runtime = self.runtime.until(Deadline::within(OWN_CALL));
        if let Err(error) = runtime.simple("OCI runtime killall failed", &kill).await {
            log::warn(chain(&error));
        }
        // Runtimes differ in what `kill --all` does when init is gone.
        cgroup.kill();
        // Whoever is told of the end of init finds nothing running any more.
        if Deadline::within(LAST_BREATH).bound(ends(dying)).await.is_none() {
            log::warn(format_args!("what is left of {} was killed and is not gone yet", self.id));
        }
    }

    fn record(&self, process: &Process, ended: Ended) {
        let at = ended.timestamp();
        self.journal.exit(ExitRecord {
            id: process.id.clone(),
            pid: process.pid().unsigned_abs(),
            status: ended.status,
            seconds: at.seconds,
            nanos: at.nanos,
            killed: false,
        });
        process.set_recorded(ended);
    }

    fn finish(&self, process: &Process, ended: Ended) {
        let exit = events::TaskExit {
            container_id: self.id.clone(),
            id: process.id.clone(),
            pid: process.pid().unsigned_abs(),
            exit_status: ended.status,
            exited_at: Some(ended.timestamp()),
        };
        self.publish("/tasks/exit", &exit);
        process.set_ended(ended);
    }

    /// Starts init, or restores it. Its start is published before its end can be.
    pub(crate) async fn start(self: &Rc<Container>, deadline: Deadline) -> Result<u32, TaskError> {
        let _alone = self.lifecycle.lock().await;
        let _announcing = self.init.announcing.lock().await;
        self.expect(&[State::Created], "start", "process")?;
        let checkpoint = self.checkpoint.borrow().clone();
        if let Some(checkpoint) = &checkpoint {
            self.revive(checkpoint, deadline).await?;
        } else {
            let start = ["start", &self.id].map(OsStr::new);
            self.runtime.until(deadline).simple("OCI runtime start failed", &start).await?;
        }
        self.init.set_state(State::Running);
        let pid = self.init.pid().unsigned_abs();
        self.publish("/tasks/start", &events::TaskStart { container_id: self.id.clone(), pid });
        if checkpoint.is_some()
            && let Some(awaited) = self.init.awaited()
        {
            self.watch_init(awaited);
        }
        Ok(pid)
    }

    /// Restores init from a checkpoint. After a failure the container is as it was, and this can be tried again.
    async fn revive(
        self: &Rc<Container>,
        checkpoint: &state::Checkpoint,
        deadline: Deadline,
    ) -> Result<(), TaskError> {
        let runtime = self.runtime.until(deadline);
        let restore = async |pid_file: &Path, socket: Option<&Path>, ends| {
            checkpoint::restore(&runtime, &self.id, checkpoint, pid_file, socket, ends).await
        };
        let revived = self.make_init(restore, deadline).await;
        match &revived {
            Ok(()) => *self.checkpoint.borrow_mut() = None,
            Err(_) => {
                self.init.disown();
                self.journal.forget(&self.id);
            }
        }
        revived
    }

    /// Opens what a process is to write to and read from. A logger may never be ready, and the filesystem of a log hang.
    async fn open_streams(
        &self,
        process: &Process,
        deadline: Deadline,
    ) -> Result<(Option<ConsoleSocket>, Option<Streams>, ChildStdio), TaskError> {
        if process.stdio.terminal {
            let socket = ConsoleSocket::listen(&self.shim.socket_dir, &self.bundle);
            let socket = socket.map_err(|source| TaskError::Console { source })?;
            return Ok((Some(socket), None, ChildStdio::default()));
        }
        let owner = self.owner(process);
        let opened = deadline.bound(Streams::pipes(&process.stdio, &owner)).await.ok_or(STREAMS_TIMED_OUT)?;
        let (streams, ends) = opened.map_err(TaskError::Stdio)?;
        Ok((None, Some(streams), ends))
    }

    async fn take_streams(
        &self,
        process: &Process,
        console: Option<ConsoleSocket>,
        streams: Option<Streams>,
        deadline: Deadline,
    ) -> Result<(), TaskError> {
        if let Some(console) = console {
            let master = console.receive().await.map_err(|source| TaskError::Console { source })?;
            let owner = self.owner(process);
            let streams = deadline.bound(Streams::terminal(&process.stdio, &owner, master)).await;
            process.set_streams(streams.ok_or(STREAMS_TIMED_OUT)?.map_err(TaskError::Stdio)?);
        }
        if let Some(streams) = streams {
            streams.start(&process.stdio.stdin).map_err(TaskError::Stdio)?;
            process.set_streams(streams);
        }
        Ok(())
    }

    fn owner<'a>(&'a self, process: &'a Process) -> Owner<'a> {
        let (uid, gid) = self.io_owner;
        Owner { id: &process.id, namespace: &self.shim.namespace, bundle: &self.bundle, uid, gid }
    }

    /// The process of this exec id; init for the empty one.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Rc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let found = self.execs.borrow().get(exec_id).cloned();
        found.ok_or_else(|| TaskError::NoProcess { id: exec_id.to_owned() })
    }

    /// Init, and the execs by id.
    pub(crate) fn all_processes(&self) -> Vec<Rc<Process>> {
        [&self.init].into_iter().chain(self.execs.borrow().values()).cloned().collect()
    }

    /// What a process is at, as clients are told. A paused container's execs are paused too.
    pub(crate) fn status(&self, process: &Process) -> Status {
        match process.state() {
            State::Created | State::Running if self.pausing.get() => Status::Pausing,
            State::Running if self.init.state() == State::Paused => Status::State(State::Paused),
            state => Status::State(state),
        }
    }

    /// Signals init, or with `all` every process.
    pub(crate) async fn kill(&self, signal: u32, all: bool, deadline: Deadline) -> Result<(), TaskError> {
        if self.init.state() == State::Deleted {
            return Err(TaskError::State { operation: "kill", state: State::Deleted, what: "process" });
        }
        if self.init_dead.get() && !all {
            return Err(TaskError::Finished);
        }
        let signal = signal.to_string();
        let mut arguments = vec!["kill"];
        if all {
            arguments.push("--all");
        }
        arguments.extend([self.id.as_str(), &signal]);
        let arguments: Vec<&OsStr> = arguments.into_iter().map(OsStr::new).collect();
        let runtime = self.runtime.until(deadline);
        runtime.simple("unknown error after kill", &arguments).await.map_err(|error| {
            let text = error.to_string().to_lowercase();
            let gone = ["process already finished", "container not running", "no such process"];
            if gone.iter().any(|words| text.contains(words)) {
                TaskError::Finished
            } else if text.contains("does not exist") {
                TaskError::NoContainer
            } else {
                error.into()
            }
        })
    }

    /// Freezes the container.
    pub(crate) async fn pause(&self, deadline: Deadline) -> Result<(), TaskError> {
        let _alone = self.lifecycle.lock().await;
        self.expect(&[State::Running], "pause", "container")?;
        self.pausing.set(true);
        let pause = ["pause", &self.id].map(OsStr::new);
        let result = self.runtime.until(deadline).simple("OCI runtime pause failed", &pause).await;
        self.pausing.set(false);
        result?;
        self.move_init(State::Running, State::Paused);
        self.publish("/tasks/paused", &events::TaskPaused { container_id: self.id.clone() });
        Ok(())
    }

    /// Thaws the container.
    pub(crate) async fn resume(&self, deadline: Deadline) -> Result<(), TaskError> {
        let _alone = self.lifecycle.lock().await;
        self.expect(&[State::Paused], "resume", "container")?;
        let resume = ["resume", &self.id].map(OsStr::new);
        self.runtime.until(deadline).simple("OCI runtime resume failed", &resume).await?;
        self.move_init(State::Paused, State::Running);
        self.publish("/tasks/resumed", &events::TaskResumed { container_id: self.id.clone() });
        Ok(())
    }

    /// Changes the state of init, unless it has died meanwhile.
    fn move_init(&self, from: State, to: State) {
        if self.init.state() == from {
            self.init.set_state(to);
        }
    }

    /// Changes limits.
    pub(crate) async fn update(&self, resources: &[u8], deadline: Deadline) -> Result<(), TaskError> {
        let _alone = self.lifecycle.lock().await;
        self.expect(&[State::Created, State::Running, State::Paused], "update", "container")?;
        Ok(self.runtime.until(deadline).update(&self.id, resources).await?)
    }

    /// Writes a checkpoint to `request.path`.
    pub(crate) async fn checkpoint(
        &self,
        request: &CheckpointTaskRequest,
        deadline: Deadline,
    ) -> Result<(), TaskError> {
        let _alone = self.lifecycle.lock().await;
        self.expect(&[State::Running, State::Paused], "checkpoint", "container")?;
        checkpoint::run(&self.runtime.until(deadline), &self.id, request).await?;
        let done =
            events::TaskCheckpointed { container_id: self.id.clone(), checkpoint: request.path.clone() };
        self.publish("/tasks/checkpointed", &done);
        Ok(())
    }

    /// The name has a prefix because `init` is an exec id like any other.
    fn exec_pid_file(&self, exec: &Process) -> PathBuf {
        self.bundle.join(format!("exec-{}.pid", exec.id))
    }

    /// Deletes the container, which must not run. Who comes second, having waited for who was first, gets the same answer.
    /// `None` for one that was never restored from its checkpoint, and so never had a process.
    pub(crate) async fn delete(&self, deadline: Deadline) -> Result<Option<Ended>, TaskError> {
        let _alone = self.lifecycle.lock().await;
        if self.init.state() == State::Deleted && (self.init.pid() == 0 || self.init.ended().is_some()) {
            return Ok(self.init.ended());
        }
        self.expect(&[State::Created, State::Stopped], "delete", "process")?;
        if let (State::Stopped, Some(streams)) = (self.init.state(), self.init.streams())
            && !streams.drained().await
        {
            log::warn(format_args!("output of {} did not end in time", self.id));
        }
        let ended = if self.checkpoint.borrow().is_some() {
            // Nothing of it is there, and whoever waits for it waits for nothing.
            self.init.set_failed(true);
            None
        } else {
            Some(self.delete_from_runtime(deadline).await?)
        };
        if let Some(streams) = self.init.streams() {
            streams.close();
        }
        if let Some(rootfs) = &self.rootfs {
            let unmounted = deadline.bound(rootfs::unmount(rootfs)).await;
            unmounted.unwrap_or(Err(TaskError::TimedOut { what: "unmount of rootfs" }))?;
        }
        self.init.set_state(State::Deleted);
        self.shim.remove(&self.id);
        let deleted = events::TaskDelete {
            container_id: self.id.clone(),
            pid: self.init.pid().unsigned_abs(),
            exit_status: ended.map_or(0, |ended| ended.status),
            exited_at: ended.map(|ended| ended.timestamp()),
            id: String::new(),
        };
        self.publish("/tasks/delete", &deleted);
        Ok(ended)
    }

    async fn delete_from_runtime(&self, deadline: Deadline) -> Result<Ended, TaskError> {
        // What was never started, as far as anybody was told, is killed, also if a start that failed did start it.
        let mut delete = vec!["delete"];
        if self.init.state() == State::Created {
            delete.push("--force");
        }
        delete.push(&self.id);
        let delete: Vec<&OsStr> = delete.into_iter().map(OsStr::new).collect();
        match self.runtime.until(deadline).simple("failed to delete task", &delete).await {
            // A runtime may have deleted the container by itself, after a checkpoint for example.
            Err(error) if error.to_string().contains("does not exist") => {}
            result => result?,
        }
        let left = Leftovers::of(&self.runtime, &self.id, self.journal.running(), true);
        if !left.is_empty() && deadline.bound(left.remove()).await.is_none() {
            return Err(TaskError::TimedOut { what: "removal of what the OCI runtime has left" });
        }
        // The runtime kills what was created and never started: that end is seen and published as any other.
        match race(self.init.wait(), crate::reactor::sleep(Duration::from_secs(10))).await {
            Either::First(Some(ended)) => Ok(ended),
            Either::First(None) | Either::Second(()) => {
                Ok(Ended { status: UNKNOWN_STATUS, at: SystemTime::now() })
            }
        }
    }

    /// All processes of the container, as the host numbers them.
    pub(crate) fn processes(&self) -> Vec<u32> {
        self.cgroup.borrow().as_ref().map(Cgroup::processes).unwrap_or_default()
    }

    /// The statistics of the container.
    pub(crate) fn metrics(&self) -> Result<prost_types::Any, TaskError> {
        self.cgroup.borrow().as_ref().map(Cgroup::metrics).ok_or(TaskError::NoCgroup)
    }

    fn expect(&self, states: &[State], operation: &'static str, what: &'static str) -> Result<(), TaskError> {
        let state = self.init.state();
        if states.contains(&state) { Ok(()) } else { Err(TaskError::State { operation, state, what }) }
    }
}

/// A state, or the passage to being paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Settled.
    State(State),
    /// The runtime is freezing the container.
    Pausing,
}

async fn observe(awaited: &Awaited) -> Ended {
    match awaited.exit().await {
        Ok((exit, at)) => Ended { status: exit.status(), at },
        Err(error) => {
            log::error(format_args!("wait for process {}: {error}", awaited.pid));
            Ended { status: UNKNOWN_STATUS, at: SystemTime::now() }
        }
    }
}

fn adopt(pid: i32) -> Result<Awaited, TaskError> {
    Awaited::adopted(pid).map_err(|source| TaskError::Io {
        step: "watch process of",
        path: PathBuf::from(format!("/proc/{pid}")),
        source,
    })
}

fn read_pid(path: &Path) -> Result<i32, TaskError> {
    read_pid_file(path).map_err(|source| TaskError::Io {
        step: "failed to retrieve OCI runtime container pid from",
        path: path.to_owned(),
        source,
    })
}

fn mounts(request: &CreateTaskRequest) -> Vec<Mount> {
    let convert = |mount: &davit_proto::containerd::types::Mount| Mount {
        kind: mount.r#type.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    };
    request.rootfs.iter().map(convert).collect()
}
