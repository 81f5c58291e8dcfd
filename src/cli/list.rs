//! What there is: containers, sandboxes, images, the daemon itself.

use std::collections::BTreeMap;

use serde_json::json;

use super::client::{Client, SHORT};
use super::failure::{one_line, During, Outcome};
use super::json;
use super::table::{age, now, short_id, size, Table};
use crate::api::admin::{IncompleteImage, InfoRequest};
use crate::api::runtime::{
    Container, ContainerState, Image, ListContainersRequest, ListImagesRequest, ListPodSandboxRequest, PodSandboxState, StatusRequest,
    VersionRequest,
};

/// How a listing looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Table,
    Json,
    /// Ids alone.
    Quiet,
}

/// `crisp ps`
pub fn containers(client: &Client, all: bool, form: Form) -> Outcome<String> {
    let mut request = ListContainersRequest::new();
    if !all {
        request.filter.mut_or_insert_default().state.mut_or_insert_default().state = ContainerState::CONTAINER_RUNNING.into();
    }
    let mut answer = client.runtime().list_containers(&request, SHORT).during(|| "list containers")?;
    answer.containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    match form {
        Form::Json => return Ok(json::text(&json::value(&answer)?)),
        Form::Quiet => return Ok(answer.containers.iter().map(|container| format!("{}\n", container.id)).collect()),
        Form::Table => {}
    }
    let names = image_names(client, &answer.containers)?;
    let mut table = Table::new(&["CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "SANDBOX"]);
    for container in &answer.containers {
        table.row([
            short_id(&container.id),
            image_name(container, &names),
            age(now(), container.created_at),
            container_state(container.state.enum_value_or(ContainerState::CONTAINER_UNKNOWN)).to_owned(),
            container.metadata.name.clone(),
            container.metadata.attempt.to_string(),
            short_id(&container.pod_sandbox_id),
        ]);
    }
    Ok(table.to_string())
}

/// A word for people; the one of CRI is in the JSON.
pub fn container_state(state: ContainerState) -> &'static str {
    match state {
        ContainerState::CONTAINER_CREATED => "created",
        ContainerState::CONTAINER_RUNNING => "running",
        ContainerState::CONTAINER_EXITED => "exited",
        ContainerState::CONTAINER_UNKNOWN => "unknown",
    }
}

/// The reference the user wrote; kubelets name the image by its id, which is looked up.
fn image_name(container: &Container, names: &BTreeMap<String, String>) -> String {
    let spec = &container.image;
    let written = if spec.user_specified_image.is_empty() { &spec.image } else { &spec.user_specified_image };
    names.get(written).cloned().unwrap_or_else(|| if written.starts_with("sha256:") { short_id(written) } else { written.clone() })
}

/// Tags by image id, asked for only if some container needs them.
fn image_names(client: &Client, containers: &[Container]) -> Outcome<BTreeMap<String, String>> {
    if !containers.iter().any(|container| container.image.image.starts_with("sha256:")) {
        return Ok(BTreeMap::new());
    }
    let images = client.images().list_images(&ListImagesRequest::new(), SHORT).during(|| "list images")?.images;
    Ok(images.into_iter().filter_map(|image| Some((image.id, image.repo_tags.into_iter().next()?))).collect())
}

/// `crisp pods`
pub fn sandboxes(client: &Client, form: Form) -> Outcome<String> {
    let mut answer = client.runtime().list_pod_sandbox(&ListPodSandboxRequest::new(), SHORT).during(|| "list sandboxes")?;
    answer.items.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at));
    match form {
        Form::Json => return Ok(json::text(&json::value(&answer)?)),
        Form::Quiet => return Ok(answer.items.iter().map(|sandbox| format!("{}\n", sandbox.id)).collect()),
        Form::Table => {}
    }
    let mut table = Table::new(&["SANDBOX", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT", "RUNTIME"]);
    for sandbox in &answer.items {
        let ready = sandbox.state == PodSandboxState::SANDBOX_READY.into();
        table.row([
            short_id(&sandbox.id),
            age(now(), sandbox.created_at),
            if ready { "ready" } else { "notready" }.to_owned(),
            sandbox.metadata.name.clone(),
            sandbox.metadata.namespace.clone(),
            sandbox.metadata.attempt.to_string(),
            handler(&sandbox.runtime_handler),
        ]);
    }
    Ok(table.to_string())
}

/// `crisp images`
pub fn images(client: &Client, form: Form) -> Outcome<String> {
    let mut answer = client.images().list_images(&ListImagesRequest::new(), SHORT).during(|| "list images")?;
    answer.images.sort_by(|a, b| (&a.repo_tags, &a.id).cmp(&(&b.repo_tags, &b.id)));
    match form {
        Form::Json => return Ok(json::text(&json::value(&answer)?)),
        Form::Quiet => return Ok(answer.images.iter().map(|image| format!("{}\n", image.id)).collect()),
        Form::Table => {}
    }
    let mut table = Table::new(&["IMAGE", "TAG", "ID", "SIZE", "PINNED"]);
    for image in &answer.images {
        for (repository, tag) in names(image) {
            let pinned = if image.pinned { "yes" } else { "" };
            table.row([repository, tag, short_id(&image.id), size(image.size), pinned.to_owned()]);
        }
    }
    let mut notes = String::new();
    for image in incomplete(client)? {
        let by_name = Image { repo_tags: image.names.iter().filter(|n| !n.contains('@')).cloned().collect(), ..Image::new() };
        for (repository, tag) in names(&by_name) {
            table.row([repository, tag, short_id(&image.id), "incomplete".to_owned(), String::new()]);
        }
        notes.push_str(&format!("{}: {}; pull it again\n", short_id(&image.id), one_line(&image.reason)));
    }
    Ok(format!("{table}{notes}"))
}

/// The images that must be pulled again. None with other servers, which do not have the admin service.
pub fn incomplete(client: &Client) -> Outcome<Vec<IncompleteImage>> {
    match client.admin().info(&InfoRequest::new(), SHORT) {
        Ok(info) => Ok(info.incomplete),
        Err(error) if error.is_unimplemented() => Ok(Vec::new()),
        Err(error) => Err(error).during(|| "read info"),
    }
}

/// Repository and tag of each name; of an image without tags, each repository it came from.
fn names(image: &Image) -> Vec<(String, String)> {
    let none = || "<none>".to_owned();
    // A colon before the last slash is a port's.
    let split = |name: &String| match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository.to_owned(), tag.to_owned()),
        _ => (name.clone(), none()),
    };
    let mut names: Vec<_> = image.repo_tags.iter().map(split).collect();
    if names.is_empty() {
        let repository = |digest: &String| (digest.split('@').next().unwrap_or_default().to_owned(), none());
        names = image.repo_digests.iter().map(repository).collect();
        names.dedup();
    }
    if names.is_empty() {
        names.push((none(), none()));
    }
    names
}

fn handler(name: &str) -> String {
    if name.is_empty() { "(default)" } else { name }.to_owned()
}

/// `crisp info`
pub fn info(client: &Client, json: bool) -> Outcome<String> {
    let mut request = StatusRequest::new();
    request.verbose = json;
    let status = client.runtime().status(&request, SHORT).during(|| "read status")?;
    if json {
        return Ok(json::text(&json::verbose(&status)?));
    }
    let mut top = versions(client)?;
    // Other runtimes do not have the admin service; what it says is an extra.
    match client.admin().info(&InfoRequest::new(), SHORT) {
        Ok(info) => {
            top.row(["root", &info.root]);
            top.row(["run", &info.run]);
        }
        Err(error) if error.is_unimplemented() => {}
        Err(error) => return Err(error).during(|| "read info"),
    }
    let mut table = Table::new(&["CONDITION", "STATUS", "REASON", "MESSAGE"]);
    for condition in &status.status.conditions {
        let state = if condition.status { "true" } else { "false" };
        table.row([&*condition.type_, state, &condition.reason, &condition.message]);
    }
    let mut text = format!("{top}\n{table}");
    if !status.runtime_handlers.is_empty() {
        let mut table = Table::new(&["HANDLER", "USER NAMESPACES", "RECURSIVE READ-ONLY"]);
        let yes = |flag| if flag { "yes" } else { "no" }.to_owned();
        for entry in &status.runtime_handlers {
            table.row([handler(&entry.name), yes(entry.features.user_namespaces), yes(entry.features.recursive_read_only_mounts)]);
        }
        text.push_str(&format!("\n{table}"));
    }
    Ok(text)
}

/// `crisp version`
pub fn version(client: &Client, json: bool) -> Outcome<String> {
    if !json {
        return Ok(versions(client)?.to_string());
    }
    let answer = client.runtime().version(&VersionRequest::new(), SHORT).during(|| "read version")?;
    Ok(json::text(&json!({ "client": env!("CARGO_PKG_VERSION"), "daemon": json::value(&answer)? })))
}

fn versions(client: &Client) -> Outcome<Table> {
    let answer = client.runtime().version(&VersionRequest::new(), SHORT).during(|| "read version")?;
    let mut table = Table::new(&["client", concat!("crisp ", env!("CARGO_PKG_VERSION"))]);
    table.row(["daemon".to_owned(), format!("{} {}", answer.runtime_name, answer.runtime_version)]);
    table.row(["API", &answer.runtime_api_version]);
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_by_tag_else_by_repository() {
        let image = |tags: &[&str], digests: &[&str]| {
            let mut image = Image::new();
            image.repo_tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
            image.repo_digests = digests.iter().map(|digest| (*digest).to_owned()).collect();
            names(&image).into_iter().map(|(repository, tag)| format!("{repository} {tag}")).collect::<Vec<_>>()
        };
        assert_eq!(image(&["a/b:1", "localhost:5000/b:2"], &["a/b@sha256:0"]), ["a/b 1", "localhost:5000/b 2"]);
        assert_eq!(image(&["localhost:5000/b"], &[]), ["localhost:5000/b <none>"]);
        assert_eq!(image(&[], &["a/b@sha256:0", "a/b@sha256:1", "c@sha256:0"]), ["a/b <none>", "c <none>"]);
        assert_eq!(image(&[], &[]), ["<none> <none>"]);
    }

    #[test]
    fn containers_are_named_by_the_image_the_user_wrote() {
        let names = BTreeMap::from([("sha256:aa".to_owned(), "busybox:1".to_owned())]);
        for (image, written, expected) in [
            ("busybox:2", "", "busybox:2"),
            ("sha256:aa", "", "busybox:1"),
            ("sha256:aa", "busybox", "busybox"),
            ("sha256:0123456789abcdef", "", "0123456789abc"),
        ] {
            let mut container = Container::new();
            container.image.mut_or_insert_default().image = image.into();
            container.image.mut_or_insert_default().user_specified_image = written.into();
            assert_eq!(image_name(&container, &names), expected);
        }
    }
}
