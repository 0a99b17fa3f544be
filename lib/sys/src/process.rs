//! Processes by file descriptor: spawn, signal and reap without the races that bare pids have.
//!
//! A child is spawned as `posix_spawn` does it, by a `clone` that shares the parent's memory until the child
//! executes (`CLONE_VM | CLONE_VFORK`), so the cost does not grow with the parent; `CLONE_PIDFD` hands out
//! the descriptor in the same step. Everything that the child needs is prepared before, since it may neither
//! allocate nor lock.

use std::ffi::{CStr, CString, NulError, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;

/// The bytes of the stack that a child has between `clone` and `execve`.
const CHILD_STACK: usize = 64 * 1024;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It called `exit` with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Exit {
    /// The exit status as shells and containerd count it: the code, or 128 plus the signal.
    pub fn status(self) -> u32 {
        match self {
            Exit::Code(code) => code as u32,
            Exit::Signal(signal) => 128 + signal as u32,
        }
    }

    /// True for code 0.
    pub fn success(self) -> bool {
        self == Exit::Code(0)
    }
}

/// A process that is our child, or became it because we are its subreaper.
#[derive(Debug)]
pub struct Child {
    /// Its id, valid until it is reaped.
    pub pid: i32,
    /// Its descriptor: readable when the process has exited.
    pub pidfd: OwnedFd,
}

/// Why a process could not be spawned.
#[derive(Debug, thiserror::Error)]
#[error("{step} to run {program:?}")]
pub struct SpawnError {
    /// What was to be executed.
    pub program: CString,
    /// The step that failed, in the words of the system call.
    pub step: &'static str,
    /// The answer of the kernel.
    pub source: io::Error,
}

/// What to execute, and in which surroundings. A descriptor that is not named here is not inherited (before
/// Linux
/// 5.11 only if it has the close-on-exec flag); 0, 1 and 2 become `/dev/null` unless they are named.
///
/// The signal mask is emptied and every signal gets its default disposition, whatever the parent has.
#[derive(Debug)]
pub struct Command<'fd> {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    directory: Option<CString>,
    descriptors: Vec<(RawFd, BorrowedFd<'fd>)>,
    new_session: bool,
    death_signal: i32,
    oom_score_adj: Option<i32>,
    restore_huge_pages: bool,
}

impl<'fd> Command<'fd> {
    /// Prepares to execute the file `program`; no PATH is searched (see [`find_program`]). The first argument
    /// (`argv[0]`) is the path itself; the environment is empty.
    ///
    /// # Errors
    /// The path holds a NUL byte.
    pub fn new(program: &Path) -> Result<Command<'fd>, NulError> {
        let program = CString::new(program.as_os_str().as_bytes())?;
        Ok(Command {
            arguments: vec![program.clone()],
            program,
            environment: Vec::new(),
            directory: None,
            descriptors: Vec::new(),
            new_session: false,
            death_signal: 0,
            oom_score_adj: None,
            restore_huge_pages: false,
        })
    }

    /// Gives the program another name (`argv[0]`) than the path that it is opened by.
    ///
    /// # Errors
    /// It holds a NUL byte.
    pub fn name(&mut self, name: impl AsRef<OsStr>) -> Result<&mut Command<'fd>, NulError> {
        self.arguments[0] = CString::new(name.as_ref().as_bytes())?;
        Ok(self)
    }

    /// Appends an argument.
    ///
    /// # Errors
    /// It holds a NUL byte.
    pub fn argument(&mut self, argument: impl AsRef<OsStr>) -> Result<&mut Command<'fd>, NulError> {
        self.arguments.push(CString::new(argument.as_ref().as_bytes())?);
        Ok(self)
    }

    /// Sets a variable of the environment.
    ///
    /// # Errors
    /// It holds a NUL byte.
    pub fn variable(
        &mut self,
        name: impl AsRef<OsStr>,
        value: impl AsRef<OsStr>,
    ) -> Result<&mut Command<'fd>, NulError> {
        let mut entry = name.as_ref().as_bytes().to_vec();
        entry.push(b'=');
        entry.extend_from_slice(value.as_ref().as_bytes());
        self.environment.push(CString::new(entry)?);
        Ok(self)
    }

    /// Takes over the environment of this process, except for the variables of these names.
    pub fn inherit_environment(&mut self, except: &[&str]) -> &mut Command<'fd> {
        for (name, value) in std::env::vars_os() {
            if !except.iter().any(|other| *other == name) {
                // What the kernel handed to us cannot hold a NUL byte.
                let _ = self.variable(name, value);
            }
        }
        self
    }

    /// Sets the working directory.
    ///
    /// # Errors
    /// The path holds a NUL byte.
    pub fn directory(&mut self, directory: &Path) -> Result<&mut Command<'fd>, NulError> {
        self.directory = Some(CString::new(directory.as_os_str().as_bytes())?);
        Ok(self)
    }

    /// Gives the child a duplicate of `source` under the number `target`.
    pub fn descriptor(&mut self, target: RawFd, source: BorrowedFd<'fd>) -> &mut Command<'fd> {
        self.descriptors.push((target, source));
        self
    }

    /// Makes the child the leader of a new session, without a terminal.
    pub fn new_session(&mut self) -> &mut Command<'fd> {
        self.new_session = true;
        self
    }

    /// Has the kernel send this signal to the child when the thread that spawned it dies.
    pub fn death_signal(&mut self, signal: i32) -> &mut Command<'fd> {
        self.death_signal = signal;
        self
    }

    /// Sets `oom_score_adj`, as far as the kernel permits it: a refusal is ignored.
    pub fn oom_score_adj(&mut self, score: i32) -> &mut Command<'fd> {
        self.oom_score_adj = Some(score);
        self
    }

    /// Gives the child back the transparent huge pages that this process has switched off for itself.
    pub fn restore_huge_pages(&mut self) -> &mut Command<'fd> {
        self.restore_huge_pages = true;
        self
    }

    /// Spawns the process. Returns when it has executed the program.
    ///
    /// # Errors
    /// A [`SpawnError`] that names the step which the kernel refused, `execve` included.
    pub fn spawn(&self) -> Result<Child, SpawnError> {
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|source| self.error("open /dev/null", source))?;
        let mut moves: Vec<(RawFd, RawFd)> = Vec::with_capacity(self.descriptors.len() + 3);
        for standard in 0..3 {
            if !self.descriptors.iter().any(|(target, _)| *target == standard) {
                moves.push((null.as_raw_fd(), standard));
            }
        }
        moves.extend(self.descriptors.iter().map(|(target, source)| (source.as_raw_fd(), *target)));
        let above_targets = moves.iter().map(|(_, target)| target + 1).max().unwrap_or(3);

        let arguments = pointers(&self.arguments);
        let environment = pointers(&self.environment);
        let score = self.oom_score_adj.map(|score| score.to_string());
        let mut plan = Plan {
            program: self.program.as_ptr(),
            arguments: arguments.as_ptr(),
            environment: environment.as_ptr(),
            directory: self.directory.as_deref().map_or(ptr::null(), CStr::as_ptr),
            moves: &mut moves,
            above_targets,
            new_session: self.new_session,
            death_signal: self.death_signal,
            parent: std::process::id() as i32,
            oom_score_adj: score.as_deref().unwrap_or_default().as_bytes(),
            restore_huge_pages: self.restore_huge_pages,
            failed: None,
        };
        let child = clone_and_run(&mut plan);
        let failed = plan.failed;
        if self.restore_huge_pages {
            // The flag belongs to the memory that the child shared with us until it executed.
            let _ = nix::sys::prctl::set_thp_disable(true);
        }
        let child = child.map_err(|source| self.error("clone", source))?;
        match failed {
            None => Ok(child),
            Some((step, errno)) => {
                let _ = wait_blocking(&child);
                Err(self.error(step, io::Error::from_raw_os_error(errno)))
            }
        }
    }

    fn error(&self, step: &'static str, source: io::Error) -> SpawnError {
        SpawnError { program: self.program.clone(), step, source }
    }
}

/// The pointers of `argv` and `envp`, with the closing null. They live as long as `strings`.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// All that the child reads, and the one thing that it writes: why it failed.
struct Plan<'a> {
    program: *const libc::c_char,
    arguments: *const *const libc::c_char,
    environment: *const *const libc::c_char,
    directory: *const libc::c_char,
    moves: &'a mut [(RawFd, RawFd)],
    above_targets: RawFd,
    new_session: bool,
    death_signal: i32,
    /// Who is to be outlived by nobody that has a death signal.
    parent: i32,
    oom_score_adj: &'a [u8],
    restore_huge_pages: bool,
    failed: Option<(&'static str, i32)>,
}

fn clone_and_run(plan: &mut Plan<'_>) -> io::Result<Child> {
    // SAFETY: an anonymous private mapping touches no memory of ours.
    let stack = unsafe {
        libc::mmap(
            ptr::null_mut(),
            CHILD_STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if stack == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: the child runs `run_child` on the top of its own stack, which stays mapped until after the
    // call: CLONE_VFORK suspends us until the child has executed or exited. `plan` outlives the call for the
    // same reason, and nobody else touches it meanwhile. With CLONE_PIDFD the fifth argument receives a
    // descriptor.
    let pid = unsafe {
        libc::clone(
            run_child,
            stack.byte_add(CHILD_STACK),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD,
            ptr::from_mut(plan).cast(),
            &mut pidfd as *mut RawFd,
        )
    };
    let error = io::Error::last_os_error();
    // SAFETY: the mapping is ours, and the child has left it.
    unsafe { libc::munmap(stack, CHILD_STACK) };
    if pid < 0 {
        return Err(error);
    }
    // SAFETY: the clone succeeded, so the kernel stored a new descriptor that only we know.
    Ok(Child { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
}

extern "C" fn run_child(plan: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `clone_and_run` passes a pointer to its exclusively borrowed plan and is suspended meanwhile.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    plan.failed = Some(prepare_and_execute(plan));
    // SAFETY: `_exit` ends this process without running anything of the parent's memory.
    unsafe { libc::_exit(127) }
}

/// Runs in the child: only system calls, no allocation, no lock. Returns only on failure.
fn prepare_and_execute(plan: &mut Plan<'_>) -> (&'static str, i32) {
    // SAFETY: each call below takes integers, or pointers into the plan, which lives until the child is gone;
    // the signal set is initialised by sigemptyset before it is read.
    unsafe {
        // By the system call itself: the C library keeps two real-time signals from its callers. A kernel sigaction of
        // zeros is the default disposition on every architecture; for SIGKILL and SIGSTOP the call fails, which is well.
        let default = [0u64; 8];
        for signal in 1..=64 {
            let (size, none) = (size_of::<u64>(), ptr::null_mut::<libc::c_void>());
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, size);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());

        if plan.new_session && libc::setsid() < 0 {
            return ("setsid", errno());
        }
        if plan.death_signal != 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, plan.death_signal as libc::c_ulong, 0, 0, 0);
            // A parent that was killed since the clone is waited for in vain: no signal comes any more.
            if libc::getppid() != plan.parent {
                return ("getppid", libc::ESRCH);
            }
        }
        if plan.restore_huge_pages {
            libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0);
        }
        if !plan.oom_score_adj.is_empty() {
            let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if file >= 0 {
                libc::write(file, plan.oom_score_adj.as_ptr().cast(), plan.oom_score_adj.len());
                libc::close(file);
            }
        }
        if !plan.directory.is_null() && libc::chdir(plan.directory) < 0 {
            return ("chdir", errno());
        }
        // Every source first moves above all targets, so that no `dup2` overwrites a source still needed.
        for (source, _) in plan.moves.iter_mut() {
            let moved = libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, plan.above_targets);
            if moved < 0 {
                return ("dup", errno());
            }
            *source = moved;
        }
        // Nothing else is inherited, also not what this process itself has inherited open by mistake.
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        for (source, target) in plan.moves.iter() {
            if libc::dup2(*source, *target) < 0 {
                return ("dup2", errno());
            }
        }
        libc::execve(plan.program, plan.arguments, plan.environment);
        ("execve", errno())
    }
}

fn errno() -> i32 {
    nix::errno::Errno::last_raw()
}

/// Looks for an executable file: an absolute path is taken as it is, a bare name is searched in the folders of `path` (a
/// `PATH` variable). Unlike `execvp` this looks into no folder by a relative path, an empty one included: what is
/// executed must not depend on where this process happens to be.
pub fn find_program(name: &OsStr, path: &OsStr) -> Option<PathBuf> {
    let executable = |candidate: &Path| {
        candidate.is_file() && nix::unistd::access(candidate, nix::unistd::AccessFlags::X_OK).is_ok()
    };
    if name.as_bytes().contains(&b'/') {
        let candidate = PathBuf::from(name);
        return (candidate.is_absolute() && executable(&candidate)).then_some(candidate);
    }
    let folders = std::env::split_paths(path).filter(|folder| folder.is_absolute());
    folders.map(|folder| folder.join(name)).find(|candidate| executable(candidate))
}

/// Has this process ignore a signal. Children that [`Command`] spawns do not inherit that.
///
/// # Errors
/// `EINVAL` for what is no signal, or cannot be ignored.
pub fn ignore(signal: i32) -> io::Result<()> {
    // SAFETY: SIG_IGN is a valid disposition for every signal, and replaces no handler of this project's
    // programs.
    let before = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the processes of this process's group, and their children, share cores only among themselves (core
/// scheduling,
/// `PR_SCHED_CORE`).
///
/// # Errors
/// That of the kernel: `EINVAL` or `ENODEV` if it has no core scheduling, or the processor no threads.
pub fn share_core_with_group() -> io::Result<()> {
    // SAFETY: the call takes integers alone; the pointer for a cookie is null, since none is asked for.
    let result = unsafe {
        libc::prctl(
            libc::PR_SCHED_CORE,
            libc::PR_SCHED_CORE_CREATE,
            0,
            libc::PR_SCHED_CORE_SCOPE_PROCESS_GROUP,
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens a descriptor of a process (pidfd_open(2)). For a child that nobody has reaped, the descriptor is
/// certain to name it, even when it is dead already.
///
/// # Errors
/// That of the kernel, `ESRCH` for no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes integers alone.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a new descriptor, which is small enough for its type, and only we know it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) })
}

/// Sends a signal to exactly the process of the descriptor (pidfd_send_signal(2)); 0 only checks.
///
/// # Errors
/// That of the kernel, `ESRCH` once the process has been reaped.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is permitted; the other arguments are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reaps the child of this descriptor if it has exited; `None` while it lives.
///
/// # Errors
/// That of the kernel, `ECHILD` if the process is no child of ours or was reaped.
pub fn wait(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    let waited = waitid(libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t, libc::WEXITED | libc::WNOHANG)?;
    Ok(waited.map(|(_, exit)| exit))
}

/// Whether the process of this descriptor is a child of ours, alive or dead and not yet reaped.
///
/// # Errors
/// That of the kernel.
pub fn is_child(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    match waitid(libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t, flags) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(false),
        Err(error) => Err(error),
    }
}

/// When a process was made, in clock ticks since boot (`starttime` of proc_pid_stat(5)). With its pid this names one
/// process for as long as the host is up.
///
/// # Errors
/// There is no such process, or `InvalidData` for a line of no known form.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let line = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses, which may itself hold blanks and parentheses.
    let rest = line.rsplit_once(')').map(|(_, rest)| rest);
    let field = rest.and_then(|rest| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    field.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Reaps a child, waiting for its end.
///
/// # Errors
/// That of the kernel.
pub fn wait_blocking(child: &Child) -> io::Result<Exit> {
    loop {
        match waitid(libc::P_PIDFD, child.pidfd.as_raw_fd() as libc::id_t, libc::WEXITED) {
            Ok(Some((_, exit))) => return Ok(exit),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The pid of some dead child that nobody has reaped yet. It stays one.
///
/// # Errors
/// That of the kernel; `ECHILD` (no children at all) is `None`.
pub fn peek_dead_child() -> io::Result<Option<i32>> {
    match waitid(libc::P_ALL, 0, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) {
        Ok(found) => Ok(found.map(|(pid, _)| pid)),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reaps the dead child of this pid and forgets its status.
///
/// # Errors
/// That of the kernel.
pub fn reap(pid: i32) -> io::Result<()> {
    waitid(libc::P_PID, pid as libc::id_t, libc::WEXITED | libc::WNOHANG).map(|_| ())
}

/// waitid(2). `nix` has it too, but fails on a death by a real-time signal after having reaped the child.
fn waitid(kind: libc::idtype_t, id: libc::id_t, flags: i32) -> io::Result<Option<(i32, Exit)>> {
    // SAFETY: all zeros are a valid siginfo_t; the kernel leaves it so if no child is in the state asked for.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writing during the call.
    if unsafe { libc::waitid(kind, id, &mut info, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: after waitid the SIGCHLD fields of the union are the valid ones; zeros mean that there was
    // none.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let exit = if info.si_code == libc::CLD_EXITED { Exit::Code(status) } else { Exit::Signal(status) };
    Ok(Some((pid, exit)))
}

/// Gives SIGCHLD its default disposition. A parent that ignores the signal hands that down through `execve`, and then
/// the kernel reaps children by itself: nobody learns how they ended (signal(7), waitpid(2)).
pub fn keep_children() {
    // SAFETY: no handler is installed, and the default disposition of SIGCHLD is to do nothing.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Sets a variable of this process's environment. Only a process of one thread may: others could be reading it, and the C library
/// has no lock for them (setenv(3)).
///
/// # Errors
/// `EBUSY` when there are other threads; a value with a NUL.
pub fn set_variable(name: &CStr, value: &Path) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    let value = CString::new(value.as_os_str().as_bytes())?;
    // SAFETY: both texts end with a NUL, and no other thread is there to read the environment meanwhile.
    match unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A short-lived copy of this process that does one thing which may sleep in the kernel.
#[derive(Debug)]
pub struct Helper {
    /// The process: code 0 for success.
    pub child: Child,
    /// Where it says that it is done, with [`DONE`], or else what went wrong, as a text of at most 32 KiB. Nothing
    /// arrives from a helper that died. Not blocking.
    pub report: OwnedFd,
}

/// The one byte in [`Helper::report`] of a helper that has done its work.
pub const DONE: u8 = 0;

/// Forks a copy of this process, which runs `work`, says in [`Helper::report`] how it went, and exits with code 0, or 1
/// after an error. The copy dies with the thread that made it.
///
/// What `work` returns is kept until the copy has ended, behind its report: descriptors whose closing takes long
/// delay nobody.
///
/// Other threads may run meanwhile if they share no lock with `work`: the copy lacks them, and with that whoever would
/// let go of a lock. The allocator is the exception, which fork(3) leaves usable.
///
/// # Errors
/// That of the kernel.
pub fn fork_helper<T>(work: impl FnOnce() -> Result<T, String>) -> io::Result<Helper> {
    let flags = nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK;
    let (report, writer) = nix::unistd::pipe2(flags)?;
    let parent = nix::unistd::getpid();
    // SAFETY: `work` waits for no lock of another thread (see above), so the copy needs none of them; it leaves by
    // `_exit`.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid > 0 {
        return Ok(Helper { child: Child { pid, pidfd: pidfd_open(pid)? }, report });
    }
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    // A parent that was killed since the fork sends no signal any more.
    let work = move || if nix::unistd::getppid() == parent { work() } else { Err("orphaned".to_owned()) };
    let code = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Ok(kept)) => {
            let _ = nix::unistd::write(&writer, &[DONE]);
            std::mem::forget(kept);
            0
        }
        Ok(Err(text)) => {
            // The pipe is empty and takes 64 KiB: this does not block.
            let bytes = text.as_bytes();
            let _ = nix::unistd::write(&writer, &bytes[..bytes.len().min(32 * 1024)]);
            1
        }
        Err(_) => 1,
    };
    // SAFETY: `_exit` runs no destructor and no exit handler of the process that we are a copy of.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    fn shell(script: &str) -> Command<'static> {
        let mut command = Command::new(Path::new("/bin/sh")).unwrap();
        command.argument("-c").unwrap().argument(script).unwrap();
        command
    }

    #[test]
    fn statuses_are_those_of_a_shell() {
        for (script, status) in
            [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("kill -40 $$", 168)]
        {
            let child = shell(script).spawn().unwrap();
            assert_eq!(wait_blocking(&child).unwrap().status(), status, "{script}");
            assert!(wait(child.pidfd.as_fd()).is_err(), "reaped once only");
        }
    }

    #[test]
    fn surroundings_are_those_that_were_asked_for() {
        let (stdin, stdin_writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        // Without the close-on-exec flag, as a careless parent of ours would leave it.
        let (output, output_writer) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&stdin_writer, b"from stdin").unwrap();
        drop(stdin_writer);
        let script = format!(
            "echo $A; pwd; test ! -e /proc/self/fd/{}; echo $?; cat </proc/self/fd/77",
            output.as_raw_fd()
        );
        let mut command = shell(&script);
        command.variable("A", "b c").unwrap().directory(Path::new("/proc")).unwrap();
        command.variable("PATH", "/bin:/usr/bin").unwrap();
        command.descriptor(77, stdin.as_fd()).descriptor(1, output_writer.as_fd());
        let child = command.spawn().unwrap();
        drop(output_writer);
        let mut text = String::new();
        std::fs::File::from(output).read_to_string(&mut text).unwrap();
        assert_eq!(text, "b c\n/proc\n0\nfrom stdin");
        assert!(wait_blocking(&child).unwrap().success());
    }

    #[test]
    fn ignored_and_blocked_signals_do_not_reach_the_child() {
        ignore(libc::SIGUSR2).unwrap();
        let mut set = nix::sys::signal::SigSet::empty();
        set.add(nix::sys::signal::Signal::SIGUSR2);
        set.thread_block().unwrap();
        let child = shell("kill -USR2 $$; exit 3").spawn().unwrap();
        assert_eq!(wait_blocking(&child).unwrap(), Exit::Signal(libc::SIGUSR2));
        set.thread_unblock().unwrap();
        // A real-time signal too, one that glibc would not let us reset.
        let ignored: [u64; 4] = [libc::SIG_IGN as u64, 0, 0, 0];
        for signal in [33, 64] {
            // SAFETY: the structure is a valid kernel sigaction: a handler and zeros.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    signal,
                    ignored.as_ptr(),
                    ptr::null_mut::<libc::c_void>(),
                    8,
                )
            };
            assert_eq!(result, 0);
        }
        let child = shell("grep -q 'SigIgn:.0*$' /proc/self/status").spawn().unwrap();
        assert!(wait_blocking(&child).unwrap().success());
    }

    #[test]
    fn a_failed_spawn_names_its_step_and_leaves_no_child() {
        let error = Command::new(Path::new("/nonexistent/program")).unwrap().spawn().unwrap_err();
        assert_eq!((error.step, error.source.raw_os_error()), ("execve", Some(libc::ENOENT)));
        let mut command = shell("true");
        command.directory(Path::new("/nonexistent")).unwrap();
        assert_eq!(command.spawn().unwrap_err().step, "chdir");
    }

    #[test]
    fn children_are_told_from_others_and_from_later_processes() {
        let child = shell("sleep 100").spawn().unwrap();
        assert!(is_child(child.pidfd.as_fd()).unwrap());
        assert!(!is_child(pidfd_open(1).unwrap().as_fd()).unwrap());
        assert!(!is_child(pidfd_open(std::process::id() as i32).unwrap().as_fd()).unwrap());
        let started = start_time(child.pid).unwrap();
        assert!(started >= start_time(std::process::id() as i32).unwrap());
        pidfd_send_signal(child.pidfd.as_fd(), libc::SIGKILL).unwrap();
        while peek_dead_child().unwrap() != Some(child.pid) {
            std::thread::yield_now();
        }
        assert!(is_child(child.pidfd.as_fd()).unwrap(), "until it is reaped");
        assert_eq!(start_time(child.pid).unwrap(), started);
        wait_blocking(&child).unwrap();
        assert!(!is_child(child.pidfd.as_fd()).unwrap_or(false));
    }

    #[test]
    fn a_signal_goes_to_the_process_of_the_descriptor() {
        let child = shell("sleep 100").spawn().unwrap();
        assert_eq!(wait(child.pidfd.as_fd()).unwrap(), None);
        let again = pidfd_open(child.pid).unwrap();
        pidfd_send_signal(again.as_fd(), libc::SIGKILL).unwrap();
        assert_eq!(wait_blocking(&child).unwrap(), Exit::Signal(libc::SIGKILL));
        assert!(pidfd_send_signal(again.as_fd(), 0).is_err());
    }

    #[test]
    fn programs_are_found_as_execvp_finds_them() {
        let found = find_program(OsStr::new("sh"), OsStr::new("/nonexistent:/bin")).unwrap();
        assert_eq!(found, Path::new("/bin/sh"));
        assert_eq!(find_program(OsStr::new("/bin/sh"), OsStr::new("")).unwrap(), Path::new("/bin/sh"));
        assert_eq!(find_program(OsStr::new("no-such-program"), OsStr::new("/bin")), None);
        assert_eq!(find_program(OsStr::new("/etc/passwd"), OsStr::new("/bin")), None);
    }

    #[test]
    fn nothing_is_found_by_a_relative_path() {
        // Tests run in the folder of their package.
        let folder = tempfile::tempdir_in(".").unwrap();
        std::os::unix::fs::symlink("/bin/sh", folder.path().join("here")).unwrap();
        let name = folder.path().file_name().unwrap();
        let relative = Path::new(name).join("here");
        assert!(relative.is_file());
        assert_eq!(find_program(relative.as_os_str(), OsStr::new("/bin")), None);
        assert_eq!(find_program(OsStr::new("here"), name), None);
        // An empty element means the working directory to a shell.
        assert_eq!(find_program(OsStr::new("Cargo.toml"), OsStr::new("")), None);
    }

    #[test]
    fn a_helper_reports_its_error() {
        let helper = fork_helper(|| Ok(())).unwrap();
        assert!(wait_blocking(&helper.child).unwrap().success());
        let mut byte = Vec::new();
        std::fs::File::from(helper.report).read_to_end(&mut byte).unwrap();
        assert_eq!(byte, [DONE]);
        let helper = fork_helper(|| Err::<(), _>("no luck".to_owned())).unwrap();
        assert_eq!(wait_blocking(&helper.child).unwrap(), Exit::Code(1));
        let mut text = String::new();
        std::fs::File::from(helper.report).read_to_string(&mut text).unwrap();
        assert_eq!(text, "no luck");
    }
}
