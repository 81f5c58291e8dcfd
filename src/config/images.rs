//! `[images]`: registries, credentials, the preload directory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::{at, text, Checker};
use crate::error::Result;

/// Images and registries.
#[derive(Clone, Debug)]
pub struct Images {
    pub registry_dir: PathBuf,
    pub plain_http: Vec<String>,
    /// Docker's config.json; None: not read.
    pub docker_config: Option<PathBuf>,
    /// By `host[:port]`.
    pub auth: BTreeMap<String, RegistryAuth>,
    /// Whether layers may come from the addresses in their descriptors.
    pub foreign_layers: bool,
    /// A download on which nothing moves for so long is given up.
    pub stall: Duration,
    pub preload_dir: PathBuf,
    pub pinned: Vec<String>,
    pub layer_downloads: usize,
    /// The same for all images together.
    pub all_downloads: u64,
    /// Percent of the file system.
    pub keep_free_percent: u64,
    /// Programs that judge images before a pull.
    pub verifier_dir: Option<PathBuf>,
    pub verifier_timeout: Duration,
    pub max_verifiers: usize,
}

/// Credentials of one registry. `Debug` shows no secret.
#[derive(Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryAuth {
    pub username: String,
    pub password: String,
    /// Base64 of `username:password`.
    pub auth: String,
    pub identity_token: String,
    pub registry_token: String,
}

impl std::fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryAuth").field("username", &self.username).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    registry_dir: Spanned<String>,
    plain_http: Vec<String>,
    docker_config: Spanned<String>,
    auth: BTreeMap<String, Spanned<RegistryAuth>>,
    foreign_layers: bool,
    stall_seconds: Spanned<u64>,
    preload_dir: Spanned<String>,
    pinned: Vec<Spanned<String>>,
    layer_downloads: Spanned<usize>,
    all_downloads: Spanned<u64>,
    keep_free_percent: Spanned<u64>,
    verifier_dir: Spanned<String>,
    verifier_timeout_seconds: Spanned<u64>,
    max_verifiers: Spanned<usize>,
}

impl Default for Raw {
    fn default() -> Raw {
        Raw {
            registry_dir: text("/etc/crisp/certs.d"),
            plain_http: Vec::new(),
            docker_config: text(""),
            auth: BTreeMap::new(),
            foreign_layers: false,
            stall_seconds: at(60),
            preload_dir: text("/var/lib/crisp-preload"),
            pinned: Vec::new(),
            layer_downloads: at(3),
            all_downloads: at(6),
            keep_free_percent: at(2),
            verifier_dir: text("/etc/crisp/image-verifiers"),
            verifier_timeout_seconds: at(10),
            max_verifiers: at(10),
        }
    }
}

impl Raw {
    pub(super) fn check(self, c: &Checker) -> Result<Images> {
        let mut auth = BTreeMap::new();
        for (host, one) in self.auth {
            let RegistryAuth { username, password, auth: pair, identity_token, registry_token } = one.get_ref();
            let login = !username.is_empty() && !password.is_empty();
            let others = [pair, identity_token, registry_token].iter().filter(|s| !s.is_empty()).count();
            if (others != 1 || !password.is_empty()) && (others != 0 || !login) {
                let what = "expected username and password, or one of auth, identity_token, registry_token";
                return Err(c.error(&one, format!("images.auth.{host:?}: {what}")));
            }
            if host.is_empty() || host.contains(['/', '@', ' ']) {
                return Err(c.error(&one, format!("images.auth.{host:?}: expected a host with an optional port")));
            }
            auth.insert(host, one.into_inner());
        }
        Ok(Images {
            registry_dir: c.path("images.registry_dir", &self.registry_dir)?,
            plain_http: self.plain_http,
            docker_config: c.optional_path("images.docker_config", &self.docker_config)?,
            auth,
            foreign_layers: self.foreign_layers,
            stall: Duration::from_secs(c.number("images.stall_seconds", &self.stall_seconds, 1, 3600)?),
            preload_dir: c.path("images.preload_dir", &self.preload_dir)?,
            pinned: check_pinned(c, &self.pinned)?,
            layer_downloads: c.number("images.layer_downloads", &self.layer_downloads, 1, 64)?,
            all_downloads: c.number("images.all_downloads", &self.all_downloads, 1, 256)?,
            keep_free_percent: c.number("images.keep_free_percent", &self.keep_free_percent, 0, 90)?,
            verifier_dir: c.optional_path("images.verifier_dir", &self.verifier_dir)?,
            verifier_timeout: Duration::from_secs(c.number("images.verifier_timeout_seconds", &self.verifier_timeout_seconds, 1, 3600)?),
            max_verifiers: c.number("images.max_verifiers", &self.max_verifiers, 1, 1000)?,
        })
    }
}

fn check_pinned(c: &Checker, raw: &[Spanned<String>]) -> Result<Vec<String>> {
    if let Some(bad) = raw.iter().find(|p| p.get_ref().is_empty() || p.get_ref().contains(char::is_whitespace)) {
        return Err(c.error(bad, format!("images.pinned: expected a reference or a pattern, found {:?}", bad.get_ref())));
    }
    Ok(raw.iter().map(|pattern| pattern.get_ref().clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Overrides};
    use crate::error::Result;

    fn parse(source: &str) -> Result<super::Images> {
        Config::parse("c.toml", source, &Overrides::default()).map(|c| c.images)
    }

    #[test]
    fn credentials_by_host() {
        let images = parse(
            "[images.auth.\"q.io:5000\"]\nusername = \"me\"\npassword = \"hunter2\"\n[images.auth.\"r.io\"]\nidentity_token = \"hunter2\"",
        )
        .unwrap();
        assert_eq!(images.auth["q.io:5000"].username, "me");
        assert!(!format!("{images:?}").contains("hunter2"));
        for bad in ["", "username = \"me\"", "password = \"x\"", "auth = \"x\"\nregistry_token = \"y\"", "auth = \"x\"\npassword = \"y\""] {
            let e = parse(&format!("\n[images.auth.\"q.io\"]\n{bad}")).unwrap_err();
            assert!(e.message().starts_with("c.toml: line 2: images.auth.\"q.io\": expected username"), "{bad:?}: {e}");
        }
        let e = parse("[images.auth.\"https://q.io/\"]\nauth = \"x\"").unwrap_err();
        assert!(e.message().contains("expected a host"), "{e}");
    }
}
