//! Namespaces: making and pinning new ones, entering pinned ones, always on a thread of their own, because
//! unshare(2) and setns(2) change the calling thread for good.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;

use super::mount;
use super::process::Program;
use super::thread::run_apart;
use crate::error::{Context, Error, Result};

/// New namespaces to make; each path is where one is pinned (a file, created here, bind-mounted over).
#[derive(Default)]
pub struct NewNamespaces {
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    /// Set in the new UTS namespace.
    pub hostname: Option<String>,
    /// Keys as paths below /proc/sys with their values, written inside the new namespaces.
    pub sysctls: Vec<(String, String)>,
    /// A process to start as PID 1 of a new PID namespace, inside the others.
    pub init: Option<Program>,
}

/// Makes the namespaces, brings `lo` up in a new network namespace, applies hostname and sysctls, pins, and starts the init
/// if one is asked for (its pid is the result). On an error nothing is left.
pub fn create(new: NewNamespaces) -> Result<Option<i32>> {
    let pins: Vec<PathBuf> = [&new.net, &new.ipc, &new.uts].into_iter().flatten().cloned().collect();
    let result = run_apart("namespaces", move || create_here(new));
    if result.is_err() {
        for pin in &pins {
            let _ = unpin(pin);
        }
    }
    result
}

fn create_here(new: NewNamespaces) -> Result<Option<i32>> {
    let kinds = [
        (&new.net, CloneFlags::CLONE_NEWNET, "net"),
        (&new.ipc, CloneFlags::CLONE_NEWIPC, "ipc"),
        (&new.uts, CloneFlags::CLONE_NEWUTS, "uts"),
    ];
    let flags = kinds.iter().filter(|k| k.0.is_some()).fold(CloneFlags::empty(), |a, k| a | k.1);
    nix::sched::unshare(flags).context(|| "unshare namespaces")?;
    if new.net.is_some() {
        super::netlink::loopback_up()?;
    }
    if let Some(name) = new.hostname.as_ref().filter(|_| new.uts.is_some()) {
        nix::unistd::sethostname(name).context(|| format!("set hostname {name:?}"))?;
    }
    for (key, value) in &new.sysctls {
        // /proc/sys resolves to the namespaces of the writing thread.
        std::fs::write(Path::new("/proc/sys").join(key), value).context(|| format!("set sysctl {key}={value:?}"))?;
    }
    for (pin, _, name) in kinds {
        if let Some(pin) = pin {
            pin_here(name, pin)?;
        }
    }
    let Some(init) = new.init else { return Ok(None) };
    // Changes only where children of this thread go.
    nix::sched::unshare(CloneFlags::CLONE_NEWPID).context(|| "unshare the PID namespace")?;
    Ok(Some(init.spawn()?.id() as i32))
}

/// Starts `init` as PID 1 of a new PID namespace inside the pinned namespaces given. Its pid is the result.
pub fn spawn_init(join: Vec<PathBuf>, init: Program) -> Result<i32> {
    run_apart("sandbox-init", move || {
        for path in &join {
            enter_here(path)?;
        }
        nix::sched::unshare(CloneFlags::CLONE_NEWPID).context(|| "unshare the PID namespace")?;
        Ok(init.spawn()?.id() as i32)
    })
}

/// Pins the calling thread's namespace `name` (net, ipc, uts) at `pin`.
fn pin_here(name: &str, at: &Path) -> Result<()> {
    pin(Path::new(&format!("/proc/thread-self/ns/{name}")), at)
}

/// Pins a namespace, a link of /proc/PID/ns, at `pin`.
pub fn pin(namespace: &Path, pin: &Path) -> Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(pin)
        .context(|| format!("create namespace pin {}", pin.display()))?;
    mount::bind(namespace, pin, false)
}

/// Undoes a pin: the namespace dies with its last process. Not pinned or not there is fine.
pub fn unpin(pin: &Path) -> Result<()> {
    mount::unmount(pin)?;
    super::file::remove_file(pin)
}

/// Whether `pin` is a mounted namespace file (nsfs), not just a left-over file.
pub fn is_pinned(pin: &Path) -> bool {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(pin).is_ok_and(|s| s.f_type as u64 == NSFS_MAGIC)
}

/// Runs `body` on a thread of its own inside the pinned network namespace.
pub fn in_netns<T: Send + 'static>(pin: &Path, body: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let pin = pin.to_owned();
    run_apart("netns", move || {
        enter_here(&pin)?;
        body()
    })
}

/// Runs `body` on a thread of its own in a new mount namespace, of whose mounts the host sees nothing.
#[cfg(feature = "engine")]
pub fn in_own_mounts<T: Send + 'static>(body: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    run_apart("own-mounts", move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).context(|| "unshare the mount namespace")?;
        let all = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, all, None::<&str>).context(|| "make all mounts private")?;
        body()
    })
}

fn enter_here(pin: &Path) -> Result<()> {
    let what = || format!("enter namespace {}", pin.display());
    if !is_pinned(pin) {
        return Err(Error::internal(format!("{}: it is not pinned", what())));
    }
    let file = File::open(pin).context(what)?;
    nix::sched::setns(&file, CloneFlags::empty()).context(what)
}
