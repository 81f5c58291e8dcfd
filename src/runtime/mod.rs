//! OCI runtimes: which there are, how they are called, whether they work here.

/// What a runtime can do.
#[cfg(feature = "engine")]
pub mod features;
/// Runtime handlers of the configuration.
pub mod handler;
/// The handler table: what is configured and works.
#[cfg(feature = "engine")]
pub mod handlers;
/// Command lines of the OCI runtimes.
pub mod oci;
/// Whether a handler works on this host.
#[cfg(feature = "engine")]
pub mod probe;

#[cfg(feature = "engine")]
pub use features::Features;
pub use handler::{Handler, Kind};
#[cfg(feature = "engine")]
pub use handlers::Handlers;
