//! The composition root: builds everything, restores, serves, stops in order.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use crate::cgroup::{warm::Warmer, Layout};
use crate::check;
use crate::config::{self, Config, Overrides};
use crate::container::{self, Containers};
use crate::error::{Context, Error, Result};
use crate::event::{Bus, Listener};
use crate::grpc;
use crate::image::{self, Images};
use crate::network::{self, Network};
use crate::runtime::Handlers;
use crate::sandbox::{self, Sandboxes};
use crate::selinux::SeLinux;
use crate::service::{Fact, Seats, Service};
use crate::snapshot::{Kind, Mapping, Snapshotter};
use crate::stats::filesystem::{self, Disk};
use crate::stats::metrics::Metrics;
use crate::stats::sampler::Sampler;
use crate::streaming;
use crate::sys::file;
use crate::sys::watch::Watcher;
use crate::telemetry::Endpoint;

/// Time that running calls get at a stop.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// Clients that hold a worker for as long as they like get this part of them, for events and for lists each.
const PATIENT_SHARE: usize = 8;
/// Time that streaming sessions get to say goodbye.
const STREAMING_GRACE: Duration = Duration::from_secs(3);

/// A running daemon. Dropping it leaves the containers running.
pub struct Daemon {
    server: Option<grpc::Server>,
    network: Arc<Network>,
    watcher: Watcher,
    events: Arc<Bus<Fact>>,
    disk: Arc<Disk>,
    endpoint: Option<Endpoint>,
    streaming: Arc<streaming::Server>,
    _locks: Vec<std::fs::File>,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(config: Config, file: Option<PathBuf>, overrides: Overrides) -> Result<()> {
    // Before any thread: all of them inherit the mask, this one takes the signals.
    let signals = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect::<SigSet>();
    signals.thread_block().context(|| "block signals")?;
    crate::sys::process::tame_malloc();
    start_log(config.log_level);
    let mut daemon = Daemon::start(&config)?;
    log::info!("crispd {} serves CRI on {}", env!("CARGO_PKG_VERSION"), config.socket.display());
    loop {
        match signals.wait().context(|| "wait for signals")? {
            Signal::SIGHUP => match Config::load(file.as_deref(), &overrides) {
                Ok(new) => daemon.reload(&new),
                Err(e) => log::error!("SIGHUP: {e}; the old configuration stays"),
            },
            signal => {
                log::info!("{signal}: stopping, containers keep running");
                daemon.stop();
                return Ok(());
            }
        }
    }
}

fn start_log(level: log::LevelFilter) {
    let mut builder = env_logger::Builder::new();
    // The filter is log's own maximum, so that SIGHUP can change it.
    builder
        .filter_level(log::LevelFilter::Trace)
        .filter_module("ureq", log::LevelFilter::Warn)
        .filter_module("rustls", log::LevelFilter::Warn);
    builder.format(|out, record| {
        use std::io::Write;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        writeln!(out, "{}.{:03} {:5} {}", now.as_secs(), now.subsec_millis(), record.level(), record.args())
    });
    let _ = builder.try_init();
    log::set_max_level(level);
}

impl Daemon {
    /// Builds the managers, brings back what a former daemon left, then listens.
    pub fn start(config: &Config) -> Result<Daemon> {
        file::make_dir(&config.root, 0o711)?;
        file::make_dir(&config.run, 0o711)?;
        // The CNI cache too: what another daemon has in it would look like left-overs to us.
        file::make_dir(&config.cni.cache_dir, 0o700)?;
        let locks = vec![lock(&config.root)?, lock(&config.run)?, lock(&config.cni.cache_dir)?];
        if !config.shim.is_file() {
            return Err(Error::precondition(format!(
                "shim: {} is not there (build it with make, or set shim in the configuration)",
                config.shim.display()
            )));
        }
        let layout = Layout::host()?;
        let watcher = Watcher::start("exits")?;
        let network = Network::start(network_settings(config))?;
        let images = Images::open(image_settings(config))?;
        let mut snapshots = snapshotter(config)?;
        let disk = Arc::new(Disk::start(disk_settings(config), snapshots.count_projects())?);
        let overlay = snapshots.kind() == Kind::Overlay;
        let mut host = container::host::detect()?;
        let selinux = selinux(config);
        host.selinux = selinux.is_some();
        if let Some(selinux) = &selinux {
            selinux.label_layers(&config.root.join("layers"))?;
        }
        let handlers = Handlers::probe(&config.runtimes, config.default_runtime.as_deref(), &config.run.join("probe"), &config.shim);
        for handler in config.runtimes.values() {
            file::make_dir(&handler.root, 0o700)?;
        }
        let patient = (config.limits.slow_threads / PATIENT_SHARE).max(1);
        let events = Bus::<Fact>::new(config.limits.event_queue, patient);
        let sandboxes =
            Arc::new(Sandboxes::open(sandbox_settings(config, selinux.clone(), events.clone()), network.clone(), watcher.clone())?);
        let settings = container_settings(config, host.clone(), selinux, events.clone(), disk.clone())?;
        let containers = Arc::new(Containers::open(settings, images.clone(), snapshots, watcher.clone())?);
        sandboxes.restore()?;
        containers.restore(|id| sandboxes.find(id).ok().flatten().is_some())?;
        if let Err(e) = images.collect() {
            log::error!("image: {e}");
        }
        let preload = images.clone();
        let dir = config.images.preload_dir.clone();
        crate::sys::thread::spawn("preload", move || preload.preload(&dir))?;
        let metrics = Metrics::new(&config.stats.groups, layout, config.root.join("snapshots"), disk.clone());
        let layers_mountpoint = images.fs_info((0, 0)).container.mountpoint.to_string_lossy().into_owned();
        let streaming = Arc::new(streaming::Server::start(&config.streaming, containers.clone())?);
        let service = Arc::new(Service {
            metrics,
            sandboxes,
            containers,
            images,
            network: network.clone(),
            handlers,
            warmer: Warmer::start(layout)?,
            disk: disk.clone(),
            layers_mountpoint,
            sampler: Sampler::new(config.stats.threads),
            streaming: streaming.clone(),
            systemd_cgroup: config.systemd_cgroup,
            root: config.root.clone(),
            run: config.run.clone(),
            config: describe(config),
            host,
            check: OnceLock::new(),
            events: events.clone(),
            lists: Seats::new(patient),
        });
        look_around(config, service.clone(), overlay)?;
        let settings = grpc::Settings {
            socket: config.socket.clone(),
            group: config.socket_group,
            slow_threads: config.limits.slow_threads,
            queue: config.limits.queue,
        };
        let server = grpc::Server::start(settings, service.clone())?;
        let endpoint = config.metrics.address.map(|address| endpoint(address, &server, service)).transpose()?;
        Ok(Daemon { server: Some(server), network, watcher, streaming, events, disk, endpoint, _locks: locks })
    }

    /// What SIGHUP can change: log level and CNI configuration. Registry certificates are read for each pull anyway.
    fn reload(&self, config: &Config) {
        log::set_max_level(config.log_level);
        if let Err(e) = self.network.reload() {
            log::error!("SIGHUP: {e}");
        }
        log::info!("SIGHUP: configuration reloaded (log level, CNI; the rest needs a restart)");
    }

    /// Ends calls, not containers.
    pub fn stop(&mut self) {
        // They would not end by themselves.
        self.events.close();
        self.streaming.begin_stop();
        if let Some(server) = self.server.take() {
            server.stop(STOP_GRACE);
        }
        self.streaming.stop(STREAMING_GRACE);
        // Records belong to whoever has the locks: exits from here on are for the next daemon to find.
        self.watcher.stop();
        self.endpoint = None;
        self.disk.stop();
    }
}

/// Has a thread find out what verbose Status tells of the host; nobody waits for it, and nothing is tried again that the start has tried.
fn look_around(config: &Config, service: Arc<Service>, overlay: bool) -> Result<()> {
    let config = config.clone();
    crate::sys::thread::spawn("check", move || {
        let known = check::Known { host: &service.host, handlers: &service.handlers, overlay };
        let report = check::look(&config, Some(&known));
        for finding in report.findings.iter().filter(|finding| finding.state == check::State::Warn) {
            log::debug!("check: {} {}: {}", finding.topic, finding.name, finding.found);
        }
        let _ = service.check.set(report);
    })?;
    Ok(())
}

fn endpoint(address: SocketAddr, server: &grpc::Server, service: Arc<Service>) -> Result<Endpoint> {
    let lanes = server.observer();
    let endpoint = Endpoint::start(address, move |gauges| {
        lanes(gauges);
        service.observe(gauges);
    })?;
    log::info!("metrics are served on http://{}/metrics", endpoint.address());
    Ok(endpoint)
}

/// One daemon per directory.
fn lock(dir: &Path) -> Result<std::fs::File> {
    let path = dir.join("lock");
    let file =
        std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).context(|| format!("open {}", path.display()))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(Error::precondition(format!("{} belongs to another crispd that is running", dir.display())))
        }
        Err(e) => Err(e).context(|| format!("lock {}", path.display())),
    }
}

fn network_settings(config: &Config) -> network::Settings {
    network::Settings {
        conf_dir: config.cni.conf_dir.clone(),
        bin_dirs: config.cni.bin_dirs.clone(),
        cache_dir: config.cni.cache_dir.clone(),
        plugin_timeout: config.cni.plugin_timeout,
        template: config.cni.conf_template.clone(),
        max_networks: 16,
    }
}

fn registry_settings(config: &Config) -> image::RegistrySettings {
    image::RegistrySettings {
        certs_dir: Some(config.images.registry_dir.clone()),
        plain_http: config.images.plain_http.clone(),
        stall: config.images.stall,
        credentials: image::Sources {
            hosts: config.images.auth.iter().map(|(host, auth)| (host.clone(), registry_auth(auth))).collect(),
            docker_config: config.images.docker_config.clone(),
            ..Default::default()
        },
        foreign_layers: config.images.foreign_layers,
        ..Default::default()
    }
}

fn registry_auth(auth: &config::RegistryAuth) -> image::Auth {
    image::Auth {
        username: auth.username.clone(),
        password: auth.password.clone(),
        auth: auth.auth.clone(),
        server_address: String::new(),
        identity_token: auth.identity_token.clone(),
        registry_token: auth.registry_token.clone(),
    }
}

fn image_settings(config: &Config) -> image::Settings {
    let mut settings = image::Settings::new(&config.root);
    settings.pinned = config.images.pinned.clone();
    settings.pinned.extend(config.sandbox_image.clone());
    settings.bounds.layer_workers = config.images.layer_downloads;
    settings.bounds.all_layers = config.images.all_downloads;
    settings.bounds.keep_free = config.images.keep_free_percent;
    settings.registry = registry_settings(config);
    settings.verifiers = image::Verifiers {
        dir: config.images.verifier_dir.clone(),
        timeout: config.images.verifier_timeout,
        max: config.images.max_verifiers,
    };
    settings
}

fn snapshotter(config: &Config) -> Result<Snapshotter> {
    let mut snapshots = match config.snapshotter {
        config::Snapshotter::Auto => Snapshotter::detect(&config.root),
        config::Snapshotter::Overlay => Snapshotter::new(&config.root, Kind::Overlay),
        config::Snapshotter::Copy => Snapshotter::new(&config.root, Kind::Copy),
    }?;
    if config.volatile_layers {
        snapshots.allow_volatile();
    }
    snapshots.set_mapping(match config.userns_rootfs {
        config::UsernsRootfs::Auto => Mapping::Auto,
        config::UsernsRootfs::Idmap => Mapping::Idmap,
        config::UsernsRootfs::Chown => Mapping::Chown,
    });
    Ok(snapshots)
}

fn sandbox_settings(config: &Config, selinux: Option<SeLinux>, events: Arc<dyn Listener<sandbox::Change>>) -> sandbox::Settings {
    sandbox::Settings {
        root: config.root.clone(),
        run: config.run.clone(),
        netns_dir: config.netns_dir.clone(),
        shim: config.shim.clone(),
        systemd_cgroup: config.systemd_cgroup,
        sysctls: config.sysctls.clone(),
        extra_networks: config.cni.extra_networks,
        selinux,
        events,
    }
}

/// None unless it is switched on, and there.
fn selinux(config: &Config) -> Option<SeLinux> {
    if !config.selinux {
        return None;
    }
    let found = SeLinux::detect(Path::new("/sys/fs/selinux"), Path::new("/etc/selinux"));
    if found.is_none() {
        log::warn!("selinux = true, and the kernel has it not enabled: containers get no labels");
    }
    found
}

fn disk_settings(config: &Config) -> filesystem::Settings {
    filesystem::Settings { interval: Duration::from_secs(config.stats.disk_interval), files_per_second: config.stats.disk_files_per_second }
}

fn container_settings(
    config: &Config,
    host: crate::spec::HostFacts,
    selinux: Option<SeLinux>,
    events: Arc<dyn Listener<container::Change>>,
    layers: Arc<Disk>,
) -> Result<container::Settings> {
    let resources = &config.resources;
    Ok(container::Settings {
        root: config.root.clone(),
        run: config.run.clone(),
        shim: config.shim.clone(),
        runtime_timeout: config.limits.runtime_timeout,
        exec_output: config.limits.exec_output,
        kill_on_disconnect: config.streaming.kill_on_disconnect,
        defaults: crate::spec::Defaults {
            pids_limit: resources.pids_limit,
            rlimits: resources.rlimits.clone(),
            annotations: config.allowed_annotations.clone(),
        },
        classes: container::Classes {
            block_io: resources.blockio_classes.as_deref().map(container::blockio::BlockIoClasses::load).transpose()?,
            rdt: resources.rdt_classes,
            ignore_unconfigured: resources.ignore_unconfigured_classes,
        },
        host,
        selinux,
        events,
        layers,
        cdi: crate::cdi::Registry::new(config.cdi_spec_dirs.clone()),
        hooks: crate::hooks::Directories::new(config.hooks_dirs.clone()),
    })
}

/// The configuration for the admin service; there are no secrets in it.
fn describe(config: &Config) -> String {
    serde_json::json!({
        "socket": config.socket,
        "root": config.root,
        "run": config.run,
        "shim": config.shim,
        "cgroup_driver": if config.systemd_cgroup { "systemd" } else { "cgroupfs" },
        "cni": {"conf_dir": config.cni.conf_dir, "bin_dirs": config.cni.bin_dirs, "cache_dir": config.cni.cache_dir},
        "images": {"registry_dir": config.images.registry_dir, "preload_dir": config.images.preload_dir},
    })
    .to_string()
}
