//! Unpacked layers on disk: `root/layers/<chain id>/diff` with the marker `layer.json` written last and fsynced. Each
//! chain ID is made once at a time, whoever asks for it; a layer without its marker is as good as none.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::damage::Damaged;
use super::digest::{is_hex, Digest};
use super::make::{self, Wanted};
use super::room::Room;
use super::slots::{Slots, Taken};
use super::unpack::{self, Limits, Unpacked};
use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::awaited::Awaited;
use crate::sys::cancel::Cancel;
use crate::sys::crash;
use crate::sys::file::{self, Durability};
use crate::sys::lock::{Lock, Rank};
use crate::sys::thread;
use crate::telemetry;

pub(super) const MARKER: &str = "layer.json";
/// The layer's files.
pub(super) const DIFF: &str = "diff";
/// Beside the marker: see `tape`.
pub(super) const TAPE: &str = "tape";
/// In the name of a directory that is being deleted.
const GONE: &str = ".gone-";

/// What the marker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marker {
    version: u32,
    pub(super) chain_id: Digest,
    pub(super) diff_id: Digest,
    pub(super) bytes: u64,
    inodes: u64,
    /// Whether there is a tape; none where an entry of the archive replaced another.
    #[serde(default)]
    pub(super) taped: bool,
}

impl Marker {
    pub(super) fn write(&self, place: &Path) -> Result<()> {
        let data = serde_json::to_vec(self).context(|| "write layer marker")?;
        file::write(&place.join(MARKER), &data, 0o600, Durability::Synced)
    }
}

/// Disk space and inodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) ready: HashMap<Digest, Marker>,
    /// Being made or removed by somebody.
    pub(super) busy: HashSet<Digest>,
    /// Layers that must stay, by who needs them: a container, or a pull under way.
    pub(super) holds: HashMap<String, Vec<Digest>>,
    /// See `damage`.
    pub(super) damaged: Damaged,
    /// Counts what may interest somebody who found a layer busy.
    changes: u64,
}

impl State {
    fn unneeded(&self, used: &HashSet<Digest>) -> Vec<Digest> {
        let held: HashSet<&Digest> = self.holds.values().flatten().collect();
        let free = |c: &&Digest| !used.contains(*c) && !held.contains(*c) && !self.busy.contains(*c);
        self.ready.keys().filter(free).cloned().collect()
    }
}

/// The layer store.
pub struct Layers {
    pub(super) dir: PathBuf,
    limits: Limits,
    serial: AtomicU64,
    pub(super) state: Awaited<State>,
    /// Layers on their way at a time, for all pulls together, beyond one of each.
    slots: Slots,
    pub room: Room,
}

/// A layer's bytes as they come. `fault` holds the error of a reader that has a better one than its I/O error (a registry
/// that went away, a cancelled call).
pub struct Stream {
    pub reader: Box<dyn Read + Send>,
    pub fault: Fault,
    pub breaks: Breaks,
}

pub type Fault = Arc<Lock<Option<Error>>>;

/// Where a reader that takes up a broken transfer again says so, for whoever shows progress.
#[derive(Clone, Default)]
pub struct Breaks(Arc<OnceLock<Tell>>);

/// Told the bytes received before a retry.
type Tell = Box<dyn Fn(u64) + Send + Sync>;

impl Breaks {
    /// `tell` is called with the bytes received so far at each break; it must not block.
    pub fn on_break(&self, tell: impl Fn(u64) + Send + Sync + 'static) {
        let _ = self.0.set(Box::new(tell));
    }

    /// A transfer broke after `received` bytes and is tried again.
    pub fn broke(&self, received: u64) {
        if let Some(tell) = self.0.get() {
            tell(received);
        }
    }
}

impl Stream {
    pub fn new(reader: impl Read + Send + 'static) -> Stream {
        Stream { reader: Box::new(reader), fault: Arc::new(Lock::new(Rank::Leaf, None)), breaks: Breaks::default() }
    }
}

/// What `claim` found.
pub enum Claimed {
    /// A layer that is there.
    Here(usize),
    /// A layer to make, and the sole right to do so.
    Ours(usize, Claim),
    /// All are being made by others. The number is for `changed`.
    Busy(u64),
}

/// A layer made and verified, waiting for its commit. Dropped, it leaves nothing.
pub struct Made {
    // Fields go in this order: the files before the right to make them.
    temp: Temp,
    claim: Claim,
    diff_id: Digest,
    below: Vec<Digest>,
    unpacked: Unpacked,
}

impl Layers {
    /// Opens the store: finds finished layers, removes half-made ones. Whatever is not ours is left alone.
    pub fn open(dir: &Path, limits: Limits, room: Room, slots: Slots) -> Result<Layers> {
        file::make_dir(dir, 0o711)?;
        let mut state = State::default();
        let mut gone = Vec::new();
        let what = || format!("list {}", dir.display());
        for entry in std::fs::read_dir(dir).context(what)? {
            let path = entry.context(what)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let chain_id = Digest::parse(&format!("sha256:{name}"));
            match (chain_id, read_marker(&path)) {
                (Ok(chain_id), Ok(marker)) if marker.chain_id == chain_id => {
                    state.ready.insert(chain_id, marker);
                }
                (_, Err(_)) if state.damaged.restore(&name, &path) => {}
                (_, Err(e)) if is_hex(name.split('.').next().unwrap_or_default(), 64) && !path.join(MARKER).exists() => {
                    log::warn!("image: remove half-made layer {name} ({e})");
                    gone.push(set_aside(&path)?);
                }
                // A marker we cannot read may be a newer version's, and a container may be using the files.
                _ => log::warn!("image: {} is not a layer; left alone", path.display()),
            }
        }
        delete(gone);
        Ok(Layers { dir: dir.to_owned(), limits, serial: AtomicU64::new(0), state: Awaited::new(Rank::Leaf, state), slots, room })
    }

    /// Where a layer's files are.
    pub fn diff_dir(&self, chain_id: &Digest) -> PathBuf {
        self.dir.join(chain_id.hex()).join("diff")
    }

    pub fn is_ready(&self, chain_id: &Digest) -> bool {
        self.state.lock().ready.contains_key(chain_id)
    }

    /// The chain IDs of all finished layers.
    pub fn all(&self) -> Vec<Digest> {
        self.state.lock().ready.keys().cloned().collect()
    }

    /// A layer's directory.
    pub(super) fn place(&self, chain_id: &Digest) -> PathBuf {
        self.dir.join(chain_id.hex())
    }

    /// What is known about a finished layer.
    pub(super) fn marker(&self, chain_id: &Digest) -> Option<Marker> {
        self.state.lock().ready.get(chain_id).cloned()
    }

    pub(super) fn is_busy(&self, chain_id: &Digest) -> bool {
        self.state.lock().busy.contains(chain_id)
    }

    /// Finished layers that neither `used` nor a holder needs.
    pub(super) fn unneeded(&self, used: &HashSet<Digest>) -> Vec<Digest> {
        self.state.lock().unneeded(used)
    }

    /// Sum over all finished layers.
    pub fn usage(&self) -> Usage {
        let state = self.state.lock();
        state.ready.values().fold(Usage::default(), |sum, m| Usage { bytes: sum.bytes + m.bytes, inodes: sum.inodes + m.inodes })
    }

    /// Keeps layers from being collected until `release`; replaces what the holder held before.
    pub fn hold(&self, holder: &str, chain: &[Digest]) {
        self.state.lock().holds.insert(holder.to_owned(), chain.to_vec());
    }

    /// As `hold`, for layers that must be there already.
    pub fn hold_ready(&self, holder: &str, chain: &[Digest]) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(missing) = chain.iter().find(|c| !state.ready.contains_key(c)) {
            return Err(Error::internal(format!("layer {missing} is missing; pull the image again")));
        }
        state.holds.insert(holder.to_owned(), chain.to_vec());
        Ok(())
    }

    pub fn release(&self, holder: &str) {
        self.state.lock().holds.remove(holder);
    }

    /// Takes the first of some layers that is there or that nobody makes; `wanted` gives each with a number of the caller's.
    pub fn claim<'a>(&self, wanted: impl Iterator<Item = (usize, &'a Digest)>) -> Claimed {
        let mut state = self.state.lock();
        for (number, chain_id) in wanted {
            if state.ready.contains_key(chain_id) {
                return Claimed::Here(number);
            }
            if state.busy.insert(chain_id.clone()) {
                return Claimed::Ours(number, self.claimed(chain_id));
            }
        }
        Claimed::Busy(state.changes)
    }

    /// The guard of a right that was taken already.
    pub(super) fn claimed(&self, chain_id: &Digest) -> Claim {
        Claim { state: self.state.clone(), chain_id: chain_id.clone() }
    }

    /// Waits until something has changed since `claim` said Busy.
    pub fn changed(&self, seen: u64, cancel: &Cancel) -> Result<()> {
        self.state.wait(cancel, |state| (state.changes != seen).then_some(()))
    }

    /// One of the slots for making layers beyond one of each image. It comes before the claim: who waits for one keeps no layer from
    /// others.
    pub(super) fn slot(&self, cancel: &Cancel) -> Result<Taken> {
        self.slots.take(1, cancel)
    }

    /// Makes a layer in a place of its own: in parallel with any other, the one below it included. `open` gives the stream.
    pub fn make(&self, claim: Claim, wanted: &Wanted, cancel: &Cancel, open: impl FnOnce() -> Result<Stream>) -> Result<Made> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let temp = Temp(self.dir.join(format!("{}.tmp-{serial}", claim.chain_id.hex())));
        file::remove_tree(&temp.0)?;
        let diff = temp.0.join(DIFF);
        file::make_dir(&temp.0, 0o700)?;
        file::make_dir(&diff, 0o755)?;
        crash::step("pull:2-begun");
        let stream = open()?;
        let fault = stream.fault.clone();
        let unpacked = make::make(stream.reader, wanted, &temp.0, &self.limits, &self.room, cancel);
        // A fault goes unchanged: some errors are known to clients by their first word.
        let unpacked = match (unpacked, fault.lock().take()) {
            (Err(_), Some(fault)) => return Err(fault),
            (result, _) => result.context(|| format!("layer {}", wanted.digest.unwrap_or(wanted.diff_id)))?,
        };
        crash::step("pull:3-unpacked");
        let below = wanted.chain[..wanted.chain.len() - 1].to_vec();
        Ok(Made { temp, claim, diff_id: wanted.diff_id.clone(), below, unpacked })
    }

    /// Commits layers of one image, lowest first; those below them are committed. The files of all are brought to the disk by
    /// one call, and only then do the markers say that they are there.
    pub fn commit(&self, mut batch: Vec<Made>) -> Result<()> {
        for made in &mut batch {
            let parents: Vec<PathBuf> = made.below.iter().rev().map(|c| self.diff_dir(c)).collect();
            unpack::inherit(&made.temp.0.join(DIFF), &made.unpacked.implicit, &parents)?;
            let place = self.dir.join(made.claim.chain_id.hex());
            self.make_room(&made.claim.chain_id, &place)?;
            std::fs::rename(&made.temp.0, &place).context(|| format!("move layer to {}", place.display()))?;
            // Without a marker it is still half-made, and goes with `made`.
            made.temp.0 = place;
        }
        crash::step("pull:4-moved");
        let dir = std::fs::File::open(&self.dir).context(|| format!("open {}", self.dir.display()))?;
        rustix::fs::syncfs(&dir).context(|| format!("sync {}", self.dir.display()))?;
        crash::step("pull:5-synced");
        for mut made in batch {
            let marker = Marker {
                version: 1,
                chain_id: made.claim.chain_id.clone(),
                diff_id: made.diff_id.clone(),
                bytes: made.unpacked.bytes,
                inodes: made.unpacked.inodes,
                taped: made.unpacked.taped,
            };
            marker.write(&made.temp.0)?;
            made.temp.keep();
            telemetry::layer_unpacked(marker.bytes);
            self.state.change(|state| state.ready.insert(marker.chain_id.clone(), marker));
            crash::step("pull:6-committed");
        }
        Ok(())
    }

    /// Takes all layers that neither `used` nor a holder needs, for `remove`.
    pub(super) fn take_unneeded(&self, used: &HashSet<Digest>) -> Vec<Claim> {
        let goes: Vec<Digest> = self.state.change(|state| {
            let goes = state.unneeded(used);
            for chain_id in &goes {
                state.ready.remove(chain_id);
                state.busy.insert(chain_id.clone());
            }
            goes
        });
        goes.iter().map(|chain_id| self.claimed(chain_id)).collect()
    }

    /// Removes layers that were taken, and damaged ones that nobody needs. Gives back how many of the former there were; their files
    /// are deleted behind the caller's back, because a large layer can keep a slow disk busy for half a minute.
    pub(super) fn remove(&self, taken: Vec<Claim>) -> Result<usize> {
        let mut errors = ErrorList::default();
        let mut gone = self.useless_damaged();
        let count = taken.len();
        for claim in taken {
            let place = self.dir.join(claim.chain_id.hex());
            // The marker first: what a crash leaves is then half-made, not half-there.
            errors.keep(file::remove_file(&place.join(MARKER)));
            gone.extend(errors.keep(set_aside(&place)));
        }
        delete(gone);
        errors.finish().map(|()| count)
    }
}

/// The sole right to one layer; given back on drop.
pub struct Claim {
    state: Awaited<State>,
    chain_id: Digest,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.state.change(|state| {
            state.busy.remove(&self.chain_id);
            state.changes += 1;
        });
    }
}

/// A directory that goes when the work on it ends, one way or the other.
struct Temp(PathBuf);

impl Temp {
    fn keep(&mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if self.0.as_os_str().is_empty() {
            return;
        }
        if let Err(e) = file::remove_tree(&self.0) {
            log::error!("image: {e}");
        }
    }
}

/// Moves a layer's directory out of the way, to a name that is free.
pub(super) fn set_aside(place: &Path) -> Result<PathBuf> {
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if name.contains(GONE) {
        return Ok(place.to_owned());
    }
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let to = place.with_file_name(format!("{name}{GONE}{stamp}"));
    std::fs::rename(place, &to).context(|| format!("move {} aside", place.display()))?;
    Ok(to)
}

/// Deletes directories on a thread of its own. What a crash leaves is found by the next `open`.
pub(super) fn delete(gone: Vec<PathBuf>) {
    if gone.is_empty() {
        return;
    }
    let work = move || {
        for path in gone {
            if let Err(e) = file::remove_tree(&path) {
                log::error!("image: {e}");
            }
        }
    };
    if let Err(e) = thread::spawn("layer-gc", work) {
        log::error!("image: {e}; unused layers stay until the next start");
    }
}

pub(super) fn read_marker(dir: &Path) -> Result<Marker> {
    let path = dir.join(MARKER);
    let data = file::read(&path, 64 << 10)?;
    let marker: Marker = serde_json::from_slice(&data).context(|| format!("parse {}", path.display()))?;
    if marker.version != 1 || !dir.join("diff").is_dir() {
        return Err(Error::internal(format!("{}: not a layer of this version", dir.display())));
    }
    Ok(marker)
}

/// Waits until deletions in `dir` are done.
#[cfg(test)]
pub(super) fn settle(dir: &Path) {
    let going = || std::fs::read_dir(dir).unwrap().flatten().any(|e| e.file_name().to_string_lossy().contains(GONE));
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while going() {
        assert!(std::time::Instant::now() < end, "deletion does not end");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn limits() -> Limits {
        Limits { max_entries: 100, max_bytes: 1 << 20 }
    }

    fn open(dir: &Path) -> Layers {
        Layers::open(dir, limits(), Room::new(dir, 0), Slots::new(2)).unwrap()
    }

    fn layer(name: &str) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut h = tar::Header::new_gnu();
        h.set_size(3);
        h.set_mode(0o644);
        builder.append_data(&mut h, name, &b"abc"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn made(layers: &Layers, wanted: &Wanted, data: &[u8]) -> Result<Made> {
        let Claimed::Ours(0, claim) = layers.claim([(0, wanted.chain.last().unwrap())].into_iter()) else { panic!("there or busy") };
        let data = data.to_vec();
        layers.make(claim, wanted, &Cancel::never(), || Ok(Stream::new(std::io::Cursor::new(data))))
    }

    fn ensure(layers: &Layers, data: &[u8], diff_id: &Digest, digest: &Digest) -> Result<()> {
        let chain = [diff_id.clone()];
        let wanted = Wanted { diff_id, chain: &chain, digest: Some(digest), size: data.len() as u64 };
        made(layers, &wanted, data).and_then(|made| layers.commit(vec![made]))
    }

    #[test]
    fn made_once_held_and_collected() {
        let dir = tempfile::tempdir().unwrap();
        let layers = open(dir.path());
        let data = layer("a");
        let id = Digest::of(&data);
        ensure(&layers, &data, &id, &id).unwrap();
        let chain = [id.clone()];
        assert!(matches!(layers.claim([(7, &id)].into_iter()), Claimed::Here(7)));
        assert_eq!(std::fs::read(layers.diff_dir(&id).join("a")).unwrap(), b"abc");
        // The directory, the file and the tape.
        assert_eq!(layers.usage(), Usage { bytes: 3 * 4096, inodes: 3 });
        layers.hold_ready("c1", &chain).unwrap();
        assert_eq!(layers.remove(layers.take_unneeded(&HashSet::new())).unwrap(), 0);
        let again = open(dir.path());
        assert!(again.is_ready(&id));
        layers.release("c1");
        assert_eq!(layers.remove(layers.take_unneeded(&HashSet::new())).unwrap(), 1);
        assert!(layers.hold_ready("c1", &chain).is_err());
        settle(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_committed_on_a_mismatch() {
        let dir = tempfile::tempdir().unwrap();
        let layers = open(dir.path());
        let data = layer("a");
        let (id, other) = (Digest::of(&data), Digest::of(b"other"));
        let e = ensure(&layers, &data, &id, &other).unwrap_err();
        assert!(e.message().contains("received") && e.code() == Code::FailedPrecondition, "{e}");
        let e = ensure(&layers, &data, &other, &id).unwrap_err();
        assert!(e.message().contains("the image config says"), "{e}");
        let e = ensure(&layers, &data[..700], &id, &id).unwrap_err();
        assert!(e.message().contains("received"), "{e}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        ensure(&layers, &data, &id, &id).unwrap();
    }

    #[test]
    fn half_made_layers_go_at_open() {
        let dir = tempfile::tempdir().unwrap();
        let hex = Digest::of(b"x").hex().to_owned();
        for name in [hex.clone(), format!("{hex}.tmp-3"), "keep-me".to_owned()] {
            std::fs::create_dir_all(dir.path().join(name).join("diff")).unwrap();
        }
        open(dir.path());
        settle(dir.path());
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["keep-me"]);
    }

    #[test]
    fn implicit_directories_look_like_those_below() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let layers = open(dir.path());
        let mut builder = tar::Builder::new(Vec::new());
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(tar::EntryType::Directory);
        h.set_size(0);
        h.set_mode(0o1777);
        h.set_mtime(77);
        builder.append_data(&mut h, "tmp/", &b""[..]).unwrap();
        let (low, high) = (builder.into_inner().unwrap(), layer("tmp/a"));
        let diff = [Digest::of(&low), Digest::of(&high)];
        let chain = super::super::digest::chain_ids(&diff);
        // The upper one is made first: what it lacks is filled in at the commit.
        let make = |i: usize, data: &[u8]| {
            let wanted = Wanted { diff_id: &diff[i], chain: &chain[..=i], digest: None, size: data.len() as u64 };
            made(&layers, &wanted, data).unwrap()
        };
        let high = make(1, &high);
        let low = make(0, &low);
        layers.commit(vec![low, high]).unwrap();
        let meta = layers.diff_dir(&chain[1]).join("tmp").metadata().unwrap();
        assert_eq!(meta.permissions().mode() & 0o7777, 0o1777);
        assert_eq!(std::os::unix::fs::MetadataExt::mtime(&meta), 77);
    }

    #[test]
    fn who_finds_a_layer_busy_hears_of_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let layers = open(dir.path());
        let id = Digest::of(b"x");
        let Claimed::Ours(_, claim) = layers.claim([(0, &id)].into_iter()) else { panic!("nobody makes it") };
        let Claimed::Busy(seen) = layers.claim([(0, &id)].into_iter()) else { panic!("it is being made") };
        let soon = Cancel::never().within(std::time::Duration::from_millis(10));
        assert_eq!(layers.changed(seen, &soon).unwrap_err().code(), Code::DeadlineExceeded);
        drop(claim);
        layers.changed(seen, &Cancel::never()).unwrap();
        assert!(matches!(layers.claim([(0, &id)].into_iter()), Claimed::Ours(0, _)));
    }

    #[test]
    fn what_is_not_committed_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layers = open(dir.path());
        let (low, high) = (layer("a"), layer("b"));
        let diff = [Digest::of(&low), Digest::of(&high)];
        let chain = super::super::digest::chain_ids(&diff);
        let make = |i: usize, data: &[u8]| {
            let wanted = Wanted { diff_id: &diff[i], chain: &chain[..=i], digest: None, size: data.len() as u64 };
            made(&layers, &wanted, data).unwrap()
        };
        drop(make(0, &low));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let (low, high) = (make(0, &low), make(1, &high));
        // The upper one cannot be moved to its place: the lower one's files are there by then, and go too.
        std::fs::remove_dir_all(&high.temp.0).unwrap();
        layers.commit(vec![low, high]).unwrap_err();
        assert!(!layers.is_ready(&chain[0]) && !layers.is_ready(&chain[1]));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(matches!(layers.claim([(0, &chain[0])].into_iter()), Claimed::Ours(0, _)), "nobody has the right any more");
    }
}
