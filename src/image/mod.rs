//! Images: references, registry, pull, unpack, import. `Images` is the face; each part has its file.
//!
//! A pull resolves a reference to a manifest, makes the layers that are missing in parallel (each streamed through
//! digest, decompression, diff ID and unpacking in one pass), commits them from the lowest up and records the image last. Nothing
//! incomplete is seen.

mod assemble;
mod audit;
mod auth;
mod catalog;
mod damage;
pub(crate) mod decompress;
mod digest;
mod flight;
mod frames;
mod fsck;
mod import;
mod layers;
mod make;
mod manifest;
mod metadata;
mod pins;
mod pipe;
mod platform;
mod preload;
mod pull;
mod reference;
mod registry;
mod room;
mod select;
mod slots;
mod tape;
pub(crate) mod tarball;
mod unpack;
mod verify;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::Arc;

pub use auth::{Auth, Sources};
pub use catalog::{Image, Incomplete, PREFIX_MIN};
pub use digest::Digest;
pub use fsck::{Check, Checked, Problem};
pub use platform::Platform;
pub use reference::{Reference, Version};
pub use registry::{Proxies, RegistrySettings, Retries};
pub use verify::Verifiers;

use catalog::Catalog;
use flight::Flights;
use layers::{Layers, Usage};
use registry::Client;
use room::Room;
use slots::Slots;

use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::lock::{Lock, Rank};
use crate::telemetry;

/// Parsers of foreign bytes, for the fuzz targets.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod parsers {
    pub use super::auth::docker::Config as DockerConfig;
    pub use super::auth::{parse_challenges, Challenge};
    pub use super::manifest::{candidates, compose, parse as manifest, parse_config, Document};
    pub use super::registry::{content_range, hosts, retry_after};
}

/// What the daemon configures.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The daemon's root: `images`, `layers`, `quarantine` are made below.
    pub root: PathBuf,
    pub bounds: Bounds,
    pub registry: RegistrySettings,
    pub platform: Platform,
    /// Images that garbage collection must leave alone: references or patterns of them, see `Pins`.
    pub pinned: Vec<String>,
    pub verifiers: Verifiers,
}

impl Settings {
    /// Defaults for a root.
    pub fn new(root: &Path) -> Settings {
        Settings {
            root: root.to_owned(),
            bounds: Bounds::default(),
            registry: RegistrySettings::default(),
            platform: Platform::host(),
            pinned: Vec::new(),
            verifiers: Verifiers::default(),
        }
    }
}

/// Bounds of what an image may be.
#[derive(Clone, Debug)]
pub struct Bounds {
    pub max_layers: usize,
    /// Layers of one image downloaded and unpacked at the same time.
    pub layer_workers: usize,
    /// The same for all images together.
    pub all_layers: u64,
    /// Percent of the file system that pulls leave free.
    pub keep_free: u64,
    pub max_manifest_bytes: u64,
    pub max_config_bytes: u64,
    /// Files of one layer.
    pub max_layer_entries: u64,
    /// Bytes of one layer, unpacked.
    pub max_unpacked_bytes: u64,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds {
            // overlayfs takes 500 lower layers.
            max_layers: 400,
            layer_workers: 3,
            all_layers: 6,
            keep_free: 2,
            max_manifest_bytes: 8 << 20,
            max_config_bytes: 8 << 20,
            max_layer_entries: 2_000_000,
            max_unpacked_bytes: 256 << 30,
        }
    }
}

/// What happens to a layer during a pull.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// For its turn, or for another pull that makes it.
    #[default]
    Waiting,
    /// Received, and unpacked as it comes.
    Downloading,
    /// The connection broke; it is taken up again.
    Retrying,
    /// All of it is received; the rest is unpacked, or waits for the layer below.
    Unpacking,
    /// It was here before.
    Exists,
    Done,
}

impl Phase {
    /// The word for it in the admin service.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Waiting => "waiting",
            Phase::Downloading => "downloading",
            Phase::Retrying => "retrying",
            Phase::Unpacking => "unpacking",
            Phase::Exists => "exists",
            Phase::Done => "done",
        }
    }
}

/// How far a layer is. The first reports of a pull are those of all its layers, in the manifest's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Place in the manifest, from 0: a manifest may have one digest twice.
    pub place: usize,
    /// Digest of the layer as the manifest has it.
    pub layer: String,
    pub phase: Phase,
    /// Bytes received; `total` when it is there.
    pub done: u64,
    pub total: u64,
}

/// Called with progress from any thread; it must not block.
pub type Watch = Arc<dyn Fn(&Progress) + Send + Sync>;

/// Layers held for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The layers' directories, top first, as overlayfs wants them.
    pub layers: Vec<PathBuf>,
    /// Chain IDs, lowest first: what the holder records to hold them again after a restart.
    pub chain: Vec<String>,
}

/// Space of one file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsUsage {
    pub mountpoint: PathBuf,
    pub used_bytes: u64,
    pub inodes_used: u64,
}

/// Space of images and of containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsInfo {
    pub image: FsUsage,
    pub container: FsUsage,
}

/// The images of this daemon. Clones share everything.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    bounds: Bounds,
    platform: Platform,
    catalog: Catalog,
    layers: Layers,
    client: Arc<Client>,
    verifiers: Verifiers,
    flights: Arc<Flights>,
    /// Layers that no image needs only because its record was lost: kept until the next start, when the image has been
    /// pulled again, or until a repair.
    spared: Lock<HashSet<Digest>>,
    /// For short-lived files without a name.
    scratch: PathBuf,
    serial: AtomicU64,
}

impl Inner {
    /// Removes layers that no image and no container needs. They are chosen while no image can be recorded: one that has just been has
    /// them no longer held by its pull.
    fn collect(&self) -> Result<()> {
        let spared = self.spared.lock().clone();
        let taken = self.catalog.with_used(|mut used| {
            used.extend(spared);
            self.layers.take_unneeded(&used)
        });
        self.layers.remove(taken).context(|| "remove unused layers").map(drop)
    }
}

impl Images {
    /// Opens or makes the store. Half-made layers go; records that cannot be read are moved to `root/quarantine`.
    pub fn open(settings: Settings) -> Result<Images> {
        let root = &settings.root;
        file::make_dir(root, 0o711)?;
        let limits = unpack::Limits { max_entries: settings.bounds.max_layer_entries, max_bytes: settings.bounds.max_unpacked_bytes };
        let dir = root.join("layers");
        let (room, slots) = (Room::new(&dir, settings.bounds.keep_free), Slots::new(settings.bounds.all_layers));
        let layers = Layers::open(&dir, limits, room, slots)?;
        let (catalog, trusted) =
            Catalog::open(&root.join("images"), &root.join("quarantine"), settings.bounds.clone(), &settings.pinned, &layers)
                .context(|| "open the image store")?;
        let spared = if trusted { HashSet::new() } else { layers.all().into_iter().collect() };
        Ok(Images {
            inner: Arc::new(Inner {
                scratch: root.join("images"),
                root: root.clone(),
                bounds: settings.bounds,
                platform: settings.platform,
                catalog,
                layers,
                client: Arc::new(Client::new(settings.registry)),
                verifiers: settings.verifiers,
                flights: Arc::new(Flights::new()),
                spared: Lock::new(Rank::Leaf, spared),
                serial: AtomicU64::new(0),
            }),
        })
    }

    /// Pulls an image, or joins the pull of it that is under way (same reference, same credentials). `cancel` ends this
    /// caller's wait; the pull itself ends with its last waiter. Registries that cannot be reached: code UNKNOWN with a message
    /// that starts with `RegistryUnavailable`, so callers put no words in front.
    pub fn pull(&self, reference: &str, auth: Option<Auth>, cancel: &Cancel, watch: Option<Watch>) -> Result<Arc<Image>> {
        let reference = Reference::parse(reference)?;
        let auth = auth.unwrap_or_default();
        let key = format!("{reference} {}", auth.fingerprint());
        let inner = self.inner.clone();
        let body = move |cancel: &Cancel, watch: Watch| {
            let meter = telemetry::image_pull();
            let pulled = pull::pull(&inner, &reference, &auth, cancel, watch);
            meter.ended(ending(&pulled));
            pulled
        };
        self.inner.flights.join(&key, cancel, watch, body)
    }

    /// The image of a reference: a tag, a digest, an id with or without `sha256:`, or a unique prefix (6 digits at least) of
    /// one. Absent: None. A reference that is none, or an ambiguous prefix: INVALID_ARGUMENT.
    pub fn status(&self, reference: &str) -> Result<Option<Arc<Image>>> {
        self.inner.catalog.find(reference)
    }

    /// All images.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.inner.catalog.list()
    }

    /// Imports every image of an OCI layout directory, an OCI archive or a docker-archive (tar or tar.gz). Names come
    /// from the archive, or `name` for its only image.
    pub fn import(&self, path: &Path, name: Option<&str>, cancel: &Cancel) -> Result<Vec<Arc<Image>>> {
        import::import(&self.inner, path, name, cancel)
    }

    /// Imports the files of a directory that have not been imported before (by name, size and time). What is wrong with one
    /// is logged and does not stop the others.
    pub fn preload(&self, dir: &Path) {
        preload::preload(self, dir);
    }

    /// Removes the image with all its names; unknown is fine. Layers that containers hold stay.
    pub fn remove(&self, reference: &str) -> Result<()> {
        let Some(id) = self.inner.catalog.find_id(reference)? else { return Ok(()) };
        self.inner.catalog.remove(&id, &self.inner.layers)?;
        self.collect()
    }

    /// The image of a reference, which must be here: NOT_FOUND else, or FAILED_PRECONDITION when parts of it are missing.
    pub fn require(&self, reference: &str) -> Result<Arc<Image>> {
        if let Some(image) = self.status(reference)? {
            return Ok(image);
        }
        match self.inner.catalog.incomplete(reference)? {
            Some(part) => Err(Error::precondition(format!("image {reference} is incomplete: {}; pull it again", part.reason))),
            None => Err(Error::not_found(format!("image {reference} is not on this host; pull it first"))),
        }
    }

    /// Images that are known and not usable, because parts of them are missing.
    pub fn incomplete(&self) -> Vec<Incomplete> {
        self.inner.catalog.all_incomplete()
    }

    /// Holds the layers of an image for a container, until `release`.
    pub fn hold(&self, image: &str, holder: &str) -> Result<Held> {
        let image = self.require(image)?;
        self.hold_again(holder, &image.chain)
    }

    /// Holds the layers of a container found at start, whose image may be gone. What there is of them is held even if one is
    /// missing, which is an error.
    pub fn hold_restored(&self, holder: &str, chain: &[String]) -> Result<()> {
        let ids: Vec<Digest> = chain.iter().map(|c| Digest::parse(c)).collect::<Result<_>>()?;
        self.inner.layers.hold_restored(&format!("container/{holder}"), &ids)
    }

    /// Holds layers by their chain IDs.
    pub fn hold_again(&self, holder: &str, chain: &[String]) -> Result<Held> {
        let mut held = self.hold_all(holder, &[chain])?;
        held.pop().ok_or_else(|| crate::error::Error::internal(format!("hold layers for {holder}: nothing was held")))
    }

    /// The same for the layers of several images at once, in their order. A holder holds what its last call named.
    pub fn hold_all(&self, holder: &str, chains: &[&[String]]) -> Result<Vec<Held>> {
        let parse = |chain: &&[String]| chain.iter().map(|c| Digest::parse(c)).collect::<Result<Vec<Digest>>>();
        let ids: Vec<Vec<Digest>> = chains.iter().map(parse).collect::<Result<_>>()?;
        self.inner.layers.hold_ready(&format!("container/{holder}"), &ids.concat()).context(|| format!("hold layers for {holder}"))?;
        let directories = |ids: &[Digest]| seen(ids.iter().rev().map(|c| self.inner.layers.diff_dir(c)));
        Ok(ids.iter().zip(chains).map(|(ids, chain)| Held { layers: directories(ids), chain: chain.to_vec() }).collect())
    }

    /// Lets go of a container's layers; those that nothing else needs are removed.
    pub fn release(&self, holder: &str) -> Result<()> {
        self.inner.layers.release(&format!("container/{holder}"));
        self.collect()
    }

    /// Removes layers that no image and no container needs. Called once at start, after the containers' `hold_restored`.
    pub fn collect(&self) -> Result<()> {
        self.inner.collect()
    }

    /// Number of layers, and the bytes they take.
    pub fn layers(&self) -> (usize, u64) {
        (self.inner.layers.all().len(), self.inner.layers.usage().bytes)
    }

    /// Verifies all that is stored, and with `repair` mends what can be. `tell` gets how far it is, and the problems; an error
    /// of its ends the check. Reads everything: it belongs on a thread that may take its time.
    pub fn check(&self, repair: bool, cancel: &Cancel, tell: &mut dyn FnMut(Check) -> Result<()>) -> Result<Checked> {
        fsck::check(&self.inner, repair, cancel, tell)
    }

    /// Space used by images: from sums kept since the layers were unpacked, so nothing is walked. `writable` is what the
    /// containers' writable layers use. On one file system (the usual case) both have one mount point: kubelet takes two for two
    /// file systems.
    pub fn fs_info(&self, writable: (u64, u64)) -> FsInfo {
        let (layers, metadata) = (self.inner.layers.usage(), self.inner.catalog.usage());
        let usage = Usage { bytes: layers.bytes + metadata.bytes, inodes: layers.inodes + metadata.inodes };
        let image = FsUsage { mountpoint: self.inner.root.clone(), used_bytes: usage.bytes, inodes_used: usage.inodes };
        let snapshots = self.inner.root.join("snapshots");
        let device = |path: &Path| std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::dev(&m)).ok();
        let mountpoint = match (device(&snapshots), device(&self.inner.root.join("layers"))) {
            (Some(a), Some(b)) if a != b => snapshots,
            _ => self.inner.root.clone(),
        };
        FsInfo { image, container: FsUsage { mountpoint, used_bytes: writable.0, inodes_used: writable.1 } }
    }
}

/// How a pull ended, as a label of metrics.
fn ending(result: &Result<Arc<Image>>) -> &'static str {
    let Err(e) = result else { return "ok" };
    match e.code() {
        Code::Unknown if e.message().starts_with(verify::REJECTED) => "rejected",
        Code::Unknown | Code::Unavailable => "unavailable",
        Code::Cancelled => "cancelled",
        Code::DeadlineExceeded => "timeout",
        Code::NotFound => "not_found",
        Code::PermissionDenied => "denied",
        Code::ResourceExhausted => "exhausted",
        Code::FailedPrecondition | Code::InvalidArgument => "invalid",
        _ => "internal",
    }
}

/// The layers, top first, down to one whose root is opaque: overlayfs merges roots whatever marks they have.
fn seen(layers: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut seen = Vec::new();
    for layer in layers {
        let opaque = crate::sys::rooted::is_opaque(&layer);
        seen.push(layer);
        if opaque {
            break;
        }
    }
    seen
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_fake;
#[cfg(test)]
mod tests_fsck;
#[cfg(test)]
mod tests_hostile;
#[cfg(test)]
mod tests_mirrors;
#[cfg(test)]
mod tests_pull;
#[cfg(test)]
mod tests_registry;
#[cfg(test)]
mod tests_unpack;
