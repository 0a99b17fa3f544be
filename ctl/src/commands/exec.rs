//! `davit exec`: a further process in a running container.

use std::path::PathBuf;

use davit_oci::environment;
use davit_oci::spec::{Host, PROCESS_TYPE_URL, capability};
use davit_oci::user;
use davit_proto::containerd::services::containers::v1::Container;
use davit_proto::containerd::services::tasks::v1::{DeleteProcessRequest, ExecProcessRequest, StartRequest};
use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::{create, run};
use crate::container::{self, State};
use crate::error::{CallContext, Error, Result};
use crate::keys::{self, DetachKeys};
use crate::process::{Ended, ProcessId, Streams};
use crate::{rootfs, task, terminal};

/// Options of `davit exec`.
#[derive(Debug, clap::Args)]
#[command(override_usage = "davit exec [OPTIONS] CONTAINER COMMAND [ARGUMENT...]")]
#[command(after_help = "Examples:\n  davit exec web ps\n  davit exec -it -u root web sh")]
pub(crate) struct Options {
    /// Run in the background; the output is dropped
    #[arg(short, long)]
    detach: bool,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable; without a value it is taken from yours
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// User name or number, with an optional group (default: the container's)
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Working directory (default: the container's)
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,
    /// The keys that leave a process with a terminal alone; it cannot be attached to again
    #[arg(long, value_name = "KEYS", default_value = keys::DEFAULT)]
    detach_keys: DetachKeys,
    /// Give the process all capabilities
    #[arg(long)]
    privileged: bool,
    /// The container, by name or id, and the command
    #[arg(required = true, trailing_var_arg = true, hide = true, value_name = "CONTAINER COMMAND")]
    pub(crate) container_and_args: Vec<String>,
}

/// `davit exec`; returns the exit code of the process.
pub(crate) async fn run(client: &Client, options: Options) -> Result<u8> {
    let Some((given, args)) = options.container_and_args.split_first().filter(|(_, args)| !args.is_empty())
    else {
        return Err(Error::usage("no command to execute", "davit exec CONTAINER COMMAND [ARGUMENT...]"));
    };
    let container = container::find(client, given).await?;
    let pid = match container::state(client, &container).await? {
        State::Running { pid } => pid,
        State::Paused { .. } => return Err(Error::Paused { given: given.clone() }),
        State::Created | State::Exited { .. } => return Err(Error::NotRunning { given: given.clone() }),
    };
    let process = describe(client, &container, &options, pid, args).await?;
    let exec_id = container::new_id()?;
    if options.detach {
        let request = request(&container.id, &exec_id, &process, None);
        return start(client, request).await.map(|()| 0);
    }
    let mut streams = Streams::open(options.interactive, options.tty, &options.detach_keys)?;
    streams.engage()?;
    start(client, request(&container.id, &exec_id, &process, Some(&streams))).await?;
    let id = ProcessId { container: container.id.clone(), exec: exec_id.clone() };
    let ended = streams.supervise(client, &id).await?;
    match ended {
        Ended::Exited(_) => {
            delete(client, &container.id, &exec_id).await;
            streams.drain().await;
        }
        Ended::Interrupted(_) => {}
        Ended::Detached => run::say_detached("the process goes on as long as the container does"),
    }
    Ok(run::exit_code(&ended))
}

/// The process of the container's spec with what the options change in it. What `davit` does not know of it stays.
async fn describe(
    client: &Client,
    container: &Container,
    options: &Options,
    pid: u32,
    args: &[String],
) -> Result<Value> {
    let mut process = container::spec(container)?["process"].take();
    if !process.is_object() {
        process = json!({});
    }
    process["args"] = json!(args);
    process["terminal"] = json!(options.tty);
    if let Some((height, width)) = terminal::size().filter(|_| options.tty) {
        process["consoleSize"] = json!({"height": height, "width": width});
    }
    if let Some(folder) = &options.workdir {
        if !folder.starts_with('/') {
            return Err(Error::usage(
                format!("invalid working directory {folder:?}"),
                "it must be an absolute path",
            ));
        }
        process["cwd"] = json!(folder);
    } else if process["cwd"].as_str().is_none_or(str::is_empty) {
        process["cwd"] = json!("/");
    }
    let mut env = container::strings(&process["env"]);
    if options.tty {
        env = environment::merge(&["TERM=xterm".to_owned()], &env);
    }
    let own = create::variables(&options.env_file, &options.env)?;
    process["env"] = json!(environment::merge(&env, &own));
    if let Some(name) = &options.user {
        let mounts = task::rootfs(client, container).await?;
        let rootfs = rootfs::of_container(&mounts, pid)?;
        let user = user::resolve(&rootfs, name, &[])?;
        process["user"] = json!({"uid": user.uid, "gid": user.gid, "additionalGids": user.groups});
    }
    let all = capability::names(Host::detect().capabilities);
    set_capabilities(&mut process, options.privileged.then_some(all));
    Ok(process)
}

/// The capabilities that go with the user: root has those of the bounding set, everybody else none until a
/// set-user-id program gives them some. `all` widens the bounding set.
fn set_capabilities(process: &mut Value, all: Option<Vec<String>>) {
    let is_root = process["user"]["uid"].as_u64().unwrap_or(0) == 0;
    let bounding = match all {
        Some(all) => json!(all),
        None => process["capabilities"]["bounding"].clone(),
    };
    if bounding.is_null() {
        return;
    }
    let held = if is_root { bounding.clone() } else { json!([]) };
    process["capabilities"] = json!({"bounding": bounding, "effective": held, "permitted": held});
}

fn request(container: &str, exec_id: &str, process: &Value, streams: Option<&Streams>) -> ExecProcessRequest {
    let value = serde_json::to_vec(process).expect("JSON that was parsed can be written");
    ExecProcessRequest {
        container_id: container.to_owned(),
        stdin: streams.map(|streams| streams.stdin.clone()).unwrap_or_default(),
        stdout: streams.map(|streams| streams.stdout.clone()).unwrap_or_default(),
        stderr: streams.map(|streams| streams.stderr.clone()).unwrap_or_default(),
        terminal: process["terminal"].as_bool().unwrap_or(false),
        spec: Some(prost_types::Any { type_url: PROCESS_TYPE_URL.to_owned(), value }),
        exec_id: exec_id.to_owned(),
    }
}

/// Registers and starts the process; one that does not start is taken back.
async fn start(client: &Client, request: ExecProcessRequest) -> Result<()> {
    let (container_id, exec_id) = (request.container_id.clone(), request.exec_id.clone());
    client.tasks().exec(request).await.call("create the process")?;
    let request = StartRequest { container_id: container_id.clone(), exec_id: exec_id.clone() };
    if let Err(status) = client.tasks().start(request).await {
        delete(client, &container_id, &exec_id).await;
        return Err(Error::Start { what: "process", status });
    }
    Ok(())
}

/// Forgets a process that is over. If the container went with it, so did the process.
async fn delete(client: &Client, container: &str, exec_id: &str) {
    let request = DeleteProcessRequest { container_id: container.to_owned(), exec_id: exec_id.to_owned() };
    let _ = client.tasks().delete_process(request).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_follow_the_user() {
        let bounding = json!(["CAP_CHOWN", "CAP_KILL"]);
        let mut process =
            json!({"user": {"uid": 1000}, "capabilities": {"bounding": bounding, "effective": bounding}});
        set_capabilities(&mut process, None);
        assert_eq!(process["capabilities"]["effective"], json!([]));
        assert_eq!(process["capabilities"]["bounding"], bounding);
        process["user"]["uid"] = json!(0);
        set_capabilities(&mut process, None);
        assert_eq!(process["capabilities"]["permitted"], bounding);
        set_capabilities(&mut process, Some(vec!["CAP_BPF".to_owned()]));
        assert_eq!(process["capabilities"]["effective"], json!(["CAP_BPF"]));
        assert!(process["capabilities"].get("inheritable").is_none());
    }
}
