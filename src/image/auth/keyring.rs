//! Which credentials go to which host: those of the request, else the configuration's for that host, else Docker's.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::{docker, same_server, Auth, Credentials};
use crate::error::{Context, Result};
use crate::sys::cancel::Cancel;

/// Where credentials of the node come from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// By `host[:port]`.
    pub hosts: BTreeMap<String, Auth>,
    /// A config.json in Docker's form. Read when a registry asks for credentials.
    pub docker_config: Option<PathBuf>,
    /// Time for a credential program.
    pub program_timeout: Duration,
}

impl Default for Sources {
    fn default() -> Sources {
        Sources { hosts: BTreeMap::new(), docker_config: None, program_timeout: Duration::from_secs(30) }
    }
}

/// The credentials of one pull.
pub struct Keyring {
    pub request: Auth,
    pub sources: Sources,
}

impl Keyring {
    /// Whether the client sent credentials.
    pub fn has_request(&self) -> bool {
        self.request != Auth::default()
    }

    /// For the host `authority`. `own` says that it is the one the reference names: credentials of a request that name no
    /// server are for that one alone. `repository` is the name in the reference, `domain/path`.
    pub fn find(&self, authority: &str, own: bool, repository: &str, cancel: &Cancel) -> Result<Credentials> {
        let domain = repository.split('/').next().unwrap_or_default();
        let is_for = |server: &str| same_server(server, authority) || (own && same_server(server, domain));
        if (self.request.server_address.is_empty() && own) || is_for(&self.request.server_address) {
            if let Some(found) = self.request.credentials()? {
                return Ok(found);
            }
        }
        if let Some((_, auth)) = self.sources.hosts.iter().find(|(host, _)| is_for(host)) {
            if let Some(found) = auth.credentials().context(|| format!("images.auth of {authority}"))? {
                return Ok(found);
            }
        }
        if let Some(path) = &self.sources.docker_config {
            let mut names = vec![authority];
            if own {
                names.insert(0, repository);
            }
            if let Some(found) = docker::find(path, &names, self.sources.program_timeout, cancel)? {
                return Ok(found);
            }
        }
        Ok(Credentials::Anonymous)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(name: &str) -> Auth {
        Auth { username: name.to_owned(), password: "p".to_owned(), ..Auth::default() }
    }

    #[test]
    fn nearest_first_and_to_their_host_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, r#"{"auths": {"q.io": {"username": "docker", "password": "p"}, "m.io": {"auth": "bTpw"}}}"#).unwrap();
        let hosts = BTreeMap::from([("Q.io".to_owned(), login("node"))]);
        let mut keyring =
            Keyring { request: login("request"), sources: Sources { hosts, docker_config: Some(path), ..Sources::default() } };
        let find = |keyring: &Keyring, authority: &str, own: bool| match keyring.find(authority, own, "q.io/a/b", &Cancel::never()).unwrap()
        {
            Credentials::Basic { username, .. } => username,
            _ => "nobody".to_owned(),
        };
        assert_eq!(find(&keyring, "q.io", true), "request");
        assert_eq!(find(&keyring, "mirror.io", false), "nobody", "a mirror gets nothing that is not its own");
        assert_eq!(find(&keyring, "m.io", false), "m");
        keyring.request.server_address = "mirror.io".to_owned();
        assert_eq!(find(&keyring, "mirror.io", false), "request");
        assert_eq!(find(&keyring, "q.io", true), "node");
        keyring.sources.hosts.clear();
        assert_eq!(find(&keyring, "q.io", true), "docker");
        assert_eq!(find(&keyring, "other.io", false), "nobody");
    }
}
