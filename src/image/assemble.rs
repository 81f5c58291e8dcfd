//! From the parts of an image to the image: layers made in parallel and committed in order, then the record. Pulls and imports
//! share it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::catalog::{Addition, Image};
use super::digest::{chain_ids, Digest};
use super::layers::{Claimed, Made, Stream};
use super::make::Wanted;
use super::manifest::{self, Descriptor};
use super::{Inner, Phase, Progress, Watch};
use crate::error::{Code, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::crash;
use crate::sys::lock::{Lock, Rank};
use crate::sys::thread;

/// Between two reports of one layer.
const REPORT: Duration = Duration::from_millis(100);

/// Opens the stream of a layer.
pub type OpenLayer = Arc<dyn Fn(&Descriptor) -> Result<Stream> + Send + Sync>;

/// An image in parts, manifest and config checked against their digests.
pub struct Parts {
    pub manifest: Descriptor,
    pub manifest_data: Vec<u8>,
    pub config_data: Vec<u8>,
    pub layers: Vec<Descriptor>,
    /// False where a layer's descriptor has the diff ID for want of the digest of its stream.
    pub layers_have_digests: bool,
    pub names: Vec<String>,
}

/// What the workers share.
struct Job {
    inner: Arc<Inner>,
    layers: Vec<Descriptor>,
    have_digests: bool,
    diff_ids: Vec<Digest>,
    chain: Vec<Digest>,
    open: OpenLayer,
    cancel: Cancel,
    /// For helpers' waits for a slot: set when no layer is left to begin with.
    help: Cancel,
    watch: Option<Watch>,
    /// Below the layer store's own lock.
    work: Lock<Work>,
}

/// How far the layers are.
struct Work {
    /// Layers nobody of us has begun with, lowest first.
    left: Vec<usize>,
    /// Layers that wait for those below: None for one that was there.
    made: BTreeMap<usize, Option<Made>>,
    /// The lowest layer that is not committed.
    next: usize,
    committing: bool,
    error: Option<Error>,
}

/// Keeps the layers of a pull under way from being collected.
struct Lease<'a> {
    inner: &'a Inner,
    holder: String,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.inner.layers.release(&self.holder);
    }
}

/// Makes the layers that are missing and records the image. `cancel` must be this image's alone: the first failure sets it
/// to stop the other layers.
pub(super) fn assemble(inner: &Arc<Inner>, parts: Parts, open: OpenLayer, cancel: &Cancel, watch: Option<Watch>) -> Result<Arc<Image>> {
    let limit = inner.bounds.max_layers;
    if parts.layers.len() > limit {
        return Err(Error::new(Code::ResourceExhausted, format!("{} layers, at most {limit} are allowed", parts.layers.len())));
    }
    let (config, diff_ids) = manifest::parse_config(&parts.config_data, parts.layers.len())?;
    if !inner.platform.runs(&config) {
        let id = Digest::of(&parts.config_data);
        log::warn!("image: {id} says that it is for {}/{}, this host is {}", config.os(), config.architecture(), inner.platform);
    }
    let chain = chain_ids(&diff_ids);
    let lease = Lease { inner, holder: format!("pull/{}", inner.serial.fetch_add(1, Ordering::Relaxed)) };
    inner.layers.hold(&lease.holder, &chain);
    let missing: Vec<u64> =
        chain.iter().zip(&parts.layers).filter(|(c, _)| !inner.layers.is_ready(c)).map(|(_, layer)| layer.size).collect();
    // Unpacked they are larger: what cannot even hold them as they come is not begun with.
    let bytes = missing.iter().fold(0u64, |sum, size| sum.saturating_add(*size));
    if bytes > 0 {
        inner.layers.room.check(bytes)?;
    }
    let job = Arc::new(Job {
        inner: inner.clone(),
        work: Lock::new(
            Rank::Status,
            Work { left: (0..parts.layers.len()).collect(), made: BTreeMap::new(), next: 0, committing: false, error: None },
        ),
        layers: parts.layers,
        have_digests: parts.layers_have_digests,
        diff_ids,
        chain,
        open,
        cancel: cancel.clone(),
        help: cancel.part(),
        watch,
    });
    for i in 0..job.layers.len() {
        job.report(i, Phase::Waiting, 0);
    }
    let mut threads = Vec::new();
    for i in 1..missing.len().min(inner.bounds.layer_workers) {
        let job = job.clone();
        // One worker does it too.
        threads.extend(thread::spawn(&format!("layer-{i}"), move || job.work(false)).inspect_err(|e| log::warn!("image: {e}")));
    }
    job.work(true);
    for thread in threads {
        if thread.join().is_err() {
            job.fail(Error::internal("a layer's thread panicked"));
        }
    }
    let (error, unfinished) = {
        let mut work = job.work.lock();
        (work.error.take(), std::mem::take(&mut work.made))
    };
    // Their files go before anybody hears of the end.
    drop(unfinished);
    if let Some(error) = error {
        return Err(error);
    }
    cancel.check()?;
    crash::step("pull:7-layers");
    let addition =
        Addition { manifest: &parts.manifest, manifest_data: &parts.manifest_data, config_data: &parts.config_data, names: &parts.names };
    inner.catalog.add(&addition, &inner.layers)
}

impl Job {
    /// Takes layers, the lowest that is free first, until none is left. `first`: the worker that every image has, whatever others fetch
    /// from slow registries; the rest of them helps with the slots of all images.
    fn work(&self, first: bool) {
        loop {
            match self.step(first) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => return self.fail(e),
            }
        }
    }

    /// One layer; false when there is none left to begin with.
    fn step(&self, first: bool) -> Result<bool> {
        let (i, claim, slot) = loop {
            self.cancel.check()?;
            let slot = match (!first).then(|| self.inner.layers.slot(&self.help)).transpose() {
                Ok(slot) => slot,
                Err(_) if self.work.lock().left.is_empty() => return Ok(false),
                Err(e) => return Err(e),
            };
            let claimed = {
                let mut work = self.work.lock();
                if work.left.is_empty() {
                    return Ok(false);
                }
                let claimed = self.inner.layers.claim(work.left.iter().map(|i| (*i, &self.chain[*i])));
                if let Claimed::Here(i) | Claimed::Ours(i, _) = &claimed {
                    work.left.retain(|left| left != i);
                }
                claimed
            };
            match claimed {
                Claimed::Here(i) => break (i, None, slot),
                Claimed::Ours(i, claim) => break (i, Some(claim), slot),
                // Other pulls make what is left.
                Claimed::Busy(seen) => {
                    drop(slot);
                    self.inner.layers.changed(seen, &self.cancel)?;
                }
            }
        };
        if self.work.lock().left.is_empty() {
            self.help.set();
        }
        let make = |claim| {
            self.report(i, Phase::Downloading, 0);
            self.inner.layers.make(claim, &self.wanted(i), &self.cancel, || self.open(i))
        };
        let phase = if claim.is_some() { Phase::Done } else { Phase::Exists };
        let made = claim.map(make).transpose()?;
        drop(slot);
        self.work.lock().made.insert(i, made);
        self.commit()?;
        self.report(i, phase, self.layers[i].size);
        Ok(true)
    }

    /// Commits what has all layers below it committed, unless another worker is at it, who will then see this too.
    fn commit(&self) -> Result<()> {
        loop {
            let mut batch = Vec::new();
            {
                let mut work = self.work.lock();
                if work.committing || work.error.is_some() {
                    return Ok(());
                }
                let first = work.next;
                loop {
                    let next = work.next;
                    let Some(made) = work.made.remove(&next) else { break };
                    batch.extend(made);
                    work.next += 1;
                }
                if work.next == first {
                    return Ok(());
                }
                work.committing = true;
            }
            let committed = self.inner.layers.commit(batch);
            self.work.lock().committing = false;
            committed?;
        }
    }

    /// Keeps the first error and stops the others, whose own errors follow from it.
    fn fail(&self, error: Error) {
        self.work.lock().error.get_or_insert(error);
        self.cancel.set();
    }

    fn wanted(&self, i: usize) -> Wanted<'_> {
        Wanted {
            diff_id: &self.diff_ids[i],
            chain: &self.chain[..=i],
            digest: Some(&self.layers[i].digest).filter(|_| self.have_digests),
            size: self.layers[i].size,
        }
    }

    fn open(&self, i: usize) -> Result<Stream> {
        let mut stream = (self.open)(&self.layers[i])?;
        if let Some(watch) = &self.watch {
            let (tell, start) = (watch.clone(), self.progress(i, Phase::Retrying, 0));
            stream.breaks.on_break(move |received| tell(&Progress { done: received.min(start.total), ..start.clone() }));
            let progress = self.progress(i, Phase::Downloading, 0);
            stream.reader = Box::new(Meter { inner: stream.reader, progress, watch: watch.clone(), last: None });
        }
        Ok(stream)
    }

    fn progress(&self, i: usize, phase: Phase, done: u64) -> Progress {
        let descriptor = &self.layers[i];
        Progress { place: i, layer: descriptor.digest.to_string(), phase, done, total: descriptor.size }
    }

    fn report(&self, i: usize, phase: Phase, done: u64) {
        if let Some(watch) = &self.watch {
            watch(&self.progress(i, phase, done));
        }
    }
}

/// Reports what is read through it, not too often.
struct Meter {
    inner: Box<dyn std::io::Read + Send>,
    progress: Progress,
    watch: Watch,
    last: Option<Instant>,
}

impl std::io::Read for Meter {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.progress.done += n as u64;
        let received = n == 0 || self.progress.done == self.progress.total;
        if received && self.progress.phase != Phase::Unpacking {
            self.progress.phase = Phase::Unpacking;
            (self.watch)(&self.progress);
        } else if !received && self.last.is_none_or(|t| t.elapsed() >= REPORT) {
            self.last = Some(Instant::now());
            (self.watch)(&self.progress);
        }
        Ok(n)
    }
}
