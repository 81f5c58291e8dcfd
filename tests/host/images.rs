//! Images on real things: Debian's docker-registry on loopback, skopeo, umoci, overlayfs. Root only.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crisp::image::{Digest, Images, Settings};
use crisp::snapshot::{Attributes, Kind, Snapshotter};
use crisp::sys::cancel::Cancel;

/// Runs a program to its end; its output on failure.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("run {program}: {e} (apt-get install it)"));
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A docker-registry with its storage in a directory of the test; ends with the value.
struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    fn start(dir: &Path) -> Registry {
        Registry::start_with(dir, "")
    }

    /// `extra` goes into the `http` section of the configuration.
    fn start_with(dir: &Path, extra: &str) -> Registry {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let config = dir.join("registry.yml");
        let storage = dir.join("registry");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}{extra}}}\n",
            storage.display()
        );
        std::fs::write(&config, text).unwrap();
        let program = crate::daemon::find("docker-registry").expect("docker-registry is not installed: run scripts/install-deps");
        let child = Command::new(program).arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let registry = Registry { child: child.expect("run docker-registry"), address };
        let end = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(&registry.address).is_err() {
            assert!(Instant::now() < end, "docker-registry does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An image of three layers with everything that is hard about layers, as an OCI layout made by umoci: `layout:box`.
fn build(dir: &Path) -> PathBuf {
    let layout = dir.join("layout");
    let image = format!("{}:box", layout.display());
    let bundle = dir.join("bundle");
    let root = bundle.join("rootfs");
    run("umoci", &["init", "--layout", &layout.display().to_string()]);
    run("umoci", &["new", "--image", &image]);
    let layer = |change: &dyn Fn(&Path)| {
        run("umoci", &["unpack", "--image", &image, &bundle.display().to_string()]);
        change(&root);
        run("umoci", &["repack", "--image", &image, &bundle.display().to_string()]);
        std::fs::remove_dir_all(&bundle).unwrap();
    };
    let write = |path: PathBuf, text: &str, mode: u32| {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    layer(&|root| {
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("apt-get install busybox-static");
        std::fs::hard_link(root.join("bin/busybox"), root.join("bin/sh")).unwrap();
        symlink("busybox", root.join("bin/ls")).unwrap();
        symlink("/nowhere/at/all", root.join("dangling")).unwrap();
        write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n", 0o644);
        write(root.join("bin/suid"), "s", 0o4755);
        write(root.join("opaque/old"), "o", 0o644);
        write(root.join("gone/deep/file"), "g", 0o600);
        write(root.join("swap"), "file", 0o644);
        std::fs::create_dir(root.join("tmp")).unwrap();
        std::fs::set_permissions(root.join("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
        std::os::unix::fs::chown(root.join("etc/passwd"), Some(1234), Some(5678)).unwrap();
        run("mkfifo", &[&root.join("fifo").display().to_string()]);
        run("mknod", &[&root.join("null").display().to_string(), "c", "1", "3"]);
        write(root.join(format!("long/{}", "n".repeat(200))), "long", 0o644);
        write(root.join("ünï ço\ndé"), "odd", 0o644);
        let attribute = |name: &str, value: &[u8]| {
            rustix::fs::lsetxattr(root.join("etc/passwd"), name, value, rustix::fs::XattrFlags::empty()).unwrap();
        };
        attribute("user.note", b"two\nlines = 1");
        // A capability with a newline byte in it.
        attribute("security.capability", &[1, 0, 0, 2, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    });
    layer(&|root| {
        std::fs::remove_dir_all(root.join("gone")).unwrap();
        std::fs::remove_dir_all(root.join("opaque")).unwrap();
        write(root.join("opaque/new"), "n", 0o640);
        std::fs::remove_file(root.join("swap")).unwrap();
        write(root.join("swap/inside"), "dir now", 0o644);
    });
    layer(&|root| {
        write(root.join("tmp/late"), "late", 0o644);
        std::fs::remove_file(root.join("dangling")).unwrap();
    });
    run("umoci", &["config", "--image", &image, "--config.user", "1234:5678", "--config.cmd", "sh", "--config.label", "a=b"]);
    layout
}

/// Everything about a tree, by path.
fn survey(root: &Path) -> BTreeMap<PathBuf, String> {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<PathBuf, String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            out.insert(path.strip_prefix(root).unwrap().to_owned(), describe(&path));
            if path.symlink_metadata().unwrap().is_dir() {
                walk(root, &path, out);
            }
        }
    }
    let mut out = BTreeMap::from([(PathBuf::new(), describe(root))]);
    walk(root, root, &mut out);
    out
}

fn describe(path: &Path) -> String {
    let meta = path.symlink_metadata().unwrap();
    let kind = meta.file_type();
    let content = if kind.is_symlink() {
        std::fs::read_link(path).unwrap().display().to_string()
    } else if kind.is_file() {
        Digest::of(&std::fs::read(path).unwrap()).to_string()
    } else if kind.is_char_device() || kind.is_block_device() {
        meta.rdev().to_string()
    } else {
        String::new()
    };
    let links = if kind.is_file() { meta.nlink() } else { 1 };
    let mut attributes: Vec<String> = crisp::sys::rooted::xattrs(path)
        .unwrap()
        .into_iter()
        .filter(|(k, _)| {
            !k.as_bytes().starts_with(b"trusted.overlay.")
                && !k.as_bytes().starts_with(b"user.umoci")
                && !k.as_bytes().starts_with(b"user.rootless")
        })
        .map(|(k, v)| format!("{}={}", k.to_string_lossy(), String::from_utf8_lossy(&v)))
        .collect();
    // Listed in the order they were set.
    attributes.sort();
    // Directories' times differ where a tool sets them before it fills them.
    let time = if kind.is_dir() { 0 } else { meta.mtime() };
    format!("{:o} {}:{} links {links} time {time} {attributes:?} {content}", meta.mode(), meta.uid(), meta.gid())
}

fn compare(ours: &Path, theirs: &Path) {
    let (ours, theirs) = (survey(ours), survey(theirs));
    for (path, text) in &theirs {
        assert_eq!(ours.get(path), Some(text), "{}", path.display());
    }
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
}

/// Everything that is stored is what its images say.
fn verify(images: &Images) {
    let mut problems = Vec::new();
    let told = &mut |step: crisp::image::Check| {
        problems.extend(step.problems);
        Ok(())
    };
    images.check(false, &Cancel::never(), told).unwrap();
    assert_eq!(problems, []);
}

/// Mounts (or copies) an image and compares it with `theirs`.
fn check_tree(images: &Images, root: &Path, reference: &str, theirs: &Path) {
    for kind in [Kind::Overlay, Kind::Copy] {
        let snapshotter = Snapshotter::new(root, kind).unwrap();
        let held = images.hold(reference, "c1").unwrap();
        let target = root.join("rootfs");
        snapshotter.prepare("c1", &held.layers, &target, Attributes::default()).unwrap();
        compare(&target, theirs);
        snapshotter.remove("c1", &target).unwrap();
        images.release("c1").unwrap();
    }
}

#[test]
fn pulled_and_imported_images_equal_umoci() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path());
    let layout = build(dir.path());
    let source = format!("oci:{}:box", layout.display());
    let reference = format!("{}/test/box", registry.address);
    run("skopeo", &["copy", "--dest-tls-verify=false", &source, &format!("docker://{reference}:v1")]);
    run("skopeo", &["copy", "--dest-tls-verify=false", "--format", "v2s2", &source, &format!("docker://{reference}:v2s2")]);
    run("umoci", &["unpack", "--image", &format!("{}:box", layout.display()), &dir.path().join("theirs").display().to_string()]);
    let theirs = dir.path().join("theirs/rootfs");

    let root = dir.path().join("root");
    let images = Images::open(Settings::new(&root)).unwrap();
    let pull = |version: &str| images.pull(&format!("{reference}{version}"), None, &Cancel::never(), None).unwrap();
    let image = pull(":v1");
    assert_eq!((image.user(), image.uid(), image.chain.len()), ("1234", Some(1234), 3));
    let digest = image.repo_digests[0].split_once('@').unwrap().1.to_owned();
    let inspected = run("skopeo", &["inspect", "--tls-verify=false", "--format", "{{.Digest}}", &format!("docker://{reference}:v1")]);
    assert_eq!(inspected.trim(), digest);
    assert_eq!(pull(&format!("@{digest}")), image);
    check_tree(&images, &root, &image.id, &theirs);
    let docker = pull(":v2s2");
    assert_eq!(docker.chain, image.chain);

    // The archives have the same config, so the same id; in a store of their own.
    for kind in ["oci-archive", "docker-archive"] {
        let file = dir.path().join(format!("{kind}.tar"));
        run("skopeo", &["copy", &source, &format!("{kind}:{}:q.io/test/{kind}:v3", file.display())]);
        let root = dir.path().join(kind);
        let images = Images::open(Settings::new(&root)).unwrap();
        let made = images.import(&file, None, &Cancel::never()).unwrap();
        assert_eq!(made[0].chain, image.chain);
        assert_eq!(made[0].repo_tags, [format!("q.io/test/{kind}:v3")]);
        check_tree(&images, &root, &format!("q.io/test/{kind}:v3"), &theirs);
        verify(&images);
    }
    verify(&images);
    let direct = Images::open(Settings::new(&dir.path().join("direct"))).unwrap();
    assert_eq!(direct.import(&layout, Some("direct"), &Cancel::never()).unwrap()[0].id, image.id);

    images.remove(&image.id).unwrap();
    images.remove(&docker.id).unwrap();
    assert!(images.list().is_empty());
    // The files go behind our back.
    let end = Instant::now() + Duration::from_secs(60);
    while std::fs::read_dir(root.join("layers")).unwrap().count() > 0 {
        assert!(Instant::now() < end, "unused layers are not deleted");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(crisp::sys::mount::below(dir.path()).unwrap().is_empty());
}

/// A layer that hides all that is below: the kernel merges the roots of layers, marked or not.
#[test]
fn an_opaque_root_equals_umoci() {
    let dir = tempfile::tempdir().unwrap();
    let layout = build(dir.path());
    let image = format!("{}:box", layout.display());
    let fresh = dir.path().join("fresh");
    std::fs::create_dir_all(fresh.join("etc")).unwrap();
    std::fs::write(fresh.join("etc/new"), "new").unwrap();
    run("umoci", &["insert", "--image", &image, "--opaque", &fresh.display().to_string(), "/"]);
    let theirs = dir.path().join("theirs");
    run("umoci", &["unpack", "--image", &image, &theirs.display().to_string()]);
    assert!(theirs.join("rootfs/etc/new").exists() && !theirs.join("rootfs/bin").exists(), "all else is hidden");
    let root = dir.path().join("root");
    let images = Images::open(Settings::new(&root)).unwrap();
    let id = images.import(&layout, Some("opaque"), &Cancel::never()).unwrap()[0].id.clone();
    check_tree(&images, &root, &id, &theirs.join("rootfs"));
    verify(&images);
    images.remove(&id).unwrap();
}

/// Files of this Debian, in layers by another tool: programs with setuid bits, links, alternatives, documentation.
#[test]
fn debian_in_layers_by_buildah_equals_umoci() {
    let dir = tempfile::tempdir().unwrap();
    let program = crate::daemon::find("buildah").expect("buildah is not there: run scripts/install-deps");
    let place = |name: &str| dir.path().join(name).display().to_string();
    let buildah = |words: &[&str]| {
        let (storage, run_root) = (place("storage"), place("run"));
        let all = [&["--root", &storage, "--runroot", &run_root, "--storage-driver", "vfs"], words].concat();
        run(program.to_str().unwrap(), &all).trim().to_owned()
    };
    let container = buildah(&["from", "scratch"]);
    let root = PathBuf::from(buildah(&["mount", &container]));
    let copy = |from: &str| {
        let to = root.join(&from[1..]);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        run("cp", &["-a", from, to.to_str().unwrap()]);
    };
    for from in
        ["/etc/alternatives", "/etc/pam.d", "/etc/skel", "/usr/bin/passwd", "/usr/bin/su", "/usr/bin/wall", "/usr/share/doc/base-files"]
    {
        copy(from);
    }
    copy("/usr/share/perl5");
    copy("/usr/share/zoneinfo/Europe");
    std::fs::hard_link(root.join("usr/bin/su"), root.join("usr/bin/su.link")).unwrap();
    run("mknod", &[root.join("zero").to_str().unwrap(), "c", "1", "5"]);
    let commit = |name: &str| buildah(&["commit", "--quiet", "--format", "oci", &container, name]);
    commit("localhost/one:1");
    // The next layer upon it: what is gone, replaced, or only looks different.
    buildah(&["rm", &container]);
    let container = buildah(&["from", "localhost/one:1"]);
    let root = PathBuf::from(buildah(&["mount", &container]));
    std::fs::remove_dir_all(root.join("usr/share/perl5")).unwrap();
    std::fs::create_dir(root.join("usr/share/perl5")).unwrap();
    std::fs::write(root.join("usr/share/perl5/new"), "new").unwrap();
    std::fs::remove_file(root.join("usr/share/zoneinfo/Europe/Berlin")).unwrap();
    std::fs::set_permissions(root.join("usr/bin/wall"), std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::remove_file(root.join("zero")).unwrap();
    std::fs::create_dir(root.join("zero")).unwrap();
    std::fs::rename(root.join("etc/skel"), root.join("etc/bones")).unwrap();
    let (oci, archive) = (format!("oci:{}:two", place("layout")), format!("docker-archive:{}:q.io/two:2", place("two.tar")));
    buildah(&["commit", "--quiet", "--format", "oci", &container, "localhost/two:2"]);
    buildah(&["push", "--quiet", "localhost/two:2", &oci]);
    buildah(&["push", "--quiet", "--format", "v2s2", "localhost/two:2", &archive]);
    run("umoci", &["unpack", "--image", &format!("{}:two", place("layout")), &place("theirs")]);
    let theirs = dir.path().join("theirs/rootfs");
    assert!(theirs.join("usr/share/perl5/new").exists() && !theirs.join("etc/skel").exists());
    for (file, name) in [("layout", Some("q.io/two:2")), ("two.tar", None)] {
        let root = dir.path().join(format!("root-{file}"));
        let images = Images::open(Settings::new(&root)).unwrap();
        let made = images.import(&dir.path().join(file), name, &Cancel::never()).unwrap();
        assert_eq!(made[0].chain.len(), 2);
        check_tree(&images, &root, "q.io/two:2", &theirs);
        verify(&images);
    }
}

#[test]
fn an_image_of_130_layers_mounts() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let blob = |data: &[u8], media_type: &str| {
        let digest = Digest::of(data);
        std::fs::write(layout.join("blobs/sha256").join(digest.hex()), data).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": digest.as_str(), "size": data.len()})
    };
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for i in 0..130 {
        let mut builder = tar::Builder::new(Vec::new());
        let text = i.to_string();
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("dir/{i}"), text.as_bytes()).unwrap();
        let data = builder.into_inner().unwrap();
        diff_ids.push(Digest::of(&data).as_str().to_owned());
        layers.push(blob(&data, "application/vnd.oci.image.layer.v1.tar"));
    }
    let architecture = crisp::image::Platform::host().architecture;
    let config = serde_json::json!({"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config = blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
    let manifest = blob(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
    std::fs::write(layout.join("index.json"), serde_json::json!({"schemaVersion": 2, "manifests": [manifest]}).to_string()).unwrap();

    let root = dir.path().join("root");
    let images = Images::open(Settings::new(&root)).unwrap();
    images.import(&layout, Some("deep:1"), &Cancel::never()).unwrap();
    let snapshotter = Snapshotter::detect(&root).unwrap();
    assert_eq!(snapshotter.kind(), Kind::Overlay);
    let target = root.join("rootfs");
    snapshotter.prepare("c1", &images.hold("deep:1", "c1").unwrap().layers, &target, Attributes::default()).unwrap();
    assert_eq!(std::fs::read_dir(target.join("dir")).unwrap().count(), 130);
    snapshotter.remove("c1", &target).unwrap();
}

#[test]
fn a_registry_with_its_own_ca() {
    let dir = tempfile::tempdir().unwrap();
    let (key, certificate) = (dir.path().join("key.pem"), dir.path().join("ca.crt"));
    let (key, certificate) = (key.to_str().unwrap(), certificate.to_str().unwrap());
    // One certificate as authority and one for the server: a server certificate must not be an authority.
    let (server_key, request, server) = (dir.path().join("s.key"), dir.path().join("s.csr"), dir.path().join("s.crt"));
    let names = dir.path().join("names");
    std::fs::write(&names, "subjectAltName=IP:127.0.0.1\n").unwrap();
    let (server_key, request, server) = (server_key.to_str().unwrap(), request.to_str().unwrap(), server.to_str().unwrap());
    let new = ["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"];
    run("openssl", &[&["req", "-x509", "-days", "2", "-keyout", key, "-out", certificate][..], &new].concat());
    run("openssl", &[&["req", "-keyout", server_key, "-out", request][..], &new].concat());
    let sign =
        ["x509", "-req", "-days", "2", "-in", request, "-CA", certificate, "-CAkey", key, "-CAcreateserial", "-out", server, "-extfile"];
    run("openssl", &[&sign[..], &[names.to_str().unwrap()]].concat());
    let registry = Registry::start_with(dir.path(), &format!(", tls: {{certificate: {server}, key: {server_key}}}"));
    let reference = format!("{}/test/box:v1", registry.address);
    let mut settings = Settings::new(&dir.path().join("root"));
    let strangers = Images::open(settings.clone()).unwrap();
    let e = strangers.pull(&reference, None, &Cancel::never(), None).unwrap_err();
    assert!(e.message().starts_with("RegistryUnavailable") && e.message().contains("certificate"), "{e}");
    let certs = dir.path().join("certs").join(&registry.address);
    std::fs::create_dir_all(&certs).unwrap();
    std::fs::copy(certificate, certs.join("ca.crt")).unwrap();
    settings.registry.certs_dir = Some(dir.path().join("certs"));
    let images = Images::open(settings).unwrap();
    // Trusted now: the registry itself answers, that it has no such image.
    let e = images.pull(&reference, None, &Cancel::never(), None).unwrap_err();
    assert_eq!(e.code(), crisp::error::Code::NotFound, "{e}");
}

#[test]
fn layers_as_gnu_tar_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let holes = std::fs::File::create(tree.join("holes")).unwrap();
    for i in 0..30u64 {
        std::os::unix::fs::FileExt::write_at(&holes, &[i as u8 + 1; 4096], i * 65536).unwrap();
    }
    holes.set_len(8 << 20).unwrap();
    std::fs::write(tree.join("f".repeat(150)), "long").unwrap();
    let architecture = crisp::image::Platform::host().architecture;
    for format in ["gnu", "pax"] {
        let work = dir.path().join(format);
        std::fs::create_dir(&work).unwrap();
        let layer = work.join("layer.tar");
        let (layer_path, tree_path) = (layer.display().to_string(), tree.display().to_string());
        run("tar", &[&format!("--format={format}"), "-S", "-cf", &layer_path, "-C", &tree_path, "."]);
        let diff_id = Digest::of(&std::fs::read(&layer).unwrap());
        let config =
            serde_json::json!({"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": [diff_id.as_str()]}});
        std::fs::write(work.join("c.json"), config.to_string()).unwrap();
        std::fs::write(work.join("manifest.json"), r#"[{"Config":"c.json","RepoTags":["sparse:1"],"Layers":["layer.tar"]}]"#).unwrap();
        let root = work.join("root");
        let images = Images::open(Settings::new(&root)).unwrap();
        images.import(&work, None, &Cancel::never()).unwrap();
        let held = images.hold("sparse:1", "c").unwrap();
        compare(&held.layers[0], &tree);
        verify(&images);
        assert!(held.layers[0].join("holes").metadata().unwrap().blocks() < 4096, "holes were filled");
    }
}
