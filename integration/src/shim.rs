//! Shims without a daemon: started as a daemon starts them, and called over their sockets by task v2, which ours and those
//! of containerd 1.6 answer alike.

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::task::v2::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse,
    ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, StartResponse, WaitRequest, WaitResponse,
};
use davit_proto::containerd::types::Mount;
use nix::libc::O_NONBLOCK;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::spec;
use crate::ttrpc::{self, Client};
use crate::{bins, census, image};

const SERVICE: &str = "containerd.task.v2.Task";

/// A folder with a root filesystem, bundles, and the sockets that shims are told of. On drop all that runs in it is ended.
pub struct Host {
    dir: TempDir,
    /// What is put before the command line of `start`.
    wrapper: Vec<String>,
    runtime: String,
}

/// A container that is to be.
pub struct Bundle {
    /// Its id.
    pub id: String,
    /// The folder.
    pub path: PathBuf,
}

/// A shim that runs, and a connection to it.
pub struct Shim {
    /// Its process.
    pub pid: u32,
    /// The time from the execution of `start` to the first answer on the socket.
    pub start: Duration,
    socket: PathBuf,
    namespace: String,
    client: Client,
}

impl Host {
    /// Makes one whose containers are run by `runtime`, `runc` or `crun`.
    ///
    /// # Errors
    /// The host lacks a busybox, or the folder cannot be made.
    pub fn new(runtime: &str) -> Result<Host> {
        let dir = tempfile::Builder::new().prefix("davit-").tempdir_in("/tmp")?;
        let mut archive = tar::Archive::new(std::io::Cursor::new(image::busybox_layer()?));
        archive.unpack(dir.path().join("image"))?;
        ttrpc::take_events(&dir.path().join("c.sock.ttrpc"))?;
        // crun 1.8 refuses a host that has controllers on both versions of cgroups. The shim is given a mount namespace
        // where only the first is to be seen.
        let hybrid = fs::metadata("/sys/fs/cgroup/unified").is_ok() && runtime == "crun";
        let hide = "umount /sys/fs/cgroup/unified && exec \"$0\" \"$@\"";
        let wrapper = if hybrid { vec!["unshare", "--mount", "sh", "-c", hide] } else { Vec::new() };
        let wrapper = wrapper.into_iter().map(str::to_owned).collect();
        Ok(Host { dir, wrapper, runtime: runtime.to_owned() })
    }

    /// A path in the folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The namespace of the containers, of which the cgroups are named.
    pub fn namespace(&self) -> String {
        self.dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// A FIFO, and its path as a shim is told of it.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn fifo(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        mkfifo(&path, Mode::from_bits_truncate(0o600))?;
        Ok(path.display().to_string())
    }

    /// Makes the bundle of a container that runs `args`. `change` may edit its `config.json`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn bundle(&self, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> Result<Bundle> {
        let path = self.path("bundles").join(id);
        fs::create_dir_all(path.join("rootfs"))?;
        let mut config = spec(&format!("/{}/{id}", self.namespace()), args);
        change(&mut config);
        fs::write(path.join("config.json"), serde_json::to_vec(&config)?)?;
        mkfifo(&path.join("log"), Mode::from_bits_truncate(0o600))?;
        Ok(Bundle { id: id.to_owned(), path })
    }

    /// Executes a shim's `start` in a bundle, and connects to what it names.
    ///
    /// # Errors
    /// It fails, or nobody answers.
    pub fn start(&self, program: &Path, bundle: &Bundle) -> Result<Shim> {
        // Somebody must have the log open: shims in Go wait for that.
        let _log = fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(O_NONBLOCK)
            .open(bundle.path.join("log"))?;
        let daemon = self.path("c.sock").display().to_string();
        let mut words = self.wrapper.clone();
        words.push(program.display().to_string());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(["-namespace", &self.namespace(), "-address", &daemon, "-publish-binary", "/bin/true"])
            .args(["-id", &bundle.id, "start"])
            .current_dir(&bundle.path)
            .env("TTRPC_ADDRESS", format!("{daemon}.ttrpc"))
            .env("GOMAXPROCS", "2")
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let begun = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let mut address = String::new();
        child.stdout.take().context("the pipe was asked for")?.read_to_string(&mut address)?;
        let status = child.wait()?;
        ensure!(status.success(), "{} start: {status}", program.display());
        let path =
            address.trim().strip_prefix("unix://").with_context(|| format!("no address: {address}"))?;
        let mut client = Client::connect(Path::new(path), &self.namespace())?;
        let request = ConnectRequest { id: bundle.id.clone() };
        let answer: ConnectResponse = client.call(SERVICE, "Connect", &request)?;
        let start = begun.elapsed();
        let namespace = self.namespace();
        Ok(Shim { pid: answer.shim_pid, start, socket: path.into(), namespace, client })
    }

    /// Has a shim create and start the container of a bundle, whose output goes to `stdout`. Gives its pid.
    ///
    /// # Errors
    /// The shim refuses.
    pub fn run(&self, shim: &mut Shim, bundle: &Bundle, stdout: &str) -> Result<u32> {
        let runtime = bins::on_path(&self.runtime).with_context(|| format!("no {}", self.runtime))?;
        let options = Options {
            binary_name: runtime.display().to_string(),
            root: self.path("runtime").display().to_string(),
            ..Options::default()
        };
        let request = CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs: vec![Mount {
                r#type: "bind".into(),
                source: self.path("image").display().to_string(),
                options: vec!["rbind".into(), "rw".into()],
                ..Mount::default()
            }],
            stdout: stdout.into(),
            // The shims of containerd want both kinds of output, or none.
            stderr: stdout.into(),
            options: Some(any::pack(&options)),
            ..CreateTaskRequest::default()
        };
        let created: CreateTaskResponse = shim.client.call(SERVICE, "Create", &request)?;
        shim.begin(&bundle.id, "")?;
        Ok(created.pid)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        census::sweep(self.dir.path());
    }
}

impl Shim {
    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Another connection to it.
    ///
    /// # Errors
    /// It is gone.
    pub fn again(&self) -> Result<Client> {
        Client::connect(&self.socket, &self.namespace)
    }

    fn begin(&mut self, id: &str, exec_id: &str) -> Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into() };
        let answer: StartResponse = self.client.call(SERVICE, "Start", &request)?;
        Ok(answer.pid)
    }

    /// Waits for the end of a process; gives its status.
    ///
    /// # Errors
    /// There is none.
    pub fn wait(&mut self, id: &str, exec_id: &str) -> Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into() };
        let answer: WaitResponse = self.client.call(SERVICE, "Wait", &request)?;
        Ok(answer.exit_status)
    }

    /// Runs a program in a container to its end and deletes it. `watcher` is a connection for the wait, which begins before
    /// the start, as containerd's clients do it. Gives the time from the start to the news of the end.
    ///
    /// # Errors
    /// The shim refuses a step, or the program fails.
    pub fn exec(&mut self, watcher: &mut Client, id: &str, exec_id: &str, args: &[&str]) -> Result<Duration> {
        let process = json!({
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/bin:/usr/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
        });
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: Some(prost_types::Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: serde_json::to_vec(&process)?,
            }),
            ..ExecProcessRequest::default()
        };
        let () = self.client.call(SERVICE, "Exec", &request)?;
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into() };
        watcher.send(SERVICE, "Wait", &request)?;
        let begun = Instant::now();
        self.begin(id, exec_id)?;
        let ended: WaitResponse = watcher.receive()?;
        let (time, status) = (begun.elapsed(), ended.exit_status);
        ensure!(status == 0, "{args:?} ended with {status}");
        self.delete(id, exec_id)?;
        Ok(time)
    }

    /// Deletes a process that has ended; with an empty `exec_id`, its container.
    ///
    /// # Errors
    /// The shim refuses.
    pub fn delete(&mut self, id: &str, exec_id: &str) -> Result<u32> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into() };
        let answer: DeleteResponse = self.client.call(SERVICE, "Delete", &request)?;
        Ok(answer.exit_status)
    }

    /// Kills a container and deletes it.
    ///
    /// # Errors
    /// The shim refuses a step.
    pub fn kill(&mut self, id: &str) -> Result<()> {
        let request = KillRequest { id: id.into(), signal: 9, all: true, ..KillRequest::default() };
        // It may have ended by itself.
        let _: Result<()> = self.client.call(SERVICE, "Kill", &request);
        self.wait(id, "")?;
        self.delete(id, "")?;
        Ok(())
    }

    /// Asks the shim to end, which it does without containers.
    ///
    /// # Errors
    /// It refuses.
    pub fn shutdown(&mut self, id: &str) -> Result<()> {
        let request = ShutdownRequest { id: id.into(), now: false };
        // Some end before they answer.
        let _: Result<()> = self.client.call(SERVICE, "Shutdown", &request);
        Ok(())
    }
}
