//! Generates what davit-proto commits: the Rust code in `proto/src/gen` and the table `proto/wire.txt`.
//!
//! The `.proto` files are compiled by protox, so that no `protoc` is needed, and the results are committed, so that
//! building the project generates nothing. Everything is made in memory or in a temporary folder first: `write`
//! then replaces what differs, `check` only tells.

mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use protox::prost_reflect::prost_types::{FileDescriptorProto, FileDescriptorSet};

/// Where the repository lies: the parent of this crate.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const COMMAND: &str = "cargo xtask codegen";

/// Packages whose services are spoken by ttrpc alone. Only their messages are generated.
const TTRPC_PACKAGES: [&str; 5] = [
    "containerd.services.events.ttrpc.v1",
    "containerd.task.v2",
    "containerd.task.v3",
    "containerd.runtime.sandbox.v1",
    "davit.shim.v1",
];

/// Fields that carry the bytes of blobs: shared rather than copied on their way through the daemon.
const SHARED_BYTES: [&str; 2] = [
    ".containerd.services.content.v1.ReadContentResponse.data",
    ".containerd.services.content.v1.WriteContentRequest.data",
];

/// Makes the committed files what they would be generated as.
///
/// # Errors
///
/// Fails if a `.proto` file is wrong, if a line of the wire table would be lost, or if a file cannot be written.
pub(crate) fn write() -> Result<()> {
    let generated = Generated::build()?;
    generated.refuse_lost_lines()?;
    let folder = code_folder();
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    for path in generated.stale_files()? {
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    for (path, content) in generated.differing_files()? {
        fs::write(path, content).with_context(|| format!("write {}", path.display()))?;
        println!("wrote {}", from_root(path));
    }
    Ok(())
}

/// Tells whether the committed files are what they would be generated as.
///
/// # Errors
///
/// Fails, naming the files, if they are not.
pub(crate) fn check() -> Result<()> {
    let generated = Generated::build()?;
    generated.refuse_lost_lines()?;
    let (stale, differing) = (generated.stale_files()?, generated.differing_files()?);
    let paths = stale.iter().chain(differing.into_iter().map(|(path, _)| path));
    let names: Vec<String> = paths.map(|path| from_root(path)).collect();
    ensure!(
        names.is_empty(),
        "the generated code of davit-proto is out of date; run `{COMMAND}` and commit the result\n  {}",
        names.join("\n  ")
    );
    Ok(())
}

fn code_folder() -> PathBuf {
    Path::new(ROOT).join("proto/src/gen")
}

fn wire_table() -> PathBuf {
    Path::new(ROOT).join("proto/wire.txt")
}

/// A path as people name it.
fn from_root(path: &Path) -> String {
    path.strip_prefix(ROOT).unwrap_or(path).display().to_string()
}

/// All generated files with their contents.
struct Generated {
    files: BTreeMap<PathBuf, String>,
}

impl Generated {
    fn build() -> Result<Self> {
        let mut descriptors = compile()?;
        let mut files = generate_code(&descriptors)?;
        descriptors.file.retain(is_own);
        files.insert(wire_table(), wire::table(&descriptors));
        Ok(Self { files })
    }

    /// Files in the folder of generated code that are not generated any more.
    fn stale_files(&self) -> Result<Vec<PathBuf>> {
        let folder = code_folder();
        if !folder.exists() {
            return Ok(Vec::new());
        }
        Ok(files_below(&folder)?.into_iter().filter(|path| !self.files.contains_key(path)).collect())
    }

    /// Files that are missing or have other contents.
    fn differing_files(&self) -> Result<Vec<(&PathBuf, &String)>> {
        let mut differing = Vec::new();
        for (path, content) in &self.files {
            if read_if_exists(path)?.as_ref() != Some(content) {
                differing.push((path, content));
            }
        }
        Ok(differing)
    }

    /// The wire table may only grow. What peers speak does not change under them, so a line that would go or change
    /// is a slip in a `.proto` file; if it is meant, the line is first deleted by hand.
    fn refuse_lost_lines(&self) -> Result<()> {
        let Some(committed) = read_if_exists(&wire_table())? else { return Ok(()) };
        let new: BTreeSet<&str> = self.files[&wire_table()].lines().collect();
        let lost: Vec<&str> = committed.lines().filter(|line| !new.contains(line)).collect();
        ensure!(
            lost.is_empty(),
            "the .proto files no longer say what proto/wire.txt says; undo that, or delete these lines there\n  {}",
            lost.join("\n  ")
        );
        Ok(())
    }
}

/// Compiles all `.proto` files, in a fixed order.
fn compile() -> Result<FileDescriptorSet> {
    let folder = Path::new(ROOT).join("proto/proto");
    let files: Vec<PathBuf> = files_below(&folder)?
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "proto"))
        .collect();
    ensure!(!files.is_empty(), "no .proto files in {}", folder.display());
    let mut descriptors =
        protox::compile(&files, [&folder]).with_context(|| format!("compile {}", folder.display()))?;
    descriptors.file.sort_by(|a, b| a.name().cmp(b.name()));
    Ok(descriptors)
}

/// Whether it is one of the project's files; the well-known types come with prost-types.
fn is_own(file: &FileDescriptorProto) -> bool {
    file.package() != "google.protobuf"
}

fn generate_code(descriptors: &FileDescriptorSet) -> Result<BTreeMap<PathBuf, String>> {
    let mut descriptors = descriptors.clone();
    for file in &mut descriptors.file {
        if TTRPC_PACKAGES.contains(&file.package()) {
            file.service.clear();
        }
    }
    let mut packages: BTreeMap<Vec<&str>, String> = BTreeMap::new();
    for file in descriptors.file.iter().filter(|file| is_own(file)) {
        let comment = packages.entry(file.package().split('.').collect()).or_default();
        if !comment.is_empty() && !package_comment(file).is_empty() {
            comment.push('\n');
        }
        comment.push_str(package_comment(file));
    }

    let scratch = tempfile::tempdir().context("create a temporary folder")?;
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names().btree_map(["."]).bytes(SHARED_BYTES);
    tonic_prost_build::configure()
        .out_dir(scratch.path())
        .client_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        .server_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        .emit_rerun_if_changed(false)
        .compile_fds_with_config(descriptors.clone(), config)
        .context("generate code")?;
    fs::write(scratch.path().join("packages.rs"), module_tree(&packages)).context("write the module tree")?;

    let generated = files_below(scratch.path())?;
    format_code(&generated)?;
    let mut files = BTreeMap::new();
    for path in generated {
        let name = path.file_name().context("a generated file has no name")?;
        let content = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        files.insert(code_folder().join(name), content);
    }
    Ok(files)
}

/// The comment above a file's `package`, which becomes the doc comment of the package's module.
fn package_comment(file: &FileDescriptorProto) -> &str {
    const PACKAGE_FIELD: i32 = 2;
    let locations = file.source_code_info.iter().flat_map(|info| &info.location);
    locations
        .filter(|location| location.path == [PACKAGE_FIELD])
        .map(|location| location.leading_comments())
        .next()
        .unwrap_or_default()
}

/// Nested modules, one for each part of a package's name, that include the generated files.
fn module_tree(packages: &BTreeMap<Vec<&str>, String>) -> String {
    let mut code = format!("// This file is @generated by `{COMMAND}`.\n");
    let mut open: &[&str] = &[];
    for (package, comment) in packages {
        let shared = open.iter().zip(package).take_while(|(a, b)| a == b).count();
        code.push_str(&"}\n".repeat(open.len() - shared));
        for depth in shared..package.len() {
            code.push_str(&format!("/// Package `{}`.\n", package[..=depth].join(".")));
            if depth + 1 == package.len() && !comment.is_empty() {
                code.push_str("///\n");
                code.extend(comment.lines().map(|line| format!("///{line}\n")));
            }
            code.push_str(&format!("pub mod {} {{\n", package[depth]));
        }
        code.push_str(&format!("include!(\"{}.rs\");\n", package.join(".")));
        open = package;
    }
    code.push_str(&"}\n".repeat(open.len()));
    code
}

/// Formats files by rustfmt, as it would format the project's own.
fn format_code(files: &[PathBuf]) -> Result<()> {
    let status = Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path", ROOT])
        .args(files)
        .status()
        .context("run rustfmt")?;
    ensure!(status.success(), "rustfmt failed: {status}");
    Ok(())
}

/// All files in a folder and those below it, in order.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("read {}", folder.display()))?;
            if entry.file_type().with_context(|| format!("read {}", folder.display()))?.is_dir() {
                folders.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

fn read_if_exists(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}
