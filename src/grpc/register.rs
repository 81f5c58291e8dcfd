//! One handler per method, generated from the service tables, under every package name of the method.

use std::sync::Arc;

use grpcio::{Marshaller, MethodType, ServiceBuilder};

use super::call::{fast, slow, Method};
use super::Lanes;
use crate::api;
use crate::service::{Admin, ImageService, RuntimeService, Service};

/// Methods that only read memory or a few kernel files: the fast lane, answered as plain unary calls.
const FAST: &[&str] = &[
    "Version",
    "Status",
    "RuntimeConfig",
    "ListPodSandbox",
    "PodSandboxStatus",
    "ListContainers",
    "ContainerStatus",
    "ContainerStats",
    "ListContainerStats",
    "PodSandboxStats",
    "ListPodSandboxStats",
    "ListMetricDescriptors",
    "ListPodSandboxMetrics",
    "ListImages",
    "ImageStatus",
    "ImageFsInfo",
    "Info",
];

fn method<P, Q>(kind: MethodType, path: &'static str) -> grpcio::Method<P, Q>
where
    P: protobuf::Message,
    Q: protobuf::Message,
{
    grpcio::Method {
        ty: kind,
        name: path,
        req_mar: Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de },
        resp_mar: Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de },
    }
}

macro_rules! register {
    ($builder:ident, $service:ident, $lanes:ident, $messages:ident
     $(($method:ident, $name:ident, $request:ident, $response:ident, $kind:ident, $paths:expr))*) => {
        $(for path in $paths {
            register!(@$kind $builder, $service, $lanes, path, $method, $name, api::$messages::$request, api::$messages::$response);
        })*
    };
    (@unary $builder:ident, $service:ident, $lanes:ident, $path:ident, $method:ident, $name:ident, $request:ty, $response:ty) => {
        let (service, lanes) = ($service.clone(), $lanes.clone());
        let info = Method::new(stringify!($method), FAST.contains(&stringify!($method)));
        $builder = if info.quiet {
            $builder.add_unary_handler(&method::<$request, $response>(MethodType::Unary, $path), move |context, request, sink| {
                let service = service.clone();
                fast(&context, &lanes.fast, info, request, sink, move |request, call| service.$name(request, call));
            })
        } else {
            $builder.add_server_streaming_handler(&method::<$request, $response>(MethodType::ServerStreaming, $path), move |context, request, sink| {
                let service = service.clone();
                slow(&context, &lanes.slow, info, request, sink, move |request, call, send| send(service.$name(request, call)?));
            })
        };
    };
    (@stream $builder:ident, $service:ident, $lanes:ident, $path:ident, $method:ident, $name:ident, $request:ty, $response:ty) => {
        let (service, lanes) = ($service.clone(), $lanes.clone());
        let info = Method::new(stringify!($method), stringify!($method).starts_with("Stream"));
        $builder = $builder.add_server_streaming_handler(&method::<$request, $response>(MethodType::ServerStreaming, $path), move |context, request, sink| {
            let service = service.clone();
            slow(&context, &lanes.slow, info, request, sink, move |request, call, send| service.$name(request, call, send));
        });
    };
}

/// The services to register.
pub(super) fn services(service: Arc<Service>, lanes: &Arc<Lanes>) -> Vec<grpcio::Service> {
    let mut builder = ServiceBuilder::new();
    let runtime: Arc<dyn RuntimeService> = service.clone();
    api::for_each_runtime_rpc!(register; builder, runtime, lanes, runtime);
    let image: Arc<dyn ImageService> = service.clone();
    api::for_each_image_rpc!(register; builder, image, lanes, runtime);
    let admin: Arc<dyn Admin> = service;
    api::for_each_admin_rpc!(register; builder, admin, lanes, admin);
    vec![builder.build()]
}
