//! Addresses: origins (what credentials are bound to), redirects, loopback.

use ureq::http::{Response, StatusCode, Uri};

/// Scheme and authority of a URL, the default port written out. None: no URL that we would send anything to (one with a
/// user name in it, a scheme other than http and https).
pub fn origin(uri: &Uri) -> Option<String> {
    let scheme = uri.scheme_str()?;
    let authority = uri.authority()?;
    if authority.as_str().contains('@') || authority.host().is_empty() || !matches!(scheme, "http" | "https") {
        return None;
    }
    let default = if scheme == "https" { 443 } else { 80 };
    let port = authority.port_u16().unwrap_or(default);
    Some(format!("{scheme}://{}:{port}", authority.host().to_ascii_lowercase()))
}

/// Whether an answer sends us on to its Location.
pub fn redirects(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where the Location of an answer from `from` leads.
pub fn location<T>(from: &Uri, response: &Response<T>) -> Option<Uri> {
    redirect(from, response.headers().get("location")?.as_bytes())
}

/// RFC 3986, 5.2, but for dots in paths. Bytes that no address has are escaped, as browsers do.
fn redirect(from: &Uri, location: &[u8]) -> Option<Uri> {
    let mut text = String::with_capacity(location.len());
    for byte in location.trim_ascii() {
        match byte {
            b'#' => break,
            0..=b' ' | 0x7f.. | b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' => text.push_str(&format!("%{byte:02X}")),
            _ => text.push(*byte as char),
        }
    }
    let location = text.as_str();
    if location.contains("://") && !location.starts_with(['/', '?']) {
        return location.parse().ok();
    }
    let scheme = from.scheme_str()?;
    if location.starts_with("//") {
        return format!("{scheme}:{location}").parse().ok();
    }
    let authority = from.authority()?;
    let path = match location.as_bytes().first()? {
        b'/' => location.to_owned(),
        b'?' => format!("{}{location}", from.path()),
        _ => format!("{}/{location}", from.path().rsplit_once('/').map_or("", |(dir, _)| dir)),
    };
    format!("{scheme}://{authority}{path}").parse().ok()
}

/// Host and port of `host[:port]`, without the brackets of IPv6.
pub fn split_port(authority: &str) -> (&str, Option<&str>) {
    if let Some((address, rest)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (address, rest.strip_prefix(':'));
    }
    match authority.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    }
}

/// Whether `host[:port]` is this machine's loopback.
pub fn is_loopback(authority: &str) -> bool {
    let name = split_port(authority).0;
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A query value: what RFC 3986 does not reserve stays, all else is escaped.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn origins_and_redirects() {
        assert_eq!(origin(&uri("https://A.io/x")), origin(&uri("https://a.io:443/y")));
        assert_ne!(origin(&uri("https://a.io/x")), origin(&uri("http://a.io/x")));
        assert_ne!(origin(&uri("https://a.io/x")), origin(&uri("https://a.io:444/x")));
        assert_eq!(origin(&uri("https://user@a.io/x")), None);
        assert_eq!(origin(&uri("ftp://a.io/x")), None);
        let from = uri("https://a.io/v2/x/blobs/y?q=1");
        assert_eq!(redirect(&from, b"https://b.io/z").unwrap(), "https://b.io/z");
        assert_eq!(redirect(&from, b"//b.io/z").unwrap(), "https://b.io/z");
        assert_eq!(redirect(&from, b"/z?a=b").unwrap(), "https://a.io/z?a=b");
        assert_eq!(redirect(&from, b"/z?back=http://b.io").unwrap(), "https://a.io/z?back=http://b.io");
        assert_eq!(redirect(&from, b"z").unwrap(), "https://a.io/v2/x/blobs/z");
        assert_eq!(redirect(&from, b"?sig=1").unwrap(), "https://a.io/v2/x/blobs/y?sig=1");
        assert_eq!(redirect(&from, b" https://b.io/z?name=a b#part").unwrap(), "https://b.io/z?name=a%20b");
        assert_eq!(redirect(&from, "/ü".as_bytes()).unwrap(), "https://a.io/%C3%BC");
        assert_eq!(redirect(&from, b"https://"), None);
        assert_eq!(redirect(&from, b""), None);
    }

    #[test]
    fn loopback_hosts() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:5000", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.evil.io", "10.0.0.1", "[fe80::1]:5", "q.io", "127.0.0.1.evil.io"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn ports_and_escapes() {
        assert_eq!(split_port("a.io:5"), ("a.io", Some("5")));
        assert_eq!(split_port("a.io"), ("a.io", None));
        assert_eq!(split_port("[::1]:5"), ("::1", Some("5")));
        assert_eq!(split_port("[::1]"), ("::1", None));
        assert_eq!(escape("a b&ns=[::1]:5"), "a%20b%26ns%3D%5B%3A%3A1%5D%3A5");
    }
}
