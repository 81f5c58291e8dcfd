//! Image references as people write them: `[domain/]path[:tag][@digest]`, normalised the way Docker does.

use std::fmt;

use super::digest::{is_hex, Digest};
use crate::error::{Error, Result};

const DEFAULT_DOMAIN: &str = "docker.io";
/// Longest name without tag and digest.
const NAME_LIMIT: usize = 255;
/// Longest text that can be a reference at all: a name, a tag, the longest digest of the image-spec, and Docker's own prefix.
const TEXT_LIMIT: usize = 640;

/// A normalised reference. With a digest the tag is dropped: the digest alone says what is meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    version: Version,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    Tag(String),
    Digest(Digest),
}

impl Reference {
    /// Parses and normalises; INVALID_ARGUMENT says which part is wrong.
    pub fn parse(text: &str) -> Result<Reference> {
        if text.len() > TEXT_LIMIT {
            let start: String = text.chars().take(64).collect();
            return Err(Error::invalid(format!("image reference {start:?}…: longer than {TEXT_LIMIT} characters")));
        }
        let wrong = |why: &str| Error::invalid(format!("image reference {text:?}: {why}"));
        if text.is_empty() {
            return Err(wrong("empty"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(|e| wrong(e.message()))?)),
            None => (text, None),
        };
        // A colon after the last slash starts the tag; one before it is a port.
        let slash = rest.rfind('/').map_or(0, |i| i + 1);
        let (name, tag) = match rest[slash..].find(':') {
            // `localhost:5000` alone is a name and a tag, as for Docker.
            Some(i) if !rest.starts_with('[') || slash > 0 => (&rest[..slash + i], Some(&rest[slash + i + 1..])),
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            if !is_tag(tag) {
                return Err(wrong("the tag must be 1 to 128 letters, digits, '_', '.', '-', and not start with '.' or '-'"));
            }
        }
        let (domain, path) = split_domain(name);
        if domain.is_none() && is_hex(path, 64) {
            return Err(wrong("64 hexadecimal digits are an image id, not a name"));
        }
        let domain = match domain {
            None | Some("index.docker.io") => DEFAULT_DOMAIN,
            Some(domain) => domain,
        };
        if !is_domain(domain) {
            return Err(wrong("the registry must be a host name, an IPv4 address or an IPv6 address in brackets, with an optional port"));
        }
        let path = match path {
            path if domain == DEFAULT_DOMAIN && !path.contains('/') && !path.is_empty() => format!("library/{path}"),
            path => path.to_owned(),
        };
        if !path.split('/').all(is_path_component) {
            return Err(wrong("the repository must be lower-case letters and digits, separated by '.', '_', '__', '-' or '/'"));
        }
        if domain.len() + 1 + path.len() > NAME_LIMIT {
            return Err(wrong("longer than 255 characters"));
        }
        let version = match (digest, tag) {
            (Some(digest), _) => Version::Digest(digest),
            (None, tag) => Version::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Reference { domain: domain.to_owned(), path, version })
    }

    /// The registry's host, with its port when one is given.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository inside the registry.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn version(&self) -> &Version {
        &self.version
    }

    /// `domain/path`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The same repository at a digest.
    pub fn with_digest(&self, digest: &Digest) -> Reference {
        Reference { version: Version::Digest(digest.clone()), ..self.clone() }
    }

    /// The tag or digest as the registry API takes it.
    pub fn version_text(&self) -> &str {
        match &self.version {
            Version::Tag(tag) => tag,
            Version::Digest(digest) => digest.as_str(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Tag(tag) => write!(f, "{}/{}:{}", self.domain, self.path, tag),
            Version::Digest(digest) => write!(f, "{}/{}@{}", self.domain, self.path, digest),
        }
    }
}

/// The part before the first slash is a host if it looks like one; else the name has no host.
fn split_domain(name: &str) -> (Option<&str>, &str) {
    match name.split_once('/') {
        Some((first, rest)) if first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|b| b.is_ascii_uppercase()) => {
            (Some(first), rest)
        }
        _ => (None, name),
    }
}

fn is_domain(text: &str) -> bool {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match after {
            "" => return true,
            after => match after.strip_prefix(':') {
                Some(port) => return is_port(port),
                None => return false,
            },
        }
    } else {
        text.split_once(':').map_or((text, None), |(h, p)| (h, Some(p)))
    };
    let label =
        |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') && !l.starts_with('-') && !l.ends_with('-');
    host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

/// Runs of letters and digits, between them `.`, `_`, `__` or any number of `-`.
fn is_path_component(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut separator = String::new();
    let mut seen_word = false;
    for b in text.bytes() {
        if word(b) {
            let joined = separator.is_empty() || matches!(separator.as_str(), "." | "_" | "__") || separator.bytes().all(|c| c == b'-');
            if !joined {
                return false;
            }
            separator.clear();
            seen_word = true;
        } else if seen_word && matches!(b, b'.' | b'_' | b'-') {
            separator.push(b as char);
        } else {
            return false;
        }
    }
    seen_word && separator.is_empty()
}

fn is_tag(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        && !text.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalises_as_docker_does() {
        for (given, want) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("a/b", "docker.io/a/b:latest".to_owned()),
            ("docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/x:v1", "localhost:5000/x:v1".to_owned()),
            ("localhost:5000", "docker.io/library/localhost:5000".to_owned()),
            ("[::1]:5000/a/b__c:t", "[::1]:5000/a/b__c:t".to_owned()),
            ("[fe80::1]/a", "[fe80::1]/a:latest".to_owned()),
            ("Registry/a", "Registry/a:latest".to_owned()),
            (&format!("gcr.io/p/i:tag@{D}"), format!("gcr.io/p/i@{D}")),
            (&format!("busybox@{D}"), format!("docker.io/library/busybox@{D}")),
            ("q.io/a---b/c.d_e", "q.io/a---b/c.d_e:latest".to_owned()),
        ] {
            assert_eq!(Reference::parse(given).unwrap().to_string(), want, "{given}");
        }
    }

    #[test]
    fn refuses_bad_ones() {
        for bad in [
            "",
            " ",
            "Busybox",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:-x",
            "a@sha256:12",
            "a@",
            "q.io/",
            "q.io/A",
            "a__/b",
            "a___b",
            "a._b",
            "-a",
            "a:b:c",
            "[::1/a",
            "[zz]/a",
            "q.io:port/a",
            "q.io:70000/a",
            "http://q.io/a",
            "a b",
            "a\nb",
            "q..io/a",
            &D[7..],
            "../../x",
            "a:b/..",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Reference::parse(&format!("q.io/{}", "a".repeat(300))).is_err());
        assert!(Reference::parse(&format!("q.io/{}", "a".repeat(250))).is_ok());
        assert!(Reference::parse(&format!("q.io/a:{}", "t".repeat(128))).is_ok());
        assert!(Reference::parse(&format!("q.io/a:{}", "t".repeat(129))).is_err());
        let e = Reference::parse(&"a".repeat(1 << 20)).unwrap_err();
        assert!(e.message().len() < 200, "{}", e.message().len());
        let e = Reference::parse(&format!("a@sha512:{}", "0".repeat(128))).unwrap_err();
        assert!(e.message().contains("algorithm \"sha512\" is not supported, only sha256"), "{e}");
        let e = Reference::parse(&format!("a:-t@{D}")).unwrap_err();
        assert!(e.message().contains("tag"), "a tag beside a digest must be one: {e}");
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(text in "\\PC{0,64}") {
            let _ = Reference::parse(&text);
        }

        #[test]
        fn display_parses_to_itself(text in "([a-z]{1,5}\\.io(:[0-9]{1,4})?/)?[a-z0-9]{1,8}(/[a-z0-9]{1,4}){0,2}(:[A-Za-z0-9_]{1,9})?") {
            let one = Reference::parse(&text).unwrap();
            proptest::prop_assert_eq!(Reference::parse(&one.to_string()).unwrap(), one);
        }
    }
}
