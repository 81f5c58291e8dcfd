//! UpdatePodSandboxResources, and the same fields of RunPodSandbox: what kubelet says that the sandbox costs, and its containers
//! together. Checked, kept and shown, not applied. The sum is no limit: of a sandbox with one container that has a limit and one that
//! has none it is the limit of the first, and would bind both. Who made the cgroup parent sets its limits: kubelet.

use std::sync::Arc;

use super::status::Status;
use super::{Sandbox, Sandboxes};
use crate::api::runtime::LinuxContainerResources;
use crate::error::{Context, Result};
use crate::spec::resources::check;

/// What is said of a sandbox; None: nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resources<'a> {
    pub overhead: Option<&'a LinuxContainerResources>,
    pub resources: Option<&'a LinuxContainerResources>,
}

impl Resources<'_> {
    /// INVALID_ARGUMENT names the field that could not be anybody's.
    pub(super) fn check(&self) -> Result<()> {
        for (name, said) in [("overhead", self.overhead), ("resources", self.resources)] {
            if let Some(said) = said {
                check(said).context(|| name.to_owned())?;
            }
        }
        Ok(())
    }

    /// What is said replaces what was; what is not stays.
    pub(super) fn put(&self, status: &mut Status) -> Result<()> {
        for (kept, said) in [(&mut status.overhead, self.overhead), (&mut status.resources, self.resources)] {
            if let Some(said) = said {
                *kept = Some(protobuf::Message::write_to_bytes(said).context(|| "encode resources")?);
            }
        }
        Ok(())
    }
}

impl Sandboxes {
    /// Keeps what is said of a READY sandbox.
    pub fn update_resources(&self, sandbox: &Arc<Sandbox>, new: Resources) -> Result<()> {
        let what = || format!("update sandbox {}", sandbox.id());
        let _op = sandbox.op.lock();
        sandbox.status().can_hold_containers(sandbox.id()).context(what)?;
        new.check().context(what)?;
        let mut kept = Status::new();
        new.put(&mut kept)?;
        self.update(sandbox, |status| {
            status.overhead = kept.overhead.or(status.overhead.take());
            status.resources = kept.resources.or(status.resources.take());
        })
    }
}
