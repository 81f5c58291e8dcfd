//! Configurations as a kubelet would send them. The benchmark uses them too.

use std::sync::atomic::{AtomicU32, Ordering};

use crisp::api::runtime::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, ImageSpec, LinuxContainerConfig, LinuxPodSandboxConfig,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, RunPodSandboxRequest,
};

use crate::daemon::{Layout, BUSYBOX};

/// A sandbox with a network of its own, or the host's; its processes share no pid namespace, as kubelet asks. Its logs have a
/// directory of their own: of a sandbox of the same name before it, the lines would still be there.
pub fn sandbox_config(layout: &Layout, name: &str, host_network: bool) -> PodSandboxConfig {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let logs = format!("{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let metadata = PodSandboxMetadata { name: name.into(), uid: format!("uid-{name}"), namespace: "test".into(), ..Default::default() };
    PodSandboxConfig {
        metadata: Some(metadata).into(),
        hostname: if host_network { String::new() } else { name.into() },
        log_directory: layout.path("logs").join(logs).display().to_string(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        annotations: [("note".to_owned(), "kept as it is".to_owned())].into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: layout.cgroup_parent(),
            security_context: Some(crisp::api::runtime::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(host_network)).into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn namespaces(host_network: bool) -> NamespaceOption {
    let network = if host_network { NamespaceMode::NODE } else { NamespaceMode::POD };
    NamespaceOption { network: network.into(), pid: NamespaceMode::CONTAINER.into(), ipc: NamespaceMode::POD.into(), ..Default::default() }
}

pub fn run_request(config: &PodSandboxConfig, handler: &str) -> RunPodSandboxRequest {
    RunPodSandboxRequest { config: Some(config.clone()).into(), runtime_handler: handler.into(), ..Default::default() }
}

/// A container of the busybox image in the namespaces of its sandbox.
pub fn container_config(sandbox: &PodSandboxConfig, name: &str, command: &[&str]) -> ContainerConfig {
    let options = &sandbox.linux.security_context.namespace_options;
    let mut linux = LinuxContainerConfig::default();
    linux.security_context.mut_or_insert_default().namespace_options = options.clone();
    linux.resources.mut_or_insert_default().cpu_shares = 102;
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), ..Default::default() }).into(),
        image: Some(ImageSpec { image: BUSYBOX.into(), user_specified_image: BUSYBOX.into(), ..Default::default() }).into(),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(linux).into(),
        ..Default::default()
    }
}

pub fn create_request(sandbox_id: &str, sandbox: &PodSandboxConfig, config: &ContainerConfig) -> CreateContainerRequest {
    CreateContainerRequest {
        pod_sandbox_id: sandbox_id.into(),
        config: Some(config.clone()).into(),
        sandbox_config: Some(sandbox.clone()).into(),
        ..Default::default()
    }
}

pub fn exec_request(container_id: &str, command: &[&str], timeout_seconds: i64) -> ExecSyncRequest {
    let cmd = command.iter().map(|&word| word.to_owned()).collect();
    ExecSyncRequest { container_id: container_id.into(), cmd, timeout: timeout_seconds, ..Default::default() }
}
