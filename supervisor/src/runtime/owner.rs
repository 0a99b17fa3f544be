//! The owner of one container: a task of tokio with a mailbox. It feeds the [`Machine`], starts what the
//! machine asks for beside itself, and never waits for anything but its mailbox.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use davit_shim_protocol::bundle::Bundle;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Instrument, Span, debug, info, info_span, warn};

use super::registry::{Handle, Shared, View};
use super::shim::Shim;
use super::task::{CreateOptions, Exit};
use super::transitions::{Action, Input, Machine, Phase, Refusal};
use super::{Error, binary, create, forward, load, teardown};
use crate::events::Cause;

/// Messages that wait for an owner before their senders wait too. An owner is always quick.
const MAILBOX: usize = 128;

/// Who waits for an answer.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What an owner is told. Most of it goes on to the machine as it is; this holds what the machine does not:
/// replies, connections, errors.
pub(super) enum Message {
    /// The job of creating is over.
    Created(Result<(Shim, u32), Error>),
    /// The job of loading has found the shim with a task.
    Found { shim: Shim, pid: u32, exit: Option<Exit> },
    /// It has found no shim, or one without a task.
    Dead { pid: u32 },
    /// It has found a shim that does not answer (yet).
    Silent { pid: u32 },
    /// The connection has ended.
    Disconnected,
    /// Delete the task.
    Delete { reply: Reply<Exit> },
    /// The job of deleting is over. `Err` with the shim still there.
    DeleteRefused(Error),
    /// The shim went away under the job of deleting.
    DeleteLost,
    /// Everything is deleted; `None` when the shim knew no such task.
    Deleted(Option<Exit>),
    /// The job of cleaning up has ended all that ran. `published` is dropped when that is told.
    Perished {
        journal: Vec<(String, Exit, Cause)>,
        running: Vec<(String, u32)>,
        killed: Option<Exit>,
        published: oneshot::Sender<()>,
    },
    /// The job of cleaning up is over.
    CleanedUp,
    /// A process was started.
    Started { process: String, pid: u32 },
    /// An exec was registered.
    ExecAdded { process: String },
    /// An exec was deleted.
    ExecDeleted { process: String, exit: Exit },
    /// The shim published an exit.
    Exited { process: String, exit: Exit },
    /// The shim published the task's deletion.
    DeletePublished,
    /// Wait for a process.
    Wait { process: String, reply: Reply<Exit> },
    /// The shim answered a wait.
    WaitOver { process: String, result: Result<Exit, Error> },
}

/// What the jobs of one container know of it.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) shared: Arc<Shared>,
    pub(super) bundle: Bundle,
    /// The owner's mailbox.
    pub(super) owner: mpsc::Sender<Message>,
}

impl Context {
    pub(super) fn id(&self) -> &str {
        self.bundle.id()
    }

    pub(super) fn namespace(&self) -> &str {
        self.bundle.namespace()
    }

    pub(super) async fn report(&self, message: Message) {
        // The owner outlives its jobs: it ends only after the last of them has reported.
        if self.owner.send(message).await.is_err() {
            debug!(namespace = self.namespace(), container.id = self.id(), "report to an owner that is gone");
        }
    }
}

/// Enters the container and starts to create its task. The answer comes through the receiver, but the work
/// goes on without it.
pub(super) async fn create(
    shared: &Arc<Shared>,
    namespace: &str,
    options: CreateOptions,
) -> Result<oneshot::Receiver<Result<u32, Error>>, Error> {
    let id = options.container_id.clone();
    // Found out before anything is made, so that nothing needs cleaning.
    let binary =
        binary::resolve(&shared.config, &options.runtime).map_err(|source| Error::StartShim { source })?;
    loop {
        let (reply, answer) = oneshot::channel();
        let owner = Owner::new(shared, namespace, &id, Machine::creating(&id), Some(reply));
        match shared.insert(namespace, &id, owner.handle()) {
            Ok(()) => {
                let context = owner.context.clone();
                tokio::spawn(
                    async move { create::run(context, binary, options).await }
                        // Part of the call's trace, while the owner has no end that a trace could wait for.
                        .instrument(info_span!("create", namespace, container.id = id)),
                );
                owner.spawn();
                return Ok(answer);
            }
            Err(existing) => {
                // What an earlier daemon left may turn out to be nothing. A task that is being cleaned up
                // still exists.
                let mut view = existing.view.clone();
                if view.borrow_and_update().phase != Phase::Loading {
                    return Err(Error::AlreadyExists { id });
                }
                // An error means that the owner is gone; the next turn of the loop sees what is there
                // instead.
                let _ =
                    view.wait_for(|view| view.phase != Phase::Loading && view.phase != Phase::Cleaning).await;
            }
        }
    }
}

/// Enters a container that was found at start and starts to look for its shim.
pub(super) fn load(
    shared: &Arc<Shared>,
    bundle: &Bundle,
    job: load::Job,
) -> Option<tokio::task::JoinHandle<()>> {
    let (namespace, id) = (bundle.namespace(), bundle.id());
    let owner = Owner::new(shared, namespace, id, Machine::loading(id), None);
    shared.insert(namespace, id, owner.handle()).ok()?;
    let context = owner.context.clone();
    owner.spawn();
    Some(tokio::spawn(
        async move { job.run(context).await }.instrument(span(bundle.namespace(), bundle.id())),
    ))
}

/// What the logs of a task hang on. It has no parent: a call's span ends with the call, however long the task lives.
pub(super) fn span(namespace: &str, id: &str) -> Span {
    info_span!(parent: None, "task", namespace, container.id = id)
}

struct Owner {
    context: Context,
    machine: Machine,
    mailbox: mpsc::Receiver<Message>,
    view: watch::Sender<View>,
    shim: Option<Shim>,
    create: Option<Reply<u32>>,
    deletes: Vec<Reply<Exit>>,
    waits: BTreeMap<String, Vec<Reply<Exit>>>,
    /// What the shim said when it refused the deletion that the machine is just told of.
    refused: Option<Error>,
    /// The shim has published the deletion, and so everything before it.
    delete_published: bool,
}

impl Owner {
    fn new(
        shared: &Arc<Shared>,
        namespace: &str,
        id: &str,
        machine: Machine,
        create: Option<Reply<u32>>,
    ) -> Owner {
        let (owner, mailbox) = mpsc::channel(MAILBOX);
        let bundle = shared.bundle(namespace, id);
        let phase = machine.phase();
        let view = watch::Sender::new(View { phase, pid: 0, shim: None, delete_published: false });
        Owner {
            context: Context { shared: shared.clone(), bundle, owner },
            machine,
            mailbox,
            view,
            shim: None,
            create,
            deletes: Vec::new(),
            waits: BTreeMap::new(),
            refused: None,
            delete_published: false,
        }
    }

    fn handle(&self) -> Handle {
        let timeouts = &self.context.shared.config.timeouts;
        // A removal has two tries before it is the container that hangs.
        let patience = timeouts.load + 2 * timeouts.cleanup;
        Handle { mailbox: self.context.owner.clone(), view: self.view.subscribe(), patience }
    }

    fn spawn(self) {
        let span = span(self.context.namespace(), self.context.id());
        tokio::spawn(self.run().instrument(span));
    }

    async fn run(mut self) {
        while let Some(message) = self.mailbox.recv().await {
            self.take(message);
            if self.machine.phase() == Phase::Gone {
                break;
            }
        }
        // What came too late is told so here, also what is just being put into the mailbox: its sender has a place already,
        // and what nobody takes out again stays there with its reply as long as somebody has the other end.
        self.mailbox.close();
        while let Some(message) = self.mailbox.recv().await {
            match message {
                Message::Delete { reply } | Message::Wait { reply, .. } => {
                    let _ = reply.send(Err(self.not_found()));
                }
                _ => {}
            }
        }
    }

    fn take(&mut self, message: Message) {
        let mut created = None;
        let mut told = None;
        let input = match message {
            Message::Created(Ok((shim, pid))) => {
                self.attach(shim);
                created = Some(Ok(pid));
                Input::Created { pid }
            }
            Message::Created(Err(error)) => {
                created = Some(Err(error));
                Input::CreateFailed
            }
            Message::Found { shim, pid, exit } => {
                self.attach(shim);
                Input::Found { pid, exit }
            }
            Message::Dead { pid } => Input::Dead { pid },
            Message::Silent { pid } => Input::Silent { pid },
            Message::Disconnected => Input::Disconnected,
            Message::Delete { reply } => {
                self.deletes.push(reply);
                Input::Delete
            }
            Message::DeleteRefused(error) => {
                self.refused = Some(error);
                Input::DeleteRefused
            }
            Message::DeleteLost => Input::DeleteLost,
            Message::Deleted(exit) => Input::Deleted { exit },
            Message::Perished { journal, running, killed, published } => {
                told = Some(published);
                Input::Perished { journal, running, killed, now: SystemTime::now() }
            }
            Message::CleanedUp => Input::CleanedUp,
            Message::Started { process, pid } => Input::Started { process, pid },
            Message::ExecAdded { process } => Input::ExecAdded { process },
            Message::ExecDeleted { process, exit } => Input::ExecDeleted { process, exit },
            Message::Exited { process, exit } => Input::Exited { process, exit },
            Message::DeletePublished => {
                self.delete_published = true;
                Input::DeletePublished
            }
            Message::Wait { process, reply } => {
                let waiting = self.waits.entry(process.clone()).or_default();
                // A shim's wait may take months; those who gave up in the meantime must not pile up.
                waiting.retain(|reply| !reply.is_closed());
                waiting.push(reply);
                Input::Wait { process }
            }
            Message::WaitOver { process, result } => {
                let lost = matches!(result, Err(Error::ShimGone { .. }));
                if !lost {
                    self.answer_wait(&process, result);
                }
                Input::WaitOver { process, lost }
            }
        };
        let before = self.machine.phase();
        let actions = self.machine.apply(input);
        let phase = self.machine.phase();
        if phase != before {
            debug!(from = ?before, to = ?phase, "task");
        }
        if matches!(phase, Phase::Cleaning | Phase::Gone) {
            self.shim = None;
        }
        if phase == Phase::Gone {
            // Before anyone is answered: the name is free for whoever hears of it.
            self.context.shared.remove(self.context.namespace(), self.context.id());
        }
        let (pid, shim) = (self.machine.pid(), self.shim.clone());
        self.view.send_replace(View { phase, pid, shim, delete_published: self.delete_published });
        // An event, or the end of the connection, may come before that.
        if let Some(result) = created
            && let Some(reply) = self.create.take()
        {
            // Nobody may be waiting; the task exists, or does not, all the same.
            let _ = reply.send(result);
        }
        for action in actions {
            self.act(action);
        }
        drop(told);
    }

    /// Takes the connection in, and looks out for its end.
    fn attach(&mut self, shim: Shim) {
        let (watched, context) = (shim.clone(), self.context.clone());
        self.spawn_job(async move {
            watched.closed().await;
            context.report(Message::Disconnected).await;
        });
        self.shim = Some(shim);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Delete => {
                if let Some(shim) = self.shim.clone() {
                    self.spawn_job(teardown::delete(self.context.clone(), shim));
                }
            }
            Action::CleanUp => {
                info!("the shim is gone; removing what it left");
                self.spawn_job(teardown::clean_up(self.context.clone()));
            }
            Action::AskWait(process) => {
                if let Some(shim) = self.shim.clone() {
                    let context = self.context.clone();
                    self.spawn_job(async move {
                        let exec_id = if process == context.id() { "" } else { &process };
                        let result = shim.wait(exec_id).await;
                        context.report(Message::WaitOver { process, result }).await;
                    });
                }
            }
            Action::AnswerWait(process, exit) => self.answer_wait(&process, Ok(exit)),
            Action::RefuseWait(process) => {
                let error = self.not_found();
                self.answer_wait(&process, Err(error));
            }
            Action::AnswerDelete(exit) => {
                let result = exit.ok_or_else(|| self.not_found());
                answer(self.deletes.drain(..), result);
            }
            Action::RefuseDelete(refusal) => {
                let error = match (refusal, self.refused.take()) {
                    (Refusal::Shim, Some(error)) => error,
                    (Refusal::Unreachable, _) => Error::Unreachable { id: self.context.id().to_owned() },
                    (Refusal::NotFound | Refusal::Shim, _) => self.not_found(),
                };
                answer(self.deletes.drain(..), Err(error));
            }
            Action::PublishExit(process, exit, cause) => self.publish_exit(process, exit, cause),
            Action::PublishDelete(exit) => {
                let envelope = forward::delete_event(self.context.namespace(), self.context.id(), exit);
                let hub = &self.context.shared.hub;
                hub.publish_once(hub.report(envelope));
            }
            Action::Leave => {}
        }
    }

    /// The one place from which the daemon itself reports an exit.
    fn publish_exit(&self, process: String, exit: Exit, cause: Cause) {
        let (namespace, container) = (self.context.namespace(), self.context.id());
        let (pid, status) = (exit.pid, exit.status);
        warn!(process, pid, status, cause = cause.name(), "exit reported for a shim that is gone");
        let envelope = forward::exit_event(namespace, container, &process, exit, cause);
        let hub = &self.context.shared.hub;
        hub.publish_once(hub.report(envelope));
    }

    fn answer_wait(&mut self, process: &str, result: Result<Exit, Error>) {
        answer(self.waits.remove(process).into_iter().flatten(), result);
    }

    fn not_found(&self) -> Error {
        Error::NotFound { id: self.context.id().to_owned() }
    }

    fn spawn_job(&self, job: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(job.instrument(Span::current()));
    }
}

/// Gives all of them the same answer. Some may have stopped waiting.
fn answer(replies: impl Iterator<Item = Reply<Exit>>, result: Result<Exit, Error>) {
    let result = result.map_err(Arc::new);
    for reply in replies {
        let _ = reply.send(result.clone().map_err(|source| Error::Shared { source }));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::events::Hub;
    use crate::grpc::notice;
    use crate::runtime::Config;

    #[tokio::test]
    async fn whoever_writes_to_an_owner_as_it_leaves_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config::of_test(folder.path());
        let shared = Arc::new(Shared::new(config, Hub::new(notice::READING)));
        let owner = Owner::new(&shared, "n", "one", Machine::creating("one"), None);
        let handle = owner.handle();
        let mut view = handle.view.clone();
        // Half of the way into the mailbox.
        let place = handle.mailbox.reserve().await.unwrap();
        let owner = tokio::spawn(owner.run());
        handle.tell(Message::Created(Err(Error::Stopping))).await;
        view.wait_for(|view| view.phase == Phase::Gone).await.unwrap();
        while !handle.mailbox.is_closed() {
            tokio::task::yield_now().await;
        }
        let (reply, answer) = oneshot::channel();
        place.send(Message::Delete { reply });
        let answer = tokio::time::timeout(Duration::from_secs(30), answer).await.expect("it is answered");
        assert!(matches!(answer, Ok(Err(Error::NotFound { .. }))));
        owner.await.unwrap();
    }
}
