//! Stats and cAdvisor metrics from kernel files, in parallel.

/// Usage of writable layers.
pub mod filesystem;
/// Counting a directory tree, a few files at a time.
mod walk;
