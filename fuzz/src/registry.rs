//! What registries and their operators send: challenges, and the configuration of hosts.

use std::path::Path;

use davit_distribution::hosts::file::{self, ServerEntry};
use davit_distribution::parse_challenges;

/// `WWW-Authenticate`: what is read can be written down and read again, and its size is bounded by that of the header.
pub fn challenge(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let challenges = parse_challenges(text);
    let is_name =
        |name: &str| !name.is_empty() && !name.bytes().any(|byte| byte.is_ascii_uppercase() || byte <= b' ');
    let mut written = Vec::new();
    let mut size = 0;
    for challenge in &challenges {
        assert!(is_name(&challenge.scheme));
        let mut parameters = Vec::new();
        for (name, value) in &challenge.parameters {
            assert!(is_name(name));
            size += name.len() + value.len();
            parameters.push(format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")));
        }
        written.push(format!("{} {}", challenge.scheme, parameters.join(", ")));
    }
    assert!(size <= text.len());
    assert_eq!(parse_challenges(&written.join(", ")), challenges);
}

/// `hosts.toml`: hosts that are accepted have a name and a clean path, and files lie where the configuration says.
pub fn hosts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let folder = Path::new("/etc/certs.d/registry.example");
    let Ok(parsed) = file::parse(text, folder) else { return };
    let server = match parsed.server {
        ServerEntry::Given(server) => Some(server),
        ServerEntry::Own(_) => None,
    };
    for host in parsed.hosts.iter().chain(&server) {
        assert!(!host.authority.is_empty() && !host.authority.contains(['@', '/', '?', '#', ' ']));
        assert!(host.path.is_empty() || host.path.starts_with('/') && !host.path.ends_with('/'));
        assert!(!host.path.split('/').any(|part| part == "." || part == ".."));
        assert!(host.settings.certificate_authorities.iter().all(|path| path.is_absolute()));
        let debug = format!("{host:?}");
        assert!(host.settings.headers.iter().all(|(_, value)| value.is_sensitive()), "{debug}");
    }
}
