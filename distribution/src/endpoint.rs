//! One host of a registry: a request with its redirects, its answers to challenges, and its further attempts.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, HeaderMap, LOCATION, USER_AGENT};
use http::{HeaderName, HeaderValue, Method, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use serde::Deserialize;
use tokio::sync::OnceCell;
use tracing::{debug, info};

use crate::auth::{self, Asker, Authorizer};
use crate::error::{Error, is_transient_status};
use crate::hosts::{Capabilities, Host};
use crate::policy::Policy;
use crate::registry::{Options, Retry};
use crate::retry::{self, Backoff};
use crate::transport::{Call, RequestBody, Response, Transport};
use crate::upload::Blob;
use crate::uri::{self, Origin};

/// What the client calls itself.
pub(crate) const AGENT: &str = concat!("davit/", env!("CARGO_PKG_VERSION"));
/// The most redirects of one request; browsers and Go's client have ten.
const MAX_REDIRECTS: usize = 10;
/// How many challenges one request answers: the first one, and one because a token was too old or had too few scopes.
const MAX_CHALLENGES: u32 = 2;
/// The most bytes of an error's body.
const MAX_ERROR: u64 = 64 << 10;
/// How much of a registry's words is shown.
const MAX_MESSAGE: usize = 512;

/// A host that serves a registry, ready to be asked.
#[derive(Debug)]
pub(crate) struct Endpoint {
    host: Host,
    /// The registry that it stands in for.
    mirror_of: Option<String>,
    /// Those of the client and those of the host.
    headers: Vec<(HeaderName, HeaderValue)>,
    retry: Retry,
    transport: Arc<Transport>,
    authorizer: Authorizer,
    /// Whether connections are encrypted, once it is known.
    https: OnceCell<bool>,
}

/// What a request is sent to.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// A path below the API's root, with its query.
    Path(String),
    /// An address that the host named, and where it may lead.
    Named(Uri, Policy),
}

/// What a request carries.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    /// These bytes, or none.
    Bytes(Bytes),
    /// A blob, read anew for each attempt.
    Blob(Blob),
}

impl Payload {
    fn size(&self) -> u64 {
        match self {
            Payload::Bytes(bytes) => bytes.len() as u64,
            Payload::Blob(blob) => blob.size(),
        }
    }

    fn body(&self, sent: &Arc<AtomicU64>) -> RequestBody {
        match self {
            Payload::Bytes(bytes) => Full::new(bytes.clone()).map_err(|never| match never {}).boxed_unsync(),
            Payload::Blob(blob) => blob.body(sent.clone()),
        }
    }
}

/// A request, to be sent as often as it takes.
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Payload,
    pub(crate) scopes: &'a [String],
    /// Whether no other host can be asked instead: only then is a host that is down or busy asked again.
    pub(crate) last: bool,
}

impl<'a> Ask<'a> {
    /// A request without body.
    pub(crate) fn new(method: Method, path: String, scopes: &'a [String]) -> Ask<'a> {
        Ask {
            method,
            target: Target::Path(path),
            headers: HeaderMap::new(),
            payload: Payload::Bytes(Bytes::new()),
            scopes,
            last: true,
        }
    }

    /// The media types that are wanted.
    pub(crate) fn accept(mut self, types: &[&str]) -> Ask<'a> {
        if let Ok(value) = types.join(", ").parse() {
            self.headers.insert(ACCEPT, value);
        }
        self
    }

    fn has_body(&self) -> bool {
        self.payload.size() > 0 || matches!(self.method, Method::POST | Method::PUT | Method::PATCH)
    }
}

/// One attempt that came to nothing, and whether another one may help.
struct Failure {
    error: Error,
    again: bool,
}

/// A response with how it was asked for.
struct Answered {
    response: Response,
    authorization: Option<HeaderValue>,
    /// Whether it comes from the configured host itself.
    own: bool,
}

impl Endpoint {
    pub(crate) fn new(
        host: Host,
        mirror_of: Option<String>,
        options: &Options,
        transport: Arc<Transport>,
        authorizer: Authorizer,
    ) -> Endpoint {
        let mut headers: Vec<_> = options.headers.iter().chain(&host.settings.headers).cloned().collect();
        // Any of them may be a key.
        headers.iter_mut().for_each(|(_, value)| value.set_sensitive(true));
        let https = OnceCell::new();
        Endpoint { host, mirror_of, headers, retry: options.retry, transport, authorizer, https }
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        self.host.capabilities
    }

    /// The name of the host, for logs.
    pub(crate) fn name(&self) -> &str {
        &self.host.authority
    }

    /// Whether the host is spoken to with TLS. Where the configuration leaves that open, the host is asked once.
    async fn https(&self) -> bool {
        if !self.host.tries_tls_first() {
            return self.host.https;
        }
        let probe = async {
            let Ok(uri) = format!("https://{}/", self.host.authority).parse::<Uri>() else { return false };
            let plain = self.transport.speaks_no_tls(&uri).await;
            if plain {
                info!(host = self.host.authority, "the host speaks no TLS: continuing without");
            }
            !plain
        };
        *self.https.get_or_init(|| probe).await
    }

    async fn address(&self, target: &Target) -> Result<Uri, Error> {
        let path = match target {
            Target::Named(uri, _) => return Ok(uri.clone()),
            Target::Path(path) => path,
        };
        let scheme = if self.https().await { "https" } else { "http" };
        let text = format!("{scheme}://{}{}/{path}", self.host.authority, self.host.path);
        let malformed = || Error::Malformed { url: text.clone(), reason: "it is no address" };
        let uri: Uri = text.parse().map_err(|_| malformed())?;
        match &self.mirror_of {
            Some(registry) => uri::with_query(&uri, "ns", registry).ok_or_else(malformed),
            None => Ok(uri),
        }
    }

    /// Sends a request until there is a response that is no challenge, no redirect, and not "later".
    ///
    /// # Errors
    /// No response; [`Error::Unauthorized`]; a challenge that cannot be answered; a redirect that is not followed.
    /// Responses with other statuses are the caller's to judge.
    pub(crate) async fn send(&self, ask: &Ask<'_>) -> Result<Response, Error> {
        let first = self.address(&ask.target).await?;
        let asker = Asker { scopes: ask.scopes, retry: self.retry };
        let mut method = ask.method.clone();
        let mut backoff = Backoff::new(self.retry);
        let mut challenges = 0;
        loop {
            let answered = match self.follow(ask, &method, &first, &asker).await {
                Ok(answered) => answered,
                Err(Failure { error, again }) => {
                    let pause = if again && ask.last { backoff.after_failure(None) } else { None };
                    let Some(pause) = pause else { return Err(error) };
                    debug!(host = self.host.authority, error = %davit_model::error::chain(&error), "trying again");
                    tokio::time::sleep(pause).await;
                    continue;
                }
            };
            let Answered { response, authorization, own } = answered;
            if response.status == StatusCode::UNAUTHORIZED {
                challenges += 1;
                if challenges > MAX_CHALLENGES {
                    return Err(auth::refusal(&response.headers));
                }
                // Its place must be free while a token service is asked or waited for: that may need the same.
                let head = response.discard().await;
                self.authorizer.challenged(&head, authorization.as_ref(), &asker, own).await?;
            } else if response.status == StatusCode::METHOD_NOT_ALLOWED
                && method == Method::HEAD
                && first.path().contains("/manifests/")
            {
                // Some registries never learnt HEAD for manifests.
                method = Method::GET;
                drop(response);
            } else if is_transient_status(response.status) && ask.last {
                let asked = retry::asked(&response.headers);
                let Some(pause) = backoff.after_failure(asked) else { return Ok(response) };
                debug!(host = self.host.authority, status = %response.status, "trying again");
                response.discard().await;
                tokio::time::sleep(pause).await;
            } else {
                return Ok(response);
            }
        }
    }

    /// Sends a request once, and once more for each redirect.
    async fn follow(
        &self,
        ask: &Ask<'_>,
        method: &Method,
        first: &Uri,
        asker: &Asker<'_>,
    ) -> Result<Answered, Failure> {
        let final_error = |error| Failure { error, again: false };
        let home = self.address(&Target::Path(String::new())).await.map_err(final_error)?;
        let home = Origin::of(&home);
        let mut policy = match &ask.target {
            Target::Path(_) => Policy::Configured,
            Target::Named(_, policy) => *policy,
        };
        let mut current = first.clone();
        for _ in 0..=MAX_REDIRECTS {
            let own = Origin::of(&current) == home;
            let authorization = self.authorizer.authorize(&current, asker).await.map_err(final_error)?;
            let sent = Arc::new(AtomicU64::new(0));
            let call = Call {
                method: method.clone(),
                uri: current.clone(),
                headers: self.request_headers(ask, own, authorization.clone()),
                body: ask.payload.body(&sent),
                sent,
                policy: if own { Policy::Configured } else { policy },
                strict: false,
            };
            let url = uri::shown(&current);
            debug!(%method, url, "request");
            let response = self.transport.send(call).await.map_err(|source| Failure {
                again: source.is_transient(),
                error: Error::Transport { method: method.clone(), url: url.clone(), source },
            })?;
            debug!(%method, url, status = %response.status, "response");
            if !is_followed(method, response.status) {
                return Ok(Answered { response, authorization, own });
            }
            let refused = |reason| final_error(Error::Redirect { url: url.clone(), reason });
            let location =
                response.header(LOCATION.as_str()).ok_or_else(|| refused("it names no address"))?;
            let next = uri::join(&current, location).ok_or_else(|| refused("it names no address of HTTP"))?;
            if current.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(refused("it leads to an address that is not encrypted"));
            }
            if policy == Policy::Configured {
                policy = Policy::named_by(response.peer);
            }
            response.discard().await;
            current = next;
        }
        let url = uri::shown(first);
        Err(final_error(Error::Redirect { url, reason: "there were ten before it" }))
    }

    /// The headers of the client and of the host go to the host alone; what the request needs goes along.
    fn request_headers(&self, ask: &Ask<'_>, own: bool, authorization: Option<HeaderValue>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        // Compression on the way would hide the bytes that the digest is of.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if own {
            for (name, _) in &self.headers {
                headers.remove(name);
            }
            for (name, value) in &self.headers {
                headers.append(name.clone(), value.clone());
            }
        }
        for (name, value) in &ask.headers {
            headers.insert(name.clone(), value.clone());
        }
        if ask.has_body() {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(ask.payload.size()));
        }
        if let Some(value) = authorization {
            headers.insert(AUTHORIZATION, value);
        }
        headers
    }
}

/// Whether a status is a redirect of this method: one that asks for another method is none of a request with a body.
fn is_followed(method: &Method, status: StatusCode) -> bool {
    match status.as_u16() {
        307 | 308 => true,
        301..=303 => matches!(*method, Method::GET | Method::HEAD),
        _ => false,
    }
}

/// The error that a response with an unexpected status is, with the registry's own words.
pub(crate) async fn failure(mut response: Response, method: Method) -> Error {
    let url = response.shown();
    let status = response.status;
    let body = if method == Method::HEAD { None } else { response.bytes(MAX_ERROR).await.ok().flatten() };
    if status == StatusCode::NOT_FOUND {
        return Error::NotFound { what: format!("content at {url} not found") };
    }
    Error::Status { method, url, status, message: body.and_then(|body| message(&body)) }
}

/// The first error of the body (distribution spec, "Error Codes"), in one line.
fn message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Body {
        errors: Vec<Reported>,
    }
    #[derive(Deserialize)]
    #[serde(default)]
    #[derive(Default)]
    struct Reported {
        code: String,
        message: String,
    }
    let first = serde_json::from_slice::<Body>(body).ok()?.errors.into_iter().next()?;
    let text = match (first.code.as_str(), first.message.as_str()) {
        ("", "") => return None,
        (code, "") => code.to_lowercase().replace('_', " "),
        ("", message) => message.to_owned(),
        (code, message) => format!("{}: {message}", code.to_lowercase().replace('_', " ")),
    };
    Some(text.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_registry_are_one_short_line() {
        let body = br#"{"errors":[{"code":"NAME_UNKNOWN","message":"no\nsuch repository","detail":{}}]}"#;
        assert_eq!(message(body).as_deref(), Some("name unknown: nosuch repository"));
        assert_eq!(message(br#"{"errors":[{"code":"DENIED"}]}"#).as_deref(), Some("denied"));
        assert_eq!(message(b"<html>"), None);
        assert_eq!(message(br#"{"errors":[]}"#), None);
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "x".repeat(10_000));
        assert_eq!(message(long.as_bytes()).map(|text| text.len()), Some(MAX_MESSAGE));
    }

    #[test]
    fn a_body_is_only_sent_on_where_the_method_stays() {
        for status in [301, 302, 303, 307, 308] {
            let status = StatusCode::from_u16(status).unwrap();
            assert!(is_followed(&Method::GET, status));
            assert_eq!(is_followed(&Method::PUT, status), status.as_u16() >= 307);
        }
        assert!(!is_followed(&Method::GET, StatusCode::NOT_MODIFIED));
    }
}
