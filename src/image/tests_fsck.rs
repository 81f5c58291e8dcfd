//! Tests of checks and repairs: what is damaged is found, named and mended, and nothing else is touched.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::fsck::Part;
use super::tests::{import, layer_tar, oci_archive, store, tar};
use super::*;
use crate::error::Code;

/// Everything a layer may hold.
fn rich_layer() -> Vec<u8> {
    use ::tar::{Builder, EntryType, Header};
    let mut builder = Builder::new(Vec::new());
    let mut add = |name: &str, kind: EntryType, data: &[u8], link: &str, xattr: Option<(&str, &[u8])>| {
        if let Some((key, value)) = xattr {
            builder.append_pax_extensions([(format!("SCHILY.xattr.{key}").as_str(), value), ("mtime", b"1700000000.123456789")]).unwrap();
        }
        let mut h = Header::new_ustar();
        h.set_entry_type(kind);
        h.set_size(data.len() as u64);
        h.set_mode(if kind == EntryType::Directory { 0o750 } else { 0o640 });
        h.set_uid(7);
        h.set_gid(8);
        h.set_mtime(1_600_000_000);
        if kind == EntryType::Char {
            h.set_device_major(1).unwrap();
            h.set_device_minor(3).unwrap();
        }
        // As it is: the builder would clean the names.
        h.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        h.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        h.set_cksum();
        builder.append(&h, data).unwrap();
    };
    add("./", EntryType::Directory, b"", "", None);
    add("d/", EntryType::Directory, b"", "", None);
    add("d/a", EntryType::Regular, &[b'a'; 3000], "", Some(("user.note", b"two\nlines")));
    add("d/b", EntryType::Regular, b"", "", None);
    add("d/hard", EntryType::Link, b"", "d/a", None);
    add("d/soft", EntryType::Symlink, b"", "../elsewhere", None);
    add("d/", EntryType::Directory, b"", "", None);
    add("null", EntryType::Char, b"", "", None);
    add("pipe", EntryType::Fifo, b"", "", None);
    add("implicit/deep/file", EntryType::Regular, &[b'x'; 700], "", None);
    add(".wh.gone", EntryType::Regular, b"", "", None);
    add("o/", EntryType::Directory, b"", "", None);
    add("o/.wh..wh..opq", EntryType::Regular, b"", "", None);
    add(".wh.swap", EntryType::Regular, b"", "", None);
    add("swap/inside", EntryType::Regular, b"s", "", None);
    builder.into_inner().unwrap()
}

fn run(images: &Images, repair: bool) -> Vec<Problem> {
    let mut problems = Vec::new();
    let checked = images
        .check(repair, &Cancel::never(), &mut |step| {
            assert!(step.total > 0 || step.problems.is_empty() || step.bytes == 0);
            problems.extend(step.problems);
            Ok(())
        })
        .unwrap();
    assert_eq!(checked.blobs, 2 * checked.images);
    problems
}

/// Two images over one base: `rich:1` has the rich layer on it, `plain:1` another.
struct Site {
    dir: tempfile::TempDir,
    images: Images,
    archives: [Vec<u8>; 2],
    ids: [String; 2],
    base: Digest,
    rich: Digest,
}

impl Site {
    fn new() -> Site {
        let (dir, images) = store();
        let (base, rich, plain) = (layer_tar("base"), rich_layer(), layer_tar("plain"));
        let (one, one_id, _) = oci_archive(Some("q.io/rich:1"), "", &[&base, &rich]);
        let (two, two_id, _) = oci_archive(Some("q.io/plain:1"), "", &[&base, &plain]);
        let archives = [one, two];
        for archive in &archives {
            import(&images, dir.path(), archive).unwrap();
        }
        let chain = digest::chain_ids(&[Digest::of(&base), Digest::of(&rich)]);
        Site { dir, images, archives, ids: [one_id, two_id], base: chain[0].clone(), rich: chain[1].clone() }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn place(&self, layer: &Digest) -> PathBuf {
        self.root().join("layers").join(layer.hex())
    }

    fn import_again(&self, i: usize) {
        import(&self.images, self.dir.path(), &self.archives[i]).unwrap();
    }

    fn listed(&self) -> Vec<String> {
        self.images.list().iter().flat_map(|i| i.repo_tags.clone()).collect()
    }

    fn reopen(&mut self) {
        self.images = Images::open(Settings::new(&self.root())).unwrap();
    }

    /// Inode of a layer's directory: it is the same for as long as nobody makes the layer again.
    fn inode(&self, layer: &Digest) -> u64 {
        self.place(layer).join("diff").metadata().unwrap().ino()
    }
}

/// Changes a file and gives it its time back, as a bad disk would.
fn behind_the_back(path: &Path, change: impl FnOnce(&Path)) {
    let before = path.symlink_metadata().unwrap();
    let above = path.parent().unwrap().metadata().unwrap();
    change(path);
    let back = |path: &Path, meta: &std::fs::Metadata| {
        let parent = rustix::fs::open(path.parent().unwrap(), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let name = Path::new(path.file_name().unwrap());
        crate::sys::rooted::set_times(&parent, name, (meta.mtime(), meta.mtime_nsec() as u32)).unwrap();
    };
    if path.symlink_metadata().is_ok() {
        back(path, &before);
    }
    back(path.parent().unwrap(), &above);
}

#[test]
fn a_whole_store_has_no_problems() {
    let mut site = Site::new();
    assert_eq!(run(&site.images, false), []);
    assert_eq!(run(&site.images, true), []);
    site.reopen();
    assert_eq!(run(&site.images, false), []);
    let checked = site.images.check(false, &Cancel::never(), &mut |_| Ok(())).unwrap();
    assert_eq!(checked, Checked { images: 2, layers: 3, blobs: 4 });
    assert!(site.place(&site.rich).join("tape").metadata().unwrap().len() < 2000);
}

#[test]
fn any_change_of_a_layer_is_found_and_named() {
    type Change = fn(&Path);
    let changes: [(&str, &str, Change); 15] = [
        ("d/a", "content has changed", |p| {
            let mut data = std::fs::read(p).unwrap();
            data[1500] ^= 1;
            std::fs::write(p, data).unwrap();
        }),
        ("d/a", "2999 bytes, not 3000", |p| std::fs::File::options().write(true).open(p).unwrap().set_len(2999).unwrap()),
        ("d/a", "attribute user.note", |p| {
            rustix::fs::lsetxattr(p, "user.note", b"other", rustix::fs::XattrFlags::empty()).unwrap();
        }),
        ("d/b", "missing", |p| std::fs::remove_file(p).unwrap()),
        ("d/b", "mode 4755, not 640", |p| std::fs::set_permissions(p, std::fs::Permissions::from_mode(0o4755)).unwrap()),
        ("d/b", "kind", |p| {
            std::fs::remove_file(p).unwrap();
            std::fs::create_dir(p).unwrap();
        }),
        ("d/hard", "no longer a link", |p| {
            let data = std::fs::read(p).unwrap();
            std::fs::remove_file(p).unwrap();
            std::fs::write(p, data).unwrap();
        }),
        ("d/soft", "points elsewhere", |p| {
            std::fs::remove_file(p).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", p).unwrap();
        }),
        ("implicit/deep/file", "missing", |p| std::fs::remove_dir_all(p.parent().unwrap().parent().unwrap()).unwrap()),
        ("gone", "missing", |p| std::fs::remove_file(p).unwrap()),
        ("o", "opaque", |p| rustix::fs::lremovexattr(p, crate::sys::rooted::OPAQUE).unwrap()),
        ("swap", "opaque", |p| rustix::fs::lremovexattr(p, crate::sys::rooted::OPAQUE).unwrap()),
        ("null", "owner", |p| std::os::unix::fs::lchown(p, Some(0), Some(0)).unwrap()),
        ("d", "mode 700, not 750", |p| std::fs::set_permissions(p, std::fs::Permissions::from_mode(0o700)).unwrap()),
        ("d", "d/new: not of this layer", |p| std::fs::write(p.join("new"), "x").unwrap()),
    ];
    let site = Site::new();
    for (name, words, change) in changes {
        let path = site.place(&site.rich).join("diff").join(name);
        let whole = name == "implicit/deep/file";
        if whole {
            change(&path);
        } else {
            behind_the_back(&path, change);
        }
        let problems = run(&site.images, false);
        assert_eq!(problems.len(), 1, "{name}: {problems:?}");
        let p = &problems[0];
        assert_eq!((p.part, p.subject.as_str(), p.action.as_str()), (Part::Layer, site.rich.as_str(), ""), "{name}");
        assert!(p.message.contains(words) && p.message.contains(name.split('/').next().unwrap()), "{name}: {}", p.message);
        assert_eq!(p.images, ["q.io/rich:1"]);
        assert_eq!(site.listed().len(), 2, "a check alone changes nothing");
        let untouched = site.inode(&site.base);
        // Repaired: this layer alone is made again.
        let problems = run(&site.images, true);
        assert_eq!(problems[0].action, "marked for the next pull", "{problems:?}");
        assert_eq!(site.listed(), ["q.io/plain:1"]);
        site.import_again(0);
        assert_eq!(run(&site.images, false), [], "{name}");
        assert_eq!(site.listed().len(), 2);
        assert_eq!(site.inode(&site.base), untouched);
    }
}

#[test]
fn an_incomplete_image_says_so_until_it_is_pulled() {
    let mut site = Site::new();
    std::fs::write(site.place(&site.base).join("diff/base"), "evil").unwrap();
    let problems = run(&site.images, true);
    assert_eq!(problems[0].images, ["q.io/plain:1", "q.io/rich:1"]);
    for again in [false, true] {
        if again {
            site.reopen();
            site.images.collect().unwrap();
        }
        assert!(site.listed().is_empty() && site.images.status("q.io/rich:1").unwrap().is_none());
        let incomplete = site.images.incomplete();
        assert_eq!(incomplete.len(), 2);
        // With the files, which nobody has mounted, the reason may have gone by the restart.
        assert!(incomplete[0].reason.starts_with(&format!("layer {} is ", site.base)), "{incomplete:?}");
        assert!(again || incomplete[0].reason.contains("is damaged: base: its time"), "{incomplete:?}");
        let e = site.images.hold("q.io/rich:1", "c1").unwrap_err();
        assert!(e.code() == Code::FailedPrecondition && e.message().contains("incomplete") && e.message().contains("pull it again"), "{e}");
        assert_eq!(site.images.require("q.io/none").unwrap_err().code(), Code::NotFound);
        assert!(site.images.inner.layers.is_ready(&site.rich), "what is above stays");
    }
    // The layer was all that both lacked.
    site.import_again(1);
    assert_eq!(site.listed().len(), 2);
    assert!(site.images.incomplete().is_empty());
}

#[test]
fn files_of_a_damaged_layer_stay_while_a_container_has_them() {
    let mut site = Site::new();
    let held = site.images.hold("q.io/rich:1", "c1").unwrap();
    std::fs::write(site.place(&site.base).join("diff/base"), "evil").unwrap();
    run(&site.images, true);
    assert!(held.layers[1].join("base").exists());
    site.reopen();
    site.images.hold_restored("c1", &held.chain).unwrap();
    site.images.collect().unwrap();
    assert_eq!(std::fs::read(held.layers[1].join("base")).unwrap(), b"evil");
    let before = site.inode(&site.base);
    site.import_again(0);
    assert_eq!(std::fs::read(held.layers[1].join("base")).unwrap(), b"base");
    let aside = || -> Vec<PathBuf> {
        let all = std::fs::read_dir(site.root().join("layers")).unwrap().map(|e| e.unwrap().path());
        all.filter(|p| p.to_string_lossy().contains(".damaged-") && !p.to_string_lossy().contains(".gone-")).collect()
    };
    assert_eq!(aside()[0].join("diff").metadata().unwrap().ino(), before);
    site.images.collect().unwrap();
    assert_eq!(aside().len(), 1);
    site.images.release("c1").unwrap();
    assert!(aside().is_empty());
    assert_eq!(run(&site.images, false), []);
}

#[test]
fn tapes_and_markers() {
    let mut site = Site::new();
    let tape = site.place(&site.rich).join("tape");
    let data = std::fs::read(&tape).unwrap();
    for (cut, words) in [(data[..data.len() / 2].to_vec(), "tape"), ([&data[..20], &[0xff; 9], &data[29..]].concat(), "")] {
        std::fs::write(&tape, cut).unwrap();
        let problems = run(&site.images, false);
        assert!(problems.len() == 1 && problems[0].part == Part::Layer && problems[0].message.contains(words), "{problems:?}");
    }
    std::fs::remove_file(&tape).unwrap();
    assert!(run(&site.images, false)[0].message.contains("tape cannot be read"));
    std::fs::write(&tape, data).unwrap();
    assert_eq!(run(&site.images, false), []);

    let marker = site.place(&site.rich).join("layer.json");
    std::fs::remove_file(&marker).unwrap();
    let problems = run(&site.images, false);
    assert_eq!((problems.len(), problems[0].part), (1, Part::Marker));
    assert_eq!(run(&site.images, true)[0].action, "written anew");
    assert_eq!(run(&site.images, false), []);
    site.reopen();
    assert_eq!(site.listed().len(), 2);
}

#[test]
fn damaged_documents() {
    for which in ["config", "manifest"] {
        let mut site = Site::new();
        let manifest =
            site.images.list().iter().find(|i| i.id == site.ids[0]).unwrap().repo_digests[0].split_once('@').unwrap().1.to_owned();
        let digest = if which == "config" { site.ids[0].clone() } else { manifest };
        let blob = site.root().join("images/blobs/sha256").join(&digest[7..]);
        std::fs::write(&blob, "{").unwrap();
        let problems = run(&site.images, false);
        assert_eq!((problems.len(), problems[0].part, problems[0].subject.as_str()), (1, Part::Blob, digest.as_str()), "{problems:?}");
        assert_eq!(problems[0].images, ["q.io/rich:1"]);
        assert_eq!(site.listed().len(), 2);
        run(&site.images, true);
        assert_eq!((site.listed(), blob.exists()), (vec!["q.io/plain:1".to_owned()], false));
        assert!(site.images.incomplete()[0].reason.contains(&digest));
        assert_eq!(std::fs::read_dir(site.root().join("quarantine")).unwrap().count(), 1);
        // Layers wait for the pull, also over a restart, where the record is lost.
        let rich = site.inode(&site.rich);
        for restart in [false, true] {
            if restart {
                std::fs::remove_file(&blob).unwrap();
                site.reopen();
            }
            site.images.collect().unwrap();
            assert_eq!(site.inode(&site.rich), rich);
            site.import_again(0);
            assert_eq!(site.listed().len(), 2);
            assert_eq!(site.inode(&site.rich), rich);
            assert_eq!(run(&site.images, false), []);
        }
    }
}

#[test]
fn an_index_is_written_anew() {
    let mut site = Site::new();
    let index = site.root().join("images/index.json");
    let whole = std::fs::read(&index).unwrap();
    std::fs::write(&index, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(run(&site.images, false)[0].part, Part::Index);
    assert_eq!(run(&site.images, true).len(), 1);
    assert_eq!(std::fs::read(&index).unwrap(), whole);
    assert_eq!(run(&site.images, false), []);

    // Lost while no daemon ran: the names are gone, the images are not.
    std::fs::write(&index, "torn").unwrap();
    site.reopen();
    site.images.collect().unwrap();
    assert!(site.images.list().is_empty());
    let (third, ..) = oci_archive(Some("q.io/third:1"), "t", &[&layer_tar("third")]);
    import(&site.images, site.dir.path(), &third).unwrap();
    site.images.remove("q.io/third:1").unwrap();
    let problems = run(&site.images, false);
    assert!(problems.iter().any(|p| p.part == Part::Index && p.message.contains("has lost")), "{problems:?}");
    run(&site.images, true);
    let mut ids: Vec<String> = site.images.list().iter().map(|i| i.id.clone()).collect();
    let mut expected = site.ids.to_vec();
    ids.sort();
    expected.sort();
    assert_eq!(ids, expected);
    assert!(site.listed().is_empty());
    assert_eq!(run(&site.images, false), []);
    site.reopen();
    assert_eq!(site.images.list().len(), 2);
    site.import_again(0);
    assert_eq!(site.listed(), ["q.io/rich:1"]);
    assert_eq!(site.images.list().len(), 2, "the name went to the image that was there");
}

#[test]
fn orphans_go_and_strangers_stay() {
    let site = Site::new();
    let layers = site.root().join("layers");
    let blobs = site.root().join("images/blobs/sha256");
    std::fs::write(blobs.join("0".repeat(64)), "orphan").unwrap();
    let half = layers.join(format!("{}.tmp-99", "1".repeat(64)));
    std::fs::create_dir_all(half.join("diff")).unwrap();
    std::fs::create_dir(layers.join("mine")).unwrap();
    let found = |problems: Vec<Problem>| problems.into_iter().map(|p| (p.part, p.action)).collect::<Vec<_>>();
    let kind = |action: &str| (Part::Orphan, action.to_owned());
    assert_eq!(found(run(&site.images, false)).len(), 3);
    assert!(half.exists());
    let mut mended = found(run(&site.images, true));
    mended.sort_by(|a, b| a.1.cmp(&b.1));
    assert_eq!(mended, [kind(""), kind("removed"), kind("removed")]);
    layers::settle(&layers);
    assert!(!half.exists() && layers.join("mine").exists() && site.listed().len() == 2);
}

#[test]
fn a_layer_that_names_a_file_twice_cannot_be_verified() {
    let (dir, images) = store();
    let twice = tar(&[("a", b"first"), ("a", b"second")]);
    let (archive, ..) = oci_archive(Some("x:1"), "", &[&twice]);
    import(&images, dir.path(), &archive).unwrap();
    let problems = run(&images, true);
    assert_eq!((problems.len(), problems[0].part), (1, Part::Unverifiable));
    assert_eq!(images.list().len(), 1);
}

#[test]
fn a_check_ends_when_its_client_goes() {
    let site = Site::new();
    let cancel = Cancel::never();
    cancel.set();
    assert_eq!(site.images.check(true, &cancel, &mut |_| Ok(())).unwrap_err().code(), Code::Cancelled);
    let e = site.images.check(true, &Cancel::never(), &mut |_| Err(Error::cancelled("gone"))).unwrap_err();
    assert_eq!(e.code(), Code::Cancelled);
    assert!(site.images.inner.layers.state.lock().holds.is_empty());
}
