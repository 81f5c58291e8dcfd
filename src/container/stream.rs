//! Exec with streams, and attach: a process's stdio as descriptors that do not block, for whoever moves the bytes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::pipe::{pipe_with, PipeFlags};
use rustix::termios::{tcsetwinsize, Winsize};

use super::manager::{Container, Containers};
use crate::error::{Code, Context, Error, Result};
use crate::shim::client::{Attachment, Client, RunningExec};
use crate::shim::protocol::ExecRequest;
use crate::sys::cancel::Cancel;
use crate::sys::console;
use crate::sys::process::{no_input, no_output, set_nonblocking};

/// The streams that a client asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Wanted {
    /// A terminal has one output for both, and a session without any stream has nothing to say.
    pub fn check(&self) -> Result<()> {
        if self.tty && self.stderr {
            return Err(Error::invalid("tty and stderr: a terminal has one output, which is stdout"));
        }
        if !self.stdin && !self.stdout && !self.stderr {
            return Err(Error::invalid("one of stdin, stdout and stderr must be set"));
        }
        Ok(())
    }
}

/// Our ends, non-blocking. With a terminal of an exec, stdin and stdout are that terminal, whose end reads as EIO once the
/// process has ended and nobody has it open.
/// Writing to a stdin that nobody reads any more, or that the container does not have, gives EPIPE.
#[derive(Debug)]
pub struct Streams {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub control: Control,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The exec'd process: its exit code, 128 + signal for a signal.
    Exited(i32),
    /// The container that was attached to; all of its output is in the pipes.
    ContainerEnded(Option<i32>),
    /// The shim has let go of an attacher that took no output for too long.
    Detached,
}

/// The process behind the streams. Dropping it, and the streams, leaves an exec'd process alone but without stdin and terminal
/// (or kills it where the configuration says so), and detaches an attacher.
#[derive(Debug)]
pub struct Control {
    kind: Kind,
    container: String,
}

#[derive(Debug)]
enum Kind {
    Exec(RunningExec, Option<Terminal>),
    Attach(Attachment),
}

/// Of an exec.
#[derive(Debug)]
struct Terminal {
    ours: OwnedFd,
    /// The other end, until the process has ended: moments in which it has it not open are no end.
    peer: Option<OwnedFd>,
}

impl Control {
    /// Readable when `outcome` has something new to say.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Exec(exec, _) => exec.as_fd(),
            Kind::Attach(attachment) => attachment.as_fd(),
        }
    }

    /// How it ended, once; None while it goes on. Never waits. UNAVAILABLE when the shim has died.
    pub fn outcome(&mut self) -> Result<Option<Ended>> {
        match &mut self.kind {
            Kind::Exec(exec, terminal) => {
                let code = exec.try_wait()?;
                if let (Some(_), Some(terminal)) = (code, terminal) {
                    terminal.peer = None;
                }
                Ok(code.map(Ended::Exited))
            }
            Kind::Attach(attachment) => match attachment.ended() {
                Ok(record) => Ok(record.map(|r| Ended::ContainerEnded(Some(r.exit_code)))),
                Err(error) if error.code() == Code::DeadlineExceeded => {
                    log::warn!("container {}: {error}", self.container);
                    Ok(Some(Ended::Detached))
                }
                Err(error) => Err(error),
            },
        }
    }

    /// The size of the terminal in characters; nothing where there is none. Never waits.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        match &self.kind {
            Kind::Exec(_, Some(terminal)) => {
                let size = Winsize { ws_col: width, ws_row: height, ws_xpixel: 0, ws_ypixel: 0 };
                tcsetwinsize(&terminal.ours, size).context(|| "set the size of the terminal")
            }
            Kind::Exec(_, None) => Ok(()),
            Kind::Attach(attachment) => attachment.resize(width, height),
        }
    }

    /// Kills the exec'd process with all it has started; they are dead when this returns. Nothing for an attacher.
    pub fn kill(&self) -> Result<()> {
        match &self.kind {
            Kind::Exec(exec, _) => exec.kill(),
            Kind::Attach(_) => Ok(()),
        }
    }
}

/// Whether a command can be one at all; INVALID_ARGUMENT says why not.
pub fn check_command(cmd: &[String]) -> Result<()> {
    if cmd.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("cmd is empty"));
    }
    match cmd.iter().any(|arg| arg.contains('\0')) {
        true => Err(Error::invalid("cmd: a NUL byte in an argument")),
        false => Ok(()),
    }
}

impl Containers {
    /// Whether `verb` (as in `exec in`) is possible now: FAILED_PRECONDITION when the container does not run.
    pub fn can_stream(&self, container: &Container, verb: &str) -> Result<()> {
        container.status.lock().can_talk(container.id(), verb)
    }

    /// Starts `cmd` in the container, as its user and with its limits; returns once it runs. A program that is not there is an
    /// error. When `cancel` ends first, what was starting is killed.
    pub fn exec_stream(&self, container: &Container, cmd: &[String], wanted: &Wanted, cancel: &Cancel) -> Result<Streams> {
        wanted.check()?;
        let starting = cancel.within(self.settings.runtime_timeout);
        self.launch(container, cmd, wanted, !self.settings.kill_on_disconnect, &starting)
    }

    /// Starts a command. `keep`: it outlives its streams.
    pub(super) fn launch(&self, container: &Container, cmd: &[String], wanted: &Wanted, keep: bool, starting: &Cancel) -> Result<Streams> {
        let id = container.id();
        let what = || format!("exec in container {id}");
        check_command(cmd)?;
        self.can_stream(container, "exec in")?;
        let process = self.exec_process(container, cmd, wanted.tty).context(what)?;
        let request = ExecRequest { id: crate::store::new_id()?[..16].to_owned(), process, console: None, keep };
        let client = Client::new(&container.meta.dir);
        let streams = |kind, stdin, stdout, stderr| Streams { stdin, stdout, stderr, control: Control { kind, container: id.to_owned() } };
        if wanted.tty {
            let (exec, terminal) = client.exec_terminal(&request, starting).map_err(|e| container.because_it_ended(e)).context(what)?;
            let copy = |wanted: bool| wanted.then(|| terminal.try_clone()).transpose().context(|| "duplicate the terminal");
            let (stdin, stdout) = (copy(wanted.stdin)?, copy(wanted.stdout)?);
            let terminal = Terminal { peer: Some(console::peer(&terminal)?), ours: terminal };
            return Ok(streams(Kind::Exec(exec, Some(terminal)), stdin, stdout, None));
        }
        let (pairs, ends) = pipes(wanted)?;
        let user = container.status().user;
        give(&ends, container.meta.owner(user.uid, user.gid))?;
        // Never /dev/null: see `no_input`.
        let empty = ends[0].is_none().then(no_input).transpose()?;
        let sink = ends[1..].iter().any(Option::is_none).then(no_output).transpose()?;
        let spare = [&empty, &sink, &sink];
        let fds = std::array::from_fn(|i| ends[i].as_ref().or(spare[i].as_ref()).expect("one or the other").as_fd());
        let exec = client.exec(&request, fds, starting).map_err(|e| container.because_it_ended(e)).context(what)?;
        let [stdin, stdout, stderr] = pairs;
        Ok(streams(Kind::Exec(exec, None), stdin, stdout, stderr))
    }

    /// Connects to the container's own stdio, next to whoever else has: its output from now on. Where the container has no stdin,
    /// or it has ended, ours is closed. Resizing is for containers with a terminal. `wanted.tty` says what the client makes of the bytes;
    /// whether there is a terminal is the container's own affair, as with peers: its output is all stdout then.
    pub fn attach(&self, container: &Container, wanted: &Wanted, cancel: &Cancel) -> Result<Streams> {
        wanted.check()?;
        let id = container.id();
        self.can_stream(container, "attach to")?;
        let (pairs, ends) = pipes(wanted)?;
        let attached = Client::new(&container.meta.dir).attach(ends.each_ref().map(|e| e.as_ref().map(AsFd::as_fd)), cancel);
        let attached = attached.map_err(|e| container.because_it_ended(e)).context(|| format!("attach to container {id}"))?;
        let [stdin, stdout, stderr] = pairs;
        Ok(Streams { stdin, stdout, stderr, control: Control { kind: Kind::Attach(attached), container: id.to_owned() } })
    }
}

type Ends = [Option<OwnedFd>; 3];

/// The process's user must be able to open /dev/stdin, /dev/stdout and /dev/stderr.
fn give(ends: &Ends, (uid, gid): (u32, u32)) -> Result<()> {
    for end in ends.iter().flatten() {
        nix::unistd::fchown(end, Some(uid.into()), Some(gid.into())).context(|| "give the pipes to the process's user")?;
    }
    Ok(())
}

/// Pipes for the streams that are wanted: our ends, which do not block, and the others.
fn pipes(wanted: &Wanted) -> Result<(Ends, Ends)> {
    let (mut ours, mut theirs) = (Ends::default(), Ends::default());
    for (index, wanted) in [wanted.stdin, wanted.stdout, wanted.stderr].into_iter().enumerate() {
        if wanted {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe")?;
            let (our, their) = if index == 0 { (write, read) } else { (read, write) };
            set_nonblocking(&our)?;
            (ours[index], theirs[index]) = (Some(our), Some(their));
        }
    }
    Ok((ours, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_wanted() {
        let all = Wanted { stdin: true, stdout: true, stderr: true, tty: false };
        assert!(all.check().is_ok());
        assert_eq!(Wanted { tty: true, ..all }.check().unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(Wanted { tty: true, ..Wanted::default() }.check().unwrap_err().code(), Code::InvalidArgument);
        assert!(Wanted { stdout: true, tty: true, ..Wanted::default() }.check().is_ok());
    }

    #[test]
    fn pipes_lead_the_right_way() {
        let (ours, theirs) = pipes(&Wanted { stdin: true, stderr: true, ..Wanted::default() }).unwrap();
        assert!(ours[1].is_none() && theirs[1].is_none());
        rustix::io::write(ours[0].as_ref().unwrap(), b"in").unwrap();
        rustix::io::write(theirs[2].as_ref().unwrap(), b"err").unwrap();
        let mut text = [0; 8];
        assert_eq!(rustix::io::read(theirs[0].as_ref().unwrap(), &mut text).unwrap(), 2);
        assert_eq!(rustix::io::read(ours[2].as_ref().unwrap(), &mut text).unwrap(), 3);
        assert_eq!(rustix::io::read(ours[2].as_ref().unwrap(), &mut text), Err(rustix::io::Errno::AGAIN));
    }
}
