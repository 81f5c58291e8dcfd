//! PID 1 of a sandbox whose containers share a PID namespace: it reaps, and has nothing. Started inside the sandbox's
//! namespaces, in two steps:
//!
//! 1. A mount namespace of its own with an empty read-only tmpfs as root: a container that may trace could read the
//!    host through /proc/1/root. This program is bound into it read-only and executed from there: through /proc/1/exe a
//!    container could otherwise come to write to the host's copy.
//! 2. No descriptors, no capabilities, no new privileges, a handful of system calls. No handler for SIGTERM: unhandled, it is
//!    ignored when it comes from inside, and the host uses SIGKILL.

use std::ffi::CString;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};

use crate::error::{Context, Result};
use crate::sys::{confine, monitor};

/// The argument of the second step.
pub const CONFINED: &str = "init-confined";
/// Where the tmpfs is mounted for the moment: a directory that every host has.
const PLACE: &str = "/proc";
const SELF: &str = "crisp-shim";

/// Step one. Comes back only with an error.
pub fn run() -> Result<()> {
    let _ = nix::unistd::setsid();
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).context(|| "unshare the mount namespace")?;
    let none = None::<&str>;
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context(|| "make mounts private")?;
    // By its path, before the tmpfs covers /proc: the link itself leads into the mount namespace we came from.
    let source = std::fs::read_link("/proc/self/exe").context(|| "read /proc/self/exe")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(Some("crisp"), PLACE, Some("tmpfs"), flags, Some("mode=0555,size=4k,nr_inodes=4"))
        .context(|| "mount the empty root")?;
    let target = Path::new(PLACE).join(SELF);
    std::fs::File::create(&target).context(|| "create the program's place")?;
    crate::sys::mount::bind(&source, &target, false)?;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags;
    nix::mount::mount(none, &target, none, read_only, none).context(|| "make the program read-only")?;
    nix::unistd::chdir(PLACE).context(|| "enter the empty root")?;
    nix::unistd::pivot_root(".", ".").context(|| "change the root")?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).context(|| "detach the old root")?;
    nix::unistd::chdir("/").context(|| "enter /")?;
    let path = CString::new(format!("/{SELF}")).map_err(|_| crate::error::Error::internal("NUL in a path"))?;
    let confined = CString::new(CONFINED).map_err(|_| crate::error::Error::internal("NUL in an argument"))?;
    let environment: [CString; 0] = [];
    nix::unistd::execve(&path, &[path.clone(), confined], &environment).context(|| "execute the program again")?;
    Ok(())
}

/// Step two: reaps for ever. Comes back only with an error.
pub fn run_confined() -> Result<()> {
    // The running program keeps its own mount; the name goes.
    nix::mount::umount2(&*format!("/{SELF}"), MntFlags::MNT_DETACH).context(|| "detach the program")?;
    std::fs::remove_file(format!("/{SELF}")).context(|| "remove the program's place")?;
    let none = None::<&str>;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(none, "/", none, read_only, none).context(|| "make the root read-only")?;
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_set_mask().context(|| "block SIGCHLD")?;
    confine::drop_capabilities()?;
    confine::renounce_privileges()?;
    monitor::close_from(0)?;
    confine::allow_only(&[libc::SYS_wait4, libc::SYS_rt_sigtimedwait, libc::SYS_restart_syscall, libc::SYS_exit_group])?;
    loop {
        while monitor::reap(None).is_some() {}
        let _ = children.wait();
    }
}
