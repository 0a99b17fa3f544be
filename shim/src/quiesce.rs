//! What is under way and cannot be put into words, and the gate that holds more of it back.
//!
//! ```text
//!          close                   everything Busy has ended
//!  Open ──────────► Closed: what is Busy goes on ──────────► Quiet: an upgrade writes down the rest, and executes
//!   ▲                  │                                        │
//!   └──────────────────┴── the guard is dropped ────────────────┘
//! ```
//! An upgrade executes another program, and with that every task of this one is gone. What a task only waits for
//! is written down and waited for again by the new program; what it is in the middle of, a runtime that it has
//! called above all, has to come to its end first.

use std::cell::Cell;
use std::rc::Rc;

use crate::sync::Condition;

#[derive(Default)]
struct State {
    busy: Cell<usize>,
    closed: Cell<bool>,
    changed: Condition,
}

thread_local! {
    static STATE: Rc<State> = Rc::default();
}

fn state() -> Rc<State> {
    STATE.with(Rc::clone)
}

/// Something is under way that an upgrade has to wait for, as long as this lives.
pub(crate) struct Busy {
    state: Rc<State>,
}

impl Busy {
    /// Begins at once, also behind a closed gate: for what belongs to something that is under way already.
    pub(crate) fn begin() -> Busy {
        let state = state();
        state.busy.set(state.busy.get() + 1);
        Busy { state }
    }

    /// Begins as soon as the gate is open.
    pub(crate) async fn admitted() -> Busy {
        opened().await;
        Busy::begin()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.state.busy.set(self.state.busy.get() - 1);
        self.state.changed.changed();
    }
}

/// Waits until the gate is open.
pub(crate) async fn opened() {
    let state = state();
    state.changed.until(|| !state.closed.get()).await;
}

/// Keeps the gate closed.
pub(crate) struct Closed {
    state: Rc<State>,
}

/// Closes the gate. To be called by one at a time.
pub(crate) fn close() -> Closed {
    let state = state();
    state.closed.set(true);
    Closed { state }
}

impl Closed {
    /// Waits until nothing is under way.
    pub(crate) async fn quiet(&self) {
        self.state.changed.until(|| self.is_quiet()).await;
    }

    /// Whether nothing is under way.
    pub(crate) fn is_quiet(&self) -> bool {
        self.state.busy.get() == 0
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.state.closed.set(false);
        self.state.changed.changed();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::executor::{run, spawn};
    use crate::reactor::sleep;

    #[test]
    fn the_gate_holds_back_what_is_new_and_waits_for_what_is_not() {
        let order = run(async {
            let order = Rc::new(std::cell::RefCell::new(Vec::new()));
            let busy = Busy::begin();
            let closed = close();
            let said = order.clone();
            let later = spawn(async move {
                let _busy = Busy::admitted().await;
                said.borrow_mut().push("admitted");
            });
            let said = order.clone();
            spawn(async move {
                sleep(Duration::from_millis(1)).await;
                said.borrow_mut().push("ended");
                drop(busy);
            });
            closed.quiet().await;
            assert!(closed.is_quiet());
            order.borrow_mut().push("quiet");
            drop(closed);
            later.await;
            order.take()
        });
        assert_eq!(order, ["ended", "quiet", "admitted"]);
    }
}
