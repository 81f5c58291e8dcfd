//! User namespaces. Only a process of one thread can make or enter one, so this is work for a program of its own: the shim's binary
//! as `pin`. It speaks over its stdin and stdout, one line of JSON each way:
//!
//! - `pin new`: it is in a new user namespace and says `READY`. The daemon writes the maps, which takes power that the program
//!   itself has no more, sends `Request`s and gets a `Reply` to each; it pins what it wants of /proc/PID/ns.
//! - `pin join`: the request names the pins to enter.
//!
//! It ends with its stdin, so a daemon that dies leaves none.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use nix::sched::CloneFlags;
use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// What `pin new` says first.
pub const READY: &str = "ready";
/// The arguments of the program.
pub const ROLE: &str = "pin";
pub const NEW: &str = "new";
pub const JOIN: &str = "join";

/// What is to be made.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Request {
    /// Pins to enter, the user namespace first: for `join`.
    pub join: Vec<PathBuf>,
    pub net: bool,
    pub ipc: bool,
    pub uts: bool,
    /// For the UTS namespace.
    pub hostname: Option<String>,
    /// Keys as paths below /proc/sys with their values.
    pub sysctls: Vec<(String, String)>,
    /// Arguments to run this program with as PID 1 of a new PID namespace; none: no process.
    pub init: Vec<String>,
}

/// What came of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    pub error: Option<String>,
    /// Of the init, which is a child of the daemon.
    pub init: Option<i32>,
}

/// The program: one thread, its stdin and stdout connected to the daemon.
pub fn serve(new: bool) -> Result<()> {
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut say = |line: &str| writeln!(output, "{line}").and_then(|()| output.flush()).context(|| "answer the daemon");
    if new {
        nix::sched::unshare(CloneFlags::CLONE_NEWUSER).context(|| "unshare the user namespace")?;
        say(READY)?;
    }
    loop {
        let mut line = String::new();
        if input.read_line(&mut line).context(|| "read the daemon's request")? == 0 {
            return Ok(());
        }
        let reply = match serde_json::from_str(&line).context(|| "read the daemon's request").and_then(|request| make(&request)) {
            Ok(init) => Reply { error: None, init },
            Err(e) => Reply { error: Some(e.message().to_owned()), init: None },
        };
        say(&serde_json::to_string(&reply).context(|| "write the answer")?)?;
    }
}

fn make(request: &Request) -> Result<Option<i32>> {
    // All opened first: inside, we are nobody to the directories that hold them.
    let open = |path: &PathBuf| std::fs::File::open(path).context(|| format!("open namespace {}", path.display()));
    for (file, path) in request.join.iter().map(open).collect::<Result<Vec<_>>>()?.iter().zip(&request.join) {
        nix::sched::setns(file, CloneFlags::empty()).context(|| format!("enter namespace {}", path.display()))?;
    }
    // Its root from here on, with no group of ours.
    nix::unistd::setgroups(&[]).context(|| "drop groups")?;
    let (root, group) = (Uid::from_raw(0), Gid::from_raw(0));
    nix::unistd::setresgid(group, group, group).context(|| "become the namespace's root group")?;
    nix::unistd::setresuid(root, root, root).context(|| "become the namespace's root")?;
    let kinds = [(request.net, CloneFlags::CLONE_NEWNET), (request.ipc, CloneFlags::CLONE_NEWIPC), (request.uts, CloneFlags::CLONE_NEWUTS)];
    let flags = kinds.iter().filter(|k| k.0).fold(CloneFlags::empty(), |all, k| all | k.1);
    nix::sched::unshare(flags).context(|| "unshare namespaces")?;
    if let Some(name) = request.hostname.as_ref().filter(|_| request.uts) {
        nix::unistd::sethostname(name).context(|| format!("set hostname {name:?}"))?;
    }
    for (key, value) in &request.sysctls {
        std::fs::write(std::path::Path::new("/proc/sys").join(key), value).context(|| format!("set sysctl {key}={value:?}"))?;
    }
    if request.init.is_empty() {
        return Ok(None);
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWPID).context(|| "unshare the PID namespace")?;
    let text = |arg: &str| std::ffi::CString::new(arg).map_err(|_| Error::internal("NUL in an argument"));
    let program = text("/proc/self/exe")?;
    let args = std::iter::once(Ok(program.clone())).chain(request.init.iter().map(|arg| text(arg))).collect::<Result<Vec<_>>>()?;
    super::monitor::spawn_sibling(&program, &args).map(Some)
}
