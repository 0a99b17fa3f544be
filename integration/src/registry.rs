//! Debian's `docker-registry` as a private process, and what can go wrong on the way to it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Result, bail};

use crate::{loopback, wait};

const PROGRAM: &str = "/usr/bin/docker-registry";

/// `htpasswd` of the password of [`Registry::start`] for `user`.
const HTPASSWD: &str = "user:$2b$04$Jd9vDuXacgGIhgvxrxsOc.L5Vrpkbb.jMLAbMjBqQLK7aS/.2STAy\n";

/// A running registry. It ends, and what it has is gone, with this.
pub struct Registry {
    child: Child,
    folder: PathBuf,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Registry {
    /// Starts one that keeps what it has in `folder`; with `password`, for `user` with the password `hunter2` alone.
    /// None if it is not installed.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(folder: &Path, password: bool) -> Result<Option<Registry>> {
        if !Path::new(PROGRAM).is_file() {
            eprintln!("skipped: needs the package docker-registry");
            return Ok(None);
        }
        fs::create_dir_all(folder)?;
        let address = loopback::address();
        let place = folder.display();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n\
             storage: {{filesystem: {{rootdirectory: {place}/data}}}}\n"
        );
        if password {
            fs::write(folder.join("htpasswd"), HTPASSWD)?;
            config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {place}/htpasswd}}}}\n"));
        }
        let file = folder.join("config.yml");
        fs::write(&file, config)?;
        let mut command = Command::new(PROGRAM);
        let child = command.arg("serve").arg(file).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut registry = Registry { child, folder: folder.to_owned(), address };
        wait::until("docker-registry listens", || {
            let ended = registry.child.try_wait().ok().flatten().map(|status| bail!("it ended: {status}"));
            ended.or_else(|| TcpStream::connect(address).is_ok().then_some(Ok(())))
        })??;
        Ok(Some(registry))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// What happens when the bytes that may pass have passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The connection breaks; everything passes after that.
    Cut,
    /// Nothing comes any more on that connection; everything passes on others.
    Stall,
}

/// A way to a registry that has one trouble.
pub struct Way {
    /// Where it begins.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    trouble: Trouble,
    /// Bytes that may come from the registry before the trouble.
    room: AtomicUsize,
    /// Whether the trouble has come.
    troubles: AtomicUsize,
    requests: Mutex<Vec<u8>>,
}

impl Way {
    /// A way to `to` whose trouble comes after `room` bytes.
    ///
    /// # Errors
    /// No port is free.
    pub fn new(to: SocketAddr, trouble: Trouble, room: usize) -> Result<Way> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            trouble,
            room: AtomicUsize::new(room),
            troubles: AtomicUsize::new(0),
            requests: Mutex::default(),
        });
        let serving = shared.clone();
        // It ends with the process: nothing of it is anywhere else.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(to) else { continue };
                serving.clone().connect(client, server);
            }
        });
        Ok(Way { address, shared })
    }

    /// Whether the trouble has come.
    pub fn had_trouble(&self) -> bool {
        self.shared.troubles.load(Ordering::SeqCst) > 0
    }

    /// What was asked for, as it came.
    pub fn requests(&self) -> String {
        let requests = self.shared.requests.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&requests).into_owned()
    }
}

impl Shared {
    fn connect(self: Arc<Self>, client: TcpStream, server: TcpStream) {
        let (Ok(mut from_client), Ok(mut to_server)) = (client.try_clone(), server.try_clone()) else {
            return;
        };
        let shared = self.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16384];
            while let Ok(count @ 1..) = from_client.read(&mut buffer) {
                shared
                    .requests
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(&buffer[..count]);
                if to_server.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            let _ = to_server.shutdown(Shutdown::Write);
        });
        thread::spawn(move || self.answer(client, server));
    }

    fn answer(&self, mut client: TcpStream, mut server: TcpStream) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = server.read(&mut buffer) {
            let room = self.room.load(Ordering::SeqCst);
            if room < count && self.troubles.fetch_add(1, Ordering::SeqCst) == 0 {
                self.room.store(usize::MAX, Ordering::SeqCst);
                if self.trouble == Trouble::Stall {
                    // Until the client has had enough.
                    let _ = client.read(&mut buffer);
                }
                break;
            }
            if room != usize::MAX {
                self.room.store(room.saturating_sub(count), Ordering::SeqCst);
            }
            if client.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
}
