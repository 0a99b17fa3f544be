//! The files by which a container finds names, its own among them: `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf`.
//!
//! They are made with the container, in a folder beside those of the daemon's logs, for a container may be started again
//! after the host was, and are bound over what the image has. A container in the host's network has the host's own files, as
//! long as nothing is to be added to them: they stay true when the host's network changes.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use davit_oci::spec::{BindMount, Network};

use crate::error::{Error, Result};
use crate::fifo;

/// The names of the files, in their folder and in `/etc`.
const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
const RESOLV_CONF: &str = "resolv.conf";

/// What a container that has no network but loopback knows.
const LOOPBACK: &str = "\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
";

/// What a user has to say about names.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct NameOptions {
    /// Address of a server that resolves names
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<IpAddr>,
    /// Domain in which names are looked for
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// Option of the resolver, such as ndots:2
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION")]
    dns_option: Vec<String>,
    /// Add a line to /etc/hosts
    #[arg(long, value_name = "HOST:ADDRESS")]
    add_host: Vec<String>,
}

impl NameOptions {
    fn changes_resolver(&self) -> bool {
        !(self.dns.is_empty() && self.dns_search.is_empty() && self.dns_option.is_empty())
    }

    /// Refuses what is not well formed.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub(crate) fn check(&self) -> Result<()> {
        for text in self.dns_search.iter().chain(&self.dns_option) {
            if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
                return Err(Error::usage(
                    format!("invalid word for the resolver: {text:?}"),
                    "want one word",
                ));
            }
        }
        self.hosts().map(drop)
    }

    /// The lines for `/etc/hosts`.
    fn hosts(&self) -> Result<String> {
        let mut lines = String::new();
        for text in &self.add_host {
            let invalid = || Error::usage(format!("invalid host {text:?}"), "want HOST:ADDRESS");
            let (name, address) = text.split_once(['=', ':']).ok_or_else(invalid)?;
            // As for a URL, an address of version 6 may stand in brackets.
            let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
            let address: IpAddr = bare.parse().map_err(|_| invalid())?;
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            if name.is_empty() || !name.chars().all(is_name) {
                return Err(invalid());
            }
            lines.push_str(&format!("{address}\t{name}\n"));
        }
        Ok(lines)
    }

    /// The host's `/etc/resolv.conf` with what is given in the place of what it says.
    fn resolver(&self, host: &str) -> String {
        let given = [
            ("nameserver", !self.dns.is_empty()),
            ("search", !self.dns_search.is_empty()),
            ("domain", !self.dns_search.is_empty()),
            ("options", !self.dns_option.is_empty()),
        ];
        let replaced = |line: &str| {
            let word = line.split_whitespace().next().unwrap_or_default();
            given.iter().any(|(key, given)| *given && *key == word)
        };
        let mut text: String =
            host.lines().filter(|line| !replaced(line)).map(|line| format!("{line}\n")).collect();
        text.extend(self.dns.iter().map(|server| format!("nameserver {server}\n")));
        for (key, words) in [("search", &self.dns_search), ("options", &self.dns_option)] {
            if !words.is_empty() {
                text.push_str(&format!("{key} {}\n", words.join(" ")));
            }
        }
        text
    }
}

/// Makes the files of a container in `folder`, below `public`, and adds them to what is bound, unless the user binds
/// something else there.
///
/// # Errors
/// When they cannot be written.
pub(crate) fn make(
    public: &Path,
    folder: &Path,
    hostname: &str,
    network: Network,
    options: &NameOptions,
    read_only: bool,
    binds: &mut Vec<BindMount>,
) -> Result<()> {
    let host_file = |name: &str| fs::read_to_string(Path::new("/etc").join(name)).unwrap_or_default();
    let mut files = vec![(HOSTNAME, format!("{hostname}\n"))];
    match network {
        Network::None => {
            files.push((HOSTS, format!("{LOOPBACK}127.0.1.1\t{hostname}\n{}", options.hosts()?)));
            files.push((RESOLV_CONF, options.resolver(&host_file(RESOLV_CONF))));
        }
        Network::Host => {
            if !options.add_host.is_empty() {
                files.push((HOSTS, format!("{}\n{}", host_file(HOSTS).trim_end(), options.hosts()?)));
            }
            if options.changes_resolver() {
                files.push((RESOLV_CONF, options.resolver(&host_file(RESOLV_CONF))));
            }
        }
    }
    let mut bind = |source: PathBuf, name: &str, read_only| {
        let destination = format!("/etc/{name}");
        if !binds.iter().any(|bind| bind.destination == destination) {
            let source = source.display().to_string();
            binds.push(BindMount { source, destination, read_only, propagation: String::new() });
        }
    };
    fifo::private_folder(public, folder)?;
    for (name, text) in &files {
        let path = folder.join(name);
        // Readable by everybody in the container, whatever the umask of whoever made it.
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)))
            .map_err(|source| Error::File { action: "cannot write", path: path.clone(), source })?;
        bind(path, name, read_only);
    }
    for name in [HOSTS, RESOLV_CONF] {
        let path = Path::new("/etc").join(name);
        let made = files.iter().any(|(made, _)| *made == name);
        if !made && fs::metadata(&path).is_ok_and(|status| status.is_file()) {
            bind(path, name, true);
        }
    }
    Ok(())
}

/// Where the file of this name is that a container has in its `/etc`.
pub(crate) fn path(folder: &str, name: &str) -> Option<PathBuf> {
    Some(Path::new(folder).join(name)).filter(|path| path.is_file())
}

/// Removes the files of a container, and nothing else that may be in the folder.
pub(crate) fn remove(folder: &Path) {
    for name in [HOSTNAME, HOSTS, RESOLV_CONF] {
        match fs::remove_file(folder.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return,
            _ => {}
        }
    }
    // What belongs to a container that is gone is of no use to anyone, and may be gone too.
    let _ = fs::remove_dir(folder);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(hosts: &[&str]) -> NameOptions {
        NameOptions {
            add_host: hosts.iter().map(|host| (*host).to_owned()).collect(),
            ..NameOptions::default()
        }
    }

    #[test]
    fn hosts_are_added_and_nothing_else_is() {
        let lines = options(&["a:10.0.0.1", "b.c=::1", "d:[fe80::1]"]).hosts().unwrap();
        assert_eq!(lines, "10.0.0.1\ta\n::1\tb.c\nfe80::1\td\n");
        for bad in ["a", "a:", ":1.1.1.1", "a b:1.1.1.1", "a:1.1.1", "a\n:1.1.1.1"] {
            assert!(options(&[bad]).check().is_err(), "{bad:?}");
        }
        let words = NameOptions { dns_search: vec!["a\nnameserver 6.6.6.6".to_owned()], ..options(&[]) };
        assert!(words.check().is_err());
    }

    #[test]
    fn what_is_given_takes_the_place_of_what_the_host_says() {
        let host = "# by hand\nnameserver 1.1.1.1\nsearch old\noptions edns0\n";
        assert_eq!(options(&[]).resolver(host), host);
        let given = NameOptions {
            dns: vec!["9.9.9.9".parse().unwrap()],
            dns_search: vec!["new".to_owned(), "more".to_owned()],
            ..options(&[])
        };
        assert_eq!(given.resolver(host), "# by hand\noptions edns0\nnameserver 9.9.9.9\nsearch new more\n");
    }

    #[test]
    fn files_are_made_bound_and_removed() {
        let public = tempfile::tempdir().unwrap();
        let folder = public.path().join("etc/ns/box");
        let own = BindMount {
            source: "/mine".to_owned(),
            destination: "/etc/hosts".to_owned(),
            read_only: false,
            propagation: String::new(),
        };
        let mut binds = vec![own.clone()];
        make(public.path(), &folder, "box", Network::None, &options(&[]), true, &mut binds).unwrap();
        assert_eq!(fs::read_to_string(folder.join(HOSTNAME)).unwrap(), "box\n");
        assert!(fs::read_to_string(folder.join(HOSTS)).unwrap().ends_with("127.0.1.1\tbox\n"));
        let bound: Vec<_> = binds.iter().map(|bind| bind.destination.as_str()).collect();
        assert_eq!(bound, ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"]);
        assert_eq!(binds[0], own, "what the user binds stays");
        assert!(binds[1].read_only);
        fs::write(folder.join("other"), "").unwrap();
        remove(&folder);
        assert!(folder.join("other").exists() && !folder.join(HOSTS).exists());
        fs::remove_file(folder.join("other")).unwrap();
        remove(&folder);
        assert!(!folder.exists());
        // What was removed already is removed.
        remove(&folder);
    }
}
