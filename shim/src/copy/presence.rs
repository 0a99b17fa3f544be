//! Whether a FIFO has a reader. The kernel tells a writer when the last one leaves (`POLLERR`), but not when one comes:
//! that is learned from an inotify watch, which exists only while somebody waits for it.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::executor::race;
use crate::log;
use crate::reactor::{Async, sleep};
use crate::sync::Condition;

/// How often it is looked when the kernel grants no watch: root has 128 of them by default.
const INTERVAL: Duration = Duration::from_millis(250);

/// One watch for all FIFOs without a reader. Which of them was opened does not matter: each waiter looks at its own.
struct Watch {
    inotify: Async<Inotify>,
    opened: Cell<u64>,
    changed: Condition,
}

thread_local! {
    static WATCH: RefCell<Weak<Watch>> = const { RefCell::new(Weak::new()) };
}

/// True if the FIFO has a reader at present.
pub(crate) fn has_reader(writer: impl AsFd) -> bool {
    let mut polled = [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut polled, PollTimeout::ZERO) {
        Ok(_) => !polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)),
        Err(_) => true,
    }
}

/// Waits until a FIFO has a reader.
pub(crate) async fn reader(writer: impl AsFd) {
    // Mostly it has one. A watch that is closed again costs more than it seems: the kernel lets the closing wait for
    // everyone who may just be looking at watches, for milliseconds on a busy machine, and with it this whole process.
    if has_reader(&writer) {
        return;
    }
    let watch = match watch(&writer) {
        Ok(watch) => watch,
        Err(error) => {
            log::debug(format_args!("no watch for the reader of a FIFO: {error}"));
            while !has_reader(&writer) {
                sleep(INTERVAL).await;
            }
            return;
        }
    };
    // The watch was there before this look: a reader that comes now is seen by one or the other.
    while !has_reader(&writer) {
        let seen = watch.opened.get();
        race(watch.changed.until(|| watch.opened.get() != seen), watch.next()).await;
    }
}

fn watch(writer: &impl AsFd) -> io::Result<Rc<Watch>> {
    let watch = match WATCH.with_borrow(Weak::upgrade) {
        Some(watch) => watch,
        None => {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            let watch = Rc::new(Watch {
                inotify: Async::new(inotify)?,
                opened: Cell::new(0),
                changed: Condition::default(),
            });
            WATCH.set(Rc::downgrade(&watch));
            watch
        }
    };
    let path = PathBuf::from(format!("/proc/self/fd/{}", writer.as_fd().as_raw_fd()));
    watch.inotify.get().add_watch(&path, AddWatchFlags::IN_OPEN)?;
    Ok(watch)
}

impl Watch {
    /// Waits for events, and tells all who wait on this watch.
    async fn next(&self) {
        let events = self.inotify.read_with(|inotify| Ok(inotify.read_events()?)).await;
        if events.is_err() {
            // It has no reason to fail; if it did, this would not be a loop without a pause.
            sleep(INTERVAL).await;
        }
        self.opened.set(self.opened.get() + 1);
        self.changed.changed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{Either, run, spawn};
    use crate::stdio::open_fifo;
    use nix::fcntl::OFlag;
    use nix::sys::stat::Mode;
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;
    use std::time::Instant;

    #[test]
    fn readers_are_seen_to_come_and_to_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let open =
            move || File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&path).unwrap();
        let path = folder.path().join("fifo");
        run(async move {
            let writers: Vec<_> = (0..3).map(|_| Rc::new(open_fifo(&path).unwrap())).collect();
            for _ in 0..3 {
                // What another test forks has the reader as well, until it executes.
                let begun = Instant::now();
                while has_reader(&*writers[0]) {
                    assert!(begun.elapsed() < Duration::from_secs(60), "a reader stays");
                    sleep(Duration::from_millis(1)).await;
                }
                let waiting: Vec<_> = writers
                    .iter()
                    .map(|writer| {
                        let writer = writer.clone();
                        spawn(async move { reader(&*writer).await })
                    })
                    .collect();
                let mut waiting = waiting;
                let all = async {
                    for wait in &mut waiting {
                        wait.await;
                    }
                };
                assert!(matches!(race(all, sleep(Duration::from_millis(20))).await, Either::Second(())));
                let reader = open();
                for wait in waiting {
                    wait.await;
                }
                assert!(has_reader(&*writers[0]));
                drop(reader);
            }
            assert!(WATCH.with_borrow(Weak::upgrade).is_none(), "nobody waits, so nothing is watched");
        });
    }
}
