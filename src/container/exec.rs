//! ExecSync: a command in a running container, its output and exit code.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::PollFlags;

use super::manager::{Container, Containers};
use crate::error::{Code, Context, Error, Result};
use crate::shim::client::Client;
use crate::shim::protocol::ExecRequest;
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::process::set_nonblocking;

/// What an exec'd command left.
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

impl Containers {
    /// Runs `cmd`; `timeout` zero is none. At the timeout the exec'd tree is dead and reaped before DEADLINE_EXCEEDED is
    /// answered. Output beyond the limit is read and dropped.
    pub fn exec_sync(&self, container: &Container, cmd: &[String], timeout: Duration, cancel: &Cancel) -> Result<ExecOutput> {
        let id = container.id();
        let what = || format!("exec in container {id}");
        if cmd.is_empty() || cmd[0].is_empty() {
            return Err(Error::invalid("cmd is empty"));
        }
        container.status.lock().can_talk(id, "exec in")?;
        let path = container.meta.spec_path();
        let spec: oci_spec::runtime::Spec =
            serde_json::from_slice(&file::read(&path, 16 << 20)?).context(|| format!("{}: read {}", what(), path.display()))?;
        let process = serde_json::to_value(crate::spec::exec_process(&spec, cmd, false)).context(what)?;
        let mut out = Pipe::new(self.settings.exec_output)?;
        let mut err = Pipe::new(self.settings.exec_output)?;
        let null = std::fs::File::open("/dev/null").context(|| "open /dev/null")?;
        let request = ExecRequest { id: crate::store::new_id()?[..16].to_owned(), process };
        let (out_end, err_end) = (out.write_end(), err.write_end());
        let ends = [null.as_fd(), out_end.as_fd(), err_end.as_fd()];
        // The time to start counts: a runtime or shim that hangs must not hold a probe longer than it asked for.
        let limit = if timeout.is_zero() { cancel.clone() } else { cancel.within(timeout) };
        let starting = limit.within(self.settings.runtime_timeout);
        let running = Client::new(&container.meta.dir).exec(&request, ends, &starting).context(what)?;
        drop((out_end, err_end));
        let exit_code = loop {
            let mut set = vec![(running.as_fd(), PollFlags::POLLIN)];
            set.extend(out.reader.as_ref().map(|r| (r.as_fd(), PollFlags::POLLIN)));
            set.extend(err.reader.as_ref().map(|r| (r.as_fd(), PollFlags::POLLIN)));
            let ended = match limit.poll(&set, None) {
                Ok(flags) => !flags[0].is_empty(),
                Err(e) => {
                    running.kill().context(what)?;
                    let ours = e.code() == Code::DeadlineExceeded && cancel.check().is_ok();
                    let text = format!("{}: timed out after {} s", what(), timeout.as_secs_f32());
                    return Err(if ours { Error::deadline(text) } else { e });
                }
            };
            // Both share one budget: the whole answer has to fit a message.
            let total = out.data.len() + err.data.len();
            out.drain(total)?;
            let total = out.data.len() + err.data.len();
            err.drain(total)?;
            if ended {
                break running.wait(&Cancel::never())?;
            }
        };
        let total = out.data.len() + err.data.len();
        out.drain(total)?;
        let total = out.data.len() + err.data.len();
        err.drain(total)?;
        Ok(ExecOutput { stdout: out.data, stderr: err.data, exit_code })
    }
}

/// One output stream of the command.
struct Pipe {
    reader: Option<std::fs::File>,
    writer: Option<OwnedFd>,
    data: Vec<u8>,
    limit: usize,
}

impl Pipe {
    fn new(limit: usize) -> Result<Pipe> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(|| "make a pipe")?;
        set_nonblocking(&reader)?;
        Ok(Pipe { reader: Some(reader.into()), writer: Some(writer), data: Vec::new(), limit })
    }

    /// The end for the command; once.
    fn write_end(&mut self) -> OwnedFd {
        self.writer.take().expect("the write end is taken once")
    }

    /// Takes what is there without waiting; bytes over the budget (`total` of it are used) are dropped.
    fn drain(&mut self, total: usize) -> Result<()> {
        let Some(reader) = &mut self.reader else { return Ok(()) };
        let mut room = self.limit.saturating_sub(total);
        let mut chunk = [0; 32768];
        loop {
            match reader.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => {
                    let kept = n.min(room);
                    self.data.extend_from_slice(&chunk[..kept]);
                    room -= kept;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e).context(|| "read the command's output"),
            }
        }
        self.reader = None;
        Ok(())
    }
}
