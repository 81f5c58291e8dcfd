//! Manifests, indexes and configs (OCI image-spec; Docker image manifest v2 schema 2): parsed strictly where a lenient
//! reading could mean two things, and chosen by platform.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use crate::error::{Context, Error, Result};

pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// A pointer to a blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub urls: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Descriptor {
        Descriptor { media_type: media_type.to_owned(), digest, size, urls: Vec::new(), platform: None, annotations: BTreeMap::new() }
    }

    /// A layer that may live outside of registries, at the addresses in its descriptor.
    pub fn is_foreign(&self) -> bool {
        !self.urls.is_empty() || self.media_type.contains("foreign") || self.media_type.contains("nondistributable")
    }
}

fn null_is_empty<'de, T: Deserialize<'de> + Default, D: serde::Deserializer<'de>>(d: D) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// What an image was built for, in Go's words (`amd64`, `arm64`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
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

    /// How well an image for `other` runs here: lower is better, None not at all. As containerd has it, a 64-bit host takes an
    /// image for its 32-bit ancestor when there is no other.
    fn rank(&self, other: &Platform) -> Option<u32> {
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

/// Bytes that a descriptor may announce: sums of them stay numbers of 64 bits with a sign, as CRI has them.
const SIZE_LIMIT: u64 = 1 << 48;

/// Either kind of document.
#[derive(Debug)]
pub enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// An image manifest whose descriptors have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    schema_version: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    #[serde(default, skip_serializing)]
    artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layers: Option<Vec<Descriptor>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default, skip_serializing)]
    fs_layers: Option<serde_json::Value>,
    #[serde(default, skip_serializing)]
    blobs: Option<serde_json::Value>,
}

/// Parses a document that was announced with `media_type` ("" when nothing was said).
pub fn parse(data: &[u8], media_type: &str) -> Result<Document> {
    let wrong = |why: String| Error::precondition(format!("manifest: {why}"));
    let raw: Raw =
        serde_json::from_slice(data).context(|| "parse manifest").map_err(|e| e.with_code(crate::error::Code::FailedPrecondition))?;
    if raw.fs_layers.is_some() || raw.schema_version == Some(1) {
        return Err(wrong("schema 1 is not supported; push the image again with a current tool".to_owned()));
    }
    if raw.schema_version.is_some_and(|v| v != 2) {
        return Err(wrong("unknown schema version".to_owned()));
    }
    if raw.blobs.is_some() {
        return Err(wrong("this is an artifact, not an image".to_owned()));
    }
    if raw.manifests.is_some() && (raw.layers.is_some() || raw.config.is_some()) {
        return Err(wrong("both an index and an image manifest".to_owned()));
    }
    let said = [Some(media_type).filter(|m| !m.is_empty() && known(m).is_some()), raw.media_type.as_deref().filter(|m| !m.is_empty())];
    for said in said.into_iter().flatten() {
        match known(said) {
            None => return Err(wrong(format!("media type {said} is not an image"))),
            Some(is_index) if is_index != raw.manifests.is_some() => {
                return Err(wrong(format!("does not look like the {said} it claims to be")))
            }
            Some(_) => {}
        }
    }
    let sized = [&raw.manifests, &raw.layers].into_iter().flatten().flatten().chain(&raw.config);
    if let Some(large) = sized.into_iter().find(|descriptor| descriptor.size > SIZE_LIMIT) {
        return Err(wrong(format!("{} has {} bytes, more than any disk", large.digest, large.size)));
    }
    if let Some(manifests) = raw.manifests {
        return Ok(Document::Index(manifests));
    }
    let Some(config) = raw.config else {
        return Err(wrong("neither an index nor an image manifest".to_owned()));
    };
    // Tools in Go write a list without members as null.
    let layers = raw.layers.unwrap_or_default();
    if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
        let kind = raw.artifact_type.filter(|t| !t.is_empty()).unwrap_or(config.media_type);
        return Err(wrong(format!("this is an artifact of type {kind:?}, not an image")));
    }
    for layer in &layers {
        check_layer(layer)?;
    }
    Ok(Document::Manifest(Manifest { config, layers }))
}

fn known(media_type: &str) -> Option<bool> {
    match media_type {
        OCI_INDEX | DOCKER_LIST => Some(true),
        OCI_MANIFEST | DOCKER_MANIFEST => Some(false),
        _ => None,
    }
}

fn check_layer(layer: &Descriptor) -> Result<()> {
    let wrong = |why: &str| Err(Error::precondition(format!("layer {}: {why}", layer.digest)));
    if layer.media_type.contains("encrypted") {
        return wrong("encrypted layers are not supported");
    }
    if !matches!(
        layer.media_type.as_str(),
        OCI_LAYER
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
    ) {
        return wrong(&format!("unknown media type {:?}", layer.media_type));
    }
    Ok(())
}

/// An OCI manifest for an image that came without one.
pub fn compose(config: &Descriptor, layers: &[Descriptor]) -> Result<Vec<u8>> {
    let raw = Raw {
        schema_version: Some(2),
        media_type: Some(OCI_MANIFEST.to_owned()),
        artifact_type: None,
        config: Some(config.clone()),
        layers: Some(layers.to_vec()),
        manifests: None,
        fs_layers: None,
        blobs: None,
    };
    serde_json::to_vec(&raw).context(|| "write manifest")
}

/// The index's entry for a platform: the best variant, the first of equals. An index of one entry without a platform
/// is that entry.
pub fn choose<'a>(entries: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let best = entries
        .iter()
        .filter_map(|d| d.platform.as_ref().and_then(|p| platform.rank(p)).map(|rank| (rank, d)))
        .min_by_key(|(rank, _)| *rank);
    if let Some((_, entry)) = best {
        return Ok(entry);
    }
    if let [only] = entries {
        if only.platform.is_none() {
            return Ok(only);
        }
    }
    let mut offered: Vec<String> = entries.iter().filter_map(|d| d.platform.as_ref()).map(|p| p.to_string()).collect();
    offered.retain(|p| !p.starts_with("unknown/"));
    Err(Error::not_found(format!(
        "no image for {platform} in the index; it has {}",
        if offered.is_empty() { "none".to_owned() } else { offered.join(", ") }
    )))
}

/// A config whose list of diff IDs is null, as tools in Go write one without members.
fn without_layers(data: &[u8]) -> Option<ImageConfiguration> {
    let mut value: serde_json::Value = serde_json::from_slice(data).ok()?;
    let ids = value.pointer_mut("/rootfs/diff_ids").filter(|ids| ids.is_null())?;
    *ids = serde_json::Value::Array(Vec::new());
    serde_json::from_value(value).ok()
}

/// A parsed config with its diff IDs, as many as the manifest has layers.
pub fn parse_config(data: &[u8], layers: usize, platform: &Platform) -> Result<(ImageConfiguration, Vec<Digest>)> {
    let failed = |e: Error| e.with_code(crate::error::Code::FailedPrecondition);
    let mut config: ImageConfiguration =
        serde_json::from_slice(data).or_else(|e| without_layers(data).ok_or(e)).context(|| "parse image config").map_err(failed)?;
    let diff_ids: Vec<Digest> =
        config.rootfs().diff_ids().iter().map(|d| Digest::parse(d)).collect::<Result<_>>().context(|| "image config").map_err(failed)?;
    if diff_ids.len() != layers {
        return Err(Error::precondition(format!("image config names {} layers, the manifest {layers}", diff_ids.len())));
    }
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    let or = |said: &str, ours: &str| if said.is_empty() { ours.to_owned() } else { said.to_owned() };
    let built_for = Platform { os: or(&os, &platform.os), architecture: or(&architecture, &platform.architecture), variant: None };
    if platform.rank(&built_for).is_none() {
        return Err(Error::precondition(format!("the image is for {os}/{architecture}, this host is {platform}")));
    }
    // Sets in JSON, lists in the type: sorted, so that equal images compare equal.
    if let Some(mut inside) = config.config().clone() {
        let sorted = |list: &Option<Vec<String>>| {
            let mut list = list.clone();
            list.iter_mut().for_each(|l| l.sort());
            list
        };
        let (volumes, ports) = (sorted(inside.volumes()), sorted(inside.exposed_ports()));
        inside.set_volumes(volumes);
        inside.set_exposed_ports(ports);
        config.set_config(Some(inside));
    }
    Ok((config, diff_ids))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str, platform: Option<(&str, &str, Option<&str>)>) -> Descriptor {
        let mut d = Descriptor::new(media_type, Digest::of(format!("{platform:?}").as_bytes()), 1);
        d.platform = platform.map(|(os, architecture, variant)| Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        });
        d
    }

    fn refused(json: &str, words: &str) {
        let e = parse(json.as_bytes(), "").unwrap_err();
        assert!(e.message().contains(words), "{e}");
    }

    #[test]
    fn chooses_by_platform() {
        let amd = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        let entries = [
            descriptor(OCI_MANIFEST, Some(("unknown", "unknown", None))),
            descriptor(OCI_MANIFEST, Some(("linux", "amd64", Some("v3")))),
            descriptor(OCI_MANIFEST, Some(("linux", "arm64", Some("v8")))),
            descriptor(OCI_MANIFEST, Some(("linux", "amd64", None))),
        ];
        assert_eq!(choose(&entries, &amd).unwrap(), &entries[3]);
        let e = choose(&entries[..3], &amd).unwrap_err();
        assert!(e.message().contains("linux/arm64/v8") && !e.message().contains("unknown"), "{e}");
        let arm = Platform { os: "linux".into(), architecture: "arm".into(), variant: Some("v7".into()) };
        let entries = [descriptor("", Some(("linux", "arm", Some("v6")))), descriptor("", Some(("linux", "arm", Some("v7"))))];
        assert_eq!(choose(&entries, &arm).unwrap(), &entries[1]);
        assert_eq!(choose(&entries[..1], &arm).unwrap(), &entries[0]);
    }

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
    fn refuses_what_is_no_plain_image() {
        let d = serde_json::to_string(&descriptor(OCI_CONFIG, None)).unwrap();
        let layer = |t: &str| serde_json::to_string(&descriptor(t, None)).unwrap();
        refused(&format!(r#"{{"schemaVersion":2,"config":{d},"layers":[],"manifests":[]}}"#), "both");
        refused(r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema 1");
        refused(
            &format!(r#"{{"schemaVersion":2,"config":{},"layers":[]}}"#, layer("application/vnd.oci.empty.v1+json")),
            "artifact of type \"application/vnd.oci.empty",
        );
        let config = layer("application/vnd.oci.empty.v1+json");
        refused(
            &format!(r#"{{"schemaVersion":2,"artifactType":"a/chart","config":{config},"layers":[]}}"#),
            "artifact of type \"a/chart\"",
        );
        refused(r#"{"schemaVersion":2,"artifactType":"a/b","blobs":[]}"#, "artifact");
        refused(&format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","config":{d},"layers":[]}}"#), "claims");
        refused(r#"{"schemaVersion":2}"#, "neither");
        let large = d.replace("\"size\":1", "\"size\":281474976710657");
        refused(&format!(r#"{{"schemaVersion":2,"config":{d},"layers":[{large}]}}"#), "more than any disk");
        refused(&format!(r#"{{"schemaVersion":2,"config":{large},"layers":[]}}"#), "more than any disk");
        refused(&format!(r#"{{"schemaVersion":2,"manifests":[{large}]}}"#), "more than any disk");
        refused(r#"{"schemaVersion":2,"schemaVersion":2}"#, "duplicate");
        let with = |l: String| format!(r#"{{"schemaVersion":2,"config":{d},"layers":[{l}]}}"#);
        assert!(parse(with(layer("application/vnd.oci.image.layer.v1.tar+zstd")).as_bytes(), "").is_ok());
        refused(&with(layer("text/plain")), "text/plain");
        let mut urls = descriptor(OCI_LAYER, None);
        urls.urls = vec!["http://evil/".into()];
        for foreign in [serde_json::to_string(&urls).unwrap(), layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")] {
            let Document::Manifest(manifest) = parse(with(foreign).as_bytes(), "").unwrap() else { panic!("a manifest") };
            assert!(manifest.layers[0].is_foreign());
        }
        assert!(parse(with(layer(OCI_LAYER)).as_bytes(), OCI_INDEX).is_err());
        assert!(parse(with(layer(OCI_LAYER)).as_bytes(), "application/json").is_ok());
    }

    /// As Go writes a list that was never made.
    #[test]
    fn images_without_layers_have_null_for_a_list() {
        let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        let d = serde_json::to_string(&descriptor(OCI_CONFIG, None)).unwrap();
        for layers in ["null", "[]"] {
            let text = format!(r#"{{"schemaVersion":2,"config":{d},"layers":{layers}}}"#);
            let Document::Manifest(manifest) = parse(text.as_bytes(), OCI_MANIFEST).unwrap() else { panic!("a manifest") };
            assert_eq!(manifest.layers, []);
            let config = format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":{layers}}}}}"#);
            assert_eq!(parse_config(config.as_bytes(), 0, &host).unwrap().1, []);
            assert!(parse_config(config.as_bytes(), 1, &host).is_err());
        }
    }

    #[test]
    fn config_must_agree() {
        let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        let json = format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#, Digest::of(b""));
        assert!(parse_config(json.as_bytes(), 1, &host).is_ok());
        assert!(parse_config(json.as_bytes(), 2, &host).unwrap_err().message().contains("names 1"));
        assert!(parse_config(json.replace("amd64", "s390x").as_bytes(), 1, &host).unwrap_err().message().contains("s390x"));
        assert!(parse_config(json.replace("amd64", "386").as_bytes(), 1, &host).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(text in "\\PC{0,200}") {
            let _ = parse(text.as_bytes(), "");
        }
    }
}
