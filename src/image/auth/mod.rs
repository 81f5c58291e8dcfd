//! Credentials for registries: their kinds, where they come from (`keyring`), and the challenges they answer.

mod challenge;
/// Docker's config.json and credential programs.
pub mod docker;
mod keyring;

use std::fmt;

use base64::Engine;

use super::digest::Hasher;
use crate::error::{Error, Result};

pub use challenge::{parse_challenges, Challenge};
pub use keyring::{Keyring, Sources};

/// What a client sent along with a pull (CRI's AuthConfig), or the configuration says. Its `Debug` shows no secret.
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
    Identity { username: String, token: String },
    Registry(String),
}

impl Auth {
    /// In the form they are used; None when nothing was given.
    pub fn credentials(&self) -> Result<Option<Credentials>> {
        if !self.identity_token.is_empty() {
            return Ok(Some(Credentials::Identity { username: self.username.clone(), token: self.identity_token.clone() }));
        }
        if !self.registry_token.is_empty() {
            return Ok(Some(Credentials::Registry(self.registry_token.clone())));
        }
        if !self.username.is_empty() || !self.password.is_empty() {
            return Ok(Some(Credentials::Basic { username: self.username.clone(), password: self.password.clone() }));
        }
        if self.auth.is_empty() {
            return Ok(None);
        }
        // Some writers pad with NUL, as Docker once did.
        let text = base64::engine::general_purpose::STANDARD.decode(self.auth.trim()).ok().and_then(|b| String::from_utf8(b).ok());
        let pair = text.as_deref().map(|t| t.trim_end_matches('\0')).and_then(|t| t.split_once(':'));
        let (username, password) = pair.ok_or_else(|| Error::invalid("auth is not base64 of username:password"))?;
        Ok(Some(Credentials::Basic { username: username.to_owned(), password: password.to_owned() }))
    }

    /// Tells pulls with different credentials apart, without keeping the credentials.
    pub fn fingerprint(&self) -> String {
        fingerprint(&[&self.username, &self.password, &self.auth, &self.server_address, &self.identity_token, &self.registry_token])
    }
}

impl Credentials {
    /// Tells credentials apart without keeping them.
    pub fn fingerprint(&self) -> String {
        match self {
            Credentials::Anonymous => fingerprint(&["anonymous"]),
            Credentials::Basic { username, password } => fingerprint(&["basic", username, password]),
            Credentials::Identity { username, token } => fingerprint(&["identity", username, token]),
            Credentials::Registry(token) => fingerprint(&["registry", token]),
        }
    }
}

fn fingerprint(parts: &[&str]) -> String {
    let mut hasher = Hasher::default();
    for part in parts {
        hasher.add(&(part.len() as u64).to_le_bytes());
        hasher.add(part.as_bytes());
    }
    hasher.finish().to_string()
}

/// Whether a server address (a host, or a URL such as Docker's `https://index.docker.io/v1/`) is a registry's.
pub fn same_server(address: &str, authority: &str) -> bool {
    let (host, other) = (plain_host(address), plain_host(authority));
    let hub = |h: &str| matches!(h, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    !host.is_empty() && (host == other || (hub(&host) && hub(&other)))
}

/// The host of an address, in lower case, without the port of https.
fn plain_host(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default().trim().to_ascii_lowercase();
    host.strip_suffix(":443").map_or(host.clone(), str::to_owned)
}

/// The header value of basic authentication.
pub fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_by_kind() {
        let basic = |u: &str, p: &str| Some(Credentials::Basic { username: u.into(), password: p.into() });
        assert!(Auth { auth: "dTpwOng=".into(), ..Auth::default() }.credentials().unwrap() == basic("u", "p:x"));
        let auth = Auth { username: "u".into(), password: "p".into(), ..Auth::default() };
        assert!(auth.credentials().unwrap() == basic("u", "p"));
        assert!(Auth::default().credentials().unwrap().is_none());
        assert!(Auth { auth: "%%".into(), ..Auth::default() }.credentials().is_err());
        let identity = Auth { identity_token: "t".into(), ..auth.clone() }.credentials().unwrap();
        assert!(identity == Some(Credentials::Identity { username: "u".into(), token: "t".into() }));
        let text = format!("{:?}", Auth { password: "hunter2".into(), registry_token: "tok".into(), ..auth.clone() });
        assert!(!text.contains("hunter2") && !text.contains("tok"), "{text}");
        assert_ne!(auth.fingerprint(), Auth::default().fingerprint());
    }

    #[test]
    fn servers() {
        for (address, authority) in [
            ("https://index.docker.io/v1/", "registry-1.docker.io"),
            ("docker.io", "index.docker.io"),
            ("https://Q.io/v2/", "q.io"),
            ("q.io:443", "q.io"),
            ("http://q.io:5000", "q.io:5000"),
        ] {
            assert!(same_server(address, authority), "{address} {authority}");
        }
        for (address, authority) in [("q.io", "q.io:5000"), ("q.io", "evil.io"), ("", ""), ("q.io.evil.io", "q.io"), ("docker.io", "q.io")]
        {
            assert!(!same_server(address, authority), "{address} {authority}");
        }
    }
}
