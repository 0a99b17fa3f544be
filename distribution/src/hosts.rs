//! Which hosts serve a registry, and how they are reached: `certs.d`, as containerd and Docker lay it out.
//!
//! For the registry `localhost:5000` the first of these folders that exists is read, in each of the configured roots
//! in turn: `localhost_5000_`, `localhost:5000`, `_default`. In it is a `hosts.toml` ([`mod@file`]), or else files by the
//! names that Docker gives them: `*.crt` are CA certificates, `*.cert` with `*.key` certificates of the client.
//!
//! Without either a registry is its own host: `docker.io` is `registry-1.docker.io`, all is encrypted, and only a
//! host that is this machine (`localhost`, a loopback address) may be spoken to without: it is tried with TLS first,
//! whatever its certificate, unless its port is 80.

pub mod file;

use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use davit_oci::reference::DEFAULT_DOMAIN;
use http::{HeaderName, HeaderValue};

use crate::uri;
use file::ServerEntry;

/// The folders of hosts that are configured, if no other one is named: containerd's and Docker's.
pub const DIRECTORIES: [&str; 2] = ["/etc/containerd/certs.d", "/etc/docker/certs.d"];

/// The host behind the name `docker.io`.
const DOCKER_HOST: &str = "registry-1.docker.io";

/// The configuration of hosts is not usable.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// A file or folder cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is no TOML, or a value has the wrong type.
    #[error("invalid {}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// What the parser said.
        source: Box<toml::de::Error>,
    },
    /// A value means nothing.
    #[error("invalid {}: host {host:?}: {reason}", path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// In which table.
        host: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A file is larger than any configuration.
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// The most bytes.
        limit: u64,
    },
    /// A certificate or key cannot be used.
    #[error("unusable certificate or key {}: {reason}", path.display())]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Coded for HostsError {
    fn code(&self) -> ErrorCode {
        match self {
            HostsError::Read { .. } => ErrorCode::Internal,
            HostsError::Syntax { .. }
            | HostsError::Value { .. }
            | HostsError::TooLarge { .. }
            | HostsError::Certificate { .. } => ErrorCode::FailedPrecondition,
        }
    }
}

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Content by its digest.
    pub pull: bool,
    /// The digest of a tag; only hosts that are trusted with it should have this.
    pub resolve: bool,
    /// Taking content.
    pub push: bool,
    /// Lists of what refers to a manifest.
    pub referrers: bool,
}

impl Capabilities {
    /// Everything.
    pub const ALL: Capabilities = Capabilities { pull: true, resolve: true, push: true, referrers: true };
}

/// A certificate by which the client shows who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The file of the certificate, in PEM.
    pub certificate: PathBuf,
    /// The file of its key; without one it is in the file of the certificate.
    pub key: Option<PathBuf>,
}

/// How a host is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Files of CA certificates that are trusted beside those of the machine.
    pub certificate_authorities: Vec<PathBuf>,
    /// Certificates of the client.
    pub client_certificates: Vec<ClientCertificate>,
    /// Whether the certificate of the host is left unchecked.
    pub skip_verify: Option<bool>,
    /// Headers of each request to this host, and to no other.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// How long a connection may take to be made.
    pub dial_timeout: Option<Duration>,
}

impl Settings {
    /// Whether something is said of TLS. An address with `http` then means: TLS if the host speaks it.
    fn configures_tls(&self) -> bool {
        !self.certificate_authorities.is_empty()
            || !self.client_certificates.is_empty()
            || self.skip_verify.is_some()
    }
}

/// A host that serves a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Whether connections are encrypted.
    pub https: bool,
    /// Name and port.
    pub authority: String,
    /// The path of its API, `/v2` as a rule.
    pub path: String,
    /// What it may be asked for.
    pub capabilities: Capabilities,
    /// How it is reached.
    pub settings: Settings,
}

impl Host {
    /// Whether TLS is to be tried although the address says `http`, and `http` is right if the host does not speak TLS:
    /// containerd's rule for an address without encryption beside settings for TLS.
    pub(crate) fn tries_tls_first(&self) -> bool {
        !self.https && self.settings.configures_tls() && !self.authority.ends_with(":80")
    }

    /// Whether it stands in for another host, and is told which by `?ns=`.
    pub(crate) fn is_mirror_of(&self, registry: &str) -> bool {
        registry != self.authority && !(registry == DEFAULT_DOMAIN && self.authority == DOCKER_HOST)
    }
}

/// Where the configuration is.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// Roots in which folders of registries are looked up, the first one first (`/etc/containerd/certs.d` and such).
    pub directories: Vec<PathBuf>,
    /// Whether hosts without configuration are reached by `http` (`Some(true)`), by `https`, or by the default rule.
    pub plain_http: Option<bool>,
}

/// The hosts of a registry, in the order in which they are asked. Blocks on files.
///
/// # Errors
/// [`HostsError`] if there is a configuration that cannot be read or obeyed.
pub fn load(options: &HostOptions, registry: &str) -> Result<Vec<Host>, HostsError> {
    for root in &options.directories {
        for name in folder_names(registry) {
            let folder = root.join(name);
            match std::fs::metadata(&folder) {
                Ok(metadata) if metadata.is_dir() => return load_folder(options, registry, &folder),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(HostsError::Read { path: folder, source }),
            }
        }
    }
    Ok(vec![own_host(options, registry, Settings::default())])
}

/// The names of a registry's folder: a colon is not possible in the names of all filesystems.
fn folder_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':')
        && !host.is_empty()
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    names
}

fn load_folder(options: &HostOptions, registry: &str, folder: &Path) -> Result<Vec<Host>, HostsError> {
    let path = folder.join("hosts.toml");
    let text = match read_text(&path) {
        Err(HostsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => String::new(),
        result => result?,
    };
    if text.is_empty() {
        return Ok(vec![own_host(options, registry, docker_files(folder)?)]);
    }
    let file::Hosts { mut hosts, server } = file::parse(&text, folder)?;
    hosts.push(match server {
        ServerEntry::Given(host) => host,
        ServerEntry::Own(settings) => own_host(options, registry, settings),
    });
    Ok(hosts)
}

fn read_text(path: &Path) -> Result<String, HostsError> {
    let read = |source| HostsError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(read)?;
    file.take(file::MAX_SIZE + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > file::MAX_SIZE {
        return Err(HostsError::TooLarge { path: path.to_owned(), limit: file::MAX_SIZE });
    }
    Ok(text)
}

/// The files of Docker's layout.
fn docker_files(folder: &Path) -> Result<Settings, HostsError> {
    let read = |source| HostsError::Read { path: folder.to_owned(), source };
    let mut settings = Settings::default();
    let entries = std::fs::read_dir(folder).map_err(read)?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>().map_err(read)?;
    paths.sort();
    for path in paths.iter().filter(|path| path.is_file()) {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => settings.certificate_authorities.push(path.clone()),
            Some("cert") => {
                let key = path.with_extension("key");
                let key = paths.contains(&key).then_some(key);
                settings.client_certificates.push(ClientCertificate { certificate: path.clone(), key });
            }
            _ => {}
        }
    }
    Ok(settings)
}

/// The registry itself as its host, with the rules for this machine and for Docker Hub.
fn own_host(options: &HostOptions, registry: &str, mut settings: Settings) -> Host {
    let mut https = options.plain_http != Some(true);
    let mut authority = registry;
    if registry == DEFAULT_DOMAIN {
        (https, authority) = (true, DOCKER_HOST);
    } else if is_this_machine(registry) && options.plain_http.is_none() {
        let port = registry.rsplit_once(':').map_or("", |(_, port)| port.trim_end_matches(']'));
        let port = if registry.ends_with(']') { "" } else { port };
        https = matches!(port, "" | "443");
        if port != "80" && settings.skip_verify.is_none() {
            settings.skip_verify = Some(true);
        }
    }
    Host {
        https,
        authority: authority.to_owned(),
        path: "/v2".to_owned(),
        capabilities: Capabilities::ALL,
        settings,
    }
}

/// Whether a name with or without port is `localhost` or a loopback address.
fn is_this_machine(registry: &str) -> bool {
    let host = uri::without_port(registry);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_registry_is_its_own_host() {
        let own = |registry: &str| load(&HostOptions::default(), registry).unwrap().remove(0);
        for (registry, https, authority, first) in [
            ("docker.io", true, "registry-1.docker.io", false),
            ("ghcr.io", true, "ghcr.io", false),
            ("registry.example:5000", true, "registry.example:5000", false),
            ("10.0.0.1:5000", true, "10.0.0.1:5000", false),
            ("localhost.example:5000", true, "localhost.example:5000", false),
            ("localhost", true, "localhost", false),
            ("localhost:5000", false, "localhost:5000", true),
            ("127.9.9.9:5000", false, "127.9.9.9:5000", true),
            ("[::1]:5000", false, "[::1]:5000", true),
            ("[::1]", true, "[::1]", false),
            ("localhost:80", false, "localhost:80", false),
            ("localhost:443", true, "localhost:443", false),
        ] {
            let host = own(registry);
            assert_eq!((host.https, host.authority.as_str()), (https, authority), "{registry}");
            assert_eq!(host.tries_tls_first(), first, "{registry}");
        }
        assert!(!own("docker.io").is_mirror_of("docker.io") && own("docker.io").is_mirror_of("ghcr.io"));
        let plain = HostOptions { plain_http: Some(true), ..HostOptions::default() };
        assert!(!load(&plain, "registry.example").unwrap()[0].https);
        assert!(load(&plain, "docker.io").unwrap()[0].https);
    }

    #[test]
    fn folders_are_found_by_both_names_and_the_default() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let directories = vec![one.path().to_owned(), two.path().to_owned()];
        let options = HostOptions { directories, ..HostOptions::default() };
        let first = |registry: &str| load(&options, registry).unwrap().remove(0).authority;
        assert_eq!(first("r.example:5000"), "r.example:5000");
        let write = |folder: &Path, name: &str, host: &str| {
            fs::create_dir_all(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("hosts.toml"), format!("[host.\"{host}\"]")).unwrap();
        };
        write(two.path(), "_default", "default-two");
        assert_eq!(first("r.example:5000"), "default-two");
        write(one.path(), "_default", "default-one");
        assert_eq!(first("r.example:5000"), "default-one");
        write(one.path(), "r.example:5000", "colon");
        assert_eq!(first("r.example:5000"), "colon");
        write(one.path(), "r.example_5000_", "underscore");
        assert_eq!(first("r.example:5000"), "underscore");
        assert_eq!(first("other"), "default-one");
        // The server comes last, and is the registry itself when the file names none.
        assert_eq!(load(&options, "docker.io").unwrap()[1].authority, "registry-1.docker.io");
    }

    #[test]
    fn the_files_of_docker() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("r.example");
        fs::create_dir(&folder).unwrap();
        for name in ["ca.crt", "client.cert", "client.key", "both.cert", "readme"] {
            fs::write(folder.join(name), "").unwrap();
        }
        let options = HostOptions { directories: vec![root.path().to_owned()], ..HostOptions::default() };
        let hosts = load(&options, "r.example").unwrap();
        let settings = &hosts[0].settings;
        assert_eq!(settings.certificate_authorities, [folder.join("ca.crt")]);
        let pair = |name: &str, key: Option<&str>| ClientCertificate {
            certificate: folder.join(name),
            key: key.map(|key| folder.join(key)),
        };
        assert_eq!(
            settings.client_certificates,
            [pair("both.cert", None), pair("client.cert", Some("client.key"))]
        );
    }

    #[test]
    fn a_bad_file_is_an_error_and_not_passed_by() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("docker.io");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("hosts.toml"), "[host").unwrap();
        let options = HostOptions { directories: vec![root.path().to_owned()], ..HostOptions::default() };
        assert!(matches!(load(&options, "docker.io"), Err(HostsError::Syntax { .. })));
    }
}
