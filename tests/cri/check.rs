//! `crispd check` beside a running daemon, and the same facts in verbose Status.

use std::time::Duration;

use crisp::api::runtime::StatusRequest;
use crisp::check::look;
use crisp::cli::client::SHORT;
use crisp::sys::cancel::Cancel;
use crisp::sys::process::{Output, Program};
use serde_json::Value;

use crate::node::{eventually, Node};

fn crispd(config: &str, arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("make a directory");
    let file = dir.path().join("config.toml");
    std::fs::write(&file, config).expect("write a configuration");
    let program = Program::new(env!("CARGO_BIN_EXE_crispd")).arg("--config").arg(&file).args(arguments);
    program.run(&Cancel::never(), Duration::from_secs(60)).expect("run crispd")
}

fn finding<'a>(report: &'a Value, topic: &str, name: &str) -> &'a Value {
    let found = report["findings"].as_array().expect("a list").iter().find(|f| f["topic"] == topic && f["name"] == name);
    found.unwrap_or_else(|| panic!("no {topic} {name} in {report:#}"))
}

#[test]
fn beside_a_daemon_and_without_a_trace() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let before = node.processes();
    let report = serde_json::to_value(look(node.config(), None)).expect("a report is JSON");
    assert_eq!(finding(&report, "runtime", "fake")["state"], "ok", "{report:#}");
    assert_eq!(finding(&report, "runtime", "crun")["state"], "warn", "{report:#}");
    assert_eq!(finding(&report, "cni", "network")["data"]["name"], "test-net");
    assert_eq!(finding(&report, "cni", "plugin first")["state"], "ok");
    assert_eq!(finding(&report, "daemon", "socket")["data"]["pid"], std::process::id());
    assert_eq!(report["ready"], true, "{report:#}");
    assert_eq!(node.processes(), before);
    assert_eq!(node.sandbox_ids(), [sandbox.clone()]);
    node.remove_sandbox(&sandbox).expect("remove");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn verbose_status_has_the_same_facts() {
    let node = Node::start();
    let ask = || {
        let answer = node.runtime().status(&StatusRequest { verbose: true, ..Default::default() }, SHORT).expect("status");
        let config: Value = serde_json::from_str(&answer.info["config"]).expect("JSON");
        Some(config["check"].clone()).filter(|check| check.is_object())
    };
    let told = eventually("the facts are there", ask);
    let own = serde_json::to_value(look(node.config(), None)).expect("JSON");
    let names = |report: &Value| -> Vec<(String, String)> {
        let list = report["findings"].as_array().expect("a list").iter();
        list.map(|f| (f["topic"].as_str().unwrap_or_default().into(), f["name"].as_str().unwrap_or_default().into())).collect()
    };
    assert_eq!(names(&told), names(&own));
    for (topic, name) in [("kernel", "version"), ("kernel", "overlayfs"), ("cgroups", "controllers"), ("runtime", "fake")] {
        assert_eq!(finding(&told, topic, name)["state"], finding(&own, topic, name)["state"], "{topic} {name}");
    }
    let calls = node.runtime_calls().len();
    for _ in 0..3 {
        ask();
    }
    assert_eq!(node.runtime_calls().len(), calls, "Status starts no process");
}

#[test]
fn the_command_says_what_is_missing_and_ends_with_1() {
    let dir = tempfile::tempdir().expect("make a directory");
    let at = |name: &str| dir.path().join(name).display().to_string();
    for name in ["cni", "cdi", "hooks"] {
        std::fs::create_dir(dir.path().join(name)).expect("make a directory");
    }
    std::fs::write(dir.path().join("cdi/broken.json"), "{").expect("write");
    let config = format!(
        "root = {:?}\nrun = {:?}\nshim = {:?}\ncdi_spec_dirs = [{:?}]\nhooks_dirs = [{:?}]\n[cni]\nconf_dir = {:?}\n\
         [runtimes.crun]\npath = \"/nonexistent/crun\"\n[runtimes.runc]\npath = \"/nonexistent/runc\"\n",
        at("root"),
        at("run"),
        at("shim"),
        at("cdi"),
        at("hooks"),
        at("cni"),
    );
    let output = crispd(&config, &["check", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["ready"], false);
    for (topic, name, state) in [
        ("runtime", "crun", "missing"),
        ("runtime", "runc", "missing"),
        ("runtime", "shim", "missing"),
        ("cni", "network", "missing"),
        ("cdi", "devices", "warn"),
        ("hooks", "files", "ok"),
        ("disk", "root", "ok"),
    ] {
        let found = finding(&report, topic, name);
        // A full disk of the machine that tests is no failure.
        assert!(found["state"] == state || topic == "disk", "{found:#}");
        assert!(found["state"] == "ok" || found["hint"].is_string(), "{found:#}");
    }
    let text = String::from_utf8(crispd(&config, &["check"]).stdout).expect("text");
    assert!(text.contains("MISSING  runtime crun") && text.contains(" -> ") && text.contains("not ready: "), "{text}");
    for name in ["root", "run"] {
        assert!(!dir.path().join(name).exists(), "{name} was made");
    }
    let left = std::fs::read_dir(dir.path()).expect("list").count();
    assert_eq!(left, 3, "nothing is left");
    assert_eq!(crispd("", &["check", "-o", "yaml"]).status.code(), Some(2));
    assert_eq!(crispd("", &["config", "default", "--json"]).status.code(), Some(2));
}
