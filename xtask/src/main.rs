//! `cargo xtask`: the commands of the README and of CI.

mod build;
mod codegen;
mod graph;
mod packages;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask <command>

  quickstart        install what is missing, build, and show the main job: a container outlives its supervisor
  test [ARGS]       install what is missing, build, and run every test; ARGS go to cargo test
  ci                what CI runs: formats, lints, generated code, order of crates, documents, tests, quickstart
  build             release binaries in target/release, the shim beside the daemon
  bench [start]     the life of a container beside Debian's containerd, in turns within one run
  bench shim        the shim beside Debian's: starts, execs, output, memory
  bench execs       what a shim is grown by after thousands of execs (--execs N)
  soak [FLAGS]      lives of containers while daemons and shims are killed at random (--lifecycles N, --seed S)
  model [FLAGS]     random calls of the whole API beside a model of it (--steps N, --seed S, --peer for containerd)
  codegen           generate proto/src/gen and proto/wire.txt from proto/proto
  codegen --check   tell whether they are as they would be generated
  graph             check the order of the crates
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: &[&str]) -> Result<()> {
    match args {
        ["quickstart"] => quickstart(),
        ["test", rest @ ..] => test(rest),
        ["ci"] => ci(),
        ["build"] => build::release(None).map(|folder| println!("binaries: {}", folder.display())),
        ["bench", rest @ ..] => program("bench", rest),
        ["soak", rest @ ..] => program("soak", rest),
        ["model", rest @ ..] => program("api-model", rest),
        ["codegen"] => codegen::write(),
        ["codegen", "--check"] => codegen::check(),
        ["graph"] => graph::check(),
        [] | ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => bail!("unknown command: {}\n\n{HELP}", args.join(" ")),
    }
}

fn quickstart() -> Result<()> {
    packages::install(packages::QUICKSTART)?;
    if !packages::is_root() {
        bail!("containers need root: run it as root");
    }
    let folder = build::release(Some("quickstart"))?;
    build::run(&folder.join("quickstart").display().to_string(), &[])
}

fn test(args: &[&str]) -> Result<()> {
    packages::install(packages::TEST)?;
    let folder = build::debug()?.display().to_string();
    build::peer_shim()?;
    let mut command = vec!["test", "--workspace", "--no-fail-fast"];
    command.extend(args);
    build::run_with("cargo", &command, &[("DAVIT_BIN_DIR", &folder)])
}

/// Runs one of the programs of `integration`, built for release.
fn program(name: &str, args: &[&str]) -> Result<()> {
    packages::install(packages::TEST)?;
    let folder = build::release(Some(name))?;
    build::run(&folder.join(name).display().to_string(), args)
}

fn ci() -> Result<()> {
    packages::install(packages::TEST)?;
    build::run("cargo", &["fmt", "--all", "--check"])?;
    graph::check()?;
    codegen::check()?;
    build::run("cargo", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    let strict = [("RUSTDOCFLAGS", "-D warnings")];
    build::run_with("cargo", &["doc", "--workspace", "--no-deps", "--quiet"], &strict)?;
    if build::has_cargo_command("deny") {
        build::run("cargo", &["deny", "--offline", "check", "bans", "licenses", "sources"])?;
    } else {
        println!("cargo-deny is not installed: the supply chain is not checked here");
    }
    test(&[])?;
    // What parses bytes from outside, for a few seconds each with inputs from a seed; CONTRIBUTING.md has the long way.
    build::run("cargo", &["test", "--manifest-path", "fuzz/Cargo.toml", "--no-default-features"])?;
    // Spans are a feature of their own; after the other tests, since it changes the daemon in target/debug.
    let spans = ["-p", "davit-supervisor", "--features", "otel"];
    build::run("cargo", &[&["clippy"], &spans[..], &["--all-targets", "--", "-D", "warnings"]].concat())?;
    build::run("cargo", &[&["test"], &spans[..], &["--test", "otel"]].concat())?;
    quickstart()
}
