//! Lanes: how many threads the work on one backend may hold.
//!
//! What blocks runs on the threads of one pool. A disk, a snapshotter or a mount that hangs keeps every thread that
//! touches it, for as long as it hangs. So the work on each backend goes through a lane of its own, which is narrower than
//! the pool: when the lane is full, callers wait without a thread, and all other backends go on.
//!
//! Work that has begun may wait for other work that has begun (that is what claims are for), but never for work that is
//! still to begin: nothing that holds a claim or a lock may enter a lane.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::{JoinError, spawn_blocking};

use crate::snapshotters;

/// The content store: more at once do not make a disk faster.
const CONTENT: usize = 32;
/// Each snapshotter. Most of this work is waiting for the metadata to be synced, which is done for many at a time.
const SNAPSHOTTER: usize = 48;
/// Each snapshotter in another process: calls that wait for it hold a thread for as long as it does not answer.
const PROXY: usize = 16;
/// The most of them.
pub const PROXIES: usize = 8;
/// Layers that go through programs of others, which may stop.
const PROGRAMS: usize = 8;
/// Layers being unpacked or made, which takes a CPU and some memory each.
const LAYERS: usize = 32;
/// Mounts that are held for clients.
const MOUNTS: usize = 16;
/// The runtime: bundles, whose removal may have to unmount something.
const RUNTIME: usize = 64;
/// What reads the history, piece by piece.
const HISTORY: usize = 4;
/// Transfers at once; others wait for their turn.
pub const TRANSFERS: usize = 8;
/// Transfers beside these that wait for other processes, which may stop.
pub const PROXY_TRANSFERS: usize = 4;
/// Transfers of archives at once, beside these: their clients may send or take nothing for as long as they like.
pub const ARCHIVES: usize = 16;
/// The threads of a transfer: three layers and a document.
const TRANSFER: usize = 4;

/// The start and the end of the daemon and the collector.
const OTHERS: usize = 40;

/// The most threads of the pool: all lanes may be stuck, and the others still find one. A thread that has nothing to do
/// ends.
pub const THREADS: usize = CONTENT
    + MOUNTS
    + SNAPSHOTTER * snapshotters::COUNT
    + PROXY * PROXIES
    + PROGRAMS
    + LAYERS
    + RUNTIME
    + HISTORY
    + (TRANSFERS + PROXY_TRANSFERS) * TRANSFER
    + ARCHIVES
    + OTHERS;

/// The way to the threads for the work on one backend. Clones are the same lane.
#[derive(Debug, Clone)]
pub struct Lane {
    permits: Arc<Semaphore>,
}

impl Lane {
    fn new(width: usize) -> Lane {
        Lane { permits: Arc::new(Semaphore::new(width)) }
    }

    /// A lane for the content store.
    pub fn content() -> Lane {
        Lane::new(CONTENT)
    }

    /// A lane for one snapshotter.
    pub fn snapshotter() -> Lane {
        Lane::new(SNAPSHOTTER)
    }

    /// A lane for one snapshotter in another process.
    pub fn proxy() -> Lane {
        Lane::new(PROXY)
    }

    /// A lane for layers that go through programs of others.
    pub fn programs() -> Lane {
        Lane::new(PROGRAMS)
    }

    /// A lane for layers: two more than there are CPUs, because some wait for the disk.
    pub fn layers() -> Lane {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Lane::new(LAYERS.min(cpus + 2))
    }

    /// A lane for the mounts that are held for clients.
    pub fn mounts() -> Lane {
        Lane::new(MOUNTS)
    }

    /// A lane for the runtime.
    pub fn runtime() -> Lane {
        Lane::new(RUNTIME)
    }

    /// A lane for what reads the history.
    pub fn history() -> Lane {
        Lane::new(HISTORY)
    }

    /// Runs work that blocks, in its turn. If the caller goes away the work is not begun, or runs to its end.
    ///
    /// # Errors
    /// The work panicked, or the daemon ends.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let permit = self.permits.clone().acquire_owned().await.expect("a lane is never closed");
        let held = move || {
            // The thread gives it back, not the caller: who goes away does not free the thread.
            let _permit = permit;
            work()
        };
        spawn_blocking(held).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_backend_that_hangs_stops_no_other() {
        let (hung, well) = (Lane::new(2), Lane::new(2));
        let (release, hold) = mpsc::channel::<()>();
        let hold = Arc::new(std::sync::Mutex::new(hold));
        let (begun, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let mut callers = Vec::new();
        for number in 0..8 {
            let (hung, hold, begun) = (hung.clone(), hold.clone(), begun.clone());
            callers.push(tokio::spawn(async move {
                let work = move || {
                    begun.send(number).unwrap();
                    let _ = hold.lock().unwrap().recv();
                };
                hung.run(work).await.unwrap();
            }));
        }
        for _ in 0..2 {
            timeout(LIMIT, seen.recv()).await.unwrap();
        }
        assert_eq!(hung.permits.available_permits(), 0);
        // Whoever gives up waiting leaves nothing behind, and a caller that goes away does not free a stuck thread.
        assert!(timeout(Duration::from_millis(1), hung.run(|| ())).await.is_err());
        assert!(seen.try_recv().is_err(), "only two have begun");
        assert_eq!(timeout(LIMIT, well.run(|| 7)).await.unwrap().unwrap(), 7);
        drop(release);
        for caller in callers {
            timeout(LIMIT, caller).await.unwrap().unwrap();
        }
        assert_eq!(hung.permits.available_permits(), 2);
    }

    #[tokio::test]
    async fn a_panic_and_a_lost_caller_give_the_thread_back() {
        let lane = Lane::new(1);
        assert!(lane.run(|| panic!("expected by this test")).await.is_err());
        let (release, hold) = mpsc::channel::<()>();
        let (begun, seen) = tokio::sync::oneshot::channel();
        let work = move || {
            begun.send(()).unwrap();
            let _ = hold.recv();
        };
        let caller = tokio::spawn({
            let lane = lane.clone();
            async move { lane.run(work).await }
        });
        timeout(LIMIT, seen).await.unwrap().unwrap();
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        assert_eq!(lane.permits.available_permits(), 0, "the thread is still held");
        drop(release);
        timeout(LIMIT, lane.run(|| ())).await.unwrap().unwrap();
    }
}
