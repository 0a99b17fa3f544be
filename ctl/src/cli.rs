//! The command line: parsing it, running the command it names, reporting what went wrong.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::client::Client;
use crate::commands;
use crate::error::{EXIT_FAILURE, Result};

const EXAMPLES: &str = "\
Examples:
  davit load -i busybox.tar                     bring an image in from an archive
  davit pull ghcr.io/owner/name:tag             or from a registry
  davit run --rm -it busybox sh                 a shell in a new container
  davit run -d --name web -m 256m busybox httpd -f
  davit ps -a                                   all containers
  davit logs -f web                             follow a container's output
  davit exec -it web sh                         a second process in it
  davit stop web && davit rm web";

/// Containers from the command line: a client of davitd, and of any daemon that speaks containerd's API.
#[derive(Debug, Parser)]
#[command(name = "davit", version, after_help = EXAMPLES, max_term_width = 110, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// The daemon's socket
    #[arg(short, long, env = "DAVIT_ADDRESS", hide_env_values = true, value_name = "PATH")]
    #[arg(default_value = "/run/davit/davit.sock")]
    address: String,
    /// The namespace that images and containers are in
    #[arg(
        short,
        long,
        env = "DAVIT_NAMESPACE",
        hide_env_values = true,
        value_name = "NAME",
        default_value = "default"
    )]
    namespace: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create and start a container
    Run(commands::run::Options),
    /// Create a container without starting it
    #[command(override_usage = "davit create [OPTIONS] IMAGE [COMMAND] [ARGUMENT...]")]
    Create(commands::create::CreateOptions),
    /// Start containers that were created or have exited
    Start(commands::start::Options),
    /// Run a command in a running container
    Exec(commands::exec::Options),
    /// Come back to a container that runs
    Attach(commands::attach::Options),
    /// List containers
    Ps(commands::ps::Options),
    /// Show the output of a container
    Logs(commands::logs::Options),
    /// Ask containers to stop, and kill those that do not
    Stop(commands::stop::Options),
    /// Stop containers and start them again
    Restart(commands::stop::Options),
    /// Send a signal to containers
    Kill(commands::kill::Options),
    /// Wait for containers to exit and print their exit codes
    Wait(commands::wait::Options),
    /// Freeze containers
    Pause(commands::pause::Options),
    /// Continue frozen containers
    Unpause(commands::pause::Options),
    /// Keep what containers are doing, to go on from there
    Checkpoint(commands::checkpoint::Options),
    /// Remove containers
    Rm(commands::rm::Options),
    /// Show the processes of a container
    Top(commands::top::Options),
    /// Show what containers use
    Stats(commands::stats::Options),
    /// List images
    Images(commands::images::Options),
    /// Show what an image was made by
    History(commands::history::Options),
    /// Get an image from a registry
    Pull(commands::pull::Options),
    /// Send an image to a registry
    Push(commands::push::Options),
    /// Check credentials for a registry and keep them in Docker's configuration
    Login(commands::login::Options),
    /// Forget the credentials for a registry
    Logout(commands::login::LogoutOptions),
    /// Write images as an archive that `davit load` and `docker load` read
    Save(commands::save::Options),
    /// Load images from an archive: an OCI layout or `docker save` tar
    Load(commands::load::Options),
    /// Load images from an archive, or make one from a filesystem's tar
    Import(commands::load::ImportOptions),
    /// Give an image another name
    Tag(commands::tag::Options),
    /// Remove images
    Rmi(commands::rmi::Options),
    /// Show everything about containers and images as JSON
    Inspect(commands::inspect::Options),
    /// Print events of the past and as they happen
    Events(commands::events::Options),
    /// Show and upgrade the processes that keep containers
    Shim(commands::shim::Options),
    /// Show what the daemon and this machine are
    Info,
    /// Show the versions of client and daemon
    Version,
    /// Print the completion script of a shell
    Completion(commands::completion::Options),
    /// Remove a container when it has exited
    #[command(hide = true)]
    Reap(commands::reap::Options),
    /// Write the manual pages into a folder
    #[command(hide = true)]
    Man(commands::completion::ManOptions),
}

/// Parses a command line. Every switch may have a value, as Docker's may (`--detach=true`, `--rm=false`); the help does
/// not show that, so it is printed from the plain definition.
fn parse_from(line: impl Iterator<Item = OsString>) -> std::result::Result<Cli, clap::Error> {
    let line: Vec<OsString> = line.collect();
    match switches_with_values(Cli::command()).try_get_matches_from(&line) {
        Ok(matches) => Cli::from_arg_matches(&matches),
        Err(error) if error.kind() == ErrorKind::DisplayHelp => Cli::try_parse_from(&line),
        Err(error) if error.kind() == ErrorKind::MissingSubcommand => {
            Cli::try_parse_from(["davit", "--help"])
        }
        Err(error) => Err(error),
    }
}

fn switches_with_values(command: clap::Command) -> clap::Command {
    let with_value = |arg: clap::Arg| match arg.get_action() {
        ArgAction::SetTrue => arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .default_value("false")
            .value_parser(clap::value_parser!(bool)),
        _ => arg,
    };
    command.mut_args(with_value).mut_subcommands(switches_with_values)
}

/// Parses the command line, runs the command, and returns the exit code.
pub(crate) fn run() -> u8 {
    let cli = match parse_from(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // That nobody can read the help is no failure of it.
            let _ = error.print();
            return if error.use_stderr() { EXIT_FAILURE } else { 0 };
        }
    };
    let runs_a_process = matches!(cli.command, Command::Run(_) | Command::Create(_));
    let failure = if runs_a_process { EXIT_FAILURE } else { 1 };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = writeln!(io::stderr(), "davit: cannot start: {error}");
            return failure;
        }
    };
    let result = runtime.block_on(dispatch(cli));
    // A thread may still wait for input that never comes.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) if error.is_broken_pipe() => 0,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{}", error.report());
            error.exit_code(failure)
        }
    }
}

async fn dispatch(cli: Cli) -> Result<u8> {
    let mut out = io::stdout();
    // The commands that need no daemon.
    let cli = match cli.command {
        Command::Login(options) => return commands::login::login(options, &mut out).await.map(|()| 0),
        Command::Logout(options) => return commands::login::logout(options, &mut out).map(|()| 0),
        command => Cli { command, ..cli },
    };
    match &cli.command {
        Command::Completion(options) => {
            commands::completion::completion(Cli::command(), options, &mut out)?;
            return Ok(0);
        }
        Command::Man(options) => {
            commands::completion::man(Cli::command(), options)?;
            return Ok(0);
        }
        _ => {}
    }
    let global = cli.global;
    let connected = Client::connect(&global.address, &global.namespace).await;
    if let Command::Version = cli.command {
        return commands::version::run(connected, &mut out).await.map(|()| 0);
    }
    let out = &mut out;
    let client = match (connected, &cli.command) {
        (Ok(client), _) => client,
        (Err(error), Command::Logs(options)) => {
            return commands::logs::without_daemon(&global.namespace, options, error, out).map(|()| 0);
        }
        (Err(error), _) => return Err(error),
    };
    match cli.command {
        Command::Run(options) => return commands::run::run(&client, options, out).await,
        Command::Attach(options) => return commands::attach::run(&client, options, out).await,
        Command::Exec(options) => return commands::exec::run(&client, options).await,
        Command::Start(options) => return commands::start::run(&client, options, out).await,
        Command::Create(options) => commands::create::run(&client, options, out).await?,
        Command::Ps(options) => commands::ps::run(&client, options, out).await?,
        Command::Logs(options) => commands::logs::run(&client, options, out).await?,
        Command::Stop(options) => commands::stop::run(&client, options, false, out).await?,
        Command::Restart(options) => commands::stop::run(&client, options, true, out).await?,
        Command::Kill(options) => commands::kill::run(&client, options, out).await?,
        Command::Wait(options) => commands::wait::run(&client, options, out).await?,
        Command::Pause(options) => commands::pause::pause(&client, options, out).await?,
        Command::Unpause(options) => commands::pause::unpause(&client, options, out).await?,
        Command::Checkpoint(options) => commands::checkpoint::run(&client, options, out).await?,
        Command::Rm(options) => commands::rm::run(&client, options, out).await?,
        Command::Top(options) => commands::top::run(&client, options, out).await?,
        Command::Stats(options) => commands::stats::run(&client, options, out).await?,
        Command::History(options) => commands::history::run(&client, options, out).await?,
        Command::Images(options) => commands::images::run(&client, options, out).await?,
        Command::Pull(options) => commands::pull::run(&client, options, out).await?,
        Command::Push(options) => commands::push::run(&client, options, out).await?,
        Command::Save(options) => commands::save::run(&client, options).await?,
        Command::Load(options) => commands::load::load(&client, options, out).await?,
        Command::Import(options) => commands::load::import(&client, options, out).await?,
        Command::Tag(options) => commands::tag::run(&client, options).await?,
        Command::Rmi(options) => commands::rmi::run(&client, options, out).await?,
        Command::Inspect(options) => commands::inspect::run(&client, options, out).await?,
        Command::Events(options) => commands::events::run(&client, options, out).await?,
        Command::Shim(options) => commands::shim::run(&client, options, out).await?,
        Command::Reap(options) => commands::reap::run(&client, options).await?,
        Command::Info => commands::info::run(&client, &global.address, out).await?,
        Command::Version
        | Command::Login(_)
        | Command::Logout(_)
        | Command::Completion(_)
        | Command::Man(_) => {}
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    fn parse(line: &[&str]) -> Command {
        parse_from(std::iter::once("davit").chain(line.iter().copied()).map(Into::into)).unwrap().command
    }

    #[test]
    fn flags_end_at_the_image() {
        let Command::Run(options) = parse(&["run", "-it", "--rm", "busybox", "--rm", "-l", "-d"]) else {
            panic!("not run")
        };
        assert_eq!(options.create.image_and_args, ["busybox", "--rm", "-l", "-d"]);
        assert!(options.rm && options.create.interactive && options.create.tty && !options.detach);
        let Command::Exec(options) = parse(&["exec", "-u", "1", "web", "-u", "root"]) else {
            panic!("not exec")
        };
        assert_eq!(options.container_and_args, ["web", "-u", "root"]);
    }

    #[test]
    fn booleans_take_a_value_as_dockers_do() {
        let Command::Run(options) = parse(&["run", "--detach=true", "--rm=false", "-it=true", "busybox"])
        else {
            panic!("not run")
        };
        assert!(options.detach && !options.rm && options.create.interactive && options.create.tty);
        assert!(parse_from(["davit", "run", "--rm=perhaps", "busybox"].map(Into::into).into_iter()).is_err());
    }

    #[test]
    fn short_options_mean_what_docker_means_by_them() {
        assert!(matches!(parse(&["ps", "-a"]), Command::Ps(_)));
        assert!(matches!(parse(&["logs", "-f", "-n", "3", "web"]), Command::Logs(_)));
        let cli = parse_from(["davit", "-n", "x", "-a", "/s", "ps"].map(Into::into).into_iter()).unwrap();
        assert_eq!((cli.global.namespace.as_str(), cli.global.address.as_str()), ("x", "/s"));
    }
}
