//! One host that is asked for a repository: requests, redirects, and the answers to its challenges. Credentials and
//! configured headers go to the host itself; whoever it redirects to gets none, and may ask for an anonymous token at most.

use std::collections::HashMap;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body, Timeout};

use super::hosts::{self, Secret, TlsFiles};
use super::retry::{again, next, retry_after, stop, unavailable, Attempt, Failure, Pace, Verdict};
use super::token::{Granted, Session};
use super::transport::{agent, Link};
use super::url::{location, origin, redirects};
use super::Site;
use crate::error::{Code, Context, Error, Result};
use crate::image::auth::{basic, parse_challenges, Challenge, Credentials};
use crate::sys::lock::{Lock, Rank};

const REDIRECTS: usize = 10;
/// Challenges of one answer that are tried.
const CHALLENGES: usize = 3;
/// Bytes of an error's text.
const SAID_LIMIT: u64 = 4096;
/// For a name and a connection, unless dial_timeout says otherwise.
const CONNECT: Duration = Duration::from_secs(15);

/// A host, for one pull.
pub struct Endpoint {
    pub(super) site: Arc<Site>,
    /// `host[:port]`, for messages and credentials.
    pub authority: String,
    /// Where credentials may go.
    pub(super) origin: String,
    /// `https://host/v2`.
    pub base: String,
    /// The registry that the reference names, not a mirror of it.
    pub own: bool,
    pub pull: bool,
    pub resolve: bool,
    pub(super) headers: Vec<(String, Secret)>,
    pub(super) agent: Agent,
    tls: TlsFiles,
    /// None: an address of a foreign layer, which gets no credentials whatever it asks.
    pub(super) session: Option<Session>,
    /// Somewhere that another host redirected to.
    is_guest: bool,
    /// It has answered in this pull: a failure to connect is passing.
    reached: AtomicBool,
    /// The hosts that it redirected to, by origin.
    elsewhere: Lock<HashMap<String, Arc<Endpoint>>>,
}

/// What to ask for.
pub struct Ask<'a> {
    pub url: &'a str,
    pub accept: &'a str,
    /// From this byte on.
    pub offset: u64,
    /// A digest that is known says whether the answer is right: a redirect may lead to plain http.
    pub has_digest: bool,
    /// For messages.
    pub what: &'a str,
}

impl Endpoint {
    /// `host` as hosts.toml has it; `scheme`, `authority` and `path` say where it is.
    pub fn new(site: &Arc<Site>, host: &hosts::Host, scheme: &str, authority: &str, path: &str, own: bool) -> Result<Endpoint> {
        let base = format!("{scheme}://{authority}{path}");
        let uri: Uri =
            format!("{scheme}://{authority}/").parse().map_err(|_| Error::invalid(format!("registry {authority}: no address")))?;
        let origin = origin(&uri).ok_or_else(|| Error::invalid(format!("registry {authority}: no address")))?;
        let agent = site.agent(scheme, authority, &host.tls, host.dial_timeout)?;
        Ok(Endpoint {
            site: site.clone(),
            authority: authority.to_owned(),
            origin,
            base,
            own,
            pull: host.pull,
            resolve: host.resolve,
            headers: host.headers.clone(),
            agent,
            tls: host.tls.clone(),
            session: Some(Session::default()),
            is_guest: false,
            reached: AtomicBool::new(false),
            elsewhere: Lock::new(Rank::Leaf, HashMap::new()),
        })
    }

    /// An address outside of any registry.
    pub fn foreign(site: &Arc<Site>, url: &str) -> Result<Endpoint> {
        let wrong = || Error::precondition(format!("address {url:?} of a foreign layer: expected http:// or https:// and a host"));
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let (Some(scheme), Some(authority), Some(_)) = (uri.scheme_str(), uri.authority(), origin(&uri)) else { return Err(wrong()) };
        let host = hosts::Host { tls: site.tls_of(authority.as_str())?, ..hosts::Host::default() };
        Ok(Endpoint { session: None, ..Endpoint::new(site, &host, scheme, authority.as_str(), "", false)? })
    }

    /// Whether it has answered in this pull.
    pub fn has_answered(&self) -> bool {
        self.reached.load(Ordering::Relaxed)
    }

    /// GET, authenticated when asked to. The answer is 200; if an offset was given also 206, or 416.
    pub fn get(&self, ask: &Ask) -> Attempt<Response<Body>> {
        let before = self.authorization()?;
        let (mut response, mut away) = self.send(ask, before.as_deref())?;
        let mut refused = None;
        if response.status() == StatusCode::UNAUTHORIZED && away.is_none() {
            for challenge in challenges(&response).iter().take(CHALLENGES) {
                let granted = match self.grant(challenge, before.as_deref()) {
                    Ok(Some(granted)) if Some(granted.header.as_str()) != before.as_deref() => granted,
                    Ok(_) => continue,
                    Err(f) if f.verdict == Verdict::Stop => return Err(f),
                    Err(f) => {
                        refused.get_or_insert(f);
                        continue;
                    }
                };
                (response, away) = self.send(ask, Some(&granted.header))?;
                if response.status() != StatusCode::UNAUTHORIZED || away.is_some() {
                    self.keep(granted);
                    refused = None;
                    break;
                }
            }
        }
        match response.status() {
            StatusCode::OK => Ok(response),
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE if ask.offset > 0 => Ok(response),
            StatusCode::UNAUTHORIZED => match (away, refused) {
                // A name in front of another registry: that one may want a token of its own.
                (Some(url), _) if !self.is_guest => self.elsewhere(&url).map_err(next)?.get(&Ask { url: &url.to_string(), ..*ask }),
                // Why there was nothing to answer a challenge with says more than the challenge.
                (None, Some(refused)) => Err(refused),
                _ => Err(self.refusal(response, ask.what)),
            },
            _ => Err(self.refusal(response, ask.what)),
        }
    }

    /// One GET, redirects followed; and where the answer is from, if not from the host itself.
    fn send(&self, ask: &Ask, authorization: Option<&str>) -> Attempt<(Response<Body>, Option<Uri>)> {
        let mut url: Uri = ask.url.parse().map_err(|_| next(Error::invalid(format!("{}: no address", ask.what))))?;
        // Once away, it stays away: who sent us back may have chosen the path.
        let mut home = true;
        for _ in 0..=REDIRECTS {
            self.site.cancel.check().map_err(stop)?;
            home = home && origin(&url).as_deref() == Some(self.origin.as_str());
            let agent = if home { self.agent.clone() } else { self.elsewhere(&url).map_err(next)?.agent.clone() };
            let mut request = agent.get(url.clone()).header("accept", ask.accept);
            if ask.offset > 0 {
                request = request.header("range", format!("bytes={}-", ask.offset));
            }
            if home {
                for (name, value) in self.headers.iter().filter(|(name, _)| authorization.is_none() || name != "authorization") {
                    request = request.header(name.as_str(), value.0.as_str());
                }
                if let Some(authorization) = authorization {
                    request = request.header("authorization", authorization);
                }
            }
            let response = request.call().map_err(|e| self.unreached(url.authority().map_or("", |a| a.as_str()), e))?;
            self.reached.store(true, Ordering::Relaxed);
            if !redirects(response.status()) {
                return Ok((response, (!home).then_some(url)));
            }
            let to = location(&url, &response).filter(|to| origin(to).is_some());
            let to = to.ok_or_else(|| next(Error::precondition(format!("{}: {} redirects to nowhere", ask.what, self.authority))))?;
            if url.scheme_str() == Some("https") && to.scheme_str() != Some("https") && !ask.has_digest {
                let words = format!("{}: {} redirects from https to http, which is not followed", ask.what, self.authority);
                return Err(next(Error::precondition(words)));
            }
            url = to;
        }
        Err(next(Error::precondition(format!("{}: {}: more than {REDIRECTS} redirects", ask.what, self.authority))))
    }

    /// A host that we were redirected to: the authorities of this one and its own, nobody's credentials. What it brings is
    /// checked by digest.
    fn elsewhere(&self, url: &Uri) -> Result<Arc<Endpoint>> {
        let authority = url.authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
        let scheme = url.scheme_str().unwrap_or("https");
        let at = origin(url).ok_or_else(|| Error::invalid(format!("registry {authority}: no address")))?;
        if let Some(known) = self.elsewhere.lock().get(&at) {
            return Ok(known.clone());
        }
        let mut tls = self.site.tls_of(&authority)?;
        tls.ca.extend(self.tls.ca.iter().cloned());
        tls.skip_verify = tls.skip_verify.or(self.tls.skip_verify);
        let host = hosts::Host { tls, ..hosts::Host::default() };
        let guest = Endpoint::new(&self.site, &host, scheme, &authority, "", false)?;
        let guest = Arc::new(Endpoint { session: Some(Session::anonymous()), is_guest: true, ..guest });
        let mut known = self.elsewhere.lock();
        if known.len() >= 16 {
            known.clear();
        }
        Ok(known.entry(at).or_insert(guest).clone())
    }

    /// For the token server it names. Unlike a redirect's target it gets credentials: its certificate must be good.
    pub(super) fn agent_for_tokens(&self, realm: &Uri) -> Result<Agent> {
        if origin(realm).as_deref() == Some(self.origin.as_str()) {
            return Ok(self.agent.clone());
        }
        let authority = realm.authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
        let mut tls = self.site.tls_of(&authority)?;
        tls.ca.extend(self.tls.ca.iter().cloned());
        self.site.agent(realm.scheme_str().unwrap_or("https"), &authority, &tls, None)
    }

    /// A header that answers the challenge; None when we have nothing for it. `failed` is the one that has just been refused.
    fn grant(&self, challenge: &Challenge, failed: Option<&str>) -> Attempt<Option<Granted>> {
        let Some(session) = &self.session else { return Ok(None) };
        let credentials =
            session.credentials(|| self.site.keyring.find(&self.authority, self.own, &self.site.repository, &self.site.cancel));
        let credentials = credentials.map_err(|e| match self.site.cancel.is_cancelled() {
            true => stop(e),
            false => next(e),
        })?;
        match (challenge.scheme.as_str(), credentials) {
            ("bearer", Credentials::Registry(token)) => Ok(Some(Granted::for_good(format!("Bearer {token}")))),
            ("bearer", credentials) => self.token(challenge, &credentials, failed).map(Some),
            ("basic", Credentials::Basic { username, password }) => Ok(Some(Granted::for_good(basic(&username, &password)))),
            _ => Ok(None),
        }
    }

    /// The header that last worked, renewed when it has run out.
    fn authorization(&self) -> Attempt<Option<String>> {
        let Some(current) = self.session.as_ref().and_then(Session::current) else { return Ok(None) };
        match &current.challenge {
            Some(challenge) if current.until.is_some_and(|until| until <= Instant::now()) => {
                let renewed = self.grant(challenge, Some(&current.header))?;
                Ok(renewed.map(|granted| {
                    let header = granted.header.clone();
                    self.keep(granted);
                    header
                }))
            }
            _ => Ok(Some(current.header)),
        }
    }

    fn keep(&self, granted: Granted) {
        if let Some(session) = &self.session {
            session.keep(granted);
        }
    }

    /// What a failure to talk to `host` means.
    pub(super) fn unreached(&self, host: &str, error: ureq::Error) -> Failure {
        if let Err(gone) = self.site.cancel.check() {
            return stop(gone);
        }
        use std::io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, InvalidData, NetworkUnreachable};
        // A host that was never there has no reason to appear within seconds.
        let passing = self.reached.load(Ordering::Relaxed);
        let may_return = match &error {
            ureq::Error::Io(e) => match e.kind() {
                InvalidData => false,
                ConnectionRefused | HostUnreachable | NetworkUnreachable | AddrNotAvailable => passing,
                _ => !e.to_string().contains("lookup") || passing,
            },
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) | ureq::Error::HostNotFound | ureq::Error::ConnectProxyFailed(_) => {
                passing
            }
            ureq::Error::Timeout(_) => true,
            _ => false,
        };
        let error = match error {
            ureq::Error::Timeout(Timeout::Resolve) => unavailable(format!("look up {host}: no answer")),
            ureq::Error::Timeout(Timeout::Connect) => unavailable(format!("connect to {host}: no answer")),
            ureq::Error::Timeout(_) => unavailable(format!("{host}: no answer for {} s", self.site.stall.as_secs_f32())),
            error => match Err::<(), _>(error).context(|| format!("talk to {host}")) {
                Err(e) => unavailable(e),
                Ok(()) => unavailable(host),
            },
        };
        if may_return {
            again(error)
        } else {
            next(error)
        }
    }

    /// The failure of an answer that is not what was asked for.
    pub(super) fn refusal(&self, response: Response<Body>, what: &str) -> Failure {
        let status = response.status().as_u16();
        let later = response.headers().get("retry-after").and_then(|v| v.to_str().ok()).and_then(|v| retry_after(v, SystemTime::now()));
        let schemes: Vec<String> = challenges(&response).into_iter().map(|c| c.scheme).collect();
        let text = self.read(response, SAID_LIMIT, what).unwrap_or_default();
        let said = said(&text).map(|s| format!(": {s}")).unwrap_or_default();
        let words = format!("{what}: {} answered {status}{said}", self.authority);
        match status {
            401 | 403 => {
                let anonymous = self.session.as_ref().is_none_or(|s| s.is_anonymous());
                let who = if anonymous { "without credentials" } else { "with the credentials given" };
                let odd = schemes.iter().find(|s| !matches!(s.as_str(), "basic" | "bearer"));
                let hint = match odd {
                    Some(scheme) if schemes.len() == 1 => format!(" (it wants {scheme}, which is not supported)"),
                    _ if self.is_guest => " (a redirect led there, and no credentials follow one: name the image by that host)".to_owned(),
                    _ if anonymous && !self.own && self.session.is_some() && self.site.keyring.has_request() => {
                        " (the pull's credentials are for the registry in the image's name; this host's belong into images.auth)".to_owned()
                    }
                    _ if anonymous => " (the repository does not exist, or is not public)".to_owned(),
                    _ => String::new(),
                };
                next(Error::new(Code::PermissionDenied, format!("pull {who} is refused: {words}{hint}")))
            }
            404 => next(Error::not_found(words)),
            429 if later.is_some() => self.busy(unavailable(format!("{words} (too many requests)")), later),
            408 | 425 | 429 | 500 | 502..=504 | 506..=599 => self.busy(unavailable(words), later),
            501 | 505 => next(unavailable(words)),
            _ => next(Error::new(Code::Unknown, words)),
        }
    }

    fn busy(&self, error: Error, later: Option<Duration>) -> Failure {
        match later {
            Some(wait) if wait > self.site.retries.longest_wait => {
                let error = Error::new(error.code(), format!("{error}, and wants to be asked in {} s", wait.as_secs()));
                next(error)
            }
            later => Failure { error, verdict: Verdict::Again(later) },
        }
    }

    /// Reads an answer whole: `limit` bytes at most, one more is an error.
    pub(super) fn read(&self, response: Response<Body>, limit: u64, what: &str) -> Attempt<Vec<u8>> {
        let mut reader = response.into_body().into_reader();
        let mut pace = Pace::new(self.site.stall);
        let (mut data, mut chunk) = (Vec::new(), [0; 8192]);
        loop {
            let begin = Instant::now();
            let n = reader.read(&mut chunk).map_err(|e| match self.site.cancel.check() {
                Err(gone) => stop(gone),
                Ok(()) => again(unavailable(format!("read {what} from {}: {e}", self.authority))),
            })?;
            if n == 0 {
                return Ok(data);
            }
            if data.len() as u64 + n as u64 > limit {
                let words = format!("{what}: {} sends more than the {limit} bytes that are allowed", self.authority);
                return Err(next(Error::precondition(words)));
            }
            data.extend_from_slice(&chunk[..n]);
            if !pace.add(n, begin) {
                return Err(again(unavailable(format!("read {what} from {}: hardly anything comes", self.authority))));
            }
        }
    }
}

/// Bearer first: its token is worth less than a password.
fn challenges(response: &Response<Body>) -> Vec<Challenge> {
    let headers = response.headers().get_all("www-authenticate");
    let mut found: Vec<Challenge> = headers.iter().filter_map(|v| v.to_str().ok()).flat_map(parse_challenges).collect();
    found.sort_by_key(|challenge| challenge.scheme != "bearer");
    found
}

/// The message in a registry's JSON error, without control characters.
fn said(body: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(body).ok()?;
    let first = json.get("errors")?.get(0)?;
    let text = first.get("message").filter(|m| m.as_str().is_some_and(|m| !m.is_empty())).or(first.get("code"))?.as_str()?;
    Some(text.chars().filter(|c| !c.is_control()).take(300).collect())
}

impl Site {
    fn tls_of(&self, authority: &str) -> Result<TlsFiles> {
        self.certs_dir.as_ref().map_or(Ok(TlsFiles::default()), |dir| hosts::tls_of(dir, authority))
    }

    pub(super) fn agent(&self, scheme: &str, authority: &str, tls: &TlsFiles, dial: Option<Duration>) -> Result<Agent> {
        Ok(agent(Link {
            tls: self.client.trust.config(tls)?,
            proxy: self.client.settings.proxies.find(scheme, authority)?,
            connect: dial.unwrap_or(CONNECT),
            stall: self.stall,
            cancel: &self.cancel,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_registries() {
        assert_eq!(said(br#"{"errors":[{"code":"X","message":"no\nway"}]}"#).unwrap(), "noway");
        assert_eq!(said(br#"{"errors":[{"code":"X","message":""}]}"#).unwrap(), "X");
        assert_eq!(said(b"<html>"), None);
    }
}
