//! What a shim hands to the program that it executes in an upgrade: everything that lives in no file and in no
//! descriptor, as one message with a head.
//!
//! ```text
//! "DAVITS" | version u16 | crc32c u32 of the message | message        integers little endian
//! ```
//! A program reads states up to its own [`VERSION`]. Fields that it does not know are of no importance to it, or the
//! version is raised; fields that an older program did not write have their protobuf defaults, which must mean what
//! the older program did. A descriptor is its own number, never 0; an instant is the time that is left until then,
//! in microseconds.

use std::collections::BTreeSet;

use davit_proto::davit::shim::v1::Program;
use davit_shim_protocol::journal::{EventRecord, ExitRecord, StartRecord};
use prost::Message;

use crate::stdio;

/// The version of the state that is written, and the highest that is read.
pub(crate) const VERSION: u16 = 1;

const MAGIC: &[u8; 6] = b"DAVITS";
const HEAD: usize = 12;

/// All of it.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct State {
    /// Every descriptor that is handed on, but for the one of the state itself.
    #[prost(uint32, repeated, tag = "1")]
    pub(crate) descriptors: Vec<u32>,
    /// The socket that clients connect to.
    #[prost(uint32, tag = "2")]
    pub(crate) listener: u32,
    /// The file that is its name, if it has one.
    #[prost(message, optional, tag = "3")]
    pub(crate) socket: Option<SocketFile>,
    /// The upgrades before this one.
    #[prost(uint64, tag = "4")]
    pub(crate) upgrades: u64,
    /// Who waits for the answer of this one, if somebody does.
    #[prost(message, optional, tag = "5")]
    pub(crate) caller: Option<Caller>,
    /// What served before.
    #[prost(message, optional, tag = "6")]
    pub(crate) before: Option<Program>,
    /// The journals, of deleted containers too as long as events of theirs are in the queue.
    #[prost(message, repeated, tag = "7")]
    pub(crate) journals: Vec<Journal>,
    /// The sequence number of the last event.
    #[prost(uint64, tag = "8")]
    pub(crate) sequence: u64,
    /// The events that the daemon has not taken, in order.
    #[prost(message, repeated, tag = "9")]
    pub(crate) queue: Vec<Queued>,
    /// The containers.
    #[prost(message, repeated, tag = "10")]
    pub(crate) containers: Vec<Container>,
    /// The clients.
    #[prost(message, repeated, tag = "11")]
    pub(crate) connections: Vec<Connection>,
    /// The address of the daemon's socket for events.
    #[prost(string, tag = "12")]
    pub(crate) daemon: String,
    /// The `oom_score_adj` from before the shim changed its own.
    #[prost(int32, optional, tag = "13")]
    pub(crate) oom_score_adj: Option<i32>,
}

/// The name of the shim's socket.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SocketFile {
    /// The path.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) path: Vec<u8>,
    /// The device of the file at the time when the shim began to listen.
    #[prost(uint64, tag = "2")]
    pub(crate) device: u64,
    /// Its number there.
    #[prost(uint64, tag = "3")]
    pub(crate) inode: u64,
}

/// Who has asked for the upgrade.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Caller {
    /// The index of the connection.
    #[prost(uint32, tag = "1")]
    pub(crate) connection: u32,
    /// The stream.
    #[prost(uint32, tag = "2")]
    pub(crate) stream: u32,
}

/// A journal that is open.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Journal {
    /// The file.
    #[prost(uint32, tag = "1")]
    pub(crate) file: u32,
    /// Its path.
    #[prost(string, tag = "2")]
    pub(crate) path: String,
    /// The bytes of it that are valid.
    #[prost(uint64, tag = "3")]
    pub(crate) length: u64,
    /// The exits that must stay in it.
    #[prost(message, repeated, tag = "4")]
    pub(crate) exits: Vec<ExitRecord>,
    /// The processes that have not ended.
    #[prost(message, repeated, tag = "5")]
    pub(crate) running: Vec<StartRecord>,
}

/// An event on its way.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Queued {
    /// Its number.
    #[prost(uint64, tag = "1")]
    pub(crate) sequence: u64,
    /// The index of its journal.
    #[prost(uint32, tag = "2")]
    pub(crate) journal: u32,
    /// Where it lies there.
    #[prost(uint64, tag = "3")]
    pub(crate) offset: u64,
    /// The event itself, if the journal did not take it.
    #[prost(message, optional, tag = "4")]
    pub(crate) event: Option<EventRecord>,
}

/// A container.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Container {
    /// Its id.
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    /// Its bundle.
    #[prost(string, tag = "2")]
    pub(crate) bundle: String,
    /// The index of its journal.
    #[prost(uint32, tag = "3")]
    pub(crate) journal: u32,
    /// Its init process.
    #[prost(message, optional, tag = "4")]
    pub(crate) init: Option<Process>,
    /// Its execs.
    #[prost(message, repeated, tag = "5")]
    pub(crate) execs: Vec<Process>,
    /// True if the shim has mounted its root filesystem.
    #[prost(bool, tag = "6")]
    pub(crate) mounted: bool,
    /// The name or path of its runtime.
    #[prost(string, tag = "7")]
    pub(crate) runtime: String,
    /// The folder of the runtime's state.
    #[prost(string, tag = "8")]
    pub(crate) runtime_root: String,
    /// Whether its cgroup is made by systemd.
    #[prost(bool, tag = "9")]
    pub(crate) systemd_cgroup: bool,
    /// The owner of its pipes.
    #[prost(uint32, tag = "10")]
    pub(crate) io_uid: u32,
    /// Their group.
    #[prost(uint32, tag = "11")]
    pub(crate) io_gid: u32,
    /// The folders of its cgroup, with their controllers; on the unified hierarchy a single one without.
    #[prost(message, repeated, tag = "12")]
    pub(crate) cgroup: Vec<CgroupFolder>,
    /// What tells of kills for want of memory on the first version.
    #[prost(uint32, tag = "13")]
    pub(crate) oom_event: u32,
    /// The kills that have been reported, on the second version.
    #[prost(uint64, optional, tag = "14")]
    pub(crate) oom_reported: Option<u64>,
    /// What its start restores it from, if it is to be restored.
    #[prost(message, optional, tag = "15")]
    pub(crate) checkpoint: Option<Checkpoint>,
}

/// A checkpoint from which a container is to be restored.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Checkpoint {
    /// The folder of its images.
    #[prost(string, tag = "1")]
    pub(crate) image: String,
    /// That of the checkpoint before it, relative to the first; empty for none.
    #[prost(string, tag = "2")]
    pub(crate) parent: String,
    /// Where criu is to work; empty for a folder in the bundle.
    #[prost(string, tag = "3")]
    pub(crate) work: String,
    /// Whether the root filesystem is not to be entered by pivot_root(2).
    #[prost(bool, tag = "4")]
    pub(crate) no_pivot: bool,
}

/// A folder of a cgroup.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CgroupFolder {
    /// The controller; empty for all.
    #[prost(string, tag = "1")]
    pub(crate) controller: String,
    /// The folder.
    #[prost(string, tag = "2")]
    pub(crate) path: String,
}

/// A process of a container.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Process {
    /// The exec's id, or the container's.
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    /// The addresses that the client gave.
    #[prost(string, tag = "2")]
    pub(crate) stdin: String,
    /// That of standard output.
    #[prost(string, tag = "3")]
    pub(crate) stdout: String,
    /// That of standard error.
    #[prost(string, tag = "4")]
    pub(crate) stderr: String,
    /// Whether it has a terminal.
    #[prost(bool, tag = "5")]
    pub(crate) terminal: bool,
    /// The process document of an exec that has not been started.
    #[prost(bytes = "vec", tag = "6")]
    pub(crate) document: Vec<u8>,
    /// What it is at.
    #[prost(enumeration = "ProcessState", tag = "7")]
    pub(crate) state: i32,
    /// Its number on the host, 0 before its start.
    #[prost(int32, tag = "8")]
    pub(crate) pid: i32,
    /// Its descriptor, while it is waited for.
    #[prost(uint32, tag = "9")]
    pub(crate) pidfd: u32,
    /// How it ended, in the journal already and perhaps not published yet.
    #[prost(message, optional, tag = "10")]
    pub(crate) recorded: Option<Ended>,
    /// True if that has been published.
    #[prost(bool, tag = "11")]
    pub(crate) published: bool,
    /// True if it could not be started.
    #[prost(bool, tag = "12")]
    pub(crate) failed: bool,
    /// Its streams, while they are open.
    #[prost(message, optional, tag = "13")]
    pub(crate) streams: Option<stdio::Saved>,
}

/// The states of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum ProcessState {
    /// None was written.
    Unset = 0,
    /// It waits for its start.
    Created = 1,
    /// It runs.
    Running = 2,
    /// It is frozen.
    Paused = 3,
    /// It has ended.
    Stopped = 4,
    /// It is gone.
    Deleted = 5,
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Ended {
    /// The code, or 128 plus the signal.
    #[prost(uint32, tag = "1")]
    pub(crate) status: u32,
    /// When, in seconds since the epoch.
    #[prost(int64, tag = "2")]
    pub(crate) seconds: i64,
    /// The nanoseconds of that second.
    #[prost(int32, tag = "3")]
    pub(crate) nanos: i32,
}

/// A client.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Connection {
    /// Its socket.
    #[prost(uint32, tag = "1")]
    pub(crate) socket: u32,
    /// The beginning of a frame.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) partial: Vec<u8>,
    /// The bytes of a frame that is too long that are still to come.
    #[prost(uint64, tag = "3")]
    pub(crate) to_drop: u64,
    /// What the client has not taken of its answers.
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) answers: Vec<u8>,
    /// The calls that only wait.
    #[prost(message, repeated, tag = "5")]
    pub(crate) calls: Vec<Call>,
}

/// A call that is to be made again.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Call {
    /// Its stream.
    #[prost(uint32, tag = "1")]
    pub(crate) stream: u32,
    /// The `ttrpc.Request`.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) request: Vec<u8>,
    /// The time after which its caller gives up.
    #[prost(uint64, optional, tag = "3")]
    pub(crate) left_micros: Option<u64>,
}

/// Why bytes are no state that this program can go on with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// They are something else.
    #[error("not the state of a shim")]
    Magic,
    /// A newer program wrote them.
    #[error("the state has version {version}, this program reads versions up to {VERSION}")]
    Version {
        /// The version found.
        version: u16,
    },
    /// They were damaged.
    #[error("the state is damaged")]
    Checksum,
    /// The message is none.
    #[error("the state cannot be read")]
    Decode(#[from] prost::DecodeError),
    /// The message contradicts itself.
    #[error("the state is inconsistent: {what}")]
    Inconsistent {
        /// Where.
        what: &'static str,
    },
}

impl State {
    /// The bytes for the next program.
    pub(crate) fn seal(&self) -> Vec<u8> {
        let message = self.encode_to_vec();
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&message).to_le_bytes());
        bytes.extend_from_slice(&message);
        bytes
    }

    /// What an earlier program has sealed.
    ///
    /// # Errors
    /// [`StateError`]: this program could not go on with it.
    pub(crate) fn open(bytes: &[u8]) -> Result<State, StateError> {
        let (head, message) = bytes.split_at_checked(HEAD).ok_or(StateError::Magic)?;
        if !head.starts_with(MAGIC) {
            return Err(StateError::Magic);
        }
        let version = u16::from_le_bytes([head[6], head[7]]);
        if version == 0 || version > VERSION {
            return Err(StateError::Version { version });
        }
        if crc32c::crc32c(message) != checksum(bytes) {
            return Err(StateError::Checksum);
        }
        let state = State::decode(message)?;
        state.examine()?;
        Ok(state)
    }

    /// Looks for what could make the program fail that has nothing to go back to.
    fn examine(&self) -> Result<(), StateError> {
        let inconsistent = |what| Err(StateError::Inconsistent { what });
        let descriptors: BTreeSet<u32> = self.descriptors.iter().copied().collect();
        if descriptors.len() != self.descriptors.len() || !descriptors.iter().all(|number| *number > 2) {
            return inconsistent("descriptors");
        }
        let files = self.journals.iter().map(|journal| journal.file);
        let sockets = self.connections.iter().map(|connection| connection.socket);
        let mut needed = files.chain(sockets).chain((!descriptors.is_empty()).then_some(self.listener));
        if !needed.all(|number| descriptors.contains(&number)) {
            return inconsistent("a descriptor is missing");
        }
        let journal = |index: u32| (index as usize) < self.journals.len();
        if !self.queue.iter().all(|queued| queued.event.is_some() || journal(queued.journal)) {
            return inconsistent("the journal of an event is missing");
        }
        for container in &self.containers {
            if !journal(container.journal) {
                return inconsistent("the journal of a container is missing");
            }
            let Some(init) = &container.init else { return inconsistent("a container without a process") };
            for process in container.execs.iter().chain([init]) {
                if process.state() == ProcessState::Unset {
                    return inconsistent("a process in no state");
                }
                if process.pidfd != 0 && !descriptors.contains(&process.pidfd) {
                    return inconsistent("the descriptor of a process is missing");
                }
            }
        }
        let connected = |caller: &Caller| (caller.connection as usize) < self.connections.len();
        if !self.caller.iter().all(connected) {
            return inconsistent("the caller is not connected");
        }
        Ok(())
    }
}

/// The checksum in the head of a sealed state, 0 if it has none.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    bytes.get(8..HEAD).map_or(0, |head| u32::from_le_bytes([head[0], head[1], head[2], head[3]]))
}

#[cfg(test)]
mod tests;
