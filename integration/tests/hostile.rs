//! Images and users of the host that mean harm, through the daemon and its shim. Each test names the class of advisory that
//! it stands for; what counts is that the host is as it was, and that the daemon goes on.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::ctr::text;
use davit_integration::image::{self, Entry};
use davit_integration::{Daemon, wait};
use serde_json::{Value, json};
use tar::EntryType;

use crate::root;

/// A daemon, a file of the host that nothing may change, and what was there before.
struct Scene {
    daemon: Daemon,
    canary: PathBuf,
    census: Census,
    /// The name of the next image.
    images: std::cell::Cell<u32>,
}

impl Scene {
    fn new() -> Result<Scene> {
        let daemon = Daemon::start()?;
        let canary = daemon.path("canary");
        fs::write(&canary, "untouched")?;
        let census = Census::take(&daemon.path(""));
        Ok(Scene { daemon, canary, census, images: Default::default() })
    }

    /// An image of busybox with a second layer and a configuration, under a name that it gives.
    fn image(&self, entries: &[Entry<'_>], config: &Value) -> Result<String> {
        let number = self.images.replace(self.images.get() + 1);
        let name = format!("example.com/hostile/image:{number}");
        let archive = self.daemon.path("hostile.tar");
        let layers = [image::busybox_layer()?, image::layer(entries)?];
        image::oci_archive(&archive, &name, &layers, config)?;
        self.daemon.ctr().run(&format!("images import {}", archive.display()))?;
        Ok(name)
    }

    /// `davit run`, whatever comes of it, but soon.
    fn run(&self, words: &[&str]) -> Result<Output> {
        let davit = self.daemon.davit_command(["run", "--rm"]);
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", "30"]).arg(davit.get_program()).args(davit.get_args()).args(words);
        command.env("DAVIT_NAMESPACE", self.daemon.namespace()).stdin(std::process::Stdio::null());
        let output = command.output()?;
        ensure!(output.status.code().is_some(), "it hung: {words:?}: {}", text(&output));
        Ok(output)
    }

    /// The host is as it was, and the daemon works.
    fn unharmed(&self) -> Result<()> {
        ensure!(
            fs::read(&self.canary).context("the canary is gone")? == b"untouched",
            "the canary was changed"
        );
        self.census.settle(&self.daemon.path(""))?;
        self.daemon.ctr().run("version")?;
        Ok(())
    }
}

fn entry<'a>(path: &'a str, kind: EntryType, data: &'a [u8]) -> Entry<'a> {
    let mode = if kind == EntryType::Directory { 0o755 } else { 0o777 };
    Entry { path, kind, mode, data }
}

/// CVE-2021-30465, CVE-2019-19921, CVE-2025-31133, CVE-2025-52565, CVE-2026-41579, CVE-2019-16884: what the runtime mounts
/// on, writes to and makes in a root filesystem leads to the host instead. Whether such a container runs is the
/// runtime's affair; what is mounted before is the shim's.
#[test]
fn links_in_a_root_filesystem_lead_nowhere() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let host = scene.daemon.path("host");
    fs::create_dir(&host)?;
    fs::copy(&scene.canary, host.join("canary"))?;
    let target = host.display().to_string();
    let up = format!("{}{}", "../".repeat(20), target.trim_start_matches('/'));
    for way in [target.as_str(), up.as_str()] {
        for place in
            ["proc", "sys", "dev", "etc", "dev/pts", "dev/shm", "dev/mqueue", "dev/console", "dev/null"]
        {
            // A folder of the layer below is replaced by the link.
            let above = Path::new(place).parent().filter(|above| !above.as_os_str().is_empty());
            let above = above.map(|above| format!("{}/", above.display()));
            let mut entries = Vec::new();
            if let Some(above) = &above {
                entries.push(entry(above, EntryType::Directory, b""));
            }
            entries.push(entry(place, EntryType::Symlink, way.as_bytes()));
            let image = scene.image(&entries, &json!({ "Env": ["PATH=/bin"] }))?;
            scene.run(&[&image, "/bin/true"])?;
            let mut found: Vec<String> = fs::read_dir(&host)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<Result<_>>()?;
            found.retain(|name| name != "canary");
            // `runc` 1.1 makes links of /dev, and the empty files on which it binds, through such a link, of which the shim
            // knows nothing. A link is looked at itself: one of them leads to the standard output of this test.
            let content = |name: &String| {
                fs::symlink_metadata(host.join(name)).is_ok_and(|found| found.len() > 0 && found.is_file())
            };
            ensure!(!found.iter().any(content), "{place} -> {way}: made on the host: {found:?}");
            ensure!(fs::read(host.join("canary"))? == b"untouched", "{place} -> {way}");
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            ensure!(!mounts.contains(&target), "{place} -> {way}: something is mounted on the host");
        }
    }
    scene.unharmed()
}

/// CVE-2024-21626: a working directory that is an open descriptor of the runtime's, and with it of the host's. The shim has
/// no descriptor open that it would hand down, so there is none to stand in.
#[test]
fn a_working_directory_is_inside() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let canary = scene.canary.display().to_string();
    let look = format!("cat {}{} 2>/dev/null; true", "../".repeat(16), canary.trim_start_matches('/'));
    let plain = scene.image(&[], &json!({ "Env": ["PATH=/bin"], "WorkingDir": "/proc/self" }))?;
    let output = scene.run(&[&plain, "/bin/sh", "-c", "echo runs"])?;
    ensure!(text(&output).contains("runs"), "else this test shows nothing: {}", text(&output));
    for number in [3, 6, 7, 8, 10] {
        for folder in [format!("/proc/self/fd/{number}"), format!("/proc/1/fd/{number}/..")] {
            let config = json!({ "Env": ["PATH=/bin"], "WorkingDir": folder });
            let image = scene.image(&[], &config)?;
            let output = scene.run(&[&image, "/bin/sh", "-c", &look])?;
            ensure!(!text(&output).contains("untouched"), "{folder}: the host was seen: {}", text(&output));
            let link = scene.image(
                &[entry("out", EntryType::Symlink, folder.as_bytes())],
                &json!({ "WorkingDir": "/out" }),
            )?;
            let output = scene.run(&[&link, "/bin/sh", "-c", &look])?;
            ensure!(!text(&output).contains("untouched"), "{folder}: the host was seen: {}", text(&output));
        }
    }
    scene.unharmed()
}

/// CVE-2019-5736: a program that is the runtime itself, opened for writing while it runs. The shim's program is in no
/// container's reach, and the runtime's is what it was.
#[test]
fn programs_of_the_host_stay_what_they_are() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let runtime = davit_integration::bins::on_path("runc").context("runc is not installed")?;
    let shim = davit_integration::bins::folder()?.join("containerd-shim-davit-v2");
    let before = (fs::read(&runtime)?, fs::read(&shim)?);
    let script = b"#!/proc/self/exe\n";
    let image =
        scene.image(&[entry("bin/again", EntryType::Regular, script)], &json!({ "Env": ["PATH=/bin"] }))?;
    let overwrite =
        "for exe in /proc/[0-9]*/exe /proc/self/exe; do echo broken 2>/dev/null >$exe; done; true";
    for words in [
        vec![image.as_str(), "/bin/again"],
        vec![&image, "/proc/self/exe"],
        vec![&image, "/bin/sh", "-c", overwrite],
    ] {
        scene.run(&words)?;
    }
    let output = scene.run(&[&image, "/bin/sh", "-c", "echo runs"])?;
    ensure!(text(&output).contains("runs"), "else this test shows nothing: {}", text(&output));
    ensure!(before == (fs::read(&runtime)?, fs::read(&shim)?), "a program of the host was changed");
    scene.unharmed()
}

/// CVE-2026-47262, CVE-2025-25173 (class F) and CVE-2024-40635, CVE-2026-46680 (class D): users and groups of an image. What
/// stands in the place of `/etc/passwd` is not waited for nor read for ever, and a number never becomes root.
#[test]
fn users_of_an_image() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let huge = vec![b'x'; 64 << 20];
    let bombs: [(&str, Vec<Entry<'_>>); 5] = [
        ("fifo", vec![entry("etc/passwd", EntryType::Fifo, b""), entry("etc/group", EntryType::Fifo, b"")]),
        ("device", vec![entry("etc/passwd", EntryType::Symlink, b"/dev/zero")]),
        ("loop", vec![entry("etc/passwd", EntryType::Symlink, b"passwd")]),
        ("outside", vec![entry("etc/passwd", EntryType::Symlink, b"/../../../../../../etc/shadow")]),
        ("huge", vec![entry("etc/passwd", EntryType::Regular, &huge)]),
    ];
    let daemon = scene.daemon.pid().context("no daemon")?;
    for (what, entries) in bombs {
        let image = scene.image(&entries, &json!({ "Env": ["PATH=/bin"], "User": "nobody" }))?;
        let output = scene.run(&[&image, "/bin/id", "-u"])?;
        ensure!(!output.status.success(), "{what}: there is no such user: {}", text(&output));
        // A number needs no file.
        let output = scene.run(&["--user", "4711:4711", &image, "/bin/cat", "/proc/self/status"])?;
        ensure!(text(&output).contains("4711") || !output.status.success(), "{what}: {}", text(&output));
    }
    let image = scene.image(&[], &json!({ "Env": ["PATH=/bin"] }))?;
    for user in [
        "4294967296",
        "4294967295",
        "2147483648",
        "-1",
        "0x0",
        "+0",
        "00000000000000000000",
        "0:4294967296",
        " 0",
        "1e0",
    ] {
        let output = scene.run(&["--user", user, &image, "/bin/id", "-u"])?;
        // All zeros are zero to everybody; all else that is root by what it is not would be a way to be root.
        let zeros = user.bytes().all(|byte| byte == b'0');
        let root = output.status.success() && text(&output).trim() == "0";
        ensure!(!root || zeros, "user {user:?} became root");
    }
    let resident = fs::read_to_string(format!("/proc/{daemon}/status"))?;
    let peak = resident.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no peak")?;
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    ensure!(peak < 512 * 1024, "the daemon took {peak} kB");
    scene.unharmed()
}

/// CVE-2026-53488, CVE-2022-23648 (class B): an image's labels and volumes steer nothing on the host. A logger that a label
/// named would run as root.
#[test]
fn an_image_steers_nothing_on_the_host() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let trap = scene.daemon.path("trapped");
    let program = scene.daemon.path("program");
    fs::write(&program, format!("#!/bin/sh\ntouch {}\n", trap.display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}", program.display());
    let file = scene.canary.display().to_string();
    let config = json!({
        "Env": ["PATH=/bin"],
        "Cmd": ["/bin/echo", "overwritten"],
        "Labels": {
            "containerd.io/restart.loguri": uri, "containerd.io/restart.status": "running",
            "nerdctl/log-uri": uri, "davit/log": file, "io.davit.stdio.mode": "blocking",
            "io.containerd.runc.v2.group": "../../escape", "davit/stdin": "open",
        },
        "Volumes": { "/../../../../etc": {}, "/proc/self/root": {} },
    });
    let image = scene.image(&[], &config)?;
    let id = davit_integration::daemon::ok(scene.daemon.davit(["run", "-d", &image])?)?.trim().to_owned();
    wait::until("the container has ended", || {
        let shown = text(&scene.daemon.davit(["ps", "-a"]).ok()?);
        shown.contains("Exited").then_some(())
    })?;
    let inspected: Value =
        serde_json::from_str(&davit_integration::daemon::ok(scene.daemon.davit(["inspect", &id])?)?)?;
    let log = inspected[0]["LogPath"].as_str().unwrap_or_default();
    ensure!(log != file && log.contains(&id), "the log is {log:?}");
    davit_integration::daemon::ok(scene.daemon.davit(["rm", "-f", &id])?)?;
    ensure!(!trap.exists(), "a program that an image names was executed");
    scene.unharmed()
}

/// CVE-2026-53488 by way of another client, which gives the labels of an image to its containers as they are: `davit` reads, writes and
/// removes nothing that they name, and leaves alone what that client has open.
#[test]
fn an_image_steers_nothing_by_way_of_another_client() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let daemon = &scene.daemon;
    let canary = scene.canary.display().to_string();
    let etc = daemon.path("etc");
    fs::create_dir(&etc)?;
    fs::write(etc.join("hosts"), "untouched")?;
    let config = json!({
        "Env": ["PATH=/bin"],
        "Cmd": ["/bin/sh", "-c", "echo overwritten; exec /bin/sleep 1000"],
        "Labels": { "davit/log": canary, "davit/etc": etc.display().to_string(), "davit/log-options": "max-file=4000000000" },
    });
    let image = scene.image(&[], &config)?;
    let mut client = daemon.ctr().words(&format!("run {image} box"));
    let mut client = client.stdout(std::process::Stdio::null()).spawn()?;
    let listed = |word: &str| daemon.ctr().run("tasks ls").is_ok_and(|tasks| tasks.contains(word));
    wait::until("it runs", || listed("RUNNING").then_some(()))?;
    let labels = daemon.ctr().run("containers info box")?;
    ensure!(labels.contains("davit/log"), "else this test shows nothing: {labels}");
    for words in [&["logs", "box"][..], &["attach", "--no-stdin", "box"]] {
        let refused = daemon.davit(words)?;
        ensure!(!refused.status.success() && !text(&refused).contains("untouched"), "{}", text(&refused));
    }
    ensure!(client.try_wait()?.is_none(), "its client has been left alone");
    daemon.ctr().run("tasks kill -s KILL box")?;
    client.wait()?;
    // From here on it is a container like others, with a log in its place.
    davit_integration::daemon::ok(daemon.davit(["start", "box"])?)?;
    wait::until("it has a log", || {
        text(&daemon.davit(["logs", "box"]).ok()?).contains("overwritten").then_some(())
    })?;
    davit_integration::daemon::ok(daemon.davit(["rm", "-f", "box"])?)?;
    ensure!(fs::read(etc.join("hosts")).context("the file of the host is gone")? == b"untouched");
    scene.unharmed()
}

/// A process of another user: its output. `None` when the host has no setpriv(1).
fn as_nobody(script: &str) -> Result<Option<String>> {
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script])
        .current_dir("/")
        .output();
    match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: needs setpriv");
            Ok(None)
        }
        output => Ok(Some(String::from_utf8_lossy(&output?.stdout).into_owned())),
    }
}

/// CVE-2021-41103, CVE-2024-25621, CVE-2021-41091, CVE-2020-15257 (class G): another user of the host looks into the
/// daemon's folders, executes a set-user-id program of a container by its path on the host, or speaks to a socket.
#[test]
fn other_users_are_kept_out() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let mut setuid = entry("bin/setuid", EntryType::Regular, b"#!/bin/sh\n");
    setuid.mode = 0o4755;
    let image = scene.image(&[setuid], &json!({ "Env": ["PATH=/bin"] }))?;
    let id = davit_integration::daemon::ok(scene.daemon.davit(["run", "-d", &image, "sleep", "1000"])?)?;
    let id = id.trim();
    // The folder of the test itself is closed to others.
    let folder = scene.daemon.path("");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    let mut reached = Vec::new();
    audit(&scene.daemon.path("root"), &mut reached)?;
    audit(&scene.daemon.path("state"), &mut reached)?;
    ensure!(reached.is_empty(), "others reach {reached:#?}");
    let bundle =
        scene.daemon.path("state/io.containerd.runtime.v2.task").join(scene.daemon.namespace()).join(id);
    ensure!(bundle.join("rootfs/bin/setuid").exists(), "else this test shows nothing");
    let script = format!(
        "for place in {bundle}/rootfs/bin/setuid {bundle}/config.json {bundle}/journal {root}/*/* {state}/*/*; do \
         [ -e $place ] && echo $place; done; \
         find {root} {state} -type f -readable 2>/dev/null; true",
        bundle = bundle.display(),
        root = scene.daemon.path("root").display(),
        state = scene.daemon.path("state").display(),
    );
    if let Some(found) = as_nobody(&script)? {
        ensure!(found.is_empty(), "others found {found}");
    }
    for socket in [scene.daemon.address(), scene.daemon.path("d.sock.ttrpc")] {
        let status = fs::symlink_metadata(&socket)?;
        ensure!(status.file_type().is_socket() && status.mode() & 0o007 == 0, "{}", socket.display());
    }
    davit_integration::daemon::ok(scene.daemon.davit(["rm", "-f", id])?)?;
    scene.unharmed()
}

/// Collects what others than root can read, write or list below a folder that they can pass through.
fn audit(path: &Path, reached: &mut Vec<String>) -> Result<()> {
    let status = fs::symlink_metadata(path)?;
    let (kind, mode) = (status.file_type(), status.mode() & 0o7777);
    // The mode of a link says nothing.
    if kind.is_symlink() {
        return Ok(());
    }
    if mode & 0o006 != 0 {
        reached.push(format!("{mode:04o} {}", path.display()));
    }
    if kind.is_dir() && mode & 0o001 != 0 {
        for entry in fs::read_dir(path)? {
            audit(&entry?.path(), reached)?;
        }
    }
    Ok(())
}

/// Class F, and CVE-2025-58160's: the words of a runtime, which have those of a container in them, reach the client as an
/// error, and the log as one line.
#[test]
fn words_of_a_runtime_are_only_words() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let runtime = scene.daemon.path("runtime");
    // A runtime tells its errors in its log; this one has been told by its container what to say.
    let forged = r"before\n2026-01-01T00:00:00Z ERROR forged: all is lost\r\u001b[2J";
    let script = format!(
        r#"#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --log ] && log=$2; shift; done
{{
    printf %s '{{"level":"error","msg":"{forged}'
    head -c 200000 /dev/zero | tr '\0' x
    printf %s '"}}'
}} >"$log"
exit 1
"#
    );
    fs::write(&runtime, script)?;
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755))?;
    let image = scene.image(&[], &json!({ "Env": ["PATH=/bin"] }))?;
    let ctr = scene.daemon.ctr();
    let line = format!("run --rm --runc-binary {} {image} words /bin/true", runtime.display());
    let said = ctr.fails(&line)?;
    ensure!(said.contains("before") && said.len() < 16 * 1024, "{} bytes: {said:.200}", said.len());
    let log = scene.daemon.log();
    ensure!(log.contains("all is lost"), "else this test shows nothing");
    for line in log.lines() {
        ensure!(!line.contains("forged: all is lost") || !line.starts_with("2026-01-01T00:00:00Z"), "{line}");
        ensure!(!line.chars().any(|character| character.is_control() && character != '\t'), "{line:?}");
    }
    scene.unharmed()
}
