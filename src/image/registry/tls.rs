//! Certificates: the host's authorities, those of hosts.toml, client certificates; and TLS itself as a link of ureq's chain.

use std::fmt;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{ring, verify_tls12_signature, verify_tls13_signature, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport, TransportAdapter};

use super::hosts::TlsFiles;
use super::url::split_port;
use crate::error::{Error, Result};
use crate::sys::file;

const FILE_LIMIT: u64 = 4 << 20;

/// The host's CA certificates, read once.
#[derive(Default)]
pub struct Trust {
    system: OnceLock<Arc<Authorities>>,
}

impl Trust {
    /// A host without any authority can still reach registries that have their own.
    fn system(&self) -> &Arc<Authorities> {
        self.system.get_or_init(|| {
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                log::warn!("image: CA certificates: {error}");
            }
            let mut authorities = Authorities { roots: RootCertStore::empty(), known: Vec::new() };
            authorities.add(found.certs);
            Arc::new(authorities)
        })
    }

    /// TLS as the files say. Errors name the file.
    pub fn config(&self, files: &TlsFiles) -> Result<Arc<ClientConfig>> {
        let mut authorities = self.system().clone();
        for path in &files.ca {
            Arc::make_mut(&mut authorities).add(some_certificates(path)?);
        }
        let provider = Arc::new(ring::default_provider());
        let authorities = (!files.skip_verify.unwrap_or(false)).then_some(authorities);
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::internal(format!("prepare TLS: {e}")))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier { authorities, provider }));
        for (certificate, _) in files.client.iter().skip(1) {
            log::warn!("image: {}: only the first client certificate of a host is used", certificate.display());
        }
        let Some((certificate, key)) = files.client.first() else { return Ok(Arc::new(builder.with_no_client_auth())) };
        let key = key.as_deref().unwrap_or(certificate);
        let chain = some_certificates(certificate)?;
        let secret = PrivateKeyDer::from_pem_slice(&file::read(key, FILE_LIMIT)?).map_err(|_| wrong(key, "no private key in it"))?;
        let config = builder.with_client_auth_cert(chain, secret);
        Ok(Arc::new(config.map_err(|e| wrong(key, &format!("not a key for {}: {e}", certificate.display())))?))
    }
}

/// Certificates that are trusted.
#[derive(Clone)]
struct Authorities {
    roots: RootCertStore,
    /// The same as they are: a server may show one of them as its own.
    known: Vec<CertificateDer<'static>>,
}

impl Authorities {
    fn add(&mut self, certificates: Vec<CertificateDer<'static>>) {
        self.roots.add_parsable_certificates(certificates.iter().cloned());
        self.known.extend(certificates);
    }
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

/// Puts TLS around a connection to an https address.
pub struct TlsConnector {
    pub config: Arc<ClientConfig>,
}

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsConnector")
    }
}

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Either<In, Tls>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> std::result::Result<Option<Self::Out>, ureq::Error> {
        let Some(plain) = chained else { return Ok(None) };
        if !details.needs_tls() || plain.is_tls() {
            return Ok(Some(Either::A(plain)));
        }
        let host = details.uri.authority().map_or("", |authority| split_port(authority.host()).0);
        let name = ServerName::try_from(host).map_err(|_| ureq::Error::BadUri(details.uri.to_string()))?.to_owned();
        let mut connection = ClientConnection::new(self.config.clone(), name).map_err(|e| ureq::Error::Io(std::io::Error::other(e)))?;
        let mut socket = TransportAdapter::new(plain.boxed(), details.current_time.clone());
        socket.set_timeout(details.timeout);
        connection.complete_io(&mut socket)?;
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Either::B(Tls { buffers, stream: StreamOwned { conn: connection, sock: socket } })))
    }
}

/// A connection with TLS, and its buffers.
pub struct Tls {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Transport for Tls {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> std::result::Result<(), ureq::Error> {
        self.stream.get_mut().set_timeout(timeout);
        self.stream.write_all(&self.buffers.output()[..amount])?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> std::result::Result<bool, ureq::Error> {
        self.stream.get_mut().set_timeout(timeout);
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

fn wrong(path: &Path, what: &str) -> Error {
    Error::precondition(format!("{}: {what}", path.display()))
}

fn some_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let data = file::read(path, FILE_LIMIT)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&data).collect();
    let found = found.map_err(|e| wrong(path, &format!("not PEM: {e}")))?;
    if found.is_empty() {
        return Err(wrong(path, "no certificate in it"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
    }

    /// The port of a server that shows a certificate of the fixtures and answers one request.
    fn serve(name: &str) -> u16 {
        let certificates = some_certificates(&fixture(&format!("{name}.crt"))).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&std::fs::read(fixture(&format!("{name}.key"))).unwrap()).unwrap();
        let builder = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth().with_single_cert(certificates, key);
        let config = Arc::new(config.unwrap());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let mut stream = StreamOwned::new(rustls::ServerConnection::new(config).unwrap(), socket);
            if stream.read(&mut [0; 4096]).is_ok() {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok");
            }
        });
        port
    }

    /// The fixtures' certificates are self-signed, as `openssl req -x509` makes them: webpki alone takes none for a server.
    #[test]
    fn a_server_may_be_its_own_authority() {
        use crate::image::registry::transport::{agent, Link};
        use crate::sys::cancel::Cancel;
        let call = |server: &str, host: &str, files: &TlsFiles| {
            let (tls, wait) = (Trust::default().config(files).unwrap(), std::time::Duration::from_secs(30));
            let agent = agent(Link { tls, proxy: None, connect: wait, stall: wait, cancel: &Cancel::never() });
            let answer = agent.get(format!("https://{host}:{}/", serve(server))).call().map_err(|e| e.to_string())?;
            Ok::<_, String>(answer.into_body().read_to_string().unwrap())
        };
        let trusts = |ca: &str| TlsFiles { ca: vec![fixture(ca)], ..TlsFiles::default() };
        assert_eq!(call("one", "localhost", &trusts("one.crt")).unwrap(), "ok");
        assert_eq!(call("one", "127.0.0.1", &trusts("one.crt")).unwrap(), "ok");
        let e = call("two", "localhost", &trusts("one.crt")).unwrap_err();
        assert!(e.contains("certificate"), "another's: {e}");
        let e = call("one", "localhost", &TlsFiles::default()).unwrap_err();
        assert!(e.contains("certificate"), "nobody's: {e}");
        let e = call("one", "0.0.0.0", &trusts("one.crt")).unwrap_err();
        assert!(e.contains("certificate"), "for another name: {e}");
        assert_eq!(call("one", "localhost", &TlsFiles { skip_verify: Some(true), ..TlsFiles::default() }).unwrap(), "ok");
    }

    #[test]
    fn errors_name_the_file() {
        let trust = Trust::default();
        let files = |ca: &str, certificate: &str, key: &str| TlsFiles {
            ca: vec![fixture(ca)],
            client: vec![(fixture(certificate), Some(fixture(key)))],
            skip_verify: None,
        };
        assert!(trust.config(&files("one.crt", "two.crt", "two.key")).unwrap().client_auth_cert_resolver.has_certs());
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
