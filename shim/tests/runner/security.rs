//! What an attacker can try on a shim: as another user of the host, by what lies in a bundle, by what a client was talked
//! into asking for. Each test names the class of advisory that it stands for.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use davit_model::{Any, ErrorCode};
use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::task::v3::{CreateTaskRequest, CreateTaskResponse, ExecProcessRequest};
use davit_shim_protocol::bootstrap::{Generation, RUNC_OPTIONS, StartInput};
use davit_shim_protocol::frame;
use prost::Message;

use crate::support::{Bundle, Client, Host, NAMESPACE, PATIENCE, SHIM, cannot_run, eventually, reader};

/// A file that nothing may change, and a way to tell.
struct Canary {
    path: PathBuf,
}

impl Canary {
    fn new(host: &Host, name: &str) -> Canary {
        let path = host.path(name);
        std::fs::write(&path, "untouched").unwrap();
        Canary { path }
    }

    #[track_caller]
    fn check(&self) {
        assert_eq!(std::fs::read_to_string(&self.path).unwrap(), "untouched", "{}", self.path.display());
    }
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The shim answers: no call of its one thread sleeps.
#[track_caller]
fn answers(client: &Client) {
    client.again().connect_call("nobody");
}

/// CVE-2020-15257: whoever reaches the socket of a shim can have anything executed as root. It has no abstract name, which
/// every container with the network of the host could reach, nobody else has a right to it, and should one have got it
/// nevertheless, the shim does not listen to that user.
#[test]
fn nobody_else_is_heard() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    // The daemon's umask lets everything through: what is private must be made so.
    let client = host.start_in(&bundle, "umask 0");
    client.create(&host.create_request(&bundle)).unwrap();
    let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(client.socket()), mode(&host.path("s"))), (0o600, 0o700));
    let shim = client.connect_call(&bundle.id).shim_pid;
    let table = std::fs::read_to_string(format!("/proc/{shim}/net/unix")).unwrap();
    for descriptor in std::fs::read_dir(format!("/proc/{shim}/fd")).unwrap().flatten() {
        let link = std::fs::read_link(descriptor.path()).unwrap_or_default().display().to_string();
        let Some(inode) = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else {
            continue;
        };
        let abstract_name = |line: &&str| line.contains(&format!(" {inode} @"));
        assert_eq!(table.lines().find(abstract_name), None);
    }

    let attempt = |expected: &str| {
        let script = "use Socket; socket(my $s, PF_UNIX, SOCK_STREAM, 0) or die; \
                      connect($s, sockaddr_un($ARGV[0])) or do { print 'no way in'; exit }; \
                      print sysread($s, my $b, 1) ? 'an answer' : 'no answer'";
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-e", script])
            .arg(client.socket())
            .output();
        match output {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                eprintln!("skipped in part: needs setpriv, perl")
            }
            output => assert_eq!(String::from_utf8_lossy(&output.unwrap().stdout), expected),
        }
    };
    attempt("no way in");
    for folder in [client.socket(), client.socket().parent().unwrap(), &host.path("")] {
        set_mode(folder, 0o777);
    }
    // It is connected, and disconnected before it has said a word.
    attempt("no answer");
    client.finish(&bundle.id);
}

/// CVE-2021-41103, CVE-2024-25621: folders that others can look into or write to. Whoever can write to the folder of the
/// sockets can put one there in place of a shim's.
#[test]
fn a_socket_folder_of_others_is_refused() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "true", |_| ());
    let folder = host.path("s");
    std::fs::create_dir(&folder).unwrap();
    set_mode(&folder, 0o1777);
    let start = || host.try_start(&bundle, &host.start_input(Generation::Bootstrap), Command::new(SHIM));
    let refused = start();
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("can be written to by others (mode 1777)"), "{}", stderr(&refused));
    std::os::unix::fs::chown(&folder, Some(65534), None).unwrap();
    set_mode(&folder, 0o700);
    let refused = start();
    assert!(stderr(&refused).contains("belongs to user 65534"), "{}", stderr(&refused));
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "no socket was made");
}

/// What the shim writes in the daemon's name is for root alone, whatever umask the daemon has: environment and
/// arguments of an exec may be secrets (CVE-2021-21334), and so may be what waits in the journal.
#[test]
fn files_are_private_whatever_the_umask() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    // The runtime stops in `exec`, so that what is there for its time can be looked at.
    let runtime = host.script(
        "runtime",
        &format!(
            "#!/bin/sh\ncase \"$*\" in *\" exec \"*) mkfifo {0}; cat {0} >/dev/null;; esac\nexec runc \"$@\"\n",
            host.path("gate").display()
        ),
    );
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start_in(&bundle, "umask 0");
    let request = host.create_request_by(&bundle, &runtime);
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    let exec = ExecProcessRequest {
        terminal: true,
        stdout: host.fifo("out"),
        ..Client::exec_request(&bundle.id, "e", "true")
    };
    client.act("Exec", &exec).unwrap();
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| client.again().start(&bundle.id, "e").unwrap());
        eventually("the runtime runs", || host.path("gate").exists());
        let mut seen = Vec::new();
        for folder in [&bundle.path, &host.path("s")] {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let name = entry.file_name().into_string().unwrap();
                // The first is of this test; the other two the runtime makes as it likes, in a folder that is private.
                let foreign = ["config.json", "log.json", "init.pid", "rootfs", "s", "address"];
                if !foreign.contains(&name.as_str()) {
                    let mode = std::fs::symlink_metadata(entry.path()).unwrap().mode();
                    assert_eq!(mode & 0o077, 0, "{name}: {mode:o}");
                    seen.push(name);
                }
            }
        }
        for expected in ["journal", "options.json", "runtime", "exec-e.process.json"] {
            assert!(seen.iter().any(|name| name == expected), "{expected} in {seen:?}");
        }
        assert!(seen.iter().any(|name| name.starts_with("pty-")), "{seen:?}");
        drop(std::fs::File::options().write(true).open(host.path("gate")).unwrap());
        starting.join().unwrap();
    });
    client.finish(&bundle.id);
}

/// CVE-2021-30465, CVE-2026-53489 and their class: links in the place of what is written, mounted on or unmounted. A
/// container that has got its own bundle mounted can put them there.
#[test]
fn links_in_a_bundle_lead_nowhere() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let names = [
        "journal",
        "options.json",
        "runtime",
        "init.pid",
        "log.json",
        "address",
        "exec-e.process.json",
        "exec-e.pid",
        "exec-e.log.json",
    ];
    let canaries: Vec<Canary> = names
        .iter()
        .map(|name| {
            let canary = Canary::new(&host, &format!("canary-{name}"));
            symlink(&canary.path, bundle.path.join(name)).unwrap();
            canary
        })
        .collect();
    let client = host.launch(&bundle, &host.create_request(&bundle));
    client.exec(&bundle.id, "e", "exit 3").unwrap();
    client.start(&bundle.id, "e").unwrap();
    assert_eq!(client.wait(&bundle.id, "e").unwrap().exit_status, 3);
    client.delete(&bundle.id, "e").unwrap();
    client.finish(&bundle.id);
    canaries.iter().for_each(Canary::check);
}

/// The same for the root filesystem: neither is anything mounted where a link leads to, nor unmounted there.
#[test]
fn a_link_is_no_root_filesystem() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let outside = host.path("outside");
    std::fs::create_dir(&outside).unwrap();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    symlink(&outside, bundle.path.join("rootfs")).unwrap();
    let client = host.start(&bundle);
    let error = client.create(&host.create_request(&bundle)).unwrap_err();
    assert!(error.message.contains("failed to mount rootfs component"), "{error}");
    let mounted = || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains(&outside.display().to_string())).count()
    };
    assert_eq!(mounted(), 0);
    // And what is below the place that the link leads to stays when the bundle is cleaned up.
    let below = outside.join("below");
    std::fs::create_dir(&below).unwrap();
    let tmpfs = davit_model::Mount {
        kind: "tmpfs".to_owned(),
        source: "tmpfs".to_owned(),
        target: String::new(),
        options: Vec::new(),
    };
    davit_sys::mount::mount_all(&[tmpfs], &below).unwrap();
    run_delete(&bundle);
    let left = mounted();
    davit_sys::mount::unmount_all(&below).unwrap();
    assert_eq!(left, 1);
    client.shutdown();
}

fn run_delete(bundle: &Bundle) {
    let output = Command::new(SHIM)
        .args(["-namespace", NAMESPACE, "-address", "/none", "-id", &bundle.id, "-bundle"])
        .arg(&bundle.path)
        .arg("delete")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

/// The `address` file says which socket to remove. It is not believed to be one.
#[test]
fn only_a_socket_is_removed_as_a_dead_socket() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "true", |_| ());
    let canary = Canary::new(&host, "canary");
    std::fs::write(bundle.path.join("address"), format!("unix://{}", canary.path.display())).unwrap();
    run_delete(&bundle);
    canary.check();
    let socket = host.path("dead");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    std::fs::write(bundle.path.join("address"), format!("unix://{}", socket.display())).unwrap();
    run_delete(&bundle);
    assert!(!socket.exists(), "else this test shows nothing");
}

/// What stands in the place of a file that the shim reads can be a FIFO, which nobody ever writes to, or endless: one
/// container would stop all that share the shim (class F, exhaustion).
#[test]
fn nothing_is_waited_for_in_a_bundle() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let fifo = |bundle: &Bundle, name: &str| {
        let path = bundle.path.join(name);
        let _ = std::fs::remove_file(&path);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    };
    // At the start.
    for (name, text) in [("fifo", "not a regular file"), ("link", ""), ("huge", "larger than")] {
        let bundle = host.bundle(name, "true", |_| ());
        let config = bundle.path.join("config.json");
        match name {
            "fifo" => fifo(&bundle, "config.json"),
            "link" => {
                std::fs::rename(&config, host.path("elsewhere")).unwrap();
                symlink(host.path("elsewhere"), &config).unwrap();
            }
            _ => std::fs::File::options().write(true).open(&config).unwrap().set_len(1 << 30).unwrap(),
        }
        let input = host.start_input(Generation::Bootstrap);
        let output = host.try_start(&bundle, &input, Command::new(SHIM));
        assert!(!output.status.success() && stderr(&output).contains(text), "{name}: {}", stderr(&output));
    }
    // While a container runs. The first shares the pid namespace of its host, so that its end has the shim look into its
    // specification again.
    let shared = host.bundle("box", "sleep 1000", |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
    });
    let client = host.start(&shared);
    client.create(&host.create_request(&shared)).unwrap();
    client.start(&shared.id, "").unwrap();
    for name in
        ["config.json", "options.json", "runtime", "init.pid", "log.json", "exec-e.pid", "exec-e.log.json"]
    {
        fifo(&shared, name);
    }
    client.exec(&shared.id, "e", "no-such-program").unwrap();
    client.start(&shared.id, "e").unwrap();
    client.wait(&shared.id, "e").unwrap();
    client.kill(&shared.id, "", 9).unwrap();
    assert_eq!(client.wait(&shared.id, "").unwrap().exit_status, 137);
    answers(&client);
    // runc reads the specification neither.
    client.finish(&shared.id);
    // And when what is left is cleaned up.
    for name in ["journal", "init.pid", "options.json", "runtime", "address", "config.json"] {
        fifo(&shared, name);
    }
    run_delete(&shared);
}

/// A client's FIFO, or what stands in its place, may have nobody at its other end: opening it must not wait. With a log that
/// is a FIFO containerd's shim hangs, and with it every container of the pod.
#[test]
fn nothing_is_waited_for_in_the_streams() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    for (name, scheme) in [("plain", ""), ("fifo", "fifo://"), ("file", "file://"), ("json", "json-file://")]
    {
        let bundle = host.bundle(name, "echo hello", |_| ());
        let client = host.start(&bundle);
        let address = |stream: &str| format!("{scheme}{}", host.fifo(&format!("{name}-{stream}")));
        let request = CreateTaskRequest {
            stdin: host.fifo(&format!("{name}-in")),
            stdout: address("out"),
            stderr: address("err"),
            ..host.create_request(&bundle)
        };
        // Whether a FIFO is taken for a log is the shim's choice; that it goes on is not.
        let created = client.again().call_version::<CreateTaskResponse>(
            "containerd.task.v3.Task",
            "Create",
            &request,
            Some(Duration::from_secs(2)),
        );
        answers(&client);
        // Whoever waits for somebody at the other end now has him.
        let readers = [&request.stdout, &request.stderr].map(|address| open_reader(address));
        if created.is_ok() || client.create(&request).is_ok() {
            client.start(&bundle.id, "").unwrap();
            assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 0);
            client.finish(&bundle.id);
        } else {
            client.shutdown();
        }
        drop(readers);
    }
}

fn open_reader(address: &str) -> std::fs::File {
    reader(address.split_once("://").map_or(address, |(_, path)| path))
}

/// CVE-2022-4318 and its kin (class T): ids that are no names. They become parts of file names in the bundle, and of the
/// command line of the runtime.
#[test]
fn ids_are_names() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let before = census(&bundle.path);
    let long = "x".repeat(77);
    for id in ["", ".", "..", "../x", "a/b", "/etc/x", "a\0b", "a\nb", "--help", "-e", "a b", "ä", &long] {
        let request = Client::exec_request(&bundle.id, id, "true");
        let error = client.act("Exec", &request).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{id:?}: {error}");
        let request = CreateTaskRequest { id: id.to_owned(), ..host.create_request(&bundle) };
        let error = client.create(&request).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{id:?}: {error}");
    }
    for path in ["relative", "", "./x"] {
        let request = CreateTaskRequest {
            id: "other".to_owned(),
            bundle: path.to_owned(),
            ..host.create_request(&bundle)
        };
        assert_eq!(client.create(&request).unwrap_err().code, ErrorCode::InvalidArgument, "{path:?}");
    }
    assert_eq!(census(&bundle.path), before);
    client.finish(&bundle.id);
}

fn census(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

/// CVE-2022-31030, CVE-2023-25153 (class F): what a client sends must not become the shim's memory.
#[test]
fn memory_does_not_grow_by_what_clients_send() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    client.create(&host.create_request(&bundle)).unwrap();
    let shim = client.connect_call(&bundle.id).shim_pid;
    let resident = || -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{shim}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let before = resident();
    // A frame that claims four gigabytes, and one after the other of which a part is missing.
    let mut endless = UnixStream::connect(client.socket()).unwrap();
    endless.set_write_timeout(Some(PATIENCE)).unwrap();
    endless.write_all(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0]).unwrap();
    for _ in 0..64 {
        endless.write_all(&[0; 1 << 20]).unwrap();
    }
    let half: Vec<UnixStream> = (0..200)
        .map(|_| {
            let mut half = UnixStream::connect(client.socket()).unwrap();
            half.write_all(&[0, 0x20, 0, 0, 0, 0, 0, 1, 1, 0, 0x0a]).unwrap();
            half
        })
        .collect();
    // Noise is no request.
    let mut noise = UnixStream::connect(client.socket()).unwrap();
    noise.write_all(&frame::encode(1, frame::TYPE_REQUEST, 0, &[0xff; 4096]).unwrap()).unwrap();
    noise.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(noise.read(&mut [0; 100]).unwrap() > 0, "it is told so");
    // Answers that nobody reads: the client is not read from any more.
    let mut deaf = UnixStream::connect(client.socket()).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let request = frame::request("containerd.task.v3.Task", &"x".repeat(60_000), Vec::new(), None, &[]);
    let bytes = frame::encode_request(1, &request).unwrap();
    let written = (0..1000).take_while(|_| deaf.write_all(&bytes).is_ok()).count();
    assert!(written < 1000, "60 MB of answers were kept for a client that does not read");
    answers(&client);
    let after = resident();
    assert!(after < before + 16 * 1024, "{before} kB became {after} kB");
    drop((endless, half, noise, deaf));
    client.finish(&bundle.id);
}

/// Options as large as a frame allows are refused or carried out; either way the shim goes on.
#[test]
fn huge_options_harm_nobody() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let mut request = host.create_request(&bundle);
    for options in [
        Options { binary_name: "x".repeat(3 << 20), ..host.options() },
        Options { root: format!("/{}", "x/".repeat(1 << 20)), ..host.options() },
        Options { binary_name: "a\0b".to_owned(), ..host.options() },
        Options { root: "/a\0b".to_owned(), ..host.options() },
        Options { binary_name: "../../bin/sh".to_owned(), ..host.options() },
        Options { binary_name: "rootfs/bin/busybox".to_owned(), ..host.options() },
    ] {
        request.options = Some(any::pack(&options));
        let error = client.create(&request).unwrap_err();
        assert!(!error.message.is_empty());
        answers(&client);
    }
    client.shutdown();
}

/// CVE-2022-0811, CVE-2024-3154 (class T): the cgroup of the shim is a path below the root of the cgroups.
#[test]
fn the_cgroup_of_a_shim_is_a_cgroup() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "true", |_| ());
    let outside = host.path("outside");
    std::fs::create_dir(&outside).unwrap();
    let canary = Canary::new(&host, "outside/cgroup.procs");
    let way = format!("/{}{}", "../".repeat(20), outside.display().to_string().trim_start_matches('/'));
    let options = Options { shim_cgroup: way, ..host.options() };
    let input = StartInput {
        options: Some(Any { type_url: RUNC_OPTIONS.to_owned(), value: options.encode_to_vec() }),
        ..host.start_input(Generation::Bootstrap)
    };
    let output = host.try_start(&bundle, &input, Command::new(SHIM));
    assert!(!output.status.success() && stderr(&output).contains("join cgroup"), "{}", stderr(&output));
    canary.check();
    eventually("nobody serves", || {
        let entries = std::fs::read_dir(host.path("s")).unwrap();
        entries.flatten().all(|entry| !entry.file_type().unwrap().is_socket())
    });
}

/// The log of the daemon is read by people and by programs: a client or a runtime must not be able to write lines of its
/// own into it (CVE-2025-58160 and its class).
#[test]
fn a_log_line_is_one_line() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    nix::unistd::mkfifo(&bundle.path.join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut log = std::fs::File::options().read(true).write(true).open(bundle.path.join("log")).unwrap();
    let client = host.start(&bundle);
    let forged = "X\ntime=\"now\" level=fatal msg=\"all is lost\"\r\x1b[2J\u{9b}1A";
    client.call::<()>(forged, &()).unwrap_err();
    client.call_version::<()>(forged, "State", &(), None).unwrap_err();
    // The runtime's words come out of the container's configuration.
    let runtime = host
        .script("runtime", "#!/bin/sh\nprintf '\\nlevel=fatal msg=\"all is lost\"\\r\\033[2J' >&2; exit 1\n");
    let request = host.create_request_by(&bundle, &runtime);
    client.create(&request).unwrap_err();
    client.shutdown();
    let mut text = String::new();
    eventually("the shim has written its log", || {
        let mut buffer = [0; 4096];
        let read = log.read(&mut buffer).unwrap();
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        text.contains("Shutdown")
    });
    assert!(text.contains("all is lost"), "else this test shows nothing: {text}");
    for line in text.lines() {
        assert!(line.starts_with("time=\"20"), "{line:?} in {text:?}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}

/// A program in the working directory is not executed because `PATH` says so, or says nothing: that is the bundle.
#[test]
fn no_runtime_is_taken_from_the_working_directory() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "true", |_| ());
    let trap = host.path("trapped");
    let script = host.script("script", &format!("#!/bin/sh\ntouch {}\nexit 1\n", trap.display()));
    std::fs::rename(script, bundle.path.join("runc")).unwrap();
    let client = host.start_in(&bundle, "PATH=\":.:$PATH\"");
    client.create(&host.create_request(&bundle)).unwrap();
    assert!(!trap.exists());
    client.finish(&bundle.id);
}

/// A pid that was told is not a pid that is ours: it may be that of another process by now, or never have been the
/// container's. Nothing else is signalled (CVE-2023-28642's class, pid reuse).
#[test]
fn no_other_process_is_taken_for_the_containers() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let mut stranger = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
    for pid in [stranger.id().to_string(), "1".to_owned(), "-1".to_owned(), "0".to_owned()] {
        // It succeeds, says that it has left a process, and names another one.
        let runtime = host.script(
            "runtime",
            &format!(
                "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" = --pid-file ] && echo {pid} >\"$2\"; shift; done\n"
            ),
        );
        let bundle = host.bundle("box", "true", |_| ());
        let client = host.start(&bundle);
        let request = host.create_request_by(&bundle, &runtime);
        assert!(client.create(&request).is_err(), "{pid}");
        client.shutdown();
        run_delete(&bundle);
        assert!(stranger.try_wait().unwrap().is_none(), "the stranger was killed for {pid}");
    }
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

/// Class F: a container that runs out of memory over and over, while no daemon is there to take the events, does not fill
/// the folder of its bundle, which is the host's memory.
#[test]
fn a_container_cannot_fill_the_journal() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let script =
        "n=0; while [ $n -lt 12 ]; do tail /dev/zero; n=$((n+1)); done; echo >/host/done; sleep 1000";
    let bundle = host.bundle("box", script, |config| {
        config["linux"]["resources"] = serde_json::json!({"memory": {"limit": 12 << 20}});
    });
    let client = host.launch(&bundle, &host.create_request(&bundle));
    eventually("it has run out of memory often enough", || host.path("done").exists());
    answers(&client);
    let control = Path::new("/sys/fs/cgroup/memory").join(&bundle.id).join("memory.oom_control");
    let control = std::fs::read_to_string(control).or_else(|_| {
        std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(&bundle.id).join("memory.events"))
    });
    let control = control.unwrap();
    let kills = control.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap();
    assert!(kills.parse::<u32>().unwrap() > 2, "else this test shows nothing: {control}");
    let journal = std::fs::read(bundle.path.join("journal")).unwrap();
    let topic = b"/tasks/oom";
    let told = journal.windows(topic.len()).filter(|window| window == topic).count();
    assert_eq!(told, 1, "events of running out of memory");
    client.finish(&bundle.id);
}
