//! Platforms: what an image was built for, and whether it runs here.

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

/// What an image was built for, in Go's words (`amd64`, `arm64`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default, deserialize_with = "super::manifest::null_is_empty")]
    pub os: String,
    #[serde(default, deserialize_with = "super::manifest::null_is_empty")]
    pub architecture: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// This host's.
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", x86_level()),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "x86" => ("386", None),
            "powerpc64" => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: variant.map(str::to_owned) }
    }

    /// The same by its usual names: processors have several, and what is not said is Linux (as containerd reads platforms).
    fn normal(&self) -> Platform {
        let (mut os, said) = (self.os.to_ascii_lowercase(), self.architecture.to_ascii_lowercase());
        if os.is_empty() {
            os = "linux".to_owned();
        }
        let (architecture, implied) = match said.as_str() {
            "x86_64" | "x86-64" => ("amd64", None),
            "i386" | "i486" | "i586" | "i686" => ("386", None),
            "aarch64" => ("arm64", None),
            "armhf" => ("arm", Some("v7")),
            "armel" => ("arm", Some("v6")),
            other => (other, None),
        };
        let full = |v: &String| match v.as_bytes() {
            [b'0'..=b'9', ..] => format!("v{v}"),
            _ => v.to_ascii_lowercase(),
        };
        let variant = self.variant.as_ref().filter(|v| !v.is_empty()).map(full);
        Platform { os, architecture: architecture.to_owned(), variant: variant.or(implied.map(str::to_owned)) }
    }

    /// Whether an image with this config runs here. What it does not say is no reason against it.
    pub fn runs(&self, config: &ImageConfiguration) -> bool {
        let or = |said: String, ours: &str| if said.is_empty() { ours.to_owned() } else { said };
        let os = or(config.os().to_string(), &self.os);
        let architecture = or(config.architecture().to_string(), &self.architecture);
        self.rank(&Platform { os, architecture, variant: config.variant().clone() }).is_some()
    }

    /// How well an image for `other` runs here: lower is better, None not at all. As containerd has it, a 64-bit host takes an
    /// image for its 32-bit ancestor when there is no other.
    pub(super) fn rank(&self, other: &Platform) -> Option<u32> {
        let other = &other.normal();
        if other.os != self.os {
            return None;
        }
        let level = |v: &Option<String>, default: u32| match v.as_deref() {
            None | Some("") => Some(default),
            Some(v) => v.strip_prefix('v').and_then(|v| v.parse::<u32>().ok()),
        };
        // No variant means the base level: x86-64-v1, armv8, armv7.
        let base = match other.architecture.as_str() {
            "arm64" => 8,
            "arm" => 7,
            _ => 1,
        };
        let theirs = level(&other.variant, base)?;
        match (self.architecture.as_str(), other.architecture.as_str()) {
            // Plain amd64 is what everybody tests; a higher level is for want of it.
            ("amd64", "amd64") if theirs == base => Some(0),
            ("amd64", "amd64") => level(&self.variant, base)?.checked_sub(theirs).map(|rank| rank + 1),
            ("amd64", "386") => Some(200),
            ("arm64", "arm") => 208_u32.checked_sub(theirs).filter(|rank| *rank >= 200),
            (ours, theirs_too) if ours == theirs_too => level(&self.variant, base)?.checked_sub(theirs),
            _ => None,
        }
    }
}

/// The level of the x86-64 psABI that this processor has; None: the first.
#[cfg(target_arch = "x86_64")]
fn x86_level() -> Option<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let second = has!("cmpxchg16b") && has!("popcnt") && has!("sse3") && has!("sse4.1") && has!("sse4.2") && has!("ssse3");
    let third =
        has!("avx") && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("f16c") && has!("fma") && has!("lzcnt") && has!("movbe");
    let fourth = has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    match (second, third, fourth) {
        (true, true, true) => Some("v4"),
        (true, true, false) => Some("v3"),
        (true, false, _) => Some("v2"),
        _ => None,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn x86_level() -> Option<&'static str> {
    None
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::tests::{choose, descriptor};
    use crate::image::manifest::OCI_MANIFEST;

    #[test]
    fn levels_and_ancestors() {
        let host = |architecture: &str, variant: Option<&str>| Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.map(str::to_owned),
        };
        let entries: Vec<_> = [("amd64", Some("v4")), ("386", None), ("amd64", Some("v2")), ("amd64", Some("v3")), ("amd64", Some("v1"))]
            .into_iter()
            .map(|(architecture, variant)| descriptor(OCI_MANIFEST, Some(("linux", architecture, variant))))
            .collect();
        let v3 = host("amd64", Some("v3"));
        assert_eq!(choose(&entries, &v3).unwrap(), &entries[4], "plain first");
        assert_eq!(choose(&entries[..4], &v3).unwrap(), &entries[3]);
        assert_eq!(choose(&entries[..3], &v3).unwrap(), &entries[2]);
        assert_eq!(choose(&entries[..2], &v3).unwrap(), &entries[1]);
        assert!(choose(&entries[..1], &v3).is_err());
        let entries: Vec<_> = [("arm", Some("v6")), ("arm", Some("v7")), ("arm64", Some("v9")), ("arm64", Some("v8"))]
            .into_iter()
            .map(|(architecture, variant)| descriptor(OCI_MANIFEST, Some(("linux", architecture, variant))))
            .collect();
        let arm = host("arm64", Some("v8"));
        assert_eq!(choose(&entries, &arm).unwrap(), &entries[3]);
        assert_eq!(choose(&entries[..3], &arm).unwrap(), &entries[1]);
        let odd =
            [descriptor(OCI_MANIFEST, Some(("linux", "arm", Some("v99")))), descriptor(OCI_MANIFEST, Some(("linux", "arm", Some("x"))))];
        assert!(choose(&odd, &arm).is_err());
        assert!(choose(&entries, &host("arm", Some("v5"))).is_err());
        assert!(Platform::host().rank(&Platform { variant: None, ..Platform::host() }).is_some());
    }

    #[test]
    fn processors_have_several_names() {
        let arm = Platform { os: "linux".into(), architecture: "arm".into(), variant: Some("v7".into()) };
        let amd = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        let entries = [
            descriptor("", Some(("linux", "armhf", None))),
            descriptor("", Some(("Linux", "X86_64", Some("")))),
            descriptor("", Some(("linux", "aarch64", Some("8")))),
        ];
        assert_eq!(choose(&entries, &arm).unwrap(), &entries[0]);
        assert_eq!(choose(&entries, &amd).unwrap(), &entries[1]);
        assert_eq!(choose(&entries, &Platform { architecture: "arm64".into(), variant: Some("v8".into()), ..amd }).unwrap(), &entries[2]);
    }
}
