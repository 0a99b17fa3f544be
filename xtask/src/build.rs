//! Building the programs: the shim in its own profile, put beside the daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The folder of the workspace.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// A command in the folder of the workspace, shown before it runs.
///
/// # Errors
/// It cannot be started, or it fails.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<()> {
    run_with(program, args, &[])
}

/// The same with more environment.
///
/// # Errors
/// It cannot be started, or it fails.
pub(crate) fn run_with(program: &str, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    println!("$ {program} {}", args.join(" "));
    let status = Command::new(program)
        .args(args)
        .envs(env.iter().copied())
        .current_dir(workspace())
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("{program} {}: {status}", args.first().copied().unwrap_or_default());
    }
    Ok(())
}

/// Builds `davitd`, `davit`, the shim and all test programs for the tests, and gives the folder that holds them.
///
/// # Errors
/// The build fails.
pub(crate) fn debug() -> Result<PathBuf> {
    // Not the whole workspace: the shim follows in its own profile, and this program runs already.
    run(
        "cargo",
        &["build", "--bins", "-p", "davit-supervisor", "-p", "davit-ctl", "-p", "davit-integration"],
    )?;
    with_shim("debug")
}

/// Builds `davitd`, `davit`, the shim and `tool`, a program of `integration`, for release, and gives the folder that
/// holds them.
///
/// # Errors
/// The build fails.
pub(crate) fn release(tool: Option<&str>) -> Result<PathBuf> {
    let mut args = vec![
        "build",
        "--release",
        "-p",
        "davit-supervisor",
        "-p",
        "davit-ctl",
        "--bin",
        "davitd",
        "--bin",
        "davit",
    ];
    if let Some(tool) = tool {
        args.extend(["-p", "davit-integration", "--bin", tool]);
    }
    run("cargo", &args)?;
    with_shim("release")
}

/// Builds the shim, and puts it beside the daemon in the place of cargo's plain build of it, so that the programs lie
/// together as they are installed.
fn with_shim(folder: &str) -> Result<PathBuf> {
    shim()?;
    let target = target_folder();
    let folder = target.join(folder);
    let shim = "containerd-shim-davit-v2";
    // Copied beside and renamed: a shim that runs keeps its file.
    let new = folder.join(format!("{shim}.new"));
    fs::copy(target.join("shim").join(shim), &new).context("cannot copy the shim")?;
    fs::rename(&new, folder.join(shim)).context("cannot put the shim in place")?;
    Ok(folder)
}

/// Builds the shim in its own profile, linked statically: without the dynamic linker it starts in two thirds of the time,
/// and each process has some 40 KiB less of its own. Where there is no C library to link so, it is built as usual.
fn shim() -> Result<()> {
    let program = "containerd-shim-davit-v2";
    let mut args = vec!["rustc", "--package", "davit-shim", "--bin", program, "--profile", "shim"];
    let library = Command::new("cc").arg("-print-file-name=libc.a").output();
    // The compiler prints the bare name of what it does not find.
    if library.is_ok_and(|output| output.stdout.starts_with(b"/")) {
        args.extend(["--", "-C", "target-feature=+crt-static"]);
    }
    run("cargo", &args)
}

/// Builds the shim that the tests run as a peer, into the folder of the debug build. It is a workspace of its own.
///
/// # Errors
/// The build fails.
pub(crate) fn peer_shim() -> Result<()> {
    let target = target_folder().display().to_string();
    run("cargo", &["build", "--manifest-path", "integration/peer-shim/Cargo.toml", "--target-dir", &target])
}

fn target_folder() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace().join(folder),
        None => workspace().join("target"),
    }
}

/// True when `cargo NAME` exists.
pub(crate) fn has_cargo_command(name: &str) -> bool {
    Command::new(format!("cargo-{name}"))
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}
