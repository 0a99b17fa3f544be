//! Chooses how the difference of two snapshots is found, and has it written.

use std::ffi::CStr;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use davit_model::Mount;

use super::DiffOptions;
use super::compare::compare;
use super::error::Error;
use super::target::{Tree, bind, open_folder, over_images, overlay, with_trees};
use super::writer::LayerWriter;

/// Writes the archive that turns the tree of `lower` into that of `upper`.
pub(super) fn write(
    lower: &[Mount],
    upper: &[Mount],
    options: &DiffOptions,
    out: impl Write + Send,
) -> Result<(), Error> {
    let latest = options.source_date_epoch.map(seconds);
    let run = |lower: Option<&OwnedFd>, upper: &OwnedFd, opaque| {
        let mut writer = LayerWriter::new(out, upper, latest);
        compare(lower, upper, opaque, &mut writer)?;
        writer.finish()
    };
    if let Some((folder, opaque)) = upper_folder(lower, upper) {
        let upper = open_folder(folder)?;
        return with_trees(&[Tree::read_only(lower)], |roots| run(roots.first(), &upper, Some(opaque)));
    }
    let mut trees = vec![Tree::read_only(upper)];
    if !lower.is_empty() {
        trees.push(Tree::read_only(lower));
    }
    with_trees(&trees, |roots| run(roots.get(1), &roots[0], None))
}

/// The upper folder of `upper`, if that is an overlay over exactly the layers of `lower`, and the attribute by
/// which it marks opaque folders. The folder then holds all that differs.
fn upper_folder<'a>(lower: &[Mount], upper: &'a [Mount]) -> Option<(&'a Path, &'static CStr)> {
    if let (Some(below), Some(over)) = (over_images(lower), over_images(upper)) {
        let same = below.upper.is_none() && below.images == over.images && !may_redirect(upper);
        return over.upper.filter(|_| same).map(|folder| (Path::new(folder), c"trusted.overlay.opaque"));
    }
    let over = overlay(upper)?;
    let folder = over.upper?;
    let layers = match (bind(lower), overlay(lower)) {
        (Some((folder, _)), _) => vec![folder.to_str()?.to_owned()],
        (None, Some(below)) if below.upper.is_none() => below.lowers,
        _ => return None,
    };
    if layers != over.lowers || may_redirect(upper) {
        return None;
    }
    let attribute = if over.user_attributes { c"user.overlay.opaque" } else { c"trusted.overlay.opaque" };
    Some((Path::new(folder), attribute))
}

/// True when the upper folder may hold folders that were moved, or files without their data, which only the mount
/// itself resolves (kernel documentation, filesystems/overlayfs, "redirect_dir" and "metadata only copy up").
fn may_redirect(mounts: &[Mount]) -> bool {
    let options = || mounts.iter().flat_map(|mount| mount.options.iter().map(String::as_str));
    if options().any(|option| option == "userxattr") {
        return false;
    }
    ["redirect_dir", "metacopy"].iter().any(|feature| {
        let named =
            options().filter_map(|option| option.strip_prefix(feature)?.strip_prefix('=')).next_back();
        match named {
            Some(value) => value != "off" && value != "nofollow",
            // What the module does unless told otherwise; not known means the worse.
            None => fs::read_to_string(format!("/sys/module/overlay/parameters/{feature}"))
                .map_or(true, |value| value.trim() != "N"),
        }
    })
}

/// Whole seconds since 1970, which are what a layer keeps of times.
fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay_of(options: &[&str]) -> Vec<Mount> {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        vec![Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }]
    }

    fn bind_of(source: &str) -> Vec<Mount> {
        let options = vec!["rbind".into(), "ro".into()];
        vec![Mount { kind: "bind".into(), source: source.into(), target: String::new(), options }]
    }

    #[test]
    fn the_shortcut_is_taken_only_over_the_very_same_layers() {
        let off = ["redirect_dir=off", "metacopy=off"];
        let upper = |lowers: &str| overlay_of(&[off[0], off[1], "workdir=/w", "upperdir=/u", lowers]);
        let found = |lower: &[Mount], upper: &[Mount]| {
            upper_folder(lower, upper).map(|(folder, _)| folder.to_owned())
        };
        let folder = Some(Path::new("/u").to_owned());
        assert_eq!(found(&bind_of("/a"), &upper("lowerdir=/a")), folder);
        assert_eq!(found(&overlay_of(&["lowerdir=/a:/b"]), &upper("lowerdir=/a:/b")), folder);
        assert_eq!(found(&overlay_of(&["lowerdir=/b:/a"]), &upper("lowerdir=/a:/b")), None);
        assert_eq!(found(&bind_of("/b"), &upper("lowerdir=/a")), None);
        assert_eq!(found(&[], &upper("lowerdir=/a")), None);
        assert_eq!(found(&overlay_of(&["upperdir=/x", "lowerdir=/a"]), &upper("lowerdir=/a")), None);
        for feature in ["redirect_dir=on", "metacopy=on"] {
            let moved = overlay_of(&[off[0], off[1], feature, "upperdir=/u", "lowerdir=/a"]);
            assert_eq!(found(&bind_of("/a"), &moved), None, "{feature}");
        }
        let mut over = bind_of("/image");
        over[0].kind = "erofs".into();
        let below = over.clone();
        over.extend(upper("lowerdir={{ mount 0 }}"));
        over[1].kind = "format/mkdir/overlay".into();
        assert_eq!(found(&below, &over), folder);
        assert_eq!(found(&bind_of("/a"), &over), None);
        let user = overlay_of(&["userxattr", "upperdir=/u", "lowerdir=/a"]);
        assert_eq!(upper_folder(&bind_of("/a"), &user).unwrap().1, c"user.overlay.opaque");
    }
}
