//! OCI runtimes: which there are, how they are called, whether they work here.

/// Runtime handlers of the configuration.
pub mod handler;
/// Command lines of the OCI runtimes.
pub mod oci;
/// Whether a handler works on this host.
pub mod probe;

pub use handler::{Handler, Kind};
