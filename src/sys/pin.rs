//! The daemon's side of `sys::userns`: starts the program, writes the maps, pins what it makes.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use nix::poll::PollFlags;

use super::cancel::Cancel;
use super::idmap::{self, IdMap, IdMaps};
use super::namespace::{self, NewNamespaces};
use super::process::{self, Program};
use super::userns::{Reply, Request, JOIN, NEW, READY, ROLE};
use super::{crash, monitor};
use crate::error::{Context, Error, Result};

/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(10);

/// The program, alive as long as this.
struct Holder {
    child: Child,
    /// None once it is to end.
    input: Option<File>,
    output: File,
}

impl Holder {
    fn start(shim: &Path, kind: &str) -> Result<Holder> {
        let (stdin, input) = monitor::pipe()?;
        let (output, stdout) = monitor::pipe()?;
        process::set_nonblocking(&output)?;
        let child = Program::new(shim).arg(ROLE).arg(kind).stdin_from(stdin).stdout_to(stdout).spawn()?;
        Ok(Holder { child, input: Some(File::from(input)), output: File::from(output) })
    }

    /// One in a new user namespace with these maps.
    fn new(shim: &Path, uids: &[IdMap], gids: &[IdMap]) -> Result<Holder> {
        let what = || "make a user namespace";
        let mut holder = Holder::start(shim, NEW).context(what)?;
        let ready = holder.line().context(what)?;
        if ready != READY {
            return Err(Error::internal(format!("{}: the program says {ready:?}", what())));
        }
        for (file, maps) in [("uid_map", uids), ("gid_map", gids)] {
            let path = format!("/proc/{}/{file}", holder.child.id());
            std::fs::write(&path, idmap::lines(maps)).context(|| format!("{}: write {path}", what()))?;
        }
        Ok(holder)
    }

    /// The process that was started, if one was asked for.
    fn ask(&mut self, request: &Request) -> Result<Option<i32>> {
        let mut text = serde_json::to_string(request).context(|| "write the request")?;
        text.push('\n');
        if let Some(input) = &mut self.input {
            input.write_all(text.as_bytes()).context(|| "send the request")?;
        }
        let reply: Reply = serde_json::from_str(&self.line()?).context(|| "read the answer")?;
        match reply.error {
            Some(error) => Err(Error::internal(error)),
            None => Ok(reply.init),
        }
    }

    fn line(&mut self) -> Result<String> {
        let (limit, mut text) = (Cancel::never().within(LIMIT), Vec::new());
        loop {
            limit.poll(&[(self.output.as_fd(), PollFlags::POLLIN)], None)?;
            let mut chunk = [0; 4096];
            match self.output.read(&mut chunk) {
                Ok(0) => return Err(Error::internal("the program that makes user namespaces has ended: the kernel may not allow them")),
                Ok(n) => text.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
                Err(e) => return Err(e).context(|| "read the answer"),
            }
            // It says one line and waits.
            if text.last() == Some(&b'\n') {
                text.pop();
                return String::from_utf8(text).context(|| "read the answer");
            }
        }
    }

    /// Its namespace `name`: user, net, ipc, uts.
    fn namespace(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/{name}", self.child.id()))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It has nothing left to do, and what it made is held by pins and descriptors.
        self.input = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A user namespace with these maps for as long as the file is open: for id-mapped mounts.
pub fn open_mapped(shim: &Path, uids: &[IdMap], gids: &[IdMap]) -> Result<File> {
    let holder = Holder::new(shim, uids, gids)?;
    let path = holder.namespace("user");
    File::open(&path).context(|| format!("open {}", path.display()))
}

/// Like [`namespace::create`], with a user namespace that is pinned at `user` and owns the others. `init` are the arguments of `shim` as
/// PID 1; none: no process.
pub fn create(shim: &Path, user: &Path, maps: &IdMaps, new: NewNamespaces, init: &[&str]) -> Result<Option<i32>> {
    let result = create_pinned(shim, user, maps, &new, init);
    if result.is_err() {
        for pin in [Some(user), new.net.as_deref(), new.ipc.as_deref(), new.uts.as_deref()].into_iter().flatten() {
            let _ = namespace::unpin(pin);
        }
    }
    result
}

fn create_pinned(shim: &Path, user: &Path, maps: &IdMaps, new: &NewNamespaces, init: &[&str]) -> Result<Option<i32>> {
    let mut holder = Holder::new(shim, &[maps.uids], &[maps.gids])?;
    namespace::pin(&holder.namespace("user"), user)?;
    crash::step("run:3-user-namespace");
    holder.ask(&Request {
        net: new.net.is_some(),
        ipc: new.ipc.is_some(),
        uts: new.uts.is_some(),
        hostname: new.hostname.clone(),
        sysctls: new.sysctls.clone(),
        ..Request::default()
    })?;
    for (name, pin) in [("net", &new.net), ("ipc", &new.ipc), ("uts", &new.uts)] {
        if let Some(pin) = pin {
            namespace::pin(&holder.namespace(name), pin)?;
        }
    }
    if let Some(net) = &new.net {
        namespace::in_netns(net, super::netlink::loopback_up)?;
    }
    if init.is_empty() {
        return Ok(None);
    }
    holder.ask(&Request { init: init.iter().map(|arg| arg.to_string()).collect(), ..Request::default() })
}

/// Like [`namespace::spawn_init`], for namespaces that belong to the user namespace pinned at `join[0]`.
pub fn spawn_init(shim: &Path, join: Vec<PathBuf>, init: &[&str]) -> Result<i32> {
    for path in &join {
        if !namespace::is_pinned(path) {
            return Err(Error::internal(format!("enter namespace {}: it is not pinned", path.display())));
        }
    }
    let init = init.iter().map(|arg| arg.to_string()).collect();
    let pid = Holder::start(shim, JOIN)?.ask(&Request { join, init, ..Request::default() })?;
    pid.ok_or_else(|| Error::internal("start the sandbox's init: the program names no process"))
}
