//! What is expected of every process, what was told of it, and whether the two agree.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use davit_proto::containerd::events::TaskExit;
use davit_proto::davit::services::events::v1::Entry;
use davit_proto::davit::services::events::v1::entry::What;
use prost::Message;

/// The cause that goes with the exit of a process whose shim was killed.
const SHIM_KILLED: &str = "shim-killed";
/// 128 and SIGKILL.
const KILLED: u32 = 137;

/// Container and process; the container's id stands for its init.
type Key = (String, String);

/// One exit as it was told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Told {
    pid: u32,
    status: u32,
    at: Option<(i64, i32)>,
    cause: String,
}

/// What is known of one process.
#[derive(Debug, Default)]
struct Process {
    /// The daemon has said that it is there: so it must say how it ended.
    began: bool,
    /// How it ends if nothing comes in between.
    status: u32,
    /// Its shim was killed.
    doomed: bool,
    /// The statuses that calls were answered with.
    answers: BTreeSet<u32>,
    told: Vec<Told>,
}

/// The books of a run.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    processes: BTreeMap<Key, Process>,
    kinds: BTreeMap<&'static str, u64>,
    judged: bool,
}

impl Ledger {
    /// A life of this kind is over.
    pub(super) fn lived(&mut self, kind: &'static str) {
        *self.kinds.entry(kind).or_default() += 1;
    }

    /// The process is there, and ends with `status` if nothing comes in between.
    pub(super) fn began(&mut self, container: &str, process: &str, status: u32) {
        let known = self.process(container, process);
        (known.began, known.status) = (true, status);
    }

    /// The shim of the container was killed, at whatever time: every process of it may have died with it.
    pub(super) fn doomed(&mut self, container: &str) {
        self.process(container, container).doomed = true;
    }

    /// A call was answered with this status.
    pub(super) fn answered(&mut self, container: &str, process: &str, status: u32) {
        self.process(container, process).answers.insert(status);
    }

    fn process(&mut self, container: &str, process: &str) -> &mut Process {
        self.processes.entry((container.to_owned(), process.to_owned())).or_default()
    }

    /// Takes in an entry of the history.
    pub(super) fn told(&mut self, entry: &Entry) -> Result<()> {
        let event = match entry.what.as_ref().context("an entry of nothing")? {
            What::Event(event) => event,
            What::Gap(gap) => bail!("the history has a gap of {}", gap.lost),
        };
        let value = event.envelope.as_ref().and_then(|envelope| envelope.event.clone()).unwrap_or_default();
        let exit = TaskExit::decode(value.value.as_slice())?;
        let at = exit.exited_at.map(|at| (at.seconds, at.nanos));
        ensure!(at.is_some(), "an exit without a time: {exit:?}");
        let told = Told { pid: exit.pid, status: exit.exit_status, at, cause: event.cause.clone() };
        self.process(&exit.container_id, &exit.id).told.push(told);
        Ok(())
    }

    /// The processes of whose exit nothing was told.
    pub(super) fn missing(&self) -> Vec<&Key> {
        let silent = self.processes.iter().filter(|(_, process)| process.began && process.told.is_empty());
        silent.map(|(key, _)| key).collect()
    }

    /// What is wrong. Nothing more is told after this.
    pub(super) fn judge(&mut self) -> Vec<String> {
        self.judged = true;
        let doomed: BTreeSet<&String> =
            self.processes.iter().filter(|(_, process)| process.doomed).map(|((id, _), _)| id).collect();
        let wrong = self.processes.iter().filter_map(|((container, name), process)| {
            let reason = process.wrong(doomed.contains(container))?;
            Some(format!("{container}/{name}: {reason}: {process:?}"))
        });
        wrong.collect()
    }

    pub(super) fn is_judged(&self) -> bool {
        self.judged
    }

    /// Lives by kind, and exits by what they were.
    pub(super) fn sums(&self) -> (BTreeMap<&'static str, u64>, BTreeMap<&'static str, u64>) {
        let mut exits = BTreeMap::new();
        for told in self.processes.values().flat_map(|process| &process.told) {
            let kind = match (told.cause.as_str(), told.status) {
                (SHIM_KILLED, _) => "with their shim",
                (_, KILLED) => "killed",
                _ => "of their own",
            };
            *exits.entry(kind).or_default() += 1;
        }
        (self.kinds.clone(), exits)
    }
}

impl Process {
    fn wrong(&self, doomed: bool) -> Option<&'static str> {
        if self.told.is_empty() {
            return self.began.then_some("its exit was never told");
        }
        let pids: BTreeSet<u32> = self.told.iter().map(|told| told.pid).collect();
        if pids.len() < self.told.len() {
            return Some("its exit was told more than once");
        }
        // A creation whose answer was lost, and whose shim was killed then, is tried again, and makes another process.
        if self.told.len() > 1 && !doomed {
            return Some("there were several of it");
        }
        if !self.answers.iter().all(|answer| self.told.iter().any(|told| told.status == *answer)) {
            return Some("calls were answered with another status than was told");
        }
        self.told.iter().find_map(|told| {
            let with_shim = told.status == KILLED && told.cause == SHIM_KILLED;
            if with_shim && !doomed {
                return Some("it is told to have died with a shim that lives");
            }
            if !told.cause.is_empty() && !with_shim {
                return Some("a cause that is none of its");
            }
            (self.began && !with_shim && told.status != self.status)
                .then_some("it is told to have ended otherwise than it did")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(status: u32, cause: &str) -> Told {
        Told { pid: 1, status, at: Some((1, 0)), cause: cause.into() }
    }

    #[test]
    fn only_what_happened_may_be_told() {
        let process =
            |status, doomed, told| Process { began: true, status, doomed, told, ..Process::default() };
        for (process, doomed, right) in [
            (process(3, false, vec![told(3, "")]), false, true),
            (process(3, false, vec![]), false, false),
            (process(3, false, vec![told(3, ""), told(3, "")]), false, false),
            (process(3, false, vec![told(137, "")]), false, false),
            (process(3, true, vec![told(137, "shim-killed")]), true, true),
            (process(3, false, vec![told(137, "shim-killed")]), false, false),
            (process(3, true, vec![told(4, "shim-killed")]), true, false),
            (process(137, true, vec![told(137, "")]), true, true),
        ] {
            assert_eq!(process.wrong(doomed).is_none(), right, "{process:?}");
        }
        let mut answered = process(3, false, vec![told(3, "")]);
        answered.answers.insert(4);
        assert!(answered.wrong(false).is_some());
    }
}
