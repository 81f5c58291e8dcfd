//! Limits of the daemon and of the kernel, disk space, addresses.

use std::net::TcpListener;
use std::path::Path;

use rustix::process::Resource;
use serde_json::json;

use super::{nearest, text, Finding};
use crate::config::Config;
use crate::sys::{process, socket};

const TOPIC: &str = "limits";

/// Kept descriptors of a busy node: a dozen for each container.
const OPEN_FILES: u64 = 65_536;
/// Each watch of a directory is an instance, and containers have theirs of the same count.
const INOTIFY_INSTANCES: u64 = 512;
const INOTIFY_WATCHES: u64 = 65_536;
const PIDS: u64 = 65_536;
/// Less of the disk free than this share, or than these bytes, is little.
const FREE_SHARE: u64 = 10;
const FREE_BYTES: u64 = 1 << 30;

/// `is_daemon`: it is the daemon itself that looks.
pub(super) fn look(config: &Config, is_daemon: bool, findings: &mut Vec<Finding>) {
    let daemon = match is_daemon {
        true => i32::try_from(std::process::id()).ok(),
        false => socket::connect(&config.socket).and_then(|stream| socket::peer_pid(&stream)).ok(),
    };
    findings.push(match daemon {
        Some(pid) => {
            Finding::ok("daemon", "socket", format!("{}: crispd runs as {pid}", config.socket.display())).with(json!({"pid": pid}))
        }
        None => Finding::ok("daemon", "socket", format!("{}: no crispd runs", config.socket.display())),
    });
    open_files(daemon, findings);
    for (name, file, least) in [
        ("inotify instances", "fs.inotify.max_user_instances", INOTIFY_INSTANCES),
        ("inotify watches", "fs.inotify.max_user_watches", INOTIFY_WATCHES),
        ("pids", "kernel.pid_max", PIDS),
        ("threads", "kernel.threads-max", PIDS),
    ] {
        let Ok(value) = text(&format!("/proc/sys/{}", file.replace('.', "/"))).parse::<u64>() else { continue };
        let finding = match value >= least {
            true => Finding::ok(TOPIC, name, value.to_string()),
            false => Finding::warn(TOPIC, name, value.to_string(), format!("sysctl -w {file}={least}, if there are many containers")),
        };
        findings.push(finding.with(json!(value)));
    }
    disk("root", &config.root, findings);
    disk("run", &config.run, findings);
    streaming(config, findings);
}

/// The daemon's own, which the unit file raises; without a daemon what this process would give it.
fn open_files(daemon: Option<i32>, findings: &mut Vec<Finding>) {
    let own = || rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let (limit, whose) = match daemon.and_then(process::open_files_limit) {
        Some(limit) => (limit, "of the daemon"),
        None => (own(), "of this shell"),
    };
    let found = format!("{limit} {whose}");
    let finding = match limit >= OPEN_FILES {
        true => Finding::ok(TOPIC, "open files", found),
        false => Finding::warn(TOPIC, "open files", found, format!("LimitNOFILE={OPEN_FILES} in the unit, or ulimit -n {OPEN_FILES}")),
    };
    findings.push(finding.with(json!(limit)));
}

/// Space where a directory is, or will be.
fn disk(name: &str, dir: &Path, findings: &mut Vec<Finding>) {
    let Ok(stat) = rustix::fs::statvfs(nearest(dir)) else { return };
    let (free, total) = (stat.f_bavail * stat.f_frsize, (stat.f_blocks * stat.f_frsize).max(1));
    let share = free.saturating_mul(100) / total;
    // Some file systems have no such number.
    let inodes = stat.f_favail.saturating_mul(100).checked_div(stat.f_files).unwrap_or(100);
    let found = format!("{}: {} MiB free ({share}%), {inodes}% of inodes", dir.display(), free >> 20);
    let finding = match (free, share < FREE_SHARE || inodes < FREE_SHARE || (name == "root" && free < FREE_BYTES)) {
        (0, _) => Finding::missing("disk", name, found, "free some space"),
        (_, true) => Finding::warn("disk", name, found, "kubelet starts to evict before it is full: free some space"),
        (_, false) => Finding::ok("disk", name, found),
    };
    let read_only = stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
    let finding = match read_only {
        true => Finding::missing("disk", name, format!("{}: on a read-only file system", dir.display()), "put it elsewhere"),
        false => finding,
    };
    findings.push(finding.with(json!({"path": dir, "free_bytes": free, "total_bytes": total, "free_inodes_percent": inodes})));
}

/// Any port will do for the question: the configured one may be the running daemon's.
fn streaming(config: &Config, findings: &mut Vec<Finding>) {
    let address = config.streaming.address;
    let found = match address.port() {
        0 => format!("{}, a port of the kernel's choice", address.ip()),
        _ => address.to_string(),
    };
    let missing_file = config.streaming.tls.iter().flat_map(|tls| [&tls.certificate, &tls.key]).find(|path| !path.is_file());
    findings.push(match (TcpListener::bind((address.ip(), 0)), missing_file) {
        (Err(error), _) => {
            Finding::missing("streaming", "address", format!("{found}: {error}"), "streaming.address must be an address of this host")
        }
        (Ok(_), Some(path)) => {
            Finding::missing("streaming", "address", format!("{} is not there", path.display()), "make it, or unset TLS")
        }
        (Ok(_), None) if !address.ip().is_loopback() && config.streaming.tls.is_none() => {
            Finding::warn("streaming", "address", found, "others can reach it, and tokens go in the clear: set tls_certificate and tls_key")
        }
        (Ok(_), None) => Finding::ok("streaming", "address", found),
    });
}
