//! What is counted when it happens. There is one set for the process: threads and modules that count need no handle.

use std::collections::HashMap;
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use prometheus::core::Collector;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::error::Code;
use crate::sys::lock::{Lock, Rank};

/// gRPC has codes 0 to 16.
const CODES: usize = 17;
/// Seconds: lists take a millisecond, starts tens of them, a stop with its grace half a minute.
const CALL_BUCKETS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];
/// Seconds of one run of one plugin.
const CNI_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Seconds of one pull.
const PULL_BUCKETS: &[f64] = &[0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0];

static METERS: LazyLock<Meters> = LazyLock::new(Meters::new);

struct Meters {
    registry: Registry,
    calls: IntCounterVec,
    call_durations: HistogramVec,
    methods: Lock<HashMap<&'static str, &'static CallMeter>>,
    refused: IntCounterVec,
    pulls: IntCounterVec,
    pull_durations: Histogram,
    pull_bytes: IntCounter,
    pull_resumes: IntCounter,
    pulls_running: IntGauge,
    layers_unpacked: IntCounter,
    unpacked_bytes: IntCounter,
    shim_starts: IntCounterVec,
    shim_deaths: IntCounter,
    cni: HistogramVec,
    events_dropped: IntCounter,
    sessions: IntGaugeVec,
    sessions_total: IntCounterVec,
}

/// Names and labels are constants, and a test makes and writes them all.
fn known<T>(made: prometheus::Result<T>) -> T {
    made.expect("valid names and labels")
}

impl Meters {
    fn new() -> Meters {
        let registry = Registry::new();
        fn kept<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
            let made = known(made);
            known(registry.register(Box::new(made.clone())));
            made
        }
        let counters = |name: &str, help: &str, labels: &[&str]| kept(&registry, IntCounterVec::new(Opts::new(name, help), labels));
        let counter = |name: &str, help: &str| kept(&registry, IntCounter::new(name, help));
        let durations = |name: &str, help: &str, buckets: &[f64], labels: &[&str]| {
            kept(&registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
        };
        Meters {
            calls: counters("crisp_calls_total", "Calls answered, by method and gRPC code.", &["method", "code"]),
            call_durations: durations(
                "crisp_call_duration_seconds",
                "Time from the begin of the work on a call to its answer, by method.",
                CALL_BUCKETS,
                &["method"],
            ),
            methods: Lock::new(Rank::Leaf, HashMap::new()),
            refused: counters("crisp_lane_refused_total", "Calls refused because the queue of their lane was full.", &["lane"]),
            pulls: counters("crisp_image_pulls_total", "Pulls that ended, by result: ok, or the reason of the failure.", &["result"]),
            pull_durations: kept(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new("crisp_image_pull_duration_seconds", "Time of a pull.").buckets(PULL_BUCKETS.to_vec()),
                ),
            ),
            pull_bytes: counter("crisp_image_pull_received_bytes_total", "Bytes of layers received from registries."),
            pull_resumes: counter("crisp_image_pull_resumes_total", "Downloads of layers that broke or stalled and were taken up again."),
            pulls_running: kept(&registry, IntGauge::new("crisp_image_pulls_running", "Pulls under way.")),
            layers_unpacked: counter("crisp_image_layers_unpacked_total", "Layers unpacked, of pulls and imports."),
            unpacked_bytes: counter("crisp_image_unpacked_bytes_total", "Bytes on disk of the layers unpacked."),
            shim_starts: counters("crisp_shim_starts_total", "Starts of containers under a shim, by result.", &["result"]),
            shim_deaths: counter("crisp_shim_deaths_total", "Shims that died and took their container with them."),
            cni: durations(
                "crisp_cni_duration_seconds",
                "Time of one run of one CNI plugin, by plugin, command and result.",
                CNI_BUCKETS,
                &["plugin", "command", "result"],
            ),
            events_dropped: counter("crisp_events_dropped_total", "Events that a subscriber was too slow to take."),
            sessions: kept(
                &registry,
                IntGaugeVec::new(Opts::new("crisp_streaming_sessions", "Streaming sessions under way, by kind."), &["kind"]),
            ),
            sessions_total: counters("crisp_streaming_sessions_total", "Streaming sessions begun, by kind.", &["kind"]),
            registry,
        }
    }
}

/// Everything that is counted.
pub(super) fn registry() -> &'static Registry {
    &METERS.registry
}

fn result(ok: bool) -> &'static str {
    if ok {
        "ok"
    } else {
        "error"
    }
}

/// What one method's calls are counted with. Series exist from the first call on.
pub struct CallMeter {
    method: &'static str,
    codes: [OnceLock<IntCounter>; CODES],
    duration: OnceLock<Histogram>,
}

/// The meter of a method; ask once and keep it.
pub fn call_meter(method: &'static str) -> &'static CallMeter {
    METERS.methods.lock().entry(method).or_insert_with(|| {
        // As many as there are methods, for the life of the process.
        Box::leak(Box::new(CallMeter { method, codes: [const { OnceLock::new() }; CODES], duration: OnceLock::new() }))
    })
}

impl CallMeter {
    /// Counts an answer.
    pub fn record(&self, code: Code, took: Duration) {
        if let Some(counter) = self.codes.get(code as usize) {
            counter.get_or_init(|| METERS.calls.with_label_values(&[self.method, code.name()])).inc();
        }
        self.duration.get_or_init(|| METERS.call_durations.with_label_values(&[self.method])).observe(took.as_secs_f64());
    }
}

/// A call found the queue of its lane full.
pub fn lane_refused(lane: &'static str) {
    METERS.refused.with_label_values(&[lane]).inc();
}

/// A pull that runs for as long as this is kept.
pub struct Pull {
    begin: Instant,
}

/// Counts a pull that begins now.
pub fn image_pull() -> Pull {
    METERS.pulls_running.inc();
    Pull { begin: Instant::now() }
}

impl Pull {
    /// It has ended: `ok`, or the reason why not.
    pub fn ended(self, result: &'static str) {
        METERS.pulls.with_label_values(&[result]).inc();
        METERS.pull_durations.observe(self.begin.elapsed().as_secs_f64());
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        METERS.pulls_running.dec();
    }
}

/// A layer was made, with so many bytes on disk.
pub fn layer_unpacked(bytes: u64) {
    METERS.layers_unpacked.inc();
    METERS.unpacked_bytes.inc_by(bytes);
}

/// Bytes of a layer came from a registry.
pub fn pull_received(bytes: u64) {
    METERS.pull_bytes.inc_by(bytes);
}

/// A layer's download is taken up again.
pub fn pull_resumed() {
    METERS.pull_resumes.inc();
}

/// A container was started, or was not.
pub fn shim_started(ok: bool) {
    METERS.shim_starts.with_label_values(&[result(ok)]).inc();
}

/// A shim was found dead with its container unfinished.
pub fn shim_died() {
    METERS.shim_deaths.inc();
}

/// A CNI plugin has run.
pub fn cni_ran(plugin: &str, command: &str, ok: bool, took: Duration) {
    METERS.cni.with_label_values(&[plugin, command, result(ok)]).observe(took.as_secs_f64());
}

/// So many events were dropped for a slow subscriber.
pub fn events_dropped(count: u64) {
    METERS.events_dropped.inc_by(count);
}

/// A streaming session of `kind` (exec, attach, port_forward) for as long as this is kept.
pub struct Session(IntGauge);

/// Counts a session that begins now.
pub fn streaming_session(kind: &'static str) -> Session {
    METERS.sessions_total.with_label_values(&[kind]).inc();
    let gauge = METERS.sessions.with_label_values(&[kind]);
    gauge.inc();
    Session(gauge)
}

impl Drop for Session {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_end() {
        let gauge = METERS.sessions.with_label_values(&["test"]);
        let (one, two) = (streaming_session("test"), streaming_session("test"));
        assert_eq!(gauge.get(), 2);
        drop(one);
        drop(two);
        assert_eq!((gauge.get(), METERS.sessions_total.with_label_values(&["test"]).get()), (0, 2));
    }

    #[test]
    fn calls_by_code() {
        let meter = call_meter("TestOnly");
        assert!(std::ptr::eq(meter, call_meter("TestOnly")));
        meter.record(Code::Ok, Duration::from_millis(2));
        meter.record(Code::NotFound, Duration::from_millis(4));
        meter.record(Code::Ok, Duration::from_millis(6));
        let counted = |code: &str| METERS.calls.with_label_values(&["TestOnly", code]).get();
        assert_eq!((counted("OK"), counted("NOT_FOUND"), counted("INTERNAL")), (2, 1, 0));
        let histogram = METERS.call_durations.with_label_values(&["TestOnly"]);
        assert_eq!(histogram.get_sample_count(), 3);
        assert!((histogram.get_sample_sum() - 0.012).abs() < 1e-9);
    }
}
