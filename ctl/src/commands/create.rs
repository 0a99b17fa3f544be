//! `davit create`, and the making of a container for `davit run`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use davit_oci::platform::Platform;
use davit_oci::spec::{self, Host, Options as SpecOptions};
use davit_oci::user;
use davit_proto::containerd::runc::v1::Options as RuncOptions;
use davit_proto::containerd::services::containers::v1::container::Runtime;
use davit_proto::containerd::services::containers::v1::{Container, CreateContainerRequest};
use davit_proto::containerd::services::snapshots::v1::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use davit_proto::containerd::types::Mount;

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::etc::{self, NameOptions};
use crate::image::{self, PlatformImage};
use crate::log::{self, LogOptions};
use crate::place::Places;
use crate::progress::Progress;
use crate::transfer::{self, PullPolicy};
use crate::unpack::Snapshotter;
use crate::{container, format, labels, lease, name, restart, rootfs, signal, unpack};

mod mounts;
mod spec_options;

pub(crate) use spec_options::variables;

/// The runtime that both davitd and containerd have.
const DEFAULT_RUNTIME: &str = "io.containerd.runc.v2";

/// What a container is made of.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CreateOptions {
    /// Name of the container (default: made from the image and the id)
    #[arg(long)]
    name: Option<String>,
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set an environment variable; without a value it is taken from yours
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Mount a folder or file of the host
    #[arg(short, long, value_name = "/HOST:/CONTAINER[:ro]")]
    volume: Vec<String>,
    /// Mount something, by fields: type=bind,source=/HOST,target=/CONTAINER,readonly or type=tmpfs,target=/CONTAINER
    #[arg(long, value_name = "FIELDS")]
    mount: Vec<String>,
    /// Mount a filesystem in memory
    #[arg(long, value_name = "PATH[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,
    /// User name or number, with an optional group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Add the process to further groups
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    /// Limit of memory, such as 512m or 2g
    #[arg(short, long, value_name = "BYTES", value_parser = format::parse_size)]
    memory: Option<u64>,
    /// Limit of memory and swap together; -1 for no limit (default: twice the memory)
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Memory to keep for the container when the host is short of it
    #[arg(long, value_name = "BYTES", value_parser = format::parse_size)]
    memory_reservation: Option<u64>,
    /// Limit of CPU time, in CPUs, such as 1.5
    #[arg(long, value_name = "NUMBER", value_parser = parse_cpus)]
    cpus: Option<f64>,
    /// Relative weight of CPU time (1024 is the usual)
    #[arg(short, long, value_name = "WEIGHT")]
    cpu_shares: Option<u64>,
    /// The CPUs to run on, such as 0-2,7
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// The memory nodes to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Limit of processes and threads; -1 for no limit
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// Limit of a resource of the process, such as nofile=1024:2048
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    ulimit: Vec<String>,
    /// Size of /dev/shm (default: 64m)
    #[arg(long, value_name = "BYTES", value_parser = format::parse_size)]
    shm_size: Option<u64>,
    /// Network: "none", a network of its own with nothing but loopback, or "host"; bridges are not there yet
    #[arg(long, visible_alias = "net", value_name = "MODE", default_value = "none")]
    network: String,
    /// Host name of the container (default: its short id)
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    #[command(flatten)]
    names: NameOptions,
    /// Command in place of the image's entrypoint
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Make the root filesystem read-only
    #[arg(long)]
    read_only: bool,
    /// Give the container everything: capabilities, devices, no filter of system calls
    #[arg(long)]
    privileged: bool,
    /// Add a capability, or ALL
    #[arg(long, value_name = "NAME")]
    cap_add: Vec<String>,
    /// Drop a capability, or ALL
    #[arg(long, value_name = "NAME")]
    cap_drop: Vec<String>,
    /// seccomp=unconfined, seccomp=FILE, no-new-privileges
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Give the container a device of the host
    #[arg(long, value_name = "PATH[:PATH[:rwm]]")]
    device: Vec<String>,
    /// Set a kernel parameter of the container
    #[arg(long, value_name = "KEY=VALUE")]
    sysctl: Vec<String>,
    /// Label the container
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    label: Vec<String>,
    /// Annotate the runtime spec
    #[arg(long, value_name = "KEY=VALUE")]
    annotation: Vec<String>,
    /// How the log of a container in the background is kept: max-size=10m, max-file=3, mode=blocking or non-blocking
    #[arg(long, value_name = "KEY=VALUE")]
    log_opt: Vec<String>,
    /// Whether the daemon starts a container in the background again: no, always, unless-stopped, on-failure,
    /// on-failure:TIMES
    #[arg(long, value_name = "POLICY", default_value = "no")]
    restart: String,
    /// Write the id of the container to a file that must not exist
    #[arg(long, value_name = "FILE")]
    cidfile: Option<PathBuf>,
    /// When to pull the image
    #[arg(long, value_name = "WHEN", value_enum, default_value = "missing")]
    pull: PullPolicy,
    /// Platform of the image, such as linux/arm64 (default: this machine's)
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// A containerd runtime such as io.containerd.runc.v2, or the name or path of an OCI runtime such as crun
    #[arg(long, value_name = "NAME", default_value = DEFAULT_RUNTIME)]
    runtime: String,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// Signal that asks the container to stop (default: the image's, or SIGTERM)
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    #[command(flatten)]
    later: spec_options::NotYet,
    /// The image, and the command to run in place of its own
    #[arg(required = true, trailing_var_arg = true, hide = true, value_name = "IMAGE")]
    pub(crate) image_and_args: Vec<String>,
}

fn parse_cpus(text: &str) -> std::result::Result<f64, String> {
    text.parse().map_err(|_| "want a number, such as 1.5".to_owned())
}

impl CreateOptions {
    /// Whether the daemon is to start the container again.
    pub(crate) fn is_restarted(&self) -> bool {
        self.restart != "no"
    }
}

/// A container that was made.
#[derive(Debug)]
pub(crate) struct Created {
    /// Its record.
    pub(crate) container: Container,
    /// The mounts of its root filesystem.
    pub(crate) rootfs: Vec<Mount>,
}

/// `davit create`.
pub(crate) async fn run(client: &Client, options: CreateOptions, out: &mut dyn Write) -> Result<()> {
    let created = create(client, &options, None).await?;
    format::line(out, created.container.id)
}

/// Makes a container: its snapshot and its record. Its output goes to the FIFOs in `fifos`, or to a log once it runs.
///
/// # Errors
/// Whatever is wrong with options, image or daemon; nothing is left behind then.
pub(crate) async fn create(
    client: &Client,
    options: &CreateOptions,
    fifos: Option<&Path>,
) -> Result<Created> {
    let logged = fifos.is_none();
    let (given, args) = options.image_and_args.split_first().expect("the parser wants at least one");
    // What can be refused without the daemon is refused first.
    options.later.refuse()?;
    let mut spec_options = spec_options::resolve(options, args)?;
    let restart = restart::policy(&options.restart)?;
    if restart.is_some() && !logged {
        let hint = "add -d, or leave out --restart";
        return Err(Error::usage("--restart is for containers in the background", hint));
    }
    let log_options = LogOptions::parse(&options.log_opt)?;
    if let Some(mode) = &log_options.mode {
        spec_options.annotations.insert(log::MODE_ANNOTATION.to_owned(), mode.clone());
    }
    let stop_signal = options.stop_signal.as_deref();
    if let Some(text) = stop_signal {
        check_signal(text)?;
    }
    if let Some(name) = &options.name {
        name::check_free(client, name).await?;
    }
    let platform =
        options.platform.as_deref().map(Platform::parse).transpose()?.unwrap_or_else(Platform::host);
    let image = transfer::find(client, given, options.pull, &platform, &options.snapshotter.name).await?;
    let found = image::for_platform(client, &image::target(&image)?, &platform).await?;
    let own = Platform::of(&found.config);
    // An image that is for one platform alone is taken for any other, unless somebody says which.
    if options.platform.is_some() && !own.runs_on(&platform) {
        let hint = format!("`davit pull --platform {platform} {given}` gets the other, if there is one");
        return Err(Error::usage(format!("the image is for {own}, not for {platform}"), hint));
    }

    let id = container::new_id()?;
    spec_options.id.clone_from(&id);
    spec_options.namespace = client.namespace().to_owned();
    if spec_options.hostname.is_empty() {
        spec_options.hostname = format::short_id(&id).to_owned();
    }
    let places = Places::of(client).await?;
    let mut labels = labels_of(options, &found, &image.name, &id)?;
    let etc = places.etc(&id);
    labels.insert(labels::ETC.to_owned(), etc.display().to_string());
    if options.interactive && logged {
        labels.insert(labels::STDIN.to_owned(), "open".to_owned());
    }
    let runtime = runtime(&options.runtime)?;
    if logged {
        let log = places.log(&id, &runtime.name);
        labels.insert(labels::LOG.to_owned(), log.display().to_string());
    }
    if !log_options.label().is_empty() {
        labels.insert(labels::LOG_OPTIONS.to_owned(), log_options.label());
    }
    // Whoever removes it removes them, too, should the client that has them be killed.
    labels.extend(fifos.map(|folder| (labels::FIFOS.to_owned(), folder.display().to_string())));
    labels.extend(restart.map(|policy| (labels::RESTART.to_owned(), policy)));
    let record = Container {
        id: id.clone(),
        labels,
        image: image.name,
        runtime: Some(runtime),
        snapshotter: options.snapshotter.name.clone(),
        snapshot_key: id,
        ..Container::default()
    };
    let cid_file = options.cidfile.as_deref().map(|path| write_cid_file(path, &record.id)).transpose()?;
    let made = lease::with_lease(client, |client| async move {
        let (hostname, network) = (spec_options.hostname.clone(), spec_options.network);
        let binds = &mut spec_options.binds;
        etc::make(places.root(), &etc, &hostname, network, &options.names, options.read_only, binds)?;
        let made = make(&client, record, &found, options, spec_options).await;
        if made.is_err() {
            etc::remove(&etc);
        }
        made
    });
    let made = made.await;
    if let (Err(_), Some(path)) = (&made, cid_file) {
        // There is no container, so there is nothing for the file to say.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// The part that needs a lease: from the layers to the record.
async fn make(
    client: &Client,
    mut record: Container,
    image: &PlatformImage,
    options: &CreateOptions,
    spec_options: SpecOptions,
) -> Result<Created> {
    let parent = unpack::unpack(client, image, &record.snapshotter, Progress::new(false)).await?;
    let request = PrepareSnapshotRequest {
        snapshotter: record.snapshotter.clone(),
        key: record.snapshot_key.clone(),
        parent,
        labels: BTreeMap::new(),
    };
    let mounts = client.snapshots().prepare(request).await.call("prepare the root filesystem")?.mounts;
    let finished = async {
        let rootfs = rootfs::of_snapshot(&mounts)?;
        let user = options.user.as_deref().unwrap_or(&image.config.config.user);
        let user = user::resolve(&rootfs, user, &options.group_add)?;
        let mut host = Host::detect();
        if spec_options.privileged {
            host.devices = spec::device::host_devices();
        }
        let document = spec::build(&image.config, &user, &spec_options, &host)?;
        record.spec =
            Some(prost_types::Any { type_url: spec::SPEC_TYPE_URL.to_owned(), value: document.to_json() });
        let request = CreateContainerRequest { container: Some(record.clone()) };
        let create =
            async { client.containers().create(request).await.call("create the container").map(drop) };
        match &options.name {
            Some(name) => name::claim(client, name, create).await,
            None => create.await,
        }
    };
    if let Err(error) = finished.await {
        let request = RemoveSnapshotRequest { snapshotter: record.snapshotter, key: record.snapshot_key };
        let _ = client.snapshots().remove(request).await;
        return Err(error);
    }
    Ok(Created { container: record, rootfs: mounts })
}

/// The labels: the image's that may be a container's, the user's, then ours.
fn labels_of(
    options: &CreateOptions,
    image: &PlatformImage,
    image_name: &str,
    id: &str,
) -> Result<BTreeMap<String, String>> {
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    let from_image = image.config.config.labels.iter();
    all.extend(
        from_image
            .filter(|(key, _)| labels::may_come_from_an_image(key))
            .map(|(key, value)| (key.clone(), value.clone())),
    );
    for label in &options.label {
        let (key, value) = label.split_once('=').unwrap_or((label, ""));
        if key.is_empty() || !labels::is_users(key) {
            let hint = "want KEY or KEY=VALUE, and no key of davit's or containerd's own";
            return Err(Error::usage(format!("invalid label {label:?}"), hint));
        }
        if key.len() + value.len() > davit_model::label::MAX_LABEL_SIZE {
            let hint = format!("key and value have {} bytes at most", davit_model::label::MAX_LABEL_SIZE);
            return Err(Error::usage(format!("the label {} is too long", format::ellipsis(key, 40)), hint));
        }
        all.insert(key.to_owned(), value.to_owned());
    }
    // An empty value deletes a label in containerd's API, and a long one is refused there.
    all.retain(|key, value| {
        !value.is_empty() && key.len() + value.len() <= davit_model::label::MAX_LABEL_SIZE
    });
    let name = options.name.clone().unwrap_or_else(|| default_name(image_name, id));
    all.insert(labels::NAME.to_owned(), name);
    let image_signal = &image.config.config.stop_signal;
    let stop_signal =
        options.stop_signal.as_ref().or(Some(image_signal).filter(|text| signal::parse(text).is_some()));
    if let Some(text) = stop_signal {
        all.insert(labels::STOP_SIGNAL.to_owned(), text.clone());
    }
    Ok(all)
}

/// A name from that of the image and the id, such as `busybox-3f2a9c01`.
fn default_name(image_name: &str, id: &str) -> String {
    let familiar = image::familiar(image_name);
    let last = familiar
        .split('@')
        .next()
        .unwrap_or("")
        .rsplit('/')
        .next()
        .unwrap_or("")
        .split(':')
        .next()
        .unwrap_or("");
    let name = format!("{last}-{}", &id[..8]);
    if davit_model::identifier::validate(&name).is_ok() { name } else { id[..12].to_owned() }
}

fn check_signal(text: &str) -> Result<()> {
    match signal::parse(text) {
        Some(_) => Ok(()),
        None => {
            Err(Error::usage(format!("invalid signal {text:?}"), "want a name such as SIGTERM, or a number"))
        }
    }
}

/// A runtime of containerd's by name; else an OCI runtime for the default one to run.
fn runtime(given: &str) -> Result<Runtime> {
    if given.is_empty() {
        return Err(Error::usage("the runtime must not be empty", "leave out --runtime for the default"));
    }
    if given.starts_with("io.containerd.") {
        return Ok(Runtime { name: given.to_owned(), options: None });
    }
    let options = RuncOptions { binary_name: given.to_owned(), ..RuncOptions::default() };
    Ok(Runtime { name: DEFAULT_RUNTIME.to_owned(), options: Some(davit_proto::any::pack(&options)) })
}

fn write_cid_file<'a>(path: &'a Path, id: &str) -> Result<&'a Path> {
    let created = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    let written = created.and_then(|mut file| file.write_all(id.as_bytes()));
    match written {
        Ok(()) => Ok(path),
        Err(source) => {
            Err(Error::File { action: "cannot create the id file", path: path.to_owned(), source })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_image_and_id() {
        let id = "0123456789abcdef";
        assert_eq!(default_name("docker.io/library/busybox:latest", id), "busybox-01234567");
        assert_eq!(default_name("localhost:5000/a/b__c:1", id), "0123456789ab");
        assert_eq!(default_name("ghcr.io/a/b@sha256:00", id), "b-01234567");
    }

    #[test]
    fn runtimes_by_name_and_by_binary() {
        assert_eq!(runtime("io.containerd.davit.v2").unwrap().options, None);
        let crun = runtime("crun").unwrap();
        assert_eq!(crun.name, DEFAULT_RUNTIME);
        assert_eq!(crun.options.unwrap().type_url, "containerd.runc.v1.Options");
        assert!(runtime("").is_err());
    }
}
