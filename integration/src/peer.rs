//! Debian's containerd as a peer: a private one, beside ours, with the same runc.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::ctr::Ctr;
use crate::{bins, census, image, wait};

const MISSING: &str = "cannot start containerd: apt-get install containerd";

/// A running containerd and its folder.
pub struct Containerd {
    dir: TempDir,
    child: Child,
    version: (u32, u32),
}

impl Containerd {
    /// Starts one and waits until it answers.
    ///
    /// # Errors
    /// It is not installed, or does not start.
    pub fn start() -> Result<Containerd> {
        Containerd::start_with("")
    }

    /// The same, with more in its configuration.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_with(more: &str) -> Result<Containerd> {
        let dir = tempfile::Builder::new().prefix("davit-peer-").tempdir_in("/tmp")?;
        let config = format!("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n{more}");
        fs::write(dir.path().join("config.toml"), config)?;
        let version = version()?;
        let child = spawn(dir.path())?;
        let peer = Containerd { dir, child, version };
        peer.ready()?;
        Ok(peer)
    }

    /// The first two numbers of its version.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Kills it and starts it again.
    ///
    /// # Errors
    /// It does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(self.dir.path())?;
        self.ready()
    }

    fn ready(&self) -> Result<()> {
        wait::until("containerd answers", || {
            let output = Command::new("ctr").arg("-a").arg(self.address()).arg("version").output().ok()?;
            output.status.success().then_some(())
        })
    }

    /// Its socket.
    pub fn address(&self) -> PathBuf {
        self.dir.path().join("c.sock")
    }

    /// A namespace of its own.
    pub fn namespace(&self) -> String {
        self.dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Puts the busybox image into it.
    ///
    /// # Errors
    /// The import fails.
    pub fn import_busybox(&self) -> Result<()> {
        let archive = self.dir.path().join("busybox.tar");
        image::busybox(&archive)?;
        Ctr::new(&self.address(), &self.namespace()).run(&format!("images import {}", archive.display()))?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        census::sweep(self.dir.path());
    }
}

/// The peer: Debian's, or the program that `DAVIT_PEER_CONTAINERD` names.
fn program() -> OsString {
    env::var_os("DAVIT_PEER_CONTAINERD").unwrap_or_else(|| "containerd".into())
}

fn version() -> Result<(u32, u32)> {
    let output = Command::new(program()).arg("--version").output().context(MISSING)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = text.split_whitespace().find_map(|word| {
        let mut numbers = word.trim_start_matches('v').split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    found.with_context(|| format!("no version in {text:?}"))
}

fn spawn(folder: &Path) -> Result<Child> {
    let path = |name: &str| folder.join(name);
    // Our shim is one of its runtimes: it looks for shims on its PATH.
    let path_variable = format!("{}:{}", bins::folder()?.display(), env::var("PATH").unwrap_or_default());
    Command::new(program())
        .env("PATH", path_variable)
        .arg("--config")
        .arg(path("config.toml"))
        .arg("--root")
        .arg(path("root"))
        .arg("--state")
        .arg(path("state"))
        .arg("--address")
        .arg(path("c.sock"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::options().create(true).append(true).open(path("log"))?)
        .process_group(0)
        .spawn()
        .context(MISSING)
}
