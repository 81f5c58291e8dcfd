//! Manifests, indexes and configs (OCI image-spec; Docker image manifest v2 schema 2): parsed strictly where a lenient
//! reading could mean two things, and chosen by platform.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::platform::Platform;
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

pub(super) fn null_is_empty<'de, T: Deserialize<'de> + Default, D: serde::Deserializer<'de>>(d: D) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// The entries of an index that can be read: one that cannot (a digest of another kind, say) is not for us, and no reason to
/// refuse the others.
pub fn usable<'de, D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Option<Vec<Descriptor>>, D::Error> {
    let entries: Option<Vec<serde_json::Value>> = Option::deserialize(d)?;
    let read = |entry| serde_json::from_value(entry).inspect_err(|e| log::debug!("image: an entry of an index is left out: {e}")).ok();
    Ok(entries.map(|entries| entries.into_iter().filter_map(read).collect()))
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
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "usable")]
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
    let is_artifact = raw.artifact_type.as_deref().is_some_and(|t| !t.is_empty());
    // Docker once pushed configs without a type of their own.
    let untyped = config.media_type == "application/octet-stream" && !is_artifact;
    if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) && !untyped {
        let kind = raw.artifact_type.filter(|t| !t.is_empty()).unwrap_or(config.media_type);
        return Err(wrong(format!("this is an artifact of type {kind:?}, not an image")));
    }
    for layer in &layers {
        check_layer(layer)?;
    }
    Ok(Document::Manifest(Manifest { config, layers }))
}

/// The media type of a document that has been parsed: the one that was announced if it is one of ours, else what the document
/// says of itself, else what it looks like.
pub fn media_type(data: &[u8], announced: &str) -> String {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Looks {
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let looks: Looks = serde_json::from_slice(data).unwrap_or_default();
    let said = [Some(announced), looks.media_type.as_deref()].into_iter().flatten().find(|said| known(said).is_some());
    said.unwrap_or(if looks.manifests.is_some() { OCI_INDEX } else { OCI_MANIFEST }).to_owned()
}

/// Whether a document that `parse` refuses is a manifest of something else than an image: a signature, a chart.
pub fn is_artifact(data: &[u8]) -> bool {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Looks {
        artifact_type: Option<String>,
        config: Option<Descriptor>,
        blobs: Option<serde::de::IgnoredAny>,
    }
    serde_json::from_slice(data).is_ok_and(|looks: Looks| {
        let odd = looks.config.is_some_and(|config| !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG));
        odd || looks.blobs.is_some() || looks.artifact_type.is_some_and(|t| !t.is_empty())
    })
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

/// The index's entries that may be for a platform: the best variant, the first of equals; if no entry says that it is for the
/// platform, those that say nothing, whose configs tell.
pub fn candidates<'a>(entries: &'a [Descriptor], platform: &Platform) -> Result<Vec<&'a Descriptor>> {
    let best = entries
        .iter()
        .filter_map(|d| d.platform.as_ref().and_then(|p| platform.rank(p)).map(|rank| (rank, d)))
        .min_by_key(|(rank, _)| *rank);
    if let Some((_, entry)) = best {
        return Ok(vec![entry]);
    }
    let silent: Vec<&Descriptor> = entries.iter().filter(|d| d.platform.is_none()).collect();
    if !silent.is_empty() {
        return Ok(silent);
    }
    let mut offered: Vec<String> = entries.iter().filter_map(|d| d.platform.as_ref()).map(|p| p.to_string()).collect();
    offered.retain(|p| !p.starts_with("unknown/"));
    Err(Error::not_found(format!(
        "no image for {platform} in the index; it has {}",
        if offered.is_empty() { "none".to_owned() } else { offered.join(", ") }
    )))
}

/// A config with what tools in Go write and read, and the types here do not: null for lists and maps without members and for
/// empty values, no word about the platform.
fn as_go_reads(data: &[u8]) -> Option<ImageConfiguration> {
    use serde_json::{json, Value};
    let mut value: Value = serde_json::from_slice(data).ok()?;
    let config = value.as_object_mut()?;
    for field in ["os", "architecture"] {
        let said = config.entry(field).or_insert(Value::Null);
        if said.is_null() {
            *said = json!("");
        }
    }
    if let Some(ids) = value.pointer_mut("/rootfs/diff_ids").filter(|ids| ids.is_null()) {
        *ids = json!([]);
    }
    for (field, empty) in [("Labels", json!("")), ("Volumes", json!({})), ("ExposedPorts", json!({}))] {
        let Some(Value::Object(members)) = value.pointer_mut(&format!("/config/{field}")) else { continue };
        members.values_mut().filter(|value| value.is_null()).for_each(|value| *value = empty.clone());
    }
    serde_json::from_value(value).ok()
}

/// A parsed config with its diff IDs, as many as the manifest has layers. What platform it is for is another matter
/// (`Platform::runs`).
pub fn parse_config(data: &[u8], layers: usize) -> Result<(ImageConfiguration, Vec<Digest>)> {
    let failed = |e: Error| e.with_code(crate::error::Code::FailedPrecondition);
    let mut config: ImageConfiguration =
        serde_json::from_slice(data).or_else(|e| as_go_reads(data).ok_or(e)).context(|| "parse image config").map_err(failed)?;
    let diff_ids: Vec<Digest> =
        config.rootfs().diff_ids().iter().map(|d| Digest::parse(d)).collect::<Result<_>>().context(|| "image config").map_err(failed)?;
    if diff_ids.len() != layers {
        return Err(Error::precondition(format!("image config names {} layers, the manifest {layers}", diff_ids.len())));
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
pub(super) mod tests {
    use super::*;

    pub fn descriptor(media_type: &str, platform: Option<(&str, &str, Option<&str>)>) -> Descriptor {
        let mut d = Descriptor::new(media_type, Digest::of(format!("{platform:?}").as_bytes()), 1);
        d.platform = platform.map(|(os, architecture, variant)| Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        });
        d
    }

    pub fn choose<'a>(entries: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
        candidates(entries, platform).map(|found| found[0])
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
        let d = serde_json::to_string(&descriptor(OCI_CONFIG, None)).unwrap();
        for layers in ["null", "[]"] {
            let text = format!(r#"{{"schemaVersion":2,"config":{d},"layers":{layers}}}"#);
            let Document::Manifest(manifest) = parse(text.as_bytes(), OCI_MANIFEST).unwrap() else { panic!("a manifest") };
            assert_eq!(manifest.layers, []);
            let config = format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":{layers}}}}}"#);
            assert_eq!(parse_config(config.as_bytes(), 0).unwrap().1, []);
            assert!(parse_config(config.as_bytes(), 1).is_err());
        }
    }

    #[test]
    fn config_must_agree() {
        let json = format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#, Digest::of(b""));
        assert!(parse_config(json.as_bytes(), 1).is_ok());
        assert!(parse_config(json.as_bytes(), 2).unwrap_err().message().contains("names 1"));
    }

    /// As image tools in Go take them.
    #[test]
    fn configs_may_be_brief() {
        let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        let read = |head: &str| {
            let json = format!(r#"{{{head}"rootfs":{{"type":"layers","diff_ids":[]}}}}"#);
            parse_config(json.as_bytes(), 0).map(|(config, _)| config)
        };
        for (head, runs) in [
            (r#""os":"linux","architecture":"amd64","#, true),
            (r#""os":"Linux","architecture":"x86_64","#, true),
            (r#""os":"linux","architecture":"386","#, true),
            (r#""os":"linux","#, true),
            (r#""architecture":null,"#, true),
            ("", true),
            (r#""os":"linux","architecture":"s390x","#, false),
            (r#""os":"windows","architecture":"amd64","#, false),
        ] {
            assert_eq!(host.runs(&read(head).unwrap()), runs, "{head}");
        }
        let config =
            read(r#""config":{"Labels":{"a":null,"b":"c"},"Volumes":{"/v":null},"ExposedPorts":{"80/tcp":null},"Env":null},"#).unwrap();
        let config = config.config().as_ref().unwrap();
        assert_eq!(config.labels().as_ref().unwrap()["a"], "");
        assert_eq!(config.volumes().as_ref().unwrap(), &["/v"]);
        assert!(read(r#""config":{"Env":"PATH"},"#).is_err());
    }

    #[test]
    fn an_entry_that_cannot_be_read_hides_no_other() {
        let good = serde_json::to_string(&descriptor(OCI_MANIFEST, Some(("linux", "amd64", None)))).unwrap();
        let sha512 = format!(r#"{{"digest":"sha512:{}","size":1,"platform":{{"os":"linux","architecture":"s390x"}}}}"#, "0".repeat(128));
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{sha512},7,{good},{{"digest":"x"}}]}}"#);
        let Document::Index(entries) = parse(text.as_bytes(), OCI_INDEX).unwrap() else { panic!("an index") };
        assert_eq!(entries.len(), 1);
    }

    #[test]
    fn what_a_document_is() {
        for (text, announced, is) in [
            ("{}", OCI_INDEX, OCI_INDEX),
            ("{}", "text/html", OCI_MANIFEST),
            ("{}", "", OCI_MANIFEST),
            (r#"{"manifests":[]}"#, "application/json", OCI_INDEX),
            (r#"{"mediaType":"application/vnd.docker.distribution.manifest.v2+json"}"#, "application/json", DOCKER_MANIFEST),
        ] {
            assert_eq!(media_type(text.as_bytes(), announced), is, "{text} {announced}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(text in "\\PC{0,200}") {
            let _ = parse(text.as_bytes(), "");
        }
    }
}
