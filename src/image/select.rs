//! From a manifest or index to the one image in it that is for a platform, however its documents are read.

use super::digest::Digest;
use super::manifest::{self, Descriptor, Document, Manifest};
use super::platform::Platform;
use crate::error::{Code, Error, Result};

/// Indexes inside of indexes.
const DEPTH: usize = 4;
/// Documents that are read for one image.
const DOCUMENTS: usize = 32;
/// Bytes of a config that is read for its platform alone.
const CONFIG_LIMIT: u64 = 4 << 20;

/// A document as it came.
pub struct Read {
    pub data: Vec<u8>,
    pub digest: Digest,
    /// As announced; may be anything.
    pub media_type: String,
}

/// The manifest that was chosen.
pub struct Selected {
    pub read: Read,
    pub manifest: Manifest,
}

/// Where documents come from. What they give has the descriptor's digest.
pub trait Documents {
    fn document(&self, descriptor: &Descriptor) -> Result<Read>;
    fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>>;
}

/// The manifest for `platform` in `top`, which is that manifest itself or an index. An index says which of its entries is for
/// which platform; where it does not, the configs are asked. Nobody asks a manifest that is the only choice: images with a wrong
/// or foreign platform in their config run elsewhere too, with an emulator or as a volume.
pub fn select(from: &dyn Documents, top: Read, platform: &Platform) -> Result<Selected> {
    Search { from, platform, left: DOCUMENTS }.search(top, 0)
}

struct Search<'a> {
    from: &'a dyn Documents,
    platform: &'a Platform,
    left: usize,
}

impl Search<'_> {
    fn search(&mut self, read: Read, depth: usize) -> Result<Selected> {
        let entries = match manifest::parse(&read.data, &read.media_type)? {
            Document::Manifest(manifest) => return Ok(Selected { read, manifest }),
            Document::Index(_) if depth == DEPTH => return Err(Error::precondition("indexes nested too deep")),
            Document::Index(entries) => entries,
        };
        let candidates = manifest::candidates(&entries, self.platform)?;
        let many = candidates.len() > 1;
        let mut first = None;
        for entry in candidates {
            match self.enter(entry, depth, many) {
                // What cannot be had just now is no reason to take another.
                Err(e) if many && matches!(e.code(), Code::NotFound | Code::FailedPrecondition) => {
                    log::debug!("image: {}: {e}", entry.digest);
                    first.get_or_insert(e);
                }
                result => return result,
            }
        }
        Err(first.unwrap_or_else(|| Error::not_found("an index without entries")))
    }

    /// One entry; `ask` its config whether it is for the platform.
    fn enter(&mut self, entry: &Descriptor, depth: usize, ask: bool) -> Result<Selected> {
        self.left =
            self.left.checked_sub(1).ok_or_else(|| Error::precondition(format!("more than {DOCUMENTS} documents for one image")))?;
        let read = self.from.document(entry)?;
        if read.data.len() as u64 != entry.size {
            let words = format!("manifest {} has {} bytes, the index says {}", entry.digest, read.data.len(), entry.size);
            return Err(Error::precondition(words));
        }
        let selected = self.search(read, depth + 1)?;
        if ask {
            if selected.manifest.config.size > CONFIG_LIMIT {
                return Err(Error::precondition(format!("config {}: too large", selected.manifest.config.digest)));
            }
            let data = self.from.config(&selected.manifest.config)?;
            let (config, _) = manifest::parse_config(&data, selected.manifest.layers.len())?;
            if !self.platform.runs(&config) {
                let words = format!("no image for {}: one is for {}/{}", self.platform, config.os(), config.architecture());
                return Err(Error::not_found(words));
            }
        }
        Ok(selected)
    }
}
