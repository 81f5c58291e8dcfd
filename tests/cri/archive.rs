//! A small image of one layer, as a docker-archive and as the documents of a registry.

use std::path::Path;

use serde_json::{json, Value};
use sha2::{Digest, Sha256};

/// The tag of the image in the archive.
pub const IMAGE: &str = "localhost/test:1";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n";
const GROUP: &str = "root:x:0:\napp:x:1001:\nextra:x:2000:app\n";

/// `sha256:` and the digest of `data`.
pub fn digest(data: &[u8]) -> String {
    let hex: String = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn append(tar: &mut tar::Builder<Vec<u8>>, path: &str, data: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(data.len() as u64);
    tar.append_data(&mut header, path, data).expect("write to memory");
}

/// A layer with users and groups, and `mark` in the file /mark.
pub fn layer(mark: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, "etc/passwd", PASSWD.as_bytes());
    append(&mut tar, "etc/group", GROUP.as_bytes());
    append(&mut tar, "mark", mark.as_bytes());
    tar.into_inner().expect("write to memory")
}

/// The image configuration over one layer; `config` is its `config` object.
pub fn configuration(layer: &[u8], config: Value) -> Vec<u8> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let document = json!({
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
    });
    document.to_string().into_bytes()
}

/// Writes a docker-archive with one image; its id.
pub fn write(path: &Path, tag: &str, mark: &str, config: Value) -> String {
    let layer = layer(mark);
    let configuration = configuration(&layer, config);
    let manifest = json!([{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]);
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, "manifest.json", manifest.to_string().as_bytes());
    append(&mut tar, "config.json", &configuration);
    append(&mut tar, "layer.tar", &layer);
    std::fs::write(path, tar.into_inner().expect("write to memory")).expect("write the archive");
    digest(&configuration)
}
