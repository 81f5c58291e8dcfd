//! The answer to a request that asks for a WebSocket: RFC 6455, 4.2, and which subprotocol is spoken.

use base64::Engine;
use tungstenite::handshake::derive_accept_key;

/// What the URL asks for; the subprotocols differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Exec and attach.
    Remote,
    PortForward,
}

/// How the connection is used from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Messages with the number of a channel in front.
    Channels {
        /// Text messages: the digit of the channel, then base64.
        base64: bool,
        /// The client may end a channel alone: 255 and its number (v5).
        half_close: bool,
        /// How exec ends: a Status as JSON (v4 and later), or words.
        status: bool,
    },
    /// SPDY/3.1 in binary messages.
    Tunnel,
}

/// An accepted request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upgrade {
    pub protocol: Protocol,
    /// The subprotocol by name; empty: the client named none.
    pub name: &'static str,
    /// The whole answer, to be sent before all else.
    pub answer: String,
}

/// A refused request: an HTTP status, words for its body, and a header that tells the client what would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    pub message: String,
    pub header: Option<(&'static str, String)>,
}

const fn channels(base64: bool, half_close: bool, status: bool) -> Protocol {
    Protocol::Channels { base64, half_close, status }
}

/// Subprotocols of exec and attach. No name at all is what browsers and the oldest clients send: the same as the first version.
const REMOTE: [(&str, Protocol); 6] = [
    ("v5.channel.k8s.io", channels(false, true, true)),
    ("v4.channel.k8s.io", channels(false, false, true)),
    ("v4.base64.channel.k8s.io", channels(true, false, true)),
    ("channel.k8s.io", channels(false, false, false)),
    ("base64.channel.k8s.io", channels(true, false, false)),
    ("", channels(false, false, false)),
];

/// Subprotocols of port-forward; v5 does not exist here.
const PORT_FORWARD: [(&str, Protocol); 4] = [
    ("SPDY/3.1+portforward.k8s.io", Protocol::Tunnel),
    ("v4.channel.k8s.io", channels(false, false, true)),
    ("v4.base64.channel.k8s.io", channels(true, false, true)),
    ("", channels(false, false, false)),
];

/// Decides on a request with these headers (names in any case). The client's order of subprotocols counts, as in Go's servers.
pub fn upgrade(headers: &[(String, String)], verb: Verb) -> Result<Upgrade, Refusal> {
    if !tokens(headers, "upgrade").any(|t| t.eq_ignore_ascii_case("websocket"))
        || !tokens(headers, "connection").any(|t| t.eq_ignore_ascii_case("upgrade"))
    {
        return Err(bad("expected a request to upgrade to websocket"));
    }
    if one(headers, "sec-websocket-version") != Some("13") {
        let header = Some(("Sec-WebSocket-Version", "13".to_owned()));
        return Err(Refusal { header, ..bad("expected version 13 of WebSocket") });
    }
    let key = one(headers, "sec-websocket-key").ok_or_else(|| bad("expected one Sec-WebSocket-Key"))?;
    if !base64::engine::general_purpose::STANDARD.decode(key).is_ok_and(|k| k.len() == 16) {
        return Err(bad("expected 16 bytes in base64 as Sec-WebSocket-Key"));
    }
    let known: &[(&str, Protocol)] = match verb {
        Verb::Remote => &REMOTE,
        Verb::PortForward => &PORT_FORWARD,
    };
    let wanted: Vec<&str> = tokens(headers, "sec-websocket-protocol").collect();
    let found = match wanted.is_empty() {
        true => known.iter().find(|k| k.0.is_empty()),
        false => wanted.iter().find_map(|w| known.iter().find(|k| k.0 == *w && !w.is_empty())),
    };
    let Some(&(name, protocol)) = found else {
        let names: Vec<&str> = known.iter().map(|k| k.0).filter(|n| !n.is_empty()).collect();
        return Err(Refusal {
            status: 403,
            message: format!("no known subprotocol; known are {}", names.join(", ")),
            header: Some(("X-Accepted-Stream-Protocol-Versions", names.join(", "))),
        });
    };
    let mut answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n",
        derive_accept_key(key.as_bytes())
    );
    if !name.is_empty() {
        answer.push_str(&format!("Sec-WebSocket-Protocol: {name}\r\n"));
    }
    answer.push_str("\r\n");
    Ok(Upgrade { protocol, name, answer })
}

fn bad(message: &str) -> Refusal {
    Refusal { status: 400, message: message.to_owned(), header: None }
}

/// The members of a list header, which may come in several lines.
fn tokens<'a>(headers: &'a [(String, String)], name: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = headers.iter().filter(move |h| h.0.eq_ignore_ascii_case(name));
    lines.flat_map(|h| h.1.split(',')).map(str::trim).filter(|t| !t.is_empty())
}

/// The value of a header that must be there once.
fn one<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let mut values = headers.iter().filter(|h| h.0.eq_ignore_ascii_case(name));
    let value = values.next()?;
    values.next().is_none().then_some(value.1.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(protocols: &[&str]) -> Vec<(String, String)> {
        let mut headers = vec![
            ("Upgrade".into(), "WebSocket".into()),
            ("Connection".into(), "keep-alive, Upgrade".into()),
            ("Sec-WebSocket-Version".into(), "13".into()),
            ("Sec-WebSocket-Key".into(), "dGhlIHNhbXBsZSBub25jZQ==".into()),
        ];
        headers.extend(protocols.iter().map(|p| ("sec-websocket-protocol".to_owned(), (*p).to_owned())));
        headers
    }

    #[test]
    fn the_key_of_the_rfc() {
        let upgrade = upgrade(&request(&["v4.channel.k8s.io"]), Verb::Remote).unwrap();
        assert!(upgrade.answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
        assert!(upgrade.answer.ends_with("Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"));
    }

    #[test]
    fn the_client_chooses() {
        for (protocols, name) in [
            (&["v5.channel.k8s.io, v4.channel.k8s.io"][..], "v5.channel.k8s.io"),
            (&["v4.channel.k8s.io,v5.channel.k8s.io"], "v4.channel.k8s.io"),
            (&["v9.channel.k8s.io", "base64.channel.k8s.io"], "base64.channel.k8s.io"),
            (&["v4.base64.channel.k8s.io"], "v4.base64.channel.k8s.io"),
            (&["channel.k8s.io"], "channel.k8s.io"),
            (&[], ""),
        ] {
            assert_eq!(upgrade(&request(protocols), Verb::Remote).unwrap().name, name, "{protocols:?}");
        }
        let tunnel = upgrade(&request(&["SPDY/3.1+portforward.k8s.io"]), Verb::PortForward).unwrap();
        assert_eq!(tunnel.protocol, Protocol::Tunnel);
        assert!(!upgrade(&request(&[]), Verb::PortForward).unwrap().answer.contains("Protocol:"));
    }

    #[test]
    fn refusals() {
        for (verb, protocol) in [
            (Verb::Remote, "SPDY/3.1+portforward.k8s.io"),
            (Verb::Remote, "v9.channel.k8s.io"),
            (Verb::PortForward, "v5.channel.k8s.io"),
            (Verb::PortForward, "channel.k8s.io"),
        ] {
            let refusal = upgrade(&request(&[protocol]), verb).unwrap_err();
            assert_eq!(refusal.status, 403, "{protocol}");
        }
        for (name, value) in [
            ("Upgrade", "h2c"),
            ("Connection", "close"),
            ("Sec-WebSocket-Version", "8"),
            ("Sec-WebSocket-Key", "c2hvcnQ="),
            ("Sec-WebSocket-Key", "not base64 at all!!!!!!!"),
        ] {
            let mut headers = request(&["v4.channel.k8s.io"]);
            headers.iter_mut().filter(|h| h.0 == name).for_each(|h| h.1 = value.to_owned());
            assert_eq!(upgrade(&headers, Verb::Remote).unwrap_err().status, 400, "{name}: {value}");
            headers.retain(|h| h.0 != name);
            assert_eq!(upgrade(&headers, Verb::Remote).unwrap_err().status, 400, "without {name}");
        }
        let mut twice = request(&[]);
        twice.push(twice[3].clone());
        assert_eq!(upgrade(&twice, Verb::Remote).unwrap_err().status, 400);
        let old = upgrade(&[request(&[])[..2].to_vec(), vec![("Sec-WebSocket-Version".into(), "8".into())]].concat(), Verb::Remote);
        assert_eq!(old.unwrap_err().header, Some(("Sec-WebSocket-Version", "13".to_owned())));
    }
}
