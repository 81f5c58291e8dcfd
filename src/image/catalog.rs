//! The images that are here: records on disk, and what lists and lookups see in memory.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;

use super::digest::{chain_ids, is_hex, Digest};
use super::fsck::{Checked, Part, Problem};
use super::layers::{Layers, Usage};
use super::manifest::{self, Descriptor, Document};
use super::metadata::{quarantine_file, Layout, Record};
use super::pins::Pins;
use super::reference::{Reference, Version};
use super::Bounds;
use crate::error::{Error, Result};
use crate::sys::file::{self, Durability};
use crate::sys::lock::{Lock, Rank};

/// Shortest prefix that is looked up as an id. Shorter words are names that were not found: a pod that asks for the image
/// `cafe` must not get whatever image's id begins so.
pub const PREFIX_MIN: usize = 6;

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

/// An image that is known and not usable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incomplete {
    pub id: String,
    /// Tags, then digests.
    pub names: Vec<String>,
    /// What is missing, or why.
    pub reason: String,
    /// Not to be removed by who cleans up.
    pub pinned: bool,
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
    /// The others.
    incomplete: HashMap<Digest, Incomplete>,
    names: HashMap<String, Digest>,
    /// Manifests and configs whose blob on disk is not what it was, with what is wrong.
    damaged: HashMap<Digest, String>,
}

/// The catalog. Changes are made by one at a time: written first, seen then.
pub struct Catalog {
    layout: Layout,
    bounds: Bounds,
    pins: Pins,
    /// False once the index or a record was lost: blobs that no record names stay then, and layers, until a repair.
    trusted: AtomicBool,
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
    /// Restores the catalog. False beside it when the index or a record was unreadable: layers that nothing seems to need
    /// must stay then, a pull will want them again.
    pub fn open(dir: &Path, quarantine: &Path, bounds: Bounds, pinned: &[String], layers: &Layers) -> Result<(Catalog, bool)> {
        let layout = Layout::open(dir)?;
        let pins = Pins::new(pinned)?;
        let loaded = layout.load(quarantine)?;
        let mut trusted = loaded.is_some();
        let catalog = Catalog {
            layout,
            bounds,
            pins,
            trusted: AtomicBool::new(true),
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
                    trusted = false;
                    quarantine_record(quarantine, i, &record)?;
                }
            }
        }
        catalog.rebuild(&mut state, layers);
        *catalog.state.lock() = state;
        catalog.trusted.store(trusted, Ordering::Relaxed);
        Ok((catalog, trusted))
    }

    fn read(&self, descriptor: &Descriptor) -> Result<(Digest, Body)> {
        let data = self.layout.read_blob(&descriptor.digest, self.bounds.max_manifest_bytes)?;
        let Document::Manifest(manifest) = manifest::parse(&data, &descriptor.media_type)? else {
            return Err(Error::internal(format!("{} is not an image manifest", descriptor.digest)));
        };
        let data = self.layout.read_blob(&manifest.config.digest, self.bounds.max_config_bytes)?;
        let (config, diff_ids) = manifest::parse_config(&data, manifest.layers.len())?;
        let sizes = [descriptor.size, manifest.config.size].into_iter().chain(manifest.layers.iter().map(|layer| layer.size));
        let size = sizes.fold(0, u64::saturating_add);
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
        let before = std::mem::take(&mut state.incomplete);
        for (id, (tags, digests)) in by_id {
            let Some(body) = state.bodies.get(&id) else { continue };
            let blobs = state.known.iter().filter(|k| k.id == id).map(|k| &k.record.manifest.digest).chain([&id]);
            let damage = blobs.filter_map(|blob| state.damaged.get(blob).map(|why| format!("blob {blob}: {why}"))).next();
            let lack = || body.chain.iter().find(|c| !layers.is_ready(c)).map(|c| layers.why_missing(c));
            if let Some(reason) = damage.or_else(lack) {
                if !before.contains_key(&id) {
                    log::warn!("image: {id} must be pulled again: {reason}");
                }
                let names: Vec<String> = tags.into_iter().chain(digests).collect();
                let pinned = self.pins.hold(id.as_str(), names.iter());
                state.incomplete.insert(id.clone(), Incomplete { id: id.to_string(), names, reason, pinned });
                continue;
            }
            let image = Image {
                id: id.to_string(),
                pinned: self.pins.hold(id.as_str(), tags.iter().chain(&digests)),
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
        // A manifest that was damaged and may not come again: this one says the same about the image.
        let damaged = {
            let mut state = self.state.lock();
            state.damaged.remove(&id);
            state.damaged.remove(&addition.manifest.digest);
            state.damaged.clone()
        };
        let mended = |old: &Known| {
            let manifest =
                if old.id == id && damaged.contains_key(&old.record.manifest.digest) { addition.manifest } else { &old.record.manifest };
            Known { record: Record { name: old.record.name.clone(), manifest: manifest.clone() }, id: old.id.clone() }
        };
        let mut known: Vec<Known> = Vec::new();
        let mut displaced: Vec<Known> = Vec::new();
        for old in self.state.lock().known.iter() {
            match &old.record.name {
                Some(name) if addition.names.contains(name) => displaced.push(old.clone()),
                // A nameless record of this image has served its time.
                None if old.id == id => {}
                _ => known.push(mended(old)),
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
        let blobs = |known: &[Known]| known.iter().flat_map(|k| [k.id.clone(), k.record.manifest.digest.clone()]).collect::<HashSet<_>>();
        let (goes, known): (Vec<Known>, Vec<Known>) = self.state.lock().known.iter().cloned().partition(|k| k.id == *id);
        let mut keep = blobs(&known);
        self.replace(known, None, layers)?;
        // What no record names may be all that is left of an image whose record was lost.
        if !self.trusted.load(Ordering::Relaxed) {
            let goes = blobs(&goes);
            keep.extend(self.layout.blobs()?.into_iter().filter(|blob| !goes.contains(blob)));
        }
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

    /// Finds an image by id (with or without `sha256:`), tag, digest or unique prefix of an id. Text that is none of them names no
    /// image.
    pub fn find(&self, text: &str) -> Result<Option<Arc<Image>>> {
        let state = self.state.lock();
        Ok(resolve(&state, text)?.and_then(|id| state.images.get(&id).cloned()))
    }

    /// The id behind a reference, of images with missing layers too.
    pub fn find_id(&self, text: &str) -> Result<Option<Digest>> {
        resolve(&self.state.lock(), text)
    }

    /// The incomplete image behind a reference.
    pub fn incomplete(&self, text: &str) -> Result<Option<Incomplete>> {
        let state = self.state.lock();
        Ok(resolve(&state, text)?.and_then(|id| state.incomplete.get(&id).cloned()))
    }

    /// All incomplete images, by id.
    pub fn all_incomplete(&self) -> Vec<Incomplete> {
        let mut all: Vec<Incomplete> = self.state.lock().incomplete.values().cloned().collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        let mut all: Vec<Arc<Image>> = self.state.lock().images.values().cloned().collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// Looks again for layers that have gone.
    pub fn refresh(&self, layers: &Layers) {
        self.rebuild(&mut self.state.lock(), layers);
    }

    /// Names, else ids, of the images that have a layer.
    pub fn users(&self, chain_id: &Digest) -> Vec<String> {
        let state = self.state.lock();
        let ids = state.bodies.iter().filter(|(_, body)| body.chain.contains(chain_id)).map(|(id, _)| id);
        let mut users: Vec<String> = ids.map(|id| name_of(&state, id)).collect();
        users.sort();
        users
    }

    /// Verifies the index and the blobs. A repair writes the index anew, from what is known or, if that was lost, from the
    /// blobs; puts damaged blobs into quarantine; and removes what no image needs.
    pub fn check(&self, repair: bool, quarantine: &Path, layers: &Layers) -> Result<(Vec<Problem>, Checked)> {
        let _writer = self.writer.lock();
        let (known, damaged) = {
            let state = self.state.lock();
            (state.known.clone(), state.damaged.clone())
        };
        let mut problems = Vec::new();
        let mut new: Vec<Known> = Vec::new();
        let done = |words: &str| if repair { words.to_owned() } else { String::new() };
        let records: Vec<Record> = known.iter().map(|k| k.record.clone()).collect();
        if let Some(message) = self.layout.differs(&records) {
            let path = self.layout.index_path();
            if repair && path.exists() {
                quarantine_file(&path, quarantine)?;
            }
            let action = done("put into quarantine and written anew");
            problems.push(Problem { part: Part::Index, subject: path.display().to_string(), message, action, images: Vec::new() });
        }
        let needed: BTreeSet<Digest> = known.iter().flat_map(|k| [k.record.manifest.digest.clone(), k.id.clone()]).collect();
        let mut bad = HashMap::new();
        for digest in &needed {
            let limit = self.bounds.max_manifest_bytes.max(self.bounds.max_config_bytes);
            let Err(e) = self.layout.read_blob(digest, limit) else { continue };
            let path = self.layout.blob_path(digest);
            if repair && path.exists() {
                quarantine_file(&path, quarantine)?;
            }
            let images = {
                let state = self.state.lock();
                let suffer = |k: &&Known| k.id == *digest || k.record.manifest.digest == *digest;
                known.iter().filter(suffer).map(|k| name_of(&state, &k.id)).collect::<BTreeSet<_>>().into_iter().collect()
            };
            // What a check before this one has found is not done again.
            let action = if damaged.contains_key(digest) { String::new() } else { done("put into quarantine; marked for the next pull") };
            problems.push(Problem { part: Part::Blob, subject: digest.to_string(), message: e.to_string(), action, images });
            bad.insert(digest.clone(), e.to_string());
        }
        for digest in self.layout.blobs()?.into_iter().filter(|d| !needed.contains(d)) {
            // Of an index that was lost, the manifests tell what images there were, though not their names.
            let lost = if self.trusted.load(Ordering::Relaxed) { None } else { self.lost_image(&digest) };
            if let Some(found) = lost {
                let (message, action) = ("manifest of an image that the index has lost".to_owned(), done("recorded without a name"));
                let images = vec![found.id.to_string()];
                problems.push(Problem { part: Part::Index, subject: digest.to_string(), message, action, images });
                new.push(found);
            }
        }
        let mut keep: HashSet<Digest> = needed.iter().cloned().collect();
        keep.extend(new.iter().flat_map(|k| [k.record.manifest.digest.clone(), k.id.clone()]));
        for digest in self.layout.blobs()?.into_iter().filter(|d| !keep.contains(d)) {
            let (message, action) = ("blob that no image needs".to_owned(), done("removed"));
            problems.push(Problem { part: Part::Orphan, subject: digest.to_string(), message, action, images: Vec::new() });
        }
        let blobs = if repair { keep.len() } else { needed.len() };
        if repair {
            let mut bodies = Vec::new();
            for known in &new {
                bodies.push(self.read(&known.record.manifest)?);
            }
            let all: Vec<Known> = known.into_iter().chain(new).collect();
            let records: Vec<Record> = all.iter().map(|k| k.record.clone()).collect();
            self.layout.save(&records)?;
            self.layout.keep_blobs(&keep)?;
            self.trusted.store(true, Ordering::Relaxed);
            let mut state = self.state.lock();
            state.known = all;
            state.bodies.extend(bodies);
            state.damaged.extend(bad);
            self.rebuild(&mut state, layers);
        }
        let images = self.state.lock().bodies.len();
        Ok((problems, Checked { images, layers: 0, blobs }))
    }

    /// The image whose manifest a blob is.
    fn lost_image(&self, digest: &Digest) -> Option<Known> {
        let data = self.layout.read_blob(digest, self.bounds.max_manifest_bytes).ok()?;
        let Document::Manifest(_) = manifest::parse(&data, "").ok()? else { return None };
        let manifest = Descriptor::new(&manifest::media_type(&data, ""), digest.clone(), data.len() as u64);
        let (id, _) = self.read(&manifest).ok()?;
        Some(Known { record: Record { name: None, manifest }, id })
    }

    /// Chain IDs that some record needs.
    pub fn used(&self) -> HashSet<Digest> {
        self.with_used(|used| used)
    }

    /// The same for `look`; no record comes or goes while it does.
    pub fn with_used<R>(&self, look: impl FnOnce(HashSet<Digest>) -> R) -> R {
        let state = self.state.lock();
        look(state.bodies.values().flat_map(|body| body.chain.iter().cloned()).collect())
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
    if let Ok(reference) = Reference::parse(text) {
        if let Some(id) = state.names.get(&reference.to_string()) {
            return Ok(Some(id.clone()));
        }
        // `repository@digest` where the digest is the image's id.
        if let Version::Digest(digest) = reference.version() {
            let repository = reference.repository();
            let of_it = |name: &str| name.strip_prefix(&repository).is_some_and(|rest| rest.starts_with([':', '@']));
            let belongs = |k: &Known| k.id == *digest && k.record.name.as_deref().is_some_and(of_it);
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

/// The first name of an image, tags before digests; else its id.
fn name_of(state: &State, id: &Digest) -> String {
    let mut names: Vec<&String> = state.known.iter().filter(|k| k.id == *id).filter_map(|k| k.record.name.as_ref()).collect();
    names.sort_by_key(|name| (name.contains('@'), *name));
    names.first().map_or_else(|| id.to_string(), |name| (*name).clone())
}

fn quarantine_record(dir: &Path, i: usize, record: &Record) -> Result<()> {
    file::make_dir(dir, 0o700)?;
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let path: PathBuf = dir.join(format!("image-{stamp}-{i}.json"));
    let text = serde_json::json!({ "name": record.name, "manifest": record.manifest });
    file::write(&path, text.to_string().as_bytes(), 0o600, Durability::Atomic)
}
