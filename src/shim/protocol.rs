//! What the shim and its clients say to each other: JSON in the messages of `sys::socket`, one request per connection.
//!
//! | request | answers |
//! |---|---|
//! | `state` | one `state` |
//! | `kill`, `reopen_log`, `update`, `exec_kill` | one `done` |
//! | `exec` | `started`, and `exited` when the process has ended; hanging up before kills it and all it started |
//! | `exec_stream` | the same; hanging up may leave it alone, and it may have a terminal |
//! | `attach` | `attached`, and `exit` when the container has ended and its output was taken; hanging up detaches. `resize` may follow |
//! | `watch` | events for as long as the shim lives: `state` first, then `oom`, `exit`; an `exit` from before is told again |
//!
//! Any of them may be answered by `error`. A message of another version is refused, so that a daemon that is newer than a
//! running shim gets words and not a misunderstanding. New requests get names of their own for the same reason: a shim that
//! does not know one says so.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};
use crate::runtime::Handler;

/// Version of everything in this file.
pub const VERSION: u32 = 1;

/// File names in a container's directory.
pub const CONFIG_FILE: &str = "shim.json";
pub const SOCKET_FILE: &str = "shim.sock";
pub const EXIT_FILE: &str = "exit";
/// There when the OCI runtime could not delete the container.
pub const UNDELETED_FILE: &str = "undeleted";

/// What one shim is for, in `shim.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimConfig {
    pub version: u32,
    /// The container's id, also for the OCI runtime.
    pub id: String,
    pub handler: Handler,
    /// `linux.cgroupsPath` of the bundle's config.json: absolute, or `slice:prefix:name`.
    pub cgroup: String,
    /// The log file; None: output is read and dropped.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    #[serde(default)]
    pub tty: bool,
    /// Keep a stdin open for later attachment.
    #[serde(default)]
    pub stdin: bool,
    /// Close it when the first attacher that could write has gone.
    #[serde(default)]
    pub stdin_once: bool,
    /// Owner of the stdio pipes: the container's root in a user namespace, so that it can open /dev/stderr.
    #[serde(default)]
    pub stdio_uid: Option<u32>,
    #[serde(default)]
    pub stdio_gid: Option<u32>,
    /// Longest run of one runtime command, milliseconds.
    pub runtime_timeout_ms: u64,
}

/// The one line that a starting shim writes to its stdout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    Started { pid: i32, start_time: u64, shim_pid: i32, started_at: i64 },
    Failed { error: Fault },
}

/// An error on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    pub code: i32,
    pub message: String,
}

impl From<&Error> for Fault {
    fn from(error: &Error) -> Fault {
        Fault { code: error.code() as i32, message: error.message().to_owned() }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Error {
        let codes = [
            Code::Cancelled,
            Code::InvalidArgument,
            Code::DeadlineExceeded,
            Code::NotFound,
            Code::ResourceExhausted,
            Code::FailedPrecondition,
            Code::Unimplemented,
            Code::Unavailable,
        ];
        let code = codes.into_iter().find(|c| *c as i32 == fault.code).unwrap_or(Code::Internal);
        Error::new(code, fault.message)
    }
}

/// A message to the shim.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope<T> {
    pub version: u32,
    pub body: T,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    State,
    /// `all`: every process of the container's cgroup, not its first alone.
    Kill {
        signal: i32,
        all: bool,
    },
    /// Beside it: descriptors for stdin, stdout, stderr.
    Exec(ExecRequest),
    /// As `exec`, with the fields of the request that `exec` of older shims does not know.
    ExecStream(ExecRequest),
    /// Beside it: descriptors for those of stdin, stdout, stderr that are wanted, in this order.
    Attach {
        stdin: bool,
        stdout: bool,
        stderr: bool,
    },
    /// The size of the container's terminal in characters, on the connection of an attacher; not answered.
    Resize {
        width: u16,
        height: u16,
    },
    /// Kills an exec'd process with all it started; done when they are dead and reaped.
    ExecKill {
        id: String,
    },
    ReopenLog {
        path: PathBuf,
    },
    /// OCI resources (config-linux.md).
    Update {
        resources: serde_json::Value,
    },
    Watch,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Unique among the execs of this container.
    pub id: String,
    /// The OCI process object.
    pub process: serde_json::Value,
    /// With a terminal: the socket, in the container's directory, on which the client takes it. No descriptors then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
    /// Hanging up leaves the process alone once it has started.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}

/// What the shim says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    State(State),
    /// Processes of the container killed for want of memory, so far.
    Oom {
        kills: u64,
    },
    Exit(ExitRecord),
    Started {
        pid: i32,
    },
    Exited {
        code: i32,
    },
    /// Output from here on is passed on.
    Attached,
    Done,
    Error(Fault),
}

/// A container as its shim sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub phase: Phase,
    /// 0 until it runs.
    pub pid: i32,
    /// Of `pid`, clock ticks since boot.
    pub start_time: u64,
    /// When the runtime had it running, nanoseconds since the epoch; 0 until then.
    pub started_at: i64,
    pub oom_kills: u64,
    pub execs: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The OCI runtime is at work.
    Starting,
    Running,
    /// Its first process has ended; the rest is being killed, its output read.
    Ending,
    /// The exit record is written.
    Exited,
}

/// How a container ended, in `exit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub version: u32,
    /// 128 + signal for the death by a signal.
    pub exit_code: i32,
    #[serde(default)]
    pub signal: Option<i32>,
    /// The OOM killer has taken a process of this container at some time.
    pub oom: bool,
    /// Nanoseconds since the epoch.
    pub finished_at: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_stays() {
        let text = r#"{"version":1,"body":{"kill":{"signal":15,"all":false}}}"#;
        let envelope: Envelope<Request> = serde_json::from_str(text).unwrap();
        assert_eq!(envelope.body, Request::Kill { signal: 15, all: false });
        assert_eq!(serde_json::to_string(&envelope).unwrap(), text);
        let exec = Request::Exec(ExecRequest { id: "e".into(), process: serde_json::Value::Null, console: None, keep: false });
        assert_eq!(serde_json::to_string(&exec).unwrap(), r#"{"exec":{"id":"e","process":null}}"#);
        let watch = r#"{"version":1,"body":"watch"}"#;
        assert_eq!(serde_json::from_str::<Envelope<Request>>(watch).unwrap().body, Request::Watch);
    }

    #[test]
    fn answers_are_told_apart() {
        let failed: Answer = serde_json::from_str(r#"{"error":{"code":4,"message":"timed out"}}"#).unwrap();
        let Answer::Failed { error } = failed else { panic!("{failed:?}") };
        assert_eq!(Error::from(error).code(), Code::DeadlineExceeded);
        let started = serde_json::to_string(&Answer::Started { pid: 1, start_time: 2, shim_pid: 3, started_at: 4 }).unwrap();
        assert!(matches!(serde_json::from_str(&started).unwrap(), Answer::Started { pid: 1, .. }));
    }

    proptest::proptest! {
        #[test]
        fn rubbish_is_an_error_only(bytes in proptest::collection::vec(0u8.., 0..200)) {
            let _ = serde_json::from_slice::<Envelope<Request>>(&bytes);
        }
    }
}
