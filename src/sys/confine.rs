//! Giving up power: capabilities, privileges over exec, debuggers, all system calls but a few.

use crate::error::{Context, Error, Result};

/// Drops every capability from every set, for good.
pub fn drop_capabilities() -> Result<()> {
    use rustix::thread::{CapabilitySet, CapabilitySets};
    let none = CapabilitySet::empty();
    // The ambient set first: it may not outlive the permitted one. Bounding next: dropping from it needs CAP_SETPCAP.
    rustix::thread::clear_ambient_capability_set().context(|| "clear ambient capabilities")?;
    for bit in 0..64 {
        // SAFETY: plain integers. By number, so that capabilities younger than this code go too; EINVAL after the last.
        let r = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, bit as libc::c_ulong, 0, 0, 0) };
        match nix::errno::Errno::result(r) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINVAL) => break,
            Err(e) => return Err(e).context(|| format!("drop capability {bit}")),
        }
    }
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .context(|| "drop capabilities")
}

/// No exec gives privileges any more, and only CAP_SYS_PTRACE of the owning user namespace sees our /proc files.
pub fn renounce_privileges() -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context(|| "set no_new_privs")?;
    nix::sys::prctl::set_dumpable(false).context(|| "clear dumpable")
}

/// Forbids (EPERM) every system call but those in `allowed`, for the rest of this process's life. Needs no_new_privs. On
/// architectures whose number we do not know it does nothing: an extra fence, not the only one.
pub fn allow_only(allowed: &[libc::c_long]) -> Result<()> {
    if ARCH == 0 {
        return Ok(());
    }
    let mut program = filter(allowed)?;
    let length = u16::try_from(program.len()).map_err(|_| Error::internal("build seccomp filter: too long"))?;
    let fprog = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: `fprog` and the instructions it points to live until the call returns; the kernel copies and checks them.
    let r = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &fprog as *const libc::sock_fprog) };
    nix::errno::Errno::result(r).map(drop).context(|| "install seccomp filter")
}

/// AUDIT_ARCH of <linux/audit.h>; 0 where we do not know it.
const ARCH: u32 = if cfg!(target_arch = "x86_64") {
    0xc000_003e
} else if cfg!(target_arch = "aarch64") {
    0xc000_00b7
} else if cfg!(target_arch = "riscv64") {
    0xc000_00f3
} else {
    0
};

/// seccomp(2): seccomp_data holds nr at 0 and arch at 4.
fn filter(allowed: &[libc::c_long]) -> Result<Vec<libc::sock_filter>> {
    let load = |offset: u32| libc::sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset };
    let give = |action: u32| libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: action };
    let equal =
        |value: u32, jt: u8, jf: u8| libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt, jf, k: value };
    let deny = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut program = vec![load(4), equal(ARCH, 1, 0), give(libc::SECCOMP_RET_KILL_PROCESS), load(0)];
    for (i, call) in allowed.iter().enumerate() {
        let to_allow = u8::try_from(allowed.len() - i).map_err(|_| Error::internal("build seccomp filter: too many calls"))?;
        program.push(equal(*call as u32, to_allow, 0));
    }
    program.push(give(deny));
    program.push(give(libc::SECCOMP_RET_ALLOW));
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_applies_to_the_thread_that_asks() {
        crate::sys::thread::run_apart("confined", || {
            // Not `renounce_privileges`: dumpable belongs to the whole test process.
            nix::sys::prctl::set_no_new_privs().context(|| "set no_new_privs")?;
            allow_only(&[
                libc::SYS_futex,
                libc::SYS_exit,
                libc::SYS_madvise,
                libc::SYS_munmap,
                libc::SYS_rt_sigprocmask,
                libc::SYS_sigaltstack,
            ])?;
            assert_eq!(nix::unistd::getcwd(), Err(nix::errno::Errno::EPERM));
            Ok(())
        })
        .unwrap();
    }
}
