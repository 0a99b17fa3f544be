//! `davit shim`: the processes that keep containers while the daemon comes and goes.

use std::io::Write;
use std::path::{Path, PathBuf};

use davit_proto::davit::services::shims::v1::{ListRequest, ListResponse, Shim, UpgradeRequest};
use davit_proto::davit::shim::v1::Program;

use crate::client::Client;
use crate::container;
use crate::error::{CallContext, Error, Result};
use crate::format;
use crate::table::Table;

use super::for_each;

/// Options of `davit shim`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the shims and what they are
    Ls(ListOptions),
    /// Have shims execute another program while their containers run
    Upgrade(UpgradeOptions),
}

/// Options of `davit shim ls`.
#[derive(Debug, clap::Args)]
struct ListOptions {
    /// Do not shorten anything
    #[arg(long)]
    no_trunc: bool,
}

/// Options of `davit shim upgrade`.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "davit shim upgrade [OPTIONS] --all\n       davit shim upgrade [OPTIONS] CONTAINER..."
)]
struct UpgradeOptions {
    /// Containers, by name or id; those that share a shim move together
    #[arg(value_name = "CONTAINER", required_unless_present = "all", conflicts_with = "all")]
    containers: Vec<String>,
    /// Upgrade every shim of the namespace that executes another program
    #[arg(long)]
    all: bool,
    /// The program; else the one that the daemon starts for new containers
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

/// `davit shim`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    match options.command {
        Command::Ls(options) => list(client, &options, out).await,
        Command::Upgrade(options) => upgrade(client, options, out).await,
    }
}

async fn all(client: &Client) -> Result<ListResponse> {
    client.shims().list(ListRequest {}).await.call("list the shims")
}

async fn list(client: &Client, options: &ListOptions, out: &mut dyn Write) -> Result<()> {
    let ListResponse { shims, binary } = all(client).await?;
    let mut table = Table::new(&["PID", "VERSION", "BUILD", "MEMORY", "UPGRADES", "PROGRAM", "CONTAINERS"]);
    for shim in &shims {
        table.row(row(shim, &binary, options.no_trunc));
    }
    table.write(out).map_err(Error::Output)
}

fn row(shim: &Shim, newest: &str, whole: bool) -> Vec<String> {
    let ids = shim.containers.iter().map(|id| if whole { id } else { format::short_id(id) });
    let containers = ids.collect::<Vec<_>>().join(" ");
    let memory = if shim.memory == 0 { String::new() } else { format::binary_size(shim.memory) };
    let pid = if shim.pid == 0 { "?".to_owned() } else { shim.pid.to_string() };
    let Some(status) = &shim.status else {
        let error = if whole { shim.error.clone() } else { format::ellipsis(&shim.error, 40) };
        return vec![pid, "?".to_owned(), "?".to_owned(), memory, "?".to_owned(), error, containers];
    };
    let program = status.program.clone().unwrap_or_default();
    // A file that was replaced is another one under the same name.
    let path = if program.path == newest || whole {
        program.path
    } else {
        let name = Path::new(&program.path).file_name().unwrap_or_default();
        format!("{} (not {newest})", name.to_string_lossy())
    };
    vec![pid, program.version, program.build, memory, status.upgrades.to_string(), path, containers]
}

async fn upgrade(client: &Client, options: UpgradeOptions, out: &mut dyn Write) -> Result<()> {
    let binary = match options.binary {
        // The daemon has a working directory of its own.
        Some(path) => std::path::absolute(&path)
            .map_err(|error| Error::usage(format!("--binary {}: {error}", path.display()), ""))?
            .to_str()
            .map(str::to_owned)
            .ok_or_else(|| Error::usage("the path of --binary is not UTF-8".to_owned(), ""))?,
        None => String::new(),
    };
    let names = if options.all {
        let listed = all(client).await?;
        let target = if binary.is_empty() { &listed.binary } else { &binary };
        let outdated = listed.shims.iter().filter(|shim| executes(shim) != Some(target));
        outdated.filter_map(|shim| shim.containers.first().cloned()).collect()
    } else {
        options.containers
    };
    let work = async |given: &str| {
        // The daemon has named its own ids, also those of containers whose records are gone.
        let id = if options.all { given.to_owned() } else { container::find(client, given).await?.id };
        let request = UpgradeRequest { container_id: id, binary: binary.clone() };
        let upgraded = client.shims().upgrade(request).await.call("upgrade the shim")?;
        let describe = |program: Option<Program>| {
            let program = program.unwrap_or_default();
            format!("{} {}", program.version, program.build)
        };
        let (before, after) = (describe(upgraded.before), describe(upgraded.after));
        let moved: Vec<&str> = upgraded.containers.iter().map(|id| format::short_id(id)).collect();
        Ok(Some(format!("{given}: {before} -> {after} ({})", moved.join(" "))))
    };
    for_each(&names, out, work).await
}

/// The program that a shim executes, if it says so.
fn executes(shim: &Shim) -> Option<&String> {
    Some(&shim.status.as_ref()?.program.as_ref()?.path)
}

#[cfg(test)]
mod tests {
    use davit_proto::davit::shim::v1::StatusResponse;

    use super::*;

    #[test]
    fn a_row_says_what_differs() {
        let program =
            Program { version: "1".into(), build: "b".into(), path: "/x/shim".into(), state_version: 1 };
        let status = StatusResponse { program: Some(program), upgrades: 2, ..StatusResponse::default() };
        let mut shim = Shim {
            containers: vec!["a".into(), "b".into()],
            pid: 7,
            memory: 512 << 10,
            status: Some(status),
            ..Shim::default()
        };
        assert_eq!(row(&shim, "/x/shim", false), ["7", "1", "b", "512KiB", "2", "/x/shim", "a b"]);
        assert_eq!(row(&shim, "/y/shim", false)[5], "shim (not /y/shim)");
        (shim.status, shim.pid, shim.memory, shim.error) = (None, 0, 0, "gone".into());
        assert_eq!(row(&shim, "/x/shim", false), ["?", "?", "?", "", "?", "gone", "a b"]);
    }
}
