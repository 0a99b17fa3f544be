//! What a container and its runtime have of the shim's own: nothing. Looked at from inside.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use davit_proto::containerd::task::v3::{CreateTaskRequest, ExecProcessRequest};

use crate::support::{Bundle, Client, Host, cannot_run, eventually};

/// The clients that are connected beside the one that asks: each is a descriptor of the shim.
const CLIENTS: usize = 50;

/// What `/proc` says of a process.
struct Seen {
    folder: PathBuf,
}

impl Seen {
    /// A process of a container, once it is what the container's specification names: `sleep`, which changes nothing of what
    /// it has got.
    #[track_caller]
    fn process(pid: u32) -> Seen {
        let seen = Seen { folder: PathBuf::from(format!("/proc/{pid}")) };
        let is_there =
            || std::fs::read(seen.folder.join("cmdline")).is_ok_and(|line| line.starts_with(b"sleep\0"));
        eventually("the process runs", is_there);
        seen
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(name)).unwrap()
    }

    /// The numbers of the open descriptors and what they lead to.
    fn descriptors(&self) -> BTreeMap<u32, String> {
        let entries = std::fs::read_dir(self.folder.join("fd")).unwrap().flatten();
        let read = |entry: std::fs::DirEntry| {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            (number, std::fs::read_link(entry.path()).unwrap().display().to_string())
        };
        entries.map(read).collect()
    }

    /// A field of `/proc/<pid>/status`.
    fn status(&self, name: &str) -> String {
        field(&self.text("status"), name)
    }

    fn environment(&self) -> BTreeMap<String, String> {
        let text = self.text("environ");
        let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
}

/// A container that stays, without a shell, which would change some of what it has got.
fn bundle(host: &Host, change: impl FnOnce(&mut serde_json::Value)) -> Bundle {
    host.bundle("box", "", |config| {
        config["process"]["args"] = serde_json::json!(["sleep", "1000"]);
        change(config);
    })
}

/// The same for an exec.
fn exec_request(
    bundle: &Bundle,
    exec_id: &str,
    change: impl FnOnce(&mut serde_json::Value),
) -> ExecProcessRequest {
    let mut request = Client::exec_request(&bundle.id, exec_id, "");
    let specification = request.spec.as_mut().unwrap();
    let mut process: serde_json::Value = serde_json::from_slice(&specification.value).unwrap();
    process["args"] = serde_json::json!(["sleep", "1000"]);
    change(&mut process);
    specification.value = process.to_string().into_bytes();
    request
}

/// Starts an exec and looks at it.
#[track_caller]
fn run_exec(client: &Client, request: &ExecProcessRequest) -> Seen {
    client.act("Exec", request).unwrap();
    Seen::process(client.start(&request.id, &request.exec_id).unwrap())
}

/// CVE-2024-21626 and CVE-2016-9962: a descriptor of the host that stays open in a container is a way out. The shim has
/// many: its socket, its clients, the journal, the pipes and terminals of others.
#[test]
fn a_process_has_three_descriptors() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let logger = host.script("logger", "#!/bin/sh\nexec 5<&-\ncat <&3 >/dev/null\n");
    let file = format!("file://{}", host.path("log").display());
    let logger = format!("binary://{}", logger.display());
    let kinds = [
        ("none", false, String::new()),
        ("fifo", false, host.fifo("out")),
        ("file", false, file.clone()),
        ("logger", false, logger),
        ("terminal", true, host.fifo("tty")),
    ];
    let mut clients = Vec::new();
    for (kind, terminal, stdout) in kinds {
        let bundle = bundle(&host, |config| config["process"]["terminal"] = terminal.into());
        let client = host.start(&bundle);
        clients.extend((0..CLIENTS).map(|_| client.again()));
        clients.iter().rev().take(CLIENTS).for_each(|client| drop(client.connect_call(&bundle.id)));
        let stdin = if kind == "none" { String::new() } else { host.fifo(&format!("{kind}-in")) };
        let request =
            CreateTaskRequest { terminal, stdin, stdout: stdout.clone(), ..host.create_request(&bundle) };
        client.create(&request).unwrap();
        let init = Seen::process(client.start(&bundle.id, "").unwrap());
        let request =
            ExecProcessRequest { terminal, stdout, ..exec_request(&bundle, &format!("{kind}-exec"), |_| ()) };
        let exec = run_exec(&client, &request);
        for (seen, who) in [(init, "init"), (exec, "exec")] {
            let open = seen.descriptors();
            assert!(open.keys().copied().eq(0..3), "{who} with {kind}: {open:?}");
            // And none of the three is anything of the shim's own.
            let harmless = |path: &String| path.starts_with("pipe:") || path.starts_with("/dev/");
            assert!(open.values().all(harmless), "{who} with {kind}: {open:?}");
        }
        client.finish(&bundle.id);
    }
}

/// What the shim changes for itself (it blocks and ignores signals, switches huge pages off, makes itself a likelier
/// victim of the kernel), and what a daemon may have done to it, a container does not see: it has what its
/// specification says, and defaults else.
#[test]
fn a_process_has_what_its_specification_says() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let given = ["CAP_CHOWN", "CAP_KILL"];
    let bundle = bundle(&host, |config| {
        config["process"]["capabilities"] = serde_json::json!({
            "bounding": given, "effective": given, "permitted": given,
        });
        config["process"]["noNewPrivileges"] = true.into();
        config["process"]["user"]["umask"] = 0o27.into();
        config["linux"]["seccomp"] = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}],
        });
    });
    let surroundings = "trap '' HUP INT USR1 USR2 PIPE TERM CHLD; umask 0; ulimit -S -n 777; \
                        echo 200 >/proc/self/oom_score_adj; \
                        export LISTEN_FDS=1 LISTEN_PID=$$ NOTIFY_SOCKET=/host/n SECRET=of-the-daemon";
    let client = host.start_in(&bundle, surroundings);
    client.create(&host.create_request(&bundle)).unwrap();
    let shim = client.connect_call(&bundle.id).shim_pid;
    let init = Seen::process(client.start(&bundle.id, "").unwrap());
    let request = exec_request(&bundle, "e", |process| {
        process["noNewPrivileges"] = false.into();
        process["capabilities"] = serde_json::json!({"bounding": ["CAP_KILL"]});
    });
    let exec = run_exec(&client, &request);
    for (seen, who) in [(&init, "init"), (&exec, "exec")] {
        for signals in ["SigBlk", "SigIgn", "ShdPnd", "SigPnd"] {
            assert_eq!(seen.status(signals), "0000000000000000", "{signals} of {who}");
        }
        assert_eq!(seen.status("THP_enabled"), "1", "{who}");
        assert_eq!(seen.status("CapAmb"), "0000000000000000", "{who}");
        assert_eq!(seen.status("Seccomp"), "2", "{who}");
        assert_eq!(seen.text("oom_score_adj"), "200\n", "{who} has what the daemon gave the shim");
        // A runtime adds a home to what the specification says.
        let names: BTreeSet<String> = seen.environment().into_keys().filter(|name| name != "HOME").collect();
        assert_eq!(names, BTreeSet::from(["PATH".to_owned()]), "{who}");
        let stat = seen.text("stat");
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let (pid, shim) = (stat.split(' ').next().unwrap(), shim.to_string());
        // Parent, group, session, terminal (proc_pid_stat(5)).
        assert_eq!(fields[1..5], [&shim, pid, pid, "0"], "{who}");
    }
    assert_eq!((init.status("NoNewPrivs"), exec.status("NoNewPrivs")), ("1".to_owned(), "0".to_owned()));
    assert_eq!(init.status("Umask"), "0027");
    // CAP_CHOWN is bit 0, CAP_KILL bit 5 (capability.h).
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(init.status(set), "0000000000000021", "{set}");
    }
    assert_eq!(exec.status("CapBnd"), "0000000000000020");
    // CVE-2022-24769: inheritable capabilities come back with a program that has them.
    assert_eq!((init.status("CapInh"), exec.status("CapInh")), ("0".repeat(16), "0".repeat(16)));
    let own = std::fs::read_to_string(format!("/proc/{shim}/status")).unwrap();
    assert_eq!(field(&own, "THP_enabled"), "0", "else this test shows nothing");
    assert_ne!(field(&own, "SigIgn"), "0000000000000000", "else this test shows nothing");
    client.finish(&bundle.id);
}

/// A score that the specification gives is the container's, whatever the shim's is.
#[test]
fn a_score_of_the_specification_counts() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = bundle(&host, |config| config["process"]["oomScoreAdj"] = 321.into());
    let client = host.start(&bundle);
    client.create(&host.create_request(&bundle)).unwrap();
    let init = Seen::process(client.start(&bundle.id, "").unwrap());
    assert_eq!(init.text("oom_score_adj"), "321\n");
    client.finish(&bundle.id);
}

/// The runtime runs as root on the host and hands down what it has: `runc` passes the descriptors of `LISTEN_FDS` and the
/// socket of `NOTIFY_SOCKET` on to the container. It has three descriptors, no signal blocked or ignored, the limits,
/// the umask and the score of the daemon, and of its environment what is not between the daemon and systemd.
#[test]
fn the_runtime_has_nothing_of_the_shims() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let runtime = host.script(
        "runtime",
        "#!/bin/sh\nfolder=$(mktemp -d \"$RECORDS/call-XXXXXX\")\n\
         for file in status limits environ oom_score_adj; do cat /proc/self/$file >$folder/$file; done\n\
         ls -l /proc/self/fd >$folder/links; umask >$folder/umask; echo \"$*\" >$folder/arguments\n\
         exec runc \"$@\"\n",
    );
    let records = host.path("records");
    std::fs::create_dir(&records).unwrap();
    let bundle = bundle(&host, |_| ());
    let surroundings = format!(
        "trap '' HUP INT USR1 USR2 PIPE TERM CHLD; umask 027; ulimit -S -n 777; \
         echo 200 >/proc/self/oom_score_adj; exec 9</; \
         export RECORDS={} LISTEN_FDS=1 LISTEN_PID=$$ LISTEN_FDNAMES=x NOTIFY_SOCKET=/n WATCHDOG_USEC=1 KEPT=yes",
        records.display()
    );
    let client = host.start_in(&bundle, &surroundings);
    let request = host.create_request_by(&bundle, &runtime);
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    client.exec(&bundle.id, "e", "true").unwrap();
    client.start(&bundle.id, "e").unwrap();
    client.wait(&bundle.id, "e").unwrap();
    client.delete(&bundle.id, "e").unwrap();
    client.finish(&bundle.id);
    let calls: Vec<PathBuf> =
        std::fs::read_dir(&records).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(calls.len() >= 5, "create, start, exec, kill, delete: {calls:?}");
    for folder in calls {
        let call = Seen { folder };
        let what = call.text("arguments");
        // All of this is what a child of the script has inherited; the fourth descriptor is the folder that is listed.
        assert_eq!(descriptors(&call.text("links")), ["0", "1", "2", "3"], "{what}: {}", call.text("links"));
        assert_eq!(call.status("SigBlk"), "0000000000000000", "{what}");
        assert_eq!(call.status("SigIgn"), "0000000000000000", "{what}");
        assert_eq!(call.status("THP_enabled"), "1", "{what}");
        assert_eq!(call.text("umask"), "0027\n", "{what}");
        assert_eq!(call.text("oom_score_adj"), "200\n", "{what}");
        let limits = call.text("limits");
        let open_files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert_eq!(open_files.split_whitespace().nth(3), Some("777"), "{what}");
        let environment = call.environment();
        assert_eq!(environment.get("KEPT").map(String::as_str), Some("yes"), "{what}");
        let systemd =
            |name: &&String| ["LISTEN", "NOTIFY", "WATCHDOG"].iter().any(|word| name.starts_with(word));
        let left: Vec<&String> = environment.keys().filter(systemd).collect();
        assert!(left.is_empty(), "{what}: {left:?}");
    }
}

/// The numbers in a listing of links, which begins with a sum. The `ls` of busybox has closed the folder before it asks where
/// the link to it leads, and shows the number alone.
fn descriptors(listing: &str) -> Vec<&str> {
    let numbers =
        listing.lines().skip(1).map(|line| line.split_once(" -> ").map_or(line, |(number, _)| number));
    numbers.filter_map(|number| number.rsplit(' ').next()).collect()
}
