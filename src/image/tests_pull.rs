//! The pull engine against a registry in this process that counts, holds back and watches what is asked of it.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::tests::{config, gzip, layer_tar};
use super::*;
use crate::error::Code;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

#[derive(Default)]
struct Seen {
    asked: HashMap<String, usize>,
    busy: usize,
    most: usize,
}

struct Shared {
    answers: HashMap<String, Vec<u8>>,
    /// Blobs of which only half is sent until they are taken out of here.
    held: Mutex<HashSet<String>>,
    released: Condvar,
    /// How long each blob takes.
    delay: Duration,
    seen: Mutex<Seen>,
}

/// A server whose threads end with the test's process.
struct Registry {
    address: String,
    shared: Arc<Shared>,
}

/// Images by name, each of layers as they are served and as tars.
type Contents<'a> = [(&'a str, Vec<(Vec<u8>, Vec<u8>)>)];

fn gzipped(names: &[&str]) -> Vec<(Vec<u8>, Vec<u8>)> {
    names.iter().map(|name| layer_tar(name)).map(|tar| (gzip(&tar), tar)).collect()
}

fn blob(data: &[u8]) -> String {
    Digest::of(data).to_string()
}

impl Registry {
    fn start(images: &Contents, delay: Duration) -> Registry {
        let mut answers = HashMap::new();
        for (name, layers) in images {
            let tars: Vec<&[u8]> = layers.iter().map(|(_, tar)| tar.as_slice()).collect();
            let config = config(&tars, name);
            let descriptor = |kind: &str, data: &[u8]| manifest::Descriptor::new(kind, Digest::of(data), data.len() as u64);
            let kind = |data: &[u8]| if frames::begins(data) { format!("{LAYER}+zstd") } else { format!("{LAYER}+gzip") };
            let layer_descriptors: Vec<_> = layers.iter().map(|(data, _)| descriptor(&kind(data), data)).collect();
            let manifest = manifest::compose(&descriptor(manifest::OCI_CONFIG, &config), &layer_descriptors).unwrap();
            answers.insert(blob(&config), config);
            answers.extend(layers.iter().map(|(data, _)| (blob(data), data.clone())));
            answers.insert(format!("{name}/manifests/1"), manifest);
        }
        let shared = Shared { answers, held: Mutex::default(), released: Condvar::new(), delay, seen: Mutex::default() };
        let (shared, listener) = (Arc::new(shared), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap().to_string();
        let ours = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = ours.clone();
                std::thread::spawn(move || shared.serve(stream));
            }
        });
        Registry { address, shared }
    }

    fn hold(&self, data: &[u8]) {
        self.shared.held.lock().unwrap().insert(blob(data));
    }

    fn release(&self) {
        self.shared.held.lock().unwrap().clear();
        self.shared.released.notify_all();
    }

    fn asked(&self, data: &[u8]) -> usize {
        self.shared.seen.lock().unwrap().asked.get(&blob(data)).copied().unwrap_or(0)
    }

    fn store(&self, change: impl FnOnce(&mut Settings)) -> (tempfile::TempDir, Images) {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::new(dir.path());
        settings.registry.plain_http = vec![self.address.clone()];
        change(&mut settings);
        (dir, Images::open(settings).unwrap())
    }

    fn pull(&self, images: &Images, name: &str, cancel: &Cancel) -> std::thread::JoinHandle<Result<Arc<Image>>> {
        let (images, name, cancel) = (images.clone(), format!("{}/{name}:1", self.address), cancel.clone());
        std::thread::spawn(move || images.pull(&name, None, &cancel, None))
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let path = line.split_whitespace().nth(1)?.to_owned();
        while reader.read_line(&mut line).ok()? > 2 {}
        let (digest, is_blob) = match path.rsplit_once("/blobs/") {
            Some((_, digest)) => (digest.to_owned(), true),
            None => (path.trim_start_matches("/v2/").to_owned(), false),
        };
        if is_blob {
            let mut seen = self.seen.lock().unwrap();
            *seen.asked.entry(digest.clone()).or_default() += 1;
            seen.busy += 1;
            seen.most = seen.most.max(seen.busy);
        }
        let sent = self.answer(&mut stream, &digest, is_blob);
        let _ = stream.shutdown(std::net::Shutdown::Both);
        sent
    }

    fn answer(&self, stream: &mut TcpStream, digest: &str, is_blob: bool) -> Option<()> {
        let Some(body) = self.answers.get(digest) else {
            return stream.write_all(b"HTTP/1.1 404 X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}").ok();
        };
        let head = format!("HTTP/1.1 200 X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let (first, second) = body.split_at(body.len() / 2);
        stream.write_all(&[head.as_bytes(), first].concat()).ok()?;
        let mut held = self.held.lock().unwrap();
        while held.contains(digest) {
            held = self.released.wait(held).unwrap();
        }
        drop(held);
        if is_blob {
            std::thread::sleep(self.delay);
            // Before the client has all of it, and goes on to the next.
            self.seen.lock().unwrap().busy -= 1;
        }
        stream.write_all(second).ok()
    }
}

/// Names of what is in the layers' directory but is no finished layer.
fn unfinished(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir.join("layers")).unwrap().flatten();
    entries.filter(|e| !e.path().join("layer.json").exists()).map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn soon(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn fifty_pulls_of_ten_images_fetch_each_layer_once() {
    let names: Vec<String> = (0..10).map(|i| format!("image{i}")).collect();
    // Five pairs of images share a second layer, all share the first.
    let images: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.as_str(), gzipped(&["base", &format!("pair{}", i / 2), &format!("own{i}")])))
        .collect();
    let registry = Registry::start(&images, Duration::from_millis(2));
    let (dir, store) = registry.store(|s| s.bounds.all_layers = 4);
    let pulls: Vec<_> = (0..50).map(|i| registry.pull(&store, &names[i % 10], &Cancel::never())).collect();
    for pull in pulls {
        pull.join().unwrap().unwrap();
    }
    for (data, _) in images.iter().flat_map(|(_, layers)| layers) {
        assert_eq!(registry.asked(data), 1);
    }
    assert_eq!((store.list().len(), unfinished(dir.path())), (10, vec![]));
    assert_eq!(std::fs::read_dir(dir.path().join("layers")).unwrap().count(), 1 + 5 + 10);
}

#[test]
fn layers_on_their_way_are_bounded_over_all_pulls() {
    let images: Vec<_> = ["x", "y", "z"].iter().map(|n| (*n, gzipped(&[&format!("{n}1"), &format!("{n}2"), &format!("{n}3")]))).collect();
    let registry = Registry::start(&images, Duration::from_millis(30));
    let (_dir, store) = registry.store(|s| (s.bounds.layer_workers, s.bounds.all_layers) = (3, 2));
    let pulls: Vec<_> = ["x", "y", "z"].iter().map(|n| registry.pull(&store, n, &Cancel::never())).collect();
    pulls.into_iter().for_each(|pull| drop(pull.join().unwrap().unwrap()));
    // A layer or the config of each image, and two layers more.
    let most = registry.shared.seen.lock().unwrap().most;
    assert!((2..=5).contains(&most), "{most} at a time");
}

#[test]
fn no_image_waits_for_those_of_slow_registries() {
    let slow: Vec<_> = ["x", "y"].iter().map(|n| (*n, gzipped(&[&format!("{n}1"), &format!("{n}2"), &format!("{n}3")]))).collect();
    let slow_registry = Registry::start(&slow, Duration::ZERO);
    slow.iter().flat_map(|(_, layers)| layers).for_each(|(data, _)| slow_registry.hold(data));
    let quick = Registry::start(&[("quick", gzipped(&["q1", "q2"]))], Duration::ZERO);
    let (_dir, store) = slow_registry.store(|s| {
        (s.bounds.layer_workers, s.bounds.all_layers) = (3, 2);
        s.registry.plain_http.push(quick.address.clone());
    });
    let cancel = Cancel::new(None);
    let pulls: Vec<_> = ["x", "y"].iter().map(|n| slow_registry.pull(&store, n, &cancel)).collect();
    let busy = || slow_registry.shared.seen.lock().unwrap().busy;
    soon("all places are taken", || busy() == 2 + 2);
    quick.pull(&store, "quick", &Cancel::never()).join().unwrap().unwrap();
    cancel.set();
    slow_registry.release();
    pulls.into_iter().for_each(|pull| drop(pull.join().unwrap().unwrap_err()));
}

#[test]
fn no_layer_waits_for_the_one_below() {
    let names = ["0", "1", "2", "3", "4", "5"];
    let layers = gzipped(&names);
    let registry = Registry::start(&[("a", layers.clone())], Duration::ZERO);
    let (dir, store) = registry.store(|s| s.bounds.layer_workers = 2);
    registry.hold(&layers[0].0);
    let pull = registry.pull(&store, "a", &Cancel::never());
    // One worker has the lowest layer; the other one does all the rest meanwhile.
    soon("the highest layer is made", || {
        let made = |e: std::fs::DirEntry| std::fs::read_dir(e.path().join("diff")).is_ok_and(|mut d| d.next().is_some());
        std::fs::read_dir(dir.path().join("layers")).unwrap().flatten().map(made).filter(|m| *m).count() == 5
    });
    assert!(store.list().is_empty() && !pull.is_finished());
    registry.release();
    let image = pull.join().unwrap().unwrap();
    let held = store.hold(&image.id, "c").unwrap();
    for (place, name) in held.layers.iter().rev().zip(names) {
        assert_eq!(std::fs::read(place.join(name)).unwrap(), name.as_bytes());
    }
}

#[test]
fn a_cancelled_pull_keeps_what_is_finished_and_nothing_else() {
    let layers = gzipped(&["low", "stuck", "high"]);
    let registry = Registry::start(&[("a", layers.clone())], Duration::ZERO);
    let (dir, store) = registry.store(|_| {});
    registry.hold(&layers[1].0);
    let cancel = Cancel::never();
    let pull = registry.pull(&store, "a", &cancel);
    let low = Digest::of(&layers[0].1);
    soon("the lowest layer is committed and the others are begun", || {
        store.inner.layers.is_ready(&low) && registry.asked(&layers[1].0) == 1 && registry.asked(&layers[2].0) == 1
    });
    let begin = Instant::now();
    cancel.set();
    assert_eq!(pull.join().unwrap().unwrap_err().code(), Code::Cancelled);
    // The registry still holds the connection: nothing waits for it.
    soon("nothing is left", || unfinished(dir.path()).is_empty());
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    assert!(store.inner.layers.is_ready(&low) && store.list().is_empty());
    registry.release();
    registry.pull(&store, "a", &Cancel::never()).join().unwrap().unwrap();
    assert_eq!((registry.asked(&layers[0].0), registry.asked(&layers[1].0)), (1, 2));
}

#[test]
fn a_pull_goes_on_where_another_one_was_cancelled() {
    let layers = gzipped(&["shared", "own"]);
    let other = [layers[0].clone(), gzipped(&["theirs"])[0].clone()].to_vec();
    let registry = Registry::start(&[("a", layers.clone()), ("b", other)], Duration::ZERO);
    let (_dir, store) = registry.store(|_| {});
    registry.hold(&layers[0].0);
    let cancel = Cancel::never();
    let first = registry.pull(&store, "a", &cancel);
    soon("the first has begun", || registry.asked(&layers[0].0) == 1);
    let second = registry.pull(&store, "b", &Cancel::never());
    cancel.set();
    assert_eq!(first.join().unwrap().unwrap_err().code(), Code::Cancelled);
    registry.release();
    second.join().unwrap().unwrap();
    assert_eq!(registry.asked(&layers[0].0), 2, "who waited for it fetches it now");
}

#[test]
fn the_first_failure_stops_the_other_layers() {
    let mut layers = gzipped(&["a", "b", "c"]);
    layers[1].1 = layer_tar("not what the config says");
    let registry = Registry::start(&[("a", layers.clone())], Duration::ZERO);
    let (dir, store) = registry.store(|_| {});
    registry.hold(&layers[2].0);
    let e = registry.pull(&store, "a", &Cancel::never()).join().unwrap().unwrap_err();
    assert!(e.message().contains("the image config says") && e.code() == Code::FailedPrecondition, "{e}");
    soon("nothing half-made is left", || unfinished(dir.path()).is_empty());
    assert!(store.list().is_empty());
}

#[test]
fn zstd_layers() {
    let tars = [layer_tar("a"), layer_tar("b")];
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let layers: Vec<_> = tars.iter().map(|tar| (ruzstd::encoding::compress_to_vec(&tar[..], level), tar.clone())).collect();
    let registry = Registry::start(&[("a", layers)], Duration::ZERO);
    let (_dir, store) = registry.store(|_| {});
    let image = registry.pull(&store, "a", &Cancel::never()).join().unwrap().unwrap();
    let held = store.hold(&image.id, "c").unwrap();
    assert_eq!(std::fs::read(held.layers[0].join("b")).unwrap(), b"b");
}

#[test]
fn without_room_nothing_is_begun() {
    let layers = gzipped(&["a"]);
    let registry = Registry::start(&[("a", layers.clone())], Duration::ZERO);
    let (dir, store) = registry.store(|s| s.bounds.keep_free = 100);
    let e = registry.pull(&store, "a", &Cancel::never()).join().unwrap().unwrap_err();
    assert!(e.code() == Code::ResourceExhausted && e.message().contains("no room in"), "{e}");
    assert_eq!((registry.asked(&layers[0].0), unfinished(dir.path())), (0, vec![]));
}
