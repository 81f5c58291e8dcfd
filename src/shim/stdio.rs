//! The container's stdin, stdout and stderr: pipes, or a terminal whose other end the OCI runtime sends us.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::log::{Log, Output, Pumped};
use super::protocol::ShimConfig;
use crate::error::{Context, Error, Result};
use crate::sys::console::Console;
use crate::sys::{console as terminal, monitor, process};

const CONSOLE_FILE: &str = "console.sock";

/// Our ends.
#[derive(Default)]
pub struct Stdio {
    /// stdout and stderr, or the terminal; None once closed.
    outputs: [Option<Output<File>>; 2],
    /// The container's stdin, open for as long as it may read it.
    stdin: Option<OwnedFd>,
    /// Attachers may write to the terminal.
    typing: bool,
    /// What the OCI runtime itself says when the container has a terminal.
    errors: Option<File>,
    console: Option<Console>,
    /// The other end of the terminal, so that it outlives moments in which no process of the container has it open.
    peer: Option<OwnedFd>,
}

/// The container's ends, for the OCI runtime to inherit.
pub struct Inherited {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: OwnedFd,
    /// For `--console-socket`; relative to the container's directory where the path would be too long for a socket.
    pub console: Option<PathBuf>,
}

impl Stdio {
    pub fn open(config: &ShimConfig, dir: &Path) -> Result<(Stdio, Inherited)> {
        let owner = |fd: &OwnedFd| -> Result<()> {
            if config.stdio_uid.is_none() && config.stdio_gid.is_none() {
                return Ok(());
            }
            let (uid, gid) = (config.stdio_uid.map(Into::into), config.stdio_gid.map(Into::into));
            nix::unistd::fchown(fd, uid, gid).context(|| "give the stdio pipes to the container's user")
        };
        let (errors, stderr) = read_end(&owner)?;
        if config.tty {
            let shown = super::exec::shown_socket(dir, CONSOLE_FILE);
            let stdio = Stdio {
                outputs: [None, None],
                stdin: None,
                typing: config.stdin,
                errors: Some(errors),
                console: Some(Console::listen(dir.join(CONSOLE_FILE))?),
                peer: None,
            };
            return Ok((stdio, Inherited { stdin: None, stdout: None, stderr, console: Some(shown) }));
        }
        let (output, stdout) = read_end(&owner)?;
        let (stdin, kept) = match config.stdin {
            true => {
                let (read, write) = monitor::pipe()?;
                owner(&read)?;
                process::set_nonblocking(&write)?;
                (Some(read), Some(write))
            }
            false => (None, None),
        };
        let outputs = [Some(Output::new(output, "stdout")), Some(Output::new(errors, "stderr"))];
        let stdio = Stdio { outputs, stdin: kept, typing: false, errors: None, console: None, peer: None };
        Ok((stdio, Inherited { stdin, stdout: Some(stdout), stderr, console: None }))
    }

    /// Outputs that are open, with the number for `pump`.
    pub fn open_outputs(&self) -> impl Iterator<Item = (usize, &File)> {
        self.outputs.iter().enumerate().filter_map(|(i, o)| Some((i, o.as_ref()?.reader())))
    }

    /// What to poll until the terminal has come.
    pub fn console(&self) -> Option<BorrowedFd<'_>> {
        self.console.as_ref().map(AsFd::as_fd)
    }

    /// Takes what there is of the terminal: first the connection, then the descriptor. True once it is here, or none is to come.
    pub fn take_console(&mut self) -> Result<bool> {
        let Some(console) = &mut self.console else { return Ok(true) };
        let Some(master) = console.take()? else { return Ok(false) };
        self.peer = Some(terminal::peer(&master)?);
        self.outputs[0] = Some(Output::new(File::from(master), "stdout"));
        self.console = None;
        Ok(true)
    }

    /// The OCI runtime has ended well: it has sent the terminal, if one was asked for.
    pub fn expect_console(&mut self) -> Result<()> {
        // The loop may not have seen it yet.
        if self.take_console()? {
            return Ok(());
        }
        Err(Error::internal("the OCI runtime sent no terminal"))
    }

    /// What a failed OCI runtime has said on stderr, before anything of the container could.
    pub fn runtime_words(&mut self) -> String {
        let mut text = [0; 4096];
        let mut reader: Option<&File> = self.errors.as_ref().or_else(|| self.outputs[1].as_ref().map(Output::reader));
        let n = reader.as_mut().map_or(0, |r| r.read(&mut text).unwrap_or(0));
        String::from_utf8_lossy(&text[..n]).into_owned()
    }

    /// The container runs: from here on all output is its own.
    pub fn started(&mut self) {
        self.errors = None;
    }

    /// The container's first process has ended: the terminal may end with those that still have it.
    pub fn let_go_of_terminal(&mut self) {
        self.peer = None;
    }

    /// Where attachers may write: the pipe or the terminal. None when nobody may, or may no more.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        match (&self.stdin, self.typing) {
            (Some(pipe), _) => Some(pipe.as_fd()),
            (None, true) => self.terminal(),
            (None, false) => None,
        }
    }

    /// The container reads the end of its input once it has read what was written. A terminal cannot be half closed: nothing happens to it.
    pub fn end_input(&mut self) {
        self.stdin = None;
    }

    /// The container's terminal, if it has one.
    pub fn terminal(&self) -> Option<BorrowedFd<'_>> {
        let reader = self.outputs[0].as_ref()?.reader();
        rustix::termios::isatty(reader).then(|| reader.as_fd())
    }

    /// Moves what output `index` has into the log and to `tap`.
    pub fn pump(&mut self, index: usize, log: &mut Log, tap: &mut dyn FnMut(&[u8]) -> bool) {
        if let Some(output) = &mut self.outputs[index] {
            if output.pump(log, tap) == Pumped::End {
                output.finish(log);
                self.outputs[index] = None;
            }
        }
    }

    pub fn is_closed(&self) -> bool {
        self.outputs.iter().all(Option::is_none)
    }

    /// Logs what has no newline yet and closes everything.
    pub fn close(&mut self, log: &mut Log) {
        for output in self.outputs.iter_mut().flatten() {
            output.finish(log);
        }
        self.outputs = [None, None];
        self.stdin = None;
        self.errors = None;
        self.console = None;
        self.peer = None;
    }
}

/// A pipe whose read end does not block.
fn read_end(owner: &dyn Fn(&OwnedFd) -> Result<()>) -> Result<(File, OwnedFd)> {
    let (read, write) = monitor::pipe()?;
    owner(&write)?;
    process::set_nonblocking(read.as_fd())?;
    Ok((File::from(read), write))
}
