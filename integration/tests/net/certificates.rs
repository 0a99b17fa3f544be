//! Authorities and what they sign.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair,
};
use tempfile::TempDir;

/// An authority, and the folder of its files.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

/// The files of a certificate and its key, in PEM.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) cert: PathBuf,
    pub(super) key: PathBuf,
}

/// Who a certificate is for.
pub(super) struct Holder<'a> {
    /// What it may be used for.
    pub(super) usage: ExtendedKeyUsagePurpose,
    /// Its common names.
    pub(super) names: &'a [&'a str],
    /// It has expired long ago.
    pub(super) expired: bool,
}

impl Authority {
    pub(super) fn new() -> Result<Authority> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("ca.pem"), issuer.pem())?;
        Ok(Authority { issuer, folder })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    fn sign(&self, file: &str, holder: &Holder<'_>) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        for name in holder.names {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.extended_key_usages = vec![holder.usage.clone()];
        if holder.expired {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer)?;
        let identity =
            Identity { cert: self.path(&format!("{file}.pem")), key: self.path(&format!("{file}.key")) };
        fs::write(&identity.cert, certificate.pem())?;
        fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }

    /// A certificate for the daemon.
    pub(super) fn server(&self) -> Result<Identity> {
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        self.sign("server", &Holder { usage, names: &["davitd"], expired: false })
    }

    /// A certificate for a client of this name.
    pub(super) fn client(&self, name: &str) -> Result<Identity> {
        self.client_of(
            name,
            &Holder { usage: ExtendedKeyUsagePurpose::ClientAuth, names: &[name], expired: false },
        )
    }

    /// A certificate for a client, in files of this name.
    pub(super) fn client_of(&self, file: &str, holder: &Holder<'_>) -> Result<Identity> {
        self.sign(file, holder)
    }
}

/// The lines of `[grpc.tcp]` for these files.
pub(super) fn settings(address: &str, ca: &Path, server: &Identity) -> String {
    format!(
        "[grpc.tcp]\naddress = \"{address}\"\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n",
        ca.display(),
        server.cert.display(),
        server.key.display()
    )
}
