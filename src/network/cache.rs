//! What was added, on disk, so that DEL uses what ADD used, whatever the conf directory says by then.
//!
//! The layout is that of the reference library (`results/<network>-<sandbox>-<ifname>`, kind `cniCacheV1`), so that other
//! tools can read it; a `crisp` field tells our entries from those of other runtimes in the same directory.

use std::path::{Path, PathBuf};

use base64::prelude::{Engine, BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::conflist::Conflist;
use crate::error::{Context, Error, Result};
use crate::sys::file::{self, Durability};

const KIND: &str = "cniCacheV1";

/// Bytes read of one entry.
const ENTRY_LIMIT: u64 = 8 << 20;

/// One network of one sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    kind: String,
    pub container_id: String,
    /// The conflist with all plugins inlined, in base64.
    config: String,
    pub if_name: String,
    pub network_name: String,
    #[serde(default)]
    pub netns: String,
    #[serde(default)]
    cni_args: Vec<[String; 2]>,
    #[serde(default)]
    pub capability_args: Map<String, Value>,
    /// What the last plugin that succeeded gave; None before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    crisp: Own,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Own {
    /// Position in the order of ADDs of the sandbox.
    order: u32,
}

impl Entry {
    pub fn new(list: &Conflist, order: u32, sandbox: &str, ifname: &str, netns: &str, args: Vec<[String; 2]>) -> Entry {
        Entry {
            kind: KIND.to_owned(),
            container_id: sandbox.to_owned(),
            config: BASE64_STANDARD.encode(list.to_json()),
            if_name: ifname.to_owned(),
            network_name: list.name.clone(),
            netns: netns.to_owned(),
            cni_args: args,
            capability_args: Map::new(),
            result: None,
            crisp: Own { order },
        }
    }

    /// The conflist that ADD used.
    pub fn conflist(&self) -> Result<Conflist> {
        let what = || format!("cached network {} of sandbox {}", self.network_name, self.container_id);
        let text = BASE64_STANDARD.decode(&self.config).map_err(|e| Error::internal(format!("decode base64: {e}"))).context(what)?;
        Conflist::parse(&text).context(what)
    }

    /// The value of CNI_ARGS.
    pub fn args(&self) -> String {
        self.cni_args.iter().map(|p| p.join("=")).collect::<Vec<_>>().join(";")
    }

    fn file_name(&self) -> String {
        format!("{}-{}-{}", self.network_name, self.container_id, self.if_name)
    }
}

/// The directory of entries.
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Opens the cache below `root`; its directory is made on the first write.
    pub fn new(root: &Path) -> Cache {
        Cache { dir: root.join("results") }
    }

    /// Writes or replaces an entry.
    pub fn write(&self, entry: &Entry) -> Result<()> {
        file::make_dir(&self.dir, 0o700)?;
        let text =
            serde_json::to_vec(entry).context(|| format!("encode network {} of sandbox {}", entry.network_name, entry.container_id))?;
        // File names have no extension, and the temporary one begins with a dot: list() leaves it out.
        file::write(&self.dir.join(entry.file_name()), &text, 0o600, Durability::Atomic)
    }

    pub fn remove(&self, entry: &Entry) -> Result<()> {
        file::remove_file(&self.dir.join(entry.file_name()))
    }

    /// The entries of a sandbox, in the order of their ADDs.
    pub fn of_sandbox(&self, id: &str) -> Result<Vec<Entry>> {
        // Other sandboxes' files are not opened.
        let part = format!("-{id}-");
        let mut entries = self.list(|name| name.contains(&part))?;
        entries.retain(|e| e.container_id == id);
        Ok(entries)
    }

    /// All our entries, sandbox by sandbox, in the order of their ADDs.
    pub fn all(&self) -> Result<Vec<Entry>> {
        self.list(|_| true)
    }

    fn list(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Entry>> {
        let what = || format!("read directory {}", self.dir.display());
        let names = match std::fs::read_dir(&self.dir) {
            Ok(names) => names,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).context(what),
        };
        let mut entries = Vec::new();
        for name in names {
            let Ok(name) = name.context(what)?.file_name().into_string() else { continue };
            if name.starts_with('.') || !wanted(&name) {
                continue;
            }
            let path = self.dir.join(&name);
            match read_entry(&path) {
                Ok(entry) if entry.file_name() == name => entries.push(entry),
                Ok(_) => log::warn!("network cache: {} is ignored: its name is not that of its content", path.display()),
                // Removed since the directory was read.
                Err(_) if !path.exists() => {}
                Err(e) => log::warn!("network cache: {} is ignored: {e}", path.display()),
            }
        }
        entries.sort_by(|a, b| (&a.container_id, a.crisp.order).cmp(&(&b.container_id, b.crisp.order)));
        Ok(entries)
    }
}

fn read_entry(path: &Path) -> Result<Entry> {
    let entry: Entry = serde_json::from_slice(&file::read(path, ENTRY_LIMIT)?).context(|| "parse JSON")?;
    if entry.kind != KIND {
        return Err(Error::internal(format!("kind {:?} is not {KIND}", entry.kind)));
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, order: u32, sandbox: &str) -> Entry {
        let list = Conflist::parse(format!(r#"{{"name":"{name}","cniVersion":"1.0.0","plugins":[{{"type":"x"}}]}}"#).as_bytes()).unwrap();
        Entry::new(&list, order, sandbox, &format!("net{order}"), "/n", vec![["A".into(), "1".into()], ["B".into(), "2".into()]])
    }

    #[test]
    fn entries_come_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        assert!(cache.all().unwrap().is_empty());
        for e in [entry("b", 1, "s1"), entry("c", 0, "s1"), entry("b", 0, "s10")] {
            cache.write(&e).unwrap();
        }
        let found = cache.of_sandbox("s1").unwrap();
        assert_eq!(found.iter().map(|e| e.network_name.as_str()).collect::<Vec<_>>(), ["c", "b"]);
        assert_eq!(found[0].args(), "A=1;B=2");
        assert_eq!(found[0].conflist().unwrap().name, "c");
        cache.remove(&found[0]).unwrap();
        cache.remove(&found[0]).unwrap();
        assert_eq!(cache.all().unwrap().len(), 2);
    }

    #[test]
    fn torn_and_foreign_files_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        cache.write(&entry("a", 0, "s1")).unwrap();
        let results = dir.path().join("results");
        let text = std::fs::read_to_string(results.join("a-s1-net0")).unwrap();
        std::fs::write(results.join("b-s1-eth0"), &text[..text.len() / 2]).unwrap();
        std::fs::write(results.join("renamed-s1-net0"), &text).unwrap();
        std::fs::write(results.join("a-s2-eth0"), text.replace("crisp", "other").replace("net0", "eth0")).unwrap();
        std::fs::create_dir(results.join("a-s3-eth0")).unwrap();
        assert_eq!(cache.all().unwrap().len(), 1);
    }

    #[test]
    fn the_layout_is_the_reference_librarys() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        cache.write(&Entry { result: Some(serde_json::json!({"ips": []})), ..entry("a", 0, "s1") }).unwrap();
        let json: Value = serde_json::from_slice(&std::fs::read(dir.path().join("results/a-s1-net0")).unwrap()).unwrap();
        assert_eq!((&json["kind"], &json["containerId"], &json["ifName"]), (&"cniCacheV1".into(), &"s1".into(), &"net0".into()));
        assert_eq!(
            (&json["networkName"], &json["cniArgs"][0][0], &json["result"]["ips"]),
            (&"a".into(), &"A".into(), &serde_json::json!([]))
        );
    }
}
