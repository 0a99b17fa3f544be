//! `davit login` and `davit logout`: the credentials in Docker's configuration.

use std::io::{self, BufRead, IsTerminal, Read, Write, stdin};
use std::path::PathBuf;
use std::sync::Arc;

use davit_distribution::docker_config::{self, DockerConfig};
use davit_distribution::hosts::{DIRECTORIES, HostOptions};
use davit_distribution::{CredentialError, CredentialSource, Credentials, Registry, Secret};

use crate::error::{Error, Result};
use crate::format;
use crate::terminal::Changed;
use crate::transfer::Reach;

/// The most bytes of a name or password.
const MAX_INPUT: u64 = 64 << 10;

/// Options of `davit login`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  davit login\n  davit login -u me --password-stdin ghcr.io < token")]
pub(crate) struct Options {
    /// The user (default: asked for)
    #[arg(short, long, value_name = "NAME")]
    username: Option<String>,
    /// Read the password from standard input, not from the terminal
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    reach: Reach,
    /// The registry (default: Docker Hub)
    #[arg(value_name = "SERVER", default_value = "docker.io", hide_default_value = true)]
    server: String,
}

/// Options of `davit logout`.
#[derive(Debug, clap::Args)]
pub(crate) struct LogoutOptions {
    /// The registry (default: Docker Hub)
    #[arg(value_name = "SERVER", default_value = "docker.io", hide_default_value = true)]
    server: String,
}

/// `davit login`.
pub(crate) async fn login(options: Options, out: &mut dyn Write) -> Result<()> {
    let (server, path) = (host(&options.server)?, path()?);
    let (username, password) = tokio::select! {
        // The thread that reads is left; what it has done to the terminal is undone here.
        asked = ask(options.username, options.password_stdin) => asked?,
        _ = tokio::signal::ctrl_c() => return Err(Error::usage("interrupted", "")),
    };
    let given = Given(Credentials::Password { username: username.clone(), password: password.clone() });
    let directories = match options.reach.hosts_dir {
        Some(folder) => vec![PathBuf::from(folder)],
        None => DIRECTORIES.iter().map(PathBuf::from).collect(),
    };
    let plain_http = options.reach.plain_http.then_some(true);
    let registry = Registry::new(davit_distribution::Options {
        hosts: HostOptions { directories, plain_http },
        credentials: Some(Arc::new(given)),
        ..davit_distribution::Options::default()
    });
    registry.check(&server).await.map_err(|source| Error::Login { server: server.clone(), source })?;
    docker_config::store(&path, &server, &username, &password)?;
    format::line(out, format!("Logged in to {server}; the password is in {}", path.display()))
}

/// `davit logout`.
pub(crate) fn logout(options: LogoutOptions, out: &mut dyn Write) -> Result<()> {
    let (server, path) = (host(&options.server)?, path()?);
    let text = if docker_config::forget(&path, &server)? { "Logged out of" } else { "Not logged in to" };
    format::line(out, format!("{text} {server}"))
}

fn path() -> Result<PathBuf> {
    DockerConfig::default_path()
        .ok_or_else(|| Error::usage("there is no place for credentials", "set HOME or DOCKER_CONFIG"))
}

/// The host of what people write: an address, or with a path behind it.
fn host(given: &str) -> Result<String> {
    let host = docker_config::host_of(given);
    // The name of a registry is what an image's name may begin with.
    match format!("{host}/x").parse::<davit_oci::reference::Reference>() {
        Ok(reference) if reference.domain() == host => Ok(host.to_owned()),
        Ok(reference) if host == "index.docker.io" => Ok(reference.domain().to_owned()),
        _ => Err(Error::usage(format!("{given:?} is no registry"), "want HOST or HOST:PORT")),
    }
}

/// What was typed, for whoever asks.
#[derive(Debug)]
struct Given(Credentials);

impl CredentialSource for Given {
    fn credentials<'a>(
        &'a self,
        _: &'a str,
    ) -> std::pin::Pin<Box<dyn Future<Output = std::result::Result<Credentials, CredentialError>> + Send + 'a>>
    {
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }
}

async fn ask(username: Option<String>, from_stdin: bool) -> Result<(String, Secret)> {
    let error = |source| Error::System { action: "read the password", source };
    if from_stdin {
        let hint = "name the user with -u NAME: standard input has the password";
        let username = username.ok_or_else(|| Error::usage("no user name", hint))?;
        let read = tokio::task::spawn_blocking(|| {
            let mut text = String::new();
            stdin().take(MAX_INPUT).read_to_string(&mut text).map(|_| text)
        });
        let text = read.await.map_err(|source| error(io::Error::other(source)))?.map_err(error)?;
        return given(username, text.trim_end_matches(['\r', '\n']));
    }
    if !stdin().is_terminal() {
        let hint = "pipe the password in with --password-stdin";
        return Err(Error::usage("standard input is no terminal to ask at", hint));
    }
    let username = match username {
        Some(username) => username,
        None => line("Username: ").await.map_err(error)?,
    };
    let silence = Changed::silence()?;
    let password = line("Password: ").await.map_err(error)?;
    drop(silence);
    let _ = writeln!(io::stderr());
    given(username, &password)
}

fn given(username: String, password: &str) -> Result<(String, Secret)> {
    if username.is_empty() || username.contains(':') || password.is_empty() {
        let hint = "neither may be empty, and a name has no colon";
        return Err(Error::usage("unusable name or password", hint));
    }
    Ok((username, Secret::new(password)))
}

/// A line from the terminal.
async fn line(prompt: &str) -> io::Result<String> {
    let _ = write!(io::stderr(), "{prompt}");
    let read = tokio::task::spawn_blocking(|| {
        let mut text = String::new();
        stdin().lock().take(MAX_INPUT).read_line(&mut text).map(|_| text)
    });
    let text = read.await.map_err(io::Error::other)??;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_named_as_people_write_them() {
        assert_eq!(host("docker.io").unwrap(), "docker.io");
        assert_eq!(host("https://index.docker.io/v1/").unwrap(), "docker.io");
        assert_eq!(host("https://r.example:5000/").unwrap(), "r.example:5000");
        assert_eq!(host("localhost:5000").unwrap(), "localhost:5000");
        for bad in ["", "library", "a b.example", "u@r.example"] {
            assert!(host(bad).is_err(), "{bad}");
        }
    }
}
