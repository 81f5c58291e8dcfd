//! Tests on real mounts: root only, like the daemon.

use super::*;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn layer(dir: &Path, name: &str, files: &[&str]) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(&path).unwrap();
    for file in files {
        match file.strip_prefix('-') {
            Some(gone) => {
                rustix::fs::mknodat(rustix::fs::CWD, path.join(gone), rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty(), 0)
                    .unwrap()
            }
            None => {
                std::fs::create_dir_all(path.join(file).parent().unwrap()).unwrap();
                std::fs::write(path.join(file), name).unwrap();
            }
        }
    }
    path
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn life(kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    let low = layer(dir.path(), "low", &["a", "b", "d/x", "o/old"]);
    std::fs::hard_link(low.join("a"), low.join("a2")).unwrap();
    std::os::unix::fs::symlink("/nowhere", low.join("l")).unwrap();
    let high = layer(dir.path(), "high", &["-b", "d/y", "o/new"]);
    crate::sys::rooted::set_opaque(&high.join("o")).unwrap();
    std::fs::set_permissions(&high, std::fs::Permissions::from_mode(0o1770)).unwrap();
    let snapshotter = Snapshotter::new(dir.path(), kind).unwrap();
    let target = dir.path().join("rootfs");
    snapshotter.prepare("c1", &[high.clone(), low.clone()], &target, Attributes::default()).unwrap();
    assert_eq!(names(&target), ["a", "a2", "d", "l", "o"]);
    assert_eq!((names(&target.join("d")), names(&target.join("o"))), (vec!["x".to_owned(), "y".to_owned()], vec!["new".to_owned()]));
    assert_eq!(target.metadata().unwrap().mode() & 0o7777, 0o1770);
    if kind == Kind::Copy {
        assert_eq!(target.join("a").metadata().unwrap().nlink(), 2);
    }
    std::fs::write(target.join("a"), "changed").unwrap();
    assert_eq!(std::fs::read(low.join("a")).unwrap(), b"low");
    assert!(snapshotter.prepare("c1", std::slice::from_ref(&low), &target, Attributes::default()).is_err());
    assert_eq!(snapshotter.list().unwrap(), ["c1"]);
    snapshotter.remove("c1", &target).unwrap();
    snapshotter.remove("c1", &target).unwrap();
    assert!(snapshotter.list().unwrap().is_empty() && names(&target).is_empty() && low.join("a").exists());
    for (id, layers) in [("none", vec![]), ("one", vec![low.clone()])] {
        snapshotter.prepare(id, &layers, &target, Attributes::default()).unwrap();
        std::fs::write(target.join("new"), "").unwrap();
        snapshotter.remove(id, &target).unwrap();
    }
    assert!(snapshotter.prepare("bad", &[dir.path().join("absent")], &target, Attributes::default()).is_err());
    assert!(snapshotter.prepare("../up", &[], &target, Attributes::default()).is_err());
    assert!(snapshotter.list().unwrap().is_empty());
    assert!(mount::below(dir.path()).unwrap().is_empty());
}

#[test]
fn overlay_life() {
    if rustix::process::geteuid().is_root() {
        life(Kind::Overlay);
    }
}

#[test]
fn copy_life() {
    if rustix::process::geteuid().is_root() {
        life(Kind::Copy);
    }
}

#[test]
fn label_of_all_that_is_in_it() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (low, target) = (layer(dir.path(), "low", &["d/x"]), dir.path().join("rootfs"));
    let label = "system_u:object_r:container_file_t:s0:c1,c2";
    let labelled = Attributes { label: Some(label), ..Default::default() };
    let copies = Snapshotter::new(dir.path(), Kind::Copy).unwrap();
    copies.prepare("c", std::slice::from_ref(&low), &target, labelled).unwrap();
    let mut value = [0; 64];
    let n = rustix::fs::lgetxattr(target.join("d/x"), "security.selinux", &mut value).unwrap();
    assert_eq!(&value[..n], format!("{label}\0").as_bytes());
    // So have the container's volumes: of an image, and of its own.
    let view = dir.path().join("view");
    copies.view("c", 0, std::slice::from_ref(&low), &view, labelled).unwrap();
    let from = std::fs::File::open(target.join("d")).unwrap();
    let volume = copies.volume("c", 0, from.as_fd(), labelled).unwrap();
    for path in [view.join("d/x"), volume.clone(), volume.join("x")] {
        let n = rustix::fs::lgetxattr(&path, "security.selinux", &mut value).unwrap();
        assert_eq!(&value[..n], format!("{label}\0").as_bytes(), "{}", path.display());
    }
    mount::unmount(&view).unwrap();
    copies.remove("c", &target).unwrap();
    if !Path::new("/sys/fs/selinux/enforce").exists() {
        // A kernel that cannot label a mount refuses it: no container without what it was to have.
        let overlays = Snapshotter::new(dir.path(), Kind::Overlay).unwrap();
        overlays.prepare("c", &[low], &target, labelled).unwrap_err();
        assert!(overlays.list().unwrap().is_empty() && mount::below(dir.path()).unwrap().is_empty());
    }
}

#[test]
fn many_layers_mount() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layers: Vec<PathBuf> = (0..200).map(|i| layer(&dir.path().join("layers"), &format!("{i:064}"), &[&format!("f{i}")])).collect();
    let snapshotter = Snapshotter::detect(dir.path()).unwrap();
    assert_eq!(snapshotter.kind(), Kind::Overlay);
    let target = dir.path().join("rootfs");
    snapshotter.prepare("c", &layers, &target, Attributes::default()).unwrap();
    assert_eq!(names(&target).len(), 200);
    snapshotter.remove("c", &target).unwrap();
    assert!(snapshotter.list().unwrap().is_empty());
}
