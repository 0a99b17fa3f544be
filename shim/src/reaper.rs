//! Waits for children, and buries the orphans that come to us as their subreaper.
//!
//! A process that somebody waits for is reaped through its own pidfd, by that waiter alone, who must do so as soon as it is
//! dead: the kernel shows one dead child at a time, and behind one that stays no other is seen. All others are orphans:
//! processes of containers whose parents have died, and those that serve a container's filesystem. They are reaped when
//! `SIGCHLD` says that there may be one, but not while a runtime is starting a process: the new process is an orphan too
//! until its pid file has been read, and it must stay a zombie until then, so that its pid is not given to another one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use davit_sys::process::{self, Child, Exit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::reactor::Async;
use crate::sync::Condition;

#[derive(Default)]
struct Reaper {
    awaited: RefCell<BTreeSet<i32>>,
    starting: Cell<usize>,
    /// True when there may be an orphan that could not be reaped when it died.
    pending: Cell<bool>,
    changed: Condition,
}

thread_local! {
    static REAPER: Reaper = Reaper::default();
}

/// While one of these lives, orphans stay zombies.
pub(crate) struct Starting;

impl Starting {
    /// To be taken before a runtime is spawned that will leave us a process.
    pub(crate) fn begin() -> Starting {
        REAPER.with(|reaper| reaper.starting.set(reaper.starting.get() + 1));
        Starting
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let _ = REAPER.try_with(|reaper| {
            reaper.starting.set(reaper.starting.get() - 1);
            reaper.look();
        });
    }
}

impl Reaper {
    fn look(&self) {
        self.pending.set(true);
        self.changed.changed();
    }
}

/// A child or adopted process that will be waited for.
pub(crate) struct Awaited {
    /// Its pid.
    pub(crate) pid: i32,
    pidfd: Async<OwnedFd>,
    /// The pid is among the awaited ones. Once it is reaped, the kernel may give it to another process of
    /// ours.
    claimed: Cell<bool>,
}

impl Awaited {
    /// Claims a child. From now on only [`Awaited::exit`] reaps it.
    pub(crate) fn child(child: Child) -> io::Result<Awaited> {
        let pidfd = Async::new(child.pidfd)?;
        REAPER.with(|reaper| reaper.awaited.borrow_mut().insert(child.pid));
        Ok(Awaited { pid: child.pid, pidfd, claimed: Cell::new(true) })
    }

    /// Claims a process that a runtime has left to us. To be called under [`Starting`].
    ///
    /// # Errors
    /// That of the kernel. `InvalidData` for a process that cannot have been left to us, whatever a runtime says: it is no
    /// child of ours, or somebody waits for it already. It must neither be waited for nor killed.
    pub(crate) fn adopted(pid: i32) -> io::Result<Awaited> {
        let pidfd = process::pidfd_open(pid)?;
        let ours = process::is_child(pidfd.as_fd())?;
        if !ours || REAPER.with(|reaper| reaper.awaited.borrow().contains(&pid)) {
            let text = "the runtime has named a process that is not the container's";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Awaited::child(Child { pid, pidfd })
    }

    /// Claims a process again that an earlier program of this process has claimed: it is our child still.
    pub(crate) fn handed_on(pid: i32, pidfd: OwnedFd) -> io::Result<Awaited> {
        Awaited::child(Child { pid, pidfd })
    }

    /// Its descriptor.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.pidfd.get().as_fd()
    }

    /// Whether its end has been seen, and its pid may be another one's.
    pub(crate) fn is_reaped(&self) -> bool {
        !self.claimed.get()
    }

    /// Sends a signal to exactly this process.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        process::pidfd_send_signal(self.pidfd.get().as_fd(), signal)
    }

    /// Waits for the end of the process. Also tells when that was.
    ///
    /// # Errors
    /// That of the kernel: the process is no child of ours.
    pub(crate) async fn exit(&self) -> io::Result<(Exit, SystemTime)> {
        self.pidfd
            .read_with(|pidfd| match process::wait(pidfd.as_fd())? {
                Some(exit) => {
                    self.give_up();
                    Ok((exit, SystemTime::now()))
                }
                None => Err(io::ErrorKind::WouldBlock.into()),
            })
            .await
    }

    fn give_up(&self) {
        if self.claimed.replace(false) {
            let _ = REAPER.try_with(|reaper| {
                reaper.awaited.borrow_mut().remove(&self.pid);
                reaper.look();
            });
        }
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// A child that is of no use to anybody when this is dropped. One that has ended cannot be killed any more, whoever has its
/// pid by then.
pub(crate) struct KilledOnDrop(Option<Awaited>);

impl KilledOnDrop {
    /// Kills this one.
    pub(crate) fn new(child: Awaited) -> KilledOnDrop {
        KilledOnDrop(Some(child))
    }

    /// Lets it live.
    pub(crate) fn spare(mut self) -> Awaited {
        self.0.take().expect("only this takes it, and that once")
    }
}

impl Deref for KilledOnDrop {
    type Target = Awaited;

    fn deref(&self) -> &Awaited {
        self.0.as_ref().expect("it is taken by what consumes this")
    }
}

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        if let Some(child) = &self.0 {
            let _ = child.signal(nix::libc::SIGKILL);
        }
    }
}

/// Reaps orphans for ever. `SIGCHLD` must be blocked already.
pub(crate) async fn bury_orphans() -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let signals = Async::new(signals)?;
    // An earlier program of this process may have been told of a death and not come to it.
    REAPER.with(Reaper::look);
    crate::executor::spawn(async {
        loop {
            until_pending().await;
            bury();
        }
    });
    loop {
        signals
            .read_with(|signals| match signals.read_signal()? {
                Some(_) => Ok(()),
                None => Err(io::ErrorKind::WouldBlock.into()),
            })
            .await?;
        REAPER.with(Reaper::look);
    }
}

async fn until_pending() {
    std::future::poll_fn(|context| {
        REAPER.with(|reaper| {
            if reaper.pending.get() && reaper.starting.get() == 0 {
                return std::task::Poll::Ready(());
            }
            reaper.changed.register(context);
            std::task::Poll::Pending
        })
    })
    .await;
}

fn bury() {
    REAPER.with(|reaper| {
        reaper.pending.set(false);
        while let Ok(Some(pid)) = process::peek_dead_child() {
            if reaper.awaited.borrow().contains(&pid) {
                // Whoever waits for it reaps it, and that makes us look again for what it hides.
                return;
            }
            if process::reap(pid).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use davit_sys::process::Command;

    use super::*;
    use crate::executor::run;

    #[test]
    fn a_pid_that_is_given_out_again_stays_claimed() {
        run(async {
            let child = Command::new(Path::new("/bin/true")).unwrap().spawn().unwrap();
            let first = Awaited::child(child).unwrap();
            assert!(first.exit().await.unwrap().0.success());
            let claim = |pid| REAPER.with(|reaper| reaper.awaited.borrow_mut().insert(pid));
            assert!(claim(first.pid), "nobody claims the pid of a process that is reaped");
            let pid = first.pid;
            drop(first);
            assert!(!claim(pid), "the claim on the next process of this pid is its own");
            REAPER.with(|reaper| reaper.awaited.borrow_mut().remove(&pid));
        });
    }
}
