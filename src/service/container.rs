//! CreateContainer, StartContainer, StopContainer, RemoveContainer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::convert::{lead, seconds};
use super::{Call, Service};
use crate::api::runtime::{ContainerConfig, CreateContainerRequest, CreateContainerResponse, NamespaceMode, StopContainerRequest};
use crate::container::{Container, CreateInputs, State};
use crate::error::{Context, Error, Result};
use crate::sandbox::{validate, PidMode, Sandbox};
use crate::spec::{NamespacePaths, Pid, SandboxFiles, UserNamespace};

impl Service {
    /// The config of the sandbox in the request is not used: what the sandbox was made with counts.
    pub(super) fn create(&self, request: CreateContainerRequest, call: &Call) -> Result<CreateContainerResponse> {
        let Some(config) = request.config.into_option() else { return Err(Error::invalid("config is missing")) };
        call.about(&config.metadata.name);
        self.warmer.request();
        let sandbox = self.sandboxes.get(&request.pod_sandbox_id)?;
        let what = || format!("create container {:?} in sandbox {}", config.metadata.name, sandbox.id());
        sandbox.status().can_hold_containers(sandbox.id()).context(what)?;
        let privileged = |c: bool, s: bool| c && !s;
        if privileged(config.linux.security_context.privileged, sandbox.config.linux.security_context.privileged) {
            return Err(Error::invalid(format!("{}: config.linux.security_context.privileged: the sandbox is not privileged", what())));
        }
        same_user_namespace(&sandbox, &config).context(what)?;
        self.image_handlers(&config).context(what)?;
        let user = sandbox.meta.user_pin().zip(sandbox.meta.userns).map(|(path, maps)| UserNamespace { path, maps });
        let (pid, target) = self.pid_namespace(&sandbox, &config).context(what)?;
        let inputs = CreateInputs {
            sandbox_id: sandbox.id(),
            sandbox: &sandbox.config,
            handler: self.handlers.get(&sandbox.meta.handler).context(what)?.clone(),
            compile_filter: self.handlers.compiles_filters(&sandbox.meta.handler),
            level: sandbox.level(),
            namespaces: NamespacePaths {
                user,
                net: sandbox.meta.netns.clone(),
                ipc: sandbox.meta.ipc_pin(),
                uts: sandbox.meta.uts_pin(),
                pid,
            },
            target,
            files: files(&sandbox),
            hostname: &sandbox.meta.hostname,
            cgroup_parent: &sandbox.meta.cgroup_parent,
            recursive_read_only: self.host.mount_setattr && self.handlers.features(&sandbox.meta.handler).recursive_read_only(),
            config: config.clone(),
        };
        let id = self.containers.create(inputs, &call.cancel).context(what).map_err(lead)?;
        // A stop that began meanwhile has not seen this container.
        if let Err(e) = sandbox.status().can_hold_containers(sandbox.id()) {
            if let Some(container) = self.containers.find(&id)? {
                self.containers.remove(&container, &call.cancel)?;
            }
            return Err(e).context(what);
        }
        call.about(&id);
        Ok(CreateContainerResponse { container_id: id, ..Default::default() })
    }

    /// Any handler's name will do for an image, since all have the same.
    fn image_handlers(&self, config: &ContainerConfig) -> Result<()> {
        self.handlers.check_name(&config.image.runtime_handler).context(|| "config.image")?;
        config.mounts.iter().try_for_each(|mount| {
            self.handlers.check_name(&mount.image.runtime_handler).context(|| format!("mount {}: image", mount.container_path))
        })
    }

    /// The PID namespace of a container, and whose it is with mode TARGET. Network, IPC and UTS are the sandbox's whatever the
    /// container says, as peers do.
    fn pid_namespace(&self, sandbox: &Arc<Sandbox>, config: &ContainerConfig) -> Result<(Pid, Option<String>)> {
        let context = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        let options = context.and_then(|c| c.namespace_options.as_ref());
        let Some(options) = options else {
            // Nothing said: what the sandbox was made for.
            return Ok(match sandbox.meta.pid {
                PidMode::Sandbox => (Pid::Path(self.sandboxes.pid_namespace(sandbox)?), None),
                PidMode::Container => (Pid::Own, None),
                PidMode::Node => (Pid::Host, None),
            });
        };
        let field = "linux.security_context.namespace_options";
        let mode = options.pid.enum_value().map_err(|n| Error::invalid(format!("{field}.pid: no namespace mode {n}")))?;
        match mode {
            // The sandbox's is the host's.
            NamespaceMode::POD if sandbox.meta.pid == PidMode::Node => Ok((Pid::Host, None)),
            NamespaceMode::POD => Ok((Pid::Path(self.sandboxes.pid_namespace(sandbox)?), None)),
            NamespaceMode::CONTAINER => Ok((Pid::Own, None)),
            NamespaceMode::NODE => Ok((Pid::Host, None)),
            NamespaceMode::TARGET => {
                let found = self.containers.find(&options.target_id).context(|| format!("{field}.target_id"))?;
                let target = found.filter(|t| t.meta.sandbox_id == sandbox.id());
                let Some(target) = target else {
                    return Err(Error::invalid(format!("{field}.target_id: no container {} in this sandbox", options.target_id)));
                };
                let status = target.status();
                if status.state != State::Running {
                    return Err(Error::precondition(format!("{field}.target_id: container {} is not running", target.id())));
                }
                Ok((Pid::Path(PathBuf::from(format!("/proc/{}/ns/pid", status.pid))), Some(target.id().to_owned())))
            }
        }
    }

    pub(super) fn start(&self, id: &str, call: &Call) -> Result<()> {
        call.about(id);
        self.warmer.request();
        let container = self.containers.get(id)?;
        call.about(container.id());
        let sandbox = self.sandboxes.get(&container.meta.sandbox_id)?;
        sandbox.status().can_hold_containers(sandbox.id()).context(|| format!("start container {}", container.id()))?;
        self.containers.start(&container)?;
        // A stop of the sandbox that began meanwhile may have looked at this container before it ran.
        if let Err(e) = sandbox.status().can_hold_containers(sandbox.id()) {
            self.containers.stop(&container, Duration::ZERO, &call.cancel)?;
            return Err(e).context(|| format!("start container {}", container.id()));
        }
        Ok(())
    }

    /// Unknown or not running is success.
    pub(super) fn stop(&self, request: &StopContainerRequest, call: &Call) -> Result<()> {
        call.about(&request.container_id);
        let Some(container) = self.containers.find(&request.container_id)? else { return Ok(()) };
        call.about(container.id());
        let grace = seconds(request.timeout);
        self.containers.stop(&container, grace, &call.cancel)
    }

    /// Unknown is success.
    pub(super) fn remove(&self, id: &str, call: &Call) -> Result<()> {
        call.about(id);
        let Some(container): Option<Arc<Container>> = self.containers.find(id)? else { return Ok(()) };
        call.about(container.id());
        self.containers.remove(&container, &call.cancel)
    }
}

/// A container that says something of its user namespace must say what the sandbox said.
fn same_user_namespace(sandbox: &Sandbox, config: &ContainerConfig) -> Result<()> {
    const FIELD: &str = "linux.security_context.namespace_options.userns_options";
    let options = &config.linux.security_context.namespace_options;
    let Some(asked) = options.userns_options.as_ref() else { return Ok(()) };
    match validate::user_namespace(asked, FIELD)? == sandbox.meta.userns {
        true => Ok(()),
        false => Err(Error::invalid(format!("{FIELD}: expected what sandbox {} has", sandbox.id()))),
    }
}

/// The files of a sandbox that its containers see.
fn files(sandbox: &Sandbox) -> SandboxFiles {
    SandboxFiles {
        resolv_conf: Some(sandbox.meta.file("resolv.conf")),
        hosts: Some(sandbox.meta.file("hosts")),
        hostname: Some(sandbox.meta.file("hostname")),
        shm: Some(sandbox.meta.shm()),
    }
}
