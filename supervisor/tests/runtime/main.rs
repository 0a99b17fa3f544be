//! The runtime with real shims and containers, and with shims that misbehave. One binary, so that its helpers
//! are built once.
#![allow(clippy::unwrap_used, unreachable_pub)] // helpers of tests, too, fail by panicking

mod deaths;
mod events;
mod fake;
mod group;
mod life;
mod restart;
mod sandbox;
mod start;
mod world;
