//! FIFOs between `davit` and a shim: made here, opened by both, gone with the process or its last client.
//!
//! The folder is the client's own (0700, a random name), so that nobody else can put anything in their place; a client that
//! has it locks it, and one that leaves the process alone leaves the folder behind for another to come. Our ends
//! are opened before the shim is told of them: the output's for reading, without waiting for a writer, and the input's
//! for reading and writing, so that neither end ever fails for want of the other.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use tokio::sync::oneshot;

use crate::container;
use crate::error::{Error, Result};
use crate::keys::{DetachKeys, Watch};

/// The folder of what a reboot may clear, shared with the daemon.
const STATE: &str = "/run/davit";
/// Where the folders of FIFOs are.
const BASE: &str = "/run/davit/fifo";
/// As much as a pipe holds.
const BUFFER_SIZE: usize = 64 << 10;

/// A folder of FIFOs that this client alone has, removed when it is dropped.
#[derive(Debug)]
pub(crate) struct FifoDir {
    path: PathBuf,
    kept: bool,
    _lock: Flock<File>,
}

impl FifoDir {
    /// Makes an empty folder.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn create() -> Result<FifoDir> {
        let path = Path::new(BASE).join(&container::new_id()?[..16]);
        make_base()?;
        make_folder(&path)?;
        FifoDir::lock(path)?.ok_or_else(|| Error::Usage {
            message: "somebody has locked a folder of a random name".to_owned(),
            hint: "try again".to_owned(),
        })
    }

    /// Takes over the folder that another client has left ([`is_folder`]). `None` if one has it still.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn take_over(path: &Path) -> Result<Option<FifoDir>> {
        let mut folder = FifoDir::lock(path.to_owned())?;
        if let Some(folder) = &mut folder {
            // It is not ours to remove before the process is over.
            folder.kept = true;
        }
        Ok(folder)
    }

    fn lock(path: PathBuf) -> Result<Option<FifoDir>> {
        let error = |source| Error::File { action: "cannot lock the folder", path: path.clone(), source };
        let folder = File::open(&path).map_err(error)?;
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(FifoDir { path, kept: false, _lock: lock })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(error(errno.into())),
        }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Says whether it is to stay for another client.
    pub(crate) fn keep(&mut self, kept: bool) {
        self.kept = kept;
    }

    /// Makes a FIFO and returns its path.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn make(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        make_fifo(&path)?;
        Ok(path)
    }
}

impl Drop for FifoDir {
    fn drop(&mut self) {
        // The shim holds what it has open; a name left behind is only untidy.
        if !self.kept {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Whether a folder is one that a client like this one has made for FIFOs. Others' are neither read nor removed.
pub(crate) fn is_folder(path: &Path) -> bool {
    path.parent() == Some(Path::new(BASE))
}

/// Removes a folder of FIFOs that a client has left, and no other folder.
pub(crate) fn remove_left(path: &Path) {
    if is_folder(path) {
        // What belongs to a container that is gone is of no use to anyone, and may be gone too.
        let _ = fs::remove_dir_all(path);
    }
}

/// The FIFO that stays open as a container's standard input without a client, and its folder.
pub(crate) fn detached_stdin(id: &str) -> (PathBuf, PathBuf) {
    let folder = Path::new(BASE).join(id);
    let fifo = folder.join("stdin");
    (folder, fifo)
}

/// Makes the FIFO of [`detached_stdin`], unless it is there.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn make_detached_stdin(id: &str) -> Result<PathBuf> {
    let (folder, fifo) = detached_stdin(id);
    make_base()?;
    make_folder(&folder)?;
    if fs::symlink_metadata(&fifo).is_err() {
        make_fifo(&fifo)?;
    }
    Ok(fifo)
}

/// Makes the folder of all FIFOs. That above it is made as the daemon makes it, so that others can pass through.
fn make_base() -> Result<()> {
    private_folder(Path::new(STATE), Path::new(BASE))
}

/// Makes `folder` and what is missing above it: 0711 down to `public`, 0700 below.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn private_folder(public: &Path, folder: &Path) -> Result<()> {
    let make = |path: &Path, mode| DirBuilder::new().mode(mode).recursive(true).create(path);
    let made = make(public, 0o711).and_then(|()| make(folder, 0o700));
    made.map_err(|source| Error::File { action: "cannot make the folder", path: folder.to_owned(), source })
}

/// Makes one folder, unless it is there.
fn make_folder(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::File { action: "cannot make the folder", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn make_fifo(path: &Path) -> Result<()> {
    nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| Error::File {
        action: "cannot make the FIFO",
        path: path.to_owned(),
        source: errno.into(),
    })
}

/// Opens the reading end, whether or not there is a writer.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn open_reader(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    opened.map_err(|source| Error::File { action: "cannot open", path: path.to_owned(), source })
}

/// Opens the writing end, whether or not there is a reader.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn open_writer(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path);
    opened.map_err(|source| Error::File { action: "cannot open", path: path.to_owned(), source })
}

/// Copies what comes out of a FIFO to `output` on a thread of its own, until the last writer is gone; the receiver
/// then resolves. When the output fails, what comes is read and dropped, so that the container never waits for it.
pub(crate) fn copy_out(mut fifo: File, mut output: impl Write + Send + 'static) -> oneshot::Receiver<()> {
    let (done, finished) = oneshot::channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; BUFFER_SIZE];
        let mut writable = true;
        loop {
            // Before the first writer, a read would look like the end; poll(2) reports that only after a writer left.
            let mut ready = [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::NONE).is_err_and(|errno| errno != nix::errno::Errno::EINTR) {
                break;
            }
            match fifo.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    writable =
                        writable && output.write_all(&buffer[..count]).and_then(|()| output.flush()).is_ok();
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => break,
            }
        }
        // Nobody may be waiting any more.
        let _ = done.send(());
    });
    finished
}

/// Why no more input is copied.
#[derive(Debug)]
pub(crate) enum InputEnd {
    /// There is none. The FIFO must stay open until the shim was told, or what is in it may be lost.
    Over(File),
    /// The user has pressed the keys that leave the process alone.
    Detached,
}

/// Copies standard input into a FIFO on a thread of its own, until its end or until `keys` are pressed.
pub(crate) fn copy_in(fifo: File, keys: Option<DetachKeys>) -> oneshot::Receiver<InputEnd> {
    let (done, finished) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = done.send(copy_input(fifo, &mut io::stdin().lock(), keys.map(DetachKeys::watch)));
    });
    finished
}

fn copy_input(mut fifo: File, input: &mut impl Read, mut keys: Option<Watch>) -> InputEnd {
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut passed = Vec::new();
    loop {
        let count = match input.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        passed.clear();
        let detached = match &mut keys {
            Some(keys) if count == 0 => {
                keys.give_up(&mut passed);
                false
            }
            Some(keys) => keys.feed(&buffer[..count], &mut passed),
            None => {
                passed.extend_from_slice(&buffer[..count]);
                false
            }
        };
        let failed = fifo.write_all(&passed).is_err();
        if detached {
            return InputEnd::Detached;
        }
        if failed || count == 0 {
            return InputEnd::Over(fifo);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    struct Collect(mpsc::Sender<Vec<u8>>);

    impl Write for Collect {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_waits_for_the_first_writer_and_ends_with_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        make_fifo(&path).unwrap();
        let reader = open_reader(&path).unwrap();
        let (sender, receiver) = mpsc::channel();
        let mut finished = copy_out(reader, Collect(sender));
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err(), "ended before a writer came");
        assert!(finished.try_recv().is_err());
        let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
        writer.write_all(b"hello").unwrap();
        drop(writer);
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)).unwrap(), b"hello");
        finished.blocking_recv().unwrap();
    }

    #[test]
    fn a_writer_needs_no_reader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        make_fifo(&path).unwrap();
        let mut writer = open_writer(&path).unwrap();
        writer.write_all(b"kept").unwrap();
        let mut reader = open_reader(&path).unwrap();
        let mut buffer = [0; 4];
        reader.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"kept");
    }
}
