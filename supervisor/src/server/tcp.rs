//! The API over TCP, with mutual TLS or not at all: who may call is root on this host.
//!
//! containerd has such a server for the services of CRI, in the clear if its file names no certificate. Here there is none
//! without a certificate of the daemon and the authorities of its clients, not even on the loopback, which every user of the host
//! and every container in its network namespace can reach. Each connection proves who it is: no session is
//! resumed, and a certificate that has expired opens none.
//!
//! A handshake is a task of its own with a deadline, and their number is bounded ([`Crowd`]).

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::KeepAlive;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::crowd::Crowd;
use crate::pages::PAUSE;

/// The most connections that have not proven themselves yet.
const HANDSHAKES: usize = 128;

/// A client gets so long to prove itself.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why there is no server on TCP.
#[derive(Debug, thiserror::Error)]
pub(super) enum TcpError {
    /// A file that does not hold what it should.
    #[error("cannot read {what} in {}", path.display())]
    Pem {
        /// What was looked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it is not there.
        source: pem::Error,
    },
    /// A file without any certificate.
    #[error("there is no certificate in {}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A certificate that cannot be an authority's.
    #[error("no authority can be taken from {}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// Authorities that nothing can be checked against.
    #[error("clients cannot be checked against {}", path.display())]
    Verifier {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: VerifierBuilderError,
    },
    /// A key that is not its owner's alone to choose.
    #[error("others than its owner may write the key {}", path.display())]
    Writable {
        /// The file.
        path: PathBuf,
    },
    /// A certificate that is not the key's.
    #[error("{} is no certificate of the key {}", cert.display(), key.display())]
    Identity {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// The address cannot be had.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// Why not.
        source: io::Error,
    },
}

/// A connection that has proven itself.
pub(super) type Connection = TlsStream<TcpStream>;

/// A socket that is listened on, and what its clients must prove.
pub(super) struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

/// Listens on the address of the configuration, if there is one. Blocks on the files it names.
///
/// # Errors
/// A file that is not there or not what it should be; an address that cannot be had.
pub(super) async fn listen(config: &config::Tcp) -> Result<Option<Server>, TcpError> {
    let address = &config.address;
    if address.is_empty() {
        return Ok(None);
    }
    let acceptor = TlsAcceptor::from(Arc::new(server_config(config)?));
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| TcpError::Listen { address: address.clone(), source })?;
    Ok(Some(Server { listener, acceptor }))
}

fn server_config(config: &config::Tcp) -> Result<ServerConfig, TcpError> {
    let provider = Arc::new(ring::default_provider());
    let mut authorities = RootCertStore::empty();
    for certificate in certificates(&config.ca)? {
        let failed = |source| TcpError::Authority { path: config.ca.clone(), source };
        authorities.add(certificate).map_err(failed)?;
    }
    let chains = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider.clone())
        .build()
        .map_err(|source| TcpError::Verifier { path: config.ca.clone(), source })?;
    let clients = Arc::new(Clients { chains, names: config.client_common_names.clone() });
    let chain = certificates(&config.cert)?;
    let key = PrivateKeyDer::from_pem_file(&config.key).map_err(|source| TcpError::Pem {
        what: "the key",
        path: config.key.clone(),
        source,
    })?;
    check_mode(&config.key)?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has suites for TLS 1.2 and 1.3")
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .map_err(|source| TcpError::Identity {
            cert: config.cert.clone(),
            key: config.key.clone(),
            source,
        })?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok(server)
}

/// Refuses a key that others than its owner may replace, and warns of one that they may read.
fn check_mode(key: &Path) -> Result<(), TcpError> {
    let mode = std::fs::metadata(key).map_or(0, |found| found.permissions().mode());
    if mode & 0o022 != 0 {
        return Err(TcpError::Writable { path: key.to_owned() });
    }
    if mode & 0o077 != 0 {
        tracing::warn!(key = %key.display(), "others than its owner may read the key");
    }
    Ok(())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TcpError> {
    let failed = |source| TcpError::Pem { what: "a certificate", path: path.to_owned(), source };
    let found: Vec<_> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(failed)?;
    if found.is_empty() {
        return Err(TcpError::Empty { path: path.to_owned() });
    }
    Ok(found)
}

/// Checks clients: first their chain, then their name.
#[derive(Debug)]
struct Clients {
    chains: Arc<dyn ClientCertVerifier>,
    /// None: every name will do.
    names: Vec<String>,
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chains.verify_client_cert(end_entity, intermediates, now)?;
        if self.names.is_empty() {
            return Ok(verified);
        }
        let name = common_name(end_entity);
        if !name.as_ref().is_some_and(|name| self.names.contains(name)) {
            tracing::warn!(name, "no client of this name may call over TCP");
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// The common name of a certificate. One with several has none: which of them its authority checked nobody knows.
fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let mut found = parsed.subject().iter_common_name();
    let (Some(name), None) = (found.next(), found.next()) else { return None };
    name.as_str().ok().map(str::to_owned)
}

impl Server {
    /// The address that is listened on.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts connections until `stop`, and gives those that have proven themselves.
    pub(super) fn connections(self, stop: CancellationToken) -> mpsc::Receiver<io::Result<Connection>> {
        let (proven, connections) = mpsc::channel(HANDSHAKES);
        tokio::spawn(self.accept(proven, stop));
        connections
    }

    async fn accept(self, proven: mpsc::Sender<io::Result<Connection>>, stop: CancellationToken) {
        let mut handshakes = Crowd::new(HANDSHAKES);
        loop {
            // An accept that is dropped has accepted nothing.
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    if !handshakes.admit(prove(self.acceptor.clone(), stream, peer, proven.clone())) {
                        tracing::debug!("too many TLS handshakes; the oldest is given up");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection over TCP");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Sets what a connection should have; it can do without.
fn prepare(stream: &TcpStream) {
    // Small answers must not wait for the acknowledgement of those before.
    let _ = stream.set_nodelay(true);
    // HTTP/2 asks a silent client whether it is there only when it has begun to speak. One whose machine goes away before that
    // would keep its descriptor for ever.
    let _ = setsockopt(stream, KeepAlive, &true);
}

/// Shakes hands with a client, and hands its connection on.
async fn prove(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    proven: mpsc::Sender<io::Result<Connection>>,
) {
    prepare(&stream);
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(connection)) => {
            // Nobody takes it when the daemon ends.
            let _ = proven.send(Ok(connection)).await;
        }
        Ok(Err(error)) => tracing::info!(%peer, %error, "refused a connection over TCP"),
        Err(_) => tracing::info!(%peer, "a client took too long for its TLS handshake"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn a_key_that_others_may_replace_is_refused() {
        let key = tempfile::NamedTempFile::new().unwrap();
        for (mode, is_good) in [(0o600, true), (0o644, true), (0o620, false), (0o602, false), (0o777, false)]
        {
            set_permissions(key.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_mode(key.path()).is_ok(), is_good, "{mode:o}");
        }
    }

    #[tokio::test]
    async fn the_kernel_looks_after_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (stream, _) = accepted.unwrap();
        prepare(&stream);
        assert!(getsockopt(&stream, KeepAlive).unwrap());
    }
}
