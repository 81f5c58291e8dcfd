//! Images to pull: made once under target/, the same bytes every time, straight in the form in which docker-registry keeps them.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crisp::image::{Digest, Platform};
use flate2::write::GzEncoder;
use flate2::Compression as Level;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::daemon::tool;
use crate::progress;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Files in one directory.
const PER_DIRECTORY: usize = 50;
/// What a file's data comes in: noise and text by turns, so that half of it compresses.
const PIECE: usize = 4096;
const BLOCK: u64 = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Gzip,
    Zstd,
}

/// An image to make.
#[derive(Clone, Copy)]
pub struct Recipe {
    pub name: &'static str,
    pub layers: usize,
    /// Data of all its files.
    pub bytes: u64,
    pub compression: Compression,
}

/// What was made.
#[derive(Clone, Serialize, Deserialize)]
pub struct Made {
    /// `bench/NAME:SIZE`
    pub reference: String,
    /// On disk: whole blocks, a block for each directory and link.
    pub unpacked: u64,
    pub compressed: u64,
}

/// Where docker-registry finds them.
pub fn storage() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench-images")
}

/// A generator of numbers that is the same everywhere (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Many small files, some large ones: sizes as in distributions' packages.
    fn size(&mut self) -> u64 {
        match self.below(100) {
            0 => (1 << 20) + self.below(7 << 20),
            1..=14 => (16 << 10) + self.below(240 << 10),
            _ => 200 << self.below(7),
        }
    }

    fn data(&mut self, size: u64) -> Vec<u8> {
        const WORDS: [&str; 8] = ["layer ", "image ", "sandbox ", "digest\n", "container ", "the ", "of ", "0x00ff, "];
        let mut data = Vec::with_capacity(size as usize + PIECE);
        while (data.len() as u64) < size {
            let end = data.len() + PIECE;
            if (data.len() / PIECE) % 2 == 0 {
                while data.len() < end {
                    data.extend_from_slice(&self.next().to_le_bytes());
                }
            } else {
                while data.len() < end {
                    data.extend_from_slice(WORDS[self.below(8) as usize].as_bytes());
                }
                data.truncate(end);
            }
        }
        data.truncate(size as usize);
        data
    }
}

/// Hashes and counts what is written through it.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Hashing<W> {
        Hashing { inner, hash: Sha256::new(), bytes: 0 }
    }

    fn digest(self) -> (W, String, u64) {
        let hex: String = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        (self.inner, format!("sha256:{hex}"), self.bytes)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(data)?;
        self.hash.update(&data[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// One layer's tar; the bytes its files take on disk.
fn write_layer(out: impl Write, number: usize, bytes: u64) -> u64 {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1));
    let mut tar = tar::Builder::new(out);
    let (mut data, mut disk, mut files) = (0, 0, 0usize);
    let header = |kind: tar::EntryType, size: u64, mode: u32| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(mode);
        header.set_mtime(1_700_000_000);
        header
    };
    while data < bytes {
        let dir = format!("usr/share/layer{number}/{}", files / PER_DIRECTORY);
        if files % PER_DIRECTORY == 0 {
            tar.append_data(&mut header(tar::EntryType::Directory, 0, 0o755), format!("{dir}/"), &[][..]).expect("write a layer");
            disk += BLOCK;
        }
        let size = numbers.size().min(bytes - data);
        let content = numbers.data(size);
        tar.append_data(&mut header(tar::EntryType::Regular, size, 0o644), format!("{dir}/f{files}"), &content[..]).expect("write a layer");
        disk += size.div_ceil(BLOCK) * BLOCK;
        data += size;
        files += 1;
    }
    tar.into_inner().expect("end a layer").flush().expect("end a layer");
    disk
}

/// The registry's own form: blobs by digest, and links that say what a repository has.
struct Storage {
    root: PathBuf,
    repository: PathBuf,
}

impl Storage {
    fn new(repository: &str) -> Storage {
        let root = storage().join("docker/registry/v2");
        Storage { repository: root.join("repositories").join(repository), root }
    }

    fn place(&self, digest: &str) -> PathBuf {
        let hex = &digest["sha256:".len()..];
        let dir = self.root.join("blobs/sha256").join(&hex[..2]).join(hex);
        fs::create_dir_all(&dir).expect("make a directory");
        dir.join("data")
    }

    fn link(&self, path: &str, digest: &str) {
        let dir = self.repository.join(path);
        fs::create_dir_all(&dir).expect("make a directory");
        fs::write(dir.join("link"), digest).expect("write a link");
    }

    fn blob(&self, kind: &str, digest: &str, size: u64) -> serde_json::Value {
        self.link(&format!("_layers/sha256/{}", &digest["sha256:".len()..]), digest);
        json!({ "mediaType": kind, "digest": digest, "size": size })
    }

    fn document(&self, kind: &str, document: &serde_json::Value) -> serde_json::Value {
        let data = document.to_string().into_bytes();
        let digest = Digest::of(&data).as_str().to_owned();
        fs::write(self.place(&digest), &data).expect("write a blob");
        self.blob(kind, &digest, data.len() as u64)
    }
}

/// Makes an image, unless it has been made before.
pub fn make(recipe: Recipe) -> Made {
    let facts = storage().join(format!("{}-{}.json", recipe.name, recipe.bytes));
    if let Some(made) = fs::read(&facts).ok().and_then(|data| serde_json::from_slice(&data).ok()) {
        return made;
    }
    let repository = format!("bench/{}", recipe.name);
    let tag = (recipe.bytes >> 20).to_string();
    let storage = Storage::new(&repository);
    fs::create_dir_all(&storage.root).expect("make a directory");
    let (mut layers, mut diff_ids, mut unpacked, mut compressed) = (Vec::new(), Vec::new(), 0, 0);
    for number in 0..recipe.layers {
        progress(&format!("making {repository}: layer {} of {}", number + 1, recipe.layers));
        let part = storage.root.join("part");
        let (diff_id, digest, size, disk) = layer(&part, number, recipe.bytes / recipe.layers as u64, recipe.compression);
        fs::rename(&part, storage.place(&digest)).expect("move a layer");
        let kind = if recipe.compression == Compression::Gzip { "gzip" } else { "zstd" };
        layers.push(storage.blob(&format!("{LAYER}+{kind}"), &digest, size));
        diff_ids.push(diff_id);
        (unpacked, compressed) = (unpacked + disk, compressed + size);
    }
    let platform = Platform::host();
    let config = json!({
        "os": platform.os, "architecture": platform.architecture, "config": { "Cmd": ["/bin/true"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = storage.document(CONFIG, &config);
    let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
    let manifest = storage.document(MANIFEST, &manifest);
    let digest = manifest["digest"].as_str().expect("a digest");
    let hex = &digest["sha256:".len()..];
    for path in [
        format!("_manifests/revisions/sha256/{hex}"),
        format!("_manifests/tags/{tag}/current"),
        format!("_manifests/tags/{tag}/index/sha256/{hex}"),
    ] {
        storage.link(&path, digest);
    }
    let made = Made { reference: format!("{repository}:{tag}"), unpacked, compressed };
    fs::write(facts, serde_json::to_vec(&made).expect("JSON")).expect("write what was made");
    made
}

/// Writes a layer; its diff ID, digest, size, and the bytes it takes unpacked.
fn layer(path: &Path, number: usize, bytes: u64, compression: Compression) -> (String, String, u64, u64) {
    let file = || BufWriter::with_capacity(1 << 20, File::create(path).expect("make a layer"));
    if compression == Compression::Gzip {
        let mut plain = Hashing::new(GzEncoder::new(Hashing::new(file()), Level::default()));
        let disk = write_layer(&mut plain, number, bytes);
        let (encoder, diff_id, _) = plain.digest();
        let (mut file, digest, size) = encoder.finish().expect("end a layer").digest();
        file.flush().expect("end a layer");
        return (diff_id, digest, size, disk);
    }
    let tar = path.with_extension("tar");
    let mut plain = Hashing::new(BufWriter::with_capacity(1 << 20, File::create(&tar).expect("make a layer")));
    let disk = write_layer(&mut plain, number, bytes);
    let (_, diff_id, _) = plain.digest();
    let (from, to) = (tar.display().to_string(), path.display().to_string());
    tool("zstd", &["-q", "-f", "-3", "--rm", "-o", &to, &from]);
    let mut packed = Hashing::new(std::io::sink());
    let mut file = File::open(path).expect("open a layer");
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).expect("read a layer");
        if n == 0 {
            break;
        }
        packed.write_all(&buffer[..n]).expect("hash a layer");
    }
    let (_, digest, size) = packed.digest();
    (diff_id, digest, size, disk)
}
