//! `crisp prune` and `crisp rmi --all/--prune`: which images nobody needs. Works with every CRI server.

use std::collections::BTreeSet;

use serde_json::json;

use super::client::{Client, LONG, SHORT};
use super::failure::{During, Failure, Outcome};
use super::image::spec;
use super::table::{short_id, size, Table};
use super::{json, list};
use crate::api::runtime::{Container, Image, ListContainersRequest, ListImagesRequest, RemoveImageRequest};

/// Which images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    All,
    /// That no container has, whatever its state.
    Unused,
}

/// The images to remove, never pinned ones, by name.
pub fn choose(client: &Client, which: Which) -> Outcome<Vec<Image>> {
    let mut images = client.images().list_images(&ListImagesRequest::new(), SHORT).during(|| "list images")?.images;
    let used = match which {
        Which::All => BTreeSet::new(),
        // After the images: one that gets a container in between is seen to have it.
        Which::Unused => {
            let answer = client.runtime().list_containers(&ListContainersRequest::new(), SHORT).during(|| "list containers")?;
            answer.containers.iter().flat_map(names).collect()
        }
    };
    // These are in no list, and take space.
    images.extend(list::incomplete(client)?.into_iter().map(|image| {
        let (repo_digests, repo_tags) = image.names.into_iter().partition(|name| name.contains('@'));
        Image { id: image.id, repo_tags, repo_digests, pinned: image.pinned, ..Image::new() }
    }));
    images.retain(|image| !image.pinned && !is_used(image, &used));
    images.sort_by(|a, b| (&a.repo_tags, &a.id).cmp(&(&b.repo_tags, &b.id)));
    Ok(images)
}

/// Whatever a container calls its image: servers differ in where they put the id.
fn names(container: &Container) -> Vec<String> {
    vec![container.image_id.clone(), container.image_ref.clone(), container.image.image.clone()]
}

fn is_used(image: &Image, used: &BTreeSet<String>) -> bool {
    let mut names = [&image.id].into_iter().chain(&image.repo_tags).chain(&image.repo_digests);
    names.any(|name| used.contains(name))
}

/// `crisp prune`: what was removed, or would be.
pub fn prune(client: &Client, dry_run: bool, json: bool) -> Outcome<(String, u8)> {
    let images = choose(client, Which::Unused)?;
    let (mut removed, mut worst) = (Vec::new(), 0);
    for image in images {
        match if dry_run { Ok(()) } else { remove(client, &image.id) } {
            Ok(()) => removed.push(image),
            Err(failure) => worst = worst.max(failure.report()),
        }
    }
    let total: u64 = removed.iter().map(|image| image.size).sum();
    if json {
        let list = removed.iter().map(|i| json!({ "id": i.id, "repoTags": i.repo_tags, "size": i.size.to_string() })).collect::<Vec<_>>();
        let key = if dry_run { "unused" } else { "removed" };
        return Ok((json::text(&json!({ key: list, "size": total.to_string() })), worst));
    }
    let mut table = Table::new(&["ID", "SIZE", "NAME"]);
    for image in &removed {
        let name = image.repo_tags.iter().chain(&image.repo_digests).next();
        table.row([short_id(&image.id), size(image.size), name.cloned().unwrap_or_default()]);
    }
    let verb = if dry_run { "would be removed" } else { "removed" };
    let text = match removed.len() {
        0 => "no unused images\n".to_owned(),
        n => format!("{table}{n} {} {verb}, {} as pulled\n", if n == 1 { "image" } else { "images" }, size(total)),
    };
    Ok((text, worst))
}

/// Removes an image by its id.
pub fn remove(client: &Client, id: &str) -> Outcome<()> {
    let request = RemoveImageRequest { image: spec(id), ..RemoveImageRequest::default() };
    client.images().remove_image(&request, LONG).during(|| format!("remove image {id}")).map(drop)
}

/// `crisp rmi --all` or `--prune`: removes them and gives the words for `each`.
pub fn ids(client: &Client, which: Which) -> Outcome<Vec<String>> {
    let ids: Vec<String> = choose(client, which)?.into_iter().map(|image| image.id).collect();
    match ids.is_empty() {
        true => Err(Failure::Silent(0)),
        false => Ok(ids),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_used_by_any_of_its_names() {
        let mut image = Image::new();
        image.id = "sha256:1".into();
        image.repo_tags.push("a/b:1".into());
        image.repo_digests.push("a/b@sha256:2".into());
        for name in ["sha256:1", "a/b:1", "a/b@sha256:2"] {
            assert!(is_used(&image, &BTreeSet::from([name.to_owned()])), "{name}");
        }
        assert!(!is_used(&image, &BTreeSet::from([String::new(), "sha256:2".to_owned()])));
    }
}
