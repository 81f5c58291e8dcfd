//! Bearer tokens: asked from the token server that a registry names, kept until they run out, renewed in the middle of a
//! pull. Kept tokens are shared by pulls with equal credentials.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body};

use super::endpoint::Endpoint;
use super::retry::{next, stop, Attempt};
use super::url::{escape, location, origin, redirects};
use crate::error::{Code, Error, Result};
use crate::image::auth::{basic, Challenge, Credentials};
use crate::image::digest::Digest;
use crate::sys::lock::{Lock, Rank};

/// Bytes of a token server's answer.
const ANSWER_LIMIT: u64 = 1 << 20;
/// Addresses of one request for a token.
const REDIRECTS: usize = 5;
/// Tokens kept at a time.
const KEPT: usize = 256;
/// A token that says nothing lasts so long (distribution's token protocol).
const LIFETIME: Duration = Duration::from_secs(60);
/// A token's last tenth is not used, and at most so much of its end.
const MARGIN: Duration = Duration::from_secs(30);

/// An Authorization header.
#[derive(Clone)]
pub struct Granted {
    pub header: String,
    /// None: for good.
    pub until: Option<Instant>,
    /// What it answered, to ask again.
    pub challenge: Option<Challenge>,
}

impl Granted {
    pub fn for_good(header: String) -> Granted {
        Granted { header, until: None, challenge: None }
    }
}

/// What one pull knows about one host.
pub struct Session {
    current: Lock<Option<Granted>>,
    credentials: Lock<Option<Credentials>>,
}

impl Default for Session {
    fn default() -> Session {
        Session { current: Lock::new(Rank::Leaf, None), credentials: Lock::new(Rank::Leaf, None) }
    }
}

impl Session {
    /// One that has nothing to answer challenges with.
    pub fn anonymous() -> Session {
        Session { credentials: Lock::new(Rank::Leaf, Some(Credentials::Anonymous)), ..Session::default() }
    }

    pub fn current(&self) -> Option<Granted> {
        self.current.lock().clone()
    }

    pub fn keep(&self, granted: Granted) {
        *self.current.lock() = Some(granted);
    }

    /// Looked up once; `find` may run a program, so no lock is held.
    pub fn credentials(&self, find: impl FnOnce() -> Result<Credentials>) -> Result<Credentials> {
        if let Some(known) = self.credentials.lock().clone() {
            return Ok(known);
        }
        let found = find()?;
        *self.credentials.lock() = Some(found.clone());
        Ok(found)
    }

    /// Whether nothing was found to answer with, or nothing was asked for.
    pub fn is_anonymous(&self) -> bool {
        matches!(&*self.credentials.lock(), None | Some(Credentials::Anonymous))
    }
}

/// Tokens of all pulls, by a digest of what they were asked with.
pub struct Tokens {
    kept: Lock<HashMap<String, (String, Instant)>>,
}

impl Default for Tokens {
    fn default() -> Tokens {
        Tokens { kept: Lock::new(Rank::Leaf, HashMap::new()) }
    }
}

impl Tokens {
    /// A token that is still good, and not the one that was refused.
    fn find(&self, key: &str, failed: Option<&str>) -> Option<(String, Instant)> {
        let mut kept = self.kept.lock();
        let (token, until) = kept.get(key)?.clone();
        if until <= Instant::now() || failed == Some(format!("Bearer {token}").as_str()) {
            kept.remove(key);
            return None;
        }
        Some((token, until))
    }

    fn keep(&self, key: String, token: &str, until: Instant) {
        let mut kept = self.kept.lock();
        if kept.len() >= KEPT {
            let now = Instant::now();
            kept.retain(|_, (_, until)| *until > now);
        }
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(key, (token.to_owned(), until));
    }
}

#[derive(serde::Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
}

/// One request to a token server.
struct Wish<'a> {
    endpoint: &'a Endpoint,
    realm: &'a Uri,
    service: &'a str,
    scopes: Vec<&'a str>,
    /// Configured headers, if the realm is the registry itself.
    headers: Vec<(&'a str, &'a str)>,
}

type Sent = Attempt<Response<Body>>;

impl Wish<'_> {
    fn get(&self, login: Option<(&str, &str)>) -> Sent {
        let mut url = self.realm.to_string();
        let mut add = |key: &str, value: &str| {
            let mark = if url.contains('?') { '&' } else { '?' };
            url.push_str(&format!("{mark}{key}={}", escape(value)));
        };
        if !self.service.is_empty() {
            add("service", self.service);
        }
        self.scopes.iter().for_each(|scope| add("scope", scope));
        if let Some((username, _)) = login.filter(|(username, _)| !username.is_empty()) {
            add("account", username);
        }
        let url = url.parse().map_err(|_| next(Error::precondition(format!("token server {}: no address", self.realm))))?;
        self.follow(url, |agent, url, at_home| {
            let mut request = agent.get(url.clone()).header("accept", "application/json");
            for (name, value) in self.headers.iter().filter(|_| at_home) {
                request = request.header(*name, *value);
            }
            if let Some((username, password)) = login.filter(|_| at_home) {
                request = request.header("authorization", basic(username, password));
            }
            Some(request.call())
        })
    }

    fn post(&self, grant: &[(&str, &str)]) -> Sent {
        let scope = self.scopes.join(" ");
        let mut form = grant.to_vec();
        form.extend([("client_id", "crisp"), ("service", self.service), ("scope", scope.as_str())]);
        self.follow(self.realm.clone(), |agent, url, at_home| {
            let mut request = agent.post(url.clone()).header("accept", "application/json");
            for (name, value) in &self.headers {
                request = request.header(*name, *value);
            }
            // The form is a secret.
            at_home.then(|| request.send_form(form.iter().copied()))
        })
    }

    /// Asks at `url` and wherever that redirects to, but never from https to http. `send` learns whether it still talks to
    /// the realm's host; None: it may not talk to that one.
    fn follow(&self, mut url: Uri, send: impl Fn(&Agent, &Uri, bool) -> Option<std::result::Result<Response<Body>, ureq::Error>>) -> Sent {
        let home = origin(self.realm);
        let mut at_home = true;
        let host = |url: &Uri| url.authority().map(|a| a.to_string()).unwrap_or_default();
        let wrong = |why: &str| next(Error::precondition(format!("token from {}: {why}", host(self.realm))));
        for _ in 0..REDIRECTS {
            self.endpoint.site.cancel.check().map_err(stop)?;
            at_home = at_home && origin(&url) == home;
            let agent = self.endpoint.agent_for_tokens(&url).map_err(next)?;
            let Some(sent) = send(&agent, &url, at_home) else { return Err(wrong("redirects a login to another host")) };
            let response = sent.map_err(|e| self.endpoint.unreached(&host(&url), e))?;
            if !redirects(response.status()) {
                return Ok(response);
            }
            let to = location(&url, &response).filter(|to| origin(to).is_some()).ok_or_else(|| wrong("redirects to nowhere"))?;
            if url.scheme_str() == Some("https") && to.scheme_str() != Some("https") {
                return Err(wrong("redirects from https to http, which is not followed"));
            }
            url = to;
        }
        Err(wrong("too many redirects"))
    }
}

/// A server that lacks one of the two ways to ask for a token.
fn lacks_it(sent: &Sent) -> bool {
    sent.as_ref().is_ok_and(|r| matches!(r.status(), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED))
}

/// One that may lack OAuth: some say so by 400 or 401.
fn lacks_oauth(sent: &Sent) -> bool {
    lacks_it(sent) || sent.as_ref().is_ok_and(|r| matches!(r.status(), StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED))
}

impl Endpoint {
    /// A token for a bearer challenge. `failed` is a header that has just been refused.
    pub(super) fn token(&self, challenge: &Challenge, credentials: &Credentials, failed: Option<&str>) -> Attempt<Granted> {
        self.site.cancel.check().map_err(stop)?;
        let parameter = |key: &str| challenge.parameters.get(key).map(String::as_str).unwrap_or_default();
        let wrong = |why: &str| next(Error::new(Code::PermissionDenied, format!("token server of {}: {why}", self.authority)));
        let realm: Uri = parameter("realm").parse().map_err(|_| wrong("the registry names none"))?;
        let Some(at) = origin(&realm) else { return Err(wrong("the registry names none")) };
        // A registry without TLS may have a token server without; no other may make us send passwords in the clear.
        if !at.starts_with("https:") && self.origin.starts_with("https:") {
            return Err(wrong("the registry names one without TLS, which is not asked"));
        }
        let host = realm.authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
        let default_scope = format!("repository:{}:pull", self.site.path);
        let scope = Some(parameter("scope")).filter(|s| !s.is_empty()).unwrap_or(&default_scope);
        let key = [&realm.to_string(), parameter("service"), scope, &credentials.fingerprint(), &self.authority].join("\n");
        let key = Digest::of(key.as_bytes()).to_string();
        let granted =
            |token: &str, until| Granted { header: format!("Bearer {token}"), until: Some(until), challenge: Some(challenge.clone()) };
        if let Some((token, until)) = self.site.client.tokens.find(&key, failed) {
            return Ok(granted(&token, until));
        }
        let headers = self.headers.iter().filter(|_| at == self.origin).filter(|(name, _)| name != "authorization");
        let wish = Wish {
            endpoint: self,
            realm: &realm,
            service: parameter("service"),
            scopes: scope.split(' ').filter(|s| !s.is_empty()).collect(),
            headers: headers.map(|(name, value)| (name.as_str(), value.0.as_str())).collect(),
        };
        let asked = Instant::now();
        let sent = match credentials {
            Credentials::Identity { username, token } => {
                let sent = wish.post(&[("grant_type", "refresh_token"), ("refresh_token", token)]);
                if lacks_oauth(&sent) {
                    wish.get(Some((username, token)))
                } else {
                    sent
                }
            }
            Credentials::Basic { username, password } => {
                let sent = wish.get(Some((username, password)));
                if lacks_it(&sent) {
                    wish.post(&[("grant_type", "password"), ("username", username), ("password", password)])
                } else {
                    sent
                }
            }
            Credentials::Anonymous | Credentials::Registry(_) => wish.get(None),
        };
        let response = sent?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response, &format!("token from {host}")));
        }
        let data = self.read(response, ANSWER_LIMIT, "token")?;
        // The parser's error could quote the answer: it is not shown.
        let answer: Answer = serde_json::from_slice(&data).map_err(|_| wrong("its answer is not a token"))?;
        let token = answer.token.filter(|t| !t.is_empty()).or(answer.access_token).unwrap_or_default();
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong("its answer is not a token"));
        }
        let until = asked + usable(answer.expires_in);
        self.site.client.tokens.keep(key, &token, until);
        Ok(granted(&token, until))
    }
}

/// How long a token is used.
fn usable(expires_in: Option<f64>) -> Duration {
    let told = expires_in.filter(|s| *s >= 0.0).and_then(|s| Duration::try_from_secs_f64(s.min(86400.0)).ok());
    let life = told.unwrap_or(LIFETIME).max(Duration::from_secs(1));
    life - (life / 10).min(MARGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes() {
        assert_eq!(usable(None), Duration::from_secs(54));
        assert_eq!(usable(Some(3600.0)), Duration::from_secs(3570));
        assert_eq!(usable(Some(-5.0)), Duration::from_secs(54));
        assert_eq!(usable(Some(0.0)), Duration::from_millis(900));
        assert_eq!(usable(Some(f64::NAN)), Duration::from_secs(54));
        assert_eq!(usable(Some(1e300)), Duration::from_secs(86370));
    }

    #[test]
    fn passwords_do_not_go_out_in_the_clear() {
        use crate::image::{Auth, Reference, RegistrySettings};
        let client = std::sync::Arc::new(crate::image::registry::Client::new(RegistrySettings::default()));
        let login = Auth { username: "me".into(), password: "secret".into(), ..Auth::default() };
        let reference = Reference::parse("registry.test/a/b").unwrap();
        let remote = client.remote(&reference, &login, &crate::sys::cancel::Cancel::never()).unwrap();
        let credentials = login.credentials().unwrap().unwrap();
        for (realm, words) in [
            ("http://127.0.0.1:1/token", "without TLS"),
            ("http://registry.test/token", "without TLS"),
            ("https://me@evil.test/token", "names none"),
            ("file:///etc/passwd", "names none"),
            ("", "names none"),
        ] {
            let parameters = std::collections::BTreeMap::from([("realm".to_owned(), realm.to_owned())]);
            let challenge = Challenge { scheme: "bearer".into(), parameters };
            let Err(failure) = remote.endpoints[0].token(&challenge, &credentials, None) else { panic!("{realm}") };
            assert!(failure.error.code() == Code::PermissionDenied && failure.error.message().contains(words), "{}", failure.error);
        }
    }

    #[test]
    fn kept_until_they_run_out_or_fail() {
        let tokens = Tokens::default();
        let later = Instant::now() + Duration::from_secs(60);
        tokens.keep("k".into(), "t", later);
        assert_eq!(tokens.find("k", None), Some(("t".into(), later)));
        assert_eq!(tokens.find("k", Some("Bearer other")), Some(("t".into(), later)));
        assert_eq!(tokens.find("k", Some("Bearer t")), None);
        assert_eq!(tokens.find("k", None), None);
        tokens.keep("k".into(), "t", Instant::now());
        assert_eq!(tokens.find("k", None), None);
        for i in 0..3 * KEPT {
            tokens.keep(i.to_string(), "t", later);
        }
        assert!(tokens.kept.lock().len() <= KEPT);
    }
}
