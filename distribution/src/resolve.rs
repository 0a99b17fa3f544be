//! From a name to a descriptor.
//!
//! A tag is resolved by hosts that may resolve; a digest by all that may be pulled from. `HEAD` is enough where the
//! host tells type, digest and size in its headers; otherwise the manifest itself is fetched and hashed.

use davit_content_store::Hasher;
use davit_model::{Algorithm, Digest};
use davit_oci::image::{Descriptor, MAX_DOCUMENT_SIZE};
use davit_oci::media_type;
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode};
use tracing::debug;

use crate::endpoint::{Ask, Endpoint, failure};
use crate::error::Error;
use crate::repository::{DIGEST_HEADER, Operation, Repository, Worst};
use crate::transport::Response;

/// What a name may stand for.
const ACCEPTED: [&str; 5] = [
    media_type::DOCKER_MANIFEST,
    media_type::DOCKER_INDEX,
    media_type::OCI_MANIFEST,
    media_type::OCI_INDEX,
    "*/*",
];
/// Manifests of the first schema, which have not been in use for years and are not supported by containerd 2 either.
const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+";

impl Repository {
    /// The descriptor of what the reference names: by its digest if it has one, else by its tag.
    ///
    /// # Errors
    /// [`Error::NoObject`]; [`Error::NotFound`]; [`Error::Denied`]; what the host that came farthest had to say.
    pub async fn resolve(&self) -> Result<Descriptor, Error> {
        let reference = &self.reference;
        let (object, operation) = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => (digest.to_string(), Operation::Pull),
            (None, Some(tag)) => (tag.to_owned(), Operation::Resolve),
            (None, None) => return Err(Error::NoObject { reference: reference.to_string() }),
        };
        let mut places = vec![format!("manifests/{object}")];
        if reference.digest().is_some() {
            // Any content has a digest, and a descriptor.
            places.push(format!("blobs/{object}"));
        }
        let hosts = self.hosts(operation, &[])?;
        let scopes = self.scopes(operation);
        let mut worst = Worst::default();
        for place in places {
            for (index, (_, endpoint)) in hosts.iter().enumerate() {
                let last = index + 1 == hosts.len();
                let path = self.path(&place);
                match resolve_at(endpoint, path, &scopes, last, reference.digest()).await {
                    Ok(descriptor) => {
                        debug!(%reference, digest = %descriptor.digest, host = endpoint.name(), "resolved");
                        return Ok(descriptor);
                    }
                    Err(Error::NotFound { .. }) => {
                        worst.note(endpoint.name(), Error::NotFound { what: reference.to_string() });
                    }
                    Err(error @ Error::Unauthorized { .. }) => {
                        let error = Error::Denied { operation: "pull", source: Box::new(error) };
                        worst.note(endpoint.name(), error);
                    }
                    Err(error) => worst.note(endpoint.name(), error),
                }
            }
        }
        Err(worst.into_error(|| Error::NotFound { what: reference.to_string() }))
    }
}

async fn resolve_at(
    endpoint: &Endpoint,
    path: String,
    scopes: &[String],
    last: bool,
    wanted: Option<&Digest>,
) -> Result<Descriptor, Error> {
    let mut ask = Ask::new(Method::HEAD, path, scopes).accept(&ACCEPTED);
    ask.last = last;
    let response = endpoint.send(&ask).await?;
    if response.status == StatusCode::FORBIDDEN {
        // The answer to HEAD has no body; the one to GET says why.
        ask.method = Method::GET;
        let response = endpoint.send(&ask).await?;
        return Err(failure(response, Method::GET).await);
    }
    if !response.status.is_success() {
        let method = response.method.clone();
        return Err(failure(response, method).await);
    }
    let mut response = response;
    // A registry that does not know HEAD has sent the manifest already.
    if response.method == Method::HEAD {
        let told = digest_header(&response)?;
        let url = response.shown();
        if let (Some(told), Some(wanted)) = (&told, wanted)
            && told.algorithm() == wanted.algorithm()
            && told != wanted
        {
            return Err(Error::WrongDigest { url, actual: told.to_string(), expected: wanted.clone() });
        }
        if let (Some(size), Some(digest)) = (response.content_length(), wanted.cloned().or(told)) {
            return descriptor(&response, digest, size);
        }
        debug!(
            host = endpoint.name(),
            "the headers do not say digest and size, fetching the manifest instead"
        );
        drop(response);
        ask.method = Method::GET;
        response = endpoint.send(&ask).await?;
        if !response.status.is_success() {
            return Err(failure(response, Method::GET).await);
        }
    }
    let told = digest_header(&response)?;
    let url = response.shown();
    let bytes = response
        .bytes(MAX_DOCUMENT_SIZE)
        .await
        .map_err(|source| Error::Transport { method: Method::GET, url: url.clone(), source })?
        .ok_or_else(|| too_large(&url))?;
    let expected = wanted.cloned().or(told);
    let algorithm = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
    let actual = Hasher::digest_of(algorithm, &bytes);
    if let Some(expected) = expected
        && expected != actual
    {
        return Err(Error::WrongDigest { url, actual: actual.to_string(), expected });
    }
    descriptor(&response, actual, bytes.len() as u64)
}

fn too_large(url: &str) -> Error {
    Error::TooLarge { what: format!("the manifest at {url}"), limit: MAX_DOCUMENT_SIZE }
}

/// The digest in the header, if there is one.
fn digest_header(response: &Response) -> Result<Option<Digest>, Error> {
    let Some(text) = response.header(DIGEST_HEADER) else { return Ok(None) };
    let malformed = || Error::Malformed { url: response.shown(), reason: "its digest header is no digest" };
    text.parse().map(Some).map_err(|_| malformed())
}

fn descriptor(response: &Response, digest: Digest, size: u64) -> Result<Descriptor, Error> {
    let header = response.header(CONTENT_TYPE.as_str()).unwrap_or_default();
    let name = header.split(';').next().unwrap_or_default().trim();
    if name.starts_with(SCHEMA_1) || name == "text/plain" {
        return Err(Error::Descriptor { digest, reason: "manifests of schema 1 are not supported" });
    }
    let is_document = media_type::is_manifest(name) || media_type::is_index(name);
    if size > MAX_DOCUMENT_SIZE && is_document {
        return Err(too_large(&response.shown()));
    }
    if size == 0 {
        return Err(Error::Malformed { url: response.shown(), reason: "it has no bytes" });
    }
    Ok(Descriptor::new(name, digest, size))
}
