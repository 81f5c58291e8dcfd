//! Version, Status, RuntimeConfig, UpdateRuntimeConfig.

use super::Service;
use crate::api::runtime::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeCondition, RuntimeConfigResponse, RuntimeFeatures, RuntimeHandler,
    RuntimeHandlerFeatures, RuntimeStatus, StatusRequest, StatusResponse, UpdateRuntimeConfigRequest, UpdateRuntimeConfigResponse,
    VersionRequest, VersionResponse,
};
use crate::error::{Context, Result};
use crate::runtime::Features;
use crate::spec::HostFacts;
use protobuf::MessageField;

/// Of the kubelet runtime API, fixed (contract.md).
const KUBE_API_VERSION: &str = "0.1.0";

/// Version of both sides.
pub(super) fn version(_: &VersionRequest) -> VersionResponse {
    VersionResponse {
        version: KUBE_API_VERSION.to_owned(),
        runtime_name: "crisp".to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
        ..Default::default()
    }
}

/// What kubelet may ask of a handler. Said only of what is built.
fn handler_features(features: &Features, host: &HostFacts) -> RuntimeHandlerFeatures {
    let user_namespaces = features.user_namespaces() && kernel_has_user_namespaces();
    let recursive_read_only_mounts = features.recursive_read_only() && host.mount_setattr;
    RuntimeHandlerFeatures { recursive_read_only_mounts, user_namespaces, ..Default::default() }
}

/// They may be built out, or forbidden by user.max_user_namespaces.
fn kernel_has_user_namespaces() -> bool {
    std::fs::read_to_string("/proc/sys/user/max_user_namespaces").is_ok_and(|most| most.trim() != "0")
}

fn condition(kind: &str, problem: Option<(&str, String)>) -> RuntimeCondition {
    let (status, (reason, message)) = (problem.is_none(), problem.unwrap_or(("", String::new())));
    RuntimeCondition { type_: kind.to_owned(), status, reason: reason.to_owned(), message, ..Default::default() }
}

impl Service {
    /// Status: memory and two stat calls, no process.
    pub(super) fn runtime_status(&self, request: &StatusRequest) -> StatusResponse {
        let network = self.network.status();
        let network = (!network.ready).then(|| (network.reason.clone(), network.message));
        let network = network.as_ref().map(|(reason, message)| (reason.as_str(), message.clone()));
        let conditions = vec![condition("RuntimeReady", self.runtime_problem()), condition("NetworkReady", network)];
        let status = RuntimeStatus { conditions, ..Default::default() };
        // The entry named "" is the default handler; the others are called by name.
        let names = std::iter::once("").chain(self.handlers.usable().map(|h| h.name.as_str()));
        let runtime_handlers = names
            .map(|name| RuntimeHandler {
                name: name.to_owned(),
                features: MessageField::some(handler_features(self.handlers.features(name), &self.host)),
                ..Default::default()
            })
            .collect();
        let mut response = StatusResponse {
            status: MessageField::some(status),
            runtime_handlers,
            features: MessageField::some(RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: true,
                mount_options: true,
                ..Default::default()
            }),
            ..Default::default()
        };
        if request.verbose {
            response.info.insert("config".to_owned(), self.verbose_config());
        }
        response
    }

    fn runtime_problem(&self) -> Option<(&'static str, String)> {
        if let Some(problem) = self.handlers.problem() {
            return Some(("RuntimeUnusable", problem));
        }
        for dir in [&self.root, &self.run] {
            if !dir.is_dir() {
                return Some(("StateUnreachable", format!("{} is not a directory", dir.display())));
            }
        }
        None
    }

    fn verbose_config(&self) -> String {
        let handlers: Vec<_> = self
            .handlers
            .all()
            .map(|(h, state)| serde_json::json!({"name": h.name, "path": h.path, "root": h.root, "state": state}))
            .collect();
        serde_json::json!({
            "stateDir": self.run,
            "rootDir": self.root,
            "runtimes": handlers,
            "defaultRuntime": self.handlers.default_name(),
            "cgroupDriver": if self.systemd_cgroup { "systemd" } else { "cgroupfs" },
            "streaming": self.streaming.base(),
            "cgroupV2": self.host.cgroup_v2,
            "seccomp": self.host.seccomp,
            "apparmor": self.host.apparmor,
            "selinux": self.host.selinux,
            "check": self.check.get(),
        })
        .to_string()
    }

    pub(super) fn cgroup_driver(&self) -> RuntimeConfigResponse {
        let driver = if self.systemd_cgroup { CgroupDriver::SYSTEMD } else { CgroupDriver::CGROUPFS };
        let linux = LinuxRuntimeConfiguration { cgroup_driver: driver.into(), ..Default::default() };
        RuntimeConfigResponse { linux: MessageField::some(linux), ..Default::default() }
    }

    /// kubelet tells the pod CIDR; an empty one is no news.
    pub(super) fn set_runtime_config(&self, request: &UpdateRuntimeConfigRequest) -> Result<UpdateRuntimeConfigResponse> {
        let cidr = request.runtime_config.network_config.pod_cidr.trim();
        if !cidr.is_empty() {
            self.network.set_pod_cidr(cidr).context(|| "runtime_config.network_config.pod_cidr")?;
        }
        Ok(UpdateRuntimeConfigResponse::new())
    }
}
