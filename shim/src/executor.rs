//! A single-threaded executor: tasks, a queue of those that can go on, and the reactor to wait in.
//!
//! The shim must not cost a thread, so there is exactly one, and it sleeps in `epoll_wait`. Tasks are only
//! ever polled between two such sleeps, one at a time: state shared by tasks needs no lock, and a method
//! without `.await` is atomic. A task that needs the others to stand still for longer asks for [`alone`].

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::reactor;

/// The ids of the tasks to poll. Behind a mutex because a `Waker` is `Send` by its type; here it never
/// contends.
type Ready = Arc<Mutex<VecDeque<u64>>>;

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    waker: Waker,
}

#[derive(Default)]
struct Executor {
    tasks: RefCell<BTreeMap<u64, Task>>,
    ready: Ready,
    next: Cell<u64>,
    /// The task that is being polled.
    current: Cell<u64>,
    /// The only task that may be polled.
    alone: Cell<Option<u64>>,
    /// The others that would be polled.
    held: RefCell<VecDeque<u64>>,
}

thread_local! {
    static EXECUTOR: Executor = Executor::default();
}

struct TaskWaker {
    id: u64,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if ready.back() != Some(&self.id) {
            ready.push_back(self.id);
        }
    }
}

struct JoinState<T> {
    result: RefCell<Option<T>>,
    waker: RefCell<Option<Waker>>,
}

/// The result of a spawned task, to be awaited or not: dropping it does not stop the task.
pub(crate) struct JoinHandle<T> {
    state: Rc<JoinState<T>>,
}

impl<T> Future for JoinHandle<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match self.state.result.borrow_mut().take() {
            Some(result) => Poll::Ready(result),
            None => {
                *self.state.waker.borrow_mut() = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Starts a task that runs to its end, whether somebody awaits its result or not.
pub(crate) fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
    let state = Rc::new(JoinState { result: RefCell::new(None), waker: RefCell::new(None) });
    let task_state = state.clone();
    EXECUTOR.with(|executor| {
        executor.add(Box::pin(async move {
            let result = future.await;
            *task_state.result.borrow_mut() = Some(result);
            if let Some(waker) = task_state.waker.borrow_mut().take() {
                waker.wake();
            }
        }));
    });
    JoinHandle { state }
}

impl Executor {
    fn add(&self, future: Pin<Box<dyn Future<Output = ()>>>) {
        let id = self.next.get();
        self.next.set(id + 1);
        let waker = Waker::from(Arc::new(TaskWaker { id, ready: self.ready.clone() }));
        waker.wake_by_ref();
        self.tasks.borrow_mut().insert(id, Task { future, waker });
    }

    /// Polls each task of the queue once. Returns whether tasks are ready again by then: a task that never
    /// waits must not keep the others from learning of their events.
    fn poll_ready(&self) -> bool {
        let ready = || self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = ready().len();
        for _ in 0..batch {
            let next = ready().pop_front();
            let Some(id) = next else { break };
            if self.alone.get().is_some_and(|alone| alone != id) {
                self.held.borrow_mut().push_back(id);
                continue;
            }
            // The task is taken out while it runs, so that it can spawn others; an id whose task has ended
            // meanwhile is stale.
            let taken = self.tasks.borrow_mut().remove(&id);
            let Some(mut task) = taken else { continue };
            let waker = task.waker.clone();
            self.current.set(id);
            if task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                self.tasks.borrow_mut().insert(id, task);
            }
        }
        !ready().is_empty()
    }
}

/// Runs tasks on this thread until `main` ends; the others are dropped with the thread.
pub(crate) fn run<T: 'static>(main: impl Future<Output = T> + 'static) -> T {
    let handle = spawn(main);
    EXECUTOR.with(|executor| {
        loop {
            let more = executor.poll_ready();
            if let Some(result) = handle.state.result.borrow_mut().take() {
                return result;
            }
            reactor::wait(!more);
        }
    })
}

/// While it lives, the task that asked for it is the only one that goes on.
pub(crate) struct Alone;

/// Has all other tasks stand still. To be called by one task at a time.
pub(crate) fn alone() -> Alone {
    EXECUTOR.with(|executor| executor.alone.set(Some(executor.current.get())));
    Alone
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = EXECUTOR.try_with(|executor| {
            executor.alone.set(None);
            let mut ready = executor.ready.lock().unwrap_or_else(PoisonError::into_inner);
            ready.append(&mut executor.held.borrow_mut());
        });
    }
}

/// The one of two futures that ended first.
pub(crate) enum Either<A, B> {
    /// The first, which is preferred if both have ended.
    First(A),
    /// The second.
    Second(B),
}

/// Waits for the first of two futures and drops the other: only for futures that lose nothing by that.
pub(crate) async fn race<A, B>(
    first: impl Future<Output = A>,
    second: impl Future<Output = B>,
) -> Either<A, B> {
    let mut first = std::pin::pin!(first);
    let mut second = std::pin::pin!(second);
    poll_fn(|context| {
        if let Poll::Ready(result) = first.as_mut().poll(context) {
            return Poll::Ready(Either::First(result));
        }
        second.as_mut().poll(context).map(Either::Second)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::sleep;
    use crate::sync::{Condition, Lock};
    use std::time::Duration;

    #[test]
    fn tasks_interleave_and_return_their_results() {
        let order = Rc::new(RefCell::new(Vec::new()));
        let seen = order.clone();
        let sum = run(async move {
            let handles: Vec<_> = (0..3u64)
                .map(|index| {
                    let order = order.clone();
                    spawn(async move {
                        sleep(Duration::from_millis(30 - 10 * index)).await;
                        order.borrow_mut().push(index);
                        index
                    })
                })
                .collect();
            let mut sum = 0;
            for handle in handles {
                sum += handle.await;
            }
            sum
        });
        assert_eq!(sum, 3);
        assert_eq!(*seen.borrow(), [2, 1, 0]);
    }

    #[test]
    fn a_race_is_won_by_the_faster() {
        let winner = run(async { race(std::future::pending::<()>(), sleep(Duration::from_millis(1))).await });
        assert!(matches!(winner, Either::Second(())));
        let winner = run(async { race(async { 1 }, async { 2 }).await });
        assert!(matches!(winner, Either::First(1)));
    }

    #[test]
    fn a_task_alone_sees_nothing_change() {
        run(async {
            let count = Rc::new(Cell::new(0));
            let counted = count.clone();
            let counting = spawn(async move {
                while counted.get() < 1000 {
                    counted.set(counted.get() + 1);
                    crate::reactor::yield_now().await;
                }
            });
            sleep(Duration::ZERO).await;
            let alone = alone();
            let before = count.get();
            sleep(Duration::from_millis(2)).await;
            assert_eq!(count.get(), before);
            drop(alone);
            counting.await;
            assert_eq!(count.get(), 1000);
        });
    }

    #[test]
    fn a_lock_admits_one_at_a_time() {
        let (inside, most) = run(async {
            let lock = Rc::new(Lock::default());
            let inside = Rc::new(Cell::new(0));
            let most = Rc::new(Cell::new(0));
            let handles: Vec<_> = (0..10)
                .map(|_| {
                    let (lock, inside, most) = (lock.clone(), inside.clone(), most.clone());
                    spawn(async move {
                        let _held = lock.lock().await;
                        inside.set(inside.get() + 1);
                        most.set(most.get().max(inside.get()));
                        sleep(Duration::from_millis(1)).await;
                        inside.set(inside.get() - 1);
                    })
                })
                .collect();
            for handle in handles {
                handle.await;
            }
            (inside.get(), most.get())
        });
        assert_eq!((inside, most), (0, 1));
    }

    #[test]
    fn a_condition_wakes_all_who_wait_for_it() {
        let woken = run(async {
            let condition = Rc::new(Condition::default());
            let level = Rc::new(Cell::new(0));
            let handles: Vec<_> = (1..=5)
                .map(|wanted| {
                    let (condition, level) = (condition.clone(), level.clone());
                    spawn(async move {
                        condition.until(|| level.get() >= wanted).await;
                        level.get()
                    })
                })
                .collect();
            for value in 1..=5 {
                level.set(value);
                condition.changed();
                sleep(Duration::ZERO).await;
            }
            let mut woken = Vec::new();
            for handle in handles {
                woken.push(handle.await);
            }
            woken
        });
        assert!(woken.iter().zip(1..=5).all(|(seen, wanted)| *seen >= wanted), "{woken:?}");
    }
}
