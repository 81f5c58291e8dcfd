//! A hook file of version 1.0.0, or of 0.1.0, which those without a version are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::Hook;
use regex::Regex;
use serde::Deserialize;

use super::{Subject, STAGES};

/// What is read. Keys that are not known are left alone, as the other programs that read these files do; but not in `when`: a condition
/// that is not understood would let the hook run where it must not.
#[derive(Deserialize)]
struct Raw {
    hook: RawHook,
    when: RawWhen,
    stages: Vec<String>,
}

#[derive(Deserialize)]
struct RawHook {
    path: PathBuf,
    args: Option<Vec<String>>,
    env: Option<Vec<String>>,
    timeout: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawWhen {
    always: Option<bool>,
    /// Patterns for names and for values.
    #[serde(default, deserialize_with = "pairs")]
    annotations: Vec<(String, String)>,
    commands: Option<Vec<String>>,
    has_bind_mounts: Option<bool>,
}

/// The form of version 0.1.0, in which any of the conditions is enough. Some names were spelt in two ways.
#[derive(Deserialize)]
struct Old {
    hook: PathBuf,
    arguments: Option<Vec<String>>,
    #[serde(alias = "stage")]
    stages: Vec<String>,
    #[serde(alias = "cmd", default)]
    cmds: Vec<String>,
    /// Patterns for values.
    #[serde(alias = "annotation", default)]
    annotations: Vec<String>,
    hasbindmounts: Option<bool>,
}

/// A valid file.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) stages: Vec<String>,
    hook: Hook,
    always: Option<bool>,
    /// Of key and value.
    annotations: Vec<(Regex, Regex)>,
    commands: Vec<Regex>,
    has_bind_mounts: Option<bool>,
    /// One condition that is true is enough.
    any: bool,
}

impl Document {
    /// A valid file, or what is wrong with it.
    pub(super) fn parse(text: &[u8]) -> Result<Document, String> {
        // Before the rest, so that files of another version are told as such.
        let value: serde_json::Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let any = match value.get("version").map(|version| version.as_str()) {
            Some(Some("1.0.0")) => false,
            None | Some(Some("0.1.0" | "")) => true,
            Some(_) => return Err(format!("version: {} is neither 1.0.0 nor 0.1.0", value["version"])),
        };
        let raw: Raw = match any {
            false => serde_json::from_slice(text).map_err(|error| error.to_string()),
            true => serde_json::from_slice(text).map(Old::renewed).map_err(|error| format!("in the form of version 0.1.0: {error}")),
        }?;
        if !raw.hook.path.is_absolute() {
            return Err(format!("hook.path: {} is not absolute", raw.hook.path.display()));
        }
        if !raw.hook.path.exists() {
            return Err(format!("hook.path: {} is not there", raw.hook.path.display()));
        }
        if raw.hook.timeout.is_some_and(|seconds| seconds <= 0) {
            return Err("hook.timeout: not above zero".to_owned());
        }
        if raw.stages.is_empty() {
            return Err("stages: there are none".to_owned());
        }
        if let Some(stage) = raw.stages.iter().find(|stage| !STAGES.contains(&stage.as_str())) {
            return Err(format!("stages: {stage:?} is not known"));
        }
        let RawWhen { always, annotations, commands, has_bind_mounts } = raw.when;
        let pattern = |field: &str, text: &str| Regex::new(text).map_err(|error| format!("when.{field}: {text:?}: {error}"));
        let pair = |(key, value): (String, String)| Ok((pattern("annotations", &key)?, pattern("annotations", &value)?));
        let annotations = annotations.into_iter().map(pair).collect::<Result<Vec<_>, String>>()?;
        let commands = commands.unwrap_or_default().iter().map(|text| pattern("commands", text)).collect::<Result<Vec<_>, _>>()?;
        if always.is_none() && has_bind_mounts.is_none() && annotations.is_empty() && commands.is_empty() {
            return Err("when: there is no condition".to_owned());
        }
        let mut hook = Hook::default();
        hook.set_path(raw.hook.path).set_args(raw.hook.args).set_env(raw.hook.env).set_timeout(raw.hook.timeout);
        let mut stages = raw.stages;
        stages.sort();
        stages.dedup();
        Ok(Document { stages, hook, always, annotations, commands, has_bind_mounts, any })
    }

    pub(super) fn hook(&self) -> Hook {
        self.hook.clone()
    }

    /// All conditions that are set must be true, or one (`any`); of `commands` one pattern. false of `always` or `hasBindMounts` is
    /// never true.
    pub(super) fn matches(&self, subject: &Subject, command: &str) -> bool {
        let annotation = |(key, value): &(Regex, Regex)| subject.annotations.iter().any(|(k, v)| key.is_match(k) && value.is_match(v));
        let commands = || self.commands.iter().any(|pattern| pattern.is_match(command));
        let mut conditions = Vec::from_iter(self.always);
        conditions.extend(self.has_bind_mounts.map(|wanted| wanted && subject.has_bind_mounts));
        conditions.extend(self.annotations.iter().map(annotation));
        conditions.extend((!self.commands.is_empty()).then(commands));
        match self.any {
            true => conditions.contains(&true),
            false => !conditions.contains(&false),
        }
    }
}

impl Old {
    fn renewed(self) -> Raw {
        let args = self.arguments.map(|list| [vec![self.hook.display().to_string()], list].concat());
        Raw {
            hook: RawHook { path: self.hook, args, env: None, timeout: None },
            when: RawWhen {
                always: None,
                annotations: self.annotations.into_iter().map(|value| (String::new(), value)).collect(),
                commands: Some(self.cmds),
                has_bind_mounts: self.hasbindmounts,
            },
            stages: self.stages,
        }
    }
}

fn pairs<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<(String, String)>, D::Error> {
    Ok(Option::<BTreeMap<_, _>>::deserialize(from)?.unwrap_or_default().into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(when: &str) -> Document {
        let text = format!(r#"{{"version": "1.0.0", "hook": {{"path": "/bin/true"}}, "when": {when}, "stages": ["prestart"]}}"#);
        Document::parse(text.as_bytes()).unwrap()
    }

    fn matches(when: &str, annotation: (&str, &str), has_bind_mounts: bool, command: &str) -> bool {
        let annotations = BTreeMap::from([(annotation.0.to_owned(), annotation.1.to_owned())]);
        parse(when).matches(&Subject { annotations: &annotations, has_bind_mounts }, command)
    }

    #[test]
    fn conditions() {
        let a = ("example.com/a", "yes");
        assert!(matches(r#"{"always": true}"#, a, false, "/bin/sh"));
        assert!(!matches(r#"{"always": false}"#, a, true, "/bin/sh"));
        assert!(matches(r#"{"hasBindMounts": true}"#, a, true, "/bin/sh"));
        assert!(!matches(r#"{"hasBindMounts": true}"#, a, false, "/bin/sh"));
        assert!(!matches(r#"{"hasBindMounts": false}"#, a, false, "/bin/sh"));
        assert!(matches(r#"{"annotations": {"^example\\.com/.*$": "^y"}}"#, a, false, "/bin/sh"));
        assert!(!matches(r#"{"annotations": {"^example\\.com/.*$": "^n"}}"#, a, false, "/bin/sh"));
        assert!(!matches(r#"{"annotations": {"a": "yes", "other": ".*"}}"#, a, false, "/bin/sh"));
        assert!(matches(r#"{"commands": ["^/usr/", "^/bin/sh$"]}"#, a, false, "/bin/sh"));
        assert!(!matches(r#"{"commands": ["^/usr/"]}"#, a, false, "/bin/sh"));
        assert!(!matches(r#"{"always": true, "commands": ["^/usr/"]}"#, a, false, "/bin/sh"), "all must be true");
        assert!(matches(r#"{"hasBindMounts": true, "annotations": {"a$": ""}, "commands": ["sh"]}"#, a, true, "/bin/sh"));
    }

    #[test]
    fn files_of_the_old_version_match_by_any_condition() {
        let parse = |text: &str| Document::parse(text.as_bytes());
        let old = r#"{"hook": "/bin/true", "arguments": ["x"], "stages": ["prestart"], "cmd": ["sh$"], "annotations": ["^yes$", "^on$"], "hasbindmounts": true}"#;
        let document = parse(old).unwrap();
        assert_eq!(document.hook().args().as_deref(), Some(&["/bin/true".to_owned(), "x".to_owned()][..]));
        let matches = |value: &str, has_bind_mounts: bool, command: &str| {
            let annotations = BTreeMap::from([("a".to_owned(), value.to_owned())]);
            document.matches(&Subject { annotations: &annotations, has_bind_mounts }, command)
        };
        assert!(
            matches("yes", false, "true") && matches("on", false, "true") && matches("no", true, "true") && matches("no", false, "/bin/sh")
        );
        assert!(!matches("no", false, "true"));
        let plain = parse(r#"{"version": "0.1.0", "hook": "/bin/true", "stage": ["poststop"], "hasbindmounts": true}"#).unwrap();
        assert_eq!((plain.hook().args(), plain.stages), (&None, vec!["poststop".to_owned()]));
        for (text, word) in [
            (r#"{"hook": "/bin/true", "stages": ["prestart"]}"#, "no condition"),
            (r#"{"hook": "/bin/true", "cmds": ["a"]}"#, "stages"),
            (r#"{"hook": "/bin/true", "stages": ["prestart"], "cmds": ["a"], "cmd": ["b"]}"#, "cmds"),
            (r#"{"version": 1, "hook": "/bin/true", "stages": ["prestart"], "cmds": ["a"]}"#, "version: 1"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(word), "{word}: {why}");
        }
    }

    #[test]
    fn wrong_files_say_what_is_wrong() {
        let hook = r#""hook": {"path": "/bin/true"}"#;
        let when = r#""when": {"always": true}"#;
        let stages = r#""stages": ["prestart"]"#;
        for (text, word) in [
            (format!("{{{hook}, {when}, {stages}}}"), "version 0.1.0"),
            (format!(r#"{{"version": "2.0.0", {hook}, {when}, {stages}}}"#), "2.0.0"),
            (format!(r#"{{"version": "1.0.0", {when}, {stages}}}"#), "hook"),
            (format!(r#"{{"version": "1.0.0", {hook}, {stages}}}"#), "when"),
            (format!(r#"{{"version": "1.0.0", {hook}, {when}}}"#), "stages"),
            (format!(r#"{{"version": "1.0.0", {hook}, {when}, "stages": []}}"#), "stages"),
            (format!(r#"{{"version": "1.0.0", {hook}, {when}, "stages": ["precreate"]}}"#), "precreate"),
            (format!(r#"{{"version": "1.0.0", {hook}, "when": {{}}, {stages}}}"#), "no condition"),
            (format!(r#"{{"version": "1.0.0", {hook}, "when": {{"cmds": ["a"]}}, {stages}}}"#), "cmds"),
            (format!(r#"{{"version": "1.0.0", {hook}, "when": {{"commands": ["("]}}, {stages}}}"#), "when.commands"),
            (format!(r#"{{"version": "1.0.0", "hook": {{"path": "true"}}, {when}, {stages}}}"#), "absolute"),
            (format!(r#"{{"version": "1.0.0", "hook": {{"path": "/no/such"}}, {when}, {stages}}}"#), "/no/such"),
            (format!(r#"{{"version": "1.0.0", "hook": {{"path": "/bin/true", "timeout": 0}}, {when}, {stages}}}"#), "timeout"),
            ("{".to_owned(), "EOF"),
        ] {
            let why = Document::parse(text.as_bytes()).unwrap_err();
            assert!(why.contains(word), "{word}: {why}");
        }
    }
}
