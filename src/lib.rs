//! crisp: a Kubernetes CRI runtime in synchronous Rust. This page is the map, top layer first; imports go only downwards
//! (tests/tidy.rs checks it).

#![deny(unsafe_code)]

/// The `crisp` client for hosts without crictl.
#[cfg(feature = "daemon")]
pub mod cli;
/// The composition root: builds everything, restores, stops in order.
#[cfg(feature = "daemon")]
pub mod daemon;
/// The gRPC face: socket, lanes, one log line per call. The only user of grpcio in the daemon.
#[cfg(feature = "daemon")]
pub mod grpc;
/// The calls of CRI, one file per group; requests and responses stop here.
#[cfg(feature = "daemon")]
pub mod service;

/// Containers: from CREATED to EXITED.
#[cfg(feature = "daemon")]
pub mod container;
/// Images: references, registry, pull, unpack, import.
#[cfg(feature = "daemon")]
pub mod image;
/// Sandboxes: pinned namespaces, pod files, network, POD-PID init.
#[cfg(feature = "daemon")]
pub mod sandbox;

/// Configuration: what was written, then what was validated.
#[cfg(feature = "daemon")]
pub mod config;

/// CNI: conflists, plugins, results.
#[cfg(feature = "daemon")]
pub mod network;
/// The monitor of one container, and the daemon's client of it.
pub mod shim;
/// OCI runtimes: the handler table, probe, and the commands.
pub mod runtime;
/// cgroup paths, OOM counters, kill, v1 and v2.
pub mod cgroup;
/// Root filesystems from layers: overlay, copy.
#[cfg(feature = "daemon")]
pub mod snapshot;
/// The OCI runtime spec of a container, computed without I/O.
#[cfg(feature = "daemon")]
pub mod spec;
/// Records on disk, names, the id index.
#[cfg(feature = "daemon")]
pub mod store;

/// Generated CRI and admin messages and service tables.
#[cfg(feature = "daemon")]
pub mod api;
/// The only unsafe code, the only `Command`, threads, locks, namespaces, mounts.
#[allow(unsafe_code)]
pub mod sys;
/// Errors with gRPC codes.
pub mod error;
