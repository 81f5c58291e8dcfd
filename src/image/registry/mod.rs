//! The registry API (OCI distribution-spec) as far as a pull needs it: hosts in the order of hosts.toml, each asked again
//! when that may help, until one gives what is wanted.

mod endpoint;
/// hosts.toml and certificate directories.
pub mod hosts;
mod proxy;
mod resume;
mod retry;
mod tls;
mod token;
mod transport;
/// Origins, redirects, loopback.
mod url;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::auth::{Auth, Keyring, Sources};
use super::digest::Digest;
use super::layers::Stream;
use super::manifest::{Descriptor, DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use super::reference::Reference;
use crate::error::{Code, Error, Result};
use crate::sys::cancel::Cancel;

use endpoint::{Ask, Endpoint};
use hosts::{Host, Place};
use retry::{next, unavailable, Attempt, Verdict};

pub use proxy::Proxies;
#[cfg(any(test, feature = "fuzz"))]
pub use resume::content_range;
#[cfg(any(test, feature = "fuzz"))]
pub use retry::retry_after;
pub use retry::Retries;

/// How registries are reached.
#[derive(Clone, Debug)]
pub struct RegistrySettings {
    /// `<dir>/<host[:port]>/hosts.toml`, or certificates as Docker has them.
    pub certs_dir: Option<PathBuf>,
    /// Hosts (`host[:port]`) spoken to without TLS. Loopback hosts fall back to it by themselves.
    pub plain_http: Vec<String>,
    /// A connection that brings nothing for so long, or next to nothing, is given up.
    pub stall: Duration,
    pub retries: Retries,
    pub proxies: Proxies,
    /// Credentials of the node.
    pub credentials: Sources,
    /// Whether layers may come from the addresses in their descriptors.
    pub foreign_layers: bool,
}

impl Default for RegistrySettings {
    fn default() -> RegistrySettings {
        RegistrySettings {
            certs_dir: None,
            plain_http: Vec::new(),
            stall: Duration::from_secs(60),
            retries: Retries::default(),
            proxies: Proxies::from_env(),
            credentials: Sources::default(),
            foreign_layers: false,
        }
    }
}

/// Makes connections to registries.
pub struct Client {
    settings: RegistrySettings,
    trust: tls::Trust,
    tokens: token::Tokens,
}

/// What all hosts of one pull share.
struct Site {
    client: Arc<Client>,
    /// `domain/path` of the reference.
    repository: String,
    path: String,
    keyring: Keyring,
    certs_dir: Option<PathBuf>,
    stall: Duration,
    retries: Retries,
    cancel: Cancel,
}

/// One repository, wherever it may be had, for one pull.
pub struct Remote {
    site: Arc<Site>,
    domain: String,
    endpoints: Vec<Arc<Endpoint>>,
}

/// A manifest or index as it came.
pub struct Fetched {
    pub data: Vec<u8>,
    pub digest: Digest,
    pub media_type: String,
}

/// A place of one thing.
struct Source {
    endpoint: Arc<Endpoint>,
    url: String,
}

impl Client {
    pub fn new(settings: RegistrySettings) -> Client {
        Client { settings, trust: tls::Trust::default(), tokens: token::Tokens::default() }
    }

    /// Whether layers may come from the addresses in their descriptors.
    fn foreign_layers(&self) -> bool {
        self.settings.foreign_layers
    }

    /// The repository of a reference, with what of `auth` is for it. Reads hosts.toml. `cancel` ends every wait of it.
    pub fn remote(self: &Arc<Self>, reference: &Reference, auth: &Auth, cancel: &Cancel) -> Result<Remote> {
        let domain = reference.domain();
        let settings = &self.settings;
        let site = Arc::new(Site {
            client: self.clone(),
            repository: reference.repository(),
            path: reference.path().to_owned(),
            keyring: Keyring { request: auth.clone(), sources: settings.credentials.clone() },
            certs_dir: settings.certs_dir.clone(),
            stall: settings.stall,
            retries: settings.retries,
            cancel: cancel.clone(),
        });
        let hosts = settings.certs_dir.as_ref().map_or_else(|| Ok(vec![Host::default()]), |dir| hosts::load(dir, domain))?;
        let mut endpoints = Vec::new();
        for host in &hosts {
            let place = match &host.place {
                Some(place) => place.clone(),
                None => self.default_place(&site, host, domain)?,
            };
            let own = super::auth::same_server(&place.authority, domain);
            endpoints.push(Arc::new(Endpoint::new(&site, host, place.scheme, &place.authority, &place.path, own)?));
        }
        Ok(Remote { site, domain: domain.to_owned(), endpoints })
    }

    /// Where a registry is unless hosts.toml says otherwise: https, but where configured; a loopback registry that does not
    /// speak TLS is spoken to in the clear.
    fn default_place(&self, site: &Arc<Site>, host: &Host, domain: &str) -> Result<Place> {
        let authority = if domain == "docker.io" { "registry-1.docker.io" } else { domain };
        let place = |scheme| Ok(Place { scheme, authority: authority.to_owned(), path: "/v2".to_owned() });
        if self.settings.plain_http.iter().any(|h| h.eq_ignore_ascii_case(authority)) {
            return place("http");
        }
        if !url::is_loopback(authority) || !host.tls.is_empty() {
            return place("https");
        }
        site.cancel.check()?;
        let agent = site.agent("https", authority, &host.tls, host.dial_timeout)?;
        match agent.get(format!("https://{authority}/v2/")).call() {
            Ok(_) => place("https"),
            Err(e @ ureq::Error::Timeout(_)) => {
                site.cancel.check()?;
                Err(unavailable(format!("talk to {authority}: {e}")))
            }
            Err(ureq::Error::Io(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                Err(unavailable(format!("connect to {authority}: {e}")))
            }
            // It speaks TLS and we do not trust it: the pull says so. Anything else is no TLS.
            Err(e) if e.to_string().to_lowercase().contains("certificate") => place("https"),
            Err(_) => {
                site.cancel.check()?;
                place("http")
            }
        }
    }
}

impl Remote {
    /// Fetches a manifest or index by tag or digest. The digest is the content's; one that was asked for must match.
    pub fn manifest(&self, version: &str, limit: u64) -> Result<Fetched> {
        let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
        let by_digest = version.contains(':');
        let what = format!("manifest {}{}{version}", self.site.repository, if by_digest { "@" } else { ":" });
        let sources = self.sources(&format!("manifests/{version}"), |e| if by_digest { e.pull } else { e.resolve });
        self.rounds(&sources, 0, |_, source| {
            let response =
                source.endpoint.get(&Ask { url: &source.url, accept: &accept, offset: 0, has_digest: by_digest, what: &what })?;
            let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().trim().to_owned();
            let media_type = header("content-type").split(';').next().unwrap_or_default().trim().to_owned();
            let announced = header("docker-content-digest");
            let data = source.endpoint.read(response, limit, &what)?;
            let digest = Digest::of(&data);
            let wanted = if by_digest { version } else { announced.as_str() };
            if !wanted.is_empty() && wanted.starts_with("sha256:") && wanted != digest.as_str() {
                let words = format!("{what}: received {digest} from {}, want {wanted}", source.endpoint.authority);
                return Err(next(Error::precondition(words)));
            }
            Ok(Fetched { data, digest, media_type })
        })
    }

    /// Whether a host other than the registry's own has brought anything.
    pub fn used_mirror(&self) -> bool {
        self.endpoints.iter().any(|e| !e.own && e.has_answered())
    }

    /// The registry itself; None when hosts.toml names another server in its place.
    pub fn without_mirrors(mut self) -> Option<Remote> {
        self.endpoints.retain(|e| e.own);
        (!self.endpoints.is_empty()).then_some(self)
    }

    /// Fetches a small blob whole.
    pub fn blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>> {
        if descriptor.size > limit {
            return Err(Error::precondition(format!("blob {}: {} bytes, at most {limit} are allowed", descriptor.digest, descriptor.size)));
        }
        let what = format!("blob {}", descriptor.digest);
        let sources = self.sources(&format!("blobs/{}", descriptor.digest), |e| e.pull);
        self.rounds(&sources, 0, |_, source| {
            let response = source.endpoint.get(&Ask { url: &source.url, accept: "*/*", offset: 0, has_digest: true, what: &what })?;
            let data = source.endpoint.read(response, descriptor.size, &what)?;
            if Digest::of(&data) != descriptor.digest || data.len() as u64 != descriptor.size {
                let words = format!("{what}: received {} ({} bytes) from {}", Digest::of(&data), data.len(), source.endpoint.authority);
                return Err(next(Error::precondition(words)));
            }
            Ok(data)
        })
    }

    /// Opens the stream of a layer. It goes on by itself after a broken connection, at another host if need be; its digest
    /// is for the reader to check.
    pub fn layer(self: &Arc<Self>, descriptor: &Descriptor) -> Result<Stream> {
        let mut sources = self.sources(&format!("blobs/{}", descriptor.digest), |e| e.pull);
        if self.site.client.foreign_layers() {
            for url in &descriptor.urls {
                sources.push(Source { endpoint: Arc::new(Endpoint::foreign(&self.site, url)?), url: url.clone() });
            }
        }
        resume::open(self, sources, descriptor).map_err(|e| match e.code() {
            Code::NotFound if descriptor.is_foreign() && !self.site.client.foreign_layers() => {
                let words = "it is foreign: it may be had at other addresses, which images.foreign_layers allows";
                Error::precondition(format!("layer {}: {words} ({e})", descriptor.digest))
            }
            _ => e,
        })
    }

    /// The hosts that may be asked for `rest` below the repository, with its address there. A host that stands in for the
    /// registry is told which one.
    fn sources(&self, rest: &str, may: impl Fn(&Endpoint) -> bool) -> Vec<Source> {
        let asked = self.endpoints.iter().filter(|e| may(e));
        asked
            .map(|endpoint| {
                let space = if endpoint.own { String::new() } else { format!("?ns={}", url::escape(&self.domain)) };
                Source { url: format!("{}/{}/{rest}{space}", endpoint.base, self.site.path), endpoint: endpoint.clone() }
            })
            .collect()
    }

    /// Tries the sources in order from `start` on; those that may do better are tried again, each when it is due. The error is
    /// that of the registry itself, with what the others said.
    fn rounds<T>(&self, sources: &[Source], start: usize, mut attempt: impl FnMut(usize, &Source) -> Attempt<T>) -> Result<T> {
        let retries = self.site.retries;
        let mut errors: Vec<Option<Error>> = sources.iter().map(|_| None).collect();
        let mut left: Vec<(usize, u32, Instant)> = (0..sources.len()).map(|i| ((start + i) % sources.len(), 0, Instant::now())).collect();
        while let Some(due) = left.iter().map(|(_, _, due)| *due).min() {
            self.site.cancel.sleep(due.saturating_duration_since(Instant::now()))?;
            let mut later = Vec::new();
            for (i, tries, due) in left {
                if due > Instant::now() {
                    later.push((i, tries, due));
                    continue;
                }
                let failure = match attempt(i, &sources[i]) {
                    Ok(value) => return Ok(value),
                    Err(failure) => failure,
                };
                log::debug!("image: {}: {}", self.site.repository, failure.error);
                match failure.verdict {
                    Verdict::Stop => return Err(failure.error),
                    Verdict::Again(wait) if tries + 1 < retries.attempts => {
                        later.push((i, tries + 1, Instant::now() + wait.unwrap_or_else(|| retries.wait(tries + 1))));
                    }
                    Verdict::Again(_) | Verdict::Next => {}
                }
                errors[i] = Some(failure.error);
            }
            left = later;
        }
        Err(self.together(sources, errors))
    }

    fn together(&self, sources: &[Source], errors: Vec<Option<Error>>) -> Error {
        let mut said: Vec<(&Source, Error)> = sources.iter().zip(errors).filter_map(|(source, error)| Some((source, error?))).collect();
        let leads = said.iter().rposition(|(source, _)| source.endpoint.session.is_some());
        let Some((_, first)) = leads.map(|i| said.remove(i)) else {
            let words = format!("{}: hosts.toml leaves no host that may be asked", self.domain);
            return Error::precondition(words);
        };
        let mut words = first.message().to_owned();
        for (source, error) in said {
            let text = error.message().strip_prefix(retry::PREFIX).unwrap_or(error.message());
            words.push_str(&format!("; before that {}: {text}", source.endpoint.authority));
        }
        Error::new(first.code(), words)
    }
}
