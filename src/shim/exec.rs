//! Further processes in the container. Each gets a child cgroup of its own where the OCI runtime can start one there, so that
//! it can be killed with everything it has started, double forks too.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::protocol::{Event, ExecRequest, Fault, Phase};
use super::server::Shim;
use super::task::{Purpose, Task};
use crate::cgroup::{Cgroup, Layout, Mode};
use crate::error::{Code, Context, Error, Result};
use crate::runtime::{oci, Kind};
use crate::sys::{file, monitor};

/// Most execs at a time: each holds a connection, and a stop must always get one.
const EXECS: usize = 96;

/// One exec'd process, from the request to its end.
pub struct Exec {
    pub number: u32,
    id: String,
    /// The connection that asked; None when it has gone and the process goes on without it.
    peer: Option<u32>,
    keep: bool,
    /// Once the OCI runtime has started it and until it is reaped.
    pub pid: Option<i32>,
    cgroup: Option<Cgroup>,
    /// The OCI runtime starts it outside `cgroup`: we move it.
    move_it: bool,
    pub kill: bool,
    /// Connections that wait for the kill.
    killers: Vec<u32>,
    /// The last answer, once known.
    outcome: Option<Event>,
}

/// Where exec number `number` goes: a child cgroup, and the `--cgroup` argument if the OCI runtime takes one.
///
/// runc on v1 takes `controller:name` and enters that hierarchy's child alone. crun on v1 takes a name and silently stays
/// out of the container's cgroup in every hierarchy without such a child, limits included: so it gets one in each.
fn place(kind: Kind, layout: &Layout, parent: &Cgroup, number: u32) -> Option<(Cgroup, Option<String>)> {
    let name = format!("crisp-exec-{number}");
    let one = ["pids", "freezer"].into_iter().find(|c| layout.v1(c).is_some());
    match (kind, layout.mode, one) {
        (Kind::Runc | Kind::Crun, Mode::V2, _) => Some((parent.child(&name, |d| d.path.is_dir()), Some(name))),
        (Kind::Runc, _, Some(one)) => {
            Some((parent.child(&name, |d| d.controllers.iter().any(|c| c == one)), Some(format!("{one}:{name}"))))
        }
        (Kind::Crun, _, _) => Some((parent.child(&name, |d| d.path.is_dir()), Some(name))),
        (_, Mode::V2, _) => Some((parent.child(&name, |d| d.unified), None)),
        (_, _, Some(one)) => Some((parent.child(&name, |d| d.controllers.iter().any(|c| c == one)), None)),
        _ => None,
    }
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
        let placed = place(self.config.handler.kind, &self.layout, &self.cgroup, number);
        // Without a cgroup of its own it can still run; only a kill is less sure then.
        let placed = placed.filter(|(cgroup, _)| match cgroup.create() {
            Ok(()) => true,
            Err(_) => {
                let _ = cgroup.remove(Duration::ZERO);
                false
            }
        });
        let (cgroup, option) = placed.map_or((None, None), |(cgroup, option)| (Some(cgroup), option));
        let started = self.start_exec(number, &request, option.as_deref(), fds);
        if started.is_err() {
            if let Some(cgroup) = &cgroup {
                let _ = cgroup.remove(Duration::ZERO);
            }
        }
        self.tasks.push(started?);
        let move_it = option.is_none() && cgroup.is_some();
        let exec = Exec {
            number,
            id: request.id,
            peer: Some(peer),
            keep: request.keep,
            pid: None,
            cgroup,
            move_it,
            kill: false,
            killers: vec![],
            outcome: None,
        };
        self.execs.push(exec);
        Ok(())
    }

    fn start_exec(&self, number: u32, request: &ExecRequest, option: Option<&str>, stdio: Vec<OwnedFd>) -> Result<Task> {
        let path = |what: &str| self.dir.join(format!("exec-{number}.{what}"));
        let process = serde_json::to_vec(&request.process).context(|| "exec: write the process")?;
        let (process_file, log) = (path("json"), path("log"));
        file::write(&process_file, &process, 0o600, file::Durability::Atomic)?;
        let console = request.console.as_ref().map(|name| shown_socket(&self.dir, name));
        let call = oci::Exec { log: &log, pid_file: &path("pid"), process: &process_file, cgroup: option, console: console.as_deref() };
        let args = oci::exec(&self.config.handler, &call, &self.config.id);
        let mut program = oci::program(&self.config.handler, args).current_dir(&self.dir);
        let mut stdio = stdio.into_iter();
        if let (Some(stdin), Some(stdout), Some(stderr)) = (stdio.next(), stdio.next(), stdio.next()) {
            program = program.stdin_from(stdin).stdout_to(stdout).stderr_to(stderr);
        }
        Task::start(program, &self.config.handler.path, Purpose::Exec(number), log, vec![process_file], self.limit())
    }

    /// The OCI runtime's exec has ended.
    pub fn exec_started(&mut self, number: u32, result: Result<()>) {
        let Some(index) = self.execs.iter().position(|e| e.number == number) else { return };
        let pid = result.and_then(|()| read_pid(&self.dir.join(format!("exec-{number}.pid"))));
        let _ = file::remove_file(&self.dir.join(format!("exec-{number}.pid")));
        let exec = &mut self.execs[index];
        match pid {
            Ok(pid) => {
                exec.pid = Some(pid);
                if exec.move_it {
                    for dir in exec.cgroup.iter().flat_map(Cgroup::dirs) {
                        let _ = std::fs::write(dir.path.join("cgroup.procs"), pid.to_string());
                    }
                }
                if let Some(peer) = exec.peer {
                    self.answer(peer, &Event::Started { pid }, false);
                }
            }
            Err(error) => {
                exec.outcome = Some(Event::Error(Fault::from(&error)));
                // What a killed or failed runtime has left.
                exec.kill = true;
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
            task.abort(Error::cancelled(format!("exec: {why}")));
        }
    }

    /// Kills what is to be killed, answers what has ended. Gives the time to look again.
    pub fn advance_execs(&mut self, now: Instant) -> Option<Instant> {
        let mut again = None;
        let mut index = 0;
        while index < self.execs.len() {
            let exec = &self.execs[index];
            let left = if exec.kill { kill_tree(exec) } else { 0 };
            if exec.outcome.is_none() || left > 0 {
                if exec.kill {
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
            self.lingering.extend(exec.cgroup);
            self.sweep_cgroups();
        }
        again
    }

    /// Removes child cgroups in which nothing lives any more. A daemon that an exec left behind keeps its own.
    fn sweep_cgroups(&mut self) {
        let mut removed_kills = 0;
        let v2 = self.layout.mode == Mode::V2;
        self.lingering.retain(|cgroup| {
            // The counters of v1 are local and go with the directory; v2 counts in the parent.
            let kills = if v2 { 0 } else { cgroup.oom_kills() };
            let gone = cgroup.remove(Duration::ZERO).is_ok();
            removed_kills += if gone { kills } else { 0 };
            !gone
        });
        self.removed_oom_kills += removed_kills;
    }
}

/// Sends SIGKILL to the processes of an exec; gives how many there were.
fn kill_tree(exec: &Exec) -> usize {
    if let Some(pid) = exec.pid {
        let _ = monitor::kill(pid, libc::SIGKILL);
    }
    let in_cgroup = exec.cgroup.as_ref().map_or(0, Cgroup::kill_once);
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
