//! Certificates: the host's authorities, those of hosts.toml, client certificates.

use std::path::Path;
use std::sync::OnceLock;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::hosts::TlsFiles;
use crate::error::{Error, Result};
use crate::sys::file;

const FILE_LIMIT: u64 = 4 << 20;

/// The host's CA certificates, read once.
#[derive(Default)]
pub struct Trust {
    system: OnceLock<Vec<Certificate<'static>>>,
}

impl Trust {
    /// A host without any authority can still reach registries that have their own.
    fn system(&self) -> &[Certificate<'static>] {
        self.system.get_or_init(|| {
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                log::warn!("image: CA certificates: {error}");
            }
            found.certs.iter().map(|c| Certificate::from_der(c.as_ref()).to_owned()).collect()
        })
    }

    /// TLS as the files say. Errors name the file.
    pub fn config(&self, files: &TlsFiles) -> Result<TlsConfig> {
        let mut roots = self.system().to_vec();
        for path in &files.ca {
            let found = certificates(path)?;
            if found.is_empty() {
                return Err(wrong(path, "no certificate in it"));
            }
            roots.extend(found.iter().map(|c| Certificate::from_der(c).to_owned()));
        }
        let mut builder =
            TlsConfig::builder().root_certs(RootCerts::new_with_certs(&roots)).disable_verification(files.skip_verify.unwrap_or(false));
        if let Some((certificate, key)) = files.client.first() {
            builder = builder.client_cert(Some(client(certificate, key.as_deref().unwrap_or(certificate))?));
        }
        for (certificate, _) in files.client.iter().skip(1) {
            log::warn!("image: {}: only the first client certificate of a host is used", certificate.display());
        }
        Ok(builder.build())
    }
}

fn wrong(path: &Path, what: &str) -> Error {
    Error::precondition(format!("{}: {what}", path.display()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let data = file::read(path, FILE_LIMIT)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&data).collect();
    found.map_err(|e| wrong(path, &format!("not PEM: {e}")))
}

/// A pair that has been seen to belong together: ureq takes it for granted.
fn client(certificate: &Path, key: &Path) -> Result<ClientCert> {
    let chain = certificates(certificate)?;
    if chain.is_empty() {
        return Err(wrong(certificate, "no certificate in it"));
    }
    let data = file::read(key, FILE_LIMIT)?;
    let der = PrivateKeyDer::from_pem_slice(&data).map_err(|_| wrong(key, "no private key in it"))?;
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let checked = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::internal(format!("prepare TLS: {e}")))?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_client_auth_cert(chain.clone(), der);
    checked.map_err(|e| wrong(key, &format!("not a key for {}: {e}", certificate.display())))?;
    let chain: Vec<Certificate<'static>> = chain.iter().map(|c| Certificate::from_der(c).to_owned()).collect();
    let key = PrivateKey::from_pem(&data).map_err(|_| wrong(key, "no private key in it"))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
    }

    #[test]
    fn errors_name_the_file() {
        let trust = Trust::default();
        let files = |ca: &str, certificate: &str, key: &str| TlsFiles {
            ca: vec![fixture(ca)],
            client: vec![(fixture(certificate), Some(fixture(key)))],
            skip_verify: None,
        };
        assert!(trust.config(&files("one.crt", "two.crt", "two.key")).unwrap().client_cert().is_some());
        for (files, words) in [
            (files("one.key", "one.crt", "one.key"), "one.key: no certificate"),
            (files("absent", "one.crt", "one.key"), "absent"),
            (files("one.crt", "one.key", "one.key"), "one.key: no certificate"),
            (files("one.crt", "one.crt", "two.crt"), "two.crt: no private key"),
            (files("one.crt", "one.crt", "two.key"), "two.key: not a key for"),
        ] {
            let Err(e) = trust.config(&files) else { panic!("{words}") };
            assert!(e.message().contains(words), "{e}");
        }
    }
}
