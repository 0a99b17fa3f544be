//! The gRPC API: one adapter per service of containerd, and of our own. An adapter parses, calls, and maps the error; it
//! holds no state of its own beside what it serves.

pub mod containers;
pub mod content;
pub mod context;
pub mod convert;
pub mod diff;
pub mod events;
pub mod history;
pub mod images;
pub mod introspection;
pub mod leases;
pub mod mounts;
pub mod namespaces;
pub mod notice;
pub mod sandboxes;
pub mod shims;
pub mod snapshots;
pub mod status;
pub mod streaming;
pub mod tasks;
pub mod transfer;
pub mod version;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use davit_proto::containerd::services::containers::v1::containers_server::ContainersServer;
use davit_proto::containerd::services::content::v1::content_server::ContentServer;
use davit_proto::containerd::services::diff::v1::diff_server::DiffServer;
use davit_proto::containerd::services::events::v1::events_server::EventsServer;
use davit_proto::containerd::services::images::v1::images_server::ImagesServer;
use davit_proto::containerd::services::introspection::v1::introspection_server::IntrospectionServer;
use davit_proto::containerd::services::leases::v1::leases_server::LeasesServer;
use davit_proto::containerd::services::mounts::v1::mounts_server::MountsServer;
use davit_proto::containerd::services::namespaces::v1::namespaces_server::NamespacesServer;
use davit_proto::containerd::services::sandbox::v1::controller_server::ControllerServer;
use davit_proto::containerd::services::sandbox::v1::store_server::StoreServer;
use davit_proto::containerd::services::snapshots::v1::snapshots_server::SnapshotsServer;
use davit_proto::containerd::services::streaming::v1::streaming_server::StreamingServer;
use davit_proto::containerd::services::tasks::v1::tasks_server::TasksServer;
use davit_proto::containerd::services::transfer::v1::transfer_server::TransferServer;
use davit_proto::containerd::services::version::v1::version_server::VersionServer;
use davit_proto::davit::services::events::v1::events_server::EventsServer as HistoryServer;
use davit_proto::davit::services::shims::v1::shims_server::ShimsServer;
use tonic::service::Routes;

use crate::checkpoint::Checkpoints;
use crate::config;
use crate::differs::Differs;
use crate::events::{History, Hub};
use crate::lane::Lane;
use crate::metadata::Metadata;
use crate::plugins::Plugin;
use crate::proxy::ProxyController;
use crate::runtime::{Sandboxes, Tasks};
use crate::transfer::Transfers;

/// What the services are made of.
pub struct Parts {
    /// What the daemon knows.
    pub metadata: Metadata,
    /// What runs.
    pub tasks: Tasks,
    /// The sandboxes that shims run.
    pub sandboxes: Sandboxes,
    /// Those that other processes run, by their controllers.
    pub controllers: BTreeMap<String, ProxyController>,
    /// What happens.
    pub hub: Hub,
    /// What has happened.
    pub history: History,
    /// Who makes and applies layers.
    pub differs: Differs,
    /// Where they do.
    pub layers: Lane,
    /// What clients are told that there is.
    pub plugins: Arc<[Plugin]>,
}

/// All services, with their limits. The identity of the daemon is kept in `identity`.
///
/// # Errors
/// The identity can be neither read nor written.
pub async fn routes(parts: Parts, identity: &Path, limits: &config::Grpc) -> io::Result<Routes> {
    let Parts { metadata, tasks, sandboxes, controllers, hub, history, differs, layers, plugins } = parts;
    let introspection = introspection::IntrospectionService::open(identity, plugins, tasks.clone())?;
    let (health, health_server) = tonic_health::server::health_reporter();
    health.set_service_status("", tonic_health::ServingStatus::Serving).await;

    /// Adds a service with the limits of the configuration.
    macro_rules! serve {
        ($routes:expr, $server:ident, $service:expr) => {
            $routes.add_service(
                $server::new($service)
                    .max_decoding_message_size(limits.max_recv_message_size)
                    .max_encoding_message_size(limits.max_send_message_size),
            )
        };
    }
    let routes = Routes::new(health_server);
    let routes = serve!(routes, VersionServer, version::VersionService);
    let routes = serve!(routes, IntrospectionServer, introspection);
    let routes = serve!(routes, NamespacesServer, namespaces::NamespacesService::new(metadata.clone()));
    let routes = serve!(routes, ContentServer, content::ContentService::new(metadata.clone()));
    let routes = serve!(routes, ImagesServer, images::ImagesService::new(metadata.clone()));
    let routes = serve!(routes, ContainersServer, containers::ContainersService::new(metadata.clone()));
    let routes = serve!(routes, SnapshotsServer, snapshots::SnapshotsService::new(metadata.clone()));
    let routes = serve!(routes, DiffServer, diff::DiffService::new(metadata.clone(), differs.clone()));
    let checkpoints = Checkpoints::new(metadata.clone(), tasks.clone(), layers);
    let transfers = Transfers::new(metadata.clone(), differs);
    let transfers = transfer::TransferService::new(transfers, metadata.streams().clone());
    let routes = serve!(routes, TransferServer, transfers);
    let routes = serve!(routes, LeasesServer, leases::LeasesService::new(metadata.clone()));
    let routes =
        serve!(routes, StreamingServer, streaming::StreamingService::new(metadata.streams().clone()));
    let routes = serve!(routes, MountsServer, mounts::MountsService::new(metadata.clone()));
    let routes = serve!(routes, StoreServer, sandboxes::StoreService::new(metadata.clone()));
    let routes = serve!(routes, ControllerServer, sandboxes::ControllerService::new(sandboxes, controllers));
    let routes = serve!(routes, EventsServer, events::EventsService::new(hub));
    let routes = serve!(routes, HistoryServer, history::HistoryService::new(history));
    let routes = serve!(routes, ShimsServer, shims::ShimsService::new(tasks.clone()));
    Ok(serve!(routes, TasksServer, tasks::TasksService::new(metadata, tasks, checkpoints)))
}
