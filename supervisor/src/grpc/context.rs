//! What a call brings with it beside its message: the namespace and the lease.
//!
//! A `tower` layer reads the headers once and puts a [`Context`] into the request's extensions; the adapters ask the
//! context for what their call needs.

use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use davit_model::{ErrorCode, identifier};
use http::{HeaderMap, Request};
use tonic::Status;
use tower::{Layer, Service};

use super::status::{self, status};
use crate::metadata::Scope;

/// The header of the namespace (containerd `pkg/namespaces`).
pub const NAMESPACE: &str = "containerd-namespace";
/// The same in ttrpc's metadata; a gRPC server takes it as well.
const NAMESPACE_TTRPC: &str = "containerd-namespace-ttrpc";
/// The header of the lease (containerd `core/leases`).
pub const LEASE: &str = "containerd-lease";

/// The namespace that a call names, unchecked.
pub fn namespace(headers: &HeaderMap) -> Option<&str> {
    given(headers, NAMESPACE).or_else(|| given(headers, NAMESPACE_TTRPC))
}

fn given<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|value| !value.is_empty())
}

/// The namespace and lease of a call, unchecked as they came.
#[derive(Debug, Clone, Default)]
pub struct Context {
    namespace: Option<Arc<str>>,
    lease: Option<Arc<str>>,
}

impl Context {
    /// The context of a request.
    pub fn of<T>(request: &tonic::Request<T>) -> Context {
        request.extensions().get::<Context>().cloned().unwrap_or_default()
    }

    /// The context of a call in a namespace.
    #[cfg(test)]
    pub(crate) fn within(namespace: &str) -> Context {
        Context { namespace: Some(Arc::from(namespace)), lease: None }
    }

    /// The namespace and the lease as they came, for a call that requires neither.
    pub fn as_given(&self) -> (Option<&str>, Option<&str>) {
        (self.namespace.as_deref(), self.lease.as_deref())
    }

    /// The namespace, checked.
    ///
    /// # Errors
    /// `FailedPrecondition` when there is none, `InvalidArgument` when it is malformed; containerd's words.
    pub fn namespace(&self) -> Result<&str, Status> {
        let namespace = self.namespace.as_deref().ok_or_else(|| {
            status(ErrorCode::FailedPrecondition, "namespace is required: failed precondition")
        })?;
        identifier::validate(namespace).map_err(|error| {
            status(ErrorCode::InvalidArgument, &format!("namespace validation: {error}: invalid argument"))
        })?;
        Ok(namespace)
    }

    /// The namespace and the lease of the call, as the metadata services take them.
    ///
    /// # Errors
    /// As [`Context::namespace`].
    pub fn scope(&self) -> Result<Scope, Status> {
        Scope::new(self.namespace()?, self.lease.as_deref()).map_err(status::from)
    }
}

/// Puts a [`Context`] into each request.
#[derive(Debug, Clone, Default)]
pub struct ContextLayer;

impl<S> Layer<S> for ContextLayer {
    type Service = ContextService<S>;

    fn layer(&self, inner: S) -> ContextService<S> {
        ContextService { inner }
    }
}

/// The service that [`ContextLayer`] makes.
#[derive(Debug, Clone)]
pub struct ContextService<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for ContextService<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let headers = request.headers();
        let context = Context {
            namespace: namespace(headers).map(Arc::from),
            lease: given(headers, LEASE).map(Arc::from),
        };
        request.extensions_mut().insert(context);
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    fn with(namespace: Option<&str>) -> Context {
        Context { namespace: namespace.map(Arc::from), lease: None }
    }

    #[test]
    fn a_missing_and_a_malformed_namespace_have_their_codes() {
        assert_eq!(with(None).namespace().unwrap_err().code(), Code::FailedPrecondition);
        for bad in ["..", "a/b", "-x"] {
            assert_eq!(with(Some(bad)).namespace().unwrap_err().code(), Code::InvalidArgument);
        }
        assert_eq!(with(Some("k8s.io")).namespace().unwrap(), "k8s.io");
    }
}
