//! What the black-box tests, the benchmarks and the quickstart share: a private daemon, images made from the host's
//! busybox, and a census of everything that a container can leave behind. It knows sockets and binaries only.

pub mod bench;
pub mod bins;
pub mod census;
pub mod client;
pub mod ctr;
pub mod daemon;
pub mod docker;
pub mod image;
pub mod lifecycle;
pub mod loopback;
pub mod memory;
pub mod model;
pub mod peer;
pub mod registry;
pub mod shim;
pub mod soak;
pub mod ttrpc;
pub mod wait;

pub use daemon::Daemon;
