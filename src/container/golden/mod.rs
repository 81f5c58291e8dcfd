//! Golden specs: for each case, what its message changes in config.json. tests/fixtures/spec/base.json is the spec of an ordinary
//! container; NAME.diff has the lines by which a case differs from it, flattened: `linux.resources.cpu.shares = 512`.
//! `CRISP_GOLDEN=write cargo test --lib golden` writes them anew; read what git says of it.

/// The cases, by area.
mod cases;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use protobuf::reflect::{ReflectFieldRef, ReflectValueRef};
use protobuf::MessageDyn;
use serde_json::Value;

use self::cases::CASES;
use super::{devices, mounts, user};
use crate::spec::fields;
use crate::spec::fixture::Fixture;

/// One change of an ordinary container's messages, image or surroundings.
struct Case {
    name: &'static str,
    change: fn(&mut Fixture),
}

const PASSWD: &str = "root:x:0:0::/root:/bin/sh\napp:x:1000:100::/home/app:/bin/sh\n";
const GROUP: &str = "root:x:0:\nusers:x:100:\ndata:x:20:app\n";

/// From the messages to the spec, the way CreateContainer goes.
fn spec_of(change: fn(&mut Fixture)) -> (Fixture, Value) {
    let mut fixture = Fixture::new();
    change(&mut fixture);
    let rootfs = tempfile::tempdir().unwrap();
    std::fs::create_dir(rootfs.path().join("etc")).unwrap();
    std::fs::write(rootfs.path().join("etc/passwd"), PASSWD).unwrap();
    std::fs::write(rootfs.path().join("etc/group"), GROUP).unwrap();
    let image_user = fixture.image.user().clone().unwrap_or_default();
    fixture.user = user::resolve(rootfs.path(), &fixture.config.linux.security_context, &image_user).unwrap();
    fixture.mounts = fixture.config.mounts.iter().map(|mount| mounts::check(mount).unwrap()).collect();
    // Without the host's own: they are another machine's somewhere else.
    let mut plain = fixture.config.clone();
    plain.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = false;
    fixture.devices = devices::collect(&plain, false).unwrap();
    let mut spec = serde_json::to_value(fixture.build().0).unwrap();
    // Sets, in no order.
    for (_, list) in spec.pointer_mut("/process/capabilities").and_then(Value::as_object_mut).into_iter().flatten() {
        list.as_array_mut().unwrap().sort_by_key(Value::to_string);
    }
    (fixture, spec)
}

/// Lines of a spec by their key. Lists of objects are told by what names an object, so that one more moves no other.
fn flatten(path: &str, value: &Value, lines: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                flatten(&if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, value, lines);
            }
        }
        Value::Array(list) if list.iter().any(Value::is_object) => match names(list) {
            Some(names) => {
                lines.insert(format!("{path} (order)"), names.join(" "));
                for (name, value) in names.iter().zip(list) {
                    flatten(&format!("{path}[{name}]"), value, lines);
                }
            }
            None => lines.extend(list.iter().enumerate().map(|(n, value)| (format!("{path}[{n:03}]"), value.to_string()))),
        },
        value => drop(lines.insert(path.to_owned(), value.to_string())),
    }
}

fn names(list: &[Value]) -> Option<Vec<String>> {
    ["destination", "path", "type", "pageSize"].iter().find_map(|key| {
        let names: Vec<String> = list.iter().filter_map(|value| value[key].as_str().map(str::to_owned)).collect();
        let different = names.iter().collect::<BTreeSet<_>>().len() == list.len();
        different.then_some(names)
    })
}

fn lines(spec: &Value) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    flatten("", spec, &mut lines);
    lines
}

fn difference(base: &Value, spec: &Value) -> String {
    let (base, spec) = (lines(base), lines(spec));
    let mut text = String::new();
    for key in base.keys().chain(spec.keys()).collect::<BTreeSet<_>>() {
        let (old, new) = (base.get(key), spec.get(key));
        if old != new {
            text.extend(old.map(|value| format!("- {key} = {value}\n")));
            text.extend(new.map(|value| format!("+ {key} = {value}\n")));
        }
    }
    text
}

fn fixture_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/spec").join(name)
}

/// Compares with the file, or writes it.
fn hold(name: &str, text: &str, wrong: &mut Vec<String>) {
    let path = fixture_path(name);
    if std::env::var_os("CRISP_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, text).unwrap();
    }
    match std::fs::read_to_string(&path) {
        Ok(golden) if golden == text => {}
        Ok(golden) => wrong.push(format!("{name} should be\n{golden}but is\n{text}")),
        Err(error) => wrong.push(format!("{name}: {error}; it is\n{text}")),
    }
}

#[test]
fn specs_are_as_written_down() {
    let base = spec_of(|_| {}).1;
    let mut wrong = Vec::new();
    hold("base.json", &format!("{base:#}\n"), &mut wrong);
    let mut files = BTreeSet::from(["base.json".to_owned()]);
    for case in CASES.iter().copied().flatten() {
        let text = difference(&base, &spec_of(case.change).1);
        assert!(!text.is_empty(), "{}: changes nothing", case.name);
        let file = format!("{}.diff", case.name);
        hold(&file, &text, &mut wrong);
        assert!(files.insert(file), "{}: twice", case.name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let present: BTreeSet<String> =
        fixture_path("").read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(present, files, "files and cases");
}

/// Whether the field at `path` is there; an enum, whose first value is also its default, when its message is.
fn is_set(message: &dyn MessageDyn, path: &str) -> bool {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    let field = message.descriptor_dyn().field_by_name(name).unwrap_or_else(|| panic!("{path}"));
    let inside = |value: ReflectValueRef| match (value, rest) {
        (ReflectValueRef::Message(inner), Some(rest)) => is_set(&*inner, rest),
        (ReflectValueRef::String(text), _) => !text.is_empty(),
        (ReflectValueRef::Bytes(bytes), _) => !bytes.is_empty(),
        (ReflectValueRef::Bool(truth), _) => truth,
        (ReflectValueRef::I32(number), _) => number != 0,
        (ReflectValueRef::I64(number), _) => number != 0,
        (ReflectValueRef::U32(number), _) => number != 0,
        (ReflectValueRef::U64(number), _) => number != 0,
        // A message, or an enum, which is there.
        _ => true,
    };
    match field.get_reflect(message) {
        ReflectFieldRef::Optional(value) => match value.value() {
            Some(value) => inside(value),
            // An enum without a value has its first.
            None => rest.is_none() && field.proto().type_() == protobuf::descriptor::field_descriptor_proto::Type::TYPE_ENUM,
        },
        ReflectFieldRef::Repeated(list) => (0..list.len()).any(|n| inside(list.get(n))),
        ReflectFieldRef::Map(map) => !map.is_empty(),
    }
}

#[test]
fn cases_set_the_fields_they_prove() {
    for row in fields::rows() {
        for name in row.proofs().filter_map(|proof| proof.strip_prefix("golden:")) {
            let case = CASES.iter().copied().flatten().find(|case| case.name == name);
            let fixture = spec_of(case.unwrap_or_else(|| panic!("{}: no case {name}", row.field)).change).0;
            let (root, path) = row.path().split_once('.').unwrap();
            let set = match root {
                "container" => is_set(&fixture.config, path),
                "sandbox" => is_set(&fixture.sandbox, path),
                _ => panic!("{}: no golden spec can show it", row.field),
            };
            assert!(set, "{}: the case {name} does not set it", row.field);
        }
    }
}
