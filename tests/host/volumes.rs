//! Volumes from images: images that are mounted, and paths that an image declares.

use std::fs;
use std::path::{Path, PathBuf};

use crisp::api::runtime::{
    ContainerConfig, ContainerState, ImageSpec, Mount, RemoveImageRequest, StartContainerRequest, StopContainerRequest,
};
use crisp::sys::mount;
use grpcio::RpcStatusCode;
use nix::sys::signal::Signal;
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use crate::archive::{self, Layer};
use crate::harness::{handlers, Container, Host};
use crate::mounts::{bind, plain_sandbox, shell, sleeper};
use crate::objects::{container_config, create_request};

const DATA: &str = "localhost/data:1";
pub const DECLARING: &str = "localhost/declaring:1";

/// Two layers, without a program: a whiteout, links that want out, a script.
fn import_data(host: &Host) -> String {
    let low = Layer::new()
        .dir("conf", 0o755, 0)
        .file("conf/kept", b"kept\n", 0o644)
        .file("conf/gone", b"gone\n", 0o644)
        .dir("private", 0o700, 1234)
        .link("out", "/etc/passwd")
        .link("up", "../../../../../../../../etc/passwd")
        .link("inside", "/conf/kept");
    let high = Layer::new().file("conf/.wh.gone", b"", 0o644).file("bin/script", b"#!/bin/sh\necho it runs\n", 0o755);
    import(host, DATA, vec![low, high], json!({}))
}

fn import(host: &Host, tag: &str, layers: Vec<Layer>, config: serde_json::Value) -> String {
    let path = host.daemon.layout.path("image.tar");
    let id = archive::write(&path, tag, layers, config);
    host.daemon.import(&path);
    fs::remove_file(&path).expect("remove the archive");
    id
}

pub fn import_declaring(host: &Host) -> String {
    let layer = Layer::busybox()
        .dir("data", 0o2750, 77)
        .dir("data/sub", 0o755, 0)
        .file("data/sub/file", b"of the image\n", 0o600)
        .link("data/link", "/etc/passwd")
        .dir("run", 0o755, 0)
        .link("var/run", "/run");
    let volumes = json!({"/data": {}, "/var/run/state": {}, "/not/there": {}, "/proc/sys": {}, "/sys/fs/cgroup": {}});
    import(host, DECLARING, vec![layer], json!({"Env": ["PATH=/bin"], "Volumes": volumes}))
}

pub fn remove_image(host: &Host, image: &str) {
    host.call(&RemoveImageRequest { image: Some(ImageSpec { image: image.into(), ..Default::default() }).into(), ..Default::default() });
}

pub fn image_mount(container_path: &str, image: &str, sub_path: &str) -> Mount {
    Mount {
        container_path: container_path.into(),
        readonly: true,
        image: Some(ImageSpec { image: image.into(), user_specified_image: image.into(), ..Default::default() }).into(),
        image_sub_path: sub_path.into(),
        ..Default::default()
    }
}

fn layers(host: &Host) -> usize {
    fs::read_dir(host.daemon.layout.path("root/layers"))
        .expect("list layers")
        .flatten()
        .filter(|e| !e.file_name().to_string_lossy().contains('.'))
        .count()
}

/// Directories of volumes that images declared.
fn kept_volumes(host: &Host) -> Vec<PathBuf> {
    fs::read_dir(host.daemon.layout.path("root/volumes")).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[test]
fn images_are_mounted_to_be_read_and_run() {
    let host = Host::start();
    for handler in handlers() {
        let before = layers(&host);
        let id = import_data(&host);
        let sandbox = plain_sandbox(&host, "images", &handler);
        let mounts = vec![
            image_mount("/img", DATA, ""),
            image_mount("/dir", &id, "conf"),
            image_mount("/file", DATA, "conf/kept"),
            image_mount("/linked", DATA, "inside"),
            Mount { mount_options: vec!["noexec".into()], ..image_mount("/noexec", DATA, "bin") },
            Mount { recursive_read_only: true, ..image_mount("/rro", DATA, "") },
        ];
        let [one, two] = ["one", "two"].map(|name| sleeper(&host, &sandbox, name, mounts.clone(), |_| {}));
        for container in [&one, &two] {
            let seen = host.status(container).mounts;
            assert!(seen.iter().all(|m| m.image.image_ref == id), "{seen:?}");
            let script =
                "cat /img/conf/kept /dir/kept /file /linked; ls /img/conf; /img/bin/script; readlink /img/out; stat -c %a:%u /img/private";
            let expected = "kept\nkept\nkept\nkept\nkept\nit runs\n/etc/passwd\n700:1234\n";
            assert_eq!(shell(&host, container, script), (0, expected.into()), "{handler}");
            for path in ["/img/x", "/dir/x", "/file", "/rro/x"] {
                let (code, text) = shell(&host, container, &format!("echo x > {path}"));
                assert!(code != 0 && text.contains("Read-only file system"), "{handler} {path}: {text}");
            }
            let (code, text) = shell(&host, container, "/noexec/script");
            assert!(code == 126 && text.contains("Permission denied"), "{handler}: {text}");
        }

        // Gone from the list, but held: also for a daemon that starts anew.
        remove_image(&host, DATA);
        assert_eq!(layers(&host), before + 2, "{handler}");
        assert_eq!(shell(&host, &one, "cat /img/conf/kept").1, "kept\n");
        host.remove(&one);
        assert_eq!((layers(&host), shell(&host, &two, "cat /img/conf/kept").1), (before + 2, "kept\n".into()), "{handler}");
        host.remove(&two);
        assert_eq!(layers(&host), before, "{handler}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn images_that_cannot_be_mounted() {
    let host = Host::start();
    import_data(&host);
    let sandbox = plain_sandbox(&host, "refused", "");
    let refused = |mounts: Vec<Mount>| {
        let mut config = container_config(&sandbox.config, "refused", &["sleep", "1"]);
        config.mounts = mounts;
        let answer = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
        // The step before was undone.
        let left: Vec<_> = mount::table()
            .expect("read the mount table")
            .into_iter()
            .filter(|m| m.target.starts_with(host.daemon.layout.path("run/containers")))
            .collect();
        assert!(left.is_empty() && kept_volumes(&host).is_empty(), "{left:?}");
        answer
    };
    for wrong in [
        image_mount("/b", "localhost/none:1", ""),
        image_mount("/b", DATA, "conf/gone"),
        image_mount("/b", DATA, "none/at/all"),
        image_mount("/b", DATA, "up"),
        image_mount("/b", DATA, "conf/kept/x"),
    ] {
        let (code, message) = refused(vec![image_mount("/a", DATA, ""), wrong.clone()]);
        assert!(code == RpcStatusCode::UNKNOWN && message.starts_with("ImageVolumeMountFailed: "), "{wrong}: {code} {message}");
    }
    for (wrong, words) in [
        (Mount { readonly: false, ..image_mount("/b", DATA, "") }, "readonly"),
        (Mount { host_path: "/srv".into(), ..image_mount("/b", DATA, "") }, "exclude"),
        (image_mount("/b", "", ""), "image.image"),
    ] {
        let (code, message) = refused(vec![image_mount("/a", DATA, ""), wrong]);
        assert!(code == RpcStatusCode::INVALID_ARGUMENT && message.contains(words), "{code} {message}");
    }
    // A step after it fails.
    let (_, message) = refused(vec![image_mount("/a", DATA, ""), Mount { propagation: protobuf_enum(7), ..bind("/b", Path::new("/srv")) }]);
    assert!(message.contains("propagation"), "{message}");
    let mut config = container_config(&sandbox.config, "late", &["sleep", "1"]);
    config.mounts = vec![image_mount("/a", DATA, "")];
    config.working_dir = "/bin/busybox/x".into();
    host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
    host.remove_all();
    remove_image(&host, DATA);
    host.finish();
}

fn protobuf_enum<E: protobuf::Enum>(number: i32) -> protobuf::EnumOrUnknown<E> {
    protobuf::EnumOrUnknown::from_i32(number)
}

fn declaring(config: &mut ContainerConfig) {
    config.image.mut_or_insert_default().image = DECLARING.into();
}

#[test]
fn declared_volumes_are_the_containers_own() {
    let host = Host::start();
    let own = host.daemon.layout.path("own");
    fs::create_dir_all(&own).expect("make a directory");
    fs::write(own.join("mine"), "mine\n").expect("write a file");
    let id = import_declaring(&host);
    for handler in handlers() {
        let sandbox = plain_sandbox(&host, "declared", &handler);
        let readonly = |config: &mut ContainerConfig| {
            declaring(config);
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().readonly_rootfs = true;
        };
        let one = sleeper(&host, &sandbox, "one", Vec::new(), readonly);
        let two = sleeper(&host, &sandbox, "two", vec![bind("/data", &own)], declaring);
        let script = "stat -c %a:%u:%g /data; cat /data/sub/file; stat -c %a /data/sub/file; readlink /data/link";
        assert_eq!(shell(&host, &one, script), (0, "2750:77:77\nof the image\n600\n/etc/passwd\n".into()), "{handler}");
        let script = "touch /data/new /run/state/new /var/run/state/other /not/there/new && ls /run/state; touch /x || touch /etc/x; \
                      grep -c -E ' (/data|/run/state|/not/there) ' /proc/self/mountinfo; grep -E ' (/data|/run/state) .* overlay ' /proc/self/mountinfo";
        let (code, text) = shell(&host, &one, script);
        assert!(code == 1 && text.starts_with("new\nother\n") && text.ends_with("\n3\n"), "{handler}: {text}");
        assert_eq!(text.matches("Read-only file system").count(), 2, "{handler}: {text}");
        // The request's own mount counts, and its status shows nothing else.
        assert_eq!(shell(&host, &two, "ls /data; ls /run/state /proc/sys | head -1"), (0, "mine\n/proc/sys:\n".into()), "{handler}");
        assert!(own.join("mine").exists() && fs::read_dir(&own).expect("list it").count() == 1);
        assert!(host.status(&one).mounts.is_empty());

        let volume = host.daemon.layout.path("root/volumes").join(&one.id);
        assert!(volume.exists() && !host.daemon.layout.path("root/snapshots").join(&one.id).join("fs/data/new").exists());
        host.remove(&one);
        assert!(!volume.exists());
        host.remove_all();
        assert!(kept_volumes(&host).is_empty());
    }
    fs::remove_dir_all(&own).expect("remove the directory");
    remove_image(&host, &id);
    host.finish();
}

#[test]
fn volumes_outlive_the_daemon() {
    let mut host = Host::start();
    let data = import_data(&host);
    import_declaring(&host);
    for handler in handlers() {
        let sandbox = plain_sandbox(&host, "restart", &handler);
        let mounts = vec![image_mount("/img", DATA, "conf")];
        let running = sleeper(&host, &sandbox, "running", mounts.clone(), declaring);
        assert_eq!(shell(&host, &running, "echo kept > /data/written").0, 0);
        let created = host.create_with(&sandbox, "created", &["sleep", "1000000"], |config| {
            config.mounts = mounts.clone();
            declaring(config);
        });
        host.daemon.stop(Signal::SIGKILL);
        host.daemon.run();
        host.daemon.wait_ready();
        remove_image(&host, DATA);
        assert_eq!(shell(&host, &running, "cat /data/written /img/kept"), (0, "kept\nkept\n".into()), "{handler}");
        host.start_container(&created);
        assert_eq!(shell(&host, &created, "cat /img/kept /data/sub/file"), (0, "kept\nof the image\n".into()), "{handler}");
        assert_eq!(host.status(&created).mounts[0].image.image_ref, data);
        host.remove_all();
        assert!(kept_volumes(&host).is_empty());
        import_data(&host);
    }
    remove_image(&host, DATA);
    remove_image(&host, DECLARING);
    host.finish();
}

/// What a power cut does to us: nothing is mounted or running any more, and `run` is empty.
#[test]
fn after_a_reboot_nothing_is_left_and_layers_are_held() {
    let mut host = Host::start();
    import_data(&host);
    import_declaring(&host);
    let sandbox = plain_sandbox(&host, "reboot", "");
    let before = layers(&host);
    let container = sleeper(&host, &sandbox, "reboot", vec![image_mount("/img", DATA, "")], declaring);
    let created =
        host.create_with(&sandbox, "created", &["sleep", "1000000"], |config| config.mounts = vec![image_mount("/img", DATA, "")]);
    host.daemon.stop(Signal::SIGKILL);
    for pid in host.daemon.monitors() {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
    for pid in crate::daemon::cgroup_processes(&host.daemon.layout.tag) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
    let run = host.daemon.layout.path("run");
    for target in mount::below(&run).expect("read the mount table") {
        mount::unmount(&target).expect("unmount it");
    }
    fs::remove_dir_all(&run).expect("remove what a reboot forgets");
    host.daemon.run();
    host.daemon.wait_ready();
    assert_eq!(host.status(&container).state.enum_value(), Ok(ContainerState::CONTAINER_EXITED));
    remove_image(&host, DATA);
    assert_eq!(layers(&host), before, "its record still names them");
    assert!(host.client.call(&StartContainerRequest { container_id: created.id.clone(), ..Default::default() }).is_err());
    host.call(&StopContainerRequest { container_id: container.id.clone(), ..Default::default() });
    host.remove_all();
    assert!(kept_volumes(&host).is_empty() && layers(&host) == before - 2);
    remove_image(&host, DECLARING);
    host.finish();
}

/// A container can nest directories as deep as its disk goes: that must not end the daemon when it removes them.
#[test]
fn directories_of_any_depth_go() {
    let host = Host::start();
    import_declaring(&host);
    let sandbox = plain_sandbox(&host, "deep", "");
    let container: Container = sleeper(&host, &sandbox, "deep", Vec::new(), declaring);
    let root = host.daemon.layout.path("root");
    for top in [root.join("snapshots").join(&container.id).join("fs/tmp"), root.join("volumes").join(&container.id).join("0")] {
        fs::create_dir_all(&top).expect("make a directory");
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = rustix::fs::open(&top, flags, Mode::empty()).expect("open it");
        for _ in 0..6_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).expect("make a directory");
            at = rustix::fs::openat(&at, "d", flags, Mode::empty()).expect("open it");
        }
    }
    let pid = host.daemon.pid();
    host.remove(&container);
    host.remove_all();
    assert!(kept_volumes(&host).is_empty() && host.daemon.pid() == pid);
    remove_image(&host, DECLARING);
    host.finish();
}
