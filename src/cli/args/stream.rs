//! The words of `crisp exec`, `crisp attach` and `crisp port-forward`.

use std::net::{IpAddr, Ipv4Addr};

use super::Command;
use crate::cli::flags;
use crate::cli::stream::keys;
use crate::cli::words::{Stop, Word, Words};

/// `crisp exec`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exec {
    pub container: String,
    pub command: Vec<String>,
    pub stdin: bool,
    pub tty: bool,
    /// By ExecSync: the output comes at the end.
    pub sync: bool,
    /// Seconds; 0: none.
    pub timeout: u32,
    pub keys: Vec<u8>,
    pub ca: Option<String>,
}

/// `crisp attach`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attach {
    pub container: String,
    pub stdin: bool,
    pub tty: bool,
    pub keys: Vec<u8>,
    pub ca: Option<String>,
}

/// `crisp port-forward`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    pub sandbox: String,
    pub address: IpAddr,
    /// Local (0: any that is free) and remote.
    pub ports: Vec<(u16, u16)>,
    pub ca: Option<String>,
}

pub(super) fn exec(words: &mut Words) -> Result<Command, Stop> {
    let mut exec = Exec { keys: keys::DEFAULT.to_vec(), ..Exec::default() };
    exec.container = loop {
        let flag = match words.read()? {
            Some(Word::Value(container)) => break container,
            Some(Word::Rest(_)) | None => return Err(words.wrong("no CONTAINER")),
            Some(Word::Flag(flag)) => flag,
        };
        match flag.as_str() {
            "-i" | "--stdin" => exec.stdin = true,
            "-t" | "--tty" => exec.tty = true,
            "--sync" => exec.sync = true,
            "--timeout" => {
                exec.timeout = flags::number(&flag, &words.value()?)?;
                // Streams have no time limit.
                exec.sync = true;
            }
            "--detach-keys" => exec.keys = keys::parse(&words.value()?)?,
            "--ca" => exec.ca = Some(words.value()?),
            _ => return Err(words.unknown(&flag)),
        }
    };
    exec.command = words.rest()?;
    if exec.command.first().is_some_and(|word| word == "--") {
        exec.command.remove(0);
    }
    if exec.command.is_empty() {
        return Err(words.wrong("no COMMAND"));
    }
    if exec.sync && (exec.stdin || exec.tty) {
        return Err(words.wrong("--sync and --timeout exclude -i and -t"));
    }
    Ok(Command::Exec(exec))
}

pub(super) fn attach(words: &mut Words) -> Result<Command, Stop> {
    let mut attach = Attach { keys: keys::DEFAULT.to_vec(), ..Attach::default() };
    let mut ids = words.values("CONTAINER", |flag, words| {
        match flag {
            "-i" | "--stdin" => attach.stdin = true,
            "-t" | "--tty" => attach.tty = true,
            "--detach-keys" => attach.keys = keys::parse(&words.value()?)?,
            "--ca" => attach.ca = Some(words.value()?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    attach.container = ids.remove(0);
    words.only(ids)?;
    Ok(Command::Attach(attach))
}

pub(super) fn forward(words: &mut Words) -> Result<Command, Stop> {
    let (mut address, mut ca) = (IpAddr::V4(Ipv4Addr::LOCALHOST), None);
    let mut values = words.values("SANDBOX", |flag, words| {
        match flag {
            "--address" => {
                let text = words.value()?;
                address = text.parse().map_err(|_| format!("--address {text}: expected an IP address"))?;
            }
            "--ca" => ca = Some(words.value()?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let sandbox = values.remove(0);
    if values.is_empty() {
        return Err(words.wrong("no PORT"));
    }
    let ports = values.iter().map(|text| port(text)).collect::<Result<_, _>>()?;
    Ok(Command::PortForward(Forward { sandbox, address, ports, ca }))
}

/// `[LOCAL:]REMOTE`; `:REMOTE` and `0:REMOTE` take any free port.
fn port(text: &str) -> Result<(u16, u16), Stop> {
    let wrong = || Stop::Usage(format!("port {text}: expected [LOCAL:]REMOTE"));
    let (local, remote) = match text.split_once(':') {
        None => (text, text),
        Some(("", remote)) => ("0", remote),
        Some((local, remote)) => (local, remote),
    };
    let remote = remote.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    Ok((local.parse().map_err(|_| wrong())?, remote))
}
