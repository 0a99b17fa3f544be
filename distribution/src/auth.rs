//! Answering challenges: which host is told what, and the tokens that are kept.
//!
//! ```text
//! request ──▶ 401 ──▶ challenge ── basic ──▶ credentials of the host in each request
//!    ▲                    │
//!    │                    └── bearer ──▶ token service (the realm) ──▶ token for these scopes, until it expires
//!    └────────────── again, with the answer ◀────────────────┘
//! ```
//!
//! Each configured host has an [`Authorizer`], and the credentials for that host are never used for another: where
//! a redirect leads to another host, that one gets an anonymous token at most. A realm is told credentials as the
//! token specification has it: whoever runs the host names the service that checks its users. But a host that was
//! reached by `https` cannot name a realm at `http`, and the addresses of realms obey the policy of addresses that
//! hosts name.

mod token;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue, Uri};
use tokio::sync::Mutex;
use tracing::debug;

use crate::challenge::{self, Challenge};
use crate::credentials::{CredentialSource, Credentials};
use crate::error::Error;
use crate::policy::Policy;
use crate::registry::Retry;
use crate::transport::{Head, Transport};
use crate::uri::{self, Origin};

pub(crate) use token::Realm;

/// How much of a server's words is shown.
const MAX_MESSAGE: usize = 256;
/// The most hosts whose answers are kept: the host itself, and those that it redirects to.
const MAX_ORIGINS: usize = 16;

/// The answers for one configured host.
#[derive(Debug)]
pub(crate) struct Authorizer {
    host: String,
    source: Option<Arc<dyn CredentialSource>>,
    transport: Arc<Transport>,
    answers: Mutex<HashMap<Origin, Answer>>,
}

/// How an origin is answered.
#[derive(Debug, Clone)]
enum Answer {
    /// The same header each time.
    Header(HeaderValue),
    /// A token of this realm.
    Bearer(Arc<Realm>),
}

/// What a request says of itself when it is authorized.
pub(crate) struct Asker<'a> {
    /// The scopes that it needs.
    pub(crate) scopes: &'a [String],
    /// How a token service is asked again.
    pub(crate) retry: Retry,
}

impl Authorizer {
    pub(crate) fn new(
        host: &str,
        source: Option<Arc<dyn CredentialSource>>,
        transport: Arc<Transport>,
    ) -> Authorizer {
        Authorizer { host: host.to_owned(), source, transport, answers: Mutex::default() }
    }

    /// The `Authorization` header for a request, if its host has asked for one.
    pub(crate) async fn authorize(&self, uri: &Uri, asker: &Asker<'_>) -> Result<Option<HeaderValue>, Error> {
        let Some(origin) = Origin::of(uri) else { return Ok(None) };
        let answer = self.answers.lock().await.get(&origin).cloned();
        match answer {
            None => Ok(None),
            Some(Answer::Header(value)) => Ok(Some(value)),
            Some(Answer::Bearer(realm)) => realm.token(&self.transport, asker).await.map(Some),
        }
    }

    /// Takes the challenges of a 401 to a request that had the header `used`. Afterwards the request is to be sent
    /// again.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] if what is known was refused already; [`Error::Challenge`] if it cannot be answered;
    /// [`Error::Credentials`].
    pub(crate) async fn challenged(
        &self,
        response: &Head,
        used: Option<&HeaderValue>,
        asker: &Asker<'_>,
        configured: bool,
    ) -> Result<(), Error> {
        let challenges = challenge::of_headers(&response.headers);
        let Some(origin) = Origin::of(&response.uri) else { return Ok(()) };
        let unusable = |reason| Error::Challenge { host: self.host.clone(), reason };
        if let Some(bearer) = challenges.iter().find(|challenge| challenge.scheme == "bearer") {
            let mut answers = self.answers.lock().await;
            if let Some(Answer::Bearer(realm)) = answers.get(&origin)
                && realm.is_named_by(bearer)
            {
                realm.refused(bearer, used, asker).await;
                return Ok(());
            }
            if matches!(answers.get(&origin), Some(Answer::Header(_))) && used.is_some() {
                return Err(Error::Unauthorized { reason: reason(&challenges) });
            }
            let realm = realm_address(&response.uri, bearer).map_err(unusable)?;
            let credentials = if configured { self.credentials().await? } else { Credentials::Anonymous };
            let answer = match credentials {
                Credentials::Header(value) => Answer::Header(sensitive(value.expose()).map_err(unusable)?),
                credentials => {
                    debug!(host = self.host, realm = uri::shown(&realm), "asking a token service");
                    let policy = realm_policy(&response.uri, &realm, response.peer);
                    Answer::Bearer(Arc::new(Realm::new(realm, bearer, credentials, policy)))
                }
            };
            if answers.len() >= MAX_ORIGINS {
                answers.clear();
            }
            answers.insert(origin, answer);
            return Ok(());
        }
        // A password that was refused once is not sent again: too many attempts lock accounts.
        if used.is_some() || !configured {
            return Err(Error::Unauthorized { reason: reason(&challenges) });
        }
        let credentials = self.credentials().await?;
        let value = match credentials {
            Credentials::Header(value) => sensitive(value.expose()).map_err(unusable)?,
            Credentials::Password { username, password }
                if challenges.iter().any(|challenge| challenge.scheme == "basic") =>
            {
                basic(&username, password.expose()).map_err(unusable)?
            }
            Credentials::Password { .. } => {
                return Err(unusable("it has no scheme that is supported (basic, bearer)"));
            }
            Credentials::Anonymous | Credentials::IdentityToken(_) => {
                let reason = reason(&challenges).unwrap_or_else(|| "no basic auth credentials".to_owned());
                return Err(Error::Unauthorized { reason: Some(reason) });
            }
        };
        self.answers.lock().await.insert(origin, Answer::Header(value));
        Ok(())
    }

    async fn credentials(&self) -> Result<Credentials, Error> {
        match &self.source {
            None => Ok(Credentials::Anonymous),
            Some(source) => source
                .credentials(&self.host)
                .await
                .map_err(|source| Error::Credentials { host: self.host.clone(), source }),
        }
    }
}

/// What a 401 that cannot be helped says.
pub(crate) fn refusal(headers: &HeaderMap) -> Error {
    Error::Unauthorized { reason: reason(&challenge::of_headers(headers)) }
}

/// What the server says, in words that are fit to be shown.
fn reason(challenges: &[Challenge]) -> Option<String> {
    let found = challenges.iter().find_map(|challenge| challenge.parameter("error"))?;
    let text: String = found.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE).collect();
    Some(format!("server message: {text}"))
}

/// The address of a realm, if the host that names it may do so.
fn realm_address(host: &Uri, challenge: &Challenge) -> Result<Uri, &'static str> {
    let text = challenge.parameter("realm").ok_or("no realm specified for token auth challenge")?;
    let absolute = text.starts_with("http://") || text.starts_with("https://");
    let realm = absolute.then(|| uri::join(host, text)).flatten().ok_or("its realm is no address")?;
    if host.scheme_str() == Some("https") && realm.scheme_str() != Some("https") {
        return Err("its realm is not encrypted, unlike the host itself");
    }
    Ok(realm)
}

/// A realm at the host itself is as good as the host.
fn realm_policy(host: &Uri, realm: &Uri, peer: Option<IpAddr>) -> Policy {
    if Origin::of(host) == Origin::of(realm) { Policy::Configured } else { Policy::named_by(peer) }
}

fn sensitive(text: &str) -> Result<HeaderValue, &'static str> {
    let mut value: HeaderValue =
        text.parse().map_err(|_| "the credentials cannot be written into a header")?;
    value.set_sensitive(true);
    Ok(value)
}

/// `Basic` of RFC 7617.
fn basic(username: &str, password: &str) -> Result<HeaderValue, &'static str> {
    sensitive(&format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn realm(host: &str, realm: &str) -> Option<String> {
        let challenge = Challenge {
            scheme: "bearer".to_owned(),
            parameters: vec![("realm".to_owned(), realm.to_owned())],
        };
        realm_address(&host.parse().unwrap(), &challenge).ok().map(|uri| uri.to_string())
    }

    #[test]
    fn realms_are_as_safe_as_their_hosts() {
        assert!(realm("https://r/v2/", "https://auth.example/token?a=b").is_some());
        assert!(realm("http://r/v2/", "http://auth.example/token").is_some());
        for bad in ["http://auth.example/token", "/token", "ftp://x", "https://u:p@x/", "https://"] {
            assert_eq!(realm("https://r/v2/", bad), None, "{bad}");
        }
    }

    #[test]
    fn the_header_of_a_password_is_sensitive() {
        let value = basic("Aladdin", "open sesame").unwrap();
        assert_eq!(value.to_str().unwrap(), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(format!("{value:?}"), "Sensitive");
        assert!(sensitive("a\nb").is_err());
    }
}
