//! Directories of hook files.

use serde_json::{json, Value};

use super::*;
use crate::error::Code;

struct Host {
    dir: tempfile::TempDir,
    hooks: Directories,
}

impl Host {
    fn new() -> Host {
        let (dir, dirs) = file::priorities();
        Host { dir, hooks: Directories::new(dirs) }
    }

    fn write(&self, name: &str, argument: &str, stages: &[&str]) {
        let file = json!({"version": "1.0.0", "hook": {"path": "/bin/true", "args": ["true", argument]}, "when": {"always": true}, "stages": stages});
        std::fs::write(self.dir.path().join(name), file.to_string()).unwrap();
    }

    fn inject(&self) -> Result<Value> {
        let mut spec = Spec::default();
        self.hooks.inject(&Subject { annotations: &BTreeMap::new(), has_bind_mounts: false }, &mut spec)?;
        Ok(serde_json::to_value(spec).unwrap()["hooks"].clone())
    }

    fn arguments(&self, stage: &str) -> Vec<String> {
        let list = self.inject().unwrap()[stage].as_array().cloned().unwrap_or_default();
        list.iter().map(|hook| hook["args"][1].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn files_are_taken_in_order_and_later_directories_replace_by_name() {
    let host = Host::new();
    assert_eq!(host.inject().unwrap(), Value::Null);
    host.write("low/B.json", "b", &["prestart"]);
    host.write("low/a.json", "a", &["prestart", "poststop", "prestart"]);
    host.write("low/c.txt", "c", &["prestart"]);
    assert_eq!(host.arguments("prestart"), ["a", "b"]);
    assert_eq!(host.arguments("poststop"), ["a"]);
    host.write("high/a.json", "replaced", &["createContainer"]);
    assert_eq!(host.arguments("prestart"), ["b"]);
    assert_eq!(host.arguments("createContainer"), ["replaced"]);
}

#[test]
fn every_stage_has_its_list() {
    let host = Host::new();
    host.write("low/a.json", "a", &STAGES);
    let hooks = host.inject().unwrap();
    let mut found: Vec<_> = hooks.as_object().unwrap().keys().cloned().collect();
    found.sort();
    let mut stages = STAGES;
    stages.sort();
    assert_eq!(found, stages);
}

#[test]
fn a_file_that_is_not_valid_is_named() {
    let host = Host::new();
    host.write("low/a.json", "a", &["prestart"]);
    std::fs::write(host.dir.path().join("high/bad.json"), "{").unwrap();
    let error = host.inject().unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("high/bad.json"), "{error}");
    host.write("high/bad.json", "good now", &["prestart"]);
    assert_eq!(host.arguments("prestart"), ["a", "good now"]);
}
