//! Leases: what keeps new content and snapshots from being collected until something refers to them.

use std::future::Future;
use std::time::{Duration, SystemTime};

use davit_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};

use crate::client::Client;
use crate::error::{CallContext, Result};
use crate::format;

/// How long a lease protects what a client left behind that died with it.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Runs `work` with a client whose creations belong to a new lease, which ends with it, whatever came out.
///
/// # Errors
/// Those of `work`, and of creating the lease. One that cannot be deleted expires.
pub(crate) async fn with_lease<T, F>(client: &Client, work: impl FnOnce(Client) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let expires = format::rfc3339(SystemTime::now() + LIFETIME);
    let labels = [("containerd.io/gc.expire".to_owned(), expires)].into();
    let id = format!("davit-{}", &crate::container::new_id()?[..16]);
    let request = CreateRequest { id, labels };
    let lease = client.leases().create(request).await.call("create a lease")?.lease.unwrap_or_default();
    let result = work(client.with_lease(&lease.id)).await;
    let _ = client.leases().delete(DeleteRequest { id: lease.id, sync: false }).await;
    result
}
