//! Proxies from the environment, by the rules of Go's programs: HTTPS_PROXY, HTTP_PROXY and NO_PROXY (or in lower case),
//! and never one for loopback.

use std::net::IpAddr;

use ureq::{Proxy, ProxyProtocol};

use super::url::{is_loopback, split_port};
use crate::error::{Error, Result};

/// What the environment says. `Debug` shows no proxy's address, which may hold a password.
#[derive(Clone, Default)]
pub struct Proxies {
    https: String,
    http: String,
    exceptions: Vec<Exception>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Exception {
    All,
    Network(IpAddr, u8),
    /// A domain; `inner` means itself as well as what is below it. With a port, that port alone.
    Domain {
        name: String,
        itself: bool,
        port: Option<u16>,
    },
    Address(IpAddr, Option<u16>),
}

impl std::fmt::Debug for Proxies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxies").field("exceptions", &self.exceptions).finish_non_exhaustive()
    }
}

impl Proxies {
    /// Of the daemon's environment.
    pub fn from_env() -> Proxies {
        let get = |name: &str| std::env::var(name).or_else(|_| std::env::var(name.to_ascii_lowercase())).unwrap_or_default();
        Proxies::new(&get("HTTPS_PROXY"), &get("HTTP_PROXY"), &get("NO_PROXY"))
    }

    pub fn new(https: &str, http: &str, exceptions: &str) -> Proxies {
        let exceptions = exceptions.split(',').filter_map(|text| exception(text.trim())).collect();
        Proxies { https: https.trim().to_owned(), http: http.trim().to_owned(), exceptions }
    }

    /// The proxy for `scheme://authority`; None: connect directly.
    pub fn find(&self, scheme: &str, authority: &str) -> Result<Option<Proxy>> {
        let (variable, text) = if scheme == "https" { ("HTTPS_PROXY", &self.https) } else { ("HTTP_PROXY", &self.http) };
        if text.is_empty() || is_loopback(authority) || self.is_excepted(scheme, authority) {
            return Ok(None);
        }
        // The value is not shown: it may hold a password.
        let wrong = |why: &str| Error::precondition(format!("{variable} in the daemon's environment: {why}"));
        let proxy = Proxy::new(text).map_err(|_| wrong("expected http://host:port"))?;
        match proxy.protocol() {
            ProxyProtocol::Http | ProxyProtocol::Https => Ok(Some(proxy)),
            _ => Err(wrong("only http:// and https:// proxies are supported")),
        }
    }

    fn is_excepted(&self, scheme: &str, authority: &str) -> bool {
        let (host, port) = split_port(authority);
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let default = if scheme == "https" { 443 } else { 80 };
        let port: u16 = port.and_then(|p| p.parse().ok()).unwrap_or(default);
        let address: Option<IpAddr> = host.parse().ok();
        self.exceptions.iter().any(|exception| match exception {
            Exception::All => true,
            Exception::Network(base, bits) => address.is_some_and(|a| contains(*base, *bits, a)),
            Exception::Address(one, at) => address == Some(*one) && at.is_none_or(|at| at == port),
            Exception::Domain { name, itself, port: at } => {
                let below = host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                at.is_none_or(|at| at == port) && address.is_none() && (below || (*itself && host == *name))
            }
        })
    }
}

fn exception(text: &str) -> Option<Exception> {
    let text = text.to_ascii_lowercase();
    if text == "*" {
        return Some(Exception::All);
    }
    if let Some((base, bits)) = text.split_once('/') {
        let (base, bits): (IpAddr, u8) = (base.parse().ok()?, bits.parse().ok()?);
        return (bits <= if base.is_ipv4() { 32 } else { 128 }).then_some(Exception::Network(base, bits));
    }
    if let Ok(address) = text.parse() {
        return Some(Exception::Address(address, None));
    }
    let (host, port) = split_port(&text);
    let port = match port {
        Some(port) => Some(port.parse().ok()?),
        None => None,
    };
    if let Ok(address) = host.parse() {
        return Some(Exception::Address(address, port));
    }
    let (name, itself) = match host.strip_prefix("*.").or_else(|| host.strip_prefix('.')) {
        Some(name) => (name, false),
        None => (host, true),
    };
    (!name.is_empty()).then(|| Exception::Domain { name: name.to_owned(), itself, port })
}

fn contains(base: IpAddr, bits: u8, address: IpAddr) -> bool {
    let wide = |address: IpAddr| match address {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
        IpAddr::V6(v6) => (u128::from(v6), 128),
    };
    let ((base, size), (address, other)) = (wide(base), wide(address));
    size == other && (bits == 0 || (base ^ address) >> (128 - u32::from(bits)) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_as_go_has_them() {
        let p = Proxies::new(
            "http://p:1",
            "http://p:2",
            "a.io, .b.io,*.c.io, 10.1.0.0/16,fd00::/8,192.0.2.7,d.io:5000,[2001:db8::1]:80, junk/99,",
        );
        let goes = |authority: &str| p.find("https", authority).unwrap().is_some();
        for host in [
            "a.io",
            "A.io:5000",
            "x.a.io",
            "x.b.io",
            "x.c.io:1",
            "10.1.2.3:5000",
            "[fd12::1]:5",
            "192.0.2.7",
            "d.io:5000",
            "x.d.io:5000",
            "localhost:5000",
            "127.0.0.1",
            "[::1]",
        ] {
            assert!(!goes(host), "{host}");
        }
        for host in ["b.io", "c.io", "ba.io", "10.2.0.1", "[fe80::1]", "192.0.2.8", "d.io", "d.io:443", "[2001:db8::1]", "q.io"] {
            assert!(goes(host), "{host}");
        }
        assert!(p.find("http", "[2001:db8::1]").unwrap().is_none());
        assert!(Proxies::new("http://p:1", "", "*").find("https", "a.io").unwrap().is_none());
        assert!(Proxies::new("http://p:1", "", "").find("http", "a.io").unwrap().is_none());
        assert!(Proxies::new("http://p:1", "", "0.0.0.0/0").find("https", "1.2.3.4").unwrap().is_none());
    }

    #[test]
    fn proxies_by_scheme() {
        let p = Proxies::new("http://me:secret@p:1", "q:2", "");
        assert_eq!(p.find("https", "a.io").unwrap().unwrap().port(), 1);
        assert_eq!(p.find("http", "a.io").unwrap().unwrap().port(), 2);
        assert!(!format!("{p:?}").contains("secret"));
        for bad in ["socks5://p:1", "http://", "http://a b"] {
            let e = Proxies::new(bad, "", "").find("https", "a.io").unwrap_err();
            assert!(e.message().starts_with("HTTPS_PROXY") && !e.message().contains("p:1"), "{e}");
        }
    }
}
