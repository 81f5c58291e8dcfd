//! What changes about a sandbox, and which transition is legal.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Being made: invisible, and undone after a crash.
    Making,
    Ready,
    /// Being stopped or stopped, or broken: no new containers.
    NotReady,
}

/// A process, safe against reuse of its pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// Clock ticks since boot, field 22 of /proc/PID/stat.
    pub start_time: u64,
}

/// Mutable facts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub phase: Phase,
    /// The network may have been set up: true on disk before the first ADD, false after a whole DEL.
    pub network_ready: bool,
    /// The default network's first IP first.
    pub ips: Vec<IpAddr>,
    /// The sandbox's init, when PID mode POD needed one.
    pub init: Option<Process>,
    /// Why it is not ready, when that was not asked for.
    pub reason: String,
    /// LinuxContainerResources as protobuf bytes: what the sandbox itself costs, as run, then as updated. None: never said.
    #[serde(default)]
    pub overhead: Option<Vec<u8>>,
    /// The same, the sum of its containers.
    #[serde(default)]
    pub resources: Option<Vec<u8>>,
    /// Its record is removed, and must not come back; not kept on disk.
    #[serde(skip)]
    pub gone: bool,
}

impl Status {
    pub fn new() -> Status {
        Status {
            phase: Phase::Making,
            network_ready: false,
            ips: Vec::new(),
            init: None,
            reason: String::new(),
            overhead: None,
            resources: None,
            gone: false,
        }
    }

    /// A container may be created or started only in a ready sandbox.
    pub fn can_hold_containers(&self, id: &str) -> Result<()> {
        match self.phase {
            Phase::Ready => Ok(()),
            _ => Err(Error::precondition(format!(
                "sandbox {id} is not ready{}",
                if self.reason.is_empty() { String::new() } else { format!(": {}", self.reason) }
            ))),
        }
    }

    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }
}

impl Default for Status {
    fn default() -> Status {
        Status::new()
    }
}
