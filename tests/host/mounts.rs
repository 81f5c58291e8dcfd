//! Mounts of a request, as the container sees them with each OCI runtime.

use std::fs;
use std::os::unix::fs::{symlink, MetadataExt};
use std::path::{Path, PathBuf};

use crisp::api::runtime::{ContainerConfig, Mount, MountPropagation, PodSandboxConfig, StatusRequest};
use crisp::sys::mount;
use grpcio::RpcStatusCode;
use serde_json::json;

use crate::archive::{self, Layer};
use crate::daemon::Kind;
use crate::harness::{handlers, kind, Container, Host, Sandbox};
use crate::objects::{container_config, create_request, sandbox_config};

const SLEEP: [&str; 2] = ["sleep", "1000000"];

pub fn bind(container_path: &str, host_path: &Path) -> Mount {
    Mount { container_path: container_path.into(), host_path: host_path.display().to_string(), ..Default::default() }
}

/// On the host's network, which takes the least time to make.
pub fn plain_sandbox(host: &Host, name: &str, handler: &str) -> Sandbox {
    host.run(sandbox_config(&host.daemon.layout, name, true), handler)
}

/// A shell's exit code and what it printed, errors in between.
pub fn shell(host: &Host, container: &Container, script: &str) -> (i32, String) {
    let (code, text, _) = host.exec(container, &["sh", "-c", &format!("({script}) 2>&1")]);
    (code, text)
}

/// A container that sleeps with these mounts, which its status must show as they were asked for.
pub fn sleeper(host: &Host, sandbox: &Sandbox, name: &str, mounts: Vec<Mount>, adjust: impl FnOnce(&mut ContainerConfig)) -> Container {
    let container = host.create_with(sandbox, name, &SLEEP, |config| {
        config.mounts = mounts.clone();
        adjust(config);
    });
    let mut shown = host.status(&container).mounts;
    for mount in &mut shown {
        if let Some(image) = mount.image.as_mut() {
            assert!(image.image_ref.starts_with("sha256:"), "{image}");
            image.image_ref.clear();
        }
    }
    assert_eq!(shown, mounts);
    host.start_container(&container);
    container
}

fn set_privileged(config: &mut PodSandboxConfig) {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
}

fn privileged(config: &mut ContainerConfig) {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
}

/// A directory with a tmpfs of its own, unmounted at the end whatever was mounted below.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(path: PathBuf, shared: bool) -> Tmpfs {
        fs::create_dir_all(&path).expect("make a mount point");
        mount::tmpfs(&path, 1 << 20, 0o755, (0, 0)).expect("mount a tmpfs");
        let flag = if shared { nix::mount::MsFlags::MS_SHARED } else { nix::mount::MsFlags::MS_PRIVATE };
        nix::mount::mount(None::<&str>, &path, None::<&str>, flag, None::<&str>).expect("set its propagation");
        Tmpfs(path)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        mount::unmount(&self.0).expect("unmount it");
    }
}

fn mounted(path: &Path) -> bool {
    mount::table().expect("read the mount table").iter().any(|m| m.target == path)
}

#[test]
fn mounts_spread_as_asked() {
    let host = Host::start();
    let dir = host.daemon.layout.path("spread");
    for handler in handlers() {
        let shared = Tmpfs::mount(dir.join("shared"), true);
        let alone = Tmpfs::mount(dir.join("alone"), false);
        let mut config = sandbox_config(&host.daemon.layout, "spread", true);
        set_privileged(&mut config);
        let sandbox = host.run(config, &handler);
        let with = |path: &str, propagation: MountPropagation| Mount { propagation: propagation.into(), ..bind(path, &shared.0) };
        let mounts = vec![
            with("/private", MountPropagation::PROPAGATION_PRIVATE),
            with("/slave", MountPropagation::PROPAGATION_HOST_TO_CONTAINER),
            with("/both", MountPropagation::PROPAGATION_BIDIRECTIONAL),
        ];
        let container = sleeper(&host, &sandbox, "spread", mounts, privileged);

        let late = Tmpfs::mount(shared.0.join("late"), false);
        let (_, seen) = shell(&host, &container, "grep -o ' /[a-z]*/late ' /proc/self/mountinfo");
        let mut seen: Vec<_> = seen.split_whitespace().collect();
        seen.sort();
        assert_eq!(seen, ["/both/late", "/slave/late"], "{handler}");
        drop(late);
        let (_, gone) = shell(&host, &container, "grep -c /late /proc/self/mountinfo");
        assert_eq!(gone, "0\n", "{handler}");

        let script = "for d in private slave both; do mkdir /$d/in-$d; mount -t tmpfs t /$d/in-$d || exit 1; done";
        assert_eq!(shell(&host, &container, script), (0, String::new()), "{handler}");
        assert!(mounted(&shared.0.join("in-both")), "{handler}");
        assert!(!mounted(&shared.0.join("in-slave")) && !mounted(&shared.0.join("in-private")), "{handler}");

        // A source that is not shared cannot do it, and the message says which mount that is.
        for propagation in [MountPropagation::PROPAGATION_HOST_TO_CONTAINER, MountPropagation::PROPAGATION_BIDIRECTIONAL] {
            let mut config = container_config(&sandbox.config, "refused", &SLEEP);
            config.mounts = vec![Mount { propagation: propagation.into(), ..bind("/p", &alone.0) }];
            let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
            assert!(message.contains(alone.0.to_str().expect("text")) && message.contains("not a shared"), "{message}");
            assert!(kind() != Kind::Crispd || code == RpcStatusCode::FAILED_PRECONDITION, "{code}");
        }
        host.remove_all();
        drop((shared, alone));
        host.assert_clean();
    }
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

/// kubelet lets privileged containers alone have this; crictl asks nobody.
#[test]
fn shared_mounts_of_the_unprivileged_leave_the_hosts_cgroups_alone() {
    let host = Host::start();
    let dir = host.daemon.layout.path("shared");
    let cgroups = || mount::table().expect("read the mount table").iter().filter(|m| m.target.starts_with("/sys/fs/cgroup")).count();
    for handler in handlers() {
        let shared = Tmpfs::mount(dir.clone(), true);
        let before = cgroups();
        let sandbox = plain_sandbox(&host, "plain", &handler);
        let volume = Mount { propagation: MountPropagation::PROPAGATION_BIDIRECTIONAL.into(), ..bind("/both", &shared.0) };
        let container = sleeper(&host, &sandbox, "plain", vec![volume], |_| {});
        assert_eq!(cgroups(), before, "{handler}");
        let (_, tags) = shell(&host, &container, "grep ' /both ' /proc/self/mountinfo");
        assert!(tags.contains("shared:"), "{handler}: {tags}");
        assert_ne!(shell(&host, &container, "mkdir /sys/fs/cgroup/x || mkdir /sys/fs/cgroup/memory/x").0, 0, "{handler}");
        host.remove_all();
        assert_eq!(cgroups(), before, "{handler}");
        drop(shared);
        host.assert_clean();
    }
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

#[test]
fn read_only_alone_and_with_all_below() {
    let host = Host::start();
    let dir = host.daemon.layout.path("readonly");
    let below = Tmpfs::mount(dir.join("below"), false);
    let features = host.call(&StatusRequest::default()).runtime_handlers;
    for handler in handlers() {
        let feature = features.iter().find(|h| h.name == handler).and_then(|h| h.features.as_ref());
        assert!(feature.is_some_and(|f| f.recursive_read_only_mounts), "{handler}: it is not advertised");
        let sandbox = plain_sandbox(&host, "readonly", &handler);
        let mounts = vec![
            bind("/rw", &dir),
            Mount { readonly: true, ..bind("/ro", &dir) },
            Mount { readonly: true, recursive_read_only: true, ..bind("/rro", &dir) },
        ];
        let container = sleeper(&host, &sandbox, "readonly", mounts, |_| {});
        for (path, works) in
            [("/rw/a", true), ("/rw/below/a", true), ("/ro/b", false), ("/ro/below/b", true), ("/rro/c", false), ("/rro/below/c", false)]
        {
            let (code, text) = shell(&host, &container, &format!("touch {path}"));
            assert_eq!(code == 0, works, "{handler} {path}: {text}");
            assert!(works || text.contains("Read-only file system"), "{handler} {path}: {text}");
        }
        host.remove_all();
    }
    drop(below);
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

#[test]
fn options_of_a_mount() {
    let host = Host::start();
    if kind() == Kind::Crispd {
        assert!(host.call(&StatusRequest::default()).features.mount_options);
    }
    let dir = host.daemon.layout.path("options");
    fs::create_dir_all(&dir).expect("make a directory");
    fs::copy(crate::daemon::find("busybox").expect("busybox is installed"), dir.join("busybox")).expect("copy busybox");
    for handler in handlers() {
        let sandbox = plain_sandbox(&host, "options", &handler);
        let with = |path: &str, options: &[&str]| Mount {
            mount_options: options.iter().map(|option| option.to_string()).collect(),
            ..bind(path, &dir)
        };
        let mounts = vec![
            with("/free", &[]),
            with("/noexec", &["noexec"]),
            with("/all", &["nosuid", "noexec", "nodev"]),
            Mount { readonly: true, ..with("/ro", &["nosuid"]) },
        ];
        let container = sleeper(&host, &sandbox, "options", mounts, |_| {});
        assert_eq!(shell(&host, &container, "/free/busybox echo runs"), (0, "runs\n".into()), "{handler}");
        for path in ["/noexec", "/all"] {
            let (code, text) = shell(&host, &container, &format!("{path}/busybox echo runs"));
            assert!(code == 126 && text.contains("Permission denied"), "{handler} {path}: {code} {text}");
        }
        for (path, flags) in [("/free", "rw"), ("/noexec", "rw,noexec"), ("/all", "rw,nosuid,nodev,noexec"), ("/ro", "ro,nosuid")] {
            let (_, line) = shell(&host, &container, &format!("grep ' {path} ' /proc/self/mountinfo"));
            let options = line.split(' ').nth(5).unwrap_or_default().replace(",relatime", "").replace(",noatime", "");
            assert_eq!(options, flags, "{handler} {path}: {line}");
        }
        host.remove_all();
    }
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

#[test]
fn sources_of_every_kind() {
    let host = Host::start();
    let dir = host.daemon.layout.path("sources");
    fs::create_dir_all(dir.join("real/sub")).expect("make a directory");
    fs::write(dir.join("real/file"), "text\n").expect("write a file");
    symlink("real", dir.join("first")).expect("link");
    symlink(dir.join("first"), dir.join("second")).expect("link");
    symlink("nowhere", dir.join("dangling")).expect("link");
    let socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).expect("make a socket");
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("make a fifo");
    for handler in handlers() {
        let sandbox = plain_sandbox(&host, "sources", &handler);
        let missing = dir.join(format!("missing-{handler}/deep"));
        let mounts = vec![
            bind("/linked", &dir.join("second")),
            bind("/linked-file", &dir.join("second/file")),
            bind("/made", &missing),
            bind("/socket", &dir.join("socket")),
            bind("/fifo", &dir.join("fifo")),
            bind("/new/place/device", Path::new("/dev/zero")),
        ];
        let container = sleeper(&host, &sandbox, "sources", mounts, |_| {});
        let script = "cat /linked/file /linked-file; [ -d /made ] && [ -S /socket ] && [ -p /fifo ] && head -c 3 /new/place/device | wc -c";
        assert_eq!(shell(&host, &container, script), (0, "text\ntext\n3\n".into()), "{handler}");
        assert_eq!(missing.metadata().expect("it was made").mode() & 0o7777, 0o755);

        let mut config = container_config(&sandbox.config, "refused", &SLEEP);
        config.mounts = vec![bind("/p", &dir.join("dangling"))];
        let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
        assert!(code != RpcStatusCode::NOT_FOUND, "kubelet would take it for gone: {message}");
        host.remove_all();
    }
    drop(socket);
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

#[test]
fn parents_first_and_over_what_is_always_mounted() {
    let host = Host::start();
    let dir = host.daemon.layout.path("order");
    for name in ["parent", "child", "grandchild", "shm", "cgroup", "bus"] {
        fs::create_dir_all(dir.join(name)).expect("make a directory");
        fs::write(dir.join(name).join("name"), name).expect("write a file");
    }
    fs::write(dir.join("hosts"), "127.0.0.1 mine\n").expect("write a file");
    for handler in handlers() {
        let sandbox = host.sandbox("order", &handler);
        let mounts = vec![
            bind("/data/x/y", &dir.join("grandchild")),
            bind("/data/x", &dir.join("child")),
            bind("/data", &dir.join("parent")),
            bind("/dev/shm", &dir.join("shm")),
            bind("/sys/fs/cgroup", &dir.join("cgroup")),
            bind("/etc/hosts", &dir.join("hosts")),
            bind("/dev/bus", &dir.join("bus")),
        ];
        let container = sleeper(&host, &sandbox, "order", mounts, |_| {});
        let script = "cat /data/name /data/x/name /data/x/y/name /dev/shm/name /sys/fs/cgroup/name /dev/bus/name /etc/hosts";
        assert_eq!(shell(&host, &container, script), (0, "parentchildgrandchildshmcgroupbus127.0.0.1 mine\n".into()), "{handler}");

        // Without them: the sandbox's own, shared by its containers.
        let [one, two] = ["one", "two"].map(|name| sleeper(&host, &sandbox, name, Vec::new(), |_| {}));
        assert_eq!(shell(&host, &one, "echo shared > /dev/shm/between; cat /etc/hostname").1, "order\n", "{handler}");
        assert_eq!(shell(&host, &two, "cat /dev/shm/between; grep -c order /etc/hosts"), (0, "shared\n1\n".into()), "{handler}");

        // All of the host's /dev, and its /proc and /sys to look at, as node agents have them.
        let mounts = vec![
            bind("/dev", Path::new("/dev")),
            bind("/host/proc", Path::new("/proc")),
            Mount { readonly: true, ..bind("/host/sys", Path::new("/sys")) },
        ];
        let agent = sleeper(&host, &sandbox, "agent", mounts, |_| {});
        let pid = std::process::id();
        let script =
            format!("cat /dev/shm/between; [ -c /dev/zero ] && [ -d /host/proc/{pid} ] && [ ! -d /proc/{pid} ] && [ -d /host/sys/kernel ]");
        assert_eq!(shell(&host, &agent, &script), (0, "shared\n".into()), "{handler}");
        host.remove_all();
        host.assert_clean();
    }
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

/// runc makes the superblock of sysfs read-only with a mount that is, for all containers of the sandbox.
#[test]
fn sys_stays_writable_for_the_privileged() {
    let host = Host::start();
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "sysfs", false);
        set_privileged(&mut config);
        let sandbox = host.run(config, &handler);
        let script =
            "mkdir /sys/x; for d in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $d/crisp-test && rmdir $d/crisp-test && echo writable; done";
        for round in ["first", "second"] {
            let plain = sleeper(&host, &sandbox, &format!("plain-{round}"), Vec::new(), |_| {});
            let (_, text) = shell(&host, &plain, script);
            assert!(text.contains("Read-only file system") && !text.contains("writable"), "{handler}: {text}");
            let other = sleeper(&host, &sandbox, &format!("privileged-{round}"), Vec::new(), privileged);
            let (_, text) = shell(&host, &other, script);
            assert!(!text.contains("'/sys/x': Read-only") && text.contains("writable"), "{handler}: {text}");
        }
        host.remove_all();
    }
    host.finish();
}

/// crun gives a container its stdin: were that the host's /dev/null, the root of a user namespace could forbid it to the whole machine.
#[test]
fn the_null_device_stays_the_hosts() {
    let host = Host::start();
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "null", false);
        let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().userns_options = Some(crate::userns::users()).into();
        let sandbox = host.run(config, &handler);
        let container = sleeper(&host, &sandbox, "null", Vec::new(), |_| {});
        // Nobody's, as seen from there.
        for _ in 0..2 {
            assert_eq!(shell(&host, &container, "stat -c %u:%a /dev/null"), (0, "65534:666\n".into()), "{handler}");
        }
        host.remove_all();
    }
    host.finish();
}

/// An image whose mount points are links out of it: everything happens inside.
#[test]
fn links_at_mount_points_lead_nowhere() {
    let host = Host::start();
    let dir = host.daemon.layout.path("victim");
    fs::create_dir_all(dir.join("inner")).expect("make a directory");
    fs::write(dir.join("secret"), "of the host").expect("write a file");
    let source = host.daemon.layout.path("source");
    fs::create_dir_all(&source).expect("make a directory");
    fs::write(source.join("file"), "mounted").expect("write a file");
    let victim = dir.display().to_string();
    let up = "../".repeat(40);
    let layer = Layer::busybox()
        .link("absolute", &victim)
        .link("relative", &format!("{up}{}", victim.trim_start_matches('/')))
        .link("file", &format!("{victim}/secret"))
        .link("magic", "/proc/self/root")
        .link("cwd", "/proc/self/fd")
        .dir("etc", 0o755, 0)
        .link("etc/resolv.conf", &format!("{victim}/secret"))
        .link("etc/hostname", &format!("{up}{}/new", victim.trim_start_matches('/')));
    let path = host.daemon.layout.path("links.tar");
    archive::write(
        &path,
        "localhost/links:1",
        vec![layer],
        json!({"Env": ["PATH=/bin"], "Volumes": {"/absolute/volume": {}, "/magic/tmp": {}}}),
    );
    host.daemon.import(&path);
    for name in ["dev", "proc", "sys"] {
        archive::write(&path, &format!("localhost/{name}:1"), vec![Layer::busybox().link(name, &victim)], json!({}));
        host.daemon.import(&path);
    }
    fs::remove_file(&path).expect("remove the archive");
    let before = list(&dir);
    let image = |config: &mut ContainerConfig| config.image.mut_or_insert_default().image = "localhost/links:1".into();
    for handler in handlers() {
        let sandbox = host.sandbox("links", &handler);
        for (name, mounts) in [
            ("none", vec![]),
            ("below", vec![bind("/absolute/inner", &source), bind("/relative/new/deep", &source)]),
            ("over", vec![bind("/absolute", &source), bind("/file", &source.join("file"))]),
            ("magic", vec![bind("/magic/etc", &source)]),
        ] {
            let mut config = container_config(&sandbox.config, name, &["sleep", "1000000"]);
            image(&mut config);
            config.mounts = mounts;
            // Whether a runtime takes such an image or refuses it is its own affair; what matters is where it writes.
            let request = create_request(&sandbox.id, &sandbox.config, &config);
            let created = host.client.call(&request);
            if let Ok(created) = created {
                let request = crisp::api::runtime::StartContainerRequest { container_id: created.container_id, ..Default::default() };
                let started = host.client.call(&request);
                println!("{handler} {name}: {started:?}");
            }
            assert_eq!(list(&dir), before, "{handler} {name}");
            assert_eq!(fs::read(dir.join("secret")).expect("it is there"), b"of the host");
            assert!(!mount::table().expect("read the mount table").iter().any(|m| m.target.starts_with(&dir)), "{handler} {name}");
        }
        // runc 1.1.5 would make /dev/fd and others at the end of such a link, on the host.
        for name in ["dev", "proc", "sys"] {
            let mut config = container_config(&sandbox.config, name, &SLEEP);
            config.image.mut_or_insert_default().image = format!("localhost/{name}:1");
            let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
            assert!(code == RpcStatusCode::FAILED_PRECONDITION && message.contains(&format!("/{name}")), "{code} {message}");
        }
        let mut config = container_config(&sandbox.config, "cwd", &SLEEP);
        image(&mut config);
        config.working_dir = "/cwd/7".into();
        let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
        assert!(code == RpcStatusCode::INVALID_ARGUMENT && message.contains("/proc/self/fd/7"), "{code} {message}");
        host.remove_all();
    }
    ["links", "dev", "proc", "sys"].iter().for_each(|name| crate::volumes::remove_image(&host, &format!("localhost/{name}:1")));
    fs::remove_dir_all(&dir).expect("remove the directory");
    fs::remove_dir_all(&source).expect("remove the directory");
    host.finish();
}

fn list(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("list a directory")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
