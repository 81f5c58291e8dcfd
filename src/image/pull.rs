//! PullImage: from a reference to the parts of an image in a registry.

use std::sync::Arc;

use super::assemble::{assemble, Parts};
use super::auth::Auth;
use super::catalog::Image;
use super::manifest::{self, Descriptor, Document, OCI_MANIFEST};
use super::reference::{Reference, Version};
use super::{Inner, Watch};
use crate::error::{Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::crash;

/// Indexes inside of indexes.
const DEPTH: usize = 4;

/// Pulls one image. The digest under which it is recorded is the one the reference led to, an index's included.
pub(super) fn pull(inner: &Arc<Inner>, reference: &Reference, auth: &Auth, cancel: &Cancel, watch: Watch) -> Result<Arc<Image>> {
    let remote = Arc::new(inner.client.remote(reference, auth, cancel)?);
    let limit = inner.bounds.max_manifest_bytes;
    let mut fetched = remote.manifest(reference.version_text(), limit, cancel)?;
    let top = fetched.digest.clone();
    let mut depth = 0;
    let manifest = loop {
        match manifest::parse(&fetched.data, &fetched.media_type).context(|| reference.to_string())? {
            Document::Manifest(manifest) => break manifest,
            Document::Index(_) if depth == DEPTH => return Err(Error::precondition(format!("{reference}: indexes nested too deep"))),
            Document::Index(entries) => {
                let entry = manifest::choose(&entries, &inner.platform).context(|| reference.to_string())?;
                fetched = remote.manifest(entry.digest.as_str(), limit, cancel)?;
                if fetched.data.len() as u64 != entry.size {
                    let words =
                        format!("{reference}: manifest {} has {} bytes, the index says {}", entry.digest, fetched.data.len(), entry.size);
                    return Err(Error::precondition(words));
                }
                depth += 1;
            }
        }
    };
    crash::step("pull:1-manifest");
    let config_data = remote.blob(&manifest.config, inner.bounds.max_config_bytes, cancel)?;
    let mut names = vec![reference.with_digest(&top).to_string()];
    if let Version::Tag(_) = reference.version() {
        names.push(reference.to_string());
    }
    let media_type = if fetched.media_type.is_empty() { OCI_MANIFEST } else { &fetched.media_type };
    let parts = Parts {
        manifest: Descriptor::new(media_type, fetched.digest, fetched.data.len() as u64),
        manifest_data: fetched.data,
        config_data,
        layers: manifest.layers,
        layers_have_digests: true,
        names,
    };
    let stop = cancel.clone();
    let open = move |layer: &Descriptor| remote.layer(layer, &stop);
    let image = assemble(inner, parts, Arc::new(open), cancel, Some(watch))?;
    crash::step("pull:8-recorded");
    Ok(image)
}
