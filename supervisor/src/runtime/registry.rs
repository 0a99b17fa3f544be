//! Which tasks there are, and the way to the owner of each.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use davit_model::error::chain;
use davit_shim_protocol::bundle::{self, Bundle, PutAway};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;
use tracing::{Instrument, warn};

use super::create::blocking;
use super::owner::Message;
use super::sandbox;
use super::shim::Shim;
use super::transitions::Phase;
use super::{Config, Error};
use crate::events::Hub;
use crate::lane::Lane;

/// What all parts of the runtime share.
pub(super) struct Shared {
    pub(super) config: Config,
    /// Who is told of events.
    pub(super) hub: Hub,
    /// Where what blocks runs.
    pub(super) lane: Lane,
    /// The sandboxes with a shim of their own, which tasks can join.
    pub(super) sandboxes: sandbox::Registry,
    /// Short sections only; never held over an await.
    tasks: Mutex<BTreeMap<Key, Handle>>,
    /// Removals that nobody waits for but the end of the daemon.
    removals: TaskTracker,
}

/// Namespace and container.
type Key = (String, String);

/// The way to the owner of one container.
#[derive(Clone)]
pub(super) struct Handle {
    pub(super) mailbox: mpsc::Sender<Message>,
    pub(super) view: watch::Receiver<View>,
    /// How long a call waits until it is decided whether there is a shim for it.
    pub(super) patience: Duration,
}

/// What an owner lets everyone see, so that most calls need not ask it.
#[derive(Clone)]
pub(super) struct View {
    pub(super) phase: Phase,
    pub(super) pid: u32,
    /// The connection, from its making until its end.
    pub(super) shim: Option<Shim>,
    /// The shim has published the deletion of the task.
    pub(super) delete_published: bool,
}

impl Handle {
    /// Gives the owner a message; false when there is no owner any more.
    pub(super) async fn tell(&self, message: Message) -> bool {
        self.mailbox.send(message).await.is_ok()
    }

    /// The init process, zero when not known.
    pub(super) fn pid(&self) -> u32 {
        self.view.borrow().pid
    }

    /// The shim to send a call to; waits while that is not decided, but not for ever: what a dead shim has left may
    /// sleep in the kernel.
    pub(super) async fn ready(&self, id: &str) -> Result<Shim, Error> {
        match tokio::time::timeout(self.patience, self.decided(id)).await {
            Ok(decided) => decided,
            Err(_) => Err(Error::NotCleanedUp { id: id.to_owned() }),
        }
    }

    /// Whether the shim has published the deletion.
    pub(super) fn is_delete_published(&self) -> bool {
        self.view.borrow().delete_published
    }

    /// Returns when the shim has published the deletion, or the owner is gone.
    pub(super) async fn delete_published(&self) {
        let _ = self.view.clone().wait_for(|view| view.delete_published).await;
    }

    async fn decided(&self, id: &str) -> Result<Shim, Error> {
        let not_found = || Error::NotFound { id: id.to_owned() };
        let mut view = self.view.clone();
        loop {
            {
                let view = view.borrow_and_update();
                match view.phase {
                    Phase::Live | Phase::Deleting => return view.shim.clone().ok_or_else(not_found),
                    Phase::Creating | Phase::Gone => return Err(not_found()),
                    Phase::Unreachable => return Err(Error::Unreachable { id: id.to_owned() }),
                    Phase::Loading | Phase::Cleaning => {}
                }
            }
            view.changed().await.map_err(|_| not_found())?;
        }
    }
}

impl Shared {
    pub(super) fn new(config: Config, hub: Hub) -> Shared {
        let (tasks, removals) = (Mutex::new(BTreeMap::new()), TaskTracker::new());
        let sandboxes = sandbox::Registry::default();
        Shared { config, hub, lane: Lane::runtime(), sandboxes, tasks, removals }
    }

    /// The bundle of a container, whether or not it exists.
    pub(super) fn bundle(&self, namespace: &str, id: &str) -> Bundle {
        Bundle::new(&self.config.state, &self.config.root, namespace, id)
    }

    pub(super) fn get(&self, namespace: &str, id: &str) -> Option<Handle> {
        self.tasks().get(&(namespace.to_owned(), id.to_owned())).cloned()
    }

    /// Enters a task, unless there is one: then that is given back.
    pub(super) fn insert(&self, namespace: &str, id: &str, handle: Handle) -> Result<(), Handle> {
        match self.tasks().entry((namespace.to_owned(), id.to_owned())) {
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(handle);
                Ok(())
            }
            std::collections::btree_map::Entry::Occupied(entry) => Err(entry.get().clone()),
        }
    }

    pub(super) fn remove(&self, namespace: &str, id: &str) {
        self.tasks().remove(&(namespace.to_owned(), id.to_owned()));
    }

    /// The tasks of a namespace, by container.
    pub(super) fn in_namespace(&self, namespace: &str) -> Vec<(String, Handle)> {
        let tasks = self.tasks();
        let of_namespace = tasks.range((namespace.to_owned(), String::new())..);
        of_namespace
            .take_while(|((of, _), _)| of == namespace)
            .map(|((_, id), handle)| (id.clone(), handle.clone()))
            .collect()
    }

    /// Whether a task other than this one has its shim at the same address: they are a group.
    pub(super) fn address_shared(&self, namespace: &str, id: &str, address: &str) -> bool {
        self.tasks().iter().any(|((other_namespace, other_id), handle)| {
            (other_namespace, other_id) != (&namespace.to_owned(), &id.to_owned())
                && handle.view.borrow().shim.as_ref().is_some_and(|shim| shim.address() == address)
        })
    }

    /// Removes a bundle that is out of use, in the background.
    pub(super) fn remove_later(&self, bundle: PutAway) {
        let lane = self.lane.clone();
        let remove = async move {
            if let Err(error) = blocking(&lane, move || bundle.remove()).await {
                warn!(
                    error = chain(&error),
                    "cannot remove the files of a deleted task; the next daemon will"
                );
            }
        };
        self.removals.spawn(remove.in_current_span());
    }

    /// Removes the folder of a checkpoint, in the background. It may be gone already.
    pub(super) fn remove_folder_later(&self, path: PathBuf) {
        let lane = self.lane.clone();
        let remove = async move {
            if let Err(error) = blocking(&lane, move || bundle::remove_stale(&path)).await {
                warn!(error = chain(&error), "cannot remove a checkpoint that has served");
            }
        };
        self.removals.spawn(remove.in_current_span());
    }

    /// Returns when what is being removed is gone.
    pub(super) async fn removals_over(&self) {
        self.removals.close();
        self.removals.wait().await;
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<Key, Handle>> {
        // A panic while the lock is held cannot leave the map half changed.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
