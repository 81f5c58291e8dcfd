//! Namespaces, init and the cgroup of a sandbox. With a user namespace of its own, that one owns the others, the PID namespace of its
//! init too: the OCI runtime joins it first, and may then enter only what belongs to it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::metadata::{Metadata, PidMode};
use super::status::Process;
use crate::cgroup::{self, Cgroup, Layout};
use crate::error::{Error, ErrorList, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::namespace::{self, NewNamespaces};
use crate::sys::pidfd::{self, PidFd};
use crate::sys::pin;
use crate::sys::process::Program;

/// Longest wait for a killed init to be gone.
const KILL_WAIT: Duration = Duration::from_secs(10);

/// Makes and pins the namespaces; with PID mode POD starts the init in them, whose process is the result.
pub fn create(meta: &Metadata, sysctls: Vec<(String, String)>, shim: &Path) -> Result<Option<Process>> {
    if let Some(dir) = meta.netns.as_deref().and_then(Path::parent) {
        file::make_dir(dir, 0o755)?;
    }
    let wants_init = meta.pid == PidMode::Sandbox;
    let user = meta.user_pin().zip(meta.userns);
    let new = NewNamespaces {
        net: meta.netns.clone(),
        ipc: meta.ipc_pin(),
        uts: meta.uts_pin(),
        hostname: Some(meta.hostname.clone()),
        sysctls,
        init: (wants_init && user.is_none()).then(|| init_program(shim)),
    };
    let program: &[&str] = if wants_init { &[INIT] } else { &[] };
    let made = match user {
        Some((user, maps)) => pin::create(shim, &user, &maps, new, program)?,
        None => namespace::create(new)?,
    };
    match made {
        Some(pid) => settle_init(meta, pid).map(Some),
        None => Ok(None),
    }
}

/// Starts the init of a sandbox that was made without one: a container asked for PID mode POD.
pub fn start_init(meta: &Metadata, shim: &Path) -> Result<Process> {
    let join: Vec<PathBuf> = [meta.user_pin(), meta.netns.clone(), meta.ipc_pin(), meta.uts_pin()].into_iter().flatten().collect();
    let pid = match meta.userns {
        Some(_) => pin::spawn_init(shim, join, &[INIT])?,
        None => namespace::spawn_init(join, init_program(shim))?,
    };
    settle_init(meta, pid)
}

/// The shim's role.
const INIT: &str = "init";

fn init_program(shim: &Path) -> Program {
    Program::new(shim).arg(INIT)
}

/// Moves a started init into the sandbox's cgroup; one that cannot be is killed again.
fn settle_init(meta: &Metadata, pid: i32) -> Result<Process> {
    let moved = init_cgroup(meta).and_then(|cgroup| {
        cgroup.create()?;
        cgroup.enter(pid)
    });
    let start_time = pidfd::start_time_of(pid);
    match (moved, start_time) {
        (Ok(()), Some(start_time)) => Ok(Process { pid, start_time }),
        (moved, start_time) => {
            if let Some(start_time) = start_time {
                stop_init(Process { pid, start_time })?;
            }
            moved?;
            Err(Error::internal("the sandbox's init ended at once"))
        }
    }
}

/// The init's own cgroup, below the parent as a container's.
fn init_cgroup(meta: &Metadata) -> Result<Cgroup> {
    Cgroup::at(Layout::host()?, &cgroup::path::below(&meta.cgroup_parent, &meta.id))
}

/// Kills an init and waits until it is gone, and with it every process of its PID namespace.
pub fn stop_init(init: Process) -> Result<()> {
    let Some(process) = PidFd::open_started(init.pid, init.start_time)? else { return Ok(()) };
    process.kill(libc::SIGKILL)?;
    if !process.wait(&Cancel::never(), Some(KILL_WAIT))? {
        return Err(Error::internal(format!("init {} is still there {} s after SIGKILL", init.pid, KILL_WAIT.as_secs())));
    }
    // Ours to reap when this daemon started it; else it is the host init's.
    process.reap();
    Ok(())
}

/// Undoes `create` and `start_init` but for the network namespace, which CNI DEL may still need.
pub fn remove(meta: &Metadata, init: Option<Process>) -> Result<()> {
    let mut errors = ErrorList::default();
    if let Some(init) = init {
        errors.keep(stop_init(init));
    }
    errors.keep(remove_cgroups(meta));
    for pin in [meta.ipc_pin(), meta.uts_pin(), meta.user_pin()].into_iter().flatten() {
        errors.keep(namespace::unpin(&pin));
    }
    errors.finish()
}

fn remove_cgroups(meta: &Metadata) -> Result<()> {
    let cgroup = init_cgroup(meta)?;
    // An init that was started but not yet recorded when the daemon died is found here.
    cgroup.kill_all(KILL_WAIT)?;
    cgroup.remove(KILL_WAIT)?;
    if meta.own_cgroup_parent {
        Cgroup::at(Layout::host()?, &meta.cgroup_parent)?.remove(KILL_WAIT)?;
    }
    Ok(())
}
