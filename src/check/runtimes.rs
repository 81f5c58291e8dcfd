//! OCI runtimes: there, of which version, and whether one really runs a container.

use serde_json::json;

use super::{is_root, nearest, Finding};
use crate::config::Config;
use crate::runtime::{Handler, Handlers};

const TOPIC: &str = "runtime";

pub(super) fn look(config: &Config, known: Option<&Handlers>, findings: &mut Vec<Finding>) {
    findings.push(match config.shim.is_file() {
        true => Finding::ok(TOPIC, "shim", config.shim.display().to_string()),
        false => {
            let hint = "make install puts it there; shim = \"...\" in the configuration tells another place";
            Finding::missing(TOPIC, "shim", format!("{} is not there", config.shim.display()), hint)
        }
    });
    let own;
    let handlers = match known {
        Some(handlers) => handlers,
        None if is_root() => {
            // Beside the daemon's own, so that whatever applies to that applies to it.
            let scratch = nearest(&config.run).join(format!(".crisp-check-{}", std::process::id()));
            own = Handlers::probe(&config.runtimes, config.default_runtime.as_deref(), &scratch, &config.shim);
            &own
        }
        None => return unprivileged(config, findings),
    };
    let ready = handlers.problem().is_none();
    for (handler, outcome) in handlers.all() {
        let is_default = handler.name == handlers.default_name();
        let works = handlers.get(&handler.name).is_ok();
        let features = handlers.features(&handler.name);
        let can = [
            ("user namespaces", features.user_namespaces()),
            ("id-mapped mounts", features.idmap_mounts),
            ("recursive read-only", features.recursive_read_only()),
            ("seccomp", features.seccomp),
            ("apparmor", features.apparmor),
            ("selinux", features.selinux),
            ("rdt", features.rdt),
        ];
        let found = match (works, is_default) {
            (true, true) => format!("{outcome}, {}, the default", handler.path.display()),
            (true, false) => format!("{outcome}, {}", handler.path.display()),
            (false, _) if !handler.path.is_file() => format!("{} is not there", handler.path.display()),
            (false, _) => outcome.clone(),
        };
        let can: Vec<&str> = can.into_iter().filter(|(_, yes)| *yes).map(|(what, _)| what).collect();
        let found = if can.is_empty() { found } else { format!("{found}; {}", can.join(", ")) };
        let data = json!({
            "path": handler.path,
            "root": handler.root,
            "default": is_default,
            "works": works,
            "version": works.then_some(outcome),
            "oci_version": features.oci_version_max,
            "features": can,
            "mount_options": features.mount_options,
            "hooks": features.hooks,
        });
        let finding = match (works, ready) {
            (true, _) => Finding::ok(TOPIC, &handler.name, found),
            // Another one does it.
            (false, true) => Finding::warn(TOPIC, &handler.name, found, "only sandboxes that ask for it miss it"),
            (false, false) => Finding::missing(TOPIC, &handler.name, found, advice(config, handler)),
        };
        findings.push(finding.with(data));
    }
}

fn advice(config: &Config, handler: &Handler) -> String {
    match handler.path.is_file() {
        true if !config.shim.is_file() => "the shim first: see there".to_owned(),
        true => "another version, or the other of crun and runc, may take this host's cgroups".to_owned(),
        false => format!("install {}, or name its path in [runtimes.{}]", handler.name, handler.name),
    }
}

/// Without root none can be tried.
fn unprivileged(config: &Config, findings: &mut Vec<Finding>) {
    let there = config.runtimes.values().any(|handler| handler.path.is_file());
    for handler in config.runtimes.values() {
        let path = handler.path.display();
        findings.push(match (handler.path.is_file(), there) {
            (true, _) => Finding::warn(TOPIC, &handler.name, format!("{path}, not tried"), "run crispd check as root"),
            (false, true) => Finding::warn(TOPIC, &handler.name, format!("{path} is not there"), "only sandboxes that ask for it miss it"),
            (false, false) => Finding::missing(TOPIC, &handler.name, format!("{path} is not there"), advice(config, handler)),
        });
    }
}
