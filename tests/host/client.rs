//! A CRI client: one gRPC channel, one generic call. The benchmark uses it too.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crisp::api::{self, admin, runtime};
use grpcio::{CallOption, ChannelBuilder, Environment, Marshaller, Method, MethodType};
use protobuf::Message;

/// A request that knows its response.
pub trait Call: Message {
    type Response: Message + Unpin;
}

macro_rules! calls {
    ($($module:ident $request:ident $response:ident;)*) => {
        $(impl Call for $module::$request { type Response = $module::$response; })*
    };
}

calls! {
    runtime VersionRequest VersionResponse;
    runtime StatusRequest StatusResponse;
    runtime RunPodSandboxRequest RunPodSandboxResponse;
    runtime StopPodSandboxRequest StopPodSandboxResponse;
    runtime RemovePodSandboxRequest RemovePodSandboxResponse;
    runtime PodSandboxStatusRequest PodSandboxStatusResponse;
    runtime ListPodSandboxRequest ListPodSandboxResponse;
    runtime CreateContainerRequest CreateContainerResponse;
    runtime StartContainerRequest StartContainerResponse;
    runtime StopContainerRequest StopContainerResponse;
    runtime RemoveContainerRequest RemoveContainerResponse;
    runtime ContainerStatusRequest ContainerStatusResponse;
    runtime ListContainersRequest ListContainersResponse;
    runtime ExecSyncRequest ExecSyncResponse;
    runtime ExecRequest ExecResponse;
    runtime AttachRequest AttachResponse;
    runtime PortForwardRequest PortForwardResponse;
    runtime UpdateContainerResourcesRequest UpdateContainerResourcesResponse;
    runtime ContainerStatsRequest ContainerStatsResponse;
    runtime ListContainerStatsRequest ListContainerStatsResponse;
    runtime PodSandboxStatsRequest PodSandboxStatsResponse;
    runtime ListPodSandboxStatsRequest ListPodSandboxStatsResponse;
    runtime ReopenContainerLogRequest ReopenContainerLogResponse;
    runtime PullImageRequest PullImageResponse;
    runtime ImageStatusRequest ImageStatusResponse;
    runtime ListImagesRequest ListImagesResponse;
    runtime RemoveImageRequest RemoveImageResponse;
    runtime ImageFsInfoRequest ImageFsInfoResponse;
    runtime ListMetricDescriptorsRequest ListMetricDescriptorsResponse;
    runtime ListPodSandboxMetricsRequest ListPodSandboxMetricsResponse;
    admin ImportImageRequest ImportImageResponse;
}

/// One channel to a CRI socket; clones share it.
#[derive(Clone)]
pub struct Client {
    client: grpcio::Client,
    timeout: Duration,
}

impl Client {
    /// Connects at the first call; `timeout` is each call's deadline.
    pub fn new(socket: &Path, timeout: Duration) -> Client {
        static ENVIRONMENT: OnceLock<Arc<Environment>> = OnceLock::new();
        let environment = ENVIRONMENT.get_or_init(|| Arc::new(Environment::new(1)));
        let channel = ChannelBuilder::new(environment.clone())
            .max_receive_message_len(64 << 20)
            // A daemon that restarts is found again at once.
            .initial_reconnect_backoff(Duration::from_millis(20))
            .max_reconnect_backoff(Duration::from_millis(100))
            // Channels with equal arguments would share one connection, and the benchmark's clients be one.
            .use_local_subchannel_pool(true)
            .connect(&format!("unix:{}", socket.display()));
        Client { client: grpcio::Client::new(channel), timeout }
    }

    pub fn call<Q: Call>(&self, request: &Q) -> grpcio::Result<Q::Response> {
        let rpc = api::RPCS.iter().find(|rpc| rpc.request == Q::NAME).expect("every request is in the table");
        let method = Method {
            ty: MethodType::Unary,
            name: rpc.paths[0],
            req_mar: Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de },
            resp_mar: Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de },
        };
        self.client.unary_call(&method, request, CallOption::default().timeout(self.timeout))
    }
}
