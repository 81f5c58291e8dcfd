//! hostname, hosts, resolv.conf and shm of a sandbox. Containers get them by bind mounts; kubelet mostly mounts its own hosts.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::Path;

use super::metadata::Metadata;
use crate::api::runtime::{DNSConfig, PodSandboxConfig};
use crate::error::{Context, Error, Result};
use crate::sys::file::{self, Durability};
use crate::sys::mount;

/// Size of a sandbox's /dev/shm, bytes: what peers give.
const SHM_SIZE: u64 = 64 << 20;
/// Longest host file copied, bytes.
const HOST_FILE_LIMIT: u64 = 1 << 20;

/// Makes the directory with all files and mounts. The IPs are not known yet: `write_hosts` comes again after the network.
pub fn create(meta: &Metadata, config: &PodSandboxConfig) -> Result<()> {
    file::make_dir(&meta.dir, 0o711)?;
    file::make_dir(&meta.file("ns"), 0o700)?;
    let resolv = match config.dns_config.as_ref() {
        Some(dns) => resolv_conf(dns)?.into_bytes(),
        None => host_file("/etc/resolv.conf")?,
    };
    write(meta, "resolv.conf", &resolv)?;
    write(meta, "hostname", format!("{}\n", meta.hostname).as_bytes())?;
    if meta.netns.is_some() {
        write_hosts(meta, &[])?;
    } else {
        write(meta, "hosts", &host_file("/etc/hosts")?)?;
    }
    if meta.ipc {
        file::make_dir(&meta.shm(), 0o1777)?;
        mount::tmpfs(&meta.shm(), SHM_SIZE, 0o1777, meta.root())?;
    }
    Ok(())
}

/// Writes hosts with the sandbox's own name at its IPs, before any container holds the file by a bind mount.
pub fn write_hosts(meta: &Metadata, ips: &[IpAddr]) -> Result<()> {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n");
    for ip in ips {
        let _ = writeln!(text, "{ip}\t{}", meta.hostname);
    }
    write(meta, "hosts", text.as_bytes())
}

/// Undoes `create`, whatever of it there is.
pub fn remove(meta: &Metadata) -> Result<()> {
    mount::unmount(&meta.dir.join("shm"))?;
    if file::remove_tree(&meta.dir).is_ok() {
        return Ok(());
    }
    // Something is mounted that we did not expect: only now is the whole mount table worth reading.
    for left in mount::below(&meta.dir)? {
        mount::unmount(&left)?;
    }
    file::remove_tree(&meta.dir)
}

/// Root of the containers may write to it, as on a machine.
fn write(meta: &Metadata, name: &str, data: &[u8]) -> Result<()> {
    let path = meta.file(name);
    file::write(&path, data, 0o644, Durability::Atomic)?;
    match meta.root() {
        (0, 0) => Ok(()),
        (uid, gid) => std::os::unix::fs::chown(&path, Some(uid), Some(gid)).context(|| format!("set the owner of {}", path.display())),
    }
}

/// A file of the host; one that is missing is an empty one.
fn host_file(path: &str) -> Result<Vec<u8>> {
    if !Path::new(path).exists() {
        return Ok(Vec::new());
    }
    file::read(Path::new(path), HOST_FILE_LIMIT)
}

/// resolv.conf(5) from what the sandbox asked for.
fn resolv_conf(dns: &DNSConfig) -> Result<String> {
    let mut text = String::new();
    for (field, values) in [("servers", &dns.servers), ("searches", &dns.searches), ("options", &dns.options)] {
        for value in values {
            if value.is_empty() || value.bytes().any(|b| b.is_ascii_control() || b == b' ') {
                return Err(Error::invalid(format!("config.dns_config.{field}: expected one word, found {value:?}")));
            }
        }
    }
    if dns.searches.len() > 32 {
        return Err(Error::invalid(format!("config.dns_config.searches: expected at most 32, found {}", dns.searches.len())));
    }
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_lines() {
        let dns = DNSConfig {
            servers: vec!["10.0.0.10".into(), "::1".into()],
            searches: vec!["a.svc".into(), "b".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        assert_eq!(resolv_conf(&dns).unwrap(), "search a.svc b\nnameserver 10.0.0.10\nnameserver ::1\noptions ndots:5\n");
        assert_eq!(resolv_conf(&DNSConfig::default()).unwrap(), "");
        let evil = DNSConfig { servers: vec!["1.1.1.1\nnameserver 6.6.6.6".into()], ..Default::default() };
        assert!(resolv_conf(&evil).unwrap_err().message().contains("dns_config.servers"));
        let many = DNSConfig { searches: vec!["a".into(); 33], ..Default::default() };
        assert!(resolv_conf(&many).is_err());
    }
}
