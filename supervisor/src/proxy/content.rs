//! A content store in another process.
//!
//! What it says is checked where that can be: a blob that is read from its start to its end has its digest, what is
//! written is hashed here as well, and sizes and offsets are those that they must be. As with snapshots, a plugin that is a
//! whole daemon is told a namespace, and what we commit there is labelled as a root; of such a daemon's blobs the
//! collector sees and takes only those with our label.

mod reader;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use davit_content_store::{Error, Info, Status};
use davit_model::{Coded, Digest, ErrorCode};
use davit_proto::containerd::services::content::v1 as wire;
use davit_proto::containerd::services::content::v1::content_client::ContentClient;
use tonic::transport::Channel;

pub use reader::ProxyReader;
pub use writer::ProxyWriter;

use super::connection::{Connection, Failure, MAX_MESSAGE, ROOT_LABEL, ROOT_VALUE, namespace_of, time};

/// A content store behind a socket. Clones are the same.
#[derive(Debug, Clone)]
pub struct ProxyStore {
    connection: Connection,
    /// That of the client whose calls these are.
    namespace: Option<Arc<str>>,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::Remote { code: failure.code(), message: failure.to_string() }
    }
}

fn no_blob(digest: &Digest) -> impl FnOnce(Failure) -> Error {
    let digest = digest.clone();
    move |failure| match failure.code {
        ErrorCode::NotFound => Error::NoBlob { digest },
        _ => failure.into(),
    }
}

fn no_ingest(reference: &str) -> impl FnOnce(Failure) -> Error {
    let reference = reference.to_owned();
    move |failure| match failure.code {
        ErrorCode::NotFound => Error::NoIngest { reference },
        _ => failure.into(),
    }
}

impl ProxyStore {
    pub(super) fn new(connection: Connection) -> ProxyStore {
        ProxyStore { connection, namespace: None }
    }

    /// The same store, for the calls of a client in `namespace`.
    #[must_use]
    pub fn in_namespace(&self, namespace: &str) -> ProxyStore {
        ProxyStore { connection: self.connection.clone(), namespace: Some(Arc::from(namespace)) }
    }

    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.connection.channel())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    fn look_limit(&self) -> Duration {
        self.connection.patience.look
    }

    fn change_limit(&self) -> Duration {
        self.connection.patience.change
    }

    fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// The namespace of a call about an ingest.
    fn namespace_for<'a>(&'a self, reference: &'a str) -> Option<&'a str> {
        self.namespace().or_else(|| namespace_of(reference))
    }

    /// The blob and its labels.
    fn look(&self, namespace: Option<&str>, digest: &Digest) -> Result<wire::Info, Failure> {
        let message = wire::InfoRequest { digest: digest.to_string() };
        let request = self.connection.request(namespace, self.look_limit(), message);
        let answer = self.connection.wait(self.look_limit(), self.client().info(request))?;
        let info = answer.into_inner().info.unwrap_or_default();
        if info.digest != digest.as_str() {
            return Err(self.connection.nonsense(format!("asked for {digest}, got {:?}", info.digest)));
        }
        Ok(info)
    }

    fn convert(&self, info: &wire::Info) -> Result<Info, Failure> {
        let nonsense =
            || self.connection.nonsense(format!("a blob {:?} of {} bytes", info.digest, info.size));
        let digest = info.digest.parse().map_err(|_| nonsense())?;
        let size = u64::try_from(info.size).map_err(|_| nonsense())?;
        Ok(Info { digest, size, created_at: time(info.created_at), updated_at: time(info.updated_at) })
    }

    fn convert_status(&self, status: wire::Status) -> Result<Status, Failure> {
        let size = |count: i64| {
            u64::try_from(count).map_err(|_| self.connection.nonsense(format!("an ingest of {count} bytes")))
        };
        Ok(Status {
            offset: size(status.offset)?,
            total: size(status.total)?,
            expected: status.expected.parse().ok(),
            started_at: time(status.started_at),
            updated_at: time(status.updated_at),
            reference: status.r#ref,
        })
    }

    /// What is known of a blob.
    ///
    /// # Errors
    /// [`Error::NoBlob`], [`Error::Remote`].
    pub fn info(&self, digest: &Digest) -> Result<Info, Error> {
        let info = self.look(self.namespace(), digest).map_err(no_blob(digest))?;
        Ok(self.convert(&info)?)
    }

    /// Opens a blob to read.
    ///
    /// # Errors
    /// [`Error::NoBlob`], [`Error::Remote`].
    pub fn reader(&self, digest: &Digest) -> Result<ProxyReader, Error> {
        let info = self.info(digest)?;
        Ok(ProxyReader::new(self.clone(), info.digest, info.size))
    }

    /// Starts or resumes an ingest.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Remote`].
    pub fn writer(&self, reference: &str, total: u64) -> Result<ProxyWriter, Error> {
        ProxyWriter::open(self, reference, total)
    }

    /// How far an ingest has come.
    ///
    /// # Errors
    /// [`Error::NoIngest`], [`Error::Remote`].
    pub fn status(&self, reference: &str) -> Result<Status, Error> {
        let message = wire::StatusRequest { r#ref: reference.to_owned() };
        let request = self.connection.request(self.namespace_for(reference), self.look_limit(), message);
        let answer = self.connection.wait(self.look_limit(), self.client().status(request));
        let status = answer.map_err(no_ingest(reference))?.into_inner().status;
        Ok(self.convert_status(status.unwrap_or_default())?)
    }

    /// All ingests.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub fn statuses(&self) -> Result<Vec<Status>, Error> {
        let list = |namespace: Option<&str>| {
            let request =
                self.connection.request(namespace, self.change_limit(), wire::ListStatusesRequest::default());
            let answer = self.connection.wait(self.change_limit(), self.client().list_statuses(request))?;
            answer.into_inner().statuses.into_iter().map(|status| self.convert_status(status)).collect()
        };
        let ours = |namespace: &str, status: &Status| namespace_of(&status.reference) == Some(namespace);
        Ok(self.connection.everywhere(list, ours)?)
    }

    /// Removes an ingest.
    ///
    /// # Errors
    /// [`Error::NoIngest`], [`Error::Remote`].
    pub fn abort(&self, reference: &str) -> Result<(), Error> {
        let message = wire::AbortRequest { r#ref: reference.to_owned() };
        let request = self.connection.request(self.namespace_for(reference), self.change_limit(), message);
        self.connection
            .wait(self.change_limit(), self.client().abort(request))
            .map_err(no_ingest(reference))?;
        Ok(())
    }

    /// Removes a blob.
    ///
    /// # Errors
    /// [`Error::NoBlob`], [`Error::Remote`].
    pub fn delete(&self, digest: &Digest) -> Result<(), Error> {
        match self.delete_in(self.namespace(), digest) {
            Err(failure) if failure.wants_namespace() => {}
            deleted => return deleted.map_err(no_blob(digest)),
        }
        let mut found = false;
        for namespace in self.connection.namespaces()? {
            match self.look(Some(&namespace), digest) {
                // The same blob may be there for others.
                Ok(info) if !is_ours(&info) => {}
                Ok(_) => {
                    self.delete_in(Some(&namespace), digest)?;
                    found = true;
                }
                Err(failure) if failure.code == ErrorCode::NotFound => {}
                Err(failure) => return Err(failure.into()),
            }
        }
        if found { Ok(()) } else { Err(Error::NoBlob { digest: digest.clone() }) }
    }

    fn delete_in(&self, namespace: Option<&str>, digest: &Digest) -> Result<(), Failure> {
        let message = wire::DeleteContentRequest { digest: digest.to_string() };
        let request = self.connection.request(namespace, self.change_limit(), message);
        self.connection.wait(self.change_limit(), self.client().delete(request)).map(drop)
    }

    /// All blobs; what is no blob is left out.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub fn walk(&self) -> Result<Vec<Info>, Error> {
        let ours = |_: &str, info: &wire::Info| is_ours(info);
        let listed = self.connection.everywhere(|namespace| self.list(namespace), ours)?;
        Ok(listed.iter().filter_map(|info| self.convert(info).ok()).collect())
    }

    fn list(&self, namespace: Option<&str>) -> Result<Vec<wire::Info>, Failure> {
        let request =
            self.connection.request(namespace, self.change_limit(), wire::ListContentRequest::default());
        let walk = async {
            let pages = self.client().list(request).await?.into_inner();
            Connection::read_pages(pages, "content", |page| page.info).await
        };
        self.connection.wait(self.change_limit(), walk)
    }
}

/// Whether a blob of a daemon was made by us.
fn is_ours(info: &wire::Info) -> bool {
    info.labels.get(ROOT_LABEL).is_some_and(|value| value == ROOT_VALUE)
}
