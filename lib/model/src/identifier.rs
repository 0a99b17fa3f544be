//! Identifiers: the names of namespaces, containers, execs and sandboxes, and the parts of event topics.

/// The most bytes of an identifier (containerd `pkg/identifiers`).
pub const MAX_LENGTH: usize = 76;

/// Why a text is no identifier. The words are containerd's: clients show them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentifierError {
    /// The empty text.
    #[error("identifier must not be empty")]
    Empty,
    /// More than [`MAX_LENGTH`] bytes.
    #[error("identifier {id:?} greater than maximum length ({MAX_LENGTH} characters)")]
    TooLong {
        /// The start of what was given.
        id: String,
    },
    /// A character or an order of characters that is not allowed.
    #[error("identifier {id:?} must match ^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$")]
    Pattern {
        /// What was given.
        id: String,
    },
}

/// Checks `^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$` and a length of 1 to 76 bytes.
///
/// Such a name is safe as a path component: it has no slash, is neither `.` nor `..`, and does not begin with a
/// dot or a dash.
///
/// # Errors
/// An [`IdentifierError`] that says which rule is broken.
pub fn validate(id: &str) -> Result<(), IdentifierError> {
    if id.is_empty() {
        return Err(IdentifierError::Empty);
    }
    if id.len() > MAX_LENGTH {
        return Err(IdentifierError::TooLong { id: id.chars().take(MAX_LENGTH).collect() });
    }
    let mut separator_before = true;
    for byte in id.bytes() {
        let separator = matches!(byte, b'.' | b'_' | b'-');
        if !(byte.is_ascii_alphanumeric() || separator && !separator_before) {
            return Err(IdentifierError::Pattern { id: id.to_owned() });
        }
        separator_before = separator;
    }
    if separator_before {
        return Err(IdentifierError::Pattern { id: id.to_owned() });
    }
    Ok(())
}

/// Checks an event topic: a slash, then identifiers joined by slashes (containerd `core/events/exchange`).
///
/// # Errors
/// The text says what is wrong.
pub fn validate_topic(topic: &str) -> Result<(), TopicError> {
    let error = |reason: &str| TopicError { topic: topic.to_owned(), reason: reason.to_owned() };
    if topic.is_empty() {
        return Err(error("must not be empty"));
    }
    let Some(rest) = topic.strip_prefix('/') else { return Err(error("must start with '/'")) };
    if rest.is_empty() {
        return Err(error("must have at least one component"));
    }
    for part in rest.split('/') {
        validate(part)
            .map_err(|source| error(&format!("failed validation on component {part:?}: {source}")))?;
    }
    Ok(())
}

/// A topic that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("topic {topic:?} {reason}")]
pub struct TopicError {
    /// What was given.
    pub topic: String,
    /// The rule that it breaks.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_containerd_accepts() {
        for id in [
            "a",
            "default",
            "Default",
            "k8s.io",
            "a-b_c.d",
            "0912341234",
            "swarmkit.docker.io",
            &"a".repeat(76),
        ] {
            assert_eq!(validate(id), Ok(()), "{id}");
        }
    }

    #[test]
    fn refuses_what_containerd_refuses() {
        let bad = [
            "",
            ".",
            "..",
            "-a",
            "a-",
            "a--b",
            "a..b",
            "foo/foo",
            "foo/..",
            "foo.-boo",
            "a b",
            "ä",
            "\0",
            &"a".repeat(77),
            "-foo.boo",
            "foo.boo-",
            "foo_.boo",
            "_foo",
            "but__rosenbaum",
        ];
        for id in bad {
            assert!(validate(id).is_err(), "{id}");
        }
    }

    #[test]
    fn topics() {
        for topic in ["/tasks/create", "/a", "/k8s.io/x"] {
            assert_eq!(validate_topic(topic), Ok(()));
        }
        for topic in ["", "/", "a", "//", "/a/", "/a//b", "/a b"] {
            assert!(validate_topic(topic).is_err(), "{topic}");
        }
    }
}
