//! The values of flags: ports, mounts, environment, credentials.

use std::path::Path;

/// `-p [IP:]HOST:CONTAINER[/PROTOCOL]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Empty: every address of the host.
    pub ip: String,
    pub host: u16,
    pub container: u16,
    pub protocol: Protocol,
}

/// What a port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// `-v HOST:CONTAINER[:ro]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub host: String,
    pub container: String,
    pub readonly: bool,
}

/// Name and password for a registry. `Debug` leaves the password out: it must not reach an error.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({}, ***)", self.username)
    }
}

/// Reads a port mapping; the error says what is wrong with it.
pub fn port(text: &str) -> Result<Port, String> {
    let wrong = |why: &str| format!("-p {text}: {why}; expected [IP:]HOSTPORT:PORT[/tcp|udp|sctp]");
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((ports, "sctp")) => (ports, Protocol::Sctp),
        Some((_, other)) => return Err(wrong(&format!("unknown protocol {other:?}"))),
    };
    let (rest, container) = ports.rsplit_once(':').ok_or_else(|| wrong("one port only"))?;
    let (ip, host) = rest.rsplit_once(':').unwrap_or(("", rest));
    let ip = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
    if !ip.is_empty() && ip.parse::<std::net::IpAddr>().is_err() {
        return Err(wrong(&format!("{ip:?} is not an IP address")));
    }
    let number = |word: &str| word.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| wrong(&format!("bad port {word:?}")));
    Ok(Port { ip: ip.to_owned(), host: number(host)?, container: number(container)?, protocol })
}

/// Reads a mount; a relative host path is taken from the current directory.
pub fn volume(text: &str) -> Result<Volume, String> {
    let wrong = |why: &str| format!("-v {text}: {why}; expected HOSTPATH:PATH[:ro]");
    let mut parts = text.split(':');
    let (host, container) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let readonly = match parts.next() {
        None | Some("rw") => false,
        Some("ro") => true,
        Some(other) => return Err(wrong(&format!("unknown option {other:?}"))),
    };
    if parts.next().is_some() {
        return Err(wrong("too many colons"));
    }
    if !container.starts_with('/') {
        return Err(wrong("the path in the container must be absolute"));
    }
    let host = std::path::absolute(Path::new(host)).map_err(|_| wrong("no host path"))?;
    let host = host.into_os_string().into_string().map_err(|_| wrong("the host path is not UTF-8"))?;
    Ok(Volume { host, container: container.to_owned(), readonly })
}

/// Reads `KEY=VALUE`, or `KEY` with the value it has in `environment`.
pub fn variable(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<(String, String), String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, value.to_owned()),
        None => (text, environment(text).ok_or_else(|| format!("-e {text}: not set here; expected KEY=VALUE"))?),
    };
    if key.is_empty() {
        return Err(format!("-e {text}: no name before the ="));
    }
    Ok((key.to_owned(), value))
}

/// Reads `USER:PASSWORD`. The error does not repeat it.
pub fn credentials(text: &str) -> Result<Credentials, String> {
    match text.split_once(':') {
        Some((username, password)) if !username.is_empty() => {
            Ok(Credentials { username: username.to_owned(), password: password.to_owned() })
        }
        _ => Err("bad credentials: expected USER:PASSWORD".to_owned()),
    }
}

/// Reads a number that is not negative: seconds, lines.
pub fn number(flag: &str, text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("{flag} {text}: expected a whole number, 0 or more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports() {
        let port_of = |ip: &str, host, container, protocol| Ok(Port { ip: ip.to_owned(), host, container, protocol });
        assert_eq!(port("8080:80"), port_of("", 8080, 80, Protocol::Tcp));
        assert_eq!(port("53:53/udp"), port_of("", 53, 53, Protocol::Udp));
        assert_eq!(port("127.0.0.1:8080:80/sctp"), port_of("127.0.0.1", 8080, 80, Protocol::Sctp));
        assert_eq!(port("[::1]:8080:80/tcp"), port_of("::1", 8080, 80, Protocol::Tcp));
        for bad in ["", "80", "80:", ":80", "0:80", "80:0", "80:65536", "-1:80", "80:80/icmp", "host:80:80", "x:80"] {
            let error = port(bad).unwrap_err();
            assert!(error.starts_with(&format!("-p {bad}: ")), "{error}");
        }
    }

    #[test]
    fn volumes() {
        let volume_of = |host: &str, container: &str, readonly| Ok(Volume { host: host.into(), container: container.into(), readonly });
        assert_eq!(volume("/a:/b"), volume_of("/a", "/b", false));
        assert_eq!(volume("/a:/b:ro"), volume_of("/a", "/b", true));
        assert_eq!(volume("/a:/b:rw"), volume_of("/a", "/b", false));
        let here = std::env::current_dir().unwrap().join("a");
        assert_eq!(volume("a:/b"), volume_of(here.to_str().unwrap(), "/b", false));
        for bad in ["", "/a", "/a:", "/a:b", ":/b", "/a:/b:x", "/a:/b:ro:ro"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables() {
        let environment = |key: &str| (key == "HOME").then(|| "/root".to_owned());
        for (text, key, value) in [("A=b=c", "A", "b=c"), ("A=", "A", ""), ("HOME", "HOME", "/root")] {
            assert_eq!(variable(text, &environment), Ok((key.to_owned(), value.to_owned())));
        }
        assert!(variable("NONE", &environment).is_err());
        assert!(variable("=x", &environment).is_err());
    }

    #[test]
    fn secrets_stay_out_of_sight() {
        let good = credentials("me:pa:ss").unwrap();
        assert_eq!((good.username.as_str(), good.password.as_str()), ("me", "pa:ss"));
        assert!(!format!("{good:?}").contains("pa:ss"));
        assert!(!credentials("secret").unwrap_err().contains("secret"));
        assert!(credentials(":secret").is_err());
    }
}
