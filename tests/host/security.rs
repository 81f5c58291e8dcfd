//! Who containers are and what holds them back, as they see it themselves: identity, capabilities, seccomp, AppArmor; in their first
//! process and in exec, with each OCI runtime.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crisp::api::runtime::security_profile::ProfileType;
use crisp::api::runtime::{
    Capability, ContainerConfig, Int64Value, LinuxContainerSecurityContext, Mount, SecurityProfile, SupplementalGroupsPolicy,
};
use grpcio::RpcStatusCode;
use protobuf::MessageField;

use crate::harness::{handlers, Container, Host, Sandbox};
use crate::objects::{container_config, create_request, sandbox_config};

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

fn profile(kind: ProfileType, localhost_ref: &str) -> MessageField<SecurityProfile> {
    MessageField::some(SecurityProfile { profile_type: kind.into(), localhost_ref: localhost_ref.into(), ..Default::default() })
}

fn int(value: i64) -> MessageField<Int64Value> {
    MessageField::some(Int64Value { value, ..Default::default() })
}

/// Created and started.
fn launch(host: &Host, sandbox: &Sandbox, name: &str, command: &[&str], adjust: impl FnOnce(&mut ContainerConfig)) -> Container {
    let container = host.create_with(sandbox, name, command, adjust);
    host.start_container(&container);
    container
}

/// The value of a line of /proc/PID/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":"));
    line.unwrap_or_else(|| panic!("no {name}: {status}")).trim()
}

fn capabilities(status: &str, name: &str) -> u64 {
    u64::from_str_radix(field(status, name), 16).unwrap_or_else(|e| panic!("{name}: {e}: {status}"))
}

/// The status of the first process and that of an exec's, which must say the same of what is looked at here.
fn statuses(host: &Host, container: &Container) -> [String; 2] {
    ["/proc/1/status", "/proc/self/status"].map(|path| {
        let (code, text, error) = host.exec(container, &["cat", path]);
        assert_eq!(code, 0, "{path}: {error}");
        text
    })
}

#[test]
fn identity_in_the_first_process_and_in_exec() {
    let host = Host::start();
    let own = fs::read_to_string("/proc/self/status").expect("read our own status");
    let bounding = capabilities(&own, "CapBnd");
    const DEFAULT: u64 = 0xa804_25fb;
    const NET_BIND_SERVICE: u64 = 1 << 10;
    const KILL: u64 = 1 << 5;
    for handler in handlers() {
        let sandbox = host.sandbox("who", &handler);
        let check = |name: &str, change: &dyn Fn(&mut LinuxContainerSecurityContext), verdict: &dyn Fn(&str)| {
            let container = launch(&host, &sandbox, name, &SLEEP, |config| change(security(config)));
            for status in statuses(&host, &container) {
                println!("--- {handler} {name}:\n{status}");
                verdict(&status);
            }
            host.remove(&container);
        };
        let capability = |add: &[&str], drop: &[&str], ambient: &[&str]| {
            let list = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
            MessageField::some(Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                add_ambient_capabilities: list(ambient),
                ..Default::default()
            })
        };

        check("plain", &|_| {}, &|status| {
            assert_eq!((field(status, "NoNewPrivs"), field(status, "Seccomp")), ("0", "0"));
            for set in ["CapBnd", "CapEff", "CapPrm"] {
                assert_eq!(capabilities(status, set), DEFAULT & bounding, "{set}: {status}");
            }
            assert_eq!((capabilities(status, "CapInh"), capabilities(status, "CapAmb")), (0, 0));
            assert_eq!(field(status, "Uid"), "0\t0\t0\t0");
        });
        check("all", &|s| s.capabilities = capability(&["ALL"], &["KILL"], &[]), &|status| {
            assert_eq!(capabilities(status, "CapBnd"), bounding & !KILL, "{status}");
            assert_eq!(capabilities(status, "CapEff"), bounding & !KILL, "{status}");
        });
        check("none", &|s| s.capabilities = capability(&[], &["ALL"], &[]), &|status| {
            for set in ["CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"] {
                assert_eq!(capabilities(status, set), 0, "{set}: {status}");
            }
        });
        let groups = |policy: SupplementalGroupsPolicy| {
            move |s: &mut LinuxContainerSecurityContext| {
                s.run_as_user = int(1234);
                s.run_as_group = int(77);
                s.supplemental_groups = vec![5, 9];
                s.supplemental_groups_policy = policy.into();
            }
        };
        check("strict", &groups(SupplementalGroupsPolicy::Strict), &|status| {
            assert_eq!(field(status, "Uid"), "1234\t1234\t1234\t1234");
            assert_eq!((field(status, "Gid"), field(status, "Groups")), ("77\t77\t77\t77", "5 9 77"));
            // Not root: nothing but ambient capabilities is effective, the bounding set stays.
            assert_eq!((capabilities(status, "CapEff"), capabilities(status, "CapBnd")), (0, DEFAULT & bounding));
        });
        let ambient = |s: &mut LinuxContainerSecurityContext| {
            s.run_as_user = int(1234);
            s.no_new_privs = true;
            s.capabilities = capability(&[], &["ALL"], &["NET_BIND_SERVICE"]);
        };
        check("ambient", &ambient, &|status| {
            for set in ["CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"] {
                assert_eq!(capabilities(status, set), NET_BIND_SERVICE, "{set}: {status}");
            }
            assert_eq!(field(status, "NoNewPrivs"), "1");
        });
        check("strict-root", &|s| s.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into(), &|status| {
            assert_eq!(field(status, "Groups"), "0");
        });
        host.remove_all();
    }
    host.finish();
}

#[test]
fn privileged_containers_are_held_back_by_nothing() {
    let host = Host::start();
    let bounding = capabilities(&fs::read_to_string("/proc/self/status").expect("read our own status"), "CapBnd");
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "root", false);
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        let sandbox = host.run(config, &handler);
        let container = launch(&host, &sandbox, "all", &SLEEP, |config| {
            let security = security(config);
            security.privileged = true;
            // All of these count for nothing beside it.
            security.capabilities.mut_or_insert_default().drop_capabilities = vec!["ALL".into()];
            security.seccomp = profile(ProfileType::Localhost, "/nonexistent/profile.json");
            security.masked_paths = vec!["/proc/kcore".into(), "/sys/firmware".into()];
            security.readonly_paths = vec!["/proc/sys".into()];
        });
        for status in statuses(&host, &container) {
            assert_eq!((capabilities(&status, "CapBnd"), capabilities(&status, "CapEff")), (bounding, bounding), "{status}");
            assert_eq!((field(&status, "Seccomp"), field(&status, "NoNewPrivs")), ("0", "0"), "{status}");
        }
        let script = "mount | grep -E ' /(sys|sys/fs/cgroup|proc/sys|sys/firmware|proc/kcore) '; ls /dev | wc -l; ls /dev/kmsg";
        let (code, text, error) = host.exec(&container, &["sh", "-c", script]);
        assert_eq!(code, 0, "{text}{error}");
        let sys = text.lines().find(|line| line.contains(" on /sys type ")).unwrap_or_else(|| panic!("{text}"));
        assert!(sys.contains("(rw,"), "{text}");
        assert!(!text.contains("(ro,") && !text.contains("/proc/sys") && !text.contains("/proc/kcore"), "{text}");
        host.remove_all();
    }
    host.finish();
}

/// A static program that makes one system call with two arguments and exits with its errno, 0 for success: for x86_64, or in its mode
/// of 32 bits.
fn probe(number: u32, first: u32, second: u32, narrow: bool) -> Vec<u8> {
    let mut code = Vec::new();
    let (to_first, to_second, call, to_status, exit): (u8, u8, [u8; 2], [u8; 2], u32) = match narrow {
        false => (0xbf, 0xbe, [0x0f, 0x05], [0x89, 0xc7], 60), // edi, esi; syscall; mov edi, eax
        true => (0xbb, 0xb9, [0xcd, 0x80], [0x89, 0xc3], 1),   // ebx, ecx; int 0x80; mov ebx, eax
    };
    for (opcode, value) in [(0xb8, number), (to_first, first), (to_second, second)] {
        code.push(opcode);
        code.extend(value.to_le_bytes());
    }
    code.extend([0x31, 0xd2]); // xor edx, edx
    code.extend(call);
    code.extend([0x85, 0xc0, 0x79, 0x06, 0xf7, 0xd8]); // test eax, eax; jns +6; neg eax
    code.extend(to_status);
    code.extend([0xeb, 0x02, 0x31, if narrow { 0xdb } else { 0xff }]); // jmp +2; xor status, status
    code.push(0xb8);
    code.extend(exit.to_le_bytes());
    code.extend(call);

    const BASE: u32 = 0x40_0000;
    let (header, entry) = if narrow { (52u16, 32u16) } else { (64, 56) };
    let start = u32::from(header + entry);
    let size = start + code.len() as u32;
    let mut elf = vec![0x7f, b'E', b'L', b'F', if narrow { 1 } else { 2 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let word = |elf: &mut Vec<u8>, value: u32| match narrow {
        true => elf.extend(value.to_le_bytes()),
        false => elf.extend(u64::from(value).to_le_bytes()),
    };
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(if narrow { 3u16 } else { 62 }.to_le_bytes()); // EM_386, EM_X86_64
    elf.extend(1u32.to_le_bytes());
    word(&mut elf, BASE + start); // entry
    word(&mut elf, u32::from(header)); // program headers
    word(&mut elf, 0);
    elf.extend(0u32.to_le_bytes());
    for value in [header, entry, 1, 0, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    assert_eq!(elf.len(), usize::from(header));
    elf.extend(1u32.to_le_bytes()); // PT_LOAD
    if !narrow {
        elf.extend(5u32.to_le_bytes()); // read and execute
    }
    word(&mut elf, 0);
    word(&mut elf, BASE);
    word(&mut elf, BASE);
    word(&mut elf, size);
    word(&mut elf, size);
    if narrow {
        elf.extend(5u32.to_le_bytes());
    }
    word(&mut elf, 0x1000);
    elf.extend(code);
    elf
}

const EPERM: i32 = 1;
const EINVAL: i32 = 22;
const ENOSYS: i32 = 38;

/// Name, number, arguments, whether it is of 32 bits, and the errno under RuntimeDefault and without a filter.
type Probe = (&'static str, u32, [u32; 2], bool, i32, i32);

/// Calls whose answer without a filter is another, or success where the profile allows them.
const PROBES: [Probe; 12] = [
    ("getpid", 39, [0, 0], false, 0, 0),
    ("clone3", 435, [0, 0], false, ENOSYS, EINVAL),
    ("unshare-user", 272, [0x1000_0000, 0], false, EPERM, 0),
    ("socket-unix", 41, [1, 1], false, 0, 0),
    // Left out: 97 (EAFNOSUPPORT) or success, as the kernel was built.
    ("personality-question", 135, [0xffff_ffff, 0], false, 0, 0),
    ("personality-no-randomize", 135, [0x004_0000, 0], false, EPERM, 0),
    ("bpf", 321, [999, 0], false, EPERM, EINVAL),
    ("io_uring_setup", 425, [0, 0], false, EPERM, 14),
    ("getpid32", 20, [0, 0], true, 0, 0),
    ("clone3-32", 435, [0, 0], true, ENOSYS, EINVAL),
    ("unshare-user32", 310, [0x1000_0000, 0], true, EPERM, 0),
    ("personality-no-randomize32", 136, [0x004_0000, 0], true, EPERM, 0),
];

/// Writes the probes of this machine, and says which there are.
fn write_probes(dir: &Path) -> Vec<Probe> {
    // Elsewhere tests/host/seccomp compares the filters alone.
    let here = PROBES.into_iter().filter(|_| cfg!(target_arch = "x86_64"));
    let written = here.inspect(|(name, number, args, narrow, ..)| {
        let path = dir.join(name);
        fs::write(&path, probe(*number, args[0], args[1], *narrow)).expect("write a probe");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
    });
    written.collect()
}

fn with_probes(config: &mut ContainerConfig, dir: &Path) {
    config.mounts.push(Mount {
        container_path: "/probes".into(),
        host_path: dir.display().to_string(),
        readonly: true,
        ..Default::default()
    });
}

#[test]
fn seccomp_answers_of_each_kind_of_profile() {
    let host = Host::start();
    let dir = tempfile::tempdir().expect("make a directory");
    let probes = write_probes(dir.path());
    // The form of Docker, with conditions: chroot is gone with its capability, clone3 gets an errno of its own.
    let file = dir.path().join("profile.json");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
                    {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": null}],
        "syscalls": [
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errno": "EDOM", "comment": "a number nobody else answers with"},
            {"name": "personality", "action": "SCMP_ACT_ERRNO", "errnoRet": 34, "args": [{"index": 0, "value": 4294967295, "op": "SCMP_CMP_EQ"}]},
            {"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 33, "excludes": {"caps": ["CAP_SYS_ADMIN"], "minKernel": "99.0"}}]}"#;
    fs::write(&file, text).expect("write the profile");
    for handler in handlers() {
        let sandbox = host.sandbox("filtered", &handler);
        let run = |name: &str, change: &dyn Fn(&mut LinuxContainerSecurityContext), expected: &dyn Fn(&Probe) -> i32, mode: &str| {
            let container = launch(&host, &sandbox, name, &SLEEP, |config| {
                change(security(config));
                with_probes(config, dir.path());
            });
            for status in statuses(&host, &container) {
                assert_eq!(field(&status, "Seccomp"), mode, "{handler} {name}: {status}");
            }
            let answers = |probe: &Probe| (probe.0, host.exec(&container, &[&format!("/probes/{}", probe.0)]).0);
            let found: Vec<_> = probes.iter().map(answers).collect();
            let wanted: Vec<_> = probes.iter().map(|probe| (probe.0, expected(probe))).collect();
            assert_eq!(found, wanted, "{handler} {name}");
            host.remove(&container);
        };
        let default = |probe: &Probe| probe.4;
        let open = |probe: &Probe| probe.5;
        run("default", &|s| s.seccomp = profile(ProfileType::RuntimeDefault, ""), &default, "2");
        run("default-old", &|s| s.seccomp_profile_path = "runtime/default".into(), &default, "2");
        run("unconfined", &|s| s.seccomp = profile(ProfileType::Unconfined, ""), &open, "0");
        run("unset", &|_| {}, &open, "0");
        let from_file = |probe: &Probe| match probe.0 {
            "clone3" | "clone3-32" => 33,
            "personality-question" => 34,
            "bpf" => 33,
            _ => probe.5,
        };
        let path = file.display().to_string();
        run("file", &|s| s.seccomp = profile(ProfileType::Localhost, &path), &from_file, "2");
        run("file-old", &|s| s.seccomp_profile_path = format!("localhost/{path}"), &from_file, "2");
        // With the capability the profile is another.
        let with_admin = |s: &mut LinuxContainerSecurityContext| {
            s.seccomp = profile(ProfileType::RuntimeDefault, "");
            s.capabilities.mut_or_insert_default().add_capabilities = vec!["SYS_ADMIN".into()];
        };
        let admin = |probe: &Probe| match probe.0 {
            name if name.starts_with("clone3") || name.starts_with("unshare") || name == "bpf" => probe.5,
            _ => probe.4,
        };
        run("admin", &with_admin, &admin, "2");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn seccomp_files_that_are_none() {
    let host = Host::start();
    let sandbox = host.sandbox("filtered", "");
    let dir = tempfile::tempdir().expect("make a directory");
    let file = dir.path().join("profile.json");
    let refused = |reference: &str| {
        let mut config = container_config(&sandbox.config, "app", &SLEEP);
        security(&mut config).seccomp = profile(ProfileType::Localhost, reference);
        host.refused(&create_request(&sandbox.id, &sandbox.config, &config))
    };
    let path = file.display().to_string();
    let (code, message) = refused(&path);
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{message}");
    assert!(message.contains(&path), "{message}");
    fs::write(&file, r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_DENY"}]}"#)
        .expect("write");
    let (code, message) = refused(&path);
    assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{message}");
    assert!(message.contains(&path) && message.contains("syscalls[0].action"), "{message}");
    assert_eq!(refused("profile.json").0, RpcStatusCode::INVALID_ARGUMENT);
    host.finish();
}

fn apparmor_is_enabled() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'))
        && Path::new("/sys/kernel/security/apparmor").is_dir()
}

/// On hosts with AppArmor: its kernel, its parser. On others: what is asked for by name is refused, and nothing else changes.
#[test]
fn apparmor_profiles() {
    let host = Host::start();
    let try_create = |sandbox: &Sandbox, apparmor: MessageField<SecurityProfile>| {
        let mut config = container_config(&sandbox.config, "refused", &SLEEP);
        security(&mut config).apparmor = apparmor;
        host.refused(&create_request(&sandbox.id, &sandbox.config, &config))
    };
    for handler in handlers() {
        let sandbox = host.sandbox("armed", &handler);
        let labels = |name: &str, change: &dyn Fn(&mut LinuxContainerSecurityContext)| {
            let container = launch(&host, &sandbox, name, &SLEEP, |config| change(security(config)));
            let labels = ["/proc/1/attr/current", "/proc/self/attr/current"].map(|path| host.exec(&container, &["cat", path]).1);
            let kcore = host.exec(&container, &["sh", "-c", "head -c 1 /proc/kcore >/dev/null"]);
            host.remove(&container);
            assert_eq!(labels[0], labels[1], "{handler} {name}");
            (labels[0].trim().to_owned(), kcore.0)
        };
        if !apparmor_is_enabled() {
            for asked in [profile(ProfileType::RuntimeDefault, ""), profile(ProfileType::Localhost, "localhost/mine")] {
                let (code, message) = try_create(&sandbox, asked);
                assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{message}");
                assert!(message.contains("AppArmor is not enabled"), "{message}");
            }
            labels("unset", &|_| {});
            labels("unconfined", &|s| s.apparmor = profile(ProfileType::Unconfined, ""));
            host.remove_all();
            continue;
        }
        let default = ("crisp-default (enforce)".to_owned(), 1);
        assert_eq!(labels("unset", &|_| {}), default);
        assert_eq!(labels("default", &|s| s.apparmor = profile(ProfileType::RuntimeDefault, "")), default);
        assert_eq!(labels("default-old", &|s| s.apparmor_profile = "runtime/default".into()), default);
        assert_eq!(labels("named", &|s| s.apparmor = profile(ProfileType::Localhost, "localhost/crisp-default")), default);
        assert_eq!(labels("unconfined", &|s| s.apparmor = profile(ProfileType::Unconfined, "")).0, "unconfined");
        let (code, message) = try_create(&sandbox, profile(ProfileType::Localhost, "no-such-profile"));
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("no-such-profile"), "{message}");
        // A container of its own can be stopped and killed from outside: signals pass.
        let container = launch(&host, &sandbox, "deaf", &["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"], |_| {});
        host.stop(&container, 30);
        assert_eq!(host.status(&container).exit_code, 7);
        host.remove_all();

        let mut config = sandbox_config(&host.daemon.layout, "rooted", false);
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        let privileged = host.run(config, &handler);
        let container = launch(&host, &privileged, "root", &SLEEP, |config| security(config).privileged = true);
        assert_eq!(host.exec(&container, &["cat", "/proc/1/attr/current"]).1.trim(), "unconfined");
        host.remove_all();
    }
    host.finish();
}

/// Where the daemon keeps the spec of a container.
fn spec_of(host: &Host, container: &Container) -> serde_json::Value {
    let path: PathBuf = host.daemon.layout.path("run").join("containers").join(&container.id).join("config.json");
    serde_json::from_slice(&fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).expect("JSON")
}

#[test]
fn compiled_filters_are_for_runtimes_that_would_compile() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("filtered", &handler);
        let container = host.create_with(&sandbox, "app", &SLEEP, |config| {
            security(config).seccomp = profile(ProfileType::RuntimeDefault, "");
        });
        let spec = spec_of(&host, &container);
        assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        let filter = spec["annotations"]["run.oci.seccomp_bpf_data"].as_str();
        let compiles = handler == "crun" && crate::seccomp::crun_compiles_each_time() && cfg!(target_arch = "x86_64");
        assert_eq!(filter.is_some(), compiles, "{handler}");
        host.remove_all();
    }
    host.finish();
}
