//! Addresses: joining, comparing, and showing them without what is secret in them.

use http::Uri;
use http::uri::{Authority, Scheme};

/// The most bytes of an address that a server names.
const MAX_LENGTH: usize = 8 << 10;

/// Scheme, host and port: what must be the same for two addresses to be the same party.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Origin {
    pub(crate) https: bool,
    host: String,
    port: u16,
}

impl Origin {
    /// The origin of an absolute address.
    pub(crate) fn of(uri: &Uri) -> Option<Origin> {
        let https = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        Some(Origin { https, host: uri.host()?.to_ascii_lowercase(), port: port(uri) })
    }
}

/// The host of an address without the brackets of an IPv6 address, for looking it up.
pub(crate) fn bare_host(uri: &Uri) -> &str {
    let host = uri.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// The host of a registry's name, without its port and the brackets of an IPv6 address.
pub(crate) fn without_port(registry: &str) -> &str {
    match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => registry.split_once(':').map_or(registry, |(host, _)| host),
    }
}

/// The port of an address.
pub(crate) fn port(uri: &Uri) -> u16 {
    uri.port_u16().unwrap_or(if uri.scheme() == Some(&Scheme::HTTP) { 80 } else { 443 })
}

/// The address that `location` means when it is named at `base` (RFC 3986, section 5; without `..`). None if it is no
/// address of HTTP, has user information, or is too long.
pub(crate) fn join(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next().unwrap_or_default();
    if location.is_empty() || location.len() > MAX_LENGTH {
        return None;
    }
    let scheme = base.scheme_str()?;
    let authority = base.authority()?;
    let text = if location.starts_with("http://") || location.starts_with("https://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else if location.split(['/', '?']).next().is_some_and(|first| first.contains(':')) {
        return None;
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let uri: Uri = text.parse().ok()?;
    let plain = |authority: &Authority| !authority.as_str().contains('@');
    (uri.authority().is_some_and(plain) && Origin::of(&uri).is_some()).then_some(uri)
}

/// The address with another query parameter at its end.
pub(crate) fn with_query(uri: &Uri, name: &str, value: &str) -> Option<Uri> {
    let query: String = form_urlencoded::Serializer::new(uri.query().unwrap_or_default().to_owned())
        .append_pair(name, value)
        .finish();
    format!("{}://{}{}?{query}", uri.scheme_str()?, uri.authority()?, uri.path()).parse().ok()
}

/// The address as it may be shown: the values of all query parameters but `ns` are left out, since signed addresses
/// of storage services are as good as passwords.
pub(crate) fn shown(uri: &Uri) -> String {
    let authority = uri.authority().map_or("", |authority| {
        authority.as_str().rsplit_once('@').map_or(authority.as_str(), |(_, host)| host)
    });
    let mut text = format!("{}://{authority}{}", uri.scheme_str().unwrap_or_default(), uri.path());
    let mut separator = '?';
    for part in uri.query().unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
        text.push(separator);
        separator = '&';
        match part.split_once('=') {
            Some(("ns", _)) | None => text.push_str(part),
            Some((name, _)) => {
                text.push_str(name);
                text.push_str("=REDACTED");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_as_browsers_do() {
        let base: Uri = "https://h:5000/v2/a/blobs/x?y=1".parse().unwrap();
        for (location, wanted) in [
            ("https://o/p?q=1", Some("https://o/p?q=1")),
            ("//o/p", Some("https://o/p")),
            ("/p", Some("https://h:5000/p")),
            ("?z", Some("https://h:5000/v2/a/blobs/x?z")),
            ("up/1", Some("https://h:5000/v2/a/blobs/up/1")),
            ("/p#fragment", Some("https://h:5000/p")),
            ("https://user:pass@o/p", None),
            ("ftp://o/p", None),
            ("file:/etc/passwd", None),
            ("", None),
            ("https://", None),
        ] {
            assert_eq!(join(&base, location).map(|uri| uri.to_string()).as_deref(), wanted, "{location}");
        }
    }

    #[test]
    fn signatures_are_not_shown() {
        let uri: Uri = "https://u:p@s3/x?ns=docker.io&X-Signature=abc&flag".parse().unwrap();
        assert_eq!(shown(&uri), "https://s3/x?ns=docker.io&X-Signature=REDACTED&flag");
        let more = with_query(&"https://h/p?a=b".parse().unwrap(), "digest", "sha256:1").unwrap();
        assert_eq!(more.to_string(), "https://h/p?a=b&digest=sha256%3A1");
    }

    #[test]
    fn origins_know_the_usual_ports() {
        let origin = |text: &str| Origin::of(&text.parse().unwrap());
        assert_eq!(origin("https://H/x"), origin("https://h:443/y"));
        assert_ne!(origin("https://h/x"), origin("http://h/x"));
        assert_ne!(origin("https://h/x"), origin("https://h:444/x"));
    }
}
