//! `pull`, `import` and `rmi`.

use serde_json::json;

use super::client::{Client, FOREVER, SHORT};
use super::failure::{During, Failure, Outcome};
use super::flags::Credentials;
use super::{json, list, prune, pull};
use crate::api::admin::{ImportImageRequest, IncompleteImage};
use crate::api::runtime::{Image, ImageSpec, ImageStatusRequest};
use crate::error::Context;
use crate::image::{Reference, PREFIX_MIN};

/// The image that `name` (a reference, an id or the start of one) means here, if any.
pub fn find(client: &Client, name: &str) -> Outcome<Option<Image>> {
    let request = ImageStatusRequest { image: spec(name), ..ImageStatusRequest::default() };
    let answer = client.images().image_status(&request, SHORT).during(|| format!("look for image {name}"))?;
    Ok(answer.image.0.map(|image| *image))
}

/// `name` as the CRI wants it.
pub fn spec(name: &str) -> protobuf::MessageField<ImageSpec> {
    protobuf::MessageField::some(ImageSpec { image: name.to_owned(), ..ImageSpec::default() })
}

/// `crisp pull`: the ids, one per line.
pub fn pull_all(client: &Client, images: &[String], credentials: Option<&Credentials>, json: bool) -> Outcome<String> {
    let mut pulled = Vec::new();
    for image in images {
        pulled.push((image, pull::pull(client, image, credentials, &crossbeam_channel::never())?));
    }
    Ok(match json {
        true => json::text(&pulled.iter().map(|(image, id)| json!({ "image": image, "imageRef": id })).collect()),
        false => pulled.iter().map(|(_, id)| format!("{id}\n")).collect(),
    })
}

/// `crisp import`: id and names of each image.
pub fn import(client: &Client, files: &[String], name: Option<&str>, json: bool) -> Outcome<String> {
    let mut images = Vec::new();
    for file in files {
        // The daemon has another current directory.
        let path = std::fs::canonicalize(file).context(|| format!("import {file}"))?;
        let path = path.into_os_string().into_string().map_err(|_| Failure::failed(format!("import {file}: its path is not UTF-8")))?;
        let request = ImportImageRequest { path, reference: name.unwrap_or_default().to_owned(), ..ImportImageRequest::default() };
        let answer = client.admin().import_image(&request, FOREVER).during(|| format!("import {file}"))?;
        images.extend(answer.images);
    }
    Ok(match json {
        true => json::text(&images.iter().map(|image| json!({ "id": image.id, "repoTags": image.tags })).collect()),
        false => images.iter().map(|image| format!("{} {}\n", image.id, image.tags.join(" ")).replace(" \n", "\n")).collect(),
    })
}

/// `crisp rmi` of one image; gives its id.
pub fn remove(client: &Client, name: &str) -> Outcome<String> {
    // The call itself succeeds for what is not there, which would hide a typing error.
    let id = match find(client, name)? {
        Some(image) => Some(image.id),
        None => list::incomplete(client)?.into_iter().find(|image| is_called(image, name)).map(|image| image.id),
    };
    let id = id.ok_or_else(|| Failure::failed(format!("no image {name:?}; crisp images lists them")))?;
    prune::remove(client, &id)?;
    Ok(id)
}

/// Whether an incomplete image has this name, id or start of an id: lookups do not find it.
fn is_called(image: &IncompleteImage, name: &str) -> bool {
    let id = name.strip_prefix("sha256:").unwrap_or(name);
    let full = Reference::parse(name).map(|reference| reference.to_string()).unwrap_or_default();
    image.names.contains(&full) || (id.len() >= PREFIX_MIN && image.id.strip_prefix("sha256:").is_some_and(|hex| hex.starts_with(id)))
}

/// The JSON of `crisp inspect` for an image.
pub fn inspect(client: &Client, name: &str) -> Outcome<Option<serde_json::Value>> {
    let request = ImageStatusRequest { image: spec(name), verbose: true, ..ImageStatusRequest::default() };
    let answer = client.images().image_status(&request, SHORT).during(|| format!("look for image {name}"))?;
    answer.image.is_some().then(|| json::verbose(&answer)).transpose()
}
