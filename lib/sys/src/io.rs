//! Descriptors that arrive from elsewhere, and terminals.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Takes possession of a descriptor that the parent left open for us across `execve`, and sets its
/// close-on-exec flag. To be called once per number, before any other descriptor is opened.
///
/// # Errors
/// `EBADF` if there is no such descriptor.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes integers alone and fails if the descriptor is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the contract above nobody else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Says whether a program that this process executes inherits a descriptor.
///
/// # Errors
/// `EBADF` if there is no such descriptor.
pub fn set_inherited(number: RawFd, inherited: bool) -> io::Result<()> {
    let flags = if inherited { 0 } else { libc::FD_CLOEXEC };
    // SAFETY: the call takes integers alone; it closes nothing and changes who owns nothing.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Receives one message with a descriptor from a unix socket (`SCM_RIGHTS`), as OCI runtimes send the master
/// of a terminal; `None` if a message came without one, or the peer has closed.
///
/// # Errors
/// That of the kernel; `WouldBlock` if nothing has come yet and the socket does not block.
pub fn receive_descriptor(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    // The payload is the name of the terminal, of which nobody makes use.
    let mut payload = [0u8; 4096];
    let mut slices = [IoSliceMut::new(&mut payload)];
    let mut control = nix::cmsg_space!([RawFd; 4]);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
    )?;
    let mut received = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just installed these descriptors for us; each is wrapped exactly once.
            received.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    Ok(received.into_iter().next())
}

/// True for the master side of a pseudoterminal, whose device is always 5:2 (pts(4)). Nothing is asked of a filesystem
/// that may not answer (statx(2): `AT_STATX_DONT_SYNC`): the descriptor may be of a container's making.
pub fn is_terminal_master(file: BorrowedFd<'_>) -> bool {
    // SAFETY: all zeros are a valid statx structure.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is NUL-terminated, and `status` is valid for writing during the call.
    let result = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, &mut status) };
    let kind = u32::from(status.stx_mode) & libc::S_IFMT;
    result == 0 && kind == libc::S_IFCHR && (status.stx_rdev_major, status.stx_rdev_minor) == (5, 2)
}

/// Sets the size of a terminal in characters; the kernel tells its foreground processes by `SIGWINCH`.
///
/// # Errors
/// That of the kernel, `ENOTTY` for what is no terminal.
pub fn set_window_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives during the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, ControlMessage, SockFlag, SockType, sendmsg, socketpair};
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_travels_over_a_socket() {
        let (near, far) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
        assert_eq!(receive_descriptor(far.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let (mut reader, writer) = std::io::pipe().unwrap();
        let numbers = [writer.as_raw_fd()];
        sendmsg::<()>(
            near.as_raw_fd(),
            &[IoSlice::new(b"/dev/pts/0")],
            &[ControlMessage::ScmRights(&numbers)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop(writer);
        let received = receive_descriptor(far.as_fd()).unwrap().unwrap();
        std::fs::File::from(received).write_all(b"hello").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        drop(near);
        assert!(receive_descriptor(far.as_fd()).unwrap().is_none());
    }

    #[test]
    fn only_a_master_is_a_master() {
        let open = |path: &str| std::fs::File::options().read(true).write(true).open(path).unwrap();
        assert!(is_terminal_master(open("/dev/ptmx").as_fd()));
        assert!(!is_terminal_master(open("/dev/null").as_fd()));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(!is_terminal_master(reader.as_fd()));
    }

    #[test]
    fn only_a_terminal_has_a_size() {
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(set_window_size(reader.as_fd(), 24, 80).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
