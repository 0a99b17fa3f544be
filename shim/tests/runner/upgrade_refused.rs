//! What a shim does not execute, and that it goes on as it was then.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use davit_model::ErrorCode;

use crate::support::{Host, SHIM, cannot_run};
use crate::upgrade::{NAME, Programs, executed_by, wait_in_thread};

#[test]
fn what_is_not_a_safe_and_working_shim_is_refused() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let good = programs.copy(&format!("good/{NAME}"), Path::new(SHIM));
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let ended = wait_in_thread(&client, &bundle.id, "");
    // The one that was started may be replaced by a build at any time.
    client.upgrade(&good).unwrap();
    let before = client.status();

    let owned = programs.copy("owned", &good);
    chown(&owned, Some(1000), None).unwrap();
    let writable = programs.copy("writable", &good);
    std::fs::set_permissions(&writable, std::fs::Permissions::from_mode(0o775)).unwrap();
    let plain = programs.copy("plain", &good);
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
    let open = programs.copy("open/shim", &good);
    std::fs::set_permissions(open.parent().unwrap(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let elf = std::fs::read(&good).unwrap();
    let script = |name: &str, text: &str| programs.write(name, format!("#!/bin/sh\n{text}\n").as_bytes());
    let shim = good.clone();
    let good = good.display();
    let mark = programs.folder.path().join("mark");
    let once = format!("[ ! -e {0} ] || exit 9; : >{0}; exec {good} \"$@\"", mark.display());
    let cases = [
        (PathBuf::from("relative"), ErrorCode::InvalidArgument, "is not absolute"),
        (programs.folder.path().join("none"), ErrorCode::NotFound, "No such file"),
        (programs.folder.path().to_owned(), ErrorCode::PermissionDenied, "is no regular file"),
        (owned, ErrorCode::PermissionDenied, "belongs to user 1000"),
        (writable, ErrorCode::PermissionDenied, "writable by others"),
        (plain, ErrorCode::PermissionDenied, "not executable"),
        (open, ErrorCode::PermissionDenied, "writable by others"),
        (programs.copy("false", Path::new("/bin/false")), ErrorCode::FailedPrecondition, "exit status 1"),
        (programs.copy("true", Path::new("/bin/true")), ErrorCode::FailedPrecondition, "exit status 0"),
        // Named so, this one says something for ever.
        (programs.copy("yes", Path::new("/bin/busybox")), ErrorCode::FailedPrecondition, "no answer within"),
        (programs.write("short", &elf[..1000]), ErrorCode::FailedPrecondition, "refused"),
        (programs.write("torn", &elf[..64 * 1024]), ErrorCode::FailedPrecondition, "refused"),
        (programs.write("empty", b""), ErrorCode::FailedPrecondition, "refused"),
        (
            script("older", "echo the state has version 1, this program reads versions up to 0; exit 1"),
            ErrorCode::FailedPrecondition,
            "reads versions up to 0",
        ),
        // It understands the state, and fails when all is at a standstill.
        (script("once", &once), ErrorCode::FailedPrecondition, "exit status 9"),
        // It passes every check, and cannot be executed in the end: its interpreter would not find it.
        (script("wrapper", &format!("exec {good} \"$@\"")), ErrorCode::Internal, "execute the program"),
    ];
    for (program, code, text) in cases {
        let error = client.upgrade(&program).unwrap_err();
        assert_eq!(error.code, code, "{}: {error}", program.display());
        assert!(error.message.contains(text), "{}: {error}", program.display());
        assert_eq!(executed_by(before.pid), shim);
        assert_eq!(client.status(), before, "after {}", program.display());
        assert!(!ended.is_finished());
    }
    // Nothing of that has harmed it.
    let exec = client.exec(&bundle.id, "e", "exit 3").and_then(|()| client.start(&bundle.id, "e"));
    assert!(exec.is_ok(), "{exec:?}");
    assert_eq!(client.wait(&bundle.id, "e").unwrap().exit_status, 3);
    let inheritable = open_without_close_on_exec(before.pid);
    assert_eq!(inheritable, [0, 1, 2], "descriptors that a program would inherit");
    client.upgrade(&shim).unwrap();
    assert_eq!(open_without_close_on_exec(before.pid), [0, 1, 2]);
    client.kill(&bundle.id, "", 9).unwrap();
    assert_eq!(ended.join().unwrap().exit_status, 137);
    client.finish(&bundle.id);
}

fn open_without_close_on_exec(pid: u32) -> Vec<u32> {
    const O_CLOEXEC: u32 = 0o2000000;
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap() {
        let entry = entry.unwrap();
        let info = std::fs::read_to_string(entry.path()).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        if u32::from_str_radix(flags, 8).unwrap() & O_CLOEXEC == 0 {
            numbers.push(entry.file_name().to_str().unwrap().parse().unwrap());
        }
    }
    numbers.sort_unstable();
    numbers
}
