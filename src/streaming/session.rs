//! From the head of a request to a session on a thread of its own.

use std::sync::Arc;

use super::http::{self, Head, Upgrade};
use super::portforward;
use super::remote::{self, Remote, Terms, What};
use super::request::{Protocol, Request, PORT_FORWARD, SPDY_PROTOCOLS};
use super::server::{Shared, Slot};
use super::spdy::Spdy;
use super::token;
use super::transport::Transport;
use super::tunnel::Tunnel;
use super::websocket::{self, Channels, PORTS};
use super::wire::Wire;
use crate::error::{Code, Result};
use crate::sys::thread;

/// The header in which both sides name protocol versions.
const VERSION: &str = "X-Stream-Protocol-Version";
/// What a refused client could have asked for.
const ACCEPTED: &str = "X-Accepted-Stream-Protocol-Versions";

/// What becomes of a request.
pub(super) enum Answer {
    Refuse(Vec<u8>),
    Serve(Box<Session>),
}

/// A session that may begin.
pub(super) struct Session {
    shared: Arc<Shared>,
    slot: Slot,
    request: Request,
    chosen: Chosen,
}

/// What the connection becomes.
enum Chosen {
    Spdy { protocol: Protocol, answer: Vec<u8> },
    WebSocket(websocket::Upgrade),
}

/// Decides on a request. Like the Go servers it takes a token for used once the request names it, whatever else is wrong
/// with the request; only a refusal for too many sessions leaves it good.
pub(super) fn answer(shared: &Arc<Shared>, head: &Head) -> Answer {
    if head.method != "GET" && head.method != "POST" {
        return Answer::Refuse(http::answer(405, &[("Allow", "GET, POST")], "GET or POST"));
    }
    let unknown = || Answer::Refuse(http::answer(404, &[], "unknown, used or expired"));
    let verbs = ["exec", "attach", "portforward"];
    let Some((verb, token)) = verbs.iter().find_map(|verb| Some((*verb, token::of_path(&head.path, verb)?))) else { return unknown() };
    if !shared.tokens.is_known(token) {
        return unknown();
    }
    let Some(slot) = shared.slot() else {
        return Answer::Refuse(http::answer(429, &[("Retry-After", "5")], "too many streaming sessions"));
    };
    let Some(request) = shared.tokens.take(token).filter(|request| request.verb() == verb) else { return unknown() };
    let chosen = match head.upgrade() {
        Some(Upgrade::Spdy) => negotiate(head, &request),
        Some(Upgrade::WebSocket) => handshake(head, &request),
        None => Err(http::answer(400, &[], "an upgrade to SPDY/3.1 or websocket is needed")),
    };
    match chosen {
        Ok(chosen) => Answer::Serve(Box::new(Session { shared: shared.clone(), slot, request, chosen })),
        Err(answer) => Answer::Refuse(answer),
    }
}

/// The client's first choice that we have, and the answer that says so; or the refusal. A client that names none is one from before
/// there were versions.
fn negotiate(head: &Head, request: &Request) -> std::result::Result<Chosen, Vec<u8>> {
    let forward = matches!(request, Request::PortForward { .. });
    let ours: Vec<(&str, Protocol)> = match forward {
        true => vec![(PORT_FORWARD, Protocol::V1)],
        false => SPDY_PROTOCOLS.iter().map(|p| (p.name(), *p)).collect(),
    };
    let mut asked = head.elements(VERSION).peekable();
    if asked.peek().is_none() {
        return Ok(Chosen::Spdy { protocol: Protocol::V1, answer: http::switching("SPDY/3.1", &[]) });
    }
    match asked.find_map(|name| ours.iter().find(|(known, _)| *known == name)) {
        Some((name, protocol)) => Ok(Chosen::Spdy { protocol: *protocol, answer: http::switching("SPDY/3.1", &[(VERSION, name)]) }),
        None => {
            let headers: Vec<(&str, &str)> = ours.iter().map(|(name, _)| (ACCEPTED, *name)).collect();
            Err(http::answer(403, &headers, "no protocol version in common"))
        }
    }
}

/// The same for WebSocket. Channels of port-forward need the ports from the RPC: the client cannot name any.
fn handshake(head: &Head, request: &Request) -> std::result::Result<Chosen, Vec<u8>> {
    let verb = match request {
        Request::PortForward { .. } => websocket::Verb::PortForward,
        _ => websocket::Verb::Remote,
    };
    let upgrade = websocket::upgrade(&head.headers, verb).map_err(|refusal| {
        let headers: Vec<(&str, &str)> = refusal.header.iter().map(|(name, value)| (*name, value.as_str())).collect();
        http::answer(refusal.status, &headers, &refusal.message)
    })?;
    match request {
        Request::PortForward { ports, .. } if upgrade.protocol != websocket::Protocol::Tunnel && !(1..=PORTS).contains(&ports.len()) => {
            Err(http::answer(400, &[], &format!("from 1 to {PORTS} ports are needed for channels")))
        }
        _ => Ok(Chosen::WebSocket(upgrade)),
    }
}

impl Session {
    /// Starts the thread `stream-N`.
    pub fn start(self: Box<Session>, transport: Box<dyn Transport>) -> Result<()> {
        let number = self.shared.next_number();
        thread::spawn(&format!("stream-{number}"), move || (*self).run(number, transport)).map(drop)
    }

    fn run(self, number: u64, transport: Box<dyn Transport>) {
        let Session { shared, slot, request, chosen } = self;
        let verb = request.verb();
        let result = chosen.open(transport, &request).and_then(|(wire, protocol)| serve(&shared, wire, request, protocol));
        drop(slot);
        match result {
            Ok(()) => log::debug!("streaming: session {number} ({verb}) ended"),
            // Clients may go when they like.
            Err(e) if e.code() == Code::Cancelled => log::debug!("streaming: session {number} ({verb}): {e}"),
            Err(e) => log::warn!("streaming: session {number} ({verb}): {e}"),
        }
    }
}

impl Chosen {
    fn open(self, transport: Box<dyn Transport>, request: &Request) -> Result<(Box<dyn Wire>, Protocol)> {
        let upgrade = match self {
            Chosen::Spdy { protocol, answer } => return Ok((Box::new(Spdy::new(transport, answer)), protocol)),
            Chosen::WebSocket(upgrade) => upgrade,
        };
        let protocol = match upgrade.protocol {
            websocket::Protocol::Tunnel => {
                let tunnel = Tunnel::new(transport, upgrade.answer.into_bytes());
                return Ok((Box::new(Spdy::new(tunnel, Vec::new())), Protocol::V1));
            }
            websocket::Protocol::Channels { half_close: true, .. } => Protocol::V5,
            websocket::Protocol::Channels { status: true, .. } => Protocol::V4,
            websocket::Protocol::Channels { .. } => Protocol::V1,
        };
        let channels = match request {
            Request::Exec { wanted, .. } | Request::Attach { wanted, .. } => {
                Channels::Remote { stdin: wanted.stdin, stdout: wanted.stdout, stderr: wanted.stderr, resize: wanted.tty }
            }
            Request::PortForward { ports, .. } => Channels::Ports(ports.clone()),
        };
        Ok((websocket::open(transport, &upgrade, &channels)?, protocol))
    }
}

fn serve(shared: &Shared, wire: Box<dyn Wire>, request: Request, protocol: Protocol) -> Result<()> {
    let (container, wanted, what) = match &request {
        Request::Exec { container, cmd, wanted } => (container, *wanted, What::Exec(cmd)),
        Request::Attach { container, wanted } => (container, *wanted, What::Attach),
        Request::PortForward { sandbox, target, .. } => return portforward::run(wire, sandbox, target, shared.idle, &shared.stop),
    };
    let terms = Terms { wanted, protocol, idle: shared.idle, cancel: &shared.stop };
    let remote = Remote { containers: &shared.containers, container, what, terms };
    remote::run(wire, &remote)
}
