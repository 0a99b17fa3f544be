//! What is left of a container when its runtime fails, hangs, lies or is killed. The kernel is asked, not the runtime; and
//! what the runtime does not remove is removed by hand.
//!
//! Nothing is killed but what certainly is the container's: the processes that the shim has recorded, known by pid and
//! start time, and what runs in a cgroup that bears the container's name. A cgroup is removed only when it is empty, and of
//! the runtime's folder only files. Daemons may share a runtime's folder: a container there that was made of a bundle which is
//! another's is left alone, with its cgroup.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use davit_model::error::chain;
use davit_shim_protocol::journal::StartRecord;
use davit_sys::fs::read_regular;
use davit_sys::process::{pidfd_open, pidfd_send_signal, start_time};
use serde::Deserialize;

use crate::cgroup;
use crate::deadline::Deadline;
use crate::log;
use crate::reactor::sleep;
use crate::runtime::{Runtime, read_pid_file};
use crate::spec::Specification;

/// The time that a runtime has to remove what it has half made. A daemon waits five seconds for the whole
/// (`io.containerd.timeout.shim.cleanup`), and by hand it takes only some milliseconds.
const RUNTIME_LIMIT: Duration = Duration::from_secs(3);
/// The most bytes of what a runtime keeps of a container: its specification, and some more.
const MAX_STATE: u64 = 32 << 20;
/// The pause between two looks at what is about to go: neither the end of a process that is no child of ours nor a cgroup
/// that becomes empty can be waited for on every kernel.
const PAUSE: Duration = Duration::from_millis(5);

/// Where to look for one container.
pub(crate) struct Leftovers<'a> {
    runtime: &'a Runtime,
    id: &'a str,
    /// The folders of its cgroup in every hierarchy.
    cgroups: Vec<PathBuf>,
    /// The processes of which it is not known that they have ended.
    running: Vec<StartRecord>,
    /// It has had any process at all. If not, what there may be in a cgroup of its name is another's.
    began: bool,
    /// What the runtime keeps of it; none if its container of this name is another bundle's.
    state: Option<PathBuf>,
}

impl<'a> Leftovers<'a> {
    /// Those of the runtime's bundle. `running` are the processes that may live; `began` says whether there ever was one.
    pub(crate) fn of(
        runtime: &'a Runtime,
        id: &'a str,
        running: Vec<StartRecord>,
        began: bool,
    ) -> Leftovers<'a> {
        let state = Some(runtime.state_of(id)).filter(|state| !is_anothers(state, &runtime.bundle));
        let specification = Specification::read(&runtime.bundle).unwrap_or_default();
        let cgroup = specification.cgroup().filter(|_| state.is_some());
        let cgroups = cgroup.map(cgroup::folders_of_container).unwrap_or_default();
        Leftovers { runtime, id, cgroups, running, began, state }
    }

    /// Whether there is anything.
    pub(crate) fn is_empty(&self) -> bool {
        !self.state.as_deref().is_some_and(is_there)
            && !self.cgroups.iter().any(|folder| is_there(folder))
            && self.alive().is_empty()
    }

    /// Removes everything, by the runtime and then by hand. Ends when nothing is left that can
    /// be removed and no process lives; one that sleeps in the kernel has to be waited for, and the caller says how long.
    pub(crate) async fn remove(&self) {
        if self.state.is_none() {
            log::warn(format_args!("the runtime's container {} is of another bundle and stays", self.id));
            return self.remove_by_hand().await;
        }
        let delete = ["delete", "--force", self.id].map(OsStr::new);
        let runtime = self.runtime.until(Deadline::within(RUNTIME_LIMIT));
        if let Err(error) = runtime.simple("failed to remove runtime container", &delete).await {
            log::warn(chain(&error));
        }
        self.remove_by_hand().await;
    }

    async fn remove_by_hand(&self) {
        if self.is_empty() {
            return;
        }
        log::warn(format_args!("the runtime has left something of {}; removing it", self.id));
        for folder in &self.cgroups {
            cgroup::thaw(folder);
        }
        while self.kill() > 0 {
            sleep(PAUSE).await;
        }
        for folder in &self.cgroups {
            // The last process may be gone, and its place in the cgroup not yet.
            let deadline = Deadline::within(Duration::from_secs(1));
            let removed = deadline.bound(async {
                while let Err(error) = remove_cgroup(folder) {
                    if error.raw_os_error() != Some(nix::libc::EBUSY) {
                        return log::warn(format_args!("remove cgroup {}: {error}", folder.display()));
                    }
                    sleep(PAUSE).await;
                }
            });
            if removed.await.is_none() {
                log::warn(format_args!("cgroup {} is in use", folder.display()));
            }
        }
        let Some(state) = &self.state else { return };
        if let Err(error) = remove_files(state) {
            log::warn(format_args!("remove {}: {error}", state.display()));
        }
    }

    /// Kills what lives, and gives the number of those.
    fn kill(&self) -> usize {
        let alive = self.alive();
        for pidfd in &alive {
            let _ = pidfd_send_signal(pidfd.as_fd(), nix::libc::SIGKILL);
        }
        alive.len()
    }

    /// The container's processes that live. A zombie is no more than a number that somebody has yet to take note of.
    fn alive(&self) -> Vec<OwnedFd> {
        let recorded = self.running.iter().filter_map(|process| {
            let pid = i32::try_from(process.pid).ok().filter(|pid| *pid > 0)?;
            // Opened first: then it is certain to be the one that is looked at.
            let pidfd = pidfd_open(pid).ok()?;
            (start_time(pid).ok()? == process.start_time && !is_zombie(pid)).then_some(pidfd)
        });
        let mut found: Vec<OwnedFd> = recorded.collect();
        if self.began {
            let members = self.members();
            found.extend(
                members.into_iter().filter(|pid| !is_zombie(*pid)).filter_map(|pid| pidfd_open(pid).ok()),
            );
        }
        found
    }

    /// What runs in a cgroup of the container's own name.
    fn members(&self) -> BTreeSet<i32> {
        let own = self.cgroups.iter().filter(|folder| folder.file_name() == Some(OsStr::new(self.id)));
        let mut members: BTreeSet<u32> = BTreeSet::new();
        for folder in own {
            cgroup::collect(folder, &mut members);
        }
        let us = std::process::id();
        members.into_iter().filter(|pid| *pid != us).filter_map(|pid| i32::try_from(pid).ok()).collect()
    }
}

/// Ends the runtimes that still work on a bundle whose shim is dead: each dies with the shim, but a moment later, in which
/// it can make what was just removed.
pub(crate) async fn end_runtimes(bundle: &Path) {
    loop {
        let at_work = runtimes(bundle);
        if at_work.is_empty() {
            return;
        }
        for runtime in at_work {
            let _ = pidfd_send_signal(runtime.as_fd(), nix::libc::SIGKILL);
        }
        sleep(PAUSE).await;
    }
}

/// The processes that log into the bundle and see the same root as we do, which no container's does.
fn runtimes(bundle: &Path) -> Vec<OwnedFd> {
    let root =
        |pid: &str| fs::metadata(format!("/proc/{pid}/root")).ok().map(|root| (root.dev(), root.ino()));
    let ours = root("self");
    let found = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        // Opened first: then it is certain to be the one that is looked at.
        let pidfd = pidfd_open(name.parse().ok()?).ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let logs_here = words.windows(2).any(|pair| {
            pair[0] == b"--log" && Path::new(OsStr::from_bytes(pair[1])).parent() == Some(bundle)
        });
        (logs_here && root(&name) == ours).then_some(pidfd)
    });
    found.collect()
}

/// The record of the process in a bundle's pid file, from before there were such records, if it is certain to be the
/// container's: it is in its cgroup.
pub(crate) fn init_of_bundle(bundle: &Path, id: &str) -> Option<StartRecord> {
    let specification = Specification::read(bundle).ok()?;
    let cgroup = Path::new("/").join(specification.cgroup()?);
    let pid = read_pid_file(&bundle.join("init.pid")).ok()?;
    let start_time = start_time(pid).ok()?;
    let memberships = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let member = memberships
        .lines()
        .any(|line| line.splitn(3, ':').nth(2).is_some_and(|path| Path::new(path) == cgroup));
    member.then(|| StartRecord { id: id.to_owned(), pid: pid.unsigned_abs(), start_time })
}

/// Whether a runtime's folder of a container tells of a bundle that is there and is not ours. runc has the bundle among the labels
/// of its `state.json`, crun in its `status`; of what another runtime has nothing is known.
fn is_anothers(state: &Path, ours: &Path) -> bool {
    #[derive(Deserialize)]
    struct Runc {
        config: RuncConfig,
    }
    #[derive(Deserialize)]
    struct RuncConfig {
        labels: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Crun {
        bundle: String,
    }
    let read = |name: &str| read_regular(&state.join(name), MAX_STATE).ok();
    let of_runc = || {
        let found: Runc = serde_json::from_slice(&read("state.json")?).ok()?;
        found.config.labels.iter().find_map(|label| label.strip_prefix("bundle=")).map(PathBuf::from)
    };
    let of_crun = || {
        let found: Crun = serde_json::from_slice(&read("status")?).ok()?;
        Some(PathBuf::from(found.bundle))
    };
    let Some(theirs) = of_runc().or_else(of_crun) else { return false };
    match (fs::metadata(theirs), fs::metadata(ours)) {
        (Ok(theirs), Ok(ours)) => (theirs.dev(), theirs.ino()) != (ours.dev(), ours.ino()),
        (Ok(_), Err(_)) => true,
        (Err(_), _) => false,
    }
}

fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn is_zombie(pid: i32) -> bool {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    line.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// Removes a cgroup and those below it; each must be empty.
fn remove_cgroup(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes a folder of files. A folder in it is of a runtime that we know nothing of, and stays, for something may be
/// mounted there.
fn remove_files(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime(folder: &Path) -> Runtime {
        Runtime {
            binary: "/bin/false".to_owned(),
            root: folder.join("root"),
            bundle: folder.to_owned(),
            systemd_cgroup: false,
            oom_score_adj: None,
            deadline: Deadline::default(),
        }
    }

    #[test]
    fn a_recorded_process_is_killed_and_a_later_one_of_its_number_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = runtime(folder.path());
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        let started = start_time(pid as i32).unwrap();
        let record = move |start_time| vec![StartRecord { id: "box".to_owned(), pid, start_time }];
        assert!(Leftovers::of(&runtime, "box", record(started + 1), true).is_empty());
        let state = runtime.state_of("box");
        fs::create_dir_all(&state).unwrap();
        fs::write(state.join("state.json"), "{}").unwrap();
        crate::executor::run({
            let runtime = runtime.clone();
            async move {
                let left = Leftovers::of(&runtime, "box", record(started), true);
                assert!(!left.is_empty());
                left.remove().await;
                assert!(left.is_empty());
            }
        });
        assert!(!child.wait().unwrap().success());
        assert!(!state.exists());
    }

    #[test]
    fn a_runtime_that_outlives_its_shim_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log.json");
        let shell = |log: &Path| {
            let script = ["-c", "while :; do sleep 0.01; done", "sh", "--log"];
            std::process::Command::new("/bin/sh").args(script).arg(log).spawn().unwrap()
        };
        let (mut here, mut elsewhere) = (shell(&log), shell(Path::new("/elsewhere/log.json")));
        while runtimes(folder.path()).is_empty() {
            std::thread::yield_now();
        }
        let waiting = std::thread::spawn(move || here.wait().unwrap());
        let bundle = folder.path().to_owned();
        crate::executor::run(async move { end_runtimes(&bundle).await });
        assert!(!waiting.join().unwrap().success());
        assert!(elsewhere.try_wait().unwrap().is_none());
        elsewhere.kill().unwrap();
        elsewhere.wait().unwrap();
    }

    #[test]
    fn only_files_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("state/mounted")).unwrap();
        fs::write(folder.path().join("state/file"), "").unwrap();
        assert!(remove_files(&folder.path().join("state")).is_err());
        assert!(folder.path().join("state/mounted").exists());
        assert!(!folder.path().join("state/file").exists());
        remove_files(&folder.path().join("none")).unwrap();
    }
}
