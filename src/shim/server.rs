//! The shim of one container: what it holds, and its loop. One thread, one poll(2); nothing in it waits for anybody.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;

use super::attach::Attachers;
use super::exec::{Exec, Place};
use super::log::Log;
use super::oom::OomWatch;
use super::protocol::{Answer, ExitRecord, Fault, Phase, ShimConfig, CONFIG_FILE, EXIT_FILE, SOCKET_FILE, VERSION};
use super::requests::Peer;
use super::stdio::Stdio;
use super::task::Task;
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Context, Error, Result};
use crate::sys::{file, monitor, socket};

/// Everything that a running shim knows.
pub struct Shim {
    pub(super) dir: PathBuf,
    pub(super) config: ShimConfig,
    pub(super) layout: Layout,
    pub(super) cgroup: Cgroup,
    pub(super) phase: Phase,
    /// The container's first process and its start time, once it runs. pid 0: not yet, or reaped.
    pub(super) pid: i32,
    pub(super) start_time: u64,
    pub(super) started_at: i64,
    pub(super) stdio: Stdio,
    pub(super) log: Log,
    pub(super) tasks: Vec<Task>,
    pub(super) execs: Vec<Exec>,
    pub(super) exec_number: u32,
    /// Cgroups of ended execs in which something still lives.
    pub(super) lingering: Vec<Place>,
    /// Those in which nothing does, for the next execs.
    pub(super) idle: Vec<Place>,
    pub(super) removed_oom_kills: u64,
    pub(super) oom: OomWatch,
    pub(super) peers: Vec<Peer>,
    pub(super) peer_number: u32,
    pub(super) attachers: Attachers,
    /// How the container ended, once all its output is read.
    pub(super) ended: Option<ExitRecord>,
    pub(super) ending: Option<Ending>,
    pub(super) finished: bool,
    signals: SignalFd,
    listener: UnixListener,
    /// Whether the daemon has its one line.
    pub(super) answered: bool,
}

/// The way from the end of the first process to the end of the shim.
pub(super) enum Ending {
    /// Killing what is left in the cgroup; given up at the time.
    Killing(ExitRecord, Instant),
    /// Reading what is left in the pipes; given up at the time.
    Draining(ExitRecord, Instant),
    /// The OCI runtime forgets the container. With the error of a failed start.
    Deleting(Option<Error>),
    /// Nothing is left but attachers that have not taken all output yet.
    Delivering,
}

/// What poll(2) found ready.
pub(super) enum Ready {
    Signals,
    Listener,
    Console,
    Oom,
    Output(usize),
    Peer(u32, PollFlags),
    /// An attacher takes output again: its connection, and the number of the output.
    Sink(u32, usize),
    /// An attacher has written something.
    Typed(u32),
    /// The container's stdin takes something again.
    Input,
}

/// Runs the shim of the container in `dir` to its end. The first line on stdout is the `Answer`.
pub fn run(dir: &Path) -> Result<()> {
    let prepared = prepare(dir);
    match prepared {
        Ok(mut shim) => {
            shim.start_container();
            shim.serve();
            Ok(())
        }
        Err(error) => {
            say(&Answer::Failed { error: Fault::from(&error) });
            Err(error)
        }
    }
}

/// Writes the one line to stdout and closes that. The daemon may be gone: then the socket tells the next one.
pub(super) fn say(answer: &Answer) {
    if let Ok(mut line) = serde_json::to_vec(answer) {
        line.push(b'\n');
        let _ = nix::unistd::write(std::io::stdout(), &line);
    }
    if let Ok(null) = std::fs::File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
    }
}

fn prepare(dir: &Path) -> Result<Shim> {
    monitor::close_from(3)?;
    monitor::detach()?;
    monitor::become_subreaper()?;
    // SIGPIPE is ignored by the Rust runtime, and given back to children by it.
    let signals =
        monitor::own_signals(&[Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2])?;
    std::env::set_current_dir("/").context(|| "enter /")?;
    let path = dir.join(CONFIG_FILE);
    let config: ShimConfig = serde_json::from_slice(&file::read(&path, 1 << 20)?).context(|| format!("read {}", path.display()))?;
    if config.version != VERSION {
        return Err(Error::internal(format!("read {}: version {} is not {VERSION}", path.display(), config.version)));
    }
    let refused = || match dir.join(EXIT_FILE).exists() {
        true => Err(Error::precondition(format!("start container {}: it has an exit record", config.id))),
        false => Ok(()),
    };
    refused()?;
    let socket_path = dir.join(SOCKET_FILE);
    if socket_path.exists() && socket::connect(&socket_path).is_ok() {
        return Err(Error::precondition(format!("start container {}: it has a shim", config.id)));
    }
    let layout = Layout::detect()?;
    let cgroup = Cgroup::at(&layout, &config.cgroup)?;
    let log = Log::open(config.log_path.as_deref())?;
    let listener = socket::listen(&socket_path, 0o600)?;
    listener.set_nonblocking(true).context(|| "set O_NONBLOCK")?;
    // All before may have taken long. A daemon that gives the start up writes the record, then connects: either it is heard or it is seen.
    refused().inspect_err(|_| drop(file::remove_file(&socket_path)))?;
    Ok(Shim {
        dir: dir.to_owned(),
        config,
        layout,
        cgroup,
        phase: Phase::Starting,
        pid: 0,
        start_time: 0,
        started_at: 0,
        stdio: Stdio::default(),
        log,
        tasks: Vec::new(),
        execs: Vec::new(),
        exec_number: 0,
        lingering: Vec::new(),
        idle: Vec::new(),
        removed_oom_kills: 0,
        oom: OomWatch::default(),
        peers: Vec::new(),
        peer_number: 0,
        attachers: Attachers::default(),
        ended: None,
        ending: None,
        finished: false,
        signals,
        listener,
        answered: false,
    })
}

impl Shim {
    /// Longest run of one runtime command.
    pub(super) fn limit(&self) -> Duration {
        Duration::from_millis(self.config.runtime_timeout_ms)
    }

    /// OOM kills so far, those in removed child cgroups included.
    pub(super) fn oom_kills(&mut self) -> u64 {
        self.oom.kills(&self.cgroup) + self.removed_oom_kills
    }

    fn serve(&mut self) {
        while !self.finished {
            let now = Instant::now();
            let again = self.advance(now);
            if self.finished {
                break;
            }
            for ready in self.wait(again) {
                match ready {
                    // It only wakes us: the children are looked at in every round.
                    Ready::Signals => while matches!(self.signals.read_signal(), Ok(Some(_))) {},
                    Ready::Listener => self.accept(),
                    Ready::Console => self.console(),
                    Ready::Oom => self.oom.notice(&self.cgroup, Instant::now()),
                    Ready::Output(index) => self.output(index),
                    Ready::Peer(number, flags) => self.peer_ready(number, flags),
                    ready => self.attacher_ready(&ready),
                }
            }
        }
        let _ = file::remove_file(&self.dir.join(SOCKET_FILE));
    }

    /// Waits until something is ready or the time `again` has come.
    fn wait(&self, again: Option<Instant>) -> Vec<Ready> {
        let mut fds: Vec<(BorrowedFd, PollFlags, Ready)> = Vec::with_capacity(6 + self.peers.len());
        fds.push((self.signals.as_fd(), PollFlags::POLLIN, Ready::Signals));
        fds.push((self.listener.as_fd(), PollFlags::POLLIN, Ready::Listener));
        fds.extend(self.stdio.console().map(|c| (c, PollFlags::POLLIN, Ready::Console)));
        fds.extend(self.oom.interest().map(|(fd, flags)| (fd, flags, Ready::Oom)));
        // Until the container runs, the pipes hold words of the OCI runtime: they belong in the error.
        if self.phase != Phase::Starting && !matches!(self.ending, Some(Ending::Deleting(_))) {
            let open = self.stdio.open_outputs().filter(|(i, _)| self.is_drained() || !self.attachers.are_full(*i));
            fds.extend(open.map(|(i, f)| (f.as_fd(), PollFlags::POLLIN, Ready::Output(i))));
        }
        self.attachers.interest(self.stdio.input(), &mut fds);
        fds.extend(self.peers.iter().map(|p| (p.channel.as_fd(), p.interest(), Ready::Peer(p.number, PollFlags::empty()))));
        let mut set: Vec<PollFd> = fds.iter().map(|(fd, flags, _)| PollFd::new(*fd, *flags)).collect();
        let timeout = again.map_or(PollTimeout::NONE, |time| {
            let ms = time.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
            PollTimeout::try_from(ms.min(i32::MAX as u128) as i32).unwrap_or(PollTimeout::MAX)
        });
        if nix::poll::poll(&mut set, timeout).is_err() {
            // EINTR by a signal that we are deaf to.
            return Vec::new();
        }
        let flags: Vec<PollFlags> = set.iter().map(|p| p.revents().unwrap_or(PollFlags::empty())).collect();
        drop(set);
        let mut ready = Vec::new();
        for ((_, _, what), flags) in fds.into_iter().zip(flags) {
            match what {
                _ if flags.is_empty() => {}
                Ready::Peer(number, _) => ready.push(Ready::Peer(number, flags)),
                other => ready.push(other),
            }
        }
        ready
    }

    /// The container has ended: its last output is read as fast as it can be.
    fn is_drained(&self) -> bool {
        matches!(self.ending, Some(Ending::Draining(..)))
    }

    /// Takes what an output of the container has.
    fn output(&mut self, index: usize) {
        let (all, attachers) = (self.is_drained(), &mut self.attachers);
        self.stdio.pump(index, &mut self.log, &mut |piece| attachers.take(index, piece) || all);
        if !self.stdio.open_outputs().any(|(i, _)| i == index) {
            self.attachers.end(index);
        }
    }

    /// The next connection, if it is allowed.
    fn accept(&mut self) {
        if let Ok((stream, _)) = self.listener.accept() {
            if socket::check_peer(&stream).is_ok() {
                self.add_peer(stream);
            }
        }
    }

    fn console(&mut self) {
        // Without a terminal the start fails once the OCI runtime has ended, whose own words come first.
        let _ = self.stdio.take_console();
    }
}
