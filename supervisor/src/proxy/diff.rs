//! A differ in another process. It reads and writes content by itself, as a client of this daemon.

use std::collections::BTreeMap;
use std::time::SystemTime;

use davit_model::{ErrorCode, Labels, Mount};
use davit_proto::containerd::services::diff::v1 as wire;
use davit_proto::containerd::services::diff::v1::diff_client::DiffClient;
use prost_types::Any;
use tonic::transport::Channel;

use super::connection::{Connection, Failure, MAX_MESSAGE};
use crate::grpc::convert::{descriptor_from_wire, descriptor_to_wire, mount_to_wire};
use crate::metadata::Descriptor;

/// A differ behind a socket. Clones are the same.
#[derive(Debug, Clone)]
pub struct ProxyDiffer {
    connection: Connection,
}

impl ProxyDiffer {
    pub(super) fn new(connection: Connection) -> ProxyDiffer {
        ProxyDiffer { connection }
    }

    fn client(&self) -> DiffClient<Channel> {
        DiffClient::new(self.connection.channel())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// Has a layer applied, and synced, and says what it was unpacked.
    ///
    /// # Errors
    /// The plugin's.
    pub async fn apply(
        &self,
        namespace: &str,
        layer: Descriptor,
        mounts: Vec<Mount>,
        payloads: BTreeMap<String, Any>,
    ) -> Result<Descriptor, Failure> {
        let message = wire::ApplyRequest {
            diff: Some(descriptor_to_wire(layer)),
            mounts: mounts.into_iter().map(mount_to_wire).collect(),
            payloads,
            sync_fs: true,
        };
        let request = self.connection.request(Some(namespace), self.connection.patience.layer, message);
        let answer =
            self.connection.answer(self.connection.patience.layer, self.client().apply(request)).await?;
        self.descriptor(answer.into_inner().applied)
    }

    /// Has the difference of two trees made a layer.
    ///
    /// # Errors
    /// The plugin's.
    pub async fn diff(
        &self,
        namespace: &str,
        [left, right]: [Vec<Mount>; 2],
        media_type: String,
        reference: String,
        labels: Labels,
        source_date_epoch: Option<SystemTime>,
    ) -> Result<Descriptor, Failure> {
        let message = wire::DiffRequest {
            left: left.into_iter().map(mount_to_wire).collect(),
            right: right.into_iter().map(mount_to_wire).collect(),
            media_type,
            r#ref: reference,
            labels,
            source_date_epoch: source_date_epoch.map(Into::into),
        };
        let request = self.connection.request(Some(namespace), self.connection.patience.layer, message);
        let answer =
            self.connection.answer(self.connection.patience.layer, self.client().diff(request)).await?;
        self.descriptor(answer.into_inner().diff)
    }

    /// That the plugin made a layer which is not in the content store.
    pub fn lost(&self, digest: &str) -> Failure {
        self.connection.error(ErrorCode::NotFound, format!("it made {digest}, which is not there"))
    }

    fn descriptor(
        &self,
        descriptor: Option<davit_proto::containerd::types::Descriptor>,
    ) -> Result<Descriptor, Failure> {
        let descriptor = descriptor.map(descriptor_from_wire);
        descriptor.ok_or_else(|| self.connection.nonsense("an answer without a descriptor"))
    }
}
