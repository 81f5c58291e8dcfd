//! Specs as real runtimes understand them: each test runs busybox in a container made from a CRI request by `crisp::spec`,
//! with runc and with crun, and reads what the container saw. Needs root, runc, crun and busybox-static.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use crisp::api::runtime::security_profile::ProfileType;
use crisp::api::runtime::{
    Capability, ContainerConfig, ContainerMetadata, Int64Value, KeyValue, LinuxContainerResources, LinuxContainerSecurityContext, Mount,
    PodSandboxConfig, PodSandboxMetadata, SecurityProfile,
};
use crisp::container::{devices, host, mounts, user};
use crisp::spec::{self, Classes, Defaults, HostFacts, Inputs, NamespacePaths, SandboxFiles};
use crisp::sys::cancel::Cancel;
use crisp::sys::namespace::{self, NewNamespaces};
use crisp::sys::process::{Output, Program};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::Spec;
use protobuf::MessageField;

use crate::daemon::patience;
use crate::harness::wanted_runtimes;

static LIMIT: LazyLock<Duration> = LazyLock::new(|| patience(Duration::from_secs(30)));
const BUSYBOX: &str = "/bin/busybox";
const HUGETLB: &str = "/sys/fs/cgroup/hugetlb";

static HOST: LazyLock<HostFacts> = LazyLock::new(|| host::detect().unwrap());
static COUNT: AtomicU32 = AtomicU32::new(0);
/// crun needs a mount while it runs, and one mount serves all tests: so they take turns.
pub static TURN: Mutex<()> = Mutex::new(());

/// crun before 1.9 refuses hybrid cgroups unless hugetlb is a v1 hierarchy.
pub struct Hugetlb {
    mounted: bool,
    made: bool,
}

impl Hugetlb {
    pub fn mount() -> Hugetlb {
        let present = std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(HUGETLB);
        if HOST.cgroup_v2 || present {
            return Hugetlb { mounted: false, made: false };
        }
        let made = std::fs::create_dir(HUGETLB).is_ok();
        program("mount").args(["-t", "cgroup", "-o", "hugetlb", "cgroup", HUGETLB]).run_ok(&Cancel::never(), *LIMIT).unwrap();
        Hugetlb { mounted: true, made }
    }
}

impl Drop for Hugetlb {
    fn drop(&mut self) {
        if self.mounted {
            let _ = program("umount").arg(HUGETLB).run(&Cancel::never(), *LIMIT);
        }
        if self.made {
            let _ = std::fs::remove_dir(HUGETLB);
        }
    }
}

fn program(name: &str) -> Program {
    let path = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists());
    Program::new(path.unwrap_or_else(|| panic!("{name} is not installed")))
}

/// A request and what is around it.
struct Case {
    sandbox: PodSandboxConfig,
    config: ContainerConfig,
    image_user: String,
    namespaces: NamespacePaths,
    files: SandboxFiles,
    dir: tempfile::TempDir,
}

impl Case {
    fn new(script: &str) -> Case {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        for name in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
            std::fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        std::fs::copy(BUSYBOX, rootfs.join("bin/busybox")).unwrap();
        for applet in ["sh", "cat", "id", "unshare", "ls", "grep", "touch", "head", "mknod", "stat", "env", "pwd", "hostname", "mount"] {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:100::/home/app:/bin/sh\n").unwrap();
        std::fs::write(rootfs.join("etc/group"), "root:x:0:\nusers:x:100:\ndata:x:20:app\n").unwrap();
        let metadata = PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), ..Default::default() };
        let config = ContainerConfig {
            metadata: MessageField::some(ContainerMetadata { name: "c".into(), ..Default::default() }),
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            ..Default::default()
        };
        Case {
            sandbox: PodSandboxConfig { metadata: MessageField::some(metadata), ..Default::default() },
            config,
            image_user: String::new(),
            namespaces: NamespacePaths::default(),
            files: SandboxFiles::default(),
            dir,
        }
    }

    fn with(script: &str, change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> Case {
        let mut case = Case::new(script);
        change(case.config.linux.mut_or_insert_default().security_context.mut_or_insert_default());
        case
    }

    fn privileged(script: &str) -> Case {
        let mut case = Case::with(script, |security| security.privileged = true);
        case.sandbox.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        case
    }

    fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    fn spec(&self, id: &str) -> Spec {
        let rootfs = self.rootfs();
        let user = user::resolve(&rootfs, &self.config.linux.security_context, &self.image_user).unwrap();
        let mut mounts = mounts::check_all(&self.config.mounts, &HOST, true).unwrap();
        mounts::find(&mut mounts).unwrap();
        let devices = devices::collect(&self.config, false).unwrap();
        let cwd = spec::process::working_dir(&self.config.working_dir, "").unwrap();
        mounts::prepare_root(&rootfs, &cwd, None).unwrap();
        let inputs = Inputs {
            sandbox_id: "s",
            sandbox: &self.sandbox,
            config: &self.config,
            image: &ImageConfiguration::default(),
            user: &user,
            namespaces: &self.namespaces,
            rootfs: &rootfs,
            mounts: &mounts,
            devices: &devices,
            classes: &Classes::default(),
            cgroups_path: &format!("/{id}"),
            hostname: "p",
            host: &HOST,
            files: &self.files,
            defaults: &Defaults::default(),
            confinement: &Default::default(),
        };
        spec::build(&inputs).unwrap().0
    }

    fn run_with(&self, runtime: &str) -> Output {
        let id = format!("crisp-spec-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        std::fs::write(self.dir.path().join("config.json"), serde_json::to_vec(&self.spec(&id)).unwrap()).unwrap();
        let state = self.dir.path().join(runtime);
        let run = program(runtime).arg("--root").arg(&state).args(["run", "--bundle"]).arg(self.dir.path()).arg(&id);
        let output = run.run(&Cancel::never(), *LIMIT).unwrap();
        let _ = program(runtime).arg("--root").arg(&state).args(["delete", "--force", &id]).run(&Cancel::never(), *LIMIT);
        output
    }

    /// What the container printed with each runtime; it must succeed.
    fn check(&self, verdict: impl Fn(&str)) {
        let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let _hugetlb = Hugetlb::mount();
        for runtime in wanted_runtimes() {
            let output = self.run_with(runtime);
            let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            println!("--- {runtime}: {}\n{text}{errors}", output.describe());
            assert!(output.status.success(), "{runtime}: {}: {text}{errors}", output.describe());
            verdict(&text);
        }
    }
}

#[test]
fn ordinary_container() {
    let script = "id; pwd; env; cat /proc/self/status | grep Cap; ls /dev; touch /tmp/x && echo writable; \
                  touch /sys/x 2>/dev/null || echo sys readonly; \
                  for d in /sys/fs/cgroup /sys/fs/cgroup/*/; do busybox mkdir $d/x 2>/dev/null && echo $d is not; done; [ $$ = 1 ] && echo pid one; \
                  head -c 1 /dev/zero | wc -c; cat /dev/kmsg 2>&1 | head -1; cat /proc/self/oom_score_adj";
    let mut case = Case::new(script);
    case.config.envs = vec![KeyValue { key: "A".into(), value: "one two".into(), ..Default::default() }];
    case.config.working_dir = "/work/dir".into();
    case.check(|text| {
        for line in ["uid=0(root) gid=0(root)", "/work/dir", "A=one two", "HOSTNAME=p", "HOME=/root", "writable", "sys readonly", "pid one"]
        {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("is not"), "{text}");
        for line in ["CapBnd:\t00000000a80425fb", "CapEff:\t00000000a80425fb", "CapInh:\t0000000000000000", "\nfull\n", "\n0\n"] {
            assert!(text.contains(line), "{line}: {text}");
        }
    });
}

#[test]
fn privileged_container() {
    let script = "cat /proc/self/status | grep CapBnd; [ -w /sys/fs/cgroup ] && echo ok; ls /dev; mount | grep ' /sys ' ; \
                  mount -t tmpfs tmpfs /tmp && echo mounted; unshare -n true && echo unshared";
    let bounding: u64 = {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let hex = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap().trim().to_owned();
        u64::from_str_radix(&hex, 16).unwrap()
    };
    Case::privileged(script).check(|text| {
        assert!(text.contains(&format!("CapBnd:\t{bounding:016x}")), "{text}");
        assert!(text.contains("mounted") && text.contains("unshared"), "{text}");
        assert!(text.contains("(rw,"), "{text}");
        assert!(text.contains("kmsg"), "{text}");
    });
}

#[test]
fn readonly_rootfs() {
    let dir = tempfile::tempdir().unwrap();
    let mut case = Case::with("touch /x 2>&1; touch /data/y && echo data; touch /ro/z 2>&1; true", |s| s.readonly_rootfs = true);
    let mount = |path: &str, readonly| Mount {
        container_path: path.into(),
        host_path: dir.path().join(path.trim_start_matches('/')).display().to_string(),
        readonly,
        ..Default::default()
    };
    case.config.mounts = vec![mount("/data", false), mount("/ro", true)];
    // A runtime cannot make mount points in a read-only root, but does so before it turns read-only.
    case.check(|text| {
        assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
        assert!(text.contains("data"), "{text}");
        assert!(dir.path().join("data/y").exists());
    });
}

#[test]
fn capabilities_dropped_and_added() {
    let capability = Capability {
        add_capabilities: vec!["net_bind_service".into()],
        drop_capabilities: vec!["ALL".into()],
        add_ambient_capabilities: vec!["CAP_KILL".into()],
        ..Default::default()
    };
    let case = Case::with("grep Cap /proc/self/status", |security| {
        security.capabilities = MessageField::some(capability.clone());
        security.run_as_user = MessageField::some(Int64Value { value: 1000, ..Default::default() });
    });
    case.check(|text| {
        for line in ["CapBnd:\t0000000000000420", "CapEff:\t0000000000000020", "CapAmb:\t0000000000000020"] {
            assert!(text.contains(line), "{line}: {text}");
        }
    });
}

#[test]
fn run_as_user_with_groups() {
    let case = Case::with("id; env | grep HOME; grep NoNewPrivs /proc/self/status", |security| {
        security.run_as_user = MessageField::some(Int64Value { value: 1000, ..Default::default() });
        security.supplemental_groups = vec![77];
        security.no_new_privs = true;
    });
    case.check(|text| {
        assert!(text.contains("uid=1000(app) gid=100(users) groups=20(data),77,100(users)"), "{text}");
        assert!(text.contains("HOME=/home/app") && text.contains("NoNewPrivs:\t1"), "{text}");
    });
}

#[test]
fn seccomp_default_profile() {
    let script =
        "grep Seccomp: /proc/self/status; unshare -n true 2>&1 && echo unshared; unshare -U true 2>&1 && echo userns; echo end | cat";
    let profile = SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), ..Default::default() };
    Case::with(script, |security| security.seccomp = MessageField::some(profile.clone())).check(|text| {
        assert!(text.contains("Seccomp:\t2") && text.contains("end"), "{text}");
        assert!(text.contains("Operation not permitted") && !text.contains("unshared") && !text.contains("userns"), "{text}");
    });
    let unconfined = SecurityProfile { profile_type: ProfileType::Unconfined.into(), ..Default::default() };
    Case::with(script, |security| security.seccomp = MessageField::some(unconfined)).check(|text| {
        assert!(text.contains("Seccomp:\t0") && text.contains("userns"), "{text}");
    });
}

#[test]
fn masked_and_readonly_paths() {
    let script = "head -c 5 /proc/interrupts | wc -c; ls /proc/fs | wc -l; echo 1 2>&1 >/proc/sys/vm/overcommit_memory";
    let case = Case::with(&format!("({script}) 2>&1; true"), |security| {
        security.masked_paths = vec!["/proc/interrupts".into(), "/proc/fs".into(), "/proc/not-there".into()];
        security.readonly_paths = vec!["/proc/sys".into(), "/proc/not-there".into()];
    });
    case.check(|text| {
        assert!(text.starts_with("0\n0\n"), "{text}");
        assert!(text.contains("Read-only file system"), "{text}");
    });
}

#[test]
fn limits_reach_the_cgroup() {
    let files = match HOST.cgroup_v2 {
        true => "memory.max cpu.max cpu.weight",
        false => "memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.shares cpuset/cpuset.cpus",
    };
    let mut case = Case::new(&format!("cd /sys/fs/cgroup && cat {files}; cat /proc/self/oom_score_adj"));
    case.config.linux.mut_or_insert_default().resources = MessageField::some(LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_quota: 25_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        cpuset_cpus: "0".into(),
        oom_score_adj: 321,
        ..Default::default()
    });
    case.check(|text| {
        let expected = match HOST.cgroup_v2 {
            true => "67108864\n25000 100000\n20\n321\n",
            false => "67108864\n67108864\n25000\n512\n0\n321\n",
        };
        assert_eq!(text, expected);
    });
}

#[test]
fn joined_namespaces_keep_their_hostname() {
    let pins = tempfile::tempdir().unwrap();
    let pin = |name: &str| Some(pins.path().join(name));
    let new = NewNamespaces { net: pin("net"), ipc: pin("ipc"), uts: pin("uts"), hostname: Some("sandbox".into()), ..Default::default() };
    namespace::create(new).unwrap();
    let shm = pins.path().join("shm");
    std::fs::create_dir(&shm).unwrap();
    let hosts = pins.path().join("hosts");
    std::fs::write(&hosts, "127.0.0.1 here\n").unwrap();

    let mut case = Case::new("hostname; ls /sys/class/net; cat /etc/hosts; touch /dev/shm/mark");
    case.namespaces = NamespacePaths { net: pin("net"), ipc: pin("ipc"), uts: pin("uts"), ..Default::default() };
    case.files = SandboxFiles { hosts: Some(hosts), shm: Some(shm.clone()), ..Default::default() };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        case.check(|text| assert_eq!(text, "sandbox\nlo\n127.0.0.1 here\n"));
        assert!(shm.join("mark").exists());
    }));
    for name in ["net", "ipc", "uts"] {
        namespace::unpin(&pins.path().join(name)).unwrap();
    }
    result.unwrap();
}

#[test]
fn exec_and_update() {
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let _hugetlb = Hugetlb::mount();
    for runtime in wanted_runtimes() {
        let mut case = Case::new("exec /bin/busybox sleep 60");
        case.image_user = "app".into();
        case.config.linux.mut_or_insert_default().resources =
            MessageField::some(LinuxContainerResources { memory_limit_in_bytes: 64 << 20, cpu_quota: 20_000, ..Default::default() });
        let id = format!("crisp-spec-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut spec = case.spec(&id);
        std::fs::write(case.dir.path().join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        let state = case.dir.path().join("state");
        let command = |verb: &str| program(runtime).arg("--root").arg(&state).arg(verb);
        let null = || std::fs::File::options().write(true).open("/dev/null").unwrap().into();
        let create = command("create").arg("--bundle").arg(case.dir.path()).arg(&id).stdout_to(null()).stderr_to(null());
        create.run_ok(&Cancel::never(), *LIMIT).unwrap();

        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            command("start").arg(&id).run_ok(&Cancel::never(), *LIMIT).unwrap();
            let new = LinuxContainerResources { memory_limit_in_bytes: 96 << 20, cpu_quota: 30_000, ..Default::default() };
            let update = spec::update_resources(&mut spec, &new, &HOST).unwrap();
            let json = serde_json::to_vec(&update.resources).unwrap();
            command("update").args(["--resources", "-", &id]).stdin(json).run_ok(&Cancel::never(), *LIMIT).unwrap();

            let files = match HOST.cgroup_v2 {
                true => "memory.max cpu.max",
                false => "memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes cpu/cpu.cfs_quota_us",
            };
            let script = format!("id -u; cd /sys/fs/cgroup && cat {files}");
            let process = spec::exec_process(spec.process().clone().unwrap(), &["/bin/sh".into(), "-c".into(), script], false);
            let path = case.dir.path().join("process.json");
            std::fs::write(&path, serde_json::to_vec(&process).unwrap()).unwrap();
            let output = command("exec").arg("--process").arg(&path).arg(&id).run_ok(&Cancel::never(), *LIMIT).unwrap();
            let expected = match HOST.cgroup_v2 {
                true => "1000\n100663296\n30000 100000\n",
                false => "1000\n100663296\n100663296\n30000\n",
            };
            assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{runtime}");
        }));
        command("delete").args(["--force", &id]).run(&Cancel::never(), *LIMIT).unwrap();
        result.unwrap();
    }
}
