//! Containers of the daemon: ids, finding one by what a user typed, and the state of its task.

use std::collections::BTreeMap;
use std::io::Read;
use std::time::SystemTime;

use davit_model::identifier;
use davit_proto::any;
use davit_proto::containerd::events::TaskExit;
use davit_proto::containerd::services::containers::v1 as api;
use davit_proto::containerd::services::tasks::v1::{GetRequest, ListTasksRequest};
use davit_proto::containerd::v1::types::{Process, Status};
use davit_proto::davit::services::events::v1::ListRequest;
use davit_proto::davit::services::events::v1::entry::What;
use tonic::Code;

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::{format, labels};

/// The state of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// Made, and never started; or the host was restarted since.
    Created,
    /// Running.
    Running {
        /// The first process, as the host numbers it.
        pid: u32,
    },
    /// Frozen.
    Paused {
        /// The first process, as the host numbers it.
        pid: u32,
    },
    /// Over.
    Exited {
        /// The exit code.
        code: u32,
        /// When, as far as it is known.
        at: Option<SystemTime>,
    },
}

impl State {
    /// Docker's word for it.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            State::Created => "created",
            State::Running { .. } => "running",
            State::Paused { .. } => "paused",
            State::Exited { .. } => "exited",
        }
    }

    /// Whether it has a live process.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self, State::Running { .. } | State::Paused { .. })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            State::Running { pid } | State::Paused { pid } => Some(*pid),
            State::Created | State::Exited { .. } => None,
        }
    }
}

/// A new random id of 64 hexadecimal digits.
///
/// # Errors
/// When the kernel gives no random bytes.
pub(crate) fn new_id() -> Result<String> {
    let mut bytes = [0_u8; 32];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|source| Error::System { action: "read random bytes", source })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The name of a container; the short id when it has none.
pub(crate) fn name(container: &api::Container) -> String {
    container.labels.get(labels::NAME).cloned().unwrap_or_else(|| format::short_id(&container.id).to_owned())
}

/// Every container of the namespace, in the order of their making.
pub(crate) async fn list(client: &Client, filters: Vec<String>) -> Result<Vec<api::Container>> {
    let action = "list the containers";
    let request = api::ListContainersRequest { filters };
    // One by one, because a thousand specs do not fit into one message.
    let mut containers = match client.containers().list_stream(request.clone()).await {
        Err(status) if status.code() == Code::Unimplemented => {
            client.containers().list(request).await.call(action)?.containers
        }
        other => {
            let mut stream = other.call(action)?;
            let mut containers = Vec::new();
            while let Some(message) =
                stream.message().await.map_err(|status| Error::Call { action: action.to_owned(), status })?
            {
                containers.extend(message.container);
            }
            containers
        }
    };
    containers.sort_by_key(|container| container.created_at.map(|time| (time.seconds, time.nanos)));
    Ok(containers)
}

/// Finds a container by id, by name, or by a start of its id that no other has.
///
/// # Errors
/// [`Error::NoContainer`], [`Error::Ambiguous`], and those of the call.
pub(crate) async fn find(client: &Client, given: &str) -> Result<api::Container> {
    let none = || Error::NoContainer { given: given.to_owned() };
    if identifier::validate(given).is_err() {
        return Err(none());
    }
    let filters = vec![
        format!("id=={given}"),
        format!("labels.\"{}\"=={given}", labels::NAME),
        format!("id~=/^{}/", given.replace('.', "\\.")),
    ];
    let found = list(client, filters).await?;
    let exact = found.iter().find(|container| container.id == given);
    let named = || found.iter().find(|c| c.labels.get(labels::NAME).is_some_and(|name| name == given));
    if let Some(container) = exact.or_else(named) {
        return Ok(container.clone());
    }
    match found.as_slice() {
        [] => Err(none()),
        [container] => Ok(container.clone()),
        several => {
            let matches =
                several.iter().map(|container| format::short_id(&container.id).to_owned()).collect();
            Err(Error::Ambiguous { given: given.to_owned(), matches })
        }
    }
}

/// The task of a container, `None` when it has none.
pub(crate) async fn task(client: &Client, id: &str) -> Result<Option<Process>> {
    let request = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
    match client.tasks().get(request).await.call(format!("look up the task of {}", format::short_id(id))) {
        Ok(response) => Ok(response.process),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The tasks of the namespace.
pub(crate) async fn tasks(client: &Client) -> Result<Vec<Process>> {
    let request = ListTasksRequest { filter: String::new() };
    Ok(client.tasks().list(request).await.call("list the tasks")?.tasks)
}

/// The state of a container, from its task or, without one, from what was written down when it exited.
pub(crate) fn state_of(container: &api::Container, task: Option<&Process>) -> State {
    let Some(task) = task else {
        let code = container.labels.get(labels::EXIT_CODE).and_then(|code| code.parse().ok());
        let at = container.labels.get(labels::EXITED_AT).and_then(|at| format::parse_rfc3339(at));
        return code.map_or(State::Created, |code| State::Exited { code, at });
    };
    match task.status() {
        Status::Running => State::Running { pid: task.pid },
        Status::Paused | Status::Pausing => State::Paused { pid: task.pid },
        Status::Stopped => State::Exited {
            code: task.exit_status,
            at: task.exited_at.as_ref().and_then(format::system_time),
        },
        Status::Created | Status::Unknown => State::Created,
    }
}

/// How those of these containers ended that have no task and of which nobody has written it down, because their shim was
/// killed: the daemon's history may know. Other daemons have none.
pub(crate) async fn past_exits(client: &Client, containers: &[&api::Container]) -> BTreeMap<String, State> {
    let mut exits = BTreeMap::new();
    let namespace = client.namespace();
    let of = |id: &str| {
        format!("namespace=={namespace},topic==\"/tasks/exit\",event.container_id=={id},event.id=={id}")
    };
    let filters: Vec<String> = containers.iter().map(|container| of(&container.id)).collect();
    if filters.is_empty() {
        return exits;
    }
    let request = ListRequest { filters, ..ListRequest::default() };
    let Ok(stream) = client.history().list(request).await else { return exits };
    let mut stream = stream.into_inner();
    while let Ok(Some(entry)) = stream.message().await {
        let Some(What::Event(event)) = entry.what else { continue };
        let event = event.envelope.and_then(|envelope| envelope.event);
        let Some(Ok(Some(exit))) = event.map(|event| any::unpack::<TaskExit>(&event)) else { continue };
        let at = exit.exited_at.as_ref().and_then(format::system_time);
        let created = containers.iter().find(|container| container.id == exit.container_id);
        let created =
            created.and_then(|container| container.created_at.as_ref().and_then(format::system_time));
        // Another container may have had the id before.
        if at >= created {
            exits.insert(exit.container_id, State::Exited { code: exit.exit_status, at });
        }
    }
    exits
}

/// The state of one container.
///
/// # Errors
/// Those of the call.
pub(crate) async fn state(client: &Client, container: &api::Container) -> Result<State> {
    Ok(state_of(container, task(client, &container.id).await?.as_ref()))
}

/// The runtime spec of a container, as it was stored.
///
/// # Errors
/// [`Error::Stored`] when it is no JSON.
pub(crate) fn spec(container: &api::Container) -> Result<serde_json::Value> {
    let value = container.spec.as_ref().map_or(&b"{}"[..], |any| &any.value);
    serde_json::from_slice(value).map_err(|source| Error::Stored {
        what: "the spec",
        id: format::short_id(&container.id).to_owned(),
        source,
    })
}

/// The texts of a JSON array.
pub(crate) fn strings(value: &serde_json::Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|item| item.as_str()).map(str::to_owned).collect()
}

/// Sets labels of a container; an empty value removes one.
///
/// # Errors
/// Those of the call.
pub(crate) async fn set_labels(client: &Client, id: &str, labels: Vec<(&str, String)>) -> Result<()> {
    let paths = labels.iter().map(|(key, _)| format!("labels.{key}")).collect();
    let labels = labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let request = api::UpdateContainerRequest {
        container: Some(api::Container { id: id.to_owned(), labels, ..Default::default() }),
        update_mask: Some(prost_types::FieldMask { paths }),
    };
    client.containers().update(request).await.call(format!("label container {}", format::short_id(id)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_random_and_well_formed() {
        let (one, two) = (new_id().unwrap(), new_id().unwrap());
        assert_eq!(one.len(), 64);
        assert_ne!(one, two);
        assert_eq!(identifier::validate(&one), Ok(()));
    }

    #[test]
    fn states_of_tasks_and_of_what_was_written_down() {
        let mut container = api::Container::default();
        assert_eq!(state_of(&container, None), State::Created);
        let mut task = Process { pid: 7, exit_status: 137, ..Process::default() };
        for (status, want) in [
            (Status::Created, State::Created),
            (Status::Running, State::Running { pid: 7 }),
            (Status::Pausing, State::Paused { pid: 7 }),
            (Status::Stopped, State::Exited { code: 137, at: None }),
        ] {
            task.set_status(status);
            assert_eq!(state_of(&container, Some(&task)), want);
        }
        container.labels.insert(labels::EXIT_CODE.to_owned(), "3".to_owned());
        container.labels.insert(labels::EXITED_AT.to_owned(), "1970-01-12T13:46:40Z".to_owned());
        let State::Exited { code, at } = state_of(&container, None) else { panic!("not exited") };
        assert_eq!(code, 3);
        assert!(at.is_some());
    }
}
