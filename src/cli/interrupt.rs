//! Ctrl-C and its like, as messages instead of sudden death: for commands that have something to undo.

use crossbeam_channel::Receiver;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Context, Result};

/// Takes INT, TERM and HUP away from the process and hands them over one by one. Must be called before there is any
/// other thread: threads inherit what is blocked.
pub fn receive() -> Result<Receiver<Signal>> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().context(|| "block signals")?;
    let (sender, receiver) = crossbeam_channel::unbounded();
    crate::sys::thread::spawn("signals", move || {
        while let Ok(signal) = set.wait() {
            if sender.send(signal).is_err() {
                return;
            }
        }
    })?;
    Ok(receiver)
}

/// The same as a descriptor to poll, with WINCH and QUIT. Under the same condition.
pub fn descriptor() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGWINCH] {
        set.add(signal);
    }
    set.thread_block().context(|| "block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context(|| "make a signal descriptor")
}

/// The exit code a shell gives a program that died of `signal`.
pub fn exit_code(signal: Signal) -> u8 {
    128 + signal as i32 as u8
}
