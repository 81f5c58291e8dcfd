//! The table of fields, read. fields.md is both the documentation and what tests hold the code to.

/// The table as text.
pub const TABLE: &str = include_str!("fields.md");

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Honoured,
    Refused,
    Informational,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its path, from one of the roots; at its end `.**` for a message with all its fields.
    pub field: &'static str,
    pub state: State,
    /// Where it goes, or why it does not.
    pub why: &'static str,
    /// What proves it, comma-separated: `golden:NAME`, `cri::FILE::FN`, `host::FILE::FN` or `MODULE::FN`. Honoured fields have one.
    pub proof: &'static str,
}

impl Row {
    /// The path without the `.**` of a whole message.
    pub fn path(&self) -> &'static str {
        self.field.strip_suffix(".**").unwrap_or(self.field)
    }

    /// The single proofs.
    pub fn proofs(&self) -> impl Iterator<Item = &'static str> {
        self.proof.split(", ").filter(|proof| !proof.is_empty())
    }
}

/// The rows, in the order of the file. A line that is no row is left out, as its field's missing shows.
pub fn rows() -> impl Iterator<Item = Row> {
    TABLE.lines().filter_map(row)
}

fn row(line: &'static str) -> Option<Row> {
    let cells: Vec<&str> = line.strip_prefix("| ")?.strip_suffix('|')?.split('|').map(str::trim).collect();
    let &[field, state, why, proof] = cells.as_slice() else { return None };
    let state = match state {
        "honoured" => State::Honoured,
        "refused" => State::Refused,
        "informational" => State::Informational,
        _ => return None,
    };
    Some(Row { field, state, why, proof })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use protobuf::reflect::{MessageDescriptor, RuntimeFieldType, RuntimeType};
    use protobuf::MessageFull;

    use super::*;
    use crate::api::runtime::{
        ContainerConfig, CreateContainerRequest, PodSandboxConfig, RunPodSandboxRequest, UpdateContainerResourcesRequest,
        UpdatePodSandboxResourcesRequest,
    };

    /// Paths of all fields that hold no other message, and of messages that have a row of their own.
    fn walk(message: &MessageDescriptor, path: &str, whole: &BTreeSet<&str>, found: &mut BTreeSet<String>) {
        for field in message.fields() {
            let path = format!("{path}.{}", field.name());
            let inner = match field.runtime_field_type() {
                RuntimeFieldType::Singular(RuntimeType::Message(inner)) | RuntimeFieldType::Repeated(RuntimeType::Message(inner)) => inner,
                _ => {
                    found.insert(path);
                    continue;
                }
            };
            let all = format!("{path}.**");
            match whole.contains(all.as_str()) {
                true => drop(found.insert(all)),
                // A number that can be absent.
                false if inner.name() == "Int64Value" => drop(found.insert(path)),
                false => walk(&inner, &path, whole, found),
            }
        }
    }

    fn fields_of_the_protocol() -> BTreeSet<String> {
        let whole: BTreeSet<&str> = rows().map(|row| row.field).filter(|field| field.ends_with(".**")).collect();
        let mut found = BTreeSet::new();
        let roots = [
            ("sandbox", PodSandboxConfig::descriptor()),
            ("container", ContainerConfig::descriptor()),
            ("run", RunPodSandboxRequest::descriptor()),
            ("create", CreateContainerRequest::descriptor()),
            ("update", UpdateContainerResourcesRequest::descriptor()),
            ("update_sandbox", UpdatePodSandboxResourcesRequest::descriptor()),
        ];
        for (root, descriptor) in roots {
            match whole.contains(format!("{root}.**").as_str()) {
                true => drop(found.insert(format!("{root}.**"))),
                false => walk(&descriptor, root, &whole, &mut found),
            }
        }
        // These have roots of their own.
        found.retain(|path| !path.starts_with("run.config.") && !path.starts_with("create.config."));
        found
    }

    #[test]
    fn every_field_of_the_protocol_has_one_row() {
        let known: BTreeSet<String> = rows().map(|row| row.field.to_owned()).collect();
        let protocol = fields_of_the_protocol();
        let without: Vec<_> = protocol.difference(&known).collect();
        let unknown: Vec<_> = known.difference(&protocol).collect();
        assert!(without.is_empty() && unknown.is_empty(), "fields without a row: {without:#?}\nrows without a field: {unknown:#?}");
        assert!(protocol.len() > 120, "{}", protocol.len());
    }

    #[test]
    fn rows_are_sorted_and_whole() {
        let lines: Vec<&str> = TABLE.lines().skip_while(|line| !line.starts_with("|---")).skip(1).collect();
        assert_eq!(rows().count(), lines.len(), "a line that is no row, or a row after a gap");
        for pair in rows().collect::<Vec<_>>().windows(2) {
            assert!(pair[0].field < pair[1].field, "not sorted, or twice: {} {}", pair[0].field, pair[1].field);
        }
        for row in rows() {
            assert!(!row.why.is_empty(), "{}: says nothing", row.field);
            assert_eq!(row.proof.is_empty(), row.state != State::Honoured, "{}: what is honoured, and only that, has a test", row.field);
        }
    }

    #[test]
    fn proofs_are_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for row in rows() {
            for proof in row.proofs() {
                if let Some(name) = proof.strip_prefix("golden:") {
                    let path = root.join("tests/fixtures/spec").join(format!("{name}.diff"));
                    assert!(path.is_file(), "{}: {} is missing", row.field, path.display());
                    continue;
                }
                let (module, name) = proof.rsplit_once("::").unwrap_or_else(|| panic!("{}: {proof}", row.field));
                let place = module.replace("::", "/");
                let places = match module.starts_with("cri::") || module.starts_with("host::") {
                    true => vec![format!("tests/{place}.rs")],
                    false => vec![format!("src/{place}.rs"), format!("src/{place}/mod.rs"), format!("src/{place}_tests.rs")],
                };
                let texts: Vec<String> = places.iter().filter_map(|place| std::fs::read_to_string(root.join(place)).ok()).collect();
                let test = format!("fn {name}() {{");
                let is_test =
                    |text: &String| text.split("#[test]\n").skip(1).any(|rest| rest.lines().next().is_some_and(|l| l.trim() == test));
                assert!(texts.iter().any(is_test), "{}: no test {name} in {places:?}", row.field);
            }
        }
    }
}
