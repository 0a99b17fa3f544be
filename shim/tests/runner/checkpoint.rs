//! Checkpoints and restores, by a runtime that needs no criu: what the shim makes of them.

use std::path::PathBuf;

use davit_model::ErrorCode;
use davit_proto::any;
use davit_proto::containerd::runc::v1::{CheckpointOptions, Options};
use davit_proto::containerd::task::v3::{CheckpointTaskRequest, CreateTaskRequest};
use davit_proto::containerd::v1::types::Status;

use crate::support::{Bundle, Client, Host, cannot_run};
use crate::upgrade::{Programs, wait_in_thread};

/// Its checkpoint is a file, and its restore a new container, but with the command line, the log and the traces of criu.
const RUNTIME: &str = r#"#!/bin/sh
next= leave=no container=
for word; do
    case $next in root) root=$word ;; log) log=$word ;; image) image=$word ;; work) work=$word ;; esac
    next=
    case $word in
    checkpoint | restore) action=$word ;;
    --root) next=root ;; --log) next=log ;; --image-path) next=image ;; --work-path) next=work ;;
    --leave-running) leave=yes ;;
    esac
    container=$word
done
fail() {
    mkdir -p "$work"
    echo "(00.02) Error (criu/some.c:1): $1" > "$work/$2.log"
    echo "{\"level\":\"error\",\"msg\":\"criu failed: type NOTIFY errno 0\\\\nlog file: $work/$2.log\"}" > "$log"
    exit 1
}
case $action in
checkpoint)
    [ -d "$image" ] || fail "no folder for images" dump
    echo pages > "$image/pages-1.img"
    [ $leave = yes ] || runc --root "$root" delete --force "$container"
    ;;
restore)
    [ -e "$image/pages-1.img" ] || fail "no images" restore
    pass= next=
    for word; do
        case $next in pass) pass="$pass $word" ;; esac
        next=
        case $word in --bundle | --pid-file | --console-socket) pass="$pass $word" next=pass ;; esac
    done
    runc --root "$root" create $pass "$container" && runc --root "$root" start "$container"
    ;;
*) exec runc "$@" ;;
esac
"#;

struct Scene {
    host: Host,
    runtime: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let host = Host::new();
        let runtime = host.script("runtime", RUNTIME);
        Scene { host, runtime }
    }

    fn request(&self, bundle: &Bundle, checkpoint: &str) -> CreateTaskRequest {
        let options = Options { binary_name: self.runtime.display().to_string(), ..self.host.options() };
        CreateTaskRequest {
            options: Some(any::pack(&options)),
            checkpoint: checkpoint.to_owned(),
            ..self.host.create_request(bundle)
        }
    }

    /// A folder as a checkpoint leaves it.
    fn images(&self) -> String {
        let folder = self.host.path("images");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("pages-1.img"), "pages\n").unwrap();
        folder.display().to_string()
    }
}

fn checkpoint(
    client: &Client,
    id: &str,
    path: &str,
    exit: bool,
) -> Result<(), davit_shim_protocol::frame::RpcError> {
    let options = Some(any::pack(&CheckpointOptions { exit, ..CheckpointOptions::default() }));
    client.act("Checkpoint", &CheckpointTaskRequest { id: id.to_owned(), path: path.to_owned(), options })
}

#[test]
fn a_restored_container_has_no_process_before_its_start_and_a_life_after_it() {
    if cannot_run() {
        return;
    }
    let scene = Scene::new();
    let events = scene.host.receive_events();
    let bundle = scene.host.bundle("box", "echo here; exit 4", |_| ());
    let client = scene.host.start(&bundle);
    let stdout = scene.host.fifo("out");
    let mut request = scene.request(&bundle, &scene.images());
    request.stdout = stdout.clone();
    assert_eq!(client.create(&request).unwrap(), 0);
    let state = client.state(&bundle.id, "").unwrap();
    assert_eq!((state.status(), state.pid), (Status::Created, 0));
    let error = client.exec(&bundle.id, "early", "true").unwrap_err();
    assert_eq!(error.message, "cannot exec in a created state: failed precondition");
    assert_eq!(client.kill(&bundle.id, "", 9).unwrap_err().message, "no such container: not found");
    let output = std::thread::spawn(move || std::fs::read_to_string(stdout).unwrap());
    let waits = wait_in_thread(&client, &bundle.id, "");
    let pid = client.start(&bundle.id, "").unwrap();
    assert_ne!(pid, 0);
    assert_eq!(waits.join().unwrap().exit_status, 4);
    assert_eq!(output.join().unwrap(), "here\n");
    let deleted = client.delete(&bundle.id, "").unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (4, pid));
    assert_eq!(events.until("delete"), ["create", "start box", "exit box 4", "delete"]);
    assert!(!bundle.path.join("criu-work").exists());
    client.shutdown();
}

#[test]
fn a_restored_container_has_its_terminal() {
    if cannot_run() {
        return;
    }
    let scene = Scene::new();
    let bundle = scene.host.bundle("box", "tty", |config| config["process"]["terminal"] = true.into());
    let client = scene.host.start(&bundle);
    let stdout = scene.host.fifo("out");
    let mut request = scene.request(&bundle, &scene.images());
    (request.stdout, request.terminal) = (stdout.clone(), true);
    client.create(&request).unwrap();
    let output = std::thread::spawn(move || std::fs::read_to_string(stdout).unwrap());
    client.start(&bundle.id, "").unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 0);
    client.finish(&bundle.id);
    assert_eq!(output.join().unwrap(), "/dev/pts/0\r\n");
}

#[test]
fn what_was_never_restored_goes_without_a_trace() {
    if cannot_run() {
        return;
    }
    let scene = Scene::new();
    let events = scene.host.receive_events();
    let bundle = scene.host.bundle("box", "true", |_| ());
    let client = scene.host.start(&bundle);
    client.create(&scene.request(&bundle, "/nowhere")).unwrap();
    let waits = wait_in_thread(&client, &bundle.id, "");
    let deleted = client.delete(&bundle.id, "").unwrap();
    assert_eq!((deleted.exit_status, deleted.pid, deleted.exited_at), (0, 0, None));
    assert_eq!(
        (waits.join().unwrap().exited_at, events.until("delete")),
        (None, vec!["create".into(), "delete".into()])
    );
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&bundle.id));
    client.shutdown();
}

#[test]
fn a_restore_that_failed_says_why_and_can_be_tried_again() {
    if cannot_run() {
        return;
    }
    let scene = Scene::new();
    let bundle = scene.host.bundle("box", "exit 5", |_| ());
    let client = scene.host.start(&bundle);
    let images = scene.host.path("images");
    client.create(&scene.request(&bundle, &images.display().to_string())).unwrap();
    let error = client.start(&bundle.id, "").unwrap_err();
    let text = format!(
        "OCI runtime restore failed: criu failed: type NOTIFY errno 0; no images path= {}",
        bundle.path.join("criu-restore.log").display()
    );
    assert_eq!((error.code, error.message), (ErrorCode::Unknown, text));
    assert!(bundle.path.join("criu-restore.log").exists());
    let state = client.state(&bundle.id, "").unwrap();
    assert_eq!((state.status(), state.pid), (Status::Created, 0));
    scene.images();
    client.start(&bundle.id, "").unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 5);
    client.finish(&bundle.id);
}

#[test]
fn an_upgrade_keeps_what_is_to_be_restored() {
    if cannot_run() {
        return;
    }
    let scene = Scene::new();
    let programs = Programs::new();
    let bundle = scene.host.bundle("box", "exit 6", |_| ());
    let client = scene.host.start(&bundle);
    client.create(&scene.request(&bundle, &scene.images())).unwrap();
    client.upgrade(&programs.builds()[1]).unwrap();
    client.start(&bundle.id, "").unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 6);
    client.finish(&bundle.id);
}

#[test]
fn a_checkpoint_ends_a_container_or_leaves_it() {
    if cannot_run() {
        return;
    }
    let scene = Scene::new();
    let events = scene.host.receive_events();
    let bundle = scene.host.bundle("box", "sleep 1000", |_| ());
    let client = scene.host.start(&bundle);
    client.create(&scene.request(&bundle, "")).unwrap();
    let error = checkpoint(&client, &bundle.id, &scene.images(), false).unwrap_err();
    assert_eq!(error.message, "cannot checkpoint a created container: failed precondition");
    client.start(&bundle.id, "").unwrap();
    let error = checkpoint(&client, &bundle.id, "/nowhere", true).unwrap_err();
    let log = bundle.path.join("criu-dump.log");
    assert_eq!(
        error.message,
        format!(
            "checkpoint failed: criu failed: type NOTIFY errno 0; no folder for images path= {}",
            log.display()
        )
    );
    checkpoint(&client, &bundle.id, &scene.images(), false).unwrap();
    assert_eq!(client.state(&bundle.id, "").unwrap().status(), Status::Running);
    events.until("checkpointed");
    checkpoint(&client, &bundle.id, &scene.images(), true).unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 137);
    // The runtime has forgotten it already.
    assert_eq!(client.delete(&bundle.id, "").unwrap().exit_status, 137);
    let list = events.until("delete");
    assert_eq!(list.iter().filter(|event| *event == "checkpointed").count(), 2, "{list:?}");
    assert_eq!(list.iter().filter(|event| event.starts_with("exit")).count(), 1, "{list:?}");
    client.shutdown();
}
