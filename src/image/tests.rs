//! Tests of the image store as a whole, without a registry.

use super::*;
use crate::error::Code;
use std::io::Write;
use std::sync::atomic::Ordering;

/// A tar of plain files and directories (names ending with a slash).
pub(super) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut h = tar::Header::new_gnu();
        h.set_size(data.len() as u64);
        h.set_mode(if name.ends_with('/') { 0o755 } else { 0o644 });
        if name.ends_with('/') {
            h.set_entry_type(tar::EntryType::Directory);
        }
        builder.append_data(&mut h, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(super) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn config(layers: &[&[u8]], user: &str) -> Vec<u8> {
    let host = Platform::host();
    let diff_ids: Vec<String> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
    serde_json::json!({
        "os": host.os, "architecture": host.architecture,
        "config": {"User": user, "Labels": {"a": "b"}, "StopSignal": "SIGUSR1", "Volumes": {"/v": {}, "/a": {}}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}
    })
    .to_string()
    .into_bytes()
}

/// A layer of one file with its name in it.
pub(super) fn layer_tar(name: &str) -> Vec<u8> {
    tar(&[(name, name.as_bytes())])
}

/// An OCI layout as files of a tar; gives the config's and the manifest's digest too.
pub(super) fn oci_archive(name: Option<&str>, user: &str, layers: &[&[u8]]) -> (Vec<u8>, String, String) {
    let config = config(layers, user);
    let blobs: Vec<Vec<u8>> = layers.iter().map(|l| gzip(l)).collect();
    let descriptor = |t: &str, data: &[u8]| manifest::Descriptor::new(t, Digest::of(data), data.len() as u64);
    let descriptors: Vec<_> = blobs.iter().map(|b| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", b)).collect();
    let manifest = manifest::compose(&descriptor(manifest::OCI_CONFIG, &config), &descriptors).unwrap();
    let mut top = descriptor(manifest::OCI_MANIFEST, &manifest);
    if let Some(name) = name {
        top.annotations.insert(metadata::NAME.to_owned(), name.to_owned());
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [top]}).to_string().into_bytes();
    let path = |data: &[u8]| format!("blobs/sha256/{}", Digest::of(data).hex());
    let mut files = vec![("index.json".to_owned(), index), (path(&config), config.clone()), (path(&manifest), manifest.clone())];
    files.extend(blobs.into_iter().map(|b| (path(&b), b)));
    let files: Vec<(&str, &[u8])> = files.iter().map(|(n, d)| (n.as_str(), d.as_slice())).collect();
    (tar(&files), Digest::of(&config).to_string(), Digest::of(&manifest).to_string())
}

pub(super) fn store() -> (tempfile::TempDir, Images) {
    let dir = tempfile::tempdir().unwrap();
    let images = Images::open(Settings::new(&dir.path().join("root"))).unwrap();
    (dir, images)
}

pub(super) fn import(images: &Images, dir: &Path, data: &[u8]) -> Result<Vec<Arc<Image>>> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let path = dir.join(format!("{}.tar", SERIAL.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&path, data).unwrap();
    images.import(&path, None, &Cancel::never())
}

#[test]
fn one_image_under_all_its_names() {
    let (dir, images) = store();
    let (base, top) = (tar(&[("etc/", b""), ("etc/a", b"1")]), tar(&[("etc/b", b"2")]));
    let (archive, id, manifest) = oci_archive(Some("q.io/x/y:v1"), "1000:7", &[&base, &top]);
    let made = import(&images, dir.path(), &gzip(&archive)).unwrap();
    let image = &made[0];
    assert_eq!((image.id.as_str(), image.repo_tags.as_slice()), (id.as_str(), &["q.io/x/y:v1".to_owned()][..]));
    assert_eq!(image.repo_digests, [format!("q.io/x/y@{manifest}")]);
    assert_eq!((image.user(), image.uid(), image.stop_signal()), ("1000", Some(1000), Some("SIGUSR1")));
    assert_eq!((image.volumes(), image.labels()["a"].as_str()), (vec!["/a".to_owned(), "/v".to_owned()], "b"));
    assert!(image.size > 0);
    for name in
        [id.as_str(), &id[7..], &id[7..19], &id[..20], "q.io/x/y:v1", &format!("q.io/x/y@{manifest}"), &format!("q.io/x/y:z@{manifest}")]
    {
        assert_eq!(images.status(name).unwrap().as_ref(), Some(image), "{name}");
    }
    assert_eq!(images.status(&format!("q.io/x/y@{id}")).unwrap().as_ref(), Some(image));
    for name in ["q.io/x/y", "y", &id[7..11], &"0".repeat(64), &format!("q.io/x@{id}"), &format!("q.io/x/yy@{id}")] {
        assert_eq!(images.status(name).unwrap(), None, "{name}");
    }
    // What is no name at all is the name of nothing; only a pull says so.
    for name in ["A B", "x:y:z", "busybox@sha256:1", ""] {
        assert_eq!(images.status(name).unwrap(), None, "{name}");
        images.remove(name).unwrap();
        assert_eq!(images.pull(name, None, &Cancel::never(), None).unwrap_err().code(), Code::InvalidArgument);
    }
    let again = Images::open(Settings::new(&dir.path().join("root"))).unwrap();
    assert_eq!(again.list(), images.list());
    assert_eq!(again.fs_info((1, 2)), images.fs_info((1, 2)));
    assert!(images.fs_info((0, 0)).image.used_bytes > 0);
    images.remove("q.io/x/y:v1").unwrap();
    images.remove("q.io/x/y:v1").unwrap();
    assert!(images.list().is_empty());
    layers::settle(&dir.path().join("root/layers"));
    assert_eq!(std::fs::read_dir(dir.path().join("root/layers")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(dir.path().join("root/images/blobs/sha256")).unwrap().count(), 0);
}

#[test]
fn a_tag_that_moves_leaves_the_old_image() {
    let (dir, images) = store();
    let layer = tar(&[("a", b"1")]);
    let (first, first_id, first_manifest) = oci_archive(Some("x:1"), "1", &[&layer]);
    let (second, second_id, _) = oci_archive(Some("x:1"), "2", &[&layer]);
    import(&images, dir.path(), &first).unwrap();
    import(&images, dir.path(), &second).unwrap();
    assert_eq!(images.status("x:1").unwrap().unwrap().id, second_id);
    let old = images.status(&first_id).unwrap().unwrap();
    assert_eq!((old.repo_tags.len(), old.repo_digests.as_slice()), (0, &[format!("docker.io/library/x@{first_manifest}")][..]));
    images.remove(&second_id).unwrap();
    assert!(images.status("x:1").unwrap().is_none() && images.status(&first_id).unwrap().is_some());
    assert!(images.inner.layers.is_ready(&Digest::of(&layer)));
}

#[test]
fn layers_in_use_outlive_their_image() {
    let (dir, images) = store();
    let (base, top) = (tar(&[("a", b"1")]), tar(&[("b", b"2")]));
    let (archive, id, _) = oci_archive(Some("x:latest"), "", &[&base, &top]);
    import(&images, dir.path(), &archive).unwrap();
    let held = images.hold("x", "c1").unwrap();
    assert!(held.layers[0].join("b").exists() && held.layers[1].join("a").exists());
    images.remove(&id).unwrap();
    assert!(images.list().is_empty() && held.layers[0].exists());
    let again = Images::open(Settings::new(&dir.path().join("root"))).unwrap();
    assert_eq!(again.hold_again("c1", &held.chain).unwrap(), held);
    again.collect().unwrap();
    assert!(held.layers[1].exists());
    again.release("c1").unwrap();
    assert!(!held.layers[0].exists() && !held.layers[1].exists());
    assert_eq!(again.hold("x", "c2").unwrap_err().code(), Code::NotFound);
}

#[test]
fn docker_archives_and_names() {
    let (dir, images) = store();
    let layer = tar(&[("a", b"1")]);
    let config = config(&[&layer, &layer], "");
    let list = br#"[{"Config":"c.json","RepoTags":["y:2","localhost:5000/z:3"],"Layers":["l/layer.tar","l/layer.tar"]}]"#;
    let archive = tar(&[("manifest.json", list), ("c.json", &config), ("l/layer.tar", &layer)]);
    let image = &import(&images, dir.path(), &archive).unwrap()[0];
    assert_eq!(image.id, Digest::of(&config).to_string());
    assert_eq!(image.repo_tags, ["docker.io/library/y:2", "localhost:5000/z:3"]);
    assert!(image.repo_digests.is_empty() && image.chain.len() == 2);
    let path = dir.path().join("named.tar");
    std::fs::write(&path, &archive).unwrap();
    images.import(&path, Some("other"), &Cancel::never()).unwrap();
    assert_eq!(images.status("other").unwrap().unwrap().id, image.id);
    assert!(import(&images, dir.path(), b"nonsense").is_err());
    assert!(import(&images, dir.path(), &tar(&[("x", b"")])).unwrap_err().message().contains("neither"));
}

#[test]
fn damage_is_found_and_kept_apart() {
    let (dir, images) = store();
    let (good, bad) = (tar(&[("a", b"1")]), tar(&[("b", b"2")]));
    let (one, one_id, _) = oci_archive(Some("good:latest"), "", &[&good]);
    let (two, two_id, _) = oci_archive(Some("bad:latest"), "", &[&bad]);
    let (three, three_id, _) = oci_archive(Some("torn:latest"), "t", &[&good]);
    for archive in [&one, &two, &three] {
        import(&images, dir.path(), archive).unwrap();
    }
    let root = dir.path().join("root");
    std::fs::remove_file(root.join("layers").join(Digest::of(&bad).hex()).join("layer.json")).unwrap();
    std::fs::write(root.join("images/blobs/sha256").join(&three_id[7..]), "{").unwrap();
    let images = Images::open(Settings::new(&root)).unwrap();
    let ids: Vec<String> = images.list().iter().map(|i| i.id.clone()).collect();
    assert_eq!(ids, [one_id]);
    assert_eq!(std::fs::read_dir(root.join("quarantine")).unwrap().count(), 2, "one record each for tag and digest");
    import(&images, dir.path(), &two).unwrap();
    assert!(images.status(&two_id).unwrap().is_some());
    std::fs::write(root.join("images/index.json"), "torn").unwrap();
    let images = Images::open(Settings::new(&root)).unwrap();
    images.collect().unwrap();
    assert!(images.list().is_empty() && images.inner.layers.is_ready(&Digest::of(&good)));
}

#[test]
fn wrong_blobs_commit_nothing() {
    let (dir, images) = store();
    let layer = tar(&[("a", b"1")]);
    let (archive, ..) = oci_archive(Some("x:latest"), "", &[&layer]);
    // The layer's blob is replaced by one of equal length and wrong content.
    let blob = gzip(&layer);
    let at = archive.windows(blob.len()).position(|w| w == blob).unwrap();
    let mut forged = archive.clone();
    forged[at + blob.len() - 5] ^= 1;
    let e = import(&images, dir.path(), &forged).unwrap_err();
    assert!(e.message().contains("received sha256:"), "{e}");
    assert!(images.list().is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("root/layers")).unwrap().count(), 0);
}

#[test]
fn preload_once() {
    let (dir, images) = store();
    let preload = dir.path().join("preload");
    std::fs::create_dir(&preload).unwrap();
    std::fs::write(preload.join("a.tar"), oci_archive(Some("x:latest"), "", &[&tar(&[("a", b"1")])]).0).unwrap();
    std::fs::write(preload.join("broken.tar"), "no").unwrap();
    images.preload(&preload);
    assert_eq!(images.list().len(), 1);
    images.remove("x").unwrap();
    images.preload(&preload);
    assert!(images.list().is_empty());
    std::fs::write(preload.join("a.tar"), oci_archive(Some("y:latest"), "", &[&tar(&[("a", b"23")])]).0).unwrap();
    images.preload(&preload);
    assert!(images.status("y").unwrap().is_some());
    images.preload(&dir.path().join("absent"));
}

#[test]
fn pinned_by_reference() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings::new(dir.path());
    settings.pinned = vec!["x".to_owned()];
    let images = Images::open(settings).unwrap();
    let (archive, ..) = oci_archive(Some("x:latest"), "", &[&tar(&[("a", b"1")])]);
    assert!(import(&images, dir.path(), &archive).unwrap()[0].pinned);
}

/// overlayfs merges the roots of its layers, marked opaque or not.
#[test]
fn an_opaque_root_hides_all_that_is_below() {
    let (dir, images) = store();
    let path = dir.path().join("image.tar");
    let layers = [tar(&[("old", b"1")]), tar(&[(".wh..wh..opq", b""), ("new", b"2")]), tar(&[("top", b"3")])];
    let (archive, id, _) = oci_archive(Some("x:1"), "", &layers.each_ref().map(Vec::as_slice));
    std::fs::write(&path, archive).unwrap();
    images.import(&path, None, &Cancel::never()).unwrap();
    let held = images.hold(&id, "c").unwrap();
    assert_eq!((held.layers.len(), held.chain.len()), (2, 3));
    assert!(held.layers[0].join("top").exists() && held.layers[1].join("new").exists());
}

#[test]
fn a_layout_with_an_image_per_platform() {
    let (dir, images) = store();
    let (mine, id, _) = oci_archive(Some("x:1"), "", &[&tar(&[("a", b"1")])]);
    let layout = dir.path().join("layout");
    ::tar::Archive::new(mine.as_slice()).unpack(&layout).unwrap();
    let index = std::fs::read(layout.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let host = Platform::host();
    let entry = |os: &str, architecture: &str, digest: Option<&str>| {
        let mut entry = index["manifests"][0].clone();
        entry["platform"] = serde_json::json!({"os": os, "architecture": architecture});
        if let Some(digest) = digest {
            entry["digest"] = digest.into();
        }
        entry
    };
    let absent = format!("sha256:{}", "0".repeat(64));
    let write = |entries: &[serde_json::Value]| {
        let text = serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string();
        std::fs::write(layout.join("index.json"), text).unwrap();
    };
    let others = [entry("linux", "s390x", Some(&absent)), entry("unknown", "unknown", Some(&absent))];
    write(&[others[0].clone(), entry(&host.os, &host.architecture, None), others[1].clone()]);
    let made = images.import(&layout, Some("named:1"), &Cancel::never()).unwrap();
    assert_eq!((made.len(), made[0].id.as_str(), made[0].repo_tags[0].as_str()), (1, id.as_str(), "docker.io/library/named:1"));
    write(&others);
    let e = images.import(&layout, None, &Cancel::never()).unwrap_err();
    assert!(e.code() == Code::NotFound && e.message().contains("linux/s390x"), "{e}");
    // A signature beside an image, first too, hides nothing.
    let mut plain = index["manifests"][0].clone();
    plain.as_object_mut().unwrap().remove("platform");
    let signature =
        br#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"DIGEST","size":2},"layers":[]}"#;
    let signature = String::from_utf8_lossy(signature).replace("DIGEST", Digest::of(b"{}").as_str());
    let digest = Digest::of(signature.as_bytes());
    std::fs::write(layout.join("blobs/sha256").join(digest.hex()), &signature).unwrap();
    let beside = serde_json::json!({"digest": digest.to_string(), "size": signature.len()});
    write(&[beside.clone(), plain]);
    assert_eq!(images.import(&layout, None, &Cancel::never()).unwrap()[0].id, id);
    assert_eq!(images.import(&layout, Some("named:2"), &Cancel::never()).unwrap()[0].id, id);
    write(&[beside]);
    let e = images.import(&layout, None, &Cancel::never()).unwrap_err();
    assert!(e.message().contains("artifact"), "{e}");

    // A layout is preloaded like an archive, once.
    let preload = dir.path().join("preload");
    std::fs::create_dir(&preload).unwrap();
    write(&[entry(&host.os, &host.architecture, None)]);
    std::fs::rename(&layout, preload.join("layout")).unwrap();
    images.remove("named:1").unwrap();
    images.preload(&preload);
    assert_eq!(images.list().len(), 1);
    images.remove(&id).unwrap();
    images.preload(&preload);
    assert!(images.list().is_empty());
}

#[test]
fn an_import_ends_when_its_caller_goes() {
    let (dir, images) = store();
    let (archive, ..) = oci_archive(Some("x:1"), "", &[&tar(&[("a", b"1")])]);
    let path = dir.path().join("a.tar");
    std::fs::write(&path, archive).unwrap();
    let cancel = Cancel::never();
    cancel.set();
    assert_eq!(images.import(&path, None, &cancel).unwrap_err().code(), Code::Cancelled);
    assert_eq!(std::fs::read_dir(dir.path().join("root/layers")).unwrap().count(), 0);
    assert_eq!(images.import(&path, None, &Cancel::never()).unwrap().len(), 1);
}

#[test]
fn pinned_by_pattern_and_by_id() {
    let dir = tempfile::tempdir().unwrap();
    let (archive, id, _) = oci_archive(Some("q.io/platform/x:1"), "", &[&tar(&[("a", b"1")])]);
    for (pinned, expected) in [("q.io/platform/*", true), ("*/x:2", false), (&id, true)] {
        let mut settings = Settings::new(&dir.path().join("root"));
        settings.pinned = vec![pinned.to_owned()];
        let images = Images::open(settings).unwrap();
        assert_eq!(import(&images, dir.path(), &archive).unwrap()[0].pinned, expected, "{pinned}");
    }
}
