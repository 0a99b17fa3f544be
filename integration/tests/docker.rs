//! Docker Engine on our socket: what people do with it every day, and both daemons' deaths under its containers.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::docker::Docker;
use davit_integration::{Daemon, wait};
use nix::sys::signal::Signal;

use crate::root;

/// Prints a line every fifth of a second.
const TICKS: &str = "n=0; while :; do echo tick $n; n=$((n+1)); usleep 200000; done";

#[test]
fn docker_engine_runs_on_our_socket() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let folder = daemon.path("");
    let before = Census::take(&folder);
    let mut docker = Docker::start(&daemon)?;
    type Step = (&'static str, fn(&Docker) -> Result<()>);
    let steps: &[Step] = &[
        ("exit codes", exit_codes),
        ("a terminal", terminal),
        ("one detached container", detached),
        ("restart policies", restart_policies),
        ("what confines a container", confinement),
        ("volumes", volumes),
        ("networks", networks),
        ("a build of two stages", build),
        ("ten at once", ten_at_once),
    ];
    for (name, step) in steps {
        let started = Instant::now();
        step(&docker).with_context(|| format!("{name}\n{}", docker.log()))?;
        println!("{name}: {:.1} s", started.elapsed().as_secs_f64());
    }
    both_daemons_die(&mut daemon, &mut docker).with_context(|| docker.log())?;
    ensure!(docker.run(&["ps", "--all", "--quiet"])?.is_empty(), "a container is left");
    docker.stop()?;
    // What dockerd itself mounts, its folder above all, it leaves mounted where it restores live containers.
    let dockers = daemon.path("docker").display().to_string();
    let left = || {
        let mut left = Census::take(&folder).since(&before);
        left.retain(|line| !line.contains(&dockers));
        left
    };
    wait::until("nothing is left", || left().is_empty().then_some(()))
        .with_context(|| format!("{:?}", left()))
}

fn busybox(docker: &Docker, script: &str) -> Result<String> {
    docker.run(&["run", "--rm", "busybox", "sh", "-c", script])
}

fn exit_codes(docker: &Docker) -> Result<()> {
    ensure!(busybox(docker, "echo hello")? == "hello");
    for (code, args) in [
        (0, &["busybox", "true"][..]),
        (1, &["busybox", "false"]),
        (137, &["busybox", "sh", "-c", "exit 137"]),
        (127, &["busybox", "/nonexistent"]),
        (126, &["busybox", "/etc/passwd"]),
        (125, &["--no-such-flag", "busybox"]),
    ] {
        let output = docker.output(&[&["run", "--rm"], args].concat())?;
        ensure!(output.status.code() == Some(code), "{args:?}: {output:?}");
    }
    Ok(())
}

/// Runs `docker` on a terminal of script(1), and gives what it shows.
fn on_terminal(docker: &Docker, args: &[&str]) -> Result<String> {
    let command = docker.command(args);
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let output = Command::new("script")
        .args(["--quiet", "--return", "--command", &words.join(" "), "/dev/null"])
        .env("HOME", docker.folder())
        .stdin(Stdio::null())
        .output()?;
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{args:?}: {shown}");
    Ok(shown)
}

fn terminal(docker: &Docker) -> Result<()> {
    let shown = on_terminal(docker, &["run", "--rm", "--interactive", "--tty", "busybox", "tty"])?;
    ensure!(shown.contains("/dev/pts/0"), "{shown}");
    Ok(())
}

/// What `docker` with these arguments prints until it has printed `wanted`; then it is killed.
fn follow(docker: &Docker, args: &[&str], wanted: &str) -> Result<()> {
    let shown = docker.folder().join("shown");
    let mut child = docker.command(args).stdout(fs::File::create(&shown)?).stderr(Stdio::null()).spawn()?;
    let seen = wait::until(wanted, || fs::read_to_string(&shown).ok()?.contains(wanted).then_some(()));
    child.kill()?;
    child.wait()?;
    seen.with_context(|| {
        format!("docker {}: {}", args.join(" "), fs::read_to_string(&shown).unwrap_or_default())
    })
}

fn detached(docker: &Docker) -> Result<()> {
    docker.run(&["run", "--detach", "--name", "ticks", "busybox", "sh", "-c", TICKS])?;
    let state = |format: &str| docker.run(&["inspect", "--format", format, "ticks"]);

    follow(docker, &["logs", "--follow", "ticks"], "tick 3")?;
    follow(docker, &["attach", "--no-stdin", "--sig-proxy=false", "ticks"], "tick")?;
    let exec = docker.output(&["exec", "ticks", "sh", "-c", "echo inside; exit 9"])?;
    ensure!(exec.status.code() == Some(9) && exec.stdout == b"inside\n", "{exec:?}");
    ensure!(on_terminal(docker, &["exec", "--interactive", "--tty", "ticks", "tty"])?.contains("/dev/pts/"));

    let (there, back) = (docker.folder().join("there"), docker.folder().join("back"));
    fs::write(&there, "data")?;
    docker.run(&["cp", &there.display().to_string(), "ticks:/tmp/file"])?;
    ensure!(docker.run(&["exec", "ticks", "cat", "/tmp/file"])? == "data");
    docker.run(&["cp", "ticks:/tmp/file", &back.display().to_string()])?;
    ensure!(fs::read(&back)? == b"data");

    let stats = docker.run(&["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "ticks"])?;
    ensure!(!stats.starts_with("0 ") && !stats.contains("0B / 0B"), "{stats}");
    let top = docker.run(&["top", "ticks"])?;
    ensure!(top.contains("tick $n"), "{top}");

    docker.run(&["pause", "ticks"])?;
    ensure!(state("{{.State.Status}}")? == "paused");
    docker.run(&["unpause", "ticks"])?;
    ensure!(state("{{.State.Status}}")? == "running");

    docker.run(&["update", "--memory", "64m", "--memory-swap", "64m", "ticks"])?;
    let limit = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null";
    let limit = docker.output(&["exec", "ticks", "sh", "-c", limit])?;
    ensure!(limit.stdout == b"67108864\n", "{limit:?}");

    let pid = state("{{.State.Pid}}")?;
    docker.run(&["restart", "--time", "0", "ticks"])?;
    ensure!(state("{{.State.Status}}")? == "running" && state("{{.State.Pid}}")? != pid);
    docker.run(&["kill", "ticks"])?;
    wait::until("it is killed", || (state("{{.State.Status}}").ok()? == "exited").then_some(()))?;
    ensure!(state("{{.State.ExitCode}}")? == "137");
    docker.run(&["start", "ticks"])?;
    docker.run(&["rm", "--force", "ticks"])?;
    Ok(())
}

fn restart_policies(docker: &Docker) -> Result<()> {
    let failing = ["--restart", "on-failure:2", "--name", "failing", "busybox", "sh", "-c", "exit 3"];
    docker.run(&[&["run", "--detach"], &failing[..]].concat())?;
    let state = |format: &str| docker.run(&["inspect", "--format", format, "failing"]);
    wait::until("two restarts", || {
        (state("{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}").ok()? == "2 exited 3").then_some(())
    })?;
    docker.run(&["rm", "failing"])?;

    docker.run(&[
        "run",
        "--detach",
        "--restart",
        "always",
        "--name",
        "always",
        "busybox",
        "sleep",
        "1000",
    ])?;
    let pid = || docker.run(&["inspect", "--format", "{{.State.Pid}}", "always"]);
    let first = pid()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first.parse()?), Signal::SIGKILL)?;
    wait::until("it runs again", || pid().ok().filter(|pid| *pid != first && pid != "0"))?;
    docker.run(&["rm", "--force", "always"])?;
    Ok(())
}

fn confinement(docker: &Docker) -> Result<()> {
    let with = |flags: &[&str], script: &str| {
        docker.run(&[&["run", "--rm"], flags, &["busybox", "sh", "-c", script]].concat())
    };
    let capabilities = "grep CapEff /proc/self/status";
    ensure!(with(&["--init"], "ps")?.contains("docker-init"));
    ensure!(with(&["--cap-drop", "ALL"], capabilities)?.ends_with("0000000000000000"));
    ensure!(
        with(&["--security-opt", "seccomp=unconfined"], "grep Seccomp: /proc/self/status")?.ends_with('0')
    );
    ensure!(with(&[], "grep Seccomp: /proc/self/status")?.ends_with('2'));
    let profile = docker.folder().join("profile.json");
    let denied = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}"#;
    fs::write(&profile, denied)?;
    let seccomp = format!("seccomp={}", profile.display());
    let refused = with(&["--security-opt", &seccomp], "mkdir /tmp/x 2>&1; touch /tmp/y && echo made")?;
    ensure!(refused.contains("Operation not permitted") && refused.ends_with("made"), "{refused}");
    ensure!(with(&["--read-only"], "touch /x 2>&1 || true")?.contains("Read-only file system"));
    // A privileged container gets all capabilities, and a runtime can give only what it has.
    let own = fs::read_to_string("/proc/self/status")?;
    let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap")?.trim().parse()?;
    let all = format!("{:016x}", (1u64 << (last + 1)) - 1);
    if own.contains(&format!("CapEff:\t{all}")) {
        ensure!(with(&["--privileged"], capabilities)?.ends_with(&all));
    } else {
        println!("skipped: --privileged, this machine's root lacks capabilities");
    }
    Ok(())
}

fn volumes(docker: &Docker) -> Result<()> {
    docker.run(&["volume", "create", "data"])?;
    docker.run(&[
        "run",
        "--rm",
        "--volume",
        "data:/data",
        "busybox",
        "sh",
        "-c",
        "echo kept > /data/file",
    ])?;
    ensure!(
        docker.run(&["run", "--rm", "--volume", "data:/data:ro", "busybox", "cat", "/data/file"])? == "kept"
    );
    docker.run(&["volume", "rm", "data"])?;
    Ok(())
}

fn networks(docker: &Docker) -> Result<()> {
    let serve = "echo page > /tmp/index.html; exec busybox httpd -f -p 80 -h /tmp";
    let publish = ["--publish", "18080:80", "--name", "web"];
    docker.run(&[&["run", "--detach"], &publish[..], &["busybox", "sh", "-c", serve]].concat())?;
    let address = docker.run(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web"])?;
    for address in [format!("{address}:80"), "172.17.0.1:18080".to_owned()] {
        let page = wait::until(&address, || docker.get(address.parse().ok()?).ok())?;
        ensure!(page.ends_with("page\n"), "{address}: {page}");
    }
    docker.run(&["rm", "--force", "web"])?;

    docker.run(&["network", "create", "one"])?;
    docker.run(&["run", "--detach", "--network", "one", "--name", "first", "busybox", "sleep", "1000"])?;
    docker.run(&["run", "--detach", "--name", "second", "busybox", "sleep", "1000"])?;
    let ping = ["busybox", "ping", "-c", "1", "-w", "20", "first"];
    docker.run(&[&["run", "--rm", "--network", "one", "busybox"], &ping[..]].concat())?;
    docker.run(&["network", "connect", "one", "second"])?;
    docker.run(&[&["exec", "second"], &ping[..]].concat())?;
    docker.run(&["rm", "--force", "first", "second"])?;
    docker.run(&["network", "rm", "one"])?;
    Ok(())
}

fn build(docker: &Docker) -> Result<()> {
    let context = docker.folder().join("context");
    fs::create_dir_all(&context)?;
    let dockerfile = "FROM busybox AS one\nRUN echo built > /tmp/out\nFROM busybox\nCOPY --from=one /tmp/out /out\n\
                      CMD [\"cat\", \"/out\"]\n";
    fs::write(context.join("Dockerfile"), dockerfile)?;
    docker.run(&["build", "--quiet", "--tag", "built", &context.display().to_string()])?;
    ensure!(docker.run(&["run", "--rm", "built"])? == "built");
    Ok(())
}

fn ten_at_once(docker: &Docker) -> Result<()> {
    let start = |n: usize| {
        let echo = ["run", "--rm", "busybox", "echo", &n.to_string()].map(str::to_owned);
        let args: Vec<&str> = echo.iter().map(String::as_str).collect();
        docker.command(&args).stdout(Stdio::piped()).spawn()
    };
    let running: Vec<_> = (0..10).map(start).collect::<std::io::Result<_>>()?;
    for (n, child) in running.into_iter().enumerate() {
        let output = child.wait_with_output()?;
        ensure!(output.status.success() && output.stdout == format!("{n}\n").into_bytes(), "{n}: {output:?}");
    }
    Ok(())
}

/// A container does not notice that `dockerd` is restarted, nor that our daemon is killed; one that ends meanwhile
/// has its exit code.
fn both_daemons_die(daemon: &mut Daemon, docker: &mut Docker) -> Result<()> {
    docker.run(&["run", "--detach", "--name", "lives", "busybox", "sh", "-c", TICKS])?;
    let wait_for_file = "until test -e /tmp/stop; do usleep 100000; done; exit 7";
    docker.run(&["run", "--detach", "--name", "ends", "busybox", "sh", "-c", wait_for_file])?;
    let pid = |docker: &Docker, name: &str| docker.run(&["inspect", "--format", "{{.State.Pid}}", name]);
    let (lives, ends) = (pid(docker, "lives")?, pid(docker, "ends")?);

    daemon.stop(Signal::SIGKILL)?;
    fs::write(format!("/proc/{ends}/root/tmp/stop"), "")?;
    wait::until("it ends without a daemon", || {
        (!Path::new(&format!("/proc/{ends}")).exists()).then_some(())
    })?;
    daemon.restart()?;
    wait::until("dockerd learns the exit code", || {
        let format = "{{.State.Status}} {{.State.ExitCode}}";
        (docker.run(&["inspect", "--format", format, "ends"]).ok()? == "exited 7").then_some(())
    })?;
    wait::until("an exec works again", || docker.run(&["exec", "lives", "true"]).ok())?;

    docker.stop()?;
    docker.restart()?;
    ensure!(pid(docker, "lives")? == lives, "another process");
    ensure!(docker.run(&["exec", "lives", "echo", "again"])? == "again");
    let last = || docker.run(&["logs", "--tail", "1", "lives"]);
    let seen = last()?;
    wait::until("its output goes on", || (last().ok()? != seen).then_some(()))?;
    docker.run(&["rm", "--force", "lives", "ends"])?;
    Ok(())
}
