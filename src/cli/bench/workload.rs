//! What a benchmark makes on a server: sandboxes with one container each, marked, so that all of them are found again.

use std::path::PathBuf;
use std::time::Duration;

use grpcio::RpcStatusCode;
use protobuf::MessageField;

use super::samples::timed;
use crate::api::runtime::{
    ContainerConfig, CreateContainerRequest, ListPodSandboxRequest, NamespaceMode, NamespaceOption, PodSandbox, PodSandboxConfig,
    PullImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopPodSandboxRequest,
};
use crate::cli::client::{Client, LONG, SHORT};
use crate::cli::failure::{CallError, During, Failure, Outcome};
use crate::cli::image;

/// Label of what a benchmark has made; its value is the run's token.
pub const LABEL: &str = "crisp.bench/token";

/// Kind, number and place of what is made.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Socket of the server.
    pub socket: PathBuf,
    /// Runtime handler; empty: the default.
    pub handler: String,
    pub image: String,
    /// What containers run; empty: what the image says.
    pub command: Vec<String>,
    pub host_network: bool,
    /// Empty: the server's default.
    pub cgroup_parent: String,
    /// Directory of the logs; one below it per sandbox.
    pub logs: PathBuf,
    /// Value of [`LABEL`].
    pub token: String,
}

/// A sandbox and its container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub sandbox: String,
    pub container: String,
}

/// Times of the calls that make a pair run.
#[derive(Clone, Copy, Debug)]
pub struct UpTimes {
    pub run: Duration,
    pub create: Duration,
    pub start: Duration,
}

impl Workload {
    /// A connection of its own.
    pub fn client(&self) -> Outcome<Client> {
        Client::connect(&self.socket)
    }

    /// Pulls the image if it is not there.
    pub fn prepare(&self, client: &Client) -> Outcome<()> {
        if image::find(client, &self.image)?.is_some() {
            return Ok(());
        }
        let request = PullImageRequest { image: image::spec(&self.image), ..PullImageRequest::default() };
        client.images().pull_image(&request, LONG).during(|| format!("pull {}", self.image))?;
        Ok(())
    }

    /// The sandbox called `name`; its log directory is made.
    pub fn sandbox(&self, name: &str) -> Outcome<PodSandboxConfig> {
        let logs = self.logs.join(name);
        crate::sys::file::make_dir(&logs, 0o755)?;
        let mut config = PodSandboxConfig::new();
        let metadata = config.metadata.mut_or_insert_default();
        metadata.name = name.to_owned();
        metadata.namespace = "crisp-bench".to_owned();
        metadata.uid = format!("{}-{name}", self.token);
        config.hostname = if self.host_network { String::new() } else { name.to_owned() };
        config.log_directory = logs.display().to_string();
        config.labels.insert(LABEL.to_owned(), self.token.clone());
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent.clone_from(&self.cgroup_parent);
        linux.security_context.mut_or_insert_default().namespace_options = self.namespaces();
        Ok(config)
    }

    /// No sharing of pid namespaces, as kubelet asks.
    fn namespaces(&self) -> MessageField<NamespaceOption> {
        let network = if self.host_network { NamespaceMode::NODE } else { NamespaceMode::POD };
        MessageField::some(NamespaceOption { network: network.into(), pid: NamespaceMode::CONTAINER.into(), ..Default::default() })
    }

    /// The container of a sandbox.
    pub fn container(&self, sandbox: &str, config: &PodSandboxConfig) -> CreateContainerRequest {
        let mut container = ContainerConfig::new();
        container.metadata.mut_or_insert_default().name = "main".to_owned();
        container.image = image::spec(&self.image);
        container.image.mut_or_insert_default().user_specified_image.clone_from(&self.image);
        container.command.clone_from(&self.command);
        container.log_path = "main.log".to_owned();
        container.labels.insert(LABEL.to_owned(), self.token.clone());
        let linux = container.linux.mut_or_insert_default();
        linux.security_context.mut_or_insert_default().namespace_options = self.namespaces();
        linux.resources.mut_or_insert_default().cpu_shares = 102;
        CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: MessageField::some(container),
            sandbox_config: MessageField::some(config.clone()),
            ..CreateContainerRequest::default()
        }
    }

    /// The request that runs `config`.
    pub fn run_request(&self, config: &PodSandboxConfig) -> RunPodSandboxRequest {
        RunPodSandboxRequest { config: MessageField::some(config.clone()), runtime_handler: self.handler.clone(), ..Default::default() }
    }

    /// A sandbox called `name` with its container, running.
    pub fn up(&self, client: &Client, name: &str) -> Outcome<(Pair, UpTimes)> {
        let config = self.sandbox(name)?;
        let runtime = client.runtime();
        let (answer, run) = timed(|| runtime.run_pod_sandbox(&self.run_request(&config), LONG));
        let sandbox = answer.during(|| format!("run sandbox {name}"))?.pod_sandbox_id;
        let request = self.container(&sandbox, &config);
        let (answer, create) = timed(|| runtime.create_container(&request, LONG));
        let container = answer.during(|| format!("create container in {name}"))?.container_id;
        let request = StartContainerRequest { container_id: container.clone(), ..Default::default() };
        let (answer, start) = timed(|| runtime.start_container(&request, LONG));
        answer.during(|| format!("start container in {name}"))?;
        Ok((Pair { sandbox, container }, UpTimes { run, create, start }))
    }

    /// Stops and removes a sandbox with its containers; the time of each.
    pub fn down(&self, client: &Client, sandbox: &str) -> Outcome<(Duration, Duration)> {
        let request = StopPodSandboxRequest { pod_sandbox_id: sandbox.to_owned(), ..Default::default() };
        let (answer, stop) = timed(|| client.runtime().stop_pod_sandbox(&request, LONG));
        answer.during(|| format!("stop sandbox {sandbox}"))?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: sandbox.to_owned(), ..Default::default() };
        let (answer, remove) = timed(|| client.runtime().remove_pod_sandbox(&request, LONG));
        answer.during(|| format!("remove sandbox {sandbox}"))?;
        Ok((stop, remove))
    }

    /// Sandboxes of this run that are there.
    pub fn marked(&self, client: &Client) -> Outcome<Vec<PodSandbox>> {
        let mut request = ListPodSandboxRequest::new();
        request.filter.mut_or_insert_default().label_selector.insert(LABEL.to_owned(), self.token.clone());
        Ok(client.runtime().list_pod_sandbox(&request, SHORT).during(|| "list sandboxes")?.items)
    }

    /// Removes all that this run has made: also what a call that failed may have left.
    pub fn clean(&self, client: &Client) -> Outcome<()> {
        let found = self.marked(client)?;
        let results = crate::sys::thread::for_each("clean", &found, &|sandbox| self.down(client, &sandbox.id).map(drop));
        let failed = results.iter().filter(|result| result.is_err()).count();
        match results.into_iter().find_map(Result::err) {
            Some(Failure::Failed(message)) => {
                Err(Failure::failed(format!("{message}; {failed} sandboxes may be left, with the label {LABEL}={}", self.token)))
            }
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

/// Sandboxes that any run has made, whatever its token.
pub fn leftovers(client: &Client) -> Outcome<Vec<PodSandbox>> {
    let all = client.runtime().list_pod_sandbox(&ListPodSandboxRequest::new(), SHORT).during(|| "list sandboxes")?.items;
    Ok(all.into_iter().filter(|sandbox| sandbox.labels.contains_key(LABEL)).collect())
}

/// None for a call that the server does not know.
pub fn known<T>(answer: Result<T, CallError>) -> Result<Option<T>, CallError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.code == RpcStatusCode::UNIMPLEMENTED => Ok(None),
        Err(error) => Err(error),
    }
}
