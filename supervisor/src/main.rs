//! `davitd`: flags, configuration, logs, and then [`davit_supervisor::server`].

use std::ffi::OsString;
use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use davit_supervisor::config::{Config, Loaded};
use davit_supervisor::logs::Logs;
use davit_supervisor::{cgroup, lane, oci_hook, publish, server};
use nix::sys::resource::{Resource, getrlimit};

/// Open files that are enough for some thousand containers: the daemon has one connection for each shim, and some files
/// for each layer that is being unpacked.
const ENOUGH_FILES: u64 = 8192;

/// The container supervisor: containerd's API, a shim per container, and containers that outlive both.
#[derive(Parser)]
#[command(
    name = "davitd",
    version,
    after_help = "Examples:\n  davitd                                    run with /etc/davit/config.toml or the defaults\n  \
                  davitd --root /tmp/d/root --state /tmp/d/state -a /tmp/d/davit.sock   a private daemon\n  \
                  davitd config default > /etc/davit/config.toml"
)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Args)]
struct Flags {
    /// Configuration file [default: /etc/davit/config.toml, if it exists]
    #[arg(short, long, global = true)]
    config: Option<PathBuf>,
    /// Folder of what must survive a reboot: blobs, snapshots, metadata
    #[arg(long, global = true)]
    root: Option<PathBuf>,
    /// Folder of what a reboot may clear: bundles, sockets
    #[arg(long, global = true)]
    state: Option<PathBuf>,
    /// Unix socket of the gRPC API
    #[arg(short, long, global = true)]
    address: Option<PathBuf>,
    /// trace, debug, info, warn or error
    #[arg(short, long, global = true)]
    log_level: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Show configurations
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Publish an event that is read from standard input, as older shims do
    Publish {
        /// The topic, such as /tasks/exit
        #[arg(long)]
        topic: String,
        /// The namespace
        #[arg(long)]
        namespace: String,
    },
    /// Run a program as a hook of an OCI runtime, with the container's {{id}}, {{pid}}, {{status}}, {{bundle}}, {{rootfs}}
    /// and {{annotation "KEY"}} filled in
    OciHook {
        /// The program and its arguments, behind `--`
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the defaults
    Default,
    /// Print the configuration in force: file and flags
    Dump,
    /// Print a configuration of containerd as one of this daemon; what has no effect is named on standard error
    Migrate,
}

fn main() -> ExitCode {
    davit_sys::process::keep_children();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("davitd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Some(Command::Config { command: ConfigCommand::Default }) = cli.command {
        print!("{}", Config::default().to_toml());
        return Ok(());
    }
    if let Some(Command::OciHook { command }) = cli.command {
        return oci_hook::run(&command);
    }
    let (config, ignored) = configuration(cli.flags)?;
    match cli.command {
        Some(Command::Config { .. }) => {
            for key in ignored {
                eprintln!("davitd: {key} of the containerd configuration has no effect");
            }
            print!("{}", config.to_toml());
            Ok(())
        }
        // Above, without a configuration.
        Some(Command::OciHook { .. }) => Ok(()),
        Some(Command::Publish { topic, namespace }) => {
            runtime(1)?.block_on(publish::run(&config.grpc.address, &topic, &namespace))
        }
        None => {
            make_temp(&config)?;
            let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
            let runtime = runtime(workers)?;
            let logs = {
                let _entered = runtime.enter();
                Logs::start(&config)?
            };
            if !ignored.is_empty() {
                tracing::warn!(
                    keys = ignored.join(", "),
                    "these keys of the containerd configuration have no effect"
                );
            }
            check_open_files();
            if !config.process.cgroup.as_os_str().is_empty() {
                cgroup::join(&config.process.cgroup, std::process::id())?;
            }
            let ended = runtime.block_on(server::run(config, logs.clone()));
            logs.end();
            // A backend that hangs must not keep the daemon from ending; what it was at is as after a crash.
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
            ended
        }
    }
}

/// The configuration file with the flags over it, and the keys of it that have no effect.
fn configuration(flags: Flags) -> anyhow::Result<(Config, Vec<String>)> {
    let Loaded { mut config, ignored } = Config::load(flags.config.as_deref())?;
    let Flags { config: _, root, state, address, log_level } = flags;
    config.root = root.unwrap_or(config.root);
    config.state = state.unwrap_or(config.state);
    config.grpc.address = address.unwrap_or(config.grpc.address);
    config.log.level = log_level.unwrap_or(config.log.level);
    config.validate()?;
    server::without_disabled(&mut config);
    Ok((config, ignored))
}

fn runtime(workers: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(lane::THREADS)
        .thread_keep_alive(std::time::Duration::from_secs(2))
        .enable_all()
        .build()?)
}

/// Says when few files may be open. The limit is not raised here, although it could be: shims and runtimes inherit it, and
/// with them every container whose spec sets none; and it can be undone for a child only in a fork of the whole
/// daemon, for each start of a container. The unit file sets it instead.
fn check_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < ENOUGH_FILES
    {
        tracing::warn!(
            soft,
            hard,
            "few files may be open at once; raise the soft limit (LimitNOFILE=, ulimit -n)"
        );
    }
}

/// Makes the folder of temporary files, and has this process and what it starts use it.
fn make_temp(config: &Config) -> anyhow::Result<()> {
    let temp = &config.process.temp;
    if temp.as_os_str().is_empty() {
        return Ok(());
    }
    private_folder(temp)
        .with_context(|| format!("cannot make the folder of temporary files {}", temp.display()))?;
    davit_sys::process::set_variable(c"TMPDIR", temp)?;
    Ok(())
}

/// Makes a folder that is ours alone. One that all users share, as `/tmp`, stays theirs: it has the sticky bit.
fn private_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let is_shared = std::fs::metadata(path)?.permissions().mode() & 0o1000 != 0;
    if is_shared { Ok(()) } else { std::fs::set_permissions(path, Permissions::from_mode(0o700)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_files_are_ours_alone_in_a_folder_that_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/temp");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        private_folder(&path).unwrap();
        assert_eq!(mode(), 0o700);
        for (before, after) in [(0o711, 0o700), (0o1777, 0o1777)] {
            std::fs::set_permissions(&path, Permissions::from_mode(before)).unwrap();
            private_folder(&path).unwrap();
            assert_eq!(mode(), after);
        }
    }
}
