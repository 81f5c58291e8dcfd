//! Docker's config.json: `auths`, `credHelpers`, `credsStore`. Credential programs are run as Docker runs them, with a
//! timeout, and neither their output nor the file's content is ever shown.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::{same_server, Auth, Credentials};
use crate::error::{Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::process::Program;

const FILE_LIMIT: u64 = 4 << 20;
/// Bytes of a program's answer.
const ANSWER_LIMIT: usize = 256 << 10;
/// The name under which Docker keeps credentials of its hub.
const HUB: &str = "https://index.docker.io/v1/";

/// The parts that concern us.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Config {
    auths: Option<BTreeMap<String, Entry>>,
    cred_helpers: Option<BTreeMap<String, String>>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    username: Option<String>,
    password: Option<String>,
    auth: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// What a program answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

impl Config {
    /// The parser's own words could quote a password: only the place of an error is told.
    pub fn parse(data: &[u8]) -> Result<Config> {
        serde_json::from_slice(data)
            .map_err(|e| Error::precondition(format!("line {} column {}: not a Docker config.json", e.line(), e.column())))
    }

    /// The program for a host: its own, or the one for all.
    pub fn program(&self, name: &str) -> Option<&str> {
        let host = name.split('/').next().unwrap_or_default();
        let own = self.cred_helpers.iter().flatten().find(|(key, _)| same_server(key, host)).map(|(_, program)| program);
        own.or(self.creds_store.as_ref()).map(String::as_str).filter(|program| !program.is_empty())
    }

    /// The entry for a name `host[/path]`: the one with the longest path that it begins with.
    pub fn entry(&self, name: &str) -> Result<Option<Credentials>> {
        let mut best: Option<(usize, &Entry)> = None;
        for (key, entry) in self.auths.iter().flatten() {
            let length = matches(key, name);
            if length.is_some_and(|length| best.is_none_or(|(longest, _)| length > longest)) {
                best = length.map(|length| (length, entry));
            }
        }
        best.map_or(Ok(None), |(_, entry)| entry.credentials())
    }
}

/// How much of a name's path a key covers; None: it is for something else.
fn matches(key: &str, name: &str) -> Option<usize> {
    let (host, path) = name.split_once('/').unwrap_or((name, ""));
    if !same_server(key, host) {
        return None;
    }
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    let covered = key.split_once('/').map_or("", |(_, path)| path).trim_matches('/');
    // Addresses of the API itself, as Docker writes them.
    if matches!(covered, "" | "v1" | "v2") {
        return Some(0);
    }
    let rest = path.strip_prefix(covered)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(covered.len())
}

impl Entry {
    fn credentials(&self) -> Result<Option<Credentials>> {
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let auth = Auth {
            username: text(&self.username),
            password: text(&self.password),
            auth: text(&self.auth),
            server_address: String::new(),
            identity_token: text(&self.identitytoken),
            registry_token: text(&self.registrytoken),
        };
        auth.credentials().map_err(|e| e.with_code(crate::error::Code::FailedPrecondition))
    }
}

/// Looks names (`host` or `host/path`) up in a config.json, in order. None: neither the file nor a program knows them, or there is no file.
pub fn find(path: &Path, names: &[&str], timeout: Duration, cancel: &Cancel) -> Result<Option<Credentials>> {
    if !path.exists() {
        log::warn!("image: {} does not exist", path.display());
        return Ok(None);
    }
    let config = Config::parse(&file::read(path, FILE_LIMIT)?).context(|| format!("read {}", path.display()))?;
    let mut asked: Vec<&str> = Vec::new();
    for name in names {
        let host = name.split('/').next().unwrap_or_default();
        if let Some(program) = config.program(name).filter(|_| !asked.iter().any(|known| same_server(known, host))) {
            asked.push(host);
            if let Some(found) = ask(program, name, timeout, cancel)? {
                return Ok(Some(found));
            }
        }
        if let Some(found) = config.entry(name).context(|| format!("read {}", path.display()))? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Runs `docker-credential-<program> get` with the server's name on stdin.
fn ask(program: &str, name: &str, timeout: Duration, cancel: &Cancel) -> Result<Option<Credentials>> {
    let host = name.split('/').next().unwrap_or_default();
    let wrong = |why: String| Error::precondition(format!("credential program {program:?} for {host}: {why}"));
    if !program.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        return Err(wrong("expected letters, digits, '-', '_' and '.' in its name".to_owned()));
    }
    run(Program::new(format!("docker-credential-{program}")), program, name, timeout, cancel)
}

fn run(command: Program, program: &str, name: &str, timeout: Duration, cancel: &Cancel) -> Result<Option<Credentials>> {
    let host = name.split('/').next().unwrap_or_default();
    let wrong = |why: String| Error::precondition(format!("credential program {program:?} for {host}: {why}"));
    let server = if same_server("docker.io", host) { HUB } else { host };
    let mut command = command.arg("get").stdin(server.as_bytes().to_vec());
    // Clouds' programs look for their own configuration.
    for (key, value) in std::env::vars_os().filter(|(key, _)| key != "PATH") {
        command = command.env(key, value);
    }
    let output = command.output_limit(ANSWER_LIMIT).run(cancel, timeout).map_err(|e| match cancel.check() {
        Err(gone) => gone,
        Ok(()) => wrong(e.message().to_owned()),
    })?;
    if !output.status.success() {
        // Docker's programs say it in these words, on stdout.
        if String::from_utf8_lossy(&output.stdout).contains("credentials not found") {
            return Ok(None);
        }
        return Err(wrong(output.describe()));
    }
    let answer: Answer =
        serde_json::from_slice(&output.stdout).map_err(|_| wrong("its answer is not JSON with Username and Secret".to_owned()))?;
    Ok(match (answer.username.as_str(), answer.secret) {
        (_, secret) if secret.is_empty() => None,
        ("<token>", token) => Some(Credentials::Identity { username: String::new(), token }),
        (username, password) => Some(Credentials::Basic { username: username.to_owned(), password }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const MINUTE: Duration = Duration::from_secs(60);

    fn name_of(found: Option<Credentials>) -> String {
        match found {
            Some(Credentials::Basic { username, .. }) => username,
            Some(Credentials::Identity { token, .. }) => format!("identity {token}"),
            Some(Credentials::Registry(token)) => format!("registry {token}"),
            _ => String::new(),
        }
    }

    #[test]
    fn entries() {
        let config = Config::parse(
            br#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "aHViOnA="},
                "q.io": {"username": "q", "password": "p"},
                "q.io/team": {"username": "team", "password": "p"},
                "http://r.io/v2/": {"identitytoken": "t", "auth": null},
                "s.io": {"registrytoken": "b"},
                "t.io": {},
                "bad.io": {"auth": "%"}
            }, "HttpHeaders": {"x": "y"}, "credsStore": ""}"#,
        )
        .unwrap();
        let entry = |name: &str| name_of(config.entry(name).unwrap());
        for (name, want) in [
            ("docker.io/library/busybox", "hub"),
            ("registry-1.docker.io", "hub"),
            ("q.io/other/x", "q"),
            ("q.io/team/x", "team"),
            ("q.io/teams/x", "q"),
            ("r.io", "identity t"),
            ("s.io", "registry b"),
            ("t.io", ""),
            ("u.io", ""),
        ] {
            assert_eq!(entry(name), want, "{name}");
        }
        assert!(config.entry("bad.io").is_err());
        assert_eq!(config.program("q.io"), None);
        let e = Config::parse(br#"{"auths": {"a": {"password": ["hunter2"]}}}"#).err().unwrap();
        assert!(!e.message().contains("hunter2") && e.message().contains("line 1"), "{e}");
        let e = Config::parse(br#"{"auths": "hunter2"}"#).err().unwrap();
        assert!(!e.message().contains("hunter2"), "{e}");
    }

    #[test]
    fn programs() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            let path = dir.path().join(format!("docker-credential-{name}"));
            std::fs::write(&path, format!("#!/bin/sh\n[ \"$1\" = get ] || exit 9\nread -r server\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        script("good", r#"echo "{\"ServerURL\": \"$server\", \"Username\": \"for $server\", \"Secret\": \"s\"}""#);
        script("token", r#"echo '{"Username": "<token>", "Secret": "it"}'"#);
        script("none", "echo 'credentials not found in native keychain'; exit 1");
        script("bad", "echo hunter2; echo hunter2 >&2; exit 3");
        script("garbage", "echo hunter2");
        script("slow", "sleep 60");
        let path = dir.path().join("config.json");
        let ask = |program: &str, name: &str, timeout: Duration| {
            let program = Program::new(dir.path().join(format!("docker-credential-{program}")));
            run(program, "x", name, timeout, &Cancel::never())
        };
        assert_eq!(name_of(ask("good", "q.io/a", MINUTE).unwrap()), "for q.io");
        assert_eq!(name_of(ask("good", "docker.io", MINUTE).unwrap()), format!("for {HUB}"));
        assert_eq!(name_of(ask("token", "q.io", MINUTE).unwrap()), "identity it");
        assert!(ask("none", "q.io", MINUTE).unwrap().is_none());
        for program in ["bad", "garbage", "absent"] {
            let e = ask(program, "q.io", MINUTE).err().unwrap();
            assert!(!e.message().contains("hunter2") && e.message().contains("for q.io"), "{e}");
        }
        let begin = std::time::Instant::now();
        assert!(ask("slow", "q.io", Duration::from_millis(100)).is_err());
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::fs::write(&path, r#"{"credHelpers": {"q.io": "../evil"}}"#).unwrap();
        let e = find(&path, &["q.io"], MINUTE, &Cancel::never()).err().unwrap();
        assert!(e.message().contains("\"../evil\""), "{e}");
        assert!(find(&dir.path().join("absent"), &["q.io"], MINUTE, &Cancel::never()).unwrap().is_none());
    }
}
