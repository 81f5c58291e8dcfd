//! Certificates: the host's authorities, those of hosts.toml, client certificates; and TLS itself as a link of ureq's chain.

use std::fmt;
use std::io::{Read, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use ureq::unversioned::transport::time::Instant;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport, TransportAdapter};

use super::hosts::TlsFiles;
use super::transport::limit;
use super::url::split_port;
use crate::error::{Error, Result};
use crate::sys::file;
use crate::sys::trust::{self, Authorities};

/// The host's CA certificates, read once.
#[derive(Default)]
pub struct Trust {
    system: OnceLock<Arc<Authorities>>,
}

impl Trust {
    /// A host without any authority can still reach registries that have their own.
    fn system(&self) -> &Arc<Authorities> {
        self.system.get_or_init(|| Arc::new(Authorities::of_host()))
    }

    /// TLS as the files say. Errors name the file.
    pub fn config(&self, files: &TlsFiles) -> Result<Arc<ClientConfig>> {
        let mut authorities = self.system().clone();
        for path in &files.ca {
            Arc::make_mut(&mut authorities).add_file(path)?;
        }
        let builder = trust::client((!files.skip_verify.unwrap_or(false)).then_some(authorities))?;
        for (certificate, _) in files.client.iter().skip(1) {
            log::warn!("image: {}: only the first client certificate of a host is used", certificate.display());
        }
        let Some((certificate, key)) = files.client.first() else { return Ok(Arc::new(builder.with_no_client_auth())) };
        let key = key.as_deref().unwrap_or(certificate);
        let wrong = |what: &str| Error::precondition(format!("{}: {what}", key.display()));
        let chain = trust::certificates(certificate)?;
        let secret = PrivateKeyDer::from_pem_slice(&file::read(key, trust::FILE_LIMIT)?).map_err(|_| wrong("no private key in it"))?;
        let config = builder.with_client_auth_cert(chain, secret);
        Ok(Arc::new(config.map_err(|e| wrong(&format!("not a key for {}: {e}", certificate.display())))?))
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
        // What connecting has taken is part of it.
        let taken = match ((details.current_time)(), details.now) {
            (Instant::Exact(now), Instant::Exact(then)) => now.saturating_duration_since(then),
            _ => Duration::ZERO,
        };
        let left = limit(details.timeout)?.map(|all| all.saturating_sub(taken));
        socket.set_timeout(NextTimeout { after: left.map_or(details.timeout.after, Into::into), ..details.timeout });
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

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
    }

    /// The port of a server that shows a certificate of the fixtures and answers one request.
    fn serve(name: &str) -> u16 {
        let certificates = trust::certificates(&fixture(&format!("{name}.crt"))).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&std::fs::read(fixture(&format!("{name}.key"))).unwrap()).unwrap();
        let builder = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
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
        assert_eq!(call("issued", "localhost", &trusts("authority.crt")).unwrap(), "ok");
        assert_eq!(call("issued", "localhost", &trusts("issued.crt")).unwrap(), "ok", "the server's own, of whatever authority");
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
