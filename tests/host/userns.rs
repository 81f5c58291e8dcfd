//! Sandboxes with a user namespace, with real OCI runtimes: what containers see of themselves, and what the host sees of them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crisp::api::runtime::{
    ContainerConfig, IDMapping, Int64Value, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxState, UserNamespace,
};
use nix::sys::signal::Signal;
use protobuf::MessageField;

use crate::daemon::Kind;
use crate::harness::{handlers, http_get_soon, kind, Container, Host, Sandbox};
use crate::objects::sandbox_config;
use crate::spdy::{connect, open, split};

const UID: u32 = 1_000_000;
const GID: u32 = 2_000_000;
const LENGTH: u32 = 65536;
const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn mapping(host_id: u32) -> Vec<IDMapping> {
    vec![IDMapping { host_id, length: LENGTH, ..Default::default() }]
}

pub fn users() -> UserNamespace {
    UserNamespace { mode: NamespaceMode::POD.into(), uids: mapping(UID), gids: mapping(GID), ..Default::default() }
}

fn options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default()
}

fn config(host: &Host, name: &str, host_network: bool) -> PodSandboxConfig {
    let mut config = sandbox_config(&host.daemon.layout, name, host_network);
    options(&mut config).userns_options = MessageField::some(users());
    config
}

fn sandbox(host: &Host, name: &str, handler: &str) -> Sandbox {
    host.run(config(host, name, false), handler)
}

/// What a script in a container prints; it must end well.
fn shell(host: &Host, container: &Container, script: &str) -> String {
    let (code, out, error) = host.exec(container, &["sh", "-c", script]);
    assert_eq!(code, 0, "{script}: {out}{error}");
    out
}

fn security(config: &mut ContainerConfig) -> &mut crisp::api::runtime::LinuxContainerSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (meta.uid(), meta.gid())
}

fn rootfs(host: &Host, container: &Container) -> PathBuf {
    host.daemon.layout.path("run/containers").join(&container.id).join("rootfs")
}

/// A directory that root alone may pass through, as kubelet's are, with a volume in it.
pub fn volume(host: &Host, name: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let closed = host.daemon.layout.path(name);
    let volume = closed.join("volume");
    fs::create_dir_all(&volume).expect("make the volume");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("close its parent");
    fs::write(volume.join("file"), "kept\n").expect("write");
    std::os::unix::fs::chown(volume.join("file"), Some(33), Some(44)).expect("chown");
    volume
}

pub fn mount(container_path: &str, host_path: &Path, mapped: bool) -> Mount {
    let ids = |id| if mapped { mapping(id) } else { Vec::new() };
    Mount {
        container_path: container_path.into(),
        host_path: host_path.display().to_string(),
        uidMappings: ids(UID),
        gidMappings: ids(GID),
        ..Default::default()
    }
}

fn skipped() -> bool {
    kind() == Kind::Containerd
}

#[test]
fn containers_are_root_of_nothing_else() {
    if skipped() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let sandbox = sandbox(&host, "users", &handler);
        let container = host.launch(&sandbox, "app", &SLEEP);
        let own = |file: &str| shell(&host, &container, &format!("cat /proc/self/{file}")).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(own("uid_map"), format!("0 {UID} {LENGTH}"), "{handler}");
        assert_eq!(own("gid_map"), format!("0 {GID} {LENGTH}"), "{handler}");
        assert_eq!(shell(&host, &container, "id -u; id -g"), "0\n0\n");
        // Both views of one file.
        assert_eq!(shell(&host, &container, "stat -c %u:%g / /bin/busybox /etc/passwd"), "0:0\n0:0\n0:0\n", "{handler}");
        let root = rootfs(&host, &container);
        assert_eq!((owner(&root), owner(&root.join("bin/busybox"))), ((UID, GID), (UID, GID)), "{handler}");
        shell(&host, &container, "echo new > /root/new; chown 33:44 /root/new; echo more >> /etc/passwd");
        assert_eq!((owner(&root.join("root/new")), owner(&root.join("etc/passwd"))), ((UID + 33, GID + 44), (UID, GID)), "{handler}");
        // The usual places are there, and are the container's.
        let script = "echo x > /dev/shm/x; stat -c %u /dev/shm /etc/hosts /etc/hostname /etc/resolv.conf; echo 10.0.0.1 more >> /etc/hosts";
        assert_eq!(shell(&host, &container, script), "0\n0\n0\n0\n", "{handler}");
        shell(
            &host,
            &container,
            "test -c /dev/null && echo x > /dev/null && head -c 1 /dev/zero && test -d /dev/mqueue && test -d /dev/pts",
        );
        assert_eq!(shell(&host, &container, "hostname"), "users\n");
        // A directory that the image does not have is made for them.
        let there = host.create_with(&sandbox, "there", &SLEEP, |config| config.working_dir = "/new/dir".into());
        host.start_container(&there);
        assert_eq!(shell(&host, &there, "pwd; stat -c %u:%g /new /new/dir; touch /new/x /new/dir/x"), "/new/dir\n0:0\n0:0\n", "{handler}");
        // Nothing of the host's can be changed.
        for script in ["echo 1 > /proc/sys/kernel/panic", "touch /sys/x", "mount -t tmpfs x /mnt", "echo 1 > /proc/sysrq-trigger"] {
            assert_ne!(host.exec(&container, &["sh", "-c", script]).0, 0, "{handler}: {script}");
        }
        // A process of the container on the host.
        let procs = crate::daemon::cgroup_processes(&host.daemon.layout.tag);
        let uids: Vec<u32> = procs.iter().filter_map(|pid| fs::metadata(format!("/proc/{pid}")).ok()).map(|m| m.uid()).collect();
        assert!(!uids.is_empty() && uids.iter().all(|uid| (UID..UID + LENGTH).contains(uid)), "{uids:?}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn the_network_belongs_to_the_users() {
    if skipped() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let sandbox = sandbox(&host, "net", &handler);
        let web = host.launch(&sandbox, "httpd", &["httpd", "-f", "-p", "80", "-h", "/www"]);
        assert_eq!(http_get_soon(&sandbox.ip, 80, "/"), "hello from a sandbox\n", "{handler}");
        assert_eq!(shell(&host, &web, "wget -q -O - http://127.0.0.1/"), "hello from a sandbox\n");
        let text = shell(&host, &web, "ip addr show eth0; ip link show lo; cat /proc/sys/net/ipv4/ping_group_range");
        assert!(text.contains(&sandbox.ip) && text.contains("LOOPBACK,UP"), "{text}");
        assert!(text.split_whitespace().collect::<Vec<_>>().ends_with(&["0", "65535"]), "{text}");
        shell(&host, &web, "ping -c 1 -W 10 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')");
        // Its root may do to it what a root may.
        let admin = host.create_with(&sandbox, "admin", &SLEEP, |config| {
            security(config).capabilities.mut_or_insert_default().add_capabilities = vec!["NET_ADMIN".into()];
        });
        host.start_container(&admin);
        shell(&host, &admin, "ip link add name up1 type veth peer name up2 || ip link set lo mtu 1400");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn standard_streams_can_be_opened_again() {
    if skipped() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        // A log of its own for each.
        let sandbox = sandbox(&host, &format!("stdio{handler}"), &handler);
        let say = "echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin; id -u";
        for user in [0, 33] {
            let container = host.create_with(&sandbox, &format!("user{user}"), &["sh", "-c", &format!("{say}; sleep 1000000")], |config| {
                security(config).run_as_user = MessageField::some(Int64Value { value: user, ..Default::default() });
            });
            host.start_container(&container);
            container.log.wait_for(&user.to_string());
            assert_eq!(container.log.text("stdout"), format!("out\n{user}\n"), "{handler}");
            assert_eq!(container.log.text("stderr"), "err\n", "{handler}");
            let (code, out, error) = host.exec(&container, &["sh", "-c", say]);
            assert_eq!((code, out.as_str(), error.as_str()), (0, format!("out\n{user}\n").as_str(), "err\n"), "{handler}");
            // A terminal, and a stream.
            for (wanted, script) in [("or", "test -t 1 && echo a terminal > /dev/tty && stat -c %u $(tty)"), ("oe", say)] {
                let request = crisp::api::runtime::ExecRequest {
                    container_id: container.id.clone(),
                    cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
                    stdout: true,
                    stderr: wanted.contains('e'),
                    tty: wanted.contains('r'),
                    ..Default::default()
                };
                let url = host.call(&request).url;
                let end = open(connect(&url), &split(&url).1, wanted).end();
                let text = String::from_utf8_lossy(&end.stdout).replace('\r', "");
                let expected = if wanted == "or" { format!("a terminal\n{user}\n") } else { format!("out\n{user}\n") };
                assert_eq!((end.code, text), (Some(0), expected), "{handler}: {wanted} {}", String::from_utf8_lossy(&end.stderr));
            }
        }
        let terminal =
            host.create_with(&sandbox, "terminal", &["sh", "-c", "stat -c %u $(tty); echo here > /dev/stderr; sleep 1000000"], |c| {
                c.tty = true;
            });
        host.start_container(&terminal);
        terminal.log.wait_for("here");
        assert_eq!(terminal.log.text("stdout").replace('\r', ""), "0\nhere\n", "{handler}");
        host.remove_all();
        // What has no stream was not given the host's device, which would now be the container's.
        let owner = fs::metadata("/dev/null").map(|meta| (meta.uid(), meta.gid())).expect("look at /dev/null");
        assert_eq!(owner, (0, 0), "{handler}: /dev/null");
    }
    host.finish();
}

#[test]
fn volumes_in_both_views() {
    if skipped() {
        return;
    }
    let host = Host::start();
    let (mapped, plain) = (volume(&host, "mapped"), volume(&host, "plain"));
    for handler in handlers() {
        let sandbox = sandbox(&host, "volumes", &handler);
        let mounts = vec![mount("/data", &mapped, true), mount("/plain", &plain, false), mount("/file", &mapped.join("file"), true)];
        let container = host.create_with(&sandbox, "app", &SLEEP, |config| config.mounts = mounts.clone());
        host.start_container(&container);
        // Owners as on the disk, where they are mapped; nobody's where they are not.
        let script = "stat -c %u:%g /data /data/file /file /plain/file; cat /data/file /file /plain/file";
        assert_eq!(shell(&host, &container, script), "0:0\n33:44\n33:44\n65534:65534\nkept\nkept\nkept\n", "{handler}");
        shell(&host, &container, "rm -f /data/new; echo x > /data/new; chown 5:6 /data/new; echo kept > /file");
        assert_eq!(owner(&mapped.join("new")), (5, 6), "{handler}");
        assert_ne!(host.exec(&container, &["touch", "/plain/new"]).0, 0, "{handler}");
        assert_eq!(host.status(&container).mounts, mounts);
        // One that root of the host has opened to all takes files of the mapped ids.
        fs::set_permissions(&plain, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("open it");
        shell(&host, &container, "rm -f /plain/new; touch /plain/new");
        assert_eq!(owner(&plain.join("new")), (UID, GID), "{handler}");
        fs::set_permissions(&plain, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("close it");
        fs::remove_file(plain.join("new")).expect("remove");
        host.remove_all();
        host.assert_clean();
    }
    // Without a user namespace the mappings count as well.
    let ordinary = host.sandbox("ordinary", "");
    let container = host.create_with(&ordinary, "app", &SLEEP, |config| config.mounts = vec![mount("/data", &mapped, true)]);
    host.start_container(&container);
    assert_eq!(shell(&host, &container, "stat -c %u:%g /data/file"), format!("{}:{}\n", UID + 33, GID + 44));
    host.remove_all();
    assert_eq!(fs::read_to_string(mapped.join("file")).expect("the volume stays"), "kept\n");
    host.finish();
}

#[test]
fn late_mounts_come_and_go_with_the_source() {
    if skipped() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let (source, late) = (host.daemon.layout.path("tree"), host.daemon.layout.path("late"));
        fs::create_dir_all(source.join("late")).expect("make the source");
        fs::create_dir_all(&late).expect("make what comes late");
        fs::write(late.join("file"), "late\n").expect("write");
        crisp::sys::mount::bind(&source, &source, false).expect("mount");
        crate::daemon::tool("mount", &["--make-shared", &source.display().to_string()]);
        let sandbox = sandbox(&host, "flow", &handler);
        let container = host.create_with(&sandbox, "app", &SLEEP, |config| {
            let mut mount = mount("/tree", &source, true);
            mount.propagation = crisp::api::runtime::MountPropagation::PROPAGATION_HOST_TO_CONTAINER.into();
            config.mounts = vec![mount];
        });
        host.start_container(&container);
        crisp::sys::mount::bind(&late, &source.join("late"), false).expect("mount");
        assert_eq!(shell(&host, &container, "cat /tree/late/file"), "late\n", "{handler}");
        host.remove_all();
        // What was mounted by others is theirs: the removal of our copy has not taken it away.
        assert_eq!(fs::read_to_string(source.join("late/file")).expect("still mounted"), "late\n", "{handler}");
        crisp::sys::mount::unmount(&source.join("late")).expect("unmount");
        crisp::sys::mount::unmount(&source).expect("unmount");
        host.assert_clean();
    }
    host.finish();
}

/// One directory mounted in a volume and one in that; a file in each and one beneath, which nobody may see. Of the disk: the kernel
/// maps the owners of a tmpfs from 6.3 on only.
#[test]
fn what_is_mounted_below_a_volume_comes_with_it() {
    if skipped() {
        return;
    }
    let host = Host::start();
    let layer = |path: &Path, above: &Path| {
        fs::create_dir_all(path).expect("make a mount point");
        fs::write(path.join("beneath"), b"").expect("write");
        fs::create_dir_all(above).expect("make what is mounted");
        fs::set_permissions(above, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("open it");
        fs::write(above.join("above"), b"").expect("write");
        crisp::sys::mount::bind(above, path, false).expect("mount");
    };
    for handler in handlers() {
        let source = host.daemon.layout.path("stack");
        let above = ["above", "above-deep"].map(|name| host.daemon.layout.path(name));
        layer(&source.join("sub"), &above[0]);
        layer(&source.join("sub/deep"), &above[1]);
        let sandbox = sandbox(&host, "stack", &handler);
        let container = host.create_with(&sandbox, "app", &SLEEP, |config| {
            let readonly = Mount { readonly: true, ..mount("/read", &source, false) };
            config.mounts = vec![mount("/plain", &source, false), readonly, mount("/mapped", &source, true)];
        });
        host.start_container(&container);
        for top in ["/plain", "/read", "/mapped"] {
            let name = &top[1..];
            let script = format!("cd {top}/sub; ls -d beneath above deep/beneath deep/above 2>/dev/null; touch w-{name} deep/w-{name}");
            assert_eq!(shell(&host, &container, &script), "above\ndeep/above\n", "{handler}: {top}");
        }
        assert_ne!(host.exec(&container, &["touch", "/read/new"]).0, 0, "{handler}");
        for dir in ["sub", "sub/deep"] {
            for top in ["plain", "read", "mapped"] {
                assert!(source.join(dir).join(format!("w-{top}")).exists(), "{handler}: {top}: {dir}");
            }
        }
        host.remove_all();
        for dir in ["sub/deep", "sub"] {
            assert!(source.join(dir).join("above").exists(), "{handler}: still mounted on the host");
            crisp::sys::mount::unmount(&source.join(dir)).expect("unmount");
        }
        let beneath = fs::read_dir(source.join("sub")).expect("list").flatten().map(|e| e.file_name()).collect::<Vec<_>>();
        assert_eq!(beneath, ["beneath"], "{handler}");
        for dir in [&source, &above[0], &above[1]] {
            fs::remove_dir_all(dir).expect("remove");
        }
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn a_shared_pid_namespace_of_other_users() {
    if skipped() {
        return;
    }
    let mut host = Host::start();
    for handler in handlers() {
        let mut config = config(&host, "shared", false);
        options(&mut config).pid = NamespaceMode::POD.into();
        let shared = host.run(config, &handler);
        let sleeper = host.launch(&shared, "sleeper", &["sleep", "424242"]);
        let looker = host.launch(&shared, "looker", &SLEEP);
        let text = shell(&host, &looker, "ps -o pid,args");
        assert!(text.contains("sleep 424242"), "{handler}: {text}");
        // The init is out of reach of its namespace's root.
        for script in ["ls /proc/1/root/", "cat /proc/1/environ", "readlink /proc/1/exe"] {
            assert_ne!(host.exec(&looker, &["sh", "-c", script]).0, 0, "{handler}: {script}");
        }
        shell(&host, &looker, "kill -15 1; sleep 0.1; test -d /proc/1");
        host.stop(&sleeper, 0);
        assert!(!shell(&host, &looker, "ps -o args").contains("424242"), "{handler}");
        // In a sandbox of mode CONTAINER one is started when a container asks, also by another daemon.
        let own = sandbox(&host, "own", &handler);
        host.daemon.stop(Signal::SIGKILL);
        host.daemon.run();
        host.daemon.wait_ready();
        let late = host.create_with(&own, "late", &SLEEP, |c| {
            security(c).namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
        });
        host.start_container(&late);
        let first = shell(&host, &late, "cat /proc/1/comm");
        assert!(first.starts_with("crisp-shim"), "{handler}: {first}");
        let aimed = host.create_with(&own, "aimed", &SLEEP, |c| {
            let options = security(c).namespace_options.mut_or_insert_default();
            (options.pid, options.target_id) = (NamespaceMode::TARGET.into(), late.id.clone());
        });
        host.start_container(&aimed);
        assert!(shell(&host, &aimed, "ps -o args").contains("sleep"), "{handler}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn the_hosts_namespaces_with_other_users() {
    if skipped() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let mut config = config(&host, "node", true);
        (options(&mut config).ipc, options(&mut config).pid) = (NamespaceMode::NODE.into(), NamespaceMode::NODE.into());
        let sandbox = host.run(config, &handler);
        let container = host.launch(&sandbox, "app", &SLEEP);
        let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).expect("read our namespace").display().to_string();
        let script = "for n in net pid ipc uts; do readlink /proc/self/ns/$n; done; cat /proc/self/uid_map";
        let text = shell(&host, &container, script);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..4], [own("net"), own("pid"), own("ipc"), own("uts")], "{handler}");
        assert_eq!(lines[4].split_whitespace().collect::<Vec<_>>(), ["0", &UID.to_string(), &LENGTH.to_string()], "{handler}");
        shell(&host, &container, "ls /sys/class/net | grep -q lo && test -d /proc/1");
        // The host's sysfs, and read-only with all that is mounted in it.
        let mounts = shell(&host, &container, "cat /proc/self/mountinfo");
        // The last mount at a place is the one that is seen.
        let mut below = std::collections::BTreeMap::new();
        for fields in mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).filter(|fields| fields[4].starts_with("/sys")) {
            below.insert(fields[4].to_owned(), fields[5].to_owned());
        }
        assert!(below.contains_key("/sys"), "{mounts}");
        for (place, options) in below {
            assert!(options.split(',').any(|option| option == "ro"), "{handler}: {place} is {options}");
        }
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn privileged_among_their_own() {
    if skipped() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let mut config = config(&host, "strong", false);
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        let sandbox = host.run(config, &handler);
        let container = host.create_with(&sandbox, "app", &SLEEP, |config| security(config).privileged = true);
        host.start_container(&container);
        shell(&host, &container, "mkdir -p /mnt && mount -t tmpfs x /mnt && touch /mnt/x && mount -t proc proc /mnt");
        shell(&host, &container, "ip link set lo mtu 1400 && echo 1 > /proc/sys/net/ipv4/ip_forward");
        assert_ne!(host.exec(&container, &["sh", "-c", "echo 1 > /proc/sys/kernel/panic"]).0, 0, "{handler}: the host's");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn they_outlive_the_daemon_and_a_copy_works_too() {
    if skipped() {
        return;
    }
    for table in ["", "snapshotter = \"copy\"\n", "userns_rootfs = \"chown\"\n"] {
        let mut host = Host::start_with(|options| options.top = table.into());
        for handler in handlers() {
            let data = volume(&host, "data");
            let sandbox = sandbox(&host, "lasting", &handler);
            let container = host.create_with(&sandbox, "app", &SLEEP, |config| config.mounts = vec![mount("/data", &data, true)]);
            host.start_container(&container);
            host.daemon.stop(Signal::SIGKILL);
            host.daemon.run();
            host.daemon.wait_ready();
            let status = host.sandbox_status(&sandbox.id);
            assert_eq!(status.state.enum_value(), Ok(PodSandboxState::SANDBOX_READY), "{status}");
            assert_eq!(status.linux.namespaces.options.userns_options, MessageField::some(users()));
            assert_eq!(shell(&host, &container, "id -u; stat -c %u /data/file /bin/busybox"), "0\n33\n0\n", "{table}{handler}");
            let second = host.launch(&sandbox, "second", &SLEEP);
            shell(&host, &second, "echo x > /etc/new");
            assert_eq!(owner(&rootfs(&host, &second).join("etc/new")), (UID, GID), "{table}{handler}");
            host.remove_all();
            host.assert_clean();
            assert_eq!(fs::read_to_string(data.join("file")).expect("the volume stays"), "kept\n");
        }
        host.finish();
    }
}
