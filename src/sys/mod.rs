//! What crisp asks of the kernel: the only place with unsafe code, child processes, threads, mounts and namespaces.

/// Values that threads wait on, with cancellation.
#[cfg(feature = "engine")]
pub mod awaited;
/// Cancellation and deadline of a call.
pub mod cancel;
/// Messages of a socket that must not block.
pub mod channel;
/// Giving up power: capabilities, system calls.
pub mod confine;
/// Where an OCI runtime sends a terminal.
pub mod console;
/// Crash points of debug builds.
#[cfg(feature = "engine")]
pub mod crash;
/// Lists of CPUs and memory nodes.
#[cfg(feature = "engine")]
pub mod cpulist;
/// CPU time of processes.
#[cfg(feature = "daemon")]
pub mod cputime;
/// Files: atomic writes, bounded reads, removal of trees.
pub mod file;
/// Maps of user and group ids, id-mapped mounts.
#[cfg(feature = "engine")]
pub mod idmap;
/// Paths inside a root filesystem, as a process in it would see them.
#[cfg(feature = "engine")]
pub mod inroot;
/// Security labels of files.
pub mod label;
/// Traffic of the links of a network namespace.
#[cfg(feature = "engine")]
pub mod links;
/// Ranked locks: the order is asserted in debug builds.
#[cfg(feature = "engine")]
pub mod lock;
/// Becoming a monitor: session, signals, orphans.
pub mod monitor;
/// Mounts and the mount table.
pub mod mount;
/// Namespaces: pinning new ones, entering pinned ones.
#[cfg(feature = "engine")]
pub mod namespace;
/// Links of a network namespace, by rtnetlink.
#[cfg(feature = "engine")]
pub mod netlink;
/// pidfds: race-free signals and waits.
pub mod pidfd;
/// Making, entering and pinning user namespaces, from the daemon.
#[cfg(feature = "engine")]
pub mod pin;
/// Child processes: bounded output, timeout, process group killed.
pub mod process;
/// Project quotas of file systems.
#[cfg(feature = "engine")]
pub mod quota;
/// File operations confined to a directory that holds a layer of a stranger.
#[cfg(feature = "engine")]
pub mod rooted;
/// Unix sockets: peer credentials, passing of file descriptors.
pub mod socket;
/// TCP sockets in network namespaces.
#[cfg(feature = "engine")]
pub mod tcp;
/// Threads with names.
pub mod thread;
/// Removal of directory trees of any depth.
pub mod tree;
/// Whom TLS clients believe.
#[cfg(feature = "engine")]
pub mod trust;
/// The program that makes and enters user namespaces.
pub mod userns;
/// One thread that waits on many descriptors.
#[cfg(feature = "engine")]
pub mod watch;
