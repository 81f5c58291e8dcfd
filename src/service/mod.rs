//! The calls of CRI: each orders the nouns it needs. Requests and responses stop here; the managers below know configs only.
//! A call that is not built answers UNIMPLEMENTED with its name: that is what the traits' default methods do.

/// Import, pull with progress, facts of the daemon.
mod admin;
/// CreateContainer, StartContainer, StopContainer, RemoveContainer.
mod container;
/// ContainerStatus and ListContainers.
mod container_status;
/// From our nouns to CRI's messages.
mod convert;
/// GetContainerEvents.
mod events;
/// ExecSync, UpdateContainerResources, ReopenContainerLog.
mod exec;
/// For the metrics of the daemon itself.
mod gauges;
/// The ImageService.
mod image;
/// Version, Status, RuntimeConfig, UpdateRuntimeConfig.
mod info;
/// ListMetricDescriptors and ListPodSandboxMetrics.
mod metrics;
/// How far a pull is.
mod progress;
/// RunPodSandbox, StopPodSandbox, RemovePodSandbox, UpdatePodSandboxResources.
mod sandbox;
/// PodSandboxStatus and ListPodSandbox.
mod sandbox_status;
/// Stats of containers and sandboxes.
mod stats;
/// The lists in pieces.
mod stream_lists;
/// Exec, Attach, PortForward.
mod streaming;

pub use events::Fact;
pub use stream_lists::Seats;

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use crate::api::{self, admin as admin_api, runtime};
use crate::cgroup::warm::Warmer;
use crate::container::Containers;
use crate::error::{Error, Result};
use crate::event::Bus;
use crate::image::Images;
use crate::network::Network;
use crate::runtime::Handlers;
use crate::sandbox::Sandboxes;
use crate::stats::filesystem::Disk;
use crate::stats::metrics::Metrics;
use crate::stats::sampler::Sampler;
use crate::streaming::Server;
use crate::sys::cancel::Cancel;

/// One call, as far as a service cares.
pub struct Call {
    /// Set when the client is gone.
    pub cancel: Cancel,
    subject: RefCell<String>,
}

impl Call {
    pub fn new(cancel: Cancel) -> Call {
        Call { cancel, subject: RefCell::new(String::from("-")) }
    }

    /// Notes which object the call is about, for its log line.
    pub fn about(&self, id: &str) {
        let short = id.strip_prefix("sha256:").unwrap_or(id);
        *self.subject.borrow_mut() = match short.len() {
            64 => short[..13].to_owned(),
            _ => short.chars().filter(|c| !c.is_control()).take(100).collect(),
        };
    }

    pub fn subject(&self) -> String {
        self.subject.borrow().clone()
    }
}

macro_rules! service_trait {
    ($(#[$doc:meta])* $service:ident, $messages:ident
     $(($method:ident, $name:ident, $request:ident, $response:ident, $kind:ident, $paths:expr))*) => {
        $(#[$doc])*
        pub trait $service: Send + Sync {
            $(service_trait!(@$kind $method, $name, $messages::$request, $messages::$response);)*
        }
    };
    (@unary $method:ident, $name:ident, $request:ty, $response:ty) => {
        fn $name(&self, _request: $request, _call: &Call) -> Result<$response> {
            Err(not_built(stringify!($method)))
        }
    };
    (@stream $method:ident, $name:ident, $request:ty, $response:ty) => {
        fn $name(&self, _request: $request, _call: &Call, _send: &mut dyn FnMut($response) -> Result<()>) -> Result<()> {
            Err(not_built(stringify!($method)))
        }
    };
}

api::for_each_runtime_rpc!(service_trait; #[doc = "CRI's RuntimeService; a method that is not overridden is not built."] RuntimeService, runtime);
api::for_each_image_rpc!(service_trait; #[doc = "CRI's ImageService; a method that is not overridden is not built."] ImageService, runtime);
api::for_each_admin_rpc!(service_trait; #[doc = "Our own service beside the CRI."] Admin, admin_api);

fn not_built(method: &str) -> Error {
    Error::unimplemented(format!("{method} is not implemented by this version of crisp"))
}

/// The managers, as the calls need them.
pub struct Service {
    pub sandboxes: Arc<Sandboxes>,
    pub containers: Arc<Containers>,
    pub images: Images,
    pub network: Arc<Network>,
    pub handlers: Handlers,
    /// Asked a moment before an OCI runtime will move a process into cgroups.
    pub warmer: Warmer,
    /// cAdvisor metrics of this host.
    pub metrics: Metrics,
    /// Writable layers.
    pub disk: Arc<Disk>,
    /// Where they are, as ImageFsInfo says.
    pub layers_mountpoint: String,
    /// Reads kernel files of many at once.
    pub sampler: Sampler,
    /// Where Exec, Attach and PortForward send their clients.
    pub streaming: Arc<Server>,
    pub systemd_cgroup: bool,
    pub root: PathBuf,
    pub run: PathBuf,
    /// The configuration as text, for verbose Status.
    pub config: String,
    /// What the host can do, found out at start.
    pub host: crate::spec::HostFacts,
    /// What `crispd check` would say, once it is known.
    pub check: OnceLock<crate::check::Report>,
    /// What the managers tell, for GetContainerEvents.
    pub events: Arc<Bus<Fact>>,
    /// For lists that are sent in pieces.
    pub lists: Seats,
}

impl RuntimeService for Service {
    fn version(&self, request: runtime::VersionRequest, _: &Call) -> Result<runtime::VersionResponse> {
        Ok(info::version(&request))
    }

    fn status(&self, request: runtime::StatusRequest, _: &Call) -> Result<runtime::StatusResponse> {
        Ok(self.runtime_status(&request))
    }

    fn runtime_config(&self, _: runtime::RuntimeConfigRequest, _: &Call) -> Result<runtime::RuntimeConfigResponse> {
        Ok(self.cgroup_driver())
    }

    fn update_runtime_config(
        &self,
        request: runtime::UpdateRuntimeConfigRequest,
        _: &Call,
    ) -> Result<runtime::UpdateRuntimeConfigResponse> {
        self.set_runtime_config(&request)
    }

    fn run_pod_sandbox(&self, request: runtime::RunPodSandboxRequest, call: &Call) -> Result<runtime::RunPodSandboxResponse> {
        self.run_sandbox(request, call)
    }

    fn stop_pod_sandbox(&self, request: runtime::StopPodSandboxRequest, call: &Call) -> Result<runtime::StopPodSandboxResponse> {
        self.stop_sandbox(&request.pod_sandbox_id, call)?;
        Ok(runtime::StopPodSandboxResponse::new())
    }

    fn remove_pod_sandbox(&self, request: runtime::RemovePodSandboxRequest, call: &Call) -> Result<runtime::RemovePodSandboxResponse> {
        self.remove_sandbox(&request.pod_sandbox_id, call)?;
        Ok(runtime::RemovePodSandboxResponse::new())
    }

    fn pod_sandbox_status(&self, request: runtime::PodSandboxStatusRequest, call: &Call) -> Result<runtime::PodSandboxStatusResponse> {
        self.sandbox_status(&request, call)
    }

    fn list_pod_sandbox(&self, request: runtime::ListPodSandboxRequest, _: &Call) -> Result<runtime::ListPodSandboxResponse> {
        self.list_sandboxes(&request)
    }

    fn create_container(&self, request: runtime::CreateContainerRequest, call: &Call) -> Result<runtime::CreateContainerResponse> {
        self.create(request, call)
    }

    fn start_container(&self, request: runtime::StartContainerRequest, call: &Call) -> Result<runtime::StartContainerResponse> {
        self.start(&request.container_id, call)?;
        Ok(runtime::StartContainerResponse::new())
    }

    fn stop_container(&self, request: runtime::StopContainerRequest, call: &Call) -> Result<runtime::StopContainerResponse> {
        self.stop(&request, call)?;
        Ok(runtime::StopContainerResponse::new())
    }

    fn remove_container(&self, request: runtime::RemoveContainerRequest, call: &Call) -> Result<runtime::RemoveContainerResponse> {
        self.remove(&request.container_id, call)?;
        Ok(runtime::RemoveContainerResponse::new())
    }

    fn list_containers(&self, request: runtime::ListContainersRequest, _: &Call) -> Result<runtime::ListContainersResponse> {
        self.list(&request)
    }

    fn container_status(&self, request: runtime::ContainerStatusRequest, call: &Call) -> Result<runtime::ContainerStatusResponse> {
        self.status_of(&request, call)
    }

    fn update_container_resources(
        &self,
        request: runtime::UpdateContainerResourcesRequest,
        call: &Call,
    ) -> Result<runtime::UpdateContainerResourcesResponse> {
        self.update_resources(&request, call)
    }

    fn update_pod_sandbox_resources(
        &self,
        request: runtime::UpdatePodSandboxResourcesRequest,
        call: &Call,
    ) -> Result<runtime::UpdatePodSandboxResourcesResponse> {
        self.update_sandbox(&request, call)?;
        Ok(runtime::UpdatePodSandboxResourcesResponse::new())
    }

    fn list_metric_descriptors(
        &self,
        _: runtime::ListMetricDescriptorsRequest,
        _: &Call,
    ) -> Result<runtime::ListMetricDescriptorsResponse> {
        Ok(self.metric_descriptors())
    }

    fn list_pod_sandbox_metrics(
        &self,
        _: runtime::ListPodSandboxMetricsRequest,
        _: &Call,
    ) -> Result<runtime::ListPodSandboxMetricsResponse> {
        self.sandbox_metrics()
    }

    fn reopen_container_log(
        &self,
        request: runtime::ReopenContainerLogRequest,
        call: &Call,
    ) -> Result<runtime::ReopenContainerLogResponse> {
        self.reopen_log(&request, call)
    }

    fn container_stats(&self, request: runtime::ContainerStatsRequest, call: &Call) -> Result<runtime::ContainerStatsResponse> {
        self.stats_of_container(&request, call)
    }

    fn list_container_stats(&self, request: runtime::ListContainerStatsRequest, _: &Call) -> Result<runtime::ListContainerStatsResponse> {
        let stats = self.container_stats_list(request.filter.as_ref())?;
        Ok(runtime::ListContainerStatsResponse { stats, ..Default::default() })
    }

    fn pod_sandbox_stats(&self, request: runtime::PodSandboxStatsRequest, call: &Call) -> Result<runtime::PodSandboxStatsResponse> {
        self.stats_of_sandbox(&request, call)
    }

    fn list_pod_sandbox_stats(
        &self,
        request: runtime::ListPodSandboxStatsRequest,
        _: &Call,
    ) -> Result<runtime::ListPodSandboxStatsResponse> {
        let stats = self.sandbox_stats_list(request.filter.as_ref())?;
        Ok(runtime::ListPodSandboxStatsResponse { stats, ..Default::default() })
    }

    fn exec_sync(&self, request: runtime::ExecSyncRequest, call: &Call) -> Result<runtime::ExecSyncResponse> {
        self.run_command(&request, call)
    }

    fn exec(&self, request: runtime::ExecRequest, call: &Call) -> Result<runtime::ExecResponse> {
        self.exec_url(request, call)
    }

    fn attach(&self, request: runtime::AttachRequest, call: &Call) -> Result<runtime::AttachResponse> {
        self.attach_url(&request, call)
    }

    fn port_forward(&self, request: runtime::PortForwardRequest, call: &Call) -> Result<runtime::PortForwardResponse> {
        self.port_forward_url(&request, call)
    }

    fn get_container_events(
        &self,
        _: runtime::GetEventsRequest,
        call: &Call,
        send: &mut dyn FnMut(runtime::ContainerEventResponse) -> Result<()>,
    ) -> Result<()> {
        self.container_events(call, send)
    }

    fn stream_pod_sandboxes(
        &self,
        request: runtime::StreamPodSandboxesRequest,
        call: &Call,
        send: &mut dyn FnMut(runtime::StreamPodSandboxesResponse) -> Result<()>,
    ) -> Result<()> {
        self.stream_sandboxes(&request.filter, call, send)
    }

    fn stream_container_stats(
        &self,
        request: runtime::StreamContainerStatsRequest,
        call: &Call,
        send: &mut dyn FnMut(runtime::StreamContainerStatsResponse) -> Result<()>,
    ) -> Result<()> {
        self.stream_stats_of_containers(request.filter.as_ref(), call, send)
    }

    fn stream_pod_sandbox_stats(
        &self,
        request: runtime::StreamPodSandboxStatsRequest,
        call: &Call,
        send: &mut dyn FnMut(runtime::StreamPodSandboxStatsResponse) -> Result<()>,
    ) -> Result<()> {
        self.stream_stats_of_sandboxes(request.filter.as_ref(), call, send)
    }

    fn stream_pod_sandbox_metrics(
        &self,
        _: runtime::StreamPodSandboxMetricsRequest,
        call: &Call,
        send: &mut dyn FnMut(runtime::StreamPodSandboxMetricsResponse) -> Result<()>,
    ) -> Result<()> {
        self.stream_metrics(call, send)
    }

    fn stream_containers(
        &self,
        request: runtime::StreamContainersRequest,
        call: &Call,
        send: &mut dyn FnMut(runtime::StreamContainersResponse) -> Result<()>,
    ) -> Result<()> {
        self.stream_containers_list(&request.filter, call, send)
    }
}

impl ImageService for Service {
    fn list_images(&self, request: runtime::ListImagesRequest, _: &Call) -> Result<runtime::ListImagesResponse> {
        self.images_list(&request)
    }

    fn stream_images(
        &self,
        request: runtime::StreamImagesRequest,
        call: &Call,
        send: &mut dyn FnMut(runtime::StreamImagesResponse) -> Result<()>,
    ) -> Result<()> {
        self.stream_images_list(&request.filter, call, send)
    }

    fn image_status(&self, request: runtime::ImageStatusRequest, call: &Call) -> Result<runtime::ImageStatusResponse> {
        self.image_info(&request, call)
    }

    fn pull_image(&self, request: runtime::PullImageRequest, call: &Call) -> Result<runtime::PullImageResponse> {
        self.pull(&request, call)
    }

    fn remove_image(&self, request: runtime::RemoveImageRequest, call: &Call) -> Result<runtime::RemoveImageResponse> {
        self.image_remove(&request, call)
    }

    fn image_fs_info(&self, _: runtime::ImageFsInfoRequest, _: &Call) -> Result<runtime::ImageFsInfoResponse> {
        self.fs_info()
    }
}

impl Admin for Service {
    fn import_image(&self, request: admin_api::ImportImageRequest, call: &Call) -> Result<admin_api::ImportImageResponse> {
        self.import(&request, call)
    }

    fn pull_image(
        &self,
        request: admin_api::PullRequest,
        call: &Call,
        send: &mut dyn FnMut(admin_api::PullProgress) -> Result<()>,
    ) -> Result<()> {
        self.pull_with_progress(&request, call, send)
    }

    fn check_images(
        &self,
        request: admin_api::CheckImagesRequest,
        call: &Call,
        send: &mut dyn FnMut(admin_api::CheckProgress) -> Result<()>,
    ) -> Result<()> {
        self.check_images_of(&request, call, send)
    }

    fn info(&self, _: admin_api::InfoRequest, _: &Call) -> Result<admin_api::InfoResponse> {
        Ok(self.daemon_info())
    }
}
