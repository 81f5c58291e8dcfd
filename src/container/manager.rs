//! Create, remove, lookup. Whatever a container has is undone by `release`: after a failed create, at removal, and for what
//! a killed daemon left.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Condvar;
use serde::{Deserialize, Serialize};

use super::apparmor::AppArmor;
use super::classes::Classes;
use super::confine::Confiner;
use super::labels;
use super::metadata::Metadata;
use super::status::{State, Status, User};
use crate::api::runtime::{ContainerConfig, PodSandboxConfig};
use crate::cdi;
use crate::cgroup::stat::{Meter, Reader, Sample};
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Code, Context, Error, ErrorList, Result};
use crate::event::{self, Listener};
use crate::hooks;
use crate::image::{Image, Images};
use crate::runtime::{Handler, Kind};
use crate::selinux::SeLinux;
use crate::snapshot::{Attributes, Owners, Snapshotter};
use crate::spec::{self, Defaults, HostFacts, NamespacePaths, ResolvedMount, SandboxFiles};
use crate::store::{new_id, now_ns, Claim, Index, Names, Records};
use crate::sys::cancel::Cancel;
use crate::sys::crash;
use crate::sys::file::{self, Durability};
use crate::sys::label::SELINUX;
use crate::sys::lock::{Lock, Rank};
use crate::sys::mount;
use crate::sys::watch::Watcher;

/// Whoever measures writable layers.
pub trait LayerWatch: Send + Sync {
    /// A container has the writable layer `upper_dir` from now on.
    fn appeared(&self, container_id: &str, upper_dir: &Path);
    /// Its layer is about to be removed.
    fn disappears(&self, container_id: &str);
}

/// What the manager needs to know.
pub struct Settings {
    pub root: PathBuf,
    pub run: PathBuf,
    pub shim: PathBuf,
    /// For one command of the OCI runtime.
    pub runtime_timeout: Duration,
    /// Bytes kept of one ExecSync.
    pub exec_output: usize,
    /// Whether an exec with streams dies with its client.
    pub kill_on_disconnect: bool,
    pub defaults: Defaults,
    pub classes: Classes,
    pub host: HostFacts,
    /// None: SELinux is off.
    pub selinux: Option<SeLinux>,
    pub events: Arc<dyn Listener<Change>>,
    pub layers: Arc<dyn LayerWatch>,
    pub cdi: cdi::Registry,
    pub hooks: hooks::Directories,
}

/// A step in the life of a container.
pub type Change = event::Change<Container, Status>;

/// One container.
pub struct Container {
    pub meta: Metadata,
    pub config: ContainerConfig,
    pub(super) status: Lock<Status>,
    /// Notified whenever the status changes.
    pub(super) changed: Condvar,
    /// Held across a transition, never across a wait.
    pub(super) op: Lock<()>,
    /// A StopContainer has sent it the stop signal.
    pub(super) stop_signalled: AtomicBool,
    /// Files of its cgroup, open from the first reading to its end.
    meter: Meter,
}

impl Container {
    pub(super) fn new(meta: Metadata, config: ContainerConfig, status: Status) -> Arc<Container> {
        let (status, op) = (Lock::new(Rank::Status, status), Lock::new(Rank::ContainerOp, ()));
        Arc::new(Container {
            meta,
            config,
            status,
            changed: Condvar::new(),
            op,
            stop_signalled: AtomicBool::new(false),
            meter: Meter::default(),
        })
    }

    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Whether it is running, for less than a copy of the status.
    pub fn is_running(&self) -> bool {
        self.status.lock().state == State::Running
    }

    /// A sample of its cgroup and the CPU rate; None when that is not there: it does not run (any more).
    pub fn sample(&self) -> Option<(Sample, Option<u64>)> {
        self.meter.sample(|| self.cgroup().ok())
    }

    /// The reader of its cgroup, for what a sample does not have.
    pub fn reader(&self) -> Option<Arc<Reader>> {
        self.meter.reader(|| self.cgroup().ok())
    }

    /// The error of something that was done with it while it ran. If it has ended meanwhile that is why, whatever the error says: on v2
    /// even a memory limit below what is in use ends it before the OCI runtime is done. Its shim may not have recorded the end yet.
    pub(super) fn because_it_ended(&self, error: Error) -> Error {
        let recorded = || matches!(crate::shim::client::exit_record(&self.meta.dir), Ok(Some(_)));
        let dead = || !crate::sys::pidfd::lives(self.status.lock().pid);
        match matches!(error.code(), Code::Unavailable | Code::Internal) && (recorded() || dead()) {
            true => Error::precondition(format!("the container has ended meanwhile: {}", error.message())),
            false => error,
        }
    }

    /// Its cgroup.
    pub(super) fn cgroup(&self) -> Result<Cgroup> {
        Cgroup::at(Layout::host()?, &self.meta.cgroups_path)
    }

    pub fn id(&self) -> &str {
        &self.meta.id
    }
}

#[derive(Serialize)]
pub(super) struct RecordOut<'a> {
    metadata: &'a Metadata,
    status: &'a Status,
}

#[derive(Deserialize)]
pub(super) struct RecordIn {
    pub metadata: Metadata,
    pub status: Status,
}

/// What a sandbox and a request say of a new container.
pub struct CreateInputs<'a> {
    pub sandbox_id: &'a str,
    pub sandbox: &'a PodSandboxConfig,
    pub config: ContainerConfig,
    pub handler: Handler,
    /// Its OCI runtime would compile a seccomp profile at each start.
    pub compile_filter: bool,
    /// SELinux level of the sandbox, "" without SELinux.
    pub level: &'a str,
    pub namespaces: NamespacePaths,
    /// Set when `namespaces.pid` is another container's.
    pub target: Option<String>,
    pub files: SandboxFiles,
    pub hostname: &'a str,
    pub cgroup_parent: &'a str,
    /// Whether the OCI runtime can make a mount read-only with all below it.
    pub recursive_read_only: bool,
}

/// All containers.
pub struct Containers {
    pub(super) settings: Settings,
    pub(super) records: Records,
    pub(super) names: Names,
    pub(super) index: Index<Container>,
    pub(super) images: Images,
    pub(super) snapshots: Snapshotter,
    pub(super) watcher: Watcher,
    confiner: Confiner,
}

impl Containers {
    pub fn open(settings: Settings, images: Images, snapshots: Snapshotter, watcher: Watcher) -> Result<Containers> {
        let records = Records::open(&settings.root, "containers")?;
        file::make_dir(&settings.run.join("containers"), 0o711)?;
        let confiner = Confiner::new(AppArmor::default(), settings.selinux.clone());
        let (names, index) = (Names::new("container"), Index::new("container"));
        Ok(Containers { settings, records, names, index, images, snapshots, watcher, confiner })
    }

    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.index.get(id)
    }

    pub fn find(&self, id: &str) -> Result<Option<Arc<Container>>> {
        self.index.find(id)
    }

    pub fn all(&self) -> Vec<Arc<Container>> {
        self.index.all()
    }

    /// The containers of a sandbox.
    pub fn of_sandbox(&self, sandbox_id: &str) -> Vec<Arc<Container>> {
        self.index.select(|c| c.meta.sandbox_id == sandbox_id)
    }

    /// Takes the name for a new container, or says which one has it already: an equal call is joined.
    pub fn create(self: &Arc<Self>, inputs: CreateInputs, cancel: &Cancel) -> Result<String> {
        let Some(m) = inputs.config.metadata.as_ref() else { return Err(Error::invalid("config.metadata is missing")) };
        if m.name.is_empty() || m.name.bytes().any(|b| b.is_ascii_control()) {
            return Err(Error::invalid(format!("config.metadata.name: expected printable text, found {:?}", m.name)));
        }
        let name = format!("{}_{}_{}", m.name, inputs.sandbox_id, m.attempt);
        let mut request = protobuf::Message::write_to_bytes(&inputs.config).context(|| "encode the container config")?;
        let config_bytes = request.len();
        request.extend_from_slice(inputs.sandbox_id.as_bytes());
        let id = new_id()?;
        match self.names.claim(&name, &id, &request, cancel)? {
            Claim::Made(id) => match self.index.find(&id)? {
                Some(c) if c.status.lock().state == State::Created => Ok(id),
                _ => Err(self.names.taken(&name, &id)),
            },
            Claim::Make(making) => {
                let result = self.make(id, name, inputs, &request[..config_bytes]);
                making.finish(result.clone(), false);
                result
            }
        }
    }

    fn make(self: &Arc<Self>, id: String, name: String, inputs: CreateInputs, config_bytes: &[u8]) -> Result<String> {
        let image = self.image(&inputs.config)?;
        let config = &inputs.config;
        // Before a volume gets a label for what is refused afterwards.
        spec::refuse::container(config, inputs.sandbox, &self.settings.host)?;
        let mut mounts = super::mounts::check_all(&config.mounts, &self.settings.host, inputs.recursive_read_only)?;
        let log_path = log_path(&inputs.sandbox.log_directory, &config.log_path)?;
        let specified = &config.image.user_specified_image;
        let meta = Metadata {
            sandbox_id: inputs.sandbox_id.to_owned(),
            name,
            created_at: now_ns(),
            handler: inputs.handler.clone(),
            image_id: image.id.clone(),
            chain: image.chain.clone(),
            image_volumes: super::image_volumes::find(&config.mounts, &self.images)?,
            image: if specified.is_empty() { image.repo_tags.first().unwrap_or(&image.id).clone() } else { specified.clone() },
            image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
            log_path,
            stop_signal: super::lifecycle::stop_signal(config, &image)?,
            cgroups_path: crate::cgroup::path::below(inputs.cgroup_parent, &id),
            target: inputs.target.clone(),
            userns: inputs.namespaces.user.as_ref().map(|user| user.maps),
            dir: self.settings.run.join("containers").join(&id),
            id,
        };
        let container = Container::new(meta, inputs.config.clone(), Status::default());
        if let Err(error) = self.build(&container, &image, &inputs, &mut mounts, config_bytes) {
            if let Err(undo) = self.release(&container).and_then(|()| self.unrecord(&container)) {
                // The record stays and says "making": the next start of the daemon tries again.
                log::error!("container {}: undo of a failed create: {undo}", container.id());
            }
            return Err(error);
        }
        let id = container.id().to_owned();
        self.settings.layers.appeared(&id, &self.snapshots.writable(&id));
        let status = container.status();
        self.index.insert_and(&id, container.clone(), || self.tell(&container, event::Kind::Created, None, Some(&status)));
        Ok(id)
    }

    /// The local image of a config.
    fn image(&self, config: &ContainerConfig) -> Result<Arc<Image>> {
        super::image_volumes::wanted(config.image.as_ref(), "config.image").and_then(|image| self.images.require(image))
    }

    /// Makes the container step by step, each recorded before it is done.
    fn build(
        &self,
        container: &Arc<Container>,
        image: &Image,
        inputs: &CreateInputs,
        mounts: &mut Vec<ResolvedMount>,
        config_bytes: &[u8],
    ) -> Result<()> {
        let (meta, config) = (&container.meta, &inputs.config);
        self.records.save_config(&meta.id, config_bytes)?;
        let resources = config.linux.as_ref().and_then(|l| l.resources.as_ref()).map(protobuf::Message::write_to_bytes);
        let resources = resources.transpose().context(|| "encode resources")?.unwrap_or_default();
        self.update(container, |s| s.resources = resources)?;
        crash::step("create:1-recorded");
        let mut confined = Vec::new();
        let contexts = (&config.linux.security_context, &inputs.sandbox.linux.security_context);
        let confinement = self.confiner.prepare(contexts.0, contexts.1, inputs.level, &self.settings.host, &mut confined)?;
        make_bundle(meta)?;
        let mut held = self.images.hold_all(&meta.id, &meta.chains())?;
        let user_namespace = inputs.namespaces.user.as_ref();
        let owners = user_namespace.map(|user| Owners { maps: user.maps, namespace: &user.path });
        let label = confinement.labels.as_ref().map(|labels| labels.mount.as_str());
        let attributes = Attributes { owners: owners.as_ref(), label };
        self.snapshots.prepare(&meta.id, &held.remove(0).layers, &meta.rootfs(), attributes)?;
        crash::step("create:2-snapshot");
        let rootfs = meta.rootfs();
        let defaults = image.config.config().as_ref();
        let image_user = defaults.and_then(|c| c.user().as_deref()).unwrap_or_default();
        let image_dir = defaults.and_then(|c| c.working_dir().as_deref()).unwrap_or_default();
        let user = super::user::resolve(&rootfs, &config.linux.security_context, image_user)?;
        super::mounts::find(mounts)?;
        if let Some(label) = label {
            labels::sandbox_files(&inputs.files, SELINUX, label)?;
            // Mounts of images have no path of the host.
            let asked = config.mounts.iter().zip(&*mounts).filter(|(asked, mount)| asked.selinux_relabel && mount.host_path.is_absolute());
            asked.map(|(_, mount)| mount).try_for_each(|mount| labels::relabel(&mount.host_path, SELINUX, label))?;
        }
        super::image_volumes::mount_images(meta, &held, &config.mounts, mounts, &self.snapshots, attributes)?;
        super::volumes::place(&meta.dir, &config.mounts, mounts, user_namespace, &self.settings.shim)?;
        let devices = super::devices::collect(config, user_namespace.is_some())?;
        super::update::check_cpuset(&container.cgroup()?, &config.linux.resources)?;
        let (classes, class_warnings) = self.settings.classes.resolve(&inputs.sandbox.annotations, config)?;
        let working_dir = spec::process::working_dir(&config.working_dir, image_dir)?;
        super::mounts::prepare_root(&rootfs, &working_dir, meta.userns.map(|maps| maps.root()))?;
        // First, so that a mount of the request in the same depth comes after it.
        let volumes = super::image_volumes::declared(&meta.id, &image.volumes(), &rootfs, mounts, &self.snapshots, attributes)?;
        mounts.splice(0..0, volumes);
        if user_namespace.is_some() && inputs.handler.kind == Kind::Crun {
            super::below::list(mounts, &mount::table()?, &self.settings.run)?;
        }
        crash::step("create:3-volumes");
        let (mut built, warnings) = spec::build(&spec::Inputs {
            sandbox_id: inputs.sandbox_id,
            sandbox: inputs.sandbox,
            config,
            image: &image.config,
            user: &user,
            namespaces: &inputs.namespaces,
            rootfs: &rootfs,
            mounts,
            devices: &devices,
            classes: &classes,
            cgroups_path: &meta.cgroups_path,
            hostname: inputs.hostname,
            host: &self.settings.host,
            files: &inputs.files,
            defaults: &self.settings.defaults,
            confinement: &confinement,
        })?;
        for warning in confined.into_iter().chain(class_warnings).chain(warnings) {
            log::warn!("container {}: {warning}", meta.id);
        }
        self.settings.edit(&mut built, config, inputs.sandbox)?;
        super::targets::prepare(&rootfs, built.mounts().as_deref().unwrap_or_default(), meta.userns.map(|maps| maps.root()))?;
        if inputs.compile_filter {
            self.confiner.precompile(&mut built, &self.settings.host.arch);
        }
        write_json(&meta.spec_path(), &built)?;
        crash::step("create:4-spec");
        // As the process will have it: devices bring groups.
        let user = built.process().as_ref().map(|process| process.user().clone()).unwrap_or_default();
        let groups = user.additional_gids().clone().unwrap_or_default();
        self.update(container, |s| {
            s.state = State::Created;
            s.user = User { uid: user.uid(), gid: user.gid(), groups };
        })?;
        crash::step("create:5-created");
        Ok(())
    }

    /// Changes the status and writes the record, both under the status lock: the file is never older than memory. An error changes nothing.
    pub(super) fn update(&self, container: &Arc<Container>, change: impl FnOnce(&mut Status)) -> Result<()> {
        self.change(container, change, false)
    }

    /// As `update`, for what has happened already: that is true whether or not the disk took it. A daemon that finds an older record
    /// sees what is there.
    pub(super) fn note(&self, container: &Arc<Container>, change: impl FnOnce(&mut Status)) {
        if let Err(e) = self.change(container, change, true) {
            log::error!("container {}: {e}", container.id());
        }
    }

    fn change(&self, container: &Arc<Container>, change: impl FnOnce(&mut Status), happened: bool) -> Result<()> {
        let mut status = container.status.lock();
        if status.gone {
            // What is still told of it is nobody's concern; the record would come back.
            return match happened {
                true => Ok(()),
                false => Err(Error::precondition(format!("container {} is removed", container.id()))),
            };
        }
        let mut next = status.clone();
        change(&mut next);
        let saved = self.records.save(&container.meta.id, &RecordOut { metadata: &container.meta, status: &next });
        if saved.is_ok() || happened {
            // Under the lock that orders the changes.
            if let Some(kind) = event_of(status.state, next.state) {
                self.tell(container, kind, Some(&status), Some(&next));
            }
            *status = next;
        }
        if status.state == State::Exited {
            container.meter.close();
        }
        container.changed.notify_all();
        saved
    }

    fn tell(&self, container: &Arc<Container>, kind: event::Kind, before: Option<&Status>, after: Option<&Status>) {
        if self.settings.events.is_listening() {
            let change = Change { kind, object: container.clone(), before: before.cloned(), after: after.cloned() };
            self.settings.events.hear(change);
        }
    }

    /// RemoveContainer of a container that does not run any more.
    pub(super) fn forget(&self, container: &Arc<Container>) -> Result<()> {
        let _op = container.op.lock();
        let what = || format!("remove container {}", container.meta.id);
        if self.index.find(&container.meta.id)?.is_none() {
            // Somebody else has done it meanwhile.
            return Ok(());
        }
        if container.status.lock().state == State::Running {
            return Err(Error::precondition(format!("{}: it is RUNNING", what())));
        }
        // A full disk must not stand in the way of what empties it.
        self.note(container, |s| s.removing = true);
        self.delete_again(container);
        self.settings.layers.disappears(&container.meta.id);
        self.release(container).context(what)?;
        crash::step("remove:3-files");
        self.unrecord(container).context(what)?;
        let status = container.status();
        self.index.remove_and(&container.meta.id, || self.tell(container, event::Kind::Deleted, Some(&status), None));
        self.names.release(&container.meta.name, &container.meta.id);
        Ok(())
    }

    /// Removes the record. The exits thread, or whoever cleans up after a shim, may still hold the container: none of them writes it again.
    pub(super) fn unrecord(&self, container: &Container) -> Result<()> {
        container.status.lock().gone = true;
        // A record that stays is still kept up to date.
        self.records.remove(&container.meta.id).inspect_err(|_| container.status.lock().gone = false)
    }

    /// Undoes everything a container without processes may have, but its record.
    pub(super) fn release(&self, container: &Container) -> Result<()> {
        let meta = &container.meta;
        let mut errors = ErrorList::default();
        errors.keep(super::image_volumes::unmount_images(&meta.dir));
        crash::step("remove:1-volumes");
        errors.keep(self.snapshots.remove(&meta.id, &meta.rootfs()));
        errors.keep(super::volumes::remove(&meta.dir));
        crash::step("remove:2-snapshot");
        // What could not be unmounted still needs its layers.
        if errors.is_empty() {
            errors.keep(self.images.release(&meta.id));
        }
        if errors.is_empty() {
            errors.keep(file::remove_tree(&meta.dir));
        }
        errors.finish()
    }
}

/// The container's directory. Root of a user namespace must be able to pass through it to its root filesystem, and no one else.
fn make_bundle(meta: &Metadata) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file::make_dir(&meta.dir, 0o700)?;
    let Some(maps) = meta.userns else { return Ok(()) };
    let what = || format!("give {} to the user namespace", meta.dir.display());
    std::os::unix::fs::chown(&meta.dir, None, Some(maps.root().1)).context(what)?;
    std::fs::set_permissions(&meta.dir, std::fs::Permissions::from_mode(0o710)).context(what)
}

/// What subscribers are told of a change of state. Entering the index is the creation, leaving it the deletion. A container that
/// could not be started has stopped too: nobody would learn of its end otherwise.
fn event_of(before: State, after: State) -> Option<event::Kind> {
    match (before, after) {
        (State::Created, State::Running) => Some(event::Kind::Started),
        (State::Created | State::Running, State::Exited) => Some(event::Kind::Stopped),
        _ => None,
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(value).context(|| format!("encode {}", path.display()))?;
    file::write(path, &json, 0o600, Durability::Atomic)
}

/// The absolute log path: `path` below `directory`, no link followed on the way. Either empty: no log.
fn log_path(directory: &str, path: &str) -> Result<Option<PathBuf>> {
    if directory.is_empty() || path.is_empty() {
        return Ok(None);
    }
    // The shim could not open it, which would be told only at the start.
    for (field, text) in [("log_directory", directory), ("config.log_path", path)] {
        if text.contains('\0') {
            return Err(Error::invalid(format!("{field}: a NUL byte in {text:?}")));
        }
    }
    let (dir, relative) = (Path::new(directory), Path::new(path));
    if !dir.is_absolute() {
        return Err(Error::invalid(format!("log_directory: expected an absolute path, found {directory:?}")));
    }
    let plain = relative.components().all(|c| matches!(c, std::path::Component::Normal(_) | std::path::Component::CurDir));
    if !plain || relative.file_name().is_none() {
        return Err(Error::invalid(format!("config.log_path: expected a path below log_directory, found {path:?}")));
    }
    file::make_dir(dir, 0o755)?;
    // Components below the directory come from the container's config: none of them may be a link out of it.
    let mut at = dir.to_owned();
    let parents: Vec<_> = relative.parent().into_iter().flat_map(Path::components).collect();
    for part in parents {
        at.push(part);
        match std::fs::symlink_metadata(&at) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(Error::invalid(format!("config.log_path: {} is not a directory", at.display()))),
            Err(_) => file::make_dir(&at, 0o755)?,
        }
    }
    let full = dir.join(relative);
    match std::fs::symlink_metadata(&full) {
        Ok(meta) if !meta.is_file() => {
            Err(Error::invalid(format!("config.log_path: {} is there and is not a regular file", full.display())))
        }
        _ => Ok(Some(full)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_once() {
        assert_eq!(event_of(State::Created, State::Running), Some(event::Kind::Started));
        assert_eq!(event_of(State::Running, State::Exited), Some(event::Kind::Stopped));
        assert_eq!(event_of(State::Created, State::Exited), Some(event::Kind::Stopped));
        for (before, after) in [(State::Exited, State::Exited), (State::Running, State::Running), (State::Making, State::Created)] {
            assert_eq!(event_of(before, after), None);
        }
    }

    #[test]
    fn log_paths_stay_below_their_directory() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path().to_str().unwrap();
        assert_eq!(log_path("", "a").unwrap(), None);
        assert_eq!(log_path(d, "").unwrap(), None);
        assert_eq!(log_path(d, "c/0.log").unwrap().unwrap(), dir.path().join("c/0.log"));
        std::os::unix::fs::symlink("/etc", dir.path().join("out")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link.log")).unwrap();
        for bad in ["../x", "/etc/x", "c/../../x", "out/x", "link.log", "."] {
            assert!(log_path(d, bad).is_err(), "{bad}");
        }
        assert!(log_path("relative", "x").is_err());
        for (directory, path, field) in [(d, "a\0b", "config.log_path"), (d, "a\0/b", "config.log_path"), ("/a\0b", "c", "log_directory")] {
            let error = log_path(directory, path).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().starts_with(field), "{error}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "c and the two links");
    }
}
