//! `davitd`, as a library of typed services and thin adapters over it.
//!
//! Reading order: [`server`] builds everything and is the one place where the parts meet; [`metadata`] holds what
//! the daemon knows (namespaces, content, images, containers, snapshots, leases) and collects garbage;
//! [`runtime`] holds what runs (shims and tasks); [`events`] tells what happened; [`grpc`] translates between all
//! of these and the wire. [`mounts`] are made for clients; [`restart`] keeps tasks in the state that labels ask for,
//! and [`rooted`] has tasks and the mounts under them come and go together; [`checkpoint`]s of tasks become content,
//! and content tasks; [`streams`] are what services and clients say beside calls; [`calls`], [`metrics`] and [`logs`]
//! tell what the daemon is at; [`transfer`] moves images from and to registries; [`differs`] unpack and make layers, by
//! [`processors`] where such are configured. [`blobs`] and snapshotters are this daemon's own or, through a [`proxy`],
//! those of other processes. What blocks goes through a [`lane`].

pub mod blobs;
pub mod calls;
pub mod cgroup;
pub mod checkpoint;
pub mod config;
mod crowd;
pub mod differs;
mod environment;
pub mod events;
pub mod grpc;
mod histogram;
pub mod lane;
pub mod logs;
pub mod metadata;
pub mod metrics;
pub mod mounts;
pub mod oci_hook;
pub mod pages;
pub mod plugins;
pub mod processors;
pub mod proxy;
pub mod publish;
pub mod restart;
pub mod rooted;
pub mod runtime;
pub mod server;
pub mod snapshotters;
pub mod streams;
mod trace;
pub mod transfer;
mod unique;
