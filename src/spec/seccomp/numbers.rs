//! Numbers of system calls by name. The tables are those of the crate `syscalls`; what it lacks (x32) stands here. Of x86 alone: tests/host shows these
//! to agree with libseccomp's, and those of ARM not to.

use syscalls::{x86, x86_64};

/// Calls are made by this convention; as libseccomp counts architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abi {
    X86_64,
    X32,
    X86,
}

/// The bit that marks numbers of x32 (arch/x86/include/uapi/asm/unistd.h).
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// Calls with a number of their own on x32, from 512 on.
const X32: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];
const X32_FIRST: u32 = 512;

/// Calls of x86_64 that x32 has not (marked "64" in arch/x86/entry/syscalls/syscall_64.tbl).
const NOT_ON_X32: [&str; 13] = [
    "uselib",
    "_sysctl",
    "create_module",
    "get_kernel_syms",
    "query_module",
    "nfsservctl",
    "set_thread_area",
    "get_thread_area",
    "epoll_ctl_old",
    "epoll_wait_old",
    "vserver",
    "map_shadow_stack",
    "uretprobe",
];

/// Calls that on x86 have a number of their own and can be made through socketcall(2) as well.
pub(super) const SOCKET_CALLS: [&str; 20] = [
    "accept",
    "accept4",
    "bind",
    "connect",
    "getpeername",
    "getsockname",
    "getsockopt",
    "listen",
    "recv",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "send",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
    "socket",
    "socketpair",
];
/// The same with ipc(2).
pub(super) const IPC_CALLS: [&str; 12] =
    ["msgctl", "msgget", "msgrcv", "msgsnd", "semctl", "semget", "semop", "semtimedop", "shmat", "shmctl", "shmdt", "shmget"];

/// The number of a call; None where there is no such call.
pub(super) fn number(abi: Abi, name: &str) -> Option<u32> {
    match abi {
        Abi::X86_64 => name.parse::<x86_64::Sysno>().ok().map(|number| number as u32),
        Abi::X32 => match X32.iter().position(|own| *own == name) {
            Some(at) => Some(X32_BIT | (X32_FIRST + at as u32)),
            None if NOT_ON_X32.contains(&name) => None,
            None => number(Abi::X86_64, name).map(|number| X32_BIT | number),
        },
        Abi::X86 => name.parse::<x86::Sysno>().ok().map(|number| number as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_a_number_per_convention() {
        let of = |name: &str| [Abi::X86_64, Abi::X32, Abi::X86].map(|abi| number(abi, name));
        assert_eq!(of("mkdir"), [Some(83), Some(0x4000_0053), Some(39)]);
        assert_eq!(of("ioctl"), [Some(16), Some(0x4000_0202), Some(54)]);
        assert_eq!(of("pwritev2")[1], Some(0x4000_0000 + 547));
        assert_eq!(of("get_thread_area"), [Some(211), None, Some(244)]);
        assert_eq!(of("socketcall"), [None, None, Some(102)]);
        assert_eq!(of("no_such_call"), [None; 3]);
    }
}
