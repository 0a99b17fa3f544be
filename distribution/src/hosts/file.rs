//! `hosts.toml`, as containerd reads it: an ordered list of hosts, and the server that comes last.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use davit_model::duration;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, Uri};
use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::{Capabilities, ClientCertificate, Host, HostsError};

/// The most bytes of a file.
pub(super) const MAX_SIZE: u64 = 1 << 20;

/// One `[host."…"]` table; the top of the file has the same keys for `server`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    capabilities: Vec<String>,
    ca: Option<OneOrMore<String>>,
    client: Option<Clients>,
    skip_verify: Option<bool>,
    header: HashMap<String, OneOrMore<String>>,
    override_path: bool,
    dial_timeout: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    server: String,
    host: HashMap<String, Entry>,
    #[serde(flatten)]
    top: Entry,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

/// A file with certificate and key, several of those, or pairs of a certificate and its key.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Clients {
    File(String),
    Files(Vec<OneOrMore<String>>),
}

impl<T> OneOrMore<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMore::One(one) => vec![one],
            OneOrMore::More(more) => more,
        }
    }
}

/// What a file says: the hosts to try, in order. The last one is the server; it has no address if the file names none,
/// and is the registry's own host then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    /// Mirrors and other hosts before the server.
    pub hosts: Vec<Host>,
    /// What the top of the file says; without `server` its address is that of the registry's own host.
    pub server: ServerEntry,
}

/// The top of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerEntry {
    /// `server` is given.
    Given(Host),
    /// It is not: containerd then takes the registry's own host with all capabilities, and the certificates, headers and
    /// timeouts that the file has at its top.
    Own(super::Settings),
}

/// Reads the text of a file in `folder`, which relative paths begin at.
///
/// # Errors
/// [`HostsError::Syntax`] and [`HostsError::Value`]. containerd logs such an error and goes on as if the file were not
/// there, so that a typing error makes it pass by a mirror or a CA; here it fails the request.
pub fn parse(text: &str, folder: &Path) -> Result<Hosts, HostsError> {
    let syntax = |source| HostsError::Syntax { path: folder.join("hosts.toml"), source: Box::new(source) };
    let mut file: File = toml::from_str(text).map_err(syntax)?;
    let mut hosts = Vec::new();
    for name in order(text).map_err(syntax)? {
        let entry = file.host.remove(&name).unwrap_or_default();
        hosts.push(host(&name, entry, folder)?);
    }
    let server = if file.server.is_empty() {
        ServerEntry::Own(settings("server", file.top, folder)?)
    } else {
        ServerEntry::Given(host(&file.server, file.top, folder)?)
    };
    Ok(Hosts { hosts, server })
}

/// The names of the host tables in the order of the text, which the parsed table does not keep.
fn order(text: &str) -> Result<Vec<String>, toml::de::Error> {
    let document = DeTable::parse(text)?;
    let mut names = Vec::new();
    for (key, value) in document.get_ref() {
        if key.get_ref() == "host"
            && let DeValue::Table(table) = value.get_ref()
        {
            names.extend(table.keys().map(|key| (key.span().start, key.get_ref().to_string())));
        }
    }
    names.sort();
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

fn host(name: &str, entry: Entry, folder: &Path) -> Result<Host, HostsError> {
    let bad = |what| value_error(folder, name, what);
    let text = if name.starts_with("http://") || name.starts_with("https://") {
        name.to_owned()
    } else if name.contains("://") {
        return Err(bad("its scheme is neither http nor https"));
    } else {
        format!("https://{name}")
    };
    let uri: Uri = text.parse().map_err(|_| bad("it is no address"))?;
    let authority = uri.authority().map(Authority::as_str).unwrap_or_default();
    if authority.is_empty() || authority.contains('@') || uri.query().is_some() {
        return Err(bad("it is no address of a host and a path"));
    }
    let capabilities = capabilities(name, &entry.capabilities, folder)?;
    let mut path = clean(uri.path());
    if !entry.override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    Ok(Host {
        https: uri.scheme_str() == Some("https"),
        authority: authority.to_owned(),
        path,
        capabilities,
        settings: settings(name, entry, folder)?,
    })
}

/// A path without empty parts, `.` and `..`, and without a slash at its end.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.iter().map(|part| format!("/{part}")).collect()
}

fn capabilities(name: &str, words: &[String], folder: &Path) -> Result<Capabilities, HostsError> {
    if words.is_empty() {
        return Ok(Capabilities::ALL);
    }
    let mut capabilities = Capabilities::default();
    for word in words {
        match word.to_ascii_lowercase().as_str() {
            "pull" => capabilities.pull = true,
            "resolve" => capabilities.resolve = true,
            "push" => capabilities.push = true,
            "referrers" => capabilities.referrers = true,
            _ => return Err(value_error(folder, name, "it has an unknown capability")),
        }
    }
    Ok(capabilities)
}

fn settings(name: &str, entry: Entry, folder: &Path) -> Result<super::Settings, HostsError> {
    let bad = |what| value_error(folder, name, what);
    let file = |path: String| -> PathBuf { folder.join(path) };
    let mut client_certificates = Vec::new();
    let clients = match entry.client {
        None => Vec::new(),
        Some(Clients::File(file)) => vec![OneOrMore::One(file)],
        Some(Clients::Files(files)) => files,
    };
    for pair in clients {
        let mut files = pair.into_vec().into_iter().map(file);
        match (files.next(), files.next(), files.next()) {
            (Some(certificate), key, None) => {
                client_certificates.push(ClientCertificate { certificate, key })
            }
            _ => return Err(bad("a client is neither a file nor a certificate and a key")),
        }
    }
    let mut headers = Vec::new();
    for (key, values) in entry.header {
        let key: HeaderName = key.parse().map_err(|_| bad("it has a header with a bad name"))?;
        for value in values.into_vec() {
            let mut value: HeaderValue =
                value.parse().map_err(|_| bad("it has a header with a bad value"))?;
            // It may be a password, and is to be in no log.
            value.set_sensitive(true);
            headers.push((key.clone(), value));
        }
    }
    headers.sort_by(|(one, _), (other, _)| one.as_str().cmp(other.as_str()));
    let dial_timeout = match entry.dial_timeout.as_str() {
        "" => None,
        text => {
            let nanoseconds = duration::nanoseconds(text).filter(|nanoseconds| *nanoseconds >= 0.0);
            let limit = nanoseconds.ok_or_else(|| bad("its dial_timeout is no duration"))?;
            // Go takes 0 for none of its own, so the usual one holds.
            (limit > 0.0).then(|| Duration::from_nanos(limit as u64))
        }
    };
    Ok(super::Settings {
        certificate_authorities: entry
            .ca
            .map(OneOrMore::into_vec)
            .unwrap_or_default()
            .into_iter()
            .map(file)
            .collect(),
        client_certificates,
        skip_verify: entry.skip_verify,
        headers,
        dial_timeout,
    })
}

fn value_error(folder: &Path, host: &str, reason: &'static str) -> HostsError {
    HostsError::Value { path: folder.join("hosts.toml"), host: host.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Hosts {
        parse(text, Path::new("/etc/certs.d/docker.io")).unwrap()
    }

    #[test]
    fn the_order_is_that_of_the_file() {
        let hosts = parsed(
            r#"
            server = "https://upstream.example"
            [host."https://z.example"]
              capabilities = ["pull", "Resolve"]
            [host."http://a.example:5000/some//path/"]
              skip_verify = true
              [host."http://a.example:5000/some//path/".header]
                x-one = "1"
                x-two = ["2", "3"]
            [host."m.example/v2"]
              override_path = true
              dial_timeout = "1m1.5s"
            "#,
        );
        let shown: Vec<_> = hosts
            .hosts
            .iter()
            .map(|host| format!("{} {}{}", host.https, host.authority, host.path))
            .collect();
        assert_eq!(shown, ["true z.example/v2", "false a.example:5000/some/path/v2", "true m.example/v2"]);
        let only = Capabilities { pull: true, resolve: true, ..Capabilities::default() };
        assert_eq!(hosts.hosts[0].capabilities, only);
        assert_eq!(hosts.hosts[1].settings.headers.len(), 3);
        assert_eq!(hosts.hosts[1].settings.skip_verify, Some(true));
        assert_eq!(hosts.hosts[2].settings.dial_timeout, Some(Duration::from_millis(61_500)));
        let ServerEntry::Given(server) = hosts.server else { panic!("{:?}", hosts.server) };
        assert_eq!((server.authority.as_str(), server.path.as_str()), ("upstream.example", "/v2"));
    }

    #[test]
    fn no_limit_for_dialling_is_the_usual_one() {
        let hosts = parsed("[host.a]\ndial_timeout = \"0s\"");
        assert_eq!(hosts.hosts[0].settings.dial_timeout, None);
    }

    #[test]
    fn certificates_in_all_their_forms() {
        let hosts = parsed(
            r#"
            ca = "ca.crt"
            [host."a"]
              ca = ["/x/ca.crt", "y.crt"]
              client = "both.pem"
            [host."b"]
              client = ["1.pem", "2.pem"]
            [host."c"]
              client = [["c.cert", "c.key"], ["d.cert", "/d.key"]]
            "#,
        );
        let ServerEntry::Own(own) = hosts.server else { panic!("{:?}", hosts.server) };
        assert_eq!(own.certificate_authorities, [Path::new("/etc/certs.d/docker.io/ca.crt")]);
        let authorities = &hosts.hosts[0].settings.certificate_authorities;
        assert_eq!(authorities[..], [PathBuf::from("/x/ca.crt"), "/etc/certs.d/docker.io/y.crt".into()]);
        assert_eq!(hosts.hosts[0].settings.client_certificates[0].key, None);
        assert_eq!(hosts.hosts[1].settings.client_certificates.len(), 2);
        assert_eq!(hosts.hosts[2].settings.client_certificates[1].key, Some("/d.key".into()));
    }

    #[test]
    fn refuses_what_it_cannot_obey() {
        for text in [
            "server = 1",
            "[host",
            "[host.\"ftp://x\"]",
            "[host.\"https://u:p@x\"]",
            "[host.\"https://x?y\"]",
            "[host.x]\ncapabilities = [\"fly\"]",
            "[host.x]\nca = 1",
            "[host.x]\nclient = [[\"a\", \"b\", \"c\"]]",
            "[host.x]\nclient = [[]]",
            "[host.x]\ndial_timeout = \"soon\"",
            "[host.x]\ndial_timeout = \"-1s\"",
            "[host.x.header]\n\"a b\" = \"1\"",
            "[host.x.header]\na = \"1\\n2\"",
        ] {
            assert!(parse(text, Path::new("/")).is_err(), "{text}");
        }
        assert!(parsed("").hosts.is_empty());
    }

    proptest! {
        #[test]
        fn nothing_breaks_it(text in "\\PC{0,200}", name in "[a-z:/.@?]{0,20}") {
            let _ = parse(&text, Path::new("/"));
            if let Ok(hosts) = parse(&format!("[host.\"{name}\"]"), Path::new("/")) {
                prop_assert_eq!(hosts.hosts.len(), 1);
                prop_assert!(!hosts.hosts[0].authority.is_empty());
            }
        }
    }
}
