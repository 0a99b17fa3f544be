//! Archives through Transfer: what comes in by a stream, what goes out, and what must not come in.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use davit_integration::daemon::ok;
use davit_integration::image::{self, digest};
use davit_integration::{Daemon, wait};
use davit_proto::any;
use davit_proto::containerd::services::streaming::v1::StreamInit;
use davit_proto::containerd::services::streaming::v1::streaming_client::StreamingClient;
use davit_proto::containerd::services::transfer::v1::transfer_client::TransferClient;
use davit_proto::containerd::services::transfer::v1::{TransferOptions, TransferRequest};
use davit_proto::containerd::types;
use davit_proto::containerd::types::transfer::{
    Data, ImageExportStream, ImageImportStream, ImageReference, ImageStore, OciRegistry, Progress,
    UnpackConfiguration, WindowUpdate,
};
use prost_types::Any;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{conn, refused, runtime};
use crate::root;

/// What is granted at once.
const WINDOW: i32 = 64 << 10;

/// Our end of a stream of bytes.
struct Bytes {
    sender: mpsc::Sender<Any>,
    answers: Streaming<Any>,
}

/// Opens a stream.
async fn open(daemon: &Daemon, id: &str) -> Result<Bytes> {
    let mut streaming = StreamingClient::new(conn(daemon, None).await?);
    let (sender, messages) = mpsc::channel(4);
    sender.send(any::pack(&StreamInit { id: id.to_owned() })).await?;
    let mut answers = streaming.stream(ReceiverStream::new(messages)).await?.into_inner();
    timeout(wait::PATIENCE, answers.message()).await??.context("no answer")?;
    Ok(Bytes { sender, answers })
}

impl Bytes {
    /// Sends as the daemon grants, until all is sent or the daemon ends the stream.
    async fn send(mut self, mut bytes: impl Read) -> Result<()> {
        let mut window = 0;
        loop {
            while window <= 0 {
                let Some(message) = self.answers.message().await? else { return Ok(()) };
                window += any::unpack::<WindowUpdate>(&message)?.context("no WindowUpdate")?.update;
            }
            let mut data = vec![0; usize::try_from(window)?.min(32 << 10)];
            let length = bytes.read(&mut data)?;
            if length == 0 {
                drop(self.sender);
                // The stream is the daemon's until it ends it.
                while self.answers.message().await?.is_some() {}
                return Ok(());
            }
            data.truncate(length);
            window -= i32::try_from(length)?;
            self.sender.send(any::pack(&Data { data })).await?;
        }
    }

    /// Receives to the end, in the way of containerd's client.
    async fn receive(mut self) -> Result<Vec<u8>> {
        let (mut window, mut all) = (0, Vec::new());
        loop {
            if window < WINDOW {
                // The end may be on its way.
                let _ = self.sender.send(any::pack(&WindowUpdate { update: WINDOW })).await;
                window += WINDOW;
            }
            let Some(message) = timeout(wait::PATIENCE, self.answers.message()).await?? else {
                return Ok(all);
            };
            let data = any::unpack::<Data>(&message)?.context("no Data")?.data;
            window -= i32::try_from(data.len())?;
            all.extend(data);
        }
    }
}

async fn transfer(daemon: &Daemon, source: Any, destination: Any, progress: &str) -> Result<(), Status> {
    let unavailable = |error: anyhow::Error| Status::unavailable(error.to_string());
    let mut transfers = TransferClient::new(conn(daemon, None).await.map_err(unavailable)?);
    let options = TransferOptions { progress_stream: progress.to_owned() };
    let (source, destination) = (Some(source), Some(destination));
    let call = transfers.transfer(TransferRequest { source, destination, options: Some(options) });
    timeout(wait::PATIENCE, call).await.map_err(|_| Status::deadline_exceeded("no answer"))?.map(drop)
}

/// Transfers, and returns the answer with all that was told.
pub(super) async fn told(
    daemon: &Daemon,
    source: Any,
    destination: Any,
) -> Result<(Result<(), Status>, Vec<Progress>)> {
    let mut stream = open(daemon, "news").await?;
    let done = transfer(daemon, source, destination, "news").await;
    let mut news = Vec::new();
    while let Some(message) = timeout(wait::PATIENCE, stream.answers.message()).await?? {
        news.push(any::unpack::<Progress>(&message)?.context("no Progress")?);
    }
    Ok((done, news))
}

/// Imports an archive, and returns the answer with the events and the names that were told of.
async fn import(
    daemon: &Daemon,
    archive: impl Read,
    store: ImageStore,
) -> Result<(Result<(), Status>, Vec<(String, String)>)> {
    let bytes = open(daemon, "bytes").await?;
    let source = ImageImportStream { stream: "bytes".to_owned(), ..ImageImportStream::default() };
    let importing = told(daemon, any::pack(&source), any::pack(&store));
    let (sent, told) = tokio::join!(bytes.send(archive), importing);
    sent?;
    let (done, news) = told?;
    Ok((done, news.into_iter().map(|news| (news.event, news.name)).collect()))
}

/// A store that takes names by a prefix, as `ctr images import` asks for it.
fn by_prefix(name: &str) -> ImageStore {
    let host = types::Platform {
        os: "linux".to_owned(),
        architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }.to_owned(),
        ..types::Platform::default()
    };
    let prefix = ImageReference {
        name: name.to_owned(),
        is_prefix: true,
        allow_overwrite: true,
        ..ImageReference::default()
    };
    ImageStore {
        extra_references: vec![prefix],
        platforms: vec![host.clone()],
        unpacks: vec![UnpackConfiguration { platform: Some(host), snapshotter: String::new() }],
        ..ImageStore::default()
    }
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        // As it is: a name that leads out of the archive would be refused.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *data).expect("memory");
    }
    builder.into_inner().expect("memory")
}

/// What `docker save` wrote before it wrote layouts.
fn docker_archive(names: &[&str]) -> Result<Vec<u8>> {
    let layer = image::busybox_layer()?;
    let config = json!({
        "os": "linux",
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "config": { "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
    });
    let table = json!([{ "Config": "c.json", "RepoTags": names, "Layers": ["1/layer.tar"] }]);
    Ok(tar(&[
        ("1/VERSION", b"1.0"),
        ("1/layer.tar", &layer),
        ("c.json", config.to_string().as_bytes()),
        ("manifest.json", table.to_string().as_bytes()),
    ]))
}

fn layout(daemon: &Daemon, name: &str) -> Result<Vec<u8>> {
    let path = daemon.path("layout.tar");
    image::oci_archive(&path, name, &[image::busybox_layer()?], &json!({ "Env": ["PATH=/bin"] }))?;
    Ok(fs::read(path)?)
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), bytes)?;
    let output = Command::new("gzip").arg("-c1").arg(file.path()).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "gzip fails");
    Ok(output.stdout)
}

fn names(daemon: &Daemon) -> Result<Vec<String>> {
    Ok(daemon.ctr().run("images ls -q")?.lines().map(str::to_owned).collect())
}

/// Waits until nothing is left of an import: no image, no content, no ingest, no lease.
fn wait_until_empty(daemon: &Daemon) -> Result<()> {
    ensure!(names(daemon)?.is_empty(), "{:?}", names(daemon)?);
    wait::until("what was imported to go", || {
        let ctr = daemon.ctr();
        let left = ["content ls -q", "leases ls -q"].map(|command| ctr.run(command));
        let active = ctr.run("content active").ok()?;
        (left.iter().all(|left| left.as_ref().is_ok_and(|left| left.trim().is_empty()))
            && !active.contains("import-"))
        .then_some(())
    })
}

#[test]
fn archives_of_all_kinds_become_images_that_run() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let full = "docker.io/library/box:1";
    let archives = [
        ("layout", layout(&daemon, full)?),
        ("compressed layout", gzip(&layout(&daemon, full)?)?),
        ("docker", docker_archive(&["box:1", "x.io/y/box:2"])?),
    ];
    for (kind, archive) in archives {
        // What stands behind the end of the archive is not asked for.
        let endless = archive.as_slice().chain(std::io::repeat(0));
        let (done, events) = match kind {
            "compressed layout" => {
                runtime()?.block_on(import(&daemon, archive.as_slice(), by_prefix("p")))?
            }
            _ => runtime()?.block_on(import(&daemon, endless, by_prefix("p")))?,
        };
        done.with_context(|| format!("import of the {kind}"))?;
        let told = |event: &str| events.iter().any(|(told, _)| told == event);
        ensure!(told("Importing") && told("Completed import"), "{kind}: {events:?}");
        ensure!(events.contains(&("saved".to_owned(), full.to_owned())), "{kind}: {events:?}");
        let wanted: &[&str] = if kind == "docker" { &[full, "x.io/y/box:2"] } else { &[full] };
        ensure!(names(&daemon)? == wanted, "{kind}: {:?}", names(&daemon)?);
        ensure!(daemon.ctr().run("leases ls -q")?.trim().is_empty(), "a lease is left");
        // The labels keep everything, and the image is unpacked already.
        ok(daemon.davit(["tag", full, "other:1"])?)?;
        daemon.ctr().run("images rm --sync docker.io/library/other:1")?;
        let snapshots = daemon.ctr().run("snapshots ls")?;
        ensure!(snapshots.contains("Committed"), "{kind}: {snapshots}");
        let text = ok(daemon.davit(["run", "--rm", "--pull=never", full, "echo", kind])?)?;
        ensure!(text.trim() == kind, "{text}");
        ok(daemon.davit([&["rmi"], wanted].concat())?)?;
        wait_until_empty(&daemon)?;
    }
    Ok(())
}

#[test]
fn a_layer_is_compressed_if_that_is_asked_for_and_taken_from_there_the_next_time() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let manifest = |compress: bool| {
        runtime()?.block_on(async {
            let bytes = open(&daemon, "bytes").await?;
            let source =
                ImageImportStream { stream: "bytes".into(), force_compress: compress, ..Default::default() };
            let call = transfer(&daemon, any::pack(&source), any::pack(&by_prefix("p")), "");
            let archive = docker_archive(&["box:1"])?;
            let (sent, done) = tokio::join!(bytes.send(archive.as_slice()), call);
            sent?;
            anyhow::Ok(done?)
        })?;
        let list = daemon.ctr().run("images ls name==docker.io/library/box:1")?;
        let target = list.split_whitespace().find(|word| word.starts_with("sha256:")).context("no image")?;
        anyhow::Ok(daemon.ctr().run(&format!("content get {target}"))?)
    };
    let compressed = manifest(true)?;
    ensure!(compressed.contains("rootfs.diff.tar.gzip"), "{compressed}");
    ensure!(manifest(false)? == compressed, "what was compressed is known");
    let text = ok(daemon.davit(["run", "--rm", "--pull=never", "box:1", "echo", "whole"])?)?;
    ensure!(text == "whole\n", "{text}");
    Ok(())
}

#[test]
fn an_archive_that_lies_or_breaks_off_changes_nothing() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let whole = layout(&daemon, "docker.io/library/box:1")?;
    let refusal = |archive: &[u8], code: Code, text: &str| {
        let (done, events) = runtime()?.block_on(import(&daemon, archive, by_prefix("p")))?;
        let status = done.err().context("it should be refused")?;
        let fits = status.code() == code && status.message().contains(text);
        ensure!(fits, "{:?} {:?}, want {code:?} {text:?}", status.code(), status.message());
        ensure!(!events.iter().any(|(event, _)| event == "saved"), "{events:?}");
        wait_until_empty(&daemon)
    };
    let version: (&str, &[u8]) = ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    let invalid = Code::InvalidArgument;
    refusal(b"no archive at all", Code::DataLoss, "truncated")?;
    refusal(&whole[..whole.len() / 2], Code::DataLoss, "truncated")?;
    refusal(&tar(&[("etc/passwd", b"x")]), invalid, "unrecognized image format")?;
    // Names that leave the archive mean nothing in it.
    refusal(&tar(&[version, ("/index.json", b"{}")]), invalid, "missing index.json in OCI layout 1.0.0")?;
    let other = [("oci-layout", br#"{"imageLayoutVersion":"9"}"#.as_slice()), ("index.json", b"{}")];
    refusal(&tar(&other), invalid, "unsupported OCI version 9")?;

    let blob = format!("blobs/sha256/{}", "0".repeat(64));
    refusal(&tar(&[version, (&blob, b"else"), ("index.json", b"{}")]), Code::FailedPrecondition, "digest")?;
    let entry = |size: u64| {
        json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": size,
            "digest": digest(b"{}"), "annotations": { "io.containerd.image.name": "x.io/a:1" } })
    };
    let index = |entries: Value| json!({ "schemaVersion": 2, "manifests": entries }).to_string();
    let gone = index(json!([entry(2)]));
    refusal(&tar(&[version, ("index.json", gone.as_bytes())]), Code::NotFound, &digest(b"{}"))?;
    let (named, wrong) = (format!("blobs/{}", digest(b"{}").replace(':', "/")), index(json!([entry(3)])));
    let files = [version, (named.as_str(), b"{}"), ("index.json", wrong.as_bytes())];
    refusal(&tar(&files), invalid, "has 2 bytes, not 3")?;
    refusal(&tar(&[version, ("index.json", index(json!([])).as_bytes())]), Code::NotFound, "filtered out")?;

    // A table of a terabyte is refused by its header, and an endless name is not read.
    for kind in [tar::EntryType::Regular, tar::EntryType::GNULongName, tar::EntryType::XHeader] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_path("index.json")?;
        header.set_size(1 << 40);
        header.set_cksum();
        let (done, _) = runtime()?.block_on(async {
            let endless = header.as_bytes().as_slice().chain(std::io::repeat(b'x'));
            import(&daemon, endless, by_prefix("p")).await
        })?;
        let status = done.err().context("it should be refused")?;
        ensure!(status.code() == invalid, "{status:?}");
    }
    wait_until_empty(&daemon)?;

    // A client that is lost has not said that this was all. Its connection goes with its runtime, without a word.
    let lost = runtime()?;
    let mut bytes = lost.block_on(open(&daemon, "lost"))?;
    let losing = std::thread::spawn(move || {
        let update = lost.block_on(bytes.answers.message())?.context("nothing is granted")?;
        ensure!(any::unpack::<WindowUpdate>(&update)?.is_some(), "{update:?}");
        let data = tar(&[version])[..1024].to_vec();
        lost.block_on(bytes.sender.send(any::pack(&Data { data })))?;
        // Its end is waited for: a body that is dropped while the connection lives is one that ends as it should.
        drop(lost);
        drop(bytes);
        anyhow::Ok(())
    });
    let source = ImageImportStream { stream: "lost".to_owned(), ..ImageImportStream::default() };
    let call = transfer(&daemon, any::pack(&source), any::pack(&by_prefix("p")), "");
    let done = runtime()?.block_on(call);
    losing.join().map_err(|_| anyhow::anyhow!("a panic"))??;
    refused(done, Code::Unavailable, "stream \"lost\" is closed: unavailable");
    wait_until_empty(&daemon)
}

#[test]
fn bytes_come_back_and_other_pairs_are_refused() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    runtime()?.block_on(async {
        let sent: Vec<u8> =
            (0..1_000_000_u32).map(|number| (number.wrapping_mul(number) >> 7) as u8).collect();
        let (from, to) = (open(&daemon, "from").await?, open(&daemon, "to").await?);
        let source = any::pack(&ImageImportStream { stream: "from".into(), ..Default::default() });
        let destination = any::pack(&ImageExportStream { stream: "to".into(), ..Default::default() });
        let call = transfer(&daemon, source.clone(), destination.clone(), "");
        let (sending, received, done) = tokio::join!(from.send(sent.as_slice()), to.receive(), call);
        sending?;
        done?;
        ensure!(received? == sent, "not what was sent");

        // Both streams are gone, and are looked for before anything else.
        let gone = transfer(&daemon, source, destination, "").await;
        refused(gone, Code::NotFound, "stream \"from\": not found");
        let (_from, _to) = (open(&daemon, "from").await?, open(&daemon, "to").await?);
        let registry = any::pack(&OciRegistry { reference: "x.io/a:1".into(), ..Default::default() });
        let import = any::pack(&ImageImportStream { stream: "from".into(), ..Default::default() });
        let export = any::pack(&ImageExportStream { stream: "to".into(), ..Default::default() });
        let prefix = any::pack(&by_prefix("p"));
        for (source, destination) in [
            (&registry, &export),
            (&import, &registry),
            (&prefix, &export),
            (&export, &prefix),
            (&registry, &registry),
        ] {
            let kinds = (&source.type_url, &destination.type_url);
            let text = format!("method Transfer not implemented for {} to {}", kinds.0, kinds.1);
            refused(
                transfer(&daemon, source.clone(), destination.clone(), "").await,
                Code::Unimplemented,
                &text,
            );
        }
        anyhow::Ok(())
    })
}

/// The files of an archive by their names.
fn files(archive: &[u8]) -> Result<HashMap<String, Vec<u8>>> {
    let mut files = HashMap::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.display().to_string();
        let mut data = Vec::new();
        entry.read_to_end(&mut data)?;
        files.insert(name, data);
    }
    Ok(files)
}

#[test]
fn an_export_has_all_names_and_what_is_asked_for() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let busybox = image::BUSYBOX;
    for name in ["busybox:2", "x.io/y/box:3"] {
        ok(daemon.davit(["tag", "busybox", name])?)?;
    }
    let export = |options: ImageExportStream, names: &[&str]| {
        let reference = |name: &&str| ImageReference { name: (*name).to_owned(), ..Default::default() };
        let store =
            ImageStore { extra_references: names.iter().map(reference).collect(), ..Default::default() };
        runtime()?.block_on(async {
            let bytes = open(&daemon, "bytes").await?;
            let options = ImageExportStream { stream: "bytes".to_owned(), ..options };
            let call = transfer(&daemon, any::pack(&store), any::pack(&options), "");
            let (archive, done) = tokio::join!(bytes.receive(), call);
            match done {
                Ok(()) => anyhow::Ok(Ok(files(&archive?)?)),
                Err(status) => Ok(Err(status)),
            }
        })
    };
    let document = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes);

    let all = [busybox, "docker.io/library/busybox:2", "x.io/y/box:3"];
    let archive = export(ImageExportStream::default(), &all)??;
    let saved = document(&archive["manifest.json"])?;
    ensure!(saved.as_array().is_some_and(|saved| saved.len() == 1), "one image: {saved}");
    ensure!(saved[0]["RepoTags"] == json!(["busybox:latest", "busybox:2", "x.io/y/box:3"]), "{saved}");
    let index = document(&archive["index.json"])?;
    let annotation = |place: usize, key: &str| index["manifests"][place]["annotations"][key].clone();
    ensure!(annotation(1, "io.containerd.image.name") == "docker.io/library/busybox:2", "{index}");
    ensure!(annotation(2, "org.opencontainers.image.ref.name") == "3", "{index}");
    for layer in saved[0]["Layers"].as_array().context("no layers")? {
        let name = layer.as_str().context("no name")?;
        ensure!(format!("sha256:{}", &name[13..]) == digest(&archive[name]), "{name} is something else");
    }

    let plain = ImageExportStream { skip_compatibility_manifest: true, ..ImageExportStream::default() };
    ensure!(!export(plain, &[busybox])??.contains_key("manifest.json"), "it was not asked for");
    let nothing = export(ImageExportStream::default(), &[])??;
    ensure!(document(&nothing["index.json"])?["manifests"] == json!([]), "there is nothing");
    let Err(status) = export(ImageExportStream::default(), &["x.io/none:1"])? else { bail!("of what?") };
    ensure!(status.code() == Code::NotFound, "{status:?}");
    Ok(())
}

#[test]
fn an_index_is_exported_for_the_platforms_that_are_asked_for() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    // Two images, and an index of both.
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |bytes: Vec<u8>| {
        let name = digest(&bytes);
        let size = bytes.len();
        files.push((format!("blobs/{}", name.replace(':', "/")), bytes));
        (name, size)
    };
    let mut manifests = Vec::new();
    for architecture in ["s390x", "ppc64le"] {
        let config = json!({ "os": "linux", "architecture": architecture, "rootfs": { "type": "layers" } });
        let (config, size) = add(config.to_string().into_bytes());
        let config = json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": size });
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [] });
        let (manifest, size) = add(manifest.to_string().into_bytes());
        manifests
            .push(json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest,
            "size": size, "platform": { "os": "linux", "architecture": architecture } }));
    }
    let (index, size) = add(json!({ "schemaVersion": 2, "manifests": manifests }).to_string().into_bytes());
    let top = json!({ "schemaVersion": 2, "manifests": [{ "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": index, "size": size, "annotations": { "org.opencontainers.image.ref.name": "1" } }] });
    files.push(("index.json".to_owned(), top.to_string().into_bytes()));
    files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, data)| (name.as_str(), data.as_slice())).collect();
    let archive = tar(&files);

    // All of it is kept: no platform is asked for.
    let store = ImageStore { platforms: Vec::new(), ..by_prefix("x.io/two") };
    runtime()?.block_on(import(&daemon, archive.as_slice(), store))?.0?;
    ensure!(names(&daemon)? == ["x.io/two:1"], "{:?}", names(&daemon)?);
    let export = |options: ImageExportStream| {
        runtime()?.block_on(async {
            let bytes = open(&daemon, "bytes").await?;
            let store = ImageStore { name: "x.io/two:1".to_owned(), ..ImageStore::default() };
            let options = ImageExportStream { stream: "bytes".to_owned(), ..options };
            let call = transfer(&daemon, any::pack(&store), any::pack(&options), "");
            let (archive, done) = tokio::join!(bytes.receive(), call);
            done?;
            let blobs = self::files(&archive?)?.into_keys().filter(|name| name.starts_with("blobs/")).count();
            anyhow::Ok(blobs)
        })
    };
    let s390x = || types::Platform { os: "linux".into(), architecture: "s390x".into(), ..Default::default() };
    let platforms = |platforms| ImageExportStream { platforms, ..ImageExportStream::default() };
    ensure!(export(platforms(vec![s390x()]))? == 3, "the index, a manifest, a configuration");
    let all = ImageExportStream { all_platforms: true, ..platforms(vec![s390x()]) };
    ensure!(export(all)? == 5, "the index, and both");
    let error = export(platforms(Vec::new())).err().context("nothing is for this machine")?;
    ensure!(error.to_string().contains("no manifest found for platform"), "{error}");

    // With a limit, and for one platform, the rest is kept neither by the index nor by anybody.
    ok(daemon.davit(["rmi", "x.io/two:1"])?)?;
    wait_until_empty(&daemon)?;
    let platforms = vec![s390x()];
    let store = ImageStore { platforms, manifest_limit: 1, unpacks: Vec::new(), ..by_prefix("x.io/two") };
    runtime()?.block_on(import(&daemon, archive.as_slice(), store))?.0?;
    ensure!(names(&daemon)? == ["x.io/two:1"], "{:?}", names(&daemon)?);
    Ok(())
}

#[test]
fn archives_that_never_come_hold_up_nothing_else() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    runtime()?.block_on(async {
        // More of each kind than there are places for transfers.
        let mut waiting = Vec::new();
        for number in 0..8 {
            let (id, told) = (format!("bytes-{number}"), format!("news-{number}"));
            let (bytes, mut news) = (open(&daemon, &id).await?, open(&daemon, &told).await?);
            let mut transfers = TransferClient::new(conn(&daemon, None).await?);
            let request = TransferRequest {
                source: Some(any::pack(&ImageImportStream { stream: id, ..Default::default() })),
                destination: Some(any::pack(&by_prefix("p"))),
                options: Some(TransferOptions { progress_stream: told }),
            };
            let call = tokio::spawn(async move { transfers.transfer(request).await });
            let begun = timeout(wait::PATIENCE, news.answers.message()).await??.context("no news")?;
            ensure!(
                any::unpack::<Progress>(&begun)?.is_some_and(|news| news.event == "Importing"),
                "{begun:?}"
            );
            waiting.push((bytes, news, call));
        }
        // Nobody listens there, which is told at once.
        let registry = OciRegistry { reference: "127.0.0.1:1/x:1".to_owned(), ..OciRegistry::default() };
        let store = ImageStore { name: "127.0.0.1:1/x:1".to_owned(), ..ImageStore::default() };
        let refused = transfer(&daemon, any::pack(&registry), any::pack(&store), "").await;
        let status = refused.err().context("of what?")?;
        ensure!(status.message().contains("127.0.0.1:1"), "{status:?}");
        let archive = layout(&daemon, "docker.io/library/box:1")?;
        import(&daemon, archive.as_slice(), by_prefix("p")).await?.0?;
        // Who gives up leaves nothing.
        for (_, _, call) in &waiting {
            call.abort();
        }
        anyhow::Ok(())
    })?;
    ok(daemon.davit(["rmi", "box:1"])?)?;
    wait_until_empty(&daemon)
}
