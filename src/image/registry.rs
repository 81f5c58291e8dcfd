//! The registry API (OCI distribution-spec) as far as a pull needs it. Credentials go to the registry itself and to the
//! token server it names, to nobody else: redirects are followed here, not by the HTTP library.

use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ureq::http::{Response, StatusCode, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::auth::{basic, parse_challenges, Auth, Challenge, Credentials};
use super::digest::{Digest, Verifier};
use super::layers::{Fault, Stream};
use super::manifest::{Descriptor, DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use super::reference::Reference;
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::lock::{Lock, Rank};

const REDIRECTS: usize = 5;
/// Bytes of a token server's answer, and of an error's text.
const TOKEN_LIMIT: u64 = 1 << 20;
const CONNECT: Duration = Duration::from_secs(15);

/// How registries are reached.
#[derive(Clone, Debug)]
pub struct RegistrySettings {
    /// `<dir>/<host[:port]>/*.crt`: CA certificates to trust for a host, beside the system's.
    pub certs_dir: Option<PathBuf>,
    /// Hosts (`host[:port]`) spoken to without TLS. Loopback hosts fall back to it by themselves.
    pub plain_http: Vec<String>,
    /// A connection that brings nothing for so long is given up.
    pub stall: Duration,
}

impl Default for RegistrySettings {
    fn default() -> RegistrySettings {
        RegistrySettings { certs_dir: None, plain_http: Vec::new(), stall: Duration::from_secs(60) }
    }
}

/// Makes connections to registries.
pub struct Client {
    settings: RegistrySettings,
    roots: OnceLock<Vec<Certificate<'static>>>,
}

/// One repository of a registry, for one pull.
pub struct Remote {
    client: Arc<Client>,
    domain: String,
    /// `https://host[:port]`.
    origin: String,
    path: String,
    agent: Agent,
    credentials: Credentials,
    /// The Authorization header that last worked.
    authorization: Lock<Option<String>>,
}

/// A manifest or index as it came.
pub struct Fetched {
    pub data: Vec<u8>,
    pub digest: Digest,
    pub media_type: String,
}

/// kubelet knows this error by the first word of its message and the code UNKNOWN.
fn unavailable(text: impl std::fmt::Display) -> Error {
    Error::new(Code::Unknown, format!("RegistryUnavailable: {text}"))
}

impl Client {
    pub fn new(settings: RegistrySettings) -> Client {
        Client { settings, roots: OnceLock::new() }
    }

    /// The repository of a reference, with what of `auth` is for it.
    pub fn remote(self: &Arc<Self>, reference: &Reference, auth: &Auth, cancel: &Cancel) -> Result<Remote> {
        let domain = reference.domain();
        let host = if domain == "docker.io" { "registry-1.docker.io" } else { domain };
        let agent = self.agent(host)?;
        let scheme = self.scheme(host, &agent, cancel)?;
        Ok(Remote {
            client: self.clone(),
            domain: domain.to_owned(),
            origin: format!("{scheme}://{host}"),
            path: reference.path().to_owned(),
            agent,
            credentials: auth.credentials(domain)?,
            authorization: Lock::new(Rank::Leaf, None),
        })
    }

    /// https, but where configured otherwise; a loopback registry that does not speak TLS is spoken to in the clear.
    fn scheme(&self, host: &str, agent: &Agent, cancel: &Cancel) -> Result<&'static str> {
        if self.settings.plain_http.iter().any(|h| h == host) {
            return Ok("http");
        }
        if !is_loopback(host) || !self.extra_roots(host)?.is_empty() {
            return Ok("https");
        }
        cancel.check()?;
        match agent.get(format!("https://{host}/v2/")).call() {
            Ok(_) => Ok("https"),
            Err(ureq::Error::Io(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                Err(unavailable(format!("connect to {host}: {e}")))
            }
            // It speaks TLS and we do not trust it: the pull says so. Anything else is no TLS.
            Err(e) if e.to_string().to_lowercase().contains("certificate") => Ok("https"),
            Err(_) => Ok("http"),
        }
    }

    fn agent(&self, host: &str) -> Result<Agent> {
        let mut roots = self.system_roots().to_vec();
        roots.extend(self.extra_roots(host)?);
        let tls = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&roots)).build();
        let mut builder = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("crisp/", env!("CARGO_PKG_VERSION")))
            .accept("")
            .tls_config(tls)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(self.settings.stall))
            .timeout_per_write(Some(self.settings.stall));
        if is_loopback(host) {
            builder = builder.proxy(None);
        }
        Ok(builder.build().new_agent())
    }

    /// The host's CA certificates, read once. A host without any can still reach registries that have their own.
    fn system_roots(&self) -> &[Certificate<'static>] {
        self.roots.get_or_init(|| {
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                log::warn!("image: CA certificates: {error}");
            }
            found.certs.iter().map(|c| Certificate::from_der(c.as_ref()).to_owned()).collect()
        })
    }

    fn extra_roots(&self, host: &str) -> Result<Vec<Certificate<'static>>> {
        let Some(dir) = self.settings.certs_dir.as_ref().map(|d| d.join(host)) else { return Ok(Vec::new()) };
        let Ok(entries) = std::fs::read_dir(&dir) else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for path in entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "crt")) {
            let data = file::read(&path, 1 << 20)?;
            for item in ureq::tls::parse_pem(&data) {
                if let ureq::tls::PemItem::Certificate(certificate) = item.context(|| format!("parse {}", path.display()))? {
                    found.push(certificate);
                }
            }
        }
        Ok(found)
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Scheme and authority of a URL, the default port left out: what credentials are bound to.
fn origin(uri: &Uri) -> Option<String> {
    let scheme = uri.scheme_str()?;
    let authority = uri.authority()?;
    if authority.as_str().contains('@') {
        return None;
    }
    let default = if scheme == "https" { 443 } else { 80 };
    let port = authority.port_u16().unwrap_or(default);
    Some(format!("{scheme}://{}:{port}", authority.host().to_ascii_lowercase()))
}

/// Where a Location header leads from `from`.
fn redirect(from: &Uri, location: &str) -> Option<Uri> {
    if location.contains("://") {
        return location.parse().ok();
    }
    let scheme = from.scheme_str()?;
    if location.starts_with("//") {
        return format!("{scheme}:{location}").parse().ok();
    }
    let authority = from.authority()?;
    let path = if location.starts_with('/') {
        location.to_owned()
    } else {
        let base = from.path().rsplit_once('/').map_or("", |(dir, _)| dir);
        format!("{base}/{location}")
    };
    format!("{scheme}://{authority}{path}").parse().ok()
}

impl Remote {
    /// Fetches a manifest or index by tag or digest. The digest is the content's; one that was asked for must match.
    pub fn manifest(&self, version: &str, limit: u64, cancel: &Cancel) -> Result<Fetched> {
        let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
        let what = format!("{}/{}:{version}", self.domain, self.path).replace(":sha256:", "@sha256:");
        let response = self.get(&format!("manifests/{version}"), &accept, &what, cancel)?;
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().trim().to_owned();
        let media_type = header("content-type").split(';').next().unwrap_or_default().trim().to_owned();
        let announced = header("docker-content-digest");
        let data = self.read(response, limit, &what)?;
        let digest = Digest::of(&data);
        let wanted = if version.contains(':') { version } else { announced.as_str() };
        if !wanted.is_empty() && wanted.starts_with("sha256:") && wanted != digest.as_str() {
            return Err(Error::precondition(format!("manifest of {what}: received {digest}, want {wanted}")));
        }
        Ok(Fetched { data, digest, media_type })
    }

    /// Fetches a small blob whole.
    pub fn blob(&self, descriptor: &Descriptor, limit: u64, cancel: &Cancel) -> Result<Vec<u8>> {
        if descriptor.size > limit {
            return Err(Error::precondition(format!("blob {}: {} bytes, at most {limit} are allowed", descriptor.digest, descriptor.size)));
        }
        let what = format!("blob {}", descriptor.digest);
        let response = self.get(&format!("blobs/{}", descriptor.digest), "*/*", &what, cancel)?;
        let data = self.read(response, descriptor.size, &what)?;
        if Digest::of(&data) != descriptor.digest || data.len() as u64 != descriptor.size {
            return Err(Error::precondition(format!("{what}: received {} ({} bytes)", Digest::of(&data), data.len())));
        }
        Ok(data)
    }

    /// Opens the stream of a layer.
    pub fn layer(&self, descriptor: &Descriptor, cancel: &Cancel) -> Result<Stream> {
        let what = format!("blob {}", descriptor.digest);
        let response = self.get(&format!("blobs/{}", descriptor.digest), "*/*", &what, cancel)?;
        if let Some(length) = response.body().content_length().filter(|l| *l != descriptor.size) {
            return Err(Error::precondition(format!("{what}: the registry sends {length} bytes, the manifest says {}", descriptor.size)));
        }
        let fault: Fault = Arc::new(Lock::new(Rank::Leaf, None));
        let reader = Transfer {
            inner: Box::new(response.into_body().into_reader()),
            left: descriptor.size,
            what: format!("{what} from {}", self.domain),
            cancel: cancel.clone(),
            fault: fault.clone(),
        };
        Ok(Stream { fault, ..Stream::new(reader) })
    }

    fn read(&self, response: Response<Body>, limit: u64, what: &str) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        let mut reader = Verifier::new(response.into_body().into_reader(), limit);
        reader.read_to_end(&mut data).map_err(|e| match e.kind() {
            // The verifier's own: more bytes than allowed.
            std::io::ErrorKind::Other if data.len() as u64 >= limit => Error::precondition(format!("{what}: {e}")),
            _ => unavailable(format!("read {what} from {}: {e}", self.domain)),
        })?;
        Ok(data)
    }

    /// GET of `/v2/<path>/<rest>`, authenticating when asked to.
    fn get(&self, rest: &str, accept: &str, what: &str, cancel: &Cancel) -> Result<Response<Body>> {
        let url: Uri = format!("{}/v2/{}/{rest}", self.origin, self.path).parse().map_err(|_| Error::invalid(format!("{what}: no URL")))?;
        let before = self.authorization.lock().clone();
        let mut response = self.send(&url, accept, before.as_deref(), cancel)?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let challenges: Vec<Challenge> =
                response.headers().get_all("www-authenticate").iter().filter_map(|v| v.to_str().ok()).flat_map(parse_challenges).collect();
            if let Some(authorization) = self.answer(&challenges, cancel)? {
                response = self.send(&url, accept, Some(&authorization), cancel)?;
                if response.status() != StatusCode::UNAUTHORIZED {
                    *self.authorization.lock() = Some(authorization);
                }
            }
        }
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        Err(self.refusal(response, what))
    }

    /// One GET, redirects followed. Only requests to the registry's own origin carry the Authorization header.
    fn send(&self, url: &Uri, accept: &str, authorization: Option<&str>, cancel: &Cancel) -> Result<Response<Body>> {
        let home = origin(url);
        let mut url = url.clone();
        for _ in 0..=REDIRECTS {
            cancel.check()?;
            let at_home = origin(&url) == home;
            let host = url.authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
            let foreign;
            let agent = if at_home {
                &self.agent
            } else {
                foreign = self.client.agent(&host)?;
                &foreign
            };
            let mut request = agent.get(url.clone()).header("accept", accept);
            if let Some(authorization) = authorization.filter(|_| at_home) {
                request = request.header("authorization", authorization);
            }
            let response = request.call().map_err(|e| connect_error(&host, e))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get("location").and_then(|v| v.to_str().ok()).unwrap_or_default();
            let next = redirect(&url, location).filter(|n| origin(n).is_some());
            let next = next.ok_or_else(|| Error::precondition(format!("{host}: redirect to nowhere")))?;
            if url.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(Error::precondition(format!("{host}: redirect from https to {}", next.scheme_str().unwrap_or_default())));
            }
            url = next;
        }
        Err(Error::precondition(format!("{}: more than {REDIRECTS} redirects", self.domain)))
    }

    /// The Authorization header that answers a challenge; None when we have nothing to answer with.
    fn answer(&self, challenges: &[Challenge], cancel: &Cancel) -> Result<Option<String>> {
        if let Some(bearer) = challenges.iter().find(|c| c.scheme == "bearer") {
            return match &self.credentials {
                Credentials::Registry(token) => Ok(Some(format!("Bearer {token}"))),
                _ => self.token(bearer, cancel).map(|token| Some(format!("Bearer {token}"))),
            };
        }
        if challenges.iter().any(|c| c.scheme == "basic") {
            if let Credentials::Basic { username, password } = &self.credentials {
                return Ok(Some(basic(username, password)));
            }
        }
        Ok(None)
    }

    /// Asks the token server that the registry named.
    fn token(&self, challenge: &Challenge, cancel: &Cancel) -> Result<String> {
        cancel.check()?;
        let parameter = |key: &str| challenge.parameters.get(key).map(String::as_str).unwrap_or_default();
        let wrong = |why: &str| Error::new(Code::PermissionDenied, format!("token server of {}: {why}", self.domain));
        let realm: Uri = parameter("realm").parse().map_err(|_| wrong("the registry names none"))?;
        let host = realm.authority().map(|a| a.as_str().to_owned()).filter(|_| origin(&realm).is_some()).ok_or_else(|| wrong("no URL"))?;
        // A registry without TLS may have a token server without; no other may make us send passwords in the clear.
        if realm.scheme_str() != Some("https") && self.origin.starts_with("https:") {
            return Err(wrong("without TLS"));
        }
        let default_scope = format!("repository:{}:pull", self.path);
        let scope = Some(parameter("scope")).filter(|s| !s.is_empty()).unwrap_or(&default_scope);
        let agent = self.client.agent(&host)?;
        let sent = match &self.credentials {
            Credentials::Identity(token) => agent.post(realm).send_form([
                ("grant_type", "refresh_token"),
                ("refresh_token", token),
                ("client_id", "crisp"),
                ("service", parameter("service")),
                ("scope", scope),
            ]),
            credentials => {
                let mut request = agent.get(realm).query("scope", scope);
                if !parameter("service").is_empty() {
                    request = request.query("service", parameter("service"));
                }
                if let Credentials::Basic { username, password } = credentials {
                    request = request.query("account", username).header("authorization", basic(username, password));
                }
                request.call()
            }
        };
        let response = sent.map_err(|e| connect_error(&host, e))?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response, &format!("token from {host}")));
        }
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let data = self.read(response, TOKEN_LIMIT, "token")?;
        // The parser's error could quote the answer: it is not shown.
        let answer: Answer = serde_json::from_slice(&data).map_err(|_| wrong("its answer is not a token"))?;
        let token = answer.token.filter(|t| !t.is_empty()).or(answer.access_token).unwrap_or_default();
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong("its answer is not a token"));
        }
        Ok(token)
    }

    /// The error of an answer that is not 200.
    fn refusal(&self, response: Response<Body>, what: &str) -> Error {
        let status = response.status();
        let mut text = Vec::new();
        let _ = response.into_body().into_reader().take(4096).read_to_end(&mut text);
        let said = said(&text).map(|s| format!(": {s}")).unwrap_or_default();
        let words = format!("{what}: {} answered {}{said}", self.domain, status.as_u16());
        match status.as_u16() {
            401 | 403 => {
                let who = match &self.credentials {
                    Credentials::Anonymous => "without credentials",
                    _ => "with the credentials given",
                };
                Error::new(Code::PermissionDenied, format!("pull {who} is refused: {words}"))
            }
            404 => Error::not_found(words),
            408 | 429 | 500..=599 => unavailable(words),
            _ => Error::new(Code::Unknown, words),
        }
    }
}

fn connect_error(host: &str, error: ureq::Error) -> Error {
    match Err::<(), _>(error).context(|| format!("talk to {host}")) {
        Err(e) => unavailable(e),
        Ok(()) => unavailable(host),
    }
}

/// The message in a registry's JSON error, without control characters.
fn said(body: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(body).ok()?;
    let first = json.get("errors")?.get(0)?;
    let text = first.get("message").or(first.get("code"))?.as_str()?;
    Some(text.chars().filter(|c| !c.is_control()).take(300).collect())
}

/// A layer on its way: cancellation between reads, and errors that say who failed.
struct Transfer {
    inner: Box<dyn Read + Send>,
    left: u64,
    what: String,
    cancel: Cancel,
    fault: Fault,
}

impl Transfer {
    fn fail(&self, error: Error) -> std::io::Error {
        let text = error.to_string();
        *self.fault.lock() = Some(error);
        std::io::Error::other(text)
    }
}

impl Read for Transfer {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.cancel.check().map_err(|e| self.fail(e))?;
        match self.inner.read(buffer) {
            Ok(0) if self.left > 0 && !buffer.is_empty() => {
                Err(self.fail(unavailable(format!("{}: ended {} bytes early", self.what, self.left))))
            }
            Ok(n) => {
                crate::telemetry::pull_received(n as u64);
                self.left = self.left.saturating_sub(n as u64);
                Ok(n)
            }
            Err(e) => Err(self.fail(unavailable(format!("{}: {e}", self.what)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_and_redirects() {
        let uri = |s: &str| s.parse::<Uri>().unwrap();
        assert_eq!(origin(&uri("https://A.io/x")), origin(&uri("https://a.io:443/y")));
        assert_ne!(origin(&uri("https://a.io/x")), origin(&uri("http://a.io/x")));
        assert_ne!(origin(&uri("https://a.io/x")), origin(&uri("https://a.io:444/x")));
        assert_eq!(origin(&uri("https://user@a.io/x")), None);
        let from = uri("https://a.io/v2/x/blobs/y?q=1");
        assert_eq!(redirect(&from, "https://b.io/z").unwrap(), "https://b.io/z");
        assert_eq!(redirect(&from, "//b.io/z").unwrap(), "https://b.io/z");
        assert_eq!(redirect(&from, "/z?a=b").unwrap(), "https://a.io/z?a=b");
        assert_eq!(redirect(&from, "z").unwrap(), "https://a.io/v2/x/blobs/z");
    }

    #[test]
    fn loopback_hosts() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:5000", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.evil.io", "10.0.0.1", "[fe80::1]:5", "q.io"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn errors_of_registries() {
        assert_eq!(said(br#"{"errors":[{"code":"X","message":"no\nway"}]}"#).unwrap(), "noway");
        assert_eq!(said(b"<html>"), None);
    }
}
