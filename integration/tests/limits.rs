//! What bounds a container: memory, processors, capabilities, system calls, and the descriptors that it gets.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::client::{Client, connect};
use davit_integration::ctr::{Ctr, text};
use davit_integration::{Daemon, image, wait};
use davit_proto::containerd::events::TaskOom;
use davit_proto::containerd::services::events::v1::SubscribeRequest;
use davit_proto::containerd::services::events::v1::events_client::EventsClient;
use davit_proto::containerd::services::tasks::v1::CloseIoRequest;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use prost::Message;

use crate::root;

const IMAGE: &str = image::BUSYBOX;

/// A daemon with an image, and what is there before its first container.
fn scene() -> Result<(Daemon, Ctr, Census)> {
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let (ctr, census) = (daemon.ctr(), Census::take(&daemon.path("")));
    Ok((daemon, ctr, census))
}

/// Kills a detached container and removes all of it.
fn end(ctr: &Ctr, id: &str) -> Result<()> {
    ctr.run(&format!("tasks kill -s SIGKILL {id}"))?;
    wait::until("the task is stopped", || ctr.run("tasks ls").ok()?.contains("STOPPED").then_some(()))?;
    ctr.words(&format!("tasks rm {id}")).output()?;
    ctr.run(&format!("containers rm {id}"))?;
    Ok(())
}

/// What `ctr run` of a command printed, which has to end with 0.
fn output(ctr: &Ctr, flags: &str, id: &str, command: &str) -> Result<String> {
    let line = format!("run --rm {flags} {IMAGE} {id} sh -c");
    let mut words: Vec<&str> = line.split_whitespace().collect();
    words.push(command);
    ctr.run_args(&words)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

#[test]
fn a_container_out_of_memory_is_killed_and_told() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (daemon, ctr, census) = scene()?;
    runtime()?.block_on(async {
        let filters = vec!["topic==\"/tasks/oom\"".to_owned()];
        let mut events = EventsClient::new(connect(&daemon.address()).await?);
        let mut events = events.subscribe(SubscribeRequest { filters }).await?.into_inner();
        // A tail of an endless line holds all of it.
        let run = ctr.words(&format!("run --rm --memory-limit 16777216 {IMAGE} eater tail /dev/zero"));
        let run = tokio::process::Command::from(run).output().await?;
        ensure!(run.status.code() == Some(137), "{}", text(&run));
        let event = tokio::time::timeout(wait::PATIENCE, events.message()).await.context("no event")??;
        let event = event.context("the subscription ended")?;
        ensure!(event.namespace == daemon.namespace(), "{event:?}");
        let oom = TaskOom::decode(event.event.unwrap_or_default().value.as_slice())?;
        ensure!(oom.container_id == "eater", "{oom:?}");
        anyhow::Ok(())
    })?;
    census.settle(&daemon.path(""))
}

/// A file of a container's cgroup: in the hierarchy of its controller, or in the only one.
fn cgroup_file(daemon: &Daemon, id: &str, controller: &str, v1: &str, v2: &str) -> Result<String> {
    let root = Path::new("/sys/fs/cgroup");
    let unified = root.join("cgroup.controllers").exists();
    let hierarchy = if unified { root.to_owned() } else { root.join(controller) };
    let path: PathBuf = hierarchy.join(daemon.namespace()).join(id).join(if unified { v2 } else { v1 });
    let value = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    Ok(value.trim().to_owned())
}

#[test]
fn limits_are_those_of_the_cgroup() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (daemon, ctr, census) = scene()?;
    ctr.run(&format!("run -d --memory-limit 33554432 --cpus 0.5 {IMAGE} limited sleep 3600"))?;
    let file = |controller, v1, v2| cgroup_file(&daemon, "limited", controller, v1, v2);
    let memory = file("memory", "memory.limit_in_bytes", "memory.max")?;
    ensure!(memory == "33554432", "{memory}");
    let quota = file("cpu", "cpu.cfs_quota_us", "cpu.max")?;
    ensure!(quota == "50000" || quota == "50000 100000", "{quota}");
    // An exec is bound by the same.
    let own = "/proc/self/cgroup";
    let seen = ctr.run(&format!("tasks exec --exec-id e limited cat {own}"))?;
    ensure!(seen.contains("/limited") || seen.lines().all(|line| line.ends_with(":/")), "{seen}");
    end(&ctr, "limited")?;
    census.settle(&daemon.path(""))
}

/// containerd's default set (its `defaultUnixCaps`), and the one descriptor that `ls` opens itself.
#[test]
fn capabilities_and_descriptors_are_the_default_ones() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (daemon, ctr, census) = scene()?;
    let set = "grep -E 'Cap(Prm|Eff|Bnd)' /proc/self/status | cut -f 2; ls /proc/self/fd | tr '\\n' ' '";
    let expected = "00000000a80425fb\n00000000a80425fb\n00000000a80425fb\n0 1 2 3 ";
    let seen = output(&ctr, "", "plain", set)?;
    ensure!(seen == expected, "{seen}");
    let dropped = output(&ctr, "--cap-drop CAP_CHOWN", "dropped", "grep CapEff /proc/self/status")?;
    ensure!(dropped == "CapEff:\t00000000a80425fa\n", "{dropped}");
    ctr.run(&format!("run -d {IMAGE} long sleep 3600"))?;
    let seen = ctr.run_args(&["tasks", "exec", "--exec-id", "e", "long", "sh", "-c", set])?;
    ensure!(seen == expected, "in an exec: {seen}");
    end(&ctr, "long")?;
    census.settle(&daemon.path(""))
}

#[test]
fn seccomp_denies_what_its_profile_denies() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (daemon, ctr, census) = scene()?;
    // A user namespace needs no capability, so that only the profile can be in the way.
    output(&ctr, "", "free", "busybox unshare -U true")?;
    let denied = ctr.words(&format!("run --rm --seccomp {IMAGE} bound busybox unshare -U true")).output()?;
    ensure!(!denied.status.success(), "{}", text(&denied));
    ensure!(text(&denied).contains("Operation not permitted"), "{}", text(&denied));
    census.settle(&daemon.path(""))
}

/// `ctr shim` finds the shim by a path that it computes itself, and speaks to it without the daemon.
#[test]
fn ctr_speaks_to_the_shim_itself() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (daemon, ctr, census) = scene()?;
    ctr.run(&format!("run -d {IMAGE} direct sleep 3600"))?;
    let state = ctr.run("shim --id direct state")?;
    ensure!(state.contains("direct") && state.contains(&daemon.path("").display().to_string()), "{state}");
    end(&ctr, "direct")?;
    census.settle(&daemon.path(""))
}

#[test]
fn a_closed_stdin_ends_what_reads_it() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (daemon, _, census) = scene()?;
    let parent = image::digest(&image::busybox_layer()?);
    let (stdin, stdout) = (daemon.path("stdin"), daemon.path("stdout"));
    for fifo in [&stdin, &stdout] {
        mkfifo(fifo, Mode::from_bits_truncate(0o600))?;
    }
    let reader = stdout.clone();
    let reader = thread::spawn(move || -> std::io::Result<String> {
        let mut text = String::new();
        File::open(reader)?.read_to_string(&mut text)?;
        Ok(text)
    });
    runtime()?.block_on(async {
        let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
        let paths = (stdin.display().to_string(), stdout.display().to_string());
        client.start_on("cat", &parent, &["cat"], &paths.0, &paths.1).await?;
        // The shim holds the other end: this does not wait.
        File::options().write(true).open(&stdin)?.write_all(b"one line\n")?;
        let close = CloseIoRequest { container_id: "cat".into(), stdin: true, ..Default::default() };
        client.tasks.close_io(close).await?;
        ensure!(client.finish("cat").await? == 0);
        anyhow::Ok(())
    })?;
    let copied = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(copied == "one line\n", "{copied:?}");
    census.settle(&daemon.path(""))
}

#[test]
fn ctr_attaches_to_a_running_container() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (daemon, ctr, census) = scene()?;
    let echo = "while read line; do echo got $line; done";
    ctr.run_args(&["run", "-d", IMAGE, "echo", "sh", "-c", echo])?;
    let mut attached = ctr.words("tasks attach echo").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = attached.stdin.take().context("no pipe")?;
    let stdout = attached.stdout.take().context("no pipe")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    stdin.write_all(b"one\ntwo\n")?;
    for expected in ["got one", "got two"] {
        let line = lines.recv_timeout(wait::PATIENCE);
        if line.is_err() {
            let _ = attached.kill();
        }
        ensure!(line? == expected);
    }
    ctr.run("tasks kill -s SIGKILL echo")?;
    let status = wait::until("ctr ends with the container", || attached.try_wait().ok().flatten())?;
    ensure!(status.code() == Some(137), "{status}");
    drop(stdin);
    // `ctr tasks attach` deletes the task of its own accord.
    ctr.words("tasks rm echo").output()?;
    ctr.run("containers rm echo")?;
    census.settle(&daemon.path(""))
}
