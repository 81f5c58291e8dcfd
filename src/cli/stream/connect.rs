//! From a URL to channels or SPDY streams: TCP, TLS where the URL says https, and the upgrade. After it, nothing blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::PollFlags;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use tungstenite::client::ClientRequestBuilder;
use tungstenite::http::Uri;
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Bytes, Error as WsError, HandshakeError, Message, WebSocket};

use crate::cli::failure::{one_line, Failure, Outcome};
use crate::error::Context;
use crate::streaming::request::PORT_FORWARD;
use crate::streaming::spdy::Spdy;
use crate::streaming::transport::{prepare, Plain, Tls, Transport};
use crate::sys::trust::{self, Authorities};

/// Streams whose ends are told one by one.
pub const V5: &str = "v5.channel.k8s.io";
/// The channels of exec, and of port-forward.
pub const V4: &str = "v4.channel.k8s.io";

/// For connecting, and for each read and write of a handshake.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest message that is accepted, bytes; servers send a few tens of KiB at a time.
const MESSAGE_LIMIT: usize = 4 << 20;
/// Most that waits unsent, bytes: a few of our chunks.
const UNSENT_LIMIT: usize = 4 << 20;
/// Longest head of an answer, bytes.
const HEAD_LIMIT: usize = 16 << 10;
/// Most of the body of a refusal that is shown, bytes.
const WORDS_LIMIT: usize = 400;

/// Whose certificates are believed: the host's authorities, and those of a file.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    ca: Option<String>,
}

impl Trust {
    /// Beside the host's authorities, those in the PEM file `ca`.
    pub fn new(ca: Option<&str>) -> Trust {
        Trust { ca: ca.map(str::to_owned) }
    }

    fn config(&self) -> Outcome<ClientConfig> {
        let mut authorities = Authorities::of_host();
        if let Some(path) = &self.ca {
            authorities.add_file(Path::new(path)).context(|| "read CA certificates")?;
        }
        Ok(trust::client(Some(Arc::new(authorities)))?.with_no_client_auth())
    }
}

/// A TCP connection, with TLS or without.
enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => &tls.sock,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(tcp) => tcp.read(buffer),
            Stream::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(tcp) => tcp.write(buffer),
            Stream::Tls(tls) => tls.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(tcp) => tcp.flush(),
            Stream::Tls(tls) => tls.flush(),
        }
    }
}

/// What the server did.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// Nothing more for now.
    Nothing,
    /// Bytes of a channel.
    Data(u8, Bytes),
    /// The server says goodbye, or has gone.
    Closed,
}

/// An open WebSocket whose messages belong to channels.
pub struct Link {
    socket: WebSocket<Stream>,
    unsent: bool,
    half_close: bool,
}

impl Link {
    /// Connects to `url` (http or https) and asks for one of `protocols`, the best first.
    pub fn open(url: &str, protocols: &[&str], trust: &Trust) -> Outcome<Link> {
        let Reached { uri, what, stream } = reach(url, trust)?;
        Link::upgrade(&uri, stream, protocols).map_err(|message| Failure::failed(format!("{what}: {message}")))
    }

    fn upgrade(uri: &Uri, stream: Stream, protocols: &[&str]) -> Result<Link, String> {
        let rest = uri.path_and_query().map_or("/", |rest| rest.as_str());
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let uri: Uri = format!("{}://{authority}{rest}", if matches!(stream, Stream::Tls(_)) { "wss" } else { "ws" })
            .parse()
            .map_err(|_| "bad URL".to_owned())?;
        let request = protocols.iter().fold(ClientRequestBuilder::new(uri), |request, name| request.with_sub_protocol(*name));
        let config = WebSocketConfig::default()
            .write_buffer_size(0)
            .max_write_buffer_size(UNSENT_LIMIT)
            .max_message_size(Some(MESSAGE_LIMIT))
            .max_frame_size(Some(MESSAGE_LIMIT));
        let (socket, response) = tungstenite::client::client_with_config(request, stream, Some(config)).map_err(refusal)?;
        let chosen = response.headers().get("Sec-WebSocket-Protocol").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let half_close = chosen == V5;
        let tcp = socket.get_ref().tcp();
        tcp.set_nonblocking(true).map_err(|error| error.to_string())?;
        Ok(Link { socket, unsent: false, half_close })
    }

    /// What to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().tcp().as_fd()
    }

    /// For what to poll while something is unsent.
    pub fn unsent(&self) -> PollFlags {
        if self.unsent {
            PollFlags::POLLOUT
        } else {
            PollFlags::empty()
        }
    }

    /// Whether more may be sent: otherwise it would only wait here.
    pub fn has_room(&self) -> bool {
        !self.unsent
    }

    /// The next thing that has arrived. Ask until nothing more comes before polling again.
    pub fn receive(&mut self) -> Outcome<Input> {
        loop {
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => match bytes.first() {
                    Some(&channel) => return Ok(Input::Data(channel, bytes.slice(1..))),
                    None => return Err(Failure::failed("read stream: a message without a channel")),
                },
                Ok(Message::Text(_)) => return Err(Failure::failed("read stream: text where bytes were expected")),
                // Answered by the next write, which is now.
                Ok(Message::Ping(_)) => self.flush()?,
                Ok(Message::Pong(_) | Message::Frame(_)) => {}
                Ok(Message::Close(_)) => {
                    let _ = self.socket.flush();
                    return Ok(Input::Closed);
                }
                Err(WsError::Io(error)) if error.kind() == ErrorKind::WouldBlock => return Ok(Input::Nothing),
                Err(WsError::Io(error)) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_end(&error) => return Ok(Input::Closed),
                Err(error) => return Err(Failure::failed(format!("read stream: {error}"))),
            }
        }
    }

    /// Queues bytes of a channel and sends what the socket takes. Not while there is no room.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Outcome<()> {
        let mut message = Vec::with_capacity(bytes.len() + 1);
        message.push(channel);
        message.extend_from_slice(bytes);
        let sent = self.socket.write(Message::Binary(message.into()));
        self.sent(sent)
    }

    /// Says that nothing more comes on a channel; false if this connection has no words for it.
    pub fn finish(&mut self, channel: u8) -> Outcome<bool> {
        if self.half_close {
            self.send(255, &[channel])?;
        }
        Ok(self.half_close)
    }

    /// Sends what is unsent.
    pub fn flush(&mut self) -> Outcome<()> {
        let sent = self.socket.flush();
        self.sent(sent)
    }

    fn sent(&mut self, result: Result<(), WsError>) -> Outcome<()> {
        self.unsent = match result {
            Ok(()) => false,
            Err(WsError::Io(error)) if error.kind() == ErrorKind::WouldBlock => true,
            // What the server said before it went is still to be read; that will end it.
            Err(error) if is_end(&error) => false,
            Err(error) => return Err(Failure::failed(format!("write stream: {error}"))),
        };
        Ok(())
    }

    /// Says goodbye, if the socket takes it.
    pub fn close(&mut self) {
        let _ = self.socket.close(None).and_then(|()| self.socket.flush());
    }
}

/// The other end of a URL.
struct Reached {
    uri: Uri,
    /// What was done, for errors.
    what: String,
    stream: Stream,
}

fn reach(url: &str, trust: &Trust) -> Outcome<Reached> {
    // A URL holds a token: it is not repeated in errors.
    let uri: Uri = url.parse().map_err(|error| Failure::failed(format!("read the daemon's URL: {error}")))?;
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        other => return Err(Failure::failed(format!("the daemon's URL is of scheme {:?}; expected http or https", other.unwrap_or("")))),
    };
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let what = format!("connect to {host}:{port}");
    let tcp = dial(&host, port).context(|| &what)?;
    tcp.set_nodelay(true).context(|| &what)?;
    tcp.set_read_timeout(Some(PATIENCE)).context(|| &what)?;
    tcp.set_write_timeout(Some(PATIENCE)).context(|| &what)?;
    let stream = if tls {
        let name = ServerName::try_from(host).map_err(|error| Failure::failed(format!("{what}: {error}")))?;
        let connection = ClientConnection::new(Arc::new(trust.config()?), name);
        let mut stream = StreamOwned::new(connection.map_err(|error| Failure::failed(format!("{what}: {error}")))?, tcp);
        // Now, so that a certificate nobody believes in is told as what it is.
        stream.conn.complete_io(&mut stream.sock).context(|| &what)?;
        Stream::Tls(Box::new(stream))
    } else {
        Stream::Plain(tcp)
    };
    Ok(Reached { uri, what, stream })
}

/// Connects to `url` and has it speak SPDY/3.1, for the ports of a sandbox.
pub fn spdy(url: &str, trust: &Trust) -> Outcome<Spdy<Box<dyn Transport>>> {
    let Reached { uri, what, mut stream } = reach(url, trust)?;
    let path = uri.path_and_query().map_or("/", |rest| rest.as_str());
    let host = uri.authority().map_or("", |authority| authority.as_str());
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {PORT_FORWARD}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).context(|| &what)?;
    // By bytes: what follows the head is no text.
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_LIMIT {
        stream.read_exact(&mut byte).context(|| &what)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let status = head.lines().next().and_then(|line| line.split_once(' ')).map_or("", |(_, status)| status);
    if !status.starts_with("101") {
        // A server may keep the connection open behind its words.
        let length = head.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length = length.and_then(|(_, value)| value.trim().parse::<u64>().ok()).unwrap_or(0);
        let mut body = Vec::new();
        let _ = stream.take(length.min(WORDS_LIMIT as u64)).read_to_end(&mut body);
        return Err(Failure::failed(format!("{what}: {}", answered(status, &body))));
    }
    prepare(stream.tcp())?;
    Ok(Spdy::client(match stream {
        Stream::Plain(tcp) => Box::new(Plain::new(tcp)) as Box<dyn Transport>,
        Stream::Tls(tls) => Box::new(Tls::new(tls.sock, tls.conn)),
    }))
}

/// What a server says that does not upgrade.
fn answered(status: &str, body: &[u8]) -> String {
    let words = one_line(&String::from_utf8_lossy(&body[..body.len().min(WORDS_LIMIT)]));
    format!("the server answers {status}{}{words}", if words.is_empty() { "" } else { ": " })
}

/// The server has gone, with a goodbye or without.
fn is_end(error: &WsError) -> bool {
    use tungstenite::error::ProtocolError;
    match error {
        WsError::ConnectionClosed | WsError::AlreadyClosed => true,
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake | ProtocolError::SendAfterClosing) => true,
        WsError::Io(error) => {
            matches!(
                error.kind(),
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted | ErrorKind::UnexpectedEof
            )
        }
        _ => false,
    }
}

fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(tcp) => return Ok(tcp),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Why the server did not upgrade, in its own words where it has some.
fn refusal<R: tungstenite::handshake::HandshakeRole>(error: HandshakeError<R>) -> String {
    match error {
        HandshakeError::Failure(WsError::Http(answer)) => {
            answered(&answer.status().to_string(), answer.body().as_deref().unwrap_or_default())
        }
        HandshakeError::Failure(error) => error.to_string(),
        HandshakeError::Interrupted(_) => "the server does not answer".to_owned(),
    }
}
