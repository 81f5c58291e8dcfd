//! Further processes in the container. Each gets a child cgroup of its own where the OCI runtime can start one there, so that
//! it can be killed with everything it has started, double forks too. Making and removing that in every hierarchy takes longer
//! than all else, so a cgroup in which nothing is left waits for the next exec.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::protocol::{Event, ExecRequest, Fault, Phase};
use super::server::Shim;
use super::task::{Purpose, Task};
use crate::cgroup::{Cgroup, Layout, Mode};
use crate::error::{Code, Context, Error, Result};
use crate::runtime::{oci, Kind};
use crate::sys::process::no_output;
use crate::sys::{file, monitor};

/// Most execs at a time: each holds a connection, and a stop must always get one.
const EXECS: usize = 96;

/// Empty cgroups kept for the next execs.
const IDLE_CGROUPS: usize = 2;

/// Where an exec goes: a child cgroup, and the `--cgroup` argument if the OCI runtime takes one.
pub struct Place {
    cgroup: Cgroup,
    option: Option<String>,
}

impl Place {
    /// Nothing lives in it, and nobody has made cgroups below it (each adds a link to the directory).
    fn is_vacant(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        self.cgroup.dirs().iter().all(|dir| {
            let bare = std::fs::metadata(&dir.path).is_ok_and(|m| m.nlink() == 2);
            bare && std::fs::read(dir.path.join("cgroup.procs")).is_ok_and(|procs| procs.is_empty())
        })
    }
}

/// One exec'd process, from the request to its end.
pub struct Exec {
    pub number: u32,
    id: String,
    /// The connection that asked; None when it has gone and the process goes on without it.
    peer: Option<u32>,
    keep: bool,
    /// Once the OCI runtime has started it and until it is reaped.
    pub pid: Option<i32>,
    place: Option<Place>,
    oom_score_adj: Option<i64>,
    pub kill: bool,
    /// Connections that wait for the kill.
    killers: Vec<u32>,
    /// The last answer, once known.
    outcome: Option<Event>,
}

/// A new place for exec number `number`.
///
/// runc on v1 takes `controller:name` and enters that hierarchy's child alone. crun on v1 takes a name and silently stays
/// out of the container's cgroup in every hierarchy without such a child, limits included: so it gets one in each.
fn place(kind: Kind, layout: &Layout, parent: &Cgroup, number: u32) -> Option<Place> {
    let name = format!("{}{number}", crate::cgroup::EXEC);
    let one = ["pids", "freezer"].into_iter().find(|c| layout.v1(c).is_some());
    let in_one = |one: &str| parent.child(&name, |d| d.controllers.iter().any(|c| c == one));
    let (cgroup, option) = match (kind, layout.mode, one) {
        (Kind::Runc | Kind::Crun, Mode::V2, _) | (Kind::Crun, _, _) => (parent.child(&name, |d| d.path.is_dir()), Some(name)),
        (Kind::Runc, _, Some(one)) => (in_one(one), Some(format!("{one}:{name}"))),
        (_, Mode::V2, _) => (parent.child(&name, |d| d.unified), None),
        (_, _, Some(one)) => (in_one(one), None),
        _ => return None,
    };
    Some(Place { cgroup, option })
}

impl Shim {
    /// Starts the OCI runtime's exec; the answers come later.
    pub fn exec(&mut self, peer: u32, request: ExecRequest, fds: Vec<OwnedFd>) -> Result<()> {
        if self.phase != Phase::Running {
            return Err(Error::precondition("exec: the container is not running"));
        }
        if self.execs.iter().filter(|e| e.peer.is_some()).count() >= EXECS {
            return Err(Error::new(Code::ResourceExhausted, format!("exec: {EXECS} are running")));
        }
        if self.execs.iter().any(|e| e.id == request.id) {
            return Err(Error::invalid(format!("exec: the id {:?} is in use", request.id)));
        }
        if request.console.as_ref().is_some_and(|c| c.is_empty() || c.contains('/')) {
            return Err(Error::invalid("exec: console: expected the name of a socket in the container's directory"));
        }
        let count = if request.console.is_some() { 0 } else { 3 };
        if fds.len() != count {
            return Err(Error::invalid(format!("exec: {} descriptors instead of {count}", fds.len())));
        }
        self.exec_number += 1;
        let number = self.exec_number;
        let place = self.take_place(number);
        let option = place.as_ref().and_then(|p| p.option.as_deref());
        let started = self.start_exec(number, &request, option, fds);
        let exec = Exec {
            number,
            id: request.id,
            peer: Some(peer),
            keep: request.keep,
            pid: None,
            place,
            oom_score_adj: request.process["oomScoreAdj"].as_i64(),
            kill: false,
            killers: vec![],
            outcome: None,
        };
        match started {
            Ok(task) => {
                self.tasks.push(task);
                self.execs.push(exec);
                Ok(())
            }
            Err(error) => {
                self.lingering.extend(exec.place);
                self.sweep_cgroups();
                Err(error)
            }
        }
    }

    /// An idle cgroup, or a new one. Without one of its own an exec can still run; only a kill is less sure then.
    fn take_place(&mut self, number: u32) -> Option<Place> {
        // Somebody in the container may have moved there meanwhile.
        while let Some(place) = self.idle.pop() {
            if place.is_vacant() {
                return Some(place);
            }
            self.lingering.push(place);
        }
        let place = place(self.config.handler.kind, &self.layout, &self.cgroup, number)?;
        if place.cgroup.create().is_err() {
            let _ = place.cgroup.remove(Duration::ZERO);
            return None;
        }
        Some(place)
    }

    fn start_exec(&self, number: u32, request: &ExecRequest, option: Option<&str>, stdio: Vec<OwnedFd>) -> Result<Task> {
        let path = |what: &str| self.dir.join(format!("exec-{number}.{what}"));
        let process = serde_json::to_vec(&request.process).context(|| "exec: write the process")?;
        let (process_file, log) = (path("json"), path("log"));
        file::write(&process_file, &process, 0o600, file::Durability::Atomic)?;
        let console = request.console.as_ref().map(|name| shown_socket(&self.dir, name));
        let call = oci::Exec { log: &log, pid_file: &path("pid"), process: &process_file, cgroup: option, console: console.as_deref() };
        let args = oci::exec(&self.config.handler, &call, &self.config.id);
        let mut program = oci::program(&self.config.handler, args, &self.dir);
        let mut stdio = stdio.into_iter();
        program = match (stdio.next(), stdio.next(), stdio.next()) {
            (Some(stdin), Some(stdout), Some(stderr)) => program.stdin_from(stdin).stdout_to(stdout).stderr_to(stderr),
            // A terminal is sent to us. What the runtime has besides is not the host's /dev/null: see `no_output`.
            _ => program.stdout_to(no_output()?).stderr_to(no_output()?),
        };
        Task::start(program, &self.config.handler.path, Purpose::Exec(number), log, vec![process_file], self.limit())
    }

    /// The OCI runtime's exec has ended.
    pub fn exec_started(&mut self, number: u32, result: Result<()>) {
        let Some(index) = self.execs.iter().position(|e| e.number == number) else { return };
        let brought = read_pid(&self.dir.join(format!("exec-{number}.pid")));
        let _ = file::remove_file(&self.dir.join(format!("exec-{number}.pid")));
        let exec = &mut self.execs[index];
        match result.and_then(|()| brought.clone()) {
            Ok(pid) => {
                exec.pid = Some(pid);
                // crun leaves it as ours is, runc as it was when the container was created.
                if let Some(adj) = exec.oom_score_adj {
                    let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), adj.to_string());
                }
                // The OCI runtime takes no option for it: we move it.
                if let Some(place) = exec.place.as_ref().filter(|p| p.option.is_none()) {
                    for dir in place.cgroup.dirs() {
                        let _ = std::fs::write(dir.path.join("cgroup.procs"), pid.to_string());
                    }
                }
                if let Some(peer) = exec.peer {
                    self.answer(peer, &Event::Started { pid }, false);
                }
            }
            Err(error) => {
                exec.outcome = Some(Event::Error(Fault::from(&error)));
                // Others may be at it, whose files look the same.
                if self.tasks.is_empty() {
                    let _ = oci::remove_leftovers(&self.config.handler, &self.config.id, &self.dir);
                }
                // What a killed or failed runtime has left, and what one that was given up has brought. The process is our child by now
                // and not reaped; it may not be in the cgroup yet.
                exec.kill = true;
                if let Ok(pid) = brought {
                    let _ = monitor::kill(pid, libc::SIGKILL);
                }
            }
        }
    }

    /// An exec'd process has been reaped.
    pub fn exec_ended(&mut self, number: u32, code: i32) {
        if let Some(exec) = self.execs.iter_mut().find(|e| e.number == number) {
            exec.pid = None;
            exec.outcome = Some(Event::Exited { code });
        }
    }

    /// Asks for the death of an exec'd process with all it started.
    pub fn exec_kill(&mut self, peer: u32, id: &str) -> Result<()> {
        let found = self.execs.iter_mut().find(|e| e.id == id);
        let exec = found.ok_or_else(|| Error::not_found(format!("kill exec {id}: it has ended")))?;
        exec.killers.push(peer);
        let number = exec.number;
        self.condemn(number, "killed while starting");
        Ok(())
    }

    /// The connection of an exec is gone: nobody can take its end any more. It dies unless it runs and is to be kept.
    pub fn exec_abandoned(&mut self, peer: u32) {
        let Some(exec) = self.execs.iter_mut().find(|e| e.peer == Some(peer)) else { return };
        exec.peer = None;
        let (number, starts) = (exec.number, exec.pid.is_none() && exec.outcome.is_none());
        if starts || !exec.keep {
            self.condemn(number, "abandoned while starting");
        }
    }

    fn condemn(&mut self, number: u32, why: &str) {
        if let Some(exec) = self.execs.iter_mut().find(|e| e.number == number) {
            exec.kill = true;
        }
        if let Some(task) = self.tasks.iter_mut().find(|t| t.purpose == Purpose::Exec(number)) {
            task.give_up(Error::cancelled(format!("exec: {why}")));
        }
    }

    /// Kills what is to be killed, answers what has ended. Gives the time to look again.
    pub fn advance_execs(&mut self, now: Instant) -> Option<Instant> {
        let mut again = None;
        let mut index = 0;
        while index < self.execs.len() {
            let exec = &self.execs[index];
            // What the OCI runtime is still bringing is in there too: it has to come back first.
            let starts = self.tasks.iter().any(|t| t.purpose == Purpose::Exec(exec.number));
            let left = if exec.kill && !starts { kill_tree(exec) } else { 0 };
            if exec.outcome.is_none() || left > 0 {
                if exec.kill && !starts {
                    again = Some(now + Duration::from_millis(2));
                }
                index += 1;
                continue;
            }
            let exec = self.execs.swap_remove(index);
            if let (Some(peer), Some(outcome)) = (exec.peer, &exec.outcome) {
                self.answer(peer, outcome, true);
            }
            for killer in &exec.killers {
                self.answer(*killer, &Event::Done, true);
            }
            self.lingering.extend(exec.place);
            self.sweep_cgroups();
        }
        again
    }

    /// Removes the cgroups of execs that have ended: there will be no more.
    pub fn drop_places(&mut self) {
        for place in self.idle.drain(..).chain(self.lingering.drain(..)) {
            let _ = place.cgroup.remove(Duration::ZERO);
        }
    }

    /// Keeps some of the cgroups in which nothing lives any more, and removes the others. A daemon that an exec left behind keeps
    /// its own.
    fn sweep_cgroups(&mut self) {
        let v2 = self.layout.mode == Mode::V2;
        for place in std::mem::take(&mut self.lingering) {
            // The counters of v1 are local and go with the directory; v2 counts in the parent.
            let kills = if v2 { 0 } else { place.cgroup.oom_kills().unwrap_or(0) };
            if kills == 0 && self.idle.len() < IDLE_CGROUPS && place.is_vacant() {
                self.idle.push(place);
            } else if place.cgroup.remove(Duration::ZERO).is_ok() {
                self.removed_oom_kills += kills;
            } else {
                self.lingering.push(place);
            }
        }
    }
}

/// Sends SIGKILL to the processes of an exec; gives how many there were.
fn kill_tree(exec: &Exec) -> usize {
    if let Some(pid) = exec.pid {
        let _ = monitor::kill(pid, libc::SIGKILL);
    }
    let in_cgroup = exec.place.as_ref().map_or(0, |p| p.cgroup.kill_once());
    in_cgroup.max(usize::from(exec.pid.is_some()))
}

/// The pid that an OCI runtime has written.
pub fn read_pid(path: &std::path::Path) -> Result<i32> {
    let text = String::from_utf8(file::read(path, 64)?).context(|| format!("read {}", path.display()))?;
    let pid: i32 = text.trim().parse().context(|| format!("read {}", path.display()))?;
    if pid <= 1 {
        return Err(Error::internal(format!("read {}: pid {pid}", path.display())));
    }
    Ok(pid)
}

/// A socket in the container's directory as the OCI runtime, which starts there, is to name it: paths of sockets are short.
pub fn shown_socket(dir: &std::path::Path, name: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    if path.as_os_str().len() < 108 {
        path
    } else {
        name.into()
    }
}
