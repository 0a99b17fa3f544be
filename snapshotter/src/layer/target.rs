//! Where the trees of some mounts are: in a folder that can be used as it is, or behind mounts that are made in a
//! mount namespace that nobody else sees.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use davit_model::Mount;
use davit_sys::fs::in_user_namespace;
use davit_sys::mount::{is_by_helper, mount_all, unmount_all};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::mkdtemp;

use super::error::Error;
use super::whiteout::Whiteouts;
use crate::erofs;

/// Enough for a walk down a tree as deep as a path can be long.
const STACK_SIZE: usize = 16 << 20;

/// What an overlay mount is made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overlay<'a> {
    /// The writable layer; absent in a read-only overlay.
    pub(super) upper: Option<&'a str>,
    /// The layers below, the nearest first.
    pub(super) lowers: Vec<String>,
    /// True when its marks are `user.overlay.` attributes.
    pub(super) user_attributes: bool,
}

/// Takes an overlay mount apart. `None` for other mounts, and for such that go elsewhere than the root.
pub(super) fn overlay(mounts: &[Mount]) -> Option<Overlay<'_>> {
    let [mount] = mounts else { return None };
    if mount.kind != "overlay" || !mount.target.is_empty() {
        return None;
    }
    let mut overlay = Overlay { upper: None, lowers: Vec::new(), user_attributes: false };
    for option in &mount.options {
        if let Some(upper) = option.strip_prefix("upperdir=") {
            overlay.upper = Some(upper);
        } else if let Some(lowers) = option.strip_prefix("lowerdir=") {
            overlay.lowers = split_lowers(lowers);
        } else if option == "userxattr" {
            overlay.user_attributes = true;
        }
    }
    Some(overlay)
}

/// A folder of changes over images, as the erofs snapshotter hands out: an overlay of all mounts before it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OverImages<'a> {
    /// The folder of changes; absent in a view.
    pub(super) upper: Option<&'a str>,
    /// The mounts of the images, the nearest first.
    pub(super) images: &'a [Mount],
}

/// Takes a list of mounts of images apart. `None` for all others.
pub(super) fn over_images(mounts: &[Mount]) -> Option<OverImages<'_>> {
    let is_image = |mount: &Mount| mount.kind == "erofs" && mount.target.is_empty();
    let (last, images) = mounts.split_last()?;
    if is_image(last) && images.is_empty() {
        return Some(OverImages { upper: None, images: mounts });
    }
    let find = |name: &str| last.options.iter().find_map(|option| option.strip_prefix(name));
    let all = match images.len() {
        0 => return None,
        1 => "{{ mount 0 }}".to_owned(),
        count => format!("{{{{ overlay 0 {} }}}}", count - 1),
    };
    let composed = last.kind == "format/mkdir/overlay" && last.target.is_empty();
    let mapped = find("uidmap=").is_some() || find("gidmap=").is_some();
    (composed && !mapped && images.iter().all(is_image) && find("lowerdir=") == Some(&all))
        .then(|| OverImages { upper: find("upperdir="), images })
}

/// The folder of changes of a snapshot that becomes an image when it is committed. What is written there needs not be synced
/// before that.
pub(super) fn changes_of_image(mounts: &[Mount]) -> Option<&Path> {
    let upper = match (over_images(mounts), bind(mounts)) {
        (Some(OverImages { upper: Some(upper), .. }), _) => Path::new(upper),
        (_, Some((folder, true))) => folder,
        _ => return None,
    };
    upper.parent()?.join(erofs::MARK).exists().then_some(upper)
}

/// The folder that a process writes to which serves the filesystem of a mount (`is_by_helper`). To sync that filesystem does not reach it:
/// the kernel passes it on to a few alone (`fuse_sync_fs`).
pub(super) fn behind_helper(mounts: &[Mount]) -> Option<&Path> {
    let [mount] = mounts else { return None };
    let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    upper.filter(|_| is_by_helper(mount)).map(Path::new)
}

/// The folder of a single bind mount of the root without further conditions, and whether it may be written.
pub(super) fn bind(mounts: &[Mount]) -> Option<(&Path, bool)> {
    let [mount] = mounts else { return None };
    let plain = |option: &String| matches!(option.as_str(), "bind" | "rbind" | "rw" | "ro");
    (mount.kind == "bind" && mount.target.is_empty() && mount.options.iter().all(plain))
        .then(|| (Path::new(&mount.source), !mount.read_only()))
}

/// The layers of a `lowerdir=` option: separated by colons, where a backslash takes the next character's meaning.
fn split_lowers(option: &str) -> Vec<String> {
    let mut lowers = vec![String::new()];
    let mut characters = option.chars();
    while let Some(character) = characters.next() {
        match (character, lowers.last_mut()) {
            (':', _) => lowers.push(String::new()),
            ('\\', Some(lower)) => lower.extend(characters.next()),
            (character, Some(lower)) => lower.push(character),
            (_, None) => {}
        }
    }
    lowers.retain(|lower| !lower.is_empty());
    lowers
}

/// Opens the folder that a layer can be written to without mounting anything: the upper folder of an overlay, or
/// the source of a bind mount. `None` when the mounts must be made.
pub(super) fn open_direct(mounts: &[Mount]) -> Result<Option<(OwnedFd, Whiteouts)>, Error> {
    if let Some((path, true)) = bind(mounts) {
        return Ok(Some((open_folder(path)?, Whiteouts::Remove)));
    }
    let Some(Overlay { upper: Some(upper), lowers, user_attributes }) = overlay(mounts) else {
        return Ok(None);
    };
    if mounts.iter().any(Mount::read_only) {
        return Ok(None);
    }
    let prefix = if user_attributes {
        "user.overlay."
    } else if in_user_namespace().unwrap_or(true) {
        // `trusted.` attributes are out of reach: only the mount itself can make the marks.
        return Ok(None);
    } else {
        "trusted.overlay."
    };
    let lowers = lowers.iter().map(|lower| open_folder(Path::new(lower))).collect::<Result<_, _>>()?;
    Ok(Some((open_folder(Path::new(upper))?, Whiteouts::Overlay { prefix, lowers })))
}

/// Opens a folder of a snapshot.
pub(super) fn open_folder(path: &Path) -> Result<OwnedFd, Error> {
    let open = File::open(path).and_then(|file| {
        if file.metadata()?.is_dir() { Ok(file) } else { Err(io::ErrorKind::NotADirectory.into()) }
    });
    open.map(OwnedFd::from).map_err(|source| Error::File {
        operation: "open folder".to_owned(),
        path: path.to_string_lossy().into_owned(),
        source: nix::errno::Errno::from_raw(source.raw_os_error().unwrap_or(nix::libc::ENOTDIR)),
    })
}

/// A tree to work on.
pub(super) enum Tree {
    /// A folder that is there already.
    Folder(PathBuf),
    /// What these mounts make; an empty tree if there are none.
    Mounts(Vec<Mount>),
}

impl Tree {
    /// The tree of some mounts, to be read only. An overlay that a container writes to at this moment is mounted
    /// without its upper folder as such: two overlays may not share one.
    pub(super) fn read_only(mounts: &[Mount]) -> Tree {
        if let Some((folder, _)) = bind(mounts) {
            return Tree::Folder(folder.to_owned());
        }
        let over_images = over_images(mounts).and_then(|parts| Some(parts.upper?.to_owned()));
        let mut mounts = mounts.to_vec();
        if let (Some(last), Some(upper)) = (mounts.last_mut(), over_images) {
            let writes = ["upperdir=", "workdir=", "volatile"];
            last.options.retain(|option| !writes.iter().any(|name| option.starts_with(name)));
            for option in &mut last.options {
                if let Some(lowers) = option.strip_prefix("lowerdir=") {
                    *option = format!("lowerdir={}:{lowers}", join_lowers(std::slice::from_ref(&upper)));
                }
            }
        }
        let parts = overlay(&mounts).and_then(|parts| Some((parts.upper?.to_owned(), parts.lowers)));
        if let ([mount], Some((upper, mut lowers))) = (mounts.as_mut_slice(), parts) {
            if lowers.is_empty() {
                return Tree::Folder(upper.into());
            }
            lowers.insert(0, upper);
            let writes = ["upperdir=", "workdir=", "lowerdir=", "volatile"];
            mount.options.retain(|option| !writes.iter().any(|name| option.starts_with(name)));
            mount.options.push(format!("lowerdir={}", join_lowers(&lowers)));
        }
        for mount in &mut mounts {
            mount.options.retain(|option| option != "rw" && option != "ro");
            mount.options.push("ro".to_owned());
        }
        Tree::Mounts(mounts)
    }
}

/// The inverse of [`split_lowers`].
fn join_lowers(lowers: &[String]) -> String {
    let escaped = lowers.iter().map(|lower| lower.replace('\\', r"\\").replace(':', r"\:"));
    escaped.collect::<Vec<_>>().join(":")
}

/// Runs `work` with the root folders of some trees, on a thread with a stack for walks down to any depth.
///
/// Mounts are made in a mount namespace of that thread, so that nobody sees them and nothing of them is left,
/// however the thread ends: the namespace goes with it, even when the process is killed. They are taken down
/// before that all the same, since a filesystem is only sure to be released when unmounting returns.
pub(super) fn with_trees<T: Send>(
    trees: &[Tree],
    work: impl FnOnce(Vec<OwnedFd>) -> Result<T, Error> + Send,
) -> Result<T, Error> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("layer-trees".to_owned())
            .stack_size(STACK_SIZE)
            .spawn_scoped(scope, || {
                if trees.iter().all(|tree| matches!(tree, Tree::Folder(_))) {
                    return work(open_trees(trees, &[])?);
                }
                enter_namespace()?;
                let workspace = Workspace::new(trees.len())?;
                // `work` owns the descriptors, so that they are closed before the workspace unmounts.
                work(open_trees(trees, &workspace.targets)?)
            })
            .map_err(|source| Error::Workspace { operation: "start a thread", source })?;
        worker.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Opens the roots of trees, each on its own target if it must be mounted.
fn open_trees(trees: &[Tree], targets: &[PathBuf]) -> Result<Vec<OwnedFd>, Error> {
    let open = |(index, tree): (usize, &Tree)| match (tree, targets.get(index)) {
        (Tree::Folder(folder), _) => open_folder(folder),
        (Tree::Mounts(mounts), Some(target)) => {
            mount_all(mounts, target).map_err(|source| Error::Mount { source })?;
            let root = open_folder(target)?;
            if mounts.iter().any(is_by_helper) {
                // Its process keeps the namespace, and were it to keep the mount with that, it would outlive a killed daemon.
                // This way it ends with our descriptors.
                unmount_all(target).map_err(|source| Error::Mount { source })?;
            }
            Ok(root)
        }
        (Tree::Mounts(_), None) => unreachable!("mounts have targets"),
    };
    trees.iter().enumerate().map(open).collect()
}

/// Gives this thread mounts of its own. What is mounted or unmounted elsewhere still shows here, so that no mount
/// of the host is held on to.
fn enter_namespace() -> Result<(), Error> {
    let error =
        |operation| move |errno: nix::errno::Errno| Error::Workspace { operation, source: errno.into() };
    unshare(CloneFlags::CLONE_NEWNS).map_err(error("create a mount namespace"))?;
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(error("keep mounts to the mount namespace"))
}

/// A folder with places to mount on, cleared when dropped.
struct Workspace {
    folder: PathBuf,
    targets: Vec<PathBuf>,
}

impl Workspace {
    fn new(count: usize) -> Result<Workspace, Error> {
        let error = |source: io::Error| Error::Workspace { operation: "create a folder to mount on", source };
        let template = std::env::temp_dir().join("davit-layer-XXXXXX");
        let folder = mkdtemp(&template).map_err(|errno| error(errno.into()))?;
        let mut workspace = Workspace { folder, targets: Vec::new() };
        for index in 0..count {
            let target = workspace.folder.join(index.to_string());
            fs::create_dir(&target).map_err(error)?;
            workspace.targets.push(target);
        }
        Ok(workspace)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // What stays mounted goes with the namespace; what stays of the folder is empty. `remove_dir` does not
        // delete what is in a tree that is still mounted.
        for target in self.targets.iter().rev() {
            if let Err(error) = unmount_all(target) {
                tracing::debug!(
                    error = davit_model::error::chain(&error),
                    "unmounting a layer's tree failed"
                );
            }
            let _ = fs::remove_dir(target);
        }
        let _ = fs::remove_dir(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(kind: &str, options: &[&str]) -> Vec<Mount> {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        vec![Mount { kind: kind.to_owned(), source: "/source".to_owned(), target: String::new(), options }]
    }

    #[test]
    fn overlays_are_taken_apart() {
        let mounts = mount_of("overlay", &["index=off", "upperdir=/u", r"lowerdir=/a\:b:/c", "workdir=/w"]);
        let lowers = vec!["/a:b".to_owned(), "/c".to_owned()];
        assert_eq!(overlay(&mounts), Some(Overlay { upper: Some("/u"), lowers, user_attributes: false }));
        assert!(matches!(open_direct(&mount_of("overlay", &["upperdir=/u", "ro"])), Ok(None)));
        // What parallel unpacking makes of a snapshot without parent.
        let lone = mount_of("overlay", &["upperdir=/u", "userxattr"]);
        let expected = Overlay { upper: Some("/u"), lowers: Vec::new(), user_attributes: true };
        assert_eq!(overlay(&lone), Some(expected));
    }

    #[test]
    fn a_writable_overlay_is_read_without_its_upper_folder() {
        let options = ["index=off", "workdir=/w", "upperdir=/u:1", "lowerdir=/a:/b", "userxattr"];
        let Tree::Mounts(mounts) = Tree::read_only(&mount_of("overlay", &options)) else { panic!() };
        assert_eq!(mounts[0].options, ["index=off", "userxattr", r"lowerdir=/u\:1:/a:/b", "ro"]);
        assert!(matches!(Tree::read_only(&mount_of("bind", &["rbind", "rw"])), Tree::Folder(_)));
    }

    #[test]
    fn changes_over_images_are_found_and_read_as_the_nearest_layer() {
        let image = mount_of("erofs", &["ro", "loop"]).remove(0);
        let over = |count: usize, lowers: &str| {
            let options = ["workdir=/w", "upperdir=/u", &format!("lowerdir={lowers}"), "index=off"];
            let mut mounts = vec![image.clone(); count];
            mounts.extend(mount_of("format/mkdir/overlay", &options));
            mounts
        };
        let two = over(2, "{{ overlay 0 1 }}");
        assert_eq!(over_images(&two), Some(OverImages { upper: Some("/u"), images: &two[..2] }));
        assert_eq!(over_images(&over(1, "{{ mount 0 }}")).unwrap().images.len(), 1);
        assert_eq!(over_images(&two[..1]), Some(OverImages { upper: None, images: &two[..1] }));
        for other in [over(3, "{{ overlay 0 1 }}"), over(0, "/a"), two[..2].to_vec(), Vec::new()] {
            assert_eq!(over_images(&other), None);
        }
        let Tree::Mounts(mounts) = Tree::read_only(&two) else { panic!() };
        assert_eq!(mounts[2].options, ["lowerdir=/u:{{ overlay 0 1 }}", "index=off", "ro"]);
        assert_eq!(mounts[0].options, ["loop", "ro"]);
    }

    #[test]
    fn only_plain_binds_are_used_directly() {
        assert_eq!(bind(&mount_of("bind", &["rbind", "rw"])), Some((Path::new("/source"), true)));
        assert_eq!(bind(&mount_of("bind", &["rbind", "ro"])), Some((Path::new("/source"), false)));
        assert_eq!(bind(&mount_of("bind", &["rbind", "uidmap=0:1:2"])), None);
        assert_eq!(bind(&mount_of("overlay", &[])), None);
        let mut elsewhere = mount_of("bind", &["rbind"]);
        elsewhere[0].target = "/sub".to_owned();
        assert_eq!(bind(&elsewhere), None);
    }
}
