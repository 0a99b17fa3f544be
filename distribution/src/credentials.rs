//! Who asks: the secrets for a host, and where they come from.

use std::fmt;

use futures::future::BoxFuture;

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text, for the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What a host is told of who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing: only what anybody may have.
    Anonymous,
    /// A name and a password.
    Password {
        /// The name of the user.
        username: String,
        /// The password or access token.
        password: Secret,
    },
    /// A long-lived token, which the host's token service exchanges for short ones (OAuth 2 refresh token). Docker's
    /// name for it is `identitytoken`; containerd has it as a secret without a user name.
    IdentityToken(Secret),
    /// The value of the `Authorization` header itself.
    Header(Secret),
}

/// The credentials cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct CredentialError {
    /// What the source says; no secret in it.
    pub reason: String,
}

/// Where credentials come from. It is asked after a host has answered 401, with the name of that host as it is in the
/// address (`registry-1.docker.io` for `docker.io`, and with a port if there is one).
///
/// What it answers is sent to that host, and to the token service that the host names in its challenge (on an
/// encrypted connection, if the host was reached by one). It is never asked for, and never used for, hosts that come
/// in through a redirect.
pub trait CredentialSource: Send + Sync + fmt::Debug {
    /// The credentials for a host.
    ///
    /// # Errors
    /// [`CredentialError`] fails the request; a source that knows nothing of the host answers
    /// [`Credentials::Anonymous`].
    fn credentials<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Credentials, CredentialError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_shown() {
        let password = Secret::new("hunter2");
        let all = [
            Credentials::Password { username: "u".to_owned(), password: password.clone() },
            Credentials::IdentityToken(password.clone()),
            Credentials::Header(password),
        ];
        assert!(!format!("{all:?}").contains("hunter2"));
    }
}
