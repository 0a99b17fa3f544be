//! [`Repository`]: one repository of a registry, and the hosts that may serve it.

use std::sync::Arc;

use davit_model::Digest;
use davit_oci::reference::Reference;
use http::Method;
use serde::Deserialize;
use tracing::info;

use crate::endpoint::{Ask, Endpoint, failure};
use crate::error::Error;
use crate::hosts::Capabilities;
use crate::transport::Response;
use crate::uri;

/// The header in which registries tell the digest of what they send or took.
pub(crate) const DIGEST_HEADER: &str = "docker-content-digest";
/// The most bytes of a page of tags.
const MAX_PAGE: u64 = 4 << 20;
/// The most tags that are listed.
const MAX_TAGS: usize = 100_000;

/// A repository. Clones share their tokens and connections.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) reference: Reference,
    pub(crate) endpoints: Arc<Vec<Endpoint>>,
}

/// What is done, which decides on the hosts and on the scope that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Pull,
    Resolve,
    Push,
    Referrers,
}

impl Operation {
    fn allowed(self, capabilities: Capabilities) -> bool {
        match self {
            Operation::Pull => capabilities.pull,
            Operation::Resolve => capabilities.pull && capabilities.resolve,
            Operation::Push => capabilities.push,
            Operation::Referrers => capabilities.referrers,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Operation::Pull => "pull",
            Operation::Resolve => "resolve",
            Operation::Push => "push",
            Operation::Referrers => "referrers",
        }
    }
}

impl Repository {
    pub(crate) fn new(reference: Reference, endpoints: Vec<Endpoint>) -> Repository {
        Repository { reference, endpoints: Arc::new(endpoints) }
    }

    /// The hosts for an operation, with their places in the list of all, but for those at the `excluded` places.
    pub(crate) fn hosts(
        &self,
        operation: Operation,
        excluded: &[usize],
    ) -> Result<Vec<(usize, &Endpoint)>, Error> {
        let all = self.endpoints.iter().enumerate();
        let hosts: Vec<_> = all
            .filter(|(place, endpoint)| {
                operation.allowed(endpoint.capabilities()) && !excluded.contains(place)
            })
            .collect();
        if hosts.is_empty() { Err(Error::NoHosts { operation: operation.name() }) } else { Ok(hosts) }
    }

    /// The scopes of an operation (token specification, "Resource Scope").
    pub(crate) fn scopes(&self, operation: Operation) -> Vec<String> {
        let actions = if operation == Operation::Push { "pull,push" } else { "pull" };
        vec![format!("repository:{}:{actions}", self.reference.path())]
    }

    /// A path in the repository.
    pub(crate) fn path(&self, rest: &str) -> String {
        format!("{}/{rest}", self.reference.path())
    }

    /// The tags of the repository, as the first host that may resolve lists them.
    ///
    /// # Errors
    /// [`Error::TooMany`] if there are more than anybody could read; those of a request.
    pub async fn tags(&self) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let hosts = self.hosts(Operation::Resolve, &[])?;
        let scopes = self.scopes(Operation::Resolve);
        let (_, endpoint) = hosts[0];
        let mut tags = Vec::new();
        let mut path = self.path("tags/list");
        loop {
            let mut response = endpoint.send(&Ask::new(Method::GET, path.clone(), &scopes)).await?;
            if !response.status.is_success() {
                return Err(failure(response, Method::GET).await);
            }
            let url = response.shown();
            let malformed = |reason| Error::Malformed { url: url.clone(), reason };
            let bytes = response
                .bytes(MAX_PAGE)
                .await
                .map_err(|source| Error::Transport { method: Method::GET, url: url.clone(), source })?
                .ok_or_else(|| Error::TooLarge {
                    what: format!("the list of tags at {url}"),
                    limit: MAX_PAGE,
                })?;
            let page: Page =
                serde_json::from_slice(&bytes).map_err(|_| malformed("it is no list of tags"))?;
            let page = page.tags.unwrap_or_default();
            let next = response.header("link").and_then(next_page);
            let ends = page.is_empty();
            tags.extend(page);
            if tags.len() > MAX_TAGS {
                return Err(Error::TooMany { parts: "tags", limit: MAX_TAGS });
            }
            // Only the query of the next page is taken: it is this repository at this host that is listed.
            let Some(link) = next.filter(|_| !ends) else { return Ok(tags) };
            let next =
                uri::join(&response.uri, link).ok_or_else(|| malformed("its next page has no address"))?;
            path = self.path(&format!("tags/list?{}", next.query().unwrap_or_default()));
        }
    }
}

/// The target of `Link: <…>; rel="next"` (RFC 8288).
fn next_page(header: &str) -> Option<&str> {
    let (target, parameters) = header.trim_start().strip_prefix('<')?.split_once('>')?;
    let next = parameters.split(';').any(|one| one.trim().replace('"', "").eq_ignore_ascii_case("rel=next"));
    next.then_some(target)
}

/// The error to tell when all hosts failed: that of the request that came farthest, the first of several.
#[derive(Debug, Default)]
pub(crate) struct Worst(Option<Error>);

impl Worst {
    /// Notes the failure of a host.
    pub(crate) fn note(&mut self, host: &str, error: Error) {
        info!(host, error = %davit_model::error::chain(&error), "a host of the registry failed");
        if self.0.as_ref().is_none_or(|before| before.rank() < error.rank()) {
            self.0 = Some(error);
        }
    }

    /// The error to tell.
    pub(crate) fn into_error(self, otherwise: impl FnOnce() -> Error) -> Error {
        self.0.unwrap_or_else(otherwise)
    }
}

/// Refuses a response that tells another digest of the same algorithm; what comes without one is checked by its bytes.
pub(crate) fn check_digest(response: &Response, expected: &Digest) -> Result<(), Error> {
    let is_other = |told: &&str| {
        told.split(':').next() == Some(expected.algorithm().as_str()) && *told != expected.as_str()
    };
    let Some(told) = response.header(DIGEST_HEADER).filter(is_other) else { return Ok(()) };
    Err(Error::WrongDigest { url: response.shown(), actual: told.to_owned(), expected: expected.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page() {
        assert_eq!(next_page(r#"</v2/a/tags/list?last=b>; rel="next""#), Some("/v2/a/tags/list?last=b"));
        assert_eq!(next_page("<x>; rel=prev"), None);
        assert_eq!(next_page("x; rel=next"), None);
    }
}
