//! The control group of the daemon's own process (`process.cgroup`).
//!
//! With cgroup v1 hierarchies it is made in each of them, as containerd does; on a host that has v2 alone, there. The process
//! moves as a whole; what it starts from then on, shims included, begins in that group.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Why the daemon could not be moved.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path could lead out of the hierarchies.
    #[error("the control group {} must have no other than plain parts", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// No hierarchy is mounted.
    #[error("no control groups are mounted")]
    None,
    /// A call of the kernel failed.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Moves process `pid` into the control group `path`, which is made where it is missing.
///
/// # Errors
/// See [`CgroupError`]; the process may be in some of the hierarchies' groups then.
pub fn join(path: &Path, pid: u32) -> Result<(), CgroupError> {
    let path = path.strip_prefix("/").unwrap_or(path);
    if !path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(CgroupError::Path { path: path.to_owned() });
    }
    let table = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(table).map_err(system("read", table))?;
    let hierarchies = hierarchies(&text);
    if hierarchies.is_empty() {
        return Err(CgroupError::None);
    }
    for hierarchy in hierarchies {
        make(&hierarchy, path)?;
        let procs = hierarchy.join(path).join("cgroup.procs");
        fs::write(&procs, pid.to_string()).map_err(system("join", &procs))?;
    }
    Ok(())
}

/// Makes the groups of a path. A new group of cpuset (v1) takes nobody in until it has processors and memory: those of the
/// group above. In v2 an empty file means just these, and the root has no such file.
fn make(hierarchy: &Path, path: &Path) -> Result<(), CgroupError> {
    // Every group of v2 has this file and none of v1 (cgroups(7)).
    let unified = hierarchy.join("cgroup.controllers").exists();
    let mut group = hierarchy.to_owned();
    for part in path.components() {
        let above = group.clone();
        group.push(part);
        match fs::create_dir(&group) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(system("make", &group)(error)),
        }
        if unified {
            continue;
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let to = group.join(file);
            match fs::read_to_string(&to) {
                Ok(value) if value.trim().is_empty() => {}
                // There is something, or this is another hierarchy.
                Ok(_) | Err(_) => continue,
            }
            let value = fs::read_to_string(above.join(file)).map_err(system("read", &above.join(file)))?;
            if !value.trim().is_empty() {
                fs::write(&to, value.trim()).map_err(system("write", &to))?;
            }
        }
    }
    Ok(())
}

/// Where the hierarchies with controllers are: those of v1, or that of v2 where there is none. Of several mounts of one the
/// first counts: another may show a part of it only, and a group there would be elsewhere in the hierarchy.
fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let of_kind = |wanted: &str| -> Vec<PathBuf> {
        let mut devices = BTreeSet::new();
        let point = |line: &str| {
            let (before, after) = line.split_once(" - ")?;
            let mut after = after.split(' ');
            let (kind, options) = (after.next()?, after.nth(1)?);
            // A named hierarchy has no controller, and is its owner's: systemd, mostly.
            let named = options.split(',').any(|option| option.starts_with("name="));
            let mut before = before.split(' ').skip(2);
            let (device, point) = (before.next()?.to_owned(), before.nth(1)?);
            (kind == wanted && !named && devices.insert(device)).then(|| PathBuf::from(point))
        };
        mountinfo.lines().filter_map(point).collect()
    };
    let found = of_kind("cgroup");
    if found.is_empty() { of_kind("cgroup2") } else { found }
}

fn system<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::System { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    #[test]
    fn hierarchies_with_controllers_are_found() {
        let hybrid = "30 23 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      31 23 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
                      32 23 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
                      33 23 0:27 /part /mnt/part rw shared:9 - cgroup cgroup rw,memory\n";
        assert_eq!(hierarchies(hybrid), [Path::new("/sys/fs/cgroup/memory")]);
        let unified = "30 23 0:25 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(hierarchies(unified), [Path::new("/sys/fs/cgroup")]);
        assert_eq!(hierarchies("22 1 0:5 / /proc rw - proc proc rw\n"), [] as [PathBuf; 0]);
    }

    /// Folders as the kernel fills them when a group is made, of which no host has both kinds.
    #[test]
    fn a_group_has_the_processors_of_the_one_above() {
        for (root_file, expected) in [("cpuset.cpus", "0-3"), ("cgroup.controllers", "")] {
            let root = tempfile::tempdir().unwrap();
            fs::write(root.path().join(root_file), "0-3\n").unwrap();
            let file = root.path().join("group/cpuset.cpus");
            fs::create_dir(root.path().join("group")).unwrap();
            fs::write(&file, "\n").unwrap();
            make(root.path(), Path::new("group")).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap().trim(), expected, "{root_file}");
        }
    }

    #[test]
    fn no_path_leads_out() {
        for path in ["../x", "a/../../x", "/a/.."] {
            assert!(matches!(join(Path::new(path), 1), Err(CgroupError::Path { .. })), "{path}");
        }
    }

    /// A process, and the groups that it is in.
    struct Joined(Child, PathBuf);

    impl Drop for Joined {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
            for hierarchy in hierarchies(&table) {
                for group in self.1.ancestors().filter(|group| !group.as_os_str().is_empty()) {
                    let _ = fs::remove_dir(hierarchy.join(group));
                }
            }
        }
    }

    #[test]
    fn a_process_is_moved_in_every_hierarchy() {
        if !nix::unistd::getuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let path = PathBuf::from(format!("davit-test-{}/inner", std::process::id()));
        let joined = Joined(Command::new("sleep").arg("600").spawn().unwrap(), path.clone());
        join(&Path::new("/").join(&path), joined.0.id()).unwrap();
        // A second time it is there.
        join(&path, joined.0.id()).unwrap();
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", joined.0.id())).unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let inside = groups.lines().filter(|line| line.ends_with(&format!("/{}", path.display()))).count();
        assert_eq!(inside, hierarchies(&table).len(), "{groups}");
    }
}
