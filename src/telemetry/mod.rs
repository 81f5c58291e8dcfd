//! Counters of the daemon itself, for Prometheus. Whoever does something counts it here, for the price of a few atomic
//! additions; what can be looked up (objects by state, queues) is asked for when somebody scrapes. Names begin with `crisp_`.
//!
//! ```text
//! crisp_calls_total{method,code}                  crisp_call_duration_seconds{method}
//! crisp_lane_refused_total{lane}                  crisp_lane_queued_calls{lane}, _workers, _busy_workers
//! crisp_image_pulls_total{result}                 crisp_image_pull_duration_seconds, crisp_image_pull_received_bytes_total
//! crisp_image_pull_resumes_total
//! crisp_image_pulls_running                       crisp_image_layers_unpacked_total, crisp_image_unpacked_bytes_total
//! crisp_images{state}                             crisp_image_layers, crisp_image_layers_bytes
//! crisp_shim_starts_total{result}                 crisp_shim_deaths_total, crisp_shims
//! crisp_cni_duration_seconds{plugin,command,result}
//! crisp_events_dropped_total                      crisp_streaming_sessions{kind}, crisp_streaming_sessions_total{kind}
//! crisp_sandboxes{state}, crisp_containers{state} crisp_process_*, crisp_build_info{version}
//! ```

/// What is asked for at a scrape.
mod gauges;
/// What is counted when it happens.
mod meters;
/// This process, as the kernel sees it.
mod process;
/// The endpoint.
mod server;

pub use gauges::Gauges;
pub use meters::{
    call_meter, cni_ran, events_dropped, image_pull, lane_refused, layer_unpacked, pull_received, pull_resumed, shim_died, shim_started,
    streaming_session, CallMeter, Pull, Session,
};
pub use server::Endpoint;

use prometheus::{Registry, TextEncoder};

use crate::error::{Error, Result};

/// All metrics in the text format, version 0.0.4; `observe` adds what only the daemon knows.
pub fn render(observe: &dyn Fn(&mut Gauges)) -> Result<String> {
    let mut gauges = Gauges::default();
    process::observe(&mut gauges);
    gauges.set("crisp_build_info", "Always 1; which version runs.", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    observe(&mut gauges);
    let registry = Registry::new();
    gauges.register(&registry).map_err(broken)?;
    let mut families = meters::registry().gather();
    families.extend(registry.gather());
    TextEncoder::new().encode_to_string(&families).map_err(broken)
}

fn broken(error: prometheus::Error) -> Error {
    Error::internal(format!("write the metrics: {error}"))
}
