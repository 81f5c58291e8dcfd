//! ContainerStatus and ListContainers: memory only, no op lock.

use std::collections::BTreeMap;

use super::convert::matches;
use super::{Call, Service};
use crate::api::runtime;
use crate::api::runtime::{
    ContainerFilter, ContainerResources, ContainerStatusRequest, ContainerStatusResponse, ContainerUser, ImageSpec, LinuxContainerUser,
    ListContainersRequest, ListContainersResponse, Mount,
};
use crate::container::{signal, Container, State, Status};
use crate::error::{Error, Result};
use protobuf::MessageField;

fn state(status: &Status) -> runtime::ContainerState {
    match status.state {
        State::Making | State::Created => runtime::ContainerState::CONTAINER_CREATED,
        State::Running => runtime::ContainerState::CONTAINER_RUNNING,
        State::Exited => runtime::ContainerState::CONTAINER_EXITED,
    }
}

/// What the user called the image, never empty, also after the image is removed. Without a runtime handler, as in the lists of images:
/// kubelet compares the two, and would take an image of a handler for unused.
fn image(container: &Container) -> ImageSpec {
    let given = &container.config.image;
    ImageSpec {
        image: container.meta.image.clone(),
        annotations: given.annotations.clone(),
        user_specified_image: given.user_specified_image.clone(),
        ..Default::default()
    }
}

fn user(status: &Status) -> ContainerUser {
    let linux = LinuxContainerUser {
        uid: status.user.uid.into(),
        gid: status.user.gid.into(),
        supplemental_groups: status.user.groups.iter().map(|g| i64::from(*g)).collect(),
        ..Default::default()
    };
    ContainerUser { linux: MessageField::some(linux), ..Default::default() }
}

/// Those of the request, and for an image which one it was.
fn mounts(container: &Container) -> Vec<Mount> {
    let mut mounts = container.config.mounts.clone();
    for volume in &container.meta.image_volumes {
        if let Some(image) = mounts.get_mut(volume.mount).and_then(|m| m.image.as_mut()) {
            image.image_ref = volume.image_id.clone();
            image.runtime_handler.clear();
        }
    }
    mounts
}

pub(super) fn full(container: &Container, status: &Status) -> runtime::ContainerStatus {
    let (meta, config) = (&container.meta, &container.config);
    // As asked for at first, or in an update; there also where nothing was, as with containerd.
    let linux = protobuf::Message::parse_from_bytes(&status.resources).unwrap_or_default();
    let resources = MessageField::some(ContainerResources { linux: MessageField::some(linux), ..Default::default() });
    runtime::ContainerStatus {
        id: meta.id.clone(),
        metadata: config.metadata.clone(),
        state: state(status).into(),
        created_at: meta.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        exit_code: status.exit_code,
        image: MessageField::some(image(container)),
        image_ref: meta.image_ref.clone(),
        image_id: meta.image_id.clone(),
        reason: status.reason.clone(),
        message: status.message.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        mounts: mounts(container),
        log_path: meta.log_path.as_ref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default(),
        resources,
        user: MessageField::some(user(status)),
        stop_signal: signal::to_cri(meta.stop_signal).into(),
        ..Default::default()
    }
}

fn brief(container: &Container, status: &Status) -> runtime::Container {
    let (meta, config) = (&container.meta, &container.config);
    runtime::Container {
        id: meta.id.clone(),
        pod_sandbox_id: meta.sandbox_id.clone(),
        metadata: config.metadata.clone(),
        image: MessageField::some(image(container)),
        // kubelet's image garbage collection compares it with Image.id.
        image_ref: meta.image_id.clone(),
        image_id: meta.image_id.clone(),
        state: state(status).into(),
        created_at: meta.created_at,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        ..Default::default()
    }
}

/// What `crictl inspect` shows beside the status.
fn verbose(container: &Container, status: &Status) -> BTreeMap<String, String> {
    let meta = &container.meta;
    let spec = crate::sys::file::read(&meta.spec_path(), 16 << 20).ok();
    let spec: Option<serde_json::Value> = spec.and_then(|s| serde_json::from_slice(&s).ok());
    let info = serde_json::json!({
        "sandboxID": meta.sandbox_id,
        "pid": status.pid,
        "removing": status.removing,
        "runtimeHandler": meta.handler.name,
        "runtimePath": meta.handler.path,
        "runtimeSpec": spec,
        "cgroupsPath": meta.cgroups_path,
        "dir": meta.dir,
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

impl Service {
    pub(super) fn status_of(&self, request: &ContainerStatusRequest, call: &Call) -> Result<ContainerStatusResponse> {
        call.about(&request.container_id);
        let container = self.containers.get(&request.container_id)?;
        let status = container.status();
        Ok(ContainerStatusResponse {
            status: MessageField::some(full(&container, &status)),
            info: if request.verbose { verbose(&container, &status) } else { BTreeMap::new() },
            ..Default::default()
        })
    }

    pub(super) fn list(&self, request: &ListContainersRequest) -> Result<ListContainersResponse> {
        let containers = self.selected_containers(&request.filter)?.collect();
        Ok(ListContainersResponse { containers, ..Default::default() })
    }

    /// What lists show of the containers of this moment that match; each message is made when it is asked for.
    pub(super) fn selected_containers(&self, filter: &ContainerFilter) -> Result<impl Iterator<Item = runtime::Container>> {
        let wanted = match filter.state.as_ref() {
            Some(value) => Some(value.state.enum_value().map_err(|n| Error::invalid(format!("filter.state: no container state {n}")))?),
            None => None,
        };
        // An unknown or ambiguous id in a filter selects nothing.
        let mut candidates = match (filter.id.as_str(), filter.pod_sandbox_id.as_str()) {
            ("", "") => self.containers.all(),
            ("", _) => Vec::new(),
            (id, _) => self.containers.find(id).ok().flatten().into_iter().collect(),
        };
        if !filter.pod_sandbox_id.is_empty() {
            let sandbox = self.sandboxes.find(&filter.pod_sandbox_id).ok().flatten();
            let here = sandbox.map(|sandbox| self.containers.of_sandbox(sandbox.id())).unwrap_or_default();
            match filter.id.is_empty() {
                true => candidates = here,
                false => candidates.retain(|container| here.iter().any(|other| other.id() == container.id())),
            }
        }
        let labels = filter.label_selector.clone();
        Ok(candidates.into_iter().filter(move |container| matches(&container.config.labels, &labels)).filter_map(move |container| {
            let status = container.status();
            wanted.is_none_or(|w| w == state(&status)).then(|| brief(&container, &status))
        }))
    }
}
