//! Loop devices (loop(4)): block devices whose blocks are those of a file.
//!
//! Every device is made to end by itself (`LO_FLAGS_AUTOCLEAR`): the kernel takes the file off it when the last that has
//! it open closes it, be it this process, however it ends, or the filesystem that was mounted from it. So nothing has to
//! be cleaned up after a crash, and nothing here does.
//!
//! A file that is on a device already is not put on a second one. Two filesystems over one file would each write as if they were
//! alone, and one that was unmounted may live on for a while; on the same device, the kernel finds that it is the same.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

/// `LOOP_CTL_GET_FREE` of the kernel's `linux/loop.h`: the number of a device that is free, a new one if need be.
const GET_FREE: libc::Ioctl = 0x4c82;
/// `LOOP_GET_STATUS64`: the file and the flags of a device, `ENXIO` when it has none.
const GET_STATUS: libc::Ioctl = 0x4c05;
/// `LOOP_CONFIGURE` (Linux 5.8): file and flags in one call, so that there is no device without its flags.
const CONFIGURE: libc::Ioctl = 0x4c0a;

/// `LO_FLAGS_*`.
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

/// Held by whoever in this process looks for a device and makes one.
static ATTACHING: Mutex<()> = Mutex::new(());

/// Between the number of a free device and its taking somebody else can be quicker. Each try is with another device.
const ATTEMPTS: u32 = 128;

/// The kernel's `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    real_device: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Info {
    const EMPTY: Info = Info {
        device: 0,
        inode: 0,
        real_device: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// The kernel's `struct loop_config`.
#[repr(C)]
struct Configuration {
    file: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// How long a file may still be in use by a filesystem that is about to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until no loop device has `file`: what a filesystem on it has to write is in the file then. After its unmounting that
/// may take a moment, as long as another mount namespace that is being made has a copy of the mount.
///
/// # Errors
/// `EBUSY` when one has it still after ten seconds.
pub fn wait_until_free(file: &Path) -> Result<(), Errno> {
    let file = std::fs::canonicalize(file).map_err(|error| errno_of(&error))?;
    let end = Instant::now() + PATIENCE;
    while is_attached(&file) {
        if Instant::now() > end {
            return Err(Errno::EBUSY);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether a loop device has the file of this path, by which the kernel knows it.
fn is_attached(file: &Path) -> bool {
    let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut files = devices.filter_map(|device| std::fs::read(device.path().join("loop/backing_file")).ok());
    files.any(|found| found.strip_suffix(b"\n") == Some(file.as_os_str().as_encoded_bytes()))
}

/// How a device uses its file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// The file is never written to; it is opened for reading only.
    pub read_only: bool,
    /// The device goes past the page cache of the file's filesystem, which then holds each block once and not twice. A
    /// filesystem that cannot do that does without.
    pub direct_io: bool,
}

/// A loop device that has its file for as long as this value, or a filesystem mounted from it, lives.
#[derive(Debug)]
pub struct LoopDevice {
    _device: File,
    path: PathBuf,
}

impl LoopDevice {
    /// Puts `file` on a device: the one that it is on already and that is used in the same way, else a free one.
    ///
    /// # Errors
    /// The call that failed, and its answer: `ENOENT` or `ENXIO` where there are no loop devices, `EBUSY` when none comes
    /// free.
    pub fn attach(file: &Path, options: Options) -> Result<LoopDevice, (&'static str, Errno)> {
        let failed = |step| move |error: std::io::Error| (step, errno_of(&error));
        let open = |path: &Path, step| {
            let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
            File::options()
                .read(true)
                .write(!options.read_only)
                .custom_flags(flags)
                .open(path)
                .map_err(failed(step))
        };
        let backing = open(file, "open the file of a loop device")?;
        let metadata = backing.metadata().map_err(failed("fstat"))?;
        if !metadata.is_file() {
            return Err(("open the file of a loop device", Errno::EINVAL));
        }
        if !options.read_only {
            wait_until_free(file).map_err(|errno| ("wait for another loop device of the file", errno))?;
        }
        let control = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open("/dev/loop-control")
            .map_err(failed("open /dev/loop-control"))?;
        let mut flags = AUTOCLEAR;
        if options.read_only {
            flags |= READ_ONLY;
        }
        if options.direct_io {
            flags |= DIRECT_IO;
        }
        // Of two at once, the second finds what the first has made. Nothing that can panic is done meanwhile.
        let _alone = ATTACHING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = existing(&metadata, options) {
            return Ok(device);
        }
        let mut attempt = 0;
        loop {
            // SAFETY: the call takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) };
            let number = Errno::result(number).map_err(|errno| ("ioctl LOOP_CTL_GET_FREE", errno))?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path, "open a loop device")?;
            match configure(&device, &backing, file, flags) {
                Ok(()) => return Ok(LoopDevice { _device: device, path }),
                Err(Errno::EBUSY) if attempt < ATTEMPTS => attempt += 1,
                Err(errno) => return Err(("ioctl LOOP_CONFIGURE", errno)),
            }
        }
    }

    /// The device's path, `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The device that has the whole of this file, and writes to it or not as is wanted.
fn existing(file: &std::fs::Metadata, options: Options) -> Option<LoopDevice> {
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        // Without looking at the device itself: who opens one keeps it from ending.
        if !entry.path().join("loop/backing_file").exists() {
            continue;
        }
        let path = Path::new("/dev").join(entry.file_name());
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let opened = File::options().read(true).write(!options.read_only).custom_flags(flags).open(&path);
        let Ok(device) = opened else { continue };
        let mut info = Info::EMPTY;
        // SAFETY: the structure has the kernel's layout and lives during the call, which fills it in.
        let asked = unsafe { libc::ioctl(device.as_raw_fd(), GET_STATUS, std::ptr::from_mut(&mut info)) };
        // From here on it cannot end any more: it is open.
        if asked == 0
            && (info.device, info.inode) == (file.dev(), file.ino())
            && (info.offset, info.size_limit) == (0, 0)
            && (info.flags & READ_ONLY != 0) == options.read_only
            && info.flags & AUTOCLEAR != 0
        {
            return Some(LoopDevice { _device: device, path });
        }
    }
    None
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn configure(device: &File, backing: &File, name: &Path, flags: u32) -> Result<(), Errno> {
    let mut file_name = [0; 64];
    // What `losetup` shows; the end of it has to stay zero.
    let text = name.as_os_str().as_encoded_bytes();
    let length = text.len().min(63);
    file_name[..length].copy_from_slice(&text[..length]);
    let configuration = Configuration {
        file: backing.as_fd().as_raw_fd() as u32,
        block_size: 0,
        info: Info { flags, file_name, ..Info::EMPTY },
        reserved: [0; 8],
    };
    // SAFETY: the structure has the kernel's layout and lives during the call, which only reads it.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE, std::ptr::from_ref(&configuration)) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// False, and says so, where there are no loop devices.
    fn may_attach() -> bool {
        let may = nix::unistd::geteuid().is_root() && Path::new("/dev/loop-control").exists();
        if !may {
            eprintln!("skipped: needs root and /dev/loop-control");
        }
        may
    }

    fn backing_file(device: &Path) -> Option<String> {
        let name = device.file_name().unwrap().to_str().unwrap();
        std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()
    }

    #[test]
    fn the_layouts_are_the_kernels() {
        assert_eq!((size_of::<Info>(), size_of::<Configuration>()), (232, 304));
    }

    #[test]
    fn a_device_shows_its_file_and_ends_with_its_last_user() {
        if !may_attach() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, vec![7; 1 << 16]).unwrap();
        let device = LoopDevice::attach(&path, Options::default()).unwrap();
        let second = LoopDevice::attach(&path, Options { read_only: true, direct_io: true }).unwrap();
        assert_ne!(device.path(), second.path());
        let node = device.path().to_owned();
        assert_eq!(backing_file(&node).unwrap().trim(), path.to_str().unwrap());
        let mut block = [0; 512];
        File::open(&node).unwrap().read_exact_at(&mut block, 512).unwrap();
        assert_eq!(block, [7; 512]);
        let open = File::open(&node).unwrap();
        drop((device, second));
        // Somebody else, such as udev, may look at a device for a moment as well.
        assert_eq!(backing_file(&node).unwrap().trim(), path.to_str().unwrap());
        drop(open);
        let gone = || backing_file(&node).is_none_or(|file| file.trim() != path.to_str().unwrap());
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !gone() {
            assert!(std::time::Instant::now() < limit, "{} keeps its file", node.display());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn a_file_that_is_in_use_stays_on_its_device() {
        if !may_attach() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("image"), folder.path().join("link"));
        std::fs::write(&path, vec![0; 4096]).unwrap();
        std::fs::hard_link(&path, &link).unwrap();
        let first = LoopDevice::attach(&path, Options::default()).unwrap();
        // By whatever name, it is the same file.
        let same = LoopDevice::attach(&link, Options::default()).unwrap();
        assert_eq!(first.path(), same.path());
        let node = first.path().to_owned();
        drop(first);
        assert_eq!(backing_file(&node).unwrap().trim(), path.to_str().unwrap());
        // Another file in its place is not on that device.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let other = LoopDevice::attach(&path, Options::default()).unwrap();
        assert_ne!(other.path(), same.path());
        // Who only reads gets none that is written to, and the other way round.
        let reading = LoopDevice::attach(&link, Options { read_only: true, direct_io: false }).unwrap();
        assert_ne!(reading.path(), same.path());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        if !may_attach() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let attach = |path: &Path| LoopDevice::attach(path, Options { read_only: true, direct_io: false });
        assert_eq!(attach(folder.path()).unwrap_err().1, Errno::EINVAL);
        assert_eq!(attach(Path::new("/dev/null")).unwrap_err().1, Errno::EINVAL);
        assert_eq!(attach(&folder.path().join("none")).unwrap_err().1, Errno::ENOENT);
    }

    #[test]
    fn many_at_once_get_one_for_each_file() {
        if !may_attach() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let file = |number: usize| folder.path().join(format!("image-{number}"));
        for number in 0..4 {
            std::fs::write(file(number), vec![0; 4096]).unwrap();
        }
        let paths: std::collections::BTreeSet<PathBuf> = std::thread::scope(|scope| {
            let makers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let made: Vec<_> = (0..4)
                            .map(|number| {
                                let options = Options { read_only: true, direct_io: false };
                                LoopDevice::attach(&file(number), options).unwrap()
                            })
                            .collect();
                        let paths: Vec<_> = made.iter().map(|device| device.path().to_owned()).collect();
                        (made, paths)
                    })
                })
                .collect();
            let made: Vec<_> = makers.into_iter().map(|maker| maker.join().unwrap()).collect();
            made.iter().flat_map(|(_, paths)| paths.clone()).collect()
        });
        assert_eq!(paths.len(), 4);
    }
}
