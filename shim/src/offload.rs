//! Work that may sleep in the kernel for long, such as a write to a disk that is full or dead: it is done by helper
//! threads, so that the shim itself goes on.
//!
//! A thread waits a moment for more work when it is done, and then ends: an idle shim has one thread. Work that sleeps
//! keeps its thread and nobody else's.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::log;
use crate::reactor::Async;
use crate::sync::Condition;

/// How long a thread waits for more work.
const LINGER: Duration = Duration::from_millis(100);
/// The stack of a helper: it writes files and formats nothing but names.
const STACK: usize = 64 * 1024;

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    /// The threads that wait and that no job has been left for.
    idle: usize,
}

static POOL: Pool =
    Pool { state: Mutex::new(State { jobs: VecDeque::new(), idle: 0 }), work: Condvar::new() };

#[derive(Default)]
struct Gate {
    working: Cell<usize>,
    closed: Cell<usize>,
    changed: Condition,
}

thread_local! {
    static GATE: &'static Gate = Box::leak(Box::default());
}

/// While one lives, no helper works.
pub(crate) struct Quiet {
    gate: &'static Gate,
}

/// Waits until no helper is at work, and holds new work back until the guard is dropped: `execve` ends all other threads. A
/// disk that does not answer makes this take as long.
pub(crate) async fn quiesce() -> Quiet {
    let gate = GATE.with(|gate| *gate);
    gate.closed.set(gate.closed.get() + 1);
    let quiet = Quiet { gate };
    gate.changed.until(|| gate.working.get() == 0).await;
    quiet
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.gate.closed.set(self.gate.closed.get() - 1);
        self.gate.changed.changed();
    }
}

/// Work that is being done.
pub(crate) struct Running<T> {
    result: Arc<Mutex<Option<T>>>,
    bell: Option<Async<Arc<EventFd>>>,
    _admitted: Admitted,
}

/// The right to have work done.
pub(crate) struct Admitted {
    gate: &'static Gate,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.gate.working.set(self.gate.working.get() - 1);
        self.gate.changed.changed();
    }
}

/// Waits until nobody wants quiet.
pub(crate) async fn admitted() -> Admitted {
    let gate = GATE.with(|gate| *gate);
    gate.changed.until(|| gate.closed.get() == 0).await;
    gate.working.set(gate.working.get() + 1);
    Admitted { gate }
}

/// Has a helper do work, which goes on when what is returned is dropped.
///
/// Without a thread or a descriptor for it the work is done at once, and this thread sleeps if it does.
pub(crate) fn begin<T: Send + 'static>(
    admitted: Admitted,
    work: impl FnOnce() -> T + Send + 'static,
) -> Running<T> {
    let result = Arc::new(Mutex::new(None));
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = EventFd::from_flags(flags).map(Arc::new).map_err(std::io::Error::from);
    let bell = bell.and_then(|bell| Ok((Async::new(bell.clone())?, bell)));
    let (bell, ring) = match bell {
        Ok((bell, ring)) => (Some(bell), Some(ring)),
        Err(error) => {
            log::warn(format_args!("no descriptor for a helper thread: {error}"));
            (None, None)
        }
    };
    let slot = result.clone();
    let threaded = ring.is_some();
    let job: Job = Box::new(move || {
        let done = work();
        *lock(&slot) = Some(done);
        if let Some(ring) = ring {
            // It cannot overflow by one.
            let _ = ring.write(1);
        }
    });
    if threaded {
        submit(job)
    } else {
        job()
    }
    Running { result, bell, _admitted: admitted }
}

impl<T> Running<T> {
    /// Waits for the result.
    pub(crate) async fn done(self) -> T {
        if let Some(bell) = &self.bell {
            // It fails with nothing but `EAGAIN`, which is waited for.
            let _ = bell.read_with(|bell| Ok(bell.read()?)).await;
        }
        lock(&self.result).take().expect("a helper leaves its result before it rings")
    }
}

/// Has a helper do work, and waits for its result.
pub(crate) async fn wait_for<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    begin(admitted().await, work).done().await
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn submit(job: Job) {
    let mut state = lock(&POOL.state);
    state.jobs.push_back(job);
    if state.idle > 0 {
        state.idle -= 1;
        POOL.work.notify_one();
        return;
    }
    drop(state);
    // All threads share the heap of the first: one for each would cost as much as the rest of the shim.
    davit_sys::memory::share_one_heap();
    if let Err(error) = std::thread::Builder::new().stack_size(STACK).spawn(help) {
        log::warn(format_args!("no helper thread, writing may take long: {error}"));
        let job = lock(&POOL.state).jobs.pop_back();
        if let Some(job) = job {
            job();
        }
    }
}

/// The life of a thread.
fn help() {
    let mut state = lock(&POOL.state);
    loop {
        while let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = lock(&POOL.state);
        }
        state.idle += 1;
        let waited = POOL.work.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
        state = waited.0;
        if state.jobs.is_empty() {
            // Whoever left a job for a thread has taken it off the count. Another thread may have found the job.
            if state.idle > 0 {
                state.idle -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{Either, race, run, spawn};
    use crate::reactor::sleep;
    use std::sync::mpsc;

    #[test]
    fn work_is_done_elsewhere_and_a_sleeper_delays_nobody() {
        let (wake, sleeping) = mpsc::channel::<()>();
        let results = run(async move {
            let sleeper = begin(admitted().await, move || sleeping.recv().is_ok());
            let mut results = Vec::new();
            for number in 0..50 {
                results.push(wait_for(move || number).await);
            }
            wake.send(()).unwrap();
            assert!(sleeper.done().await);
            results
        });
        assert!(results.into_iter().eq(0..50));
    }

    #[test]
    fn quiet_waits_for_work_and_holds_new_work_back() {
        run(async {
            let (wake, sleeping) = mpsc::channel::<()>();
            let sleeper = spawn(async move { wait_for(move || sleeping.recv()).await });
            sleep(Duration::from_millis(5)).await;
            assert!(matches!(race(quiesce(), sleep(Duration::from_millis(20))).await, Either::Second(())));
            wake.send(()).unwrap();
            let quiet = quiesce().await;
            assert!(sleeper.await.is_ok());
            let late = spawn(async { wait_for(|| 5).await });
            sleep(Duration::from_millis(20)).await;
            assert_eq!(quiet.gate.working.get(), 0);
            drop(quiet);
            assert_eq!(late.await, 5);
        });
    }
}
