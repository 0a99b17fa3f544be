//! Tasks together with what the daemon mounts of their root filesystems.
//!
//! What no shim can mount is mounted before a task is created, and taken away after it. Both go on to their end whoever waits
//! for them: a client that goes away in between leaves no mounts without a task.

use davit_model::{Coded, ErrorCode};
use tokio::task::JoinError;
use tracing::Instrument;

use crate::metadata::{self, Metadata, Rootfs, Scope};
use crate::runtime::{self, CreateOptions, Exit, Tasks};

/// Why a task cannot be created or deleted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its root filesystem.
    #[error(transparent)]
    Rootfs(metadata::Error),
    /// The task itself.
    #[error(transparent)]
    Task(#[from] runtime::Error),
    /// The daemon ends.
    #[error("the call was interrupted")]
    Interrupted {
        /// By what.
        source: JoinError,
    },
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::Rootfs(error) => error.code(),
            Error::Task(error) => error.code(),
            Error::Interrupted { .. } => ErrorCode::Internal,
        }
    }

    fn reason(&self) -> Option<&'static str> {
        match self {
            Error::Task(error) => error.reason(),
            Error::Rootfs(_) | Error::Interrupted { .. } => None,
        }
    }
}

/// Creates and deletes tasks. Clones are the same.
#[derive(Clone)]
pub struct RootedTasks {
    metadata: Metadata,
    tasks: Tasks,
}

impl RootedTasks {
    /// Of these tasks, with mounts that `metadata` keeps the records of.
    pub fn new(metadata: Metadata, tasks: Tasks) -> RootedTasks {
        RootedTasks { metadata, tasks }
    }

    /// Creates a task on the mounts of `options`, see [`Tasks::create`].
    ///
    /// # Errors
    /// Any of [`Error`]; no mounts are left behind then.
    pub async fn create(&self, scope: &Scope, options: CreateOptions) -> Result<u32, Error> {
        let (rooted, scope) = (self.clone(), scope.clone());
        detached(async move { rooted.create_to_the_end(&scope, options).await }).await
    }

    async fn create_to_the_end(&self, scope: &Scope, options: CreateOptions) -> Result<u32, Error> {
        let mounts = self.metadata.mounts(scope);
        let accepted = self.tasks.accepted_mounts(&options.runtime);
        let rootfs = mounts.activate_rootfs(&options.container_id, options.rootfs, accepted).await;
        let Rootfs { mounts: rootfs, hold } = rootfs.map_err(Error::Rootfs)?;
        let id = options.container_id.clone();
        let created = self.tasks.create(scope.namespace(), CreateOptions { rootfs, ..options }).await;
        drop(hold);
        if created.is_err() {
            self.take_mounts_away(scope, &id).await;
        }
        Ok(created?)
    }

    /// Deletes a task and takes away what was mounted for it, see [`Tasks::delete`].
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn delete(&self, scope: &Scope, id: &str) -> Result<Exit, Error> {
        let (rooted, scope, id) = (self.clone(), scope.clone(), id.to_owned());
        let delete = async move {
            let exit = rooted.tasks.delete(scope.namespace(), &id).await?;
            rooted.take_mounts_away(&scope, &id).await;
            Ok(exit)
        };
        detached(delete).await
    }

    async fn take_mounts_away(&self, scope: &Scope, id: &str) {
        let (tasks, namespace, task) = (self.tasks.clone(), scope.namespace().to_owned(), id.to_owned());
        let has_task = move || tasks.exists(&namespace, &task);
        self.metadata.mounts(scope).deactivate_rootfs(id, has_task).await;
    }
}

/// Runs a change to its end even if the caller goes away.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work.in_current_span()).await.unwrap_or_else(|source| Err(Error::Interrupted { source }))
}
