//! Becoming a monitor: away from the parent, in a session of its own, deaf to signals meant for others, heir of orphans.

use std::os::fd::OwnedFd;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::ForkResult;

use crate::error::{Context, Result};

/// Forks; the parent exits with 0 and never returns, the child goes on in a new session. So whoever started us reaps at
/// once and has nobody to reap later. The caller has one thread.
pub fn detach() -> Result<()> {
    // SAFETY: called by single-threaded programs only, so no lock of another thread is left held in the child.
    match unsafe { nix::unistd::fork() }.context(|| "fork the monitor")? {
        // SAFETY: _exit runs no destructor and flushes nothing: the child alone owns what we had.
        ForkResult::Parent { .. } => unsafe { libc::_exit(0) },
        ForkResult::Child => nix::unistd::setsid().map(drop).context(|| "make a session"),
    }
}

/// Orphans of our descendants become our children.
pub fn become_subreaper() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context(|| "become the reaper of orphans")
}

/// Closes every descriptor from `first` on. The caller holds none of them as an owned value.
pub fn close_from(first: u32) -> Result<()> {
    // SAFETY: plain integers; by contract nobody uses the descriptors afterwards.
    let r = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    nix::errno::Errno::result(r).map(drop).context(|| "close descriptors")
}

/// The signals of this process: `deaf` ones do nothing, SIGCHLD comes by descriptor. Programs started through
/// `with_clean_signals` inherit neither: a handler, unlike SIG_IGN, is not kept over exec.
pub fn own_signals(deaf: &[Signal]) -> Result<SignalFd> {
    for signal in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP | Signal::SIGPIPE)) {
        // What whoever started us ignores (nohup) would be ignored by the container too.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        unsafe { nix::sys::signal::sigaction(signal, &default) }.context(|| format!("reset {signal}"))?;
    }
    let action = SigAction::new(SigHandler::Handler(on_deaf), SaFlags::SA_RESTART, SigSet::empty());
    for signal in deaf {
        // SAFETY: the handler does nothing, so it is safe at any time.
        unsafe { nix::sys::signal::sigaction(*signal, &action) }.context(|| format!("set handler of {signal}"))?;
    }
    let mask = child_mask();
    mask.thread_set_mask().context(|| "set signal mask")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context(|| "make signalfd")
}

extern "C" fn on_deaf(_: libc::c_int) {}

fn child_mask() -> SigSet {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask
}

/// Runs `start`, which starts a program, with no signal blocked: masks are inherited. A SIGCHLD of that moment would be
/// lost, be it the program's own, so one is sent afterwards in any case.
pub fn with_clean_signals<T>(start: impl FnOnce() -> Result<T>) -> Result<T> {
    SigSet::empty().thread_set_mask().context(|| "clear signal mask")?;
    let result = start();
    child_mask().thread_set_mask().context(|| "set signal mask")?;
    nix::sys::signal::raise(Signal::SIGCHLD).context(|| "raise SIGCHLD")?;
    result
}

/// Starts a program as a sibling: our parent reaps it. The caller has one thread. In the new process nothing runs but the exec.
pub fn spawn_sibling(program: &std::ffi::CStr, args: &[std::ffi::CString]) -> Result<i32> {
    let mut list: Vec<*const libc::c_char> = args.iter().map(|arg| arg.as_ptr()).collect();
    list.push(std::ptr::null());
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: like fork(2), on our own stack, by a program of one thread. The child makes only calls that are safe after a fork, with
    // pointers to what the parent had before it.
    let pid = unsafe {
        let (flags, none) = (libc::c_long::from(libc::CLONE_PARENT | libc::SIGCHLD), 0 as libc::c_long);
        let pid = libc::syscall(libc::SYS_clone, flags, none, none, none, none);
        if pid == 0 {
            libc::execve(program.as_ptr(), list.as_ptr(), environment.as_ptr());
            libc::_exit(127);
        }
        pid
    };
    nix::errno::Errno::result(pid).map(|pid| pid as i32).context(|| "start a process beside us")
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Code(i32),
    Signal(i32),
}

impl End {
    /// As a shell tells it: 128 + signal.
    pub fn exit_code(self) -> i32 {
        match self {
            End::Code(code) => code,
            End::Signal(signal) => 128 + signal,
        }
    }

    pub fn signal(self) -> Option<i32> {
        match self {
            End::Code(_) => None,
            End::Signal(signal) => Some(signal),
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Code(code) => write!(f, "exit {code}"),
            End::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Reaps child `pid`, or any child when None, without waiting. None when there is nothing to reap (yet).
pub fn reap(pid: Option<i32>) -> Option<(i32, End)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call. Not nix's waitpid: it turns the end by a real-time signal into an error.
        match unsafe { libc::waitpid(pid.unwrap_or(-1), &mut status, libc::WNOHANG) } {
            -1 if nix::errno::Errno::last() == nix::errno::Errno::EINTR => {}
            -1 | 0 => return None,
            found if libc::WIFSIGNALED(status) => return Some((found, End::Signal(libc::WTERMSIG(status)))),
            found => return Some((found, End::Code(libc::WEXITSTATUS(status)))),
        }
    }
}

/// Sends a signal by number (real-time ones too) to a child that is not reaped, or with a negative pid to its group. Gone is fine.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: plain integers.
    let r = unsafe { libc::kill(pid, signal) };
    match nix::errno::Errno::result(r) {
        Ok(_) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(e) => Err(e).context(|| format!("send signal {signal} to {pid}")),
    }
}

/// A pipe: read end (non-blocking for us), write end. Both close-on-exec.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context(|| "make pipe")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_as_a_shell_tells_them() {
        assert_eq!((End::Code(3).exit_code(), End::Code(3).signal()), (3, None));
        assert_eq!((End::Signal(9).exit_code(), End::Signal(9).signal()), (137, Some(9)));
        assert_eq!(End::Signal(9).to_string(), "signal 9");
    }
}
