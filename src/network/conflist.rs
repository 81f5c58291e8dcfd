//! CNI network configurations: `.conflist`, `.conf` and `.json` files of the conf directory, and what is sent to a plugin.
//!
//! Source of the rules: the CNI specification, sections 1 and 3 (0.3.0 to 1.1.0).

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Context, Error, Result};
use crate::sys::file;

/// Bytes read of one configuration file.
const FILE_LIMIT: u64 = 1 << 20;

/// Files looked at in one directory: a bound on work, not a policy.
const FILES_LIMIT: usize = 256;

/// A version of the CNI specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u16, u16, u16);

impl Version {
    /// The first with CHECK, and with a prevResult for DEL.
    pub const V0_4_0: Version = Version(0, 4, 0);
    /// The first with GC and STATUS, and the newest we speak.
    pub const V1_1_0: Version = Version(1, 1, 0);
    /// A configuration without a version is of this one.
    const V0_1_0: Version = Version(0, 1, 0);

    /// Parses `major.minor.patch`.
    pub fn parse(text: &str) -> Option<Version> {
        let mut parts = text.split('.').map(|p| p.parse::<u16>().ok().filter(|_| p.bytes().all(|b| b.is_ascii_digit())));
        let version = Version(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }

    fn is_spoken(self) -> bool {
        ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"].contains(&self.to_string().as_str())
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// One plugin's part of a conflist.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginConf {
    /// The `type`: the name of the executable.
    pub kind: String,
    /// What it declares `true` in `capabilities`.
    pub capabilities: BTreeSet<String>,
    /// The `ipam.type`, an executable that the plugin calls itself.
    pub ipam: Option<String>,
    json: Map<String, Value>,
}

/// A network: a name and a chain of plugins. A single-plugin file becomes a chain of one.
#[derive(Clone, Debug, PartialEq)]
pub struct Conflist {
    pub name: String,
    pub version: Version,
    pub disable_check: bool,
    pub disable_gc: bool,
    pub plugins: Vec<PluginConf>,
    /// More plugins may stand in the directory named like the network (1.1.0).
    load_more: bool,
}

impl Conflist {
    /// Parses a list, or a single plugin's configuration, as text. Plugins of the network's own directory are not looked for.
    pub fn parse(text: &[u8]) -> Result<Conflist> {
        let list = Conflist::parse_open(text)?;
        list.check_chain()?;
        Ok(list)
    }

    /// Reads `path` and, unless the list says `loadOnlyInlinedPlugins`, the `*.conf` files of the directory beside it that
    /// is named like the network.
    pub fn load(path: &Path) -> Result<Conflist> {
        let mut list = Conflist::parse_open(&file::read(path, FILE_LIMIT)?)?;
        let dir = path.parent().unwrap_or(Path::new("/")).join(&list.name);
        if list.load_more && dir.is_dir() {
            for name in names_in(&dir, &["conf"])? {
                let path = dir.join(&name);
                let plugin = serde_json::from_slice(&file::read(&path, FILE_LIMIT)?)
                    .context(|| "parse JSON")
                    .and_then(|json| PluginConf::parse(&json))
                    .context(|| format!("plugin file {}", path.display()))?;
                list.plugins.push(plugin);
            }
        }
        list.check_chain()?;
        Ok(list)
    }

    fn parse_open(text: &[u8]) -> Result<Conflist> {
        let json: Value = serde_json::from_slice(text).context(|| "parse JSON")?;
        let object = json.as_object().ok_or_else(|| Error::invalid("the configuration is not a JSON object"))?;
        let name = string(object, "name")?.ok_or_else(|| Error::invalid("field name is missing"))?;
        if !is_identifier(name) {
            return Err(Error::invalid(format!("field name: {name:?} is not letters, digits, '_', '.' and '-'")));
        }
        let single = !object.contains_key("plugins") && object.contains_key("type");
        let plugins = match object.get("plugins") {
            _ if single => vec![PluginConf::parse(&json)?],
            None => Vec::new(),
            Some(Value::Array(plugins)) => {
                plugins.iter().enumerate().map(|(i, p)| PluginConf::parse(p).context(|| format!("plugins[{i}]"))).collect::<Result<_>>()?
            }
            Some(_) => return Err(Error::invalid("field plugins is not a list")),
        };
        let version = version_of(object)?;
        let inlined_only = flag(object, "loadOnlyInlinedPlugins")?;
        Ok(Conflist {
            name: name.to_owned(),
            version,
            disable_check: flag(object, "disableCheck")?,
            disable_gc: flag(object, "disableGC")?,
            plugins,
            load_more: !single && !inlined_only,
        })
    }

    fn check_chain(&self) -> Result<()> {
        if self.plugins.is_empty() {
            return Err(Error::invalid(format!("network {} has no plugin", self.name)));
        }
        Ok(())
    }

    /// The network as one document with all its plugins inlined; `parse` reads it back.
    pub fn to_json(&self) -> Vec<u8> {
        let mut object = Map::new();
        object.insert("cniVersion".into(), self.version.to_string().into());
        object.insert("name".into(), self.name.clone().into());
        for (key, value) in [("disableCheck", self.disable_check), ("disableGC", self.disable_gc)] {
            if value {
                object.insert(key.into(), true.into());
            }
        }
        object.insert("loadOnlyInlinedPlugins".into(), true.into());
        object.insert("plugins".into(), self.plugins.iter().map(|p| Value::Object(p.json.clone())).collect());
        Value::Object(object).to_string().into_bytes()
    }

    /// Whether a plugin of the chain declares `capability`.
    pub fn declares(&self, capability: &str) -> bool {
        self.plugins.iter().any(|p| p.capabilities.contains(capability))
    }

    /// What `plugin` gets on stdin: its configuration with name, version, the declared part of `capability_args`, the
    /// previous result, and `extra`.
    pub fn request(
        &self,
        plugin: &PluginConf,
        capability_args: &Map<String, Value>,
        previous: Option<&Value>,
        extra: Option<(&str, Value)>,
    ) -> Vec<u8> {
        let mut object = plugin.json.clone();
        object.remove("capabilities");
        object.insert("cniVersion".into(), self.version.to_string().into());
        object.insert("name".into(), self.name.clone().into());
        let declared: Map<_, _> =
            capability_args.iter().filter(|(k, _)| plugin.capabilities.contains(*k)).map(|(k, v)| (k.clone(), v.clone())).collect();
        if !declared.is_empty() {
            object.insert("runtimeConfig".into(), declared.into());
        }
        if let Some(previous) = previous {
            object.insert("prevResult".into(), previous.clone());
        }
        if let Some((key, value)) = extra {
            object.insert(key.into(), value);
        }
        Value::Object(object).to_string().into_bytes()
    }
}

impl PluginConf {
    fn parse(json: &Value) -> Result<PluginConf> {
        let object = json.as_object().ok_or_else(|| Error::invalid("the plugin is not a JSON object"))?;
        let kind = string(object, "type")?.ok_or_else(|| Error::invalid("field type is missing"))?;
        check_plugin_name(kind)?;
        let mut capabilities = BTreeSet::new();
        match object.get("capabilities") {
            None | Some(Value::Null) => {}
            Some(Value::Object(map)) => {
                for (key, value) in map {
                    match value {
                        Value::Bool(true) => drop(capabilities.insert(key.clone())),
                        Value::Bool(false) => {}
                        _ => return Err(Error::invalid(format!("field capabilities.{key} is not a boolean"))),
                    }
                }
            }
            Some(_) => return Err(Error::invalid("field capabilities is not an object")),
        }
        let ipam = object.get("ipam").and_then(|i| i.get("type")).and_then(Value::as_str).filter(|t| !t.is_empty()).map(str::to_owned);
        Ok(PluginConf { kind: kind.to_owned(), capabilities, ipam, json: object.clone() })
    }
}

/// A plugin's name is looked up in the plugin directories: it must not lead out of them.
pub fn check_plugin_name(name: &str) -> Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.contains('/') || name.chars().any(char::is_control) {
        return Err(Error::invalid(format!("field type: {name:?} is not the name of a plugin")));
    }
    Ok(())
}

/// The form that the specification asks of network names and container ids.
pub fn is_identifier(text: &str) -> bool {
    text.len() <= 255
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn string<'a>(object: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Error::invalid(format!("field {key} is not a string"))),
    }
}

/// A boolean, also in the form of a string, which older files use.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(Error::invalid(format!("field {key} is not a boolean"))),
    }
}

/// The newest version that the file offers (`cniVersion`, and `cniVersions` since 1.1.0) and that we speak.
fn version_of(object: &Map<String, Value>) -> Result<Version> {
    let mut offered: Vec<&str> = Vec::new();
    offered.extend(string(object, "cniVersion")?.filter(|v| !v.is_empty()));
    match object.get("cniVersions") {
        None | Some(Value::Null) => {}
        Some(Value::Array(list)) => {
            for value in list {
                offered.push(value.as_str().ok_or_else(|| Error::invalid("field cniVersions has an entry that is not a string"))?);
            }
        }
        Some(_) => return Err(Error::invalid("field cniVersions is not a list")),
    }
    if offered.is_empty() {
        return Ok(Version::V0_1_0);
    }
    let best = offered.iter().filter_map(|v| Version::parse(v)).filter(|v| v.is_spoken()).max();
    best.ok_or_else(|| Error::invalid(format!("cniVersion {} is not one of 0.1.0 to {}", offered.join(", "), Version::V1_1_0)))
}

/// The networks of a conf directory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Directory {
    /// In the order of their file names: the first is the default.
    pub networks: Vec<Arc<Conflist>>,
    /// One line per file that was left out, with the reason.
    pub problems: Vec<String>,
}

impl Directory {
    /// Reads all configurations of `dir`. A file that is not valid is left out; a directory that is not there is empty.
    pub fn load(dir: &Path) -> Result<Directory> {
        let mut found = Directory::default();
        if !dir.exists() {
            return Ok(found);
        }
        let names = names_in(dir, &["conf", "conflist", "json"])?;
        if names.len() > FILES_LIMIT {
            found.problems.push(format!("{}: only the first {FILES_LIMIT} of {} files are read", dir.display(), names.len()));
        }
        for name in names.iter().take(FILES_LIMIT) {
            let path = dir.join(name);
            match Conflist::load(&path) {
                Ok(list) if found.named(&list.name).is_some() => {
                    found.problems.push(format!("{}: a file before it has a network of the name {}", path.display(), list.name));
                }
                Ok(list) => found.networks.push(Arc::new(list)),
                Err(e) => found.problems.push(format!("{}: {e}", path.display())),
            }
        }
        Ok(found)
    }

    pub fn default_network(&self) -> Option<&Arc<Conflist>> {
        self.networks.first()
    }

    pub fn named(&self, name: &str) -> Option<&Arc<Conflist>> {
        self.networks.iter().find(|n| n.name == name)
    }
}

/// Names of the visible entries of `dir` with one of the extensions, sorted by bytes.
fn names_in(dir: &Path, extensions: &[&str]) -> Result<Vec<String>> {
    let what = || format!("read directory {}", dir.display());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).context(what)? {
        let Ok(name) = entry.context(what)?.file_name().into_string() else { continue };
        let extension = name.rsplit_once('.').map_or("", |(_, e)| e);
        if !name.starts_with('.') && extensions.contains(&extension) && !dir.join(&name).is_dir() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<Conflist> {
        Conflist::parse(value.to_string().as_bytes())
    }

    #[test]
    fn a_list() {
        let list = parse(json!({"cniVersion": "1.0.0", "name": "cbr0", "disableCheck": "true", "plugins": [
            {"type": "bridge", "ipam": {"type": "host-local"}},
            {"type": "portmap", "capabilities": {"portMappings": true, "ips": false}}]}))
        .unwrap();
        assert_eq!((list.name.as_str(), list.version, list.disable_check, list.disable_gc), ("cbr0", Version(1, 0, 0), true, false));
        assert_eq!(list.plugins[0].ipam.as_deref(), Some("host-local"));
        assert!(list.declares("portMappings") && !list.declares("ips"));
        let again = Conflist::parse(&list.to_json()).unwrap();
        assert_eq!((again.plugins, again.version), (list.plugins, list.version));
    }

    #[test]
    fn a_single_plugin_becomes_a_chain_of_one() {
        let list = parse(json!({"name": "lo", "type": "loopback"})).unwrap();
        assert_eq!((list.plugins.len(), list.version), (1, Version::V0_1_0));
        assert_eq!(Conflist::parse(&list.to_json()).unwrap().plugins, list.plugins);
    }

    #[test]
    fn versions() {
        let with = |v: Value| parse(json!({"name": "a", "cniVersions": v, "cniVersion": "0.4.0", "plugins": [{"type": "x"}]}));
        assert_eq!(with(json!(["1.0.0", "1.1.0", "2.0.0"])).unwrap().version, Version::V1_1_0);
        assert_eq!(with(Value::Null).unwrap().version, Version::V0_4_0);
        assert!(with(json!([1])).is_err());
        let e = parse(json!({"name": "a", "cniVersion": "1.2.0", "type": "x"})).unwrap_err();
        assert!(e.message().contains("cniVersion 1.2.0 is not one of"), "{e}");
        assert_eq!(Version::parse("1.+2.0"), None);
        assert_eq!(Version::parse("1.2.3.4"), None);
    }

    #[test]
    fn wrong_shapes_name_the_field() {
        for (value, words) in [
            (json!([]), "not a JSON object"),
            (json!({"plugins": []}), "field name is missing"),
            (json!({"name": "../x", "plugins": []}), "field name"),
            (json!({"name": "a", "plugins": {}}), "field plugins is not a list"),
            (json!({"name": "a", "plugins": []}), "has no plugin"),
            (json!({"name": "a", "plugins": [{}]}), "plugins[0]: field type is missing"),
            (json!({"name": "a", "plugins": [{"type": "../sh"}]}), "not the name of a plugin"),
            (json!({"name": "a", "plugins": [{"type": "x", "capabilities": {"ips": 1}}]}), "capabilities.ips is not a boolean"),
            (json!({"name": "a", "disableGC": 3, "plugins": [{"type": "x"}]}), "disableGC is not a boolean"),
        ] {
            let e = parse(value.clone()).unwrap_err();
            assert!(e.message().contains(words), "{value}: {e}");
        }
    }

    #[test]
    fn a_request_has_only_declared_capabilities() {
        let list = parse(json!({"cniVersion": "0.4.0", "name": "n", "plugins": [
            {"type": "a", "mtu": 9, "capabilities": {"mac": true}}, {"type": "b"}]}))
        .unwrap();
        let args = json!({"mac": "02:00:00:00:00:01", "ips": ["10.0.0.9/24"]});
        let prev = json!({"ips": []});
        let request = |i: usize| -> Value {
            let bytes = list.request(&list.plugins[i], args.as_object().unwrap(), Some(&prev), None);
            serde_json::from_slice(&bytes).unwrap()
        };
        assert_eq!(
            request(0),
            json!({"type": "a", "mtu": 9, "name": "n", "cniVersion": "0.4.0", "prevResult": {"ips": []},
                "runtimeConfig": {"mac": "02:00:00:00:00:01"}})
        );
        assert_eq!(request(1), json!({"type": "b", "name": "n", "cniVersion": "0.4.0", "prevResult": {"ips": []}}));
    }

    #[test]
    fn a_directory_skips_what_is_not_valid() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(Directory::load(&dir.path().join("absent")).unwrap(), Directory::default());
        put("00-torn.conflist", "{\"name\":");
        put("10-a.conf", r#"{"name":"a","type":"x"}"#);
        put("20-a.json", r#"{"name":"a","type":"y"}"#);
        put("30-b.conflist", r#"{"name":"b","cniVersion":"1.1.0"}"#);
        put("40-c.conflist.bak", r#"{"name":"c","type":"x"}"#);
        put(".05.conf.tmp", r#"{"name":"d","type":"x"}"#);
        std::fs::create_dir(dir.path().join("b")).unwrap();
        std::fs::write(dir.path().join("b/1.conf"), r#"{"type":"z"}"#).unwrap();
        let found = Directory::load(dir.path()).unwrap();
        assert_eq!(found.networks.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(found.default_network().unwrap().plugins[0].kind, "x");
        assert_eq!(found.named("b").unwrap().plugins[0].kind, "z");
        assert_eq!(found.problems.len(), 2, "{:?}", found.problems);
        assert!(found.problems[0].contains("00-torn.conflist: parse JSON"), "{:?}", found.problems);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Conflist::parse(&bytes);
        }

        #[test]
        fn what_parses_survives_the_cache(name in "[a-z./-]{0,6}", kind in "[a-z./]{0,4}", version in "[01]\\.[0-4]\\.[01]",
            caps in any::<bool>()) {
            let text = json!({"name": name, "cniVersion": version, "plugins": [{"type": kind, "capabilities": {"ips": caps}}]}).to_string();
            if let Ok(list) = Conflist::parse(text.as_bytes()) {
                let again = Conflist::parse(&list.to_json()).unwrap();
                prop_assert_eq!(again.plugins, list.plugins);
                prop_assert_eq!(again.version, list.version);
            }
        }
    }
}
