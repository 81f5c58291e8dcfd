//! PodSandboxStatus and ListPodSandbox: memory only, no op lock.

use std::collections::BTreeMap;

use super::convert::{matches, namespace_option};
use super::{Call, Service};
use crate::api::runtime::{
    LinuxContainerResources, LinuxPodSandboxStatus, ListPodSandboxRequest, ListPodSandboxResponse, Namespace, PodIP, PodSandbox,
    PodSandboxFilter, PodSandboxNetworkStatus, PodSandboxState, PodSandboxStatus, PodSandboxStatusRequest, PodSandboxStatusResponse,
};
use crate::error::{Error, Result};
use crate::sandbox::{Sandbox, Status};
use protobuf::MessageField;

fn state(status: &Status) -> PodSandboxState {
    if status.is_ready() {
        PodSandboxState::SANDBOX_READY
    } else {
        PodSandboxState::SANDBOX_NOTREADY
    }
}

fn network(status: &Status) -> PodSandboxNetworkStatus {
    let mut ips = status.ips.iter().map(|ip| ip.to_string());
    PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| PodIP { ip, ..Default::default() }).collect(),
        ..Default::default()
    }
}

pub(super) fn full(sandbox: &Sandbox, status: &Status) -> PodSandboxStatus {
    let options = namespace_option(&sandbox.config);
    let namespaces = Namespace { options: MessageField::some(options), ..Default::default() };
    let linux = LinuxPodSandboxStatus { namespaces: MessageField::some(namespaces), ..Default::default() };
    PodSandboxStatus {
        id: sandbox.meta.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: state(status).into(),
        created_at: sandbox.meta.created_at,
        network: MessageField::some(network(status)),
        linux: MessageField::some(linux),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.meta.requested_handler.clone(),
        ..Default::default()
    }
}

fn brief(sandbox: &Sandbox, status: &Status) -> PodSandbox {
    PodSandbox {
        id: sandbox.meta.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: state(status).into(),
        created_at: sandbox.meta.created_at,
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.meta.requested_handler.clone(),
        ..Default::default()
    }
}

/// Resources with the field names of CRI; null: nothing was said.
fn said(resources: &Option<Vec<u8>>) -> serde_json::Value {
    let message = resources.as_ref().and_then(|bytes| protobuf::Message::parse_from_bytes(bytes).ok());
    message.map_or(serde_json::Value::Null, |r: LinuxContainerResources| {
        let pages: Vec<_> = r.hugepage_limits.iter().map(|l| serde_json::json!({"page_size": l.page_size, "limit": l.limit})).collect();
        serde_json::json!({
            "cpu_period": r.cpu_period,
            "cpu_quota": r.cpu_quota,
            "cpu_shares": r.cpu_shares,
            "memory_limit_in_bytes": r.memory_limit_in_bytes,
            "memory_swap_limit_in_bytes": r.memory_swap_limit_in_bytes,
            "oom_score_adj": r.oom_score_adj,
            "cpuset_cpus": r.cpuset_cpus,
            "cpuset_mems": r.cpuset_mems,
            "hugepage_limits": pages,
            "unified": r.unified,
        })
    })
}

/// As of an OCI runtime spec what a sandbox has of one: tools look here for its network namespace. No process, for there is none.
fn runtime_spec(sandbox: &Sandbox) -> serde_json::Value {
    let meta = &sandbox.meta;
    let pins = [("user", meta.user_pin()), ("network", meta.netns.clone()), ("ipc", meta.ipc_pin()), ("uts", meta.uts_pin())];
    let namespaces: Vec<_> =
        pins.iter().filter_map(|(kind, path)| path.as_ref().map(|path| serde_json::json!({"type": kind, "path": path}))).collect();
    let mut annotations = sandbox.config.annotations.clone();
    annotations.extend(crate::spec::sandbox_annotations(&meta.id, &sandbox.config));
    serde_json::json!({
        "ociVersion": crate::spec::OCI_VERSION,
        "hostname": meta.hostname,
        "annotations": annotations,
        "linux": {"namespaces": namespaces, "cgroupsPath": meta.cgroup_parent},
    })
}

/// What `crictl inspectp` shows beside the status.
fn verbose(sandbox: &Sandbox, status: &Status) -> BTreeMap<String, String> {
    let meta = &sandbox.meta;
    let info = serde_json::json!({
        "sandboxID": meta.id,
        "pid": status.init.map_or(0, |i| i.pid),
        "runtimeHandler": meta.handler,
        "runtimeType": "crisp.pinned",
        "network": {"namespace": meta.netns, "ready": status.network_ready, "ips": status.ips},
        "ipcNamespace": meta.ipc_pin(),
        "utsNamespace": meta.uts_pin(),
        "userNamespace": meta.user_pin(),
        "cgroupParent": meta.cgroup_parent,
        "overhead": said(&status.overhead),
        "resources": said(&status.resources),
        "dir": meta.dir,
        "reason": status.reason,
        "runtimeSpec": runtime_spec(sandbox),
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

impl Service {
    pub(super) fn sandbox_status(&self, request: &PodSandboxStatusRequest, call: &Call) -> Result<PodSandboxStatusResponse> {
        call.about(&request.pod_sandbox_id);
        let sandbox = self.sandboxes.get(&request.pod_sandbox_id)?;
        // Before the sandbox's own status, so that the time is true for it too.
        let (containers_statuses, timestamp) = self.statuses_of(&sandbox);
        let status = sandbox.status();
        Ok(PodSandboxStatusResponse {
            status: MessageField::some(full(&sandbox, &status)),
            info: if request.verbose { verbose(&sandbox, &status) } else { BTreeMap::new() },
            containers_statuses,
            timestamp,
            ..Default::default()
        })
    }

    pub(super) fn list_sandboxes(&self, request: &ListPodSandboxRequest) -> Result<ListPodSandboxResponse> {
        let items = self.selected_sandboxes(&request.filter)?.collect();
        Ok(ListPodSandboxResponse { items, ..Default::default() })
    }

    /// What lists show of the sandboxes of this moment that match; each message is made when it is asked for.
    pub(super) fn selected_sandboxes(&self, filter: &PodSandboxFilter) -> Result<impl Iterator<Item = PodSandbox>> {
        let wanted = match filter.state.as_ref() {
            Some(value) => Some(value.state.enum_value().map_err(|n| Error::invalid(format!("filter.state: no sandbox state {n}")))?),
            None => None,
        };
        let candidates = match filter.id.as_str() {
            "" => self.sandboxes.all(),
            // An unknown or ambiguous id in a filter selects nothing.
            id => self.sandboxes.find(id).ok().flatten().into_iter().collect(),
        };
        let labels = filter.label_selector.clone();
        Ok(candidates.into_iter().filter(move |sandbox| matches(&sandbox.config.labels, &labels)).filter_map(move |sandbox| {
            let status = sandbox.status();
            wanted.is_none_or(|w| w == state(&status)).then(|| brief(&sandbox, &status))
        }))
    }
}
