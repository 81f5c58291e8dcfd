//! From what the user typed to one container or sandbox.

use super::client::{Client, SHORT};
use super::failure::{During, Failure, Outcome};
use super::table::short_id;
use crate::api::runtime::{ContainerState, ListContainersRequest, ListPodSandboxRequest, PodSandboxState};

/// A container or a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Container,
    Sandbox,
}

/// What can be named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub kind: Kind,
    pub id: String,
    pub name: String,
    /// The sandbox it is in; its own id for a sandbox.
    pub sandbox: String,
    /// A container that runs, a sandbox that is ready.
    pub alive: bool,
}

impl Object {
    /// `container 3f2a… (web)`, for errors.
    pub fn describe(&self) -> String {
        let kind = match self.kind {
            Kind::Container => "container",
            Kind::Sandbox => "sandbox",
        };
        format!("{kind} {} ({})", short_id(&self.id), self.name)
    }
}

/// All containers and sandboxes of the daemon.
pub fn objects(client: &Client) -> Outcome<Vec<Object>> {
    let sandboxes = client.runtime().list_pod_sandbox(&ListPodSandboxRequest::new(), SHORT).during(|| "list sandboxes")?;
    let containers = client.runtime().list_containers(&ListContainersRequest::new(), SHORT).during(|| "list containers")?;
    let sandboxes = sandboxes.items.into_iter().map(|mut sandbox| Object {
        kind: Kind::Sandbox,
        name: std::mem::take(&mut sandbox.metadata.mut_or_insert_default().name),
        sandbox: sandbox.id.clone(),
        alive: sandbox.state == PodSandboxState::SANDBOX_READY.into(),
        id: sandbox.id,
    });
    let containers = containers.containers.into_iter().map(|mut container| Object {
        kind: Kind::Container,
        name: std::mem::take(&mut container.metadata.mut_or_insert_default().name),
        sandbox: container.pod_sandbox_id,
        alive: container.state == ContainerState::CONTAINER_RUNNING.into(),
        id: container.id,
    });
    Ok(sandboxes.chain(containers).collect())
}

/// The container or sandbox that `word` names: a whole id, else a name, else the start of an id. If `word` fits a
/// sandbox and its containers alone, the sandbox is meant.
pub fn any<'a>(objects: &'a [Object], word: &str) -> Outcome<Option<&'a Object>> {
    let found = matching(objects, word);
    let mut sandboxes = found.iter().filter(|object| object.kind == Kind::Sandbox);
    if let (Some(sandbox), None) = (sandboxes.next(), sandboxes.next()) {
        if found.iter().all(|object| object.sandbox == sandbox.id) {
            return Ok(Some(sandbox));
        }
    }
    one(&found, word)
}

/// The container that `word` names, as [`any`]; a sandbox stands for its only container.
pub fn container<'a>(objects: &'a [Object], word: &str) -> Outcome<&'a Object> {
    let found = matching(objects, word);
    let mut containers: Vec<&Object> = found.iter().copied().filter(|object| object.kind == Kind::Container).collect();
    if containers.is_empty() {
        let inside = |object: &&Object| object.kind == Kind::Container && found.iter().any(|sandbox| sandbox.id == object.sandbox);
        containers = objects.iter().filter(inside).collect();
    }
    one(&containers, word)?.ok_or_else(|| Failure::failed(format!("no container {word:?}; crisp ps -a lists them")))
}

/// The sandbox that `word` names, as [`any`]; a container stands for its sandbox.
pub fn sandbox<'a>(objects: &'a [Object], word: &str) -> Outcome<&'a Object> {
    let found = matching(objects, word);
    let named: Vec<&Object> = found.iter().copied().filter(|object| object.kind == Kind::Sandbox).collect();
    let around = |object: &&Object| object.kind == Kind::Sandbox && found.iter().any(|container| container.sandbox == object.id);
    let sandboxes = if named.is_empty() { objects.iter().filter(around).collect() } else { named };
    one(&sandboxes, word)?.ok_or_else(|| Failure::failed(format!("no sandbox {word:?}; crisp pods lists them")))
}

/// Everything that `word` fits equally well. Never empty ids or names: an empty word fits nothing.
fn matching<'a>(objects: &'a [Object], word: &str) -> Vec<&'a Object> {
    if word.is_empty() {
        return Vec::new();
    }
    let by = |fits: &dyn Fn(&Object) -> bool| objects.iter().filter(|object| fits(object)).collect::<Vec<_>>();
    let mut found = by(&|object| object.id == word);
    if found.is_empty() {
        found = by(&|object| object.name == word);
    }
    if found.is_empty() {
        found = by(&|object| object.id.starts_with(word));
    }
    found
}

fn one<'a>(found: &[&'a Object], word: &str) -> Outcome<Option<&'a Object>> {
    match found {
        [] => Ok(None),
        [object] => Ok(Some(object)),
        many => {
            let names: Vec<String> = many.iter().map(|object| object.describe()).collect();
            Err(Failure::failed(format!("{word:?} is ambiguous: {}", names.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(kind: Kind, id: &str, name: &str, sandbox: &str) -> Object {
        Object { kind, id: id.into(), name: name.into(), sandbox: sandbox.into(), alive: true }
    }

    fn node() -> Vec<Object> {
        vec![
            object(Kind::Sandbox, "aa11", "web", "aa11"),
            object(Kind::Container, "bb11", "web", "aa11"),
            object(Kind::Sandbox, "aa22", "db", "aa22"),
            object(Kind::Container, "cc11", "main", "aa22"),
            object(Kind::Container, "cc22", "aa1", "aa22"),
            object(Kind::Container, "dd11", "main", "ee11"),
            object(Kind::Sandbox, "ee11", "old", "ee11"),
        ]
    }

    #[test]
    fn any_object() {
        let node = node();
        for (word, expected) in [
            ("aa11", Ok(Some("aa11"))),
            ("bb", Ok(Some("bb11"))),
            ("web", Ok(Some("aa11"))),
            // A name wins over the start of an id.
            ("aa1", Ok(Some("cc22"))),
            ("zz", Ok(None)),
            ("", Ok(None)),
            ("main", Err("\"main\" is ambiguous: container cc11 (main), container dd11 (main)")),
            ("aa", Err("\"aa\" is ambiguous: sandbox aa11 (web), sandbox aa22 (db)")),
        ] {
            let got = any(&node, word).map(|object| object.map(|o| o.id.as_str()));
            assert_eq!(got.map_err(|f| text(&f)), expected.map_err(str::to_owned), "{word}");
        }
    }

    #[test]
    fn sandboxes() {
        let node = node();
        for (word, expected) in [
            ("web", Ok("aa11")),
            ("bb11", Ok("aa11")),
            ("aa1", Ok("aa22")),
            ("main", Err("\"main\" is ambiguous: sandbox aa22 (db), sandbox ee11 (old)")),
            ("zz", Err("no sandbox \"zz\"; crisp pods lists them")),
        ] {
            let got = sandbox(&node, word).map(|object| object.id.as_str());
            assert_eq!(got.map_err(|f| text(&f)), expected.map_err(str::to_owned), "{word}");
        }
    }

    #[test]
    fn containers() {
        let node = node();
        for (word, expected) in [
            ("web", Ok("bb11")),
            ("aa11", Ok("bb11")),
            ("old", Ok("dd11")),
            ("db", Err("\"db\" is ambiguous: container cc11 (main), container cc22 (aa1)")),
            ("main", Err("\"main\" is ambiguous: container cc11 (main), container dd11 (main)")),
            ("zz", Err("no container \"zz\"; crisp ps -a lists them")),
        ] {
            let got = container(&node, word).map(|object| object.id.as_str());
            assert_eq!(got.map_err(|f| text(&f)), expected.map_err(str::to_owned), "{word}");
        }
    }

    fn text(failure: &Failure) -> String {
        match failure {
            Failure::Failed(text) => text.clone(),
            other => format!("{other:?}"),
        }
    }
}
