//! Our own service: import, pull with progress, facts of the daemon.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::convert::lead;
use super::image::auth;
use super::{Call, Service};
use crate::api::admin::{ImportImageRequest, ImportImageResponse, ImportedImage, InfoResponse, LayerProgress, PullProgress, PullRequest};
use crate::api::runtime::AuthConfig;
use crate::error::{Context, Error, Result};
use crate::sys::lock::{Lock, Rank};

/// How often a pull tells its progress.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

impl Service {
    pub(super) fn import(&self, request: &ImportImageRequest, call: &Call) -> Result<ImportImageResponse> {
        call.about(&request.path);
        let path = Path::new(&request.path);
        if !path.is_absolute() {
            return Err(Error::invalid(format!("path: expected an absolute path, found {:?}", request.path)));
        }
        if request.all_platforms {
            return Err(Error::unimplemented("all_platforms: only images of this host's platform are imported"));
        }
        let name = Some(request.reference.as_str()).filter(|r| !r.is_empty());
        let images = self.images.import(path, name).context(|| format!("import {}", request.path))?;
        let images = images.iter().map(|i| ImportedImage { id: i.id.clone(), tags: i.repo_tags.clone(), ..Default::default() }).collect();
        Ok(ImportImageResponse { images, ..Default::default() })
    }

    /// The pull runs on a thread of its own, this one reports. A client that goes away cancels it as PullImage does.
    pub(super) fn pull_with_progress(
        &self,
        request: &PullRequest,
        call: &Call,
        send: &mut dyn FnMut(PullProgress) -> Result<()>,
    ) -> Result<()> {
        let reference = request.image.clone();
        call.about(&reference);
        if reference.is_empty() {
            return Err(Error::invalid("image is empty"));
        }
        let credentials = auth(&AuthConfig {
            username: request.username.clone(),
            password: request.password.clone(),
            auth: request.auth.clone(),
            server_address: request.server_address.clone(),
            identity_token: request.identity_token.clone(),
            registry_token: request.registry_token.clone(),
            ..Default::default()
        });
        let layers: Arc<Lock<BTreeMap<String, (u64, u64)>>> = Arc::new(Lock::new(Rank::Leaf, BTreeMap::new()));
        let seen = layers.clone();
        let watch: crate::image::Watch = Arc::new(move |p| {
            seen.lock().insert(p.layer.clone(), (p.done, p.total));
        });
        let (done, result) = crossbeam_channel::bounded(1);
        let (images, cancel, name) = (self.images.clone(), call.cancel.clone(), reference.clone());
        crate::sys::thread::spawn("pull", move || {
            let _ = done.send(images.pull(&name, credentials, &cancel, Some(watch)));
        })?;
        let report = |image_ref: String| {
            let layers = layers.lock().iter().map(|(digest, (bytes, total))| layer(digest, *bytes, *total)).collect();
            PullProgress { reference: reference.clone(), layers, image_ref, ..Default::default() }
        };
        loop {
            match result.recv_timeout(PROGRESS_PERIOD) {
                Ok(image) => {
                    let image = image.context(|| format!("pull {reference}")).map_err(lead)?;
                    return send(report(image.id.clone()));
                }
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                    if let Err(e) = send(report(String::new())) {
                        call.cancel.set();
                        return Err(e);
                    }
                }
                Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                    return Err(Error::internal(format!("pull {reference}: the pull panicked")))
                }
            }
        }
    }

    pub(super) fn daemon_info(&self) -> InfoResponse {
        InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: self.root.to_string_lossy().into_owned(),
            run: self.run.to_string_lossy().into_owned(),
            config_json: self.config.clone(),
            ..Default::default()
        }
    }
}

fn layer(digest: &str, bytes: u64, total: u64) -> LayerProgress {
    let state = match bytes {
        0 => "waiting",
        n if n >= total => "done",
        _ => "pulling",
    };
    LayerProgress { digest: digest.to_owned(), state: state.to_owned(), bytes: bytes as i64, total: total as i64, ..Default::default() }
}
