//! The terminal we are on: raw, so that every key reaches the other side, and put back on every way out.

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::sys::termios::{self, SetArg, Termios};

use crate::error::{Context, Result};

/// Columns and lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub width: u16,
    pub height: u16,
}

/// The size of the terminal, if it is one and tells.
pub fn size(fd: BorrowedFd<'_>) -> Option<Size> {
    let size = rustix::termios::tcgetwinsize(fd).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some(Size { width: size.ws_col, height: size.ws_row })
}

/// A terminal without echo, lines and signal keys. Dropping it puts back what was.
#[derive(Debug)]
pub struct Raw {
    fd: OwnedFd,
    before: Termios,
}

impl Raw {
    /// None if `fd` is no terminal.
    pub fn enter(fd: BorrowedFd<'_>) -> Result<Option<Raw>> {
        let Ok(before) = termios::tcgetattr(fd) else { return Ok(None) };
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        let fd = fd.try_clone_to_owned().context(|| "copy the terminal's descriptor")?;
        termios::tcsetattr(&fd, SetArg::TCSADRAIN, &raw).context(|| "make the terminal raw")?;
        Ok(Some(Raw { fd, before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(&self.fd, SetArg::TCSADRAIN, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::{openpty, Winsize};
    use nix::sys::termios::LocalFlags;
    use std::os::fd::AsFd;

    #[test]
    fn a_terminal_is_put_back_even_by_a_panic() {
        let window = Winsize { ws_row: 5, ws_col: 33, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&window, None).unwrap();
        let terminal = pty.slave.as_fd();
        assert_eq!(size(terminal), Some(Size { width: 33, height: 5 }));
        let echoes = || termios::tcgetattr(terminal).unwrap().local_flags.contains(LocalFlags::ECHO | LocalFlags::ISIG);
        assert!(echoes());
        let died = std::panic::catch_unwind(|| {
            let _raw = Raw::enter(terminal).unwrap().unwrap();
            assert!(!echoes());
            panic!("on purpose");
        });
        assert!(died.is_err() && echoes());
        let file = tempfile::tempfile().unwrap();
        assert!(Raw::enter(file.as_fd()).unwrap().is_none() && size(file.as_fd()).is_none());
    }
}
