//! The API over TCP: who proves itself may call, and nobody else.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use davit_integration::{Daemon, loopback, wait};
use davit_proto::containerd::services::containers::v1::ListContainersRequest;
use davit_proto::containerd::services::containers::v1::containers_client::ContainersClient;
use davit_proto::containerd::services::namespaces::v1::namespaces_client::NamespacesClient;
use davit_proto::containerd::services::namespaces::v1::{CreateNamespaceRequest, Namespace};
use davit_proto::containerd::services::version::v1::version_client::VersionClient;
use hyper_util::rt::TokioIo;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use super::certificates::{Authority, Holder, Identity, settings};
use crate::root;

const VERSIONS: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

/// A channel to the daemon, with this certificate or without one.
async fn connect(
    address: &str,
    ca: &Path,
    identity: Option<&Identity>,
    version: &'static SupportedProtocolVersion,
) -> Result<Channel> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[version])?
        .with_root_certificates(roots);
    let mut config = match identity {
        Some(Identity { cert, key }) => {
            let chain = CertificateDer::pem_file_iter(cert)?.collect::<Result<Vec<_>, _>>()?;
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (connector, address) = (TlsConnector::from(Arc::new(config)), address.to_owned());
    let connector = tower::service_fn(move |_| {
        let (connector, address) = (connector.clone(), address.clone());
        async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            let name = ServerName::try_from("localhost").map_err(std::io::Error::other)?;
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("http://localhost").timeout(wait::PATIENCE);
    Ok(endpoint.connect_with_connector(connector).await?)
}

/// Connects and asks for the version.
async fn ask(
    address: &str,
    ca: &Path,
    identity: Option<&Identity>,
    version: &'static SupportedProtocolVersion,
) -> Result<()> {
    let channel = connect(address, ca, identity, version).await?;
    let told = VersionClient::new(channel).version(()).await?.into_inner();
    ensure!(!told.version.is_empty());
    Ok(())
}

/// A daemon that serves on TCP for the clients of `authority` that `more` lets in.
fn daemon(authority: &Authority, more: &str) -> Result<(Daemon, String)> {
    let address = loopback::address().to_string();
    let tcp = settings(&address, &authority.ca(), &authority.server()?);
    Ok((Daemon::start_with(&[], &format!("{tcp}{more}"))?, address))
}

#[test]
fn the_whole_api_is_served_to_who_proves_itself() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let authority = Authority::new()?;
    let (daemon, address) = daemon(&authority, "[grpc]\nmax_recv_message_size = 100000\n")?;
    let client = authority.client("anyone")?;
    runtime()?.block_on(async {
        for version in VERSIONS {
            ask(&address, &authority.ca(), Some(&client), version).await?;
        }
        let channel = connect(&address, &authority.ca(), Some(&client), VERSIONS[0]).await?;
        let namespace = |label: usize| Namespace {
            name: "over-tcp".into(),
            labels: [("l".to_owned(), "x".repeat(label))].into(),
        };
        let create = |label| CreateNamespaceRequest { namespace: Some(namespace(label)) };
        let mut namespaces = NamespacesClient::new(channel.clone());
        namespaces.create(create(10)).await?;
        let mut request = tonic::Request::new(ListContainersRequest::default());
        request.metadata_mut().insert("containerd-namespace", "over-tcp".parse()?);
        ensure!(ContainersClient::new(channel).list(request).await?.into_inner().containers.is_empty());
        // The bound is that of the socket.
        let refused = namespaces.create(create(200_000)).await.unwrap_err();
        ensure!(refused.code() == tonic::Code::OutOfRange, "{refused:?}");
        Ok(())
    })?;
    // The same daemon, on its socket.
    ensure!(daemon.ctr().run("namespaces ls -q")?.contains("over-tcp"));
    Ok(())
}

#[test]
fn nobody_else_gets_in() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (authority, stranger) = (Authority::new()?, Authority::new()?);
    let (daemon, address) = daemon(&authority, "client_common_names = [\"operator\", \"ci\"]\n")?;
    let ca = authority.ca();
    let holder = |names, expired| Holder { usage: ExtendedKeyUsagePurpose::ClientAuth, names, expired };
    let wrong = [
        ("no certificate", None),
        ("another authority's", Some(stranger.client("operator")?)),
        ("another name", Some(authority.client("operator2")?)),
        ("no name", Some(authority.client_of("nameless", &holder(&[], false))?)),
        ("an expired one", Some(authority.client_of("old", &holder(&["operator"], true))?)),
        (
            "one for servers",
            Some(authority.client_of(
                "usage",
                &Holder { usage: ExtendedKeyUsagePurpose::ServerAuth, ..holder(&["operator"], false) },
            )?),
        ),
    ];
    let right = [authority.client("operator")?, authority.client("ci")?];
    runtime()?.block_on(async {
        for version in VERSIONS {
            for (what, identity) in &wrong {
                let asked = ask(&address, &ca, identity.as_ref(), version).await;
                ensure!(asked.is_err(), "{what} was let in with {version:?}");
                ask(&address, &ca, Some(&right[0]), version).await?;
            }
            ask(&address, &ca, Some(&right[1]), version).await?;
        }
        Ok(())
    })?;
    // A client of the API without TLS gets an alert at most.
    let mut plain = TcpStream::connect(&address)?;
    plain.set_read_timeout(Some(wait::PATIENCE))?;
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    ensure!(answer.len() < 16 && !answer.contains(&0x04), "{answer:?}");
    let log = daemon.log();
    ensure!(log.contains("no client of this name may call") && log.contains("operator2"), "{log}");
    Ok(())
}

#[test]
fn who_says_nothing_keeps_nobody_out() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let authority = Authority::new()?;
    let (_daemon, address) = daemon(&authority, "")?;
    let client = authority.client("c")?;
    /// What a client is given for its handshake.
    const HANDSHAKE: Duration = Duration::from_secs(10);
    let mut last = Instant::now();
    let connect = |_| {
        last = Instant::now();
        TcpStream::connect(&address)
    };
    let silent = (0..300).map(connect).collect::<Result<Vec<_>, _>>()?;
    runtime()?.block_on(ask(&address, &authority.ca(), Some(&client), VERSIONS[0]))?;
    // The daemon says nothing to who says nothing, and so what can be read is an end.
    let closed = |mut stream: &TcpStream, patience: Duration| -> Result<bool> {
        stream.set_read_timeout(Some(patience))?;
        let error = stream.read_exact(&mut [0]).expect_err("a byte without a handshake");
        Ok(!matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    };
    // The oldest had to go when the bound of 128 was reached, the last stays until its time is over.
    ensure!(closed(&silent[0], wait::PATIENCE)?, "the first connection is still open");
    let over = closed(&silent[299], Duration::from_millis(1))?;
    // On a machine that is so slow its time may be over.
    ensure!(!over || last.elapsed() >= HANDSHAKE, "the last connection is closed already");
    ensure!(closed(&silent[299], wait::PATIENCE)?, "a handshake has no end");
    Ok(())
}

#[test]
fn a_client_on_the_c_core_calls() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let python = Path::new("/usr/bin/python3");
    let imports = Command::new(python).args(["-c", "import grpc"]).output();
    if !imports.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: needs grpc for Python (apt-get install python3-grpcio)");
        return Ok(());
    }
    let authority = Authority::new()?;
    let (_daemon, address) = daemon(&authority, "client_common_names = [\"python\"]\n")?;
    let call = |identity: &Identity| {
        let script = r#"
import grpc, sys
read = lambda path: open(path, "rb").read()
address, ca, cert, key = sys.argv[1:]
credentials = grpc.ssl_channel_credentials(read(ca), read(key), read(cert))
options = [("grpc.enable_retries", 0), ("grpc.ssl_target_name_override", "localhost")]
channel = grpc.secure_channel(address, credentials, options)
call = channel.unary_unary("/containerd.services.version.v1.Version/Version")
print(call(b"", timeout=60))
"#;
        let output = Command::new(python)
            .args(["-c", script, &address])
            .args([&authority.ca(), &identity.cert, &identity.key])
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            bail!("{said}");
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let version = call(&authority.client("python")?)?;
    ensure!(version.starts_with("b'"), "{version}");
    let refused = call(&authority.client("ruby")?).unwrap_err().to_string();
    ensure!(refused.contains("UNAVAILABLE") || refused.contains("DEADLINE"), "{refused}");
    Ok(())
}
