//! proto/runtime/v1/api.proto is the CRI: its compiled descriptor and the table of facts have the same rows.

use std::collections::BTreeSet;

use crisp::api::{self, Rpc};
use protobuf::descriptor::field_descriptor_proto::{Label, Type};
use protobuf::descriptor::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto};

const TABLE: &str = include_str!("../fixtures/cri-v1.tsv");
const PROTO: &str = include_str!("../../proto/runtime/v1/api.proto");

#[test]
fn descriptor_equals_the_table() {
    let table = table_rows();
    let descriptor = descriptor_rows(api::runtime::file_descriptor().proto());
    let missing: Vec<_> = table.difference(&descriptor).collect();
    let extra: Vec<_> = descriptor.difference(&table).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing in api.proto: {missing:#?}\nnot in the table: {extra:#?}");
}

#[test]
fn service_table_equals_the_table() {
    let cri: BTreeSet<_> = api::RPCS.iter().filter(|rpc| rpc.service != "Admin").map(rpc_row).collect();
    let table: BTreeSet<_> = table_rows().into_iter().filter(|row| row.starts_with("rpc\t")).collect();
    assert_eq!(cri, table);
    assert_eq!(cri.len(), 43);
}

/// The mark is a comment, so the text is what there is to look at.
#[test]
fn secret_fields_are_marked() {
    let mut secrets = 0;
    for row in TABLE.lines().filter(|row| row.ends_with("\tsecret: never logged")) {
        let column: Vec<_> = row.split('\t').collect();
        let start = format!("  {} {} = {};", column[4], column[2], column[3]);
        let message = PROTO.split(&format!("\nmessage {} {{\n", column[1])).nth(1).expect(row);
        let field = message.lines().find(|line| line.starts_with(&start)).expect(row);
        assert!(field.ends_with(" Secret: never logged."), "{field}");
        secrets += 1;
    }
    assert!(secrets > 0);
}

/// The table's rows, without the note of a secret, which a descriptor cannot have.
fn table_rows() -> BTreeSet<String> {
    let rows: Vec<_> = TABLE
        .lines()
        .filter(|row| !row.starts_with('#'))
        .map(|row| row.trim_end_matches("\tsecret: never logged").trim_end().to_owned())
        .collect();
    let set: BTreeSet<_> = rows.iter().cloned().collect();
    assert_eq!(set.len(), rows.len(), "the table has a row twice");
    set
}

fn descriptor_rows(file: &FileDescriptorProto) -> BTreeSet<String> {
    assert_eq!((file.package(), file.syntax()), ("runtime.v1", "proto3"));
    assert!(file.dependency.is_empty() && file.extension.is_empty());
    let mut rows = BTreeSet::new();
    for service in &file.service {
        for method in &service.method {
            assert!(!method.client_streaming());
            let kind = if method.server_streaming() { "server-stream" } else { "unary" };
            let (request, response) = (local(method.input_type()), local(method.output_type()));
            rows.insert(format!("rpc\t{}\t{}\t{request}\t{response}\t{kind}", service.name(), method.name()));
        }
    }
    file.enum_type.iter().for_each(|e| enum_rows(&mut rows, "", e));
    file.message_type.iter().for_each(|m| message_rows(&mut rows, "", m));
    rows
}

fn rpc_row(rpc: &Rpc) -> String {
    let kind = if rpc.stream { "server-stream" } else { "unary" };
    format!("rpc\t{}\t{}\t{}\t{}\t{kind}", rpc.service, rpc.method, rpc.request, rpc.response)
}

fn enum_rows(rows: &mut BTreeSet<String>, outer: &str, enumeration: &EnumDescriptorProto) {
    for value in &enumeration.value {
        rows.insert(format!("enum\t{outer}{}\t{}\t{}", enumeration.name(), value.name(), value.number()));
    }
}

fn message_rows(rows: &mut BTreeSet<String>, outer: &str, message: &DescriptorProto) {
    let name = format!("{outer}{}", message.name());
    if message.field.is_empty() {
        rows.insert(format!("message\t{name}\t(no fields)"));
    }
    for field in &message.field {
        let (kind, label) = kind_and_label(message, field);
        let note = if field.options.deprecated() { "\tdeprecated" } else { "" };
        rows.insert(format!("field\t{name}\t{}\t{}\t{kind}\t{label}{note}", field.name(), field.number()));
    }
    let inner = format!("{name}.");
    message.enum_type.iter().for_each(|e| enum_rows(rows, &inner, e));
    let entries = |m: &&DescriptorProto| !m.options.map_entry();
    message.nested_type.iter().filter(entries).for_each(|m| message_rows(rows, &inner, m));
}

/// The table's last two columns: `map<string,string>`, `map`.
fn kind_and_label(message: &DescriptorProto, field: &FieldDescriptorProto) -> (String, String) {
    let entry = message
        .nested_type
        .iter()
        .find(|nested| nested.options.map_entry() && field.type_name().ends_with(&format!(".{}.{}", message.name(), nested.name())));
    if let Some(entry) = entry {
        return (format!("map<{},{}>", kind(&entry.field[0]), kind(&entry.field[1])), "map".to_owned());
    }
    let label = match (field.label(), field.has_oneof_index()) {
        (Label::LABEL_REPEATED, _) => "repeated".to_owned(),
        (_, true) => format!("oneof:{}", message.oneof_decl[field.oneof_index() as usize].name()),
        _ => "single".to_owned(),
    };
    (kind(field), label)
}

fn kind(field: &FieldDescriptorProto) -> String {
    match field.type_() {
        Type::TYPE_MESSAGE | Type::TYPE_ENUM => local(field.type_name()).to_owned(),
        // TYPE_INT64 -> int64
        scalar => format!("{scalar:?}").trim_start_matches("TYPE_").to_lowercase(),
    }
}

/// `.runtime.v1.SecurityProfile.ProfileType` -> `SecurityProfile.ProfileType`
fn local(name: &str) -> &str {
    name.strip_prefix(".runtime.v1.").expect("a type of this package")
}
