//! User namespaces that serve only as the id mapping of a mount (`MOUNT_ATTR_IDMAP`, Linux 5.12).

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::calls;

/// Why there is no user namespace of that mapping.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The text is no mapping.
    Syntax,
    /// The kernel refused: at which step, and why.
    Kernel(&'static str, Errno),
}

/// A user namespace with these mappings, each `container:host:length[,…]`.
///
/// A namespace begins with a process, so one is started for as long as it takes to write the mappings and open
/// the namespace.
pub(super) fn user_namespace(users: &str, groups: &str) -> Result<OwnedFd, Failure> {
    let users = kernel_form(users).ok_or(Failure::Syntax)?;
    let groups = kernel_form(groups).ok_or(Failure::Syntax)?;
    let child = calls::start_namespace_holder().map_err(|errno| Failure::Kernel("clone3", errno))?;
    let namespace = describe(child, &users, &groups);
    // Nobody else waits for a child without exit signal, so the id is still this child's.
    let child = Pid::from_raw(child);
    let _ = kill(child, Signal::SIGKILL);
    while waitpid(child, Some(WaitPidFlag::__WALL)) == Err(Errno::EINTR) {}
    namespace
}

/// Writes the mappings of the child's namespace and opens it.
fn describe(child: i32, users: &str, groups: &str) -> Result<OwnedFd, Failure> {
    let step = |step: &'static str| {
        move |error: io::Error| {
            Failure::Kernel(step, error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
        }
    };
    fs::write(format!("/proc/{child}/uid_map"), users).map_err(step("write uid_map"))?;
    fs::write(format!("/proc/{child}/gid_map"), groups).map_err(step("write gid_map"))?;
    let namespace = File::open(format!("/proc/{child}/ns/user")).map_err(step("open ns/user"))?;
    Ok(namespace.into())
}

/// From `container:host:length,…` to the lines of /proc/PID/uid_map. Ids are 32 bits, and a range must not wrap.
fn kernel_form(mappings: &str) -> Option<String> {
    let mut lines = String::new();
    for mapping in mappings.split(',') {
        let mut numbers = mapping.split(':').map(|number| {
            // `parse` would take a plus sign.
            number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse::<u32>().ok())?
        });
        let (container, host, length) = (numbers.next()??, numbers.next()??, numbers.next()??);
        if numbers.next().is_some() || length == 0 {
            return None;
        }
        container.checked_add(length)?;
        host.checked_add(length)?;
        lines.push_str(&format!("{container} {host} {length}\n"));
    }
    Some(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_become_lines() {
        assert_eq!(kernel_form("0:1000:65536,65536:0:1").as_deref(), Some("0 1000 65536\n65536 0 1\n"));
    }

    #[test]
    fn bad_mappings_are_refused() {
        let bad = [
            "",
            ":",
            "0:0",
            "0:0:0",
            "0:0:1:2",
            "a:0:1",
            "-1:0:1",
            "+1:0:1",
            "0:0:1,",
            "4294967295:0:1",
            "0:4294967290:10",
            "0:99999999999:1",
            "0:0: 1",
        ];
        for mapping in bad {
            assert_eq!(kernel_form(mapping), None, "{mapping:?}");
        }
    }

    #[test]
    fn makes_a_namespace_of_the_mapping() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let namespace = user_namespace("0:100000:65536", "0:200000:65536").unwrap();
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        let other =
            fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&namespace))).unwrap();
        assert!(other.to_string_lossy().starts_with("user:["));
        assert_ne!(own, other);
        assert_eq!(user_namespace("0:0:1", "x").unwrap_err(), Failure::Syntax);
    }

    /// A helper must not hold what another one waits for, and none may stay.
    #[test]
    fn threads_that_make_namespaces_at_once_do_not_wait_for_each_other() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let (done, finished) = std::sync::mpsc::channel();
        for _ in 0..4 {
            let done = done.clone();
            // Not scoped: threads that hang must fail the test, not hold it up.
            std::thread::spawn(move || {
                for _ in 0..300 {
                    user_namespace("0:100000:65536", "0:100000:65536").unwrap();
                }
                // Only the children of this thread: another test may be making some.
                let task = nix::unistd::gettid();
                let children =
                    fs::read_to_string(format!("/proc/self/task/{task}/children")).unwrap_or_default();
                done.send(children).unwrap();
            });
        }
        for _ in 0..4 {
            let left = finished.recv_timeout(std::time::Duration::from_secs(120)).expect("no thread hangs");
            assert_eq!(left, "", "no helper stays");
        }
    }
}
