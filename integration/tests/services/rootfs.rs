//! What containerd does around the creation of a task: mounts that a root filesystem is composed of, and hooks.

use std::fs;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::client::{Client, spec};
use davit_integration::{Daemon, bins, image, wait};
use davit_proto::containerd::services::containers::v1::container::Runtime;
use davit_proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest,
};
use davit_proto::containerd::services::mounts::v1::InfoRequest;
use davit_proto::containerd::services::mounts::v1::mounts_client::MountsClient;
use davit_proto::containerd::services::tasks::v1::{
    CreateTaskRequest, DeleteTaskRequest, KillRequest, ListTasksRequest, StartRequest, WaitRequest,
};
use davit_proto::containerd::types::Mount;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tonic::Code;

use super::{conn, refused, runtime};
use crate::root;

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        r#type: kind.into(),
        source: source.into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    }
}

/// Unpacks busybox in a folder of the daemon's.
fn unpacked(daemon: &Daemon) -> Result<String> {
    let folder = daemon.path("busybox");
    tar::Archive::new(image::busybox_layer()?.as_slice()).unpack(&folder)?;
    Ok(folder.display().to_string())
}

fn container(id: &str, spec: &Value) -> Result<CreateContainerRequest> {
    let spec = prost_types::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
        value: serde_json::to_vec(spec)?,
    };
    let runtime = Runtime { name: "io.containerd.runc.v2".into(), options: None };
    let container =
        Container { id: id.into(), runtime: Some(runtime), spec: Some(spec), ..Default::default() };
    Ok(CreateContainerRequest { container: Some(container) })
}

/// Creates and starts a task on these mounts.
async fn start(client: &mut Client, id: &str, rootfs: Vec<Mount>) -> Result<u32> {
    let create = CreateTaskRequest { container_id: id.into(), rootfs, ..Default::default() };
    client.tasks.create(create).await?;
    let start = StartRequest { container_id: id.into(), ..Default::default() };
    Ok(client.tasks.start(start).await?.into_inner().pid)
}

/// Waits for the end of a task and deletes it.
async fn end(client: &mut Client, id: &str) -> Result<u32> {
    let wait = WaitRequest { container_id: id.into(), ..Default::default() };
    let status = client.tasks.wait(wait).await?.into_inner().exit_status;
    client.tasks.delete(DeleteTaskRequest { container_id: id.into() }).await?;
    Ok(status)
}

#[test]
fn mounts_that_refer_to_each_other_are_held_for_a_container() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let busybox = unpacked(&daemon)?;
    let disk = daemon.path("disk");
    fs::create_dir_all(&disk)?;
    let census = Census::take(&daemon.path(""));
    let rootfs = |lower: &str, upper: &str| {
        let upper = format!("{{{{ mount 1 }}}}/{upper}");
        let options = [
            format!("X-containerd.mkdir.path={upper}:0755"),
            format!("X-containerd.mkdir.path={upper}-work:0755"),
            format!("lowerdir={lower}"),
            format!("upperdir={upper}"),
            format!("workdir={upper}-work"),
        ];
        vec![
            mount("bind", &busybox, &["bind", "ro"]),
            mount("bind", &disk.display().to_string(), &["bind"]),
            Mount { options: options.to_vec(), ..mount("format/mkdir/overlay", "overlay", &[]) },
        ]
    };
    let runtime = runtime()?;
    let script = "echo here > /mark && sleep 1000";
    let cgroup = |id: &str| format!("/{}/{id}", daemon.namespace());
    let request = container("first", &spec(&cgroup("first"), &["/bin/sh", "-c", script]))?;
    let second = container("second", &spec(&cgroup("second"), &["/bin/grep", "here", "/mark"]))?;
    runtime.block_on(async {
        let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
        client.containers.create(request).await?;
        // A creation that fails leaves no mounts.
        let broken =
            vec![mount("bind", &busybox, &["bind"]), mount("format/bind", "{{ mount 7 }}", &["bind"])];
        let create = CreateTaskRequest { container_id: "first".into(), rootfs: broken, ..Default::default() };
        let error = client.tasks.create(create).await.expect_err("there is no mount 7");
        ensure!(error.message().contains("index out of bounds"), "{error}");
        let mut mounts = MountsClient::new(conn(&daemon, None).await?);
        let info = || InfoRequest { name: "first".into() };
        refused(mounts.info(info()).await, Code::NotFound, "mount \"first\": not found");

        start(&mut client, "first", rootfs("{{ mount 0 }}", "one")).await?;
        let held = mounts.info(info()).await?.into_inner().info.context("no activation")?;
        ensure!(held.active.len() == 2 && held.system.len() == 1, "{held:?}");
        ensure!(held.system[0].r#type == "overlay", "{held:?}");
        let keep = [("containerd.io/gc.bref.container".to_owned(), "first".to_owned())];
        ensure!(held.labels == keep.into(), "{held:?}");
        wait::until("the container to write", || fs::read(disk.join("one/mark")).ok())?;
        anyhow::Ok(())
    })?;
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    runtime.block_on(async {
        let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
        let mut mounts = MountsClient::new(conn(&daemon, None).await?);
        let info = || InfoRequest { name: "first".into() };
        mounts.info(info()).await?;
        client
            .tasks
            .kill(KillRequest { container_id: "first".into(), signal: 9, ..Default::default() })
            .await?;
        ensure!(end(&mut client, "first").await? == 137);
        refused(mounts.info(info()).await, Code::NotFound, "mount \"first\": not found");

        // What the first container has written is part of the second's root filesystem.
        client.containers.create(second).await?;
        start(&mut client, "second", rootfs("{{ mount 1 }}/one:{{ mount 0 }}", "two")).await?;
        ensure!(end(&mut client, "second").await? == 0);
        for id in ["first", "second"] {
            client.containers.delete(DeleteContainerRequest { id: id.into() }).await?;
        }
        anyhow::Ok(())
    })?;
    census.settle(&daemon.path(""))
}

#[test]
fn who_gives_up_creating_a_task_leaves_no_mounts() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let busybox = unpacked(&daemon)?;
    let census = Census::take(&daemon.path(""));
    // A shim that begins, waits, and fails.
    let (shim, begun, go) = (daemon.path("shim"), daemon.path("begun"), daemon.path("go"));
    let script = "#!/bin/sh\ncase \"$*\" in *start) touch BEGUN; while [ ! -e GO ]; do sleep 0.01; done;; esac\nexit 1\n";
    let script = script.replace("BEGUN", &begun.display().to_string());
    fs::write(&shim, script.replace("GO", &go.display().to_string()))?;
    fs::set_permissions(&shim, Permissions::from_mode(0o755))?;
    let rootfs = vec![mount("bind", &busybox, &["bind"]), mount("format/bind", "{{ mount 0 }}", &["rbind"])];
    let create = CreateTaskRequest {
        container_id: "one".into(),
        rootfs,
        runtime_path: shim.display().to_string(),
        ..Default::default()
    };
    let runtime = runtime()?;
    let mut client = runtime.block_on(Client::new(&daemon.address(), &daemon.namespace()))?;
    let request = container("one", &spec(&format!("/{}/one", daemon.namespace()), &["/bin/true"]))?;
    runtime.block_on(client.containers.create(request))?;
    let mut mounts = MountsClient::new(runtime.block_on(conn(&daemon, None))?);
    let mut info = || runtime.block_on(mounts.info(InfoRequest { name: "one".into() }));
    let mut tasks = client.tasks.clone();
    let creating = runtime.spawn(async move { tasks.create(create).await.map(drop) });
    wait::until("the shim is started", || begun.exists().then_some(()))?;
    ensure!(info()?.into_inner().info.is_some_and(|held| !held.active.is_empty()));
    creating.abort();
    ensure!(runtime.block_on(creating).is_err_and(|error| error.is_cancelled()));
    // What follows on the same connection is answered when the daemon has heard of it.
    let listed = runtime.block_on(client.tasks.list(ListTasksRequest::default()))?;
    ensure!(listed.into_inner().tasks.iter().all(|task| task.pid == 0), "there is no task");
    fs::write(&go, "")?;
    wait::until("the mounts are taken away", || {
        info().is_err_and(|status| status.code() == Code::NotFound).then_some(())
    })?;
    runtime.block_on(client.containers.delete(DeleteContainerRequest { id: "one".into() }))?;
    census.settle(&daemon.path(""))
}

#[test]
fn hooks_are_told_of_the_container_on_their_command_line() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let busybox = unpacked(&daemon)?;
    let told = daemon.path("told");
    let mut spec = spec(&format!("/{}/c", daemon.namespace()), &["/bin/true"]);
    spec["annotations"] = json!({ "some/key": "some value" });
    let write = format!("echo \"$0 $1 $TOLD\" > {}", told.display());
    spec["hooks"] = json!({ "createRuntime": [{
        "path": bins::folder()?.join("davitd"),
        "args": [
            "containerd", "oci-hook", "--", "/bin/sh", "-c", write, "{{id}}", "{{ annotation \"some/key\" }}",
        ],
        "env": ["PATH=/bin", "TOLD={{pid}}"],
    }] });
    runtime()?.block_on(async {
        let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
        client.containers.create(container("c", &spec)?).await?;
        let pid = start(&mut client, "c", vec![mount("bind", &busybox, &["bind", "ro"])]).await?;
        ensure!(end(&mut client, "c").await? == 0);
        let told = fs::read_to_string(&told)?;
        ensure!(told == format!("c some value {pid}\n"), "{told}");
        anyhow::Ok(())
    })
}

/// Takes the test's control group away.
struct Group(String);

impl Drop for Group {
    fn drop(&mut self) {
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let folders = hierarchies.map(|entry| entry.path()).chain([Path::new("/sys/fs/cgroup").into()]);
        for folder in folders {
            let _ = fs::remove_dir(folder.join(&self.0));
        }
    }
}

#[test]
fn the_daemon_moves_into_the_control_group_of_its_configuration() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let group = Group(format!("davit-test-daemon-{}", std::process::id()));
    let daemon = Daemon::start_with(&[], &format!("version = 2\n[cgroup]\npath = \"{}\"\n", group.0))?;
    let pid = daemon.pid().context("no daemon")?;
    let inside = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(inside.lines().any(|line| line.ends_with(&format!("/{}", group.0))), "{inside}");
    ensure!(!daemon.log().contains("cgroup.path"), "{}", daemon.log());
    Ok(())
}
