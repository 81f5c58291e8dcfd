//! PullImage: from a reference to the parts of an image in a registry.

use std::sync::Arc;

use super::assemble::{assemble, Parts};
use super::auth::Auth;
use super::catalog::Image;
use super::manifest::{self, Descriptor, Document, OCI_MANIFEST};
use super::reference::{Reference, Version};
use super::registry::Remote;
use super::{Inner, Watch};
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::crash;

/// Indexes inside of indexes.
const DEPTH: usize = 4;

/// Pulls one image. The digest under which it is recorded is the one the reference led to, an index's included. What a mirror
/// brought may be wrong in ways that only show at the end of a layer: then the registry itself is asked for all that is missing.
pub(super) fn pull(inner: &Arc<Inner>, reference: &Reference, auth: &Auth, cancel: &Cancel, watch: Watch) -> Result<Arc<Image>> {
    let attempt = cancel.part();
    let remote = Arc::new(inner.client.remote(reference, auth, &attempt)?);
    let failed = match once(inner, reference, &remote, &attempt, watch.clone()) {
        Err(e) if e.code() == Code::FailedPrecondition && remote.used_mirror() => e,
        result => return result,
    };
    cancel.check()?;
    log::warn!("image: {failed}; once more without mirrors");
    let attempt = cancel.part();
    let Some(remote) = inner.client.remote(reference, auth, &attempt)?.without_mirrors() else { return Err(failed) };
    once(inner, reference, &Arc::new(remote), &attempt, watch)
}

fn once(inner: &Arc<Inner>, reference: &Reference, remote: &Arc<Remote>, cancel: &Cancel, watch: Watch) -> Result<Arc<Image>> {
    let limit = inner.bounds.max_manifest_bytes;
    let mut fetched = remote.manifest(reference.version_text(), limit)?;
    let top = fetched.digest.clone();
    inner.verifiers.admit(&reference.to_string(), &Descriptor::new(&fetched.media_type, top.clone(), fetched.data.len() as u64), cancel)?;
    let mut depth = 0;
    let manifest = loop {
        match manifest::parse(&fetched.data, &fetched.media_type).context(|| reference.to_string())? {
            Document::Manifest(manifest) => break manifest,
            Document::Index(_) if depth == DEPTH => return Err(Error::precondition(format!("{reference}: indexes nested too deep"))),
            Document::Index(entries) => {
                let entry = manifest::choose(&entries, &inner.platform).context(|| reference.to_string())?;
                fetched = remote.manifest(entry.digest.as_str(), limit)?;
                if fetched.data.len() as u64 != entry.size {
                    let words =
                        format!("{reference}: manifest {} has {} bytes, the index says {}", entry.digest, fetched.data.len(), entry.size);
                    return Err(Error::precondition(words));
                }
                depth += 1;
            }
        }
    };
    if let Some(layer) = manifest.layers.iter().find(|layer| layer.is_foreign() && !inner.client.foreign_layers()) {
        let words =
            format!("{reference}: layer {} is foreign: it lives at other addresses, which images.foreign_layers allows", layer.digest);
        return Err(Error::precondition(words));
    }
    crash::step("pull:1-manifest");
    let config_data = remote.blob(&manifest.config, inner.bounds.max_config_bytes)?;
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
    let remote = remote.clone();
    let open = move |layer: &Descriptor| remote.layer(layer);
    let image = assemble(inner, parts, Arc::new(open), cancel, Some(watch))?;
    crash::step("pull:8-recorded");
    Ok(image)
}
