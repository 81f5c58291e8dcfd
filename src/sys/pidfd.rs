//! pidfds: signals and waits that cannot hit a recycled pid.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::PollFlags;
use rustix::process::{PidfdFlags, Signal};

use super::cancel::Cancel;
use crate::error::{Context, Error, Result};

/// A process that may be gone already, but is never another one.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    pid: i32,
}

impl PidFd {
    /// Opens the process `pid`; None when there is no such process.
    pub fn open(pid: i32) -> Result<Option<PidFd>> {
        let raw = rustix::process::Pid::from_raw(pid).ok_or_else(|| Error::internal("open pidfd: pid 0"))?;
        match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(PidFd { fd, pid })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(e) => Err(e).context(|| format!("open pidfd of {pid}")),
        }
    }

    /// Opens `pid` only if it is still the process that started at `start_time` (field 22 of /proc/PID/stat, proc(5)).
    pub fn open_started(pid: i32, start_time: u64) -> Result<Option<PidFd>> {
        let found = PidFd::open(pid)?;
        // Read after the open: the pidfd holds the process we compare.
        Ok(found.filter(|_| start_time_of(pid) == Some(start_time)))
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends signal number `signal`; a process that is gone is fine.
    pub fn kill(&self, signal: i32) -> Result<()> {
        let Some(named) = Signal::from_named_raw(signal) else {
            return signal_raw(self.fd.as_fd(), signal).context(|| format!("send signal {signal} to {}", self.pid));
        };
        match rustix::process::pidfd_send_signal(&self.fd, named) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e).context(|| format!("send signal {signal} to {}", self.pid)),
        }
    }

    /// Waits until the process has ended (its parent may still have to reap it). False when `limit` passed first.
    pub fn wait(&self, cancel: &Cancel, limit: Option<Duration>) -> Result<bool> {
        let flags = cancel.poll(&[(self.fd.as_fd(), PollFlags::POLLIN)], limit)?;
        Ok(flags[0].contains(PollFlags::POLLIN))
    }

    /// Reaps the process if it is a child of ours that has ended; else nothing.
    pub fn reap(&self) {
        use rustix::process::{waitid, WaitId, WaitIdOptions};
        let _ = waitid(WaitId::PidFd(self.fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }

    /// The descriptor alone: readable when the process has ended.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    pub fn has_ended(&self) -> bool {
        matches!(Cancel::never().poll(&[(self.fd.as_fd(), PollFlags::POLLIN)], Some(Duration::ZERO)), Ok(f) if !f[0].is_empty())
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Real-time signals have no name in rustix.
fn signal_raw(fd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: plain integers and a null siginfo; the kernel checks the descriptor and the signal number.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    match nix::errno::Errno::result(r) {
        Ok(_) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Whether a process is there and has not ended; a zombie has.
pub fn lives(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rfind(')').is_some_and(|end| !stat[end + 1..].trim_start().starts_with(['Z', 'X']))
}

/// Start time of a process in clock ticks since boot, field 22 of /proc/PID/stat; None when it is gone.
pub fn start_time_of(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command (field 2) may hold blanks and parentheses: fields count from the last one.
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_itself_and_no_stranger() {
        let me = std::process::id() as i32;
        let start = start_time_of(me).unwrap();
        assert!(PidFd::open_started(me, start).unwrap().is_some());
        assert!(PidFd::open_started(me, start + 1).unwrap().is_none());
        assert!(PidFd::open(i32::MAX - 1).unwrap().is_none());
        assert!(lives(me) && !lives(i32::MAX - 1) && !lives(0));
    }
}
