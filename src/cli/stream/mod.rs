//! `exec`, `attach` and `port-forward`: the daemon gives a URL, and a WebSocket to it carries the streams as channels,
//! each message with the number of its channel in front.

/// Reaching a URL.
pub mod connect;
/// Ports.
pub mod forward;
/// Detach keys.
pub mod keys;
/// Streams of a process.
pub mod session;
/// Terminals.
pub mod terminal;

use std::io::IsTerminal;
use std::os::fd::AsFd;

use crossbeam_channel::Receiver;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;

use super::args::stream::{Attach, Exec, Forward};
use super::client::{Client, SHORT};
use super::failure::{warn, CallError, During, Failure, Outcome};
use super::{object, resolve};
use crate::api::runtime::{AttachRequest, ContainerState, ExecRequest, PortForwardRequest};
use connect::{Link, Trust};
use session::{End, Io, Plan};

/// Subprotocols of exec and attach; the newer ends stdin alone.
pub const REMOTE: [&str; 2] = [connect::V5, connect::V4];

/// `crisp exec`: gives the exit code of the command. Without a stream of its own (older servers) and with a time limit,
/// the output comes at the end.
pub fn exec(client: &Client, exec: &Exec, signals: Option<&SignalFd>) -> Outcome<u8> {
    let objects = resolve::objects(client)?;
    let id = &resolve::container(&objects, &exec.container)?.id;
    if exec.sync {
        return object::exec(client, id, &exec.command, exec.timeout);
    }
    let trust = Trust::new(exec.ca.as_deref());
    let tty = exec.tty && !(exec.stdin && is_no_terminal());
    let mut link = match open_exec(client, id, &exec.command, exec.stdin, tty, &trust) {
        Ok(link) => link,
        Err(Refused::Unknown) if !exec.stdin && !tty => return object::exec(client, id, &exec.command, exec.timeout),
        Err(Refused::Unknown) => return Err(Failure::failed("this daemon has no streams: Exec is not implemented")),
        Err(Refused::Failed(failure)) => return Err(failure),
    };
    let plan = Plan { stdin: exec.stdin, tty, keys: exec.keys.clone() };
    match converse(&mut link, &plan, signals)? {
        End::Status(status) => Ok(session::exit_code(&status).unwrap_or_else(|message| {
            warn(&format!("exec in container {id}: {message}"));
            1
        })),
        End::Closed => Err(Failure::failed(format!("exec in container {id}: the connection ended before the command did"))),
        End::Detached => Ok(0),
    }
}

/// A file or a pipe as stdin is an input that ends, which a terminal on the other side could not tell: none is asked for then, as kubectl does.
fn is_no_terminal() -> bool {
    let none = !std::io::stdin().is_terminal();
    if none {
        warn("stdin is no terminal: the command gets none (-t is ignored)");
    }
    none
}

/// Why there is no stream.
pub enum Refused {
    /// The server does not know the call.
    Unknown,
    Failed(Failure),
}

impl Refused {
    fn of(error: CallError, what: String) -> Refused {
        match error.is_unimplemented() {
            true => Refused::Unknown,
            false => Refused::Failed(Err::<(), _>(error).during(|| what).err().unwrap_or(Failure::Silent(1))),
        }
    }
}

/// Asks for an exec and connects to it.
pub fn open_exec(client: &Client, id: &str, command: &[String], stdin: bool, tty: bool, trust: &Trust) -> Result<Link, Refused> {
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: command.to_vec(),
        tty,
        stdin,
        stdout: true,
        // A terminal has one output.
        stderr: !tty,
        ..ExecRequest::default()
    };
    let answer = client.runtime().exec(&request, SHORT).map_err(|error| Refused::of(error, format!("exec in container {id}")))?;
    Link::open(&answer.url, &REMOTE, trust).map_err(Refused::Failed)
}

/// `crisp attach`: gives the exit code of the container, if it ended meanwhile.
pub fn attach(client: &Client, attach: &Attach, signals: Option<&SignalFd>) -> Outcome<u8> {
    let objects = resolve::objects(client)?;
    let id = &resolve::container(&objects, &attach.container)?.id;
    let request = AttachRequest {
        container_id: id.clone(),
        stdin: attach.stdin,
        tty: attach.tty,
        stdout: true,
        stderr: !attach.tty,
        ..AttachRequest::default()
    };
    let url = client.runtime().attach(&request, SHORT).during(|| format!("attach to container {id}"))?.url;
    let mut link = Link::open(&url, &REMOTE, &Trust::new(attach.ca.as_deref()))?;
    let plan = Plan { stdin: attach.stdin, tty: attach.tty, keys: attach.keys.clone() };
    let end = converse(&mut link, &plan, signals)?;
    if let End::Status(status) = &end {
        if let Err(message) = session::exit_code(status) {
            return Err(Failure::failed(format!("attach to container {id}: {message}")));
        }
    }
    if matches!(end, End::Detached) {
        return Ok(0);
    }
    let status = object::status(client, id).during(|| format!("read status of container {id}"))?;
    let ended = status.filter(|status| status.state == ContainerState::CONTAINER_EXITED.into());
    Ok(ended.map_or(0, |status| object::exit_code(status.exit_code)))
}

/// Our own streams on one side, the link on the other; the terminal is raw as long as it lasts.
fn converse(link: &mut Link, plan: &Plan, signals: Option<&SignalFd>) -> Outcome<End> {
    let (stdin, mut stdout, mut stderr) = (std::io::stdin(), std::io::stdout().lock(), std::io::stderr().lock());
    let _raw = (plan.tty && plan.stdin).then(|| terminal::Raw::enter(stdin.as_fd())).transpose()?.flatten();
    let mut io = Io { stdin: stdin.as_fd(), stdout: &mut stdout, stderr: &mut stderr, signals, size: &window };
    session::run(link, plan, &mut io)
}

/// The terminal we are on, whichever of our streams it is.
fn window() -> Option<terminal::Size> {
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    terminal::size(stdout.as_fd()).or_else(|| terminal::size(stdin.as_fd()))
}

fn forward_url(client: &Client, sandbox: &str, ports: Vec<i32>) -> Outcome<String> {
    let request = PortForwardRequest { pod_sandbox_id: sandbox.to_owned(), port: ports, ..Default::default() };
    Ok(client.runtime().port_forward(&request, SHORT).during(|| format!("forward to sandbox {sandbox}"))?.url)
}

/// A link to one port of a sandbox, with two channels: the bytes and the words of an error. The server begins each with the port.
pub fn open_port(client: &Client, sandbox: &str, port: u16, trust: &Trust) -> Outcome<Link> {
    Link::open(&forward_url(client, sandbox, vec![port.into()])?, &[connect::V4], trust)
}

/// `crisp port-forward`: until a signal comes.
pub fn port_forward(client: &Client, forward: &Forward, signals: &Receiver<Signal>) -> Outcome<u8> {
    let objects = resolve::objects(client)?;
    let id = &resolve::sandbox(&objects, &forward.sandbox)?.id;
    let (to, sandbox, trust) = (client.clone(), id.clone(), Trust::new(forward.ca.as_deref()));
    let mut forwarder = forward::Forwarder::new(move || connect::spdy(&forward_url(&to, &sandbox, Vec::new())?, &trust));
    let mut text = String::new();
    for (local, remote) in &forward.ports {
        let address = forwarder.listen(&forward.address, *local, *remote)?;
        text.push_str(&format!("{address} -> {remote}\n"));
    }
    forwarder.start()?;
    super::print(&text)?;
    match signals.recv() {
        // Ctrl-C is how one leaves.
        Ok(Signal::SIGINT) | Err(_) => Ok(0),
        Ok(signal) => Err(Failure::Silent(super::interrupt::exit_code(signal))),
    }
}
