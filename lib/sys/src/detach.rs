//! Leaving a copy of this process behind that serves on, without executing the program a second time.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use crate::io::inherited;
use crate::process::{Child, pidfd_open};

/// The number under which the copy finds the one descriptor that it keeps.
const KEPT: RawFd = 3;

/// Forks a copy of this process, which runs `serve` and exits with the code that this returns.
///
/// The copy leads a process group of its own and blocks no signal. It stays in the session, as containerd's shims do: a
/// new one would be a group of its own for the scheduler too (sched(7), autogroup), which on a busy host makes each start
/// wait for its first turn. It has `/dev/null` for standard input and output,
/// `log`, or `/dev/null` without one, for standard error, and `kept`, which `serve` gets. No other descriptor of this
/// process stays open in it. A copy in which that cannot be set up ends at once with code 127.
///
/// Only for a process of a single thread: no lock can be held then by a thread that the copy lacks.
///
/// # Errors
/// That of the kernel.
pub fn leave_behind(
    kept: OwnedFd,
    log: Option<OwnedFd>,
    serve: impl FnOnce(OwnedFd) -> i32,
) -> io::Result<Child> {
    let null: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/null")?.into();
    // SAFETY: the process has one thread (see above), so the copy is a complete one; it leaves by `_exit`.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid > 0 {
        return Ok(Child { pid, pidfd: pidfd_open(pid)? });
    }
    let run = || {
        let log = log.unwrap_or(null.try_clone()?);
        detach(&null, &log, &kept)?;
        // They are closed by now.
        for descriptor in [null, log, kept] {
            let _ = descriptor.into_raw_fd();
        }
        Ok::<i32, io::Error>(serve(inherited(KEPT)?))
    };
    let code = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(Ok(code)) => code,
        Ok(Err(_)) => 127,
        Err(_) => 101,
    };
    // SAFETY: `_exit` runs no destructor and no exit handler of the process that we are a copy of.
    unsafe { libc::_exit(code) }
}

/// Sets up the copy. Its descriptors have other numbers afterwards.
fn detach(null: &OwnedFd, log: &OwnedFd, kept: &OwnedFd) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // First above all targets, so that no `dup2` overwrites a source still needed.
    let above = |source: &OwnedFd| {
        // SAFETY: the call takes integers alone.
        check(unsafe { libc::fcntl(source.as_raw_fd(), libc::F_DUPFD_CLOEXEC, KEPT + 1) })
    };
    let (null, log, kept) = (above(null)?, above(log)?, above(kept)?);
    // SAFETY: the calls take integers alone, or the pointer to a set that lives across them and is initialised by
    // sigemptyset. What descriptors they close belongs to the process that this is a copy of, whose owners of them
    // never run here: `leave_behind` does not return in the copy.
    unsafe {
        check(libc::setpgid(0, 0))?;
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()))?;
        for (source, target) in [(null, 0), (null, 1), (log, 2), (kept, KEPT)] {
            check(libc::dup2(source, target))?;
        }
        check(libc::syscall(libc::SYS_close_range, KEPT + 1, libc::c_uint::MAX, 0) as libc::c_int)?;
    }
    Ok(())
}

/// Writes another command line over the one that this process was executed with, for those who look for it in
/// `/proc`. One that needs more room than there is is left out: the old one stays.
///
/// [`std::env::args`] gives nothing that makes sense afterwards.
///
/// # Errors
/// `/proc/self/stat` cannot be read.
pub fn set_command_line<'a>(arguments: impl IntoIterator<Item = &'a OsStr>) -> io::Result<()> {
    let mut line = Vec::new();
    for argument in arguments {
        line.extend_from_slice(argument.as_bytes());
        line.push(0);
    }
    let (start, end) = argument_area(&std::fs::read_to_string("/proc/self/stat")?)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let room = end.saturating_sub(start);
    // The last byte stays zero: without it the kernel takes the line to go on in the environment.
    if line.len() > room {
        return Ok(());
    }
    line.resize(room, 0);
    // SAFETY: the kernel has laid the strings of `argv` out from `start` to `end`, writable and for as long as the process
    // lives; what points into them, the array of their addresses, finds strings that end at a zero as before. This process
    // has one thread, so nobody reads them meanwhile.
    unsafe { ptr::copy_nonoverlapping(line.as_ptr(), start as *mut u8, room) };
    Ok(())
}

/// `arg_start` and `arg_end`, the fields 48 and 49 of `/proc/<pid>/stat` (proc(5)). The second is a name in brackets that
/// may hold anything.
fn argument_area(stat: &str) -> Option<(usize, usize)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(48 - 3);
    let mut number = || fields.next()?.parse::<usize>().ok();
    Some((number()?, number()?)).filter(|(start, end)| *start != 0 && start < end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::wait_blocking;
    use std::io::Read;

    #[test]
    fn the_copy_keeps_what_it_was_given_and_nothing_else() {
        let (mut answers, answer) = std::io::pipe().unwrap();
        let (_open, _too) = std::io::pipe().unwrap();
        let (mut log, log_writer) = std::io::pipe().unwrap();
        let child = leave_behind(answer.into(), Some(log_writer.into()), |kept| {
            let open: Vec<String> = std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .map(|entry| entry.unwrap())
                .filter_map(|entry| {
                    let target = std::fs::read_link(entry.path()).ok()?;
                    Some(format!("{}={}", entry.file_name().display(), target.display()))
                })
                .collect();
            let leader = nix::unistd::getpgrp() == nix::unistd::getpid();
            set_command_line([OsStr::new("a"), OsStr::new("b c")]).unwrap();
            let line = String::from_utf8(std::fs::read("/proc/self/cmdline").unwrap()).unwrap();
            let text = format!("{leader} {:?} {open:?}", line.trim_end_matches('\0'));
            nix::unistd::write(&kept, text.as_bytes()).unwrap();
            nix::unistd::write(std::io::stderr(), b"log").unwrap();
            7
        })
        .unwrap();
        assert_eq!(wait_blocking(&child).unwrap().status(), 7);
        let mut text = String::new();
        answers.read_to_string(&mut text).unwrap();
        let (mut logged, mut rest) = (String::new(), text.as_str());
        log.read_to_string(&mut logged).unwrap();
        assert_eq!(logged, "log");
        for expected in ["true \"a\\0b c\"", "\"0=/dev/null\", \"1=/dev/null\", \"2=pipe:", "\"3=pipe:"] {
            let at = rest.find(expected).unwrap_or_else(|| panic!("{expected} is not in {text}"));
            rest = &rest[at + expected.len()..];
        }
        // What is read from is the one that is open beside them.
        assert!(text.matches("=").count() <= 5, "{text}");
    }

    #[test]
    fn the_area_of_the_arguments_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|number| number.to_string()).collect();
        let stat = format!("1 (a ) b) {}", fields.join(" "));
        assert_eq!(argument_area(&stat), Some((48, 49)));
        assert_eq!(argument_area("1 (a) 2 3"), None);
    }
}
