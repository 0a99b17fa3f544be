//! Journals and events on their way through an upgrade.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use davit_shim_protocol::journal::Journal;

use super::{ContainerJournal, Outbox, Place, Queued};
use crate::state;

impl ContainerJournal {
    fn save(&self, lend: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> state::Journal {
        let journal = self.journal.borrow();
        let (file, path) = journal.file();
        state::Journal {
            file: lend(file),
            path: path.display().to_string(),
            length: journal.length(),
            exits: self.exits.borrow().values().cloned().collect(),
            running: self.running.borrow().values().cloned().collect(),
        }
    }

    /// The journal that was saved, as part of [`Journals`].
    ///
    /// # Errors
    /// Its file is missing.
    pub(crate) fn restore(
        saved: state::Journal,
        take: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<ContainerJournal> {
        let journal = Journal::resume(take(saved.file)?, PathBuf::from(saved.path), saved.length);
        let exits = saved.exits.into_iter().map(|exit| (exit.id.clone(), exit)).collect();
        let running = saved.running.into_iter().map(|start| (start.id.clone(), start)).collect();
        Ok(ContainerJournal {
            journal: RefCell::new(journal),
            exits: RefCell::new(exits),
            running: RefCell::new(running),
            pending: Cell::new(0),
        })
    }
}

/// The journals of containers and events, each once.
#[derive(Default)]
pub(crate) struct Journals(Vec<Rc<ContainerJournal>>);

impl Journals {
    /// The index of a journal, which is added if it is new.
    pub(crate) fn index(&mut self, journal: &Rc<ContainerJournal>) -> u32 {
        let known = self.0.iter().position(|known| Rc::ptr_eq(known, journal));
        let index = known.unwrap_or_else(|| {
            self.0.push(journal.clone());
            self.0.len() - 1
        });
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// Describes them, in the order of their indices.
    pub(crate) fn save(&self, lend: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> Vec<state::Journal> {
        self.0.iter().map(|journal| journal.save(lend)).collect()
    }
}

impl Outbox {
    /// Describes the queue for [`Outbox::restore`], beside the last sequence number. To be called while nothing is being
    /// sent.
    pub(crate) fn save(&self, journals: &mut Journals) -> (u64, Vec<state::Queued>) {
        let save = |queued: &Queued| match &queued.place {
            Place::Journal(journal, offset) => state::Queued {
                sequence: queued.sequence,
                journal: journals.index(journal),
                offset: *offset,
                event: None,
            },
            Place::Memory(event) => state::Queued {
                sequence: queued.sequence,
                event: Some(event.as_ref().clone()),
                ..state::Queued::default()
            },
        };
        (self.sequence.get(), self.queue.borrow().iter().map(save).collect())
    }

    /// Goes on where another queue was saved.
    pub(crate) fn restore(
        &self,
        sequence: u64,
        queue: Vec<state::Queued>,
        journals: &[Rc<ContainerJournal>],
    ) {
        self.sequence.set(sequence.max(self.sequence.get()));
        for queued in queue {
            let place = match queued.event {
                Some(event) => Place::Memory(Box::new(event)),
                None => {
                    let Some(journal) = journals.get(queued.journal as usize) else { continue };
                    journal.pending.set(journal.pending.get() + 1);
                    Place::Journal(journal.clone(), queued.offset)
                }
            };
            self.queue.borrow_mut().push_back(Queued { sequence: queued.sequence, place });
        }
        self.changed.changed();
    }
}
