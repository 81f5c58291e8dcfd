//! What this host can do for crisp, and what it lacks: `crispd check`, and the verbose Status. Nothing is changed: what has to be tried
//! is tried in a directory and a mount namespace of its own and removed.

/// cgroup hierarchies, controllers and the driver.
mod cgroups;
/// Kernel features: seccomp, LSMs, user namespaces, mounts.
mod kernel;
/// Limits of process, kernel and disk; addresses.
mod limits;
/// CNI, CDI, hooks: what the configured directories hold.
mod directories;
/// OCI runtimes.
mod runtimes;

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::config::Config;
use crate::runtime::Handlers;
use crate::spec::HostFacts;

/// How it is with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// Containers run; something they may ask for does not work, or will not for long.
    Warn,
    /// Without it there are no containers, or none with a network.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What it belongs to: `cgroups`, `runtime`.
    pub topic: &'static str,
    /// What it is: `driver`, `crun`.
    pub name: String,
    pub state: State,
    /// What was found, for people.
    pub found: String,
    /// What to do about it, when it is not well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What was found, for programs.
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    pub data: serde_json::Value,
}

impl Finding {
    fn new(topic: &'static str, name: &str, state: State, found: impl Into<String>) -> Finding {
        let (name, found) = (name.to_owned(), found.into());
        Finding { topic, name, state, found, hint: None, data: serde_json::Value::Null }
    }

    fn ok(topic: &'static str, name: &str, found: impl Into<String>) -> Finding {
        Finding::new(topic, name, State::Ok, found)
    }

    /// What a container may ask for and would be refused.
    fn warn(topic: &'static str, name: &str, found: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { hint: Some(hint.into()), ..Finding::new(topic, name, State::Warn, found) }
    }

    fn missing(topic: &'static str, name: &str, found: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { hint: Some(hint.into()), ..Finding::new(topic, name, State::Missing, found) }
    }

    fn with(self, data: serde_json::Value) -> Finding {
        Finding { data, ..self }
    }
}

/// All that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Nothing is missing.
    pub ready: bool,
    pub findings: Vec<Finding>,
}

/// What a running daemon has found out already; it is not tried again.
pub struct Known<'a> {
    pub host: &'a HostFacts,
    pub handlers: &'a Handlers,
    /// Whether root filesystems are overlays.
    pub overlay: bool,
}

/// Looks at this host as `config` would have it used. Starts the OCI runtimes and mounts a small overlay, unless `known` has what came
/// of that; as another user than root less can be seen, and the report says so.
pub fn look(config: &Config, known: Option<&Known>) -> Report {
    let mut findings = Vec::new();
    kernel::look(config, known, &mut findings);
    cgroups::look(config, &mut findings);
    runtimes::look(config, known.map(|known| known.handlers), &mut findings);
    directories::look(config, &mut findings);
    limits::look(config, known.is_some(), &mut findings);
    Report { ready: findings.iter().all(|finding| finding.state != State::Missing), findings }
}

impl fmt::Display for Report {
    /// One line each, aligned, the hint below.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = |finding: &Finding| format!("{} {}", finding.topic, finding.name);
        let width = self.findings.iter().map(|finding| label(finding).chars().count()).max().unwrap_or(0);
        for finding in &self.findings {
            let state = match finding.state {
                State::Ok => "ok",
                State::Warn => "warn",
                State::Missing => "MISSING",
            };
            writeln!(f, "{state:<7}  {:<width$}  {}", label(finding), one_line(&finding.found))?;
            if let Some(hint) = &finding.hint {
                writeln!(f, "{:<7}  {:<width$}  -> {}", "", "", one_line(hint))?;
            }
        }
        let count = |state: State| self.findings.iter().filter(|finding| finding.state == state).count();
        let (warnings, missing) = (count(State::Warn), count(State::Missing));
        match self.ready {
            true => writeln!(f, "\nready: containers can run here ({warnings} warnings)"),
            false => writeln!(f, "\nnot ready: {missing} missing, {warnings} warnings"),
        }
    }
}

/// Words of other programs may have lines of their own.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `path`, or the nearest directory above it that is there.
fn nearest(path: &Path) -> &Path {
    path.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The text of a kernel file, trimmed; empty when it is not there.
fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests;
