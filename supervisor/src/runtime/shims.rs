//! The shims themselves, beside the tasks in them: what they are, and upgrading them while their containers run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use davit_model::ErrorCode;
use davit_model::error::chain;
use davit_proto::davit::shim::v1 as private;

use super::shim::Shim;
use super::{Error, Tasks, binary, detached};
use crate::lane::Lane;

/// The private service of the project's own shims.
const SERVICE: &str = "davit.shim.v1.Shim";

/// The runtime whose shim is the one to upgrade to.
const OWN_RUNTIME: &str = "io.containerd.davit.v2";

/// The time for an upgrade: longer than a shim takes for one that it gives up (10 s for its calls, twice 5 for the checks).
const UPGRADE_LIMIT: Duration = Duration::from_secs(30);

/// A running shim.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningShim {
    /// The containers that it keeps, by id.
    pub containers: Vec<String>,
    /// Where it listens.
    pub address: String,
    /// Its process, zero when it did not say.
    pub pid: u32,
    /// Its proportional set size in bytes.
    pub memory: Option<u64>,
    /// What it says of itself, passed on as it is; or why there is nothing.
    pub status: Result<private::StatusResponse, String>,
}

impl Tasks {
    /// The shims of a namespace, in the order of their first containers. Those that are being started or removed are left
    /// out.
    pub async fn shims(&self, namespace: &str) -> Vec<RunningShim> {
        let mut groups: BTreeMap<String, (Shim, Vec<String>)> = BTreeMap::new();
        for (id, task) in self.shared.in_namespace(namespace) {
            let Some(shim) = task.view.borrow().shim.clone() else { continue };
            let address = shim.address().to_owned();
            groups.entry(address).or_insert_with(|| (shim, Vec::new())).1.push(id);
        }
        let limit = self.shared.config.timeouts.state;
        let described = groups
            .into_values()
            .map(|(shim, containers)| describe(&self.shared.lane, shim, containers, limit));
        let mut shims = futures::future::join_all(described).await;
        shims.sort_by(|one, other| one.containers.cmp(&other.containers));
        shims
    }

    /// The shim that is started today for a container of the project's own runtimes.
    ///
    /// # Errors
    /// [`Error::StartShim`] when there is none.
    pub fn own_shim(&self) -> Result<PathBuf, Error> {
        self.resolve_runtime(OWN_RUNTIME)
    }

    /// Whether that is the project's own, with all that only it can do. Another one can be configured in its place.
    pub fn starts_own_shims(&self) -> bool {
        self.own_shim().is_ok_and(|path| path.file_name().is_some_and(|name| name == binary::OWN_BINARY))
    }

    /// Has the shim of a container execute another program, `None` for [`Tasks::own_shim`]; its containers go on. Gives
    /// what the shim says, and the containers that have moved.
    ///
    /// # Errors
    /// [`Error::NotUpgradable`] for a shim that cannot; the shim's, which goes on as it was then.
    pub async fn upgrade_shim(
        &self,
        namespace: &str,
        id: &str,
        program: Option<PathBuf>,
    ) -> Result<(private::UpgradeResponse, Vec<String>), Error> {
        let program = match program {
            Some(program) => program,
            None => self.own_shim()?,
        };
        let (task, id) = (self.task(namespace, id)?, id.to_owned());
        let (tasks, namespace) = (self.clone(), namespace.to_owned());
        detached(async move {
            let shim = task.ready(&id).await?;
            let response = upgrade(&shim, &id, &program).await?;
            let others = tasks.shared.in_namespace(&namespace).into_iter().filter(|(_, other)| {
                other.view.borrow().shim.as_ref().is_some_and(|other| other.address() == shim.address())
            });
            Ok((response, others.map(|(id, _)| id).collect()))
        })
        .await
    }
}

async fn upgrade(shim: &Shim, id: &str, program: &Path) -> Result<private::UpgradeResponse, Error> {
    let request = private::UpgradeRequest { binary: program.display().to_string() };
    match shim.call_other(SERVICE, "Upgrade", UPGRADE_LIMIT, &request).await {
        Err(Error::Shim { code: ErrorCode::Unimplemented, .. }) => {
            Err(Error::NotUpgradable { id: id.to_owned() })
        }
        result => result,
    }
}

async fn describe(lane: &Lane, shim: Shim, containers: Vec<String>, limit: Duration) -> RunningShim {
    let request = private::StatusRequest {};
    let status: Result<private::StatusResponse, Error> =
        shim.call_other(SERVICE, "Status", limit, &request).await;
    let (pid, status) = match status {
        Ok(status) => (status.pid, Ok(status)),
        Err(Error::Shim { code: ErrorCode::Unimplemented, .. }) => {
            let id = containers.first().cloned().unwrap_or_default();
            let error = Error::NotUpgradable { id };
            (shim.ping(limit).await.unwrap_or(0), Err(error.to_string()))
        }
        Err(error) => (0, Err(chain(&error))),
    };
    let address = shim.address().to_owned();
    // The kernel walks through all its pages for that.
    let memory = lane.run(move || memory(pid)).await.ok().flatten();
    RunningShim { containers, address, pid, memory, status }
}

/// The proportional set size of a process (proc_pid_smaps(5)), in bytes.
fn memory(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_memory_of_a_process_is_known_while_it_lives() {
        assert!(super::memory(std::process::id()).is_some_and(|bytes| bytes > 100_000));
        assert_eq!(super::memory(0), None);
    }
}
