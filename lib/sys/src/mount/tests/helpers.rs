//! Mounts by programs: by scripts for what they are told and how they fail, and by a real one.

use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

/// Puts a script into a folder as the program `mount.fuse3`. Written by another process: a descriptor for writing that a child of
/// another test has by mistake would keep it from being executed.
fn script(dir: &Path, text: &str) -> PathBuf {
    let programs = folder(dir, "programs");
    let write = "cat > \"$1\" && chmod 755 \"$1\"";
    let mut writer = Command::new("sh")
        .args(["-c", write, "sh"])
        .arg(programs.join("mount.fuse3"))
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let text = format!("#!/bin/sh\nPATH=/usr/bin:/bin:/usr/sbin:/sbin\n{text}\n");
    std::io::Write::write_all(&mut writer.stdin.take().unwrap(), text.as_bytes()).unwrap();
    assert!(writer.wait().unwrap().success());
    programs
}

fn by_script(mount: &Mount, target: &Path, programs: &Path, patience: Duration) -> Result<OwnedFd, Error> {
    let options = Options::parse(mount)?;
    let job = Job { mount, target, options, source: &mount.source };
    let helper = helper::of(&mount.kind).unwrap();
    helper::mount(&job, helper, &helper::Terms { folders: programs.as_os_str(), patience })
}

/// Long enough for every script that ends.
const LONG: Duration = Duration::from_secs(60);

fn until(what: &str, condition: impl Fn() -> bool) {
    let limit = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < limit, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_gone(pid: &str) -> bool {
    // Orphans are zombies for as long as who inherits them likes.
    read_to_string(format!("/proc/{}/stat", pid.trim())).map_or(true, |line| line.contains(") Z "))
}

#[test]
fn a_helper_is_told_what_containerd_tells_it_and_inherits_nothing() {
    isolated(|dir| {
        let target = folder(dir, "target");
        create_dir_all(target.join("below")).unwrap();
        let told = dir.join("told");
        let report = format!(
            "{{ printf '%s|' \"$@\"; echo; pwd; env | grep -v -e ^PWD= -e ^OLDPWD= -e ^SHLVL= -e ^_= ; ls -l /proc/self/fd | grep -c memfd; }} > {}\n\
             mount -t tmpfs fake \"$2\"",
            told.display()
        );
        let programs = script(dir, &report);
        let secret = fs::File::open("/dev/null").unwrap();
        // Only what is marked is closed by execve of itself.
        nix::fcntl::fcntl(&secret, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        let mut wanted =
            mount("fuse3.fuse-overlayfs", Path::new("overlay"), &["ro", "", "lowerdir=/a:/b c", "-x"]);
        wanted.target = "/below".to_owned();
        let point = by_script(&wanted, &target, &programs, LONG).unwrap();
        let text = read_to_string(&told).unwrap();
        let below = target.join("below");
        let words = format!("overlay|{}|-o|ro|-o|lowerdir=/a:/b c|-o|-x|-t|fuse-overlayfs|", below.display());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines, [&words, "/", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "1"], "{text}");
        assert_eq!(mounts_at(dir).len(), 1);
        detach(&point);
        assert_eq!(mounts_at(dir), Vec::<String>::new());
    });
}

#[test]
fn what_a_helper_says_is_told_and_nothing_of_a_failure_is_left() {
    isolated(|dir| {
        let target = folder(dir, "target");
        let wanted = mount("fuse3.x", Path::new("x"), &[]);
        let cases = [
            ("echo no such thing >&2; exit 3", "it ended with 3: no such thing"),
            ("mount -t tmpfs fake \"$2\"; exit 1", "it ended with 1"),
            ("kill -9 $$", "it ended with 137"),
            ("echo fine", "it has mounted nothing: fine"),
        ];
        for (text, reason) in cases {
            let programs = script(dir, text);
            let error = by_script(&wanted, &target, &programs, LONG).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Unknown);
            let place = format!("mount helper mount.fuse3 for fuse3.x x on {}: {reason}", target.display());
            assert_eq!(error.to_string(), place);
            assert_eq!(mounts_at(dir), Vec::<String>::new(), "{text}");
        }
        // However much it says.
        let programs = script(dir, "yes wrong | head -c 100000 >&2; exit 1");
        let error = by_script(&wanted, &target, &programs, LONG).unwrap_err().to_string();
        assert!(error.len() < 5000, "{}", error.len());
        let error = by_script(&wanted, &target, dir, LONG).unwrap_err().to_string();
        assert!(error.ends_with(&format!("it is not in {}", dir.display())), "{error}");
    });
}

#[test]
fn a_helper_that_takes_too_long_is_killed_with_what_it_has_started() {
    isolated(|dir| {
        let (target, pids) = (folder(dir, "target"), dir.join("pids"));
        let text = format!(
            "sleep 1000 & echo $! > {0}; echo $$ >> {0}; mount -t tmpfs fake \"$2\"; wait",
            pids.display()
        );
        let programs = script(dir, &text);
        // It has not begun after so short a time, or it has: both are well.
        for patience in [Duration::ZERO, Duration::from_millis(300)] {
            let wanted = mount("fuse3.x", Path::new("x"), &[]);
            let error = by_script(&wanted, &target, &programs, patience).unwrap_err().to_string();
            assert!(error.contains("it was killed after"), "{error}");
            assert_eq!(mounts_at(dir), Vec::<String>::new());
            for pid in read_to_string(&pids).unwrap_or_default().lines() {
                until("it is gone", || is_gone(pid));
            }
        }
    });
}

#[test]
fn a_process_that_goes_on_keeps_nobody_waiting() {
    isolated(|dir| {
        let (target, pid) = (folder(dir, "target"), dir.join("pid"));
        // It never closes what it has for an output, and writes there all the time.
        let text = format!(
            "mount -t tmpfs fake \"$2\"; (while :; do echo on; sleep 0.01; done) & echo $! > {}",
            pid.display()
        );
        let programs = script(dir, &text);
        by_script(&mount("fuse3.x", Path::new("x"), &[]), &target, &programs, LONG).unwrap();
        let pid = read_to_string(&pid).unwrap();
        assert!(!is_gone(&pid));
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.trim().parse().unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        until("it is gone", || is_gone(&pid));
        unmount_all(&target).unwrap();
    });
}

#[test]
fn no_other_program_can_be_named_and_no_source_passes_for_an_option() {
    isolated(|dir| {
        let target = folder(dir, "target");
        let programs = script(dir, "mount -t tmpfs fake \"$2\"");
        let plain = Path::new("x");
        for kind in ["fuse3.", "fuse3.-x", "fuse3..x", "fuse3.a b", "fuse3.a;b", "fuse3.a\0"] {
            let error = by_script(&mount(kind, plain, &[]), &target, &programs, LONG).unwrap_err();
            assert!(error.to_string().contains("its type names no program"), "{kind}: {error}");
        }
        let slash = mount_all(&[mount("fuse3./bin/sh", plain, &[])], &target).unwrap_err();
        assert!(matches!(slash, Error::Unsupported { .. }), "{slash}");
        let refused = |source: &str, options: &[&str]| {
            let wanted = mount("fuse3.x", Path::new(source), options);
            by_script(&wanted, &target, &programs, LONG).unwrap_err()
        };
        assert!(refused("-odrop", &[]).to_string().contains("no source but an option"));
        assert!(refused("x", &["uidmap=0:1:2", "gidmap=0:1:2"]).to_string().contains("maps no ids"));
        for option in ["a\0b", "X-containerd.mkdir.path=/x"] {
            assert!(matches!(refused("x", &[option]), Error::Option { .. }), "{option}");
        }
        let below = mount("tmpfs", Path::new("x"), &[]);
        let over = mount("format/fuse3.x", plain, &["lowerdir={{ mount 0 }}"]);
        let error = mount_all(&[below, over], &target).unwrap_err().to_string();
        assert!(error.contains("a mount helper does not find the mounts before it"), "{error}");
        assert_eq!(mounts_at(dir), Vec::<String>::new());
    });
}

/// Whether there is a real helper; says so if not.
fn has_fuse_overlayfs() -> bool {
    let there = Path::new("/dev/fuse").exists()
        && ["mount.fuse3", "fuse-overlayfs"].iter().all(|name| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            crate::process::find_program(name.as_ref(), &path).is_some()
        });
    if !there {
        eprintln!("skipped: needs /dev/fuse, mount.fuse3 and fuse-overlayfs");
    }
    there
}

/// The processes that serve something of this folder.
fn servers(dir: &Path) -> usize {
    let name = dir.as_os_str().as_bytes();
    let serves = |path: PathBuf| {
        let words = fs::read(path.join("cmdline")).unwrap_or_default();
        words.starts_with(b"fuse-overlayfs") && words.windows(name.len()).any(|part| part == name)
    };
    fs::read_dir("/proc").unwrap().flatten().filter(|entry| serves(entry.path())).count()
}

#[test]
fn fuse_overlayfs_is_mounted_and_ends_with_its_mount() {
    isolated(|dir| {
        if !has_fuse_overlayfs() {
            return;
        }
        let [lower, upper, work, target] = ["lower", "upper", "work", "target"].map(|name| folder(dir, name));
        write(lower.join("old"), "old").unwrap();
        write(lower.join("kept"), "kept").unwrap();
        let of = |name: &str, path: &Path| format!("{name}={}", path.display());
        let options = [of("lowerdir", &lower), of("upperdir", &upper), of("workdir", &work)];
        let options = [&options[0], options[1].as_str(), &options[2]];
        for kind in ["fuse3.fuse-overlayfs", "fuse.fuse-overlayfs"] {
            let wanted = [mount(kind, Path::new("overlay"), &options)];
            mount_all(&wanted, &target).unwrap();
            assert!(mounts_at(&target)[0].contains(" fuse.fuse-overlayfs "), "{:?}", mounts_at(&target));
            assert_eq!(servers(dir), 1);
            write(target.join("new"), kind).unwrap();
            let _ = fs::remove_file(target.join("old"));
            unmount_all(&target).unwrap();
            assert_eq!(read_to_string(upper.join("new")).unwrap(), kind);
            assert!(!target.join("kept").exists());
            until("its process has ended", || servers(dir) == 0);
        }
        // The helper's own words, where it refuses.
        let wrong = mount("fuse3.fuse-overlayfs", Path::new("overlay"), &["lowerdir=/nonexistent/folder"]);
        let error = mount_all(&[wrong], &target).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/folder"), "{error}");
        // One that is mounted after others takes them down with it when it fails.
        let failing = mount("fuse3.none-of-this-name", Path::new("x"), &[]);
        mount_all(&[mount("tmpfs", Path::new("tmpfs"), &[]), failing], &target).unwrap_err();
        assert_eq!(mounts_at(dir), Vec::<String>::new());

        let root = mount_privately(&[mount("fuse3.fuse-overlayfs", Path::new("overlay"), &options)]).unwrap();
        let kept = nix::fcntl::openat(&root, "kept", OFlag::O_RDONLY, Mode::empty()).unwrap();
        assert!(nix::fcntl::openat(&root, "old", OFlag::O_RDONLY, Mode::empty()).is_err());
        drop((root, kept));
        until("its process has ended", || servers(dir) == 0);
    });
}
