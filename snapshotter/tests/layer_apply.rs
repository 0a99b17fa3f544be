//! Applying layers: hostile archives stay inside, honest ones come out as GNU tar and the kernel have them.
// Helpers of tests may fail like tests.
#![allow(clippy::unwrap_used)]

#[path = "layer/archive.rs"]
mod archive;
#[path = "layer/benign.rs"]
mod benign;
#[path = "layer/depth.rs"]
mod depth;
#[path = "layer/hostile.rs"]
mod hostile;
#[path = "layer/overlay.rs"]
mod overlay;
#[path = "layer/stream.rs"]
mod stream;
#[path = "layer/tree.rs"]
mod tree;
