//! ListMetricDescriptors and ListPodSandboxMetrics. Kernel files are read by the threads of stats, no lock is held meanwhile, and
//! all values of one container come from one look at it.

use std::sync::Arc;

use protobuf::Message;

use super::stats::in_batches;
use super::Service;
use crate::api::runtime::{
    ContainerMetrics, LinuxContainerResources, ListMetricDescriptorsResponse, ListPodSandboxMetricsResponse, Metric, PodSandboxMetrics,
};
use crate::container::Container;
use crate::error::Result;
use crate::sandbox::Sandbox;
use crate::stats::metrics::values::{Direction, Labels, Space, Spec, Traffic};
use crate::stats::metrics::Subject;
use crate::sys::links::Link;

/// The name that cAdvisor's users know a sandbox's own metrics by.
const SANDBOX: &str = "POD";

impl Service {
    pub(super) fn metric_descriptors(&self) -> ListMetricDescriptorsResponse {
        ListMetricDescriptorsResponse { descriptors: self.metrics.descriptors(), ..Default::default() }
    }

    pub(super) fn sandbox_metrics(&self) -> Result<ListPodSandboxMetricsResponse> {
        Ok(ListPodSandboxMetricsResponse { pod_metrics: self.sandbox_metrics_list()?, ..Default::default() })
    }

    /// The metrics of all sandboxes that are ready, with those of their containers that run, in the order of ids. What ends
    /// meanwhile is not in it.
    pub(super) fn sandbox_metrics_list(&self) -> Result<Vec<PodSandboxMetrics>> {
        Ok(self.sandbox_metrics_by(usize::MAX).collect())
    }

    /// The same, `batch` sandboxes measured at a time, when they are asked for.
    pub(super) fn sandbox_metrics_by(&self, batch: usize) -> impl Iterator<Item = PodSandboxMetrics> + use<'_> {
        let mut containers = self.containers.all();
        containers.retain(|c| c.is_running());
        containers.sort_by(|a, b| a.meta.sandbox_id.cmp(&b.meta.sandbox_id));
        let space = self.metrics.space();
        let measure = move |sandbox: &Arc<Sandbox>| {
            let id = sandbox.id();
            if !sandbox.status().is_ready() {
                return None;
            }
            let begin = containers.partition_point(|c| c.meta.sandbox_id.as_str() < id);
            let own = containers[begin..].iter().take_while(|c| c.meta.sandbox_id == id);
            let container_metrics = own.filter_map(|c| self.container_metrics(sandbox, c, &space)).collect();
            let metrics = self.network_metrics(sandbox);
            Some(PodSandboxMetrics { pod_sandbox_id: id.to_owned(), metrics, container_metrics, ..Default::default() })
        };
        in_batches(self.sandboxes.all(), batch, move |some| self.sampler.each(some, &measure))
    }

    fn container_metrics(&self, sandbox: &Sandbox, container: &Container, space: &Space) -> Option<ContainerMetrics> {
        let (sample, _) = container.sample()?;
        let reader = container.reader()?;
        let status = container.status();
        let name = container.config.metadata.name.as_str();
        let subject = Subject {
            labels: Labels { id: container.id(), name, image: &container.meta.image, container: name, ..labels(sandbox) },
            spec: Spec {
                started_at: status.started_at,
                resources: LinuxContainerResources::parse_from_bytes(&status.resources).unwrap_or_default(),
            },
            pid: status.pid,
        };
        let metrics = self.metrics.container(&subject, &reader, &sample, space);
        Some(ContainerMetrics { container_id: container.id().to_owned(), metrics, ..Default::default() })
    }

    fn network_metrics(&self, sandbox: &Sandbox) -> Vec<Metric> {
        if !self.metrics.wants_network() {
            return Vec::new();
        }
        let links = sandbox.links().unwrap_or_default();
        let traffic: Vec<_> = links.iter().filter(|link| link.name != "lo").map(traffic).collect();
        self.metrics.network(&labels(sandbox), &traffic)
    }
}

/// The labels of a sandbox itself.
fn labels(sandbox: &Sandbox) -> Labels<'_> {
    let metadata = &sandbox.config.metadata;
    Labels { id: sandbox.id(), name: SANDBOX, image: "", pod: &metadata.name, namespace: &metadata.namespace, container: SANDBOX }
}

fn traffic(link: &Link) -> Traffic<'_> {
    let direction = |bytes, packets, errors, dropped| Direction { bytes, packets, errors, dropped };
    Traffic {
        interface: &link.name,
        rx: direction(link.rx_bytes, link.rx_packets, link.rx_errors, link.rx_dropped),
        tx: direction(link.tx_bytes, link.tx_packets, link.tx_errors, link.tx_dropped),
    }
}
