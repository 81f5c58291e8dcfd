//! What is fuzzed: everything that takes apart bytes of strangers, or of the kernel. Each target checks more than that nothing
//! panics. They belong to the library (feature `fuzz`), because most parsers are its own affair; the fuzzer (tests/fuzz) and the
//! replay of the corpora below call the same functions.

use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

use crate::cgroup::stat::{cpu, hugetlb, io, memory, number, pids, pressure};
use crate::cgroup::{path, Layout};
use crate::image::decompress::Decompress;
use crate::image::tarball::{Entry, Tarball};
use crate::image::{parsers, Platform, Reference};
use crate::network::{Outcome, Version};
use crate::shim::protocol::{Answer, Envelope, Event, ExitRecord, Request, ShimConfig};
use crate::spec::seccomp::interpreter::{self, Call};
use crate::spec::seccomp::{bpf, Conditions, Profile};
use crate::spec::security::BY_NUMBER;
use crate::spec::selinux::{Label, Policy};
use crate::streaming::spdy::frame::{self, Frame};
use crate::streaming::spdy::header;
use crate::streaming::websocket::frame as websocket;
use crate::streaming::{http, token, websocket::Verb};
use crate::sys::cancel::Cancel;
use crate::sys::mount;

/// A function that must not panic on any bytes, and its name.
pub type Target = (&'static str, fn(&[u8]));

/// Name and function of every target; the name is its directory in corpus/ too.
pub const TARGETS: [Target; 18] = [
    ("spdy_frames", spdy_frames),
    ("spdy_headers", spdy_headers),
    ("websocket_frames", websocket_frames),
    ("upgrade_head", upgrade_head),
    ("token_url", token_url),
    ("cgroup_files", cgroup_files),
    ("cni_result", cni_result),
    ("image_reference", image_reference),
    ("image_manifest", image_manifest),
    ("hosts_toml", hosts_toml),
    ("docker_config", docker_config),
    ("www_authenticate", www_authenticate),
    ("mountinfo", mountinfo),
    ("shim_protocol", shim_protocol),
    ("seccomp_profile", seccomp_profile),
    ("selinux_label", selinux_label),
    ("tar_entries", tar_entries),
    ("layer_stream", layer_stream),
];

/// The frames of a byte stream that comes in pieces of `step` bytes, pieces of data joined, and whether it went wrong.
fn frames(bytes: &[u8], step: usize) -> (Vec<Frame>, bool) {
    let (mut decoder, mut found) = (frame::Decoder::default(), Vec::new());
    for mut piece in bytes.chunks(step) {
        while !piece.is_empty() {
            let Ok((used, frame)) = decoder.decode(piece) else { return (found, true) };
            assert!(used > 0 || frame.is_some(), "no progress");
            piece = &piece[used..];
            match (found.last_mut(), frame) {
                (Some(Frame::Data { stream: a, bytes, fin: end @ false }), Some(Frame::Data { stream: b, bytes: more, fin }))
                    if *a == b =>
                {
                    bytes.extend(more);
                    *end = fin;
                }
                (_, frame) => found.extend(frame),
            }
        }
    }
    (found, false)
}

/// What a client sends means the same however the network cuts it.
fn spdy_frames(bytes: &[u8]) {
    let whole = frames(bytes, bytes.len().max(1));
    assert_eq!(frames(bytes, 1), whole);
    assert_eq!(frames(bytes, 7), whole);
}

/// Blocks are bounded, and what we write of a block is read as the same.
fn spdy_headers(bytes: &[u8]) {
    let mut reader = header::Reader::default();
    // The first byte cuts the input in two blocks of one zlib stream.
    let Some((cut, bytes)) = bytes.split_first() else { return };
    let (first, second) = bytes.split_at((*cut as usize).min(bytes.len()));
    for block in [first, second] {
        let Ok(pairs) = reader.read(block) else { return };
        let size: usize = pairs.iter().map(|(name, value)| name.len() + value.len()).sum();
        assert!(size <= header::BLOCK_LIMIT);
        let borrowed: Vec<(&str, &str)> = pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let written = header::Writer::default().write(&borrowed);
        assert_eq!(header::Reader::default().read(&written).expect("ours is read"), pairs);
    }
}

/// The payload of what a client sends, and its control frames, is the same however the network cuts it.
fn websocket_frames(bytes: &[u8]) {
    let whole = payload(bytes, 64 << 10);
    assert_eq!(payload(bytes, 1), whole);
    assert_eq!(payload(bytes, 5), whole);
}

#[derive(Debug, PartialEq, Eq, Default)]
struct Payload {
    bytes: Vec<u8>,
    messages: usize,
    controls: Vec<websocket::Found>,
    broken: bool,
}

fn payload(bytes: &[u8], step: usize) -> Payload {
    let (mut decoder, mut all) = (websocket::Decoder::new(), Payload::default());
    let mut rest = bytes;
    loop {
        match decoder.next() {
            Ok(Some(websocket::Found::Piece { last, at, .. })) => {
                all.bytes.extend_from_slice(decoder.bytes(&at));
                all.messages += usize::from(last);
            }
            Ok(Some(control)) => all.controls.push(control),
            Ok(None) if rest.is_empty() => return all,
            Ok(None) => {
                let space = decoder.space();
                let n = step.min(rest.len()).min(space.len());
                assert!(n > 0, "nowhere to read to");
                space[..n].copy_from_slice(&rest[..n]);
                decoder.filled(n);
                rest = &rest[n..];
            }
            Err(_) => {
                all.broken = true;
                return all;
            }
        }
    }
}

/// A head is whole at one length and no other, and an upgrade that is accepted can be answered.
fn upgrade_head(bytes: &[u8]) {
    let Ok(Some((head, length))) = http::parse(bytes) else { return };
    assert!(length <= bytes.len() && length <= http::HEAD_LIMIT);
    assert!(matches!(http::parse(&bytes[..length]), Ok(Some((again, n))) if again == head && n == length));
    assert!(!matches!(http::parse(&bytes[..length - 1]), Ok(Some((_, n))) if n >= length));
    let _ = head.upgrade();
    for verb in [Verb::Remote, Verb::PortForward] {
        match crate::streaming::websocket::upgrade(&head.headers, verb) {
            Ok(upgrade) => {
                let lines = upgrade.answer.split("\r\n").filter(|line| !line.is_empty()).count();
                assert!(upgrade.answer.starts_with("HTTP/1.1 101 ") && upgrade.answer.ends_with("\r\n\r\n") && (4..=5).contains(&lines));
            }
            Err(refusal) => assert!(matches!(refusal.status, 400..=499) && !refusal.message.contains('\n')),
        }
    }
}

/// A token is 22 letters and digits, and nothing of the path is left over.
fn token_url(bytes: &[u8]) {
    let Ok(path) = std::str::from_utf8(bytes) else { return };
    for verb in ["exec", "attach", "portforward"] {
        let Some(token) = token::of_path(path, verb) else { continue };
        assert_eq!(path, format!("/{verb}/{token}"));
        assert!(token.len() == 22 && !token.contains(['/', '.', '%', '?']));
    }
}

/// Form feeds cut the input into the files of one cgroup.
fn cgroup_files(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split('\u{c}');
    let mut next = || parts.next().unwrap_or_default();
    let (a, b, c, d, e) = (next(), next(), next(), next(), next());
    let _ = (cpu::usage_v1(a), cpu::usage_v2(a), cpu::times_v1(a, b, 100), cpu::times_v2(a), cpu::limits_v1(a, b, c), cpu::limits_v2(a, b));
    for memory in [memory::Memory::v1(a, b), memory::Memory::v2(a, b, c, d, e)] {
        let _ = (memory.working_set(), memory.available(1 << 40), memory.swap_available());
        assert!(memory.limit_below(1 << 40).is_none_or(|limit| limit < 1 << 40));
    }
    let _ = (memory::more_v1(a, b, c, d), memory::more_v2(a, b, c), memory::limits_v1(a, b, c), memory::limits_v2(a, b, c));
    let _ = (io::v1(a, b), io::v2(a), hugetlb::v1(a, b, c, d), hugetlb::v2(a, b, c), pids::parse(a, b), pids::processes(a));
    let _ = (pressure::parse(a), number::device(a), number::pairs(a).count());
    let _ = crate::cgroup::parse::flat_keyed(a, "oom_kill");
    for (controllers, path) in crate::cgroup::parse::proc_cgroup(a) {
        assert!(controllers.len() + path.len() <= a.len());
    }
    if let Ok(resolved) = path::resolve(a) {
        assert!(!resolved.components().any(|part| matches!(part, std::path::Component::ParentDir)), "{}", resolved.display());
    }
}

/// A result that is taken is taken again from what was kept of it, with the same meaning.
fn cni_result(bytes: &[u8]) {
    let Some(asked) = Version::parse("1.0.0") else { panic!("a version") };
    let Ok(outcome) = Outcome::parse(bytes, asked) else { return };
    let ips: Vec<IpAddr> = outcome.ips("eth0");
    let serde_json::Value::Object(kept) = outcome.raw.clone() else { panic!("a result is an object") };
    let again = Outcome::of(kept).expect("what was taken is taken again");
    assert_eq!((again.ips("eth0"), again.mac("eth0"), &again.addresses), (ips, outcome.mac("eth0"), &outcome.addresses));
}

/// A normal form is its own normal form.
fn image_reference(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(reference) = Reference::parse(text) else { return };
    assert_eq!(Reference::parse(&reference.to_string()).expect("a normal form"), reference);
    assert!(!reference.path().split('/').any(|part| part.is_empty() || part == "." || part == ".."));
}

/// A manifest that is taken is an image's, and means the same when it is written again.
fn image_manifest(bytes: &[u8]) {
    let host = Platform::host();
    let _ = parsers::parse_config(bytes, 1);
    match parsers::manifest(bytes, "") {
        Ok(parsers::Document::Manifest(manifest)) => {
            let written = parsers::compose(&manifest.config, &manifest.layers).expect("it was read");
            let again = parsers::manifest(&written, "").expect("ours is read");
            assert!(matches!(again, parsers::Document::Manifest(again) if again == manifest));
        }
        Ok(parsers::Document::Index(entries)) => {
            let found = parsers::candidates(&entries, &host).unwrap_or_default();
            assert!(found.iter().all(|entry| entries.contains(entry)));
        }
        Err(_) => {}
    }
}

/// Every host that is taken is a plain address with an absolute path, and its files are absolute.
fn hosts_toml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok((hosts, _)) = parsers::hosts::parse(text, Path::new("/d")) else { return };
    assert!(!hosts.is_empty(), "the registry itself is always there");
    for host in &hosts {
        let files = host.tls.ca.iter().chain(host.tls.client.iter().flat_map(|(a, b)| [Some(a), b.as_ref()].into_iter().flatten()));
        files.for_each(|file| assert!(file.is_absolute()));
        let Some(place) = &host.place else { continue };
        assert!(!place.authority.contains(['/', '@', ' ']) && !place.authority.is_empty(), "{place:?}");
        assert!(place.path.is_empty() || place.path.starts_with('/'), "{place:?}");
        assert!(!place.path.split('/').any(|part| part == ".."), "{place:?}");
    }
}

/// Errors do not quote the file, which holds passwords.
fn docker_config(bytes: &[u8]) {
    match parsers::DockerConfig::parse(bytes) {
        Ok(config) => {
            for name in ["docker.io/library/busybox", "q.io:5000/a/b", "q.io"] {
                let _ = (config.program(name), config.entry(name).is_ok());
            }
        }
        Err(e) => assert!(e.message().len() < 100, "{e}"),
    }
}

/// Challenges that are understood mean the same when they are written properly.
fn www_authenticate(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = (parsers::content_range(text), parsers::retry_after(text, std::time::UNIX_EPOCH));
    let found = parsers::parse_challenges(text);
    let quote = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"");
    let write = |one: &parsers::Challenge| {
        let parameters: Vec<String> = one.parameters.iter().map(|(key, value)| format!("{key}=\"{}\"", quote(value))).collect();
        format!("{} {}", one.scheme, parameters.join(","))
    };
    let written: Vec<String> = found.iter().map(write).collect();
    assert_eq!(parsers::parse_challenges(&written.join(", ")), found);
}

/// Lines are taken one by one: a broken one does not spoil others.
fn mountinfo(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let table = mount::parse_table(&text);
    assert!(table.len() <= text.lines().count());
    let one_by_one: Vec<_> = text.lines().flat_map(mount::parse_table).collect();
    assert_eq!(table, one_by_one);
    let _ = (mount::holding(&table, Path::new("/sys/fs/cgroup/memory/a")), Layout::from_table(&table));
}

/// What is read is written and read as the same, in both directions and in files.
fn shim_protocol(bytes: &[u8]) {
    fn again<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
        let written = serde_json::to_vec(&value).expect("it was read");
        assert_eq!(serde_json::from_slice::<T>(&written).expect("ours is read"), value);
    }
    again::<Event>(bytes);
    again::<Answer>(bytes);
    again::<ExitRecord>(bytes);
    again::<ShimConfig>(bytes);
    if let Ok(envelope) = serde_json::from_slice::<Envelope<Request>>(bytes) {
        let written = serde_json::to_vec(&envelope).expect("it was read");
        assert_eq!(serde_json::from_slice::<Envelope<Request>>(&written).expect("ours is read").body, envelope.body);
    }
}

/// A profile is refused, or gives a container a filter that answers every call with one of the profile's actions.
fn seccomp_profile(bytes: &[u8]) {
    let Ok(profile) = Profile::parse(bytes) else { return };
    for (bounding, arch) in [(BY_NUMBER.into_iter().collect(), "x86_64"), (Default::default(), "riscv64")] {
        let Ok((filter, warnings)) = profile.resolve(&Conditions { bounding: &bounding, arch, kernel: (6, 1) }) else { continue };
        assert!(warnings.iter().all(|line| !line.contains('\n')));
        let Some(program) = bpf::compile(&filter, arch) else { continue };
        for arch in [0xc000_003e, 0x4000_0003, 0xc000_00b7, 0x4000_0028, 0] {
            for number in [0, 1, 39, 41, 56, 102, 0x4000_0000, u32::MAX] {
                let answer = interpreter::run(&program, &Call { arch, number, args: [1, 2, 3, 4, 5, 6] });
                assert!([0, 0x8000_0000, 0x3_0000, 0x5_0000, 0x7ff0_0000, 0x7ffc_0000, 0x7fff_0000].contains(&(answer & 0xffff_0000)));
            }
        }
    }
}

/// A label that is taken apart is put together again as it was, and is one line.
fn selinux_label(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some(label) = Label::parse(&text) {
        assert_eq!(label.to_string(), text);
        assert!(!text.contains(['\n', ' ', '\0']));
    }
    let policy = Policy::parse(&text);
    for label in [policy.process, policy.file] {
        assert_eq!(Label::parse(&label.to_string()), Some(label));
    }
}

/// A stream that comes in pieces of so many bytes.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = buffer.len().min(self.1);
        self.0.read(&mut buffer[..n])
    }
}

/// The entries of an archive with the length of what each stores, and whether it went wrong.
fn entries(stream: impl Read) -> (Vec<(Entry, usize)>, bool) {
    let (mut tar, mut found) = (Tarball::new(stream), Vec::new());
    loop {
        let Ok(next) = tar.next_entry() else { return (found, true) };
        let Some(entry) = next else { return (found, false) };
        let mut data = Vec::new();
        if tar.read_to_end(&mut data).is_err() {
            return (found, true);
        }
        found.push((entry, data.len()));
    }
}

/// An archive means the same however its bytes come; what an entry announces is what it has.
fn tar_entries(bytes: &[u8]) {
    let whole = entries(bytes);
    assert_eq!(entries(Pieces(bytes, 1)), whole);
    assert_eq!(entries(Pieces(bytes, 300)), whole);
    for (entry, length) in whole.0 {
        assert_eq!(entry.stored, length as u64);
        assert!(entry.mode <= 0o7777 && entry.uid != u32::MAX && entry.gid != u32::MAX && entry.mtime.1 < 1_000_000_000);
        let Some(pieces) = entry.pieces else {
            assert_eq!(entry.size, entry.stored);
            continue;
        };
        assert_eq!(pieces.iter().map(|(_, length)| length).sum::<u64>(), entry.stored);
        assert!(pieces.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0));
        assert!(pieces.last().is_none_or(|(offset, length)| offset + length <= entry.size));
    }
}

/// The first megabyte of a stream, and whether it went wrong there.
fn plain(stream: impl Read) -> (Vec<u8>, bool) {
    let mut out = Vec::new();
    let Ok(plain) = Decompress::new(stream, &Cancel::never()) else { return (out, true) };
    let broken = plain.take(1 << 20).read_to_end(&mut out).is_err();
    (out, broken)
}

/// What comes out of gzip, zstd or neither does not hang on how the bytes come in.
fn layer_stream(bytes: &[u8]) {
    let (whole, broken) = plain(bytes);
    for step in [1, 5] {
        let (again, also) = plain(Pieces(bytes, step));
        // Of a broken one more or less may have come out before that showed.
        assert_eq!((also, broken || again == whole), (broken, true));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What people write or registries send, bent a little: cheap enough for every run.
    #[test]
    fn bent_corpora() {
        const SIGNS: &[u8] = b"\"\\/=:,.@[]{} \n%*";
        const BENT: [&str; 5] = ["image_reference", "image_manifest", "hosts_toml", "docker_config", "www_authenticate"];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below.max(1) as u64) as usize
        };
        for (name, target) in TARGETS.iter().filter(|(name, _)| BENT.contains(name)) {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
            let mut paths: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|file| file.unwrap().path()).collect();
            paths.sort();
            let corpus: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
            for _ in 0..1000 {
                let mut bytes = corpus[random(corpus.len())].clone();
                for _ in 0..=random(4) {
                    let at = random(bytes.len() + 1);
                    let other = &corpus[random(corpus.len())];
                    match random(5) {
                        0 => bytes.truncate(at),
                        1 => bytes.insert(at, SIGNS[random(SIGNS.len())]),
                        2 => drop(bytes.drain(at..(at + random(8)).min(bytes.len()))),
                        3 => bytes.extend_from_slice(&other[random(other.len() + 1)..]),
                        _ => {
                            if let Some(byte) = bytes.get_mut(at) {
                                *byte = random(256) as u8;
                            }
                        }
                    }
                }
                let result = std::panic::catch_unwind(|| target(&bytes));
                assert!(result.is_ok(), "{name}: {:?}", String::from_utf8_lossy(&bytes));
            }
        }
    }

    #[test]
    fn corpora() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
        for (name, target) in TARGETS {
            let dir = root.join(name);
            let files = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
            let mut count = 0;
            for file in files {
                let path = file.unwrap().path();
                let bytes = std::fs::read(&path).unwrap();
                let result = std::panic::catch_unwind(|| target(&bytes));
                assert!(result.is_ok(), "{}", path.display());
                count += 1;
            }
            assert!(count > 0, "{} is empty", dir.display());
        }
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), TARGETS.len(), "a directory per target, and no other");
    }
}
