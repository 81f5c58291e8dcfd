//! The whole daemon in this process, driven over its socket by a real gRPC client, with fakes for what it runs: an OCI runtime
//! that starts plain processes and CNI plugins that do nothing, both of which note how they were called. What is tested here is
//! what a client sees; `tests/host` has the real programs.

#![allow(clippy::cloned_ref_to_slice_refs)] // lists of ids are compared with lists of ids

/// Images the tests make.
mod archive;
/// Calls: unimplemented ones, both package names, codes of wrong requests.
mod calls;
/// Clients that go away, deadlines, a hundred calls that wait.
mod cancel;
/// `crispd check`, and verbose Status.
mod check;
/// Containers: the happy path and its rules.
mod container;
/// proto/ and the table of facts.
mod descriptor;
/// CDI devices and hooks in specs.
mod edits;
/// GetContainerEvents.
mod events;
/// ExecSync.
mod exec;
/// The table of fields, field by field.
mod fields;
/// The ImageService.
mod image;
/// Status, RuntimeConfig, UpdateRuntimeConfig.
mod info;
/// Shims that are late: a start that was given up before they listen.
mod late;
/// Lists and their filters.
mod list;
/// What a daemon tells of itself, and waiting for it.
mod metric;
/// Networks whose plugins fail.
mod network;
/// The daemon of one test, and the look for what it left.
mod node;
/// Sandboxes with one PID namespace.
mod pid;
/// Calls by their path.
mod raw;
/// What a sandbox or container is refused for.
mod refused;
/// A registry in this process.
mod registry;
/// Limits of containers and sandboxes, classes.
mod resources;
/// Another daemon on the same directories.
mod restart;
/// Equal calls that meet.
mod retry;
/// OCI runtimes that fail.
mod runtime;
/// Sandboxes: the happy path and its rules.
mod sandbox;
/// Stats of containers and sandboxes.
mod stats;
/// The lists in pieces.
mod stream_lists;
/// Streams of messages that a test can leave, or not read.
mod subscriber;
/// The client's side of SPDY.
#[path = "../host/spdy.rs"]
mod spdy;
/// Exec over SPDY: tokens, refusals, TLS, bounds.
mod streaming;
/// Many things at once.
mod together;
/// Sandboxes of other users.
mod userns;
/// Clients that take no answers.
mod window;
