//! The images that are here: records on disk, and what lists and lookups see in memory.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;

use super::digest::{chain_ids, is_hex, Digest};
use super::layers::{Layers, Usage};
use super::manifest::{self, Descriptor, Document, Platform};
use super::metadata::{Layout, Record};
use super::reference::{Reference, Version};
use super::Bounds;
use crate::error::{Context, Error, Result};
use crate::sys::file::{self, Durability};
use crate::sys::lock::{Lock, Rank};

/// Shortest prefix that is looked up as an id. Shorter words are names that were not found: a pod that asks for the image
/// `cafe` must not get whatever image's id begins so.
const PREFIX_MIN: usize = 6;

/// An image that is here, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// The config's digest, `sha256:…`: the one id of an image.
    pub id: String,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    /// Bytes of manifest, config and layers as the registry has them (compressed), as containerd counts.
    pub size: u64,
    pub config: Arc<ImageConfiguration>,
    /// Chain IDs, lowest layer first.
    pub chain: Vec<String>,
    /// Not to be removed by kubelet's image GC.
    pub pinned: bool,
}

impl Image {
    /// The config's USER before the colon: a uid or a user name; "" when there is none.
    pub fn user(&self) -> &str {
        let user = self.config.config().as_ref().and_then(|c| c.user().as_deref()).unwrap_or_default();
        user.split(':').next().unwrap_or_default()
    }

    /// `user` as a number, when it is one.
    pub fn uid(&self) -> Option<i64> {
        self.user().parse::<u32>().ok().map(i64::from)
    }

    /// Paths of the image's volumes, sorted.
    pub fn volumes(&self) -> Vec<String> {
        self.config.config().as_ref().and_then(|c| c.volumes().clone()).unwrap_or_default()
    }

    pub fn stop_signal(&self) -> Option<&str> {
        self.config.config().as_ref().and_then(|c| c.stop_signal().as_deref()).filter(|s| !s.is_empty())
    }

    pub fn labels(&self) -> HashMap<String, String> {
        self.config.config().as_ref().and_then(|c| c.labels().clone()).unwrap_or_default()
    }
}

/// What does not change about an image, whatever it is called.
#[derive(Clone)]
struct Body {
    size: u64,
    config: Arc<ImageConfiguration>,
    chain: Vec<Digest>,
}

#[derive(Clone)]
struct Known {
    record: Record,
    id: Digest,
}

#[derive(Default)]
struct State {
    known: Vec<Known>,
    bodies: HashMap<Digest, Body>,
    /// Whole images by id; one with a missing layer is in `bodies` alone.
    images: HashMap<Digest, Arc<Image>>,
    names: HashMap<String, Digest>,
}

/// The catalog. Changes are made by one at a time: written first, seen then.
pub struct Catalog {
    layout: Layout,
    bounds: Bounds,
    platform: Platform,
    pinned: HashSet<String>,
    writer: Lock<()>,
    state: Lock<State>,
}

/// A new image to record, its layers being there.
pub struct Addition<'a> {
    pub manifest: &'a Descriptor,
    pub manifest_data: &'a [u8],
    pub config_data: &'a [u8],
    /// `repository:tag` and `repository@digest`, normalised. They are taken from whatever image has them.
    pub names: &'a [String],
}

impl Catalog {
    /// Restores the catalog. False beside it when the index was unreadable: layers must not be collected then, a pull
    /// will want them again.
    pub fn open(
        dir: &Path,
        quarantine: &Path,
        bounds: Bounds,
        platform: Platform,
        pinned: &[String],
        layers: &Layers,
    ) -> Result<(Catalog, bool)> {
        let layout = Layout::open(dir)?;
        let pinned =
            pinned.iter().map(|p| Reference::parse(p).map(|r| r.to_string())).collect::<Result<_>>().context(|| "pinned images")?;
        let loaded = layout.load(quarantine)?;
        let trusted = loaded.is_some();
        let catalog = Catalog {
            layout,
            bounds,
            platform,
            pinned,
            writer: Lock::new(Rank::Names, ()),
            state: Lock::new(Rank::Index, State::default()),
        };
        let mut state = State::default();
        for (i, record) in loaded.unwrap_or_default().into_iter().enumerate() {
            match catalog.read(&record.manifest) {
                Ok((id, body)) => {
                    state.bodies.insert(id.clone(), body);
                    state.known.push(Known { record, id });
                }
                Err(e) => {
                    let name = record.name.clone().unwrap_or_else(|| record.manifest.digest.to_string());
                    log::error!("image: record of {name}: {e}; quarantined");
                    quarantine_record(quarantine, i, &record)?;
                }
            }
        }
        catalog.rebuild(&mut state, layers);
        *catalog.state.lock() = state;
        Ok((catalog, trusted))
    }

    fn read(&self, descriptor: &Descriptor) -> Result<(Digest, Body)> {
        let data = self.layout.read_blob(&descriptor.digest, self.bounds.max_manifest_bytes)?;
        let Document::Manifest(manifest) = manifest::parse(&data, &descriptor.media_type)? else {
            return Err(Error::internal(format!("{} is not an image manifest", descriptor.digest)));
        };
        let data = self.layout.read_blob(&manifest.config.digest, self.bounds.max_config_bytes)?;
        let (config, diff_ids) = manifest::parse_config(&data, manifest.layers.len(), &self.platform)?;
        let size = descriptor.size + manifest.config.size + manifest.layers.iter().map(|l| l.size).sum::<u64>();
        Ok((manifest.config.digest, Body { size, config: Arc::new(config), chain: chain_ids(&diff_ids) }))
    }

    /// Makes the visible images from the records.
    fn rebuild(&self, state: &mut State, layers: &Layers) {
        state.names.clear();
        let mut by_id: HashMap<Digest, (BTreeSet<String>, BTreeSet<String>)> = HashMap::new();
        for known in &state.known {
            let (tags, digests) = by_id.entry(known.id.clone()).or_default();
            let Some(name) = &known.record.name else { continue };
            state.names.insert(name.clone(), known.id.clone());
            if name.contains('@') {
                digests.insert(name.clone());
            } else {
                tags.insert(name.clone());
            }
        }
        state.bodies.retain(|id, _| by_id.contains_key(id));
        state.images.clear();
        for (id, (tags, digests)) in by_id {
            let Some(body) = state.bodies.get(&id) else { continue };
            if let Some(missing) = body.chain.iter().find(|c| !layers.is_ready(c)) {
                log::warn!("image: {id} lacks layer {missing}; it must be pulled again");
                continue;
            }
            let image = Image {
                id: id.to_string(),
                pinned: tags.iter().chain(&digests).any(|n| self.pinned.contains(n)),
                repo_tags: tags.into_iter().collect(),
                repo_digests: digests.into_iter().collect(),
                size: body.size,
                config: body.config.clone(),
                chain: body.chain.iter().map(|c| c.to_string()).collect(),
            };
            state.images.insert(id, Arc::new(image));
        }
    }

    /// Records an image. Its layers are there and held by the caller.
    pub fn add(&self, addition: &Addition, layers: &Layers) -> Result<Arc<Image>> {
        let _writer = self.writer.lock();
        self.layout.write_blob(&Digest::of(addition.config_data), addition.config_data)?;
        self.layout.write_blob(&addition.manifest.digest, addition.manifest_data)?;
        let (id, body) = self.read(addition.manifest)?;
        let mut known: Vec<Known> = Vec::new();
        let mut displaced: Vec<Known> = Vec::new();
        for old in self.state.lock().known.iter() {
            match &old.record.name {
                Some(name) if addition.names.contains(name) => displaced.push(old.clone()),
                // A nameless record of this image has served its time.
                None if old.id == id => {}
                _ => known.push(old.clone()),
            }
        }
        // An image that lost its last name stays until it is removed by id.
        for old in displaced {
            if old.id != id && !known.iter().any(|k| k.id == old.id) {
                known.push(Known { record: Record { name: None, manifest: old.record.manifest }, id: old.id });
            }
        }
        let record =
            |name: Option<&String>| Known { record: Record { name: name.cloned(), manifest: addition.manifest.clone() }, id: id.clone() };
        known.extend(addition.names.iter().map(|n| record(Some(n))));
        if !known.iter().any(|k| k.id == id) {
            known.push(record(None));
        }
        self.replace(known, Some((id.clone(), body)), layers)?;
        self.state.lock().images.get(&id).cloned().ok_or_else(|| Error::internal(format!("image {id} lost a layer while it was recorded")))
    }

    /// Forgets an image with all its names. Its layers are the caller's to collect.
    pub fn remove(&self, id: &Digest, layers: &Layers) -> Result<()> {
        let _writer = self.writer.lock();
        let known: Vec<Known> = self.state.lock().known.iter().filter(|k| k.id != *id).cloned().collect();
        self.replace(known, None, layers)?;
        let keep = {
            let state = self.state.lock();
            state.known.iter().flat_map(|k| [k.id.clone(), k.record.manifest.digest.clone()]).collect()
        };
        self.layout.keep_blobs(&keep)
    }

    fn replace(&self, known: Vec<Known>, body: Option<(Digest, Body)>, layers: &Layers) -> Result<()> {
        let records: Vec<Record> = known.iter().map(|k| k.record.clone()).collect();
        self.layout.save(&records)?;
        let mut state = self.state.lock();
        state.known = known;
        state.bodies.extend(body);
        self.rebuild(&mut state, layers);
        Ok(())
    }

    /// Finds an image by id (with or without `sha256:`), tag, digest or unique prefix of an id.
    pub fn find(&self, text: &str) -> Result<Option<Arc<Image>>> {
        let state = self.state.lock();
        Ok(resolve(&state, text)?.and_then(|id| state.images.get(&id).cloned()))
    }

    /// The id behind a reference, of images with missing layers too.
    pub fn find_id(&self, text: &str) -> Result<Option<Digest>> {
        resolve(&self.state.lock(), text)
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        let mut all: Vec<Arc<Image>> = self.state.lock().images.values().cloned().collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// Chain IDs that some record needs.
    pub fn used(&self) -> HashSet<Digest> {
        self.state.lock().bodies.values().flat_map(|b| b.chain.iter().cloned()).collect()
    }

    /// Disk space of manifests and configs, estimated at two blocks an image and record.
    pub fn usage(&self) -> Usage {
        let state = self.state.lock();
        let files = (state.known.len() + state.bodies.len()) as u64;
        Usage { bytes: files * 4096, inodes: files }
    }
}

fn resolve(state: &State, text: &str) -> Result<Option<Digest>> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    if is_hex(hex, 64) {
        let id = Digest::parse(&format!("sha256:{hex}"))?;
        return Ok(Some(id).filter(|id| state.bodies.contains_key(id)));
    }
    let prefixed = hex.len() >= PREFIX_MIN && is_hex(hex, hex.len());
    let reference = match Reference::parse(text) {
        Ok(reference) => Some(reference),
        Err(_) if prefixed => None,
        Err(e) => return Err(e),
    };
    if let Some(reference) = reference {
        if let Some(id) = state.names.get(&reference.to_string()) {
            return Ok(Some(id.clone()));
        }
        // `repository@digest` where the digest is the image's id.
        if let Version::Digest(digest) = reference.version() {
            let repository = reference.repository();
            let belongs = |k: &Known| k.id == *digest && k.record.name.as_deref().is_some_and(|n| n.starts_with(&repository));
            return Ok(state.known.iter().find(|k| belongs(k)).map(|k| k.id.clone()));
        }
    }
    if !prefixed {
        return Ok(None);
    }
    let mut found = state.bodies.keys().filter(|id| id.hex().starts_with(hex));
    match (found.next(), found.next()) {
        (Some(_), Some(_)) => Err(Error::invalid(format!("image id {text} is ambiguous"))),
        (found, _) => Ok(found.cloned()),
    }
}

fn quarantine_record(dir: &Path, i: usize, record: &Record) -> Result<()> {
    file::make_dir(dir, 0o700)?;
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let path: PathBuf = dir.join(format!("image-{stamp}-{i}.json"));
    let text = serde_json::json!({ "name": record.name, "manifest": record.manifest });
    file::write(&path, text.to_string().as_bytes(), 0o600, Durability::Atomic)
}
