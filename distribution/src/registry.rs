//! [`Registry`]: what all repositories of a client share.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use davit_oci::reference::Reference;
use http::{HeaderName, HeaderValue, Method};
use hyper_util::client::proxy::matcher::Matcher;

use crate::auth::Authorizer;
use crate::credentials::CredentialSource;
use crate::endpoint::{Ask, Endpoint, failure};
use crate::error::Error;
use crate::hosts::{self, HostOptions, HostsError};
use crate::repository::Repository;
use crate::tls::{self, Roots};
use crate::transport::{Shared, Transport};

/// How many connections there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// To one host and port.
    pub connections_per_host: usize,
    /// To all.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections_per_host: 16, connections: 64 }
    }
}

/// How long is waited for what. Nothing limits the whole of a transfer: a large layer may take its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, unless `dial_timeout` of its host says otherwise.
    pub connect: Duration,
    /// For a TLS handshake.
    pub handshake: Duration,
    /// For the head of a response, after the request's body stopped being taken.
    pub response: Duration,
    /// For the next bytes of a response.
    pub idle: Duration,
    /// In this time of waiting at least `least` bytes of a response must come.
    pub window: Duration,
    /// See `window`.
    pub least: u64,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        // The first three are containerd's.
        Timeouts {
            connect: Duration::from_secs(30),
            handshake: Duration::from_secs(10),
            response: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            window: Duration::from_secs(60),
            least: 16 << 10,
        }
    }
}

/// How often and when something is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// The most attempts of one request, the first one included.
    pub attempts: u32,
    /// The pause after the first failure; it doubles with each further one.
    pub first: Duration,
    /// The longest pause of our own choice.
    pub longest: Duration,
    /// The longest pause that a server may ask for with `Retry-After`; a longer one is a failure.
    pub longest_asked: Duration,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry {
            attempts: 5,
            first: Duration::from_millis(200),
            longest: Duration::from_secs(10),
            longest_asked: Duration::from_secs(60),
        }
    }
}

/// How a client is made.
#[derive(Clone, Default)]
pub struct Options {
    /// Where the configuration of hosts is.
    pub hosts: HostOptions,
    /// Where credentials come from; without one all requests are anonymous.
    pub credentials: Option<Arc<dyn CredentialSource>>,
    /// Headers of all requests to registries.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// See [`Limits`].
    pub limits: Limits,
    /// See [`Timeouts`].
    pub timeouts: Timeouts,
    /// See [`Retry`].
    pub retry: Retry,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Headers may be keys.
        f.debug_struct("Options")
            .field("hosts", &self.hosts)
            .field("headers", &self.headers.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .field("limits", &self.limits)
            .field("timeouts", &self.timeouts)
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}

/// A client of registries. Clones share connections' limits and roots of trust.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: Options,
    shared: Arc<Shared>,
    roots: Roots,
}

impl Registry {
    /// A client that takes its proxies from the environment: `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, in capitals
    /// or not, as Go's programs do.
    pub fn new(options: Options) -> Registry {
        let [http, https, none] = proxies(|name| std::env::var(name).ok());
        Registry::with_proxies(options, &http, &https, &none)
    }

    /// A client with the given proxies for `http` and `https`, and the hosts that need none.
    pub fn with_proxies(options: Options, http: &str, https: &str, none: &str) -> Registry {
        let proxies = Matcher::builder().http(http).https(https).no(none).build();
        let shared = Arc::new(Shared::new(proxies, options.timeouts, options.limits));
        Registry { inner: Arc::new(Inner { options, shared, roots: Roots::default() }) }
    }

    /// The repository of a reference, with the hosts that are configured for its registry now.
    ///
    /// # Errors
    /// [`Error::Hosts`].
    pub async fn repository(&self, reference: &Reference) -> Result<Repository, Error> {
        let (inner, registry) = (self.inner.clone(), reference.domain().to_owned());
        let endpoints = tokio::task::spawn_blocking(move || inner.endpoints(&registry))
            .await
            .map_err(|_| Error::Task { task: "reading the configuration of hosts" })?
            .map_err(|source| Error::Hosts { registry: reference.domain().to_owned(), source })?;
        Ok(Repository::new(reference.clone(), endpoints))
    }

    /// Asks a registry, and none of its mirrors, whether it takes the credentials (distribution spec, "Determining
    /// Support").
    ///
    /// # Errors
    /// [`Error::Unauthorized`] if it does not; those of a request.
    pub async fn check(&self, registry: &str) -> Result<(), Error> {
        let (inner, name) = (self.inner.clone(), registry.to_owned());
        let endpoints = tokio::task::spawn_blocking(move || inner.endpoints(&name))
            .await
            .map_err(|_| Error::Task { task: "reading the configuration of hosts" })?
            .map_err(|source| Error::Hosts { registry: registry.to_owned(), source })?;
        // Mirrors come before it.
        let endpoint = endpoints.last().ok_or(Error::NoHosts { operation: "login" })?;
        let response = endpoint.send(&Ask::new(Method::GET, String::new(), &[])).await?;
        if response.status.is_success() { Ok(()) } else { Err(failure(response, Method::GET).await) }
    }
}

/// The proxies for `http` and for `https`, and the hosts without, by variables of the environment.
fn proxies(variable: impl Fn(&str) -> Option<String>) -> [String; 3] {
    let either = |name: &str| {
        let found = variable(name).filter(|value| !value.is_empty());
        found.or_else(|| variable(&name.to_lowercase())).unwrap_or_default()
    };
    // In a CGI program HTTP_PROXY is a header of its client (CVE-2016-5385).
    let http = if variable("REQUEST_METHOD").is_some() { String::new() } else { either("HTTP_PROXY") };
    [http, either("HTTPS_PROXY"), either("NO_PROXY")]
}

impl Inner {
    fn endpoints(&self, registry: &str) -> Result<Vec<Endpoint>, HostsError> {
        let hosts = hosts::load(&self.options.hosts, registry)?;
        hosts
            .into_iter()
            .map(|host| {
                let tls = tls::configure(&self.roots, &host.settings)?;
                let transport =
                    Arc::new(Transport::new(self.shared.clone(), tls, host.settings.dial_timeout));
                let authorizer =
                    Authorizer::new(&host.authority, self.options.credentials.clone(), transport.clone());
                let mirror_of = host.is_mirror_of(registry).then(|| registry.to_owned());
                Ok(Endpoint::new(host, mirror_of, &self.options, transport, authorizer))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_those_of_the_environment() {
        let of = |variables: &[(&str, &str)]| {
            proxies(|name| {
                variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(of(&[]), ["", "", ""]);
        assert_eq!(of(&[("HTTP_PROXY", "a"), ("http_proxy", "b"), ("https_proxy", "c")]), ["a", "c", ""]);
        assert_eq!(of(&[("HTTPS_PROXY", ""), ("https_proxy", "c"), ("NO_PROXY", "x,y")]), ["", "c", "x,y"]);
        assert_eq!(
            of(&[("HTTP_PROXY", "a"), ("HTTPS_PROXY", "c"), ("REQUEST_METHOD", "GET")]),
            ["", "c", ""]
        );
    }

    #[test]
    fn debug_shows_no_header() {
        let headers = vec![("x-key".parse().unwrap(), "hunter2".parse().unwrap())];
        let registry = Registry::with_proxies(
            Options { headers, ..Options::default() },
            "http://user:hunter2@proxy.example:3128",
            "http://user:hunter2@proxy.example:3128",
            "",
        );
        assert!(!format!("{registry:?}").contains("hunter2"), "{registry:?}");
    }
}
