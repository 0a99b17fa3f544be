//! TLS: what is trusted, and who the client is.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tracing::warn;

use crate::hosts::{ClientCertificate, HostsError, Settings};

/// The CA certificates of the machine, read when they are needed first.
#[derive(Debug, Default)]
pub(crate) struct Roots(OnceLock<RootCertStore>);

impl Roots {
    /// The roots; none at all is fine if a host brings its own.
    fn get(&self) -> &RootCertStore {
        self.0.get_or_init(|| {
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                warn!(%error, "cannot read a CA certificate of this machine");
            }
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(found.certs);
            roots
        })
    }
}

/// The configurations of a host.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    /// For the host and the places that it names.
    pub(crate) usual: Arc<ClientConfig>,
    /// For other hosts that are sent secrets: their certificates are checked although `skip_verify` is set.
    pub(crate) strict: Arc<ClientConfig>,
}

/// Makes the configurations of a host. Blocks on files.
///
/// # Errors
/// [`HostsError::Certificate`].
pub(crate) fn configure(roots: &Roots, settings: &Settings) -> Result<Tls, HostsError> {
    let provider = Arc::new(ring::default_provider());
    let mut trusted = roots.get().clone();
    for path in &settings.certificate_authorities {
        let before = trusted.len();
        for certificate in certificates(path)? {
            trusted.add(certificate).map_err(|error| unusable(path, error))?;
        }
        if trusted.len() == before {
            return Err(unusable(path, "there is no certificate in it"));
        }
    }
    let skip = settings.skip_verify == Some(true);
    let keys = settings
        .client_certificates
        .iter()
        .map(|pair| certified_key(&provider, pair).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()?;
    let config = |skip: bool| {
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("the provider has suites for both versions");
        let builder = if skip {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(NoVerification(provider.clone())))
        } else {
            builder.with_root_certificates(trusted.clone())
        };
        let mut config = if keys.is_empty() {
            builder.with_no_client_auth()
        } else {
            builder.with_client_cert_resolver(Arc::new(ClientCertificates(keys.clone())))
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Arc::new(config)
    };
    let usual = config(skip);
    let strict = if skip { config(false) } else { usual.clone() };
    Ok(Tls { usual, strict })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, HostsError> {
    CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(|error| unusable(path, error))
}

fn certified_key(provider: &CryptoProvider, pair: &ClientCertificate) -> Result<CertifiedKey, HostsError> {
    let chain = certificates(&pair.certificate)?;
    if chain.is_empty() {
        return Err(unusable(&pair.certificate, "there is no certificate in it"));
    }
    let path = pair.key.as_ref().unwrap_or(&pair.certificate);
    let key = PrivateKeyDer::from_pem_file(path).map_err(|error| unusable(path, error))?;
    let key = provider.key_provider.load_private_key(key).map_err(|error| unusable(path, error))?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|error| unusable(path, error))?;
    Ok(certified)
}

fn unusable(path: &Path, reason: impl ToString) -> HostsError {
    HostsError::Certificate { path: path.to_owned(), reason: reason.to_string() }
}

/// The client's certificates: the first whose key can sign as the server wants.
#[derive(Debug)]
struct ClientCertificates(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for ClientCertificates {
    fn resolve(&self, _: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.iter().find(|certified| certified.key.choose_scheme(schemes).is_some()).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// `skip_verify`: any certificate will do. Signatures are still checked, as they tell a broken connection.
#[derive(Debug)]
struct NoVerification(Arc<CryptoProvider>);

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
