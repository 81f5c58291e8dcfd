//! What CNI must know of a sandbox: identity, port mappings, bandwidth, DNS.

use super::metadata::Metadata;
use super::validate;
use crate::api::runtime::{PodSandboxConfig, Protocol};
use crate::error::{Error, Result};
use crate::network::{Attachment, Bandwidth, Dns, PortMapping};

/// The attachment of a sandbox with a network namespace.
pub fn build(meta: &Metadata, config: &PodSandboxConfig, extra_networks: Vec<String>) -> Result<Attachment> {
    let m = validate::metadata(config)?;
    Ok(Attachment {
        sandbox_id: meta.id.clone(),
        name: m.name.clone(),
        namespace: m.namespace.clone(),
        uid: m.uid.clone(),
        netns: meta.netns.clone().unwrap_or_default(),
        port_mappings: port_mappings(config)?,
        bandwidth: Bandwidth::from_annotations(|key| config.annotations.get(key).map(String::as_str))?,
        dns: config.dns_config.as_ref().map(|d| Dns {
            servers: d.servers.clone(),
            searches: d.searches.clone(),
            options: d.options.clone(),
        }),
        cgroup_path: Some(meta.cgroup_parent.clone()),
        extra_networks,
        annotations: config.annotations.clone(),
        ..Attachment::default()
    })
}

/// Enough of an attachment to tear down what is cached of a sandbox without a record.
pub fn orphan(meta: &Metadata) -> Attachment {
    Attachment { sandbox_id: meta.id.clone(), netns: meta.netns.clone().unwrap_or_default(), ..Attachment::default() }
}

fn port_mappings(config: &PodSandboxConfig) -> Result<Vec<PortMapping>> {
    let mut list = Vec::new();
    for (i, p) in config.port_mappings.iter().enumerate() {
        let field = format!("config.port_mappings[{i}]");
        let protocol = match p.protocol.enum_value() {
            Ok(Protocol::TCP) => "tcp",
            Ok(Protocol::UDP) => "udp",
            Ok(Protocol::SCTP) => "sctp",
            Err(n) => return Err(Error::invalid(format!("{field}.protocol: no protocol {n}"))),
        };
        if p.host_port == 0 {
            // Nothing to map: kubelet sends every container port.
            continue;
        }
        let port = |name: &str, n: i32| {
            u16::try_from(n)
                .ok()
                .filter(|n| *n > 0)
                .ok_or_else(|| Error::invalid(format!("{field}.{name}: expected 1 to 65535, found {n}")))
        };
        if !p.host_ip.is_empty() && p.host_ip.parse::<std::net::IpAddr>().is_err() {
            return Err(Error::invalid(format!("{field}.host_ip: expected an IP, found {:?}", p.host_ip)));
        }
        list.push(PortMapping {
            protocol: protocol.to_owned(),
            container_port: port("container_port", p.container_port)?,
            host_port: port("host_port", p.host_port)?,
            host_ip: p.host_ip.clone(),
        });
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime;

    #[test]
    fn ports() {
        let map = |host_port, container_port, host_ip: &str| runtime::PortMapping {
            host_port,
            container_port,
            host_ip: host_ip.into(),
            ..Default::default()
        };
        let config = PodSandboxConfig { port_mappings: vec![map(0, 80, ""), map(8080, 80, "127.0.0.1")], ..Default::default() };
        let list = port_mappings(&config).unwrap();
        assert_eq!((list.len(), list[0].host_port, list[0].protocol.as_str()), (1, 8080, "tcp"));
        for bad in [map(70000, 80, ""), map(80, 0, ""), map(80, 80, "x")] {
            let config = PodSandboxConfig { port_mappings: vec![bad], ..Default::default() };
            assert!(port_mappings(&config).unwrap_err().message().starts_with("config.port_mappings[0]."));
        }
    }
}
