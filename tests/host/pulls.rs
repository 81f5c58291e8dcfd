//! Pulls that are cut off: by a kill at each step, and by a full disk. And what a large one costs.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crisp::api::runtime::{ImageSpec, ListImagesRequest, PullImageRequest, RemoveImageRequest};
use crisp::image::{Images, Settings};
use crisp::sys::cancel::Cancel;
use nix::sys::signal::Signal;

use crate::daemon::{crispd, patience, tool, Kind};
use crate::harness::{kind, Host};
use crate::registry::Registry;

/// An OCI layout with one image of gzipped layers, each of one file of random bytes and one of zeros; pushed. The reference.
fn push(registry: &Registry, dir: &Path, name: &str, layers: &[(usize, usize)]) -> String {
    let layout = dir.join(name);
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |kind: &str, data: &[u8]| {
        let digest = crisp::image::Digest::of(data);
        std::fs::write(blobs.join(digest.hex()), data).unwrap();
        serde_json::json!({"mediaType": kind, "digest": digest.as_str(), "size": data.len()})
    };
    let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
    for (number, (random, zeros)) in layers.iter().enumerate() {
        let mut noise = vec![0u8; *random];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut noise).unwrap();
        let mut tar = tar::Builder::new(Vec::new());
        for (file, data) in [("noise", noise), ("zeros", vec![0; *zeros])] {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("layer{number}/{file}"), &data[..]).unwrap();
        }
        let plain = tar.into_inner().unwrap();
        diff_ids.push(crisp::image::Digest::of(&plain).to_string());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        descriptors.push(put("application/vnd.oci.image.layer.v1.tar+gzip", &gzip.finish().unwrap()));
    }
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = serde_json::json!({
        "os": "linux", "architecture": architecture, "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors});
    let mut top = put(MANIFEST, manifest.to_string().as_bytes());
    top["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "it"});
    std::fs::write(layout.join("index.json"), serde_json::json!({"schemaVersion": 2, "manifests": [top]}).to_string()).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let reference = format!("{}/{name}:1", registry.host);
    let source = format!("oci:{}:it", layout.display());
    tool("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &source, &format!("docker://{reference}")]);
    reference
}

/// Finished layers with the inode of their marker, and the names of everything else.
fn layers(dir: &Path) -> (BTreeMap<String, u64>, Vec<String>) {
    let (mut finished, mut other) = (BTreeMap::new(), Vec::new());
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match entry.path().join("layer.json").metadata() {
            Ok(marker) => drop(finished.insert(name, marker.ino())),
            Err(_) => other.push(name),
        }
    }
    (finished, other)
}

/// What is deleted goes behind our back.
fn settled(dir: &Path) -> BTreeMap<String, u64> {
    let end = Instant::now() + patience(Duration::from_secs(20));
    loop {
        let (finished, other) = layers(dir);
        if other.is_empty() {
            return finished;
        }
        assert!(Instant::now() < end, "left over: {other:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn spec(reference: &str) -> protobuf::MessageField<ImageSpec> {
    Some(ImageSpec { image: reference.to_owned(), ..Default::default() }).into()
}

fn pull(host: &Host, reference: &str) -> Result<String, grpcio::Error> {
    let request = PullImageRequest { image: spec(reference), ..Default::default() };
    host.client.call(&request).map(|answer| answer.image_ref)
}

#[test]
fn a_crash_at_each_step_of_a_pull_costs_the_unfinished_layers_alone() {
    if kind() != Kind::Crispd {
        return;
    }
    let steps = tool(&crispd().display().to_string(), &["debug", "steps"]);
    let steps: Vec<_> = steps.lines().map(str::trim).filter(|line| line.starts_with("pull:")).collect();
    assert!(steps.len() >= 8, "{steps:?}");
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let reference = push(&registry, dir.path(), "cut", &[(1000, 5000), (200_000, 10), (10, 3_000_000)]);
    let mut host = Host::start();
    let store: PathBuf = host.daemon.layout.path("root/layers");
    let before = settled(&store);
    for step in steps {
        host.daemon.stop(Signal::SIGTERM);
        host.daemon.options.environment = vec![("CRISP_CRASH_AT".into(), step.into())];
        host.daemon.run();
        host.daemon.wait_ready();
        pull(&host, &reference).expect_err(step);
        let begin = Instant::now();
        while host.daemon.ended().is_none() {
            assert!(begin.elapsed() < patience(Duration::from_secs(10)), "{step}: no crash");
            std::thread::sleep(Duration::from_millis(10));
        }
        let (finished, _) = layers(&store);
        host.daemon.options.environment.clear();
        host.daemon.stop(Signal::SIGKILL);
        host.daemon.run();
        host.daemon.wait_ready();
        let whole = |host: &Host| host.call(&ListImagesRequest::default()).images.iter().any(|i| i.repo_tags.contains(&reference));
        assert_eq!(whole(&host), step == "pull:8-recorded", "after a crash at {step}");
        // Layers that no image needs yet may go at a start; those that stay are not made anew.
        let kept = settled(&store);
        assert!(kept.iter().all(|(name, marker)| finished.get(name) == Some(marker)), "after a crash at {step}");
        pull(&host, &reference).unwrap_or_else(|e| panic!("after a crash at {step}: {e}"));
        let now = settled(&store);
        assert_eq!(now.len(), before.len() + 3, "after a crash at {step}");
        assert!(kept.iter().all(|(name, marker)| now.get(name) == Some(marker)), "{step}: a finished layer was made again");
        host.call(&RemoveImageRequest { image: spec(&reference), ..Default::default() });
        assert_eq!(settled(&store), before, "after a crash at {step}");
    }
    host.finish();
}

#[test]
fn the_daemon_stays_small_while_it_pulls() {
    if kind() != Kind::Crispd {
        return;
    }
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let reference = push(&registry, dir.path(), "large", &[(10 << 20, 200 << 20), (10 << 20, 1000), (10 << 20, 1000), (10 << 20, 1000)]);
    let host = Host::start();
    pull(&host, &reference).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.daemon.pid())).unwrap();
    let peak: u64 = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok()).unwrap();
    assert!(peak < 64 << 10, "the daemon had {peak} KiB of 65536");
    host.call(&RemoveImageRequest { image: spec(&reference), ..Default::default() });
    host.finish();
}

/// An ext4 of 64 MiB in a file.
struct Small {
    dir: tempfile::TempDir,
}

impl Small {
    fn new() -> Small {
        let dir = tempfile::tempdir().unwrap();
        let (file, place) = (dir.path().join("disk"), dir.path().join("fs"));
        std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        std::fs::create_dir(&place).unwrap();
        tool("mkfs.ext4", &["-q", "-m", "0", &file.display().to_string()]);
        tool("mount", &["-o", "loop", &file.display().to_string(), &place.display().to_string()]);
        Small { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("fs/root")
    }

    fn free(&self) -> u64 {
        let fs = rustix::fs::statvfs(self.dir.path().join("fs")).unwrap();
        fs.f_bavail * fs.f_frsize
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        tool("umount", &[&self.dir.path().join("fs").display().to_string()]);
    }
}

#[test]
fn a_full_disk_is_resource_exhausted_and_left_as_it_was() {
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let one_file = push(&registry, dir.path(), "one", &[(1000, 1000), (1000, 100 << 20)]);
    let dense = push(&registry, dir.path(), "dense", &[(70 << 20, 0)]);
    let fits = push(&registry, dir.path(), "fits", &[(1000, 10 << 20)]);
    for keep_free in [0, 10] {
        let disk = Small::new();
        let mut settings = Settings::new(&disk.root());
        settings.bounds.keep_free = keep_free;
        let images = Images::open(settings).unwrap();
        let whole = disk.free();
        for reference in [&one_file, &dense] {
            let e = images.pull(reference, None, &Cancel::never(), None).unwrap_err();
            assert_eq!(e.code(), crisp::error::Code::ResourceExhausted, "{e}");
            assert!(e.message().contains("no room in"), "{e}");
            let free = disk.free();
            assert!(free > whole - (1 << 20), "{free} of {whole} bytes are free after {reference}");
        }
        assert!(images.list().is_empty());
        assert_eq!(layers(&disk.root().join("layers")).1, Vec::<String>::new());
        images.pull(&fits, None, &Cancel::never(), None).unwrap();
        drop(images);
    }
}

/// The space may go between two looks: the write itself says so then.
#[test]
fn a_disk_that_fills_up_meanwhile_is_resource_exhausted_too() {
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let disk = Small::new();
    let mut settings = Settings::new(&disk.root());
    settings.bounds.keep_free = 0;
    let images = Images::open(settings).unwrap();
    // Fits by what is seen of it before each file, each too small to be looked for alone: 900 KiB are left for 1000.
    let small = push(&registry, dir.path(), "small", &[(500_000, 500_000)]);
    let mut rest = std::fs::File::create(disk.dir.path().join("fs/rest")).unwrap();
    let mut left = disk.free().saturating_sub(900 << 10);
    while left > 0 {
        let part = left.min(1 << 20);
        rest.write_all(&vec![1; part as usize]).unwrap();
        left -= part;
    }
    rest.sync_all().unwrap();
    let e = images.pull(&small, None, &Cancel::never(), None).unwrap_err();
    assert_eq!(e.code(), crisp::error::Code::ResourceExhausted, "{e}");
    assert_eq!(layers(&disk.root().join("layers")), (BTreeMap::new(), vec![]));
    drop(rest);
    std::fs::remove_file(disk.dir.path().join("fs/rest")).unwrap();
    images.pull(&small, None, &Cancel::never(), None).unwrap();
    drop(images);
}
