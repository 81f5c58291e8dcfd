//! Layers of strangers: one test per trick. Each unpacks beside a secret that nothing may reach.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::room::Room;
use super::unpack::{unpack, Limits, Unpacked};
use crate::error::{Code, Result};
use crate::sys::cancel::Cancel;
use crate::sys::rooted;

/// An entry as hostile as wanted: names are written as they are.
#[derive(Clone)]
pub struct Item<'a> {
    pub name: &'a str,
    pub kind: u8,
    pub link: &'a str,
    pub data: &'a [u8],
    /// The size in the header; the data's own without it.
    pub size: Option<u64>,
    pub pax: &'a [(&'a str, &'a [u8])],
    pub device: (u32, u32),
    pub mode: u32,
    pub owner: (u32, u32),
}

pub fn item(name: &str, kind: u8) -> Item<'_> {
    Item { name, kind, link: "", data: b"", size: None, pax: &[], device: (0, 0), mode: 0o755, owner: (0, 0) }
}

pub fn file<'a>(name: &'a str, data: &'a [u8]) -> Item<'a> {
    Item { data, ..item(name, b'0') }
}

fn dir(name: &str) -> Item<'_> {
    item(name, b'5')
}

fn link<'a>(name: &'a str, kind: u8, link: &'a str) -> Item<'a> {
    Item { link, ..item(name, kind) }
}

fn symlink<'a>(name: &'a str, target: &'a str) -> Item<'a> {
    link(name, b'2', target)
}

fn hardlink<'a>(name: &'a str, target: &'a str) -> Item<'a> {
    link(name, b'1', target)
}

/// A ustar header; the caller may still damage it before `seal`.
pub fn header(item: &Item) -> [u8; 512] {
    let mut h = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| h[at..at + text.len()].copy_from_slice(text);
    put(0, item.name.as_bytes());
    put(100, format!("{:07o}", item.mode).as_bytes());
    put(108, format!("{:07o}", item.owner.0).as_bytes());
    put(116, format!("{:07o}", item.owner.1).as_bytes());
    put(124, format!("{:011o}", item.size.unwrap_or(item.data.len() as u64)).as_bytes());
    put(136, format!("{:011o}", 1000).as_bytes());
    put(156, &[item.kind]);
    put(157, item.link.as_bytes());
    put(257, b"ustar\x0000");
    put(329, format!("{:07o}", item.device.0).as_bytes());
    put(337, format!("{:07o}", item.device.1).as_bytes());
    seal(&mut h);
    h
}

pub fn seal(h: &mut [u8; 512]) {
    h[148..156].copy_from_slice(b"        ");
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn padded(data: &[u8]) -> Vec<u8> {
    [data, &vec![0; data.len().wrapping_neg() % 512]].concat()
}

fn records(pax: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in pax {
        let rest = key.len() + value.len() + 3;
        let length = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
        out.extend([format!("{length} {key}=").as_bytes(), value, b"\n"].concat());
    }
    out
}

pub fn archive(items: &[Item]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        if !item.pax.is_empty() {
            let data = records(item.pax);
            out.extend(header(&file("pax", &data)).map(|b| b).iter().copied().enumerate().map(|(i, b)| if i == 156 { b'x' } else { b }));
            let at = out.len() - 512;
            let mut h: [u8; 512] = out[at..].try_into().unwrap();
            seal(&mut h);
            out[at..].copy_from_slice(&h);
            out.extend(padded(&data));
        }
        out.extend(header(item));
        out.extend(padded(item.data));
    }
    out.extend([0; 1024]);
    out
}

struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layer")).unwrap();
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        Site { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("layer").join(name)
    }

    fn raw(&self, mut archive: &[u8]) -> Result<Unpacked> {
        let limits = Limits { max_entries: 1000, max_bytes: 1 << 20 };
        let (room, tape) = (Room::new(self.dir.path(), 0), self.dir.path().join("tape"));
        let result = unpack(&mut archive, &self.path(""), &tape, &limits, &room, &Cancel::never());
        crate::sys::file::remove_file(&tape).unwrap();
        let secret = self.dir.path().join("secret");
        assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
        let meta = secret.metadata().unwrap();
        assert_eq!((meta.nlink(), meta.mode() & 0o7777), (1, 0o644), "the secret was touched");
        assert_eq!(std::fs::read_dir(self.dir.path()).unwrap().count(), 2, "something was made outside");
        result
    }

    fn unpack(&self, items: &[Item]) -> Result<Unpacked> {
        self.raw(&archive(items))
    }

    fn opaque(&self, name: &str) -> bool {
        rooted::is_opaque(&self.path(name))
    }

    fn whiteout(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
    }
}

fn unpacked(items: &[Item]) -> Site {
    let site = Site::new();
    site.unpack(items).unwrap_or_else(|e| panic!("{e}"));
    site
}

fn refused(items: &[Item], words: &str) {
    let e = Site::new().unpack(items).unwrap_err();
    assert!(e.message().contains(words), "{e}");
    assert!(matches!(e.code(), Code::FailedPrecondition | Code::ResourceExhausted), "{:?}: {e}", e.code());
}

#[test]
fn names_that_climb() {
    refused(&[file("../evil", b"x")], "outside");
    refused(&[file("a/../../evil", b"x")], "outside");
    refused(&[file("..", b"x")], "outside");
    let site = unpacked(&[file("/abs/x", b"1"), file("a/../b", b"2"), file("//c//d", b"3"), file("./e/.", b"4")]);
    assert!(["abs/x", "b", "c/d", "e"].iter().all(|name| site.path(name).is_file()));
}

#[test]
fn names_of_nothing() {
    for name in ["", ".", "./", "/", "a/.."] {
        refused(&[item(name, b'2')], "root of a layer");
    }
    let site = unpacked(&[Item { mode: 0o1711, ..dir("./") }, file("d/", b"")]);
    assert_eq!(site.path("").metadata().unwrap().mode() & 0o7777, 0o1711);
    assert!(site.path("d").is_dir(), "a file with a slash behind its name is an old tar's directory");
}

#[test]
fn long_names_and_deep_trees() {
    let deep = "d/".repeat(254);
    let long = |name: &str| unpacked(&[Item { pax: &[("path", name.as_bytes())], ..file("short", b"x") }]);
    assert!(long(&format!("{deep}f")).path(&format!("{deep}f")).is_file());
    let name = "n".repeat(255);
    assert!(long(&name).path(&name).is_file());
    let refuse = |name: &str, words: &str| refused(&[Item { pax: &[("path", name.as_bytes())], ..file("short", b"x") }], words);
    refuse(&"n".repeat(256), "longer than 255");
    refuse(&format!("{}f", "d/".repeat(300)), "directories deep");
    refuse(&"a/".repeat(2100), "longer than 4095");
    refuse("a\0b", "NUL");
    // Through links a tree could become deeper than any name; what removes it would run out of stack.
    let items = [
        Item { pax: &[("path", deep.as_bytes())], ..dir("short") },
        Item { pax: &[("linkpath", deep.as_bytes())], ..symlink("s", "short") },
        dir("s/e"),
        dir("s/e/f"),
        dir("s/e/f/g"),
    ];
    refused(&items, "directories deep");
}

#[test]
fn links_as_parents_stay_inside() {
    let site = unpacked(&[
        symlink("up", "../.."),
        file("up/secret", b"evil"),
        symlink("abs", "/"),
        file("abs/x", b"y"),
        symlink("dangling", "not/here"),
        file("dangling/z", b"z"),
        symlink("magic", "/proc/self/root"),
        file("magic/p", b"p"),
    ]);
    assert_eq!(std::fs::read(site.path("secret")).unwrap(), b"evil");
    assert!(site.path("x").exists() && site.path("not/here/z").exists() && site.path("proc/self/root/p").exists());
    refused(&[symlink("a", "b"), symlink("b", "a"), file("a/x", b"")], "too many links");
}

#[test]
fn what_is_made_through_links_is_known_by_its_true_name() {
    let site = Site::new();
    let done = site.unpack(&[symlink("lib", "usr/lib"), file("lib/sub/x", b""), dir("lib/sub/y")]).unwrap();
    let names = ["", "usr", "usr/lib", "usr/lib/sub"].map(PathBuf::from);
    assert_eq!(done.implicit, BTreeSet::from(names));
    assert_eq!(site.path("usr/lib/sub/y").metadata().unwrap().mtime(), 1000);
}

#[test]
fn a_link_that_replaces_a_parent_is_followed_inside() {
    let site = unpacked(&[file("d/a", b"1"), symlink("d", "../.."), file("d/secret", b"evil")]);
    assert_eq!(std::fs::read(site.path("secret")).unwrap(), b"evil");
    assert!(!site.path("d/a").exists());
    let site = unpacked(&[dir("d"), file("d/a", b"1"), symlink("d", "e"), dir("e"), file("d/b", b"2")]);
    assert!(site.path("e/b").exists() && !site.path("e/a").exists());
}

#[test]
fn files_are_never_written_through_links() {
    let site = unpacked(&[symlink("f", "../secret"), file("f", b"new"), dir("d"), symlink("d", "..")]);
    assert_eq!(std::fs::read(site.path("f")).unwrap(), b"new");
    assert!(site.path("d").symlink_metadata().unwrap().is_symlink());
    // Mode, owner and times of a link are its own, not its target's.
    unpacked(&[Item { mode: 0o4777, owner: (7, 7), ..symlink("s", "../secret") }]);
    // Nor through a second name of a file.
    let site = unpacked(&[file("a", b"1"), hardlink("b", "a"), file("b", b"22")]);
    assert_eq!(std::fs::read(site.path("a")).unwrap(), b"1");
}

#[test]
fn hard_links_stay_in_the_layer() {
    refused(&[hardlink("l", "../secret")], "outside");
    refused(&[hardlink("l", "/etc/passwd")], "no such file in this layer");
    refused(&[symlink("up", ".."), hardlink("l", "up/secret")], "no such file in this layer");
    refused(&[symlink("up", "/etc"), hardlink("l", "up/passwd")], "no such file in this layer");
    refused(&[symlink("self", "self"), hardlink("l", "self/f")], "no such file in this layer");
    refused(&[dir("d"), hardlink("l", "d")], "not a file");
    refused(&[hardlink("l", "")], "no such file in this layer");
    refused(&[file(".wh.w", b""), hardlink("l", "w")], "not a file");
    refused(&[file("f", b""), hardlink("l", "f/x")], "no such file in this layer");
    refused(&[file("d/f", b""), hardlink("d", "d/f")], "no such file in this layer");
    let site = Site::new();
    // A link to a link is a second name of the link, never of its target.
    let made = site.unpack(&[symlink("s", "../secret"), hardlink("l", "s"), file("a", b"1"), hardlink("b", "./a"), hardlink("b", "a")]);
    // The root, the link, the file, and the tape.
    assert_eq!(made.unwrap().inodes, 4);
    assert!(site.path("l").symlink_metadata().unwrap().is_symlink());
    assert_eq!(site.path("b").metadata().unwrap().nlink(), 2);
    // By a way that a link leads, as the entries of a merged /usr have it.
    let site = unpacked(&[dir("usr"), dir("usr/bin"), symlink("bin", "/usr/bin"), file("bin/a", b"1"), hardlink("bin/b", "bin/a")]);
    assert_eq!(site.path("usr/bin/b").metadata().unwrap().nlink(), 2);
    // Onto itself and onto what is there.
    let site = unpacked(&[file("a", b"1"), hardlink("a", "a"), file("b", b"2"), hardlink("b", "a")]);
    assert_eq!((std::fs::read(site.path("b")).unwrap(), site.path("a").metadata().unwrap().nlink()), (b"1".to_vec(), 2));
}

#[test]
fn whiteouts() {
    let site = unpacked(&[
        file(".wh.gone", b""),
        dir("o"),
        file("o/.wh..wh..opq", b""),
        file("implicit/.wh..wh..opq", b""),
        file(".wh.again/", b""),
        file("again/x", b"1"),
        dir("kept"),
        file(".wh.kept", b""),
        file("stays", b"1"),
        file(".wh.stays", b""),
        file(".wh.back", b""),
        file("back", b"2"),
        dir(".wh.dir"),
    ]);
    assert!(site.whiteout("gone") && site.whiteout("dir"));
    for opaque in ["o", "implicit", "again", "kept"] {
        assert!(site.opaque(opaque), "{opaque}");
    }
    // Whiteouts are for the layers below, in whatever order.
    assert_eq!((std::fs::read(site.path("stays")).unwrap(), std::fs::read(site.path("back")).unwrap()), (b"1".to_vec(), b"2".to_vec()));
    for bad in [".wh.", ".wh..", ".wh...", "d/.wh..."] {
        refused(&[file(bad, b"")], "whiteout of nothing");
    }
}

#[test]
fn opaque_directories_and_their_siblings() {
    // The mark first, last, or between: what this layer brings stays.
    let orders: [[&str; 4]; 3] =
        [["d/.wh..wh..opq", "d/", "d/a", "d/b"], ["d/", "d/a", "d/.wh..wh..opq", "d/b"], ["d/a", "d/b", "d/", "d/.wh..wh..opq"]];
    for order in orders {
        let items: Vec<Item> = order.iter().map(|name| if name.ends_with('/') { dir(name) } else { file(name, b"x") }).collect();
        let site = unpacked(&items);
        assert!(site.opaque("d") && site.path("d/a").exists() && site.path("d/b").exists(), "{order:?}");
        assert!(!site.path("d/.wh..wh..opq").exists());
    }
}

#[test]
fn directories_made_in_the_place_of_something_hide_what_is_below() {
    let site = Site::new();
    let done = site.unpack(&[file(".wh.w", b""), file("w/x", b"1"), file(".wh.v", b""), dir("v"), file("f", b""), dir("f")]).unwrap();
    assert!(site.opaque("w") && site.opaque("v") && site.opaque("f"));
    assert_eq!(done.implicit, BTreeSet::from([PathBuf::new()]), "a new directory has nothing from those below");
}

#[test]
fn names_of_aufs_are_left_out() {
    let site =
        unpacked(&[file(".wh..wh.plnk", b""), dir(".wh..wh.aufs/"), file(".wh..wh.plnk/12.34", b"x"), file("a/.wh..wh.orph/b", b"x")]);
    assert_eq!(std::fs::read_dir(site.path("")).unwrap().count(), 0);
}

#[test]
fn devices() {
    let null = Item { device: (1, 3), mode: 0o666, ..item("null", b'3') };
    let site = unpacked(&[null, Item { device: (7, 0), ..item("block", b'4') }, item("pipe", b'6')]);
    let meta = site.path("null").metadata().unwrap();
    assert_eq!((meta.rdev(), meta.mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o666));
    assert!(site.path("block").metadata().unwrap().file_type().is_block_device());
    assert!(site.path("pipe").metadata().unwrap().file_type().is_fifo());
    refused(&[item("w", b'3')], "0/0");
    // What the kernel would cut off to 0/0.
    for device in [(0, 1 << 20), (1 << 12, 0), (0o7777777, 1)] {
        refused(&[Item { device, ..item("w", b'3') }], "out of range");
    }
}

#[test]
fn attributes_and_capabilities() {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"1\n2"), ("SCHILY.xattr.security.capability", &capability), ("mtime", b"5.5")];
    let site = Site::new();
    let made = site.unpack(&[Item { pax, owner: (5, 6), mode: 0o6755, ..file("sub/f", b"x") }]).unwrap();
    assert_eq!(made.implicit, BTreeSet::from([PathBuf::new(), PathBuf::from("sub")]));
    let meta = site.path("sub/f").metadata().unwrap();
    // A change of the owner would have taken both away.
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (5, 6, 0o6755));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (5, 500_000_000));
    let mut found = rooted::xattrs(&site.path("sub/f")).unwrap();
    found.sort();
    assert_eq!(found, [("security.capability".into(), capability.to_vec()), ("user.a".into(), b"1\n2".to_vec())]);
    // On what cannot have them they are left out.
    let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.nonsense", b"1")];
    let site = unpacked(&[Item { pax, ..symlink("s", "x") }, Item { pax, ..item("pipe", b'6') }, Item { pax, ..file("f", b"") }]);
    assert_eq!(rooted::xattrs(&site.path("f")).unwrap().len(), 1);
}

#[test]
fn attributes_of_overlayfs_and_selinux_are_not_the_archives_to_set() {
    let pax: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.overlay.metacopy", b""),
        ("SCHILY.xattr.security.selinux", b"other_u:object_r:other_t:s0"),
        ("SCHILY.xattr.trusted.mine", b"1"),
    ];
    let site = unpacked(&[Item { pax, ..dir("d") }, Item { pax, ..file("f", b"") }, Item { pax, ..dir("./") }]);
    for name in ["d", "f", ""] {
        assert_eq!(rooted::xattrs(&site.path(name)).unwrap(), [("trusted.mine".into(), b"1".to_vec())], "{name}");
    }
}

#[test]
fn types_change_and_names_repeat() {
    let site = Site::new();
    let done = site
        .unpack(&[
            file("a", b"1"),
            dir("a"),
            file("a/x", b"2"),
            file("b/deep/er", b"1"),
            dir("b/other"),
            file("b", b"file now"),
            Item { mode: 0o700, ..dir("c") },
            file("c/x", b"1"),
            Item { mode: 0o711, ..dir("c") },
            item("p", b'6'),
            symlink("p", "a"),
            file("twice", b"one"),
            file("twice", b"second"),
        ])
        .unwrap();
    assert_eq!(std::fs::read(site.path("a/x")).unwrap(), b"2");
    assert_eq!(std::fs::read(site.path("b")).unwrap(), b"file now");
    assert_eq!((site.path("c").metadata().unwrap().mode() & 0o7777, site.path("c/x").exists()), (0o711, true));
    assert_eq!(std::fs::read_link(site.path("p")).unwrap(), Path::new("a"));
    assert_eq!(std::fs::read(site.path("twice")).unwrap(), b"second");
    assert_eq!(done.implicit, BTreeSet::from([PathBuf::new()]), "what went is not waited for");
    refused(&[file("a", b""), file("a/b", b"")], "in the way");
}

#[test]
fn times_of_all_ages() {
    let at = |seconds: &'static str| Item { pax: Box::leak(Box::new([("mtime", seconds.as_bytes())])), ..file("f", b"") };
    let mtime = |item: Item| unpacked(&[item]).path("f").metadata().unwrap().mtime();
    assert_eq!(mtime(at("-1.5")), -2);
    assert_eq!(mtime(at("0")), 0);
    // The file system keeps what it can hold.
    assert!(mtime(at("9223372036854775807")) > 1 << 32);
    assert!(mtime(at("-9223372036854775807")) < 0);
    refused(&[at("99999999999999999999")], "malformed time");
    let mut h = header(&dir("d"));
    h[136..148].copy_from_slice(&[0xff; 12]);
    seal(&mut h);
    let site = Site::new();
    site.raw(&h).unwrap();
    assert_eq!(site.path("d").metadata().unwrap().mtime(), -1);
}

#[test]
fn directory_times_survive_what_is_made_in_them() {
    let site = unpacked(&[dir("d"), file("d/x", b"1"), dir("d/e"), file("d/e/y", b"1")]);
    assert_eq!((site.path("d").metadata().unwrap().mtime(), site.path("d/e").metadata().unwrap().mtime()), (1000, 1000));
}

#[test]
fn owners_out_of_range() {
    for id in ["4294967295", "4294967296", "18446744073709551615"] {
        refused(&[Item { pax: &[("uid", id.as_bytes())], ..file("f", b"") }], "out of range");
    }
    refused(&[Item { pax: &[("gid", b"-1")], ..file("f", b"") }], "malformed");
    let site = unpacked(&[Item { pax: &[("uid", b"4294967294")], ..file("f", b"") }]);
    assert_eq!(site.path("f").metadata().unwrap().uid(), u32::MAX - 1);
}

#[test]
fn sizes_that_lie() {
    // Refused before a byte is read.
    let lie = Item { pax: &[("size", b"99999999999")], ..file("a", b"x") };
    refused(&[lie], "more than 1048576 bytes");
    refused(&[Item { pax: &[("size", b"18446744073709551615")], ..file("a", b"x") }], "out of range");
    // More announced than there is, and less.
    let e = Site::new().raw(&header(&Item { size: Some(5000), ..file("a", b"") })).unwrap_err();
    assert!(e.message().contains("ends inside a file"), "{e}");
    refused(&[Item { size: Some(0), ..file("a", &[b'x'; 512]) }], "malformed octal");
    let mut negative = header(&file("a", b""));
    negative[124..136].copy_from_slice(&[0xff; 12]);
    seal(&mut negative);
    assert!(Site::new().raw(&negative).unwrap_err().message().contains("negative size"));
    // Links and directories have no data, whatever they say.
    let site = unpacked(&[Item { size: Some(4096), ..symlink("s", "x") }, Item { size: Some(4096), ..dir("d") }, file("f", b"1")]);
    assert!(site.path("f").exists());
}

#[test]
fn too_many_and_too_much() {
    let names: Vec<String> = (0..1001).map(|i| format!("f{i}")).collect();
    let items: Vec<Item> = names.iter().map(|n| file(n, b"")).collect();
    assert_eq!(Site::new().unpack(&items).unwrap_err().code(), Code::ResourceExhausted);
    let half = vec![0; 600 << 10];
    assert_eq!(Site::new().unpack(&[file("a", &half), file("b", &half)]).unwrap_err().code(), Code::ResourceExhausted);
    let e = Site::new().raw(&[&header(&Item { size: Some(1 << 30), ..item("x", b'x') })[..], &[b'1'; 512]].concat()).unwrap_err();
    assert!(e.message().contains("1 MiB"), "{e}");
}

#[test]
fn unknown_kinds_and_damaged_headers() {
    refused(&[item("v", b'V')], "unknown entry type");
    let mut h = header(&file("a", b""));
    h[0] = b'b';
    assert!(Site::new().raw(&h).unwrap_err().message().contains("checksum"));
    assert!(Site::new().raw(&h[..300]).unwrap_err().message().contains("inside a header"));
    refused(&[Item { pax: &[("GNU.sparse.major", b"2")], ..file("a", b"") }], "unknown sparse format");
}

#[test]
fn global_headers_hold_until_taken_back() {
    let global = records(&[("mtime", b"77"), ("SCHILY.xattr.user.g", b"1")]);
    let head = header(&Item { size: Some(global.len() as u64), ..item("g", b'g') });
    let rest = archive(&[file("a", b""), Item { pax: &[("mtime", b"")], ..file("b", b"") }]);
    let site = Site::new();
    site.raw(&[&head[..], &padded(&global), &rest].concat()).unwrap();
    assert_eq!((site.path("a").metadata().unwrap().mtime(), site.path("b").metadata().unwrap().mtime()), (77, 1000));
    assert_eq!(rooted::xattrs(&site.path("b")).unwrap().len(), 1);
}

/// What every member takes over is small, however many headers there are.
#[test]
fn global_headers_and_attributes_are_bounded() {
    let global = |key: &str, value: &[u8]| {
        let records = records(&[(key, value)]);
        let head = header(&Item { size: Some(records.len() as u64), ..item("g", b'g') });
        [&head[..], &padded(&records)].concat()
    };
    let text = vec![b'x'; 10 << 10];
    let twice = |first: &str, second: &str| [global(first, &text), global(second, &text), archive(&[file("a", b"")])].concat();
    for (first, second) in [("SCHILY.xattr.user.a", "SCHILY.xattr.user.b"), ("linkpath", "GNU.sparse.name")] {
        let error = Site::new().raw(&twice(first, second)).unwrap_err();
        assert!(error.message().contains("global headers of more than 16 KiB"), "{error}");
    }
    // The same again takes the first one's place.
    Site::new().raw(&twice("comment", "comment")).unwrap();
    Site::new().raw(&twice("linkpath", "linkpath")).unwrap();
    let names: Vec<String> = (0..513).map(|i| format!("SCHILY.xattr.trusted.{i}")).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"1"[..])).collect();
    refused(&[Item { pax: &many, ..file("a", b"") }], "more than 512 attributes");
}

/// 512 bytes at 4096 of 8192, as every sparse format says it.
fn assert_sparse(site: &Site, name: &str) {
    let text = std::fs::read(site.path(name)).unwrap();
    assert!(text.len() == 8192 && text[..4096] == [0; 4096] && text[4096..4608] == [7; 512] && text[4608..].iter().all(|b| *b == 0));
    assert!(site.path(name).metadata().unwrap().blocks() <= 8, "holes stay holes");
}

#[test]
fn sparse_files_of_every_format() {
    let mut h = tar::Header::new_gnu();
    h.set_path("s").unwrap();
    h.set_entry_type(tar::EntryType::GNUSparse);
    h.set_mode(0o644);
    h.set_size(512);
    let gnu = h.as_gnu_mut().unwrap();
    gnu.sparse[0].set_offset(4096);
    gnu.sparse[0].set_length(512);
    gnu.set_real_size(8192);
    h.set_cksum();
    let site = Site::new();
    site.raw(&[h.as_bytes(), &[7u8; 512][..]].concat()).unwrap();
    assert_sparse(&site, "s");
    let zero: &[(&str, &[u8])] = &[
        ("GNU.sparse.size", b"8192"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"4096"),
        ("GNU.sparse.numbytes", b"512"),
        ("GNU.sparse.offset", b"8192"),
        ("GNU.sparse.numbytes", b"0"),
    ];
    let one: &[(&str, &[u8])] = &[("GNU.sparse.size", b"8192"), ("GNU.sparse.map", b"4096,512,8192,0"), ("GNU.sparse.name", b"one")];
    let two: &[(&str, &[u8])] =
        &[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.name", b"two"), ("GNU.sparse.realsize", b"8192")];
    let map = padded(b"2\n4096\n512\n8192\n0\n");
    let with_map = [&map[..], &[7; 512]].concat();
    let data = [7; 512];
    let site = unpacked(&[
        Item { pax: zero, ..file("zero", &data) },
        Item { pax: one, ..file("x", &data) },
        Item { pax: two, ..file("y", &with_map) },
        file("after", b"1"),
    ]);
    ["zero", "one", "two"].iter().for_each(|name| assert_sparse(&site, name));
    assert!(site.path("after").exists());
}

#[test]
fn sparse_maps_that_lie() {
    let refuse = |pax: &[(&str, &[u8])], words: &str| refused(&[Item { pax, ..file("s", &[7; 512]) }], words);
    refuse(&[("GNU.sparse.map", b"0,512")], "without its size");
    refuse(&[("GNU.sparse.size", b"8192"), ("GNU.sparse.map", b"0,512,1")], "malformed sparse map");
    refuse(&[("GNU.sparse.size", b"8192"), ("GNU.sparse.map", b"0,256")], "add up");
    refuse(&[("GNU.sparse.size", b"8192"), ("GNU.sparse.map", b"0,256,100,256")], "overlap");
    refuse(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,512")], "exceed");
    refuse(&[("GNU.sparse.size", b"8192"), ("GNU.sparse.map", b"18446744073709551615,512")], "out of range");
    refuse(&[("GNU.sparse.size", b"8192"), ("GNU.sparse.offset", b"0"), ("GNU.sparse.offset", b"1")], "malformed sparse map");
    refuse(&[("GNU.sparse.size", b"9999999999"), ("GNU.sparse.map", b"0,512")], "more than 1048576 bytes");
    refuse(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"8192")], "sparse map");
}

#[test]
fn a_cancelled_call_stops_between_entries() {
    let cancel = Cancel::never();
    cancel.set();
    let site = Site::new();
    let limits = Limits { max_entries: 1000, max_bytes: 1 << 20 };
    let data = archive(&[file("a", b"1")]);
    let e = unpack(&mut data.as_slice(), &site.path(""), &site.dir.path().join("tape"), &limits, &Room::new(site.dir.path(), 0), &cancel)
        .unwrap_err();
    assert_eq!(e.code(), Code::Cancelled);
}

#[test]
fn a_full_disk_is_seen_before_it_is_full() {
    let site = Site::new();
    let limits = Limits { max_entries: 1000, max_bytes: 1 << 40 };
    let data = archive(&[Item { pax: &[("size", b"20000000")], ..file("a", b"x") }]);
    let none = Room::new(site.dir.path(), 100);
    let e = unpack(&mut data.as_slice(), &site.path(""), &site.dir.path().join("tape"), &limits, &none, &Cancel::never()).unwrap_err();
    assert!(e.code() == Code::ResourceExhausted && e.message().contains("no room in"), "{e}");
    assert_eq!(site.path("a").metadata().unwrap().len(), 0, "not a byte was written");
}

/// Deep trees are removed on a thread with the stack that ours have.
#[test]
fn the_deepest_tree_goes_again() {
    let deep = "d/".repeat(255);
    let site = unpacked(&[Item { pax: &[("path", deep.as_bytes())], ..dir("short") }]);
    let path = site.path("d");
    crate::sys::thread::spawn("remove", move || crate::sys::file::remove_tree(&path)).unwrap().join().unwrap().unwrap();
    assert!(!site.path("d").exists());
}

mod any {
    use super::*;
    use proptest::prelude::*;

    fn name() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            3 => Just("a".to_owned()), 3 => Just("b".to_owned()), 2 => Just("..".to_owned()), 1 => Just(".".to_owned()),
            1 => Just(String::new()), 1 => Just(".wh.a".to_owned()), 1 => Just(".wh..wh..opq".to_owned()), 1 => Just("secret".to_owned()),
        ];
        proptest::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
    }

    fn entries() -> impl Strategy<Value = Vec<(String, u8, String, u32)>> {
        let kind = prop_oneof![Just(b'0'), Just(b'1'), Just(b'2'), Just(b'5'), Just(b'6'), Just(b'3')];
        proptest::collection::vec((name(), kind, name(), 0u32..0o10000), 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
        /// However links, whiteouts and names climb about, nothing outside is touched, what is refused is the image's fault, and
        /// everything that was made can be removed.
        #[test]
        fn entries_stay_inside(entries in entries()) {
            let site = Site::new();
            let items: Vec<Item> = entries
                .iter()
                .map(|(name, kind, link, mode)| Item { kind: *kind, link, mode: *mode, device: (1, 3), data: if *kind == b'0' { b"data" } else { b"" }, ..item(name, *kind) })
                .collect();
            match site.unpack(&items) {
                Ok(done) => prop_assert!(done.implicit.iter().all(|path| site.path("").join(path).symlink_metadata().is_ok_and(|m| m.is_dir()))),
                Err(e) => prop_assert_eq!(e.code(), Code::FailedPrecondition, "{}", e),
            }
            std::fs::set_permissions(site.path(""), std::fs::Permissions::from_mode(0o700)).unwrap();
        }

        /// A damaged archive is an error or another archive; never more than that.
        #[test]
        fn damaged_archives_stay_inside(at in 0usize..4096, value: u8, cut in 0usize..6000) {
            let data = [1u8; 600];
            let items = [dir("d"), file("d/f", &data), symlink("s", "../.."), hardlink("h", "d/f"), file("s/x", b"y")];
            let mut bytes = archive(&items);
            let at = at % bytes.len();
            bytes[at] = value;
            // The checksum made right again: the rest of the header counts.
            let start = at / 512 * 512;
            if bytes[start + 257..start + 262] == *b"ustar" {
                let mut h: [u8; 512] = bytes[start..start + 512].try_into().unwrap();
                seal(&mut h);
                bytes[start..start + 512].copy_from_slice(&h);
            }
            bytes.truncate(bytes.len().min(cut.max(512)));
            if let Err(e) = Site::new().raw(&bytes) {
                prop_assert!(matches!(e.code(), Code::FailedPrecondition | Code::ResourceExhausted), "{:?} {}", e.code(), e);
            }
        }
    }
}
