//! `crisp run`: a sandbox with one container, from the pull to the last line of its output; and nothing left behind,
//! whatever goes wrong on the way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::{select, Receiver};
use grpcio::RpcStatusCode;
use nix::sys::signal::Signal;
use serde_json::json;

use super::args::{Run, GRACE};
use super::client::{Client, LONG, SHORT};
use super::failure::{warn, During, Failure, Outcome};
use super::follow::LogFile;
use super::log::Sink;
use super::request::{self, LABEL, LOG_FILE};
use super::{image, interrupt, json, object, print, pull};
use crate::api::runtime::{ContainerStatus, ListPodSandboxRequest, PodSandboxConfig, RunPodSandboxRequest, StartContainerRequest};
use crate::error::{Context, Result};

/// Where logs of detached containers are kept; those of the others are in the directory for temporary files.
const LOGS: &str = "/var/log/crisp";
/// How names of our log directories start.
const PREFIX: &str = "crisp-run-";
/// How long a daemon may be away while a container is followed: it may be restarted.
const PATIENCE: Duration = Duration::from_secs(30);

/// `crisp run`: gives the exit code of the container.
pub fn run(client: &Client, run: &Run, json: bool, signals: &Receiver<Signal>) -> Outcome<u8> {
    if image::find(client, &run.image)?.is_none() {
        pull::pull(client, &run.image, run.credentials.as_ref(), signals)?;
    }
    let life = Life::begin(client, run)?;
    let result = life.live(run, json, signals);
    if run.detach && result.is_ok() {
        return result;
    }
    if let Some(left) = life.end(signals) {
        warn(&left);
        // A success that leaves something behind is none.
        return result.map(|code| code.max(1));
    }
    result
}

/// What one run has made: the sandbox, found again by its token, and the log directory.
struct Life {
    client: Client,
    token: String,
    config: PodSandboxConfig,
    logs: PathBuf,
}

impl Life {
    fn begin(client: &Client, run: &Run) -> Outcome<Life> {
        let token = request::token()?;
        let base = if run.detach { PathBuf::from(LOGS) } else { std::env::temp_dir() };
        if run.detach {
            crate::sys::file::make_dir(&base, 0o755)?;
        }
        let logs =
            nix::unistd::mkdtemp(&base.join(format!("{PREFIX}XXXXXX"))).context(|| format!("create directory in {}", base.display()))?;
        let config = request::sandbox(run, &token, &logs);
        Ok(Life { client: client.clone(), token, config, logs })
    }

    /// From the sandbox to the end of the container.
    fn live(&self, run: &Run, json: bool, signals: &Receiver<Signal>) -> Outcome<u8> {
        let interrupted = || signals.try_recv().map_or(Ok(()), |signal| Err(Failure::Silent(interrupt::exit_code(signal))));
        let runtime = self.client.runtime();
        let mut request = RunPodSandboxRequest { runtime_handler: run.runtime.clone(), ..RunPodSandboxRequest::default() };
        request.config = protobuf::MessageField::some(self.config.clone());
        let sandbox = runtime.run_pod_sandbox(&request, LONG).during(|| "run sandbox")?.pod_sandbox_id;
        interrupted()?;
        let request = request::container(run, &sandbox, &self.config);
        let container = runtime.create_container(&request, LONG).during(|| "create container")?.container_id;
        interrupted()?;
        let request = StartContainerRequest { container_id: container.clone(), ..StartContainerRequest::default() };
        runtime.start_container(&request, LONG).during(|| format!("start container {container}"))?;
        if !run.detach {
            return self.follow(&container, signals);
        }
        print(&match json {
            true => json::text(&json!({ "containerId": container, "podSandboxId": sandbox })),
            false => format!("{container}\n{sandbox}\n"),
        })?;
        Ok(0)
    }

    /// Shows the output until the container has ended. The first signal stops it with grace, the second kills it.
    fn follow(&self, container: &str, signals: &Receiver<Signal>) -> Outcome<u8> {
        let (mut stdout, mut stderr) = (std::io::stdout().lock(), std::io::stderr().lock());
        let mut stdout = std::io::BufWriter::new(&mut stdout);
        let mut sink = Sink::new(&mut stdout, &mut stderr, false);
        let mut log = LogFile::open(&self.logs.join(LOG_FILE), None)?;
        let (stopped_sender, stopped) = crossbeam_channel::unbounded();
        let (mut interrupts, mut ended) = (0, None);
        let (mut pause, mut seen) = (Duration::from_millis(5), Instant::now());
        loop {
            // The state is read before the log: what was written before the end is there.
            let moved = log.pump(&mut sink)?;
            if let Some(status) = ended {
                log.finish(&mut sink)?;
                return Ok(verdict(container, &status));
            }
            pause = if moved { Duration::from_millis(5) } else { (pause * 2).min(Duration::from_millis(100)) };
            select! {
                recv(signals) -> signal => {
                    interrupts += 1;
                    let grace = match interrupts {
                        1 => GRACE,
                        2 => 0,
                        _ => return Err(Failure::Silent(signal.map_or(1, interrupt::exit_code))),
                    };
                    let (client, container, sender) = (self.client.clone(), container.to_owned(), stopped_sender.clone());
                    crate::sys::thread::spawn("stop", move || sender.send(object::stop_container(&client, &container, grace)))?;
                }
                recv(stopped) -> result => if let Ok(Err(failure)) = result { return Err(failure) },
                default(pause) => {}
            }
            match object::status(&self.client, container) {
                Ok(None) => return Err(Failure::failed(format!("container {container} was removed by somebody else"))),
                Ok(Some(status)) => {
                    seen = Instant::now();
                    ended = (!object::is_before_end(&status)).then_some(status);
                }
                // The container does not need the daemon, so a daemon that restarts is waited for.
                Err(error) if error.code == RpcStatusCode::UNAVAILABLE && seen.elapsed() < PATIENCE => {}
                Err(error) => return Err(error).during(|| format!("read status of container {container}")),
            }
        }
    }

    /// Removes everything; the answer says what is left, if anything. A second signal meanwhile gives up waiting.
    fn end(&self, signals: &Receiver<Signal>) -> Option<String> {
        let (sender, done) = crossbeam_channel::bounded(1);
        let (client, token) = (self.client.clone(), self.token.clone());
        let started = crate::sys::thread::spawn("remove", move || sender.send(remove_marked(&client, &token)));
        if let Err(error) = started {
            return Some(error.to_string());
        }
        let mut interrupts = 0;
        let left = loop {
            select! {
                recv(done) -> result => break match result {
                    Ok(Err(Failure::Failed(message) | Failure::Usage(message))) => Some(message),
                    _ => None,
                },
                recv(signals) -> _ => interrupts += 1,
            }
            if interrupts == 2 {
                break Some("gave up waiting for the removal".to_owned());
            }
        };
        remove_logs(&self.logs);
        left.map(|message| format!("{message}; a sandbox named {} may be left", self.config.metadata.name))
    }
}

/// Stops and removes the sandboxes that carry `token`: also one whose answer never came.
fn remove_marked(client: &Client, token: &str) -> Outcome<()> {
    let mut request = ListPodSandboxRequest::new();
    request.filter.mut_or_insert_default().label_selector.insert(LABEL.to_owned(), token.to_owned());
    let found = client.runtime().list_pod_sandbox(&request, SHORT).during(|| "list sandboxes")?.items;
    found.iter().try_for_each(|sandbox| object::remove_sandbox(client, &sandbox.id))
}

/// The exit code, and a word on stderr for an end that the code does not explain.
fn verdict(container: &str, status: &ContainerStatus) -> u8 {
    if !matches!(status.reason.as_str(), "" | "Completed" | "Error") {
        let message = if status.message.is_empty() { String::new() } else { format!(": {}", status.message) };
        warn(&format!("container {container}: {}{message}", status.reason));
    }
    object::exit_code(status.exit_code)
}

/// Removes the log directory of a detached run, which the sandbox's annotations name.
pub fn remove_logs_of(annotations: &BTreeMap<String, String>) {
    if let Some(path) = annotations.get(request::LOGS_ANNOTATION).map(Path::new) {
        if is_ours(path) {
            remove_logs(path);
        }
    }
}

/// Annotations are anybody's: only a directory that a run has made is one.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
    let parent = path.parent().is_some_and(|parent| parent == Path::new(LOGS) || parent == std::env::temp_dir());
    name && parent && std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

/// Removes the log and then its directory, and nothing else that may be there.
fn remove_logs(directory: &Path) {
    let remove = || -> Result<()> {
        crate::sys::file::remove_file(&directory.join(LOG_FILE))?;
        std::fs::remove_dir(directory).context(|| format!("remove {}", directory.display()))
    };
    if let Err(error) = remove() {
        warn(&error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_runs_are_removed() {
        let temp = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap();
        let annotations = |path: &Path| BTreeMap::from([(request::LOGS_ANNOTATION.to_owned(), path.to_str().unwrap().to_owned())]);
        let other = tempfile::tempdir().unwrap();
        let inside = other.path().join(format!("{PREFIX}x"));
        std::fs::create_dir(&inside).unwrap();
        remove_logs_of(&annotations(&inside));
        remove_logs_of(&annotations(other.path()));
        assert!(inside.is_dir() && other.path().is_dir());
        std::fs::write(temp.path().join(LOG_FILE), "x").unwrap();
        remove_logs_of(&annotations(temp.path()));
        assert!(!temp.path().exists());
    }
}
