//! The ttrpc server: accepts clients of our own user, each of which has a [`Connection`].

mod connection;

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::sys::socket::{SockFlag, accept4};

use crate::arguments::Arguments;
use crate::executor::spawn;
use crate::log;
use crate::reactor::{Async, sleep};
use crate::serve::{Given, SocketFile};
use crate::shim::Shim;
use crate::socket::is_ours;

pub(crate) use connection::Connection;

/// The listening socket and who is connected to it.
pub(crate) struct Server {
    /// What is served.
    pub(crate) shim: Rc<Shim>,
    /// The command line.
    pub(crate) arguments: Arguments,
    /// The address of the daemon's socket for events.
    pub(crate) daemon: String,
    /// The name of the socket that clients connect to.
    pub(crate) socket: Option<SocketFile>,
    /// The socket itself.
    pub(crate) listener: Async<OwnedFd>,
    /// Somebody has the turn to upgrade.
    pub(crate) upgrading: Cell<bool>,
    connections: RefCell<Vec<Rc<Connection>>>,
}

impl Server {
    /// A server without clients.
    ///
    /// # Errors
    /// The socket cannot be watched.
    pub(crate) fn new(
        shim: Rc<Shim>,
        arguments: Arguments,
        given: Given,
        socket: Option<SocketFile>,
    ) -> io::Result<Rc<Server>> {
        let Given { listener, daemon, oom_score_adj: _ } = given;
        let listener = Async::new(listener)?;
        let (upgrading, connections) = (Cell::new(false), RefCell::default());
        Ok(Rc::new(Server { shim, arguments, daemon, socket, listener, upgrading, connections }))
    }

    /// Accepts clients for ever.
    pub(crate) async fn serve(self: Rc<Server>) {
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let accepted = self
                .listener
                .read_with(|listener| {
                    let number = accept4(listener.as_raw_fd(), flags)?;
                    davit_sys::io::inherited(number)
                })
                .await;
            match accepted {
                Ok(client) => self.accept(client),
                Err(error) => {
                    // A client that has left already, or no descriptor to be had at present.
                    log::warn(format_args!("accept client: {error}"));
                    sleep(std::time::Duration::from_millis(10)).await;
                }
            }
        }
    }

    fn accept(self: &Rc<Server>, client: OwnedFd) {
        if !is_ours(&client) {
            log::warn("refused a client of another user");
            return;
        }
        match Connection::new(client) {
            Ok(connection) => self.attend(Rc::new(connection)),
            Err(error) => return log::warn(format_args!("watch client: {error}")),
        }
        // Whoever connects is a daemon, mostly one that has just come back.
        self.shim.outbox.poke();
    }

    /// Serves a client until it leaves.
    pub(crate) fn attend(self: &Rc<Server>, connection: Rc<Connection>) {
        self.connections.borrow_mut().push(connection.clone());
        self.shim.client_came();
        spawn(connection.clone().write_answers());
        let server = self.clone();
        spawn(async move {
            connection.clone().read_requests(&server).await;
            server.connections.borrow_mut().retain(|other| !Rc::ptr_eq(other, &connection));
            server.shim.client_left();
        });
    }

    /// Who is connected, in the order of their coming.
    pub(crate) fn connections(&self) -> Vec<Rc<Connection>> {
        self.connections.borrow().clone()
    }
}
