//! What a client writes for a process.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use crate::copy::{Moved, read_once, splice_once, write_once};
use crate::reactor::{Async, yield_now};
use crate::stdio::saved;

/// A copy from a client's FIFO to a process.
pub(crate) struct Input {
    /// `None` when nothing more will be copied: then the process has its end of input, too.
    ends: RefCell<Option<Rc<Ends>>>,
    /// What was read and not delivered.
    carry: RefCell<Vec<u8>>,
}

struct Ends {
    source: Async<OwnedFd>,
    sink: InputSink,
}

/// Where input goes to.
pub(crate) enum InputSink {
    /// The pipe that is the process's standard input.
    Pipe(Async<OwnedFd>),
    /// Its terminal.
    Terminal(Rc<Async<OwnedFd>>),
}

impl Input {
    /// From here to there.
    pub(crate) fn new(source: Async<OwnedFd>, sink: InputSink, carry: Vec<u8>) -> Input {
        Input { ends: RefCell::new(Some(Rc::new(Ends { source, sink }))), carry: RefCell::new(carry) }
    }

    /// Copies until both the client and the shim have closed the FIFO, or the process does not read any more.
    pub(crate) async fn run(&self) {
        let Some(ends) = self.ends.borrow().clone() else { return };
        // Broken pipes are the container's way to say that it has read enough.
        let _ = self.copy(&ends).await;
        self.ends.take();
    }

    async fn copy(&self, Ends { source, sink }: &Ends) -> io::Result<()> {
        let (sink, mut spliced) = match sink {
            InputSink::Pipe(pipe) => (pipe, true),
            InputSink::Terminal(terminal) => (&**terminal, false),
        };
        loop {
            let moved = if !self.carry.borrow().is_empty() {
                sink.writable().await;
                let moved = write_once(sink, &self.carry.borrow())?;
                if let Moved::Some(count) = moved {
                    self.carry.borrow_mut().drain(..count);
                }
                moved
            } else if spliced {
                source.readable().await;
                sink.writable().await;
                splice_once(source, sink)?
            } else {
                source.readable().await;
                read_once(source, |bytes| self.carry.borrow_mut().extend_from_slice(bytes))?
            };
            match moved {
                Moved::Some(_) => yield_now().await,
                Moved::Empty | Moved::Full => {}
                Moved::Unspliceable => spliced = false,
                Moved::End | Moved::Broken => return Ok(()),
            }
            if self.carry.borrow().is_empty() {
                self.carry.take();
            }
        }
    }

    /// Describes it; `fds` takes note of the descriptors. `None` if nothing more will be copied.
    pub(crate) fn save(&self, fds: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> Option<saved::Input> {
        let ends = self.ends.borrow();
        let Ends { source, sink } = ends.as_deref()?;
        Some(saved::Input {
            source: fds(source.get().as_fd()),
            sink: match sink {
                InputSink::Pipe(pipe) => fds(pipe.get().as_fd()),
                InputSink::Terminal(_) => 0,
            },
            carry: self.carry.borrow().clone(),
        })
    }
}
