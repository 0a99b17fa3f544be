//! Docker Engine as a client: Debian's `dockerd` on a daemon's socket, and its `docker`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::daemon::ok;
use crate::{Daemon, image, wait};

/// Debian's client; a newer one may come before it on PATH.
const CLIENT: &str = "/usr/bin/docker";

/// A running `dockerd` whose containers are the daemon's. It keeps all that it owns in the daemon's folder, and
/// its bridges and packet filter rules in a network namespace of its own, which ends with it.
pub struct Docker {
    folder: PathBuf,
    containerd: PathBuf,
    namespace: String,
    child: Option<Child>,
}

impl Docker {
    /// Starts one on the daemon's socket, waits until it answers, and gives it the image `busybox`.
    ///
    /// # Errors
    /// It is not installed or does not start.
    pub fn start(daemon: &Daemon) -> Result<Docker> {
        let folder = daemon.path("docker");
        fs::create_dir_all(&folder)?;
        let (containerd, namespace) = (daemon.address(), daemon.namespace());
        let mut docker = Docker { folder, containerd, namespace, child: None };
        docker.restart()?;
        let layer = docker.folder.join("busybox.tar");
        fs::write(&layer, image::busybox_layer()?)?;
        docker.run(&["import", &layer.display().to_string(), "busybox"])?;
        Ok(docker)
    }

    /// Starts it (again) and waits until it answers.
    ///
    /// # Errors
    /// It does not answer; its log is part of the error.
    pub fn restart(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.folder.join("log"))?;
        let mut command = Command::new("unshare");
        // The loopback device of a new network namespace is down, and dockerd's DNS listens on it.
        command.args([
            "--net",
            "sh",
            "-c",
            "/bin/busybox ip link set lo up && exec dockerd \"$@\"",
            "dockerd",
        ]);
        for (flag, value) in [
            ("--containerd", &self.containerd),
            ("--data-root", &self.folder.join("data")),
            ("--exec-root", &self.folder.join("exec")),
            ("--pidfile", &self.folder.join("pid")),
        ] {
            command.arg(flag).arg(value);
        }
        command.arg("--host").arg(self.host());
        command.args(["--containerd-namespace", &self.namespace]);
        command.args(["--cgroup-parent", &format!("/{}", self.namespace)]);
        command.args(["--live-restore", "--userland-proxy=false"]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.child = Some(command.spawn().context("cannot start dockerd: apt-get install docker.io")?);
        wait::until("dockerd answers", || {
            let output = self.command(&["info"]).output().ok()?;
            output.status.success().then_some(())
        })
        .with_context(|| self.log())
    }

    /// Ends it; its containers go on.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&mut self) -> Result<()> {
        let mut child = self.child.take().context("dockerd does not run")?;
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM)?;
        wait::until("dockerd ends", || child.try_wait().ok().flatten())?;
        Ok(())
    }

    fn host(&self) -> String {
        format!("unix://{}", self.folder.join("docker.sock").display())
    }

    /// Its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// A folder for the files of a test.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A `docker` with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(CLIENT);
        // The classic builder runs its steps as containers of the engine.
        command.arg("--host").arg(self.host()).args(args).env("DOCKER_BUILDKIT", "0").stdin(Stdio::null());
        command.env("HOME", &self.folder);
        command
    }

    /// What `docker` with these arguments did.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        Ok(self.command(args).output()?)
    }

    /// What it printed; it must succeed.
    ///
    /// # Errors
    /// It failed; the error has all that it said.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let printed = ok(self.output(args)?).with_context(|| format!("docker {}", args.join(" ")))?;
        Ok(printed.trim_end().to_owned())
    }

    /// What a web server answers to someone in the network namespace of `dockerd`, where its published ports are.
    ///
    /// # Errors
    /// Nobody answers, or `dockerd` does not run.
    pub fn get(&self, address: SocketAddr) -> Result<String> {
        let pid = self.child.as_ref().context("dockerd does not run")?.id();
        let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
        // A network namespace is a thread's: this one ends with the request.
        let request = move || -> Result<String> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
            connection.set_read_timeout(Some(Duration::from_secs(5)))?;
            connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            connection.read_to_string(&mut answer)?;
            Ok(answer)
        };
        std::thread::spawn(request).join().map_err(|_| anyhow!("the request panicked"))?
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() || std::env::var_os("DAVIT_KEEP_LOG").is_some() {
            eprintln!("--- log of dockerd ---\n{}", self.log());
        }
    }
}
