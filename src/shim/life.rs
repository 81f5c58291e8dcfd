//! The life of the container in its shim: started by the OCI runtime, watched, and after its first process has ended: the rest
//! killed, output read to its end, exit record written, watchers told, the OCI runtime made to forget it. In this order: whoever
//! hears of an exit finds its record, and whoever finds a shim gone without a record knows that it died.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::de::IgnoredAny;
use serde::Deserialize;

use super::exec::read_pid;
use super::protocol::{Answer, Event, ExitRecord, Fault, Phase, VERSION};
use super::record::{self, now};
use super::server::{say, Ending, Shim};
use super::stdio::Stdio;
use super::task::{Purpose, Task};
use crate::error::{Error, Result};
use crate::runtime::{oci, Kind};
use crate::sys::monitor::{self, End};
use crate::sys::process::no_output;
use crate::sys::{file, pidfd};

/// How long processes may take to die of SIGKILL before we go on without them.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long output is awaited once nothing of the container lives: something else holds the pipe then.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// How long removing the cgroups may take.
const REMOVE_LIMIT: Duration = Duration::from_millis(500);

/// Longest config.json that is read, bytes; ours are some ten thousand.
const SPEC_LIMIT: u64 = 16 << 20;

const PID_FILE: &str = "pid";
const RUN_LOG: &str = "runtime.log";
const DELETE_LOG: &str = "delete.log";

impl Shim {
    /// Starts the OCI runtime's run.
    pub fn start_container(&mut self) {
        if let Err(error) = self.start_run() {
            self.fail(error);
        }
    }

    fn start_run(&mut self) -> Result<()> {
        let (stdio, ends) = Stdio::open(&self.config, &self.dir)?;
        self.stdio = stdio;
        let (pid_file, log) = (self.dir.join(PID_FILE), self.dir.join(RUN_LOG));
        file::remove_file(&pid_file)?;
        file::remove_file(&log)?;
        let handler = &self.config.handler;
        let args = oci::run(handler, &log, &self.dir, &pid_file, ends.console.as_deref(), &self.config.id);
        let mut program = oci::program(handler, args, &self.dir).stderr_to(ends.stderr);
        if let Some(fd) = ends.stdin {
            program = program.stdin_from(fd);
        }
        // With a terminal the runtime's own, which is not the host's /dev/null.
        program = program.stdout_to(ends.stdout.map_or_else(no_output, Ok)?);
        if handler.systemd_cgroup {
            self.oom.count_above(&self.cgroup);
        }
        let task = Task::start(program, &handler.path, Purpose::Run, log, Vec::new(), self.limit())?;
        self.tasks.push(task);
        Ok(())
    }

    /// Stops a start that is under way.
    pub fn abort_run(&mut self, why: Error) {
        if let Some(task) = self.tasks.iter_mut().find(|t| t.purpose == Purpose::Run) {
            task.abort(why);
        }
    }

    /// Everything that is due: children, deadlines, the way to the end. Gives the time to come again.
    pub fn advance(&mut self, now: Instant) -> Option<Instant> {
        self.reap();
        self.tasks.iter_mut().for_each(|t| t.check(now));
        let mut again = None;
        let mut sooner = |time: Option<Instant>| again = [again, time].into_iter().flatten().min();
        sooner(self.advance_execs(now));
        if self.oom.has_notice() {
            let kills = self.oom_kills();
            if self.oom.look(kills, now) {
                self.tell_watchers(&Event::Oom { kills });
            }
            sooner(self.oom.deadline(now));
        }
        sooner(self.advance_ending(now));
        sooner(self.advance_attachers(now));
        // Last: the steps before may have started one.
        sooner(self.tasks.iter().map(|t| t.deadline).min());
        again
    }

    /// Takes dead children. While the OCI runtime is bringing a process of the container, only those we know by number: the
    /// unknown one may be just that process, and its pid must stay taken until we have read it.
    fn reap(&mut self) {
        let mut index = 0;
        while index < self.tasks.len() {
            match monitor::reap(Some(self.tasks[index].pid)) {
                Some((_, end)) => {
                    let task = self.tasks.swap_remove(index);
                    self.task_ended(task, end);
                }
                None => index += 1,
            }
        }
        if self.tasks.iter().any(|t| t.purpose.brings_child()) {
            let known: Vec<i32> = self.execs.iter().filter_map(|e| e.pid).chain((self.pid > 0).then_some(self.pid)).collect();
            for pid in known {
                if let Some((pid, end)) = monitor::reap(Some(pid)) {
                    self.process_ended(pid, end);
                }
            }
            return;
        }
        while let Some((pid, end)) = monitor::reap(None) {
            match self.tasks.iter().position(|t| t.pid == pid) {
                Some(index) => {
                    let task = self.tasks.swap_remove(index);
                    self.task_ended(task, end);
                }
                None => self.process_ended(pid, end),
            }
        }
    }

    fn process_ended(&mut self, pid: i32, end: End) {
        if pid == self.pid {
            self.first_process_ended(end);
        } else if let Some(number) = self.execs.iter().find(|e| e.pid == Some(pid)).map(|e| e.number) {
            self.exec_ended(number, end.exit_code());
        }
    }

    fn task_ended(&mut self, task: Task, end: End) {
        let purpose = task.purpose;
        let stdio = &mut self.stdio;
        let result = task.outcome(end, || if purpose == Purpose::Run { stdio.runtime_words() } else { String::new() });
        match purpose {
            Purpose::Run => {
                if let Err(error) = result.and_then(|()| self.running()) {
                    self.fail(error);
                }
            }
            Purpose::Exec(number) => self.exec_started(number, result),
            Purpose::Update(peer) => self.answer_result(peer, result),
            Purpose::Delete => {
                if result.is_err() {
                    self.mark_undeleted();
                }
                self.deleted()
            }
        }
    }

    /// The OCI runtime says that the container runs.
    fn running(&mut self) -> Result<()> {
        let pid = read_pid(&self.dir.join(PID_FILE))?;
        self.stdio.expect_console()?;
        self.pid = pid;
        self.started_at = now();
        // It may have ended already; until it is reaped its start time can be read.
        self.start_time = pidfd::start_time_of(pid).unwrap_or(0);
        self.phase = Phase::Running;
        self.stdio.started();
        self.oom.arm(&self.cgroup);
        self.answered = true;
        say(&Answer::Started { pid, start_time: self.start_time, shim_pid: std::process::id() as i32, started_at: self.started_at });
        self.tell_state();
        Ok(())
    }

    /// The start has failed: undo, then say why.
    fn fail(&mut self, error: Error) {
        self.stdio.close(&mut self.log);
        let _ = self.cgroup.kill_all(REMOVE_LIMIT);
        self.delete(Some(error));
    }

    fn first_process_ended(&mut self, end: End) {
        let finished_at = now();
        let record =
            ExitRecord { version: VERSION, exit_code: end.exit_code(), signal: end.signal(), oom: self.oom_kills() > 0, finished_at };
        self.pid = 0;
        self.oom.disarm();
        self.stdio.let_go_of_terminal();
        self.phase = Phase::Ending;
        for task in &mut self.tasks {
            let why = Error::precondition("the container has ended meanwhile");
            match task.purpose.brings_child() {
                true => task.give_up(why),
                false => task.abort(why),
            }
        }
        for exec in &mut self.execs {
            exec.kill = true;
        }
        self.ending = Some(Ending::Killing(record, Instant::now() + KILL_LIMIT));
    }

    fn advance_ending(&mut self, now: Instant) -> Option<Instant> {
        if let Some(Ending::Killing(record, until)) = &self.ending {
            // In a PID namespace of its own everything is dead by now; in a shared one it is not.
            // Whoever waits for the end of an exec hears of it before we go.
            // What an OCI runtime is still bringing is in there too: it has to come back first, or to use up its time.
            if self.tasks.iter().any(|t| t.purpose.brings_child()) && now < *until {
                return None;
            }
            let left = self.cgroup.kill_once() > 0 || !self.execs.is_empty();
            if left && now < *until {
                return Some(now + Duration::from_millis(2));
            }
            self.ending = Some(Ending::Draining(record.clone(), now + DRAIN_LIMIT));
        }
        if let Some(Ending::Draining(record, until)) = &self.ending {
            if !self.stdio.is_closed() && now < *until {
                return Some(*until);
            }
            let record = record.clone();
            self.stdio.close(&mut self.log);
            // Without the record the daemon still learns the end from the event, or that this shim is gone.
            let _ = record::write(&self.dir, &record);
            self.phase = Phase::Exited;
            self.ended = Some(record.clone());
            self.tell_watchers(&Event::Exit(record));
            self.delete(None);
        }
        None
    }

    /// Makes the OCI runtime forget the container.
    fn delete(&mut self, error: Option<Error>) {
        let clean = error.is_none();
        self.ending = Some(Ending::Deleting(error));
        // Before the runtime's own command: it takes a directory with a mount in it for no container's.
        let _ = oci::remove_leftovers(&self.config.handler, &self.config.id, &self.dir);
        if clean && self.forget() {
            return self.deleted();
        }
        self.drop_places();
        let log = self.dir.join(DELETE_LOG);
        let handler = &self.config.handler;
        let program = oci::program(handler, oci::delete(handler, Some(&log), &self.config.id), &self.dir);
        match Task::start(program, &handler.path, Purpose::Delete, log, Vec::new(), self.limit()) {
            Ok(task) => self.tasks.push(task),
            Err(_) => {
                self.mark_undeleted();
                self.deleted()
            }
        }
    }

    /// What the runtime's `delete` does about a container that has ended, without a process: its cgroups and its state directory go. False
    /// where there is more to do, poststop hooks, or things do not look as crun and runc leave them; then the command has to do it.
    fn forget(&self) -> bool {
        let handler = &self.config.handler;
        let state = handler.root.join(&self.config.id);
        let known = matches!(handler.kind, Kind::Crun | Kind::Runc) && !handler.systemd_cgroup && state.is_dir();
        known && !has_poststop(&self.dir) && self.cgroup.remove(REMOVE_LIMIT).is_ok() && file::remove_tree(&state).is_ok()
    }

    /// Leaves word for the daemon that the OCI runtime still knows the container.
    fn mark_undeleted(&self) {
        let _ = file::write(&self.dir.join(super::protocol::UNDELETED_FILE), b"", 0o600, file::Durability::Atomic);
    }

    /// The last step. What the OCI runtime could not remove is tried once more; the daemon looks again when the container is removed.
    fn deleted(&mut self) {
        let _ = self.cgroup.kill_all(REMOVE_LIMIT);
        let _ = self.cgroup.remove(REMOVE_LIMIT);
        let _ = oci::remove_leftovers(&self.config.handler, &self.config.id, &self.dir);
        let _ = file::remove_file(&self.dir.join(PID_FILE));
        let _ = file::remove_file(&self.dir.join(super::protocol::SOCKET_FILE));
        if let Some(Ending::Deleting(Some(error))) = &self.ending {
            if !self.answered {
                say(&Answer::Failed { error: Fault::from(error) });
            }
        }
        // To the daemon we are gone; attachers that are slow get what is theirs.
        self.ending = Some(Ending::Delivering);
        self.drop_watchers();
    }
}

/// Whether the bundle's spec has hooks for after the end. One that cannot be read may.
fn has_poststop(bundle: &Path) -> bool {
    #[derive(Default, Deserialize)]
    struct Spec {
        #[serde(default)]
        hooks: Option<Hooks>,
    }
    #[derive(Default, Deserialize)]
    struct Hooks {
        #[serde(default)]
        poststop: Option<Vec<IgnoredAny>>,
    }
    let read = file::read(&bundle.join("config.json"), SPEC_LIMIT).ok();
    let spec = read.and_then(|bytes| serde_json::from_slice::<Spec>(&bytes).ok());
    spec.is_none_or(|spec| spec.hooks.and_then(|hooks| hooks.poststop).is_some_and(|list| !list.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poststop_hooks_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let with = |spec: &str| {
            std::fs::write(dir.path().join("config.json"), spec).unwrap();
            has_poststop(dir.path())
        };
        assert!(!with(r#"{"ociVersion": "1.0.2", "linux": {}}"#));
        assert!(!with(r#"{"hooks": {"prestart": [{"path": "/bin/true"}], "poststop": []}}"#));
        assert!(!with(r#"{"hooks": null}"#));
        assert!(with(r#"{"hooks": {"poststop": [{"path": "/bin/true"}]}}"#));
        assert!(with("{"), "what cannot be read may have some");
        std::fs::remove_file(dir.path().join("config.json")).unwrap();
        assert!(has_poststop(dir.path()));
    }
}
