//! Our own service: import, pull with progress, check, facts of the daemon.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::convert::lead;
use super::image::auth;
use super::progress::Board;
use super::{Call, Service};
use crate::api::admin::{
    CheckImagesRequest, CheckProgress, ImportImageRequest, ImportImageResponse, ImportedImage, IncompleteImage, InfoResponse, Problem,
    PullProgress, PullRequest,
};
use crate::api::runtime::AuthConfig;
use crate::error::{Context, Error, Result};
use crate::sys::lock::{Lock, Rank};

/// How often a pull tells its progress.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

impl Service {
    pub(super) fn import(&self, request: &ImportImageRequest, call: &Call) -> Result<ImportImageResponse> {
        call.about(&request.path);
        let path = Path::new(&request.path);
        if !path.is_absolute() || request.path.contains('\0') {
            return Err(Error::invalid(format!("path: expected an absolute path, found {:?}", request.path)));
        }
        if request.all_platforms {
            return Err(Error::unimplemented("all_platforms: only images of this host's platform are imported"));
        }
        let name = Some(request.reference.as_str()).filter(|r| !r.is_empty());
        let images = self.images.import(path, name, &call.cancel).context(|| format!("import {}", request.path))?;
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
        let board = Arc::new(Lock::new(Rank::Leaf, Board::default()));
        let seen = board.clone();
        let watch: crate::image::Watch = Arc::new(move |progress| seen.lock().note(progress));
        let (done, result) = crossbeam_channel::bounded(1);
        let (images, cancel, name) = (self.images.clone(), call.cancel.clone(), reference.clone());
        crate::sys::thread::spawn("pull", move || {
            let _ = done.send(images.pull(&name, credentials, &cancel, Some(watch)));
        })?;
        let report = |image_ref: &str| board.lock().message(Instant::now(), &reference, image_ref);
        loop {
            match result.recv_timeout(PROGRESS_PERIOD) {
                Ok(image) => {
                    let image = image.context(|| format!("pull {reference}")).map_err(lead)?;
                    return send(report(&image.id));
                }
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                    if let Err(e) = send(report("")) {
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

    /// The check runs on a thread of the lowest priority, this one reports.
    pub(super) fn check_images_of(
        &self,
        request: &CheckImagesRequest,
        call: &Call,
        send: &mut dyn FnMut(CheckProgress) -> Result<()>,
    ) -> Result<()> {
        let (steps, received) = crossbeam_channel::bounded(64);
        let (images, cancel, repair) = (self.images.clone(), call.cancel.clone(), request.repair);
        let thread = crate::sys::thread::spawn("image-check", move || {
            crate::sys::thread::lowest_priority();
            images.check(repair, &cancel, &mut |step| steps.send(step).map_err(|_| Error::cancelled("nobody listens")))
        })?;
        for step in received {
            if let Err(e) = send(progress(step)) {
                call.cancel.set();
                return Err(e);
            }
        }
        let checked = thread.join().unwrap_or_else(|_| Err(Error::internal("the check panicked"))).context(|| "check images")?;
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let (images, layers, blobs) = (count(checked.images), count(checked.layers), count(checked.blobs));
        send(CheckProgress { finished: true, images, layers, blobs, ..Default::default() })
    }

    pub(super) fn daemon_info(&self) -> InfoResponse {
        InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: self.root.to_string_lossy().into_owned(),
            run: self.run.to_string_lossy().into_owned(),
            config_json: self.config.clone(),
            incomplete: self.images.incomplete().into_iter().map(incomplete).collect(),
            ..Default::default()
        }
    }
}

fn progress(step: crate::image::Check) -> CheckProgress {
    let problem = |p: crate::image::Problem| Problem {
        kind: p.part.name().to_owned(),
        subject: p.subject,
        message: p.message,
        action: p.action,
        images: p.images,
        ..Default::default()
    };
    CheckProgress {
        subject: step.subject,
        bytes: i64::try_from(step.bytes).unwrap_or(i64::MAX),
        total: i64::try_from(step.total).unwrap_or(i64::MAX),
        problems: step.problems.into_iter().map(problem).collect(),
        ..Default::default()
    }
}

fn incomplete(image: crate::image::Incomplete) -> IncompleteImage {
    IncompleteImage { id: image.id, names: image.names, reason: image.reason, ..Default::default() }
}
