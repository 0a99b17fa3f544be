//! A registry client: what containerd's resolver, fetcher and pusher do, for the daemon's transfers and the CLI.
//!
//! From the outside in: [`pull`] and [`push`] move whole images between a registry and a content store; a
//! [`Repository`] is one repository with all the hosts that may serve it, and resolves, fetches, pushes and lists;
//! a [`Registry`] makes repositories and holds what they share: limits, roots of trust, proxies, credentials. Below:
//!
//! ```text
//! pull, push ──▶ Repository: resolve, open, put ──▶ endpoint: retries, redirects, re-authorization
//!                     │                                │             │
//!                     ▼                                ▼             ▼
//!             hosts: certs.d, hosts.toml     auth: challenges,   transport: connections, TLS, proxies,
//!                                             tokens             bounds of time and of number
//! ```
//!
//! What a registry sends is believed in one case only: the digest of a tag, from a host that may resolve. All else
//! is checked against the digest and the size of its descriptor while it arrives.
//!
//! Where it differs from containerd, on purpose: a `hosts.toml` that cannot be read fails the request, and is not passed
//! by; a host that answers 408 or 429 is asked again only if there is no other one; a host that was reached through a
//! redirect is told no credentials, and an `https` host cannot name an `http` realm or redirect; a response that is
//! encoded is not decoded, as none was asked for; the `urls` of layers that may not be distributed are not followed.
//!
//! **Invariants**, each with a test:
//! - A secret goes to the host that it was asked for and to the realm which that host names, encrypted if the host
//!   was reached so; it is in no error, log or `Debug`.
//! - No byte beyond the size of a descriptor is taken, no document beyond 4 MiB, no header beyond 128 KiB.
//! - No answer is waited for without end: a connection that brings nothing, or next to nothing, is given up.
//! - A blob is what its digest says, and not what a `Content-Encoding` makes of it.
//! - A registry cannot direct the client to a loopback or link-local address (the metadata services of clouds).

mod auth;
mod challenge;
mod connect;
mod credentials;
pub mod docker_config;
mod endpoint;
mod error;
mod fetch;
pub mod hosts;
pub mod labels;
mod policy;
mod progress;
mod pull;
mod push;
mod referrers;
mod registry;
mod repository;
mod resolve;
mod retry;
mod store;
mod tls;
mod transport;
mod upload;
mod uri;

pub use challenge::{Challenge, parse_challenges};
pub use credentials::{CredentialError, CredentialSource, Credentials, Secret};
pub use error::Error;
pub use fetch::Download;
pub use progress::{Observer, Progress, State, Unobserved};
pub use pull::{Platforms, PullOptions, Ready, Wanted, pull};
pub use push::{PushOptions, push};
pub use registry::{Limits, Options, Registry, Retry, Timeouts};
pub use repository::Repository;
pub use store::{Opened, Sink, SinkError, SinkWriter, Source, read_whole};
pub use transport::TransportError;
pub use upload::Uploaded;
