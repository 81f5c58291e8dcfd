//! The table of fields is true: a message with a field that is refused gets an error that names it, one with a field that does not
//! apply is accepted. (src/spec/fields.rs looks after the fields that are honoured.)

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use crisp::cli::failure::CallError;
use crisp::spec::fields::{rows, Row, State};
use protobuf::reflect::{ReflectFieldRef, ReflectValueBox, ReflectValueRef, RuntimeFieldType, RuntimeType};
use protobuf::MessageDyn;

use crate::node::{create_request, run_request, Node};

/// Sets the field at `path`, with all below it if it is a message and `whole`: to what is not its default. Of a list the first element
/// is changed, if there is one.
fn set(message: &mut dyn MessageDyn, path: &str, whole: bool) {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    let field = message.descriptor_dyn().field_by_name(name).unwrap_or_else(|| panic!("no field {path}"));
    let change = |inner: &mut dyn MessageDyn| match rest {
        Some(rest) => set(inner, rest, whole),
        None if whole || inner.descriptor_dyn().name() == "Int64Value" => fill(inner),
        None => {}
    };
    match field.runtime_field_type() {
        RuntimeFieldType::Singular(RuntimeType::Message(_)) => change(field.mut_message(message)),
        RuntimeFieldType::Singular(kind) => field.set_singular_field(message, other(name, &kind)),
        RuntimeFieldType::Repeated(RuntimeType::Message(inner)) => {
            let mut element = match field.get_reflect(message) {
                ReflectFieldRef::Repeated(list) if !list.is_empty() => match list.get(0) {
                    ReflectValueRef::Message(first) => first.clone_box(),
                    _ => inner.new_instance(),
                },
                _ => inner.new_instance(),
            };
            change(&mut *element);
            let mut list = field.mut_repeated(message);
            match list.len() {
                0 => list.push(ReflectValueBox::Message(element)),
                _ => list.set(0, ReflectValueBox::Message(element)),
            }
        }
        RuntimeFieldType::Repeated(kind) => field.mut_repeated(message).push(other(name, &kind)),
        RuntimeFieldType::Map(key, value) => field.mut_map(message).insert(other(name, &key), other(name, &value)),
    }
}

/// Every field of a message, and of those in it.
fn fill(message: &mut dyn MessageDyn) {
    for field in message.descriptor_dyn().fields() {
        set(message, field.name(), true);
    }
}

/// A value that is no default.
fn other(field: &str, kind: &RuntimeType) -> ReflectValueBox {
    match kind {
        // An SELinux level must look like one.
        RuntimeType::String if field == "level" => ReflectValueBox::String("s0".into()),
        RuntimeType::String => ReflectValueBox::String("x".into()),
        RuntimeType::Bool => ReflectValueBox::Bool(true),
        RuntimeType::I32 => ReflectValueBox::I32(1),
        RuntimeType::I64 => ReflectValueBox::I64(1),
        RuntimeType::U32 => ReflectValueBox::U32(1),
        RuntimeType::U64 => ReflectValueBox::U64(1),
        RuntimeType::F32 => ReflectValueBox::F32(1.0),
        RuntimeType::F64 => ReflectValueBox::F64(1.0),
        RuntimeType::VecU8 => ReflectValueBox::Bytes(vec![1]),
        // Unconfined comes first, and asks for nothing.
        RuntimeType::Enum(values) if field == "profile_type" => ReflectValueBox::Enum(values.clone(), 2),
        RuntimeType::Enum(values) => ReflectValueBox::Enum(values.clone(), 1),
        RuntimeType::Message(_) => unreachable!("messages are changed in their place"),
    }
}

/// Around the field in question, what it needs to be looked at at all.
fn prepare(row: &Row, config: &mut ContainerConfig) {
    if row.field.starts_with("container.mounts.") {
        config.mounts = vec![Mount { container_path: "/data".into(), host_path: "/tmp".into(), ..Default::default() }];
    }
}

struct Made {
    node: Node,
    sandbox: String,
    container: String,
}

impl Made {
    fn new() -> Made {
        let node = Node::start();
        let sandbox = node.sandbox("web");
        let container = node.create(&sandbox, &node.container_config("there", "true")).expect("create");
        Made { node, sandbox, container }
    }

    /// The answer to a message with the row's field set.
    fn ask(&self, row: &Row, whole: bool) -> Result<(), CallError> {
        let node = &self.node;
        let (root, path) = row.path().split_once('.').unwrap_or((row.path(), ""));
        match root {
            "sandbox" => {
                let mut config = node.sandbox_config("field");
                set(&mut config, path, whole);
                let id = node.run(&config)?;
                node.remove_sandbox(&id)
            }
            "run" => {
                let mut request = run_request(&node.sandbox_config("field"), "");
                set(&mut request, path, whole);
                node.remove_sandbox(&node.runtime().run_pod_sandbox(&request, SHORT)?.pod_sandbox_id)
            }
            "container" => {
                let mut config = node.container_config("field", "true");
                prepare(row, &mut config);
                set(&mut config, path, whole);
                node.remove(&node.create(&self.sandbox, &config)?)
            }
            "create" => {
                let mut request = create_request(&self.sandbox, &node.container_config("field", "true"));
                set(&mut request, path, whole);
                node.remove(&node.runtime().create_container(&request, SHORT)?.container_id)
            }
            "update" => {
                let limit = HugepageLimit { page_size: "2MB".into(), limit: 2 << 20, ..Default::default() };
                let mut request = UpdateContainerResourcesRequest { container_id: self.container.clone(), ..Default::default() };
                if path.contains("hugepage_limits") {
                    request.linux.mut_or_insert_default().hugepage_limits = vec![limit];
                }
                set(&mut request, path, whole);
                node.runtime().update_container_resources(&request, SHORT).map(drop)
            }
            "update_sandbox" => {
                let mut request = UpdatePodSandboxResourcesRequest { pod_sandbox_id: self.sandbox.clone(), ..Default::default() };
                match path {
                    "" => fill(&mut request),
                    path => set(&mut request, path, whole),
                }
                node.runtime().update_pod_sandbox_resources(&request, SHORT).map(drop)
            }
            root => panic!("{root} is no root of the table"),
        }
    }
}

#[test]
fn refused_fields_are_refused_by_name() {
    let made = Made::new();
    let mut wrong = Vec::new();
    for row in rows().filter(|row| row.state == State::Refused) {
        // A field, or the message that is refused with it.
        let mut names: Vec<&str> =
            row.path().rsplit('.').take(2).filter(|name| !["container", "sandbox", "update"].contains(name)).collect();
        // The deprecated form is told as the field that it stands for.
        names.extend(row.path().ends_with(".apparmor_profile").then_some("apparmor"));
        match made.ask(&row, false) {
            Ok(()) => wrong.push(format!("{}: is accepted", row.field)),
            Err(error) if names.iter().any(|name| error.message.contains(name)) => {}
            Err(error) => wrong.push(format!("{}: {error}: names none of {names:?}", row.field)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(made.node.container_ids(), [made.container.clone()]);
}

#[test]
fn informational_fields_are_accepted() {
    let made = Made::new();
    let mut wrong = Vec::new();
    for row in rows().filter(|row| row.state == State::Informational) {
        if let Err(error) = made.ask(&row, true) {
            wrong.push(format!("{}: {error}", row.field));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
