//! Images from and to registries. The daemon does the work; it asks here for credentials, and tells how it goes.

use std::io::Write;
use std::time::Duration;

use davit_distribution::Credentials;
use davit_distribution::docker_config::DockerConfig;
use davit_oci::platform::Platform;
use davit_oci::reference::Reference;
use davit_proto::any;
use davit_proto::containerd::services::images::v1 as api;
use davit_proto::containerd::services::streaming::v1::StreamInit;
use davit_proto::containerd::services::transfer::v1::{TransferOptions, TransferRequest};
use davit_proto::containerd::types;
use davit_proto::containerd::types::transfer::{
    AuthRequest, AuthResponse, AuthType, Data, ImageExportStream, ImageReference, ImageStore, OciRegistry,
    Progress, RegistryResolver, UnpackConfiguration, WindowUpdate,
};
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::client::Client;
use crate::container;
use crate::display::Display;
use crate::error::{CallContext, Error, Result};
use crate::image;

/// How long the last news are waited for when the work is done.
const LAST_NEWS: Duration = Duration::from_secs(2);

/// When an image is pulled that a container is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PullPolicy {
    /// Always, although it may be there
    Always,
    /// If it is not there
    Missing,
    /// Never
    Never,
}

/// How a registry is reached beside what is configured for its hosts.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Reach {
    /// Reach the registry without encryption
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// Take the configuration of registries from this folder (default: /etc/containerd/certs.d)
    #[arg(long, value_name = "FOLDER")]
    pub(crate) hosts_dir: Option<String>,
}

/// Finds an image, and pulls it first if the policy says so.
///
/// # Errors
/// As [`image::find`] and [`pull`].
pub(crate) async fn find(
    client: &Client,
    given: &str,
    policy: PullPolicy,
    platform: &Platform,
    snapshotter: &str,
) -> Result<api::Image> {
    if policy != PullPolicy::Always {
        match image::find(client, given).await {
            Err(Error::NoImage { .. }) if policy == PullPolicy::Missing => {}
            found => return found,
        }
    }
    let reference = given.parse::<Reference>()?.with_default_tag();
    let mut display = Display::new(false);
    pull(client, &reference, platform, snapshotter, &Reach::default(), &mut display).await?;
    image::find(client, given).await
}

/// Pulls an image for one platform and unpacks it.
///
/// # Errors
/// Those of the call, and of the credentials.
pub(crate) async fn pull(
    client: &Client,
    reference: &Reference,
    platform: &Platform,
    snapshotter: &str,
    reach: &Reach,
    display: &mut Display,
) -> Result<()> {
    let wanted = to_wire(platform);
    let unpack = UnpackConfiguration { platform: Some(wanted.clone()), snapshotter: snapshotter.to_owned() };
    let store = ImageStore {
        name: reference.to_string(),
        platforms: vec![wanted],
        unpacks: vec![unpack],
        ..ImageStore::default()
    };
    transfer(client, reference, reach, display, Direction::Pull(store)).await
}

/// Pushes an image under the name `reference`.
///
/// # Errors
/// As [`pull`].
pub(crate) async fn push(
    client: &Client,
    name: &str,
    reference: &Reference,
    platform: Option<&Platform>,
    reach: &Reach,
    display: &mut Display,
) -> Result<()> {
    let platforms = platform.map(to_wire);
    let store = ImageStore {
        name: name.to_owned(),
        platforms: platforms.into_iter().collect(),
        ..ImageStore::default()
    };
    transfer(client, reference, reach, display, Direction::Push(store)).await
}

fn to_wire(platform: &Platform) -> types::Platform {
    let Platform { os, architecture, variant } = platform.clone();
    types::Platform { os, architecture, variant, ..types::Platform::default() }
}

enum Direction {
    Pull(ImageStore),
    Push(ImageStore),
}

async fn transfer(
    client: &Client,
    reference: &Reference,
    reach: &Reach,
    display: &mut Display,
    direction: Direction,
) -> Result<()> {
    let session = container::new_id()?;
    let (progress_stream, auth_stream) =
        (format!("davit-progress-{session}"), format!("davit-auth-{session}"));
    let mut news = open(client, &progress_stream).await?;
    let mut questions = open(client, &auth_stream).await?;
    let resolver = RegistryResolver {
        auth_stream,
        host_dir: reach.hosts_dir.clone().unwrap_or_default(),
        default_scheme: if reach.plain_http { "http".to_owned() } else { String::new() },
        ..RegistryResolver::default()
    };
    let registry = any::pack(&OciRegistry { reference: reference.to_string(), resolver: Some(resolver) });
    let (verb, source, destination) = match &direction {
        Direction::Pull(store) => ("pull", registry, any::pack(store)),
        Direction::Push(store) => ("push", any::pack(store), registry),
    };
    let request = TransferRequest {
        source: Some(source),
        destination: Some(destination),
        options: Some(TransferOptions { progress_stream }),
    };
    let mut transfers = client.transfer();
    let mut work = std::pin::pin!(transfers.transfer(request));
    let mut answering = std::pin::pin!(answer(&mut questions));
    let mut open = true;
    let done = loop {
        // The call and the answers go on where they were, and a message that was not taken comes again.
        tokio::select! {
            biased;
            message = news.answers.message(), if open => match message {
                Ok(Some(message)) => tell(display, &message),
                Ok(None) | Err(_) => open = false,
            },
            done = &mut work => break done.map(drop).map_err(|status| {
                let (name, host) = (reference.familiar(), reference.domain().to_owned());
                Error::Transfer { verb, name, host, status }
            }),
            error = &mut answering => break Err(error),
        }
    };
    while open && done.is_ok() {
        match tokio::time::timeout(LAST_NEWS, news.answers.message()).await {
            Ok(Ok(Some(message))) => tell(display, &message),
            _ => open = false,
        }
    }
    display.finish();
    done
}

fn tell(display: &mut Display, message: &Any) {
    // What a newer daemon may tell beside progress is not for us.
    if let Ok(Some(progress)) = any::unpack::<Progress>(message) {
        display.update(progress);
    }
}

/// Our end of a stream.
struct Open {
    sender: mpsc::Sender<Any>,
    answers: Streaming<Any>,
}

async fn open(client: &Client, id: &str) -> Result<Open> {
    let action = "open a stream";
    let (sender, messages) = mpsc::channel(4);
    let lost = || Error::Call {
        action: action.to_owned(),
        status: tonic::Status::unavailable("the daemon ended the stream"),
    };
    sender.send(any::pack(&StreamInit { id: id.to_owned() })).await.map_err(|_| lost())?;
    let mut answers = client.streaming().stream(ReceiverStream::new(messages)).await.call(action)?;
    let first = answers.message().await;
    first.map_err(|status| Error::Call { action: action.to_owned(), status })?.ok_or_else(lost)?;
    Ok(Open { sender, answers })
}

/// Answers the daemon's questions for credentials with those of Docker's configuration; ends only if it cannot.
async fn answer(questions: &mut Open) -> Error {
    while let Ok(Some(question)) = questions.answers.message().await {
        let Ok(Some(question)) = any::unpack::<AuthRequest>(&question) else { continue };
        let answer = match credentials(&question.host).await {
            Ok(answer) => answer,
            Err(error) => return error,
        };
        if questions.sender.send(any::pack(&answer)).await.is_err() {
            break;
        }
    }
    // The call says what has happened to the stream.
    std::future::pending().await
}

async fn credentials(host: &str) -> Result<AuthResponse> {
    let config = match DockerConfig::default_path() {
        Some(path) => DockerConfig::load(&path)?,
        None => DockerConfig::default(),
    };
    let found = config.find(host).await;
    let found = found.map_err(|source| Error::Credentials { host: host.to_owned(), source })?;
    let (kind, username, secret) = match found {
        Credentials::Anonymous => (AuthType::None, String::new(), String::new()),
        Credentials::Password { username, password } => {
            (AuthType::Credentials, username, password.expose().to_owned())
        }
        Credentials::IdentityToken(token) => (AuthType::Refresh, String::new(), token.expose().to_owned()),
        Credentials::Header(value) => (AuthType::Header, String::new(), value.expose().to_owned()),
    };
    Ok(AuthResponse { auth_type: kind.into(), secret, username, expire_at: None })
}

/// What the daemon may send before we have taken it.
const WINDOW: i32 = 64 << 10;

/// Writes images as an archive.
///
/// # Errors
/// Those of the call and of `out`.
pub(crate) async fn export(
    client: &Client,
    names: Vec<String>,
    platform: &Platform,
    out: &mut dyn Write,
) -> Result<()> {
    let action = format!("save {}", names.join(", "));
    let stream = format!("davit-save-{}", container::new_id()?);
    let mut bytes = open(client, &stream).await?;
    let grant = async |sender: &mpsc::Sender<Any>, update| {
        // That the stream is gone the call says.
        let _ = sender.send(any::pack(&WindowUpdate { update })).await;
    };
    grant(&bytes.sender, WINDOW).await;
    let extra = |name| ImageReference { name, ..ImageReference::default() };
    let store =
        ImageStore { extra_references: names.into_iter().map(extra).collect(), ..ImageStore::default() };
    let platforms = vec![to_wire(platform)];
    let export = ImageExportStream { stream, platforms, ..ImageExportStream::default() };
    let (source, destination) = (Some(any::pack(&store)), Some(any::pack(&export)));
    let mut transfers = client.transfer();
    let mut work = std::pin::pin!(transfers.transfer(TransferRequest { source, destination, options: None }));
    let (mut reading, mut done) = (true, false);
    while reading || !done {
        // The call goes on where it was, and a message that was not taken comes again.
        tokio::select! {
            biased;
            message = bytes.answers.message(), if reading => match message {
                Ok(Some(message)) => {
                    let Ok(Some(data)) = any::unpack::<Data>(&message) else { continue };
                    out.write_all(&data.data).map_err(Error::Output)?;
                    grant(&bytes.sender, i32::try_from(data.data.len()).unwrap_or(0)).await;
                }
                Ok(None) => reading = false,
                Err(status) => return Err(Error::Call { action, status }),
            },
            result = &mut work, if !done => {
                result.call(action.as_str())?;
                done = true;
            }
        }
    }
    out.flush().map_err(Error::Output)
}
