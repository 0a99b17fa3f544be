//! What can go wrong in a command: the message, the hint that says what to do about it, and the exit code, in one
//! place.
//!
//! Exit codes follow Docker's: 125 when `davit` itself or the daemon failed, 126 when the container's command could
//! not be invoked, 127 when it was not found, else the command's own.

use std::io;
use std::path::PathBuf;

use davit_model::{Coded, ErrorCode};
use tonic::{Code, Status};

/// The exit code when `davit` or the daemon failed.
pub(crate) const EXIT_FAILURE: u8 = 125;
/// The exit code when the container's command exists but cannot be invoked.
const EXIT_CANNOT_INVOKE: u8 = 126;
/// The exit code when the container's command does not exist.
const EXIT_NOT_FOUND: u8 = 127;

/// A command that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot connect to the daemon at {address:?}")]
    Connect {
        address: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot {action}: {}", status.message())]
    Call { action: String, status: Status },
    /// A transfer failed; most that can go wrong is the registry's.
    #[error("cannot {verb} {name}: {}", status.message())]
    Transfer { verb: &'static str, name: String, host: String, status: Status },
    /// The OCI runtime could not start the command. Its text is all that tells the cases apart.
    #[error("cannot start the {what}: {}", status.message())]
    Start { what: &'static str, status: Status },
    #[error("no such container: {given}")]
    NoContainer { given: String },
    #[error("{given:?} matches several containers: {}", matches.join(", "))]
    Ambiguous { given: String, matches: Vec<String> },
    #[error("no such image: {given}")]
    NoImage { given: String },
    #[error("no such container or image: {given}")]
    NoObject { given: String },
    #[error("the container name {name:?} is already in use by container {id}")]
    NameTaken { name: String, id: String },
    #[error("container {given} is not running")]
    NotRunning { given: String },
    #[error("container {given} is running")]
    Running { given: String },
    #[error("container {given} is paused")]
    Paused { given: String },
    /// What was asked for is wrong or not there; the second text says what to do instead.
    #[error("{message}")]
    Usage { message: String, hint: String },
    #[error("{action} {path:?}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// Writing the command's own output failed.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    #[error("invalid image archive: {reason}")]
    Archive { reason: String },
    /// Docker's configuration cannot be read.
    #[error(transparent)]
    DockerConfig(#[from] davit_distribution::docker_config::DockerConfigError),
    #[error("cannot log in to {server}")]
    Login {
        server: String,
        #[source]
        source: davit_distribution::Error,
    },
    #[error("cannot get the credentials for {host}")]
    Credentials {
        host: String,
        #[source]
        source: davit_distribution::CredentialError,
    },
    #[error(transparent)]
    Reference(#[from] davit_oci::reference::ReferenceError),
    #[error(transparent)]
    Document(#[from] davit_oci::image::DocumentError),
    #[error(transparent)]
    Platform(#[from] davit_oci::platform::PlatformError),
    #[error(transparent)]
    User(#[from] davit_oci::user::UserError),
    #[error(transparent)]
    Rootfs(#[from] davit_oci::rootfs::RootfsError),
    /// A root filesystem whose files only a mount shows.
    #[error("cannot look into the root filesystem")]
    Mount(#[source] davit_sys::mount::Error),
    #[error(transparent)]
    Spec(#[from] davit_oci::spec::SpecError),
    #[error(transparent)]
    Environment(#[from] davit_oci::environment::EnvironmentError),
    #[error("{what} of container {id} cannot be read")]
    Stored {
        what: &'static str,
        id: String,
        #[source]
        source: serde_json::Error,
    },
    /// Several of the things named failed; each was reported when it did.
    #[error("{failed} of {all} failed")]
    Several { failed: usize, all: usize },
}

/// The result of a command's parts.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Usage { message: message.into(), hint: hint.into() }
    }

    /// Whether the reader of our output has gone away, which is no failure (`davit ps | head -1`).
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Error::Output(source) if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Whether the daemon says that the thing named does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Error::Call { status, .. } if status.code() == Code::NotFound)
    }

    /// Whether the daemon says that the thing to create exists.
    pub(crate) fn is_already_exists(&self) -> bool {
        matches!(self, Error::Call { status, .. } if status.code() == Code::AlreadyExists)
    }

    /// The exit code; `failure` is the command's own for what is not about starting a process.
    pub(crate) fn exit_code(&self, failure: u8) -> u8 {
        let Error::Start { status, .. } = self else { return failure };
        let text = status.message().to_lowercase();
        // The texts of runc and crun. A missing file that is not the command itself, such as the source of a mount,
        // has the same words; those come with "mount" before them.
        if text.contains("mount") || text.contains("console copy") || Error::names_no_runtime(&text) {
            EXIT_FAILURE
        } else if text.contains("permission denied")
            || text.contains("is a directory")
            || text.contains("exec format")
        {
            EXIT_CANNOT_INVOKE
        } else if text.contains("executable file") || text.contains("no such file or directory") {
            EXIT_NOT_FOUND
        } else {
            EXIT_FAILURE
        }
    }

    /// Whether what was not found is the OCI runtime itself. It is reported with the same words, but nothing of the
    /// runtime's own comes before them; containerd has then looked in vain for the log that a runtime writes.
    fn names_no_runtime(text: &str) -> bool {
        text.contains("unable to retrieve oci runtime error") || text.contains("create failed: exec: \"")
    }

    /// What to do about it, if there is something.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Error::Connect { address, source } => Some(match source.kind() {
                _ if address.to_string_lossy().contains("://") => {
                    "want the path of the daemon's unix socket: `davit` speaks to a daemon on this machine"
                        .to_owned()
                }
                io::ErrorKind::PermissionDenied => {
                    "you need access to the socket: run this as root, or join the socket's group".to_owned()
                }
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => format!(
                    "is the daemon running? Start it with `systemctl start davitd` or `davitd`; if its socket is \
                     elsewhere, name it with -a/--address or DAVIT_ADDRESS (now {})",
                    address.display()
                ),
                _ => "name the daemon's socket with -a/--address or DAVIT_ADDRESS".to_owned(),
            }),
            Error::Transfer { status, host, .. } => match status.code() {
                Code::Unauthenticated | Code::PermissionDenied => {
                    Some(format!("if the name is right, log in with `davit login {host}`"))
                }
                // The daemon's own errors end with the words of their class; a lost connection has other words.
                Code::Unavailable if status.message().ends_with(": unavailable") => {
                    Some(format!("{host} cannot be reached from the daemon; try again later"))
                }
                Code::Unavailable => Some("the daemon went away or is restarting; try again".to_owned()),
                Code::Unimplemented => {
                    Some("this daemon has no Transfer service; bring images in with `davit load`".to_owned())
                }
                _ => None,
            },
            Error::Call { status, .. } => match status.code() {
                Code::Unavailable => Some("the daemon went away or is restarting; try again".to_owned()),
                Code::Unimplemented => Some("this daemon does not support it".to_owned()),
                Code::InvalidArgument if status.message().contains("snapshotter not loaded") => {
                    Some("`davit info` lists the snapshotters that are there".to_owned())
                }
                _ => None,
            },
            Error::Start { status, .. } if Error::names_no_runtime(&status.message().to_lowercase()) => {
                Some("install the OCI runtime, or name another with --runtime".to_owned())
            }
            Error::Start { status, .. } if status.message().contains("console copy") => Some(
                "this daemon cannot log what a terminal shows: leave out -t or -d, or use davitd".to_owned(),
            ),
            Error::Start { .. } => match self.exit_code(EXIT_FAILURE) {
                EXIT_NOT_FOUND => Some("the image has no such command, or not in its PATH".to_owned()),
                EXIT_CANNOT_INVOKE => {
                    Some("the command is not an executable file for this machine".to_owned())
                }
                _ => None,
            },
            Error::NoContainer { .. } => Some("`davit ps -a` lists the containers".to_owned()),
            Error::Ambiguous { .. } => Some("give more characters of the id".to_owned()),
            Error::NoImage { given } => Some(format!(
                "`davit images` lists what is there; `davit pull {given}` gets it from a registry, and `davit load -i FILE` from an archive"
            )),
            Error::NoObject { .. } => Some("`davit ps -a` and `davit images` list what is there".to_owned()),
            Error::NameTaken { name, .. } => {
                Some(format!("choose another --name, or free this one with `davit rm {name}`"))
            }
            Error::NotRunning { given } => Some(format!("start it with `davit start {given}`")),
            Error::Running { given } => {
                Some(format!("stop it first with `davit stop {given}`, or force this with -f"))
            }
            Error::Paused { given } => Some(format!("continue it with `davit unpause {given}`")),
            Error::Usage { hint, .. } => Some(hint.clone()).filter(|hint| !hint.is_empty()),
            Error::File { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run this as root".to_owned())
            }
            Error::User(davit_oci::user::UserError::NoUser { .. }) => {
                Some("a number works without an entry: -u UID[:GID]".to_owned())
            }
            Error::Spec(davit_oci::spec::SpecError::NoCommand) => {
                Some("name a command after the image: `davit run IMAGE COMMAND`".to_owned())
            }
            Error::Mount(error) if error.code() == ErrorCode::PermissionDenied => {
                Some("run this as root, or use the snapshotter overlayfs or native".to_owned())
            }
            Error::Archive { .. } => {
                Some("want an OCI layout or `docker save` archive, plain or compressed with gzip".to_owned())
            }
            Error::File { .. }
            | Error::System { .. }
            | Error::Output(_)
            | Error::Reference(_)
            | Error::Document(_)
            | Error::Platform(_)
            | Error::User(_)
            | Error::Rootfs(_)
            | Error::Mount(_)
            | Error::Spec(_)
            | Error::Environment(_)
            | Error::Stored { .. }
            | Error::DockerConfig(_)
            | Error::Login { .. }
            | Error::Credentials { .. }
            | Error::Several { .. } => None,
        }
    }

    /// The whole report: the chain of causes on one line, then the hint.
    pub(crate) fn report(&self) -> String {
        let mut text = format!("davit: {}", davit_model::error::chain(self));
        if let Some(hint) = self.hint() {
            text.push_str("\nhint: ");
            text.push_str(&hint);
        }
        text
    }
}

/// Names the call that a status came from.
pub(crate) trait CallContext<T> {
    /// Turns the status into an error that reads "cannot {action}: …".
    fn call(self, action: impl Into<String>) -> Result<T>;
}

impl<T> CallContext<T> for std::result::Result<tonic::Response<T>, Status> {
    fn call(self, action: impl Into<String>) -> Result<T> {
        match self {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(Error::Call { action: action.into(), status }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(message: &str) -> u8 {
        Error::Start { what: "container", status: Status::unknown(message) }.exit_code(EXIT_FAILURE)
    }

    #[test]
    fn exit_codes_of_runtimes_texts() {
        let runc = "runc create failed: unable to start container process: exec: \"nope\": executable file not found in \
                    $PATH: unknown";
        assert_eq!(start(runc), 127);
        assert_eq!(start("exec: \"/nope\": stat /nope: no such file or directory: unknown"), 127);
        assert_eq!(start("executable file `nope` not found in $PATH: No such file or directory"), 127);
        assert_eq!(start("exec: \"/etc\": permission denied: unknown"), 126);
        assert_eq!(start("exec /etc/passwd: exec format error"), 126);
        assert_eq!(start("error mounting \"/none\" to rootfs: no such file or directory"), 125);
        let no_runtime = "unable to retrieve OCI runtime error (open log.json: no such file or directory): exec: \"x\": \
                          executable file not found in $PATH: unknown";
        assert_eq!(start(no_runtime), 125);
        assert_eq!(start("OCI runtime create failed: exec: \"x\": executable file not found in $PATH"), 125);
        assert_eq!(start("no cgroup"), 125);
        assert_eq!(Error::NoContainer { given: "x".to_owned() }.exit_code(1), 1);
    }

    #[test]
    fn reports_carry_cause_and_hint() {
        let error = Error::Connect {
            address: "/x.sock".into(),
            source: io::Error::from(io::ErrorKind::ConnectionRefused),
        };
        let report = error.report();
        assert!(
            report.starts_with(
                "davit: cannot connect to the daemon at \"/x.sock\": connection refused\nhint: "
            )
        );
        assert!(report.contains("systemctl start davitd"));
    }
}
