//! Images for one test, as docker-archives: layers of what the test says.

use std::fs;
use std::path::Path;

use serde_json::{json, Value};
use sha2::{Digest, Sha256};
use tar::EntryType;

use crate::daemon::find;

/// A layer that is being written.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Layer {
        Layer(tar::Builder::new(Vec::new()))
    }

    /// With a shell: busybox and the applets that the tests of mounts need.
    pub fn busybox() -> Layer {
        let program = fs::read(find("busybox").expect("busybox is installed")).expect("read busybox");
        let mut layer = Layer::new().file("bin/busybox", &program, 0o755);
        for applet in [
            "sh", "cat", "grep", "id", "ls", "mkdir", "mount", "readlink", "sleep", "stat", "touch", "umount", "head", "wc", "test",
            "usleep", "echo", "true",
        ] {
            layer = layer.link(&format!("bin/{applet}"), "busybox");
        }
        layer
    }

    fn add(mut self, path: &str, kind: EntryType, mode: u32, owner: u64, target: &str, data: &[u8]) -> Layer {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        match target {
            "" => self.0.append_data(&mut header, path, data).expect("write to memory"),
            target => self.0.append_link(&mut header, path, target).expect("write to memory"),
        }
        self
    }

    pub fn dir(self, path: &str, mode: u32, owner: u64) -> Layer {
        self.add(path, EntryType::Directory, mode, owner, "", &[])
    }

    pub fn file(self, path: &str, data: &[u8], mode: u32) -> Layer {
        self.add(path, EntryType::Regular, mode, 0, "", data)
    }

    pub fn link(self, path: &str, target: &str) -> Layer {
        self.add(path, EntryType::Symlink, 0o777, 0, target, &[])
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("write to memory")
    }
}

fn digest(data: &[u8]) -> String {
    let hex: String = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Writes an image of these layers, lowest first; `config` is its `config` object. Its id.
pub fn write(path: &Path, tag: &str, layers: Vec<Layer>, config: Value) -> String {
    let layers: Vec<Vec<u8>> = layers.into_iter().map(Layer::bytes).collect();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
    let document = json!({
        "architecture": architecture, "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let names: Vec<String> = (0..layers.len()).map(|n| format!("{n}.tar")).collect();
    let manifest = json!([{"Config": "config.json", "RepoTags": [tag], "Layers": names}]);
    let mut archive = Layer::new().file("manifest.json", manifest.to_string().as_bytes(), 0o644).file(
        "config.json",
        document.to_string().as_bytes(),
        0o644,
    );
    for (name, layer) in names.iter().zip(&layers) {
        archive = archive.file(name, layer, 0o644);
    }
    fs::write(path, archive.bytes()).expect("write the archive");
    digest(document.to_string().as_bytes())
}
