//! Mounts by programs: filesystems that a process serves (FUSE), whose types begin with `fuse.` or `fuse3.`.
//!
//! ```text
//!   mount.fuse3 SOURCE TARGET -o OPTION … -t TYPE ──► TYPE SOURCE TARGET -o OPTION,… ──► mounted; ends, and serves on as a child
//! ```
//!
//! The rule for the words is containerd's (`core/mount/mount_linux.go`). The helper executes the program TYPE, which it
//! looks for in PATH; so a type has to be a plain name, and PATH is ours. What serves the filesystem ends when it is unmounted: it
//! needs no more than any other mount for that.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use davit_model::Mount;
use davit_model::error::chain;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Error, Job, classic, detach};
use crate::process::{self, Child, Command, Exit, find_program};

/// The programs, by what the types that they are for begin with.
const PROGRAMS: [(&str, &str); 2] = [("fuse.", "mount.fuse"), ("fuse3.", "mount.fuse3")];

/// Where they are looked for, and where they look for others: no client and no configuration has a say in that.
const FOLDERS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long one may take; then it is killed.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many bytes of what it says are kept.
const SAID: i64 = 4096;

/// A program that carries out mounts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Helper<'a> {
    program: &'static str,
    /// What it knows the type of the mount as.
    kind: &'a str,
}

/// The program that carries out mounts of this type; `None` if the kernel does.
pub(super) fn of(kind: &str) -> Option<Helper<'_>> {
    PROGRAMS.iter().find_map(|(prefix, program)| Some(Helper { program, kind: kind.strip_prefix(prefix)? }))
}

/// Whether a program carries out the mount, and a process serves it from then on. That process keeps the mount namespace in
/// which it was started, and all mounts there, this one included, until it ends.
pub fn is_by_helper(mount: &Mount) -> bool {
    of(&mount.kind).is_some()
}

/// What a helper finds, and how long it may take.
pub(super) struct Terms<'a> {
    pub(super) folders: &'a OsStr,
    pub(super) patience: Duration,
}

impl Default for Terms<'_> {
    fn default() -> Self {
        Terms { folders: OsStr::new(FOLDERS), patience: PATIENCE }
    }
}

/// Mounts, and answers the mount point for undoing; nothing is mounted after an error.
pub(super) fn mount(job: &Job<'_>, helper: Helper<'_>, terms: &Terms<'_>) -> Result<OwnedFd, Error> {
    let Helper { program, kind } = helper;
    let plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '+' | '-');
    if !kind.starts_with(|letter: char| letter.is_ascii_alphanumeric()) || !kind.chars().all(plain) {
        return Err(job.unsupported("its type names no program"));
    }
    if job.source.starts_with('-') || job.source.contains('\0') {
        // For the filesystem's program this is one argument among others.
        return Err(job.unsupported("its source is no source but an option"));
    }
    if job.options.mapping.is_some() {
        return Err(job.unsupported("a mount helper maps no ids"));
    }
    let failed = |reason| Error::Helper { mount: job.describe(), program, reason };
    let Some(path) = find_program(OsStr::new(program), terms.folders) else {
        return Err(failed(format!("it is not in {}", terms.folders.display())));
    };
    let point = job.open_point()?;
    let before = mount_id(&point).map_err(|errno| job.error("read fdinfo", errno))?;
    let link = classic::fd_path(&point);
    let target =
        fs::read_link(&link).map_err(|error| failed(format!("no path leads to its target: {error}")))?;

    let mut words = vec![OsString::from(job.source), target.into_os_string()];
    for option in job.mount.options.iter().filter(|option| !option.is_empty()) {
        words.extend(["-o".into(), option.into()]);
    }
    words.extend(["-t".into(), kind.into()]);
    let said = output().map_err(|errno| job.error("memfd_create", errno))?;
    let run = || -> Result<Child, String> {
        let nul = |error: std::ffi::NulError| chain(&error);
        let mut command = Command::new(&path).map_err(nul)?;
        for word in &words {
            command.argument(word).map_err(nul)?;
        }
        command.variable("PATH", terms.folders).map_err(nul)?;
        command.directory("/".as_ref()).map_err(nul)?;
        command.new_session().death_signal(nix::libc::SIGKILL);
        command.descriptor(1, said.as_fd()).descriptor(2, said.as_fd());
        if nix::sys::prctl::get_thp_disable() == Ok(true) {
            command.restore_huge_pages();
        }
        command.spawn().map_err(|error| chain(&error))
    };
    let child = run().map_err(failed)?;
    let undone = |reason: String| {
        // It may have come as far as that.
        if mounted(job, &before) {
            detach(&point);
        }
        failed(reason)
    };
    match wait(&child, terms.patience) {
        Ok(Some(exit)) if exit.success() => {}
        Ok(Some(exit)) => return Err(undone(format!("it ended with {}{}", exit.status(), quoted(&said)))),
        Ok(None) => {
            let text = format!("it was killed after {} s{}", terms.patience.as_secs(), quoted(&said));
            return Err(undone(text));
        }
        Err(error) => return Err(undone(format!("its end is unknown: {error}"))),
    }
    if !mounted(job, &before) {
        return Err(failed(format!("it has mounted nothing{}", quoted(&said))));
    }
    Ok(point)
}

/// Whether something is mounted on the target that was not before.
fn mounted(job: &Job<'_>, before: &str) -> bool {
    job.open_point().is_ok_and(|point| mount_id(&point).is_ok_and(|now| now != before))
}

/// The number of the mount that a descriptor is in (proc_pid_fdinfo(5)). Unlike stat(2) this asks no filesystem.
fn mount_id(point: &OwnedFd) -> Result<String, Errno> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", point.as_raw_fd()))
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    id.map(|id| id.trim().to_owned()).ok_or(Errno::ENODATA)
}

/// A place for what a helper says. It cannot grow, so that a process which keeps it for ever costs no more; and unlike a pipe it keeps
/// nobody waiting who does, neither us nor that process.
fn output() -> Result<fs::File, Errno> {
    let file = memfd_create(c"mount-helper", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&file, SAID)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK))?;
    Ok(file.into())
}

/// What was said, behind a colon, up to the zeros that the file begins with.
fn quoted(said: &fs::File) -> String {
    let mut bytes = vec![0; SAID as usize];
    let count = said.read_at(&mut bytes, 0).unwrap_or(0);
    bytes.truncate(bytes[..count].iter().position(|byte| *byte == 0).unwrap_or(count));
    let text = OsString::from_vec(bytes).to_string_lossy().trim().to_owned();
    if text.is_empty() { text } else { format!(": {text}") }
}

/// Waits for the end of a helper. One that takes too long is killed with all that it has started, and that is `None`.
fn wait(child: &Child, patience: Duration) -> std::io::Result<Option<Exit>> {
    if ended(child, patience)? {
        return process::wait(child.pidfd.as_fd());
    }
    // It leads a session of its own, and its number is its own until it is waited for.
    kill(Pid::from_raw(-child.pid), Signal::SIGKILL)?;
    // Whom the kernel does not let die is not waited for.
    if ended(child, Duration::from_secs(1))? {
        process::wait(child.pidfd.as_fd())?;
    }
    Ok(None)
}

/// Whether the child ends in this time.
fn ended(child: &Child, patience: Duration) -> std::io::Result<bool> {
    let limit = Instant::now() + patience;
    loop {
        let left = limit.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) => {}
            Ok(_) => return Ok(true),
        }
    }
}
