//! Which images garbage collection must leave alone: references, ids, and patterns of full names.

use std::collections::HashSet;

use super::digest::Digest;
use super::reference::Reference;
use crate::error::{Context, Error, Result};

/// What is pinned.
#[derive(Debug, Default)]
pub struct Pins {
    /// Full names and ids.
    exact: HashSet<String>,
    /// With `*` for any characters, slashes too, and `?` for one.
    patterns: Vec<String>,
}

impl Pins {
    /// Takes each as a pattern if it has `*` or `?` in it, else as an id (`sha256:…`) or a reference, which is completed as
    /// for a pull.
    pub fn new(texts: &[String]) -> Result<Pins> {
        let mut pins = Pins::default();
        for text in texts {
            if text.trim() != text || text.is_empty() {
                return Err(Error::invalid(format!("pinned image {text:?}: expected a reference or a pattern")));
            }
            if text.contains(['*', '?']) {
                pins.patterns.push(text.clone());
            } else if Digest::parse(text).is_ok() {
                pins.exact.insert(text.clone());
            } else {
                pins.exact.insert(Reference::parse(text).context(|| "pinned images")?.to_string());
            }
        }
        Ok(pins)
    }

    /// Whether one of an image's names, or its id, is pinned.
    pub fn hold<'a>(&self, id: &str, mut names: impl Iterator<Item = &'a String>) -> bool {
        self.exact.contains(id)
            || names.any(|name| self.exact.contains(name) || self.patterns.iter().any(|p| matches(p.as_bytes(), name.as_bytes())))
    }
}

/// Whether `text` is what `pattern` says. Goes back to the last star only, so the time is the product of the lengths at most.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where the last star was, and how much of the text it has taken.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(b'?') => (p, t) = (p + 1, t + 1),
            Some(byte) if *byte == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, t) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_ids_and_patterns() {
        let id = format!("sha256:{}", "0".repeat(64));
        let texts = ["x", "q.io/a/b:1", "registry.k8s.io/pause:*", "*/platform/*@*", &id].map(str::to_owned);
        let pins = Pins::new(&texts).unwrap();
        let holds = |name: &str| pins.hold("sha256:1", [name.to_owned()].iter());
        for name in [
            "docker.io/library/x:latest",
            "q.io/a/b:1",
            "registry.k8s.io/pause:3.9",
            "registry.k8s.io/pause:",
            "q.io/platform/a/b@sha256:0",
        ] {
            assert!(holds(name), "{name}");
        }
        for name in ["docker.io/library/x:1", "q.io/a/b:12", "registry.k8s.io/pause2:3", "q.io/platform/a:1", "platform/a@b", ""] {
            assert!(!holds(name), "{name}");
        }
        assert!(pins.hold(&id, [].iter()));
        assert!(!Pins::default().hold(&id, [String::new()].iter()));
        for bad in ["", " a", "A B"] {
            assert!(Pins::new(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn stars() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("**", "abc", true),
            ("a*c", "abbc", true),
            ("a*c", "abcd", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*a*a", "aaaa", true),
            ("*b", "aaaa", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
        // As many stars as one likes take no time.
        assert!(!matches("*a".repeat(200).as_bytes(), "b".repeat(20_000).as_bytes()));
    }

    proptest::proptest! {
        #[test]
        fn a_text_with_holes_matches_itself(text in "[a-c/:]{0,20}", holes in proptest::collection::vec(0usize..20, 0..5)) {
            let mut pattern = text.clone().into_bytes();
            for hole in holes {
                if let Some(byte) = pattern.get_mut(hole) {
                    *byte = if hole % 2 == 0 { b'*' } else { b'?' };
                }
            }
            proptest::prop_assert!(matches(&pattern, text.as_bytes()));
        }
    }
}
