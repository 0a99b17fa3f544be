//! Shims that execute a newer program while their containers run, and older shims under the daemon of today.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::ctr::text;
use davit_integration::daemon::ok;
use davit_integration::{Daemon, bins, image};
use nix::sys::signal::Signal;

use crate::restart::scenario;
use crate::root;

const SHIM: &str = "containerd-shim-davit-v2";
const GO_SHIM: &str = "containerd-shim-runc-v2";

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A folder where only root can write, as programs are installed in.
fn installed() -> Result<tempfile::TempDir> {
    let folder = tempfile::Builder::new().prefix("davit-installed-").tempdir_in("/var/lib")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    Ok(folder)
}

/// Puts a program in place as a package manager does: a new file gets the name of the old one.
fn install(program: &Path, folder: &Path) -> Result<PathBuf> {
    let path = folder.join(SHIM);
    let new = folder.join("new");
    fs::copy(program, &new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(&new, &path)?;
    Ok(path)
}

fn columns(daemon: &Daemon) -> Result<Vec<Vec<String>>> {
    let listed = ok(daemon.davit(["shim", "ls", "--no-trunc"])?)?;
    let cells = |line: &str| {
        line.split("   ").map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).collect()
    };
    Ok(listed.lines().skip(1).map(cells).collect())
}

#[test]
fn an_installed_shim_replaces_those_that_run() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let folder = installed()?;
    let built = bins::folder()?.join(SHIM);
    let shim = install(&built, folder.path())?;
    let mut daemon = Daemon::start_with_shim(&shim)?;
    daemon.import_busybox()?;
    let before = Census::take(&daemon.path(""));
    for name in ["one", "two"] {
        let script = "trap 'exit 7' TERM; while read -r line; do echo got $line; done; while :; do sleep 1 & wait $!; done";
        ok(daemon.davit(["run", "-d", "--name", name, image::BUSYBOX, "sh", "-c", script])?)?;
    }
    let shims = columns(&daemon)?;
    ensure!(shims.len() == 2, "{shims:?}");
    let pids: Vec<String> = shims.iter().map(|row| row[0].clone()).collect();
    ensure!(shims.iter().all(|row| row.contains(&shim.display().to_string())), "{shims:?}");
    let executed = |pid: &str| fs::metadata(format!("/proc/{pid}/exe")).map(|file| file.ino());

    // A newer one is installed. Who runs executes the old one, which has no name any more.
    install(&built, folder.path())?;
    let newer = fs::metadata(&shim)?.ino();
    for pid in &pids {
        ensure!(executed(pid)? != newer);
    }
    let shims = columns(&daemon)?;
    ensure!(shims.iter().all(|row| row.iter().any(|cell| cell.ends_with("(deleted)"))), "{shims:?}");
    let said = ok(daemon.davit(["shim", "upgrade", "one"])?)?;
    ensure!(said.starts_with("one: ") && said.contains(" -> "), "{said}");
    let moved = pids.iter().filter(|pid| executed(pid).is_ok_and(|inode| inode == newer)).count();
    ensure!(moved == 1, "{moved} have moved");
    let said = ok(daemon.davit(["shim", "upgrade", "--all"])?)?;
    ensure!(said.lines().count() == 1, "only the other one is to move: {said}");
    for pid in &pids {
        ensure!(executed(pid)? == newer, "{pid} has not moved");
    }
    ensure!(ok(daemon.davit(["shim", "upgrade", "--all"])?)?.is_empty(), "nothing is left to do");

    // Both go on, also with the next daemon.
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    for name in ["one", "two"] {
        ensure!(ok(daemon.davit(["exec", name, "echo", "inside"])?)? == "inside\n");
    }
    let again: Vec<String> = columns(&daemon)?.into_iter().map(|row| row[0].clone()).collect();
    ensure!(again == pids, "{again:?} were {pids:?}");

    // What must not be executed is not, and says why.
    fs::set_permissions(&shim, fs::Permissions::from_mode(0o777))?;
    let refused = daemon.davit(["shim", "upgrade", "one"])?;
    ensure!(!refused.status.success() && text(&refused).contains("writable by others"), "{}", text(&refused));
    let refused = daemon.davit(["shim", "upgrade", "one", "--binary", "/bin/true"])?;
    ensure!(!refused.status.success() && text(&refused).contains("refused"), "{}", text(&refused));

    for name in ["one", "two"] {
        ok(daemon.davit(["stop", name])?)?;
        ensure!(ok(daemon.davit(["wait", name])?)?.trim() == "7");
        ok(daemon.davit(["rm", name])?)?;
    }
    before.settle(&daemon.path(""))
}

#[test]
fn a_shim_of_others_says_that_it_cannot() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let Some(shim) = bins::on_path(GO_SHIM) else {
        eprintln!("skipped: {GO_SHIM} is not installed");
        return Ok(());
    };
    let daemon = Daemon::start_with_shim(&shim)?;
    daemon.import_busybox()?;
    ok(daemon.davit(["run", "-d", "--name", "box", image::BUSYBOX, "sleep", "3600"])?)?;
    cannot_be_upgraded(&daemon, "box")?;
    ok(daemon.davit(["rm", "-f", "box"])?)?;
    Ok(())
}

/// The daemon shows the shim of a container, and says plainly that it knows no upgrade.
fn cannot_be_upgraded(daemon: &Daemon, name: &str) -> Result<()> {
    let shims = columns(daemon)?;
    ensure!(shims.len() == 1 && shims[0][0].parse::<u32>().is_ok(), "{shims:?}");
    ensure!(shims[0].iter().any(|cell| cell.contains("knows no upgrade")), "{shims:?}");
    let refused = daemon.davit(["shim", "upgrade", name])?;
    ensure!(!refused.status.success() && text(&refused).contains("knows no upgrade"), "{}", text(&refused));
    Ok(())
}

/// The shim of an older commit, which `older-shim.commit` names. `None`, said visibly, if this clone does not have it.
fn older_shim(folder: &Path) -> Result<Option<PathBuf>> {
    let commit = include_str!("../older-shim.commit").trim();
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.args(["-c", "safe.directory=*", "-C", ROOT]).args(arguments);
        command
    };
    let known = git(&["cat-file", "-e", &format!("{commit}^{{commit}}")]).stderr(Stdio::null()).status();
    if !known.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this clone has no commit {commit}");
        return Ok(None);
    }
    // One checkout and one build per commit, beside those of today and not among them: programs of one name would replace
    // each other. It is built as quickly as can be; what it does is no matter of speed.
    let place = Path::new(ROOT).join("target/older-shim").join(commit);
    let checkout = place.join("checkout");
    if !checkout.exists() {
        let new = place.join("new");
        let _ = fs::remove_dir_all(&new);
        fs::create_dir_all(&new)?;
        let mut archive = git(&["archive", commit]).stdout(Stdio::piped()).spawn()?;
        let files = archive.stdout.take().context("no output")?;
        let unpacked = Command::new("tar").arg("-x").current_dir(&new).stdin(files).status()?;
        ensure!(archive.wait()?.success() && unpacked.success(), "cannot unpack {commit}");
        fs::rename(&new, &checkout)?;
    }
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked", "--package", "davit-shim", "--bin", SHIM])
        .args(["--config", "profile.dev.package.\"*\".opt-level=0", "--config", "profile.dev.debug=false"])
        .arg("--target-dir")
        .arg(place.join("target"))
        .current_dir(&checkout)
        .output()?;
    ensure!(built.status.success(), "{}", text(&built));
    Ok(Some(install(&place.join("target/debug").join(SHIM), folder)?))
}

/// Who updates the daemon has shims of yesterday running for months.
#[test]
fn an_older_shim_under_the_daemon_of_today() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let folder = installed()?;
    let Some(shim) = older_shim(folder.path())? else { return Ok(()) };
    let mut daemon = Daemon::start_with_shim(&shim)?;
    daemon.import_busybox()?;
    let before = Census::take(&daemon.path(""));
    let ctr = daemon.ctr();
    let busybox = image::BUSYBOX;
    ensure!(ctr.run(&format!("run --rm {busybox} hello echo hello"))? == "hello\n");
    let mut seven = ctr.words(&format!("run --rm {busybox} seven"));
    ensure!(seven.args(["sh", "-c", "exit 7"]).status()?.code() == Some(7));
    let terminal = ctr.on_terminal(&format!("run --rm -t {busybox} tty sh -c 'tty; sleep 1'"))?;
    ensure!(terminal.contains("/dev/pts/0"), "{terminal}");
    // By a client of its own time: that of today asks for logs that only shims of today write.
    ctr.run(&format!("run -d {busybox} box sleep 3600"))?;
    ensure!(ok(daemon.davit(["exec", "box", "echo", "inside"])?)? == "inside\n");
    ok(daemon.davit(["pause", "box"])?)?;
    ok(daemon.davit(["unpause", "box"])?)?;
    cannot_be_upgraded(&daemon, "box")?;
    ok(daemon.davit(["kill", "box"])?)?;
    ensure!(ok(daemon.davit(["wait", "box"])?)?.trim() == "137");
    ok(daemon.davit(["rm", "box"])?)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(scenario(&mut daemon, Signal::SIGKILL))?;
    before.settle(&daemon.path(""))
}
