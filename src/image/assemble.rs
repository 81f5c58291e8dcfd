//! From the parts of an image to the image: layers made in parallel, then the record. Pulls and imports share it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::catalog::{Addition, Image};
use super::digest::{chain_ids, Digest};
use super::layers::{Stream, Wanted};
use super::manifest::{self, Descriptor};
use super::{Inner, Phase, Progress, Watch};
use crate::error::{Code, Error, Result};
use crate::sys::cancel::Cancel;
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
    next: AtomicUsize,
    open: OpenLayer,
    cancel: Cancel,
    watch: Option<Watch>,
    error: Lock<Option<Error>>,
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
    let (_, diff_ids) = manifest::parse_config(&parts.config_data, parts.layers.len(), &inner.platform)?;
    let chain = chain_ids(&diff_ids);
    let lease = Lease { inner, holder: format!("pull/{}", inner.serial.fetch_add(1, Ordering::Relaxed)) };
    inner.layers.hold(&lease.holder, &chain);
    let missing = chain.iter().filter(|c| !inner.layers.is_ready(c)).count();
    let job = Arc::new(Job {
        inner: inner.clone(),
        layers: parts.layers,
        have_digests: parts.layers_have_digests,
        diff_ids,
        chain,
        next: AtomicUsize::new(0),
        open,
        cancel: cancel.clone(),
        watch,
        error: Lock::new(Rank::Leaf, None),
    });
    for i in 0..job.layers.len() {
        job.report(i, Phase::Waiting, 0);
    }
    let mut threads = Vec::new();
    for i in 1..missing.min(inner.bounds.layer_workers) {
        let job = job.clone();
        threads.push(thread::spawn(&format!("layer-{i}"), move || job.work())?);
    }
    job.work();
    for thread in threads {
        if thread.join().is_err() {
            job.fail(Error::internal("a layer's thread panicked"));
        }
    }
    if let Some(error) = job.error.lock().take() {
        return Err(error);
    }
    cancel.check()?;
    let addition =
        Addition { manifest: &parts.manifest, manifest_data: &parts.manifest_data, config_data: &parts.config_data, names: &parts.names };
    inner.catalog.add(&addition, &inner.layers)
}

impl Job {
    /// Takes layers, lowest first, until none is left.
    fn work(&self) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.layers.len() || self.cancel.is_cancelled() {
                return;
            }
            if let Err(e) = self.layer(i) {
                self.fail(e);
            }
        }
    }

    /// Keeps the first error and stops the others, whose own errors follow from it.
    fn fail(&self, error: Error) {
        {
            let mut first = self.error.lock();
            if first.is_none() {
                *first = Some(error);
            }
        }
        self.cancel.set();
    }

    fn layer(&self, i: usize) -> Result<()> {
        let descriptor = &self.layers[i];
        let wanted = Wanted {
            diff_id: &self.diff_ids[i],
            chain: &self.chain[..=i],
            digest: Some(&descriptor.digest).filter(|_| self.have_digests),
            size: descriptor.size,
        };
        let mut made = false;
        self.inner.layers.ensure(&wanted, &self.cancel, || {
            made = true;
            self.report(i, Phase::Downloading, 0);
            let mut stream = (self.open)(descriptor)?;
            if let Some(watch) = &self.watch {
                let (tell, start) = (watch.clone(), self.progress(i, Phase::Retrying, 0));
                stream.breaks.on_break(move |received| tell(&Progress { done: received.min(start.total), ..start.clone() }));
                let progress = self.progress(i, Phase::Downloading, 0);
                stream.reader = Box::new(Meter { inner: stream.reader, progress, watch: watch.clone(), last: None });
            }
            Ok(stream)
        })?;
        self.report(i, if made { Phase::Done } else { Phase::Exists }, descriptor.size);
        Ok(())
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
