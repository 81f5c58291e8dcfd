//! Credentials for registries, and the challenges registries answer with.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;

use super::digest::Hasher;
use crate::error::{Error, Result};

/// What a client sent along with a pull (CRI's AuthConfig). Its `Debug` shows no secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    pub username: String,
    pub password: String,
    /// Base64 of `username:password`.
    pub auth: String,
    pub server_address: String,
    /// A refresh token, exchanged at the token server.
    pub identity_token: String,
    /// A bearer token, sent as it is.
    pub registry_token: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("username", &self.username).field("server_address", &self.server_address).finish_non_exhaustive()
    }
}

/// Credentials in the form they are used.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    Anonymous,
    Basic { username: String, password: String },
    Identity(String),
    Registry(String),
}

impl Auth {
    /// What to use for a registry. Credentials that name another server are not for it.
    pub fn credentials(&self, domain: &str) -> Result<Credentials> {
        if !self.server_address.is_empty() && !same_server(&self.server_address, domain) {
            return Ok(Credentials::Anonymous);
        }
        if !self.identity_token.is_empty() {
            return Ok(Credentials::Identity(self.identity_token.clone()));
        }
        if !self.registry_token.is_empty() {
            return Ok(Credentials::Registry(self.registry_token.clone()));
        }
        if !self.username.is_empty() || !self.password.is_empty() {
            return Ok(Credentials::Basic { username: self.username.clone(), password: self.password.clone() });
        }
        if !self.auth.is_empty() {
            // Some writers pad with NUL, as Docker once did.
            let text = base64::engine::general_purpose::STANDARD.decode(self.auth.trim()).ok().and_then(|b| String::from_utf8(b).ok());
            let pair = text.as_deref().map(|t| t.trim_end_matches('\0')).and_then(|t| t.split_once(':'));
            let (username, password) = pair.ok_or_else(|| Error::invalid("auth is not base64 of username:password"))?;
            return Ok(Credentials::Basic { username: username.to_owned(), password: password.to_owned() });
        }
        Ok(Credentials::Anonymous)
    }

    /// Tells pulls with different credentials apart, without keeping the credentials.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Hasher::default();
        for part in [&self.username, &self.password, &self.auth, &self.server_address, &self.identity_token, &self.registry_token] {
            hasher.add(&(part.len() as u64).to_le_bytes());
            hasher.add(part.as_bytes());
        }
        hasher.finish().to_string()
    }
}

/// Whether a server address (a host, or a URL such as Docker's `https://index.docker.io/v1/`) is a registry's.
fn same_server(address: &str, domain: &str) -> bool {
    let host = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or_default();
    let hub = |h: &str| matches!(h, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    host == domain || (hub(host) && hub(domain))
}

/// The header value of basic authentication.
pub fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}

/// One challenge of a WWW-Authenticate header: scheme and parameter names in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    pub scheme: String,
    pub parameters: BTreeMap<String, String>,
}

/// Parses WWW-Authenticate (RFC 9110, 11.6.1). What cannot be understood is skipped.
pub fn parse_challenges(header: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return found;
        }
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        if end == 0 {
            // No token where one must be: skip a character and look on.
            rest = &rest[rest.chars().next().map_or(1, char::len_utf8)..];
            continue;
        }
        let (token, after) = rest.split_at(end);
        let Some(value) = after.trim_start().strip_prefix('=') else {
            found.push(Challenge { scheme: token.to_ascii_lowercase(), parameters: BTreeMap::new() });
            rest = after;
            continue;
        };
        let value = value.trim_start();
        let (text, after) = if let Some(quoted) = value.strip_prefix('"') {
            unquote(quoted)
        } else {
            let end = value.find([',', ' ', '\t']).unwrap_or(value.len());
            (value[..end].to_owned(), &value[end..])
        };
        if let Some(challenge) = found.last_mut() {
            challenge.parameters.entry(token.to_ascii_lowercase()).or_insert(text);
        }
        rest = after;
    }
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(c)
}

/// The text up to the closing quote, and what follows it.
fn unquote(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return (out, &text[i + 1..]),
            '\\' => out.extend(chars.next().map(|(_, c)| c)),
            c => out.push(c),
        }
    }
    (out, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter<'a>(c: &'a Challenge, key: &str) -> &'a str {
        c.parameters.get(key).map_or("", String::as_str)
    }

    #[test]
    fn challenges() {
        let all = parse_challenges(r#"Bearer realm="https://a/t?x=1,2",service="s \"q\"",Scope=repository:a:pull , Basic realm=x"#);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].scheme.as_str(), parameter(&all[0], "realm")), ("bearer", "https://a/t?x=1,2"));
        assert_eq!((parameter(&all[0], "service"), parameter(&all[0], "scope")), ("s \"q\"", "repository:a:pull"));
        assert_eq!((all[1].scheme.as_str(), parameter(&all[1], "realm")), ("basic", "x"));
        assert_eq!(parse_challenges("Negotiate, BASIC").len(), 2);
        assert!(parse_challenges("").is_empty());
    }

    #[test]
    fn credentials_by_kind_and_server() {
        let basic = |u: &str, p: &str| Credentials::Basic { username: u.into(), password: p.into() };
        let auth = Auth { auth: "dTpwOng=".into(), ..Auth::default() };
        assert!(auth.credentials("q.io").unwrap() == basic("u", "p:x"));
        let auth =
            Auth { username: "u".into(), password: "p".into(), server_address: "https://index.docker.io/v1/".into(), ..Auth::default() };
        assert!(auth.credentials("docker.io").unwrap() == basic("u", "p"));
        assert!(auth.credentials("evil.io").unwrap() == Credentials::Anonymous);
        assert!(Auth { auth: "%%".into(), ..Auth::default() }.credentials("q.io").is_err());
        assert!(Auth { identity_token: "t".into(), ..auth.clone() }.credentials("docker.io").unwrap() == Credentials::Identity("t".into()));
        let text = format!("{:?}", Auth { password: "hunter2".into(), registry_token: "tok".into(), ..auth.clone() });
        assert!(!text.contains("hunter2") && !text.contains("tok"), "{text}");
        assert_ne!(auth.fingerprint(), Auth::default().fingerprint());
    }

    proptest::proptest! {
        #[test]
        fn challenges_never_panic(text in "\\PC{0,100}") {
            parse_challenges(&text);
        }

        #[test]
        fn quoted_values_come_back(value in "[a-zA-Z0-9:/?=,. ]{0,40}") {
            let all = parse_challenges(&format!("Bearer realm=\"{value}\",service=\"s\""));
            proptest::prop_assert_eq!(parameter(&all[0], "realm"), value);
        }
    }
}
