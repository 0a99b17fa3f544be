//! A private daemon: own root, own state, own socket, gone with its folder.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::ctr::Ctr;
use crate::{bins, image, wait};

/// In a configuration, what stands for the daemon's own folder.
pub const FOLDER: &str = "{folder}";

/// A daemon under test and the folder of all that it owns.
pub struct Daemon {
    dir: TempDir,
    bins: PathBuf,
    extra: Vec<String>,
    /// What is put before the daemon's command line.
    wrapper: Vec<String>,
    child: Option<Child>,
}

impl Daemon {
    /// Starts a daemon in a new folder and waits until it answers.
    ///
    /// # Errors
    /// It does not start; its log is part of the error.
    pub fn start() -> Result<Daemon> {
        Daemon::start_with(&[], "")
    }

    /// The same, started by `wrapper`, which must end as the daemon by `exec`.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_wrapped(wrapper: &[&str]) -> Result<Daemon> {
        Daemon::make(&[], "", wrapper)
    }

    /// The same, with another shim than ours for `io.containerd.runc.v2`.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_with_shim(shim: &Path) -> Result<Daemon> {
        Daemon::start_with(&[], &format!("[runtime]\nshim = \"{}\"\n", shim.display()))
    }

    /// The same, with flags and a configuration.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_with(flags: &[&str], config: &str) -> Result<Daemon> {
        Daemon::make(flags, config, &[])
    }

    fn make(flags: &[&str], config: &str, wrapper: &[&str]) -> Result<Daemon> {
        // The path of a unix socket is short (unix(7)), and the folder must allow devices.
        let dir = tempfile::Builder::new().prefix("davit-").tempdir_in("/tmp")?;
        let extra = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
        let mut daemon = Daemon { dir, bins: bins::folder()?, extra, wrapper, child: None };
        let config = config.replace(FOLDER, &daemon.path("").display().to_string());
        let verbose = if config.contains("[log]") { "" } else { "[log]\nlevel = \"debug\"\n" };
        fs::write(daemon.config(), format!("{config}\n{verbose}"))?;
        daemon.restart()?;
        Ok(daemon)
    }

    /// A path in the daemon's folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self) -> PathBuf {
        self.path("config.toml")
    }

    /// The namespace of the daemon's own: cgroups are named by it, so that daemons beside each other do not mix theirs.
    pub fn namespace(&self) -> String {
        self.dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The socket.
    pub fn address(&self) -> PathBuf {
        self.path("d.sock")
    }

    /// The process id of the daemon that runs now.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The log of every daemon that ran here.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Starts the daemon (again) and waits until it answers.
    ///
    /// # Errors
    /// It ends, or does not answer.
    pub fn restart(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("the daemon runs already");
        }
        let _ = fs::remove_file(self.path("notify"));
        let notify = UnixDatagram::bind(self.path("notify"))?;
        notify.set_read_timeout(Some(Duration::from_millis(100)))?;
        let log = File::options().create(true).append(true).open(self.path("log"))?;
        let program = self.bins.join("davitd");
        let mut command = match self.wrapper.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        command
            .arg("--config")
            .arg(self.config())
            .arg("--root")
            .arg(self.path("root"))
            .arg("--state")
            .arg(self.path("state"))
            .arg("--address")
            .arg(self.address())
            .args(&self.extra)
            .env("NOTIFY_SOCKET", self.path("notify"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // A group of its own: a Ctrl-C at the terminal is for the test, not for the daemon.
            .process_group(0);
        self.child = Some(command.spawn().context("cannot start davitd")?);
        // It tells as it tells systemd (sd_notify(3)), when the API is served.
        let mut message = [0; 4096];
        wait::until("davitd is ready", || {
            if let Some(child) = &mut self.child
                && let Ok(Some(status)) = child.try_wait()
            {
                return Some(Err(status));
            }
            let length = notify.recv(&mut message).ok()?;
            message[..length].starts_with(b"READY=1").then_some(Ok(()))
        })
        .with_context(|| self.log())?
        .map_err(|status| anyhow!("davitd ended at once ({status}):\n{}", self.log()))
    }

    /// Ends the daemon with a signal and waits for its end.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.child.take() else { bail!("the daemon does not run") };
        kill(Pid::from_raw(child.id() as i32), signal)?;
        wait::until("davitd ends", || child.try_wait().ok().flatten())?;
        Ok(())
    }

    /// Sends the daemon a signal that does not end it.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let Some(child) = &self.child else { bail!("the daemon does not run") };
        Ok(kill(Pid::from_raw(child.id() as i32), signal)?)
    }

    /// `davit` against this daemon.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn davit<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Output> {
        Ok(self.davit_command(args).output()?)
    }

    /// `davit` against this daemon, not yet started.
    pub fn davit_command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(self.bins.join("davit"));
        command.arg("--address").arg(self.address()).args(args).stdin(Stdio::null());
        command.env("DAVIT_NAMESPACE", self.namespace());
        command
    }

    /// Debian's `ctr` against this daemon, in its namespace.
    pub fn ctr(&self) -> Ctr {
        Ctr::new(&self.address(), &self.namespace())
    }

    /// What the daemon has recorded of containers, as `ctr` lists it.
    ///
    /// # Errors
    /// `ctr` fails.
    pub fn rows(&self) -> Result<String> {
        let ctr = self.ctr();
        let lines = ["snapshots ls", "leases ls", "containers ls", "tasks ls"];
        lines.into_iter().map(|line| ctr.run(line)).collect()
    }

    /// Puts the busybox image into the daemon through `ctr images import`.
    ///
    /// # Errors
    /// The import fails.
    pub fn import_busybox(&self) -> Result<()> {
        let archive = self.path("busybox.tar");
        image::busybox(&archive)?;
        self.ctr().run(&format!("images import {}", archive.display()))?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        crate::census::sweep(self.dir.path());
        if std::thread::panicking() || std::env::var_os("DAVIT_KEEP_LOG").is_some() {
            eprintln!("--- log of davitd ---\n{}", self.log());
        }
    }
}

/// The standard output of a command that must have succeeded.
///
/// # Errors
/// It failed; the error has all that it said.
pub fn ok(output: Output) -> Result<String> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{}\nstdout: {stdout}\nstderr: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}
