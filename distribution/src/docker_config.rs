//! Docker's `config.json`: the credentials that `docker login` keeps, and the programs that keep them instead.
//!
//! ```json
//! { "auths": { "registry.example:5000": { "auth": "<base64 of user:password>", "identitytoken": "…" } },
//!   "credHelpers": { "gcr.example": "gcloud" },
//!   "credsStore": "secretservice" }
//! ```
//!
//! A helper is the program `docker-credential-<name>`. It reads the name of the server and writes a JSON object.

mod edit;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use davit_model::{Coded, ErrorCode};
use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

pub use edit::{forget, store};

use crate::credentials::{CredentialError, CredentialSource, Credentials, Secret};

/// The most bytes of the file, and of what a helper writes.
const MAX_SIZE: u64 = 1 << 20;
/// How long a helper may take; some ask their user, or a server far away.
const HELPER_TIME: Duration = Duration::from_secs(60);
/// The names of Docker Hub in the file, the one that `docker login` writes first.
const HUB: &str = "https://index.docker.io/v1/";
/// What a helper names as the user of an identity token.
const TOKEN_USER: &str = "<token>";

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DockerConfigError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no JSON of this form. What the parser says is left out: it may quote a secret.
    #[error("invalid {}: line {line}, column {column}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// Where in the line.
        column: usize,
    },
    /// It cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A helper keeps the secrets.
    #[error("{} leaves credentials to the helper {helper:?}: log in and out with that", path.display())]
    Helper {
        /// The file.
        path: PathBuf,
        /// The helper.
        helper: String,
    },
    /// It is larger than any configuration.
    #[error("{} is larger than {MAX_SIZE} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

impl Coded for DockerConfigError {
    fn code(&self) -> ErrorCode {
        match self {
            DockerConfigError::Read { .. } | DockerConfigError::Write { .. } => ErrorCode::Internal,
            DockerConfigError::Syntax { .. }
            | DockerConfigError::TooLarge { .. }
            | DockerConfigError::Helper { .. } => ErrorCode::FailedPrecondition,
        }
    }
}

/// What the file says.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DockerConfig {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: String,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Kept {
    username: String,
    secret: String,
}

impl DockerConfig {
    /// The path of the file of this user: in `$DOCKER_CONFIG`, or else in `.docker` of the home.
    pub fn default_path() -> Option<PathBuf> {
        let folder = match std::env::var_os("DOCKER_CONFIG").filter(|value| !value.is_empty()) {
            Some(folder) => PathBuf::from(folder),
            None => Path::new(&std::env::var_os("HOME").filter(|value| !value.is_empty())?).join(".docker"),
        };
        Some(folder.join("config.json"))
    }

    /// Reads a file; one that is not there has nothing to say.
    ///
    /// # Errors
    /// [`DockerConfigError`].
    pub fn load(path: &Path) -> Result<DockerConfig, DockerConfigError> {
        parse(path, &read(path)?)
    }

    /// The helper that keeps the secrets of a host, if one does, and the name that it has for the host.
    fn helper<'a>(&'a self, host: &'a str) -> Option<(&'a str, &'a str)> {
        let server = server_name(host);
        let own = self.cred_helpers.iter().find(|(key, _)| host_of(key) == host_of(server));
        let (helper, name) = own.map_or((&self.creds_store, server), |(key, helper)| (helper, key.as_str()));
        (!helper.is_empty()).then_some((helper, name))
    }

    /// The credentials for a host.
    ///
    /// # Errors
    /// [`CredentialError`] if a helper cannot be run or fails, or an entry cannot be read.
    pub async fn find(&self, host: &str) -> Result<Credentials, CredentialError> {
        let server = server_name(host);
        if let Some((helper, name)) = self.helper(host) {
            if helper.contains('/') {
                let reason = format!("credential helper {helper:?}: its name must not be a path");
                return Err(CredentialError { reason });
            }
            let found = ask(&format!("docker-credential-{helper}"), name).await?;
            if found != Credentials::Anonymous {
                return Ok(found);
            }
        }
        let exact = self.auths.get(server);
        let entry = exact
            .or_else(|| self.auths.iter().find(|(key, _)| host_of(key) == host_of(server)).map(|(_, e)| e));
        entry.map_or(Ok(Credentials::Anonymous), Entry::credentials)
    }
}

impl fmt::Debug for DockerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DockerConfig")
            .field("auths", &self.auths.keys())
            .field("cred_helpers", &self.cred_helpers)
            .field("creds_store", &self.creds_store)
            .finish()
    }
}

impl CredentialSource for DockerConfig {
    fn credentials<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Credentials, CredentialError>> {
        Box::pin(self.find(host))
    }
}

impl Entry {
    fn credentials(&self) -> Result<Credentials, CredentialError> {
        if !self.registrytoken.is_empty() {
            return Ok(Credentials::Header(Secret::new(format!("Bearer {}", self.registrytoken))));
        }
        if !self.identitytoken.is_empty() {
            return Ok(Credentials::IdentityToken(Secret::new(&self.identitytoken)));
        }
        let (username, password) = if self.auth.is_empty() {
            (self.username.clone(), self.password.clone())
        } else {
            let bad = || CredentialError {
                reason: "the auth of an entry is not the base64 of user:password".to_owned(),
            };
            let decoded = STANDARD.decode(self.auth.trim()).map_err(|_| bad())?;
            let text = String::from_utf8(decoded).map_err(|_| bad())?;
            let (username, password) = text.split_once(':').ok_or_else(bad)?;
            // Old files have zeros at the end.
            (username.to_owned(), password.trim_end_matches('\0').to_owned())
        };
        if username.is_empty() && password.is_empty() {
            return Ok(Credentials::Anonymous);
        }
        Ok(Credentials::Password { username, password: Secret::new(password) })
    }
}

/// The name of a host in the file: Docker Hub has a special one.
fn server_name(host: &str) -> &str {
    if matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io") { HUB } else { host }
}

/// The text of a file; one that is not there is an empty object.
fn read(path: &Path) -> Result<Vec<u8>, DockerConfigError> {
    let failed = |source| DockerConfigError::Read { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(b"{}".to_vec()),
        result => result.map_err(failed)?,
    };
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MAX_SIZE + 1), &mut text).map_err(failed)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(DockerConfigError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

fn parse<'a, T: Deserialize<'a>>(path: &Path, text: &'a [u8]) -> Result<T, DockerConfigError> {
    serde_json::from_slice(text).map_err(|error| DockerConfigError::Syntax {
        path: path.to_owned(),
        line: error.line(),
        column: error.column(),
    })
}

/// The host of what people write for a registry, and of a key of the file: an address, or with a path behind it.
pub fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or_default()
}

/// Asks a helper for what it keeps.
async fn ask(program: &str, server: &str) -> Result<Credentials, CredentialError> {
    ask_with(Command::new(program).arg("get"), server).await.map_err(|error| CredentialError {
        reason: format!("credential helper {program:?}: {}", error.reason),
    })
}

async fn ask_with(command: &mut Command, server: &str) -> Result<Credentials, CredentialError> {
    let failed = |reason: String| CredentialError { reason };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("cannot be run: {error}")))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let talk = async {
        if let Some(mut stdin) = stdin {
            // A helper that does not read its input says why by its status.
            let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        }
        let mut output = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(MAX_SIZE).read_to_end(&mut output).await?;
        }
        if output.len() as u64 == MAX_SIZE {
            return Err(io::Error::other("its answer is too long"));
        }
        Ok::<_, io::Error>((child.wait().await?, output))
    };
    let (status, output) = match timeout(HELPER_TIME, talk).await {
        Ok(Ok(done)) => done,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed(format!("no answer within {HELPER_TIME:?}"))),
    };
    if !status.success() {
        let text = String::from_utf8_lossy(&output);
        // The words of Docker's helper library, which all helpers are made with.
        if text.contains("credentials not found in native keychain") {
            return Ok(Credentials::Anonymous);
        }
        return Err(failed(status.to_string()));
    }
    let kept: Kept =
        serde_json::from_slice(&output).map_err(|_| failed("its answer is not understood".to_owned()))?;
    if kept.username == TOKEN_USER {
        return Ok(Credentials::IdentityToken(Secret::new(kept.secret)));
    }
    Ok(Credentials::Password { username: kept.username, password: Secret::new(kept.secret) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> DockerConfig {
        serde_json::from_str(text).unwrap()
    }

    fn password(username: &str, password: &str) -> Credentials {
        Credentials::Password { username: username.to_owned(), password: Secret::new(password) }
    }

    #[tokio::test]
    async fn finds_hosts_by_all_their_names() {
        let config = config(
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "dTpw"},
                "https://old.example/v1/": {"auth": "YTpiOmM="},
                "r.example:5000": {"username": "x", "password": "y"},
                "token.example": {"auth": "", "identitytoken": "t"},
                "bearer.example": {"registrytoken": "b"},
                "empty.example": {}, "bad.example": {"auth": "***"}
            }, "HttpHeaders": {"a": "b"}}"#,
        );
        assert_eq!(config.find("registry-1.docker.io").await.unwrap(), password("u", "p"));
        assert_eq!(config.find("docker.io").await.unwrap(), password("u", "p"));
        assert_eq!(config.find("old.example").await.unwrap(), password("a", "b:c"));
        assert_eq!(config.find("r.example:5000").await.unwrap(), password("x", "y"));
        assert_eq!(config.find("r.example").await.unwrap(), Credentials::Anonymous);
        assert_eq!(config.find("token.example").await.unwrap(), Credentials::IdentityToken(Secret::new("t")));
        assert_eq!(
            config.find("bearer.example").await.unwrap(),
            Credentials::Header(Secret::new("Bearer b"))
        );
        assert_eq!(config.find("empty.example").await.unwrap(), Credentials::Anonymous);
        assert!(config.find("bad.example").await.is_err());
        assert!(!format!("{config:?}").contains("dTpw"));
    }

    #[tokio::test]
    async fn a_helper_that_is_not_there_is_an_error() {
        let config = config(r#"{"credHelpers": {"r.example": "no-such-helper", "s.example": "../x"}}"#);
        assert!(config.find("r.example").await.unwrap_err().reason.contains("cannot be run"));
        assert!(config.find("s.example").await.unwrap_err().reason.contains("path"));
        assert_eq!(config.find("other").await.unwrap(), Credentials::Anonymous);
    }

    #[tokio::test]
    async fn a_helper_is_asked_and_its_words_are_understood() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker-credential-test");
        let answer = async |script: &str| {
            std::fs::write(&path, script).unwrap();
            // By the shell: a script that was just written may still be open in a process that is being made.
            ask_with(Command::new("/bin/sh").arg(&path), "server.example").await
        };
        let echo = r#"read -r server; printf '{"ServerURL":"%s","Username":"%s","Secret":"hunter2"}' "$server" "$server""#;
        assert_eq!(answer(echo).await.unwrap(), password("server.example", "hunter2"));
        let token = r#"echo '{"Username":"<token>","Secret":"t"}'"#;
        assert_eq!(answer(token).await.unwrap(), Credentials::IdentityToken(Secret::new("t")));
        let nothing = "echo credentials not found in native keychain; exit 1";
        assert_eq!(answer(nothing).await.unwrap(), Credentials::Anonymous);
        for bad in ["echo hunter2", "echo hunter2; exit 1", "echo '{\"Secret\":\"hunter2\"}'"] {
            let error = answer(bad).await.unwrap_err();
            assert!(!error.reason.contains("hunter2"), "{error}");
        }
        // One that does not end its output is not listened to for ever.
        assert!(answer("yes").await.is_err());
    }

    #[test]
    fn errors_quote_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        assert!(DockerConfig::load(&path).unwrap().auths.is_empty());
        std::fs::write(&path, r#"{"auths": {"h": {"auth": ["hunter2"]}}}"#).unwrap();
        let error = DockerConfig::load(&path).unwrap_err();
        assert!(!davit_model::error::chain(&error).contains("hunter2"), "{error}");
        assert!(error.to_string().contains("line 1"), "{error}");
    }
}
