//! `[streaming]`: where exec, attach and port-forward connect to.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::{at, text, Checker};
use crate::error::Result;

/// The streaming server.
#[derive(Clone, Debug)]
pub struct Streaming {
    /// Port 0: the kernel chooses one.
    pub address: SocketAddr,
    /// None: plain HTTP.
    pub tls: Option<Tls>,
    /// Sessions at a time; more are answered by 429.
    pub sessions: usize,
    /// A session on which nothing moves for so long is ended; zero: never.
    pub idle_timeout: Duration,
    /// Whether a broken connection kills what exec has started, with all its descendants. Otherwise it loses stdin and terminal alone.
    pub kill_on_disconnect: bool,
}

/// Files in PEM form; read again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    address: Spanned<String>,
    port: u16,
    tls_certificate: Spanned<String>,
    tls_key: Spanned<String>,
    sessions: Spanned<usize>,
    idle_timeout_seconds: Spanned<u64>,
    kill_on_disconnect: bool,
}

impl Default for Raw {
    fn default() -> Raw {
        Raw {
            address: text("127.0.0.1"),
            port: 0,
            tls_certificate: text(""),
            tls_key: text(""),
            sessions: at(256),
            idle_timeout_seconds: at(4 * 3600),
            kill_on_disconnect: false,
        }
    }
}

impl Raw {
    pub(super) fn check(self, c: &Checker) -> Result<Streaming> {
        let ip: IpAddr = self.address.get_ref().parse().map_err(|_| {
            c.error(&self.address, format!("streaming.address: expected an IP address, found {:?}", self.address.get_ref()))
        })?;
        let certificate = c.optional_path("streaming.tls_certificate", &self.tls_certificate)?;
        let key = c.optional_path("streaming.tls_key", &self.tls_key)?;
        let tls = match (certificate, key) {
            (Some(certificate), Some(key)) => Some(Tls { certificate, key }),
            (None, None) => None,
            (Some(_), None) => return Err(c.error(&self.tls_certificate, "streaming.tls_key: expected beside streaming.tls_certificate")),
            (None, Some(_)) => return Err(c.error(&self.tls_key, "streaming.tls_certificate: expected beside streaming.tls_key")),
        };
        Ok(Streaming {
            address: SocketAddr::new(ip, self.port),
            tls,
            sessions: c.number("streaming.sessions", &self.sessions, 1, 65536)?,
            idle_timeout: Duration::from_secs(c.number("streaming.idle_timeout_seconds", &self.idle_timeout_seconds, 0, 30 * 86400)?),
            kill_on_disconnect: self.kill_on_disconnect,
        })
    }
}
