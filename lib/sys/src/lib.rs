//! The kernel's calls that `nix` does not wrap, or not safely enough. The only crate with `unsafe`, and no policy.
#![allow(unsafe_code)]

pub mod btrfs;
pub mod detach;
pub mod fs;
pub mod io;
pub mod loop_device;
pub mod memory;
pub mod mount;
pub mod process;
