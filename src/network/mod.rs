//! CNI: which networks there are, which plugins they need, and a sandbox's attachment to them.
//!
//! The manager (`Network`) loads the conf directory and follows it, runs the chains of ADD, DEL, CHECK, GC and STATUS, and
//! keeps on disk what was added. No lock is held while a plugin runs.

/// What ADD and DEL know of a sandbox.
mod attachment;
/// What was added, on disk.
mod cache;
/// One network's chain of plugins.
mod chain;
/// Configurations of the conf directory.
mod conflist;
/// Keeps GC and setups apart.
mod gate;
/// The manager: setup, teardown, check, gc, status.
mod manager;
/// Executables and their verbs.
mod plugin;
/// Answers and errors of plugins.
mod result;
/// The conflist template of UpdateRuntimeConfig.
mod template;
/// The thread that follows the conf directory.
mod watch;

#[cfg(test)]
mod tests;

pub use attachment::{Attachment, Bandwidth, PortMapping};
pub use conflist::{Conflist, Directory, PluginConf, Version};
pub use manager::{Attached, Network, Readiness, Settings, Setup};
pub use plugin::Plugins;
pub use result::{Address, Dns, Interface, Outcome};
