//! `davit` as its users know it from Docker: names, files, mounts, terminals.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::daemon::ok;
use davit_integration::peer::Containerd;
use davit_integration::{Daemon, bins, wait};
use davit_proto::containerd::services::leases::v1::CreateRequest;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Request;

use crate::root;

fn daemon() -> Result<Daemon> {
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    Ok(daemon)
}

fn failed(output: &Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "it should fail");
    Ok(text)
}

#[test]
fn of_many_that_want_a_name_one_gets_it() -> Result<()> {
    const CLIENTS: usize = 20;
    if !root() {
        return Ok(());
    }
    let daemon = daemon()?;
    let before = Census::take(&daemon.path(""));
    let run = || {
        let mut command = daemon.davit_command(["run", "-d", "--name", "x", "busybox", "sleep", "1000"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let clients = (0..CLIENTS).map(|_| run()).collect::<std::io::Result<Vec<_>>>()?;
    let outputs = clients.into_iter().map(std::process::Child::wait_with_output);
    let outputs = outputs.collect::<std::io::Result<Vec<_>>>()?;
    let (won, lost): (Vec<&Output>, Vec<&Output>) =
        outputs.iter().partition(|output| output.status.success());
    ensure!(won.len() == 1, "{} have the name", won.len());
    let id = String::from_utf8_lossy(&won[0].stdout).trim().to_owned();
    for output in lost {
        let text = failed(output)?;
        ensure!(text.contains(&format!("\"x\" is already in use by container {}", &id[..12])), "{text}");
    }
    ensure!(ok(daemon.davit(["ps", "-aq", "--no-trunc"])?)?.trim() == id, "something else was made");
    ok(daemon.davit(["rm", "-f", "x"])?)?;
    ensure!(daemon.ctr().run("leases ls -q")?.trim().is_empty(), "a lock is left");
    ensure!(daemon.ctr().run("snapshots ls")?.lines().all(|line| !line.contains("Active")));
    // The name is free again.
    ok(daemon.davit(["run", "--rm", "--name", "x", "busybox", "true"])?)?;
    before.settle(&daemon.path(""))
}

#[test]
fn a_name_that_a_dead_client_has_locked_is_free_when_the_lock_expires() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = daemon()?;
    expired_lock(&daemon.address(), &daemon.namespace())?;
    // containerd collects nothing as long as nothing is changed.
    if bins::on_path("containerd").is_none() {
        eprintln!("skipped in part: needs containerd (apt-get install containerd)");
        return Ok(());
    }
    let peer = Containerd::start()?;
    peer.import_busybox()?;
    expired_lock(&peer.address(), &peer.namespace())
}

fn expired_lock(address: &Path, namespace: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let expires = prost_types::Timestamp::from(SystemTime::now() + Duration::from_secs(2)).to_string();
    let labels = [("containerd.io/gc.expire".to_owned(), expires)].into();
    let mut request = Request::new(CreateRequest { id: "davit-name-x".to_owned(), labels });
    request.metadata_mut().insert("containerd-namespace", namespace.parse()?);
    runtime.block_on(async {
        let channel = davit_integration::client::connect(address).await?;
        LeasesClient::new(channel).create(request).await?;
        anyhow::Ok(())
    })?;
    let davit = |words: &[&str]| {
        let mut command = Command::new(bins::folder()?.join("davit"));
        command.args(["--namespace", namespace, "--address"]).arg(address).args(words);
        ok(command.output()?)
    };
    let id = davit(&["create", "--name", "x", "busybox", "true"])?;
    ensure!(davit(&["ps", "-aq", "--no-trunc"])? == id);
    davit(&["rm", "x"]).map(drop)
}

#[test]
fn a_container_has_files_for_names_and_keeps_them() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = daemon()?;
    let show = "cat /etc/hostname /etc/hosts /etc/resolv.conf; hostname; id -u";
    let names = ["--hostname", "me", "--add-host", "db:10.1.2.3", "--dns", "9.9.9.9", "--dns-search", "a.b"];
    let run = ["run", "--name", "x", "-u", "1000"];
    let run = run.into_iter().chain(names).chain(["busybox", "sh", "-c", show]);
    let shown = ok(daemon.davit(run)?)?;
    let lines: Vec<&str> = shown.lines().collect();
    ensure!(lines.first() == Some(&"me") && lines.ends_with(&["me", "1000"]), "{shown}");
    for line in ["127.0.0.1\tlocalhost", "127.0.1.1\tme", "10.1.2.3\tdb", "nameserver 9.9.9.9", "search a.b"]
    {
        ensure!(lines.contains(&line), "{line} is not in {shown}");
    }
    let folder = daemon.path("root/etc").join(daemon.namespace());
    ensure!(fs::read_dir(&folder)?.count() == 1);
    // What the container writes into them is there at the next start, which may be after one of the host.
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    let hosts = ok(daemon.davit(["inspect", "-f", "{{.HostsPath}}", "x"])?)?;
    fs::write(hosts.trim(), "10.0.0.1\tchanged\n")?;
    let again = ok(daemon.davit(["start", "-a", "x"])?)?;
    ensure!(again.contains("10.0.0.1\tchanged") && again.starts_with("me\n"), "{again}");
    ok(daemon.davit(["rm", "x"])?)?;
    ensure!(fs::read_dir(&folder)?.count() == 0, "its files are left");

    // In the host's network they are the host's, and read-only.
    let script = "cmp /etc/resolv.conf /host/resolv.conf && ! touch /etc/hosts";
    let host = ["run", "--rm", "--net=host", "-v", "/etc:/host:ro", "busybox", "sh", "-c", script];
    ok(daemon.davit(host)?)?;
    let text = failed(&daemon.davit(["run", "--add-host", "no-address", "busybox"])?)?;
    ensure!(text.contains("want HOST:ADDRESS"), "{text}");
    Ok(())
}

#[test]
fn mounts_are_described_by_fields() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = daemon()?;
    let folder = daemon.path("shared");
    fs::create_dir(&folder)?;
    fs::write(folder.join("file"), "text")?;
    let bind = format!("type=bind,source={},target=/data,readonly", folder.display());
    let memory = "type=tmpfs,target=/memory,tmpfs-size=1m";
    let script = "cat /data/file; touch /data/other 2>/dev/null || echo read-only; df -k /memory | tail -1";
    let run = ["run", "--rm", "--mount", &bind, "--mount", memory, "busybox", "sh", "-c", script];
    let shown = ok(daemon.davit(run)?)?;
    ensure!(shown.starts_with("textread-only\n") && shown.contains(" 1024 "), "{shown}");
    let missing = format!("type=bind,source={}/none,target=/data", folder.display());
    let text = failed(&daemon.davit(["run", "--rm", "--mount", &missing, "busybox"])?)?;
    ensure!(text.contains("cannot use the folder or file of the host"), "{text}");
    ensure!(!folder.join("none").exists(), "a source of --mount is not made");
    Ok(())
}

/// A terminal with `davit` in it.
struct Screen {
    keyboard: fs::File,
    shown: Arc<Mutex<String>>,
    davit: Child,
}

impl Screen {
    fn open(daemon: &Daemon, words: &[&str]) -> Result<Screen> {
        let pty = nix::pty::openpty(None, None)?;
        let end = || pty.slave.try_clone();
        let mut command = daemon.davit_command(words);
        let davit = command.stdin(end()?).stdout(end()?).stderr(end()?).spawn()?;
        drop((command, pty.slave));
        let keyboard = fs::File::from(pty.master);
        let (mut screen, shown) = (keyboard.try_clone()?, Arc::new(Mutex::new(String::new())));
        let text = shown.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // At the end of its last process a terminal fails with EIO.
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                text.lock()
                    .expect("nobody panics with it")
                    .push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Ok(Screen { keyboard, shown, davit })
    }

    fn types(&mut self, keys: &str) -> Result<()> {
        Ok(self.keyboard.write_all(keys.as_bytes())?)
    }

    fn shows(&self, text: &str) -> Result<()> {
        wait::until(text, || self.shown.lock().expect("nobody panics with it").contains(text).then_some(()))
            .with_context(|| format!("shown: {}", self.shown.lock().expect("nobody panics with it")))
    }

    /// The exit code of `davit`.
    fn ends(&mut self) -> Result<Option<i32>> {
        let status = wait::until("davit ends", || self.davit.try_wait().ok().flatten())?;
        Ok(status.code())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.davit.kill();
        let _ = self.davit.wait();
    }
}

#[test]
fn a_container_is_left_alone_and_found_again() -> Result<()> {
    const LEAVE: &str = "\u{10}\u{11}";
    if !root() {
        return Ok(());
    }
    let mut daemon = daemon()?;
    let before = Census::take(&daemon.path(""));
    // The quotes keep what is typed from being taken for what is answered.
    let mut screen = Screen::open(&daemon, &["run", "-it", "--name", "x", "busybox", "sh"])?;
    screen.types("kept=42; echo fir''st\r")?;
    screen.shows("first")?;
    // Half of the keys are for the shell.
    screen.types("\u{10}")?;
    screen.types("\r")?;
    screen.types(LEAVE)?;
    screen.shows("detached; `davit attach x` comes back")?;
    ensure!(screen.ends()? == Some(0));
    ensure!(ok(daemon.davit(["ps", "--format", "{{.Names}} {{.State}}"])?)? == "x running\n");

    // It outlives the daemon, as all do.
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    let mut screen = Screen::open(&daemon, &["attach", "x"])?;
    screen.types("echo $kept again''st\r")?;
    screen.shows("42 against")?;
    let text = failed(&daemon.davit(["attach", "x"])?)?;
    ensure!(text.contains("another client is attached"), "{text}");
    // A client that dies gives it up, too.
    screen.davit.kill()?;
    screen.davit.wait()?;
    let mut screen = Screen::open(&daemon, &["attach", "--detach-keys", "ctrl-a,d", "x"])?;
    screen.types(&format!("echo $kept {LEAVE}third''ly\r"))?;
    screen.shows("thirdly")?;
    screen.types("\u{1}d")?;
    ensure!(screen.ends()? == Some(0));

    // A process in it is left alone, and ends with it.
    let mut exec = Screen::open(&daemon, &["exec", "-it", "x", "sh"])?;
    exec.types("echo ins''ide\r")?;
    exec.shows("inside")?;
    exec.types(LEAVE)?;
    exec.shows("the process goes on")?;
    ensure!(exec.ends()? == Some(0));

    let mut screen = Screen::open(&daemon, &["attach", "x"])?;
    screen.types("exit 5\r")?;
    ensure!(screen.ends()? == Some(5), "the exit code is that of the container");
    ensure!(ok(daemon.davit(["ps", "-a", "--format", "{{.Status}}"])?)?.starts_with("Exited (5) "));
    let text = failed(&daemon.davit(["attach", "x"])?)?;
    ensure!(text.contains("is not running"), "{text}");

    // Once more, left in an orderly way and by a client that is killed, and removed while nobody is there.
    let folder = || -> Result<PathBuf> {
        let id = ok(daemon.davit(["ps", "-q", "--no-trunc"])?)?;
        let record = daemon.ctr().run(&format!("containers info {}", id.trim()))?;
        let record: serde_json::Value = serde_json::from_str(&record)?;
        Ok(record["Labels"]["davit/fifos"].as_str().context("no folder of FIFOs")?.into())
    };
    for (words, is_killed) in
        [(["start", "-ai", "x"].as_slice(), false), (&["run", "-it", "busybox", "sh"], true)]
    {
        let mut screen = Screen::open(&daemon, words)?;
        screen.types("echo agai''n\r")?;
        screen.shows("again")?;
        if is_killed {
            screen.davit.kill()?;
            screen.davit.wait()?;
        } else {
            screen.types(LEAVE)?;
            ensure!(screen.ends()? == Some(0));
        }
        let folder = folder()?;
        ensure!(folder.is_dir());
        let id = ok(daemon.davit(["ps", "-q"])?)?;
        ok(daemon.davit(["rm", "-f", id.trim()])?)?;
        ensure!(!folder.exists(), "its FIFOs are left");
    }
    before.settle(&daemon.path(""))
}

#[test]
fn a_container_in_the_background_is_joined_and_removed_at_its_end() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = daemon()?;
    let before = Census::take(&daemon.path(""));
    let script = "while read -r word; do [ $word = end ] && exit 6; echo got $word; done";
    ok(daemon.davit(["run", "-d", "-i", "--rm", "--name", "x", "busybox", "sh", "-c", script])?)?;
    let mut attach = daemon.davit_command(["attach", "x"]);
    let mut joined = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = joined.stdin.take().context("no input")?;
    let mut output = BufReader::new(joined.stdout.take().context("no output")?);
    let mut line = String::new();
    input.write_all(b"one\n")?;
    output.read_line(&mut line)?;
    ensure!(line == "got one\n", "{line}");
    // The end of this client's input is not that of the container.
    drop(input);
    // The time for it to be told, if it were.
    ok(daemon.davit(["exec", "x", "true"])?)?;
    joined.kill()?;
    joined.wait()?;
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    let mut joined = daemon.davit_command(["attach", "x"]).stdin(Stdio::piped()).spawn()?;
    joined.stdin.take().context("no input")?.write_all(b"end\n")?;
    ensure!(joined.wait()?.code() == Some(6));
    wait::until("the container is removed", || {
        let left = ok(daemon.davit(["ps", "-aq"]).ok()?).ok()?;
        left.is_empty().then_some(())
    })?;
    before.settle(&daemon.path(""))
}

#[test]
fn what_ends_is_started_again_until_a_user_stops_it() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start_with(&[], "[restart]\ninterval = 1\n")?;
    daemon.import_busybox()?;
    let before = Census::take(&daemon.path(""));
    let run = |name: &str| {
        let script = "echo up; exec sleep 1000";
        let run = ["run", "-d", "--restart", "always", "--name", name, "busybox", "sh", "-c", script];
        ok(daemon.davit(run)?)
    };
    let state = |name: &str| {
        let shown =
            ok(daemon.davit(["inspect", "-f", "{{.State.Status}} {{.State.Pid}}", name]).ok()?).ok()?;
        let (word, pid) = shown.trim().split_once(' ')?;
        Some((word.to_owned(), pid.parse::<i32>().ok()?))
    };
    // What kills it is no client.
    let killed_and_started = |name: &str| {
        let (word, pid) = state(name).context("no state")?;
        ensure!(word == "running", "{name} is {word}");
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        wait::until("it is started again", || {
            state(name).filter(|(word, now)| word == "running" && *now != pid).map(drop)
        })
    };
    run("x")?;
    run("other")?;
    killed_and_started("x")?;
    ensure!(ok(daemon.davit(["logs", "x"])?)? == "up\nup\n");
    let policy = ["inspect", "-f", "{{.HostConfig.RestartPolicy.Name}}", "x"];
    ensure!(ok(daemon.davit(policy)?)?.trim() == "always");

    ok(daemon.davit(["stop", "-t", "0", "x"])?)?;
    // The daemon looks at all of them when it looks at the other.
    killed_and_started("other")?;
    ensure!(state("x").is_some_and(|(word, _)| word == "exited"), "{:?}", state("x"));
    ok(daemon.davit(["start", "x"])?)?;
    killed_and_started("x")?;
    ok(daemon.davit(["restart", "-t", "0", "x"])?)?;
    killed_and_started("x")?;
    let text = failed(&daemon.davit(["run", "--restart", "always", "busybox", "true"])?)?;
    ensure!(text.contains("--restart is for containers in the background"), "{text}");
    ok(daemon.davit(["rm", "-f", "x", "other"])?)?;
    before.settle(&daemon.path(""))
}

#[test]
fn lists_select_and_format() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = daemon()?;
    ok(daemon.davit(["run", "-d", "--name", "a", "-l", "tier=front", "busybox", "sleep", "1000"])?)?;
    ok(daemon.davit(["create", "--name", "b", "-l", "tier=back", "busybox", "true"])?)?;
    let ps = |words: &[&str]| ok(daemon.davit(["ps", "--format", "{{.Names}}"].iter().chain(words))?);
    ensure!(ps(&[])? == "a\n");
    ensure!(ps(&["-a"])? == "b\na\n", "the newest comes first");
    ensure!(ps(&["--filter", "status=created"])? == "b\n", "what is about states shows all of them");
    ensure!(ps(&["-a", "--filter", "label=tier=front"])? == "a\n");
    ensure!(ps(&["-l"])? == "b\n");
    let table = ok(daemon.davit(["ps", "-a", "--format", "table {{.Names}}\\t{{.Labels}}"])?)?;
    ensure!(table == "NAMES     LABELS\nb         tier=back\na         tier=front\n", "{table}");
    let label = ["inspect", "-f", "{{index .Config.Labels \"tier\"}} {{json .State.Running}}", "a"];
    ensure!(ok(daemon.davit(label)?)? == "front true\n");

    let history = ok(daemon.davit(["history", "--format", "{{.ID}} {{.Size}}", "busybox"])?)?;
    ensure!(history.lines().count() == 1 && history.trim().ends_with("MB"), "{history}");
    let once = ok(daemon.davit(["stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}"])?)?;
    ensure!(once == "a 1\n", "{once}");
    let mut stats = daemon.davit_command(["stats", "--format", "{{.Name}}", "a"]);
    let mut stats = stats.stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(stats.stdout.take().context("no output")?).lines();
    ensure!(lines.take(3).all(|line| line.is_ok_and(|line| line == "a")), "it measures again and again");
    stats.kill()?;
    stats.wait()?;
    ok(daemon.davit(["rm", "-f", "a", "b"])?).map(drop)
}

#[test]
fn every_command_is_completed_and_has_a_page() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let davit = bins::folder()?.join("davit");
    let help = ok(Command::new(&davit).arg("--help").output()?)?;
    let script = ok(Command::new(&davit).args(["completion", "bash"]).output()?)?;
    ok(Command::new(&davit).arg("man").arg(folder.path()).output()?)?;
    let commands = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let commands: Vec<&str> = commands
        .take_while(|line| !line.is_empty())
        .filter(|line| !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    ensure!(commands.len() > 30, "{commands:?}");
    for command in commands {
        ensure!(script.contains(&format!("davit,{command})")), "{command} is not completed");
        ensure!(folder.path().join(format!("davit-{command}.1")).exists(), "{command} has no page");
    }
    Ok(())
}
