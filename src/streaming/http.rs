//! HTTP/1.1 as far as an upgrade needs it: the head of one request, and one answer. Pure: bytes in, values out.

use crate::error::{Error, Result};

/// Longest head of a request, bytes.
pub const HEAD_LIMIT: usize = 16 << 10;
/// Most header lines.
const HEADERS: usize = 100;

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub method: String,
    /// The target without its query.
    pub path: String,
    /// In their order, names as they came.
    pub headers: Vec<(String, String)>,
}

/// What a client wants the connection to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upgrade {
    Spdy,
    WebSocket,
}

/// Parses a head; None while it is not whole. The number is its length in bytes: what follows belongs to the upgraded connection.
pub fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(&bytes[..bytes.len().min(HEAD_LIMIT)]) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_LIMIT => return Ok(None),
        Ok(httparse::Status::Partial) => return Err(Error::invalid(format!("head of more than {HEAD_LIMIT} bytes"))),
        Err(e) => return Err(Error::invalid(format!("head: {e}"))),
    };
    let (Some(method), Some(target)) = (request.method, request.path) else { return Err(Error::invalid("head without a request line")) };
    let mut list = Vec::with_capacity(request.headers.len());
    for header in request.headers.iter() {
        let value = std::str::from_utf8(header.value).map_err(|_| Error::invalid("head: a value that is not UTF-8"))?;
        list.push((header.name.to_owned(), value.trim().to_owned()));
    }
    let head = Head { method: method.to_owned(), path: target.split('?').next().unwrap_or_default().to_owned(), headers: list };
    let chunked = head.values("transfer-encoding").next().is_some();
    if chunked || head.values("content-length").any(|v| v != "0") {
        // Its bytes would be taken for frames.
        return Err(Error::invalid("a body in a request to upgrade"));
    }
    Ok(Some((head, length)))
}

impl Head {
    /// The values of all headers of this name, in any case.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The elements of headers that are lists: repeated, separated by commas, or both.
    pub fn elements<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.values(name).flat_map(|value| value.split(',')).map(str::trim).filter(|element| !element.is_empty())
    }

    /// None: no upgrade is asked for, or to something unknown.
    pub fn upgrade(&self) -> Option<Upgrade> {
        if !self.elements("connection").any(|element| element.eq_ignore_ascii_case("upgrade")) {
            return None;
        }
        self.elements("upgrade").find_map(|element| {
            if element.eq_ignore_ascii_case("spdy/3.1") {
                Some(Upgrade::Spdy)
            } else if element.eq_ignore_ascii_case("websocket") {
                Some(Upgrade::WebSocket)
            } else {
                None
            }
        })
    }
}

/// A final answer: the connection closes after it.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} {}\r\n", reason(status));
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n");
    text.push_str(&format!("Content-Length: {}\r\n\r\n{body}\n", body.len() + 1));
    text.into_bytes()
}

/// Yes to an upgrade: what follows is the new protocol.
pub fn switching(protocol: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 101 {}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n", reason(101));
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

fn reason(status: u16) -> &'static str {
    match status {
        101 => "Switching Protocols",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBECTL: &[u8] = b"POST /exec/abc?x=1 HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: SPDY/3.1\r\n\
        X-Stream-Protocol-Version: v4.channel.k8s.io\r\nX-Stream-Protocol-Version: v3.channel.k8s.io, v2.channel.k8s.io\r\n\
        Content-Length: 0\r\n\r\n\x80\x03";

    #[test]
    fn a_whole_head_and_what_follows() {
        let (head, length) = parse(KUBECTL).unwrap().unwrap();
        assert_eq!((head.method.as_str(), head.path.as_str(), &KUBECTL[length..]), ("POST", "/exec/abc", &b"\x80\x03"[..]));
        assert_eq!(head.upgrade(), Some(Upgrade::Spdy));
        let protocols: Vec<_> = head.elements("x-stream-protocol-version").collect();
        assert_eq!(protocols, ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io"]);
        for n in 0..length {
            assert_eq!(parse(&KUBECTL[..n]).unwrap(), None, "{n}");
        }
    }

    #[test]
    fn odd_heads_are_refused() {
        for head in [
            "GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET / SPDY\r\n\r\n",
            "\0\r\n\r\n",
            "GET / HTTP/1.1\r\na\r\n\r\n",
        ] {
            assert!(parse(head.as_bytes()).is_err(), "{head:?}");
        }
        let long = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "x".repeat(HEAD_LIMIT));
        assert!(parse(long.as_bytes()).is_err());
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert!(parse(many.as_bytes()).is_err());
    }

    #[test]
    fn an_upgrade_needs_both_headers() {
        let upgrade = |lines: &str| parse(format!("GET / HTTP/1.1\r\n{lines}\r\n").as_bytes()).unwrap().unwrap().0.upgrade();
        assert_eq!(upgrade("Connection: upgrade\r\nUpgrade: websocket\r\n"), Some(Upgrade::WebSocket));
        assert_eq!(upgrade("Upgrade: SPDY/3.1\r\n"), None);
        assert_eq!(upgrade("Connection: Upgrade\r\n"), None);
        assert_eq!(upgrade("Connection: Upgrade\r\nUpgrade: h2c\r\n"), None);
        assert_eq!(upgrade("Connection: Upgrade\r\nUpgrade: spdy/3.1\r\n"), Some(Upgrade::Spdy));
    }

    proptest::proptest! {
        #[test]
        fn hostile_heads_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2000)) {
            let _ = parse(&bytes);
        }
    }
}
