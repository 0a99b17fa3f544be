//! The execs of a container: processes that are added to it while it runs.

use std::rc::Rc;
use std::time::Duration;

use davit_proto::containerd::events;

use super::{Container, adopt, observe, read_pid};
use crate::console::ConsoleSocket;
use crate::deadline::Deadline;
use crate::error::TaskError;
use crate::executor::{Either, race, spawn};
use crate::process::{Ended, Process, State};
use crate::reactor::sleep;
use crate::reaper::{Awaited, Starting};
use crate::runtime::read_pid_file;

/// How long a runtime that is at an exec when init dies has to say itself that there is nothing to execute in any more. One
/// that is cut short at once says nothing, and who works together with it waits for ever.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl Container {
    /// Registers an exec.
    pub(crate) fn add_exec(&self, exec: Process) -> Result<(), TaskError> {
        match self.init.state() {
            State::Created if self.checkpoint.borrow().is_none() => {}
            State::Running => {}
            state => return Err(TaskError::State { operation: "exec in", state, what: "state" }),
        }
        let mut execs = self.execs.borrow_mut();
        // The container's own id means init, in the journal and in events.
        if exec.id == self.id || execs.contains_key(&exec.id) {
            return Err(TaskError::ExecExists { id: exec.id });
        }
        let added = events::TaskExecAdded { container_id: self.id.clone(), exec_id: exec.id.clone() };
        execs.insert(exec.id.clone(), Rc::new(exec));
        drop(execs);
        self.publish("/tasks/exec-added", &added);
        Ok(())
    }

    /// Starts an exec. Several can be started at once.
    pub(crate) async fn start_exec(
        self: &Rc<Container>,
        exec: &Rc<Process>,
        deadline: Deadline,
    ) -> Result<u32, TaskError> {
        if self.init_dead.get() {
            return Err(TaskError::InitNotRunning { id: self.id.clone() });
        }
        self.running_execs.set(self.running_execs.get() + 1);
        let result = self.start_exec_process(exec, deadline).await;
        if result.is_err() {
            self.exec_gone();
        }
        result
    }

    fn exec_gone(&self) {
        self.running_execs.set(self.running_execs.get() - 1);
        self.changed.changed();
    }

    async fn start_exec_process(
        self: &Rc<Container>,
        exec: &Rc<Process>,
        deadline: Deadline,
    ) -> Result<u32, TaskError> {
        let _announcing = exec.announcing.lock().await;
        if exec.state() != State::Created {
            return Err(TaskError::State { operation: "start", state: exec.state(), what: "process" });
        }
        exec.set_failed(false);
        let pid_file = self.exec_pid_file(exec);
        // What an exec that failed has left must not be taken for this one's.
        let _ = std::fs::remove_file(&pid_file);
        let opened = self.while_init_lives(self.open_streams(exec, deadline), Duration::ZERO).await;
        let (console, streams, ends) = opened.inspect_err(|_| exec.set_failed(true))?;
        // Not before: a logger may take long to be ready, and orphans are not reaped meanwhile.
        let starting = Starting::begin();
        let socket = console.as_ref().map(ConsoleSocket::path);
        let runtime = self.runtime.until(deadline);
        let work =
            async { Ok(runtime.exec(&self.id, &exec.id, &exec.document, &pid_file, socket, ends).await?) };
        let started =
            self.while_init_lives(work, LAST_WORDS).await.and_then(|()| adopt(read_pid(&pid_file)?));
        let awaited = match started {
            Ok(awaited) => Rc::new(awaited),
            Err(error) => {
                if let Some(streams) = streams {
                    streams.close();
                }
                // A runtime that was cut short may have left the process all the same, of which nobody will ever know.
                if let Ok(pid) = read_pid_file(&pid_file)
                    && let Ok(awaited) = Awaited::adopted(pid)
                {
                    let _ = awaited.signal(nix::libc::SIGKILL);
                }
                exec.set_failed(true);
                return Err(error);
            }
        };
        drop(starting);
        exec.adopt(awaited.clone());
        self.record_start(exec);
        let taken = self.take_streams(exec, console, streams, deadline);
        let streams = self.while_init_lives(taken, Duration::ZERO).await;
        if streams.is_err() {
            let _ = awaited.signal(nix::libc::SIGKILL);
        }
        exec.set_state(State::Running);
        let pid = exec.pid().unsigned_abs();
        if streams.is_ok() {
            let started =
                events::TaskExecStarted { container_id: self.id.clone(), exec_id: exec.id.clone(), pid };
            self.publish("/tasks/exec-started", &started);
            self.watch_exec(exec.clone(), awaited);
        } else {
            let ended = observe(&awaited).await;
            self.record(exec, ended);
            exec.set_ended(ended);
        }
        streams.map(|()| pid)
    }

    /// Does the work, unless init is dead before, and has been for so long. Init's exit waits for those of all execs: a logger
    /// that is not ready or a runtime that hangs must not hold it back. Nothing can be executed in a container that is dead.
    async fn while_init_lives<T>(
        &self,
        work: impl Future<Output = Result<T, TaskError>>,
        grace: Duration,
    ) -> Result<T, TaskError> {
        let dead = async {
            self.changed.until(|| self.init_dead.get()).await;
            sleep(grace).await;
        };
        match race(work, dead).await {
            Either::First(result) => result,
            Either::Second(()) => Err(TaskError::InitNotRunning { id: self.id.clone() }),
        }
    }

    pub(super) fn watch_exec(self: &Rc<Container>, exec: Rc<Process>, awaited: Rc<Awaited>) {
        let container = self.clone();
        spawn(async move {
            let ended = observe(&awaited).await;
            drop(awaited);
            container.record(&exec, ended);
            container.exec_ended(&exec, ended).await;
        });
    }

    /// Leads the recorded exit of an exec through the other gates. An upgrade in between has this done again.
    pub(super) async fn exec_ended(&self, exec: &Process, ended: Ended) {
        let _announced = exec.announcing.lock().await;
        self.finish(exec, ended);
        self.exec_gone();
    }

    /// Deletes an exec that does not run.
    pub(crate) async fn delete_exec(&self, exec: &Process) -> Result<(), TaskError> {
        // One that is being started is no longer what its state says.
        let _announcing = exec.announcing.lock().await;
        match exec.state() {
            State::Created | State::Stopped => {}
            state => return Err(TaskError::State { operation: "delete", state, what: "process" }),
        }
        exec.close_streams().await;
        let _ = std::fs::remove_file(self.exec_pid_file(exec));
        if exec.state() == State::Created {
            // Whoever waits for its end waits for nothing.
            exec.set_failed(true);
        }
        exec.set_state(State::Deleted);
        self.execs.borrow_mut().remove(&exec.id);
        self.journal.forget(&exec.id);
        Ok(())
    }

    /// The id of the exec with this pid.
    pub(crate) fn exec_of_pid(&self, pid: u32) -> Option<String> {
        let execs = self.execs.borrow();
        execs.values().find(|exec| exec.pid().unsigned_abs() == pid && pid != 0).map(|exec| exec.id.clone())
    }
}
