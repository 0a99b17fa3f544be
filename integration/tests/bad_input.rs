//! Bad input: each gets the right code and a clear text, and changes nothing.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::client::{Client, connect, spec};
use davit_integration::ctr::{Ctr, text};
use davit_integration::image::{self, Entry};
use davit_integration::{Daemon, wait};
use davit_proto::containerd::services::containers::v1::container::Runtime;
use davit_proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest,
};
use davit_proto::containerd::services::content::v1::content_client::ContentClient;
use davit_proto::containerd::services::content::v1::{InfoRequest, ReadContentRequest};
use davit_proto::containerd::services::tasks::v1::{CreateTaskRequest, ListTasksRequest};
use serde_json::json;
use tar::EntryType;
use tonic::{Code, Request};

use crate::root;

/// The keys of snapshots, the leases and the ingests of the default namespace: what a failed call must not leave.
fn records(ctr: &Ctr) -> Result<String> {
    let lines = ["snapshots ls", "leases ls", "content active", "containers ls", "tasks ls", "images ls -q"];
    let mut all = String::new();
    for line in lines {
        all.push_str(&ctr.run(line)?);
    }
    Ok(all)
}

/// A daemon with an image, and what is there before the bad input comes.
struct Scene {
    daemon: Daemon,
    ctr: Ctr,
    census: Census,
    records: String,
}

impl Scene {
    fn new() -> Result<Scene> {
        let daemon = Daemon::start()?;
        daemon.import_busybox()?;
        let ctr = daemon.ctr();
        let census = Census::take(&daemon.path(""));
        let records = records(&ctr)?;
        Ok(Scene { daemon, ctr, census, records })
    }

    fn unchanged(&self) -> Result<()> {
        let now = || (Census::take(&self.daemon.path("")).since(&self.census), records(&self.ctr));
        let same = || {
            let (left, records) = now();
            (left.is_empty() && records.ok()? == self.records).then_some(())
        };
        wait::until("everything is as before", same)
            .map_err(|error| error.context(format!("{:#?}\nbefore: {}", now(), self.records)))
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

#[test]
fn calls_with_malformed_names() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    runtime()?.block_on(async {
        let channel = connect(&scene.daemon.address()).await?;
        let mut content = ContentClient::new(channel);
        let info = |digest: &str, namespace: Option<&str>| {
            let mut request = Request::new(InfoRequest { digest: digest.into() });
            if let Some(namespace) = namespace {
                let value = namespace.parse().expect("the tests send printable names");
                request.metadata_mut().insert("containerd-namespace", value);
            }
            request
        };
        let absent = image::digest(b"absent");
        for (digest, namespace, code) in [
            (absent.as_str(), None, Code::FailedPrecondition),
            (&absent, Some("../up"), Code::InvalidArgument),
            (&absent, Some("-x"), Code::InvalidArgument),
            (&absent, Some("default"), Code::NotFound),
            ("", Some("default"), Code::InvalidArgument),
            ("sha256:short", Some("default"), Code::InvalidArgument),
            ("sha256:../../../../etc/passwd", Some("default"), Code::InvalidArgument),
        ] {
            let status = content.info(info(digest, namespace)).await.expect_err(digest);
            ensure!(status.code() == code, "{digest:?} in {namespace:?}: {status:?}");
            ensure!(!status.message().is_empty());
        }
        let mut read = Request::new(ReadContentRequest { digest: absent.clone(), ..Default::default() });
        read.metadata_mut().insert("containerd-namespace", "default".parse()?);
        ensure!(content.read(read).await.expect_err("no such blob").code() == Code::NotFound);

        let mut client = Client::new(&scene.daemon.address(), &scene.daemon.namespace()).await?;
        for id in ["", "../up", "a/b", "-a", "a b", &"x".repeat(77)] {
            let container = Container {
                id: id.into(),
                runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
                spec: Some(prost_types::Any::default()),
                ..Default::default()
            };
            let request = CreateContainerRequest { container: Some(container) };
            let status = client.containers.create(request).await.expect_err(id);
            ensure!(status.code() == Code::InvalidArgument, "{id:?}: {status:?}");
        }
        let status = client.containers.get(GetContainerRequest { id: "absent".into() }).await;
        ensure!(status.expect_err("no such container").code() == Code::NotFound);
        let task = CreateTaskRequest { container_id: "absent".into(), ..Default::default() };
        ensure!(client.tasks.create(task).await.expect_err("no such container").code() == Code::NotFound);
        ensure!(client.tasks.list(ListTasksRequest::default()).await?.into_inner().tasks.is_empty());
        let mut long = Container {
            id: "long".into(),
            runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
            spec: Some(prost_types::Any::default()),
            ..Default::default()
        };
        long.labels.insert("k".into(), "v".repeat(200_000));
        let status = client.containers.create(CreateContainerRequest { container: Some(long) }).await;
        ensure!(status.expect_err("a label of 200,000 bytes").code() == Code::InvalidArgument);
        anyhow::Ok(())
    })?;
    scene.unchanged()
}

#[test]
fn runtimes_and_specs_that_do_not_work() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let script = |name: &str, text: &str| -> Result<String> {
        let path = scene.daemon.path(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(path.display().to_string())
    };
    let good = serde_json::to_vec(&spec("/bad/bad", &["/bin/true"]))?;
    let cases = [
        ("io.containerd.no-such.v9".to_owned(), good.clone(), "no-such"),
        ("relative/path".to_owned(), good.clone(), "runtime"),
        ("/no/such/shim".to_owned(), good.clone(), "/no/such/shim"),
        (script("fails", "echo it went wrong >&2; exit 3")?, good.clone(), "it went wrong"),
        (script("nonsense", "echo this is no address")?, good, "this is no address"),
        ("io.containerd.runc.v2".to_owned(), b"this is no JSON".to_vec(), ""),
    ];
    runtime()?.block_on(async {
        let mut client = Client::new(&scene.daemon.address(), &scene.daemon.namespace()).await?;
        for (name, spec, words) in cases {
            let container = Container {
                id: "bad".into(),
                runtime: Some(Runtime { name: name.clone(), options: None }),
                spec: Some(prost_types::Any {
                    type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                    value: spec,
                }),
                ..Default::default()
            };
            client.containers.create(CreateContainerRequest { container: Some(container) }).await?;
            let task = CreateTaskRequest { container_id: "bad".into(), ..Default::default() };
            let status = client.tasks.create(task).await.expect_err(&name);
            ensure!(status.message().contains(words), "{name}: {status:?}");
            client.containers.delete(DeleteContainerRequest { id: "bad".into() }).await?;
        }
        anyhow::Ok(())
    })?;
    scene.unchanged()
}

#[test]
fn blobs_that_are_not_what_they_say() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let layer = image::busybox_layer()?;
    let truncated = layer[..layer.len() / 2].to_vec();
    let mut corrupt = layer.clone();
    corrupt[148..156].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xff");
    for (name, bytes) in [("truncated", truncated), ("corrupt", corrupt)] {
        let archive = scene.daemon.path(format!("{name}.tar"));
        image::oci_archive(&archive, "example.com/bad:1", &[bytes], &json!({}))?;
        let error = scene.ctr.fails(&format!("images import {}", archive.display()))?;
        ensure!(!error.is_empty());
        scene.ctr.run("images rm --sync example.com/bad:1").ok();
    }
    let blob = scene.daemon.path("blob");
    std::fs::write(&blob, b"one thing")?;
    for flags in [format!("--expected-digest {}", image::digest(b"another")), "--expected-size 3".to_owned()]
    {
        let mut ingest = scene.ctr.words(&format!("content ingest {flags} wrong"));
        let output = ingest.stdin(Stdio::from(std::fs::File::open(&blob)?)).output()?;
        ensure!(!output.status.success(), "{flags}: {}", text(&output));
    }
    drop_ingest(&scene)?;
    scene.unchanged()
}

/// The ingest of a refused commit stays, so that a client can try again: that is a rule of the API. It is dropped by a
/// commit of the right content.
fn drop_ingest(scene: &Scene) -> Result<()> {
    let digest = image::digest(b"one thing");
    let mut ingest = scene.ctr.words("content ingest wrong");
    let blob = std::fs::File::open(scene.daemon.path("blob"))?;
    ensure!(ingest.stdin(Stdio::from(blob)).status()?.success());
    scene.ctr.run(&format!("content rm {digest}"))?;
    Ok(())
}

#[test]
fn layers_that_want_out_of_their_root() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let scene = Scene::new()?;
    let canary = scene.daemon.path("canary");
    std::fs::write(&canary, b"untouched")?;
    let outside = scene.daemon.path("");
    let up = format!("{}{}", "../".repeat(20), canary.display().to_string().trim_start_matches('/'));
    let link = |path: &'static str, data: &'static str| Entry {
        path,
        kind: EntryType::Symlink,
        mode: 0o777,
        data: data.as_bytes(),
    };
    let file =
        |path: &'static str| Entry { path, kind: EntryType::Regular, mode: 0o644, data: b"overwritten" };
    let target: &'static str = Box::leak(outside.display().to_string().into_boxed_str());
    let hard: &'static str = Box::leak(up.into_boxed_str());
    let layers = [
        vec![link("way", target), file("way/canary")],
        vec![link("way", hard), file("way")],
        vec![Entry { path: "hard", kind: EntryType::Link, mode: 0o644, data: hard.as_bytes() }, file("hard")],
        vec![
            link("way", target),
            Entry { path: "way/.wh.canary", kind: EntryType::Regular, mode: 0, data: b"" },
        ],
    ];
    for entries in layers {
        let archive = scene.daemon.path("out.tar");
        image::oci_archive(&archive, "example.com/out:1", &[image::layer(&entries)?], &json!({}))?;
        // Whether such a layer is refused or kept inside is the unpacker's choice; that it stays inside is not.
        scene.ctr.words(&format!("images import {}", archive.display())).output()?;
        ensure!(std::fs::read(&canary).context("the canary is gone")? == b"untouched");
        let strangers = strangers(&outside)?;
        ensure!(strangers.is_empty(), "made outside: {strangers:?}");
        scene.ctr.run("images rm --sync example.com/out:1").ok();
    }
    std::fs::remove_file(&canary)?;
    scene.unchanged()
}

/// The names in the daemon's folder that neither the daemon nor the tests put there.
fn strangers(folder: &Path) -> Result<Vec<String>> {
    let known = "root state d.sock d.sock.ttrpc notify log config.toml canary busybox.tar out.tar";
    let mut strangers = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !known.split(' ').any(|known| known == name) {
            strangers.push(name);
        }
    }
    Ok(strangers)
}
