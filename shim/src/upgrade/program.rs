//! The program of an upgrade: whether it may be executed, and whether it can go on from the state.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use davit_sys::process::{Command, Exit};
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::{pipe2, read};

use super::UpgradeError;
use crate::executor::{Either, race};
use crate::identity;
use crate::reactor::{Async, sleep};
use crate::reaper::Awaited;
use crate::state::{self, State};

/// The time that the program has to look at the state.
const CHECK_LIMIT: Duration = Duration::from_secs(5);
/// The most that it may say.
const MAX_ANSWER: usize = 4096;

/// A program that may be executed.
pub(super) struct Program {
    path: PathBuf,
    /// `O_PATH`: what was looked at is what is executed, whatever becomes of its name.
    file: OwnedFd,
}

impl Program {
    /// Opens a program, component by component. It and every folder above it must belong to root and be writable by
    /// nobody else; the sticky bit does not suffice, for an old program can be linked into a folder that has it.
    pub(super) fn open(path: &Path) -> Result<Program, UpgradeError> {
        if !path.is_absolute() {
            return Err(UpgradeError::Relative { path: path.to_owned() });
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| UpgradeError::Open { path, source }
        };
        // Links may lead anywhere: what counts is where they end.
        let path = path.canonicalize().map_err(failed(path))?;
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let mut walked = PathBuf::from("/");
        let mut file = open(&walked, flags, Mode::empty()).map_err(|error| failed(&walked)(error.into()))?;
        examine(&walked, &file, SFlag::S_IFDIR)?;
        let components: Vec<_> = path.components().skip(1).collect();
        for (index, component) in components.iter().enumerate() {
            walked.push(component);
            let name: &Path = component.as_ref();
            file =
                openat(&file, name, flags, Mode::empty()).map_err(|error| failed(&walked)(error.into()))?;
            let last = index + 1 == components.len();
            examine(&walked, &file, if last { SFlag::S_IFREG } else { SFlag::S_IFDIR })?;
        }
        Ok(Program { path, file })
    }

    /// Its path, without links.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Executes the program in a process of its own, with this state, and fails unless it says that it can go on from
    /// there. `bytes` are what is in the file.
    pub(super) async fn check(&self, file: &OwnedFd, bytes: &[u8]) -> Result<(), UpgradeError> {
        let failed = |step| move |source| UpgradeError::Io { step, source };
        let refused = |why: String| UpgradeError::Check { path: self.path.clone(), why };
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .map_err(|error| failed("make a pipe for the check")(error.into()))?;
        let child = {
            use std::os::fd::AsRawFd;
            // Our own table of descriptors: the child's is about to change.
            let opened = format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd());
            let invalid = |error: std::ffi::NulError| failed("prepare the check")(error.into());
            let mut command = Command::new(Path::new(&opened)).map_err(invalid)?;
            command.name(&self.path).map_err(invalid)?.argument("-upgrade-check").map_err(invalid)?;
            command.descriptor(0, file.as_fd());
            command.descriptor(1, writer.as_fd()).descriptor(2, writer.as_fd());
            command.death_signal(nix::libc::SIGKILL).restore_huge_pages();
            command.spawn().map_err(|error| refused(error.source.to_string()))?
        };
        drop(writer);
        let child = Awaited::child(child).map_err(failed("watch the check"))?;
        let reader = Async::new(reader).map_err(failed("watch the check"))?;
        let answer = async {
            let said = read_answer(&reader).await?;
            // It may hold its output open, or have closed it and not end.
            Ok::<_, io::Error>((said, child.exit().await?.0))
        };
        let answered = race(answer, sleep(CHECK_LIMIT)).await;
        let answered = match answered {
            Either::First(answered) => answered.map_err(failed("wait for the check"))?,
            Either::Second(()) => {
                let _ = child.signal(nix::libc::SIGKILL);
                let _ = child.exit().await;
                return Err(refused(format!("no answer within {} s", CHECK_LIMIT.as_secs())));
            }
        };
        match answered {
            (said, Exit::Code(0)) if said == expected(bytes) => Ok(()),
            (said, exit) => {
                let said = said.trim();
                let how = match exit {
                    Exit::Code(code) => format!("exit status {code}"),
                    Exit::Signal(signal) => format!("signal {signal}"),
                };
                Err(refused(if said.is_empty() { how } else { format!("{how}: {said}") }))
            }
        }
    }
}

/// Fails if anybody but root can change the file, or what lies in the folder.
fn examine(path: &Path, file: &OwnedFd, kind: SFlag) -> Result<(), UpgradeError> {
    let failed = |error: nix::Error| UpgradeError::Open { path: path.to_owned(), source: error.into() };
    let stat = fstat(file).map_err(failed)?;
    match objection(&stat, kind) {
        None => Ok(()),
        Some(why) => Err(UpgradeError::Unsafe { path: path.to_owned(), why }),
    }
}

fn objection(stat: &FileStat, kind: SFlag) -> Option<String> {
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != kind {
        return Some(if kind == SFlag::S_IFREG { "is no regular file" } else { "is no folder" }.to_owned());
    }
    if stat.st_uid != 0 {
        return Some(format!("belongs to user {}, not to root", stat.st_uid));
    }
    let mode = Mode::from_bits_truncate(stat.st_mode);
    if mode.intersects(Mode::S_IWGRP | Mode::S_IWOTH) {
        return Some(format!("is writable by others than root (mode {:04o})", stat.st_mode & 0o7777));
    }
    if kind == SFlag::S_IFREG && !mode.intersects(Mode::S_IXUSR | Mode::S_IXGRP | Mode::S_IXOTH) {
        return Some("is not executable".to_owned());
    }
    None
}

/// What is said until the end of the output, or until it is too much.
async fn read_answer(reader: &Async<OwnedFd>) -> io::Result<String> {
    let mut said = Vec::new();
    let mut buffer = [0; 512];
    while said.len() < MAX_ANSWER {
        let count = reader.read_with(|reader| Ok(read(reader, &mut buffer)?)).await?;
        if count == 0 {
            break;
        }
        said.extend_from_slice(&buffer[..count]);
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// The answer of a program that understands the state: what no other program says by chance.
fn expected(state: &[u8]) -> String {
    format!("shim state of {} bytes, checksum {:08x}: understood\n", state.len(), state::checksum(state))
}

/// `-upgrade-check`: says whether this program can go on from the state at standard input.
///
/// # Errors
/// It cannot.
pub(crate) fn answer_check() -> io::Result<()> {
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes)?;
    State::open(&bytes).map_err(|error| {
        let text = format!("build {}: {}", identity::build(), davit_model::error::chain(&error));
        io::Error::new(io::ErrorKind::InvalidData, text)
    })?;
    io::stdout().write_all(expected(&bytes).as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn why(path: &Path) -> String {
        match Program::open(path) {
            Ok(_) => "nothing".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn only_what_root_alone_can_change_is_opened() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        // Not in /tmp, where everybody can write.
        let folder = tempfile::tempdir_in("/var/lib").unwrap();
        let (below, program) = (folder.path().join("below"), folder.path().join("below/program"));
        std::fs::create_dir(&below).unwrap();
        std::fs::write(&program, "").unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&below, 0o755);
        mode(&program, 0o755);
        assert_eq!(why(&program), "nothing");
        let link = folder.path().join("link");
        symlink(&program, &link).unwrap();
        assert_eq!(why(&link), "nothing");
        for (wrong, says) in [(0o775, "(mode 0775)"), (0o757, "(mode 0757)"), (0o644, "is not executable")] {
            mode(&program, wrong);
            assert!(why(&program).ends_with(says), "{}", why(&program));
            assert!(why(&link).ends_with(says), "{}", why(&link));
        }
        mode(&program, 0o755);
        for wrong in [0o775, 0o757, 0o1777] {
            mode(&below, wrong);
            assert!(why(&program).contains("below is writable by others"), "{}", why(&program));
        }
        mode(&below, 0o755);
        chown(&below, Some(1000), None).unwrap();
        assert!(why(&program).ends_with("below belongs to user 1000, not to root"));
        chown(&below, Some(0), None).unwrap();
        chown(&program, Some(1000), None).unwrap();
        assert!(why(&program).ends_with("program belongs to user 1000, not to root"));
        assert!(why(&below).ends_with("is no regular file"));
        assert!(why(Path::new("program")).ends_with("is not absolute"));
        assert!(matches!(Program::open(&below.join("none")), Err(UpgradeError::Open { .. })));
    }
}
