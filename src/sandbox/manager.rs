//! Run, stop, remove, restore. Whatever a sandbox has is undone by `release`, which knows no shortcut: after a failed run,
//! in stop and remove, and for what a killed daemon left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::levels::{Level, Levels};
use super::metadata::Metadata;
use super::resources::Resources;
use super::status::{Phase, Process, Status};
use super::{attachment, files, namespaces, validate};
use crate::api::runtime::PodSandboxConfig;
use crate::cgroup::path::is_slice;
use crate::error::{Context, Error, ErrorList, Result};
use crate::event::{self, Kind, Listener};
use crate::network::{Attachment, Network};
use crate::selinux::SeLinux;
use crate::spec::selinux;
use crate::store::names::Making;
use crate::store::{new_id, now_ns, record::Restored, Claim, Index, Names, Records};
use crate::sys::cancel::Cancel;
use crate::sys::crash;
use crate::sys::label;
use crate::sys::lock::{Lock, Rank};
use crate::sys::namespace;
use crate::sys::pidfd::PidFd;
use crate::sys::watch::{Keep, Watcher};
use serde::{Deserialize, Serialize};

/// Annotation with conflist names, comma-separated, of networks beside the default one.
pub const NETWORKS_ANNOTATION: &str = "crisp.dev/networks";

/// What the manager needs to know.
pub struct Settings {
    pub root: PathBuf,
    pub run: PathBuf,
    pub netns_dir: PathBuf,
    pub shim: PathBuf,
    pub systemd_cgroup: bool,
    /// Defaults for sandboxes with a network namespace.
    pub sysctls: BTreeMap<String, String>,
    pub extra_networks: bool,
    /// None: SELinux is off.
    pub selinux: Option<SeLinux>,
    pub events: Arc<dyn Listener<Change>>,
}

/// What a new sandbox will be, its sysctls, and the SELinux level it holds.
type Prepared = (Metadata, Vec<(String, String)>, Option<Level>);

/// A step in the life of a sandbox.
pub type Change = event::Change<Sandbox, Status>;

/// One sandbox.
pub struct Sandbox {
    pub meta: Metadata,
    pub config: PodSandboxConfig,
    pub(super) usage: super::usage::Usage,
    /// Its SELinux level, taken from others as long as the sandbox is there.
    level: Option<Level>,
    status: Lock<Status>,
    /// Its stop has begun and was not told to have ended. Changes under the status lock.
    stopping: AtomicBool,
    /// Held across a transition, never across a wait.
    pub op: Lock<()>,
}

impl Sandbox {
    fn new(meta: Metadata, config: PodSandboxConfig, status: Status, level: Option<Level>) -> Sandbox {
        let (status, op) = (Lock::new(Rank::Status, status), Lock::new(Rank::SandboxOp, ()));
        Sandbox { meta, config, usage: Default::default(), level, status, stopping: AtomicBool::new(false), op }
    }

    /// Ready only while its network namespace is there, which others could take away: one statfs(2) tells.
    pub fn status(&self) -> Status {
        let mut status = self.status.lock().clone();
        if status.is_ready() && self.meta.netns.as_deref().is_some_and(|pin| !namespace::is_pinned(pin)) {
            status.phase = Phase::NotReady;
            status.reason = "its network namespace is gone".to_owned();
        }
        status
    }

    pub fn id(&self) -> &str {
        &self.meta.id
    }

    /// Its SELinux level, "" without SELinux.
    pub fn level(&self) -> &str {
        self.level.as_ref().map_or("", Level::as_str)
    }
}

#[derive(Serialize)]
struct RecordOut<'a> {
    metadata: &'a Metadata,
    status: &'a Status,
}

#[derive(Deserialize)]
struct RecordIn {
    metadata: Metadata,
    status: Status,
}

/// Which namespace of a sandbox is not pinned any more: after a reboot none is, and a sandbox on the host's network has no
/// netns to tell. One without any namespace of its own is told by its files, which go the same way.
fn lost_namespace(meta: &Metadata) -> Option<&'static str> {
    let gone = |pin: Option<&Path>| pin.is_some_and(|pin| !namespace::is_pinned(pin));
    if gone(meta.netns.as_deref()) {
        return Some("its network namespace is gone");
    }
    if gone(meta.ipc_pin().as_deref()) || gone(meta.uts_pin().as_deref()) || gone(meta.user_pin().as_deref()) {
        return Some("its namespaces are gone");
    }
    (!meta.file("hosts").exists()).then_some("its files are gone")
}

fn said_of(config: &PodSandboxConfig) -> Resources<'_> {
    Resources { overhead: config.linux.overhead.as_ref(), resources: config.linux.resources.as_ref() }
}

/// All sandboxes.
pub struct Sandboxes {
    settings: Settings,
    records: Records,
    names: Names,
    index: Index<Sandbox>,
    network: Arc<Network>,
    watcher: Watcher,
    levels: Levels,
}

impl Sandboxes {
    pub fn open(settings: Settings, network: Arc<Network>, watcher: Watcher) -> Result<Sandboxes> {
        let records = Records::open(&settings.root, "sandboxes")?;
        crate::sys::file::make_dir(&settings.run.join("sandboxes"), 0o711)?;
        Ok(Sandboxes {
            settings,
            records,
            names: Names::new("sandbox"),
            index: Index::new("sandbox"),
            network,
            watcher,
            levels: Levels::default(),
        })
    }

    pub fn get(&self, id: &str) -> Result<Arc<Sandbox>> {
        self.index.get(id)
    }

    pub fn find(&self, id: &str) -> Result<Option<Arc<Sandbox>>> {
        self.index.find(id)
    }

    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.index.all()
    }

    /// RunPodSandbox with the handler already resolved. An equal call that is still running is joined.
    pub fn run(self: &Arc<Self>, config: PodSandboxConfig, handler: &str, requested_handler: &str, cancel: &Cancel) -> Result<String> {
        let m = validate::metadata(&config)?;
        let name = format!("{}_{}_{}_{}", m.name, m.namespace, m.uid, m.attempt);
        let mut request = protobuf::Message::write_to_bytes(&config).context(|| "encode the sandbox config")?;
        let config_bytes = request.len();
        request.extend_from_slice(requested_handler.as_bytes());
        let id = new_id()?;
        match self.names.claim(&name, &id, &request, cancel)? {
            Claim::Made(id) => {
                let still_ready = self.index.find(&id)?.is_some_and(|s| s.status.lock().is_ready());
                if still_ready {
                    Ok(id)
                } else {
                    Err(self.names.taken(&name, &id))
                }
            }
            Claim::Make(making) => self.make(making, id, name, config, &request[..config_bytes], handler, requested_handler),
        }
    }

    #[allow(clippy::too_many_arguments)] // the facts of one new sandbox, each used once
    fn make(
        self: &Arc<Self>,
        making: Making,
        id: String,
        name: String,
        config: PodSandboxConfig,
        config_bytes: &[u8],
        handler: &str,
        requested_handler: &str,
    ) -> Result<String> {
        let mut status = Status::new();
        let said = said_of(&config).put(&mut status);
        let prepared = said.and_then(|()| self.prepare(id, name, &config, handler, requested_handler));
        let (meta, sysctls, level) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => {
                making.finish(Err(e.clone()), false);
                return Err(e);
            }
        };
        let sandbox = Arc::new(Sandbox::new(meta, config, status, level));
        let id = sandbox.id().to_owned();
        let result = self.build(&sandbox, config_bytes, sysctls);
        let Err(error) = result else {
            self.index.insert(&id, sandbox);
            making.finish(Ok(id.clone()), false);
            return Ok(id);
        };
        let announced = sandbox.status.lock().is_ready();
        if announced {
            self.note(&sandbox, |s| s.phase = Phase::NotReady);
        }
        let keep = match self.release(&sandbox).and_then(|()| self.unrecord(&sandbox)) {
            Ok(()) => {
                if announced {
                    let status = sandbox.status.lock();
                    self.tell(&sandbox, Kind::Deleted, Some(&status), None);
                }
                false
            }
            Err(undo) => {
                // kubelet sees a sandbox that is not ready and stops it again: that retries the undo.
                log::error!("sandbox {id}: undo of a failed run: {undo}");
                self.note(&sandbox, |s| {
                    s.phase = Phase::NotReady;
                    s.reason = format!("{error}; undo: {undo}");
                });
                self.index.insert(&id, sandbox);
                true
            }
        };
        making.finish(Err(error.clone()), keep);
        Err(error)
    }

    /// Checks the config and decides what the sandbox will be; makes nothing.
    fn prepare(&self, id: String, name: String, config: &PodSandboxConfig, handler: &str, requested: &str) -> Result<Prepared> {
        let ns = validate::namespaces(config)?;
        let linux = config.linux.as_ref();
        said_of(config).check().context(|| "linux")?;
        let mut sysctls: BTreeMap<String, String> = BTreeMap::new();
        if !ns.host_network {
            for (key, value) in &self.settings.sysctls {
                let path = validate::sysctl_path(key)?;
                let value = validate::default_sysctl(&path, value, &ns);
                sysctls.insert(path, value);
            }
        }
        sysctls.extend(validate::sysctls(linux, &ns)?);
        let mut hostname = validate::hostname(config)?;
        if hostname.is_empty() {
            hostname = nix::unistd::gethostname().context(|| "read the host name")?.to_string_lossy().into_owned();
        }
        let asked = linux.map(|l| l.cgroup_parent.clone()).unwrap_or_default();
        if asked.split('/').any(|p| p == "..") || asked.contains('\0') {
            return Err(Error::invalid(format!("linux.cgroup_parent: expected a path without .., found {asked:?}")));
        }
        let own_cgroup_parent = asked.is_empty() && !self.settings.systemd_cgroup;
        let cgroup_parent = match (asked.is_empty(), self.settings.systemd_cgroup) {
            // Without a common parent: nobody has to remove one that another sandbox is just entering.
            (true, false) => format!("/crisp-{id}"),
            (true, true) => "crisp.slice".to_owned(),
            (false, true) if !is_slice(&asked) => {
                return Err(Error::invalid(format!("linux.cgroup_parent: the systemd driver expects a slice, found {asked:?}")));
            }
            // An OCI runtime would make a directory of the name, and nobody else look for it there.
            (false, false) if is_slice(&asked) => {
                let what = "linux.cgroup_parent: the cgroupfs driver (cgroup_driver of the configuration) takes no slice of systemd";
                return Err(Error::invalid(format!("{what}, found {asked:?}")));
            }
            (false, _) => asked,
        };
        let level = self.level(config)?;
        let meta = Metadata {
            name,
            handler: handler.to_owned(),
            requested_handler: requested.to_owned(),
            created_at: now_ns(),
            netns: (!ns.host_network).then(|| self.settings.netns_dir.join(format!("crisp-{id}"))),
            ipc: !ns.host_ipc,
            pid: ns.pid,
            userns: ns.userns,
            hostname,
            cgroup_parent,
            own_cgroup_parent,
            selinux_level: level.as_ref().map(|level| level.as_str().to_owned()).unwrap_or_default(),
            dir: self.settings.run.join("sandboxes").join(&id),
            id,
        };
        // Everything CNI would refuse is refused before anything is made.
        if meta.netns.is_some() {
            self.attachment(&meta, config)?;
        }
        Ok((meta, sysctls.into_iter().collect(), level))
    }

    /// The SELinux level of a new sandbox: the one asked for, else one of its own. What its containers will be labelled with is refused here
    /// if the policy does not know it.
    fn level(&self, config: &PodSandboxConfig) -> Result<Option<Level>> {
        let options = &config.linux.security_context.selinux_options;
        selinux::check(options).context(|| "linux.security_context")?;
        let Some(selinux) = &self.settings.selinux else { return Ok(None) };
        let level = match options.level.as_str() {
            "" => self.levels.choose(&selinux.policy.file.level)?,
            level => self.levels.take(level),
        };
        selinux.labels(options, level.as_str(), false).context(|| "linux.security_context")?;
        Ok(Some(level))
    }

    /// Labels what containers get of the sandbox's files.
    fn label(&self, sandbox: &Sandbox) -> Result<()> {
        let Some(selinux) = &self.settings.selinux else { return Ok(()) };
        let options = &sandbox.config.linux.security_context.selinux_options;
        let label = selinux::labels(&selinux.policy, options, sandbox.level(), false).mount;
        let meta = &sandbox.meta;
        let own_shm = meta.ipc.then(|| meta.shm());
        let files = ["hosts", "hostname", "resolv.conf"].map(|name| meta.file(name)).into_iter().chain(own_shm);
        files.into_iter().try_for_each(|path| label::set_tree(&path, label::SELINUX, &label))
    }

    /// Makes the sandbox step by step, each recorded before it is done.
    fn build(self: &Arc<Self>, sandbox: &Arc<Sandbox>, config_bytes: &[u8], sysctls: Vec<(String, String)>) -> Result<()> {
        let meta = &sandbox.meta;
        self.records.save_config(&meta.id, config_bytes)?;
        self.update(sandbox, |_| {})?;
        crash::step("run:1-recorded");
        files::create(meta, &sandbox.config)?;
        crash::step("run:2-files");
        let init = namespaces::create(meta, sysctls, &self.settings.shim)?;
        crash::step("run:3-namespaces");
        self.update(sandbox, |s| {
            s.init = init;
            s.network_ready = meta.netns.is_some();
        })?;
        crash::step("run:4-network-intent");
        let mut ips = Vec::new();
        if meta.netns.is_some() {
            // Not cancelled with the client: an abandoned run is finished, and handed to the retry. Plugins have their timeout.
            ips = self.network.setup(&self.attachment(meta, &sandbox.config)?, &Cancel::never())?.ips;
            files::write_hosts(meta, &ips)?;
        }
        // Only now: a file that is written again is a new one.
        self.label(sandbox)?;
        crash::step("run:5-network");
        self.update(sandbox, |s| {
            s.ips = ips;
            s.phase = Phase::Ready;
        })?;
        if let Some(init) = init {
            self.watch_init(sandbox, init)?;
        }
        crash::step("run:6-ready");
        Ok(())
    }

    /// What CNI must know of the sandbox.
    fn attachment(&self, meta: &Metadata, config: &PodSandboxConfig) -> Result<Attachment> {
        let extra = match config.annotations.get(NETWORKS_ANNOTATION) {
            Some(list) if self.settings.extra_networks => list.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect(),
            _ => Vec::new(),
        };
        attachment::build(meta, config, extra)
    }

    /// Changes the status and writes the record, both under the status lock: the file is never older than memory. An error changes nothing.
    pub fn update(&self, sandbox: &Arc<Sandbox>, change: impl FnOnce(&mut Status)) -> Result<()> {
        self.change(sandbox, change, false)
    }

    /// As `update`, for what goes or has gone: a full disk must not stand in the way of what empties it. A daemon that finds an older record
    /// sees what is there.
    fn note(&self, sandbox: &Arc<Sandbox>, change: impl FnOnce(&mut Status)) {
        if let Err(e) = self.change(sandbox, change, true) {
            log::error!("sandbox {}: {e}", sandbox.meta.id);
        }
    }

    fn change(&self, sandbox: &Arc<Sandbox>, change: impl FnOnce(&mut Status), happened: bool) -> Result<()> {
        let mut status = sandbox.status.lock();
        if status.gone {
            // What is still told of it is nobody's concern; the record would come back.
            return match happened {
                true => Ok(()),
                false => Err(Error::precondition(format!("sandbox {} is removed", sandbox.id()))),
            };
        }
        let mut next = status.clone();
        change(&mut next);
        let saved = self.records.save(&sandbox.meta.id, &RecordOut { metadata: &sandbox.meta, status: &next });
        if saved.is_err() && !happened {
            return saved;
        }
        // Under the lock that orders the changes.
        match (status.phase, next.phase) {
            (Phase::Making, Phase::Ready) => {
                self.tell(sandbox, Kind::Created, None, Some(&next));
                self.tell(sandbox, Kind::Started, Some(&next), Some(&next));
            }
            // What could not be undone is seen from here on.
            (Phase::Making, Phase::NotReady) => self.tell(sandbox, Kind::Created, None, Some(&next)),
            (Phase::Ready, Phase::NotReady) => {
                let stopping = sandbox.stopping.load(Ordering::SeqCst);
                self.tell(sandbox, if stopping { Kind::Stopping } else { Kind::Stopped }, Some(&status), Some(&next));
            }
            _ => {}
        }
        *status = next;
        saved
    }

    fn tell(&self, sandbox: &Arc<Sandbox>, kind: Kind, before: Option<&Status>, after: Option<&Status>) {
        if self.settings.events.is_listening() {
            let change = Change { kind, object: sandbox.clone(), before: before.cloned(), after: after.cloned() };
            self.settings.events.hear(change);
        }
    }

    /// First half of StopPodSandbox: from here on the sandbox takes no containers.
    pub fn begin_stop(&self, sandbox: &Arc<Sandbox>) {
        let _op = sandbox.op.lock();
        let ready = sandbox.status.lock().is_ready();
        if ready {
            self.note(sandbox, |s| {
                sandbox.stopping.store(s.is_ready(), Ordering::SeqCst);
                s.phase = Phase::NotReady;
            });
        }
        crash::step("stop-sandbox:1-stopping");
    }

    /// Its containers have stopped too: told once, after their ends.
    pub fn stopped(&self, sandbox: &Arc<Sandbox>) {
        let status = sandbox.status.lock();
        if sandbox.stopping.swap(false, Ordering::SeqCst) {
            self.tell(sandbox, Kind::Stopped, Some(&status), Some(&status));
        }
    }

    /// Second half, after the containers: network, namespaces, init. Every step runs; what failed is tried again by the next
    /// stop.
    pub fn finish_stop(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let _op = sandbox.op.lock();
        self.unplug(sandbox)
    }

    fn unplug(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let meta = &sandbox.meta;
        // A socket in the network namespace would keep it.
        sandbox.usage.close();
        let status = sandbox.status();
        let mut errors = ErrorList::default();
        let mut network_down = true;
        if status.network_ready {
            let down = self.attachment(meta, &sandbox.config).and_then(|a| self.network.teardown(&a));
            network_down = errors.keep(down.context(|| format!("tear down the network of sandbox {}", meta.id))).is_some();
        }
        crash::step("stop-sandbox:3-network");
        errors.keep(namespaces::remove(meta, status.init));
        if network_down {
            if let Some(netns) = &meta.netns {
                network_down = errors.keep(namespace::unpin(netns)).is_some();
            }
        }
        crash::step("stop-sandbox:4-namespaces");
        if errors.is_empty() && (status.network_ready || status.init.is_some()) {
            self.note(sandbox, |s| {
                s.network_ready = !network_down;
                s.init = None;
            });
        }
        errors.finish()
    }

    /// RemovePodSandbox after its containers are gone.
    pub fn remove(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let _op = sandbox.op.lock();
        let what = || format!("remove sandbox {}", sandbox.meta.id);
        if self.index.find(&sandbox.meta.id)?.is_none() {
            // Somebody else has done it meanwhile.
            return Ok(());
        }
        self.release(sandbox).context(what)?;
        crash::step("remove-sandbox:2-files");
        self.unrecord(sandbox).context(what)?;
        let status = sandbox.status.lock().clone();
        self.index.remove_and(&sandbox.meta.id, || self.tell(sandbox, Kind::Deleted, Some(&status), None));
        self.names.release(&sandbox.meta.name, &sandbox.meta.id);
        Ok(())
    }

    /// Removes the record. The exits thread may still hold the sandbox: it does not write it again.
    fn unrecord(&self, sandbox: &Sandbox) -> Result<()> {
        sandbox.status.lock().gone = true;
        self.records.remove(&sandbox.meta.id).inspect_err(|_| sandbox.status.lock().gone = false)
    }

    /// Undoes everything a sandbox may have but its record.
    fn release(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let mut errors = ErrorList::default();
        errors.keep(self.unplug(sandbox));
        if errors.is_empty() {
            errors.keep(files::remove(&sandbox.meta));
        }
        errors.finish()
    }

    /// The PID namespace of the sandbox, as a path: its init is started if it has none yet.
    pub fn pid_namespace(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<PathBuf> {
        let _op = sandbox.op.lock();
        // It may have been stopped, or removed, since the caller looked.
        sandbox.status().can_hold_containers(sandbox.id())?;
        let init = match sandbox.status().init {
            Some(init) => init,
            None => {
                let init = namespaces::start_init(&sandbox.meta, &self.settings.shim)?;
                if let Err(e) = self.update(sandbox, |s| s.init = Some(init)) {
                    namespaces::stop_init(init)?;
                    return Err(e);
                }
                self.watch_init(sandbox, init)?;
                init
            }
        };
        Ok(Path::new("/proc").join(init.pid.to_string()).join("ns/pid"))
    }

    /// A sandbox whose init dies is not ready any more.
    fn watch_init(self: &Arc<Self>, sandbox: &Arc<Sandbox>, init: Process) -> Result<()> {
        let Some(process) = PidFd::open_started(init.pid, init.start_time)? else {
            return Err(Error::internal(format!("init {} of sandbox {} is gone", init.pid, sandbox.meta.id)));
        };
        let (manager, weak) = (Arc::downgrade(self), Arc::downgrade(sandbox));
        let on_exit = move || {
            let (Some(manager), Some(sandbox)) = (manager.upgrade(), weak.upgrade()) else { return Keep::No };
            if let Ok(Some(process)) = PidFd::open_started(init.pid, init.start_time) {
                process.reap();
            }
            if sandbox.status.lock().is_ready() {
                manager.init_died(&sandbox, init);
            }
            Keep::No
        };
        self.watcher.add(format!("init of sandbox {}", sandbox.id()), process.into_fd(), Box::new(on_exit))
    }

    fn init_died(&self, sandbox: &Arc<Sandbox>, init: Process) {
        log::warn!("sandbox {}: its init {} has died", sandbox.meta.id, init.pid);
        self.note(sandbox, |s| {
            // It may have been stopped since we looked.
            if s.is_ready() {
                s.phase = Phase::NotReady;
                s.reason = "its init has died".to_owned();
            }
        });
    }

    /// Reads the records at start: half-made sandboxes are undone, the others come back as they are found.
    pub fn restore(self: &Arc<Self>) -> Result<()> {
        use rayon::prelude::*;
        let restored = self.records.load::<RecordIn>()?;
        restored.into_par_iter().for_each(|record| {
            let id = record.id.clone();
            if let Err(e) = self.restore_one(record) {
                log::error!("restore sandbox {id}: {e}");
            }
        });
        self.sweep()
    }

    fn restore_one(self: &Arc<Self>, restored: Restored<RecordIn>) -> Result<()> {
        let RecordIn { metadata: meta, status } = restored.record;
        let config: PodSandboxConfig = match protobuf::Message::parse_from_bytes(&restored.config) {
            Ok(config) => config,
            Err(e) => {
                self.records.set_aside(&meta.id, &Error::internal(format!("config: {e}")));
                return Ok(());
            }
        };
        let mut request = restored.config;
        request.extend_from_slice(meta.requested_handler.as_bytes());
        let level = (!meta.selinux_level.is_empty()).then(|| self.levels.take(&meta.selinux_level));
        let sandbox = Arc::new(Sandbox::new(meta, config, status.clone(), level));
        let meta = &sandbox.meta;
        if status.phase == Phase::Making {
            log::info!("sandbox {}: half made by a daemon that ended, undone", meta.id);
            match self.release(&sandbox).and_then(|()| self.unrecord(&sandbox)) {
                Ok(()) => return Ok(()),
                Err(undo) => self.note(&sandbox, |s| {
                    s.phase = Phase::NotReady;
                    s.reason = format!("undo: {undo}");
                }),
            }
        }
        let mut lost = lost_namespace(meta);
        if let Some(init) = status.init {
            let watched = match PidFd::open_started(init.pid, init.start_time) {
                Ok(Some(_)) if status.is_ready() => self.watch_init(&sandbox, init).is_ok(),
                found => matches!(found, Ok(Some(_))),
            };
            if !watched {
                lost = Some("its init is gone");
            }
        }
        if let Some(reason) = lost.filter(|_| status.is_ready()) {
            log::warn!("sandbox {}: {reason}", meta.id);
            self.note(&sandbox, |s| {
                s.phase = Phase::NotReady;
                s.reason = reason.to_owned();
            });
        }
        self.names.restore(&meta.name, &meta.id, &request);
        self.index.insert(&meta.id.clone(), sandbox);
        Ok(())
    }

    /// Removes what has no record: directories with their mounts and pins, network attachments.
    fn sweep(&self) -> Result<()> {
        let mut errors = ErrorList::default();
        let dir = self.settings.run.join("sandboxes");
        for entry in std::fs::read_dir(&dir).context(|| format!("list {}", dir.display()))?.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            if self.index.find(&id).ok().flatten().is_some() {
                continue;
            }
            log::warn!("sandbox {id}: left without a record, removed");
            let orphan = Metadata::orphan(&id, &dir, &self.settings.netns_dir);
            errors.keep(self.network.teardown(&attachment::orphan(&orphan)));
            errors.keep(namespaces::remove(&orphan, None));
            errors.keep(orphan.netns.as_deref().map_or(Ok(()), namespace::unpin));
            errors.keep(files::remove(&orphan));
        }
        // Attachments in CNI's cache without a living sandbox, and whatever the plugins themselves remember of others.
        let living: Vec<String> = self.index.all().iter().map(|s| s.meta.id.clone()).collect();
        if let Err(e) = self.network.gc(&living) {
            log::warn!("collect left-over network attachments: {e}");
        }
        // A plugin may be missing that a sandbox of ours is to install: the next start tries again.
        if let Err(e) = errors.finish() {
            log::error!("remove what no sandbox needs: {e}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hears what is told.
    #[derive(Default)]
    struct Heard(parking_lot::Mutex<Vec<Kind>>);

    impl Listener<Change> for Heard {
        fn is_listening(&self) -> bool {
            true
        }

        fn hear(&self, change: Change) {
            self.0.lock().push(change.kind);
        }
    }

    /// A manager of sandboxes without namespaces of their own, and what it tells.
    fn manager(dir: &Path) -> (Arc<Sandboxes>, Arc<Heard>) {
        manager_with(dir, None)
    }

    fn manager_with(dir: &Path, selinux: Option<SeLinux>) -> (Arc<Sandboxes>, Arc<Heard>) {
        let heard = Arc::new(Heard::default());
        let settings = Settings {
            root: dir.join("root"),
            run: dir.join("run"),
            netns_dir: dir.join("netns"),
            shim: PathBuf::new(),
            systemd_cgroup: false,
            sysctls: BTreeMap::new(),
            extra_networks: false,
            selinux,
            events: heard.clone(),
        };
        let network = crate::network::Settings {
            conf_dir: dir.join("conf"),
            bin_dirs: Vec::new(),
            cache_dir: dir.join("cache"),
            plugin_timeout: std::time::Duration::from_secs(1),
            template: None,
            max_networks: 1,
        };
        let manager = Sandboxes::open(settings, Network::start(network).unwrap(), Watcher::start("test").unwrap());
        (Arc::new(manager.unwrap()), heard)
    }

    fn ready(manager: &Sandboxes, id: &str) -> Arc<Sandbox> {
        let meta = Metadata::orphan(id, &manager.settings.run.join("sandboxes"), Path::new(""));
        let meta = Metadata { netns: None, ipc: false, own_cgroup_parent: false, ..meta };
        let sandbox = Arc::new(Sandbox::new(meta, PodSandboxConfig::new(), Status::new(), None));
        manager.update(&sandbox, |s| s.phase = Phase::Ready).unwrap();
        manager.index.insert(id, sandbox.clone());
        sandbox
    }

    #[test]
    fn levels_are_taken_for_labels_that_the_policy_knows() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("enforce"), "1").unwrap();
        std::fs::write(dir.path().join("context"), "").unwrap();
        let (manager, _) = manager_with(dir.path(), SeLinux::detect(dir.path(), dir.path()));
        let mut config = PodSandboxConfig::new();
        let own = manager.level(&config).unwrap().unwrap();
        assert!(own.as_str().starts_with("s0:c"), "{}", own.as_str());
        let options = &mut config.linux.mut_or_insert_default().security_context.mut_or_insert_default().selinux_options;
        options.mut_or_insert_default().level = "s0:c5".into();
        assert_eq!(manager.level(&config).unwrap().unwrap().as_str(), "s0:c5");
        // What the kernel refuses to write there, it does not know.
        std::fs::remove_file(dir.path().join("context")).unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.path().join("context")).unwrap();
        let error = manager.level(&config).map(drop).unwrap_err();
        assert!(error.code() == crate::error::Code::InvalidArgument && error.message().contains("container_t:s0:c5"), "{error}");
    }

    /// The exits thread looks, and is preempted before it notes.
    #[test]
    fn an_init_that_is_late_to_die_brings_nothing_back() {
        let dir = tempfile::tempdir().unwrap();
        let (manager, heard) = manager(dir.path());
        let init = Process { pid: 1, start_time: 1 };
        let record = |id: &str| dir.path().join("root/sandboxes").join(format!("{id}.json"));
        let (stopped, removed) = (ready(&manager, "stopped"), ready(&manager, "removed"));
        manager.begin_stop(&stopped);
        manager.init_died(&stopped, init);
        assert_eq!(stopped.status().reason, "", "it was asked to stop");
        assert!(record("stopped").exists() && record("removed").exists());
        manager.remove(&removed).unwrap();
        heard.0.lock().clear();
        manager.init_died(&removed, init);
        assert!(!record("removed").exists());
        assert!(manager.update(&removed, |_| {}).is_err());
        assert_eq!(*heard.0.lock(), []);
    }
}
