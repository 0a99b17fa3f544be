//! What state a task is in, and what follows from what happens to it. No I/O, no clock, no synchronization of
//! its own: the owner of a container feeds it [`Input`]s one by one and carries out the [`Action`]s that it
//! answers with.
//!
//! ```text
//!   create                                    load
//!     │                                         │
//!  Creating ──CreateFailed──▶ Gone           Loading ──Silent──▶ Unreachable
//!     │ Created                           Found │ └──Dead──┐  Found │   │ Dead, Disconnected
//!     ▼                                         ▼          │        ▼   │
//!    Live ◀─────────────────────────────────────┴──────────┼────────┘   │
//!     │ ▲ └──Disconnected──────────────────────────────────┼─▶ Cleaning ◀
//!     │ └─DeleteRefused─┐                                  └─────▶ ▲ │
//!     └──Delete──▶ Deleting ──DeleteLost───────────────────────────┘ │ CleanedUp
//!                       └──Deleted──▶ Gone ◀─────────────────────────┘
//! ```
//! The job that cleans up first makes sure that the shim is gone, and reports `Found` if only the connection
//! was lost: then `Cleaning` goes back to `Live`.
//!
//! **Invariants.** A task enters `Cleaning` only when its connection is closed or nothing listens at its
//! address; slowness never leads there. The exit of a process is published here only if the shim has not
//! published it. Whoever waits or deletes is answered at the latest on the way to `Gone`.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::task::Exit;
use crate::events::Cause;

/// The exit code of a process that was killed with its shim: 128 + SIGKILL.
pub const KILLED: u32 = 137;

/// The states. See the diagram above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its shim is being started and is creating the container. To everyone but a second create it does not
    /// exist.
    Creating,
    /// Found at start; its shim has not answered yet. Calls wait.
    Loading,
    /// The shim serves it.
    Live,
    /// Found at start, and its shim neither answers nor is gone.
    Unreachable,
    /// The shim was asked to delete it. Other calls still go to the shim.
    Deleting,
    /// The shim is gone; what it left is being removed. Calls wait.
    Cleaning,
    /// No more.
    Gone,
}

/// What can happen to a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The shim has created the container.
    Created {
        /// Its init process.
        pid: u32,
    },
    /// It has not, and everything is cleaned up.
    CreateFailed,
    /// The shim of an earlier daemon, or one whose connection was lost, answered and has the task.
    Found {
        /// Its init process.
        pid: u32,
        /// How that ended, if it has. The shim tells everyone else of it itself.
        exit: Option<Exit>,
    },
    /// There is no shim, or none with a task. `pid` is that of the init process as the bundle remembers it,
    /// zero when there never was one.
    Dead {
        /// Its init process.
        pid: u32,
    },
    /// The shim of an earlier daemon does not answer.
    Silent {
        /// Its init process, zero when not known.
        pid: u32,
    },
    /// The connection to the shim has ended.
    Disconnected,
    /// Somebody wants the task deleted.
    Delete,
    /// The shim refused to delete it.
    DeleteRefused,
    /// The connection ended before the shim had answered the deletion.
    DeleteLost,
    /// It is deleted, shim and bundle and all. `None` when the shim said that it has no such task.
    Deleted {
        /// The exit of the init process.
        exit: Option<Exit>,
    },
    /// Nothing of the container runs any more, and it is known how it all ended. Its bundle is still there, so that a
    /// daemon that dies before this is published finds out again.
    Perished {
        /// The exits that the shim's journal holds, oldest first, and why it is not the shim that tells them.
        journal: Vec<(String, Exit, Cause)>,
        /// The processes that the journal knows to have been there and whose end it does not: some of them may be of an
        /// earlier daemon's time.
        running: Vec<(String, u32)>,
        /// What `shim delete` said of the init process.
        killed: Option<Exit>,
        /// The time to put on deaths that nobody recorded.
        now: SystemTime,
    },
    /// What a dead shim left is removed.
    CleanedUp,
    /// A process was started.
    Started {
        /// The container's id for the init process, else the exec's.
        process: String,
        /// Its number.
        pid: u32,
    },
    /// An exec was registered.
    ExecAdded {
        /// Its id.
        process: String,
    },
    /// An exec was deleted.
    ExecDeleted {
        /// Its id.
        process: String,
        /// How it ended; without a time when it never ran.
        exit: Exit,
    },
    /// The shim published an exit.
    Exited {
        /// The container's id for the init process, else the exec's.
        process: String,
        /// How it ended.
        exit: Exit,
    },
    /// The shim published the deletion of the task.
    DeletePublished,
    /// Somebody waits for the end of a process.
    Wait {
        /// The container's id for the init process, else the exec's.
        process: String,
    },
    /// The shim answered a wait (`lost`: the connection ended instead).
    WaitOver {
        /// The process.
        process: String,
        /// There was no answer.
        lost: bool,
    },
}

/// What the owner is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask the shim to delete the task, then take the shim and the bundle down. Ends in `Deleted`,
    /// `DeleteRefused` or `DeleteLost`.
    Delete,
    /// End and remove what the dead shim left. Ends in `Perished` and then `CleanedUp`, or in `Found`.
    CleanUp,
    /// Ask the shim to wait for a process. Ends in `WaitOver`.
    AskWait(String),
    /// Answer everyone who waits for a process.
    AnswerWait(String, Exit),
    /// Tell everyone who waits for a process that there is no such process.
    RefuseWait(String),
    /// Answer everyone who wants the task deleted.
    AnswerDelete(Option<Exit>),
    /// Tell them why not.
    RefuseDelete(Refusal),
    /// Publish `/tasks/exit`, with why the daemon says it: no cause where the shim's journal holds the exit.
    PublishExit(String, Exit, Cause),
    /// Publish `/tasks/delete`.
    PublishDelete(Exit),
    /// Take the task out of the registry. Nothing follows.
    Leave,
}

/// Why a deletion is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There is no task.
    NotFound,
    /// Its shim does not answer.
    Unreachable,
    /// The shim said no; its words are with the owner.
    Shim,
}

/// A process that the daemon knows of.
#[derive(Debug, Clone, Default)]
struct Known {
    /// Zero until it is started.
    pid: u32,
    /// Set once the shim has published its exit.
    exit: Option<Exit>,
}

/// The state of one task.
#[derive(Debug, Clone)]
pub struct Machine {
    id: String,
    phase: Phase,
    /// A shim has, or had, created the container.
    had_task: bool,
    /// By exec id, and the container's id for the init process. Execs of an earlier daemon's time are not
    /// known here; a shim answers for them.
    processes: BTreeMap<String, Known>,
    /// The processes that somebody waits for; true once the shim has been asked.
    waits: BTreeMap<String, bool>,
    /// Somebody wants it deleted, and that has not begun.
    delete_wanted: bool,
    /// The connection ended before the outcome of creating or deleting was known.
    disconnected: bool,
    /// The shim has published the deletion.
    delete_published: bool,
}

impl Machine {
    /// A task that is about to be created.
    pub fn creating(id: &str) -> Machine {
        Machine::new(id, Phase::Creating)
    }

    /// A task of an earlier daemon.
    pub fn loading(id: &str) -> Machine {
        Machine::new(id, Phase::Loading)
    }

    fn new(id: &str, phase: Phase) -> Machine {
        Machine {
            id: id.to_owned(),
            phase,
            had_task: false,
            // Of its init process an event may come before anything else does.
            processes: BTreeMap::from([(id.to_owned(), Known::default())]),
            waits: BTreeMap::new(),
            delete_wanted: false,
            disconnected: false,
            delete_published: false,
        }
    }

    /// The state that it is in.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The init process, zero while there is none.
    pub fn pid(&self) -> u32 {
        self.processes.get(&self.id).map_or(0, |init| init.pid)
    }

    /// Takes what happened, gives what is to be done, in order.
    pub fn apply(&mut self, input: Input) -> Vec<Action> {
        match input {
            Input::Created { pid } if self.phase == Phase::Creating => self.up(pid),
            Input::CreateFailed if self.phase == Phase::Creating => self.leave(),
            Input::Found { pid, exit }
                if matches!(self.phase, Phase::Loading | Phase::Unreachable | Phase::Cleaning) =>
            {
                self.disconnected = false;
                if exit.is_some() {
                    self.processes.entry(self.id.clone()).or_default().exit = exit;
                }
                self.up(pid)
            }
            Input::Dead { pid } if matches!(self.phase, Phase::Loading | Phase::Unreachable) => {
                self.know_init(pid);
                self.clean_up()
            }
            Input::Silent { pid } if self.phase == Phase::Loading => {
                self.know_init(pid);
                self.silent()
            }
            Input::Disconnected => self.disconnected(),
            Input::Delete => self.delete(),
            Input::DeleteRefused if self.phase == Phase::Deleting => {
                self.phase = Phase::Live;
                let mut actions = vec![Action::RefuseDelete(Refusal::Shim)];
                if self.disconnected {
                    actions.extend(self.clean_up());
                }
                actions
            }
            Input::DeleteLost if self.phase == Phase::Deleting => {
                self.delete_wanted = true;
                self.clean_up()
            }
            Input::Deleted { exit } if self.phase == Phase::Deleting => self.deleted(exit),
            Input::Perished { journal, running, killed, now } if self.phase == Phase::Cleaning => {
                self.perished(journal, running, killed, now)
            }
            Input::CleanedUp if self.phase == Phase::Cleaning => {
                let init = self.processes.get(&self.id).and_then(|init| init.exit).filter(|_| self.had_task);
                self.deleted(init)
            }
            Input::Started { process, pid } => {
                // After a restart the exec may have been registered with an earlier daemon.
                self.processes.entry(process).or_default().pid = pid;
                Vec::new()
            }
            Input::ExecAdded { process } => {
                // A start that was quicker than this report has put it there already.
                self.processes.entry(process).or_default();
                Vec::new()
            }
            Input::ExecDeleted { process, exit } => self.exec_deleted(process, exit),
            Input::Exited { process, exit } => {
                // Only of a process that is known: what an event says late of a deleted exec must not stay
                // for ever.
                if let Some(known) = self.processes.get_mut(&process)
                    && (known.pid == 0 || known.pid == exit.pid)
                {
                    known.exit = Some(exit);
                }
                Vec::new()
            }
            Input::DeletePublished => {
                self.delete_published = true;
                Vec::new()
            }
            Input::Wait { process } => self.wait(process),
            Input::WaitOver { process, lost } => {
                if lost {
                    // The loss of the connection itself follows, and answers.
                    if let Some(asked) = self.waits.get_mut(&process) {
                        *asked = false;
                    }
                } else {
                    self.waits.remove(&process);
                }
                Vec::new()
            }
            // Late news of a phase that is over.
            Input::Created { .. }
            | Input::CreateFailed
            | Input::Found { .. }
            | Input::Dead { .. }
            | Input::Silent { .. }
            | Input::DeleteRefused
            | Input::DeleteLost
            | Input::Deleted { .. }
            | Input::Perished { .. }
            | Input::CleanedUp => Vec::new(),
        }
    }

    fn know_init(&mut self, pid: u32) {
        if pid != 0 {
            self.had_task = true;
            self.processes.entry(self.id.clone()).or_default().pid = pid;
        }
    }

    /// The shim serves the task.
    fn up(&mut self, pid: u32) -> Vec<Action> {
        self.had_task = true;
        self.know_init(pid);
        self.phase = Phase::Live;
        if self.disconnected {
            return self.clean_up();
        }
        let mut actions = Vec::new();
        for (process, asked) in &mut self.waits {
            *asked = true;
            actions.push(Action::AskWait(process.clone()));
        }
        if self.delete_wanted {
            actions.extend(self.delete());
        }
        actions
    }

    fn silent(&mut self) -> Vec<Action> {
        self.phase = Phase::Unreachable;
        if std::mem::take(&mut self.delete_wanted) {
            return vec![Action::RefuseDelete(Refusal::Unreachable)];
        }
        Vec::new()
    }

    fn disconnected(&mut self) -> Vec<Action> {
        match self.phase {
            Phase::Live | Phase::Unreachable => self.clean_up(),
            // Whoever brings it up or takes it down sees the end of the connection too, and says what
            // follows.
            Phase::Creating | Phase::Deleting => {
                self.disconnected = true;
                Vec::new()
            }
            Phase::Loading | Phase::Cleaning | Phase::Gone => Vec::new(),
        }
    }

    fn clean_up(&mut self) -> Vec<Action> {
        self.phase = Phase::Cleaning;
        for asked in self.waits.values_mut() {
            *asked = false;
        }
        vec![Action::CleanUp]
    }

    fn delete(&mut self) -> Vec<Action> {
        match self.phase {
            Phase::Live => {
                self.delete_wanted = false;
                self.phase = Phase::Deleting;
                vec![Action::Delete]
            }
            // One deletion serves all who want it.
            Phase::Deleting => Vec::new(),
            Phase::Loading | Phase::Cleaning => {
                self.delete_wanted = true;
                Vec::new()
            }
            Phase::Unreachable => vec![Action::RefuseDelete(Refusal::Unreachable)],
            Phase::Creating | Phase::Gone => vec![Action::RefuseDelete(Refusal::NotFound)],
        }
    }

    fn deleted(&mut self, exit: Option<Exit>) -> Vec<Action> {
        let mut actions = Vec::new();
        for process in std::mem::take(&mut self.waits).into_keys() {
            let known = self.processes.get(&process).and_then(|known| known.exit);
            match if process == self.id { exit.or(known) } else { known } {
                Some(exit) => actions.push(Action::AnswerWait(process, exit)),
                None => actions.push(Action::RefuseWait(process)),
            }
        }
        actions.push(Action::AnswerDelete(exit));
        actions.extend(self.leave());
        actions
    }

    fn perished(
        &mut self,
        journal: Vec<(String, Exit, Cause)>,
        running: Vec<(String, u32)>,
        killed: Option<Exit>,
        now: SystemTime,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let mut init_exit = None;
        // A shim that never had a task has nothing to report, whatever `shim delete` makes up.
        if self.had_task {
            for (process, exit, cause) in journal {
                let known = self.processes.entry(process.clone()).or_default();
                if known.exit.is_none() && (known.pid == 0 || known.pid == exit.pid) {
                    known.exit = Some(exit);
                    known.pid = exit.pid;
                    // Init's exit comes after those of its execs, as a shim publishes them.
                    if process == self.id {
                        init_exit = Some((exit, cause));
                    } else {
                        actions.push(Action::PublishExit(process, exit, cause));
                    }
                }
            }
            for (process, pid) in running {
                let known = self.processes.entry(process).or_default();
                if known.exit.is_none() {
                    known.pid = pid;
                }
            }
            let killed_with_shim = |pid: u32| Exit { pid, status: KILLED, exited_at: Some(now) };
            for (process, known) in &mut self.processes {
                if known.exit.is_some() || *process != self.id && known.pid == 0 {
                    continue;
                }
                let mut exit = killed_with_shim(known.pid);
                if *process == self.id {
                    if let Some(killed) = killed {
                        exit = Exit {
                            pid: if killed.pid == 0 { known.pid } else { killed.pid },
                            status: killed.status,
                            exited_at: killed.exited_at.or(Some(now)),
                        };
                    }
                    init_exit = Some((exit, Cause::ShimKilled));
                } else {
                    actions.push(Action::PublishExit(process.clone(), exit, Cause::ShimKilled));
                }
                known.exit = Some(exit);
            }
            if let Some((exit, cause)) = init_exit {
                actions.push(Action::PublishExit(self.id.clone(), exit, cause));
            }
        }
        let init = self.processes.get(&self.id).and_then(|init| init.exit).filter(|_| self.had_task);
        if let Some(exit) = init
            && !self.delete_published
        {
            self.delete_published = true;
            actions.push(Action::PublishDelete(exit));
        }
        actions
    }

    fn exec_deleted(&mut self, process: String, exit: Exit) -> Vec<Action> {
        self.processes.remove(&process);
        if self.waits.remove(&process).is_none() {
            return Vec::new();
        }
        // A shim may leave a wait for an exec that never ran without an answer for ever.
        match exit.exited_at {
            Some(_) => vec![Action::AnswerWait(process, exit)],
            None => vec![Action::RefuseWait(process)],
        }
    }

    fn wait(&mut self, process: String) -> Vec<Action> {
        match self.phase {
            Phase::Live | Phase::Deleting => {
                // One wait at the shim serves all who wait for the process.
                let asked = self.waits.entry(process.clone()).or_insert(false);
                if std::mem::replace(asked, true) { Vec::new() } else { vec![Action::AskWait(process)] }
            }
            Phase::Loading | Phase::Unreachable | Phase::Cleaning => {
                self.waits.entry(process).or_insert(false);
                Vec::new()
            }
            Phase::Creating | Phase::Gone => vec![Action::RefuseWait(process)],
        }
    }

    fn leave(&mut self) -> Vec<Action> {
        self.phase = Phase::Gone;
        vec![Action::Leave]
    }
}

#[cfg(test)]
mod tests;
