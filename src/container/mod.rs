//! Containers: from CREATED to EXITED. The OCI runtime runs at start, not at create: a created container is a bundle on disk
//! and costs no process, and an exited one has neither shim nor runtime state.

/// AppArmor profiles of the host.
pub mod apparmor;
mod below;
/// Block I/O classes from their file.
pub mod blockio;
/// Classes that annotations ask for.
pub mod classes;
/// seccomp profiles, AppArmor and SELinux for one container.
pub mod confine;
/// Host devices of a container.
pub mod devices;
/// CDI devices and hooks, put into a spec.
mod edits;
/// ExecSync.
pub mod exec;
/// What exits of shims and containers do.
pub mod exit;
/// Specs of messages, written down.
#[cfg(test)]
mod golden;
/// What the host can do.
pub mod host;
/// SELinux labels.
pub mod labels;
/// Images as volumes, and volumes that images declare.
pub mod image_volumes;
/// Start, stop, kill, log.
pub mod lifecycle;
/// Create, remove, lookup.
pub mod manager;
/// What never changes about a container.
pub mod metadata;
/// Host paths and propagation of mounts.
pub mod mounts;
/// Containers found at the daemon's start.
pub mod restore;
/// Signals by name.
pub mod signal;
/// What changes, and which transition is legal.
pub mod status;
/// Exec with streams, attach.
pub mod stream;
/// Where mounts go in the root filesystem, before they are made.
mod targets;
/// UpdateContainerResources.
pub mod update;
/// The user of a container, from its rootfs.
pub mod user;
/// Id-mapped mounts.
pub mod volumes;

pub use classes::Classes;
pub use manager::{Change, Container, Containers, CreateInputs, LayerWatch, Settings};
pub use metadata::Metadata;
pub use status::{State, Status};
pub use stream::{Control, Ended, Streams, Wanted};
