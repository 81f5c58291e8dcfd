//! What others put into directories: networks and plugins, CDI specs, hooks.

use serde_json::json;

use super::Finding;
use crate::cdi;
use crate::config::Config;
use crate::hooks;
use crate::network::{Directory, Plugins};

const CNI: &str = "cni";

pub(super) fn look(config: &Config, findings: &mut Vec<Finding>) {
    networks(config, findings);
    let (devices, broken) = match cdi::Registry::new(config.cdi_spec_dirs.clone()).survey() {
        Ok(found) => found,
        Err(error) => (Vec::new(), vec![error.to_string()]),
    };
    let data = json!({"dirs": config.cdi_spec_dirs, "devices": devices, "broken": broken});
    let found = match devices.len() {
        0 => "none".to_owned(),
        n => format!("{n} in {}", listed(&config.cdi_spec_dirs)),
    };
    findings.push(
        match broken.is_empty() {
            true => Finding::ok("cdi", "devices", found),
            false => Finding::warn("cdi", "devices", format!("{found}; {}", broken.join("; ")), "mend these files, or remove them"),
        }
        .with(data),
    );
    let data = json!({"dirs": config.hooks_dirs});
    findings.push(match hooks::Directories::new(config.hooks_dirs.clone()).survey() {
        Ok(files) if files.is_empty() => Finding::ok("hooks", "files", "none").with(data),
        Ok(files) => Finding::ok("hooks", "files", listed(&files)).with(json!({"dirs": config.hooks_dirs, "files": files})),
        Err(error) => {
            Finding::missing("hooks", "files", error.to_string(), "no container is created before it is mended or removed").with(data)
        }
    });
}

fn listed(paths: &[std::path::PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn networks(config: &Config, findings: &mut Vec<Finding>) {
    let conf_dir = config.cni.conf_dir.display();
    let directory = match Directory::load(&config.cni.conf_dir) {
        Ok(directory) => directory,
        Err(error) => return findings.push(Finding::missing(CNI, "network", error.to_string(), "make it readable")),
    };
    let problems = directory.problems.join("; ");
    let Some(network) = directory.default_network() else {
        let found = if problems.is_empty() { format!("no configuration in {conf_dir}") } else { problems };
        let hint = "install a network, or write a conflist; sandboxes on the host's network need none";
        return findings.push(Finding::missing(CNI, "network", found, hint));
    };
    let data = json!({"name": network.name, "version": network.version.to_string(), "conf_dir": config.cni.conf_dir, "problems": directory.problems});
    let found = format!("{} (CNI {}) in {conf_dir}", network.name, network.version);
    findings.push(
        match problems.is_empty() {
            true => Finding::ok(CNI, "network", found),
            false => Finding::warn(CNI, "network", format!("{found}; {problems}"), "mend these files, or remove them"),
        }
        .with(data),
    );
    let plugins = Plugins::new(config.cni.bin_dirs.clone(), config.cni.plugin_timeout);
    let mut kinds: Vec<&str> = Vec::new();
    for (at, network) in directory.networks.iter().enumerate() {
        for kind in network.plugins.iter().flat_map(|plugin| [Some(&plugin.kind), plugin.ipam.as_ref()]).flatten() {
            if kinds.contains(&kind.as_str()) {
                continue;
            }
            kinds.push(kind);
            let name = format!("plugin {kind}");
            findings.push(match plugins.find(kind) {
                Ok(path) => Finding::ok(CNI, &name, path.display().to_string()),
                Err(error) if at == 0 => {
                    let hint = "install the CNI plugins, or name their directory in cni.bin_dirs";
                    Finding::missing(CNI, &name, error.to_string(), hint)
                }
                Err(error) => Finding::warn(CNI, &name, error.to_string(), format!("only network {} needs it", network.name)),
            });
        }
    }
}
