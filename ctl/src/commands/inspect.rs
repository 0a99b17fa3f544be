//! `davit inspect`: everything about containers and images, as JSON in Docker's shape where there is one.

use std::io::Write;
use std::path::Path;

use davit_oci::platform::Platform;
use davit_proto::containerd::services::containers::v1::Container;
use davit_proto::containerd::services::images::v1::Image;
use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::ps;
use crate::container::{self, State};
use crate::error::{Error, Result};
use crate::template::Format;
use crate::{etc, format, image, labels};

const EXAMPLES: &str = "\
Examples:
  davit inspect web
  davit inspect -f '{{.State.Status}} {{.State.Pid}}' web
  davit inspect -f '{{json .Mounts}}' web
  davit inspect -f '{{index .Config.Labels \"tier\"}}' web";

/// Options of `davit inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Show each by a template of Go's, such as {{.State.Pid}}, or as a line of json
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Look among these only
    #[arg(long, value_name = "TYPE", value_parser = ["container", "image"])]
    r#type: Option<String>,
    /// Containers or images, by name or id
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// `davit inspect`. What is found is printed even if something else is not.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let mut found = Vec::new();
    let mut failure = None;
    for given in &options.names {
        match inspect(client, given, options.r#type.as_deref()).await {
            Ok(value) => found.push(value),
            Err(error) => failure = Some(error),
        }
    }
    match &options.format {
        Some(format) => {
            for value in &found {
                format::line(out, format.show(value)?)?;
            }
        }
        None => {
            let text = serde_json::to_string_pretty(&found).expect("JSON values can be written");
            format::line(out, text)?;
        }
    }
    failure.map_or(Ok(()), Err)
}

async fn inspect(client: &Client, given: &str, kind: Option<&str>) -> Result<Value> {
    if kind != Some("image") {
        match container::find(client, given).await {
            Ok(container) => return describe_container(client, &container).await,
            Err(Error::NoContainer { .. }) if kind.is_none() => {}
            Err(error) => return Err(error),
        }
    }
    match image::find(client, given).await {
        Ok(image) => describe_image(client, &image).await,
        Err(Error::NoImage { .. }) if kind.is_none() => Err(Error::NoObject { given: given.to_owned() }),
        Err(error) => Err(error),
    }
}

async fn describe_container(client: &Client, container: &Container) -> Result<Value> {
    let mut state = container::state(client, container).await?;
    if state == State::Created {
        // As for `davit ps`.
        state = container::past_exits(client, &[container]).await.remove(&container.id).unwrap_or(state);
    }
    let spec = container::spec(container)?;
    let (code, finished) = match &state {
        State::Exited { code, at } => (*code, at.map(format::rfc3339)),
        State::Created | State::Running { .. } | State::Paused { .. } => (0, None),
    };
    let process = &spec["process"];
    let args = container::strings(&process["args"]);
    let users: serde_json::Map<String, Value> = container
        .labels
        .iter()
        .filter(|(key, _)| labels::is_users(key))
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    let memory = &spec["linux"]["resources"]["memory"]["limit"];
    let namespaces = spec["linux"]["namespaces"].as_array();
    let own_network =
        namespaces.is_some_and(|all| all.iter().any(|namespace| namespace["type"] == "network"));
    let etc = container.labels.get(labels::ETC).map_or("", String::as_str);
    let of_etc = |name: &str| etc::path(etc, name).map(|path| path.display().to_string());
    // Those that everybody has are told apart, as with Docker.
    let bind = |mount: &&Value| mount["type"] == "bind" && !is_of_etc(mount, etc);
    let mounts: Vec<Value> =
        spec["mounts"].as_array().into_iter().flatten().filter(bind).map(describe_mount).collect();
    Ok(json!({
        "Id": container.id,
        "Created": container.created_at.as_ref().and_then(format::system_time).map(format::rfc3339),
        "Path": args.first(),
        "Args": args.get(1..),
        "State": {
            "Status": state.word(),
            "Running": state.is_live(),
            "Paused": matches!(state, State::Paused { .. }),
            "Pid": state.pid().unwrap_or(0),
            "ExitCode": code,
            "StartedAt": state.pid().and_then(ps::started_at).map(format::rfc3339),
            "FinishedAt": finished,
        },
        "Image": container.image,
        "LogPath": container.labels.get(labels::LOG),
        "HostnamePath": of_etc("hostname"),
        "HostsPath": of_etc("hosts"),
        "ResolvConfPath": of_etc("resolv.conf"),
        "Name": container::name(container),
        "Driver": container.snapshotter,
        "Runtime": container.runtime.as_ref().map(|runtime| &runtime.name),
        "Mounts": mounts,
        "Config": {
            "Hostname": spec["hostname"],
            "Env": process["env"],
            "Cmd": args,
            "WorkingDir": process["cwd"],
            "User": format!("{}:{}", process["user"]["uid"], process["user"]["gid"]),
            "Tty": process["terminal"].as_bool().unwrap_or(false),
            "Labels": users,
            "StopSignal": container.labels.get(labels::STOP_SIGNAL),
        },
        "HostConfig": {
            "RestartPolicy": restart_policy(container),
            "NetworkMode": if own_network { "none" } else { "host" },
            "ReadonlyRootfs": spec["root"]["readonly"].as_bool().unwrap_or(false),
            "Memory": memory.as_u64().unwrap_or(0),
            "NanoCpus": nano_cpus(&spec["linux"]["resources"]["cpu"]),
            "PidsLimit": spec["linux"]["resources"]["pids"]["limit"],
            "CgroupPath": spec["linux"]["cgroupsPath"],
        },
        "NetworkSettings": {"IPAddress": ""},
        "Spec": spec,
    }))
}

fn restart_policy(container: &Container) -> Value {
    let policy = container.labels.get(labels::RESTART).map_or("no", String::as_str);
    let (name, times) = policy.split_once(':').unwrap_or((policy, "0"));
    json!({"Name": name, "MaximumRetryCount": times.parse::<u32>().unwrap_or(0)})
}

/// Whether a mount is one of the container's files in `/etc`: its own in the folder `etc`, or the host's.
fn is_of_etc(mount: &Value, etc: &str) -> bool {
    let (source, destination) = (mount["source"].as_str(), mount["destination"].as_str());
    let is_own = !etc.is_empty() && source.is_some_and(|source| Path::new(source).starts_with(etc));
    let is_hosts = source == destination && matches!(destination, Some("/etc/hosts" | "/etc/resolv.conf"));
    is_own || is_hosts
}

fn describe_mount(mount: &Value) -> Value {
    let read_only = container::strings(&mount["options"]).iter().any(|option| option == "ro");
    json!({"Type": "bind", "Source": mount["source"], "Destination": mount["destination"], "RW": !read_only})
}

/// Quota and period as Docker's billionths of a CPU; 0 for no limit.
fn nano_cpus(cpu: &Value) -> u64 {
    let (quota, period) = (cpu["quota"].as_u64().unwrap_or(0), cpu["period"].as_u64().unwrap_or(0));
    quota.saturating_mul(1_000_000_000).checked_div(period).unwrap_or(0)
}

async fn describe_image(client: &Client, image: &Image) -> Result<Value> {
    let target = image::target(image)?;
    let found = image::for_platform(client, &target, &Platform::host()).await?;
    let names: Vec<String> = image::list(client)
        .await?
        .iter()
        .filter(|other| other.target == image.target)
        .map(|other| image::familiar(&other.name))
        .collect();
    let layers: Vec<&str> = found.config.rootfs.diff_ids.iter().map(|digest| digest.as_str()).collect();
    let config = serde_json::to_value(&found.config.config).unwrap_or_default();
    Ok(json!({
        "Id": target.digest.as_str(),
        "RepoTags": names,
        "Created": found.config.created,
        "Architecture": found.config.architecture,
        "Variant": found.config.variant,
        "Os": found.config.os,
        "Config": config,
        "RootFS": {"Type": "layers", "Layers": layers},
        "Descriptor": {"mediaType": target.media_type, "digest": target.digest.as_str(), "size": target.size},
        "Labels": image.labels,
    }))
}
