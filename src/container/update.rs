//! UpdateContainerResources: all that was given is set, or nothing has changed. What takes an update back is in the bundle
//! before the first change (`update.json`), so that a daemon that died in the middle leaves no half of one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use super::manager::{Container, Containers};
use super::status::State;
use crate::api::runtime::LinuxContainerResources;
use crate::cgroup::limits::{self, Limits};
use crate::cgroup::Cgroup;
use crate::error::{Context, Error, ErrorList, Result};
use crate::runtime::Kind;
use crate::shim::client::{self, Client};
use crate::spec::resources::update::merge;
use crate::spec::{self, OomScoreAdj, Update};
use crate::sys::cpulist::CpuList;
use crate::sys::crash;
use crate::sys::file::{self, Durability};

/// What a shim needs beyond the OCI runtime's own time to answer.
const SHIM_MARGIN: Duration = Duration::from_secs(15);
/// Bytes of a spec, at most.
const SPEC_LIMIT: u64 = 16 << 20;
/// How often a container is looked through for processes that were started while its others got a new oom_score_adj.
const OOM_ROUNDS: usize = 8;

/// What an update may have changed, as it was.
#[derive(Serialize, Deserialize)]
struct Undo {
    spec: Spec,
    /// The CRI message, as in the status.
    resources: Vec<u8>,
    /// For the OCI runtime's own memory; None: it was not asked.
    runtime: Option<LinuxResources>,
    limits: Limits,
    /// From the new one back.
    oom_score_adj: Option<OomScoreAdj>,
}

impl Containers {
    /// Changes limits of a CREATED or RUNNING container. 0 and "" mean unchanged. INVALID_ARGUMENT names a value that cannot be,
    /// FAILED_PRECONDITION says what this host or the container's use does not allow.
    pub fn update_resources(&self, container: &Arc<Container>, new: &LinuxContainerResources) -> Result<()> {
        let id = container.id();
        let what = || format!("update container {id}");
        let _op = container.op.lock();
        container.status.lock().can_update(id)?;
        // An earlier one may have failed, and its undo too.
        self.finish_undo(container).context(what)?;
        let status = container.status();
        let running = status.state == State::Running;
        let cgroup = container.cgroup().context(what)?;
        check_cpuset(&cgroup, new).context(what)?;

        let old = read_spec(&container.meta.spec_path()).context(what)?;
        let mut spec = old.clone();
        let update = spec::update_resources(&mut spec, new, &self.settings.host).context(what)?;
        for warning in &update.warnings {
            log::warn!("container {id}: {warning}");
        }
        let mut now: LinuxContainerResources = protobuf::Message::parse_from_bytes(&status.resources).context(what)?;
        merge(&mut now, new);
        let resources = protobuf::Message::write_to_bytes(&now).context(what)?;

        let undo = Undo::new(&cgroup, running, old, status.resources, &update, new);
        let journal = journal(container);
        file::write(&journal, &serde_json::to_vec(&undo).context(what)?, 0o600, Durability::Atomic).context(what)?;
        crash::step("update:1-intent");
        let mut told = false;
        let done = (|| {
            if running {
                self.apply(container, &cgroup, &update, &undo.limits, &mut told)?;
            }
            crash::step("update:2-applied");
            write_spec(&container.meta.spec_path(), &spec)?;
            crash::step("update:3-spec");
            self.update(container, |s| s.resources = resources)?;
            crash::step("update:4-recorded");
            file::remove_file(&journal)
        })();
        let Err(error) = done else { return Ok(()) };
        let error = if running { container.because_it_ended(error) } else { error };
        // systemd has taken over what a runtime told it before it failed.
        let told = told || container.meta.handler.systemd_cgroup;
        match self.undo(container, &undo, told).and_then(|()| file::remove_file(&journal)) {
            Ok(()) => Err(error).context(what),
            Err(undo) => {
                log::error!("container {id}: take a failed update back: {undo}; tried again before the next");
                Err(error).context(|| format!("{} (and not taken back whole: {undo})", what()))
            }
        }
    }

    /// Changes a running container, whose limits are those of `before`. `told` is set once the OCI runtime knows the new ones.
    fn apply(&self, container: &Container, cgroup: &Cgroup, update: &Update, before: &Limits, told: &mut bool) -> Result<()> {
        if update.resources != LinuxResources::default() {
            if let Some(cpu) = update.resources.cpu() {
                limits::admit_cpuset(cgroup, cpu.cpus().as_deref(), cpu.mems().as_deref())?;
            }
            self.tell_runtime(container, &update.resources).map_err(|error| too_small(cgroup, update, error))?;
            *told = true;
            if container.meta.handler.systemd_cgroup {
                // systemd writes all that it knows of the scope anew, and it is not told all: of the number of processes by crun 1.8, of
                // no swap at all by runc 1.1.
                before.restore_but(&written(update))?;
            }
        }
        for limit in &update.hugepages {
            limits::set_hugepages(cgroup, limit.page_size(), limit.limit().max(0) as u64)?;
        }
        match update.oom_score_adj {
            Some(change) => set_oom_score_adj(cgroup, change),
            None => Ok(()),
        }
    }

    fn tell_runtime(&self, container: &Container, resources: &LinuxResources) -> Result<()> {
        let mut resources = resources.clone();
        if let Some(cpu) = resources.cpu_mut().as_mut().filter(|cpu| cpu.quota() == Some(-1)) {
            // crun writes it to a v1 cgroup as a number without a sign, which the kernel refuses. It remembers no limits, as runc does.
            if container.meta.handler.kind == Kind::Crun && limits::lift_quota(&container.cgroup()?)? {
                cpu.set_quota(None);
            }
        }
        let json = serde_json::to_value(resources).context(|| "encode resources")?;
        Client::new(&container.meta.dir).update(json, self.settings.runtime_timeout + SHIM_MARGIN)
    }

    /// Takes back an update of which a former try, or daemon, left the note.
    pub(super) fn finish_undo(&self, container: &Arc<Container>) -> Result<()> {
        let journal = journal(container);
        if !journal.exists() {
            return Ok(());
        }
        let what = || format!("take back what is in {}", journal.display());
        let undo: Undo = serde_json::from_slice(&file::read(&journal, 2 * SPEC_LIMIT)?).context(what)?;
        self.undo(container, &undo, true).context(what)?;
        log::info!("container {}: a half-done update was taken back", container.id());
        file::remove_file(&journal)
    }

    /// Every step runs. With `told` the OCI runtime is told too.
    fn undo(&self, container: &Arc<Container>, undo: &Undo, told: bool) -> Result<()> {
        let mut errors = ErrorList::default();
        let lives = || container.status.lock().state == State::Running && !matches!(client::exit_record(&container.meta.dir), Ok(Some(_)));
        if let Some(resources) = undo.runtime.as_ref().filter(|_| told && lives()) {
            let admitted = match (resources.cpu(), container.cgroup()) {
                (Some(cpu), Ok(cgroup)) => limits::admit_cpuset(&cgroup, cpu.cpus().as_deref(), cpu.mems().as_deref()),
                _ => Ok(()),
            };
            match admitted.and_then(|()| self.tell_runtime(container, resources)) {
                Err(e) if lives() => drop(errors.keep::<()>(Err(e))),
                _ => {}
            }
        }
        if lives() {
            errors.keep(undo.limits.restore());
            if let Some(change) = undo.oom_score_adj {
                errors.keep(container.cgroup().and_then(|cgroup| set_oom_score_adj(&cgroup, change)));
            }
        }
        errors.keep(write_spec(&container.meta.spec_path(), &undo.spec));
        if container.status.lock().resources != undo.resources {
            errors.keep(self.update(container, |s| s.resources = undo.resources.clone()));
        }
        errors.finish()
    }
}

impl Undo {
    fn new(cgroup: &Cgroup, running: bool, spec: Spec, resources: Vec<u8>, update: &Update, new: &LinuxContainerResources) -> Undo {
        if !running {
            return Undo { spec, resources, runtime: None, limits: Limits::default(), oom_score_adj: None };
        }
        let sizes = update.hugepages.iter().map(|limit| limit.page_size().as_str());
        let limits = Limits::read(cgroup, sizes, new.unified.keys().map(String::as_str));
        let mut before = update.before.clone();
        if let Some(cpu) = before.cpu_mut() {
            // What it had been given, or what it had from above.
            let had = |name: &str| {
                let own = limits.get(name).map(str::to_owned).filter(|text| !text.is_empty());
                let above = || std::fs::read_to_string(cgroup.dir("cpuset")?.join(format!("{name}.effective"))).ok();
                own.or_else(above).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
            };
            let asked = |text: &str, given: &Option<String>| !text.is_empty() && given.is_none();
            if asked(&new.cpuset_cpus, cpu.cpus()) {
                cpu.set_cpus(had("cpuset.cpus"));
            }
            if asked(&new.cpuset_mems, cpu.mems()) {
                cpu.set_mems(had("cpuset.mems"));
            }
        }
        let runtime = Some(before).filter(|_| update.resources != LinuxResources::default());
        let oom_score_adj = update.oom_score_adj.map(|change| OomScoreAdj { from: change.to, to: change.from });
        Undo { spec, resources, runtime, limits, oom_score_adj }
    }
}

/// The files that an update is about.
fn written(update: &Update) -> Vec<&str> {
    let (cpu, memory) = (update.resources.cpu().as_ref(), update.resources.memory().as_ref());
    let shares = cpu.is_some_and(|cpu| cpu.shares().is_some());
    let quota = cpu.is_some_and(|cpu| cpu.quota().is_some() || cpu.period().is_some());
    let bytes = memory.is_some_and(|memory| memory.limit().is_some() || memory.swap().is_some());
    let groups: [(bool, &[&str]); 5] = [
        (shares, &["cpu.shares", "cpu.weight"]),
        (quota, &["cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.max"]),
        (cpu.is_some_and(|cpu| cpu.cpus().is_some()), &["cpuset.cpus"]),
        (cpu.is_some_and(|cpu| cpu.mems().is_some()), &["cpuset.mems"]),
        (bytes, &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max", "memory.swap.max"]),
    ];
    let mut names: Vec<&str> = groups.into_iter().filter(|(asked, _)| *asked).flat_map(|(_, names)| names).copied().collect();
    names.extend(update.resources.unified().iter().flat_map(|unified| unified.keys().map(String::as_str)));
    names
}

fn journal(container: &Container) -> PathBuf {
    container.meta.dir.join("update.json")
}

fn read_spec(path: &Path) -> Result<Spec> {
    serde_json::from_slice(&file::read(path, SPEC_LIMIT)?).context(|| format!("read {}", path.display()))
}

fn write_spec(path: &Path, spec: &Spec) -> Result<()> {
    let json = serde_json::to_vec(spec).context(|| format!("encode {}", path.display()))?;
    file::write(path, &json, 0o600, Durability::Atomic)
}

/// Whether the cgroup can be given these CPUs and memory nodes: INVALID_ARGUMENT where the kernel would refuse them. A list that is
/// none is for others to refuse.
pub(super) fn check_cpuset(cgroup: &Cgroup, asked: &LinuxContainerResources) -> Result<()> {
    let all = [
        ("cpuset_cpus", &asked.cpuset_cpus, "cpuset.cpus", "/sys/devices/system/cpu/possible"),
        ("cpuset_mems", &asked.cpuset_mems, "cpuset.mems", "/sys/devices/system/node/possible"),
    ];
    for (field, text, name, possible) in all {
        let Some(list) = CpuList::parse(text).filter(|list| !list.is_empty()) else { continue };
        let (bounds, whose) = match limits::cpuset_bounds(cgroup, name) {
            Some(bounds) => (Some(bounds), "the parent cgroup"),
            None => (std::fs::read_to_string(possible).ok().and_then(|text| CpuList::parse(&text)), "this host"),
        };
        if let Some(bounds) = bounds.filter(|bounds| !list.is_within(bounds)) {
            return Err(Error::invalid(format!("{field}: expected some of {bounds}, what {whose} has, found {text}")));
        }
    }
    Ok(())
}

/// v1 refuses a memory limit below what is in use and cannot be reclaimed: that is nobody's bug. (v2 takes it, and reclaims, and
/// kills if need be.)
fn too_small(cgroup: &Cgroup, update: &Update, error: Error) -> Error {
    let limit = update.resources.memory().and_then(|memory| memory.limit()).and_then(|limit| u64::try_from(limit).ok());
    match limit.zip(limits::memory_usage(cgroup)) {
        Some((limit, usage)) if limit < usage => {
            let precondition = Error::precondition(format!("memory_limit_in_bytes: {limit} is below the {usage} bytes in use"));
            Err::<(), _>(precondition).context(|| error.message().to_owned()).unwrap_err()
        }
        _ => error,
    }
}

/// Changes the score of all processes that have the container's former one; who has chosen another keeps it. OCI runtimes leave
/// it alone in updates: it is a property of processes.
fn set_oom_score_adj(cgroup: &Cgroup, change: OomScoreAdj) -> Result<()> {
    for _ in 0..OOM_ROUNDS {
        let mut changed = false;
        for pid in cgroup.procs() {
            let path = format!("/proc/{pid}/oom_score_adj");
            let now = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<i32>().ok());
            if now != Some(change.from) {
                continue;
            }
            match std::fs::write(&path, change.to.to_string()) {
                Ok(()) => changed = true,
                // Gone meanwhile is fine.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(e) => return Err(e).context(|| format!("write {} to {path}", change.to)),
            }
        }
        if !changed {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Layout;

    #[test]
    fn cpus_that_nobody_has() {
        let cgroup = Cgroup::at(Layout::host().unwrap(), "/crisp-test-none/c1").unwrap();
        let with =
            |cpus: &str, mems: &str| LinuxContainerResources { cpuset_cpus: cpus.into(), cpuset_mems: mems.into(), ..Default::default() };
        check_cpuset(&cgroup, &with("0", "0")).unwrap();
        check_cpuset(&cgroup, &with("", "not a list")).unwrap();
        for (field, asked) in [("cpuset_cpus: ", with("0,60000", "")), ("cpuset_mems: ", with("0", "900"))] {
            let error = check_cpuset(&cgroup, &asked).unwrap_err();
            assert!(error.code() == crate::error::Code::InvalidArgument && error.message().starts_with(field), "{error}");
        }
    }
}
