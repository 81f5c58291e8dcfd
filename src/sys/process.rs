//! Child processes: the only `std::process::Command` of the crate. Output is bounded, a timeout kills the whole process
//! group, and nothing waits for a grandchild that keeps a pipe open.

use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::poll::PollFlags;

use super::cancel::Cancel;
use super::label;
use super::pidfd::PidFd;
use crate::error::{Context, Error, Result};

/// Bytes kept of each of stdout and stderr; the rest is read and dropped.
const OUTPUT_LIMIT: usize = 4 << 20;

/// A program to run. The environment starts empty but for PATH.
pub struct Program {
    command: Command,
    path: PathBuf,
    stdin: Vec<u8>,
    stdin_fd: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    limit: usize,
}

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Output {
    /// `exit 3` or `signal 9`, for errors.
    pub fn describe(&self) -> String {
        describe(self.status)
    }
}

/// `exit 3` or `signal 9`, for errors.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown end".to_owned(),
    }
}

impl Program {
    pub fn new(path: impl AsRef<Path>) -> Program {
        let path = path.as_ref().to_owned();
        let mut command = Command::new(&path);
        command.env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/sbin:/usr/bin:/sbin:/bin")));
        Program { command, path, stdin: Vec::new(), stdin_fd: None, stdout: None, stderr: None, limit: OUTPUT_LIMIT }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Program {
        self.command.arg(arg);
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Program {
        self.command.args(args);
        self
    }

    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Program {
        self.command.env(key, value);
        self
    }

    pub fn current_dir(mut self, dir: impl AsRef<Path>) -> Program {
        self.command.current_dir(dir);
        self
    }

    /// Bytes for the program's stdin (else its end at once).
    pub fn stdin(mut self, data: Vec<u8>) -> Program {
        self.stdin = data;
        self
    }

    /// A descriptor for the stdin of a program started by `spawn`.
    pub fn stdin_from(mut self, fd: OwnedFd) -> Program {
        self.stdin_fd = Some(fd);
        self
    }

    /// A descriptor for the program's stdout instead of a captured pipe.
    pub fn stdout_to(mut self, fd: OwnedFd) -> Program {
        self.stdout = Some(fd);
        self
    }

    /// A descriptor for the program's stderr instead of a captured pipe.
    pub fn stderr_to(mut self, fd: OwnedFd) -> Program {
        self.stderr = Some(fd);
        self
    }

    /// The program is killed when the thread that starts it ends, however that comes (PR_SET_PDEATHSIG). Its own children are not.
    /// It starts with no signal blocked.
    pub fn ends_with_us(mut self) -> Program {
        let us = rustix::process::getpid();
        let ask = move || {
            // The daemon's threads block what ends it, and a program would inherit that: no `timeout` could end it or its children.
            nix::sys::signal::SigSet::empty().thread_set_mask()?;
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // We may have ended before it asked.
            match rustix::process::getppid() == Some(us) {
                true => Ok(()),
                false => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
            }
        };
        // SAFETY: system calls and no memory: they may stand between fork and exec.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut self.command, ask) };
        self
    }

    /// Bytes kept of each captured stream.
    pub fn output_limit(mut self, bytes: usize) -> Program {
        self.limit = bytes;
        self
    }

    fn what(&self) -> String {
        format!("run {}", self.path.display())
    }

    /// Starts the program in a session-independent process group of its own and lets it live: for monitors. Its
    /// stdin, stdout and stderr are those given, else one at its end and /dev/null. The caller reaps it.
    pub fn spawn(mut self) -> Result<Child> {
        self.command.stdin(self.stdin_fd.take().map_or_else(no_input, Ok)?);
        self.command.stdout(self.stdout.take().map_or_else(Stdio::null, Stdio::from));
        self.command.stderr(self.stderr.take().map_or_else(Stdio::null, Stdio::from));
        self.command.process_group(0);
        let what = self.what();
        self.command.spawn().context(|| what)
    }

    /// Runs the program to its end, or to ours. On `timeout` (DEADLINE_EXCEEDED), or when `cancel` ends, its process group is killed
    /// and reaped before the error is returned. A non-zero exit is not an error here.
    pub fn run(self, cancel: &Cancel, timeout: Duration) -> Result<Output> {
        let what = self.what();
        let mut program = self.ends_with_us();
        program.command.stdin(if program.stdin.is_empty() { Stdio::from(no_input()?) } else { Stdio::piped() });
        program.command.stdout(program.stdout.take().map_or_else(Stdio::piped, Stdio::from));
        program.command.stderr(program.stderr.take().map_or_else(Stdio::piped, Stdio::from));
        program.command.process_group(0);
        let mut child = program.command.spawn().context(|| what.clone())?;
        // Close our copies of descriptors given to the child: they hold pipes open.
        drop(std::mem::replace(&mut program.command, Command::new("/")));
        let result = exchange(&mut child, &program.stdin, program.limit, &cancel.within(timeout));
        if result.is_err() {
            kill_group(&child);
        }
        let status = child.wait().context(|| what.clone())?;
        match result {
            Ok((stdout, stderr)) => Ok(Output { status, stdout, stderr }),
            Err(e) if cancel.check().is_ok() && e.code() == crate::error::Code::DeadlineExceeded => {
                Err(Error::deadline(format!("{what}: no answer after {} s, killed", timeout.as_secs_f32())))
            }
            Err(e) => Err(e).context(|| what),
        }
    }

    /// `run`, with any end but exit 0 an error that carries the last of stderr.
    pub fn run_ok(self, cancel: &Cancel, timeout: Duration) -> Result<Output> {
        let what = self.what();
        let output = self.run(cancel, timeout)?;
        if output.status.success() {
            return Ok(output);
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let text = text.trim();
        let tail = text.char_indices().rev().nth(2047).map_or(text, |(i, _)| &text[i..]);
        Err(Error::internal(format!("{what}: {}: {tail}", output.describe())))
    }
}

/// A stdin that is at its end: `no_output`, or a pipe that nobody writes to for who may not make that. A program tells a pipe from a
/// terminal that is not there, and may wait for input where it would else do its work.
pub fn no_input() -> Result<OwnedFd> {
    no_output().or_else(|_| super::monitor::pipe().map(|(read, _)| read))
}

/// A null device of our own, on a file system that is mounted nowhere and goes with the descriptor. Never the host's: crun gives the
/// standard streams of a container to its root, who in a user namespace could then forbid /dev/null to the whole machine. Needs
/// Linux 5.2 and CAP_SYS_ADMIN.
pub fn no_output() -> Result<OwnedFd> {
    use rustix::fs::{FileType, Mode, OFlags};
    use rustix::mount::{fsconfig_create, fsmount, fsopen, FsMountFlags, FsOpenFlags, MountAttrFlags};
    let what = || "make a null device";
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context(what)?;
    fsconfig_create(fs.as_fd()).context(what)?;
    let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).context(what)?;
    let mode = Mode::from(0o666);
    rustix::fs::mknodat(&mount, "null", FileType::CharacterDevice, mode, rustix::fs::makedev(1, 3)).context(what)?;
    // Whatever the umask is: the container's user may open /dev/stdin again.
    rustix::fs::chmodat(&mount, "null", mode, rustix::fs::AtFlags::empty()).context(what)?;
    let null = rustix::fs::openat(&mount, "null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).context(what)?;
    // SELinux takes away what a container may not use, and every policy lets it use that.
    if let Some(label) = label::get(Path::new("/dev/null"), label::SELINUX) {
        label::set_open(null.as_fd(), label::SELINUX, &label).context(what)?;
    }
    Ok(null)
}

fn kill_group(child: &Child) {
    let group = nix::unistd::Pid::from_raw(child.id() as i32);
    // Not reaped yet, so the number is still ours.
    let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
}

/// Feeds stdin and collects stdout and stderr until the child has ended; then takes what is still in the pipes without
/// waiting for grandchildren that hold them.
fn exchange(child: &mut Child, input: &[u8], limit: usize, cancel: &Cancel) -> Result<(Vec<u8>, Vec<u8>)> {
    let pidfd = PidFd::open(child.id() as i32)?.ok_or_else(|| Error::internal("child is gone before it was reaped"))?;
    let mut stdin = child.stdin.take();
    let mut stdout = child.stdout.take();
    let mut stderr = child.stderr.take();
    for fd in
        [stdin.as_ref().map(|f| f.as_fd()), stdout.as_ref().map(|f| f.as_fd()), stderr.as_ref().map(|f| f.as_fd())].into_iter().flatten()
    {
        set_nonblocking(fd)?;
    }
    let mut sent = 0;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        let mut set = vec![(pidfd.as_fd(), PollFlags::POLLIN)];
        set.extend(stdout.as_ref().map(|f| (f.as_fd(), PollFlags::POLLIN)));
        set.extend(stderr.as_ref().map(|f| (f.as_fd(), PollFlags::POLLIN)));
        set.extend(stdin.as_ref().map(|f| (f.as_fd(), PollFlags::POLLOUT)));
        let ended = !cancel.poll(&set, None)?[0].is_empty();
        if let Some(pipe) = &mut stdin {
            match pipe.write(&input[sent..]) {
                Ok(n) => sent += n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // A program that does not read its input is judged by its exit code.
                Err(_) => sent = input.len(),
            }
            if sent == input.len() {
                stdin = None;
            }
        }
        drain(&mut stdout, &mut out, limit)?;
        drain(&mut stderr, &mut err, limit)?;
        if ended {
            return Ok((out, err));
        }
    }
}

/// Reads what is there; None after end of file.
fn drain<R: Read>(pipe: &mut Option<R>, into: &mut Vec<u8>, limit: usize) -> Result<()> {
    let Some(reader) = pipe else { return Ok(()) };
    let mut chunk = [0; 16384];
    loop {
        match reader.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => into.extend_from_slice(&chunk[..n.min(limit.saturating_sub(into.len()))]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e).context(|| "read output"),
        }
    }
    *pipe = None;
    Ok(())
}

/// Keeps malloc to two arenas (by default every thread gets one of its own, and many short-lived threads are our way), and gives
/// large blocks back to the kernel when they are freed (by default the first large one raises the bar for all that follow).
pub fn tame_malloc() {
    for (parameter, value) in [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 128 << 10), (libc::M_TRIM_THRESHOLD, 128 << 10)] {
        // SAFETY: mallopt takes two integers and is called before other threads exist.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Sets O_NONBLOCK.
pub fn set_nonblocking(fd: impl AsFd) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd).context(|| "read descriptor flags")?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK).context(|| "set O_NONBLOCK")
}

/// The soft limit of open files of a process; `u64::MAX`: none. None: there is no such process.
#[cfg(feature = "engine")]
pub fn open_files_limit(pid: i32) -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: nothing is set, and the kernel writes one struct rlimit.
    let r = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &mut limit) };
    (r == 0 && pid > 0).then_some(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{SigSet, Signal};
    use std::time::Instant;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_sink_of_our_own() {
        use std::os::unix::fs::MetadataExt;
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut sink = std::fs::File::from(no_output().unwrap());
        sink.write_all(&[7; 100_000]).unwrap();
        let (ours, hosts) = (sink.metadata().unwrap(), std::fs::metadata("/dev/null").unwrap());
        assert_eq!(ours.rdev(), hosts.rdev());
        assert_ne!((ours.dev(), ours.ino()), (hosts.dev(), hosts.ino()));
    }

    #[test]
    fn input_output_and_exit() {
        let out = Program::new("/bin/sh")
            .args(["-c", "cat; echo no >&2; exit 3"])
            .stdin(vec![b'x'; 300_000])
            .run(&Cancel::never(), MINUTE)
            .unwrap();
        assert_eq!((out.status.code(), out.stdout.len(), out.stderr.as_slice()), (Some(3), 300_000, &b"no\n"[..]));
        let e = Program::new("/bin/sh").args(["-c", "echo no >&2; exit 3"]).run_ok(&Cancel::never(), MINUTE).unwrap_err();
        assert_eq!(e.message(), "run /bin/sh: exit 3: no");
    }

    /// As the daemon's threads have it, which take signals in one place.
    #[test]
    fn nothing_blocks_the_signals_of_a_program() {
        let blocked = SigSet::from_iter([Signal::SIGTERM, Signal::SIGHUP]);
        blocked.thread_block().unwrap();
        let out = Program::new("/bin/sh").args(["-c", "grep SigBlk /proc/self/status"]).run_ok(&Cancel::never(), MINUTE);
        blocked.thread_unblock().unwrap();
        assert_eq!(String::from_utf8_lossy(&out.unwrap().stdout), "SigBlk:\t0000000000000000\n");
    }

    #[test]
    fn a_program_ends_with_the_thread_that_waits_for_it() {
        // The signal comes when the thread ends, so one that ends without waiting stands for a process that is killed.
        let child = std::thread::spawn(|| Program::new("/bin/sleep").arg("600").ends_with_us().spawn().unwrap()).join();
        assert_eq!(child.unwrap().wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn timeout_kills_the_group() {
        let begin = Instant::now();
        let e = Program::new("/bin/sh").args(["-c", "sleep 60 & sleep 60"]).run(&Cancel::never(), Duration::from_millis(50)).unwrap_err();
        assert_eq!(e.code(), crate::error::Code::DeadlineExceeded);
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_grandchild_with_the_pipe_does_not_hang_us() {
        let begin = Instant::now();
        let out = Program::new("/bin/sh").args(["-c", "sleep 60 & echo hi"]).run(&Cancel::never(), MINUTE).unwrap();
        assert_eq!(out.stdout, b"hi\n");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn missing_program() {
        let e = Program::new("/nonexistent/x").run(&Cancel::never(), MINUTE).unwrap_err();
        assert!(e.message().starts_with("run /nonexistent/x: No such file"), "{e}");
    }

    #[test]
    fn output_is_bounded() {
        let out = Program::new("/bin/sh").args(["-c", "head -c 100000 /dev/zero"]).output_limit(10).run(&Cancel::never(), MINUTE).unwrap();
        assert_eq!(out.stdout.len(), 10);
    }
}
