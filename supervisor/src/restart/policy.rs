//! What the labels of a container want of its task (containerd `core/runtime/restart`).

use davit_model::Labels;

use crate::runtime::Status;

/// The state that the task shall be in: `running` or `stopped`. Containers without it are let alone.
pub(super) const STATUS: &str = "containerd.io/restart.status";
/// `no`, `always` (as is an empty text), `on-failure[:TIMES]` or `unless-stopped`.
const POLICY: &str = "containerd.io/restart.policy";
/// How often the task was started again.
pub(super) const COUNT: &str = "containerd.io/restart.count";
/// True when a person stopped the container.
const EXPLICITLY_STOPPED: &str = "containerd.io/restart.explicitly-stopped";
/// Where the output of the task goes.
const LOG_URI: &str = "containerd.io/restart.loguri";
/// The same as the path of a file; containerd took it until 2.0.
const LOG_PATH: &str = "containerd.io/restart.logpath";

/// What the policies are called, as clients find them in the plugin list.
pub const CAPABILITIES: [&str; 4] = ["no", "always", "on-failure", "unless-stopped"];

/// Why a policy is none. Such a container is let alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum PolicyError {
    /// No policy has the name.
    #[error("restart policy {text:?} not supported")]
    Unknown {
        /// What the label says.
        text: String,
    },
    /// The policy takes no number.
    #[error("restart policy {name:?} not support max retry count")]
    Number {
        /// The policy.
        name: String,
    },
    /// What should be a number is none.
    #[error("invalid max retry count: {text}")]
    NoNumber {
        /// What the label says.
        text: String,
    },
    /// The count of restarts is no number.
    #[error("label {COUNT} is {text:?}")]
    Count {
        /// What the label says.
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    No,
    Always,
    OnFailure { most: i64 },
    UnlessStopped,
}

impl Policy {
    fn parse(text: &str) -> Result<Policy, PolicyError> {
        let (name, number) = match text.split_once(':') {
            // What follows a second colon was never looked at.
            Some((name, rest)) => (name, Some(rest.split(':').next().unwrap_or_default())),
            None => (text, None),
        };
        let policy = match name {
            "no" => Policy::No,
            "" | "always" => Policy::Always,
            "unless-stopped" => Policy::UnlessStopped,
            "on-failure" => {
                let most = number.map_or(Ok(0), str::parse);
                let most =
                    most.map_err(|_| PolicyError::NoNumber { text: number.unwrap_or_default().into() })?;
                return Ok(Policy::OnFailure { most });
            }
            _ => return Err(PolicyError::Unknown { text: text.to_owned() }),
        };
        match number {
            Some(_) => Err(PolicyError::Number { name: name.to_owned() }),
            None => Ok(policy),
        }
    }
}

/// The state of a container's task, as the labels care for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// There is none.
    None,
    /// In this state, and with this exit code if it has ended.
    Is(Status, u32),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// What is left of the task is deleted, and a new one started; it is the so manieth start.
    Start { count: i64 },
    /// The task is killed and deleted.
    Stop,
}

/// Compares what is with what is wanted.
pub(super) fn reconcile(labels: &Labels, task: Task) -> Result<Change, PolicyError> {
    let label = |key: &str| labels.get(key).map_or("", String::as_str);
    match label(STATUS) {
        "running" => {
            let exit_status = match task {
                Task::None => 0,
                Task::Is(Status::Stopped, exit_status) => exit_status,
                // One that was created is about to be started by whoever did that; what is not known is not touched.
                Task::Is(_, _) => return Ok(Change::None),
            };
            let number = || label(COUNT).parse::<i64>();
            let wanted = match Policy::parse(label(POLICY))? {
                Policy::No => false,
                Policy::Always => true,
                Policy::OnFailure { most } => {
                    let count = if label(COUNT).is_empty() { Ok(0) } else { number() };
                    let count = count.map_err(|_| PolicyError::Count { text: label(COUNT).to_owned() })?;
                    exit_status != 0 && (most == 0 || count < most)
                }
                // The texts that Go's ParseBool takes for true.
                Policy::UnlessStopped => {
                    !matches!(label(EXPLICITLY_STOPPED), "1" | "t" | "T" | "true" | "TRUE" | "True")
                }
            };
            let count = number().unwrap_or(0).saturating_add(1);
            Ok(if wanted { Change::Start { count } } else { Change::None })
        }
        "stopped" if !matches!(task, Task::None | Task::Is(Status::Stopped, _)) => Ok(Change::Stop),
        _ => Ok(Change::None),
    }
}

/// The address that the output of a restarted task goes to; empty for nowhere.
pub(super) fn log(labels: &Labels) -> String {
    let label = |key| labels.get(key).filter(|text| !text.is_empty());
    match (label(LOG_URI), label(LOG_PATH)) {
        (Some(uri), _) => uri.clone(),
        (None, Some(path)) => format!("file://{path}"),
        (None, None) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn after_exit(policy: &str, exit_status: u32, more: &[(&str, &str)]) -> Result<Change, PolicyError> {
        let mut all = labels(&[(STATUS, "running"), (POLICY, policy)]);
        all.extend(labels(more));
        reconcile(&all, Task::Is(Status::Stopped, exit_status))
    }

    #[test]
    fn the_policy_decides_after_an_exit() {
        let first = Ok(Change::Start { count: 1 });
        for policy in ["", "always", "unless-stopped"] {
            assert_eq!(after_exit(policy, 0, &[]), first, "{policy}");
        }
        assert_eq!(after_exit("no", 1, &[]), Ok(Change::None));
        assert_eq!(after_exit("on-failure", 0, &[]), Ok(Change::None));
        assert_eq!(after_exit("on-failure", 1, &[]), first);
        assert_eq!(after_exit("on-failure:2", 1, &[(COUNT, "1")]), Ok(Change::Start { count: 2 }));
        assert_eq!(after_exit("on-failure:2", 1, &[(COUNT, "2")]), Ok(Change::None));
        assert_eq!(after_exit("unless-stopped", 1, &[(EXPLICITLY_STOPPED, "true")]), Ok(Change::None));
        assert_eq!(after_exit("unless-stopped", 1, &[(EXPLICITLY_STOPPED, "false")]), first);
    }

    #[test]
    fn what_makes_no_sense_is_let_alone() {
        let text = |result: Result<Change, PolicyError>| result.unwrap_err().to_string();
        assert_eq!(text(after_exit("sometimes", 1, &[])), "restart policy \"sometimes\" not supported");
        assert_eq!(
            text(after_exit("always:3", 1, &[])),
            "restart policy \"always\" not support max retry count"
        );
        assert_eq!(text(after_exit("on-failure:x", 1, &[])), "invalid max retry count: x");
        assert!(after_exit("on-failure", 1, &[(COUNT, "x")]).is_err());
        // Only one policy counts.
        assert_eq!(after_exit("always", 1, &[(COUNT, "x")]), Ok(Change::Start { count: 1 }));
    }

    #[test]
    fn what_is_as_wanted_stays() {
        let wanted = |status: &str, task| reconcile(&labels(&[(STATUS, status)]), task).unwrap();
        for state in [Status::Running, Status::Created, Status::Paused, Status::Pausing, Status::Unknown] {
            assert_eq!(wanted("running", Task::Is(state, 0)), Change::None, "{state:?}");
            assert_eq!(wanted("stopped", Task::Is(state, 0)), Change::Stop, "{state:?}");
        }
        assert_eq!(wanted("running", Task::None), Change::Start { count: 1 });
        assert_eq!(wanted("stopped", Task::None), Change::None);
        assert_eq!(wanted("stopped", Task::Is(Status::Stopped, 1)), Change::None);
        assert_eq!(wanted("paused", Task::None), Change::None);
    }

    #[test]
    fn output_goes_where_a_label_says() {
        assert_eq!(log(&labels(&[])), "");
        assert_eq!(log(&labels(&[(LOG_PATH, "/l")])), "file:///l");
        assert_eq!(log(&labels(&[(LOG_PATH, "/l"), (LOG_URI, "binary:///b?x=y")])), "binary:///b?x=y");
    }
}
