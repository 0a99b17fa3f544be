//! Tells when the kernel has killed a process of a container for want of memory.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::{Cgroup, pairs};
use crate::reactor::Async;

/// Watches the memory controller of a cgroup.
pub(crate) enum Watch {
    /// The first version signals an eventfd: when memory runs out, and when the cgroup is removed.
    V1 {
        /// The folder of the memory controller.
        folder: PathBuf,
        /// What is signalled.
        event: Async<OwnedFd>,
    },
    /// The second version modifies `memory.events`, of which only a growing `oom_kill` counts.
    V2 {
        /// The folder of the cgroup.
        folder: PathBuf,
        /// Tells of the modification.
        inotify: Async<Inotify>,
        /// The kills that have been reported.
        reported: Cell<u64>,
    },
}

impl Watch {
    /// Begins to watch; `None` if the cgroup has no memory controller.
    pub(crate) fn new(cgroup: &Cgroup) -> io::Result<Option<Watch>> {
        let Some(folder) = cgroup.controller("memory") else { return Ok(None) };
        if let Cgroup::V1(_) = cgroup {
            let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
            let control = std::fs::File::open(folder.join("memory.oom_control"))?;
            let registration = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
            std::fs::write(folder.join("cgroup.event_control"), registration)?;
            return Ok(Some(Watch::V1 { folder: folder.to_owned(), event: Async::new(event.into())? }));
        }
        Watch::unified(folder, kills(folder))
    }

    fn unified(folder: &Path, reported: u64) -> io::Result<Option<Watch>> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        match inotify.add_watch(&folder.join("memory.events"), AddWatchFlags::IN_MODIFY) {
            Ok(_) => {}
            Err(nix::errno::Errno::ENOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let (folder, reported) = (folder.to_owned(), Cell::new(reported));
        Ok(Some(Watch::V2 { folder, inotify: Async::new(inotify)?, reported }))
    }

    /// What [`Watch::restore`] needs beside the cgroup: the number of the event, or the kills that have been reported.
    pub(crate) fn save(&self, lend: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> (u32, Option<u64>) {
        match self {
            Watch::V1 { event, .. } => (lend(event.get().as_fd()), None),
            Watch::V2 { reported, .. } => (0, Some(reported.get())),
        }
    }

    /// The watch that was saved. What has happened since is not missed.
    ///
    /// # Errors
    /// The event is missing, or the cgroup cannot be watched.
    pub(crate) fn restore(
        cgroup: &Cgroup,
        event: u32,
        reported: Option<u64>,
        take: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<Option<Watch>> {
        let Some(folder) = cgroup.controller("memory") else { return Ok(None) };
        match (cgroup, reported) {
            // The kernel goes on to signal the same event.
            (Cgroup::V1(_), _) if event != 0 => {
                Ok(Some(Watch::V1 { folder: folder.to_owned(), event: Async::new(take(event)?)? }))
            }
            (Cgroup::V2(_), Some(reported)) => Watch::unified(folder, reported),
            _ => Ok(None),
        }
    }

    /// Waits until [`Watch::happened`] may have something new to tell.
    pub(crate) async fn changed(&self) {
        match self {
            Watch::V1 { event, .. } => event.readable().await,
            Watch::V2 { inotify, .. } => inotify.readable().await,
        }
    }

    /// Whether there were kills since the last time that this was asked. Returns at once.
    pub(crate) fn happened(&self) -> bool {
        match self {
            Watch::V1 { folder, event } => {
                event.clear_readable();
                nix::unistd::read(event.get(), &mut [0; 8]).is_ok() && folder.is_dir()
            }
            Watch::V2 { folder, inotify, reported } => {
                inotify.clear_readable();
                // What the events are is of no interest; they are read so that the next one is an edge again.
                while inotify.get().read_events().is_ok() {}
                let kills = kills(folder);
                kills > reported.replace(kills.max(reported.get()))
            }
        }
    }
}

fn kills(folder: &Path) -> u64 {
    let mut kills = 0;
    pairs(folder, "memory.events", |key, value| {
        if key == "oom_kill" {
            kills = value;
        }
    });
    kills
}
