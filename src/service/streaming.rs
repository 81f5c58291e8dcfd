//! Exec, Attach, PortForward: what can be refused is refused here, the rest is a URL.

use super::{Call, Service};
use crate::api::runtime::{AttachRequest, AttachResponse, ExecRequest, ExecResponse, PortForwardRequest, PortForwardResponse};
use crate::container::stream::{check_command, Wanted};
use crate::error::{Error, Result};
use crate::streaming::request::{NetTarget, Request};

impl Service {
    pub(super) fn exec_url(&self, request: ExecRequest, call: &Call) -> Result<ExecResponse> {
        call.about(&request.container_id);
        let wanted = Wanted { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, tty: request.tty };
        wanted.check()?;
        check_command(&request.cmd)?;
        let container = self.containers.get(&request.container_id)?;
        call.about(container.id());
        self.containers.can_stream(&container, "exec in")?;
        // The client comes for it within a moment.
        self.warmer.request();
        let url = self.streaming.url(Request::Exec { container, cmd: request.cmd, wanted })?;
        Ok(ExecResponse { url, ..Default::default() })
    }

    pub(super) fn attach_url(&self, request: &AttachRequest, call: &Call) -> Result<AttachResponse> {
        call.about(&request.container_id);
        let wanted = Wanted { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, tty: request.tty };
        wanted.check()?;
        let container = self.containers.get(&request.container_id)?;
        call.about(container.id());
        self.containers.can_stream(&container, "attach to")?;
        let url = self.streaming.url(Request::Attach { container, wanted })?;
        Ok(AttachResponse { url, ..Default::default() })
    }

    pub(super) fn port_forward_url(&self, request: &PortForwardRequest, call: &Call) -> Result<PortForwardResponse> {
        call.about(&request.pod_sandbox_id);
        let ports = request.port.iter().map(|port| match u16::try_from(*port) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(Error::invalid(format!("port: expected 1 to 65535, found {port}"))),
        });
        let ports = ports.collect::<Result<Vec<u16>>>()?;
        let sandbox = self.sandboxes.get(&request.pod_sandbox_id)?;
        call.about(sandbox.id());
        sandbox.status().can_hold_containers(sandbox.id())?;
        let target = sandbox.meta.netns.clone().map_or(NetTarget::Host, NetTarget::Netns);
        let url = self.streaming.url(Request::PortForward { sandbox: sandbox.id().to_owned(), target, ports })?;
        Ok(PortForwardResponse { url, ..Default::default() })
    }
}
