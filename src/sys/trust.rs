//! Whom TLS clients believe: the host's certificate authorities, those of files, and servers that are their own.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name, WantsClientCert};
use rustls::crypto::{ring, verify_tls12_signature, verify_tls13_signature, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::file;
use crate::error::{Error, Result};

/// Bytes of a file of certificates.
pub const FILE_LIMIT: u64 = 4 << 20;

/// Certificates that are trusted.
#[derive(Clone)]
pub struct Authorities {
    roots: RootCertStore,
    /// The same as they are: a server may show one of them as its own.
    known: Vec<CertificateDer<'static>>,
}

impl Default for Authorities {
    fn default() -> Authorities {
        Authorities { roots: RootCertStore::empty(), known: Vec::new() }
    }
}

impl Authorities {
    /// The host's. One that cannot be read is told, and no reason to distrust the others.
    pub fn of_host() -> Authorities {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            log::warn!("CA certificates: {error}");
        }
        let mut authorities = Authorities::default();
        authorities.add(found.certs);
        authorities
    }

    /// Those in a PEM file; FAILED_PRECONDITION that names it when it has none.
    pub fn add_file(&mut self, path: &Path) -> Result<()> {
        self.add(certificates(path)?);
        Ok(())
    }

    fn add(&mut self, certificates: Vec<CertificateDer<'static>>) {
        self.roots.add_parsable_certificates(certificates.iter().cloned());
        self.known.extend(certificates);
    }
}

/// The beginning of a client's configuration that believes `authorities`; None: whoever it is.
pub fn client(authorities: Option<Arc<Authorities>>) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|e| Error::internal(format!("prepare TLS: {e}")))?.dangerous();
    Ok(builder.with_custom_certificate_verifier(Arc::new(Verifier { authorities, provider })))
}

/// The certificates of a PEM file, at least one. FAILED_PRECONDITION names the file.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let wrong = |what: &str| Error::precondition(format!("{}: {what}", path.display()));
    let data = file::read(path, FILE_LIMIT)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&data).collect();
    let found = found.map_err(|e| wrong(&format!("not PEM: {e}")))?;
    if found.is_empty() {
        return Err(wrong("no certificate in it"));
    }
    Ok(found)
}

/// Verifies servers by the authorities; None: whoever it is. Unlike webpki alone it takes a server whose own certificate has been
/// put among the authorities, as OpenSSL and Go do: a self-signed one is an authority by its own words, and webpki takes no
/// authority for a server.
struct Verifier {
    authorities: Option<Arc<Authorities>>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

type Verified<T> = std::result::Result<T, rustls::Error>;

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Verified<ServerCertVerified> {
        let Some(authorities) = &self.authorities else { return Ok(ServerCertVerified::assertion()) };
        let certificate = ParsedCertificate::try_from(shown)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        match verify_server_cert_signed_by_trust_anchor(&certificate, &authorities.roots, intermediates, now, algorithms) {
            // webpki looks at the dates before it finds either.
            Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)))
                if authorities.known.iter().any(|known| known == shown) => {}
            other => other?,
        }
        verify_server_name(&certificate, name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        match self.authorities {
            Some(_) => verify_tls12_signature(message, shown, signed, &self.provider.signature_verification_algorithms),
            None => Ok(HandshakeSignatureValid::assertion()),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        match self.authorities {
            Some(_) => verify_tls13_signature(message, shown, signed, &self.provider.signature_verification_algorithms),
            None => Ok(HandshakeSignatureValid::assertion()),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
