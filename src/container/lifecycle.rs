//! Start, stop, kill, log: transitions of one container. An op lock covers a transition, not a wait.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::exit::BURY_LIMIT;
use super::manager::{Container, Containers};
use super::signal;
use super::status::State;
use crate::api::runtime::ContainerConfig;
use crate::error::{Context, Error, Result};
use crate::image::Image;
use crate::shim::client::{self, Client};
use crate::shim::protocol::{self, ShimConfig};
use crate::store::now_ns;
use crate::sys::cancel::Cancel;
use crate::sys::crash;

/// What a shim needs beyond the OCI runtime's own time: to start, to answer.
const SHIM_MARGIN: Duration = Duration::from_secs(15);
/// Longest wait for a killed container to be gone, and for its shim, or another call that does so in its place, to have cleaned up.
const KILL_WAIT: Duration = BURY_LIMIT;
/// How late a gone client may be noticed while we wait for something else.
const CANCEL_SLICE: Duration = Duration::from_millis(200);

/// The stop signal: the request's, else the image's, else TERM.
pub(super) fn stop_signal(config: &ContainerConfig, image: &Image) -> Result<i32> {
    let asked = config.stop_signal.enum_value().map_err(|n| Error::invalid(format!("config.stop_signal: no signal {n}")))?;
    if let Some(number) = signal::of_cri(asked)? {
        return Ok(number);
    }
    match image.stop_signal() {
        Some(name) => signal::number(name).context(|| format!("image {}", image.id)),
        None => Ok(libc::SIGTERM),
    }
}

impl Containers {
    /// StartContainer. A failed start leaves the container EXITED with reason StartError and exit code 128.
    pub fn start(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let id = container.id();
        let _op = container.op.lock();
        container.status.lock().can_start(id)?;
        if let Some(target) = &container.meta.target {
            let running = self.find(target)?.is_some_and(|t| t.status.lock().state == State::Running);
            if !running {
                return Err(Error::precondition(format!("start container {id}: its target container {target} is not running")));
            }
        }
        self.update(container, |s| s.starting = true)?;
        crash::step("start:1-intent");
        let limit = self.settings.runtime_timeout + SHIM_MARGIN;
        // Not cancelled with the client: a start is finished and found by the retry's status.
        let started = client::start(&self.settings.shim, &container.meta.dir, &self.shim_config(container), &Cancel::never(), limit);
        crate::telemetry::shim_started(started.is_ok());
        crash::step("start:2-started");
        match started {
            Ok(started) => {
                // With a record that says `starting` the next daemon finds it too.
                self.note(container, |s| {
                    s.state = State::Running;
                    s.starting = false;
                    s.pid = started.pid;
                    s.started_at = started.started_at;
                    s.shim_alive = true;
                });
                crash::step("start:3-running");
                self.watch(container);
                Ok(())
            }
            Err(error) => {
                self.note(container, |s| s.end_because(128, "StartError", error.message().to_owned(), now_ns()));
                Err(error)
            }
        }
    }

    fn shim_config(&self, container: &Container) -> ShimConfig {
        let (meta, status) = (&container.meta, container.status());
        let (uid, gid) = meta.owner(status.user.uid, status.user.gid);
        ShimConfig {
            version: protocol::VERSION,
            id: meta.id.clone(),
            handler: meta.handler.clone(),
            cgroup: meta.cgroups_path.clone(),
            log_path: meta.log_path.clone(),
            tty: container.config.tty,
            stdin: container.config.stdin,
            stdin_once: container.config.stdin_once,
            // The container's user must be able to open /dev/stdout.
            stdio_uid: Some(uid),
            stdio_gid: Some(gid),
            runtime_timeout_ms: self.settings.runtime_timeout.as_millis() as u64,
        }
    }

    /// StopContainer: the stop signal, up to `grace` for it to work, then KILL for every process. Success when it does not
    /// run any more. A second stop with a shorter grace just kills earlier.
    pub fn stop(self: &Arc<Self>, container: &Arc<Container>, grace: Duration, cancel: &Cancel) -> Result<()> {
        let id = container.id();
        if !self.is_running(container) {
            return Ok(());
        }
        if !grace.is_zero() {
            // Once: programs take a second one for less patience than there is.
            let asked = match container.stop_signalled.swap(true, Ordering::SeqCst) {
                true => Ok(()),
                false => self.signal(container, container.meta.stop_signal, false),
            };
            crash::step("stop:1-signalled");
            match asked {
                Ok(()) if self.wait_exit(container, grace, cancel)? => return Ok(()),
                Ok(()) => {}
                // A shim that does not answer cannot ask its container to end: on to what works without it.
                Err(e) => {
                    container.stop_signalled.store(false, Ordering::SeqCst);
                    log::warn!("{e}; killed without grace");
                }
            }
        }
        if let Err(e) = self.signal(container, libc::SIGKILL, true) {
            log::error!("{e}");
            client::kill_shim(&container.meta.dir)?;
            self.bury(container, 137, "ShimDied", "its shim did not answer, so it was killed with it");
        }
        if self.wait_exit(container, KILL_WAIT, cancel)? {
            crash::step("stop:2-exited");
            return Ok(());
        }
        Err(Error::deadline(format!("stop container {id}: still running {} s after SIGKILL", KILL_WAIT.as_secs())))
    }

    /// Whether it runs; a start that is under way is waited for.
    fn is_running(&self, container: &Container) -> bool {
        let _op = container.op.lock();
        container.status.lock().state == State::Running
    }

    fn signal(self: &Arc<Self>, container: &Arc<Container>, signal: i32, all: bool) -> Result<()> {
        match Client::new(&container.meta.dir).kill(signal, all) {
            Ok(()) => Ok(()),
            // The shim may have gone with its container between our look and our message.
            Err(_) if container.status.lock().state != State::Running => Ok(()),
            Err(_) if client::exit_record(&container.meta.dir)?.is_some() => Ok(()),
            Err(e) => Err(e).context(|| format!("send signal {signal} to container {}", container.id())),
        }
    }

    /// Waits until the container has exited; false when `limit` passed.
    fn wait_exit(&self, container: &Container, limit: Duration, cancel: &Cancel) -> Result<bool> {
        self.wait_until(container, limit, cancel, |s| s.state != State::Running)
    }

    /// Waits until its status is as wanted; false when `limit` passed.
    pub(super) fn wait_until(
        &self,
        container: &Container,
        limit: Duration,
        cancel: &Cancel,
        done: impl Fn(&super::Status) -> bool,
    ) -> Result<bool> {
        let end = Instant::now() + limit;
        let mut status = container.status.lock();
        loop {
            if done(&status) {
                return Ok(true);
            }
            let now = Instant::now();
            if now >= end {
                return Ok(false);
            }
            cancel.check()?;
            status.wait_for(&container.changed, (end - now).min(CANCEL_SLICE));
        }
    }

    /// RemoveContainer: a running one is killed first.
    pub fn remove(self: &Arc<Self>, container: &Arc<Container>, cancel: &Cancel) -> Result<()> {
        self.stop(container, Duration::ZERO, cancel)?;
        // The shim deletes the runtime's state and cgroups after it reported the exit.
        if !self.wait_until(container, KILL_WAIT, cancel, |s| !s.shim_alive)? {
            return Err(Error::deadline(format!("remove container {}: its shim is still at work", container.id())));
        }
        self.forget(container)
    }

    /// ReopenContainerLog: the new file exists when this returns.
    pub fn reopen_log(&self, container: &Container) -> Result<()> {
        let id = container.id();
        container.status.lock().can_talk(id, "reopen the log of")?;
        let Some(path) = &container.meta.log_path else { return Ok(()) };
        let reopened = Client::new(&container.meta.dir).reopen_log(path).map_err(|e| container.because_it_ended(e));
        reopened.context(|| format!("reopen the log of container {id}"))
    }
}
