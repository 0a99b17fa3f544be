//! TLS: whom the client trusts, whom it shows what, and where it falls back.

use std::path::Path;
use std::sync::Arc;

use davit_distribution::{Credentials, Options, Registry, Secret};
use davit_oci::reference::Reference;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fake::{Fake, Reply};
use crate::setup::*;

/// An authority and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
struct Identity {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    fn sign(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// A server for `name`; with `clients` it wants certificates of this authority.
    fn server(&self, name: &str, clients: bool) -> Arc<ServerConfig> {
        let identity = self.sign(name, ExtendedKeyUsagePurpose::ServerAuth);
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if clients {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(self.pem().as_bytes()).unwrap()).unwrap();
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
        Arc::new(builder.with_single_cert(vec![certificate], key).unwrap())
    }
}

/// The rule for a registry that is no host of this machine: its name is not the loopback address by which it is reached.
fn hosts(fake: &Fake, rest: &str) -> String {
    format!("server = \"https://{}\"\n{rest}", fake.name())
}

async fn resolves(options: Options, fake: &Fake) -> Result<(), String> {
    let reference: Reference = "registry.example/a:v1".parse().unwrap();
    let repository = client(options).repository(&reference).await.map_err(|error| text(&error))?;
    let _ = fake;
    patiently(repository.resolve()).await.map(drop).map_err(|error| text(&error))
}

#[tokio::test]
async fn only_known_authorities_are_trusted() {
    let authority = Authority::new();
    let fake = Fake::start_with(Some(authority.server("127.0.0.1", false))).await;
    Image::new(1, &[10]).serve(&fake, "a", "v1");
    let files = tempfile::tempdir().unwrap();
    let (good, bad) = (files.path().join("good.crt"), files.path().join("bad.crt"));
    std::fs::write(&good, authority.pem()).unwrap();
    std::fs::write(&bad, Authority::new().pem()).unwrap();
    let with = |rest: &str| with_hosts(options(), "registry.example", &hosts(&fake, rest));
    let ca = |path: &Path| format!("ca = \"{}\"", path.display());

    let (_a, unknown) = with("");
    assert!(resolves(unknown, &fake).await.unwrap_err().contains("UnknownIssuer"));
    let (_b, other) = with(&ca(&bad));
    assert!(resolves(other, &fake).await.unwrap_err().contains("TLS handshake"));
    assert!(fake.seen().is_empty(), "nothing is sent to who is not trusted");
    let (_c, known) = with(&ca(&good));
    resolves(known, &fake).await.unwrap();
    let (_d, skipped) = with("skip_verify = true");
    resolves(skipped, &fake).await.unwrap();

    // Another name than that of the certificate.
    let elsewhere = Fake::start_with(Some(authority.server("other.example", false))).await;
    let (_e, wrong) = with_hosts(options(), "registry.example", &hosts(&elsewhere, &ca(&good)));
    assert!(resolves(wrong, &elsewhere).await.is_err());
    assert!(elsewhere.seen().is_empty());
    // A file that is no certificate.
    std::fs::write(&bad, "nothing").unwrap();
    let (_f, nothing) = with(&ca(&bad));
    assert!(resolves(nothing, &fake).await.unwrap_err().contains("there is no certificate in it"));
}

#[tokio::test]
async fn the_client_shows_its_certificate() {
    let authority = Authority::new();
    let fake = Fake::start_with(Some(authority.server("127.0.0.1", true))).await;
    Image::new(2, &[10]).serve(&fake, "a", "v1");
    let root = tempfile::tempdir().unwrap();
    let identity = authority.sign("client", ExtendedKeyUsagePurpose::ClientAuth);
    let folder = root.path().join("registry.example");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
    std::fs::write(folder.join("client.pem"), &identity.certificate).unwrap();
    std::fs::write(folder.join("client.key"), &identity.key).unwrap();
    std::fs::write(folder.join("both.pem"), format!("{}{}", identity.certificate, identity.key)).unwrap();
    let mut options = options();
    options.hosts.directories = vec![root.path().to_owned()];
    for (client, works) in
        [("", false), ("client = \"both.pem\"", true), ("client = [[\"client.pem\", \"client.key\"]]", true)]
    {
        let text = hosts(&fake, &format!("ca = \"ca.pem\"\n{client}"));
        std::fs::write(folder.join("hosts.toml"), text).unwrap();
        assert_eq!(resolves(options.clone(), &fake).await.is_ok(), works, "{client}");
    }
    // A key of somebody else.
    std::fs::write(folder.join("client.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(resolves(options.clone(), &fake).await.unwrap_err().contains("unusable certificate or key"));

    // Docker's layout, with the registry's own name.
    let docker = root.path().join(fake.name().replace(':', "_") + "_");
    std::fs::create_dir(&docker).unwrap();
    std::fs::write(docker.join("ca.crt"), authority.pem()).unwrap();
    std::fs::write(docker.join("client.cert"), &identity.certificate).unwrap();
    std::fs::write(docker.join("client.key"), &identity.key).unwrap();
    let repository = repository(options, &format!("{}/a:v1", fake.name())).await;
    patiently(repository.resolve()).await.unwrap();
}

#[tokio::test]
async fn this_machine_is_tried_with_tls_first() {
    // A certificate that nobody knows is good enough for a loopback address.
    let fake = Fake::start_with(Some(Authority::new().server("127.0.0.1", false))).await;
    Image::new(3, &[10]).serve(&fake, "a", "v1");
    let name = format!("{}/a:v1", fake.name());
    patiently(repository(options(), &name).await.resolve()).await.unwrap();
    // But not if the configuration says otherwise: it speaks TLS, so there is no falling back.
    let text = format!("server = \"http://{}\"\nskip_verify = false", fake.name());
    let (_root, strict) = with_hosts(options(), &fake.name(), &text);
    assert!(patiently(repository(strict, &name).await.resolve()).await.is_err());

    let plain = Fake::start().await;
    Image::new(3, &[10]).serve(&plain, "a", "v1");
    patiently(repository(options(), &format!("{}/a:v1", plain.name())).await.resolve()).await.unwrap();
    // An address with `https` is never spoken to without.
    let (_root, options) = with_hosts(options(), &plain.name(), &hosts(&plain, "skip_verify = true"));
    let before = plain.seen().len();
    assert!(patiently(repository(options, &format!("{}/a:v1", plain.name())).await.resolve()).await.is_err());
    assert_eq!(plain.seen().len(), before);
}

#[tokio::test]
async fn nobody_leads_out_of_tls() {
    let authority = Authority::new();
    let (fake, plain) =
        (Fake::start_with(Some(authority.server("127.0.0.1", false))).await, Fake::start().await);
    Image::new(4, &[10]).serve(&plain, "a", "v1");
    let target = plain.name();
    let (_root, options) = with_hosts(options(), "registry.example", &hosts(&fake, "skip_verify = true"));
    let keys =
        Keys::of(Credentials::Password { username: "user".to_owned(), password: Secret::new("hunter2") });
    let options = Options { credentials: Some(keys.clone()), ..options };
    let mut step = 0;
    fake.rule(move |seen, _| {
        step += 1;
        Some(match step {
            1 => Reply::new(307).header("location", format!("http://{target}{}", seen.path)),
            _ => {
                Reply::new(401).header("www-authenticate", format!("Bearer realm=\"http://{target}/token\""))
            }
        })
    });
    assert!(resolves(options.clone(), &fake).await.unwrap_err().contains("not encrypted"));
    assert!(resolves(options.clone(), &fake).await.unwrap_err().contains("realm is not encrypted"));
    assert!(plain.seen().is_empty());
    assert!(keys.asked.lock().unwrap().is_empty());

    // Where certificates are not checked, those of token services are, for they are told passwords.
    let service = Fake::start_with(Some(authority.server("127.0.0.1", false))).await;
    let realm = format!("Bearer realm=\"https://{}/token\"", service.name());
    let fake = Fake::start_with(Some(authority.server("127.0.0.1", false))).await;
    fake.rule(move |_, _| Some(Reply::new(401).header("www-authenticate", &realm)));
    let (_root, skipping) = with_hosts(options, "registry.example", &hosts(&fake, "skip_verify = true"));
    assert!(resolves(skipping, &fake).await.unwrap_err().contains("UnknownIssuer"));
    assert!(service.seen().is_empty());
}

/// A proxy that knows `CONNECT` and one destination.
async fn tunnel(
    destination: std::net::SocketAddr,
) -> (String, tokio::task::JoinHandle<()>, Arc<std::sync::Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let heads: Arc<std::sync::Mutex<String>> = Arc::default();
    let kept = heads.clone();
    let task = tokio::spawn(async move {
        let mut tunnels = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let kept = kept.clone();
            tunnels.spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                kept.lock().unwrap().push_str(&String::from_utf8(head).unwrap());
                let mut other = TcpStream::connect(destination).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut other).await;
            });
        }
    });
    (name, task, heads)
}

#[tokio::test]
async fn tls_goes_through_a_proxy_from_end_to_end() {
    let authority = Authority::new();
    let fake = Fake::start_with(Some(authority.server("registry.example", false))).await;
    let image = Image::new(5, &[100_000, 10]);
    image.serve(&fake, "a", "v1");
    let (proxy, task, heads) = tunnel(fake.address).await;
    let root = tempfile::tempdir().unwrap();
    let ca = root.path().join("ca.crt");
    std::fs::write(&ca, authority.pem()).unwrap();
    write_hosts(root.path(), "registry.example", &format!("ca = \"{}\"", ca.display()));
    let mut options = options();
    options.hosts.directories = vec![root.path().to_owned()];
    let registry = Registry::with_proxies(options, "", &format!("http://user:hunter2@{proxy}"), "");
    let repository = registry.repository(&"registry.example/a:v1".parse().unwrap()).await.unwrap();
    let (_store_root, store) = store();
    pull_from(&repository, &store).await.unwrap();
    image.assert_in(&store);
    let heads = heads.lock().unwrap().clone();
    assert!(heads.starts_with("CONNECT registry.example:443 HTTP/1.1\r\n"), "{heads}");
    assert!(heads.contains(BASIC));
    assert!(fake.seen().iter().all(|seen| seen.header("proxy-authorization").is_empty()));
    task.abort();
}
