//! What a plugin's ADD answers, in the shapes of all versions of the specification, mapped into one type; and what it
//! answers when it fails.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::conflist::Version;
use crate::error::{Code, Context, Error, Result};

/// Name service settings, of a sandbox or of a result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// A link that a plugin made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub mac: Option<String>,
    /// The netns it is in; None on the host.
    pub sandbox: Option<String>,
}

/// An address that a plugin assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    /// Length of the network's prefix in bits.
    pub prefix: u8,
    pub gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    pub interface: Option<usize>,
}

/// The result of an ADD.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub interfaces: Vec<Interface>,
    pub addresses: Vec<Address>,
    pub dns: Dns,
    /// As the plugin gave it, with `cniVersion` filled in: the next plugin's prevResult.
    pub raw: Value,
}

impl Outcome {
    /// Parses a plugin's stdout. A result without `cniVersion` is of the version asked for.
    pub fn parse(stdout: &[u8], asked: Version) -> Result<Outcome> {
        let json = serde_json::from_slice(stdout).context(|| "parse JSON").and_then(|v: Value| match v {
            Value::Object(map) => Ok(map),
            _ => Err(Error::internal("not a JSON object")),
        });
        let mut json = json.context(|| format!("result {}", excerpt(stdout)))?;
        if !matches!(json.get("cniVersion"), Some(Value::String(v)) if !v.is_empty()) {
            json.insert("cniVersion".into(), asked.to_string().into());
        }
        Outcome::of(json).context(|| format!("result {}", excerpt(stdout)))
    }

    /// Reads back a result that was kept as JSON.
    pub fn of(json: Map<String, Value>) -> Result<Outcome> {
        let mut interfaces = Vec::new();
        for (i, value) in list(&json, "interfaces")?.iter().enumerate() {
            let text = |key: &str| value.get(key).and_then(Value::as_str).filter(|t| !t.is_empty()).map(str::to_owned);
            let name = text("name").ok_or_else(|| Error::internal(format!("interfaces[{i}].name is missing")))?;
            interfaces.push(Interface { name, mac: text("mac"), sandbox: text("sandbox") });
        }
        let mut addresses = Vec::new();
        for (i, value) in list(&json, "ips")?.iter().enumerate() {
            let address =
                value.get("address").and_then(Value::as_str).ok_or_else(|| Error::internal(format!("ips[{i}].address is missing")))?;
            let interface = match value.get("interface") {
                None | Some(Value::Null) => None,
                // Some plugins of 0.3.0 say -1 for "none".
                Some(Value::Number(n)) if n.as_i64().is_some_and(|n| n < 0) => None,
                Some(n) => {
                    let index = n.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n < interfaces.len());
                    Some(index.ok_or_else(|| Error::internal(format!("ips[{i}].interface {n} is not an index of interfaces")))?)
                }
            };
            addresses.push(parse_address(address, value.get("gateway"), interface).context(|| format!("ips[{i}]"))?);
        }
        // Versions 0.1.0 and 0.2.0.
        for key in ["ip4", "ip6"] {
            let Some(value) = json.get(key).filter(|v| !v.is_null()) else { continue };
            let address = value.get("ip").and_then(Value::as_str).ok_or_else(|| Error::internal(format!("{key}.ip is missing")))?;
            addresses.push(parse_address(address, value.get("gateway"), None).context(|| key)?);
        }
        let dns = json.get("dns").and_then(|d| serde_json::from_value::<WireDns>(d.clone()).ok()).unwrap_or_default();
        let dns = Dns { servers: dns.nameservers, searches: dns.search, options: dns.options };
        Ok(Outcome { interfaces, addresses, dns, raw: Value::Object(json) })
    }

    /// The addresses of the sandbox's interface `ifname`, each once, in the plugin's order but for the first IPv4 one, which leads:
    /// clients that know one address know that. Where the plugin names no such interface, those of any inside the sandbox.
    pub fn ips(&self, ifname: &str) -> Vec<IpAddr> {
        let pick = |want: &dyn Fn(&Interface) -> bool| {
            let mut ips = Vec::new();
            for a in &self.addresses {
                if a.interface.is_none_or(|i| want(&self.interfaces[i])) && !ips.contains(&a.ip) {
                    ips.push(a.ip);
                }
            }
            ips
        };
        let mut ips = pick(&|i| i.name == ifname);
        if ips.is_empty() {
            ips = pick(&|i| i.sandbox.is_some());
        }
        if let Some(first) = ips.iter().position(IpAddr::is_ipv4) {
            ips[..=first].rotate_right(1);
        }
        ips
    }

    /// The hardware address of the sandbox's interface `ifname`.
    pub fn mac(&self, ifname: &str) -> Option<String> {
        self.interfaces.iter().find(|i| i.name == ifname && i.sandbox.is_some())?.mac.clone()
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireDns {
    nameservers: Vec<String>,
    search: Vec<String>,
    options: Vec<String>,
}

fn list<'a>(json: &'a Map<String, Value>, key: &str) -> Result<&'a [Value]> {
    match json.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(values)) => Ok(values),
        Some(_) => Err(Error::internal(format!("{key} is not a list"))),
    }
}

fn parse_address(cidr: &str, gateway: Option<&Value>, interface: Option<usize>) -> Result<Address> {
    let (ip, prefix) = parse_cidr(cidr).ok_or_else(|| Error::internal(format!("address {cidr:?} is not IP/PREFIX")))?;
    let gateway = match gateway {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(value) => {
            let ip = value.as_str().and_then(|t| t.parse().ok());
            Some(ip.ok_or_else(|| Error::internal(format!("gateway {value} is not an IP address")))?)
        }
    };
    Ok(Address { ip, prefix, gateway, interface })
}

/// Parses `IP/PREFIX`.
pub fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (ip, prefix) = text.split_once('/')?;
    let ip: IpAddr = ip.parse().ok()?;
    let digits = !prefix.is_empty() && prefix.len() <= 3 && prefix.bytes().all(|b| b.is_ascii_digit());
    let prefix: u8 = prefix.parse().ok().filter(|_| digits)?;
    (prefix <= if ip.is_ipv4() { 32 } else { 128 }).then_some((ip, prefix))
}

/// The error of a plugin that ended with another code than 0: its JSON error if it gave one, else what it printed; and the end of stderr.
pub fn failure(ended: &str, stdout: &[u8], stderr: &[u8]) -> Error {
    #[derive(Deserialize)]
    struct Failure {
        code: u64,
        #[serde(default)]
        msg: String,
        #[serde(default)]
        details: String,
    }
    let (code, mut text) = match serde_json::from_slice::<Failure>(stdout) {
        Ok(f) => {
            let mut text = format!("{} (code {})", printable(&f.msg, 1024), f.code);
            if !f.details.is_empty() {
                text.push_str(": ");
                text.push_str(&printable(&f.details, 1024));
            }
            // Code 11 of the specification: try again later.
            (if f.code == 11 { Code::Unavailable } else { Code::Internal }, text)
        }
        Err(_) if stdout.trim_ascii().is_empty() => (Code::Internal, ended.to_owned()),
        Err(_) => (Code::Internal, format!("{ended}, printed {}", excerpt(stdout))),
    };
    let stderr = stderr.trim_ascii();
    if !stderr.is_empty() {
        let tail = &stderr[stderr.len().saturating_sub(1024)..];
        text.push_str("; stderr: ");
        text.push_str(&printable(&String::from_utf8_lossy(tail), 1024));
    }
    Error::new(code, text)
}

/// The first bytes of foreign output, quoted and printable.
pub fn excerpt(bytes: &[u8]) -> String {
    let bytes = bytes.trim_ascii();
    if bytes.is_empty() {
        return "(nothing)".to_owned();
    }
    let more = if bytes.len() > 200 { "…" } else { "" };
    format!("{:?}{more}", String::from_utf8_lossy(&bytes[..bytes.len().min(200)]))
}

/// Foreign text on one line: control characters become blanks; at most `limit` characters.
fn printable(text: &str, limit: usize) -> String {
    text.trim().chars().take(limit).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Outcome> {
        Outcome::parse(text.as_bytes(), Version::V0_4_0)
    }

    fn ips(text: &str) -> Vec<String> {
        parse(text).unwrap().ips("eth0").iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn shapes_of_all_versions() {
        assert_eq!(
            ips(r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.1.0.5/16","gateway":"10.1.0.1"},"ip6":{"ip":"fd00::5/64"}}"#),
            ["10.1.0.5", "fd00::5"]
        );
        assert_eq!(
            ips(r#"{"cniVersion":"0.3.1","interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/run/netns/x"}],
                "ips":[{"version":"4","interface":1,"address":"10.1.0.5/16"},{"version":"6","interface":1,"address":"fd00::5/64"}]}"#),
            ["10.1.0.5", "fd00::5"]
        );
        let one = parse(
            r#"{"cniVersion":"1.0.0","interfaces":[{"name":"br0","mac":"02:00:00:00:00:01"},
                {"name":"eth0","mac":"02:00:00:00:00:02","sandbox":"/n"}],
                "ips":[{"interface":1,"address":"10.1.0.5/16","gateway":"10.1.0.1"},{"interface":0,"address":"10.1.0.1/16"}],
                "routes":[{"dst":"0.0.0.0/0"}],"dns":{"nameservers":["10.0.0.10"],"search":["a"]}}"#,
        )
        .unwrap();
        assert_eq!(one.ips("eth0"), ["10.1.0.5".parse::<IpAddr>().unwrap()]);
        assert_eq!(one.mac("eth0").as_deref(), Some("02:00:00:00:00:02"));
        assert_eq!((one.dns.servers, one.dns.searches), (vec!["10.0.0.10".to_owned()], vec!["a".to_owned()]));
        assert_eq!(one.addresses[0].gateway, Some("10.1.0.1".parse().unwrap()));
        // An interface of another name inside the sandbox is better than no address.
        assert_eq!(ips(r#"{"interfaces":[{"name":"x","sandbox":"/n"}],"ips":[{"interface":0,"address":"10.1.0.5/16"}]}"#), ["10.1.0.5"]);
        assert!(ips("{}").is_empty());
        let two = r#"{"interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"interface":0,"address":"fd00::5/64"},
            {"interface":0,"address":"fd00::6/64"},{"interface":0,"address":"10.1.0.5/16"},{"interface":0,"address":"10.1.0.6/16"}]}"#;
        assert_eq!(ips(two), ["10.1.0.5", "fd00::5", "fd00::6", "10.1.0.6"], "the first of IPv4 leads");
    }

    #[test]
    fn version_is_filled_in() {
        assert_eq!(parse(r#"{"ips":[]}"#).unwrap().raw["cniVersion"], "0.4.0");
        assert_eq!(parse(r#"{"cniVersion":"1.0.0"}"#).unwrap().raw["cniVersion"], "1.0.0");
    }

    #[test]
    fn garbage_is_quoted_and_bounded() {
        let e = parse(&format!("hello\n\x1b[31m{}", "x".repeat(5000))).unwrap_err().to_string();
        assert!(e.starts_with("result \"hello\\n\\u{1b}[31mxxx") && e.len() < 500, "{e}");
        assert!(parse("").unwrap_err().message().starts_with("result (nothing)"));
        for text in [
            "[]",
            r#"{"ips":{}}"#,
            r#"{"ips":[{}]}"#,
            r#"{"ips":[{"address":"10.0.0.1"}]}"#,
            r#"{"ips":[{"address":"10.0.0.1/33"}]}"#,
            r#"{"ips":[{"address":"10.0.0.1/24","interface":0}]}"#,
            r#"{"ips":[{"address":"10.0.0.1/24","gateway":"x"}]}"#,
            r#"{"interfaces":[{}]}"#,
            r#"{"ip4":{}}"#,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn failures_carry_all_that_was_said() {
        let e = failure("exit 1", br#"{"cniVersion":"1.0.0","code":11,"msg":"busy\nnow","details":"later"}"#, b"  trace\n");
        assert_eq!((e.code(), e.message()), (Code::Unavailable, "busy now (code 11): later; stderr: trace"));
        assert_eq!(failure("exit 2", b"", b"").message(), "exit 2");
        assert_eq!(failure("signal 9", b"oops", b"").message(), "signal 9, printed \"oops\"");
    }

    #[test]
    fn cidr() {
        assert_eq!(parse_cidr("10.0.0.0/8"), Some(("10.0.0.0".parse().unwrap(), 8)));
        for bad in ["10.0.0.0", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/33", "::/129", "a/8", "10.0.0.0/8/8"] {
            assert_eq!(parse_cidr(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Outcome::parse(&bytes, Version::V1_1_0);
            let _ = failure("exit 1", &bytes, &bytes);
        }

        #[test]
        fn any_index_and_address_is_survived(index in -3i64..4, address in "[0-9a-f.:/]{0,20}") {
            let text = format!(r#"{{"interfaces":[{{"name":"eth0"}}],"ips":[{{"address":"{address}","interface":{index}}}]}}"#);
            if let Ok(outcome) = Outcome::parse(text.as_bytes(), Version::V1_1_0) {
                let _ = outcome.ips("eth0");
            }
        }
    }
}
