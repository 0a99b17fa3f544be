//! What both ends of a shim share: how it is started and found, the frames that are spoken, and the journal that
//! it leaves in its bundle. Everything here is versioned, for a shim outlives the daemon that started it.

pub mod address;
pub mod bootstrap;
pub mod bundle;
#[cfg(feature = "tokio")]
pub mod client;
pub mod frame;
pub mod journal;
#[cfg(feature = "tokio")]
pub mod server;
