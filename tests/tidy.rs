//! The rules of this repository, checked on its text.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file at most; 400 are wanted.
const FILE_LIMIT: usize = 800;

/// Modules that may import modules above them in src/lib.rs, or beside the order, and why.
const EXCEPTIONS: [(&str, &str, &str); 0] = [];

/// Modules of the shim: they compile without the features of the daemon (src/lib.rs says which those are).
const SHIM_SIDE: [&str; 5] = ["cgroup", "runtime", "shim", "error", "sys"];

/// Crates that only the daemon has.
const DAEMON_CRATES: [&str; 8] = ["log", "parking_lot", "crossbeam_channel", "grpcio", "protobuf", "rayon", "oci_spec", "toml"];

struct Source {
    /// `src/sandbox/manager.rs`
    path: String,
    text: String,
    /// The same without unit tests and comments.
    code: String,
}

impl Source {
    /// `sandbox` of src/sandbox/manager.rs and of src/sandbox.rs.
    fn module(&self) -> &str {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        inner.split('/').next().unwrap_or(inner).trim_end_matches(".rs")
    }

    fn is_test(&self) -> bool {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        name.starts_with("tests") || name.ends_with("_tests.rs") || matches!(name, "fixture.rs" | "fake.rs")
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("read {path}: {e}"))
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> =
        fs::read_dir(dir).unwrap_or_else(|e| panic!("list {}: {e}", dir.display())).flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        match path.is_dir() {
            true => walk(&path, files),
            false => files.push(path),
        }
    }
}

fn rust_files(dir: &str) -> Vec<Source> {
    let mut files = Vec::new();
    walk(&root().join(dir), &mut files);
    let rust = files.into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    rust.map(|path| {
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
        let path = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
        Source { code: code_of(&text), path, text }
    })
    .collect()
}

/// Without the unit tests at the bottom, comments, and macro rules' documentation.
fn code_of(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let lines = text[..end].lines().map(|line| match line.trim_start().starts_with("//") {
        true => "",
        false => line.split(" // ").next().unwrap_or(line),
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Fails with all findings at once.
fn report(rule: &str, findings: Vec<String>) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

/// Lines of the code that contain one of the words, as `path:line: text`.
fn lines_with(source: &Source, words: &[&str]) -> Vec<String> {
    let found = source.code.lines().enumerate().filter(|(_, line)| words.iter().any(|word| line.contains(word)));
    found.map(|(n, line)| format!("{}:{}: {}", source.path, n + 1, line.trim())).collect()
}

/// Modules in the order of src/lib.rs.
fn order() -> Vec<String> {
    let text = read("src/lib.rs");
    text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).map(str::to_owned).collect()
}

/// Names of top modules in `crate::NAME` and `crate::{NAME, …}`.
fn imports(code: &str) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(list) => {
                let (mut depth, mut at_start) = (0, true);
                for (at, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => at_start = true,
                        c if c.is_whitespace() => {}
                        _ if at_start => {
                            names.insert(word(&list[at..]));
                            at_start = false;
                        }
                        _ => {}
                    }
                }
            }
            None => drop(names.insert(word(rest))),
        }
    }
    names
}

#[test]
fn imports_go_downwards() {
    let order = order();
    assert!(order.len() > 10, "{order:?}");
    let rank = |module: &str| order.iter().position(|known| known == module);
    let mut findings = Vec::new();
    for source in rust_files("src") {
        let module = source.module();
        // The binaries and the map itself stand above all.
        let Some(own) = rank(module) else { continue };
        for import in imports(&source.code) {
            let excepted = EXCEPTIONS.iter().any(|(from, to, _)| *from == module && *to == import);
            if rank(&import).is_some_and(|other| other < own) && !excepted {
                findings.push(format!("{}: crate::{import} is above {module} in src/lib.rs", source.path));
            }
        }
    }
    report("imports go only downwards in the order of src/lib.rs", findings);
}

#[test]
fn requests_and_responses_stop_in_service() {
    let mut findings = Vec::new();
    let tail = |line: &str, word: &str| {
        line.match_indices(word).any(|(at, _)| {
            let before = line[..at].chars().next_back().is_some_and(|c| c.is_ascii_alphanumeric());
            let after = line[at + word.len()..].chars().next().is_some_and(|c| c.is_alphanumeric() || c == '_');
            before && !after
        })
    };
    for source in rust_files("src") {
        if ["service", "grpc", "cli", "api"].contains(&source.module()) {
            continue;
        }
        // Other protocols have requests too; CRI's are imported from the generated module.
        let uses = source.code.contains("api::runtime") || source.code.contains("api::admin");
        let lines = source.code.lines().filter(|line| uses && (tail(line, "Request") || tail(line, "Response")));
        findings.extend(lines.map(|line| format!("{}: {}", source.path, line.trim())));
    }
    report("CRI's requests and responses stop in service/", findings);
}

#[test]
fn dangerous_things_have_one_place() {
    let mut findings = Vec::new();
    for source in rust_files("src") {
        let module = source.module();
        if !["grpc", "cli"].contains(&module) {
            findings.extend(lines_with(&source, &["grpcio"]));
        }
        if module != "sys" {
            findings.extend(lines_with(&source, &["process::Command", "Command::new", "unsafe ", "unsafe{", "setns("]));
        }
        if source.path != "src/sys/thread.rs" && !source.is_test() {
            // Our own wrapper has the same name as the library's.
            let wrapped = ["use crate::sys::thread", "use super::thread", "sys::thread;"].iter().any(|import| source.code.contains(import));
            let ours = |line: &str| !line.contains("std::thread") && (wrapped || line.contains("::thread::spawn("));
            let spawned = lines_with(&source, &["thread::spawn(", "thread::Builder"]).into_iter();
            findings.extend(spawned.filter(|line| !ours(line) || line.contains("Builder")));
        }
    }
    report("grpcio only in grpc/ and cli/; Command, unsafe and setns only in sys/; threads only by sys::thread::spawn", findings);
}

#[test]
fn the_shim_side_has_no_crate_of_the_daemon() {
    let map = read("src/lib.rs");
    let mut findings = Vec::new();
    for module in SHIM_SIDE {
        assert!(map.contains(&format!("\npub mod {module};")), "{module} is not in src/lib.rs");
    }
    for source in rust_files("src").iter().filter(|s| SHIM_SIDE.contains(&s.module())) {
        if of_the_daemon(&source.path) {
            continue;
        }
        for name in DAEMON_CRATES {
            let words = [format!(" {name}::"), format!("({name}::"), format!("use {name}"), format!("<{name}::")];
            let mut gated = false;
            for line in source.code.lines() {
                if !gated && words.iter().any(|word| line.contains(word.as_str())) {
                    findings.push(format!("{}: {}", source.path, line.trim()));
                }
                gated = line.contains("cfg(feature = \"engine\")");
            }
        }
    }
    report("the shim is built without the daemon's crates", findings);
}

/// Whether the file's module is declared behind the feature `engine`, by its folder's mod.rs or in a line of its own.
fn of_the_daemon(path: &str) -> bool {
    let Some((dir, name)) = path.rsplit_once('/') else { return false };
    let index = root().join(dir).join("mod.rs");
    let Ok(index) = fs::read_to_string(index) else { return false };
    let name = name.trim_end_matches(".rs");
    let mut gated = false;
    for line in index.lines() {
        if line.contains("cfg(feature = \"engine\")") {
            gated = true;
        } else if line.trim_end_matches(';').ends_with(&format!("mod {name}")) {
            return gated;
        } else if !line.trim_start().starts_with("//") && !line.trim_start().starts_with("#[") {
            gated = false;
        }
    }
    false
}

#[test]
fn files_say_what_they_are_and_stay_short() {
    let mut findings = Vec::new();
    for source in rust_files("src").iter().chain(&rust_files("tests")).chain(&[build_script()]) {
        if !source.text.starts_with("//! ") {
            findings.push(format!("{}: does not begin with //!", source.path));
        }
        let length = source.text.lines().count();
        if length > FILE_LIMIT {
            findings.push(format!("{}: {length} lines", source.path));
        }
    }
    report("every file begins with what it is, and has 800 lines at most", findings);
}

fn build_script() -> Source {
    let text = read("build.rs");
    let text = text.strip_prefix("#!").map_or(text.clone(), str::to_owned);
    Source { path: "build.rs".to_owned(), code: code_of(&text), text }
}

#[test]
fn no_banned_names() {
    const BANNED: [&str; 6] = ["util", "utils", "common", "helper", "helpers", "misc"];
    let bad = |name: &str| name.starts_with("do_") || name.split('_').any(|part| BANNED.contains(&part) || part == "mgr");
    let mut findings = Vec::new();
    for source in rust_files("src").iter().chain(&rust_files("tests")) {
        let stem = source.path.rsplit('/').next().unwrap_or_default().trim_end_matches(".rs");
        let folder = source.path.rsplit('/').nth(1).unwrap_or_default();
        if bad(stem) || bad(folder) {
            findings.push(source.path.clone());
        }
        for line in source.text.lines() {
            let line = line.trim_start();
            for keyword in ["fn ", "mod ", "struct ", "trait ", "enum "] {
                let declared = line.split_once(keyword).filter(|(before, _)| before.split(' ').all(is_modifier));
                let Some((_, rest)) = declared else { continue };
                let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if bad(&name.to_lowercase()) {
                    findings.push(format!("{}: {keyword}{name}", source.path));
                }
            }
        }
    }
    report("names say what a thing is: not util, common, helper, misc, mgr, do_", findings);
}

fn is_modifier(word: &str) -> bool {
    word.is_empty() || word.starts_with("pub") || ["const", "unsafe", "async", "super)", "crate)"].contains(&word)
}

#[test]
fn nothing_is_left_for_later() {
    // Written apart, so that this file does not find itself.
    let words: Vec<String> =
        [["to", "do!("], ["unimplemented", "!("], ["FIX", "ME"], ["XX", "X"], ["#[ign", "ore"], ["allow(dead", "_code)"]]
            .map(|w| w.concat())
            .into();
    let mut findings = Vec::new();
    for source in rust_files("src").iter().chain(&rust_files("tests")) {
        for (n, line) in source.text.lines().enumerate() {
            // An example in the documentation of macros may stand for code.
            if line.starts_with("//! ") && line.contains("fn $") {
                continue;
            }
            // A template of mkdtemp(3) is no note.
            let line = line.replace(&"X".repeat(6), "");
            if words.iter().any(|word| line.contains(word.as_str())) {
                findings.push(format!("{}:{}: {}", source.path, n + 1, line.trim()));
            }
        }
    }
    report("no stubs, no notes to ourselves, no tests that are passed over", findings);
}

#[test]
fn secrets_are_not_printed() {
    let mut findings = Vec::new();
    for source in rust_files("src") {
        findings.extend(lines_with(&source, &["{request:?}", "{auth:?}", "{credentials:?}", "{config:?}"]));
        // They belong into headers, not into logs and errors.
        let spoken = lines_with(&source, &["{password", "{token}"]).into_iter();
        findings.extend(spoken.filter(|line| line.contains("log::") || line.contains("Error::")));
        for line in lines_with(&source, &["{:?}", "{:#?}"]) {
            let argument = line.rsplit(',').next().unwrap_or_default();
            if ["request)", "auth)", "credentials)", "password)", "config)"].iter().any(|word| argument.contains(word)) {
                findings.push(line);
            }
        }
        // Generated messages print everything; ours that hold secrets must not derive it.
        for name in ["Auth", "Credentials"] {
            let text = &source.text;
            let declared = text.find(&format!("pub struct {name} {{")).or_else(|| text.find(&format!("pub enum {name} {{")));
            let derived = declared.and_then(|at| text[..at].rfind("#[derive(").map(|from| &text[from..at]));
            if derived.is_some_and(|derived| derived.contains("Debug")) {
                findings.push(format!("{}: {name} derives Debug", source.path));
            }
        }
    }
    report("requests and credentials are never formatted", findings);
}

#[test]
fn dependencies_say_why() {
    let text = read("Cargo.toml");
    let (mut in_table, mut count, mut findings) = (false, 0, Vec::new());
    for line in text.lines() {
        if line.starts_with('[') {
            in_table = line.ends_with("dependencies]");
            continue;
        }
        if !in_table || line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        count += 1;
        let reason = line.rsplit_once('#').map_or("", |(_, reason)| reason.trim());
        if reason.len() < 3 {
            findings.push(line.to_owned());
        }
    }
    assert!(count > 10, "{count} dependencies");
    report("every dependency has a comment that says why", findings);
}

/// `make fuzz` builds with --locked, and nothing else does with that lock.
#[test]
fn the_fuzzers_lock_has_what_the_engine_needs() {
    let (manifest, lock) = (read("Cargo.toml"), read("tests/fuzz/Cargo.lock"));
    let engine = manifest.split_once("\nengine = [").expect("the feature engine").1;
    let engine = engine.split_once(']').expect("its end").0;
    let ours = lock.split("[[package]]").find(|p| p.contains("\nname = \"crisp\"\n")).expect("crisp in the lock of tests/fuzz");
    let needed: Vec<&str> = engine.split('"').filter_map(|word| word.strip_prefix("dep:")).collect();
    assert!(needed.len() > 20, "{needed:?}");
    // A version follows the name where there are several.
    let missing =
        needed.iter().filter(|name| !ours.lines().any(|l| l.trim().trim_matches([' ', '"', ',']).split(' ').next() == Some(name)));
    let missing: Vec<String> = missing.map(|name| format!("{name}: run cargo update -p crisp in tests/fuzz")).collect();
    report("tests/fuzz/Cargo.lock", missing);
}

#[test]
fn documents_are_there() {
    let names = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"];
    let missing = names.iter().filter(|name| !root().join(name).is_file()).map(|name| (*name).to_owned());
    report("documents that belong to the repository", missing.collect());
}
