//! A census of what a container can leave behind: processes, mounts, cgroups, FIFOs, sockets, folders.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// Where the OCI runtime keeps the containers of each namespace, unless a client says otherwise.
const RUNTIME_FOLDER: &str = "/run/containerd/runc";

/// What is there at one moment, as lines that name each thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

impl Census {
    /// Counts what belongs to the daemon whose folder this is, except for the daemon itself: processes with the folder
    /// on their command line, with their root or their working directory below it, and those in its containers' cgroups;
    /// mounts below it, network namespaces that are pinned there too; the cgroups themselves, of either version; every
    /// file of its state folder, of the folder of shims' sockets if that is its own (`s`), and of the OCI runtime's state.
    pub fn take(folder: &Path) -> Census {
        let mut lines = BTreeSet::new();
        for process in processes(folder) {
            lines.insert(format!("process {} {}", process.0, process.1));
        }
        for process in containers_below(folder) {
            lines.insert(format!("container process {}", process.0));
        }
        for mount in mounts(folder) {
            lines.insert(format!("mount {}", mount.display()));
        }
        for cgroup in cgroups(folder) {
            for pid in fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default().lines() {
                lines.insert(format!("process {pid} in cgroup {}", cgroup.display()));
            }
            lines.insert(format!("cgroup {}", cgroup.display()));
        }
        for part in ["state", "root/io.containerd.runtime.v2.task", "s", "runc"] {
            files(&folder.join(part), &mut lines);
        }
        files(&Path::new(RUNTIME_FOLDER).join(folder.file_name().unwrap_or_default()), &mut lines);
        // The folder of a namespace stays, as in containerd.
        let own = folder.file_name().unwrap_or_default();
        lines.retain(|line| !Path::new(line).ends_with(own));
        Census(lines)
    }

    /// What is there now and was not there before.
    pub fn since(&self, before: &Census) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Waits until nothing of the daemon whose folder this is is there that this census has not counted.
    ///
    /// # Errors
    /// Something stays; the error lists it.
    pub fn settle(&self, folder: &Path) -> Result<()> {
        let left = || Census::take(folder).since(self);
        wait::until("nothing is left behind", || left().is_empty().then_some(()))
            .with_context(|| format!("{:#?}", left()))
    }
}

/// The pids and command lines of processes that name `folder`, the daemon excepted.
fn processes(folder: &Path) -> Vec<(i32, String)> {
    let needle = folder.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let in_folder = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder));
        let program = line.split(' ').next().unwrap_or_default();
        let clients = ["davitd", "containerd", "ctr", "davit", "soak"];
        if (line.contains(&needle) || in_folder)
            && !clients.iter().any(|client| Path::new(program).ends_with(client))
        {
            found.push((pid, line));
        }
    }
    found
}

/// The mount points below `folder`, the last mounted first.
fn mounts(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(folder))
        .collect();
    found.reverse();
    found
}

/// The cgroups of the daemon's containers in every hierarchy: clients put them at `/<namespace>/<container>`, and each
/// daemon under test has a namespace of its own, named like its folder.
fn cgroups(folder: &Path) -> Vec<PathBuf> {
    let namespace = folder.file_name().unwrap_or_default();
    hierarchies().iter().flat_map(|hierarchy| folders(&hierarchy.join(namespace))).collect()
}

/// The roots of the cgroup hierarchies: one on cgroup v2, several on v1.
pub fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() { vec![root.to_owned()] } else { folders(root) }
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn files(path: &Path, lines: &mut BTreeSet<String>) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        lines.insert(format!("file {}", path.display()));
        // A container's root filesystem is one thing here, whatever it holds.
        if kind.is_dir() && !path.ends_with("rootfs") {
            files(&path, lines);
        }
    }
}

/// Ends what a failed test left below `folder`: shims, containers, mounts. A test that passes has nothing to sweep.
pub fn sweep(folder: &Path) {
    for round in 0..50 {
        let mut left = processes(folder);
        left.extend(containers_below(folder));
        if left.is_empty() {
            break;
        }
        for (pid, _) in left {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        sleep(Duration::from_millis(if round == 0 { 5 } else { 20 }));
    }
    for point in mounts(folder) {
        let _ = umount2(&point, MntFlags::MNT_DETACH);
    }
    let Some(namespace) = folder.file_name() else { return };
    // What the runtime knows of containers that a test has not deleted, and the folder, which stays as in containerd.
    let _ = fs::remove_dir_all(Path::new(RUNTIME_FOLDER).join(namespace));
    // The parent of the containers' cgroups, which clients of containerd leave.
    for hierarchy in hierarchies() {
        let parent = hierarchy.join(namespace);
        for cgroup in folders(&parent).into_iter().chain([parent]) {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

/// Processes whose root lies on a mount below `folder`: what runs in containers does not name it.
fn containers_below(folder: &Path) -> Vec<(i32, String)> {
    let needle = folder.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let table = fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        let root = table.lines().find(|line| line.split(' ').nth(4) == Some("/"));
        if root.is_some_and(|line| line.contains(&needle)) {
            found.push((pid, String::new()));
        }
    }
    found
}
