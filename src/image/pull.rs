//! PullImage: from a reference to the parts of an image in a registry.

use std::sync::Arc;

use super::assemble::{assemble, Parts};
use super::auth::Auth;
use super::catalog::Image;
use super::manifest::{self, Descriptor};
use super::reference::{Reference, Version};
use super::registry::Remote;
use super::select::{select, Documents, Read, Selected};
use super::{Inner, Watch};
use crate::error::{Code, Context, Result};
use crate::sys::cancel::Cancel;
use crate::sys::crash;

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
    let source = Registry { remote, manifest_limit: inner.bounds.max_manifest_bytes, config_limit: inner.bounds.max_config_bytes };
    let read = source.read(reference.version_text())?;
    let top = read.digest.clone();
    let descriptor = Descriptor::new(&manifest::media_type(&read.data, &read.media_type), top.clone(), read.data.len() as u64);
    inner.verifiers.admit(&reference.to_string(), &descriptor, cancel)?;
    let Selected { read, manifest } = select(&source, read, &inner.platform).context(|| reference.to_string())?;
    crash::step("pull:1-manifest");
    let config_data = source.config(&manifest.config)?;
    let mut names = vec![reference.with_digest(&top).to_string()];
    if let Version::Tag(_) = reference.version() {
        names.push(reference.to_string());
    }
    let media_type = manifest::media_type(&read.data, &read.media_type);
    let parts = Parts {
        manifest: Descriptor::new(&media_type, read.digest, read.data.len() as u64),
        manifest_data: read.data,
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

/// A repository, and how much of it is read at once.
struct Registry<'a> {
    remote: &'a Remote,
    manifest_limit: u64,
    config_limit: u64,
}

impl Registry<'_> {
    fn read(&self, version: &str) -> Result<Read> {
        let fetched = self.remote.manifest(version, self.manifest_limit)?;
        Ok(Read { data: fetched.data, digest: fetched.digest, media_type: fetched.media_type })
    }
}

impl Documents for Registry<'_> {
    fn document(&self, descriptor: &Descriptor) -> Result<Read> {
        self.read(descriptor.digest.as_str())
    }

    fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        self.remote.blob(descriptor, self.config_limit)
    }
}
