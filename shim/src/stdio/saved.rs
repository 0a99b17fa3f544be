//! What a live upgrade hands on of a process's streams, see [`super::Streams::save`].
//!
//! Descriptors are numbers that the caller of `save` has given out; 0 means that there is none, so those numbers begin
//! at 1. Bytes that were read and not yet delivered are in here, or in the spool's file.

/// The streams of one process.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Saved {
    /// The outputs, standard output first.
    #[prost(message, repeated, tag = "1")]
    pub outputs: Vec<Output>,
    /// What is copied to the process.
    #[prost(message, optional, tag = "2")]
    pub input: Option<Input>,
    /// The shim's own writing end of the FIFO of standard input.
    #[prost(uint32, tag = "3")]
    pub stdin_hold: u32,
    /// The writing end of standard input, if copying has not begun.
    #[prost(uint32, tag = "4")]
    pub stdin_sink: u32,
    /// The master side of the terminal.
    #[prost(uint32, tag = "5")]
    pub terminal: u32,
    /// The pid of the logger, 0 for none.
    #[prost(int32, tag = "6")]
    pub logger: i32,
    /// True if copying has begun.
    #[prost(bool, tag = "7")]
    pub started: bool,
    /// True if the process has exited.
    #[prost(bool, tag = "8")]
    pub exited: bool,
    /// The logs that outputs go to.
    #[prost(message, repeated, tag = "9")]
    pub logs: Vec<Log>,
}

/// One direction of output.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Output {
    /// `stdout` or `stderr`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Where it comes from; 0 for the terminal, and when it has ended.
    #[prost(uint32, tag = "2")]
    pub source: u32,
    /// It comes from the terminal.
    #[prost(bool, tag = "3")]
    pub from_terminal: bool,
    /// Nothing more comes.
    #[prost(bool, tag = "4")]
    pub ended: bool,
    /// Nothing more is to be done.
    #[prost(bool, tag = "5")]
    pub done: bool,
    /// Where it goes to.
    #[prost(enumeration = "SinkKind", tag = "6")]
    pub kind: i32,
    /// The FIFO or pipe.
    #[prost(uint32, tag = "7")]
    pub sink: u32,
    /// What was read and not delivered; for a json log, the line whose end has not come, too.
    #[prost(bytes = "vec", tag = "8")]
    pub carry: Vec<u8>,
    /// What waits behind that.
    #[prost(message, optional, tag = "9")]
    pub spool: Option<Spool>,
    /// The longest time in microseconds for which there was output that was not taken.
    #[prost(uint64, tag = "10")]
    pub stalled_micros: u64,
    /// The bytes that were dropped beside those of the spool.
    #[prost(uint64, tag = "11")]
    pub dropped: u64,
    /// Which of the logs, from 0.
    #[prost(uint32, tag = "12")]
    pub log: u32,
}

/// What a sink is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum SinkKind {
    /// Nowhere.
    Null = 0,
    /// A FIFO whose readers come and go.
    Fifo = 1,
    /// A FIFO or pipe that is waited for.
    Blocking = 2,
    /// The pipe of a logger that is not waited for.
    Logger = 3,
    /// One of the logs.
    Log = 4,
}

/// Bytes that wait.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Spool {
    /// The folder that the file is made in.
    #[prost(string, tag = "1")]
    pub folder: String,
    /// The oldest bytes, which were kept in memory.
    #[prost(bytes = "vec", tag = "2")]
    pub memory: Vec<u8>,
    /// The file, which has no name.
    #[prost(uint32, tag = "3")]
    pub file: u32,
    /// Where in the stream the file's bytes begin.
    #[prost(uint64, tag = "4")]
    pub head: u64,
    /// Where they end.
    #[prost(uint64, tag = "5")]
    pub tail: u64,
    /// The bytes that came by here.
    #[prost(uint64, tag = "6")]
    pub spooled: u64,
    /// The bytes that were dropped.
    #[prost(uint64, tag = "7")]
    pub dropped: u64,
}

/// What comes from a client.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Input {
    /// The FIFO or file.
    #[prost(uint32, tag = "1")]
    pub source: u32,
    /// The pipe of the process; 0 for the terminal.
    #[prost(uint32, tag = "2")]
    pub sink: u32,
    /// What was read and not delivered.
    #[prost(bytes = "vec", tag = "3")]
    pub carry: Vec<u8>,
}

/// A log file.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Log {
    /// Its path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// True for one of JSON lines.
    #[prost(bool, tag = "2")]
    pub json: bool,
    /// The size in bytes that it is rotated at, 0 for never.
    #[prost(uint64, tag = "3")]
    pub max_size: u64,
    /// How many files there may be.
    #[prost(uint32, tag = "4")]
    pub max_files: u32,
    /// The open file.
    #[prost(uint32, tag = "5")]
    pub file: u32,
    /// Its size, of a json log.
    #[prost(uint64, tag = "9")]
    pub file_size: u64,
    /// What the file refused.
    #[prost(bytes = "vec", tag = "6")]
    pub refused: Vec<u8>,
    /// What waits behind that.
    #[prost(message, optional, tag = "7")]
    pub spool: Option<Spool>,
    /// True if the container waits for it.
    #[prost(bool, tag = "8")]
    pub blocking: bool,
    /// The bytes that came while the file was busy.
    #[prost(uint64, tag = "10")]
    pub delayed: u64,
}
