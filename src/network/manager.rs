//! The manager's face: which networks are loaded, whether they are ready, and the order in which a sandbox joins them.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::event::EventfdFlags;
use serde::{Deserialize, Serialize};

use super::attachment::Attachment;
use super::cache::{Cache, Entry};
use super::chain;
use super::conflist::{Conflist, Directory, Version};
use super::gate::Gate;
use super::plugin::{Plugins, Verb};
use super::template::{self, Values};
use super::watch;
use crate::error::{Code, Context, Error, ErrorList, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file::{self, Durability};
use crate::sys::lock::{Lock, Rank, SharedLock};

/// How often plugins are asked for their STATUS: while they say yes, and while they say no.
const STATUS_EVERY: Duration = Duration::from_secs(10);
const STATUS_RETRY: Duration = Duration::from_secs(2);

/// The interface of the default network.
const DEFAULT_IFNAME: &str = "eth0";

/// The file that a template is rendered into.
const RENDERED: &str = "10-crisp.conflist";

/// Bytes read of a template.
const TEMPLATE_LIMIT: u64 = 1 << 20;

/// Where networks come from.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its lexically first valid file is the default network. It may appear later.
    pub conf_dir: PathBuf,
    /// Searched in order for plugins; CNI_PATH.
    pub bin_dirs: Vec<PathBuf>,
    /// What was added is kept in `results` below it. Survives reboots: leases of sandboxes that are gone are freed by it.
    pub cache_dir: PathBuf,
    /// For each run of one plugin.
    pub plugin_timeout: Duration,
    /// Rendered into the conf directory when the pod CIDR becomes known (template.rs says what it may contain).
    pub template: Option<PathBuf>,
    /// Networks one sandbox may have, the default included.
    pub max_networks: usize,
}

/// The NetworkReady condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    pub ready: bool,
    /// One CamelCase word; empty when ready.
    pub reason: String,
    pub message: String,
}

/// What a sandbox got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The default network's addresses in its plugins' order: the first is the sandbox's primary IP. Never empty.
    pub ips: Vec<IpAddr>,
    /// All networks, the default first.
    pub networks: Vec<Attached>,
}

/// One network of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    pub name: String,
    pub ifname: String,
    pub ips: Vec<IpAddr>,
    pub mac: Option<String>,
}

/// CNI networks. Shared by all calls; no lock of it is held while a plugin runs.
pub struct Network {
    settings: Settings,
    plugins: Plugins,
    cache: Cache,
    loaded: SharedLock<Loaded>,
    /// Held from the stamp to the store of what was read: of two readings the younger is the one that stays. A file that is written in
    /// place changes no stamp: half of it, stored late, would stay until the next change.
    reading: Lock<()>,
    status: Lock<Option<Verdict>>,
    gate: Gate,
    /// Ends the watch thread.
    stop: Cancel,
    /// Wakes the watch thread.
    wake: Arc<OwnedFd>,
}

#[derive(Clone, Default)]
struct Loaded {
    directory: Arc<Directory>,
    stamp: Option<Stamp>,
}

/// What STATUS said of a network.
struct Verdict {
    network: Arc<Conflist>,
    result: Result<()>,
}

/// Longest tick of the kernel's clock, by which files have their times (CONFIG_HZ=100), and some room.
const TICK: Duration = Duration::from_millis(20);

/// Device, inode and mtime of the conf directory: changes when a file comes or goes.
type Stamp = (u64, u64, i64, i64);

fn stamp(dir: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(dir).ok()?;
    Some((meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec()))
}

/// Whether a change from now on would give another stamp: files that come in the same tick of the kernel's clock leave it as it is.
fn is_settled(stamp: &Stamp) -> bool {
    let (_, _, seconds, nanoseconds) = *stamp;
    let changed = UNIX_EPOCH + Duration::new(seconds.max(0) as u64, nanoseconds.max(0) as u32);
    // One from the future is as good as it will get.
    SystemTime::now().duration_since(changed).map_or(true, |age| age > TICK)
}

impl Network {
    /// Loads the conf directory (a missing one only means "not ready") and starts the thread `cni-watch`, which ends with
    /// the last reference.
    pub fn start(settings: Settings) -> Result<Arc<Network>> {
        let stop = Cancel::never();
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd")?;
        let network = Arc::new(Network {
            plugins: Plugins::new(settings.bin_dirs.clone(), settings.plugin_timeout),
            cache: Cache::new(&settings.cache_dir),
            loaded: SharedLock::new(Rank::Leaf, Loaded::default()),
            reading: Lock::new(Rank::Status, ()),
            status: Lock::new(Rank::Leaf, None),
            gate: Gate::default(),
            stop: stop.clone(),
            wake: Arc::new(wake),
            settings,
        });
        network.reload_logged();
        watch::start(&network, network.settings.conf_dir.clone(), stop, network.wake.clone())?;
        Ok(network)
    }

    /// Reads the conf directory again. A directory that cannot be read is an error and counts as empty.
    pub fn reload(&self) -> Result<()> {
        self.reload_by(Directory::load)
    }

    pub(super) fn reload_by(&self, load: impl FnOnce(&Path) -> Result<Directory>) -> Result<()> {
        let _alone = self.reading.lock();
        // Taken before the files are read: what changes meanwhile is seen as a change.
        let stamp = stamp(&self.settings.conf_dir).filter(is_settled);
        let (mut directory, result) = match load(&self.settings.conf_dir) {
            Ok(directory) => (directory, Ok(())),
            Err(e) => (Directory { networks: Vec::new(), problems: vec![e.to_string()] }, Err(e)),
        };
        let mut loaded = self.loaded.write();
        let before = loaded.directory.clone();
        for network in &mut directory.networks {
            // An unchanged network stays the same object, and so keeps its STATUS.
            if let Some(same) = before.networks.iter().find(|n| *n == network) {
                *network = same.clone();
            }
        }
        *loaded = Loaded { directory: Arc::new(directory), stamp };
        let now = loaded.directory.clone();
        drop(loaded);
        if before.problems != now.problems {
            now.problems.iter().for_each(|p| log::warn!("network configuration left out: {p}"));
        }
        let (old, new) = (before.default_network(), now.default_network());
        if old != new {
            match new {
                Some(n) => log::info!("default network is {} (CNI {})", n.name, n.version),
                None => log::warn!("no network configuration in {}", self.settings.conf_dir.display()),
            }
            self.wake_watcher();
        }
        result
    }

    pub(super) fn reload_logged(&self) {
        if let Err(e) = self.reload() {
            log::warn!("load network configurations: {e}");
        }
    }

    fn wake_watcher(&self) {
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// What is loaded, read again if files have come or gone since: an emptied directory counts at once, not when the
    /// watch thread has had its turn.
    fn directory(&self) -> Arc<Directory> {
        let known = self.loaded.read().stamp;
        if known != stamp(&self.settings.conf_dir) {
            self.reload_logged();
        }
        self.loaded.read().directory.clone()
    }

    /// Directories beside the conflists that hold more of their plugins (1.1.0), for the watch thread.
    pub(super) fn plugin_dirs(&self) -> Vec<PathBuf> {
        let directory = self.loaded.read().directory.clone();
        directory.networks.iter().map(|n| self.settings.conf_dir.join(&n.name)).filter(|d| d.is_dir()).collect()
    }

    /// Whether sandboxes can be given a network: there is a valid default network, its plugins exist, and, since 1.1.0, they
    /// said so when last asked. Runs no plugin.
    pub fn status(&self) -> Readiness {
        let no = |reason: &str, message: String| Readiness { ready: false, reason: reason.to_owned(), message };
        let directory = self.directory();
        let Some(network) = directory.default_network() else {
            let problems = directory.problems.iter().map(|p| format!("; {p}")).collect::<String>();
            return no("NetworkConfigMissing", format!("no valid CNI configuration in {}{problems}", self.settings.conf_dir.display()));
        };
        if let Err(e) = self.find_plugins(network) {
            return no("NetworkPluginMissing", e.to_string());
        }
        if network.version >= Version::V1_1_0 {
            match self.status.lock().as_ref().filter(|v| Arc::ptr_eq(&v.network, network)) {
                None => {
                    return no("NetworkStatusPending", format!("network {}: its plugins are being asked for their status", network.name))
                }
                Some(Verdict { result: Err(e), .. }) => return no("NetworkPluginNotReady", format!("network {}: {e}", network.name)),
                Some(_) => {}
            }
        }
        Readiness { ready: true, reason: String::new(), message: String::new() }
    }

    /// Asks the default network's plugins for their STATUS, for `status`. In how long it is to be asked again; None where
    /// the version has no STATUS.
    pub(super) fn refresh_status(&self) -> Option<Duration> {
        let network = self.loaded.read().directory.default_network().cloned();
        let network = network.filter(|n| n.version >= Version::V1_1_0)?;
        let result = self.ask_status(&network);
        let pause = if result.is_ok() { STATUS_EVERY } else { STATUS_RETRY };
        *self.status.lock() = Some(Verdict { network, result });
        Some(pause)
    }

    fn ask_status(&self, network: &Conflist) -> Result<()> {
        for plugin in &network.plugins {
            match self.plugins.versions(&plugin.kind, &self.stop) {
                Ok(versions) if !versions.contains(&Version::V1_1_0) => {
                    return Err(Error::precondition(format!("plugin {} does not speak CNI {}", plugin.kind, network.version)));
                }
                Ok(_) => {}
                Err(e) => return Err(e),
            }
            let request = network.request(plugin, &Default::default(), None, None);
            self.plugins.run(&plugin.kind, Verb::Status, None, &request, &self.stop)?;
        }
        Ok(())
    }

    /// Attaches a sandbox to its extra networks and to the default network (ADD). Every network is written to the cache
    /// before its first plugin runs; on any error all are detached again (DEL, in reverse, the failing one included). What
    /// could not be detached stays in the cache for `teardown` to retry, and the error says so.
    pub fn setup(&self, attachment: &Attachment, cancel: &Cancel) -> Result<Setup> {
        attachment.validate()?;
        let what = || format!("set up network of sandbox {}", attachment.sandbox_id);
        let netns = attachment.netns.to_str().ok_or_else(|| Error::invalid(format!("netns {:?} is not UTF-8", attachment.netns)))?;
        let plan = self.plan(attachment).context(what)?;
        // Before anything is recorded: a DEL of what a missing plugin never made would fail for ever.
        plan.iter().try_for_each(|(network, _)| self.find_plugins(network)).context(what)?;
        let _turn = self.gate.enter(cancel).context(what)?;
        let earlier = self.cache.of_sandbox(&attachment.sandbox_id).context(what)?;
        if !earlier.is_empty() {
            log::warn!("sandbox {}: networks of an earlier attempt are detached first", attachment.sandbox_id);
            self.detach(&earlier, netns).context(what)?;
        }
        let mut done: Vec<Entry> = Vec::new();
        let result = self.attach_all(attachment, netns, &plan, cancel, &mut done);
        let Err(error) = result else { return result };
        match self.detach(&done, netns) {
            Ok(()) => Err(error).context(what),
            Err(undo) => Err(error).context(what).map_err(|e| Error::new(e.code(), format!("{e}; and the undo: {undo}"))),
        }
    }

    /// Whether all plugins of a network are there, those for addresses too.
    fn find_plugins(&self, network: &Conflist) -> Result<()> {
        let kinds = network.plugins.iter().flat_map(|p| [Some(&p.kind), p.ipam.as_ref()]).flatten();
        kinds.into_iter().try_for_each(|kind| self.plugins.find(kind).map(drop)).context(|| format!("network {}", network.name))
    }

    /// The networks of a sandbox with their interfaces, in the order of ADD: the default is the last.
    fn plan(&self, attachment: &Attachment) -> Result<Vec<(Arc<Conflist>, String)>> {
        let directory = self.directory();
        let default = directory
            .default_network()
            .ok_or_else(|| Error::new(Code::Unavailable, format!("no valid CNI configuration in {}", self.settings.conf_dir.display())))?;
        if attachment.extra_networks.len() >= self.settings.max_networks {
            return Err(Error::invalid(format!(
                "{} extra networks: a sandbox may have {} networks",
                attachment.extra_networks.len(),
                self.settings.max_networks
            )));
        }
        let mut plan = Vec::new();
        for (i, name) in attachment.extra_networks.iter().enumerate() {
            let network = directory.named(name);
            let network =
                network.ok_or_else(|| Error::invalid(format!("extra network {name:?} is not in {}", self.settings.conf_dir.display())))?;
            plan.push((network.clone(), format!("net{}", i + 1)));
        }
        plan.push((default.clone(), DEFAULT_IFNAME.to_owned()));
        Ok(plan)
    }

    fn attach_all(
        &self,
        attachment: &Attachment,
        netns: &str,
        plan: &[(Arc<Conflist>, String)],
        cancel: &Cancel,
        done: &mut Vec<Entry>,
    ) -> Result<Setup> {
        let mut setup = Setup::default();
        for (order, (network, ifname)) in plan.iter().enumerate() {
            let default = order + 1 == plan.len();
            let mut entry = Entry::new(network, order as u32, &attachment.sandbox_id, ifname, netns, attachment.cni_args());
            entry.capability_args = attachment.capability_args(default);
            entry.capability_args.retain(|name, _| network.declares(name));
            self.cache.write(&entry)?;
            let outcome = chain::add(&self.plugins, &self.cache, network, &mut entry, cancel);
            done.push(entry);
            let outcome = outcome.context(|| format!("network {}", network.name))?;
            let ips = outcome.ips(ifname);
            if default && ips.is_empty() {
                return Err(Error::internal(format!("network {}: the plugins gave no IP address for {ifname}", network.name)));
            }
            let attached = Attached { name: network.name.clone(), ifname: ifname.clone(), mac: outcome.mac(ifname), ips };
            if default {
                setup.ips = attached.ips.clone();
                setup.networks.insert(0, attached);
            } else {
                setup.networks.push(attached);
            }
        }
        Ok(setup)
    }

    /// Detaches entries in reverse. All are tried; those that succeed leave the cache.
    fn detach(&self, entries: &[Entry], netns: &str) -> Result<()> {
        let mut errors = ErrorList::default();
        for entry in entries.iter().rev() {
            let result = chain::del(&self.plugins, entry, netns).and_then(|()| self.cache.remove(entry));
            errors.keep(result.context(|| format!("network {}", entry.network_name)));
        }
        errors.finish()
    }

    /// Detaches a sandbox from all its networks (DEL) with the configurations, arguments and results of its ADDs. Every
    /// plugin of every network is tried; the errors are collected, and what failed stays in the cache for a retry. A sandbox
    /// that nothing was added to is fine, as is a netns that is gone. Not cancellable: half a teardown helps nobody.
    pub fn teardown(&self, attachment: &Attachment) -> Result<()> {
        self.teardown_id(&attachment.sandbox_id, attachment.netns.to_str())
    }

    fn teardown_id(&self, id: &str, netns: Option<&str>) -> Result<()> {
        let what = || format!("tear down network of sandbox {id}");
        let entries = self.cache.of_sandbox(id).context(what)?;
        let Some(first) = entries.first() else { return Ok(()) };
        let netns = netns.filter(|n| !n.is_empty()).unwrap_or(&first.netns);
        self.detach(&entries, netns).context(what)
    }

    /// Asks the plugins whether the sandbox's networks are as ADD left them (CHECK), where their version has it and the
    /// network does not disable it.
    pub fn check(&self, attachment: &Attachment) -> Result<()> {
        let what = || format!("check network of sandbox {}", attachment.sandbox_id);
        let netns = attachment.netns.to_string_lossy();
        for entry in self.cache.of_sandbox(&attachment.sandbox_id).context(what)? {
            chain::check(&self.plugins, &entry, &netns).context(|| format!("network {}", entry.network_name)).context(what)?;
        }
        Ok(())
    }

    /// Frees what sandboxes other than `living` have left: DEL for what the cache has of them, then GC of every network
    /// whose version has it. UNAVAILABLE while a setup is under way; setups that begin meanwhile wait.
    pub fn gc(&self, living: &[String]) -> Result<()> {
        let _turn = self.gate.close()?;
        let mut errors = ErrorList::default();
        for id in self.cached_sandboxes() {
            if !living.contains(&id) {
                log::info!("sandbox {id} is gone: its network is torn down");
                errors.keep(self.teardown_id(&id, None));
            }
        }
        let left = errors.keep(self.cache.all()).unwrap_or_default();
        if !errors.is_empty() {
            // What DEL could not free must not be freed behind its back, and the list of the valid may be short.
            return errors.finish();
        }
        for network in &self.directory().networks {
            errors.keep(chain::gc(&self.plugins, network, &left).context(|| format!("collect garbage of network {}", network.name)));
        }
        errors.finish()
    }

    /// Ids of all sandboxes that have something in the cache.
    pub fn cached_sandboxes(&self) -> Vec<String> {
        let entries = self.cache.all().unwrap_or_else(|e| {
            log::warn!("network cache: {e}");
            Vec::new()
        });
        // Sorted by id.
        let mut ids: Vec<String> = entries.into_iter().map(|e| e.container_id).collect();
        ids.dedup();
        ids
    }

    /// Takes the pod CIDR of UpdateRuntimeConfig (one, or one of each family with a comma; "" is accepted and changes
    /// nothing): renders the template, if there is one, into the conf directory and reloads. A file with that content is
    /// left alone.
    pub fn set_pod_cidr(&self, cidr: &str) -> Result<()> {
        if cidr.is_empty() {
            return Ok(());
        }
        let values = Values::parse(cidr)?;
        let Some(template) = &self.settings.template else {
            log::info!("pod CIDR is {cidr}; there is no network template to render");
            return Ok(());
        };
        let what = || format!("render network template {}", template.display());
        let text = String::from_utf8(file::read(template, TEMPLATE_LIMIT)?).context(what)?;
        let rendered = template::render(&text, &values).context(what)?;
        Conflist::parse(rendered.as_bytes()).context(|| "the rendered text is not a network configuration").context(what)?;
        let target = self.settings.conf_dir.join(RENDERED);
        if std::fs::read(&target).is_ok_and(|now| now == rendered.as_bytes()) {
            return Ok(());
        }
        file::make_dir(&self.settings.conf_dir, 0o755)?;
        file::write(&target, rendered.as_bytes(), 0o644, Durability::Atomic)?;
        log::info!("pod CIDR is {cidr}: wrote {}", target.display());
        self.reload()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.stop.set();
    }
}
