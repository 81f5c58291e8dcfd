//! The one error type: a gRPC code, a message for people, and what caused it.
//!
//! The code is set where its meaning is known; `.context(…)` adds words in front and keeps the code. There is on
//! purpose no `From<std::io::Error>`: a bare `?` on it does not compile, so every error says which path or verb.

use std::fmt;

/// gRPC status codes (grpc/status.proto numbers) that crisp answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
}

impl Code {
    /// The upper-case name of the gRPC documentation, for logs.
    pub fn name(self) -> &'static str {
        match self {
            Code::Ok => "OK",
            Code::Cancelled => "CANCELLED",
            Code::Unknown => "UNKNOWN",
            Code::InvalidArgument => "INVALID_ARGUMENT",
            Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Code::NotFound => "NOT_FOUND",
            Code::AlreadyExists => "ALREADY_EXISTS",
            Code::PermissionDenied => "PERMISSION_DENIED",
            Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Code::FailedPrecondition => "FAILED_PRECONDITION",
            Code::Unimplemented => "UNIMPLEMENTED",
            Code::Internal => "INTERNAL",
            Code::Unavailable => "UNAVAILABLE",
        }
    }
}

/// An error of crisp. `Display` prints the whole chain of words, outermost first.
#[derive(Clone, Debug)]
pub struct Error {
    code: Code,
    message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Error {
        Error { code, message: message.into() }
    }

    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(Code::InvalidArgument, message)
    }

    pub fn not_found(message: impl Into<String>) -> Error {
        Error::new(Code::NotFound, message)
    }

    pub fn precondition(message: impl Into<String>) -> Error {
        Error::new(Code::FailedPrecondition, message)
    }

    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(Code::Internal, message)
    }

    pub fn unimplemented(message: impl Into<String>) -> Error {
        Error::new(Code::Unimplemented, message)
    }

    pub fn cancelled(message: impl Into<String>) -> Error {
        Error::new(Code::Cancelled, message)
    }

    pub fn deadline(message: impl Into<String>) -> Error {
        Error::new(Code::DeadlineExceeded, message)
    }

    pub fn code(&self) -> Code {
        self.code
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same error under another code.
    pub fn with_code(mut self, code: Code) -> Error {
        self.code = code;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What `.context` accepts as a cause. A closed list: our own error keeps its code, everything foreign is INTERNAL until
/// somebody who knows better says `with_code`. An ENOENT never becomes NOT_FOUND by itself, because kubelet reads
/// NOT_FOUND as "already gone".
pub trait Cause {
    fn into_parts(self) -> (Code, String);
}

impl Cause for Error {
    fn into_parts(self) -> (Code, String) {
        (self.code, self.message)
    }
}

/// A full file system is the one thing that every call means alike: RESOURCE_EXHAUSTED.
macro_rules! system {
    ($($t:ty => $number:expr),* $(,)?) => {$(
        impl Cause for $t {
            fn into_parts(self) -> (Code, String) {
                let number: Option<i32> = $number(&self);
                let full = matches!(number, Some(libc::ENOSPC | libc::EDQUOT));
                (if full { Code::ResourceExhausted } else { Code::Internal }, chain(&self))
            }
        }
    )*};
}

system!(
    std::io::Error => std::io::Error::raw_os_error,
    nix::errno::Errno => |e: &nix::errno::Errno| Some(*e as i32),
    rustix::io::Errno => |e: &rustix::io::Errno| Some(e.raw_os_error()),
);

macro_rules! foreign {
    ($($t:ty),* $(,)?) => {$(
        impl Cause for $t {
            fn into_parts(self) -> (Code, String) {
                (Code::Internal, chain(&self))
            }
        }
    )*};
}

foreign!(serde_json::Error, std::num::ParseIntError, std::str::Utf8Error, std::string::FromUtf8Error,);

#[cfg(feature = "engine")]
foreign!(protobuf::Error, ureq::Error, oci_spec::OciSpecError);

/// An error and its sources, each once, joined by ": ".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let words = source.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = source.source();
    }
    text
}

/// Adds words to an error: a lower-case verb phrase with the path or id, such as `mount overlay on /run/…/rootfs`.
pub trait Context<T> {
    fn context<S: Into<String>>(self, words: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Cause> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, words: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| {
            let (code, message) = cause.into_parts();
            Error { code, message: format!("{}: {}", words().into(), message) }
        })
    }
}

/// Collects the errors of a teardown, whose every step runs whatever happened to the one before.
#[derive(Debug, Default)]
pub struct ErrorList(Vec<Error>);

impl ErrorList {
    /// Keeps the error of `result`, if any; gives its value back.
    pub fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.0.push(error);
                None
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first error's code with all the messages, or success.
    pub fn finish(self) -> Result<()> {
        let Some(first) = self.0.first() else { return Ok(()) };
        let code = first.code;
        let message = self.0.iter().map(|e| e.message.as_str()).collect::<Vec<_>>().join("; ");
        Err(Error { code, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_the_code() {
        let e: Result<()> = Err(Error::not_found("container 3f2a"));
        let e = e.context(|| "start container").unwrap_err();
        assert_eq!(e.code(), Code::NotFound);
        assert_eq!(e.to_string(), "start container: container 3f2a");
    }

    #[test]
    fn enoent_is_internal() {
        let e = std::fs::read("/nonexistent").context(|| "read /nonexistent").unwrap_err();
        assert_eq!(e.code(), Code::Internal);
    }

    #[test]
    fn list_joins_all() {
        let mut list = ErrorList::default();
        list.keep::<()>(Err(Error::internal("a")));
        list.keep(Ok(1));
        list.keep::<()>(Err(Error::invalid("b")));
        let e = list.finish().unwrap_err();
        assert_eq!((e.code(), e.message()), (Code::Internal, "a; b"));
    }
}
