//! SELinux: labels of processes and files, computed. Reading the policy's files and writing labels is done elsewhere
//! (`container::labels`, `sys::label`).

use std::fmt;

use crate::api::runtime::SELinuxOption;
use crate::error::{Error, Result};

/// A label: `user:role:type:level`; the level is missing in policies without MLS and MCS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    pub user: String,
    pub role: String,
    pub kind: String,
    pub level: String,
}

impl Label {
    /// None for what is not a label.
    pub fn parse(text: &str) -> Option<Label> {
        let mut parts = text.splitn(4, ':');
        let mut part = || parts.next().filter(|part| is_word(part)).map(str::to_owned);
        let (user, role, kind) = (part()?, part()?, part()?);
        let level = parts.next();
        level.is_none_or(is_level).then(|| Label { user, role, kind, level: level.unwrap_or_default().to_owned() })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        match self.level.as_str() {
            "" => Ok(()),
            level => write!(f, ":{level}"),
        }
    }
}

/// What the host's policy has for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub process: Label,
    pub file: Label,
    /// What every container may read and execute, and none may write: layers.
    pub readonly_file: Label,
}

impl Default for Policy {
    /// The types of container-selinux, which every policy for containers defines.
    fn default() -> Policy {
        let label = |role: &str, kind: &str| Label { user: "system_u".into(), role: role.into(), kind: kind.into(), level: "s0".into() };
        Policy {
            process: label("system_r", "container_t"),
            file: label("object_r", "container_file_t"),
            readonly_file: label("object_r", "container_ro_file_t"),
        }
    }
}

impl Policy {
    /// Reads the policy's file lxc_contexts: `process = "system_u:system_r:container_t:s0"`. What is not there is the default.
    pub fn parse(text: &str) -> Policy {
        let mut policy = Policy::default();
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let Some(label) = Label::parse(value.trim().trim_matches('"')) else { continue };
            match key.trim() {
                "process" => policy.process = label,
                "file" => policy.file = label,
                "ro_file" => policy.readonly_file = label,
                _ => {}
            }
        }
        policy
    }
}

/// The labels of one container, or of a sandbox's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// None: what the policy gives to what the OCI runtime executes.
    pub process: Option<String>,
    pub mount: String,
}

/// The labels of a container: the policy's, with the sandbox's level, and what its options say over them. Without options of its own
/// those of the sandbox count. A privileged container has no process label of ours.
pub fn labels(policy: &Policy, options: &SELinuxOption, sandbox_level: &str, privileged: bool) -> Labels {
    let (mut process, mut file) = (policy.process.clone(), policy.file.clone());
    let given = |slot: &mut String, value: &str| {
        if !value.is_empty() {
            value.clone_into(slot);
        }
    };
    given(&mut process.role, &options.role);
    given(&mut process.kind, &options.type_);
    for label in [&mut process, &mut file] {
        given(&mut label.user, &options.user);
        given(&mut label.level, sandbox_level);
        given(&mut label.level, &options.level);
    }
    Labels { process: (!privileged).then(|| process.to_string()), mount: file.to_string() }
}

/// Checks the parts of a label, on hosts without SELinux too. INVALID_ARGUMENT names the part.
pub fn check(options: &SELinuxOption) -> Result<()> {
    if !options.level.is_empty() && !is_level(&options.level) {
        return Err(Error::invalid(format!("selinux_options: {:?} is not a level", options.level)));
    }
    for (name, part) in [("user", &options.user), ("role", &options.role), ("type", &options.type_)] {
        if !part.is_empty() && !is_word(part) {
            return Err(Error::invalid(format!("selinux_options: {part:?} is not a {name}")));
        }
    }
    Ok(())
}

fn is_word(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// An MLS/MCS level: `s0`, `s0-s15`, `s0:c1,c2`, `s0-s0:c0.c1023`.
pub fn is_level(level: &str) -> bool {
    let numbered = |text: &str, letter: char| {
        text.strip_prefix(letter).is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
    };
    let range = |text: &str, letter: char| match text.split_once('.') {
        Some((low, high)) => numbered(low, letter) && numbered(high, letter),
        None => numbered(text, letter),
    };
    let one = |text: &str| match text.split_once(':') {
        Some((sensitivity, categories)) => numbered(sensitivity, 's') && categories.split(',').all(|part| range(part, 'c')),
        None => numbered(text, 's'),
    };
    match level.split_once('-') {
        Some((low, high)) => one(low) && one(high),
        None => one(level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    /// In the form in which container-selinux ships it.
    const LXC_CONTEXTS: &str = "process = \"system_u:system_r:container_t:s0\"\ncontent = \"system_u:object_r:virt_var_lib_t:s0\"\n\
        file = \"system_u:object_r:container_file_t:s0\"\nro_file=\"system_u:object_r:container_ro_file_t:s0\"\n\
        sandbox_kvm_process = \"system_u:system_r:svirt_qemu_net_t:s0\"\n";

    #[test]
    fn levels() {
        for good in ["s0", "s0-s15", "s0:c0", "s0:c0.c1023", "s0-s0:c1,c2.c5", "s0:c1-s15:c0.c1023"] {
            assert!(is_level(good), "{good}");
        }
        for bad in ["", "s", "0", "s0:", "s0:c", "s0:c1,", "s0:c1.c2.c3", "s0-", "S0", "s0 ", "s0:1", "s0:c1:c2"] {
            assert!(!is_level(bad), "{bad}");
        }
    }

    #[test]
    fn labels_are_taken_apart_and_put_together() {
        for text in ["system_u:system_r:container_t:s0:c1,c2", "u:r:t", "u:object_r:a.b-c_t:s0-s0:c0.c1023"] {
            assert_eq!(Label::parse(text).unwrap().to_string(), text);
        }
        for bad in ["a:b:c:", "", "u:r", "u:r:", "u::t:s0", "u:r:t:x", "u:r:t u:s0", "u:r:t\n:s0"] {
            assert_eq!(Label::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn policy_file() {
        assert_eq!(Policy::parse(LXC_CONTEXTS), Policy::default());
        let other = Policy::parse("process=\"a_u:a_r:a_t:s0\"\nfile = nonsense\n# file = \"x:y:z\"\nro_file = \"a_u:o_r:b_t:s0\"\n");
        assert_eq!(other.readonly_file.to_string(), "a_u:o_r:b_t:s0");
        assert_eq!((other.process.to_string().as_str(), other.file), ("a_u:a_r:a_t:s0", Policy::default().file));
    }

    #[test]
    fn options_go_over_the_sandboxs_level_and_that_over_the_policys() {
        let of = |options: &SELinuxOption, level: &str, privileged: bool| {
            let labels = labels(&Policy::default(), options, level, privileged);
            (labels.process.unwrap_or_default(), labels.mount)
        };
        let nothing = SELinuxOption::default();
        let expected = ("system_u:system_r:container_t:s0:c1,c2".to_owned(), "system_u:object_r:container_file_t:s0:c1,c2".to_owned());
        assert_eq!(of(&nothing, "s0:c1,c2", false), expected);
        assert_eq!(of(&nothing, "s0:c1,c2", true), (String::new(), expected.1));
        let all =
            SELinuxOption { user: "u_u".into(), role: "r_r".into(), type_: "t_t".into(), level: "s0:c9".into(), ..Default::default() };
        assert_eq!(of(&all, "s0:c1,c2", false), ("u_u:r_r:t_t:s0:c9".to_owned(), "u_u:object_r:container_file_t:s0:c9".to_owned()));
        assert_eq!(of(&nothing, "", false).0, "system_u:system_r:container_t:s0");
    }

    #[test]
    fn parts_are_checked() {
        check(&SELinuxOption { user: "system_u".into(), level: "s0:c1,c2".into(), ..Default::default() }).unwrap();
        for (bad, word) in [
            (SELinuxOption { level: "s0:1".into(), ..Default::default() }, "level"),
            (SELinuxOption { user: "a:b".into(), ..Default::default() }, "user"),
            (SELinuxOption { role: "a b".into(), ..Default::default() }, "role"),
            (SELinuxOption { type_: "t\n".into(), ..Default::default() }, "type"),
        ] {
            let error = check(&bad).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().ends_with(word), "{error}");
        }
    }
}
