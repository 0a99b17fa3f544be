//! What all parts of the serving process share.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use crate::container::Container;
use crate::error::TaskError;
use crate::outbox::Outbox;
use crate::sync::Condition;

/// The state of a serving shim.
pub(crate) struct Shim {
    /// The namespace of its containers.
    pub(crate) namespace: String,
    /// The folder of its socket, where short-lived ones go too.
    pub(crate) socket_dir: PathBuf,
    /// The `oom_score_adj` from before the shim changed its own.
    pub(crate) oom_score_adj: Option<i32>,
    /// The upgrades of this process so far.
    pub(crate) upgrades: Cell<u64>,
    /// The events on their way.
    pub(crate) outbox: Rc<Outbox>,
    containers: RefCell<BTreeMap<String, Rc<Container>>>,
    /// The containers that are being created.
    creating: RefCell<Vec<String>>,
    clients: Cell<usize>,
    stopping: Cell<bool>,
    changed: Condition,
}

/// An id that nobody else can use while a container of it is being created.
pub(crate) struct Reservation<'shim> {
    shim: &'shim Shim,
    id: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.shim.creating.borrow_mut().retain(|id| *id != self.id);
        self.shim.changed.changed();
    }
}

impl Shim {
    /// A shim without containers.
    pub(crate) fn new(namespace: String, socket_dir: PathBuf, oom_score_adj: Option<i32>) -> Shim {
        Shim {
            outbox: Rc::new(Outbox::new(namespace.clone())),
            namespace,
            socket_dir,
            oom_score_adj,
            upgrades: Cell::new(0),
            containers: RefCell::default(),
            creating: RefCell::default(),
            clients: Cell::new(0),
            stopping: Cell::new(false),
            changed: Condition::default(),
        }
    }

    /// The container of this id.
    pub(crate) fn container(&self, id: &str) -> Result<Rc<Container>, TaskError> {
        self.containers.borrow().get(id).cloned().ok_or(TaskError::NotCreated)
    }

    /// All containers, by id.
    pub(crate) fn containers(&self) -> Vec<Rc<Container>> {
        self.containers.borrow().values().cloned().collect()
    }

    /// Reserves an id for a new container. A shim that is about to end makes none: it would leave the container alone.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation<'_>, TaskError> {
        if self.stopping.get() {
            return Err(TaskError::Ending);
        }
        let mut creating = self.creating.borrow_mut();
        if self.containers.borrow().contains_key(id) || creating.iter().any(|other| other == id) {
            return Err(TaskError::ContainerExists { id: id.to_owned() });
        }
        creating.push(id.to_owned());
        Ok(Reservation { shim: self, id: id.to_owned() })
    }

    /// Waits until no container of this id is being created.
    pub(crate) async fn created(&self, id: &str) {
        self.changed.until(|| !self.creating.borrow().iter().any(|creating| creating == id)).await;
    }

    /// Adds a container that has been created.
    pub(crate) fn add(&self, container: Rc<Container>) {
        self.containers.borrow_mut().insert(container.id.clone(), container);
    }

    /// Removes a container that has been deleted.
    pub(crate) fn remove(&self, id: &str) {
        self.containers.borrow_mut().remove(id);
    }

    /// Ends the shim, unless it still has containers.
    pub(crate) fn stop(&self) {
        if self.containers.borrow().is_empty() && self.creating.borrow().is_empty() {
            self.stopping.set(true);
            self.changed.changed();
        }
    }

    /// Whether the shim is to end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Waits until the shim is to end.
    pub(crate) async fn stopped(&self) {
        self.changed.until(|| self.stopping.get()).await;
    }

    /// Counts a client that has connected.
    pub(crate) fn client_came(&self) {
        self.clients.set(self.clients.get() + 1);
    }

    /// Counts a client that has disconnected.
    pub(crate) fn client_left(&self) {
        self.clients.set(self.clients.get() - 1);
        self.changed.changed();
    }

    /// Waits until no client is connected.
    pub(crate) async fn without_clients(&self) {
        self.changed.until(|| self.clients.get() == 0).await;
    }
}
