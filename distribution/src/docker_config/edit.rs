//! Changing the file: what `docker login` and `docker logout` write, and nothing else of it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::{DockerConfig, DockerConfigError, host_of, parse, read, server_name};
use crate::credentials::Secret;

/// Puts a user and the password for a host into the file, which only its owner can read then. What else is in it stays.
///
/// # Errors
/// [`DockerConfigError`]; where a helper keeps the secrets of the host, nothing is written.
pub fn store(path: &Path, host: &str, username: &str, password: &Secret) -> Result<(), DockerConfigError> {
    let mut document = open(path, host)?;
    let auth = STANDARD.encode(format!("{username}:{}", password.expose()));
    let auths = document.entry("auths").or_insert_with(|| Value::Object(Map::new()));
    let Some(auths) = auths.as_object_mut() else { return Err(malformed(path)) };
    let server = server_name(host);
    auths.retain(|key, _| key == server || host_of(key) != host_of(server));
    auths.insert(server.to_owned(), json!({ "auth": auth }));
    write(path, &document)
}

/// Removes what the file has for a host; false if that is nothing.
///
/// # Errors
/// As [`store`].
pub fn forget(path: &Path, host: &str) -> Result<bool, DockerConfigError> {
    let mut document = open(path, host)?;
    let Some(auths) = document.get_mut("auths").and_then(Value::as_object_mut) else { return Ok(false) };
    let (before, server) = (auths.len(), server_name(host));
    auths.retain(|key, _| host_of(key) != host_of(server));
    if auths.len() == before {
        return Ok(false);
    }
    write(path, &document).map(|()| true)
}

fn malformed(path: &Path) -> DockerConfigError {
    DockerConfigError::Syntax { path: path.to_owned(), line: 1, column: 1 }
}

/// All of the file, if it is ours to change.
fn open(path: &Path, host: &str) -> Result<Map<String, Value>, DockerConfigError> {
    let text = read(path)?;
    // What could not be read again is not written over.
    let config: DockerConfig = parse(path, &text)?;
    if let Some((helper, _)) = config.helper(host) {
        return Err(DockerConfigError::Helper { path: path.to_owned(), helper: helper.to_owned() });
    }
    parse(path, &text)
}

/// Replaces the file by a new one, so that there is always a whole one. A link stays a link.
fn write(path: &Path, document: &Map<String, Value>) -> Result<(), DockerConfigError> {
    let path: PathBuf = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let error = |source| DockerConfigError::Write { path: path.clone(), source };
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(error)?;
    }
    let mut text = serde_json::to_vec_pretty(document).map_err(|source| error(source.into()))?;
    text.push(b'\n');
    let new = path.with_extension(format!("json.{}", std::process::id()));
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.map_err(error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::credentials::Credentials;

    #[tokio::test]
    async fn a_login_is_kept_alone_and_its_logout_leaves_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker/config.json");
        let (user, password) = ("u", Secret::new("hunter2"));
        store(&path, "docker.io", user, &password).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        fs::write(
            &path,
            fs::read_to_string(&path).unwrap().replacen('{', r#"{"HttpHeaders": {"a": "b"},"#, 1),
        )
        .unwrap();
        store(&path, "r.example:5000", user, &password).unwrap();
        let kept = Credentials::Password { username: user.to_owned(), password: password.clone() };
        let config = DockerConfig::load(&path).unwrap();
        assert_eq!(config.find("registry-1.docker.io").await.unwrap(), kept);
        assert_eq!(config.find("r.example:5000").await.unwrap(), kept);
        assert!(forget(&path, "docker.io").unwrap() && !forget(&path, "docker.io").unwrap());
        let config = DockerConfig::load(&path).unwrap();
        assert_eq!(config.find("docker.io").await.unwrap(), Credentials::Anonymous);
        assert_eq!(config.find("r.example:5000").await.unwrap(), kept);
        assert!(fs::read_to_string(&path).unwrap().contains("HttpHeaders"));
    }

    #[test]
    fn what_a_helper_keeps_or_nobody_can_read_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        for text in [r#"{"credsStore": "secretservice"}"#, r#"{"auths": 3}"#, "{"] {
            fs::write(&path, text).unwrap();
            assert!(store(&path, "r.example", "u", &Secret::new("p")).is_err(), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
