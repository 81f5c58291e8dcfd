//! crispd on this host: real OCI runtimes, CNI plugins, overlayfs, cgroups and a registry. Needs root; `make host` runs it.
//! A host that cannot is a failure that says what is missing, never a skip.
//!
//! `CRISP_TEST_DAEMON=containerd` runs what every CRI runtime must do against containerd: that checks the tests.

mod archive;
mod bpf;
mod client;
mod daemon;
mod devices;
mod events;
mod exposition;
mod harness;
mod images;
mod interrupted;
mod lifecycle;
mod login;
mod logs;
mod metrics;
mod mounts;
mod namespaces;
mod network;
mod objects;
mod pulls;
mod python;
mod push;
mod registry;
mod resources;
mod restart;
mod seccomp;
mod security;
mod selinux;
mod shim;
mod snapshot;
mod spdy;
mod spec;
mod streaming;
mod streams;
mod stats;
mod targets;
mod trouble;
mod unified;
mod userns;
mod volumes;
mod websocket;
