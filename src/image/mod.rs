//! Images: references, registry, pull, unpack, import. `Images` is the face; each part has its file.
//!
//! A pull resolves a reference to a manifest, makes the layers that are missing in parallel (each streamed through
//! digest, decompression, diff ID and unpacking in one pass), commits them from the lowest up and records the image last. Nothing
//! incomplete is seen.

mod assemble;
mod auth;
mod catalog;
pub(crate) mod decompress;
mod digest;
mod flight;
mod frames;
mod import;
mod layers;
mod make;
mod manifest;
mod metadata;
mod pipe;
mod preload;
mod pull;
mod reference;
mod registry;
mod room;
mod slots;
pub(crate) mod tarball;
mod unpack;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::Arc;
use std::time::Instant;

pub use auth::Auth;
pub use catalog::Image;
pub use digest::Digest;
pub use manifest::Platform;
pub use reference::{Reference, Version};
pub use registry::RegistrySettings;

use catalog::Catalog;
use flight::Flights;
use layers::{Layers, Usage};
use registry::Client;
use room::Room;
use slots::Slots;

use crate::error::{Context, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::telemetry;

/// What the daemon configures.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The daemon's root: `images`, `layers`, `quarantine` are made below.
    pub root: PathBuf,
    pub bounds: Bounds,
    pub registry: RegistrySettings,
    pub platform: Platform,
    /// References that garbage collection must leave alone.
    pub pinned: Vec<String>,
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

/// How far a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Digest of the layer as the manifest has it.
    pub layer: String,
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
    /// Chain IDs, lowest first: what the holder records to `hold_again` after a restart.
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
    flights: Arc<Flights>,
    /// False until a restart when the index was lost: see `Catalog::open`.
    may_collect: bool,
    /// For short-lived files without a name.
    scratch: PathBuf,
    serial: AtomicU64,
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
        let (catalog, may_collect) = Catalog::open(
            &root.join("images"),
            &root.join("quarantine"),
            settings.bounds.clone(),
            settings.platform.clone(),
            &settings.pinned,
            &layers,
        )
        .context(|| "open the image store")?;
        Ok(Images {
            inner: Arc::new(Inner {
                scratch: root.join("images"),
                root: root.clone(),
                bounds: settings.bounds,
                platform: settings.platform,
                catalog,
                layers,
                client: Arc::new(Client::new(settings.registry)),
                flights: Arc::new(Flights::new()),
                may_collect,
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
            let begin = Instant::now();
            let pulled = pull::pull(&inner, &reference, &auth, cancel, watch);
            telemetry::image_pulled(pulled.is_ok(), begin.elapsed());
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
    pub fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<Arc<Image>>> {
        import::import(&self.inner, path, name, &Cancel::never())
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

    /// Holds the layers of an image for a container, until `release`.
    pub fn hold(&self, image: &str, holder: &str) -> Result<Held> {
        let image =
            self.status(image)?.ok_or_else(|| crate::error::Error::not_found(format!("image {image} is not here; pull it first")))?;
        self.hold_again(holder, &image.chain)
    }

    /// Holds known layers: for containers found at start, whose image may be gone.
    pub fn hold_again(&self, holder: &str, chain: &[String]) -> Result<Held> {
        let ids: Vec<Digest> = chain.iter().map(|c| Digest::parse(c)).collect::<Result<_>>()?;
        self.inner.layers.hold_ready(&format!("container/{holder}"), &ids).context(|| format!("hold layers for {holder}"))?;
        let layers = ids.iter().rev().map(|c| self.inner.layers.diff_dir(c)).collect();
        Ok(Held { layers, chain: chain.to_vec() })
    }

    /// Lets go of a container's layers; those that nothing else needs are removed.
    pub fn release(&self, holder: &str) -> Result<()> {
        self.inner.layers.release(&format!("container/{holder}"));
        self.collect()
    }

    /// Removes layers that no image and no container needs. Called once at start, after the containers' `hold_again`.
    pub fn collect(&self) -> Result<()> {
        if !self.inner.may_collect {
            return Ok(());
        }
        self.inner.layers.collect(&self.inner.catalog.used()).context(|| "remove unused layers").map(drop)
    }

    /// Space used by images, from sums kept since the layers were unpacked, and by containers. On one file system (the
    /// usual case) both say the same, as containerd does; a file system of its own for containers is asked as a whole.
    pub fn fs_info(&self) -> Result<FsInfo> {
        let (layers, metadata) = (self.inner.layers.usage(), self.inner.catalog.usage());
        let usage = Usage { bytes: layers.bytes + metadata.bytes, inodes: layers.inodes + metadata.inodes };
        let image = FsUsage { mountpoint: self.inner.root.clone(), used_bytes: usage.bytes, inodes_used: usage.inodes };
        let snapshots = self.inner.root.join("snapshots");
        let device = |path: &Path| std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::dev(&m)).ok();
        let container = match (device(&snapshots), device(&self.inner.root.join("layers"))) {
            (Some(a), Some(b)) if a != b => {
                let fs = rustix::fs::statvfs(&snapshots).context(|| format!("ask for the space of {}", snapshots.display()))?;
                FsUsage {
                    mountpoint: snapshots,
                    used_bytes: fs.f_blocks.saturating_sub(fs.f_bfree) * fs.f_frsize,
                    inodes_used: fs.f_files.saturating_sub(fs.f_ffree),
                }
            }
            _ => image.clone(),
        };
        Ok(FsInfo { image, container })
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_registry;
#[cfg(test)]
mod tests_pull;
#[cfg(test)]
mod tests_unpack;
