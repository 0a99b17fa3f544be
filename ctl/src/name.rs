//! The names of containers. containerd's API knows none: a name is a label, and unique only among what `davit` makes.
//!
//! Between the look whether a name is free and the record that has it, another client could look as well. So both are done
//! under a lock: a lease whose id comes from the name, and which a daemon therefore gives to one client at a time. It is
//! held for a moment; one that a dying client leaves behind expires, and the daemon collects it.

use std::future::Future;
use std::time::{Duration, Instant, SystemTime};

use davit_model::identifier;
use davit_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest, ListRequest};

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::{container, format, labels, lease};

/// How long a lock holds: longer than two calls take on the slowest machine.
const LIFETIME: Duration = Duration::from_secs(60);
/// How long to wait for a lock: until one that was left behind is certainly gone.
const PATIENCE: Duration = Duration::from_secs(90);
/// The pause between two attempts to get it.
const PAUSE: Duration = Duration::from_millis(20);

/// Refuses what is no name, and a name that a container has.
///
/// # Errors
/// [`Error::Usage`], [`Error::NameTaken`], and those of the call.
pub(crate) async fn check_free(client: &Client, name: &str) -> Result<()> {
    identifier::validate(name).map_err(|source| {
        let hint = "a name is made of letters, digits and single . _ - between them";
        Error::usage(format!("invalid container name: {source}"), hint)
    })?;
    let filters = vec![format!("labels.\"{}\"=={name}", labels::NAME), format!("id=={name}")];
    match container::list(client, filters).await?.first() {
        None => Ok(()),
        Some(other) => {
            Err(Error::NameTaken { name: name.to_owned(), id: format::short_id(&other.id).to_owned() })
        }
    }
}

/// Does `work`, which makes the container of this name, unless another client has made one or does so before.
///
/// # Errors
/// [`Error::NameTaken`], and those of the calls and of `work`.
pub(crate) async fn claim<T>(
    client: &Client,
    name: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let id = format!("davit-name-{name}");
    lock(client, name, &id).await?;
    let result = match check_free(client, name).await {
        Ok(()) => work.await,
        Err(error) => Err(error),
    };
    let _ = client.leases().delete(DeleteRequest { id, sync: false }).await;
    result
}

async fn lock(client: &Client, name: &str, id: &str) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let expires = format::rfc3339(SystemTime::now() + LIFETIME);
        let labels = [(lease::EXPIRE.to_owned(), expires)].into();
        let request = CreateRequest { id: id.to_owned(), labels };
        match client.leases().create(request).await.call(format!("lock the name {name}")) {
            Err(error) if error.is_already_exists() && Instant::now() < end => {}
            other => return other.map(drop),
        }
        // Whoever has it may have its container by now.
        check_free(client, name).await?;
        if is_left_behind(client, id).await? {
            // The daemon looks at the time itself: what somebody has locked meanwhile stays.
            lease::collect(client).await?;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether the lock's time is over.
async fn is_left_behind(client: &Client, id: &str) -> Result<bool> {
    let request = ListRequest { filters: vec![format!("id=={id}")] };
    let leases = client.leases().list(request).await.call("look at the lock of a name")?.leases;
    let expires = leases.first().and_then(|lease| format::parse_rfc3339(lease.labels.get(lease::EXPIRE)?));
    Ok(expires.is_some_and(|expires| expires < SystemTime::now()))
}
