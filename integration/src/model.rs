//! A model of the whole metadata API, and random calls that a daemon and the model must answer alike.
//!
//! ```text
//!   draw ──▶ step ──┬──▶ wire ──▶ daemon ──▶ reply ──┐
//!    ▲              │                                ├─ agree?
//!    │              ├──▶ world ──────────▶ answer ───┘
//!    └─ state ──────┤
//!                   └──▶ worlds without one rule each ──▶ answers that must come to differ
//! ```
//!
//! The model (`world`, `content`, `snapshots`, `collect`) is written from what containerd promises on the wire. It runs beside
//! any daemon that speaks it: beside containerd itself it shows that the model is right, beside ours that the daemon is.

pub mod call;
mod collect;
mod content;
pub mod draw;
pub mod filter;
pub mod rule;
pub mod run;
mod snapshots;
pub mod subject;
pub mod together;
pub mod wire;
pub mod world;

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Result;
use tonic::{Code, Status};

use call::Call;

/// A daemon to compare with.
pub trait Subject {
    /// Its socket.
    fn address(&self) -> PathBuf;
    /// Kills it by SIGKILL, starts it again, and waits until it answers.
    ///
    /// # Errors
    /// It does not start.
    fn kill(&mut self) -> Result<()>;
    /// Whether it has the service of a call.
    fn serves(&self, call: &Call) -> bool;
    /// The code of an error.
    fn code(&self, status: &Status) -> Code {
        status.code()
    }
    /// Whether every collection sweeps all that it finds on disk, and not only what it knows to be in disorder.
    fn sweeps_all(&self) -> bool;
    /// Whether the text of an error is one by which clients know its class.
    fn words(&self, status: &Status) -> bool;
    /// The blobs on its disk.
    ///
    /// # Errors
    /// The folder cannot be read.
    fn blobs(&self) -> Result<BTreeSet<String>>;
    /// How many ingests are on its disk.
    ///
    /// # Errors
    /// The folder cannot be read.
    fn ingests(&self) -> Result<usize>;
    /// Whether a snapshotter makes a folder for a view of another snapshot.
    fn views_have_folders(&self, snapshotter: &str) -> bool;
    /// How many snapshots of a snapshotter are on its disk.
    ///
    /// # Errors
    /// The folder cannot be read.
    fn snapshots(&self, snapshotter: &str) -> Result<usize>;
}
