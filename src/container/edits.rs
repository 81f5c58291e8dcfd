//! What others have to say about a container's spec: vendors of devices (CDI), the host's administrator (hooks).

use oci_spec::runtime::Spec;

use super::manager::Settings;
use crate::api::runtime::{ContainerConfig, PodSandboxConfig};
use crate::error::Result;
use crate::{cdi, hooks};

impl Settings {
    /// Changes the spec as the devices that are asked for and the hooks that match want it. INVALID_ARGUMENT for a name that is none,
    /// FAILED_PRECONDITION for a device that is not there and for a hook file that is not valid.
    pub(super) fn edit(&self, spec: &mut Spec, config: &ContainerConfig, sandbox: &PodSandboxConfig) -> Result<()> {
        self.cdi.inject(&cdi::requested(config)?, spec)?;
        let mut annotations = config.annotations.clone();
        // As in CRI-O, the sandbox's win: they are the pod's own.
        annotations.extend(sandbox.annotations.clone());
        let has_bind_mounts = !config.mounts.is_empty();
        self.hooks.inject(&hooks::Subject { annotations: &annotations, has_bind_mounts }, spec)
    }
}
