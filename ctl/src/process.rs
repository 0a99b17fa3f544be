//! A process in the foreground: its streams joined to ours, its exit awaited, signals and the window's size passed on.
//!
//! ```text
//! open ──► engage ──► (the task or exec is created and started) ──► supervise ──► exit ──► drain
//!          raw mode,                                              ▲  │  stdin at its end → CloseIO
//!          signals caught                                         │  │  SIGWINCH → ResizePty
//!                                                                 │  │  signals → Kill, or the end of the client
//!                                               reattach ─────────┘  └► detached: by keys, or a client that ends
//! ```

use std::io::IsTerminal;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use davit_proto::containerd::services::tasks::v1::{
    CloseIoRequest, KillRequest, ResizePtyRequest, WaitRequest,
};
use davit_proto::containerd::v1::types::Process;
use nix::libc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tonic::Code;

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::fifo::{self, FifoDir, InputEnd};
use crate::keys::DetachKeys;
use crate::terminal::{self, Changed};

/// How long the output may take after the process is gone and the shim has closed its ends. Only a process that was
/// handed one of the FIFOs and outlives the container can make it as long.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait before asking a daemon again that went away.
const RECONNECT_DELAY: Duration = Duration::from_millis(200);
/// How many interrupts end the client when the process does not react to them.
const MAX_INTERRUPTS: u32 = 3;

/// The streams of a process in the foreground, our ends open.
pub(crate) struct Streams {
    /// The FIFO of the standard input, empty for none.
    pub(crate) stdin: String,
    /// That of the standard output.
    pub(crate) stdout: String,
    /// That of the standard error, empty with a terminal, which has but one stream.
    pub(crate) stderr: String,
    /// Whether the process has a terminal.
    pub(crate) terminal: bool,
    input: Option<std::fs::File>,
    /// The end of our input is that of the process, too.
    input_ends: bool,
    /// Signals are for the process.
    pass_signals: bool,
    keys: DetachKeys,
    outputs: Vec<oneshot::Receiver<()>>,
    raw: Option<Changed>,
    signals: Option<Signals>,
    /// `None` where another place than ours has the output.
    folder: Option<FifoDir>,
}

/// Which process: a container's first one, or an exec in it.
#[derive(Debug, Clone)]
pub(crate) struct ProcessId {
    /// The container.
    pub(crate) container: String,
    /// The exec, empty for the container's first process.
    pub(crate) exec: String,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit code; 128 and the number of the signal that killed it.
    pub(crate) code: u32,
    /// When.
    pub(crate) at: SystemTime,
}

/// Why supervision ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The process did.
    Exited(Exit),
    /// The client is to end, by the signal of this number; the process runs on.
    Interrupted(i32),
    /// The user has left the process alone.
    Detached,
}

impl Streams {
    /// Makes the FIFOs and begins to copy the output.
    ///
    /// # Errors
    /// Those of making and opening them, and [`Error::Usage`] for a terminal on an input that is none.
    pub(crate) fn open(interactive: bool, terminal: bool, keys: &DetachKeys) -> Result<Streams> {
        if interactive && terminal && !std::io::stdin().is_terminal() {
            let hint = "leave out -t: -i alone passes standard input on";
            return Err(Error::usage("the input is not a terminal", hint));
        }
        let folder = FifoDir::create()?;
        let text = |path: &std::path::Path| path.display().to_string();
        let mut outputs = Vec::new();
        let stdout = folder.make("stdout")?;
        outputs.push(fifo::copy_out(fifo::open_reader(&stdout)?, std::io::stdout()));
        let mut stderr = String::new();
        if !terminal {
            let path = folder.make("stderr")?;
            outputs.push(fifo::copy_out(fifo::open_reader(&path)?, std::io::stderr()));
            stderr = text(&path);
        }
        let mut stdin = String::new();
        let mut input = None;
        if interactive {
            let path = folder.make("stdin")?;
            input = Some(fifo::open_writer(&path)?);
            stdin = text(&path);
        }
        Ok(Streams {
            stdin,
            stdout: text(&stdout),
            stderr,
            terminal,
            input,
            input_ends: true,
            pass_signals: true,
            keys: keys.clone(),
            outputs,
            raw: None,
            signals: None,
            folder: Some(folder),
        })
    }

    /// Opens the streams of a process that another `davit` has left alone; none of the output where it goes elsewhere.
    ///
    /// # Errors
    /// Those of opening them, and [`Error::Usage`] when a client is there.
    pub(crate) fn reopen(
        process: &Process,
        interactive: bool,
        pass_signals: bool,
        keys: &DetachKeys,
    ) -> Result<Streams> {
        // What is in another folder another client has made, which may be there.
        let folder_of = |path: &str| {
            let is_fifo = std::fs::symlink_metadata(path).is_ok_and(|status| status.file_type().is_fifo());
            Path::new(path).parent().filter(|folder| is_fifo && fifo::is_folder(folder)).map(Path::to_owned)
        };
        let mut outputs = Vec::new();
        let mut folder = None;
        if let Some(path) = folder_of(&process.stdout) {
            folder = FifoDir::take_over(&path)?;
            if folder.is_none() {
                let hint = "detach that one first (ctrl-p ctrl-q), or follow a log: run containers with -d";
                return Err(Error::usage("another client is attached to the container", hint));
            }
            let reader = fifo::open_reader(process.stdout.as_ref())?;
            outputs.push(fifo::copy_out(reader, std::io::stdout()));
            if folder_of(&process.stderr).is_some() {
                outputs.push(fifo::copy_out(fifo::open_reader(process.stderr.as_ref())?, std::io::stderr()));
            }
        }
        let mut input = None;
        if interactive && folder_of(&process.stdin).is_some() {
            input = Some(fifo::open_writer(process.stdin.as_ref())?);
        }
        Ok(Streams {
            stdin: process.stdin.clone(),
            stdout: process.stdout.clone(),
            stderr: process.stderr.clone(),
            terminal: process.terminal,
            input,
            // The input of a container in the background stays open without a client.
            input_ends: folder.is_some(),
            pass_signals,
            keys: keys.clone(),
            outputs,
            raw: None,
            signals: None,
            folder,
        })
    }

    /// Whether the output comes here.
    pub(crate) fn has_output(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// The folder of the FIFOs, if the output comes through some.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.folder.as_ref().map(FifoDir::path)
    }

    /// Has the FIFOs stay for another client: this one leaves the process alone.
    pub(crate) fn leave(&mut self) {
        if let Some(folder) = &mut self.folder {
            folder.keep(true);
        }
    }

    /// Has a terminal show again what it shows: a program that draws on it does so when the size changes.
    pub(crate) async fn redraw(&self, client: &Client, process: &ProcessId) {
        if let Some((height, width)) = terminal::size().filter(|_| self.terminal) {
            resize(client, process, (height.saturating_add(1), width)).await;
        }
    }

    /// From here on the terminal is the process', and signals wait for [`Streams::supervise`]: what is started after
    /// this cannot be left behind by an interrupt. Comes before the start, or the first output would be garbled.
    ///
    /// # Errors
    /// When the terminal cannot be set up.
    pub(crate) fn engage(&mut self) -> Result<()> {
        self.signals = Some(Signals::listen(self.terminal)?);
        if self.terminal && self.input.is_some() {
            self.raw = Changed::raw()?;
        }
        Ok(())
    }

    /// Waits until all output is written. The process is over, and so are its FIFOs.
    pub(crate) async fn drain(&mut self) {
        if let Some(folder) = &mut self.folder {
            folder.keep(false);
        }
        let all = async {
            for output in &mut self.outputs {
                // A thread that ended otherwise has nothing more to write either.
                let _ = output.await;
            }
        };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, all).await;
    }

    /// Joins the user's terminal or streams to the started process until it exits, and gives the terminal back.
    ///
    /// # Errors
    /// When the daemon does not know the process.
    pub(crate) async fn supervise(&mut self, client: &Client, process: &ProcessId) -> Result<Ended> {
        if self.signals.is_none() {
            self.engage()?;
        }
        let raw = self.raw.take();
        let mut signals = self.signals.take().expect("it was engaged");
        if let Some(size) = terminal::size().filter(|_| self.terminal) {
            resize(client, process, size).await;
        }
        // Keys are for people.
        let keys = raw.is_some().then(|| self.keys.clone());
        let mut input_end = self.input.take().map(|fifo| fifo::copy_in(fifo, keys));
        let mut interrupts = 0;
        let exit = wait(client, process);
        tokio::pin!(exit);
        loop {
            // Cancel safety: `exit` is pinned outside of the loop; a receiver of signals and the end of the input keep
            // what they have when they are dropped.
            tokio::select! {
                exit = &mut exit => return exit.map(Ended::Exited),
                end = at_end(&mut input_end) => match end {
                    InputEnd::Detached => return Ok(Ended::Detached),
                    InputEnd::Over(fifo) => {
                        if self.input_ends {
                            close_stdin(client, process).await;
                        }
                        // Only now may our end go: the shim has been told, and reads what is left.
                        drop(fifo);
                    }
                },
                number = signals.receiver.recv() => {
                    let Some(number) = number else { continue };
                    if number == libc::SIGWINCH {
                        if let Some(size) = terminal::size() {
                            resize(client, process, size).await;
                        }
                        continue;
                    }
                    let ends_client =
                        !self.pass_signals || raw.is_some() || self.terminal && number != libc::SIGINT;
                    if number == libc::SIGINT {
                        interrupts += 1;
                    }
                    if ends_client || interrupts >= MAX_INTERRUPTS {
                        return Ok(Ended::Interrupted(number));
                    }
                    // A signal that does not get through, because the daemon is away, must still end somebody.
                    if kill(client, process, number.unsigned_abs(), false).await.is_err()
                        && matches!(number, libc::SIGTERM | libc::SIGHUP | libc::SIGQUIT)
                    {
                        return Ok(Ended::Interrupted(number));
                    }
                }
            }
        }
    }
}

/// The end of the input, once; never when there is none.
async fn at_end(input: &mut Option<oneshot::Receiver<InputEnd>>) -> InputEnd {
    let Some(receiver) = input else { return std::future::pending().await };
    let end = receiver.await;
    *input = None;
    match end {
        Ok(end) => end,
        // A thread that ended otherwise has nothing more to pass on.
        Err(_) => std::future::pending().await,
    }
}

/// Waits for the exit of a process, through restarts of the daemon.
///
/// # Errors
/// When the daemon does not know the process.
pub(crate) async fn wait(client: &Client, process: &ProcessId) -> Result<Exit> {
    let mut told = false;
    loop {
        let request = WaitRequest { container_id: process.container.clone(), exec_id: process.exec.clone() };
        match client.tasks().wait(request).await.call("wait for the container") {
            Ok(response) => {
                let at = response.exited_at.as_ref().and_then(crate::format::system_time);
                return Ok(Exit { code: response.exit_status, at: at.unwrap_or_else(SystemTime::now) });
            }
            Err(Error::Call { status, .. }) if is_lost_connection(&status) => {
                if !told {
                    told = true;
                    eprint_line(
                        "davit: lost the daemon; the container runs on, waiting for the daemon to come back",
                    );
                }
                tokio::time::sleep(RECONNECT_DELAY).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether the status was made here, for want of a connection, and not sent by the daemon.
fn is_lost_connection(status: &tonic::Status) -> bool {
    let from_transport = std::error::Error::source(status).is_some();
    status.code() == Code::Unavailable || from_transport && status.code() == Code::Unknown
}

/// Writes to standard error even while the terminal is raw.
fn eprint_line(text: &str) {
    use std::io::Write;
    // That nobody can read it changes nothing.
    let _ = std::io::stderr().write_all(format!("{text}\r\n").as_bytes());
}

/// Sends a signal.
///
/// # Errors
/// Those of the call; a process that is gone is "not found".
pub(crate) async fn kill(client: &Client, process: &ProcessId, signal: u32, all: bool) -> Result<()> {
    let request =
        KillRequest { container_id: process.container.clone(), exec_id: process.exec.clone(), signal, all };
    client.tasks().kill(request).await.call("signal the container")
}

/// Tells the terminal of the process its size, rows and columns. A process that is already gone needs none.
async fn resize(client: &Client, process: &ProcessId, (height, width): (u16, u16)) {
    let request = ResizePtyRequest {
        container_id: process.container.clone(),
        exec_id: process.exec.clone(),
        width: width.into(),
        height: height.into(),
    };
    let _ = client.tasks().resize_pty(request).await;
}

/// Tells the shim that no more input comes. A process that is already gone needs none.
async fn close_stdin(client: &Client, process: &ProcessId) {
    let request = CloseIoRequest {
        container_id: process.container.clone(),
        exec_id: process.exec.clone(),
        stdin: true,
    };
    let _ = client.tasks().close_io(request).await;
}

/// The signals that concern the process.
struct Signals {
    receiver: mpsc::Receiver<i32>,
}

impl Signals {
    fn listen(terminal: bool) -> Result<Signals> {
        let mut kinds = vec![
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::terminate(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        if terminal {
            kinds.push(SignalKind::window_change());
        }
        let (sender, receiver) = mpsc::channel(16);
        for kind in kinds {
            let error = |source| Error::System { action: "listen for signals", source };
            let mut stream = signal(kind).map_err(error)?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(kind.as_raw_value()).await.is_ok() {}
            });
        }
        Ok(Signals { receiver })
    }
}
