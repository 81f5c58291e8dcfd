//! Mount points of images that are links: into the kernel's file systems they are refused, to what is not there yet they are made.

use std::fs;

use grpcio::RpcStatusCode;
use serde_json::json;

use crate::archive::{self, Layer};
use crate::daemon::Kind;
use crate::harness::{handlers, kind, Host};
use crate::mounts::{bind, shell};
use crate::objects::{container_config, create_request};

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn import(host: &Host, name: &str, layer: Layer) -> String {
    let (path, image) = (host.daemon.layout.path("image.tar"), format!("localhost/{name}:1"));
    archive::write(&path, &image, vec![layer], json!({"Env": ["PATH=/bin"]}));
    host.daemon.import(&path);
    fs::remove_file(&path).expect("remove the archive");
    image
}

/// crun mounts wherever links lead inside the root filesystem; runc refuses what is in /proc.
#[test]
fn an_image_leads_no_mount_into_the_kernels_file_systems() {
    if kind() == Kind::Containerd {
        return;
    }
    let host = Host::start();
    let source = host.daemon.layout.path("source");
    fs::create_dir_all(&source).expect("make a directory");
    let hosts = import(&host, "hosts", Layer::busybox().dir("etc", 0o755, 0).link("etc/hosts", "/proc/1/attr/exec"));
    let proc = import(&host, "mnt", Layer::busybox().link("mnt", "/proc"));
    let sys = import(&host, "sub", Layer::busybox().link("mnt", "sys"));
    for handler in handlers() {
        let sandbox = host.sandbox("misled", &handler);
        for (image, mounts, named) in [
            (&hosts, vec![], "mount /etc/hosts"),
            (&proc, vec![bind("/mnt", &source)], "mount /mnt"),
            (&sys, vec![bind("/mnt/kernel", &source)], "mount /mnt/kernel"),
        ] {
            let mut config = container_config(&sandbox.config, "misled", &SLEEP);
            config.image.mut_or_insert_default().image = image.clone();
            config.mounts = mounts;
            let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
            assert!(code == RpcStatusCode::FAILED_PRECONDITION && message.contains(named), "{handler}: {code} {message}");
        }
        host.remove_all();
    }
    [hosts, proc, sys].iter().for_each(|image| crate::volumes::remove_image(&host, image));
    fs::remove_dir_all(&source).expect("remove the directory");
    host.finish();
}

/// As many images have /var/run and /etc/resolv.conf. Nothing else makes /run.
#[test]
fn mount_points_behind_dangling_links_are_made() {
    let host = Host::start();
    let source = host.daemon.layout.path("source");
    fs::create_dir_all(&source).expect("make a directory");
    fs::write(source.join("file"), "mounted\n").expect("write a file");
    let layer = Layer::busybox()
        .dir("etc", 0o755, 0)
        .dir("var", 0o755, 0)
        .link("var/run", "/run")
        .link("etc/resolv.conf", "../lib/systemd/resolve/stub-resolv.conf")
        .link("etc/file", "/opt/new/file");
    let image = import(&host, "dangling", layer);
    for handler in handlers() {
        for users in [false, true].into_iter().filter(|users| !users || kind() == Kind::Crispd) {
            let mut config = crate::objects::sandbox_config(&host.daemon.layout, "dangling", false);
            if users {
                let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
                context.namespace_options.mut_or_insert_default().userns_options = Some(crate::userns::users()).into();
            }
            let sandbox = host.run(config, &handler);
            let container = host.create_with(&sandbox, "main", &SLEEP, |config| {
                config.image.mut_or_insert_default().image = image.clone();
                config.mounts = vec![bind("/var/run/secrets/a/token", &source), bind("/etc/file", &source.join("file"))];
            });
            host.start_container(&container);
            let script = "cat /var/run/secrets/a/token/file /run/secrets/a/token/file /opt/new/file /etc/file; stat -c %u /run /run/secrets/a /opt/new; test -e /etc/resolv.conf";
            let expected = format!("{}0\n0\n0\n", "mounted\n".repeat(4));
            assert_eq!(shell(&host, &container, script), (0, expected), "{handler}, user namespace: {users}");
            host.remove_all();
        }
    }
    crate::volumes::remove_image(&host, &image);
    fs::remove_dir_all(&source).expect("remove the directory");
    host.finish();
}
