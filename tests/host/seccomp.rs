//! The filters that we compile beside those that libseccomp does, call by call: crun leaves its own in its state directory.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use base64::prelude::{Engine, BASE64_STANDARD};
use crisp::spec::seccomp::{bpf, runtime_default, Conditions, Profile};
use crisp::spec::security::BY_NUMBER;
use crisp::sys::cancel::Cancel;
use crisp::sys::process::Program;
use oci_spec::runtime::{Arch, Capabilities, Capability, LinuxSeccomp};
use serde_json::json;

use crate::bpf::{run, Call};
use crate::daemon::{find, patience};
use crate::harness::wanted_runtimes;
use crate::spec::{Hugetlb, TURN};

/// AUDIT_ARCH of linux/audit.h: x86_64, i386, aarch64, arm, and one that no profile here lists.
const ARCHES: [u32; 5] = [0xc000_003e, 0x4000_0003, 0xc000_00b7, 0x4000_0028, 0xc000_00f3];

/// Values around those that rules compare with, and with bits that only one half sees.
const VALUES: [u64; 38] = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    11,
    12,
    13,
    16,
    19,
    20,
    23,
    25,
    34,
    37,
    38,
    39,
    40,
    41,
    45,
    46,
    100,
    101,
    0x2_0000,
    0x2_0008,
    0x2_0009,
    0x0200_0000,
    0x7e02_0000,
    0x7e02_0011,
    0x1_0000_0000,
    0x1_0000_0002,
    0x1_0000_0026,
    0xffff_fffe,
    0xffff_ffff,
    0x1_ffff_ffff,
    u64::MAX,
];

fn crun() -> Program {
    Program::new(find("crun").expect("crun is not installed: run scripts/install-deps"))
}

/// Whether the installed crun is one before 1.14, which gets compiled filters.
pub fn crun_compiles_each_time() -> bool {
    let output = crun().arg("--version").run_ok(&Cancel::never(), patience(Duration::from_secs(10))).expect("crun --version");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.lines().next().and_then(|line| line.strip_prefix("crun version ")).expect("a version").trim().to_owned();
    let mut numbers = version.split('.').map(|n| n.parse::<u32>().expect("a number"));
    (numbers.next().expect("major"), numbers.next().expect("minor")) < (1, 14)
}

/// What crun makes of a profile: the filter, and the names it does not know.
fn by_crun(profile: &LinuxSeccomp, dir: &Path, number: usize) -> (Vec<u8>, BTreeSet<String>) {
    let (id, bundle) = (format!("crisp-seccomp-{}-{number}", std::process::id()), dir.join(format!("bundle{number}")));
    std::fs::create_dir_all(bundle.join("rootfs/proc")).expect("make a root");
    std::fs::create_dir_all(bundle.join("rootfs/dev")).expect("make a root");
    std::fs::create_dir_all(bundle.join("rootfs/bin")).expect("make a root");
    std::fs::copy("/bin/busybox", bundle.join("rootfs/bin/busybox")).expect("copy busybox");
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["/bin/busybox", "true"], "env": ["PATH=/bin"], "terminal": false},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"cgroupsPath": format!("/{id}"), "namespaces": [{"type": "pid"}, {"type": "mount"}], "seccomp": profile},
    });
    std::fs::write(bundle.join("config.json"), spec.to_string()).expect("write config.json");
    let (state, log) = (dir.join("state"), dir.join("log"));
    let limit = patience(Duration::from_secs(30));
    let command = || crun().arg("--debug").arg("--log").arg(&log).arg("--root").arg(&state);
    let null = || std::fs::File::options().write(true).open("/dev/null").expect("open /dev/null").into();
    let create = command().arg("create").arg("--bundle").arg(&bundle).arg(&id).stdout_to(null()).stderr_to(null());
    let created = create.run_ok(&Cancel::never(), limit);
    let filter = std::fs::read(state.join(&id).join("seccomp.bpf"));
    let deleted = command().args(["delete", "--force", &id]).run_ok(&Cancel::never(), limit);
    let log = std::fs::read_to_string(&log).unwrap_or_default();
    created.unwrap_or_else(|e| panic!("{e}: {log}"));
    deleted.expect("delete the container");
    let unknown = log.lines().filter_map(|line| line.split_once("unknown seccomp syscall `")?.1.split('`').next());
    (filter.expect("crun's filter"), unknown.map(str::to_owned).collect())
}

/// The same profile without these names: libseccomp leaves out what it is too old to know.
fn without(profile: &LinuxSeccomp, names: &BTreeSet<String>) -> LinuxSeccomp {
    let mut profile = profile.clone();
    let mut syscalls = profile.syscalls().clone().unwrap_or_default();
    for syscall in &mut syscalls {
        let known = syscall.names().iter().filter(|name| !names.contains(*name)).cloned().collect();
        syscall.set_names(known);
    }
    syscalls.retain(|syscall| !syscall.names().is_empty());
    profile.set_syscalls(Some(syscalls));
    profile
}

fn numbers() -> Vec<u32> {
    let ranges = [0..600, 0x3fff_fff0..0x4000_0300, 0xf_0000..0xf_0008, 0x7fff_fff0..0x8000_0010, 0xffff_fff0..0xffff_ffff];
    ranges.into_iter().flatten().chain([u32::MAX]).collect()
}

/// Every call with a few arguments, those that look at them with all.
fn compare(name: &str, ours: &[u8], theirs: &[u8]) {
    let (mut compared, mut differences) = (0, Vec::new());
    let mut ask = |call: Call| {
        compared += 1;
        let answers = (run(ours, &call), run(theirs, &call));
        if answers.0 != answers.1 && differences.len() < 20 {
            differences.push(format!("{call:x?}: ours {:#x}, theirs {:#x}", answers.0, answers.1));
        }
        answers.0
    };
    for arch in ARCHES {
        for number in numbers() {
            let mut answers = BTreeSet::new();
            for value in [0, 38, 0x2_0009, 0x7e02_0000, 0x1_0000_0002, u64::MAX] {
                answers.insert(ask(Call { arch, number, args: [value; 6] }));
            }
            if answers.len() > 1 {
                for (first, second) in VALUES.iter().flat_map(|first| VALUES.map(|second| (*first, second))) {
                    ask(Call { arch, number, args: [first, second, second, first, second, first] });
                }
            }
        }
    }
    println!("{name}: {compared} calls compared, {} bytes beside {}", ours.len(), theirs.len());
    assert!(differences.is_empty(), "{name}:\n{}", differences.join("\n"));
}

#[test]
fn filters_answer_as_libseccomps() {
    if !wanted_runtimes().contains(&"crun") {
        return;
    }
    let arch = std::env::consts::ARCH;
    if arch != "x86_64" {
        return;
    }
    let default = |bounding: &[Capability]| {
        let bounding: Capabilities = bounding.iter().copied().collect();
        runtime_default(&Conditions { bounding: &bounding, arch, kernel: (6, 1) })
    };
    let with = |mut profile: LinuxSeccomp, architectures: &[Arch]| {
        profile.set_architectures(Some(architectures.to_vec()));
        profile
    };
    let file = |text: &str| {
        let profile = Profile::parse(text.as_bytes()).expect("a profile");
        profile.resolve(&Conditions { bounding: &Capabilities::new(), arch, kernel: (6, 1) }).expect("resolve").0
    };
    // Of calls that crun can do without between the filter and its end.
    const OPERATORS: &str = r#"{"defaultAction": "SCMP_ACT_LOG", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], "syscalls": [
        {"names": ["kcmp"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7, "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
        {"names": ["acct"], "action": "SCMP_ACT_TRAP", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_LT"}]},
        {"names": ["quotactl"], "action": "SCMP_ACT_KILL_PROCESS", "args": [{"index": 1, "value": 40, "op": "SCMP_CMP_LE"}]},
        {"names": ["swapon"], "action": "SCMP_ACT_KILL", "args": [{"index": 1, "value": 40, "op": "SCMP_CMP_GT"}]},
        {"names": ["swapoff"], "action": "SCMP_ACT_TRACE", "errnoRet": 9, "args": [{"index": 2, "value": 40, "op": "SCMP_CMP_GE"}]},
        {"names": ["iopl"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 12, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 40, "op": "SCMP_CMP_GE"}]},
        {"names": ["vhangup"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 12, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}]},
        {"names": ["ustat"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 3, "value": 33685504, "valueTwo": 33554432, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["mmap", "mprotect"], "action": "SCMP_ACT_LOG"},
        {"names": ["kexec_load"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["kexec_load"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["brk"], "action": "SCMP_ACT_ERRNO", "errnoRet": 3, "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}]},
        {"names": ["brk"], "action": "SCMP_ACT_ALLOW"}]}"#;
    const WIDE: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["kcmp"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 4294967298, "op": "SCMP_CMP_GT"}]},
        {"names": ["acct"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 4294967298, "op": "SCMP_CMP_LE"}]},
        {"names": ["vmsplice"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 8589934591, "valueTwo": 4294967295, "op": "SCMP_CMP_MASKED_EQ"}]}]}"#;
    use Arch::*;
    let all_capabilities = default(&BY_NUMBER);
    let cases = vec![
        ("default", default(&[])),
        ("default with SYS_ADMIN", default(&[Capability::SysAdmin])),
        ("default with all capabilities", all_capabilities.clone()),
        ("default without other architectures", with(default(&[]), &[])),
        ("without x32", with(all_capabilities, &[ScmpArchX86_64, ScmpArchX86])),
        ("wide values", file(WIDE)),
        ("operators", file(OPERATORS)),
    ];
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let _hugetlb = Hugetlb::mount();
    for (n, (name, profile)) in cases.into_iter().enumerate() {
        let dir = tempfile::tempdir().expect("make a directory");
        let (theirs, unknown) = by_crun(&profile, dir.path(), n);
        println!("{name}: unknown to this libseccomp: {unknown:?}");
        let ours = bpf::compile(&without(&profile, &unknown), arch).unwrap_or_else(|| panic!("{name}: not compiled"));
        compare(name, &ours, &theirs);
        assert!(BASE64_STANDARD.encode(&ours).len() < 64 << 10, "{name}: {} bytes", ours.len());
    }
}
