//! RunPodSandbox, StopPodSandbox, RemovePodSandbox: sandbox and containers in the right order.

use std::sync::Arc;
use std::time::Duration;

use super::{Call, Service};
use crate::api::runtime::{NamespaceMode, PodSandboxConfig, RunPodSandboxRequest, RunPodSandboxResponse, UpdatePodSandboxResourcesRequest};
use crate::container::Container;
use crate::error::{Context, Error, ErrorList, Result};
use crate::sandbox::Resources;
use crate::sys::crash;
use crate::sys::thread;

/// What a container of a stopping sandbox gets before KILL when kubelet did not stop it itself: kubelet stops containers with
/// their own grace first, so these are left-overs.
const LEFTOVER_GRACE: Duration = Duration::ZERO;

fn wants_user_namespace(config: &PodSandboxConfig) -> bool {
    let options = &config.linux.security_context.namespace_options.userns_options;
    options.as_ref().is_some_and(|o| o.mode.enum_value() == Ok(NamespaceMode::POD))
}

impl Service {
    pub(super) fn run_sandbox(&self, request: RunPodSandboxRequest, call: &Call) -> Result<RunPodSandboxResponse> {
        let Some(config) = request.config.into_option() else { return Err(Error::invalid("config is missing")) };
        if let Some(m) = config.metadata.as_ref() {
            call.about(&format!("{}/{}", m.namespace, m.name));
        }
        // The sandbox's first container follows in a moment.
        self.warmer.request();
        let handler = self.handlers.get(&request.runtime_handler)?.name.clone();
        if wants_user_namespace(&config) && !self.handlers.features(&handler).user_namespaces() {
            let field = "linux.security_context.namespace_options.userns_options";
            return Err(Error::precondition(format!("run sandbox: {field}: runtime handler {handler} has no user namespaces")));
        }
        let id = self.sandboxes.run(config, &handler, &request.runtime_handler, &call.cancel).context(|| "run sandbox")?;
        call.about(&id);
        Ok(RunPodSandboxResponse { pod_sandbox_id: id, ..Default::default() })
    }

    /// Kept and shown, not applied: see `sandbox::resources`.
    pub(super) fn update_sandbox(&self, request: &UpdatePodSandboxResourcesRequest, call: &Call) -> Result<()> {
        call.about(&request.pod_sandbox_id);
        let sandbox = self.sandboxes.get(&request.pod_sandbox_id)?;
        call.about(sandbox.id());
        let new = Resources { overhead: request.overhead.as_ref(), resources: request.resources.as_ref() };
        self.sandboxes.update_resources(&sandbox, new)
    }

    /// Unknown is success: NOT_FOUND means "already gone" to kubelet either way.
    pub(super) fn stop_sandbox(&self, id: &str, call: &Call) -> Result<()> {
        call.about(id);
        let Some(sandbox) = self.sandboxes.find(id)? else { return Ok(()) };
        call.about(sandbox.id());
        self.sandboxes.begin_stop(&sandbox);
        let (mut errors, cancel) = (ErrorList::default(), &call.cancel);
        if errors.keep(self.each_container(sandbox.id(), |c| self.containers.stop(c, LEFTOVER_GRACE, cancel))).is_some() {
            // Whatever becomes of the network.
            self.sandboxes.stopped(&sandbox);
        }
        crash::step("stop-sandbox:2-containers");
        // Even when a container would not stop: every step runs, kubelet retries the rest.
        errors.keep(self.sandboxes.finish_stop(&sandbox));
        errors.finish().context(|| format!("stop sandbox {}", sandbox.id()))
    }

    pub(super) fn remove_sandbox(&self, id: &str, call: &Call) -> Result<()> {
        call.about(id);
        let Some(sandbox) = self.sandboxes.find(id)? else { return Ok(()) };
        self.stop_sandbox(sandbox.id(), call)?;
        let cancel = &call.cancel;
        self.each_container(sandbox.id(), |c| self.containers.remove(c, cancel)).context(|| format!("remove sandbox {}", sandbox.id()))?;
        crash::step("remove-sandbox:1-containers");
        self.sandboxes.remove(&sandbox)
    }

    /// Does `work` for each container of a sandbox, at the same time, and collects the errors. Threads of their own: the work
    /// waits, and would starve the pool that computes.
    fn each_container(&self, sandbox_id: &str, work: impl Fn(&Arc<Container>) -> Result<()> + Sync) -> Result<()> {
        let containers = self.containers.of_sandbox(sandbox_id);
        if let [only] = containers.as_slice() {
            return work(only);
        }
        let mut errors = ErrorList::default();
        for result in thread::for_each("stop", &containers, &work) {
            errors.keep(result);
        }
        errors.finish()
    }
}
