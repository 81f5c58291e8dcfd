//! What CNI must know of a sandbox: identity, port mappings, bandwidth, DNS.

use super::metadata::Metadata;
use super::validate;
use crate::api::runtime::{PodSandboxConfig, Protocol};
use crate::error::{Error, Result};
use crate::network::{Attachment, Bandwidth, Dns, PortMapping};

/// Rates in bits per second, as quantities such as `10M` (kubernetes.io/docs, "Support traffic shaping").
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// The bucket of the bandwidth plugin, bits: its largest value, as peers choose.
const BURST: u64 = i32::MAX as u64;

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
        bandwidth: bandwidth(config)?,
        dns: config.dns_config.as_ref().map(|d| Dns {
            servers: d.servers.clone(),
            searches: d.searches.clone(),
            options: d.options.clone(),
        }),
        cgroup_path: Some(meta.cgroup_parent.clone()),
        extra_networks,
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

fn bandwidth(config: &PodSandboxConfig) -> Result<Option<Bandwidth>> {
    let rate = |key: &str| match config.annotations.get(key) {
        None => Ok(0),
        Some(text) => {
            quantity(text).ok_or_else(|| Error::invalid(format!("annotation {key}: expected 1k to 1P bits per second, found {text:?}")))
        }
    };
    let (ingress, egress) = (rate(INGRESS)?, rate(EGRESS)?);
    if ingress == 0 && egress == 0 {
        return Ok(None);
    }
    let burst = |rate: u64| if rate > 0 { BURST } else { 0 };
    Ok(Some(Bandwidth { ingress_rate: ingress, ingress_burst: burst(ingress), egress_rate: egress, egress_burst: burst(egress) }))
}

/// A Kubernetes quantity of 1k to 1P as a whole number; decimal (k, M, G, T, P) and binary (Ki … Pi) suffixes.
fn quantity(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor: f64 = match suffix {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "Ki" => 1024.0,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        _ => return None,
    };
    let value = number.parse::<f64>().ok()? * factor;
    (1e3..=1e15).contains(&value).then_some(value as u64)
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

    #[test]
    fn quantities() {
        for (text, expected) in [
            ("10M", Some(10_000_000)),
            ("1Ki", Some(1024)),
            ("1.5k", Some(1500)),
            ("999", None),
            ("2P", None),
            ("M", None),
            ("1e3", None),
            ("-1k", None),
        ] {
            assert_eq!(quantity(text), expected, "{text}");
        }
    }
}
