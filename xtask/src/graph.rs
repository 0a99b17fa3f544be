//! The order of the crates: one uses only those above it. A crate that reaches downwards is how layers rot.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::workspace;

/// The crates, lowest first, with the crates of the project that each may not use although they stand above it.
const ORDER: &[(&str, &[&str])] = &[
    ("davit-model", &[]),
    ("davit-sys", &[]),
    ("davit-oci", &[]),
    ("davit-metadata", &["davit-oci"]),
    ("davit-proto", &["davit-model", "davit-sys", "davit-oci", "davit-metadata"]),
    ("davit-shim-protocol", &["davit-oci", "davit-metadata"]),
    ("davit-content-store", &["davit-oci", "davit-metadata", "davit-proto", "davit-shim-protocol"]),
    (
        "davit-history",
        &[
            "davit-sys",
            "davit-oci",
            "davit-metadata",
            "davit-proto",
            "davit-shim-protocol",
            "davit-content-store",
        ],
    ),
    ("davit-snapshotter", &["davit-oci", "davit-proto", "davit-shim-protocol"]),
    (
        "davit-distribution",
        &["davit-sys", "davit-metadata", "davit-proto", "davit-shim-protocol", "davit-snapshotter"],
    ),
    // The shim stays small: none of the daemon's crates.
    (
        "davit-shim",
        &[
            "davit-oci",
            "davit-metadata",
            "davit-content-store",
            "davit-history",
            "davit-snapshotter",
            "davit-distribution",
        ],
    ),
    ("davit-supervisor", &["davit-shim"]),
    // The CLI is a client of the gRPC API alone.
    (
        "davit-ctl",
        &[
            "davit-metadata",
            "davit-shim-protocol",
            "davit-content-store",
            "davit-history",
            "davit-snapshotter",
            "davit-shim",
            "davit-supervisor",
        ],
    ),
    // Black-box tests see sockets and binaries; the suites of the traits are the one thing that they share.
    (
        "davit-integration",
        &[
            "davit-oci",
            "davit-metadata",
            "davit-shim-protocol",
            "davit-history",
            "davit-distribution",
            "davit-shim",
            "davit-supervisor",
            "davit-ctl",
        ],
    ),
    ("xtask", &["davit-proto", "davit-supervisor", "davit-shim", "davit-ctl"]),
];

/// Checks the manifest of every crate against [`ORDER`], and that each takes the workspace's lints.
///
/// # Errors
/// The first crate that breaks the order, with what it uses.
pub(crate) fn check() -> Result<()> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(workspace())
        .output()
        .context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let position = ORDER
            .iter()
            .position(|(crate_name, _)| *crate_name == name)
            .with_context(|| format!("{name} has no place in the order of crates (xtask/src/graph.rs)"))?;
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let uses = dependency["name"].as_str().unwrap_or_default();
            let Some(below) = ORDER.iter().position(|(crate_name, _)| *crate_name == uses) else { continue };
            // A crate that names itself does so to test with more of its features.
            if below > position || ORDER[position].1.contains(&uses) {
                bail!("{name} must not use {uses}: see the order of crates in ARCHITECTURE.md");
            }
        }
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        if !std::fs::read_to_string(manifest)?.contains("[lints]\nworkspace = true") {
            bail!("{name} does not take the lints of the workspace: add [lints] workspace = true");
        }
    }
    println!("crates: {} in order", packages.len());
    Ok(())
}
