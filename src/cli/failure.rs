//! How a command ends when it does not end well: with one line on stderr and an exit code.

use std::fmt;
use std::io;

use grpcio::RpcStatusCode;

use crate::error::Error;

/// Why a command stops.
#[derive(Debug)]
pub enum Failure {
    /// The command line is wrong: exit 2.
    Usage(String),
    /// Something did not work: exit 1.
    Failed(String),
    /// Whatever there is to say has been said, or the reader of our output has gone: this exit code, no line.
    Silent(u8),
}

/// What commands return.
pub type Outcome<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A `Failed` of one line.
    pub fn failed(message: impl Into<String>) -> Failure {
        Failure::Failed(message.into())
    }

    /// From a write to stdout or stderr: a reader that has gone ends the command quietly.
    pub fn output(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::Silent(0),
            _ => Failure::Failed(format!("write output: {error}")),
        }
    }

    /// Prints the line, if any, and gives the exit code.
    pub fn report(&self) -> u8 {
        match self {
            Failure::Usage(message) => {
                warn(message);
                2
            }
            Failure::Failed(message) => {
                warn(message);
                1
            }
            Failure::Silent(code) => *code,
        }
    }
}

/// An error of this side (files, threads): its gRPC code says nothing to the user.
impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Failed(error.to_string())
    }
}

/// Prints `crisp: MESSAGE` on stderr. A stderr that is gone is nobody's loss.
pub fn warn(message: &str) {
    let _ = io::Write::write_all(&mut io::stderr().lock(), format!("crisp: {}\n", one_line(message)).as_bytes());
}

/// `text` without control characters: what a server or a registry says must not move the cursor of a terminal.
pub fn one_line(text: &str) -> String {
    let clean: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean
}

/// The error of one call to the daemon.
#[derive(Debug, Clone)]
pub struct CallError {
    pub code: RpcStatusCode,
    pub message: String,
}

impl CallError {
    /// The daemon does not have the method, or the whole service.
    pub fn is_unimplemented(&self) -> bool {
        self.code == RpcStatusCode::UNIMPLEMENTED
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // grpcio writes a code as 5-NOT_FOUND.
        let code = self.code.to_string();
        write!(f, "{}: {}", code.split_once('-').map_or(code.as_str(), |(_, name)| name), self.message)
    }
}

impl From<grpcio::Error> for CallError {
    fn from(error: grpcio::Error) -> CallError {
        match error {
            grpcio::Error::RpcFailure(status) => CallError { code: status.code(), message: status.message().to_owned() },
            grpcio::Error::RpcFinished(Some(status)) => CallError { code: status.code(), message: status.message().to_owned() },
            grpcio::Error::Codec(error) => CallError { code: RpcStatusCode::INTERNAL, message: format!("decode answer: {error}") },
            other => CallError { code: RpcStatusCode::UNAVAILABLE, message: other.to_string() },
        }
    }
}

/// Adds to an error what was being done.
pub trait During<T> {
    /// `VERB PHRASE: CODE: message`, the form of every error of a call.
    fn during<S: Into<String>>(self, what: impl FnOnce() -> S) -> Outcome<T>;
}

impl<T> During<T> for Result<T, CallError> {
    fn during<S: Into<String>>(self, what: impl FnOnce() -> S) -> Outcome<T> {
        self.map_err(|error| Failure::Failed(format!("{}: {error}", what().into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_error_is_one_line_with_its_code() {
        let error = CallError { code: RpcStatusCode::NOT_FOUND, message: "no\x1b[2J such\nthing".into() };
        let Err(Failure::Failed(text)) = Err::<(), _>(error).during(|| "stop container 3f2a") else { panic!() };
        assert_eq!(one_line(&text), "stop container 3f2a: NOT_FOUND: no [2J such thing");
    }

    #[test]
    fn broken_pipe_is_quiet() {
        assert!(matches!(Failure::output(io::ErrorKind::BrokenPipe.into()), Failure::Silent(0)));
        assert!(matches!(Failure::output(io::ErrorKind::StorageFull.into()), Failure::Failed(_)));
    }
}
