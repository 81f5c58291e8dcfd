//! ExecSync: a command in a running container, its output and exit code.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::PollFlags;
use oci_spec::runtime::Process;
use serde::Deserialize;

use super::manager::{Container, Containers};
use super::stream::{Ended, Wanted};
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;

/// What an exec'd command left.
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

/// All that an exec needs of a config.json, of which this is a small part.
#[derive(Deserialize)]
struct ProcessOfSpec {
    #[serde(default)]
    process: Process,
}

impl Containers {
    /// Runs `cmd`; `timeout` zero is none. At the timeout the exec'd tree is dead and reaped before DEADLINE_EXCEEDED is
    /// answered. Output beyond the limit is read and dropped.
    pub fn exec_sync(&self, container: &Container, cmd: &[String], timeout: Duration, cancel: &Cancel) -> Result<ExecOutput> {
        let what = || format!("exec in container {}", container.id());
        // The time to start counts: a runtime or shim that hangs must not hold a probe longer than it asked for.
        let limit = if timeout.is_zero() { cancel.clone() } else { cancel.within(timeout) };
        let starting = limit.within(self.settings.runtime_timeout);
        let wanted = Wanted { stdout: true, stderr: true, ..Wanted::default() };
        let mut running = self.launch(container, cmd, &wanted, false, &starting)?;
        let (mut out, mut err) = (Pipe::new(running.stdout.take()), Pipe::new(running.stderr.take()));
        let control = &mut running.control;
        // Both share one budget: the whole answer has to fit a message.
        let most = self.settings.exec_output;
        let exit_code = loop {
            let mut set = vec![(control.as_fd(), PollFlags::POLLIN)];
            set.extend([&out, &err].into_iter().filter_map(|p| Some((p.reader.as_ref()?.as_fd(), PollFlags::POLLIN))));
            let ready = limit.poll(&set, None);
            let ended = match ready {
                Ok(_) => control.outcome().map_err(|e| container.because_it_ended(e)).context(what)?,
                Err(e) => {
                    control.kill().context(what)?;
                    let ours = e.code() == Code::DeadlineExceeded && cancel.check().is_ok();
                    let text = format!("{}: timed out after {} s", what(), timeout.as_secs_f32());
                    return Err(if ours { Error::deadline(text) } else { e });
                }
            };
            // After the end once more: what it wrote last. What a daemon of it writes later is not awaited.
            out.drain(most.saturating_sub(err.data.len()))?;
            err.drain(most.saturating_sub(out.data.len()))?;
            if let Some(Ended::Exited(code)) = ended {
                break code;
            }
        };
        Ok(ExecOutput { stdout: out.data, stderr: err.data, exit_code })
    }

    /// The OCI process object of an exec: the container's own, with another command.
    pub(super) fn exec_process(&self, container: &Container, cmd: &[String], tty: bool) -> Result<serde_json::Value> {
        let path = container.meta.spec_path();
        let text = file::read(&path, 16 << 20)?;
        let spec: ProcessOfSpec = serde_json::from_slice(&text).context(|| format!("read {}", path.display()))?;
        serde_json::to_value(crate::spec::exec_process(spec.process, cmd, tty)).context(|| "write the process object")
    }
}

/// One output stream of the command.
struct Pipe {
    reader: Option<File>,
    data: Vec<u8>,
}

impl Pipe {
    fn new(reader: Option<OwnedFd>) -> Pipe {
        Pipe { reader: reader.map(File::from), data: Vec::new() }
    }

    /// Takes what is there without waiting, and drops what is beyond `most`.
    fn drain(&mut self, most: usize) -> Result<()> {
        let Some(reader) = &mut self.reader else { return Ok(()) };
        let mut room = most.saturating_sub(self.data.len());
        let mut chunk = [0; 32768];
        // More than the largest pipe holds, but not for ever: one that writes without end must not keep us from its timeout.
        for _ in 0..64 {
            match reader.read(&mut chunk) {
                Ok(0) => {
                    self.reader = None;
                    return Ok(());
                }
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
        Ok(())
    }
}
