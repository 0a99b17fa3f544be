//! Leases: what keeps new content and snapshots from being collected until something refers to them.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, SystemTime};

use davit_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};

use crate::client::Client;
use crate::error::{CallContext, Result};
use crate::format;

/// The label that says when a lease is of no value any more.
pub(crate) const EXPIRE: &str = "containerd.io/gc.expire";
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
    let id = create(client).await?;
    let result = work(client.with_lease(&id)).await;
    let _ = client.leases().delete(DeleteRequest { id, sync: false }).await;
    result
}

/// Has the daemon collect what nothing refers to, expired leases among it, and waits for that.
///
/// # Errors
/// Those of the calls.
pub(crate) async fn collect(client: &Client) -> Result<()> {
    // What the API has for it is to delete something and wait.
    let id = create(client).await?;
    client.leases().delete(DeleteRequest { id, sync: true }).await.call("collect garbage")?;
    Ok(())
}

async fn create(client: &Client) -> Result<String> {
    let expires = format::rfc3339(SystemTime::now() + LIFETIME);
    let labels = BTreeMap::from([(EXPIRE.to_owned(), expires)]);
    let id = format!("davit-{}", &crate::container::new_id()?[..16]);
    let created = client.leases().create(CreateRequest { id, labels }).await.call("create a lease")?;
    Ok(created.lease.unwrap_or_default().id)
}
