//! From our nouns to CRI's messages, where more than one call needs it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::api::runtime::{NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace};
use crate::error::{Code, Error};
use protobuf::MessageField;

/// Whether `labels` has everything that `selector` wants.
pub(super) fn matches(labels: &BTreeMap<String, String>, selector: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The namespaces of a sandbox as given, with the user namespace's mode always said.
pub(super) fn namespace_option(config: &PodSandboxConfig) -> NamespaceOption {
    let mut options = config.linux.security_context.namespace_options.as_ref().cloned().unwrap_or_default();
    if options.userns_options.is_none() {
        options.userns_options = MessageField::some(UserNamespace { mode: NamespaceMode::NODE.into(), ..Default::default() });
    }
    options
}

/// A timeout as CRI gives it. One that is negative is 0; one beyond all clocks is 136 years.
pub(super) fn seconds(given: i64) -> Duration {
    Duration::from_secs(given.clamp(0, u32::MAX.into()) as u64)
}

/// kubelet knows some errors only by the word their message starts with (contract.md): it goes to the front.
pub(super) fn lead(error: Error) -> Error {
    const WORDS: &[&str] = &["RegistryUnavailable", "SignatureValidationFailed", "RROUnsupported", "ImageVolumeMountFailed"];
    // An image or a mount may be called so too.
    if error.code() != Code::Unknown {
        return error;
    }
    for word in WORDS {
        if let Some(at) = error.message().find(word).filter(|at| *at > 0) {
            let (before, after) = error.message().split_at(at);
            let rest = after[word.len()..].trim_start_matches(':').trim_start();
            return Error::new(error.code(), format!("{word}: {before}{rest}"));
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_anded() {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let labels = map(&[("a", "1"), ("b", "2")]);
        assert!(matches(&labels, &map(&[])));
        assert!(matches(&labels, &map(&[("a", "1"), ("b", "2")])));
        assert!(!matches(&labels, &map(&[("a", "1"), ("b", "3")])));
        assert!(!matches(&labels, &map(&[("c", "")])));
    }

    #[test]
    fn known_words_come_first() {
        let e = lead(Error::new(Code::Unknown, "pull a: RegistryUnavailable: connect to b: refused"));
        assert_eq!(e.message(), "RegistryUnavailable: pull a: connect to b: refused");
        assert_eq!(lead(Error::internal("x")).message(), "x");
    }
}
