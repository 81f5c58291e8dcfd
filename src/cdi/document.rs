//! The form of a spec file. Strict, as CDI asks: a key that is not known, or that came with a later version than the file says,
//! makes the file not valid.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer};

use super::name::Name;
use super::yaml;

/// Versions there are; the index orders them.
const VERSIONS: [&str; 10] = ["0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];

/// A spec file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    #[serde(rename = "cdiVersion")]
    version: String,
    /// `vendor/class`
    kind: String,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
    pub(super) devices: Vec<Device>,
    /// For every container with one of the devices.
    #[serde(default, deserialize_with = "or_default", rename = "containerEdits")]
    pub(super) container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Device {
    #[serde(deserialize_with = "text")]
    name: String,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default", rename = "containerEdits")]
    pub(super) container_edits: Edits,
}

/// What is changed in the OCI spec of a container.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct Edits {
    /// `NAME=value`
    #[serde(deserialize_with = "or_default")]
    pub(super) env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(super) device_nodes: Vec<Node>,
    #[serde(deserialize_with = "or_default")]
    pub(super) net_devices: Vec<NetDevice>,
    #[serde(deserialize_with = "or_default")]
    pub(super) mounts: Vec<Mount>,
    #[serde(deserialize_with = "or_default")]
    pub(super) hooks: Vec<Hook>,
    pub(super) intel_rdt: Option<IntelRdt>,
    #[serde(deserialize_with = "or_default")]
    pub(super) additional_gids: Vec<u32>,
}

/// A key without a value is as good as no key, as libraries in Go take it.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// Text; YAML reads `name: 0` as a number.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected text")]
    enum Scalar {
        Text(String),
        Number(i64),
    }
    Ok(match Scalar::deserialize(from)? {
        Scalar::Text(text) => text,
        Scalar::Number(number) => number.to_string(),
    })
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct Node {
    pub(super) path: String,
    /// Empty: `path`.
    pub(super) host_path: String,
    /// b, c, u or p; empty: what the host has there.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// With `minor`; 0: what the host has there.
    pub(super) major: i64,
    pub(super) minor: i64,
    pub(super) file_mode: Option<u32>,
    /// Of r, w and m; "none" for none, empty for all.
    pub(super) permissions: String,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// Moves an interface of the host. Of runtime-spec 1.3, which the runtimes of today's distributions do not know.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct NetDevice {
    host_interface_name: String,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct Mount {
    pub(super) host_path: String,
    pub(super) container_path: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) options: Vec<String>,
    #[serde(rename = "type")]
    pub(super) kind: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct Hook {
    /// A stage of the OCI runtime spec.
    pub(super) hook_name: String,
    pub(super) path: String,
    pub(super) args: Option<Vec<String>>,
    pub(super) env: Option<Vec<String>>,
    /// Seconds.
    pub(super) timeout: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct IntelRdt {
    #[serde(rename = "closID")]
    pub(super) clos_id: Option<String>,
    pub(super) l3_cache_schema: Option<String>,
    pub(super) mem_bw_schema: Option<String>,
    pub(super) schemata: Option<Vec<String>>,
    pub(super) enable_monitoring: Option<bool>,
    #[serde(rename = "enableCMT")]
    pub(super) enable_cmt: Option<bool>,
    #[serde(rename = "enableMBM")]
    pub(super) enable_mbm: Option<bool>,
}

impl Document {
    /// A valid document, or what is wrong with it.
    pub(super) fn parse(text: &str, json: bool) -> Result<Document, String> {
        let document: Document = match json {
            true => serde_json::from_str(text),
            false => serde_json::from_value(yaml::parse(text)?),
        }
        .map_err(|error| error.to_string())?;
        document.validate()?;
        Ok(document)
    }

    /// Valid, because the document is.
    pub(super) fn name_of(&self, device: &Device) -> Name {
        Name::new(&self.kind, &device.name).expect("names are checked when a document is read")
    }

    fn validate(&self) -> Result<(), String> {
        let version = self.version.trim_start_matches('v');
        let Some(declared) = VERSIONS.iter().position(|known| *known == version) else {
            return Err(format!("cdiVersion: {:?} is not known", self.version));
        };
        // Names first: the message is about them then.
        Name::new(&self.kind, "0").map_err(|why| format!("kind: {why}"))?;
        if self.devices.is_empty() {
            return Err("devices: there are none".to_owned());
        }
        let mut names = BTreeSet::new();
        for device in &self.devices {
            Name::new(&self.kind, &device.name).map_err(|why| format!("devices: {why}"))?;
            if !names.insert(&device.name) {
                return Err(format!("devices: {} is there twice", device.name));
            }
            if device.container_edits.is_empty() {
                return Err(format!("devices: {}: containerEdits are empty", device.name));
            }
            device.container_edits.validate().map_err(|why| format!("devices: {}: {why}", device.name))?;
        }
        self.container_edits.validate()?;
        for (needed, what) in self.needs() {
            if VERSIONS.iter().position(|known| *known == needed) > Some(declared) {
                return Err(format!("{what}: needs cdiVersion {needed}, not {version}"));
            }
        }
        let rdts = self.all_edits().filter_map(|edits| edits.intel_rdt.as_ref());
        if version == "1.1.0" && rdts.into_iter().any(|rdt| rdt.enable_cmt.is_some() || rdt.enable_mbm.is_some()) {
            return Err("intelRdt: enableCMT and enableMBM are not part of cdiVersion 1.1.0".to_owned());
        }
        Ok(())
    }

    fn all_edits(&self) -> impl Iterator<Item = &Edits> {
        std::iter::once(&self.container_edits).chain(self.devices.iter().map(|device| &device.container_edits))
    }

    /// Versions that parts of the document came with.
    fn needs(&self) -> Vec<(&'static str, &'static str)> {
        let mut needs = Vec::new();
        let mut need = |is: bool, version, what| needs.extend(is.then_some((version, what)));
        let class = self.kind.split_once('/').map_or("", |(_, class)| class);
        need(class.contains('.'), "0.6.0", "kind: a class with a dot");
        need(!self.annotations.is_empty(), "0.6.0", "annotations");
        for device in &self.devices {
            need(!device.annotations.is_empty(), "0.6.0", "devices.annotations");
            need(!device.name.starts_with(|first: char| first.is_ascii_alphabetic()), "0.5.0", "devices.name: a digit first");
        }
        for edits in self.all_edits() {
            need(edits.mounts.iter().any(|mount| !mount.kind.is_empty()), "0.4.0", "mounts.type");
            need(edits.device_nodes.iter().any(|node| !node.host_path.is_empty()), "0.5.0", "deviceNodes.hostPath");
            need(edits.intel_rdt.is_some(), "0.7.0", "intelRdt");
            need(!edits.additional_gids.is_empty(), "0.7.0", "additionalGids");
            need(!edits.net_devices.is_empty(), "1.1.0", "netDevices");
            let rdt = edits.intel_rdt.as_ref();
            need(rdt.is_some_and(|rdt| rdt.schemata.is_some()), "1.1.0", "intelRdt.schemata");
            need(rdt.is_some_and(|rdt| rdt.enable_monitoring.is_some()), "1.1.0", "intelRdt.enableMonitoring");
        }
        needs
    }
}

impl Edits {
    fn is_empty(&self) -> bool {
        let lists = [self.env.len(), self.device_nodes.len(), self.net_devices.len(), self.mounts.len(), self.hooks.len()];
        lists.iter().sum::<usize>() == 0 && self.intel_rdt.is_none() && self.additional_gids.is_empty()
    }

    fn validate(&self) -> Result<(), String> {
        // Not shown: it may be a secret.
        if self.env.iter().any(|text| text.split_once('=').is_none_or(|(name, _)| name.is_empty())) {
            return Err("env: one is not NAME=value".to_owned());
        }
        self.device_nodes.iter().try_for_each(Node::validate)?;
        self.mounts.iter().try_for_each(Mount::validate)?;
        self.hooks.iter().try_for_each(Hook::validate)?;
        if self.net_devices.iter().any(|device| device.host_interface_name.is_empty() || device.name.is_empty()) {
            return Err("netDevices: one without a name".to_owned());
        }
        match self.intel_rdt.as_ref().and_then(|rdt| rdt.clos_id.as_deref()) {
            Some(id) if id.len() >= 4096 || matches!(id, "." | "..") || id.contains(['/', '\n']) => {
                Err(format!("intelRdt.closID: {id:?} is not a name"))
            }
            _ => Ok(()),
        }
    }
}

impl Node {
    fn validate(&self) -> Result<(), String> {
        if !self.path.starts_with('/') || !(self.host_path.is_empty() || self.host_path.starts_with('/')) {
            return Err(format!("deviceNodes: {:?}: paths must be absolute", self.path));
        }
        if !["", "b", "c", "u", "p"].contains(&self.kind.as_str()) {
            return Err(format!("deviceNodes: {}: type {:?} is not b, c, u or p", self.path, self.kind));
        }
        if self.permissions != "none" && !self.permissions.bytes().all(|letter| b"rwm".contains(&letter)) {
            return Err(format!("deviceNodes: {}: permissions {:?} are not of r, w and m", self.path, self.permissions));
        }
        Ok(())
    }
}

impl Mount {
    fn validate(&self) -> Result<(), String> {
        if self.host_path.is_empty() || !self.container_path.starts_with('/') {
            return Err(format!("mounts: {:?}: hostPath is empty or containerPath is not absolute", self.container_path));
        }
        Ok(())
    }
}

impl Hook {
    fn validate(&self) -> Result<(), String> {
        if !crate::hooks::STAGES.contains(&self.hook_name.as_str()) {
            return Err(format!("hooks: {:?} is not a stage", self.hook_name));
        }
        if !self.path.starts_with('/') {
            return Err(format!("hooks: {:?}: path is not absolute", self.path));
        }
        let env = self.env.iter().flatten();
        match env.into_iter().any(|text| text.split_once('=').is_none_or(|(name, _)| name.is_empty())) {
            true => Err(format!("hooks: {}: env is not of NAME=value", self.path)),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(version: &str, device: &str, rest: &str) -> Result<Document, String> {
        let text = format!(r#"{{"cdiVersion": "{version}", "kind": "v.com/c", "devices": [{{"name": "d", {device}}}]{rest}}}"#);
        Document::parse(&text, true)
    }

    const EDITS: &str = r#""containerEdits": {"env": ["A=b"]}"#;

    #[test]
    fn json_and_yaml_say_the_same() {
        let document = parse("0.6.0", r#""containerEdits": {"deviceNodes": [{"path": "/dev/x", "fileMode": 432, "uid": 5}]}"#, "").unwrap();
        assert_eq!(document.name_of(&document.devices[0]).to_string(), "v.com/c=d");
        let text = "cdiVersion: 0.6.0\nkind: v.com/c\ndevices:\n- name: d\n  containerEdits:\n    deviceNodes:\n    - {path: /dev/x, fileMode: 432, uid: 5}\n";
        let yaml = Document::parse(text, false).unwrap();
        assert_eq!(format!("{document:?}"), format!("{yaml:?}"));
    }

    /// As people and generators write them.
    #[test]
    fn numbers_for_names_octal_modes_and_keys_without_a_value() {
        let text = "cdiVersion: 0.6.0\nkind: v.com/c\nannotations:\ncontainerEdits: ~\ndevices:\n- name: 0\n  containerEdits:\n    \
            env:\n    mounts: ~\n    hooks:\n    additionalGids:\n    deviceNodes:\n    - {path: /dev/x, fileMode: 0640}\n";
        let document = Document::parse(text, false).unwrap();
        assert_eq!(document.name_of(&document.devices[0]).to_string(), "v.com/c=0");
        assert_eq!(document.devices[0].container_edits.device_nodes[0].file_mode, Some(0o640));
        let why = Document::parse(&text.replace("name: 0", "name: [0]"), false).unwrap_err();
        assert!(why.contains("expected text"), "{why}");
    }

    #[test]
    fn versions_are_held_to() {
        parse("0.3.0", EDITS, "").unwrap();
        for (version, device, rest, word) in [
            ("0.9.0", EDITS, "", "cdiVersion"),
            ("", EDITS, "", "cdiVersion"),
            ("0.5.0", EDITS, r#", "annotations": {"a": "b"}"#, "0.6.0"),
            ("0.3.0", r#""containerEdits": {"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}]}"#, "", "mounts.type"),
            ("0.4.0", r#""containerEdits": {"deviceNodes": [{"path": "/a", "hostPath": "/b"}]}"#, "", "hostPath"),
            ("0.6.0", r#""containerEdits": {"additionalGids": [5]}"#, "", "additionalGids"),
            ("1.0.0", r#""containerEdits": {"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}"#, "", "netDevices"),
            ("1.0.0", r#""containerEdits": {"intelRdt": {"schemata": ["L3:0=f"]}}"#, "", "schemata"),
            ("1.1.0", r#""containerEdits": {"intelRdt": {"enableCMT": true}}"#, "", "enableCMT"),
        ] {
            let why = parse(version, device, rest).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
        parse("v1.1.0", r#""containerEdits": {"intelRdt": {"schemata": ["L3:0=f"]}}"#, "").unwrap();
    }

    #[test]
    fn wrong_files_say_what_is_wrong() {
        let edits = |inner: &str| format!(r#""containerEdits": {{{inner}}}"#);
        for (device, word) in [
            (edits(""), "empty"),
            (edits(r#""env": ["SECRET"]"#), "env"),
            (edits(r#""deviceNodes": [{"path": "dev"}]"#), "absolute"),
            (edits(r#""deviceNodes": [{"path": "/d", "type": "x"}]"#), "type"),
            (edits(r#""deviceNodes": [{"path": "/d", "permissions": "rx"}]"#), "permissions"),
            (edits(r#""mounts": [{"containerPath": "/d"}]"#), "hostPath"),
            (edits(r#""hooks": [{"hookName": "later", "path": "/h"}]"#), "stage"),
            (edits(r#""hooks": [{"hookName": "prestart", "path": "h"}]"#), "absolute"),
            (edits(r#""intelRdt": {"closID": "a/b"}"#), "closID"),
            (edits(r#""surprise": 1"#), "surprise"),
            (r#""name": "e""#.to_owned(), "duplicate field"),
        ] {
            let why = parse("1.0.0", &device, "").unwrap_err();
            assert!(why.contains(word), "{word}: {why}");
        }
        for text in [
            r#"{"cdiVersion": "1.0.0", "kind": "v.com/c", "devices": []}"#.to_owned(),
            format!(r#"{{"cdiVersion": "1.0.0", "kind": "c", "devices": [{{"name": "d", {EDITS}}}]}}"#),
            format!(r#"{{"cdiVersion": "1.0.0", "kind": "v.com/c", "devices": [{{"name": "d", {EDITS}}}, {{"name": "d", {EDITS}}}]}}"#),
            "[]".to_owned(),
            "".to_owned(),
        ] {
            assert!(Document::parse(&text, true).is_err(), "{text}");
        }
    }
}
