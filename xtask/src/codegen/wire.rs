//! The table of all that peers can see of the `.proto` files: names, numbers, types and labels.
//!
//! One fact per line, sorted, so that a change of the wire is a line in a review and not lost among comments.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use protox::prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use protox::prost_reflect::prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, MethodDescriptorProto,
    ServiceDescriptorProto,
};

const HEADER: &str = "\
# What peers see of the .proto files. Written by `cargo xtask codegen`; see there before changing a line.
# message NAME, then its fields: number name type label
# enum NAME, then its values: number name
# service NAME, then its methods: name request response
";

/// The whole table, ordered by full name, then by number.
pub(super) fn table(descriptors: &FileDescriptorSet) -> String {
    let mut sections = BTreeMap::new();
    for file in &descriptors.file {
        for message in &file.message_type {
            add_message(&mut sections, file.package(), message);
        }
        for enumeration in &file.enum_type {
            add_enum(&mut sections, file.package(), enumeration);
        }
        for service in &file.service {
            add_service(&mut sections, file.package(), service);
        }
    }
    let mut table = HEADER.to_owned();
    table.extend(sections.into_values());
    table
}

fn add_message(sections: &mut BTreeMap<String, String>, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    let mut fields: Vec<&FieldDescriptorProto> = message.field.iter().collect();
    fields.sort_by_key(|field| field.number());
    let mut section = format!("message {name}\n");
    for field in fields {
        line(&mut section, format_args!("{name} {}", field_fact(message, field)));
    }
    sections.insert(name.clone(), section);
    for nested in message.nested_type.iter().filter(|nested| !is_map_entry(nested)) {
        add_message(sections, &name, nested);
    }
    for enumeration in &message.enum_type {
        add_enum(sections, &name, enumeration);
    }
}

fn field_fact(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let entry = message
        .nested_type
        .iter()
        .find(|nested| is_map_entry(nested) && field.type_name().rsplit('.').next() == Some(nested.name()));
    let (type_name, label) = match entry {
        Some(entry) => {
            let types: Vec<String> = entry.field.iter().map(type_name).collect();
            (format!("map<{}>", types.join(",")), "repeated".to_owned())
        }
        None => (type_name(field), label(message, field)),
    };
    format!("{} {} {type_name} {label}", field.number(), field.name())
}

fn is_map_entry(message: &DescriptorProto) -> bool {
    message.options.as_ref().is_some_and(|options| options.map_entry())
}

fn type_name(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => field.type_name().trim_start_matches('.').to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_ascii_lowercase(),
    }
}

/// How often a field occurs, and by what its absence can be told from its default.
fn label(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    match (field.label(), field.oneof_index) {
        (Label::Repeated, _) => "repeated".to_owned(),
        (Label::Required, _) => "required".to_owned(),
        (Label::Optional, None) => "singular".to_owned(),
        (Label::Optional, Some(_)) if field.proto3_optional() => "optional".to_owned(),
        (Label::Optional, Some(index)) => {
            let oneof = usize::try_from(index).ok().and_then(|index| message.oneof_decl.get(index));
            format!("oneof:{}", oneof.map(|oneof| oneof.name()).unwrap_or_default())
        }
    }
}

fn add_enum(sections: &mut BTreeMap<String, String>, scope: &str, enumeration: &EnumDescriptorProto) {
    let name = format!("{scope}.{}", enumeration.name());
    let mut section = format!("enum {name}\n");
    let mut values: Vec<(i32, &str)> =
        enumeration.value.iter().map(|value| (value.number(), value.name())).collect();
    values.sort_unstable();
    for (number, value) in values {
        line(&mut section, format_args!("{name} {number} {value}"));
    }
    sections.insert(name, section);
}

fn add_service(sections: &mut BTreeMap<String, String>, scope: &str, service: &ServiceDescriptorProto) {
    let name = format!("{scope}.{}", service.name());
    let mut section = format!("service {name}\n");
    let mut methods: Vec<&MethodDescriptorProto> = service.method.iter().collect();
    methods.sort_by_key(|method| method.name());
    for method in methods {
        let request = payload(method.client_streaming(), method.input_type());
        let response = payload(method.server_streaming(), method.output_type());
        line(&mut section, format_args!("{name} {} {request} {response}", method.name()));
    }
    // A service and a message may not share a name within a package, so that no section is overwritten.
    sections.insert(name, section);
}

fn payload(streaming: bool, type_name: &str) -> String {
    let name = type_name.trim_start_matches('.');
    if streaming { format!("stream<{name}>") } else { name.to_owned() }
}

fn line(section: &mut String, fact: std::fmt::Arguments<'_>) {
    writeln!(section, "{fact}").expect("writing to a String never fails");
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTO: &str = r#"
        syntax = "proto3";
        package p;
        message B {
            repeated uint32 numbers = 3;
            map<string, B> map = 1;
            optional bytes maybe = 2;
            oneof choice { Inner inner = 4; E e = 5; }
            message Inner {}
        }
        enum E { ZERO = 0; MINUS = -1; }
        service A { rpc Zap(stream B) returns (B.Inner); rpc Do(B) returns (stream B); }
    "#;

    #[test]
    fn tells_all_that_peers_see() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("p.proto"), PROTO).unwrap();
        let descriptors = protox::compile(["p.proto"], [folder.path()]).unwrap();
        let table = table(&descriptors);
        let expected = "\
service p.A
p.A Do p.B stream<p.B>
p.A Zap stream<p.B> p.B.Inner
message p.B
p.B 1 map map<string,p.B> repeated
p.B 2 maybe bytes optional
p.B 3 numbers uint32 repeated
p.B 4 inner p.B.Inner oneof:choice
p.B 5 e p.E oneof:choice
message p.B.Inner
enum p.E
p.E -1 MINUS
p.E 0 ZERO
";
        assert_eq!(table.strip_prefix(HEADER), Some(expected));
    }
}
