//! What is done to containers and sandboxes that exist: `stop`, `rm`, `exec --sync`, `logs`, `inspect`.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use super::client::{Client, FOREVER, LONG, SHORT};
use super::failure::{During, Failure, Outcome};
use super::follow::LogFile;
use super::log::Sink;
use super::resolve::{self, Kind, Object};
use super::{image, json, run};
use crate::api::runtime::{
    ContainerState, ContainerStatus, ContainerStatusRequest, ExecSyncRequest, PodSandboxStatusRequest, RemoveContainerRequest,
    RemovePodSandboxRequest, StopContainerRequest, StopPodSandboxRequest,
};

/// Time between two looks at a log that is followed.
const PAUSE: Duration = Duration::from_millis(100);

/// The container or sandbox that `word` names.
fn find<'a>(objects: &'a [Object], word: &str) -> Outcome<&'a Object> {
    resolve::any(objects, word)?
        .ok_or_else(|| Failure::failed(format!("no container or sandbox {word:?}; crisp ps -a and crisp pods list them")))
}

/// `crisp stop` of one object; gives its id.
pub fn stop(client: &Client, objects: &[Object], word: &str, timeout: u32) -> Outcome<String> {
    let object = find(objects, word)?;
    match object.kind {
        Kind::Container => stop_container(client, &object.id, timeout)?,
        Kind::Sandbox => {
            // StopPodSandbox kills; the grace is for us to give.
            for container in objects.iter().filter(|c| c.kind == Kind::Container && c.sandbox == object.id && c.alive) {
                stop_container(client, &container.id, timeout)?;
            }
            stop_sandbox(client, &object.id)?;
        }
    }
    Ok(object.id.clone())
}

/// Signals the container and waits for its end, at most `grace` seconds until it is killed.
pub fn stop_container(client: &Client, id: &str, grace: u32) -> Outcome<()> {
    let request = StopContainerRequest { container_id: id.to_owned(), timeout: grace.into(), ..StopContainerRequest::default() };
    let limit = LONG.map(|limit| limit + Duration::from_secs(grace.into()));
    client.runtime().stop_container(&request, limit).during(|| format!("stop container {id}"))?;
    Ok(())
}

fn stop_sandbox(client: &Client, id: &str) -> Outcome<()> {
    let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned(), ..StopPodSandboxRequest::default() };
    client.runtime().stop_pod_sandbox(&request, LONG).during(|| format!("stop sandbox {id}"))?;
    Ok(())
}

/// Stops and removes the sandbox and all that is in it.
pub fn remove_sandbox(client: &Client, id: &str) -> Outcome<()> {
    stop_sandbox(client, id)?;
    let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned(), ..RemovePodSandboxRequest::default() };
    client.runtime().remove_pod_sandbox(&request, LONG).during(|| format!("remove sandbox {id}"))?;
    Ok(())
}

/// `crisp rm` of one object; gives its id.
pub fn remove(client: &Client, objects: &[Object], word: &str, force: bool) -> Outcome<String> {
    let object = find(objects, word)?;
    if object.alive && !force {
        let state = if object.kind == Kind::Container { "running" } else { "ready" };
        return Err(Failure::failed(format!("remove {}: it is {state}; stop it first, or use --force", object.describe())));
    }
    match object.kind {
        Kind::Container => {
            let request = RemoveContainerRequest { container_id: object.id.clone(), ..RemoveContainerRequest::default() };
            client.runtime().remove_container(&request, LONG).during(|| format!("remove container {}", object.id))?;
        }
        Kind::Sandbox => {
            let request = PodSandboxStatusRequest { pod_sandbox_id: object.id.clone(), ..PodSandboxStatusRequest::default() };
            let status = client.runtime().pod_sandbox_status(&request, SHORT).during(|| format!("read sandbox {}", object.id))?;
            remove_sandbox(client, &object.id)?;
            run::remove_logs_of(&status.status.annotations);
        }
    }
    Ok(object.id.clone())
}

/// `crisp exec --sync` in container `id`: gives the exit code of the command.
pub fn exec(client: &Client, id: &str, command: &[String], timeout: u32) -> Outcome<u8> {
    let request =
        ExecSyncRequest { container_id: id.to_owned(), cmd: command.to_vec(), timeout: timeout.into(), ..ExecSyncRequest::default() };
    // The daemon keeps the time; ours is for a daemon that does not answer.
    let limit = if timeout == 0 { FOREVER } else { LONG.map(|limit| limit + Duration::from_secs(timeout.into())) };
    let answer = client.runtime().exec_sync(&request, limit).during(|| format!("exec in container {id}"))?;
    let (mut stdout, mut stderr) = (std::io::stdout().lock(), std::io::stderr().lock());
    stdout.write_all(&answer.stdout).and_then(|()| stdout.flush()).map_err(Failure::output)?;
    stderr.write_all(&answer.stderr).map_err(Failure::output)?;
    Ok(exit_code(answer.exit_code))
}

/// An exit code of a container as one of ours.
pub fn exit_code(code: i32) -> u8 {
    // What does not fit was not a success.
    u8::try_from(code).unwrap_or(255)
}

/// The status of a container; None when there is none of that id any more.
pub fn status(client: &Client, id: &str) -> Result<Option<ContainerStatus>, super::failure::CallError> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), ..ContainerStatusRequest::default() };
    match client.runtime().container_status(&request, SHORT) {
        Ok(answer) => Ok(answer.status.0.map(|status| *status)),
        Err(error) if error.code == grpcio::RpcStatusCode::NOT_FOUND => Ok(None),
        Err(error) => Err(error),
    }
}

/// `crisp logs`
pub fn logs(client: &Client, word: &str, follow: bool, tail: Option<usize>, times: bool) -> Outcome<()> {
    let objects = resolve::objects(client)?;
    let id = &resolve::container(&objects, word)?.id;
    let what = || format!("read status of container {id}");
    let first = status(client, id).during(what)?.ok_or_else(|| Failure::failed(format!("container {id} has just been removed")))?;
    if first.log_path.is_empty() {
        return Err(Failure::failed(format!("container {id} has no log: it was made without a log path")));
    }
    let mut log = LogFile::open(Path::new(&first.log_path), tail)?;
    if !log.exists() && !follow {
        return match first.state == ContainerState::CONTAINER_CREATED.into() {
            true => Ok(()),
            false => Err(Failure::failed(format!("read log of container {id}: no file {}", first.log_path))),
        };
    }
    let (mut stdout, mut stderr) = (std::io::BufWriter::new(std::io::stdout().lock()), std::io::stderr().lock());
    let mut sink = Sink::new(&mut stdout, &mut stderr, times);
    let mut ended = !follow;
    loop {
        log.pump(&mut sink)?;
        if ended {
            return log.finish(&mut sink);
        }
        std::thread::sleep(PAUSE);
        let now = status(client, id).during(what)?;
        ended = now.is_none_or(|now| !is_before_end(&now));
    }
}

/// Whether the container may still write.
pub fn is_before_end(status: &ContainerStatus) -> bool {
    matches!(status.state.enum_value(), Ok(ContainerState::CONTAINER_CREATED | ContainerState::CONTAINER_RUNNING))
}

/// `crisp inspect`
pub fn inspect(client: &Client, words: &[String]) -> Outcome<String> {
    let objects = resolve::objects(client)?;
    let mut found = Vec::new();
    for word in words {
        found.push(match resolve::any(&objects, word)? {
            Some(object) => inspect_object(client, object)?,
            None => image::inspect(client, word)?.ok_or_else(|| Failure::failed(format!("no container, sandbox or image {word:?}")))?,
        });
    }
    // One is shown as it is, as the CRI answers it; several as a list.
    Ok(json::text(&if found.len() == 1 { found.remove(0) } else { found.into() }))
}

fn inspect_object(client: &Client, object: &Object) -> Outcome<serde_json::Value> {
    let id = object.id.clone();
    match object.kind {
        Kind::Container => {
            let request = ContainerStatusRequest { container_id: id, verbose: true, ..ContainerStatusRequest::default() };
            json::verbose(&client.runtime().container_status(&request, SHORT).during(|| format!("read status of {}", object.describe()))?)
        }
        Kind::Sandbox => {
            let request = PodSandboxStatusRequest { pod_sandbox_id: id, verbose: true, ..PodSandboxStatusRequest::default() };
            json::verbose(&client.runtime().pod_sandbox_status(&request, SHORT).during(|| format!("read status of {}", object.describe()))?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_that_do_not_fit_are_not_a_success() {
        assert_eq!([0, 3, 137, 255, 256, -1].map(exit_code), [0, 3, 137, 255, 255, 255]);
    }
}
