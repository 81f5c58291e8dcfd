//! What changes about a container, and which transition is legal.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// CRI's states, and the one before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Being made: invisible, and undone after a crash.
    Making,
    Created,
    Running,
    Exited,
}

/// The user that the container's first process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// The primary group among them.
    pub groups: Vec<u32>,
}

/// Mutable facts. Times are nanoseconds since the epoch, 0 for not yet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub state: State,
    /// Intent: the shim is being started. A daemon that finds it set looks for what became of it.
    pub starting: bool,
    /// Intent: a removal has begun and is finished by whoever comes next.
    pub removing: bool,
    /// Host pid of the first process while it runs.
    pub pid: i32,
    pub user: User,
    pub started_at: i64,
    pub finished_at: i64,
    pub exit_code: i32,
    /// Completed, Error, OOMKilled, StartError, ContainerStatusUnknown or ShimDied once it has ended.
    pub reason: String,
    pub message: String,
    /// LinuxContainerResources as protobuf bytes: as created, then as updated.
    pub resources: Vec<u8>,
    /// Whether its shim still has work to do; not kept on disk.
    #[serde(skip)]
    pub shim_alive: bool,
    /// Somebody cleans up, or has cleaned up, after a shim that could not; not kept on disk.
    #[serde(skip)]
    pub buried: bool,
    /// Its record is removed, and must not come back; not kept on disk.
    #[serde(skip)]
    pub gone: bool,
}

impl Default for Status {
    fn default() -> Status {
        Status {
            state: State::Making,
            starting: false,
            removing: false,
            pid: 0,
            user: User::default(),
            started_at: 0,
            finished_at: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            resources: Vec::new(),
            shim_alive: false,
            buried: false,
            gone: false,
        }
    }
}

impl Status {
    pub fn can_start(&self, id: &str) -> Result<()> {
        self.expect(id, "start", State::Created)
    }

    /// Exec, log reopening.
    pub fn can_talk(&self, id: &str, verb: &str) -> Result<()> {
        self.expect(id, verb, State::Running)
    }

    pub fn can_update(&self, id: &str) -> Result<()> {
        match self.state {
            State::Created | State::Running if !self.removing => Ok(()),
            state => Err(Error::precondition(format!("update container {id}: it is {}", name(state)))),
        }
    }

    fn expect(&self, id: &str, verb: &str, wanted: State) -> Result<()> {
        if self.removing {
            return Err(Error::precondition(format!("{verb} container {id}: it is being removed")));
        }
        if self.state == wanted {
            return Ok(());
        }
        Err(Error::precondition(format!("{verb} container {id}: it is {}, not {}", name(self.state), name(wanted))))
    }

    /// How it ended, by its own exit record.
    pub fn end(&mut self, exit_code: i32, oom: bool, finished_at: i64) {
        self.exit_code = exit_code;
        // A program that ends at once has ended before we could say that it runs.
        self.finished_at = finished_at.max(self.started_at);
        self.reason = match (exit_code, oom) {
            (0, _) => "Completed",
            (_, true) => "OOMKilled",
            (_, false) => "Error",
        }
        .to_owned();
        self.message.clear();
        self.become_exited();
    }

    /// How it ended, when nothing recorded it or it never ran.
    pub fn end_because(&mut self, exit_code: i32, reason: &str, message: String, finished_at: i64) {
        self.exit_code = exit_code;
        self.finished_at = finished_at;
        self.reason = reason.to_owned();
        self.message = message;
        self.become_exited();
    }

    fn become_exited(&mut self) {
        self.state = State::Exited;
        self.starting = false;
        self.pid = 0;
    }
}

/// The state as CRI names it.
pub fn name(state: State) -> &'static str {
    match state {
        State::Making => "being created",
        State::Created => "CREATED",
        State::Running => "RUNNING",
        State::Exited => "EXITED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons() {
        for (code, oom, reason) in
            [(0, false, "Completed"), (0, true, "Completed"), (137, true, "OOMKilled"), (137, false, "Error"), (1, false, "Error")]
        {
            let mut status = Status::default();
            status.end(code, oom, 5);
            assert_eq!((status.reason.as_str(), status.state, status.finished_at), (reason, State::Exited, 5));
        }
    }

    #[test]
    fn nothing_ends_before_it_began() {
        let mut status = Status { started_at: 7, ..Status::default() };
        status.end(0, false, 5);
        assert_eq!(status.finished_at, 7);
    }

    #[test]
    fn transitions() {
        let mut status = Status { state: State::Created, ..Status::default() };
        assert!(status.can_start("a").is_ok() && status.can_update("a").is_ok());
        assert_eq!(status.can_talk("a", "exec in").unwrap_err().message(), "exec in container a: it is CREATED, not RUNNING");
        status.state = State::Running;
        assert!(status.can_start("a").is_err() && status.can_talk("a", "exec in").is_ok());
        status.removing = true;
        assert!(status.can_talk("a", "exec in").is_err() && status.can_update("a").is_err());
    }
}
