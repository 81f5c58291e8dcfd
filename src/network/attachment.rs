//! What ADD and DEL know of a sandbox: its identity, its netns, and what it asks of the plugins.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::conflist::is_identifier;
use super::result::{parse_cidr, Dns};
use crate::error::{Context, Error, Result};

/// A port of the host that leads to one of the sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    pub container_port: u16,
    /// 0: no mapping is made.
    pub host_port: u16,
    /// The host's address to listen on; empty for all.
    pub host_ip: String,
}

/// Rates in bits per second, bursts in bits; 0 means unlimited (a burst of 0 with a rate: as large as plugins take).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    pub ingress_rate: u64,
    pub ingress_burst: u64,
    pub egress_rate: u64,
    pub egress_burst: u64,
}

/// Everything ADD and DEL need to know of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attachment {
    pub sandbox_id: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    /// The pinned network namespace.
    pub netns: PathBuf,
    pub port_mappings: Vec<PortMapping>,
    pub bandwidth: Option<Bandwidth>,
    pub dns: Option<Dns>,
    /// Fixed addresses for the default network, `IP` or `IP/PREFIX`.
    pub ips: Vec<String>,
    /// A fixed hardware address for the default network.
    pub mac: Option<String>,
    pub cgroup_path: Option<String>,
    /// Names of networks besides the default, in the order of their interfaces net1, net2, …
    pub extra_networks: Vec<String>,
    /// The sandbox's annotations, for plugins that declare they want them.
    pub annotations: BTreeMap<String, String>,
}

/// The capability by which plugins ask for the sandbox's annotations: containerd's name, known to existing plugins.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// The default burst: what fits the bandwidth plugin's check, in bits.
const LARGEST_BURST: u64 = u32::MAX as u64;

impl Attachment {
    /// Refuses (INVALID_ARGUMENT) what would be read as something else by a plugin.
    pub fn validate(&self) -> Result<()> {
        if !is_identifier(&self.sandbox_id) {
            return Err(Error::invalid(format!("sandbox id {:?} is not letters, digits, '_', '.' and '-'", self.sandbox_id)));
        }
        for (field, value) in [("name", &self.name), ("namespace", &self.namespace), ("uid", &self.uid)] {
            // CNI_ARGS is KEY=VALUE;KEY=VALUE without quoting.
            if let Some(c) = value.chars().find(|c| matches!(c, ';' | '=') || c.is_control()) {
                return Err(Error::invalid(format!("sandbox metadata {field} {value:?} has {c:?}, which CNI arguments cannot carry")));
            }
        }
        for p in self.port_mappings.iter().filter(|p| p.host_port != 0) {
            if !matches!(p.protocol.as_str(), "tcp" | "udp" | "sctp") {
                return Err(Error::invalid(format!("port mapping {}: protocol {:?} is not tcp, udp or sctp", p.host_port, p.protocol)));
            }
            if p.container_port == 0 {
                return Err(Error::invalid(format!("port mapping {}: container port is 0", p.host_port)));
            }
            if !p.host_ip.is_empty() && p.host_ip.parse::<IpAddr>().is_err() {
                return Err(Error::invalid(format!("port mapping {}: host IP {:?} is not an IP address", p.host_port, p.host_ip)));
            }
        }
        for ip in &self.ips {
            if ip.parse::<IpAddr>().is_err() && parse_cidr(ip).is_none() {
                return Err(Error::invalid(format!("requested IP {ip:?} is not an IP address")));
            }
        }
        if let Some(mac) = &self.mac {
            let octets: Vec<_> = mac.split(':').collect();
            if octets.len() != 6 || !octets.iter().all(|o| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit())) {
                return Err(Error::invalid(format!("requested MAC {mac:?} is not six octets in hex")));
            }
        }
        Ok(())
    }

    /// The pairs of CNI_ARGS.
    pub(super) fn cni_args(&self) -> Vec<[String; 2]> {
        [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", &self.namespace),
            ("K8S_POD_NAME", &self.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &self.sandbox_id),
            ("K8S_POD_UID", &self.uid),
        ]
        .map(|(k, v)| [k.to_owned(), v.to_owned()])
        .into()
    }

    /// Capability arguments by name. Ports, rates and fixed addresses belong to the default network alone.
    pub(super) fn capability_args(&self, default: bool) -> Map<String, Value> {
        let mut args = Map::new();
        if default {
            let ports: Vec<Value> = self.port_mappings.iter().filter(|p| p.host_port != 0).map(port_argument).collect();
            if !ports.is_empty() {
                args.insert("portMappings".into(), ports.into());
            }
            if let Some(b) = self.bandwidth.as_ref().filter(|b| b.ingress_rate != 0 || b.egress_rate != 0) {
                args.insert("bandwidth".into(), bandwidth_argument(b));
            }
            if !self.ips.is_empty() {
                args.insert("ips".into(), self.ips.clone().into());
            }
            if let Some(mac) = &self.mac {
                args.insert("mac".into(), mac.clone().into());
            }
        }
        if let Some(dns) = &self.dns {
            args.insert("dns".into(), json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options}));
        }
        if let Some(path) = &self.cgroup_path {
            args.insert("cgroupPath".into(), path.clone().into());
        }
        if !self.annotations.is_empty() {
            args.insert(ANNOTATIONS.into(), json!(self.annotations));
        }
        args
    }
}

fn port_argument(p: &PortMapping) -> Value {
    let mut port = json!({"hostPort": p.host_port, "containerPort": p.container_port, "protocol": p.protocol});
    if !p.host_ip.is_empty() {
        port["hostIP"] = p.host_ip.clone().into();
    }
    port
}

fn bandwidth_argument(b: &Bandwidth) -> Value {
    let mut map = Map::new();
    for (direction, rate, burst) in [("ingress", b.ingress_rate, b.ingress_burst), ("egress", b.egress_rate, b.egress_burst)] {
        if rate != 0 {
            map.insert(format!("{direction}Rate"), rate.into());
            // Plugins want a rate and its burst both or neither.
            map.insert(format!("{direction}Burst"), if burst == 0 { LARGEST_BURST } else { burst }.into());
        }
    }
    map.into()
}

impl Bandwidth {
    /// Reads the annotations `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth`: Kubernetes quantities in
    /// bits per second, from 1k to 1P.
    pub fn from_annotations<'a>(annotation: impl Fn(&str) -> Option<&'a str>) -> Result<Option<Bandwidth>> {
        let rate = |key: &str| {
            let Some(text) = annotation(key) else { return Ok(0) };
            let rate = parse_quantity(text).context(|| format!("annotation {key}"))?;
            if !(1_000..=1_000_000_000_000_000).contains(&rate) {
                return Err(Error::invalid(format!("annotation {key}: {text:?} is not between 1k and 1P")));
            }
            Ok(rate)
        };
        let bandwidth = Bandwidth {
            ingress_rate: rate("kubernetes.io/ingress-bandwidth")?,
            egress_rate: rate("kubernetes.io/egress-bandwidth")?,
            ..Bandwidth::default()
        };
        Ok((bandwidth != Bandwidth::default()).then_some(bandwidth))
    }
}

/// A Kubernetes quantity as a whole number, rounded up.
fn parse_quantity(text: &str) -> Result<u64> {
    let wrong = || Error::invalid(format!("{text:?} is not a quantity"));
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    // `1e6` and `1E6` are exponents; a bare `E` is exa.
    let exponent = suffix.strip_prefix(['e', 'E']).and_then(|d| d.parse::<u32>().ok()).and_then(|e| 10u128.checked_pow(e));
    let unit: u128 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "E" => 1_000_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "Ei" => 1 << 60,
        _ => exponent.ok_or_else(wrong)?,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 18 || fraction.contains('.') {
        return Err(wrong());
    }
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| wrong())?;
    let scaled = digits.checked_mul(unit).ok_or_else(wrong)?.div_ceil(10u128.pow(fraction.len() as u32));
    u64::try_from(scaled).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment() -> Attachment {
        Attachment { sandbox_id: "3f2a".into(), name: "web".into(), namespace: "default".into(), uid: "u-1".into(), ..Default::default() }
    }

    #[test]
    fn metadata_cannot_inject_arguments() {
        attachment().validate().unwrap();
        for bad in ["a;K8S_POD_NAME=b", "a=b", "a\nb", "a\0"] {
            let e = Attachment { name: bad.into(), ..attachment() }.validate().unwrap_err();
            assert_eq!(e.code(), crate::error::Code::InvalidArgument, "{e}");
            assert!(Attachment { uid: bad.into(), ..attachment() }.validate().is_err());
        }
        assert!(Attachment { sandbox_id: "../x".into(), ..attachment() }.validate().is_err());
    }

    #[test]
    fn requests_are_checked() {
        let port = |protocol: &str, container_port, host_port, host_ip: &str| {
            let p = PortMapping { protocol: protocol.into(), container_port, host_port, host_ip: host_ip.into() };
            Attachment { port_mappings: vec![p], ..attachment() }.validate()
        };
        port("tcp", 80, 8080, "127.0.0.1").unwrap();
        port("whatever", 80, 0, "not looked at").unwrap();
        assert!(port("TCP", 80, 8080, "").is_err());
        assert!(port("tcp", 0, 8080, "").is_err());
        assert!(port("tcp", 80, 8080, "localhost").is_err());
        assert!(Attachment { ips: vec!["10.0.0.300".into()], ..attachment() }.validate().is_err());
        assert!(Attachment { mac: Some("02:00:00:00:00".into()), ..attachment() }.validate().is_err());
    }

    #[test]
    fn arguments() {
        let a = Attachment {
            port_mappings: vec![
                PortMapping { protocol: "tcp".into(), container_port: 80, host_port: 8080, host_ip: "127.0.0.1".into() },
                PortMapping { protocol: "udp".into(), container_port: 53, host_port: 0, host_ip: String::new() },
            ],
            bandwidth: Some(Bandwidth { ingress_rate: 1000, ..Default::default() }),
            mac: Some("02:00:00:00:00:01".into()),
            dns: Some(Dns { servers: vec!["10.0.0.10".into()], ..Default::default() }),
            ..attachment()
        };
        let args = Value::Object(a.capability_args(true));
        assert_eq!(args["portMappings"], json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]));
        assert_eq!(args["bandwidth"], json!({"ingressRate": 1000, "ingressBurst": 4294967295u64}));
        assert_eq!(args["dns"], json!({"servers": ["10.0.0.10"], "searches": [], "options": []}));
        assert_eq!(a.capability_args(false).keys().collect::<Vec<_>>(), ["dns"]);
        let args: Vec<String> = a.cni_args().iter().map(|p| p.join("=")).collect();
        assert_eq!(
            args.join(";"),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=3f2a;K8S_POD_UID=u-1"
        );
    }

    #[test]
    fn quantities() {
        for (text, bits) in
            [("1k", 1000), ("10M", 10_000_000), ("1.5Mi", 1_572_864), ("1e6", 1_000_000), ("0.5", 1), ("1E", 1_000_000_000_000_000_000)]
        {
            assert_eq!(parse_quantity(text).unwrap(), bits, "{text}");
        }
        for bad in ["", "M", "-1", "1.2.3", "1 k", "1kk", "99999999999E", "1e99", "."] {
            assert!(parse_quantity(bad).is_err(), "{bad}");
        }
        let read = |v: &'static str| Bandwidth::from_annotations(|k| (k == "kubernetes.io/egress-bandwidth").then_some(v));
        assert_eq!(read("10M").unwrap().unwrap().egress_rate, 10_000_000);
        assert!(read("100").is_err());
        assert_eq!(Bandwidth::from_annotations(|_| None).unwrap(), None);
    }
}
