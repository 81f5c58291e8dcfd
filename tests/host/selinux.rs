//! SELinux as the kernel enforces it: labels of processes and files, and what they hold apart, with each OCI runtime. The virtual machine
//! of scripts/vm has it (`make test-selinux`), with the policy scripts/vm/selinux.cil; on other hosts these tests say that there is none.

use std::fs;
use std::path::{Path, PathBuf};

use crisp::api::runtime::{ContainerConfig, IDMapping, Mount, NamespaceMode, PodSandboxConfig, SELinuxOption, UserNamespace};
use grpcio::RpcStatusCode;
use nix::sys::signal::Signal;
use protobuf::MessageField;

use crate::daemon::tool;
use crate::harness::{handlers, Container, Host, Sandbox};
use crate::mounts::{bind, shell, sleeper};
use crate::objects::{container_config, create_request, run_request, sandbox_config};
use crate::volumes::{image_mount, import_declaring, remove_image, DECLARING};

const FILE: &str = "system_u:object_r:container_file_t";

/// A host with SELinux, and what its kernel has denied since.
struct Enforced {
    host: Host,
    seen: usize,
}

/// A daemon with `more` in its configuration. None, and a word of it, where SELinux is not enabled.
fn enforced(more: &str) -> Option<Enforced> {
    match fs::read_to_string("/sys/fs/selinux/enforce") {
        Err(e) => {
            assert!(std::env::var_os("CRISP_TEST_SELINUX").is_none(), "this host is to have SELinux: {e}");
            println!("selinux: not enabled on this host, nothing was tested");
            return None;
        }
        Ok(mode) => assert_eq!(mode, "1", "SELinux is permissive here, and denies nothing"),
    }
    let seen = denials(0).len();
    let host = Host::start_with(|options| options.top = format!("selinux = true\n{more}"));
    Some(Enforced { host, seen })
}

/// The kernel's denials since it began, but for the first `skip`.
fn denials(skip: usize) -> Vec<String> {
    let log = tool("dmesg", &[]);
    log.lines().filter(|line| line.contains("avc:  denied")).skip(skip).map(str::to_owned).collect()
}

impl Enforced {
    /// What was denied since the last time.
    fn denied(&mut self) -> Vec<String> {
        let new = denials(self.seen);
        self.seen += new.len();
        new
    }

    /// The script fails for want of a permission, which the kernel has logged with these words.
    fn assert_denied(&mut self, container: &Container, script: &str, words: &[&str]) {
        assert_eq!(self.denied(), [""; 0], "before {script}");
        let (code, text) = shell(&self.host, container, script);
        assert!(code != 0 && text.contains("ermission denied"), "{script}: {code}, {text}");
        let denied = self.denied();
        assert!(denied.iter().any(|line| words.iter().all(|word| line.contains(word))), "{script}: {denied:#?}");
    }

    fn finish(mut self) {
        assert_eq!(self.denied(), [""; 0]);
        let seen = self.seen;
        self.host.finish();
        assert_eq!(denials(seen), [""; 0], "at the end");
    }
}

fn options(user: &str, role: &str, kind: &str, level: &str) -> MessageField<SELinuxOption> {
    let options = SELinuxOption { user: user.into(), role: role.into(), type_: kind.into(), level: level.into(), ..Default::default() };
    MessageField::some(options)
}

fn of_sandbox(config: &mut PodSandboxConfig) -> &mut crisp::api::runtime::LinuxSandboxSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

fn of_container(config: &mut ContainerConfig) -> &mut crisp::api::runtime::LinuxContainerSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

/// Runs a sandbox on the host's network, the quickest to make.
fn sandbox(host: &Host, name: &str, handler: &str, adjust: impl FnOnce(&mut PodSandboxConfig)) -> Sandbox {
    let mut config = sandbox_config(&host.daemon.layout, name, true);
    adjust(&mut config);
    host.run(config, handler)
}

fn plain(host: &Host, sandbox: &Sandbox, name: &str) -> Container {
    sleeper(host, sandbox, name, Vec::new(), |_| {})
}

/// The label of the first process, which an exec's has too.
fn label(host: &Host, container: &Container) -> String {
    let read = |path: &str| {
        let (code, text, error) = host.exec(container, &["cat", path]);
        assert_eq!(code, 0, "{path}: {error}");
        text.trim_end_matches('\0').to_owned()
    };
    let own = read("/proc/self/attr/current");
    assert_eq!(read("/proc/1/attr/current"), own);
    own
}

/// Type and level of a label, which has the names of the machine.
fn kind_and_level(label: &str) -> (String, String) {
    let parts: Vec<&str> = label.splitn(4, ':').collect();
    assert_eq!(parts[..2], ["system_u", "system_r"], "{label}");
    (parts[2].to_owned(), parts[3].to_owned())
}

fn of_file(path: &Path) -> String {
    let mut value = [0; 256];
    let n = rustix::fs::lgetxattr(path, "security.selinux", &mut value).unwrap_or_else(|e| panic!("label of {}: {e}", path.display()));
    String::from_utf8_lossy(&value[..n]).trim_end_matches('\0').to_owned()
}

/// The root file system that the container itself sees, with all its mounts.
fn root(host: &Host, container: &Container) -> PathBuf {
    let record = fs::read_to_string(host.daemon.layout.path("root/containers").join(format!("{}.json", container.id))).expect("its record");
    let record: serde_json::Value = serde_json::from_str(&record).expect("JSON");
    let pid = record["record"]["status"]["pid"].as_i64().unwrap_or_else(|| panic!("no pid: {record}"));
    // Not the link, whose label is the process's.
    PathBuf::from(format!("/proc/{pid}/root/."))
}

#[test]
fn each_sandbox_has_its_label_and_reads_nothing_of_others() {
    let Some(mut on) = enforced("") else { return };
    for handler in handlers() {
        let [one, other] = ["one", "other"].map(|name| on.host.sandbox(name, &handler));
        let [first, second] = ["first", "second"].map(|name| plain(&on.host, &one, name));
        let label_of_one = label(&on.host, &first);
        let (kind, level) = kind_and_level(&label_of_one);
        let categories: Vec<&str> = level.strip_prefix("s0:").expect("a level").split(',').collect();
        assert!(kind == "container_t" && categories.len() == 2 && categories.iter().all(|c| c.starts_with('c')), "{label_of_one}");
        assert_eq!(label(&on.host, &second), label_of_one, "{handler}");

        // The files of both, wherever they come from.
        let file = format!("{FILE}:{level}");
        for container in [&first, &second] {
            let root = root(&on.host, container);
            for path in
                ["", "bin/sh", "bin/busybox", "etc/hosts", "etc/hostname", "etc/resolv.conf", "dev", "dev/null", "dev/pts/ptmx", "dev/shm"]
            {
                assert_eq!(of_file(&root.join(path)), file, "{handler}: {path}");
            }
        }
        let script = "cat /etc/hosts /etc/hostname /etc/resolv.conf; echo shared > /dev/shm/between; echo x > /new; echo y >> /etc/hosts; ls -l /dev /proc /sys >/dev/null";
        assert_eq!(shell(&on.host, &first, script).0, 0, "{handler}");
        assert_eq!(shell(&on.host, &second, "cat /dev/shm/between"), (0, "shared\n".into()), "{handler}");
        let own = |name: &str| root(&on.host, &first).join(name);
        assert_eq!((of_file(&own("new")), of_file(&own("dev/shm/between"))), (file.clone(), file.clone()), "{handler}");

        // Another sandbox that gets hold of them: a path of the host is mounted, and root may do everything but for SELinux.
        let rootfs = on.host.daemon.layout.path("run/containers").join(&first.id).join("rootfs");
        let shm = on.host.daemon.layout.path("run/sandboxes").join(&one.id).join("shm");
        let thief = sleeper(&on.host, &other, "thief", vec![bind("/rootfs", &rootfs), bind("/stolen", &shm)], |_| {});
        let stranger = label(&on.host, &thief);
        assert_ne!(stranger, label_of_one, "{handler}");
        assert_eq!(kind_and_level(&stranger).0, "container_t");
        let words = [format!("scontext={stranger}"), format!("tcontext={file}")];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        on.assert_denied(&thief, "cat /rootfs/new", &words);
        on.assert_denied(&thief, "cat /stolen/between", &words);
        on.assert_denied(&thief, "echo x > /rootfs/other", &words);
        // What it does at home is nobody's concern.
        assert_eq!(shell(&on.host, &thief, "echo x > /new; cat /new"), (0, "x\n".into()), "{handler}");
        on.host.remove_all();
    }
    on.finish();
}

/// The kubelet's own masks, terminals, and the first process, which says its label into its log.
#[test]
fn what_the_oci_runtime_makes_is_the_containers() {
    let Some(mut on) = enforced("") else { return };
    for handler in handlers() {
        let host = &on.host;
        let sandbox = host.sandbox("made", &handler);
        let say = ["sh", "-c", "cat /proc/self/attr/current; echo; exec sleep 1000000"];
        let masked = ["/proc/kcore", "/proc/keys", "/proc/acpi", "/proc/scsi", "/sys/firmware"].map(str::to_owned);
        let made = host.create_with(&sandbox, "made", &say, |config| {
            of_container(config).masked_paths = masked.to_vec();
            of_container(config).readonly_paths = vec!["/proc/bus".into(), "/proc/sys".into()];
            of_container(config).readonly_rootfs = true;
        });
        let terminal = host.create_with(&sandbox, "terminal", &say, |config| (config.tty, config.stdin) = (true, true));
        for container in [&made, &terminal] {
            host.start_container(container);
            container.log.wait_for(&label(host, container));
        }
        let script = "cat /proc/kcore /proc/keys; ls /proc/acpi /sys/firmware; mount; ps; cat /proc/sys/kernel/ostype /sys/fs/cgroup/*.* ; echo x > /dev/shm/x; \
                      echo x > /dev/null; head -c 8 /dev/urandom; echo > /dev/stderr; true";
        assert_eq!(shell(host, &made, script).0, 0, "{handler}");
        assert_eq!(shell(host, &terminal, "ls -l /proc/1/fd && echo hello > /dev/console && echo hello > /dev/pts/0").0, 0, "{handler}");
        let file = format!("{FILE}:{}", kind_and_level(&label(host, &terminal)).1);
        let seen = root(host, &terminal);
        for path in ["dev/console", "dev/pts/0", "dev/mqueue", "dev/fd"] {
            assert_eq!(of_file(&seen.join(path)), file, "{handler}: {path}");
        }
        // Layers are everybody's to map: overlayfs maps their own files.
        for path in fs::read_dir(host.daemon.layout.path("root/layers")).expect("list layers").flatten().map(|entry| entry.path()) {
            assert_eq!(of_file(&path), "system_u:object_r:container_ro_file_t:s0", "{}", path.display());
        }
        host.remove_all();
        assert_eq!(on.denied(), [""; 0], "{handler}");
    }
    on.finish();
}

#[test]
fn a_copy_of_an_image_has_the_label_of_its_container() {
    let Some(on) = enforced("snapshotter = \"copy\"\n") else { return };
    // Nothing that an OCI runtime does: one is enough.
    for handler in handlers().into_iter().take(1) {
        let container = plain(&on.host, &sandbox(&on.host, "copied", &handler, |_| {}), "copied");
        let file = format!("{FILE}:{}", kind_and_level(&label(&on.host, &container)).1);
        assert_eq!(shell(&on.host, &container, "echo x > /new && cat /new"), (0, "x\n".into()), "{handler}");
        let seen = root(&on.host, &container);
        for path in ["", "bin/sh", "bin/busybox", "new"] {
            assert_eq!(of_file(&seen.join(path)), file, "{handler}: {path}");
        }
        on.host.remove_all();
    }
    on.finish();
}

/// A privileged container, whatever its options, is what the policy makes of one without a label.
fn privileged_is_not_confined(host: &Host, handler: &str) {
    let neighbour = plain(host, &sandbox(host, "neighbour", handler, |_| {}), "neighbour");
    let rootfs = host.daemon.layout.path("run/containers").join(&neighbour.id).join("rootfs");
    let trusted = sandbox(host, "trusted", handler, |config| of_sandbox(config).privileged = true);
    let privileged = sleeper(host, &trusted, "privileged", vec![bind("/rootfs", &rootfs)], |config| {
        of_container(config).privileged = true;
        of_container(config).selinux_options = options("", "", "container_init_t", "");
    });
    assert_eq!(kind_and_level(&label(host, &privileged)).0, "spc_t", "{handler}");
    let level = of_file(&root(host, &privileged)).strip_prefix(&format!("{FILE}:")).expect("its files have a level").to_owned();
    assert_eq!(
        shell(host, &privileged, "cat /etc/hosts >/dev/null && echo x > /rootfs/new && cat /rootfs/new"),
        (0, "x\n".into()),
        "{handler}"
    );
    // The sandbox's other containers have its level, and are held back.
    let (kind, beside) = kind_and_level(&label(host, &plain(host, &trusted, "plain")));
    assert_eq!((kind.as_str(), beside), ("container_t", level), "{handler}");
}

#[test]
fn options_of_sandboxes_and_containers_and_privilege() {
    let Some(mut on) = enforced("") else { return };
    for handler in handlers() {
        let host = &on.host;
        let asked = sandbox(host, "asked", &handler, |config| {
            of_sandbox(config).selinux_options = options("user_u", "user_r", "container_init_t", "s0:c10,c20");
        });
        let inherits =
            sleeper(host, &asked, "inherits", Vec::new(), |config| of_container(config).selinux_options = options("", "", "", ""));
        assert_eq!(label(host, &inherits), "user_u:user_r:container_init_t:s0:c10,c20", "{handler}");
        assert_eq!(of_file(&root(host, &inherits)), "user_u:object_r:container_file_t:s0:c10,c20", "{handler}");
        assert_eq!(of_file(&root(host, &inherits).join("etc/hosts")), "user_u:object_r:container_file_t:s0:c10,c20", "{handler}");

        // The container's own go before, and what they do not say is the policy's, with the sandbox's level.
        let typed =
            sleeper(host, &asked, "typed", Vec::new(), |config| of_container(config).selinux_options = options("", "", "spc_t", ""));
        assert_eq!(label(host, &typed), "system_u:system_r:spc_t:s0:c10,c20", "{handler}");

        // One with a level of its own still resolves names.
        let apart = sandbox(host, "apart", &handler, |_| {});
        let level =
            sleeper(host, &apart, "level", Vec::new(), |config| of_container(config).selinux_options = options("", "", "", "s0:c1.c3,c7"));
        assert_eq!(label(host, &level), "system_u:system_r:container_t:s0:c1.c3,c7", "{handler}");
        assert_eq!(of_file(&root(host, &level)), format!("{FILE}:s0:c1.c3,c7"), "{handler}");
        assert_eq!(shell(host, &level, "cat /etc/hosts /etc/resolv.conf /etc/hostname && touch /dev/shm/x").0, 0, "{handler}");

        // Refused by name: what is no label, and what this policy does not know.
        let bad = [
            (options("", "", "", "s0:c1,"), "is not a level"),
            (options("", "", "a:b", ""), "is not a type"),
            (options("", "", "", "s0:c1024"), "container_t:s0:c1024"),
            (options("", "", "", "s1"), "container_t:s1"),
            (options("", "", "nobody_t", ""), "nobody_t"),
            (options("nobody_u", "", "", ""), "nobody_u"),
            (options("", "nobody_r", "", ""), "nobody_r"),
        ];
        for (options, words) in bad {
            let mut config = container_config(&apart.config, "refused", &["true"]);
            of_container(&mut config).selinux_options = options.clone();
            let (code, message) = host.refused(&create_request(&apart.id, &apart.config, &config));
            assert!(code == RpcStatusCode::INVALID_ARGUMENT && message.contains("selinux_options") && message.contains(words), "{message}");
            let mut config = sandbox_config(&host.daemon.layout, "refused", true);
            of_sandbox(&mut config).selinux_options = options;
            let (code, message) = host.refused(&run_request(&config, &handler));
            assert!(code == RpcStatusCode::INVALID_ARGUMENT && message.contains("selinux_options") && message.contains(words), "{message}");
        }
        privileged_is_not_confined(host, &handler);
        host.remove_all();
        host.assert_clean();
        assert_eq!(on.denied(), [""; 0], "{handler}");
    }
    on.finish();
}

#[test]
fn volumes_have_the_label_of_who_may_read_them() {
    let Some(mut on) = enforced("") else { return };
    import_declaring(&on.host);
    let dir = on.host.daemon.layout.path("volumes");
    for handler in handlers() {
        for name in ["mine/sub", "unlabelled", "everybodys"] {
            fs::create_dir_all(dir.join(name)).expect("make a directory");
            fs::write(dir.join(name).join("file"), "content\n").expect("write a file");
        }
        let of_machine = of_file(&dir);
        let [one, other] = ["one", "other"].map(|name| sandbox(&on.host, name, &handler, |_| {}));
        let relabelled = |path: &str, name: &str| Mount { selinux_relabel: true, ..bind(path, &dir.join(name)) };
        let mounts =
            vec![relabelled("/mine", "mine"), bind("/unlabelled", &dir.join("unlabelled")), image_mount("/image", DECLARING, "data")];
        let owner = sleeper(&on.host, &one, "owner", mounts, |config| {
            config.image.mut_or_insert_default().image = DECLARING.into();
        });
        let level = kind_and_level(&label(&on.host, &owner)).1;
        let file = format!("{FILE}:{level}");
        for path in ["mine", "mine/sub", "mine/sub/file"] {
            assert_eq!(of_file(&dir.join(path)), file, "{handler}: {path}");
        }
        assert_eq!(of_file(&dir.join("unlabelled/file")), of_machine, "{handler}");
        assert_eq!(shell(&on.host, &owner, "cat /mine/sub/file && echo more >> /mine/sub/file"), (0, "content\n".into()), "{handler}");
        on.assert_denied(&owner, "cat /unlabelled/file", &["scontext=system_u:system_r:container_t", &format!("tcontext={of_machine}")]);
        // A volume of the image that is mounted, and one that its own declares.
        assert_eq!(
            shell(&on.host, &owner, "cat /image/sub/file /data/sub/file && echo x > /data/new"),
            (0, "of the image\n".repeat(2)),
            "{handler}"
        );
        let seen = root(&on.host, &owner);
        for path in ["image", "image/sub/file", "data", "data/sub/file", "data/link", "data/new"] {
            assert_eq!(of_file(&seen.join(path)), file, "{handler}: {path}");
        }

        // Without a relabelling it is not another sandbox's; with one it is its, and no longer the first one's.
        let guest = sleeper(&on.host, &other, "guest", vec![bind("/mine", &dir.join("mine"))], |_| {});
        on.assert_denied(&guest, "cat /mine/sub/file", &[&format!("tcontext={file}")]);
        let heir = sleeper(&on.host, &other, "heir", vec![relabelled("/mine", "mine")], |_| {});
        assert_eq!(shell(&on.host, &heir, "cat /mine/sub/file"), (0, "content\nmore\n".into()), "{handler}");
        on.assert_denied(&owner, "cat /mine/sub/file", &[&format!("scontext={}", label(&on.host, &owner))]);
        // What has no categories is everybody's.
        let shared = sleeper(&on.host, &one, "shared", vec![relabelled("/all", "everybodys")], |config| {
            of_container(config).selinux_options = options("", "", "", "s0");
        });
        assert_eq!(shell(&on.host, &shared, "cat /all/file").0, 0, "{handler}");
        let reader = sleeper(&on.host, &other, "reader", vec![bind("/all", &dir.join("everybodys"))], |_| {});
        assert_eq!(shell(&on.host, &reader, "cat /all/file && echo x > /all/new"), (0, "content\n".into()), "{handler}");

        // The host's own directories are not relabelled for anybody.
        for path in ["/", "/etc", "/usr/bin", "/proc/1", "/dev/shm"] {
            let before = of_file(Path::new(path));
            let mut config = container_config(&one.config, "refused", &["true"]);
            config.mounts = vec![Mount { selinux_relabel: true, ..bind("/host", Path::new(path)) }];
            let (code, message) = on.host.refused(&create_request(&one.id, &one.config, &config));
            assert!(code == RpcStatusCode::INVALID_ARGUMENT && message.contains(&format!("selinux_relabel: {path} is")), "{message}");
            assert_eq!(of_file(Path::new(path)), before);
        }
        // Nor is a volume for what is refused all the same.
        let mut config = container_config(&one.config, "refused", &["true"]);
        config.mounts = vec![relabelled("/unlabelled", "unlabelled")];
        of_container(&mut config).privileged = true;
        let (code, message) = on.host.refused(&create_request(&one.id, &one.config, &config));
        assert!(code == RpcStatusCode::INVALID_ARGUMENT && message.contains("privileged"), "{message}");
        assert_eq!(of_file(&dir.join("unlabelled/file")), of_machine, "{handler}");
        on.host.remove_all();
        fs::remove_dir_all(&dir).expect("remove the volumes");
    }
    remove_image(&on.host, DECLARING);
    on.finish();
}

#[test]
fn levels_outlive_the_daemon() {
    let Some(mut on) = enforced("") else { return };
    let start = |handler: String| {
        let before = sandbox(&on.host, &format!("before{handler}"), &handler, |_| {});
        let first = plain(&on.host, &before, "first");
        (handler, label(&on.host, &first), before, first)
    };
    let started: Vec<_> = handlers().into_iter().map(start).collect();
    on.host.daemon.stop(Signal::SIGKILL);
    on.host.daemon.run();
    on.host.daemon.wait_ready();
    for (handler, old, before, first) in &started {
        assert_eq!(label(&on.host, first), *old, "{handler}");
        let second = plain(&on.host, before, "second");
        assert_eq!(label(&on.host, &second), *old, "{handler}");
        assert_eq!(shell(&on.host, &second, "cat /etc/hosts").0, 0, "{handler}");
        let after = sandbox(&on.host, &format!("after{handler}"), handler, |_| {});
        let new = label(&on.host, &plain(&on.host, &after, "third"));
        assert!(started.iter().all(|(_, old, ..)| *old != new), "{handler}: {new}");
    }
    assert_eq!(on.denied(), [""; 0]);
    on.finish();
}

#[test]
fn namespaces_of_the_host_and_of_users() {
    let Some(mut on) = enforced("") else { return };
    for handler in handlers() {
        // The host's processes and IPC: seen, and not touched. As with containerd, it stays confined.
        let bare = sandbox(&on.host, "bare", &handler, |config| {
            let namespaces = of_sandbox(config).namespace_options.mut_or_insert_default();
            (namespaces.pid, namespaces.ipc) = (NamespaceMode::NODE.into(), NamespaceMode::NODE.into());
        });
        let shm_of_host = of_file(Path::new("/dev/shm"));
        let guest = plain(&on.host, &bare, "guest");
        let text = on.host.exec(&guest, &["cat", "/proc/self/attr/current"]).1;
        assert_eq!(kind_and_level(text.trim_end_matches('\0')).0, "container_t", "{handler}");
        let victim = plain(&on.host, &sandbox(&on.host, "victim", &handler, |_| {}), "victim");
        let pid = root(&on.host, &victim).components().nth(2).expect("a pid").as_os_str().to_string_lossy().into_owned();
        on.assert_denied(&guest, &format!("kill -9 {pid}"), &["sigkill", &format!("tcontext={}", label(&on.host, &victim))]);
        on.assert_denied(&guest, "kill -9 1", &["sigkill", "kernel_t"]);
        on.assert_denied(&guest, "touch /dev/shm/x", &[&format!("tcontext={shm_of_host}")]);
        assert_eq!(of_file(Path::new("/dev/shm")), shm_of_host, "{handler}");

        // A user namespace, and processes that see one another.
        let ids = |host_id| vec![IDMapping { host_id, length: 65536, ..Default::default() }];
        let users = UserNamespace { mode: NamespaceMode::POD.into(), uids: ids(1 << 20), gids: ids(1 << 20), ..Default::default() };
        let mut config = sandbox_config(&on.host.daemon.layout, "mapped", false);
        let namespaces = of_sandbox(&mut config).namespace_options.mut_or_insert_default();
        (namespaces.pid, namespaces.userns_options) = (NamespaceMode::POD.into(), MessageField::some(users));
        let mapped = on.host.run(config, &handler);
        let inside = plain(&on.host, &mapped, "inside");
        let text = on.host.exec(&inside, &["cat", "/proc/self/attr/current"]).1;
        let (kind, level) = kind_and_level(text.trim_end_matches('\0'));
        assert_eq!(kind, "container_t", "{handler}");
        assert_eq!(of_file(&root(&on.host, &inside)), format!("{FILE}:{level}"), "{handler}");
        let script = "echo x > /new && cat /new /etc/hosts /etc/resolv.conf >/dev/null && echo x > /dev/shm/new && ps && id -u";
        let (code, text) = shell(&on.host, &inside, script);
        assert!(code == 0 && text.ends_with("\n0\n") && text.contains("sleep 1000000"), "{handler}: {text}");
        // Nothing of that kind shows what a new program may not do, either.
        let gained = sleeper(&on.host, &mapped, "no-new-privileges", Vec::new(), |config| of_container(config).no_new_privs = true);
        assert_eq!(
            on.host
                .exec(&gained, &["cat", "/proc/self/attr/current"])
                .1
                .trim_end_matches('\0')
                .rsplit_once("container_t:")
                .expect("its type")
                .1,
            level
        );
        on.host.remove_all();
        assert_eq!(on.denied(), [""; 0], "{handler}");
    }
    on.finish();
}
