//! One network's chain of plugins, verb by verb (specification, section 3).

use serde_json::{json, Value};

use super::cache::{Cache, Entry};
use super::conflist::{Conflist, Version};
use super::plugin::{Plugins, Target, Verb};
use super::result::Outcome;
use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::cancel::Cancel;
use crate::sys::namespace;

/// The key of GC's list of attachments to keep.
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// Runs ADD along the chain. After each plugin its result is in the entry and in the cache, so that a DEL, even after a crash,
/// hands the plugins what they gave.
pub fn add(plugins: &Plugins, cache: &Cache, list: &Conflist, entry: &mut Entry, cancel: &Cancel) -> Result<Outcome> {
    let mut last = None;
    for plugin in &list.plugins {
        cancel.check()?;
        let args = entry.args();
        let target = Target { container_id: &entry.container_id, netns: &entry.netns, ifname: &entry.if_name, args: &args };
        let request = list.request(plugin, &entry.capability_args, entry.result.as_ref(), None);
        let stdout = plugins.run(&plugin.kind, Verb::Add, Some(target), &request, cancel)?;
        let outcome = Outcome::parse(&stdout, list.version).context(|| format!("plugin {}: ADD", plugin.kind))?;
        entry.result = Some(outcome.raw.clone());
        cache.write(entry)?;
        last = Some(outcome);
    }
    last.ok_or_else(|| Error::internal("the chain has no plugin"))
}

/// Runs DEL along the chain in reverse, with the configuration of ADD. Every plugin is tried; the errors are collected.
pub fn del(plugins: &Plugins, entry: &Entry, netns: &str) -> Result<()> {
    let list = entry.conflist()?;
    // A path that is no longer a namespace would make plugins fail; an empty one tells them that it is gone.
    let netns = if namespace::is_pinned(netns.as_ref()) { netns } else { "" };
    let args = entry.args();
    let target = Target { container_id: &entry.container_id, netns, ifname: &entry.if_name, args: &args };
    let previous = entry.result.as_ref().filter(|_| list.version >= Version::V0_4_0);
    let mut errors = ErrorList::default();
    for plugin in list.plugins.iter().rev() {
        let request = list.request(plugin, &entry.capability_args, previous, None);
        errors.keep(plugins.run(&plugin.kind, Verb::Del, Some(target), &request, &Cancel::never()));
    }
    errors.finish()
}

/// Runs CHECK along the chain, where the version has it and the network does not disable it.
pub fn check(plugins: &Plugins, entry: &Entry, netns: &str) -> Result<()> {
    let list = entry.conflist()?;
    if list.version < Version::V0_4_0 || list.disable_check {
        return Ok(());
    }
    let args = entry.args();
    let target = Target { container_id: &entry.container_id, netns, ifname: &entry.if_name, args: &args };
    for plugin in &list.plugins {
        let request = list.request(plugin, &entry.capability_args, entry.result.as_ref(), None);
        plugins.run(&plugin.kind, Verb::Check, Some(target), &request, &Cancel::never())?;
    }
    Ok(())
}

/// Runs GC of each plugin, where the version and the plugin have it and the network does not disable it; `valid` are all
/// entries to keep, of this network and of others.
pub fn gc(plugins: &Plugins, list: &Conflist, valid: &[Entry]) -> Result<()> {
    if list.version < Version::V1_1_0 || list.disable_gc {
        return Ok(());
    }
    let of_list = valid.iter().filter(|e| e.network_name == list.name);
    let keep: Vec<Value> = of_list.map(|e| json!({"containerID": e.container_id, "ifname": e.if_name})).collect();
    let mut errors = ErrorList::default();
    for plugin in &list.plugins {
        let versions = errors.keep(plugins.versions(&plugin.kind, &Cancel::never())).unwrap_or_default();
        if versions.contains(&Version::V1_1_0) {
            let request = list.request(plugin, &Default::default(), None, Some((VALID_ATTACHMENTS, keep.clone().into())));
            errors.keep(plugins.run(&plugin.kind, Verb::Gc, None, &request, &Cancel::never()));
        }
    }
    errors.finish()
}
