//! The handler table: which runtimes are configured, which passed their probe, which is the default.

use std::collections::BTreeMap;
use std::path::Path;

use super::{probe, Features, Handler, Kind};
use crate::error::{Error, Result};

/// Tried in this order when the configuration names no default.
const PREFERRED: [&str; 2] = ["crun", "runc"];

struct Entry {
    handler: Handler,
    /// The version it reports, or why it cannot be used.
    state: Result<String>,
    features: Features,
}

/// All handlers.
pub struct Handlers {
    entries: BTreeMap<String, Entry>,
    default: String,
}

impl Handlers {
    /// Probes each configured handler with a real container (`scratch` is a directory for it) and chooses the default: the
    /// configured one, else the first of crun, runc that works.
    pub fn probe(configured: &BTreeMap<String, Handler>, default: Option<&str>, scratch: &Path, shim: &Path) -> Handlers {
        let handlers: Vec<&Handler> = configured.values().collect();
        let states = crate::sys::thread::for_each("probe", &handlers, &|h| probe::probe(h, &scratch.join(&h.name), shim));
        let _ = crate::sys::file::remove_tree(scratch);
        let mut entries = BTreeMap::new();
        for (handler, state) in handlers.into_iter().zip(states) {
            match &state {
                Ok((v, _)) => log::info!("runtime handler {}: {} ({} {})", handler.name, handler.path.display(), v.name, v.version),
                Err(e) => log::warn!("runtime handler {} cannot be used: {e}", handler.name),
            }
            let (state, features) = match state {
                Ok((v, features)) => (Ok(format!("{} {}", v.name, v.version)), features),
                Err(e) => (Err(e), Features::default()),
            };
            entries.insert(handler.name.clone(), Entry { handler: handler.clone(), state, features });
        }
        let works = |name: &&str| entries.get(*name).is_some_and(|e| e.state.is_ok());
        let chosen = default.or_else(|| PREFERRED.into_iter().find(works)).unwrap_or(PREFERRED[0]).to_owned();
        log::info!("default runtime handler: {chosen}");
        Handlers { entries, default: chosen }
    }

    /// The handler that a sandbox asks for; "" is the default. An unknown name is INVALID_ARGUMENT, one that failed its probe
    /// FAILED_PRECONDITION with the reason.
    pub fn get(&self, name: &str) -> Result<&Handler> {
        let name = if name.is_empty() { &self.default } else { name };
        let Some(entry) = self.entries.get(name) else { return Err(self.unknown(name)) };
        match &entry.state {
            Ok(_) => Ok(&entry.handler),
            Err(e) => Err(Error::precondition(format!("runtime_handler: {name} cannot be used on this host: {e}"))),
        }
    }

    /// Whether it is the name of a handler, "" for the default, that works or does not: what an image may be asked for by, since all
    /// handlers have the same images. INVALID_ARGUMENT for others.
    pub fn check_name(&self, name: &str) -> Result<()> {
        match name.is_empty() || self.entries.contains_key(name) {
            true => Ok(()),
            false => Err(self.unknown(name)),
        }
    }

    fn unknown(&self, name: &str) -> Error {
        let known = self.entries.keys().cloned().collect::<Vec<_>>().join(", ");
        Error::invalid(format!("runtime_handler: no handler {name:?}; configured: {known}"))
    }

    /// Whether the handler's OCI runtime compiles a seccomp profile at each start, and takes a compiled one: crun before 1.14, which
    /// remembers them.
    pub fn compiles_filters(&self, name: &str) -> bool {
        let name = if name.is_empty() { &self.default } else { name };
        let entry = self.entries.get(name).filter(|entry| entry.handler.kind == Kind::Crun);
        entry.and_then(|entry| entry.state.as_deref().ok()?.split_once(' ')).is_some_and(|(_, version)| is_before_1_14(version))
    }

    /// What the handler named so can do; "" is the default. Nothing when it is unknown or cannot be used.
    pub fn features(&self, name: &str) -> &Features {
        static NOTHING: std::sync::LazyLock<Features> = std::sync::LazyLock::new(Features::default);
        let name = if name.is_empty() { &self.default } else { name };
        self.entries.get(name).map_or_else(|| &*NOTHING, |e| &e.features)
    }

    /// Handlers that can be used.
    pub fn usable(&self) -> impl Iterator<Item = &Handler> {
        self.entries.values().filter(|e| e.state.is_ok()).map(|e| &e.handler)
    }

    /// All, each with its version or its problem.
    pub fn all(&self) -> impl Iterator<Item = (&Handler, String)> {
        self.entries.values().map(|e| (&e.handler, e.state.as_ref().map_or_else(|p| p.to_string(), String::clone)))
    }

    pub fn default_name(&self) -> &str {
        &self.default
    }

    /// Why the default handler cannot be used.
    pub fn problem(&self) -> Option<String> {
        self.get("").err().map(|e| e.message().to_owned())
    }
}

fn is_before_1_14(version: &str) -> bool {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) < (1, 14),
        // A version that cannot be read may be anything: it gets the profile alone.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_cruns_compile_at_each_start() {
        for old in ["1.8.1", "0.17", "1.13", "1.13.9+dfsg"] {
            assert!(is_before_1_14(old), "{old}");
        }
        for young in ["1.14", "1.28", "2.0", "x", "", "1"] {
            assert!(!is_before_1_14(young), "{young}");
        }
    }
}
