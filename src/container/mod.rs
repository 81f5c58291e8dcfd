//! (being written)

pub mod devices;
pub mod host;
pub mod mounts;
pub mod user;
