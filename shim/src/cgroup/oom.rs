//! Tells when the kernel has killed a process of a container for want of memory.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
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
        event: Async<EventFd>,
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
            return Ok(Some(Watch::V1 { folder: folder.to_owned(), event: Async::new(event)? }));
        }
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        match inotify.add_watch(&folder.join("memory.events"), AddWatchFlags::IN_MODIFY) {
            Ok(_) => {}
            Err(nix::errno::Errno::ENOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let reported = Cell::new(kills(folder));
        Ok(Some(Watch::V2 { folder: folder.to_owned(), inotify: Async::new(inotify)?, reported }))
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
                event.get().read().is_ok() && folder.is_dir()
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
