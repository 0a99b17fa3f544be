//! An OCI runtime that does what `runc` does, but for the faults that a test has ordered.
//!
//! It is run as a link in a folder of the test's own. A file `faults/<action>@<container>` beside the link, or
//! `faults/<action>`, orders one fault for the next call of that action; its text is one of the words in [`Fault`]. Whoever
//! takes the order writes its pid into the file and, where the fault is, renames it to `….taken`; with the words that wait
//! it goes on only when there is a file `….go`. So a test can stop a container's life at a step, do what it wants to do there, and let it go on,
//! without any guess at times.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use davit_integration::bins;
use nix::sys::signal::{Signal, raise};

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// `fail`: nothing is done; the log says why.
    Fail,
    /// `mute`: nothing is done, and nothing said.
    Mute,
    /// `garbage`: nothing is done, and the log is no JSON.
    Garbage,
    /// `lie`: nothing is done, and all is said to be well.
    Lie,
    /// `die`: it is killed before it has done anything.
    Die,
    /// `half`: it is killed when it has made the cgroup and nothing else.
    Half,
    /// `done-die`: it is killed when it has done all.
    DoneDie,
    /// `done-fail`: it does all, and says that it has failed.
    DoneFail,
    /// `wait`: it waits before it does anything.
    Wait,
    /// `done-wait`: it waits when it has done all.
    DoneWait,
    /// `no-pid`, `bad-pid`: it leaves no pid file, or nonsense in it.
    NoPid,
    BadPid,
    /// `other-pid`: the pid file names the process of `faults/canary`.
    OtherPid,
}

impl Fault {
    fn of(word: &str) -> Result<Fault> {
        Ok(match word {
            "fail" => Fault::Fail,
            "mute" => Fault::Mute,
            "garbage" => Fault::Garbage,
            "lie" => Fault::Lie,
            "die" => Fault::Die,
            "half" => Fault::Half,
            "done-die" => Fault::DoneDie,
            "done-fail" => Fault::DoneFail,
            "wait" => Fault::Wait,
            "done-wait" => Fault::DoneWait,
            "no-pid" => Fault::NoPid,
            "bad-pid" => Fault::BadPid,
            "other-pid" => Fault::OtherPid,
            _ => bail!("no such fault: {word}"),
        })
    }
}

/// A fault, and the files about it.
struct Order {
    fault: Fault,
    taking: PathBuf,
    taken: PathBuf,
    go: PathBuf,
}

impl Order {
    /// Tells the test that the step is reached.
    fn tell(&self) -> Result<()> {
        Ok(fs::rename(&self.taking, &self.taken)?)
    }
}

/// The parts of a runtime's command line that matter here.
struct Call {
    action: String,
    container: String,
    log: Option<PathBuf>,
    pid_file: Option<PathBuf>,
    bundle: Option<PathBuf>,
}

impl Call {
    fn parse(arguments: &[OsString]) -> Call {
        let text: Vec<String> =
            arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
        let after = |flag: &str| {
            let place = text.iter().position(|argument| argument == flag)?;
            text.get(place + 1).cloned()
        };
        let with_value = ["--root", "--log", "--log-format"];
        let mut words = text.iter().enumerate().filter(|(place, word)| {
            !word.starts_with("--")
                && !place.checked_sub(1).is_some_and(|p| with_value.contains(&text[p].as_str()))
        });
        let action = words.next().map(|(_, word)| word.clone()).unwrap_or_default();
        // The signal of `kill` comes behind the container.
        let last = if action == "kill" { text.len().saturating_sub(2) } else { text.len().saturating_sub(1) };
        Call {
            container: text.get(last).cloned().unwrap_or_default(),
            action,
            log: after("--log").map(PathBuf::from),
            pid_file: after("--pid-file").map(PathBuf::from),
            bundle: after("--bundle").map(PathBuf::from),
        }
    }

    /// Takes the order for this call, if there is one. Several calls may want the same one; a rename has one winner.
    fn order(&self, faults: &Path) -> Result<Option<Order>> {
        for name in [format!("{}@{}", self.action, self.container), self.action.clone()] {
            let order = faults.join(&name);
            let Ok(word) = fs::read_to_string(&order) else { continue };
            let taking = faults.join(format!("{name}.{}", std::process::id()));
            if fs::rename(&order, &taking).is_err() {
                continue;
            }
            fs::write(&taking, std::process::id().to_string())?;
            let taken = faults.join(format!("{name}.taken"));
            return Ok(Some(Order {
                fault: Fault::of(word.trim())?,
                taking,
                taken,
                go: faults.join(format!("{name}.go")),
            }));
        }
        Ok(None)
    }
}

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args_os();
    let own = PathBuf::from(arguments.next().context("no name of this program")?);
    let arguments: Vec<OsString> = arguments.collect();
    let faults = own.parent().unwrap_or(Path::new(".")).join("faults");
    let call = Call::parse(&arguments);
    let Some(order) = call.order(&faults)? else { return Err(run(&arguments)?.exec().into()) };
    let fault = order.fault;
    if fault != Fault::DoneWait {
        order.tell()?;
    }
    match fault {
        Fault::Lie => return Ok(ExitCode::SUCCESS),
        Fault::Mute => return Ok(ExitCode::FAILURE),
        Fault::Fail => {
            return failed(&call, "{\"level\":\"error\",\"msg\":\"a fault was ordered\",\"time\":\"x\"}\n");
        }
        Fault::Garbage => return failed(&call, "\u{1}{no JSON at all"),
        Fault::Half => {
            make_cgroup(&call)?;
            raise(Signal::SIGKILL)?;
        }
        Fault::Die => raise(Signal::SIGKILL)?,
        Fault::Wait => {
            wait_for(&order.go);
            return Err(run(&arguments)?.exec().into());
        }
        Fault::DoneDie
        | Fault::DoneFail
        | Fault::DoneWait
        | Fault::NoPid
        | Fault::BadPid
        | Fault::OtherPid => {}
    }
    let done = run(&arguments)?.status()?;
    match (fault, &call.pid_file) {
        (Fault::DoneDie, _) => raise(Signal::SIGKILL)?,
        (Fault::DoneFail, _) => return Ok(ExitCode::FAILURE),
        (Fault::DoneWait, _) => {
            order.tell()?;
            wait_for(&order.go);
        }
        (Fault::NoPid, Some(file)) => fs::remove_file(file)?,
        (Fault::BadPid, Some(file)) => fs::write(file, "not a number")?,
        (Fault::OtherPid, Some(file)) => fs::write(file, fs::read_to_string(faults.join("canary"))?)?,
        _ => {}
    }
    Ok(done.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The runtime that does the work: that of the link `next` beside this one, if there is one.
fn run(arguments: &[OsString]) -> Result<Command> {
    let own = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let next = Some(own.with_file_name("next")).filter(|next| next.exists());
    let mut command = Command::new(next.or_else(|| bins::on_path("runc")).context("runc is not installed")?);
    command.args(arguments);
    Ok(command)
}

fn failed(call: &Call, log: &str) -> Result<ExitCode> {
    if let Some(path) = &call.log {
        fs::File::options().create(true).append(true).open(path)?.write_all(log.as_bytes())?;
    }
    Ok(ExitCode::FAILURE)
}

fn wait_for(go: &Path) {
    while !go.exists() {
        sleep(Duration::from_millis(2));
    }
}

/// What a runtime that is killed early leaves: a cgroup of the container's name in every hierarchy.
fn make_cgroup(call: &Call) -> Result<()> {
    let bundle = call.bundle.as_ref().context("only `create` has a cgroup to make")?;
    let spec: serde_json::Value = serde_json::from_slice(&fs::read(bundle.join("config.json"))?)?;
    let path = spec["linux"]["cgroupsPath"].as_str().context("no cgroup in the spec")?;
    for hierarchy in davit_integration::census::hierarchies() {
        fs::create_dir_all(hierarchy.join(path.trim_start_matches('/')))?;
    }
    Ok(())
}
