//! Carries out the calls on a daemon, and puts its answers into documents that can be compared.
//!
//! A document has all that a client sees but the times. Its members are named as the field masks and filters of the API
//! name them, so that a mask can be carried out on it and a filter be asked of it.

mod content;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use davit_proto::containerd::services::containers::v1 as containers;
use davit_proto::containerd::services::containers::v1::containers_client::ContainersClient;
use davit_proto::containerd::services::content::v1::content_client::ContentClient;
use davit_proto::containerd::services::images::v1 as images;
use davit_proto::containerd::services::images::v1::images_client::ImagesClient;
use davit_proto::containerd::services::leases::v1 as leases;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use davit_proto::containerd::services::namespaces::v1 as namespaces;
use davit_proto::containerd::services::namespaces::v1::namespaces_client::NamespacesClient;
use davit_proto::containerd::services::sandbox::v1 as sandboxes;
use davit_proto::containerd::services::sandbox::v1::store_client::StoreClient;
use davit_proto::containerd::services::snapshots::v1 as snapshots;
use davit_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use davit_proto::containerd::types;
use prost_types::{Any, FieldMask};
use serde_json::{Value, json};
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::call::{Call, Labels, NewSnapshot, Step};
use super::world::{document, labels, text};
use crate::client::connect;

/// An answer as it came: a document, or an error with its text.
pub type Reply = Result<Value, Status>;

/// The headers of a call.
#[derive(Clone)]
pub(super) struct Headers {
    namespace: Option<String>,
    lease: Option<String>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (key, value) in [("containerd-namespace", &self.namespace), ("containerd-lease", &self.lease)] {
            if let Some(value) = value {
                let value = MetadataValue::try_from(value.as_str());
                let value = value.map_err(|error| Status::internal(error.to_string()))?;
                request.metadata_mut().insert(key, value);
            }
        }
        Ok(request)
    }
}

/// A connection to a daemon.
#[derive(Debug, Clone)]
pub struct Wire {
    channel: Channel,
}

impl Wire {
    /// Connects to the daemon on `socket`.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn connect(socket: &Path) -> Result<Wire> {
        Ok(Wire { channel: connect(socket).await? })
    }

    /// Carries out a call.
    ///
    /// # Errors
    /// What the daemon answers.
    pub async fn answer(&self, step: &Step) -> Reply {
        let headers = Headers { namespace: step.namespace.clone(), lease: step.lease.clone() };
        let conn = InterceptedService::new(self.channel.clone(), headers);
        let service = step.call.method().split('.').next().unwrap_or_default();
        match service {
            "Namespaces" => of_namespaces(NamespacesClient::new(conn), &step.call).await,
            "Containers" => of_containers(ContainersClient::new(conn), &step.call).await,
            "Images" => of_images(ImagesClient::new(conn), &step.call).await,
            "Content" => content::answer(ContentClient::new(conn), &step.call).await,
            "Leases" => of_leases(LeasesClient::new(conn), &step.call).await,
            "Store" => of_sandboxes(StoreClient::new(conn), &step.call).await,
            _ => of_snapshots(SnapshotsClient::new(conn), &step.call).await,
        }
    }
}

type Conn = InterceptedService<Channel, Headers>;

/// The table above sent a call to a service that is not its own.
fn misplaced(call: &Call) -> Reply {
    Err(Status::internal(format!("no service for {}", call.method())))
}

fn mask(paths: &[String]) -> Option<FieldMask> {
    (!paths.is_empty()).then(|| FieldMask { paths: paths.to_vec() })
}

/// All messages of a stream.
async fn all<T>(mut stream: Streaming<T>) -> Result<Vec<T>, Status> {
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

/// An Any is written as its type and its bytes, which the calls here make texts.
fn any(document: &Value) -> Option<Any> {
    let (url, value) = document.as_str()?.split_once(' ')?;
    Some(Any { type_url: url.to_owned(), value: value.as_bytes().to_vec() })
}

fn any_document(any: Option<Any>) -> Value {
    any.map_or(Value::Null, |any| json!(format!("{} {}", any.type_url, String::from_utf8_lossy(&any.value))))
}

fn extensions(record: &Value) -> BTreeMap<String, Any> {
    let map = record["extensions"].as_object().cloned().unwrap_or_default();
    map.into_iter().filter_map(|(name, value)| Some((name, any(&value)?))).collect()
}

fn extensions_document(extensions: BTreeMap<String, Any>) -> Value {
    extensions.into_iter().map(|(name, value)| (name, any_document(Some(value)))).collect()
}

async fn of_namespaces(mut client: NamespacesClient<Conn>, call: &Call) -> Reply {
    use namespaces::{
        CreateNamespaceRequest, DeleteNamespaceRequest, GetNamespaceRequest, ListNamespacesRequest,
        Namespace, UpdateNamespaceRequest,
    };
    let document = |namespace: Namespace| json!({ "name": namespace.name, "labels": namespace.labels });
    let wanted =
        |name: &String, labels: &Labels| Some(Namespace { name: name.clone(), labels: labels.clone() });
    match call {
        Call::GetNamespace { name } => {
            let answer = client.get(GetNamespaceRequest { name: name.clone() }).await?.into_inner();
            Ok(document(answer.namespace.unwrap_or_default()))
        }
        Call::ListNamespaces => {
            let answer = client.list(ListNamespacesRequest::default()).await?.into_inner();
            Ok(answer.namespaces.into_iter().map(document).collect())
        }
        Call::CreateNamespace { name, labels } => {
            let request = CreateNamespaceRequest { namespace: wanted(name, labels) };
            let answer = client.create(request).await?.into_inner().namespace.unwrap_or_default();
            // containerd answers with what was asked for, empty labels included.
            let kept = answer.labels.into_iter().filter(|(_, value)| !value.is_empty()).collect();
            Ok(document(Namespace { labels: kept, ..answer }))
        }
        Call::UpdateNamespace { name, labels, mask: paths } => {
            let request =
                UpdateNamespaceRequest { namespace: wanted(name, labels), update_mask: mask(paths) };
            // containerd leaves the answer empty.
            client.update(request).await?;
            Ok(Value::Null)
        }
        Call::DeleteNamespace { name } => {
            client.delete(DeleteNamespaceRequest { name: name.clone() }).await?;
            Ok(Value::Null)
        }
        _ => misplaced(call),
    }
}

async fn of_containers(mut client: ContainersClient<Conn>, call: &Call) -> Reply {
    use containers::{
        Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest,
        ListContainersRequest, UpdateContainerRequest, container::Runtime,
    };
    let document = |container: Container| {
        let Runtime { name, options } = container.runtime.unwrap_or_default();
        document([
            ("id", json!(container.id)),
            ("labels", json!(container.labels)),
            ("image", json!(container.image)),
            ("runtime", json!({ "name": name, "options": any_document(options) })),
            ("spec", any_document(container.spec)),
            ("snapshotter", json!(container.snapshotter)),
            ("snapshotkey", json!(container.snapshot_key)),
            ("extensions", extensions_document(container.extensions)),
            ("sandbox", json!(container.sandbox)),
        ])
    };
    let message = |record: &Value| Container {
        id: text(record, "id"),
        labels: labels(record),
        image: text(record, "image"),
        runtime: Some(Runtime {
            name: text(&record["runtime"], "name"),
            options: any(&record["runtime"]["options"]),
        }),
        spec: any(&record["spec"]),
        snapshotter: text(record, "snapshotter"),
        snapshot_key: text(record, "snapshotkey"),
        extensions: extensions(record),
        sandbox: text(record, "sandbox"),
        ..Container::default()
    };
    match call {
        Call::GetContainer { id } => {
            let answer = client.get(GetContainerRequest { id: id.clone() }).await?.into_inner();
            Ok(document(answer.container.unwrap_or_default()))
        }
        Call::ListContainers { filters } => {
            let answer = client.list(ListContainersRequest { filters: filters.texts() }).await?.into_inner();
            Ok(answer.containers.into_iter().map(document).collect())
        }
        Call::StreamContainers { filters } => {
            let request = ListContainersRequest { filters: filters.texts() };
            let messages = all(client.list_stream(request).await?.into_inner()).await?;
            Ok(messages.into_iter().filter_map(|message| message.container).map(document).collect())
        }
        Call::CreateContainer { record } => {
            let request = CreateContainerRequest { container: Some(message(record)) };
            Ok(document(client.create(request).await?.into_inner().container.unwrap_or_default()))
        }
        Call::UpdateContainer(change) => {
            let container = Some(message(&change.record));
            let request = UpdateContainerRequest { container, update_mask: mask(&change.mask) };
            Ok(document(client.update(request).await?.into_inner().container.unwrap_or_default()))
        }
        Call::DeleteContainer { id } => {
            client.delete(DeleteContainerRequest { id: id.clone() }).await?;
            Ok(Value::Null)
        }
        _ => misplaced(call),
    }
}

async fn of_images(mut client: ImagesClient<Conn>, call: &Call) -> Reply {
    use images::{
        CreateImageRequest, DeleteImageRequest, GetImageRequest, Image, ListImagesRequest, UpdateImageRequest,
    };
    let document = |image: Image| {
        let target = image.target.unwrap_or_default();
        json!({
            "name": image.name,
            "labels": image.labels,
            "target": { "digest": target.digest, "size": target.size, "mediatype": target.media_type },
            "annotations": target.annotations,
        })
    };
    let message = |record: &Value| {
        let target = &record["target"];
        let annotations = labels(&json!({ "labels": record["annotations"] }));
        let descriptor = types::Descriptor {
            media_type: text(target, "mediatype"),
            digest: text(target, "digest"),
            size: target["size"].as_i64().unwrap_or_default(),
            annotations,
        };
        let (name, labels) = (text(record, "name"), labels(record));
        Some(Image { name, labels, target: Some(descriptor), ..Image::default() })
    };
    match call {
        Call::GetImage { name } => {
            let answer = client.get(GetImageRequest { name: name.clone() }).await?.into_inner();
            Ok(document(answer.image.unwrap_or_default()))
        }
        Call::ListImages { filters } => {
            let answer = client.list(ListImagesRequest { filters: filters.texts() }).await?.into_inner();
            Ok(answer.images.into_iter().map(document).collect())
        }
        Call::CreateImage { record } => {
            let request = CreateImageRequest { image: message(record), source_date_epoch: None };
            Ok(document(client.create(request).await?.into_inner().image.unwrap_or_default()))
        }
        Call::UpdateImage(change) => {
            let image = message(&change.record);
            let request =
                UpdateImageRequest { image, update_mask: mask(&change.mask), source_date_epoch: None };
            Ok(document(client.update(request).await?.into_inner().image.unwrap_or_default()))
        }
        Call::DeleteImage { name, target, sync } => {
            let target = target.clone().map(|digest| types::Descriptor { digest, ..Default::default() });
            client.delete(DeleteImageRequest { name: name.clone(), sync: *sync, target }).await?;
            Ok(Value::Null)
        }
        _ => misplaced(call),
    }
}

async fn of_leases(mut client: LeasesClient<Conn>, call: &Call) -> Reply {
    use leases::{
        AddResourceRequest, CreateRequest, DeleteRequest, DeleteResourceRequest, Lease, ListRequest,
        ListResourcesRequest, Resource,
    };
    let document = |lease: Lease| json!({ "id": lease.id, "labels": lease.labels });
    let resource = |resource: &super::call::Resource| {
        Some(Resource { id: resource.id.clone(), r#type: resource.kind.clone() })
    };
    match call {
        Call::CreateLease { id, labels } => {
            let answer = client.create(CreateRequest { id: id.clone(), labels: labels.clone() }).await?;
            Ok(document(answer.into_inner().lease.unwrap_or_default()))
        }
        Call::DeleteLease { id, sync } => {
            client.delete(DeleteRequest { id: id.clone(), sync: *sync }).await?;
            Ok(Value::Null)
        }
        Call::ListLeases { filters } => {
            let answer = client.list(ListRequest { filters: filters.texts() }).await?.into_inner();
            Ok(answer.leases.into_iter().map(document).collect())
        }
        Call::AddResource(what) => {
            let request = AddResourceRequest { id: what.lease.clone(), resource: resource(what) };
            client.add_resource(request).await?;
            Ok(Value::Null)
        }
        Call::DeleteResource(what) => {
            let request = DeleteResourceRequest { id: what.lease.clone(), resource: resource(what) };
            client.delete_resource(request).await?;
            Ok(Value::Null)
        }
        Call::ListResources { lease } => {
            let answer = client.list_resources(ListResourcesRequest { id: lease.clone() }).await?;
            let held = answer.into_inner().resources.into_iter();
            Ok(held.map(|held| json!([held.r#type, held.id])).collect())
        }
        _ => misplaced(call),
    }
}

async fn of_sandboxes(mut client: StoreClient<Conn>, call: &Call) -> Reply {
    use sandboxes::{
        StoreCreateRequest, StoreDeleteRequest, StoreGetRequest, StoreListRequest, StoreUpdateRequest,
    };
    use types::sandbox::Runtime;
    let document = |sandbox: types::Sandbox| {
        let Runtime { name, options } = sandbox.runtime.unwrap_or_default();
        json!({
            "id": sandbox.sandbox_id,
            "labels": sandbox.labels,
            "runtime": { "name": name, "options": any_document(options) },
            "spec": any_document(sandbox.spec),
            "extensions": extensions_document(sandbox.extensions),
            "sandboxer": sandbox.sandboxer,
        })
    };
    let message = |record: &Value| {
        let runtime = &record["runtime"];
        Some(types::Sandbox {
            sandbox_id: text(record, "id"),
            runtime: Some(Runtime { name: text(runtime, "name"), options: any(&runtime["options"]) }),
            spec: any(&record["spec"]),
            labels: labels(record),
            extensions: extensions(record),
            sandboxer: text(record, "sandboxer"),
            ..types::Sandbox::default()
        })
    };
    match call {
        Call::GetSandbox { id } => {
            let answer = client.get(StoreGetRequest { sandbox_id: id.clone() }).await?.into_inner();
            Ok(document(answer.sandbox.unwrap_or_default()))
        }
        Call::ListSandboxes { filters } => {
            let answer = client.list(StoreListRequest { filters: filters.texts() }).await?.into_inner();
            Ok(answer.list.into_iter().map(document).collect())
        }
        Call::CreateSandbox { record } => {
            let answer = client.create(StoreCreateRequest { sandbox: message(record) }).await?;
            Ok(document(answer.into_inner().sandbox.unwrap_or_default()))
        }
        Call::UpdateSandbox(change) => {
            let sandbox = message(&change.record);
            let answer = client.update(StoreUpdateRequest { sandbox, fields: change.mask.clone() }).await?;
            Ok(document(answer.into_inner().sandbox.unwrap_or_default()))
        }
        Call::DeleteSandbox { id } => {
            client.delete(StoreDeleteRequest { sandbox_id: id.clone() }).await?;
            Ok(Value::Null)
        }
        _ => misplaced(call),
    }
}

async fn of_snapshots(mut client: SnapshotsClient<Conn>, call: &Call) -> Reply {
    use snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
        PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
        UsageRequest, ViewSnapshotRequest,
    };
    let info = |info: Info| {
        let kind = info.kind().as_str_name().to_lowercase();
        json!({ "name": info.name, "kind": kind, "parent": info.parent, "labels": info.labels })
    };
    match call {
        Call::Prepare(NewSnapshot { at, parent, labels }) => {
            let request = PrepareSnapshotRequest {
                snapshotter: at.snapshotter.clone(),
                key: at.key.clone(),
                parent: parent.clone(),
                labels: labels.clone(),
            };
            Ok(client.prepare(request).await?.into_inner().mounts.iter().map(mount).collect())
        }
        Call::View(NewSnapshot { at, parent, labels }) => {
            let request = ViewSnapshotRequest {
                snapshotter: at.snapshotter.clone(),
                key: at.key.clone(),
                parent: parent.clone(),
                labels: labels.clone(),
            };
            Ok(client.view(request).await?.into_inner().mounts.iter().map(mount).collect())
        }
        Call::Mounts(at) => {
            let request = MountsRequest { snapshotter: at.snapshotter.clone(), key: at.key.clone() };
            Ok(client.mounts(request).await?.into_inner().mounts.iter().map(mount).collect())
        }
        Call::Commit { new: NewSnapshot { at, parent, labels }, from } => {
            let request = CommitSnapshotRequest {
                snapshotter: at.snapshotter.clone(),
                name: at.key.clone(),
                key: from.clone(),
                labels: labels.clone(),
                parent: parent.clone(),
            };
            client.commit(request).await?;
            Ok(Value::Null)
        }
        Call::Remove(at) => {
            let request = RemoveSnapshotRequest { snapshotter: at.snapshotter.clone(), key: at.key.clone() };
            client.remove(request).await?;
            Ok(Value::Null)
        }
        Call::Stat(at) => {
            let request = StatSnapshotRequest { snapshotter: at.snapshotter.clone(), key: at.key.clone() };
            Ok(info(client.stat(request).await?.into_inner().info.unwrap_or_default()))
        }
        Call::UpdateSnapshot { snapshotter, change } => {
            let (name, labels) = (text(&change.record, "name"), labels(&change.record));
            let request = UpdateSnapshotRequest {
                snapshotter: snapshotter.clone(),
                info: Some(Info { name, labels, ..Info::default() }),
                update_mask: mask(&change.mask),
            };
            Ok(info(client.update(request).await?.into_inner().info.unwrap_or_default()))
        }
        Call::ListSnapshots { snapshotter, filters } => {
            let request = ListSnapshotsRequest { snapshotter: snapshotter.clone(), filters: filters.texts() };
            let pages = all(client.list(request).await?.into_inner()).await?;
            Ok(pages.into_iter().flat_map(|page| page.info).map(info).collect())
        }
        Call::Usage(at) => {
            let request = UsageRequest { snapshotter: at.snapshotter.clone(), key: at.key.clone() };
            let usage = client.usage(request).await?.into_inner();
            // Sizes are the filesystem's matter.
            if usage.size < 0 || usage.inodes < 0 { Ok(json!("negative")) } else { Ok(Value::Null) }
        }
        Call::Cleanup { snapshotter } => {
            client.cleanup(CleanupRequest { snapshotter: snapshotter.clone() }).await?;
            Ok(Value::Null)
        }
        _ => misplaced(call),
    }
}

/// A mount without its paths.
fn mount(mount: &types::Mount) -> Value {
    let of = |key: &str| mount.options.iter().find_map(|option| option.strip_prefix(key));
    if mount.r#type == "overlay" {
        let lowers = of("lowerdir=").map_or(0, |lowers| lowers.split(':').count());
        let upper = of("upperdir=").is_some() && of("workdir=").is_some();
        return json!({ "type": "overlay", "lowers": lowers, "upper": upper });
    }
    let mut options = mount.options.clone();
    options.sort();
    json!({ "type": mount.r#type, "options": options })
}
