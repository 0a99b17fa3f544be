//! Image references, by the grammar and the normalisation that Docker's users are used to.
//!
//! `busybox` is short for `docker.io/library/busybox:latest`. The first component of a name is a registry only if it
//! looks like a host: it has a dot, a colon or an upper-case letter, or is `localhost` (distribution/reference). In
//! containerd's API an image is found under its full name, so every name that a user types goes through here once.

use std::fmt;
use std::str::FromStr;

use davit_model::{Coded, Digest, ErrorCode};

/// The registry of names that name none.
pub const DEFAULT_DOMAIN: &str = "docker.io";
/// The older name of [`DEFAULT_DOMAIN`], still understood.
const LEGACY_DEFAULT_DOMAIN: &str = "index.docker.io";
/// The folder of names on Docker Hub that name none.
const OFFICIAL_PREFIX: &str = "library/";
/// The tag of references that have neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";
/// The most bytes of domain and path together.
const MAX_NAME_LENGTH: usize = 255;
/// The most bytes of a tag.
const MAX_TAG_LENGTH: usize = 128;

/// A parsed, normalised reference. It always has a domain; it may lack both tag and digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The empty text.
    #[error("image reference must not be empty")]
    Empty,
    /// An upper-case letter in the path.
    #[error("invalid image reference {text:?}: repository name must be lowercase")]
    UpperCase {
        /// What was given.
        text: String,
    },
    /// 64 hexadecimal digits: an image's id, which is no name.
    #[error("invalid image reference {text:?}: a name must not be 64 hexadecimal digits")]
    Identifier {
        /// What was given.
        text: String,
    },
    /// Domain and path are too long.
    #[error("invalid image reference: repository name must not be longer than {MAX_NAME_LENGTH} characters")]
    TooLong,
    /// A part breaks the grammar.
    #[error("invalid image reference {text:?}: {part} {value:?} is not well formed")]
    Format {
        /// What was given.
        text: String,
        /// Which part.
        part: &'static str,
        /// The part as given.
        value: String,
    },
}

impl Coded for ReferenceError {
    fn code(&self) -> ErrorCode {
        match self {
            ReferenceError::Empty
            | ReferenceError::UpperCase { .. }
            | ReferenceError::Identifier { .. }
            | ReferenceError::TooLong
            | ReferenceError::Format { .. } => ErrorCode::InvalidArgument,
        }
    }
}

impl Reference {
    /// The registry, `docker.io` when none was named.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository within the registry, such as `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Domain and path: the repository.
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The same, with the tag `latest` when it has neither tag nor digest.
    pub fn with_default_tag(mut self) -> Reference {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some(DEFAULT_TAG.to_owned());
        }
        self
    }

    /// The repository as people write it: without what the normalisation added.
    pub fn familiar_name(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.name();
        }
        match self.path.strip_prefix(OFFICIAL_PREFIX) {
            // Without its folder, such a name would be read as the id of an image.
            Some(rest) if is_identifier(rest) => self.name(),
            Some(rest) if !rest.contains('/') => rest.to_owned(),
            // Without its registry, such a path would be read as one.
            _ if split_domain(&self.path).1 != self.path => self.name(),
            _ => self.path.clone(),
        }
    }

    /// The whole reference as people write it.
    pub fn familiar(&self) -> String {
        let mut text = self.familiar_name();
        self.push_suffix(&mut text);
        text
    }

    fn push_suffix(&self, text: &mut String) {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(digest.as_str());
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.name();
        self.push_suffix(&mut text);
        f.write_str(&text)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let format = |part, value: &str| ReferenceError::Format {
            text: text.to_owned(),
            part,
            value: value.to_owned(),
        };
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if is_identifier(text) {
            return Err(ReferenceError::Identifier { text: text.to_owned() });
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                (rest, Some(digest.parse::<Digest>().map_err(|_| format("digest", digest))?))
            }
        };
        let (domain, remainder) = split_domain(rest);
        let (path, tag) = match remainder.split_once(':') {
            None => (remainder, None),
            Some((path, tag)) => (path, Some(tag)),
        };
        if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(ReferenceError::UpperCase { text: text.to_owned() });
        }
        let path = if domain == DEFAULT_DOMAIN && !path.contains('/') {
            format!("{OFFICIAL_PREFIX}{path}")
        } else {
            path.to_owned()
        };
        if !is_domain(domain) {
            return Err(format("registry", domain));
        }
        if !path.split('/').all(is_path_component) {
            return Err(format("repository", &path));
        }
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(format("tag", tag));
        }
        if domain.len() + 1 + path.len() > MAX_NAME_LENGTH {
            return Err(ReferenceError::TooLong);
        }
        Ok(Reference { domain: domain.to_owned(), path, tag: tag.map(str::to_owned), digest })
    }
}

/// 64 hexadecimal digits: what the id of an image looks like.
fn is_identifier(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Splits a name into its registry and the rest, by what the first component looks like.
fn split_domain(name: &str) -> (&str, &str) {
    let (domain, rest) = match name.split_once('/') {
        Some((first, rest)) if looks_like_host(first) => (first, rest),
        _ => (DEFAULT_DOMAIN, name),
    };
    if domain == LEGACY_DEFAULT_DOMAIN { (DEFAULT_DOMAIN, rest) } else { (domain, rest) }
}

fn looks_like_host(component: &str) -> bool {
    component == "localhost"
        || component.bytes().any(|byte| matches!(byte, b'.' | b':') || byte.is_ascii_uppercase())
}

/// Dotted labels or a bracketed IPv6 address, and an optional port.
fn is_domain(domain: &str) -> bool {
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(rest) = domain.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else { return false };
        let is_address = !address.is_empty()
            && address.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'));
        return is_address && (rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port));
    }
    let host = match domain.split_once(':') {
        None => domain,
        Some((host, port)) if is_port(port) => host,
        Some(_) => return false,
    };
    host.split('.').all(|label| {
        let bytes = label.as_bytes();
        bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
            && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
    })
}

/// Lower-case letters and digits, joined by one dot, one or two underscores, or any number of dashes.
fn is_path_component(component: &str) -> bool {
    let is_word = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(is_word) || !bytes.last().is_some_and(is_word) {
        return false;
    }
    bytes.split(is_word).filter(|separator| !separator.is_empty()).all(|separator| {
        matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|byte| *byte == b'-')
    })
}

fn is_tag(tag: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= MAX_TAG_LENGTH
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn full(text: &str) -> String {
        text.parse::<Reference>().unwrap().with_default_tag().to_string()
    }

    #[test]
    fn normalises_as_docker_does() {
        let table = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("library/busybox", "docker.io/library/busybox:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("user/repo", "docker.io/user/repo:latest"),
            ("a/b/c", "docker.io/a/b/c:latest"),
            ("localhost/busybox", "localhost/busybox:latest"),
            ("localhost:5000/busybox", "localhost:5000/busybox:latest"),
            ("127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("ghcr.io/a/b", "ghcr.io/a/b:latest"),
            ("Registry/a", "Registry/a:latest"),
            ("a_b/c__d/e.f/g---h", "docker.io/a_b/c__d/e.f/g---h:latest"),
            ("x:T_1.2-3", "docker.io/library/x:T_1.2-3"),
        ];
        for (given, want) in table {
            assert_eq!(full(given), want, "{given}");
        }
        assert_eq!(full(&format!("busybox@{DIGEST}")), format!("docker.io/library/busybox@{DIGEST}"));
        assert_eq!(full(&format!("a.b/c:t@{DIGEST}")), format!("a.b/c:t@{DIGEST}"));
    }

    #[test]
    fn familiar_undoes_the_normalisation() {
        for text in ["busybox:latest", "user/repo:1", "localhost:5000/a:b", "ghcr.io/a/b:latest"] {
            assert_eq!(text.parse::<Reference>().unwrap().familiar(), text);
        }
        assert_eq!("docker.io/library/a/b:c".parse::<Reference>().unwrap().familiar(), "library/a/b:c");
        let like_an_id = format!("docker.io/library/{}", "0a".repeat(32));
        assert_eq!(like_an_id.parse::<Reference>().unwrap().familiar(), like_an_id);
    }

    #[test]
    fn refuses_what_docker_refuses() {
        let long = "a".repeat(300);
        let tag = format!("a:{}", "t".repeat(129));
        let bad = [
            "",
            "Busybox",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a:",
            "a:-t",
            "a:t:u",
            "a b",
            "ä",
            "a@sha256:12",
            "a@",
            "local host/a",
            "x.y:port/a",
            ".x/a",
            "[::1/a",
            DIGEST.trim_start_matches("sha256:"),
            &long,
            &tag,
        ];
        for text in bad {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
        assert_eq!("Foo".parse::<Reference>(), Err(ReferenceError::UpperCase { text: "Foo".to_owned() }));
    }

    proptest! {
        #[test]
        fn parsing_what_was_printed_changes_nothing(text in "[a-zA-Z0-9._:/@-]{1,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference.clone());
                prop_assert_eq!(reference.familiar().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
