//! Rust from proto/, without protoc: the messages into OUT_DIR/proto, the service tables into OUT_DIR/services.rs.
//! src/api.rs includes both. The shim (no `engine` feature) needs neither.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=proto");
    #[cfg(feature = "engine")]
    daemon::generate();
}

#[cfg(feature = "engine")]
mod daemon {
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    const INCLUDE: &str = "proto";
    const INPUTS: [&str; 2] = ["proto/runtime/v1/api.proto", "proto/crisp/v1/admin.proto"];

    /// The packages a service answers under, by the package it is declared in. Old kubelets and crictls speak
    /// v1alpha2, which has the same form on the wire.
    const PACKAGES: [(&str, &[&str]); 2] = [("runtime.v1", &["runtime.v1", "runtime.v1alpha2"]), ("crisp.v1", &["crisp.v1"])];

    pub(super) fn generate() {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        protobuf_codegen::Codegen::new()
            .pure()
            .include(INCLUDE)
            .inputs(INPUTS)
            // Half the size of an empty HashMap, and equal messages have equal bytes.
            .customize(protobuf_codegen::Customize::default().btreemaps(true))
            .cargo_out_dir("proto")
            .run_from_script();
        write_services(&out.join("services.rs"));
    }

    /// One macro per service and one table of all; src/api.rs explains them.
    fn write_services(path: &Path) {
        let files = protobuf_parse::Parser::new().pure().include(INCLUDE).inputs(INPUTS).file_descriptor_set();
        let files = files.expect("Codegen has just parsed the same files").file;
        let (mut table, mut macros) = (String::new(), String::new());
        for file in &files {
            let (_, packages) = PACKAGES.iter().find(|(name, _)| *name == file.package()).expect("a package we know");
            for service in &file.service {
                let mut rows = String::new();
                for method in &service.method {
                    assert!(!method.client_streaming(), "{}: client streams are not foreseen", method.name());
                    let (service, name, stream) = (service.name(), method.name(), method.server_streaming());
                    let (request, response) = (last(method.input_type()), last(method.output_type()));
                    let paths: Vec<_> = packages.iter().map(|package| format!("/{package}.{service}/{name}")).collect();
                    let (kind, snake) = (if stream { "stream" } else { "unary" }, snake_case(name));
                    put(&mut rows, format_args!("({name}, {snake}, {request}, {response}, {kind}, {paths:?})"));
                    put(
                        &mut table,
                        format_args!(
                            "Rpc {{ service: {service:?}, method: {name:?}, request: {request:?}, \
                             response: {response:?}, stream: {stream}, paths: &{paths:?} }},"
                        ),
                    );
                }
                // RuntimeService -> for_each_runtime_rpc
                let noun = snake_case(service.name().trim_end_matches("Service"));
                put(
                    &mut macros,
                    format_args!(
                        "/// Calls back with one row per method of {}.\n\
                         #[allow(unused_macros)]\n\
                         macro_rules! for_each_{noun}_rpc {{ ($callback:ident $(; $($context:tt)*)?) => {{\n\
                         $callback! {{ $($($context)*)?\n{rows}}} }} }}\n\
                         #[allow(unused_imports)]\npub(crate) use for_each_{noun}_rpc;",
                        service.name()
                    ),
                );
            }
        }
        let text = format!("/// Every method of every service.\npub const RPCS: &[Rpc] = &[\n{table}];\n{macros}");
        fs::write(path, text).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    }

    fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
        writeln!(text, "{line}").expect("a String takes what it gets");
    }

    /// `.runtime.v1.VersionRequest` -> `VersionRequest`
    fn last(name: &str) -> &str {
        name.rsplit('.').next().unwrap_or(name)
    }

    /// `RunPodSandbox` -> `run_pod_sandbox`
    fn snake_case(name: &str) -> String {
        let mut snake = String::new();
        for (at, letter) in name.char_indices() {
            if letter.is_ascii_uppercase() && at > 0 {
                snake.push('_');
            }
            snake.push(letter.to_ascii_lowercase());
        }
        snake
    }
}
