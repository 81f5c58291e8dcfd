//! The daemon's side of the shim: starts it, asks it, hears of the end. Calls block, each for a bounded time.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::protocol::{Answer, Envelope, Event, ExecRequest, ExitRecord, Request, ShimConfig, State, CONFIG_FILE, SOCKET_FILE, VERSION};
use super::record;
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Code, Context, Error, ErrorList, Result};
use crate::runtime::{oci, Handler};
use crate::sys::cancel::Cancel;
use crate::sys::console::Console;
use crate::sys::pidfd::PidFd;
use crate::sys::process::{self, Program};
use crate::sys::{file, monitor, socket};

/// How long a shim may take to answer what it can answer at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to undo a start that we have given up.
const UNDO_LIMIT: Duration = Duration::from_secs(15);
/// How often it is told to.
const KILL_PERIOD: Duration = Duration::from_millis(50);

/// A container that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    pub pid: i32,
    /// Of `pid`: clock ticks since boot.
    pub start_time: u64,
    pub shim_pid: i32,
    /// When the runtime had it running, nanoseconds since the epoch.
    pub started_at: i64,
}

/// Starts the container whose bundle is `dir`, under a shim of its own that outlives this process. When `cancel` ends or
/// `timeout` passes first, the start is undone before the error comes. Nobody has to reap anything afterwards.
pub fn start(shim: &Path, dir: &Path, config: &ShimConfig, cancel: &Cancel, timeout: Duration) -> Result<Started> {
    let what = || format!("start container {}", config.id);
    let text = serde_json::to_vec(config).context(what)?;
    file::write(&dir.join(CONFIG_FILE), &text, 0o600, file::Durability::Atomic)?;
    let (answer, line) = monitor::pipe()?;
    process::set_nonblocking(&answer)?;
    let mut parent = Program::new(shim).arg("container").arg(dir).stdout_to(line).spawn().context(what)?;
    let mut answer = File::from(answer);
    let mut waited = read_answer(&mut answer, &cancel.within(timeout));
    if let Err(error) = &waited {
        if let Err(undo) = give_up(&mut answer, config, dir) {
            waited = Err(Error::new(error.code(), format!("{} (and not undone: {undo})", error.message())));
        }
    }
    // It forks and ends at once: this waits for nothing.
    parent.wait().context(what)?;
    match waited.context(what)? {
        Answer::Started { pid, start_time, shim_pid, started_at } => Ok(Started { pid, start_time, shim_pid, started_at }),
        Answer::Failed { error } => Err(Error::from(error)).context(what),
    }
}

/// Undoes a start for which nobody waits any more; nothing of it runs when this returns.
fn give_up(answer: &mut File, config: &ShimConfig, dir: &Path) -> Result<()> {
    let end = Instant::now() + UNDO_LIMIT;
    let left = || end.saturating_duration_since(Instant::now());
    loop {
        // Killing while it starts undoes the start. A shim that does not listen yet has not heard the last one.
        let _ = Client::new(dir).order(Request::Kill { signal: libc::SIGKILL, all: true }, left().max(KILL_PERIOD));
        match read_answer(answer, &Cancel::never().within(left().clamp(Duration::from_millis(1), KILL_PERIOD))) {
            Ok(Answer::Failed { .. }) => return Ok(()),
            // The start was faster, and may have been faster than the kill.
            Ok(Answer::Started { .. }) if abandon(dir).is_ok() => return Ok(()),
            Err(e) if e.code() == Code::DeadlineExceeded && !left().is_zero() => {}
            // It has died, or cannot even do that: what it had begun with is undone without it.
            _ => return bury(config, dir),
        }
    }
}

/// Undoes a start of which no shim, or none that answers, is left.
fn bury(config: &ShimConfig, dir: &Path) -> Result<()> {
    let mut errors = ErrorList::default();
    // A shim that only now gets so far finds it and gives up.
    errors.keep(record::refuse(dir));
    errors.keep(kill_shim(dir));
    let cgroup = errors.keep(Layout::host().and_then(|layout| Cgroup::at(layout, &config.cgroup)));
    errors.keep(cleanup_dead(&config.handler, &config.id, dir, cgroup.as_ref(), UNDO_LIMIT));
    errors.finish()
}

/// Has a shim that is still starting its container give that up, and waits until it has ended. One that was faster kills its container.
pub fn abandon(dir: &Path) -> Result<()> {
    let watch = Client::new(dir).watch()?;
    watch.stream.set_read_timeout(Some(UNDO_LIMIT)).context(|| "set a timeout on the shim's socket")?;
    Client::new(dir).kill(libc::SIGKILL, true)?;
    while watch.next()?.is_some() {}
    Ok(())
}

/// Reads the shim's one line.
fn read_answer(from: &mut File, cancel: &Cancel) -> Result<Answer> {
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        cancel.poll(&[(from.as_fd(), PollFlags::POLLIN)], None)?;
        match from.read(&mut chunk) {
            Ok(0) => return Err(Error::internal("the shim ended without an answer")),
            Ok(n) => text.extend_from_slice(&chunk[..n]),
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => continue,
            Err(e) => return Err(e).context(|| "read the shim's answer"),
        }
        if let Some(end) = text.iter().position(|b| *b == b'\n') {
            return serde_json::from_slice(&text[..end]).context(|| "read the shim's answer");
        }
        if text.len() > 64 * 1024 {
            return Err(Error::internal("read the shim's answer: it does not end"));
        }
    }
}

/// The shim of the container in a directory, alive or not.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(dir: &Path) -> Client {
        Client { socket: dir.join(SOCKET_FILE) }
    }

    /// Sends a request on a connection of its own.
    fn ask(&self, body: Request, fds: &[BorrowedFd<'_>]) -> Result<UnixStream> {
        let stream = socket::connect(&self.socket).map_err(|e| e.with_code(Code::Unavailable))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).context(|| "set a timeout on the shim's socket")?;
        stream.set_write_timeout(Some(ANSWER_LIMIT)).context(|| "set a timeout on the shim's socket")?;
        let message = serde_json::to_vec(&Envelope { version: VERSION, body }).context(|| "write request to the shim")?;
        socket::send(&stream, &message, fds)?;
        Ok(stream)
    }

    /// A request with one answer, which may take until `limit`.
    fn call(&self, body: Request, limit: Duration) -> Result<Event> {
        let stream = self.ask(body, &[])?;
        stream.set_read_timeout(Some(limit)).context(|| "set a timeout on the shim's socket")?;
        next_event(&stream)?.ok_or_else(gone)
    }

    fn order(&self, body: Request, limit: Duration) -> Result<()> {
        match self.call(body, limit)? {
            Event::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// What the shim knows. UNAVAILABLE when nobody listens.
    pub fn state(&self) -> Result<State> {
        match self.call(Request::State, ANSWER_LIMIT)? {
            Event::State(state) => Ok(state),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a signal to the first process, or with `all` to every process of the container. One that has ended is fine;
    /// one that is starting is given up.
    pub fn kill(&self, signal: i32, all: bool) -> Result<()> {
        self.order(Request::Kill { signal, all }, ANSWER_LIMIT)
    }

    /// Goes on logging in a new file, which exists when this returns.
    pub fn reopen_log(&self, path: &Path) -> Result<()> {
        self.order(Request::ReopenLog { path: path.to_owned() }, ANSWER_LIMIT)
    }

    /// Applies OCI resources. `limit`: the time limit of runtime commands, and a little.
    pub fn update(&self, resources: serde_json::Value, limit: Duration) -> Result<()> {
        self.order(Request::Update { resources }, limit)
    }

    /// Starts a further process with these as stdin, stdout and stderr; returns once it runs. When `cancel` ends first, hanging
    /// up makes the shim kill what it was starting.
    pub fn exec(&self, request: &ExecRequest, fds: [BorrowedFd<'_>; 3], cancel: &Cancel) -> Result<RunningExec> {
        self.start_exec(request, &fds, None, cancel).map(|(exec, _)| exec)
    }

    /// The same with a terminal of its own, of which the one descriptor that keeps it open comes back. It does not block.
    pub fn exec_terminal(&self, request: &ExecRequest, cancel: &Cancel) -> Result<(RunningExec, OwnedFd)> {
        let name = format!("exec-{}.sock", request.id);
        let path = self.socket.with_file_name(&name);
        let request = ExecRequest { console: Some(name), ..request.clone() };
        let (exec, terminal) = self.start_exec(&request, &[], Some(Console::listen(path)?), cancel)?;
        Ok((exec, terminal.ok_or_else(|| Error::internal("the OCI runtime sent no terminal"))?))
    }

    fn start_exec(
        &self,
        request: &ExecRequest,
        fds: &[BorrowedFd<'_>],
        mut console: Option<Console>,
        cancel: &Cancel,
    ) -> Result<(RunningExec, Option<OwnedFd>)> {
        let plain = !request.keep && request.console.is_none();
        let body = if plain { Request::Exec } else { Request::ExecStream };
        let stream = self.ask(body(request.clone()), fds)?;
        let mut terminal = None;
        loop {
            let mut set = vec![(stream.as_fd(), PollFlags::POLLIN)];
            set.extend(console.as_ref().filter(|_| terminal.is_none()).map(|c| (c.as_fd(), PollFlags::POLLIN)));
            let ready = cancel.poll(&set, None)?;
            if let Some(console) = console.as_mut().filter(|_| terminal.is_none()) {
                // Why none comes says the answer.
                terminal = console.take().unwrap_or_default();
            }
            if ready[0].is_empty() {
                continue;
            }
            return match next_event(&stream).map_err(older)?.ok_or_else(gone)? {
                Event::Started { pid } => Ok((RunningExec { stream, pid, id: request.id.clone(), client: self.clone() }, terminal)),
                other => Err(unexpected(&other)),
            };
        }
    }

    /// Attaches these to the container's stdin, stdout (or terminal) and stderr: what it writes from now on, until it ends.
    pub fn attach(&self, fds: [Option<BorrowedFd<'_>>; 3], cancel: &Cancel) -> Result<Attachment> {
        let [stdin, stdout, stderr] = fds.map(|f| f.is_some());
        let fds: Vec<_> = fds.into_iter().flatten().collect();
        let stream = self.ask(Request::Attach { stdin, stdout, stderr }, &fds)?;
        cancel.poll(&[(stream.as_fd(), PollFlags::POLLIN)], Some(ANSWER_LIMIT))?;
        match next_event(&stream).map_err(older)?.ok_or_else(gone)? {
            Event::Attached => Ok(Attachment { stream }),
            other => Err(unexpected(&other)),
        }
    }

    /// Hears of everything from now on.
    pub fn watch(&self) -> Result<Watch> {
        Ok(Watch { stream: self.ask(Request::Watch, &[])? })
    }
}

fn gone() -> Error {
    Error::new(Code::Unavailable, "the shim is gone")
}

/// A shim that a daemon before this one has started need not know every request.
fn older(error: Error) -> Error {
    if error.code() == Code::InvalidArgument && error.message().contains("unknown variant") {
        return Error::unimplemented("the shim of this container was started by an older daemon and cannot do this");
    }
    error
}

fn unexpected(event: &Event) -> Error {
    Error::internal(format!("the shim answered {event:?}"))
}

/// The next message; an error message becomes an error. None at the end of the connection.
fn next_event(stream: &UnixStream) -> Result<Option<Event>> {
    let Some((message, _)) = socket::receive(stream)? else { return Ok(None) };
    match serde_json::from_slice(&message).context(|| "read the shim's message")? {
        Event::Error(fault) => Err(Error::from(fault)),
        event => Ok(Some(event)),
    }
}

/// An exec'd process. Dropping this before its end kills it with all it has started.
#[derive(Debug)]
pub struct RunningExec {
    stream: UnixStream,
    pid: i32,
    id: String,
    client: Client,
}

impl RunningExec {
    /// On the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for the end: the exit code, 128 + signal for a signal. What it has left running lives on. When `cancel` ends
    /// first, the process is untouched: `kill` it.
    pub fn wait(&self, cancel: &Cancel) -> Result<i32> {
        cancel.poll(&[(self.stream.as_fd(), PollFlags::POLLIN)], None)?;
        match next_event(&self.stream)?.ok_or_else(gone)? {
            Event::Exited { code } => Ok(code),
            other => Err(unexpected(&other)),
        }
    }

    /// The exit code, if it has ended already; never waits.
    pub fn try_wait(&self) -> Result<Option<i32>> {
        match is_readable(&self.stream)? {
            true => self.wait(&Cancel::never()).map(Some),
            false => Ok(None),
        }
    }

    /// Kills it with all it has started; they are dead when this returns. One that has ended is fine.
    pub fn kill(&self) -> Result<()> {
        match self.client.order(Request::ExecKill { id: self.id.clone() }, ANSWER_LIMIT) {
            Err(e) if e.code() == Code::NotFound => Ok(()),
            result => result,
        }
    }
}

impl AsFd for RunningExec {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Whether a message has come, or the end.
fn is_readable(stream: &UnixStream) -> Result<bool> {
    let ready = Cancel::never().poll(&[(stream.as_fd(), PollFlags::POLLIN)], Some(Duration::ZERO))?;
    Ok(!ready[0].is_empty())
}

/// A connection to the container's stdio. Dropping it detaches.
#[derive(Debug)]
pub struct Attachment {
    stream: UnixStream,
}

impl Attachment {
    /// To a shim that is a test.
    #[cfg(test)]
    pub fn over(stream: UnixStream) -> Attachment {
        Attachment { stream }
    }

    /// How the container ended, if it has: all its output is in the pipes then. DEADLINE_EXCEEDED when the shim has let go
    /// because nobody took the output. Never waits.
    pub fn ended(&self) -> Result<Option<ExitRecord>> {
        if !is_readable(&self.stream)? {
            return Ok(None);
        }
        match next_event(&self.stream)?.ok_or_else(gone)? {
            Event::Exit(record) => Ok(Some(record)),
            other => Err(unexpected(&other)),
        }
    }

    /// The size of the container's terminal in characters. Never waits.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        let body = Request::Resize { width, height };
        let message = serde_json::to_vec(&Envelope { version: VERSION, body }).context(|| "write request to the shim")?;
        let writable = Cancel::never().poll(&[(self.stream.as_fd(), PollFlags::POLLOUT)], Some(Duration::ZERO))?;
        if !writable[0].contains(PollFlags::POLLOUT) {
            return Err(Error::new(Code::Unavailable, "resize: the shim does not answer"));
        }
        socket::send(&self.stream, &message, &[])
    }
}

impl AsFd for Attachment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Events of one container: its state first. Poll the descriptor, then call `next`.
#[derive(Debug)]
pub struct Watch {
    stream: UnixStream,
}

impl Watch {
    /// The next event; None once the shim is gone.
    pub fn next(&self) -> Result<Option<Event>> {
        next_event(&self.stream)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Kills the shim itself, which does not answer any more; what it watched is for `cleanup_dead`. None there is fine.
pub fn kill_shim(dir: &Path) -> Result<()> {
    // Connecting works with a stopped process too, and the kernel says who listens.
    let Ok(stream) = socket::connect(&dir.join(SOCKET_FILE)) else { return Ok(()) };
    let pid = socket::peer_pid(&stream)?;
    match PidFd::open(pid)? {
        Some(process) => process.kill(libc::SIGKILL).context(|| format!("kill shim {pid}")),
        None => Ok(()),
    }
}

/// How the container in `dir` ended, if its shim could say.
pub fn exit_record(dir: &Path) -> Result<Option<ExitRecord>> {
    record::read(dir)
}

/// Cleans up after a shim that died: kills the container, makes the OCI runtime forget it, removes cgroups and sockets.
/// Everything is tried whatever fails before. Harmless on a container of which nothing is left.
pub fn cleanup_dead(handler: &Handler, id: &str, dir: &Path, cgroup: Option<&Cgroup>, limit: Duration) -> Result<()> {
    let mut errors = ErrorList::default();
    if let Some(cgroup) = cgroup {
        errors.keep(cgroup.kill_all(limit));
    }
    // A runtime that finds nothing says so by success, but for a directory that it cannot remove.
    errors.keep(oci::remove_leftovers(handler, id, dir));
    errors.keep(oci::program(handler, oci::delete(handler, None, id), dir).run_ok(&Cancel::never(), limit).map(drop));
    errors.keep(oci::remove_leftovers(handler, id, dir));
    if let Some(cgroup) = cgroup {
        errors.keep(cgroup.remove(Duration::from_secs(1)));
    }
    for name in [SOCKET_FILE, "console.sock", "pid", "runtime.log", "delete.log"] {
        errors.keep(file::remove_file(&dir.join(name)));
    }
    errors.finish().context(|| format!("clean up container {id}"))
}
