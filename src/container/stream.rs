//! Exec with streams, and attach: a process's stdio as descriptors that do not block, for whoever moves the bytes.

use std::os::fd::{BorrowedFd, OwnedFd};

use super::manager::{Container, Containers};
use crate::error::{Error, Result};
use crate::sys::cancel::Cancel;

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

/// Our ends, non-blocking.
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
    Exited(i32),
    ContainerEnded(Option<i32>),
    Detached,
}

/// The process behind the streams.
#[derive(Debug)]
pub struct Control {
    fd: OwnedFd,
}

impl Control {
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.fd)
    }

    pub fn outcome(&mut self) -> Result<Option<Ended>> {
        Ok(None)
    }

    pub fn resize(&self, _width: u16, _height: u16) -> Result<()> {
        Ok(())
    }

    pub fn kill(&self) -> Result<()> {
        Ok(())
    }
}

impl Containers {
    pub fn can_stream(&self, container: &Container, verb: &str) -> Result<()> {
        container.status.lock().can_talk(container.id(), verb)
    }

    pub fn exec_stream(&self, _: &Container, _: &[String], wanted: &Wanted, _: &Cancel) -> Result<Streams> {
        wanted.check()?;
        Err(Error::unimplemented("exec with streams"))
    }

    pub fn attach(&self, _: &Container, wanted: &Wanted, _: &Cancel) -> Result<Streams> {
        wanted.check()?;
        Err(Error::unimplemented("attach"))
    }
}
