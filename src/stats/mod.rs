//! Stats and cAdvisor metrics from kernel files, in parallel.

/// Usage of writable layers.
pub mod filesystem;
/// cAdvisor metrics.
pub mod metrics;
/// Many readings at once.
pub mod sampler;
/// Counting a directory tree, a few files at a time.
mod walk;
