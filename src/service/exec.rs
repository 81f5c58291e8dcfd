//! ExecSync, UpdateContainerResources, ReopenContainerLog.

use super::convert::seconds;
use super::{Call, Service};
use crate::api::runtime::{
    ExecSyncRequest, ExecSyncResponse, ReopenContainerLogRequest, ReopenContainerLogResponse, UpdateContainerResourcesRequest,
    UpdateContainerResourcesResponse,
};
use crate::container::classes;
use crate::error::{Error, Result};

impl Service {
    pub(super) fn run_command(&self, request: &ExecSyncRequest, call: &Call) -> Result<ExecSyncResponse> {
        call.about(&request.container_id);
        self.warmer.request();
        let container = self.containers.get(&request.container_id)?;
        call.about(container.id());
        // 0 and less: no timeout.
        let timeout = seconds(request.timeout);
        let output = self.containers.exec_sync(&container, &request.cmd, timeout, &call.cancel)?;
        Ok(ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.exit_code, ..Default::default() })
    }

    pub(super) fn update_resources(
        &self,
        request: &UpdateContainerResourcesRequest,
        call: &Call,
    ) -> Result<UpdateContainerResourcesResponse> {
        call.about(&request.container_id);
        let container = self.containers.get(&request.container_id)?;
        call.about(container.id());
        if request.windows.is_some() {
            return Err(Error::invalid("windows: this is a Linux host"));
        }
        // Annotations are for plugins between kubelet and runtime; there are none here.
        if let Some(key) = request.annotations.keys().find(|key| classes::is_class(key)) {
            return Err(Error::invalid(format!("annotations: {key}: a class cannot change after creation")));
        }
        // No resources: nothing changes.
        if let Some(linux) = request.linux.as_ref() {
            self.containers.update_resources(&container, linux)?;
        }
        Ok(UpdateContainerResourcesResponse::new())
    }

    pub(super) fn reopen_log(&self, request: &ReopenContainerLogRequest, call: &Call) -> Result<ReopenContainerLogResponse> {
        call.about(&request.container_id);
        let container = self.containers.get(&request.container_id)?;
        self.containers.reopen_log(&container)?;
        Ok(ReopenContainerLogResponse::new())
    }
}
