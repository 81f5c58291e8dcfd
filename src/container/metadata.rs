//! What never changes about a container. It is on disk before anything else is made.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::image_volumes::{ImageVolume, IMAGES};
use crate::runtime::Handler;
use crate::sys::idmap::IdMaps;

/// Immutable facts, beside the config message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Metadata {
    pub id: String,
    pub sandbox_id: String,
    /// `<name>_<sandbox name>_<attempt>`: one container at a time has it.
    pub name: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// The OCI runtime, as configured when the container was created: a changed configuration does not strand it.
    pub handler: Handler,
    /// Digest of the image's config.
    pub image_id: String,
    /// Chain IDs of its layers, lowest first: they are held even when the image is removed.
    pub chain: Vec<String>,
    /// Images that the request mounts; their layers are held likewise.
    #[serde(default)]
    pub image_volumes: Vec<ImageVolume>,
    /// What the user called the image.
    pub image: String,
    /// repo@digest, or the id when there is none.
    pub image_ref: String,
    /// Absolute; None: no log.
    pub log_path: Option<PathBuf>,
    /// Signal number.
    pub stop_signal: i32,
    /// `linux.cgroupsPath`.
    pub cgroups_path: String,
    /// The container whose PID namespace this one joins (PID mode TARGET).
    pub target: Option<String>,
    /// Maps of the sandbox's user namespace; None, and missing in older records: the host's.
    #[serde(default)]
    pub userns: Option<IdMaps>,
    /// `run/containers/<id>`
    pub dir: PathBuf,
}

impl Metadata {
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Where images that it mounts are mounted.
    pub fn images_dir(&self) -> PathBuf {
        self.dir.join(IMAGES)
    }

    /// The layers to hold: its own image's, then those of each image that it mounts.
    pub fn chains(&self) -> Vec<&[String]> {
        std::iter::once(self.chain.as_slice()).chain(self.image_volumes.iter().map(|v| v.chain.as_slice())).collect()
    }

    /// The ids of a user of the container on the host.
    pub fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
        self.userns.map_or((uid, gid), |maps| maps.owner(uid, gid))
    }

    pub fn spec_path(&self) -> PathBuf {
        self.dir.join("config.json")
    }
}
