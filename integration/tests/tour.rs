//! The tour of Debian's `ctr` 1.6.20, unmodified: everything that an operator types, with both runtimes and both
//! snapshotters.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use davit_integration::census::Census;
use davit_integration::ctr::{Ctr, text};
use davit_integration::{Daemon, bins, image, wait};

use crate::{CONTROLLERS, root};

const IMAGE: &str = image::BUSYBOX;

/// A tour's choice of snapshotter and runtime, as flags of `ctr`.
struct Choice {
    snapshotter: &'static str,
    runtime: &'static str,
    /// Another shim than ours.
    shim: Option<&'static str>,
}

#[test]
fn with_overlayfs_and_runc() -> Result<()> {
    everything(&Choice { snapshotter: "overlayfs", runtime: "", shim: None })
}

#[test]
fn with_native_and_runc() -> Result<()> {
    everything(&Choice { snapshotter: "native", runtime: "", shim: None })
}

#[test]
fn with_overlayfs_and_crun() -> Result<()> {
    if bins::on_path("crun").is_none() {
        eprintln!("skipped: crun is not installed");
        return Ok(());
    }
    let choice = Choice { snapshotter: "overlayfs", runtime: "--runc-binary crun", shim: None };
    let _alone = CONTROLLERS.write().unwrap_or_else(PoisonError::into_inner);
    let folder = Path::new("/sys/fs/cgroup/hugetlb");
    let hybrid = std::fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").unwrap_or_default();
    if !root() || !hybrid.contains("hugetlb") {
        return everything(&choice);
    }
    // crun 1.8 refuses a host that has hugetlb on v2 beside controllers on v1. A daemon in a mount namespace of its own
    // gets it on v1, and with the namespace that is over.
    std::fs::create_dir(folder)?;
    let mount = format!("mount -t cgroup -o hugetlb hugetlb {} && exec \"$0\" \"$@\"", folder.display());
    let daemon = Daemon::start_wrapped(&["unshare", "--mount", "sh", "-c", &mount])?;
    let namespace = daemon.namespace();
    let result = everything_on(&daemon, &choice);
    drop(daemon);
    // The parent of the containers' cgroups keeps the hierarchy, and with it the controller, on v1: it is removed, and the
    // kernel takes a moment to let go of it.
    let release = format!(
        "mount -t cgroup -o hugetlb hugetlb {0} && rmdir {0}/{namespace}/* {0}/{namespace}; umount {0}",
        folder.display()
    );
    let on_v2 = || {
        let controllers = std::fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers");
        controllers.is_ok_and(|controllers| controllers.contains("hugetlb"))
    };
    let released = wait::until("the host has hugetlb on v2 again", || {
        Command::new("unshare")
            .args(["--mount", "sh", "-c", &release])
            .stderr(Stdio::null())
            .status()
            .ok()?;
        // The kernel gives it back a while after the last unmount; to mount it again at once would take it again.
        for _ in 0..200 {
            if on_v2() {
                return Some(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    });
    std::fs::remove_dir(folder)?;
    result.and(released)
}

/// Debian's Go shim under our daemon: whoever changes over keeps the shims that run.
#[test]
fn with_the_shim_of_containerd() -> Result<()> {
    let _unmoved = CONTROLLERS.read().unwrap_or_else(PoisonError::into_inner);
    let shim = Some("/usr/bin/containerd-shim-runc-v2");
    everything(&Choice { snapshotter: "overlayfs", runtime: "", shim })
}

fn everything(choice: &Choice) -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = match choice.shim {
        Some(shim) => Daemon::start_with_shim(Path::new(shim))?,
        None => Daemon::start()?,
    };
    everything_on(&daemon, choice)
}

fn everything_on(daemon: &Daemon, choice: &Choice) -> Result<()> {
    let ctr = daemon.ctr();
    let before = Census::take(&daemon.path(""));
    let events = Events::start(&ctr)?;

    // First, while nothing was deleted: a blob that nothing refers to is collected after that, at any moment.
    content(&ctr, &daemon.path("blob"))?;
    let archive = daemon.path("busybox.tar");
    image::busybox(&archive)?;
    images(&ctr, choice, &archive, &daemon.path("export.tar"))?;
    runs(&ctr, choice)?;
    life(&ctr, choice, &events)?;
    terminal(&ctr, choice)?;
    metadata(&ctr, choice, &daemon.namespace())?;

    ctr.run(&format!("images rm --sync {IMAGE}"))?;
    ensure!(ctr.run("images ls -q")?.trim().is_empty(), "an image is left");
    before.settle(&daemon.path(""))
}

/// A subscriber that was there from the beginning.
struct Events {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Events {
    fn start(ctr: &Ctr) -> Result<Events> {
        let mut child = ctr.words("events").stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().expect("the pipe was asked for");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let events = Events { child, lines };
        // containerd's Subscribe acknowledges nothing: the first event seen tells that it is in force.
        wait::until("the subscription is in force", || {
            ctr.run("namespaces create probe").ok()?;
            let seen = events.next(Duration::from_millis(200));
            ctr.run("namespaces rm probe").ok()?;
            seen
        })?;
        Ok(events)
    }

    fn next(&self, patience: Duration) -> Option<String> {
        self.lines.recv_timeout(patience).ok()
    }

    /// The topics of the events that name `id`, until `last` is among them.
    fn topics(&self, id: &str, last: &str) -> Result<Vec<String>> {
        let mut topics = Vec::new();
        let end = Instant::now() + wait::PATIENCE;
        while !topics.iter().any(|topic| topic == last) {
            ensure!(Instant::now() < end, "no {last} among {topics:?}");
            let Some(line) = self.next(Duration::from_millis(100)) else { continue };
            if line.contains(&format!("\"{id}\""))
                && let Some(topic) = line.split_whitespace().find(|word| word.starts_with('/'))
            {
                topics.push(topic.to_owned());
            }
        }
        Ok(topics)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn images(ctr: &Ctr, choice: &Choice, archive: &Path, export: &Path) -> Result<()> {
    let imported =
        ctr.run(&format!("images import --snapshotter {} {}", choice.snapshotter, archive.display()))?;
    ensure!(imported.contains(IMAGE), "{imported}");
    ensure!(ctr.run("images ls")?.contains("application/vnd.oci.image.manifest.v1+json"));
    ctr.run(&format!("images tag {IMAGE} example.com/other:1"))?;
    let error = ctr.fails(&format!("images tag {IMAGE} example.com/other:1"))?;
    ensure!(error.contains("already exists"), "{error}");
    ensure!(ctr.run("images ls -q")?.lines().count() == 2);
    ctr.run("images label example.com/other:1 a=b")?;
    ensure!(ctr.run("images ls labels.a==b")?.contains("example.com/other:1"));
    ctr.run(&format!("images check --snapshotter {}", choice.snapshotter))?;
    ctr.run(&format!("images export {} {IMAGE}", export.display()))?;
    ensure!(std::fs::metadata(export)?.len() > 500_000);
    ctr.run("images rm example.com/other:1")?;
    let error = ctr.fails("run --rm nobody.example/none:1 x true")?;
    ensure!(error.contains("not found"), "{error}");
    Ok(())
}

fn runs(ctr: &Ctr, choice: &Choice) -> Result<()> {
    let run = |flags: &str, id: &str, args: &[&str]| {
        let line =
            format!("run --rm --snapshotter {} {} {flags} {IMAGE} {id}", choice.snapshotter, choice.runtime);
        let mut words: Vec<&str> = line.split_whitespace().collect();
        words.extend(args);
        ctr.command(&words).output()
    };
    let output = run("", "hello", &["echo", "hello world"])?;
    ensure!(output.status.success() && output.stdout == b"hello world\n", "{output:?}");
    ensure!(run("", "seven", &["sh", "-c", "exit 7"])?.status.code() == Some(7));
    let output = run("", "streams", &["sh", "-c", "echo out; echo err >&2"])?;
    ensure!(output.stdout == b"out\n" && output.stderr.ends_with(b"err\n"), "{output:?}");
    let output = run("--env A=b --cwd /tmp", "env", &["sh", "-c", "echo $A; pwd"])?;
    ensure!(output.stdout == b"b\n/tmp\n", "{output:?}");
    let output = run("", "missing", &["no-such-program"])?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && text.contains("no-such-program"), "{text}");
    let limits = "--memory-limit 33554432 --cpus 0.5 --seccomp";
    let output = run(limits, "limits", &["sh", "-c", "grep Seccomp: /proc/self/status; echo done"])?;
    ensure!(output.stdout == b"Seccomp:\t2\ndone\n", "{output:?}");
    // Everything that a container of one's own namespaces should not see.
    let output = run("", "alone", &["sh", "-c", "ls /proc/self/fd | wc -l; echo $$"])?;
    ensure!(output.stdout == b"4\n1\n", "a descriptor or a process leaks in: {output:?}");
    Ok(())
}

fn life(ctr: &Ctr, choice: &Choice, events: &Events) -> Result<()> {
    let line = format!(
        "run -d --memory-limit 67108864 --snapshotter {} {} {IMAGE} life sleep 3600",
        choice.snapshotter, choice.runtime
    );
    ctr.run(&line)?;
    ensure!(ctr.run("tasks ls")?.contains("RUNNING"));
    let error = ctr.fails(&line)?;
    ensure!(error.contains("already exists"), "{error}");
    let output =
        ctr.run_args(&["tasks", "exec", "--exec-id", "e1", "life", "sh", "-c", "echo in $0", "here"])?;
    ensure!(output == "in here\n", "{output}");
    let code = ctr.words("tasks exec --exec-id e2 life false").status()?.code();
    ensure!(code == Some(1), "{code:?}");
    let ps = ctr.run("tasks ps life")?;
    ensure!(ps.lines().count() == 2, "{ps}");
    ctr.run("tasks pause life")?;
    ensure!(ctr.run("tasks ls")?.contains("PAUSED"));
    ctr.run("tasks resume life")?;
    ensure!(ctr.run("tasks ls")?.contains("RUNNING"));
    let metrics = ctr.run("tasks metrics life")?;
    ensure!(metrics.contains("memory.") && metrics.contains("pids."), "{metrics}");
    let error = ctr.fails("tasks rm life")?;
    ensure!(error.contains("running") || error.contains("stopped"), "{error}");
    let error = ctr.fails("containers rm life")?;
    ensure!(!error.is_empty());
    ctr.run("tasks kill -s SIGKILL life")?;
    wait::until("the task is stopped", || ctr.run("tasks ls").ok()?.contains("STOPPED").then_some(()))?;
    let removed = text(&ctr.words("tasks rm life").output()?);
    ensure!(removed.contains("exit code 137"), "{removed}");
    ctr.run("containers rm life")?;
    let topics = events.topics("life", "/containers/delete")?;
    let expected = [
        "/snapshot/prepare",
        "/containers/create",
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
        "/snapshot/remove",
        "/containers/delete",
    ];
    ensure!(topics == expected, "{topics:#?}");
    let error = ctr.fails("tasks kill life")?;
    ensure!(error.contains("not found"), "{error}");
    Ok(())
}

fn terminal(ctr: &Ctr, choice: &Choice) -> Result<()> {
    let flags = format!("--snapshotter {} {}", choice.snapshotter, choice.runtime);
    let output =
        ctr.on_terminal(&format!("run --rm -t {flags} {IMAGE} tty sh -c 'tty; stty size; sleep 1'"))?;
    ensure!(output.contains("/dev/pts/0"), "{output:?}");
    ctr.run(&format!("run -d {flags} {IMAGE} ttyexec sleep 3600"))?;
    let output = ctr.on_terminal("tasks exec -t --exec-id t1 ttyexec sh -c 'tty; sleep 1'")?;
    ensure!(output.contains("/dev/pts/"), "{output:?}");
    ctr.run("tasks kill -s SIGKILL ttyexec")?;
    wait::until("the task is stopped", || ctr.run("tasks ls").ok()?.contains("STOPPED").then_some(()))?;
    ctr.words("tasks rm ttyexec").output()?;
    ctr.run("containers rm ttyexec")?;
    Ok(())
}

fn metadata(ctr: &Ctr, choice: &Choice, namespace: &str) -> Result<()> {
    let version = ctr.run("version")?;
    ensure!(version.contains("v2.3.4"), "{version}");
    let plugins = ctr.run("plugins ls")?;
    ensure!(plugins.contains("io.containerd.snapshotter.v1") && plugins.contains("overlayfs"), "{plugins}");

    ctr.run("namespaces create one a=b")?;
    ctr.run("namespaces label one c=d")?;
    let list = ctr.run("namespaces ls")?;
    ensure!(list.contains("a=b") && list.contains("c=d"), "{list}");
    let error = ctr.fails("namespaces create one")?;
    ensure!(error.contains("already exists"), "{error}");
    let error = ctr.fails(&format!("namespaces rm {namespace}"))?;
    ensure!(error.contains("must be empty"), "{error}");
    ctr.run("namespaces rm one")?;

    ctr.run("leases create --id keep --expires 1h x=y")?;
    ensure!(ctr.run("leases ls")?.contains("keep"));
    ctr.run("leases rm keep")?;

    ctr.run(&format!(
        "containers create --snapshotter {} --label l=m {IMAGE} made true",
        choice.snapshotter
    ))?;
    ensure!(ctr.run("containers info made")?.contains("\"l\": \"m\""));
    ctr.run("containers label made n=o")?;
    ensure!(ctr.run("containers ls labels.n==o")?.contains("made"));

    let snapshots = format!("snapshots --snapshotter {}", choice.snapshotter);
    ensure!(ctr.run(&format!("{snapshots} ls"))?.contains("made"));
    ensure!(ctr.run(&format!("{snapshots} tree"))?.contains("made"));
    ensure!(ctr.run(&format!("{snapshots} usage made"))?.contains("made"));
    let mounts = ctr.run(&format!("{snapshots} mounts /mnt made"))?;
    ensure!(mounts.starts_with("mount -t "), "{mounts}");
    ensure!(ctr.run(&format!("{snapshots} info made"))?.contains("Active"));
    let error = ctr.fails(&format!("{snapshots} rm nothing"))?;
    ensure!(error.contains("not found") || error.contains("does not exist"), "{error}");
    ctr.run("containers rm made")?;
    ensure!(!ctr.run(&format!("{snapshots} ls"))?.contains("made"));
    Ok(())
}

fn content(ctr: &Ctr, blob: &Path) -> Result<()> {
    std::fs::write(blob, b"some content")?;
    let digest = image::digest(b"some content");
    let file = || std::fs::File::open(blob);
    // A blob that nothing refers to may be collected at any moment, so also before the label that keeps it.
    wait::until("a blob is kept by its label", || {
        let line = format!("content ingest --expected-digest {digest} --expected-size 12 ref-1");
        ctr.words(&line).stdin(file().ok()?).output().ok()?;
        ctr.run(&format!("content label {digest} containerd.io/gc.root=now k=v")).ok()
    })?;
    ensure!(ctr.run(&format!("content get {digest}"))? == "some content");
    ensure!(ctr.run("content ls")?.contains(&digest));
    ensure!(ctr.run("content ls labels.k==v")?.contains(&digest));
    let wrong = image::digest(b"other content");
    let mut ingest = ctr.words(&format!("content ingest --expected-digest {wrong} ref-2"));
    ensure!(!ingest.stdin(file()?).output()?.status.success(), "a wrong digest must be refused");
    ctr.run("content active")?;
    ctr.run("content prune references")?;
    ctr.run(&format!("content rm {digest}"))?;
    let error = ctr.fails(&format!("content get {digest}"))?;
    ensure!(error.contains("not found"), "{error}");
    Ok(())
}
