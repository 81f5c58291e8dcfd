//! ContainerStats, ListContainerStats, PodSandboxStats, ListPodSandboxStats: the filter first, then kernel files, no op lock and
//! no lock across a reading. Lists have what runs; what ends meanwhile is left out. Asked for by id, what does not run is
//! answered with its attributes alone.

use std::sync::Arc;

use protobuf::MessageField;

use super::convert::matches;
use super::{Call, Service};
use crate::api::runtime::{
    ContainerAttributes, ContainerStats, ContainerStatsFilter, ContainerStatsRequest, ContainerStatsResponse, CpuUsage,
    FilesystemIdentifier, FilesystemUsage, IoUsage, LinuxPodSandboxStats, MemoryUsage, NetworkInterfaceUsage, NetworkUsage,
    PodSandboxAttributes, PodSandboxStats, PodSandboxStatsFilter, PodSandboxStatsRequest, PodSandboxStatsResponse, ProcessUsage, PsiData,
    PsiStats, SwapUsage, UInt64Value,
};
use crate::cgroup::stat::pressure::{Pressure, Stall};
use crate::cgroup::stat::Sample;
use crate::container::Container;
use crate::error::Result;
use crate::sandbox::Sandbox;
use crate::store::now_ns;
use crate::sys::links::Link;

/// The interface of the default network, as CNI is told.
const DEFAULT_INTERFACE: &str = "eth0";

fn number(value: u64) -> MessageField<UInt64Value> {
    MessageField::some(UInt64Value { value, ..Default::default() })
}

fn maybe(value: Option<u64>) -> MessageField<UInt64Value> {
    value.map_or_else(MessageField::none, number)
}

fn psi(pressure: &Option<Pressure>) -> MessageField<PsiStats> {
    let data = |stall: &Option<Stall>| match stall {
        Some(s) => MessageField::some(PsiData { Total: s.total, Avg10: s.avg10, Avg60: s.avg60, Avg300: s.avg300, ..Default::default() }),
        None => MessageField::none(),
    };
    match pressure {
        Some(p) => MessageField::some(PsiStats { Full: data(&p.full), Some: data(&p.some), ..Default::default() }),
        None => MessageField::none(),
    }
}

fn cpu(sample: &Sample, rate: Option<u64>) -> CpuUsage {
    CpuUsage {
        timestamp: sample.taken_at,
        usage_core_nano_seconds: maybe(sample.cpu),
        usage_nano_cores: maybe(rate),
        psi: psi(&sample.cpu_pressure),
        ..Default::default()
    }
}

fn memory(sample: &Sample, host_memory: u64) -> MemoryUsage {
    let m = &sample.memory;
    MemoryUsage {
        timestamp: sample.taken_at,
        working_set_bytes: maybe(m.working_set()),
        available_bytes: maybe(m.available(host_memory)),
        usage_bytes: maybe(m.usage),
        rss_bytes: maybe(m.rss),
        page_faults: maybe(m.faults),
        major_page_faults: maybe(m.major_faults),
        psi: psi(&sample.memory_pressure),
        ..Default::default()
    }
}

fn swap(sample: &Sample) -> SwapUsage {
    SwapUsage {
        timestamp: sample.taken_at,
        swap_available_bytes: maybe(sample.memory.swap_available()),
        swap_usage_bytes: maybe(sample.memory.swap),
        ..Default::default()
    }
}

fn io(sample: &Sample) -> IoUsage {
    IoUsage { timestamp: sample.taken_at, psi: psi(&sample.io_pressure), ..Default::default() }
}

fn interface(link: &Link) -> NetworkInterfaceUsage {
    NetworkInterfaceUsage {
        name: link.name.clone(),
        rx_bytes: number(link.rx_bytes),
        rx_errors: number(link.rx_errors),
        tx_bytes: number(link.tx_bytes),
        tx_errors: number(link.tx_errors),
        ..Default::default()
    }
}

/// The default interface by itself, the others but loopback in a list. Whoever may administrate the sandbox's network can take the
/// default one away; the first that is switched on then stands for it, else the first (the kernel brings some that are not), as with
/// containerd. None without any: kubelet takes a default one for granted.
fn network(links: &[Link], timestamp: i64) -> Option<NetworkUsage> {
    let mut links: Vec<&Link> = links.iter().filter(|l| l.name != "lo").collect();
    let default = links.iter().position(|l| l.name == DEFAULT_INTERFACE).or_else(|| links.iter().position(|l| l.up)).unwrap_or(0);
    let default = (default < links.len()).then(|| links.remove(default))?;
    Some(NetworkUsage {
        timestamp,
        default_interface: MessageField::some(interface(default)),
        interfaces: links.into_iter().map(interface).collect(),
        ..Default::default()
    })
}

fn container_attributes(container: &Container) -> MessageField<ContainerAttributes> {
    MessageField::some(ContainerAttributes {
        id: container.id().to_owned(),
        metadata: container.config.metadata.clone(),
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        ..Default::default()
    })
}

fn sandbox_attributes(sandbox: &Sandbox) -> MessageField<PodSandboxAttributes> {
    MessageField::some(PodSandboxAttributes {
        id: sandbox.id().to_owned(),
        metadata: sandbox.config.metadata.clone(),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        ..Default::default()
    })
}

/// The sum of a field over what has it; absent when nothing has it.
fn sum<'a, T: 'a>(items: impl Iterator<Item = &'a T>, field: impl Fn(&'a T) -> &'a MessageField<UInt64Value>) -> MessageField<UInt64Value> {
    let values = items.filter_map(|item| field(item).as_ref()).map(|v| v.value);
    maybe(values.reduce(u64::saturating_add))
}

/// CPU and memory of a sandbox without a cgroup of its own: those of its containers together. Pressure does not add up, and
/// there is no limit.
fn together(containers: &[ContainerStats], timestamp: i64) -> (CpuUsage, MemoryUsage) {
    if containers.is_empty() {
        let cpu = CpuUsage { timestamp, usage_core_nano_seconds: number(0), ..Default::default() };
        let memory =
            MemoryUsage { timestamp, working_set_bytes: number(0), usage_bytes: number(0), rss_bytes: number(0), ..Default::default() };
        return (cpu, memory);
    }
    let (cpus, memories) = (|| containers.iter().filter_map(|c| c.cpu.as_ref()), || containers.iter().filter_map(|c| c.memory.as_ref()));
    let cpu = CpuUsage {
        timestamp,
        usage_core_nano_seconds: sum(cpus(), |c| &c.usage_core_nano_seconds),
        usage_nano_cores: sum(cpus(), |c| &c.usage_nano_cores),
        ..Default::default()
    };
    let memory = MemoryUsage {
        timestamp,
        working_set_bytes: sum(memories(), |m| &m.working_set_bytes),
        usage_bytes: sum(memories(), |m| &m.usage_bytes),
        rss_bytes: sum(memories(), |m| &m.rss_bytes),
        page_faults: sum(memories(), |m| &m.page_faults),
        major_page_faults: sum(memories(), |m| &m.major_page_faults),
        ..Default::default()
    };
    (cpu, memory)
}

/// The results of `work` for `size` items at a time; what has none is left out.
pub(super) fn in_batches<T, R>(items: Vec<T>, size: usize, mut work: impl FnMut(&[T]) -> Vec<Option<R>>) -> impl Iterator<Item = R> {
    let mut at = 0usize;
    let batches = std::iter::from_fn(move || {
        let end = at.saturating_add(size.max(1)).min(items.len());
        let some = (at < end).then(|| work(&items[at..end]));
        at = end;
        some
    });
    batches.flatten().flatten()
}

impl Service {
    pub(super) fn stats_of_container(&self, request: &ContainerStatsRequest, call: &Call) -> Result<ContainerStatsResponse> {
        call.about(&request.container_id);
        let container = self.containers.get(&request.container_id)?;
        let running = if container.is_running() { self.measure_container(&container) } else { None };
        let stats = running.unwrap_or_else(|| ContainerStats {
            attributes: container_attributes(&container),
            writable_layer: self.writable_layer(container.id()),
            ..Default::default()
        });
        Ok(ContainerStatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    pub(super) fn stats_of_sandbox(&self, request: &PodSandboxStatsRequest, call: &Call) -> Result<PodSandboxStatsResponse> {
        call.about(&request.pod_sandbox_id);
        let sandbox = self.sandboxes.get(&request.pod_sandbox_id)?;
        let stats = match sandbox.status().is_ready() {
            true => self.measure_sandbox(&sandbox, &self.running_in(sandbox.id())),
            false => PodSandboxStats { attributes: sandbox_attributes(&sandbox), ..Default::default() },
        };
        Ok(PodSandboxStatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    /// The running containers that the filter selects, in the order of ListContainers.
    pub(super) fn container_stats_list(&self, filter: Option<&ContainerStatsFilter>) -> Result<Vec<ContainerStats>> {
        Ok(self.container_stats_by(usize::MAX, filter).collect())
    }

    /// The same, `batch` containers measured at a time, when they are asked for.
    pub(super) fn container_stats_by(
        &self,
        batch: usize,
        filter: Option<&ContainerStatsFilter>,
    ) -> impl Iterator<Item = ContainerStats> + use<'_> {
        in_batches(self.select_containers(filter), batch, |some| self.sampler.each(some, |c| self.measure_container(c)))
    }

    /// The ready sandboxes that the filter selects, in the order of ListPodSandbox.
    pub(super) fn sandbox_stats_list(&self, filter: Option<&PodSandboxStatsFilter>) -> Result<Vec<PodSandboxStats>> {
        Ok(self.sandbox_stats_by(usize::MAX, filter).collect())
    }

    /// The same, `batch` sandboxes measured at a time, when they are asked for.
    pub(super) fn sandbox_stats_by(
        &self,
        batch: usize,
        filter: Option<&PodSandboxStatsFilter>,
    ) -> impl Iterator<Item = PodSandboxStats> + use<'_> {
        let mut sandboxes = match filter.map_or("", |f| f.id.as_str()) {
            "" => self.sandboxes.all(),
            // An unknown or ambiguous id in a filter selects nothing.
            id => self.sandboxes.find(id).ok().flatten().into_iter().collect(),
        };
        if let Some(filter) = filter {
            sandboxes.retain(|s| matches(&s.config.labels, &filter.label_selector));
        }
        // By sandbox, so that each finds its own without a look at all.
        let mut containers = self.containers.all();
        containers.retain(|c| c.is_running());
        containers.sort_by(|a, b| a.meta.sandbox_id.cmp(&b.meta.sandbox_id));
        let measure = move |sandbox: &Arc<Sandbox>| {
            let id = sandbox.id();
            let begin = containers.partition_point(|c| c.meta.sandbox_id.as_str() < id);
            let end = begin + containers[begin..].partition_point(|c| c.meta.sandbox_id == id);
            sandbox.status().is_ready().then(|| self.measure_sandbox(sandbox, &containers[begin..end]))
        };
        in_batches(sandboxes, batch, move |some| self.sampler.each(some, &measure))
    }

    fn select_containers(&self, filter: Option<&ContainerStatsFilter>) -> Vec<Arc<Container>> {
        let Some(filter) = filter else {
            let mut all = self.containers.all();
            all.retain(|c| c.is_running());
            return all;
        };
        let mut selected = match filter.id.as_str() {
            "" => self.containers.all(),
            // An unknown or ambiguous id in a filter selects nothing.
            id => self.containers.find(id).ok().flatten().into_iter().collect(),
        };
        if !filter.pod_sandbox_id.is_empty() {
            let Some(sandbox) = self.sandboxes.find(&filter.pod_sandbox_id).ok().flatten() else { return Vec::new() };
            selected.retain(|c| c.meta.sandbox_id == sandbox.id());
        }
        selected.retain(|c| matches(&c.config.labels, &filter.label_selector) && c.is_running());
        selected
    }

    fn running_in(&self, sandbox_id: &str) -> Vec<Arc<Container>> {
        let mut containers = self.containers.of_sandbox(sandbox_id);
        containers.retain(|c| c.is_running());
        containers
    }

    /// None when the container has ended.
    fn measure_container(&self, container: &Container) -> Option<ContainerStats> {
        let (sample, rate) = container.sample()?;
        Some(ContainerStats {
            attributes: container_attributes(container),
            cpu: MessageField::some(cpu(&sample, rate)),
            memory: MessageField::some(memory(&sample, self.sampler.host_memory())),
            writable_layer: self.writable_layer(container.id()),
            swap: MessageField::some(swap(&sample)),
            io: MessageField::some(io(&sample)),
            ..Default::default()
        })
    }

    /// Absent until it was measured for the first time.
    fn writable_layer(&self, container_id: &str) -> MessageField<FilesystemUsage> {
        let usage = self.disk.usage(container_id).map(|usage| FilesystemUsage {
            timestamp: usage.taken_at,
            fs_id: MessageField::some(FilesystemIdentifier { mountpoint: self.layers_mountpoint.clone(), ..Default::default() }),
            used_bytes: number(usage.bytes),
            inodes_used: number(usage.inodes),
            ..Default::default()
        });
        usage.into()
    }

    /// The pod's own cgroup where there is one, else its running containers together.
    fn measure_sandbox(&self, sandbox: &Sandbox, running: &[Arc<Container>]) -> PodSandboxStats {
        let containers: Vec<ContainerStats> = running.iter().filter_map(|c| self.measure_container(c)).collect();
        let mut linux = LinuxPodSandboxStats::default();
        match sandbox.sample() {
            Some((sample, rate)) => {
                linux.cpu = MessageField::some(cpu(&sample, rate));
                linux.memory = MessageField::some(memory(&sample, self.sampler.host_memory()));
                linux.io = MessageField::some(io(&sample));
            }
            None => {
                let timestamp = now_ns();
                let (cpu, memory) = together(&containers, timestamp);
                linux.cpu = MessageField::some(cpu);
                linux.memory = MessageField::some(memory);
                linux.io = MessageField::some(IoUsage { timestamp, ..Default::default() });
            }
        }
        let links = sandbox.links();
        linux.network = links.and_then(|links| network(&links, now_ns())).into();
        let process = ProcessUsage { timestamp: now_ns(), process_count: number(self.processes(sandbox, running)), ..Default::default() };
        linux.process = MessageField::some(process);
        linux.containers = containers;
        PodSandboxStats { attributes: sandbox_attributes(sandbox), linux: MessageField::some(linux), ..Default::default() }
    }

    /// Processes of the running containers, and the sandbox's init if it has one.
    fn processes(&self, sandbox: &Sandbox, running: &[Arc<Container>]) -> u64 {
        let of_containers: u64 = running.iter().filter_map(|c| c.reader()).map(|reader| reader.processes()).sum();
        of_containers + u64::from(sandbox.status().init.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, rx_bytes: u64) -> Link {
        Link { name: name.into(), rx_bytes, tx_errors: 3, ..Link::default() }
    }

    #[test]
    fn the_default_interface_is_apart() {
        let usage = network(&[link("lo", 1), link("net1", 2), link("eth0", 3)], 7).unwrap();
        assert_eq!((usage.timestamp, usage.default_interface.rx_bytes.value, usage.default_interface.tx_errors.value), (7, 3, 3));
        assert_eq!(usage.interfaces.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["net1"]);
        let usage = network(&[link("lo", 1), link("x0", 2), link("net1", 3)], 7).unwrap();
        assert_eq!((usage.default_interface.name.as_str(), usage.interfaces.len(), usage.interfaces[0].name.as_str()), ("x0", 1, "net1"));
        let up = Link { up: true, ..link("x0", 2) };
        let usage = network(&[link("tunl0", 0), up], 7).unwrap();
        assert_eq!((usage.default_interface.name.as_str(), usage.interfaces[0].name.as_str()), ("x0", "tunl0"));
        assert!(network(&[link("lo", 1)], 7).is_none() && network(&[], 7).is_none());
    }

    #[test]
    fn containers_together() {
        let one = |usage: u64, rate: Option<u64>| ContainerStats {
            cpu: MessageField::some(CpuUsage {
                usage_core_nano_seconds: number(usage),
                usage_nano_cores: maybe(rate),
                ..Default::default()
            }),
            memory: MessageField::some(MemoryUsage { working_set_bytes: number(usage), ..Default::default() }),
            ..Default::default()
        };
        let (cpu, memory) = together(&[one(5, None), one(7, Some(2)), ContainerStats::default()], 1);
        assert_eq!((cpu.usage_core_nano_seconds.value, cpu.usage_nano_cores.value, memory.working_set_bytes.value), (12, 2, 12));
        assert!(memory.rss_bytes.is_none() && memory.available_bytes.is_none());
        let (cpu, memory) = together(&[one(5, None)], 1);
        assert!(cpu.usage_nano_cores.is_none() && memory.usage_bytes.is_none());
        let (cpu, memory) = together(&[], 1);
        assert!(cpu.usage_core_nano_seconds.is_some() && memory.working_set_bytes.is_some() && cpu.usage_nano_cores.is_none());
    }

    #[test]
    fn batches_are_whole_and_made_when_they_are_asked_for() {
        let sizes = std::cell::RefCell::new(Vec::new());
        let odd = |some: &[u32]| {
            sizes.borrow_mut().push(some.len());
            some.iter().map(|n| (n % 2 == 1).then_some(*n)).collect()
        };
        let mut items = in_batches((0..10).collect(), 4, odd);
        assert_eq!(items.next(), Some(1));
        assert_eq!(*sizes.borrow(), [4]);
        assert_eq!(items.collect::<Vec<_>>(), [3, 5, 7, 9]);
        assert_eq!(*sizes.borrow(), [4, 4, 2]);
        assert_eq!(in_batches((0..10).collect(), usize::MAX, odd).count(), 5);
        assert_eq!(in_batches(Vec::new(), 4, odd).next(), None);
    }
}
