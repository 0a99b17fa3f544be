//! Lists of mounts of which the last refers to those before it (`template`): an overlay whose lower folders are images
//! that have to be mounted first, as containerd's erofs snapshotter hands out.
//!
//! ```text
//!   mount 0, mount 1, … on the target, one over the other ──► the last over them, with /proc/self/fd/N for mount N
//!         ──► a copy of the last alone (open_tree) ──► all off the target ──► the copy on the target
//! ```
//!
//! An overlay keeps private copies of the mounts that its folders are in, and a bind mount keeps its filesystem; so
//! those below can go at once, and in the end the target has one mount, which ends with all that it is made of. There is
//! no other place that would have to be cleaned up: not after an error, and not after a crash.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use davit_model::Mount;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::MntFlags;
use nix::sys::stat::Mode;

use super::template::{Earlier, fill_in};
use super::{Error, Interface, calls, describe, is_by_helper, mount_one, take_off};

/// The words before a type that are carried out here. The others are `mkfs/`, which runs programs, and what nobody knows.
const WORDS: [&str; 2] = ["format", "mkdir"];

/// The option of `mkdir/`, which is not carried out here.
const MKDIR: &str = "X-containerd.mkdir.";

/// Takes the words before the type of a mount away; `None` if there are none, or others than those that are known here.
fn plain_kind(kind: &str) -> Option<&str> {
    let mut rest = kind;
    while let Some((word, after)) = rest.split_once('/') {
        if !WORDS.contains(&word) {
            return None;
        }
        rest = after;
    }
    (rest.len() < kind.len()).then_some(rest)
}

/// True when the last of the mounts refers to those before it.
pub(super) fn is_composed(mounts: &[Mount]) -> bool {
    mounts.len() > 1 && mounts.last().is_some_and(|last| plain_kind(&last.kind).is_some())
}

/// What is on the target; taken off again unless it is kept.
struct Stack<'a> {
    target: &'a Path,
    /// The roots of the mounts, by which those after them find them.
    roots: Vec<OwnedFd>,
    earlier: Vec<Earlier>,
}

impl Drop for Stack<'_> {
    fn drop(&mut self) {
        for _ in &self.roots {
            // In use they are by nobody but the mounts that are made of them.
            let _ = take_off(self.target, MntFlags::MNT_DETACH);
        }
    }
}

impl Stack<'_> {
    /// Mounts one more on the target.
    fn push(&mut self, mount: &Mount) -> Result<(), Error> {
        let mount = self.resolve(mount)?;
        if !mount.target.is_empty() {
            return Err(Error::Unsupported {
                mount: describe(&mount),
                reason: "a mount that others are made of cannot have a target",
            });
        }
        mount_one(&mount, self.target, Interface::Newest)?;
        let root = open_root(self.target, &mount).inspect_err(|_| {
            let _ = take_off(self.target, MntFlags::MNT_DETACH);
        })?;
        let point = format!("/proc/self/fd/{}", root.as_raw_fd());
        self.roots.push(root);
        self.earlier.push(Earlier { source: mount.source, target: mount.target, point });
        Ok(())
    }

    /// The mount without words before its type and without references.
    fn resolve(&self, mount: &Mount) -> Result<Mount, Error> {
        let Some(kind) = plain_kind(&mount.kind) else { return Ok(mount.clone()) };
        let fill = |text: &String| {
            fill_in(text, &self.earlier).map_err(|reason| Error::Template {
                mount: describe(mount),
                text: text.clone(),
                reason,
            })
        };
        if mount.options.iter().any(|option| option.starts_with(MKDIR)) {
            return Err(Error::Unsupported {
                mount: describe(mount),
                reason: "its folders are made by a mount manager",
            });
        }
        let resolved = Mount {
            kind: kind.to_owned(),
            source: fill(&mount.source)?,
            target: fill(&mount.target)?,
            options: mount.options.iter().map(fill).collect::<Result<_, _>>()?,
        };
        if is_by_helper(&resolved) {
            // What stands for those are descriptors of this process.
            return Err(Error::Unsupported {
                mount: describe(mount),
                reason: "a mount helper does not find the mounts before it",
            });
        }
        Ok(resolved)
    }
}

fn open_root(target: &Path, mount: &Mount) -> Result<OwnedFd, Error> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(target, flags, Mode::empty()).map_err(|errno| failed(mount, target, "open mounted root", errno))
}

fn failed(mount: &Mount, target: &Path, syscall: &'static str, source: Errno) -> Error {
    let mount = format!("{} on {}", describe(mount), target.display());
    Error::Syscall { mount, syscall, option: None, log: None, source }
}

/// Carries out a composed list; nothing is mounted after an error.
pub(super) fn mount_composed(mounts: &[Mount], target: &Path) -> Result<(), Error> {
    let mut stack = Stack { target, roots: Vec::new(), earlier: Vec::new() };
    mounts.iter().try_for_each(|mount| stack.push(mount))?;
    let (Some(last), Some(top)) = (mounts.last(), stack.roots.last()) else { return Ok(()) };
    let copy = calls::clone_tree(Some(top.as_fd()), c"", false)
        .map_err(|errno| failed(last, target, "open_tree", errno))?;
    drop(stack);
    let point = open_root(target, last)?;
    calls::move_mount(copy.as_fd(), point.as_fd()).map_err(|errno| failed(last, target, "move_mount", errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_words_compose() {
        assert_eq!(plain_kind("format/mkdir/overlay"), Some("overlay"));
        for kind in ["overlay", "mkfs/ext4", "format/mkfs/ext4", "fancy/overlay"] {
            assert_eq!(plain_kind(kind), None, "{kind}");
        }
    }
}
