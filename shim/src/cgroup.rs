//! The cgroup of a container: found when its init exists, read for statistics, pids and out-of-memory events.

pub(crate) mod oom;
mod v1;
mod v2;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use davit_proto::any;
use davit_sys::process::{pidfd_open, pidfd_send_signal};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use prost_types::Any;

use crate::state;

const ROOT: &str = "/sys/fs/cgroup";

/// Where the processes of a container are accounted.
#[derive(Debug, Clone)]
pub(crate) enum Cgroup {
    /// A hierarchy per controller; pairs of controller and folder. Also on hosts that have a second version
    /// beside it: the controllers are in the first.
    V1(Vec<(String, PathBuf)>),
    /// The unified hierarchy.
    V2(PathBuf),
}

impl Cgroup {
    /// The cgroup that a process is in.
    pub(crate) fn of_process(pid: i32) -> io::Result<Cgroup> {
        let memberships = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let found = if unified() {
            in_unified(&memberships)
        } else {
            // Only here: it is long on a host with many containers, and this is on the way of each one's creation.
            in_hierarchies(&memberships, &std::fs::read_to_string("/proc/self/mountinfo")?)
        };
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup is mounted"))
    }

    /// The folders, for [`Cgroup::restore`]: of the unified hierarchy one without a controller's name.
    pub(crate) fn save(&self) -> Vec<state::CgroupFolder> {
        let folder = |controller: &str, path: &Path| state::CgroupFolder {
            controller: controller.to_owned(),
            path: path.display().to_string(),
        };
        match self {
            Cgroup::V1(folders) => folders.iter().map(|(name, path)| folder(name, path)).collect(),
            Cgroup::V2(path) => vec![folder("", path)],
        }
    }

    /// The cgroup of these folders, if there are any.
    pub(crate) fn restore(folders: Vec<state::CgroupFolder>) -> Option<Cgroup> {
        match folders.as_slice() {
            [] => None,
            [all] if all.controller.is_empty() => Some(Cgroup::V2(PathBuf::from(&all.path))),
            _ => Some(Cgroup::V1(
                folders.into_iter().map(|folder| (folder.controller, PathBuf::from(folder.path))).collect(),
            )),
        }
    }

    /// The statistics, in the message of the cgroup's version.
    pub(crate) fn metrics(&self) -> Any {
        match self {
            Cgroup::V1(folders) => any::pack(&v1::metrics(folders)),
            Cgroup::V2(folder) => any::pack(&v2::metrics(folder)),
        }
    }

    /// All processes in the cgroup and below it, in ascending order.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut found = BTreeSet::new();
        if let Some(folder) = self.tree() {
            collect(folder, &mut found);
        }
        found.into_iter().collect()
    }

    /// A descriptor of each process in the cgroup and below it, to see its end.
    pub(crate) fn pidfds(&self) -> Vec<OwnedFd> {
        let pids = self.processes().into_iter().filter_map(|pid| i32::try_from(pid).ok());
        pids.filter_map(|pid| pidfd_open(pid).ok()).collect()
    }

    /// Whether this process is in the cgroup or below it. Then the cgroup is not the container's own, and most of what is
    /// in it is the host's.
    pub(crate) fn holds_us(&self) -> bool {
        self.processes().contains(&std::process::id())
    }

    /// Kills every process in the cgroup and below it.
    pub(crate) fn kill(&self) {
        for pid in self.processes().into_iter().filter_map(|pid| i32::try_from(pid).ok()) {
            // Opened first and looked at again: the number may have become another process's meanwhile.
            let Ok(pidfd) = pidfd_open(pid) else { continue };
            let still = Cgroup::of_process(pid).is_ok_and(
                |now| matches!((now.tree(), self.tree()), (Some(now), Some(ours)) if now.starts_with(ours)),
            );
            if still {
                let _ = pidfd_send_signal(pidfd.as_fd(), nix::libc::SIGKILL);
            }
        }
    }

    /// The folder whose tree has all processes: any hierarchy of the first version will do, preferably one
    /// that every runtime uses.
    fn tree(&self) -> Option<&Path> {
        match self {
            Cgroup::V2(folder) => Some(folder),
            Cgroup::V1(_) => {
                ["devices", "pids", "memory", "cpu"].into_iter().find_map(|name| self.controller(name))
            }
        }
    }

    /// The folder of a controller.
    pub(crate) fn controller(&self, name: &str) -> Option<&Path> {
        match self {
            Cgroup::V2(folder) => Some(folder),
            Cgroup::V1(folders) => {
                folders.iter().find(|(controller, _)| controller == name).map(|(_, folder)| folder.as_path())
            }
        }
    }
}

/// The folders of the cgroup with this name, in every hierarchy that is mounted.
pub(crate) fn folders_of(name: &str) -> Vec<PathBuf> {
    let name = name.trim_start_matches('/');
    if unified() {
        return vec![Path::new(ROOT).join(name)];
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let point = mount.split(' ').nth(4)?;
            filesystem.starts_with("cgroup ").then(|| Path::new(point).join(name))
        })
        .filter(|folder| folder.is_dir())
        .collect()
}

/// The folders of a container's cgroup, in every hierarchy of either version that is mounted: a runtime on a host with
/// both makes one in each. `name` has no slash in front.
pub(crate) fn folders_of_container(name: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let folders = mounts.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        let kind = filesystem.split(' ').next()?;
        matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(point).join(name))
    });
    // Two mounts of one hierarchy, or one below the other, are the same folders twice.
    folders.collect::<BTreeSet<PathBuf>>().into_iter().filter(|folder| folder.is_dir()).collect()
}

/// Lets the processes of a cgroup go on, and so be killed, if somebody has frozen them. Where it has no freezer, nothing
/// happens.
pub(crate) fn thaw(folder: &Path) {
    for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        let opened = std::fs::File::options().write(true).open(folder.join(file));
        let _ = opened.and_then(|mut file| std::io::Write::write_all(&mut file, thawed.as_bytes()));
    }
}

fn unified() -> bool {
    statfs(ROOT).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Adds the processes in a cgroup and below it.
pub(crate) fn collect(folder: &Path, found: &mut BTreeSet<u32>) {
    let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), found);
        }
    }
}

/// What `/proc/<pid>/cgroup` says of the unified hierarchy (cgroups(7)).
fn in_unified(memberships: &str) -> Option<Cgroup> {
    let path = memberships.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(Cgroup::V2(Path::new(ROOT).join(path.trim_start_matches('/'))))
}

/// Brings together what `/proc/<pid>/cgroup` and `/proc/self/mountinfo` say (cgroups(7), proc(5)).
fn in_hierarchies(memberships: &str, mounts: &str) -> Option<Cgroup> {
    let mut folders = Vec::new();
    for line in memberships.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        for controller in controllers.split(',').filter(|name| !name.is_empty()) {
            if let Some(folder) = mounted(mounts, controller, path) {
                folders.push((controller.to_owned(), folder));
            }
        }
    }
    (!folders.is_empty()).then_some(Cgroup::V1(folders))
}

/// Where the group `path` of a controller of the first version is visible.
fn mounted(mounts: &str, controller: &str, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut filesystem = filesystem.split(' ');
        if filesystem.next() != Some("cgroup") {
            return None;
        }
        let options = filesystem.nth(1)?;
        if !options.split(',').any(|option| option == controller) {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let below = path.strip_prefix(root.trim_end_matches('/'))?;
        Some(Path::new(point).join(below.trim_start_matches('/')))
    })
}

/// A file with one number in it; `max` is the largest one, as containerd reports it.
fn number(folder: &Path, file: &str) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join(file)).ok()?;
    match text.trim() {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

/// A file of lines `key value`, each handed to `take`.
fn pairs(folder: &Path, file: &str, mut take: impl FnMut(&str, u64)) -> bool {
    let Ok(text) = std::fs::read_to_string(folder.join(file)) else { return false };
    for line in text.lines() {
        if let Some((key, value)) = line.split_once(' ')
            && let Ok(value) = value.trim().parse()
        {
            take(key, value);
        }
    }
    true
}

/// The sizes of huge pages for which a folder has files `hugetlb.<size>.<suffix>`.
fn huge_page_sizes(folder: &Path, suffix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut sizes: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?.to_owned())
        })
        .filter(|size| !size.contains('.'))
        .collect();
    sizes.sort();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /outer /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn groups_of_the_first_version_are_found_in_their_mounts() {
        let memberships = "5:cpu,cpuacct:/default/box\n4:memory:/outer/default/box\n2:freezer:/x\n1:name=systemd:/s\n0::/u\n";
        let Some(Cgroup::V1(folders)) = in_hierarchies(memberships, MOUNTS) else { panic!("not found") };
        let expected = [
            ("cpu", "/sys/fs/cgroup/cpu,cpuacct/default/box"),
            ("cpuacct", "/sys/fs/cgroup/cpu,cpuacct/default/box"),
            ("memory", "/sys/fs/cgroup/memory/default/box"),
            ("name=systemd", "/sys/fs/cgroup/systemd/s"),
        ];
        let found: Vec<(&str, &Path)> =
            folders.iter().map(|(name, folder)| (name.as_str(), folder.as_path())).collect();
        assert_eq!(found, expected.map(|(name, folder)| (name, Path::new(folder))));
    }

    #[test]
    fn the_unified_group_is_below_its_root() {
        let Some(Cgroup::V2(folder)) = in_unified("0::/system.slice/box\n") else { panic!("not found") };
        assert_eq!(folder, Path::new("/sys/fs/cgroup/system.slice/box"));
        assert!(in_unified("5:cpu:/x\n").is_none());
        assert!(in_hierarchies("", MOUNTS).is_none());
    }
}
