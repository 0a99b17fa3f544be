//! Small rules of containerd's API, to the letter: what a daemon in its place answers to calls that are odd, wrong or
//! incomplete. (Each was compared with containerd 2.3.4, which dies of some of those that lack a message.)

use anyhow::{Context, Result, ensure};
use davit_integration::Daemon;
use davit_integration::client::{Conn, connect};
use davit_proto::containerd::services::containers::v1 as containers;
use davit_proto::containerd::services::containers::v1::containers_client::ContainersClient;
use davit_proto::containerd::services::content::v1 as content;
use davit_proto::containerd::services::content::v1::content_client::ContentClient;
use davit_proto::containerd::services::content::v1::{
    WriteAction, WriteContentRequest, WriteContentResponse,
};
use davit_proto::containerd::services::events::v1::ForwardRequest;
use davit_proto::containerd::services::events::v1::events_client::EventsClient;
use davit_proto::containerd::services::images::v1 as images;
use davit_proto::containerd::services::images::v1::images_client::ImagesClient;
use davit_proto::containerd::services::introspection::v1::PluginsRequest;
use davit_proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use davit_proto::containerd::services::leases::v1 as leases;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use davit_proto::containerd::services::sandbox::v1::StoreCreateRequest;
use davit_proto::containerd::services::sandbox::v1::store_client::StoreClient;
use davit_proto::containerd::types;
use tokio_stream::StreamExt;
use tonic::{Code, Status};

use super::{conn, refused, runtime};
use crate::root;

/// Runs one test against a daemon of its own.
fn with_daemon(test: impl AsyncFnOnce(Conn) -> Result<()>) -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    runtime()?.block_on(async { test(conn(&daemon, None).await?).await })
}

fn write(action: WriteAction, offset: i64, data: &'static str) -> WriteContentRequest {
    WriteContentRequest {
        action: action.into(),
        r#ref: "r".into(),
        offset,
        data: data.into(),
        ..Default::default()
    }
}

/// All answers of one writing session, and how it ended.
async fn session(
    client: &mut ContentClient<Conn>,
    requests: Vec<WriteContentRequest>,
) -> Result<(Vec<WriteContentResponse>, Option<Status>)> {
    let mut answers = client.write(tokio_stream::iter(requests)).await?.into_inner();
    let mut got = Vec::new();
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(answer) => got.push(answer),
            Err(status) => return Ok((got, Some(status))),
        }
    }
    Ok((got, None))
}

#[test]
fn a_writer_tells_what_it_told_before() -> Result<()> {
    with_daemon(async |conn| {
        let mut client = ContentClient::new(conn);
        // Times and total, once told, are in every later answer; the last answer comes twice.
        let requests = vec![
            WriteContentRequest { total: 9, ..write(WriteAction::Stat, 0, "") },
            write(WriteAction::Write, 0, "hello"),
            // A negative offset goes on where the ingest ends.
            write(WriteAction::Write, -1, " you"),
        ];
        let (answers, status) = session(&mut client, requests).await?;
        ensure!(status.is_none() && answers.len() == 4, "{answers:?} {status:?}");
        ensure!(answers.iter().map(|answer| answer.offset).eq([0, 5, 9, 9]), "{answers:?}");
        for answer in &answers {
            ensure!(answer.total == 9 && answer.started_at == answers[0].started_at, "{answer:?}");
            ensure!(answer.started_at.is_some() && answer.updated_at.is_some(), "{answer:?}");
        }
        ensure!(answers[2] == answers[3]);

        // An offset of zero begins anew, in a commit as well. A negative total is none.
        let again = WriteContentRequest { total: -1, ..write(WriteAction::Commit, 0, "all new") };
        let (answers, status) = session(&mut client, vec![again]).await?;
        ensure!(status.is_none() && answers.len() == 2 && answers[0].offset == 7, "{answers:?} {status:?}");
        ensure!(answers[0].started_at.is_none(), "{answers:?}");
        let digest = answers[0].digest.clone();

        // The ingest is gone.
        let asked = client.status(content::StatusRequest { r#ref: "r".into() }).await;
        refused(asked, Code::NotFound, "could not get status for ref \"r\": reference r: not found");
        for (offset, size, wanted) in [(-3, 3, "all"), (4, -1, "new"), (7, 0, "")] {
            let request = content::ReadContentRequest { digest: digest.clone(), offset, size };
            let mut pieces = client.read(request).await?.into_inner();
            let mut data = Vec::new();
            while let Some(piece) = pieces.message().await? {
                data.extend_from_slice(&piece.data);
            }
            ensure!(data == wanted.as_bytes(), "{data:?}");
        }
        Ok(())
    })
}

#[test]
fn leases_hold_what_has_a_name() -> Result<()> {
    with_daemon(async |conn| {
        let mut client = LeasesClient::new(conn);
        let labels = [(String::new(), "v".to_owned())].into();
        let nameless = client.create(leases::CreateRequest { id: "x".into(), labels }).await;
        refused(nameless, Code::InvalidArgument, "label key must not be empty: invalid argument");
        // Beyond that, labels of a lease are not looked at: not even their size.
        let labels = [("k".to_owned(), "v".repeat(5000))].into();
        client.create(leases::CreateRequest { id: "l".into(), labels }).await?;
        let add = |id: &str, kind: &str, name: &str| leases::AddResourceRequest {
            id: id.into(),
            resource: Some(leases::Resource { id: name.into(), r#type: kind.into() }),
        };
        // A lease that is not there is what a client is told of first.
        let error = client.add_resource(add("none", "other", "")).await;
        refused(error, Code::NotFound, "lease \"none\": not found");
        for (kind, name, code, text) in [
            ("images", "", Code::InvalidArgument, "resource id must not be empty: invalid argument"),
            ("images/x", "i", Code::InvalidArgument, "invalid resource type images/x: invalid argument"),
            (
                "snapshots",
                "k",
                Code::InvalidArgument,
                "invalid snapshot resource type snapshots: invalid argument",
            ),
            ("streams", "s", Code::Unimplemented, "resource type streams not supported yet: not implemented"),
        ] {
            refused(client.add_resource(add("l", kind, name)).await, code, text);
        }
        // Nothing of what is held need exist, not even the snapshotter.
        for (kind, name) in [("ingests", "r"), ("snapshots/none", "k"), ("images", "a/b:c")] {
            client.add_resource(add("l", kind, name)).await?;
        }
        let held = client.list_resources(leases::ListResourcesRequest { id: "l".into() }).await?.into_inner();
        let kinds: Vec<_> = held.resources.iter().map(|resource| resource.r#type.as_str()).collect();
        ensure!(kinds == ["images", "ingests", "snapshots/none"], "{kinds:?}");
        Ok(())
    })
}

#[test]
fn a_container_says_what_it_lacks() -> Result<()> {
    with_daemon(async |conn| {
        let mut client = ContainersClient::new(conn);
        let whole = |id: &str| containers::Container {
            id: id.into(),
            runtime: Some(containers::container::Runtime { name: "r".into(), options: None }),
            spec: Some(prost_types::Any::default()),
            ..Default::default()
        };
        let create = |container| containers::CreateContainerRequest { container: Some(container) };
        let nameless = client.create(create(containers::Container { runtime: None, ..whole("c") })).await;
        let text = "create container failed validation: container.Runtime.Name must be set: invalid argument";
        refused(nameless, Code::InvalidArgument, text);
        let rule = "identifier \"a/b\" must match ^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$";
        let text = format!("create container failed validation: container.ID: {rule}: invalid argument");
        refused(client.create(create(whole("a/b"))).await, Code::InvalidArgument, &text);
        for id in ["one", "two", "three"] {
            client.create(create(whole(id))).await?;
        }
        let change = containers::UpdateContainerRequest {
            container: Some(containers::Container { snapshot_key: "k".into(), ..whole("one") }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["snapshotkey".into()] }),
        };
        let text = "update failed validation: container.Snapshotter must be set if container.SnapshotKey is set: \
                    invalid argument";
        refused(client.update(change).await, Code::InvalidArgument, text);
        let absent = client.delete(containers::DeleteContainerRequest { id: "none".into() }).await;
        refused(absent, Code::NotFound, "container none: not found");

        // One message for each container.
        let list = |filter: &str| containers::ListContainersRequest { filters: vec![filter.into()] };
        let mut stream = client.list_stream(list("id~=^t")).await?.into_inner();
        let mut ids = Vec::new();
        while let Some(message) = stream.message().await? {
            ids.push(message.container.context("a message without a container")?.id);
        }
        ensure!(ids == ["three", "two"], "{ids:?}");
        let broken = client.list_stream(list("(")).await.map(drop);
        let text = "filters: parse error: [ >|(|< ]: expected field or quoted: invalid argument";
        refused(broken, Code::InvalidArgument, text);
        Ok(())
    })
}

#[test]
fn what_is_left_out_of_a_request_harms_nobody() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    runtime()?.block_on(async {
        let conn = conn(&daemon, None).await?;
        let mut images = ImagesClient::new(conn.clone());
        let targetless = images::Image { name: "i".into(), ..Default::default() };
        for (image, text) in [
            (None, "image is required: invalid argument"),
            (Some(images::Image::default()), "Image.Name required: invalid argument"),
        ] {
            let request = images::CreateImageRequest { image, ..Default::default() };
            refused(images.create(request).await, Code::InvalidArgument, text);
        }
        let request = images::CreateImageRequest { image: Some(targetless.clone()), ..Default::default() };
        let error = images.create(request).await.expect_err("it has no target");
        ensure!(
            error.code() == Code::InvalidArgument
                && error.message().starts_with("target.Digest \"\" invalid")
        );
        let request = images::UpdateImageRequest { image: Some(targetless), ..Default::default() };
        refused(images.update(request).await, Code::NotFound, "image \"i\": not found");

        let mut store = StoreClient::new(conn.clone());
        let error = store.create(StoreCreateRequest::default()).await.expect_err("there is no sandbox");
        ensure!(error.code() == Code::InvalidArgument, "{error}");
        let sandbox = types::Sandbox { sandbox_id: "s".into(), ..Default::default() };
        store.create(StoreCreateRequest { sandbox: Some(sandbox) }).await?;

        let mut events = EventsClient::new(conn.clone());
        let error = events.forward(ForwardRequest::default()).await.expect_err("there is no envelope");
        ensure!(error.code() == Code::InvalidArgument, "{error}");
        // An event without a time is one of 1970.
        let event = |topic: &str| {
            let envelope = types::Envelope {
                namespace: "n".into(),
                topic: topic.into(),
                event: Some(prost_types::Any::default()),
                ..Default::default()
            };
            ForwardRequest { envelope: Some(envelope) }
        };
        events.forward(event("/a/b")).await?;
        for (topic, rule) in [
            ("a", "must start with '/'"),
            ("/", "must have at least one component"),
            ("/a//b", "failed validation on component \"\": identifier must not be empty"),
        ] {
            let text = format!("envelope topic {topic:?}: {rule}: invalid argument");
            refused(events.forward(event(topic)).await, Code::InvalidArgument, &text);
        }

        // No namespace is needed to look at the plugins, and a filter that is none is told of once.
        let mut introspection = IntrospectionClient::new(connect(&daemon.address()).await?);
        let broken = introspection.plugins(PluginsRequest { filters: vec!["type==".into()] }).await;
        let text = "filters: parse error: [type==]: expected value or quoted: invalid argument";
        refused(broken, Code::InvalidArgument, text);
        anyhow::Ok(())
    })
}
