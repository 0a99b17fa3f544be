//! Token services: the token specification of the distribution project, and its OAuth 2 form.
//!
//! With credentials the OAuth form is tried first (`POST`); services that do not have it answer 400, 401, 404 or 405,
//! and are asked with `GET` and basic authorization from then on. Without credentials it is `GET` at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, USER_AGENT};
use http::{HeaderValue, Method, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::{Asker, basic, sensitive};
use crate::challenge::Challenge;
use crate::credentials::Credentials;
use crate::endpoint::{AGENT, failure};
use crate::error::{Error, is_transient_status};
use crate::policy::Policy;
use crate::retry::{self, Backoff};
use crate::transport::{Call, Response, Transport};
use crate::uri;

/// The most bytes of a token service's answer. Tokens with many groups in them have tens of kilobytes.
const MAX_ANSWER: u64 = 1 << 20;
/// How long a token is good for if its service does not say (token specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// The most tokens that are kept for a realm.
const MAX_TOKENS: usize = 64;
/// What the client calls itself to token services. Some know only certain clients, and containerd's is one.
const CLIENT_ID: &str = "containerd-client";

/// A realm with its tokens.
#[derive(Debug)]
pub(crate) struct Realm {
    address: Uri,
    service: String,
    credentials: Credentials,
    policy: Policy,
    get_only: AtomicBool,
    /// Held while a token is fetched: who needs the same waits, and finds it here.
    tokens: Mutex<Tokens>,
}

#[derive(Debug, Default)]
struct Tokens {
    /// Scopes that the host asked for beyond those that requests bring.
    more: Vec<String>,
    by_scopes: HashMap<Vec<String>, Token>,
}

#[derive(Debug)]
struct Token {
    header: HeaderValue,
    until: Option<Instant>,
}

/// The answer, in both forms.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
    #[serde(default)]
    expires_in: i64,
}

impl Realm {
    pub(super) fn new(
        address: Uri,
        challenge: &Challenge,
        credentials: Credentials,
        policy: Policy,
    ) -> Realm {
        let service = challenge.parameter("service").unwrap_or_default().to_owned();
        let tokens = Tokens { more: scopes(challenge), by_scopes: HashMap::new() };
        let (get_only, tokens) = (AtomicBool::new(false), Mutex::new(tokens));
        Realm { address, service, credentials, policy, get_only, tokens }
    }

    /// Whether a challenge names this realm again.
    pub(super) fn is_named_by(&self, challenge: &Challenge) -> bool {
        let service = challenge.parameter("service").unwrap_or_default();
        challenge.parameter("realm").and_then(|text| text.parse::<Uri>().ok()).as_ref() == Some(&self.address)
            && service == self.service
    }

    /// A token was refused: it is forgotten, unless another request has already got a new one; and the scopes that the
    /// host asks for are added.
    pub(super) async fn refused(&self, challenge: &Challenge, used: Option<&HeaderValue>, asker: &Asker<'_>) {
        let mut tokens = self.tokens.lock().await;
        let key = tokens.key(asker.scopes);
        if tokens.by_scopes.get(&key).is_some_and(|token| Some(&token.header) == used) {
            tokens.by_scopes.remove(&key);
        }
        for scope in scopes(challenge) {
            if !tokens.more.contains(&scope) && tokens.more.len() < MAX_TOKENS {
                tokens.more.push(scope);
            }
        }
    }

    /// The header with a token for these scopes.
    pub(super) async fn token(&self, transport: &Transport, asker: &Asker<'_>) -> Result<HeaderValue, Error> {
        let mut tokens = self.tokens.lock().await;
        let key = tokens.key(asker.scopes);
        if let Some(token) = tokens.by_scopes.get(&key)
            && token.until.is_none_or(|until| Instant::now() < until)
        {
            return Ok(token.header.clone());
        }
        let answer = self.fetch(transport, &key, asker).await?;
        let text = if answer.access_token.is_empty() { answer.token } else { answer.access_token };
        let unusable = |reason| Error::Token { url: uri::shown(&self.address), reason };
        if text.is_empty() {
            return Err(unusable("it did not include a token"));
        }
        let header = sensitive(&format!("Bearer {text}")).map_err(unusable)?;
        let life = match u64::try_from(answer.expires_in) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => DEFAULT_LIFE,
        };
        // A tenth less, for the way of the request; a service that names an absurd time means "for ever".
        let until = Instant::now().checked_add(life.mul_f64(0.9));
        if tokens.by_scopes.len() >= MAX_TOKENS {
            tokens.by_scopes.clear();
        }
        tokens.by_scopes.insert(key, Token { header: header.clone(), until });
        Ok(header)
    }

    async fn fetch(
        &self,
        transport: &Transport,
        scopes: &[String],
        asker: &Asker<'_>,
    ) -> Result<Answer, Error> {
        if let Some(form) = self.form(scopes)
            && !self.get_only.load(Ordering::Relaxed)
        {
            let (status, answer) = self.ask(transport, asker, |realm| realm.post(&form)).await?;
            match answer {
                Ok(answer) => return Ok(answer),
                // An identity token has no other form.
                Err(error) => match (status.as_u16(), &self.credentials) {
                    (400 | 401 | 404 | 405, Credentials::Password { .. }) => {
                        self.get_only.store(true, Ordering::Relaxed);
                    }
                    _ => return Err(error),
                },
            }
        }
        self.ask(transport, asker, |realm| realm.get(scopes)).await?.1
    }

    /// The OAuth form, if there is something to say in it.
    fn form(&self, scopes: &[String]) -> Option<String> {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("service", &self.service).append_pair("client_id", CLIENT_ID);
        if !scopes.is_empty() {
            form.append_pair("scope", &scopes.join(" "));
        }
        match &self.credentials {
            Credentials::Password { username, password } => {
                form.append_pair("grant_type", "password");
                form.append_pair("username", username).append_pair("password", password.expose());
            }
            Credentials::IdentityToken(token) => {
                form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token.expose());
            }
            Credentials::Anonymous | Credentials::Header(_) => return None,
        }
        Some(form.finish())
    }

    fn post(&self, form: &str) -> Result<Call, &'static str> {
        let mut headers = self.headers();
        let kind = HeaderValue::from_static("application/x-www-form-urlencoded; charset=utf-8");
        headers.insert(CONTENT_TYPE, kind);
        Ok(self.call(Method::POST, self.address.clone(), headers, Bytes::copy_from_slice(form.as_bytes())))
    }

    fn get(&self, scopes: &[String]) -> Result<Call, &'static str> {
        let mut address = self.address.clone();
        let service = (!self.service.is_empty()).then_some(("service", self.service.as_str()));
        let scopes = scopes.iter().map(|scope| ("scope", scope.as_str()));
        for (name, value) in service.into_iter().chain(scopes) {
            address = uri::with_query(&address, name, value).ok_or("its realm is no address")?;
        }
        let mut headers = self.headers();
        if let Credentials::Password { username, password } = &self.credentials {
            headers.insert(AUTHORIZATION, basic(username, password.expose())?);
        }
        Ok(self.call(Method::GET, address, headers, Bytes::new()))
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers
    }

    fn call(&self, method: Method, uri: Uri, mut headers: HeaderMap, body: Bytes) -> Call {
        if !body.is_empty() {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        Call {
            method,
            uri,
            headers,
            body: Full::new(body).map_err(|never| match never {}).boxed_unsync(),
            sent: Arc::new(AtomicU64::new(0)),
            policy: self.policy,
            strict: self.policy != Policy::Configured,
        }
    }

    /// Asks, again if the service is busy; redirects are not followed, since they would take the secrets along.
    async fn ask(
        &self,
        transport: &Transport,
        asker: &Asker<'_>,
        call: impl Fn(&Realm) -> Result<Call, &'static str>,
    ) -> Result<(StatusCode, Result<Answer, Error>), Error> {
        let url = uri::shown(&self.address);
        let mut backoff = Backoff::new(asker.retry);
        loop {
            let call = call(self).map_err(|reason| Error::Token { url: url.clone(), reason })?;
            let method = call.method.clone();
            match transport.send(call).await {
                Ok(response) if is_transient_status(response.status) => {
                    let asked = retry::asked(&response.headers);
                    let Some(pause) = backoff.after_failure(asked) else {
                        return Ok((response.status, Err(failure(response, method).await)));
                    };
                    drop(response);
                    tokio::time::sleep(pause).await;
                }
                Ok(response) => {
                    let status = response.status;
                    if !status.is_success() {
                        return Ok((status, Err(failure(response, method).await)));
                    }
                    return Ok((status, read(response, &url, &method).await));
                }
                Err(source) => {
                    let pause = if source.is_transient() { backoff.after_failure(None) } else { None };
                    let Some(pause) = pause else { return Err(Error::Transport { method, url, source }) };
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }
}

async fn read(mut response: Response, url: &str, method: &Method) -> Result<Answer, Error> {
    let transport = |source| Error::Transport { method: method.clone(), url: url.to_owned(), source };
    let unusable = |reason| Error::Token { url: url.to_owned(), reason };
    let bytes =
        response.bytes(MAX_ANSWER).await.map_err(transport)?.ok_or_else(|| unusable("it is too large"))?;
    // The parser's words could quote the token.
    serde_json::from_slice(&bytes).map_err(|_| unusable("it is not the JSON that it should be"))
}

fn scopes(challenge: &Challenge) -> Vec<String> {
    let text = challenge.parameter("scope").unwrap_or_default();
    text.split(' ').filter(|scope| !scope.is_empty()).map(str::to_owned).collect()
}

impl Tokens {
    /// The scopes of a request and those that the host asked for, each once, in order.
    fn key(&self, scopes: &[String]) -> Vec<String> {
        let mut all: Vec<String> = scopes.iter().chain(&self.more).cloned().collect();
        all.sort();
        all.dedup();
        all
    }
}
