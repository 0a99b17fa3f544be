//! Transfer: images to and from a registry, by our client and by another's, and what happens on a bad way.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use davit_integration::daemon::ok;
use davit_integration::image::{self, Entry};
use davit_integration::registry::{Registry, Trouble, Way};
use davit_integration::{Daemon, wait};
use davit_proto::any;
use davit_proto::containerd::services::transfer::v1::TransferRequest;
use davit_proto::containerd::services::transfer::v1::transfer_client::TransferClient;
use davit_proto::containerd::types::transfer::{
    ImageStore, OciRegistry, Progress, RegistryResolver, UnpackConfiguration,
};
use nix::sys::signal::Signal;
use tar::EntryType;
use tonic::Code;

use super::archives::told;
use super::{conn, plugins, refused, runtime};
use crate::root;

/// `davit` with a configuration of Docker's in `folder`, which need not be there.
fn davit(daemon: &Daemon, folder: &Path, args: &[&str]) -> Command {
    let mut command = daemon.davit_command(args);
    command.env("DOCKER_CONFIG", folder);
    command
}

fn failed(output: Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "it should fail: {text}");
    Ok(text)
}

/// Runs a command with `input` on its standard input.
fn with_input(mut command: Command, input: &str) -> Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

/// Gives busybox the name `name`, pushes it, and removes it with all that it keeps.
fn push(daemon: &Daemon, config: &Path, name: &str) -> Result<()> {
    daemon.import_busybox()?;
    ok(daemon.davit(["tag", "busybox", name])?)?;
    ok(davit(daemon, config, &["push", name]).output()?)?;
    ok(daemon.davit(["rmi", "busybox", name])?)?;
    wait_until_empty(daemon)
}

/// Waits until nothing of an image is left.
fn wait_until_empty(daemon: &Daemon) -> Result<()> {
    wait::until("the content to go", || {
        let left = daemon.ctr().run("content ls -q").ok()?;
        left.trim().is_empty().then_some(())
    })
}

#[test]
fn an_image_goes_to_a_registry_and_comes_back() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let Some(registry) = Registry::start(&daemon.path("registry"), false)? else { return Ok(()) };
    let (config, name) = (daemon.path("no-config"), format!("{}/team/box:1", registry.address));
    runtime()?.block_on(plugins(&daemon, &[("transfer.v1", "local"), ("grpc.v1", "transfer")]))?;
    push(&daemon, &config, &name)?;

    // What is missing is pulled, unless that is forbidden; what is there is not asked for again.
    let text = failed(davit(&daemon, &config, &["run", "--rm", "--pull=never", &name, "true"]).output()?)?;
    ensure!(text.contains("no such image"), "{text}");
    let hello = davit(&daemon, &config, &["run", "--rm", &name, "echo", "hello"]).output()?;
    let news = String::from_utf8_lossy(&hello.stderr).into_owned();
    ensure!(ok(hello)? == "hello\n", "only the container's output");
    for event in ["manifest", "config", "layer", "downloading", "extracted"] {
        ensure!(news.contains(event), "{event} is not told of: {news}");
    }
    let pulled = ok(davit(&daemon, &config, &["pull", "-q", &name]).output()?)?;
    ensure!(pulled.trim() == name, "{pulled}");
    // No lease is left, and the image keeps what it needs.
    ensure!(daemon.ctr().run("leases ls -q")?.trim().is_empty(), "a lease is left");
    ok(davit(&daemon, &config, &["run", "--rm", "--pull=always", &name, "true"]).output()?)?;

    let missing = format!("{}/team/box:2", registry.address);
    let text = failed(davit(&daemon, &config, &["pull", &missing]).output()?)?;
    ensure!(text.contains("not found"), "{text}");
    ok(daemon.davit(["rmi", &name])?)?;
    wait_until_empty(&daemon)
}

#[test]
fn layers_lie_in_their_order_and_outlive_a_collection() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let Some(registry) = Registry::start(&daemon.path("registry"), false)? else { return Ok(()) };
    let (config, name) = (daemon.path("no-config"), format!("{}/many:1", registry.address));
    let mut layers = vec![image::busybox_layer()?];
    for number in 0..12 {
        let text = number.to_string();
        let own = format!("of-{number}");
        let file = |path| Entry { path, kind: EntryType::Regular, mode: 0o644, data: text.as_bytes() };
        layers.push(image::layer(&[file("top"), file(&own)])?);
    }
    let archive = daemon.path("many.tar");
    image::oci_archive(&archive, &name, &layers, &serde_json::json!({ "Env": ["PATH=/bin"] }))?;
    daemon.ctr().run(&format!("images import {}", archive.display()))?;
    ok(davit(&daemon, &config, &["push", &name]).output()?)?;
    ok(daemon.davit(["rmi", &name])?)?;
    wait_until_empty(&daemon)?;
    ok(davit(&daemon, &config, &["pull", &name]).output()?)?;
    let snapshots = daemon.ctr().run("snapshots ls")?;
    ensure!(snapshots.lines().filter(|line| line.contains("Committed")).count() == 13, "{snapshots}");
    ensure!(!snapshots.contains("extract-"), "{snapshots}");

    ok(daemon.davit(["tag", &name, "other:1"])?)?;
    daemon.ctr().run("images rm --sync docker.io/library/other:1")?;
    let script = "cat top && for n in 0 5 11; do cat of-$n; done";
    let run = ["run", "--rm", "--pull=never", &name, "sh", "-c", script];
    let text = ok(davit(&daemon, &config, &run).output()?)?;
    ensure!(text == "110511", "{text}");
    ensure!(daemon.ctr().run("snapshots ls")? == snapshots, "something was unpacked again, or is left");
    Ok(())
}

#[test]
fn a_secret_goes_to_the_registry_and_nowhere_else() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let Some(registry) = Registry::start(&daemon.path("registry"), true)? else { return Ok(()) };
    let (config, name) = (daemon.path("config"), format!("{}/box:1", registry.address));
    fs::create_dir_all(&config)?;
    let write = |auth: &str| {
        let auths = serde_json::json!({ "auths": { registry.address.to_string(): { "auth": auth } } });
        fs::write(config.join("config.json"), auths.to_string())
    };
    // user:hunter2 and user:hunter3
    write("dXNlcjpodW50ZXIy")?;
    push(&daemon, &config, &name)?;
    write("dXNlcjpodW50ZXIz")?;
    let text = failed(davit(&daemon, &config, &["pull", &name]).output()?)?;
    ensure!(
        text.contains("authorization") && text.contains(&format!("davit login {}", registry.address.ip())),
        "{text}"
    );
    ensure!(!text.contains("hunter"), "{text}");
    fs::remove_file(config.join("config.json"))?;
    failed(davit(&daemon, &config, &["pull", &name]).output()?)?;
    write("dXNlcjpodW50ZXIy")?;
    ok(davit(&daemon, &config, &["pull", &name]).output()?)?;
    let log = daemon.log();
    for secret in ["hunter", "dXNlcjpodW50ZX"] {
        ensure!(!log.contains(secret), "{secret} is in the log");
    }
    Ok(())
}

#[test]
fn a_login_is_tried_before_it_is_kept() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let Some(registry) = Registry::start(&daemon.path("registry"), true)? else { return Ok(()) };
    let (config, name) = (daemon.path("config"), format!("{}/box:1", registry.address));
    let server = registry.address.to_string();
    let login = ["login", "-u", "user", "--password-stdin", server.as_str()];
    let text = failed(with_input(davit(&daemon, &config, &login), "hunter3\n")?)?;
    ensure!(text.contains("authorization failed") && !text.contains("hunter"), "{text}");
    ensure!(!config.exists(), "a wrong password was kept");
    ok(with_input(davit(&daemon, &config, &login), "hunter2\n")?)?;
    push(&daemon, &config, &name)?;
    ok(davit(&daemon, &config, &["pull", &name]).output()?)?;
    ok(davit(&daemon, &config, &["logout", &server]).output()?)?;
    failed(davit(&daemon, &config, &["pull", &name]).output()?)?;
    Ok(())
}

/// A daemon with nothing, and a registry that has busybox at the end of a bad way.
struct Scene {
    daemon: Daemon,
    _registry: Registry,
    way: Way,
    /// A folder without a configuration of Docker's.
    config: PathBuf,
    /// What busybox is called at this end of the way.
    name: String,
}

impl Scene {
    /// A way whose trouble comes after 300 kB of an answer. `None` where there is no registry to start.
    fn new(trouble: Trouble) -> Result<Option<Scene>> {
        let daemon = Daemon::start()?;
        let Some(registry) = Registry::start(&daemon.path("registry"), false)? else { return Ok(None) };
        let config = daemon.path("no-config");
        push(&daemon, &config, &format!("{}/box:1", registry.address))?;
        let way = Way::new(registry.address, trouble, 300_000)?;
        let name = format!("{}/box:1", way.address);
        Ok(Some(Scene { daemon, _registry: registry, way, config, name }))
    }
}

#[test]
fn a_broken_way_is_taken_up_where_it_broke() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let Some(scene) = Scene::new(Trouble::Cut)? else { return Ok(()) };
    let Scene { daemon, way, config, name, .. } = &scene;
    ok(davit(daemon, config, &["pull", name]).output()?)?;
    ensure!(way.had_trouble(), "nothing was cut");
    ensure!(way.requests().to_lowercase().contains("range: bytes="), "{}", way.requests());
    let text = ok(davit(daemon, config, &["run", "--rm", name, "echo", "whole"]).output()?)?;
    ensure!(text == "whole\n", "{text}");
    Ok(())
}

#[test]
fn a_pull_goes_on_with_the_next_daemon() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let Some(mut scene) = Scene::new(Trouble::Stall)? else { return Ok(()) };
    let Scene { daemon, way, config, name, .. } = &mut scene;
    let mut pulling = davit(daemon, config, &["pull", name]).spawn()?;
    wait::until("the layer to come", || {
        let active = daemon.ctr().run("content active").ok()?;
        let layer = active.lines().find(|line| line.starts_with("layer-"))?;
        // What is on its way from the registry is not in the ingest yet, and only what is can be gone on behind.
        let has_some = layer.split_whitespace().nth(1).is_some_and(|size| !size.starts_with("0.0"));
        (way.had_trouble() && has_some).then_some(())
    })?;
    daemon.stop(Signal::SIGKILL)?;
    ensure!(!pulling.wait()?.success(), "a pull without a daemon");
    daemon.restart()?;
    let asked = way.requests().len();
    ok(davit(daemon, config, &["pull", name]).output()?)?;
    let later = way.requests()[asked..].to_lowercase();
    ensure!(later.contains("range: bytes="), "{later}");
    let text = ok(davit(daemon, config, &["run", "--rm", name, "echo", "whole"]).output()?)?;
    ensure!(text == "whole\n", "{text}");
    Ok(())
}

#[test]
fn a_client_that_goes_away_takes_its_pull_with_it() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let Some(scene) = Scene::new(Trouble::Stall)? else { return Ok(()) };
    let Scene { daemon, way, config, name, .. } = &scene;
    let mut pull = davit(daemon, config, &["pull", "-q", name]);
    let mut pulling = pull.spawn()?;
    wait::until("the layer to come", || way.had_trouble().then_some(()))?;
    pulling.kill()?;
    pulling.wait()?;
    wait::until("the lease to go", || {
        let leases = daemon.ctr().run("leases ls -q").ok()?;
        leases.trim().is_empty().then_some(())
    })?;
    wait_until_empty(daemon)?;
    wait::until("the ingest to go", || {
        let active = daemon.ctr().run("content active").ok()?;
        (!active.contains("layer-")).then_some(())
    })
}

#[test]
fn a_saved_image_is_read_by_us_and_by_others() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let archive = daemon.path("saved.tar").display().to_string();
    ok(daemon.davit(["save", "-o", &archive, "busybox"])?)?;
    let list = ok(Command::new("tar").args(["-tf", &archive]).output()?)?;
    for name in ["oci-layout", "index.json", "manifest.json", "blobs/sha256/"] {
        ensure!(list.contains(name), "{name} is not in {list}");
    }
    for load in ["images import", "davit load"] {
        ok(daemon.davit(["rmi", "busybox"])?)?;
        wait_until_empty(&daemon)?;
        match load {
            "davit load" => drop(ok(daemon.davit(["load", "-i", &archive])?)?),
            command => drop(daemon.ctr().run(&format!("{command} {archive}"))?),
        }
        let text = ok(daemon.davit(["run", "--rm", "--pull=never", "busybox", "echo", load])?)?;
        ensure!(text.trim() == load, "{text}");
    }
    let text = failed(daemon.davit(["save", "-o", &archive, "nothing"])?)?;
    ensure!(text.contains("no such image"), "{text}");
    Ok(())
}

#[test]
fn an_image_gets_further_names() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    runtime()?
        .block_on(async {
            let mut transfer = TransferClient::new(conn(&daemon, None).await?);
            let store =
                |name: &str| Some(any::pack(&ImageStore { name: name.to_owned(), ..ImageStore::default() }));
            let mut call = async |source, destination| {
                transfer.transfer(TransferRequest { source, destination, options: None }).await
            };
            call(store("docker.io/library/busybox:latest"), store("example.com/box:2")).await?;
            let names = daemon.ctr().run("images ls -q")?;
            ensure!(names.contains("example.com/box:2"), "{names}");
            let text = "image \"nothing\": not found";
            refused(call(store("nothing"), store("else")).await, Code::NotFound, text);
            anyhow::Ok(())
        })
        .context("the calls")
}

#[test]
fn a_transfer_is_told_of_in_the_words_and_the_order_of_containerd() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let Some(registry) = Registry::start(&daemon.path("registry"), false)? else { return Ok(()) };
    let (local, name) = (image::BUSYBOX, format!("{}/box:1", registry.address));
    daemon.import_busybox()?;
    let remote = |name: &str| {
        let resolver = RegistryResolver { default_scheme: "http".to_owned(), ..RegistryResolver::default() };
        any::pack(&OciRegistry { reference: name.to_owned(), resolver: Some(resolver) })
    };
    let store = |name: &str| {
        let unpacks = vec![UnpackConfiguration::default()];
        any::pack(&ImageStore { name: name.to_owned(), unpacks, ..ImageStore::default() })
    };
    let told = |source, destination| runtime()?.block_on(told(&daemon, source, destination));
    let of = |news: &[Progress], part: &str| -> Vec<String> {
        news.iter().filter(|news| news.name.starts_with(part)).map(|news| news.event.clone()).collect()
    };
    let ends = |news: &[Progress], first: &[&str], last: &[&str]| {
        let events: Vec<&str> = news.iter().map(|news| news.event.as_str()).collect();
        ensure!(events.starts_with(first) && events.ends_with(last), "{events:?}");
        anyhow::Ok(())
    };

    let (done, news) = told(store(local), remote(&name))?;
    done?;
    let place = format!("OCI Registry ({name})");
    let completed = format!("Completed push to {place}");
    ends(&news, &[&format!("Pushing to {place}"), "pushing content"], &[&completed, "pushed content"])?;
    for part in ["manifest-", "config-", "layer-"] {
        let events = of(&news, part);
        ensure!(events.first().is_some_and(|event| event == "waiting"), "{part}: {events:?}");
        ensure!(events.last().is_some_and(|event| event == "complete"), "{part}: {events:?}");
    }
    // What is the outermost document belongs to the image, by its own name and not by the registry's.
    let manifest = news.iter().find(|news| news.name.starts_with("manifest-")).context("no manifest")?;
    ensure!(manifest.parents == [local], "{manifest:?}");

    let gone = format!("{}/box:2", registry.address);
    let (done, news) = told(remote(&gone), store(&gone))?;
    refused(done, Code::NotFound, &format!("failed to resolve image: {gone}: not found"));
    ends(&news, &[&format!("Resolving from OCI Registry ({gone})")], &[])?;

    ok(daemon.davit(["rmi", "busybox"])?)?;
    wait_until_empty(&daemon)?;
    let first = [format!("Resolving from {place}"), format!("Pulling from {place}")];
    let first = [first[0].as_str(), first[1].as_str(), "fetching image content"];
    let completed = format!("Completed pull from {place}");
    let (done, news) = told(remote(&name), store(&name))?;
    done?;
    ends(&news, &first, &[&completed, "saved"])?;
    let layer = of(&news, "layer-");
    ensure!(layer.ends_with(&["extracting".to_owned(), "extracted".to_owned()]), "{layer:?}");
    ensure!(of(&news, "config-").ends_with(&["complete".to_owned()]), "{:?}", of(&news, "config-"));

    // What is there is neither fetched nor unpacked.
    let (done, news) = told(remote(&name), store(&name))?;
    done?;
    ends(&news, &first, &[&completed, "saved"])?;
    for part in ["manifest-", "config-", "layer-"] {
        let events = of(&news, part);
        ensure!(events.last().is_none_or(|event| event == "already exists"), "{part}: {events:?}");
    }
    Ok(())
}
