//! The ImageService.

use std::collections::BTreeMap;

use super::convert::lead;
use super::{Call, Service};
use crate::api::runtime::{
    self, AuthConfig, FilesystemIdentifier, FilesystemUsage, ImageFilter, ImageFsInfoResponse, ImageSpec, ImageStatusRequest,
    ImageStatusResponse, Int64Value, ListImagesRequest, ListImagesResponse, PullImageRequest, PullImageResponse, RemoveImageRequest,
    RemoveImageResponse, UInt64Value,
};
use crate::error::{Context, Error, Result};
use crate::image::{Auth, FsUsage, Image};
use crate::store::now_ns;
use protobuf::MessageField;

/// Without a runtime handler, for it is the same for all: kubelet keeps images apart by it.
fn message(image: &Image) -> runtime::Image {
    let uid = image.uid();
    runtime::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.map(|value| Int64Value { value, ..Default::default() }).into(),
        username: if uid.is_some() { String::new() } else { image.user().to_owned() },
        spec: MessageField::some(ImageSpec { image: image.id.clone(), ..Default::default() }),
        pinned: image.pinned,
        ..Default::default()
    }
}

/// Credentials of a request; None when it has none.
pub(super) fn auth(given: &AuthConfig) -> Option<Auth> {
    let auth = Auth {
        username: given.username.clone(),
        password: given.password.clone(),
        auth: given.auth.clone(),
        identity_token: given.identity_token.clone(),
        registry_token: given.registry_token.clone(),
        server_address: given.server_address.clone(),
    };
    (auth != Auth::default()).then_some(auth)
}

fn usage(fs: &FsUsage) -> FilesystemUsage {
    let id = FilesystemIdentifier { mountpoint: fs.mountpoint.to_string_lossy().into_owned(), ..Default::default() };
    FilesystemUsage {
        timestamp: now_ns(),
        fs_id: MessageField::some(id),
        used_bytes: MessageField::some(UInt64Value { value: fs.used_bytes, ..Default::default() }),
        inodes_used: MessageField::some(UInt64Value { value: fs.inodes_used, ..Default::default() }),
        ..Default::default()
    }
}

impl Service {
    fn wanted<'a>(&self, spec: &'a MessageField<ImageSpec>) -> Result<&'a str> {
        let Some(spec) = spec.as_ref().filter(|s| !s.image.is_empty()) else { return Err(Error::invalid("image.image is empty")) };
        self.handlers.check_name(&spec.runtime_handler).context(|| "image")?;
        Ok(&spec.image)
    }

    pub(super) fn images_list(&self, request: &ListImagesRequest) -> Result<ListImagesResponse> {
        Ok(ListImagesResponse { images: self.selected_images(&request.filter)?.collect(), ..Default::default() })
    }

    /// The images of this moment that match; each message is made when it is asked for. All handlers have the same images.
    pub(super) fn selected_images(&self, filter: &ImageFilter) -> Result<impl Iterator<Item = runtime::Image>> {
        self.handlers.check_name(&filter.image.runtime_handler).context(|| "filter.image")?;
        let images = match filter.image.image.as_str() {
            "" => self.images.list(),
            // What is not a reference selects nothing.
            reference => self.images.status(reference).ok().flatten().into_iter().collect(),
        };
        Ok(images.into_iter().map(|image| message(&image)))
    }

    /// An absent image is an answer, not an error.
    pub(super) fn image_info(&self, request: &ImageStatusRequest, call: &Call) -> Result<ImageStatusResponse> {
        let reference = self.wanted(&request.image)?;
        call.about(reference);
        let Some(image) = self.images.status(reference)? else { return Ok(ImageStatusResponse::new()) };
        let mut info = BTreeMap::new();
        if request.verbose {
            let json = serde_json::json!({ "chainID": image.chain.last(), "imageSpec": *image.config });
            info.insert("info".to_owned(), json.to_string());
        }
        Ok(ImageStatusResponse { image: MessageField::some(message(&image)), info, ..Default::default() })
    }

    /// `sandbox_config` does not apply: images are not pulled for one sandbox.
    pub(super) fn pull(&self, request: &PullImageRequest, call: &Call) -> Result<PullImageResponse> {
        let reference = self.wanted(&request.image)?;
        call.about(reference);
        let auth = request.auth.as_ref().and_then(auth);
        let image = self.images.pull(reference, auth, &call.cancel, None).context(|| format!("pull {reference}")).map_err(lead)?;
        Ok(PullImageResponse { image_ref: image.id.clone(), ..Default::default() })
    }

    /// Unknown is success.
    pub(super) fn image_remove(&self, request: &RemoveImageRequest, call: &Call) -> Result<RemoveImageResponse> {
        let reference = self.wanted(&request.image)?;
        call.about(reference);
        self.images.remove(reference).context(|| format!("remove image {reference}"))?;
        Ok(RemoveImageResponse::new())
    }

    pub(super) fn fs_info(&self) -> Result<ImageFsInfoResponse> {
        let info = self.images.fs_info(self.disk.total());
        Ok(ImageFsInfoResponse {
            image_filesystems: vec![usage(&info.image)],
            container_filesystems: vec![usage(&info.container)],
            ..Default::default()
        })
    }
}
