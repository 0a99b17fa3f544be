//! Two daemons may run `delete` for one bundle: the second one after the death of the first, whose `delete` is still at it.

use std::process::{Command, Stdio};

use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::task::v3::DeleteResponse;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;

use crate::support::{Host, NAMESPACE, SHIM, cannot_run, eventually};

#[test]
fn two_deletes_at_once_say_the_same_and_leave_nothing() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    // Its `delete` waits until the test says `go`.
    let runtime = host.script(
        "runtime",
        "#!/bin/sh\nfolder=$(dirname \"$0\")\ncase \"$*\" in\n\
         *\" delete \"*) echo x >> $folder/deleting; while [ ! -e $folder/go ]; do sleep 0.01; done ;;\n\
         esac\nexec runc \"$@\"\n",
    );
    let deleting = || std::fs::read_to_string(host.path("deleting")).unwrap_or_default().lines().count();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let mut request = host.create_request(&bundle);
    let options = Options { binary_name: runtime.display().to_string(), ..host.options() };
    request.options = Some(any::pack(&options));
    client.create(&request).unwrap();
    let pid = client.start(&bundle.id, "").unwrap();
    let shim = client.connect_call(&bundle.id).shim_pid;
    kill(Pid::from_raw(shim as i32), Signal::SIGKILL).unwrap();
    eventually("the shim is gone", || !std::path::Path::new(&format!("/proc/{shim}/root")).exists());
    let delete = || {
        let mut command = Command::new(SHIM);
        command.args(["-namespace", NAMESPACE, "-id", &bundle.id, "-address", "/nonexistent", "-bundle"]);
        command.arg(&bundle.path).arg("delete").current_dir(&bundle.path);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let first = delete();
    eventually("the first one is at it", || deleting() == 1);
    let second = delete();
    eventually("the second one is at it", || deleting() == 2);
    std::fs::write(host.path("go"), "").unwrap();
    let answers = [first, second].map(|child| {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        DeleteResponse::decode(output.stdout.as_slice()).unwrap()
    });
    assert_eq!(answers[0], answers[1], "the first one's word stands");
    assert_eq!((answers[0].exit_status, answers[0].pid), (137, pid));
    assert!(!host.path("runc").join(NAMESPACE).join(&bundle.id).exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}/root")).exists(), "a zombie at most");
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&bundle.id));
}
