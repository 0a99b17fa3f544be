//! What tasks wait for each other with. All of it lives on one thread, so there is nothing to lock: these
//! types only keep the wakers of who waits.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

/// A place to wait until something about shared state holds: the condition variable of a single thread.
#[derive(Default)]
pub(crate) struct Condition {
    wakers: RefCell<Vec<Waker>>,
}

impl Condition {
    /// Waits until `holds` returns true. It is asked now and after each [`Condition::changed`].
    pub(crate) async fn until(&self, mut holds: impl FnMut() -> bool) {
        poll_fn(|context| {
            if holds() {
                return Poll::Ready(());
            }
            self.register(context);
            Poll::Pending
        })
        .await;
    }

    /// Wakes everybody who waits, to look again.
    pub(crate) fn changed(&self) {
        for waker in self.wakers.take() {
            waker.wake();
        }
    }

    pub(crate) fn register(&self, context: &mut Context<'_>) {
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            wakers.push(context.waker().clone());
        }
    }
}

/// Mutual exclusion across `.await`.
#[derive(Default)]
pub(crate) struct Lock {
    held: Cell<bool>,
    condition: Condition,
}

/// Holds a [`Lock`] until it is dropped.
pub(crate) struct Held<'lock> {
    lock: &'lock Lock,
}

impl Lock {
    /// Waits until nobody holds the lock, and takes it.
    pub(crate) async fn lock(&self) -> Held<'_> {
        self.condition.until(|| !self.held.replace(true)).await;
        Held { lock: self }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.lock.held.set(false);
        self.lock.condition.changed();
    }
}
