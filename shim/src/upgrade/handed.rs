//! The other side of an upgrade: a program that goes on where another one stood still.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;

use davit_model::error::chain;
use davit_proto::davit::shim::v1::UpgradeResponse;
use davit_sys::io::inherited;
use prost::Message;

use crate::container::Container;
use crate::outbox::ContainerJournal;
use crate::rpc::{Connection, Server};
use crate::serve::{Given, SocketFile};
use crate::state::State;
use crate::{identity, log};

/// What the earlier program has handed on.
pub(crate) struct Handed {
    state: State,
    descriptors: BTreeMap<u32, OwnedFd>,
}

impl Handed {
    /// Receives the state at this descriptor, and the descriptors that it lists. To be called before any other is opened.
    ///
    /// # Errors
    /// There is no state, or none that this program understands: it has been checked before.
    pub(crate) fn receive(number: RawFd) -> io::Result<Handed> {
        let mut file = File::from(inherited(number)?);
        file.rewind()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let state = State::open(&bytes).map_err(|error| io::Error::other(chain(&error)))?;
        let mut descriptors = BTreeMap::new();
        for number in &state.descriptors {
            if let Ok(raw) = RawFd::try_from(*number) {
                descriptors.insert(*number, inherited(raw)?);
            }
        }
        Ok(Handed { state, descriptors })
    }

    /// What a serving process is given by its `start` else.
    ///
    /// # Errors
    /// There is no listening socket.
    pub(crate) fn given(&mut self) -> io::Result<Given> {
        Ok(Given {
            listener: self.take(self.state.listener)?,
            daemon: self.state.daemon.clone(),
            oom_score_adj: self.state.oom_score_adj,
        })
    }

    /// The name of the socket.
    pub(crate) fn socket_file(&self) -> Option<SocketFile> {
        self.state.socket.as_ref().map(SocketFile::restore)
    }

    fn take(&mut self, number: u32) -> io::Result<OwnedFd> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("descriptor {number}"));
        self.descriptors.remove(&number).ok_or_else(missing)
    }

    /// Makes everything that there was, and answers who has asked for the upgrade. What cannot be made is logged, for there
    /// is nothing to go back to.
    pub(crate) fn restore(mut self, server: &Rc<Server>) {
        let state = std::mem::take(&mut self.state);
        let mut take = |number| self.take(number);
        let shim = &server.shim;
        shim.upgrades.set(state.upgrades + 1);
        let mut journals = Vec::new();
        for journal in state.journals {
            match ContainerJournal::restore(journal, &mut take) {
                Ok(journal) => journals.push(Rc::new(journal)),
                Err(error) => return log::error(format_args!("journals are lost: {error}")),
            }
        }
        shim.outbox.restore(state.sequence, state.queue, &journals);
        for saved in state.containers {
            let id = saved.id.clone();
            let Some(journal) = journals.get(saved.journal as usize).cloned() else { continue };
            match Container::restore(shim, saved, journal, &mut take) {
                Ok(container) => {
                    shim.add(container.clone());
                    container.watch_again();
                }
                Err(error) => log::error(format_args!("container {id} is lost: {error}")),
            }
        }
        for (index, mut saved) in state.connections.into_iter().enumerate() {
            let calls = std::mem::take(&mut saved.calls);
            let connection = match Connection::restore(&saved, &mut take) {
                Ok(connection) => Rc::new(connection),
                Err(error) => {
                    log::error(format_args!("a client is lost: {error}"));
                    continue;
                }
            };
            server.attend(connection.clone());
            connection.call_again(server, calls);
            if let Some(caller) = state.caller.filter(|caller| caller.connection as usize == index) {
                let before = state.before.clone();
                let response = UpgradeResponse { before, after: Some(identity::program()) };
                connection.answer(caller.stream, Ok(response.encode_to_vec()));
            }
        }
    }
}
