//! Sandboxes: namespaces pinned without a pause container, the sandbox's files, its network, and the init that PID mode POD
//! needs. Mode "container" for runtimes that want a pause container would be a second arm where `manager` calls
//! `namespaces`.

/// What CNI must know of a sandbox.
pub mod attachment;
/// hostname, hosts, resolv.conf and shm of a sandbox.
pub mod files;
/// SELinux levels of sandboxes.
pub mod levels;
/// Run, stop, remove, restore.
pub mod manager;
/// What never changes about a sandbox.
pub mod metadata;
/// Namespaces, init and the cgroup of a sandbox.
pub mod namespaces;
/// What is said of a sandbox's resources.
pub mod resources;
/// What changes, and which transition is legal.
pub mod status;
/// What is kept open to measure a sandbox.
pub mod usage;
/// Which sandbox configs are accepted.
pub mod validate;

pub use manager::{Change, Sandbox, Sandboxes, Settings};
pub use metadata::{Metadata, PidMode};
pub use resources::Resources;
pub use status::Status;
