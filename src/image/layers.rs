//! Unpacked layers on disk: `root/layers/<chain id>/diff` with the marker `layer.json` written last and fsynced. Each
//! chain ID is made once at a time, whoever asks for it; a layer without its marker is as good as none.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Condvar;
use serde::{Deserialize, Serialize};

use super::damage::Damaged;
use super::decompress::Decompress;
use super::digest::{is_hex, Digest, Verifier};
use super::unpack::{self, Limits, Unpacked};
use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file::{self, Durability};
use crate::sys::lock::{Lock, Rank};
use crate::sys::thread;
use crate::telemetry;

pub(super) const MARKER: &str = "layer.json";
/// Beside the marker: see `tape`.
pub(super) const TAPE: &str = "tape";
/// In the name of a directory that is being deleted.
const GONE: &str = ".gone-";
/// Between looks at cancellation while another pull makes the layer we want.
const LOOK: Duration = Duration::from_millis(100);

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
}

/// The layer store.
pub struct Layers {
    pub(super) dir: PathBuf,
    limits: Limits,
    serial: AtomicU64,
    pub(super) state: Lock<State>,
    changed: Condvar,
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

/// A layer to make: its place in the chain and how its stream must turn out.
pub struct Wanted<'a> {
    pub diff_id: &'a Digest,
    /// Chain IDs from the lowest layer to this one.
    pub chain: &'a [Digest],
    /// Digest of the stream as it comes; None where only the diff ID is known.
    pub digest: Option<&'a Digest>,
    /// Bytes of the stream as it comes.
    pub size: u64,
}

impl Layers {
    /// Opens the store: finds finished layers, removes half-made ones. Whatever is not ours is left alone.
    pub fn open(dir: &Path, limits: Limits) -> Result<Layers> {
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
        Ok(Layers { dir: dir.to_owned(), limits, serial: AtomicU64::new(0), state: Lock::new(Rank::Leaf, state), changed: Condvar::new() })
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
        let state = self.state.lock();
        let held: HashSet<&Digest> = state.holds.values().flatten().collect();
        let free = |c: &&Digest| !used.contains(*c) && !held.contains(*c) && !state.busy.contains(*c);
        state.ready.keys().filter(free).cloned().collect()
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

    /// Makes one layer unless it is there. `open` gives the stream; it is called at most once, and not at all when
    /// somebody else makes the layer meanwhile. Waits for the layer below before it commits.
    pub fn ensure(&self, wanted: &Wanted, cancel: &Cancel, open: impl FnOnce() -> Result<Stream>) -> Result<()> {
        let Some(chain_id) = wanted.chain.last() else { return Err(Error::internal("a layer without a chain ID")) };
        let Some(_claim) = self.claim(chain_id, cancel)? else { return Ok(()) };
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let temp = Temp(self.dir.join(format!("{}.tmp-{serial}", chain_id.hex())));
        file::remove_tree(&temp.0)?;
        let diff = temp.0.join("diff");
        file::make_dir(&temp.0, 0o700)?;
        file::make_dir(&diff, 0o755)?;
        let stream = open()?;
        let fault = stream.fault.clone();
        let unpacked = self.stream(wanted, stream.reader, &diff, cancel);
        // A fault goes unchanged: some errors are known to clients by their first word.
        let unpacked = match (unpacked, fault.lock().take()) {
            (Err(_), Some(fault)) => return Err(fault),
            (result, _) => result.context(|| format!("layer {}", wanted.digest.unwrap_or(wanted.diff_id)))?,
        };
        let below = &wanted.chain[..wanted.chain.len() - 1];
        if let Some(parent) = below.last() {
            self.await_ready(parent, cancel)?;
        }
        self.commit(wanted, chain_id, below, &unpacked, &temp.0)
    }

    /// Downloads, verifies, decompresses, verifies, unpacks: all in one pass.
    fn stream(&self, wanted: &Wanted, stream: Box<dyn Read + Send>, diff: &Path, cancel: &Cancel) -> Result<Unpacked> {
        let fault = |e: Error| e.with_code(crate::error::Code::FailedPrecondition);
        let mut blob = Verifier::new(stream, wanted.size);
        // Headers and padding come on top of the files' bytes, never more than twice as much in earnest.
        let bound = self.limits.max_bytes.saturating_mul(2).saturating_add(64 << 20);
        let result = (|| {
            let mut plain = Verifier::new(Decompress::new(&mut blob).context(|| "decompress").map_err(fault)?, bound);
            let unpacked = unpack::unpack(&mut plain, diff, &diff.with_file_name(TAPE), &self.limits, cancel)?;
            let (diff_id, _) = plain.finish().context(|| "decompress").map_err(fault)?;
            if diff_id != *wanted.diff_id {
                return Err(Error::precondition(format!("content is {diff_id}, the image config says {}", wanted.diff_id)));
            }
            Ok(unpacked)
        })();
        if cancel.is_cancelled() {
            cancel.check()?;
        }
        // Of a stream that could not be used, the digest says whether the image is bad or the transfer was.
        match (blob.finish(), wanted.digest) {
            (Ok((digest, size)), Some(want)) if digest != *want || size != wanted.size => {
                Err(Error::precondition(format!("received {digest} ({size} bytes), want {want} ({} bytes)", wanted.size)))
            }
            (Err(e), _) if result.is_ok() => Err(e).context(|| "read to the end").map_err(fault),
            _ => result,
        }
    }

    fn commit(&self, wanted: &Wanted, chain_id: &Digest, below: &[Digest], unpacked: &Unpacked, temp: &Path) -> Result<()> {
        let parents: Vec<PathBuf> = below.iter().rev().map(|c| self.diff_dir(c)).collect();
        if !parents.is_empty() {
            unpack::inherit(&temp.join("diff"), &unpacked.implicit, &parents)?;
        }
        let place = self.dir.join(chain_id.hex());
        self.make_room(chain_id, &place)?;
        std::fs::rename(temp, &place).context(|| format!("move layer to {}", place.display()))?;
        // The files must be on disk before the marker says so: one call for them all.
        let dir = std::fs::File::open(&self.dir).context(|| format!("open {}", self.dir.display()))?;
        rustix::fs::syncfs(&dir).context(|| format!("sync {}", self.dir.display()))?;
        let marker = Marker {
            version: 1,
            chain_id: chain_id.clone(),
            diff_id: wanted.diff_id.clone(),
            bytes: unpacked.bytes,
            inodes: unpacked.inodes,
            taped: unpacked.taped,
        };
        marker.write(&place)?;
        telemetry::layer_unpacked(unpacked.bytes);
        self.state.lock().ready.insert(chain_id.clone(), marker);
        self.changed.notify_all();
        Ok(())
    }

    /// Takes the sole right to make a layer; None when it is there. Waits while another has the right.
    pub(super) fn claim(&self, chain_id: &Digest, cancel: &Cancel) -> Result<Option<Claim<'_>>> {
        let mut state = self.state.lock();
        loop {
            cancel.check()?;
            if state.ready.contains_key(chain_id) {
                return Ok(None);
            }
            if state.busy.insert(chain_id.clone()) {
                return Ok(Some(Claim { layers: self, chain_id: chain_id.clone() }));
            }
            state.wait_for(&self.changed, LOOK);
        }
    }

    /// The guard of a right that was taken already.
    pub(super) fn claimed(&self, chain_id: &Digest) -> Claim<'_> {
        Claim { layers: self, chain_id: chain_id.clone() }
    }

    /// Waits for a layer that another worker of the same pull takes care of.
    fn await_ready(&self, chain_id: &Digest, cancel: &Cancel) -> Result<()> {
        let mut state = self.state.lock();
        while !state.ready.contains_key(chain_id) {
            cancel.check()?;
            state.wait_for(&self.changed, LOOK);
        }
        Ok(())
    }

    /// Removes all layers that neither `used` nor a holder needs. Gives back how many went; their files are deleted behind
    /// the caller's back, because a large layer can keep a slow disk busy for half a minute.
    pub fn collect(&self, used: &HashSet<Digest>) -> Result<usize> {
        let goes: Vec<Digest> = {
            let mut state = self.state.lock();
            let held: HashSet<&Digest> = state.holds.values().flatten().collect();
            let free = |c: &&Digest| !used.contains(*c) && !held.contains(*c) && !state.busy.contains(*c);
            let goes: Vec<Digest> = state.ready.keys().filter(free).cloned().collect();
            for chain_id in &goes {
                state.ready.remove(chain_id);
                state.busy.insert(chain_id.clone());
            }
            goes
        };
        let mut errors = ErrorList::default();
        let mut gone = self.useless_damaged();
        for chain_id in &goes {
            let _claim = Claim { layers: self, chain_id: chain_id.clone() };
            let place = self.dir.join(chain_id.hex());
            // The marker first: what a crash leaves is then half-made, not half-there.
            errors.keep(file::remove_file(&place.join(MARKER)));
            gone.extend(errors.keep(set_aside(&place)));
        }
        delete(gone);
        errors.finish().map(|()| goes.len())
    }
}

/// The sole right to one layer; given back on drop.
pub(super) struct Claim<'a> {
    layers: &'a Layers,
    chain_id: Digest,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.layers.state.lock().busy.remove(&self.chain_id);
        self.layers.changed.notify_all();
    }
}

/// A directory that goes when the work on it ends, one way or the other.
struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
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
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while going() {
        assert!(std::time::Instant::now() < end, "deletion does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn limits() -> Limits {
        Limits { max_entries: 100, max_bytes: 1 << 20 }
    }

    fn layer(name: &str) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut h = tar::Header::new_gnu();
        h.set_size(3);
        h.set_mode(0o644);
        builder.append_data(&mut h, name, &b"abc"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn ensure(layers: &Layers, data: &[u8], diff_id: &Digest, digest: &Digest) -> Result<()> {
        let chain = [diff_id.clone()];
        let wanted = Wanted { diff_id, chain: &chain, digest: Some(digest), size: data.len() as u64 };
        let data = data.to_vec();
        layers.ensure(&wanted, &Cancel::never(), || Ok(Stream::new(std::io::Cursor::new(data))))
    }

    #[test]
    fn made_once_held_and_collected() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path(), limits()).unwrap();
        let data = layer("a");
        let id = Digest::of(&data);
        ensure(&layers, &data, &id, &id).unwrap();
        let chain = [id.clone()];
        let wanted = Wanted { diff_id: &id, chain: &chain, digest: None, size: 0 };
        layers.ensure(&wanted, &Cancel::never(), || panic!("opened again")).unwrap();
        assert_eq!(std::fs::read(layers.diff_dir(&id).join("a")).unwrap(), b"abc");
        // The directory, the file and the tape.
        assert_eq!(layers.usage(), Usage { bytes: 3 * 4096, inodes: 3 });
        layers.hold_ready("c1", &chain).unwrap();
        assert_eq!(layers.collect(&HashSet::new()).unwrap(), 0);
        let again = Layers::open(dir.path(), limits()).unwrap();
        assert!(again.is_ready(&id));
        layers.release("c1");
        assert_eq!(layers.collect(&HashSet::new()).unwrap(), 1);
        assert!(layers.hold_ready("c1", &chain).is_err());
        settle(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_committed_on_a_mismatch() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path(), limits()).unwrap();
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
        Layers::open(dir.path(), limits()).unwrap();
        settle(dir.path());
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["keep-me"]);
    }

    #[test]
    fn implicit_directories_look_like_those_below() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path(), limits()).unwrap();
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
        for (i, data) in [low, high].into_iter().enumerate() {
            let wanted = Wanted { diff_id: &diff[i], chain: &chain[..=i], digest: None, size: data.len() as u64 };
            layers.ensure(&wanted, &Cancel::never(), || Ok(Stream::new(std::io::Cursor::new(data)))).unwrap();
        }
        let meta = layers.diff_dir(&chain[1]).join("tmp").metadata().unwrap();
        assert_eq!(meta.permissions().mode() & 0o7777, 0o1777);
        assert_eq!(std::os::unix::fs::MetadataExt::mtime(&meta), 77);
    }
}
