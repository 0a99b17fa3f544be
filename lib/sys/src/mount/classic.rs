//! The same mounts with mount(2), for kernels that lack a part of the new API, and for options longer than
//! `fsconfig(2)` takes. One page holds all options here, which overlays of many layers exceed: their lower
//! folders are then named relative to the folder that they share.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::{SysconfVar, chdir, sysconf};

use super::options::{common_directory, lower_directories, replace_lower_directories};
use super::{Error, Job, calls, detach};

/// The path that leads to an open file, whatever is named like it now.
pub(super) fn fd_path(fd: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Mounts on `point`; nothing is mounted after an error.
pub(super) fn attach(job: &Job<'_>, point: &OwnedFd) -> Result<(), Error> {
    match &job.options.mapping {
        Some((users, groups)) if job.mount.kind == "overlay" => {
            attach_idmapped_overlay(job, point, users, groups)?;
        }
        Some(_) => {
            return Err(job.unsupported("id mappings need mount_setattr(2) of Linux 5.12"));
        }
        None => mount_on(job, point, &job.options.data)?,
    }
    finish(job).inspect_err(|_| detach(point))
}

/// Changes the flags and data of the mount whose root is `point`.
pub(super) fn remount(job: &Job<'_>, point: &OwnedFd) -> Result<(), Error> {
    let data = job.options.data.join(",");
    mount(None::<&Path>, &fd_path(point), None::<&str>, job.options.flags, Some(data.as_str()))
        .map_err(|errno| job.error("mount", errno))
}

/// What mount(2) wants in calls of their own: the flags of a bind mount, and the propagation.
fn finish(job: &Job<'_>) -> Result<(), Error> {
    let change = job.options.attributes() != 0 || job.options.cleared_attributes() != 0;
    if job.options.bind() && change {
        let root = job.open_point()?;
        let flags = (job.options.flags & !MsFlags::MS_REC) | MsFlags::MS_REMOUNT;
        let result = change_flags(&root, flags)
            // A mount that came from another user namespace keeps its flags locked: they have to be repeated.
            .or_else(|errno| match errno {
                Errno::EPERM => change_flags(&root, flags | present_flags(&root)?),
                errno => Err(errno),
            });
        result.map_err(|errno| job.error("mount (remount)", errno))?;
    }
    if !job.options.propagation.is_empty() {
        change_flags(&job.open_point()?, job.options.propagation)
            .map_err(|errno| job.error("mount (propagation)", errno))?;
    }
    Ok(())
}

fn change_flags(root: &OwnedFd, flags: MsFlags) -> Result<(), Errno> {
    mount(None::<&Path>, &fd_path(root), None::<&Path>, flags, None::<&Path>)
}

/// The flags of a mount that can be locked.
fn present_flags(root: &OwnedFd) -> Result<MsFlags, Errno> {
    let present = fstatvfs(root)?.flags();
    let lockable = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let flags = lockable.into_iter().filter(|(present_flag, _)| present.contains(*present_flag));
    Ok(flags.fold(MsFlags::empty(), |flags, (_, flag)| flags | flag))
}

fn mount_on(job: &Job<'_>, point: &OwnedFd, data: &[String]) -> Result<(), Error> {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().map_or(4096, |size| size as usize);
    let mut text = data.join(",");
    let mut directory = None;
    // The reserve is containerd's: what the kernel adds to the page has to fit as well.
    if job.mount.kind == "overlay" && text.len() >= page - 512 {
        let lower = lower_directories(data).unwrap_or_default();
        if let Some(common) = common_directory(&lower) {
            let relative: Vec<String> =
                lower.iter().map(|path| path[common.len() + 1..].to_owned()).collect();
            text = replace_lower_directories(data, &relative).join(",");
            directory = Some(common);
        }
    }
    if text.len() >= page {
        return Err(Error::Option {
            mount: job.describe(),
            option: start_of(&text),
            reason: "all options together exceed the page that mount(2) takes",
        });
    }
    let (target, flags) = (fd_path(point), job.options.flags);
    let (source, kind) = (job.source, job.mount.kind.as_str());
    let call = || mount(Some(source), &target, Some(kind), flags, Some(text.as_str()));
    let result = match directory {
        None => call(),
        Some(directory) => in_directory(directory, call),
    };
    // Which of the options it is about, this call does not say.
    result.map_err(|source| Error::Syscall {
        mount: job.describe(),
        syscall: "mount",
        option: (!text.is_empty()).then(|| start_of(&text)),
        log: None,
        source,
    })
}

/// As much of the options as fits an error.
fn start_of(text: &str) -> String {
    text.chars().take(256).collect()
}

/// Runs `call` in a thread with a working directory of its own: that of this process belongs to all its threads.
fn in_directory(directory: &str, call: impl FnOnce() -> Result<(), Errno> + Send) -> Result<(), Errno> {
    std::thread::scope(|scope| {
        let work = move || {
            unshare(CloneFlags::CLONE_FS)?;
            chdir(directory)?;
            call()
        };
        match std::thread::Builder::new().spawn_scoped(scope, work) {
            Ok(thread) => thread.join().unwrap_or(Err(Errno::EIO)),
            Err(_) => Err(Errno::EAGAIN),
        }
    })
}

/// An overlay over idmapped lower folders (Linux 5.19): those are mounted on `point` first, so that no other
/// folder is needed for them, and taken away from under the overlay in the end.
fn attach_idmapped_overlay(job: &Job<'_>, point: &OwnedFd, users: &str, groups: &str) -> Result<(), Error> {
    let (data, lowers) = job.idmap_lowers(point, users, groups)?;
    mount_on(job, point, &data)?;
    let overlay = job
        .open_point()
        .and_then(|root| {
            calls::clone_tree(Some(root.as_fd()), c"", false).map_err(|errno| job.error("open_tree", errno))
        })
        .inspect_err(|_| detach(point));
    detach(point);
    drop(lowers);
    calls::move_mount(overlay?.as_fd(), point.as_fd()).map_err(|errno| job.error("move_mount", errno))
}
