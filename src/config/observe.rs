//! `[stats]` and `[metrics]`: what is measured, how, and who may ask.

use std::net::SocketAddr;

use serde::Deserialize;
use toml::Spanned;

use super::{at, text, Checker};
use crate::error::Result;

/// Sampling of cgroups and writable layers.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Threads that read kernel files for a list; 0: one per core.
    pub threads: usize,
    /// Seconds between two looks at a writable layer, at least.
    pub disk_interval: u64,
    /// Files that the walker of writable layers looks at in a second, at most.
    pub disk_files_per_second: u32,
    /// Metric groups of ListPodSandboxMetrics.
    pub groups: Vec<MetricsGroup>,
}

/// Metrics that can be left out together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MetricsGroup {
    Cpu,
    Memory,
    Network,
    Filesystem,
    Processes,
    Pressure,
    Hugetlb,
    Blkio,
    Oom,
    Spec,
}

impl MetricsGroup {
    /// All of them, in the order of the descriptor list.
    pub const ALL: [MetricsGroup; 10] = [
        MetricsGroup::Cpu,
        MetricsGroup::Memory,
        MetricsGroup::Network,
        MetricsGroup::Filesystem,
        MetricsGroup::Processes,
        MetricsGroup::Pressure,
        MetricsGroup::Hugetlb,
        MetricsGroup::Blkio,
        MetricsGroup::Oom,
        MetricsGroup::Spec,
    ];
}

/// The Prometheus endpoint of the daemon itself.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// None: no endpoint.
    pub address: Option<SocketAddr>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawStats {
    threads: Spanned<usize>,
    disk_interval_seconds: Spanned<u64>,
    disk_files_per_second: Spanned<u32>,
    metrics: Vec<MetricsGroup>,
}

impl Default for RawStats {
    fn default() -> RawStats {
        RawStats { threads: at(0), disk_interval_seconds: at(60), disk_files_per_second: at(20_000), metrics: MetricsGroup::ALL.to_vec() }
    }
}

impl RawStats {
    pub(super) fn check(self, c: &Checker) -> Result<Stats> {
        let mut groups = self.metrics;
        groups.sort_unstable();
        groups.dedup();
        Ok(Stats {
            threads: c.number("stats.threads", &self.threads, 0, 1024)?,
            disk_interval: c.number("stats.disk_interval_seconds", &self.disk_interval_seconds, 1, 86400)?,
            disk_files_per_second: c.number("stats.disk_files_per_second", &self.disk_files_per_second, 100, 100_000_000)?,
            groups,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawMetrics {
    address: Spanned<String>,
}

impl Default for RawMetrics {
    fn default() -> RawMetrics {
        RawMetrics { address: text("") }
    }
}

impl RawMetrics {
    pub(super) fn check(self, c: &Checker) -> Result<Metrics> {
        if self.address.get_ref().is_empty() {
            return Ok(Metrics { address: None });
        }
        match self.address.get_ref().parse() {
            Ok(address) => Ok(Metrics { address: Some(address) }),
            Err(_) => Err(c.error(&self.address, format!("metrics.address: expected address:port, found {:?}", self.address.get_ref()))),
        }
    }
}
