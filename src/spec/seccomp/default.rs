//! The seccomp profile of RuntimeDefault, as data.
//!
//! Which calls are allowed follows the default profile of Moby (github.com/moby/profiles, seccomp/default.json at commit
//! 02e898b137ae, of 2026), which containerd and Docker share in substance: an allow list, everything else EPERM, no io_uring,
//! calls that make namespaces or mounts only with the capability they need, clone3 ENOSYS so that C libraries fall back to
//! clone, whose flags a filter can see. Take over a change of theirs by editing the lists below, and this line; names unknown
//! to the runtime's libseccomp are skipped by the runtime.

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator as Operator, LinuxSyscall,
};

use super::{argument, Conditions};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;

/// Allowed with any arguments on every architecture.
const ALWAYS: &str = "
    accept accept4 access adjtimex alarm
    bind brk
    cachestat capget capset chdir chmod chown chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64
    clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat
    dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
    execve execveat exit exit_group
    faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32
    fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs
    fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat
    get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32
    getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32
    getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr
    getxattrat
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents
    io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc
    kill
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount
    listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64
    madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall
    mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
    mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
    name_to_handle_at nanosleep newfstatat _newselect
    open openat openat2
    pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64
    preadv preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 pwrite64
    pwritev pwritev2
    read readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr
    removexattrat rename renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending
    rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg
    sendto set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups
    setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
    setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown
    sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 statmount
    statx symlink symlinkat sync sync_file_range syncfs sysinfo
    tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64
    ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes
    vfork vmsplice
    wait4 waitid waitpid write writev";

/// Allowed with any arguments on kernels from 4.8 on; before, a traced process could change a call after the filter had seen it.
const TRACING: &str = "process_vm_readv process_vm_writev ptrace";
const TRACING_IS_SAFE: (u32, u32) = (4, 8);

/// Allowed with any arguments when the bounding set holds the capability.
const WITH_CAPABILITY: &[(Capability, &str)] = &[
    (Capability::Bpf, "bpf"),
    (Capability::DacReadSearch, "open_by_handle_at"),
    (Capability::Perfmon, "perf_event_open"),
    (
        Capability::SysAdmin,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr lsm_list_modules \
         lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname \
         sethostname setns syslog umount umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (Capability::SysModule, "delete_module finit_module init_module"),
    (Capability::SysNice, "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    (Capability::SysPacct, "acct"),
    (Capability::SysPtrace, "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    (Capability::SysRawio, "ioperm iopl"),
    (Capability::SysTime, "clock_settime clock_settime64 settimeofday stime"),
    (Capability::SysTtyConfig, "vhangup"),
    (Capability::Syslog, "syslog"),
];

/// Allowed on these architectures (names of `std::env::consts::ARCH`).
const ON_ARCHITECTURE: &[(&[&str], &str)] = &[
    (&["powerpc64"], "swapcontext sync_file_range2"),
    (&["arm", "aarch64"], "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2"),
    (&["x86_64"], "arch_prctl"),
    (&["x86", "x86_64"], "modify_ldt"),
    (&["s390x"], "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
    (&["riscv64"], "riscv_flush_icache"),
];

/// personality(2): PER_LINUX, PER_LINUX32, UNAME26 with either, and the question 0xffffffff.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Below this socket(2) family all are allowed: the usual ones, and a few old ones without users' code to reach.
const FAMILIES_BELOW: u64 = 12;
/// The allowed ones from there on. Left out: DECnet, Econet, ATM SVC, IrDA, WANPIPE, ISDN and CAIF, which hardly anybody
/// needs, AF_ALG (38), a frequent way into the kernel, and AF_VSOCK (40), which leads to the hypervisor and knows no namespaces.
/// An allow list, because the filter compares 64 bits where the kernel takes 32: `!= 40` would let 40 + 2^32 pass.
const FAMILIES: [u64; 25] = [13, 14, 15, 16, 17, 18, 21, 22, 24, 26, 27, 28, 29, 30, 31, 32, 33, 35, 36, 39, 41, 42, 43, 44, 45];

/// The profile for a container under these conditions.
pub fn runtime_default(conditions: &Conditions) -> LinuxSeccomp {
    let Conditions { bounding, arch, kernel } = *conditions;
    let mut syscalls = vec![allow(ALWAYS)];
    if kernel >= TRACING_IS_SAFE {
        syscalls.push(allow(TRACING));
    }
    syscalls.push(allow_if("socket", argument(0, Operator::ScmpCmpLt, FAMILIES_BELOW, 0)));
    for family in FAMILIES {
        syscalls.push(allow_if("socket", argument(0, Operator::ScmpCmpEq, family, 0)));
    }
    for personality in PERSONALITIES {
        syscalls.push(allow_if("personality", argument(0, Operator::ScmpCmpEq, personality, 0)));
    }
    for (arches, names) in ON_ARCHITECTURE {
        if arches.contains(&arch) {
            syscalls.push(allow(names));
        }
    }
    for (capability, names) in WITH_CAPABILITY {
        if bounding.contains(capability) {
            syscalls.push(allow(names));
        }
    }
    if !bounding.contains(&Capability::SysAdmin) {
        // The stack comes first on s390, the flags second.
        let flags = usize::from(arch == "s390x");
        syscalls.push(allow_if("clone", argument(flags, Operator::ScmpCmpMaskedEq, NAMESPACE_FLAGS, 0)));
        let mut clone3 = syscall("clone3", Action::ScmpActErrno);
        clone3.set_errno_ret(Some(ENOSYS));
        syscalls.push(clone3);
    }

    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(Action::ScmpActErrno).set_default_errno_ret(Some(EPERM)).set_syscalls(Some(syscalls));
    profile.set_architectures(architectures(arch));
    profile
}

/// The architecture and those whose programs its kernel runs too; None for one not known here (the runtime then takes
/// its own).
fn architectures(arch: &str) -> Option<Vec<Arch>> {
    let list: &[Arch] = match arch {
        "x86_64" => &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
        "aarch64" => &[Arch::ScmpArchAarch64, Arch::ScmpArchArm],
        "s390x" => &[Arch::ScmpArchS390x, Arch::ScmpArchS390],
        "riscv64" => &[Arch::ScmpArchRiscv64],
        "loongarch64" => &[Arch::ScmpArchLoongarch64],
        _ => return None,
    };
    Some(list.to_vec())
}

fn syscall(names: &str, action: Action) -> LinuxSyscall {
    let mut syscall = LinuxSyscall::default();
    syscall.set_names(names.split_ascii_whitespace().map(str::to_owned).collect()).set_action(action);
    syscall
}

fn allow(names: &str) -> LinuxSyscall {
    syscall(names, Action::ScmpActAllow)
}

fn allow_if(name: &str, condition: LinuxSeccompArg) -> LinuxSyscall {
    let mut syscall = allow(name);
    syscall.set_args(Some(vec![condition]));
    syscall
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules<'a>(profile: &'a LinuxSeccomp, name: &str) -> Vec<&'a LinuxSyscall> {
        profile.syscalls().as_ref().unwrap().iter().filter(|s| s.names().iter().any(|n| n == name)).collect()
    }

    fn profile(bounding: &[Capability], arch: &str) -> LinuxSeccomp {
        let bounding = bounding.iter().copied().collect();
        runtime_default(&Conditions { bounding: &bounding, arch, kernel: (6, 1) })
    }

    #[test]
    fn everything_else_is_eperm() {
        let profile = profile(&[], "x86_64");
        assert_eq!((profile.default_action(), profile.default_errno_ret()), (Action::ScmpActErrno, Some(1)));
        for name in ["unshare", "mount", "bpf", "io_uring_setup", "open_by_handle_at", "setns", "keyctl", "userfaultfd", "kcmp"] {
            assert!(rules(&profile, name).is_empty(), "{name}");
        }
    }

    #[test]
    fn architectures_with_those_their_kernels_run_too() {
        let of = |arch: &str| profile(&[], arch).architectures().clone();
        assert_eq!(of("x86_64").unwrap(), [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]);
        assert_eq!(of("aarch64").unwrap(), [Arch::ScmpArchAarch64, Arch::ScmpArchArm]);
        assert_eq!((of("loongarch64").unwrap().len(), of("sparc64")), (1, None));
    }

    #[test]
    fn capabilities_open_their_calls() {
        let profile = profile(&[Capability::SysAdmin, Capability::SysTime], "x86_64");
        for name in ["unshare", "mount", "bpf", "clone", "clone3", "stime"] {
            let rules = rules(&profile, name);
            assert_eq!(rules.len(), 1, "{name}");
            assert_eq!((rules[0].action(), rules[0].args()), (Action::ScmpActAllow, &None), "{name}");
        }
    }

    #[test]
    fn tracing_needs_a_young_kernel_or_the_capability() {
        let on = |bounding: &[Capability], kernel: (u32, u32)| {
            let bounding = bounding.iter().copied().collect();
            let profile = runtime_default(&Conditions { bounding: &bounding, arch: "x86_64", kernel });
            ["ptrace", "process_vm_readv"].map(|name| !rules(&profile, name).is_empty())
        };
        assert_eq!((on(&[], (4, 7)), on(&[], (4, 8)), on(&[], (5, 0))), ([false; 2], [true; 2], [true; 2]));
        assert_eq!(on(&[Capability::SysPtrace], (4, 7)), [true; 2]);
    }

    #[test]
    fn clone_may_not_make_namespaces_without_sys_admin() {
        let amd64 = profile(&[], "x86_64");
        let clone = rules(&amd64, "clone")[0].args().as_ref().unwrap()[0];
        assert_eq!((clone.index(), clone.value(), clone.value_two()), (0, 0x7e02_0000, Some(0)));
        let clone3 = rules(&amd64, "clone3")[0];
        assert_eq!((clone3.action(), clone3.errno_ret()), (Action::ScmpActErrno, Some(38)));
        let s390 = profile(&[], "s390x");
        assert_eq!(rules(&s390, "clone")[0].args().as_ref().unwrap()[0].index(), 1);
    }

    #[test]
    fn socket_families_are_an_allow_list() {
        let profile = profile(&[], "aarch64");
        let families = rules(&profile, "socket");
        let conditions: Vec<_> = families.iter().map(|s| s.args().as_ref().unwrap()[0]).map(|a| (a.op(), a.value())).collect();
        let allowed = |family: u64| {
            conditions.iter().any(|(op, value)| match op {
                Operator::ScmpCmpLt => family < *value,
                Operator::ScmpCmpEq => family == *value,
                _ => panic!("{op:?}"),
            })
        };
        let refused: Vec<u64> = (0..64).filter(|family| !allowed(*family)).collect();
        let beyond: Vec<u64> = (46..64).collect();
        assert_eq!(refused, [&[12, 19, 20, 23, 25, 34, 37, 38, 40][..], &beyond].concat());
        assert!(!allowed(40 + (1 << 32)) && !allowed(2 + (1 << 32)));
    }

    #[test]
    fn lists_name_nothing_twice() {
        let mut names: Vec<_> = ALWAYS.split_ascii_whitespace().collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(all > 300, "{all}");
    }
}
