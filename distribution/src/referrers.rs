//! What refers to a manifest: signatures, attestations, lists of parts.

use davit_model::Digest;
use davit_oci::image::{self, Descriptor, MAX_DOCUMENT_SIZE};
use davit_oci::media_type;
use http::Method;

use crate::endpoint::{Ask, failure};
use crate::error::Error;
use crate::repository::{Operation, Repository, Worst};

impl Repository {
    /// The descriptors of manifests that name `digest` as their subject, by the API of distribution spec 1.1, or by
    /// the tag of the older scheme (`sha256-…`) where a registry does not have it. Filtering by type is left to the
    /// caller, as registries need not do it.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Document`], those of requests. A registry that knows nothing answers with an empty
    /// list.
    pub async fn referrers(&self, digest: &Digest) -> Result<Vec<Descriptor>, Error> {
        let scopes = self.scopes(Operation::Referrers);
        let places =
            [format!("referrers/{digest}"), format!("manifests/{}", digest.as_str().replacen(':', "-", 1))];
        let operations = [Operation::Referrers, Operation::Resolve];
        let mut worst = Worst::default();
        for (place, operation) in places.into_iter().zip(operations) {
            let Ok(hosts) = self.hosts(operation, &[]) else { continue };
            for (index, (_, endpoint)) in hosts.iter().enumerate() {
                let mut ask =
                    Ask::new(Method::GET, self.path(&place), &scopes).accept(&[media_type::OCI_INDEX]);
                ask.last = index + 1 == hosts.len();
                let mut response = match endpoint.send(&ask).await {
                    Ok(response) if response.status.is_success() => response,
                    Ok(response) => {
                        let error = failure(response, Method::GET).await;
                        if !error.is_not_found() {
                            worst.note(endpoint.name(), error);
                        }
                        continue;
                    }
                    Err(error) => {
                        worst.note(endpoint.name(), error);
                        continue;
                    }
                };
                let url = response.shown();
                let bytes = response
                    .bytes(MAX_DOCUMENT_SIZE)
                    .await
                    .map_err(|source| Error::Transport { method: Method::GET, url: url.clone(), source })?
                    .ok_or_else(|| Error::TooLarge {
                        what: format!("the referrers at {url}"),
                        limit: MAX_DOCUMENT_SIZE,
                    })?;
                let index = image::parse_index(&bytes)
                    .map_err(|source| Error::Document { digest: digest.clone(), source })?;
                return Ok(index.manifests);
            }
        }
        let nothing = || Error::NotFound { what: String::new() };
        match worst.into_error(nothing) {
            Error::NotFound { .. } => Ok(Vec::new()),
            error => Err(error),
        }
    }
}
