//! Two daemons may run `delete` for one bundle: the second one after the death of the first, whose `delete` is still at it. And
//! two may have containers of one name in one folder of a runtime.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::task::v3::DeleteResponse;
use davit_proto::containerd::v1::types::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;

use crate::support::{Bundle, Host, NAMESPACE, SHIM, cannot_run, eventually};

fn delete(bundle: &Bundle) -> Child {
    let mut command = Command::new(SHIM);
    command.args(["-namespace", NAMESPACE, "-id", &bundle.id, "-address", "/nonexistent", "-bundle"]);
    command.arg(&bundle.path).arg("delete").current_dir(&bundle.path);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

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
    eventually("the shim is gone", || !Path::new(&format!("/proc/{shim}/root")).exists());
    let first = delete(&bundle);
    eventually("the first one is at it", || deleting() == 1);
    let second = delete(&bundle);
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
    assert!(!Path::new(&format!("/proc/{pid}/root")).exists(), "a zombie at most");
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&bundle.id));
}

#[test]
fn anothers_container_of_the_same_name_is_left_alone() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let theirs = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&theirs, &host.create_request(&theirs));

    let other = Host::new();
    let ours = Bundle { id: theirs.id.clone(), path: other.path("bundles").join(&theirs.id) };
    std::fs::create_dir_all(&ours.path).unwrap();
    std::fs::copy(theirs.path.join("config.json"), ours.path.join("config.json")).unwrap();
    let shim = other.start(&ours);
    let mut request = other.create_request(&ours);
    request.options = Some(any::pack(&host.options()));
    let error = shim.create(&request).unwrap_err();
    assert!(error.message.contains("exists"), "{error:?}");
    let lives = || client.state(&theirs.id, "").unwrap().status() == Status::Running;
    assert!(lives(), "killed by the shim");
    let delete_ours = || assert!(delete(&ours).wait_with_output().unwrap().status.success());
    delete_ours();
    assert!(lives(), "killed by `delete`");
    shim.shutdown();

    // It has all that it is managed by.
    client.exec(&theirs.id, "e1", "exit 3").unwrap();
    client.start(&theirs.id, "e1").unwrap();
    assert_eq!(client.wait(&theirs.id, "e1").unwrap().exit_status, 3);
    client.finish(&theirs.id);
    let state = host.path("runc").join(NAMESPACE).join(&theirs.id);
    assert!(!state.exists(), "{}", state.display());

    // In crun's words. One whose bundle is gone is nobody's, and is removed for the next of that name.
    for (bundle, stays) in [(theirs.path.as_path(), true), (Path::new("/nonexistent"), false)] {
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(state.join("status"), serde_json::json!({ "bundle": bundle }).to_string()).unwrap();
        delete_ours();
        assert_eq!(state.exists(), stays, "{}", bundle.display());
    }
}
