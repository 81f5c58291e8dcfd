//! The gRPC face of the daemon: one unix socket, the CRI under both its package names, our own admin service. The
//! completion-queue threads decode and enqueue, nothing else; calls run on the workers of two lanes.

/// From an arrived request to its answer: panics, status, the log line.
mod call;
/// Bounded queues with worker threads.
mod lane;
/// One handler per method, generated from the service tables.
mod register;
/// Answers that have not left yet.
mod way;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use grpcio::{ChannelBuilder, ResourceQuota, ServerBuilder, ServerCredentials};

use crate::error::{Context, Error, Result};
use crate::service::Service;
use crate::telemetry::Gauges;
use lane::Lane;

/// Requests may be this large; clients receive 16 MiB at most, but send more (contract.md).
const REQUEST_LIMIT: i32 = 64 << 20;
/// Workers of the fast lane: its calls read memory only, so more of them than cores would only wait for each other.
const FAST_WORKERS: usize = 4;

/// What the last answers get to reach their clients, and clients that go by themselves to do so.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// What the server needs to know.
pub struct Settings {
    pub socket: PathBuf,
    /// Group of the socket, which gets mode 0660 then; else 0600.
    pub group: Option<u32>,
    pub slow_threads: usize,
    pub queue: usize,
}

/// The two lanes: a hundred stuck slow calls never delay a list.
pub(crate) struct Lanes {
    fast: Arc<Lane>,
    slow: Arc<Lane>,
}

/// A listening server.
pub struct Server {
    lanes: Arc<Lanes>,
    inner: grpcio::Server,
    socket: PathBuf,
}

impl Server {
    /// Binds the socket and serves. A stale socket is replaced; a living daemon on it is an error.
    pub fn start(settings: Settings, service: Arc<Service>) -> Result<Server> {
        claim_socket(&settings.socket)?;
        let env = Arc::new(grpcio::EnvBuilder::new().cq_count(2).name_prefix("grpc").build());
        let lanes = Arc::new(Lanes {
            fast: Lane::new("fast", FAST_WORKERS, settings.queue),
            slow: Lane::new("slow", settings.slow_threads, settings.queue),
        });
        let quota = ResourceQuota::new(Some("crispd")).resize_memory(256 << 20);
        let channel = ChannelBuilder::new(env.clone()).max_receive_message_len(REQUEST_LIMIT).max_send_message_len(-1);
        let mut builder = ServerBuilder::new(env).channel_args(channel.set_resource_quota(quota).build_args());
        for service in register::services(service, &lanes) {
            builder = builder.register_service(service);
        }
        let mut inner = builder.build().map_err(|e| Error::internal(format!("build the gRPC server: {e}")))?;
        bind(&mut inner, &settings)?;
        inner.start();
        Ok(Server { lanes, inner, socket: settings.socket })
    }

    /// What to ask at each scrape of the metrics.
    pub fn observer(&self) -> impl Fn(&mut Gauges) + Send + 'static {
        let lanes = self.lanes.clone();
        move |gauges| {
            for (name, lane) in [("fast", &lanes.fast), ("slow", &lanes.slow)] {
                let (queued, workers, busy) = lane.load();
                let lane = [("lane", name)];
                gauges.set("crisp_lane_queued_calls", "Calls that wait for a worker of their lane.", &lane, queued as f64);
                gauges.set("crisp_lane_workers", "Workers of a lane.", &lane, workers as f64);
                gauges.set("crisp_lane_busy_workers", "Workers of a lane that are at work.", &lane, busy as f64);
            }
        }
    }

    /// Refuses new calls, lets running ones end for `grace`, cancels the rest and closes the connections. Containers do not notice.
    pub fn stop(mut self, grace: Duration) {
        let _ = crate::sys::file::remove_file(&self.socket);
        let done = self.inner.shutdown();
        let (tx, rx) = crossbeam_channel::bounded(1);
        let waiter = crate::sys::thread::spawn("grpc-stop", move || {
            let _ = futures_executor::block_on(done);
            let _ = tx.send(());
        });
        if waiter.is_err() {
            return;
        }
        // Not for the clients: an idle one may stay connected for as long as it likes.
        let end = Instant::now() + grace;
        if !(self.lanes.slow.wait_until_idle(end) && self.lanes.fast.wait_until_idle(end)) {
            log::warn!("calls still run {} s after the stop, cancelled", grace.as_secs());
        }
        if rx.recv_timeout(LAST_ANSWERS).is_err() {
            self.inner.cancel_all_calls();
            let _ = rx.recv_timeout(grace);
        }
    }
}

/// Removes a socket file nobody listens on.
fn claim_socket(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    if let Some(dir) = path.parent() {
        crate::sys::file::make_dir(dir, 0o711)?;
    }
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context(|| format!("socket {}", path.display())),
        Ok(meta) if !meta.file_type().is_socket() => {
            Err(Error::precondition(format!("socket {}: the path is there and is not a socket", path.display())))
        }
        Ok(_) => match crate::sys::socket::connect(path) {
            Ok(_) => Err(Error::precondition(format!("socket {}: another daemon lives on it", path.display()))),
            Err(_) => crate::sys::file::remove_file(path),
        },
    }
}

/// Binds in a directory that is ours alone and moves the socket into place once its mode is right: the library makes it with
/// the mode that the process's umask leaves, and a umask changed for that moment would reach the files of every other thread.
fn bind(server: &mut grpcio::Server, settings: &Settings) -> Result<()> {
    use std::os::unix::fs::{chown, PermissionsExt};
    let path = &settings.socket;
    let name = path.file_name().ok_or_else(|| Error::invalid(format!("socket {}: names no file", path.display())))?;
    let private = path.with_file_name(format!(".{}", name.to_string_lossy()));
    let fresh = private.join("s");
    crate::sys::file::make_dir(&private, 0o700)?;
    let bound = server.add_listening_port(format!("unix:{}", fresh.display()), ServerCredentials::insecure());
    let placed = bound.map_err(|e| Error::internal(format!("listen on {}: {e}", path.display()))).and_then(|_| {
        let mode = if settings.group.is_some() { 0o660 } else { 0o600 };
        chown(&fresh, None, settings.group).context(|| format!("give {} to its group", path.display()))?;
        std::fs::set_permissions(&fresh, PermissionsExt::from_mode(mode)).context(|| format!("chmod {}", path.display()))?;
        std::fs::rename(&fresh, path).context(|| format!("move the socket to {}", path.display()))
    });
    let cleared = std::fs::remove_dir_all(&private).context(|| format!("remove {}", private.display()));
    placed.and(cleared)
}
