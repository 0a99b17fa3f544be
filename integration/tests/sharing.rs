//! Containers that share a shim, as those of a pod do: by the annotations of the spec that containerd's own shims know.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::client::Client;
use davit_integration::peer::Containerd;
use davit_integration::shim::Host;
use davit_integration::{Daemon, bins, image, memory, wait};
use davit_proto::containerd::services::tasks::v1::ListTasksRequest;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use sha2::{Digest, Sha256};

use crate::restart::Reader;
use crate::root;

const GO_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";
const OUR_SHIM: &str = "containerd-shim-davit-v2";

/// What the containers of a pod are marked with (CRI).
const POD: (&str, &str) = ("io.kubernetes.cri.sandbox-id", "pod");
/// The group of containerd's shims, which counts before the pod.
const GROUP: (&str, &str) = ("io.containerd.runc.v2.group", "group");

/// A daemon, and how it is killed and started again.
trait Restart {
    fn address(&self) -> PathBuf;
    fn namespace(&self) -> String;
    fn folder(&self) -> PathBuf;
    fn restart(&mut self) -> Result<()>;
}

impl Restart for Daemon {
    fn address(&self) -> PathBuf {
        Daemon::address(self)
    }

    fn namespace(&self) -> String {
        Daemon::namespace(self)
    }

    fn folder(&self) -> PathBuf {
        self.path("")
    }

    fn restart(&mut self) -> Result<()> {
        self.stop(Signal::SIGKILL)?;
        Daemon::restart(self)
    }
}

impl Restart for Containerd {
    fn address(&self) -> PathBuf {
        Containerd::address(self)
    }

    fn namespace(&self) -> String {
        Containerd::namespace(self)
    }

    fn folder(&self) -> PathBuf {
        Containerd::folder(self).to_owned()
    }

    fn restart(&mut self) -> Result<()> {
        Containerd::restart(self)
    }
}

/// Task v3.
#[test]
fn our_shim_under_our_daemon() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    daemon.import_busybox()?;
    share(&mut daemon, "io.containerd.runc.v2", OUR_SHIM)
}

/// Task v2, from the other side.
#[test]
fn the_shim_of_containerd_under_our_daemon() -> Result<()> {
    if !root() || missing(GO_SHIM) {
        return Ok(());
    }
    let mut daemon = Daemon::start_with_shim(Path::new(GO_SHIM))?;
    daemon.import_busybox()?;
    share(&mut daemon, "io.containerd.runc.v2", "containerd-shim-runc-v2")
}

/// Task v2.
#[test]
fn our_shim_under_containerd() -> Result<()> {
    if !root() || missing("/usr/bin/containerd") {
        return Ok(());
    }
    let mut peer = Containerd::start()?;
    peer.import_busybox()?;
    share(&mut peer, "io.containerd.davit.v2", OUR_SHIM)
}

fn missing(program: &str) -> bool {
    let missing = !Path::new(program).exists();
    if missing {
        eprintln!("skipped: {program} is not installed");
    }
    missing
}

fn share(daemon: &mut impl Restart, runtime: &str, shim: &str) -> Result<()> {
    let before = Census::take(&daemon.folder());
    let executor = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    executor.block_on(scenario(daemon, runtime, shim))?;
    before.settle(&daemon.folder())
}

async fn scenario(daemon: &mut impl Restart, runtime: &str, shim: &str) -> Result<()> {
    let parent = image::digest(&image::busybox_layer()?);
    let folder = daemon.folder();
    let shims = || shims_of(shim, &folder);
    let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
    client.runtime = runtime.to_owned();
    client.annotations.insert(POD.0.into(), POD.1.into());

    // Three at once: one of them makes the shim, the others join it.
    let mut starts = Vec::new();
    let mut readers = Vec::new();
    for (n, kind) in ["sandbox", "container", "container"].into_iter().enumerate() {
        let fifo = folder.join(format!("out-{n}"));
        mkfifo(&fifo, Mode::from_bits_truncate(0o600))?;
        readers.push(Reader::start(&fifo));
        let (mut client, parent) = (client.clone(), parent.clone());
        client.annotations.insert("io.kubernetes.cri.container-type".into(), kind.into());
        // The shims of containerd want both kinds of output, or none.
        client.stderr = fifo.display().to_string();
        starts.push(tokio::spawn(async move {
            let count = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done";
            let id = format!("c-{n}");
            client.start_writing(&id, &parent, &["sh", "-c", count], &fifo.display().to_string()).await
        }));
    }
    let mut pids = Vec::new();
    for start in starts {
        pids.push(start.await??);
    }
    let shared = shims();
    ensure!(shared.len() == 1, "{} shims serve one pod", shared.len());
    ensure!(parents(&pids)? == vec![shared[0]; 3], "another shim is the parent of a container");
    let flow = |numbers: &[usize]| -> Result<()> {
        for n in numbers {
            let lines = readers[*n].lines();
            wait::until("output goes on", || (readers[*n].lines() > lines + 10).then_some(()))?;
        }
        Ok(())
    };
    flow(&[0, 1, 2])?;

    // One of the group is another matter: it counts before the pod.
    let mut other = client.clone();
    other.annotations.insert(GROUP.0.into(), GROUP.1.into());
    other.start("other", &parent, &["sleep", "3600"]).await?;
    let mut apart = shims();
    apart.retain(|pid| *pid != shared[0]);
    ensure!(apart.len() == 1, "the group has {} shims of its own", apart.len());
    ensure!(other.kill("other").await? == 137);
    wait::until("the shim of the group ends with it", || (shims() == shared).then_some(()))?;

    // One dies; the others do not move.
    ensure!(client.kill("c-1").await? == 137);
    ensure!(tasks(&mut client).await? == [("c-0".to_owned(), pids[0]), ("c-2".to_owned(), pids[2])]);
    flow(&[0, 2])?;
    ensure!(shims() == shared);

    daemon.restart()?;
    flow(&[0, 2])?;
    let (runtime, annotations) = (client.runtime, client.annotations);
    let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
    (client.runtime, client.annotations) = (runtime, annotations);
    ensure!(tasks(&mut client).await? == [("c-0".to_owned(), pids[0]), ("c-2".to_owned(), pids[2])]);

    // A newcomer joins the shim that an earlier daemon has started; the one that made it goes.
    let newcomer = client.start("c-3", &parent, &["sleep", "3600"]).await?;
    ensure!(shims() == shared && parents(&[newcomer])? == shared, "the newcomer has another shim");
    ensure!(client.kill("c-0").await? == 137);
    ensure!(client.kill("c-2").await? == 137);
    ensure!(shims() == shared, "the shim has ended with a container in it");
    ensure!(fs::metadata(format!("/proc/{newcomer}")).is_ok());
    ensure!(client.kill("c-3").await? == 137);
    wait::until("the shim ends with the last of the pod", || shims().is_empty().then_some(()))?;
    readers.into_iter().try_for_each(Reader::finish)
}

/// The shims of a daemon, without their short-lived copies.
fn shims_of(program: &str, folder: &Path) -> Vec<u32> {
    let all = memory::named(program, &folder.display().to_string());
    // A copy may have ended since it was found, and has no parent then.
    let own = |pid: u32| parents(&[pid]).is_ok_and(|parents| !all.contains(&parents[0]));
    all.iter().copied().filter(|pid| own(*pid)).collect()
}

/// The tasks by id, and their processes.
async fn tasks(client: &mut Client) -> Result<Vec<(String, u32)>> {
    let tasks = client.tasks.list(ListTasksRequest::default()).await?.into_inner().tasks;
    let mut tasks: Vec<_> = tasks.into_iter().map(|task| (task.id, task.pid)).collect();
    tasks.sort();
    Ok(tasks)
}

/// The parents of processes.
fn parents(pids: &[u32]) -> Result<Vec<u32>> {
    let parent = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).context("no parent")?;
        Ok(line.trim().parse()?)
    };
    pids.iter().map(parent).collect()
}

#[test]
fn the_rules_of_sockets_are_those_of_containerd() -> Result<()> {
    if !root() || missing(GO_SHIM) {
        return Ok(());
    }
    for program in [bins::folder()?.join(OUR_SHIM), PathBuf::from(GO_SHIM)] {
        sockets(&program).with_context(|| program.display().to_string())?;
    }
    Ok(())
}

/// The path is a hash of the daemon's address, the namespace and the group; a shim that listens there is joined, and a
/// socket that nobody listens on replaced.
fn sockets(program: &Path) -> Result<()> {
    let host = Host::new("runc")?;
    let with = |pairs: &'static [(&str, &str)]| {
        move |config: &mut serde_json::Value| {
            for (name, value) in pairs {
                config["annotations"][*name] = (*value).into();
            }
        }
    };
    let address = host.path("c.sock").display().to_string();
    let path = |group: &str| -> PathBuf {
        let hash = Sha256::digest(format!("{address}/{}/{group}", host.namespace()));
        let name: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Path::new("/run/containerd/s").join(name)
    };
    let alone = host.bundle("alone", &["true"], |_| {})?;
    let mut shim = host.start(program, &alone)?;
    ensure!(shim.socket() == path("alone"), "{}", shim.socket().display());
    shim.shutdown("alone")?;

    let first = host.bundle("first", &["true"], with(&[POD]))?;
    let second = host.bundle("second", &["true"], with(&[POD]))?;
    let third = host.bundle("third", &["true"], with(&[POD, GROUP]))?;
    let one = host.start(program, &first)?;
    ensure!(one.socket() == path(POD.1));
    let same = host.start(program, &second)?;
    ensure!(same.pid == one.pid && same.socket() == one.socket(), "a shim that listens is not joined");
    let mut group = host.start(program, &third)?;
    ensure!(group.pid != one.pid && group.socket() == path(GROUP.1), "the group does not count first");
    group.shutdown("third")?;

    kill(Pid::from_raw(one.pid as i32), Signal::SIGKILL)?;
    wait::until("nobody listens", || UnixStream::connect(one.socket()).is_err().then_some(()))?;
    ensure!(one.socket().exists());
    let mut next = host.start(program, &second)?;
    ensure!(next.pid != one.pid && next.socket() == one.socket(), "a dead socket is not replaced");
    next.shutdown("second")?;
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    wait::until("the shims end", || memory::named(&name, &address).is_empty().then_some(()))?;
    ensure!(!next.socket().exists(), "a socket is left");
    Ok(())
}
