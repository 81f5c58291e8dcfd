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
#[cfg(feature = "engine")]
pub mod service;

/// What this host can do, for `crispd check` and verbose Status.
#[cfg(feature = "engine")]
pub mod check;

/// What is fuzzed, for tests/fuzz and the replay of its corpora.
#[cfg(any(test, feature = "fuzz"))]
#[path = "../tests/fuzz/targets.rs"]
pub mod fuzz;
/// Exec, attach and port-forward for clients that bring SPDY or WebSocket.
#[cfg(feature = "engine")]
pub mod streaming;
/// Stats and cAdvisor metrics from kernel files, in parallel.
#[cfg(feature = "engine")]
pub mod stats;
/// Containers: from CREATED to EXITED.
#[cfg(feature = "engine")]
pub mod container;
/// Images: references, registry, pull, unpack, import.
#[cfg(feature = "engine")]
pub mod image;
/// Sandboxes: pinned namespaces, pod files, network, POD-PID init.
#[cfg(feature = "engine")]
pub mod sandbox;

/// Configuration: what was written, then what was validated.
#[cfg(feature = "engine")]
pub mod config;

/// What happened to sandboxes and containers, for subscribers.
#[cfg(feature = "engine")]
pub mod event;
/// CNI: conflists, plugins, results.
#[cfg(feature = "engine")]
pub mod network;
/// The monitor of one container, and the daemon's client of it.
pub mod shim;
/// OCI runtimes: the handler table, probe, and the commands.
pub mod runtime;
/// cgroup paths, OOM counters, kill, v1 and v2.
pub mod cgroup;
/// Root filesystems from layers: overlay, copy.
#[cfg(feature = "engine")]
pub mod snapshot;
/// CDI: devices by name, from spec files into OCI specs.
#[cfg(feature = "engine")]
pub mod cdi;
/// OCI hooks of the host's administrator.
#[cfg(feature = "engine")]
pub mod hooks;
/// The SELinux of this host: what its policy has for containers, which labels it knows.
#[cfg(feature = "engine")]
pub mod selinux;
/// The OCI runtime spec of a container, computed without I/O.
#[cfg(feature = "engine")]
pub mod spec;
/// Records on disk, names, the id index.
#[cfg(feature = "engine")]
pub mod store;

/// Counters of the daemon itself, for Prometheus.
#[cfg(feature = "engine")]
pub mod telemetry;
/// Generated CRI and admin messages and service tables.
#[cfg(feature = "engine")]
pub mod api;
/// The only unsafe code, the only `Command`, threads, locks, namespaces, mounts.
#[allow(unsafe_code)]
pub mod sys;
/// Errors with gRPC codes.
pub mod error;
