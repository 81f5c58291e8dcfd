//! Commands of the OCI runtime as children of the shim: started, watched for their time limit, judged when reaped.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::runtime::oci;
use crate::sys::file;
use crate::sys::monitor::{self, End};
use crate::sys::process::Program;

/// How long a command may go on that nobody wants any more. Most end in hundredths of a second; an end is told later by so much.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Run,
    /// The number of the exec.
    Exec(u32),
    /// The number of the connection that waits.
    Update(u32),
    Delete,
}

impl Purpose {
    fn verb(self) -> &'static str {
        match self {
            Purpose::Run => "run",
            Purpose::Exec(_) => "exec",
            Purpose::Update(_) => "update",
            Purpose::Delete => "delete",
        }
    }

    /// Whether a process of the container becomes our child through it.
    pub fn brings_child(self) -> bool {
        matches!(self, Purpose::Run | Purpose::Exec(_))
    }
}

/// A running command.
pub struct Task {
    pub pid: i32,
    pub purpose: Purpose,
    pub deadline: Instant,
    limit: Duration,
    runtime: String,
    log: PathBuf,
    /// Input files to remove at the end.
    inputs: Vec<PathBuf>,
    ended_by_us: Option<Error>,
}

impl Task {
    /// Starts `program`, which writes its errors to `log`.
    pub fn start(program: Program, runtime: &Path, purpose: Purpose, log: PathBuf, inputs: Vec<PathBuf>, limit: Duration) -> Result<Task> {
        // Whoever cleans up after a shim that died must not meet a command of its.
        let child = monitor::with_clean_signals(|| program.ends_with_us().spawn()).inspect_err(|_| remove(&inputs))?;
        let runtime = runtime.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pid = child.id() as i32;
        Ok(Task { pid, purpose, deadline: Instant::now() + limit, limit, runtime, log, inputs, ended_by_us: None })
    }

    /// Wants the command no more, and lets it come to its end: what it did by then is undone by what it would do next (it mounts its own
    /// binary for a moment). One that needs long is killed.
    pub fn give_up(&mut self, why: Error) {
        if self.ended_by_us.is_none() {
            self.ended_by_us = Some(why);
            self.deadline = self.deadline.min(Instant::now() + LAST_WORDS);
        }
    }

    /// Kills the command and what is still in its process group; it is reaped as usual.
    pub fn abort(&mut self, why: Error) {
        if self.ended_by_us.is_none() {
            self.ended_by_us = Some(why);
        }
        // Not reaped yet, so the number is still ours.
        let _ = monitor::kill(-self.pid, libc::SIGKILL);
    }

    /// Kills it once its time is over.
    pub fn check(&mut self, now: Instant) {
        if now >= self.deadline {
            let text = format!("run {} {}: timed out after {} s", self.runtime, self.purpose.verb(), self.limit.as_secs_f32());
            self.abort(Error::deadline(text));
            // Should the kill not take at once, ask again, but do not spin.
            self.deadline = now + Duration::from_millis(100);
        }
    }

    /// Judges the end of the command. `stderr` is asked for when its log says nothing.
    pub fn outcome(self, end: End, stderr: impl FnOnce() -> String) -> Result<()> {
        let log = file::read(&self.log, 1 << 20).unwrap_or_default();
        let _ = file::remove_file(&self.log);
        remove(&self.inputs);
        if let Some(error) = self.ended_by_us {
            return Err(error);
        }
        if end == End::Code(0) {
            return Ok(());
        }
        let words = oci::last_error(&String::from_utf8_lossy(&log)).or_else(|| oci::last_error(&stderr()));
        let words = words.map_or(String::new(), |w| format!(": {w}"));
        Err(Error::internal(format!("run {} {}: {end}{words}", self.runtime, self.purpose.verb())))
    }
}

fn remove(files: &[PathBuf]) {
    for path in files {
        let _ = file::remove_file(path);
    }
}
