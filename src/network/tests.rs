//! The manager against fake plugins: shell scripts that record what they were asked.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::*;
use crate::error::Code;
use crate::sys::cancel::Cancel;
use crate::sys::thread;

/// Records `VERB name ifname netns` in `log` and stdin in `<name>-<VERB>-<ifname>.json`, runs the script `<name>.<VERB>` if there
/// is one, then answers; what ADD gives says `by` whom.
const FAKE: &str = r#"#!/bin/sh
home=$(dirname "$0"); me=$(basename "$0")
cat > "$home/$me-$CNI_COMMAND-$CNI_IFNAME.json"
if [ "$CNI_COMMAND" = VERSION ]; then
  echo '{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}'; exit 0
fi
echo "$CNI_COMMAND $me $CNI_IFNAME ${CNI_NETNS:-none}" >> "$home/log"
if [ -e "$home/$me.$CNI_COMMAND" ]; then . "$home/$me.$CNI_COMMAND"; fi
if [ "$CNI_COMMAND" = ADD ]; then
  link="{\"name\":\"$CNI_IFNAME\",\"mac\":\"02:00:00:00:00:01\",\"sandbox\":\"$CNI_NETNS\"}"
  echo "{\"cniVersion\":\"1.0.0\",\"by\":\"$me\",\"interfaces\":[$link],"
  echo "\"ips\":[{\"interface\":0,\"address\":\"10.9.0.2/24\"},{\"interface\":0,\"address\":\"fd00::2/64\"}]}"
fi
"#;

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Host {
        let host = Host { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir_all(host.path("bin")).unwrap();
        for name in ["a", "b", "c"] {
            host.plugin(name);
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plugin(&self, name: &str) {
        let path = self.path("bin").join(name);
        std::fs::write(&path, FAKE).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What the plugin `name` does first at `verb`.
    fn behave(&self, name: &str, verb: &str, script: &str) {
        std::fs::write(self.path("bin").join(format!("{name}.{verb}")), script).unwrap();
    }

    /// Renamed into place, as a file that is written there counts only once it is whole.
    fn conf(&self, file: &str, version: &str, network: &str, plugins: &[&str]) {
        std::fs::create_dir_all(self.path("conf")).unwrap();
        std::fs::write(self.path("new"), self.conf_text(file, version, network, plugins)).unwrap();
        std::fs::rename(self.path("new"), self.path("conf").join(file)).unwrap();
    }

    fn conf_text(&self, file: &str, version: &str, network: &str, plugins: &[&str]) -> String {
        let plugins: Vec<Value> =
            plugins.iter().map(|p| json!({"type": p, "from": file, "capabilities": {"portMappings": true}})).collect();
        json!({"cniVersion": version, "name": network, "plugins": plugins}).to_string()
    }

    fn settings(&self) -> Settings {
        Settings {
            conf_dir: self.path("conf"),
            bin_dirs: vec![self.path("bin")],
            cache_dir: self.path("cache"),
            plugin_timeout: Duration::from_secs(60),
            template: None,
            max_networks: 4,
        }
    }

    fn network(&self) -> Arc<Network> {
        Network::start(self.settings()).unwrap()
    }

    fn log(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("bin/log")).unwrap_or_default();
        let _ = std::fs::remove_file(self.path("bin/log"));
        text.lines().map(str::to_owned).collect()
    }

    fn input(&self, name: &str, verb: &str, ifname: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path("bin").join(format!("{name}-{verb}-{ifname}.json"))).unwrap()).unwrap()
    }

    fn cached(&self) -> usize {
        std::fs::read_dir(self.path("cache/results")).map_or(0, Iterator::count)
    }
}

fn attachment(id: &str) -> Attachment {
    Attachment {
        sandbox_id: id.into(),
        name: "web".into(),
        namespace: "default".into(),
        uid: "u1".into(),
        netns: "/run/netns/not-there".into(),
        port_mappings: vec![PortMapping { protocol: "tcp".into(), container_port: 80, host_port: 8080, host_ip: String::new() }],
        ..Default::default()
    }
}

fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !test() {
        assert!(Instant::now() < end, "not in 60 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_chain_is_added_in_order_and_deleted_in_reverse() {
    let host = Host::new();
    host.conf("10.conflist", "1.0.0", "net", &["a", "b"]);
    let network = host.network();
    let a = attachment("s1");
    let setup = network.setup(&a, &Cancel::never()).unwrap();
    assert_eq!(setup.ips.iter().map(|i| i.to_string()).collect::<Vec<_>>(), ["10.9.0.2", "fd00::2"]);
    assert_eq!((setup.networks[0].ifname.as_str(), setup.networks[0].mac.as_deref()), ("eth0", Some("02:00:00:00:00:01")));
    assert_eq!(host.log(), ["ADD a eth0 /run/netns/not-there", "ADD b eth0 /run/netns/not-there"]);
    assert_eq!(host.input("a", "ADD", "eth0").get("prevResult"), None);
    assert_eq!(host.input("b", "ADD", "eth0")["prevResult"]["by"], "a");
    assert_eq!(host.input("b", "ADD", "eth0")["runtimeConfig"]["portMappings"][0]["hostPort"], 8080);
    assert_eq!(network.cached_sandboxes(), ["s1"]);

    network.check(&a).unwrap();
    assert_eq!(host.log(), ["CHECK a eth0 /run/netns/not-there", "CHECK b eth0 /run/netns/not-there"]);
    host.behave("b", "CHECK", "exit 9");
    assert_eq!(network.check(&a).unwrap_err().message(), "check network of sandbox s1: network net: plugin b: CHECK: exit 9");
    host.log();

    // Today's configuration is another one; DEL does not look at it.
    host.conf("10.conflist", "1.0.0", "net", &["c"]);
    network.reload().unwrap();
    network.teardown(&Attachment { port_mappings: Vec::new(), ..a.clone() }).unwrap();
    assert_eq!(host.log(), ["DEL b eth0 none", "DEL a eth0 none"]);
    assert_eq!(host.input("a", "DEL", "eth0")["prevResult"]["by"], "b");
    assert_eq!(host.input("a", "DEL", "eth0")["runtimeConfig"]["portMappings"][0]["hostPort"], 8080);
    assert_eq!(host.cached(), 0);
    network.teardown(&a).unwrap();
    assert!(host.log().is_empty());
}

#[test]
fn a_failure_half_way_deletes_everything() {
    let host = Host::new();
    host.conf("10.conflist", "0.3.1", "net", &["a", "b", "c"]);
    host.behave("b", "ADD", "echo '{\"code\":7,\"msg\":\"no more\"}'; echo trace >&2; exit 1");
    let network = host.network();
    let e = network.setup(&attachment("s1"), &Cancel::never()).unwrap_err();
    assert_eq!(e.message(), "set up network of sandbox s1: network net: plugin b: ADD: no more (code 7); stderr: trace");
    assert_eq!(host.log()[2..], ["DEL c eth0 none", "DEL b eth0 none", "DEL a eth0 none"]);
    // Version 0.3 has no prevResult at DEL.
    assert_eq!(host.input("a", "DEL", "eth0").get("prevResult"), None);
    assert_eq!(host.cached(), 0);
}

#[test]
fn what_cannot_be_undone_stays_for_a_retry() {
    let host = Host::new();
    host.conf("10.conflist", "1.0.0", "net", &["a", "b"]);
    host.behave("b", "ADD", "exit 3");
    host.behave("b", "DEL", "echo stuck >&2; exit 4");
    let network = host.network();
    let e = network.setup(&attachment("s1"), &Cancel::never()).unwrap_err();
    assert!(e.message().contains("b: ADD: exit 3; and the undo: network net: plugin b: DEL: exit 4; stderr: stuck"), "{e}");
    assert_eq!(host.log().last().unwrap(), "DEL a eth0 none");
    assert!(network.teardown(&attachment("s1")).is_err());
    host.behave("b", "DEL", "");
    host.log();
    // The result of the plugin that succeeded is still known.
    network.teardown(&attachment("s1")).unwrap();
    assert_eq!(host.input("b", "DEL", "eth0")["prevResult"]["by"], "a");
    assert_eq!((host.log().len(), host.cached()), (2, 0));
}

#[test]
fn bad_answers_are_told_and_undone() {
    let host = Host::new();
    host.conf("10.conflist", "1.0.0", "net", &["a"]);
    let patient = host.network();
    // Also for the start of the DEL that follows.
    let hasty = Network::start(Settings { plugin_timeout: Duration::from_secs(4), ..host.settings() }).unwrap();
    for (script, words, code) in [
        ("echo 'panic: runtime error'; exit 0", "plugin a: ADD: result \"panic: runtime error\": parse JSON", Code::Internal),
        ("exit 0", "result (nothing)", Code::Internal),
        ("echo '{\"ips\":[]}'; exit 0", "the plugins gave no IP address for eth0", Code::Internal),
        ("sleep 62.5 & sleep 62.5", "no answer after 4 s, killed", Code::DeadlineExceeded),
        ("kill -9 $$", "signal 9", Code::Internal),
    ] {
        host.behave("a", "ADD", script);
        let network = if code == Code::DeadlineExceeded { &hasty } else { &patient };
        let e = network.setup(&attachment("s1"), &Cancel::never()).unwrap_err();
        assert!(e.message().contains(words), "{script}: {e}");
        assert_eq!(e.code(), code, "{script}");
        assert_eq!(host.log().last().unwrap(), "DEL a eth0 none", "{script}");
        assert_eq!(host.cached(), 0, "{script}");
    }
    std::fs::remove_file(host.path("bin/a")).unwrap();
    let e = patient.setup(&attachment("s1"), &Cancel::never()).unwrap_err();
    assert!(e.message().contains("plugin a: not found in"), "{e}");
}

#[test]
fn the_intent_is_on_disk_before_the_first_add() {
    let host = Host::new();
    host.conf("10.conflist", "1.0.0", "net", &["a"]);
    host.behave("a", "ADD", "ls \"$home/../cache/results\" > \"$home/seen\"");
    host.network().setup(&attachment("s1"), &Cancel::never()).unwrap();
    assert_eq!(std::fs::read_to_string(host.path("bin/seen")).unwrap(), "net-s1-eth0\n");
}

#[test]
fn extra_networks_come_first_and_go_last() {
    let host = Host::new();
    host.conf("10.conflist", "1.0.0", "main", &["a"]);
    host.conf("20.conflist", "1.0.0", "storage", &["b"]);
    let network = host.network();
    let extra = |names: &[&str]| Attachment { extra_networks: names.iter().map(|n| n.to_string()).collect(), ..attachment("s1") };
    let setup = network.setup(&extra(&["storage", "main"]), &Cancel::never()).unwrap();
    assert_eq!(setup.networks.iter().map(|n| n.ifname.as_str()).collect::<Vec<_>>(), ["eth0", "net1", "net2"]);
    // Ports are the default network's business.
    assert_eq!(host.input("b", "ADD", "net1").get("runtimeConfig"), None);
    network.teardown(&extra(&[])).unwrap();
    let log: Vec<String> = host.log().iter().map(|l| l.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(log, ["ADD b net1", "ADD a net2", "ADD a eth0", "DEL a eth0", "DEL a net2", "DEL b net1"]);
    assert_eq!(host.cached(), 0);
    let e = network.setup(&extra(&["other"]), &Cancel::never()).unwrap_err();
    assert_eq!((e.code(), e.message().contains("extra network \"other\"")), (Code::InvalidArgument, true), "{e}");
    assert_eq!(network.setup(&extra(&["main"; 4]), &Cancel::never()).unwrap_err().code(), Code::InvalidArgument);
    assert!(host.log().is_empty());
}

#[test]
fn injection_is_refused_before_anything_runs() {
    let host = Host::new();
    host.conf("10.conflist", "1.0.0", "net", &["a"]);
    let bad = Attachment { name: "x;K8S_POD_NAMESPACE=kube-system".into(), ..attachment("s1") };
    assert_eq!(host.network().setup(&bad, &Cancel::never()).unwrap_err().code(), Code::InvalidArgument);
    assert!(host.log().is_empty() && host.cached() == 0);
}

#[test]
fn readiness_follows_the_directory_at_once() {
    let host = Host::new();
    let network = host.network();
    assert_eq!(network.status().reason, "NetworkConfigMissing");
    assert_eq!(network.setup(&attachment("s1"), &Cancel::never()).unwrap_err().code(), Code::Unavailable);
    host.conf("20.conflist", "1.0.0", "net", &["a"]);
    assert!(network.status().ready);
    host.conf("10.conflist", "1.0.0", "first", &["gone"]);
    let status = network.status();
    assert_eq!(status.reason, "NetworkPluginMissing");
    assert!(status.message.contains("network first: plugin gone: not found in"), "{}", status.message);
    host.plugin("gone");
    assert!(network.status().ready);
    std::fs::remove_file(host.path("conf/10.conflist")).unwrap();
    std::fs::remove_file(host.path("conf/20.conflist")).unwrap();
    assert_eq!(network.status().reason, "NetworkConfigMissing");
    // A directory that went and came is followed, and so is a change inside a file.
    std::fs::remove_dir(host.path("conf")).unwrap();
    assert!(!network.status().ready);
    host.conf("10.conflist", "1.0.0", "net", &["nowhere"]);
    eventually("the new directory is loaded", || network.status().reason == "NetworkPluginMissing");
    std::fs::write(host.path("conf/10.conflist"), host.conf_text("10.conflist", "1.0.0", "net", &["a"])).unwrap();
    eventually("the changed file is loaded", || network.status().ready);
}

/// The kernel's clock does not tell them apart.
#[test]
fn changes_in_the_same_tick_count_too() {
    let host = Host::new();
    let network = host.network();
    host.plugin("a");
    for round in 0..50 {
        host.conf("10.conflist", "1.0.0", "net", &["a"]);
        assert!(network.status().ready, "{round}");
        std::fs::remove_file(host.path("conf/10.conflist")).unwrap();
        assert_eq!(network.status().reason, "NetworkConfigMissing", "{round}");
    }
}

#[test]
fn plugins_of_1_1_say_whether_they_are_ready() {
    let host = Host::new();
    host.conf("10.conflist", "1.1.0", "net", &["a"]);
    let gate = "while [ ! -e \"$home/gate\" ]; do sleep 0.02; done";
    host.behave("a", "STATUS", &format!("{gate}; echo '{{\"code\":50,\"msg\":\"no agent\"}}'; exit 1"));
    let network = host.network();
    // Not waited for.
    assert_eq!(network.status().reason, "NetworkStatusPending");
    std::fs::write(host.path("bin/gate"), "").unwrap();
    eventually("the answer is known", || network.status().reason == "NetworkPluginNotReady");
    assert!(network.status().message.contains("plugin a: STATUS: no agent (code 50)"));
    host.behave("a", "STATUS", "");
    eventually("it is asked again", || network.status().ready);
    // The same configuration, read again, is still ready.
    network.reload().unwrap();
    assert!(network.status().ready);
}

#[test]
fn gc_frees_what_the_dead_have_left() {
    let host = Host::new();
    host.conf("10.conflist", "1.1.0", "net", &["a", "b"]);
    let network = host.network();
    for id in ["living", "dead"] {
        network.setup(&attachment(id), &Cancel::never()).unwrap();
    }
    eventually("STATUS was asked", || network.status().ready);
    host.log();
    network.gc(&["living".to_owned()]).unwrap();
    let log: Vec<String> = host.log().into_iter().filter(|l| !l.starts_with("STATUS")).collect();
    assert_eq!(log, ["DEL b eth0 none", "DEL a eth0 none", "GC a  none", "GC b  none"]);
    assert_eq!(host.input("a", "GC", "")["cni.dev/valid-attachments"], json!([{"containerID": "living", "ifname": "eth0"}]));
    assert_eq!(network.cached_sandboxes(), ["living"]);
}

#[test]
fn a_hanging_plugin_delays_nobody_else() {
    let host = Host::new();
    host.conf("10.conflist", "1.0.0", "net", &["a"]);
    host.behave("a", "ADD", "if [ $CNI_CONTAINERID = slow ]; then touch \"$home/hangs\"; sleep 630.5; fi");
    let network = host.network();
    let cancel = Cancel::never();
    let slow = thread::spawn("slow", {
        let (network, cancel) = (network.clone(), cancel.clone());
        move || network.setup(&attachment("slow"), &cancel)
    })
    .unwrap();
    eventually("it hangs", || host.path("bin/hangs").exists());
    let begin = Instant::now();
    assert!(network.status().ready);
    network.setup(&attachment("quick"), &Cancel::never()).unwrap();
    network.teardown(&attachment("quick")).unwrap();
    assert_eq!(network.gc(&[]).unwrap_err().code(), Code::Unavailable);
    assert!(begin.elapsed() < Duration::from_secs(30));
    cancel.set();
    assert_eq!(slow.join().unwrap().unwrap_err().code(), Code::Cancelled);
    assert_eq!(host.cached(), 0);
}

#[test]
fn the_pod_cidr_renders_the_template_once() {
    let host = Host::new();
    let template = host.path("template");
    std::fs::write(&template, r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"a","subnet":"{{.PodCIDR}}"}]}"#).unwrap();
    let network = Network::start(Settings { template: Some(template.clone()), ..host.settings() }).unwrap();
    network.set_pod_cidr("").unwrap();
    assert_eq!(network.set_pod_cidr("10.0.0.0").unwrap_err().code(), Code::InvalidArgument);
    network.set_pod_cidr("10.7.0.0/24").unwrap();
    assert!(network.status().ready);
    let rendered = host.path("conf/10-crisp.conflist");
    let before = std::fs::metadata(&rendered).unwrap().modified().unwrap();
    network.set_pod_cidr("10.7.0.0/24").unwrap();
    assert_eq!(std::fs::metadata(&rendered).unwrap().modified().unwrap(), before);
    network.setup(&attachment("s1"), &Cancel::never()).unwrap();
    assert_eq!(host.input("a", "ADD", "eth0")["subnet"], "10.7.0.0/24");
    std::fs::write(&template, "{{.PodCIDR}}").unwrap();
    let e = network.set_pod_cidr("10.8.0.0/24").unwrap_err();
    assert!(e.message().contains("the rendered text is not a network configuration"), "{e}");
    // Without a template it is only noted.
    host.network().set_pod_cidr("10.9.0.0/24").unwrap();
}

#[test]
fn the_watch_thread_ends_with_the_network() {
    let host = Host::new();
    let network = host.network();
    let weak = Arc::downgrade(&network);
    drop(network);
    eventually("the last reference is gone", || weak.strong_count() == 0);
}

/// A reading that finds half of a file is overtaken by one that finds all of it.
#[test]
fn of_two_readings_the_younger_stays() {
    let host = Host::new();
    let network = host.network();
    let file = host.path("conf/10-a.conflist");
    host.conf("10-a.conflist", "1.0.0", "whole", &["a"]);
    let whole = std::fs::read(&file).unwrap();
    let (half_read, go) = std::sync::mpsc::channel::<()>();
    let (overtaken, done) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let (network, file, whole) = (&network, &file, &whole);
        scope.spawn(move || {
            let slow = |dir: &std::path::Path| {
                std::fs::write(file, &whole[..whole.len() / 2]).unwrap();
                let half = Directory::load(dir);
                std::fs::write(file, whole).unwrap();
                half_read.send(()).unwrap();
                // Preempted here, for as long as a reading takes that does not wait for us.
                let _ = done.recv_timeout(Duration::from_millis(500));
                half
            };
            network.reload_by(slow).unwrap();
        });
        scope.spawn(move || {
            go.recv().unwrap();
            network.reload().unwrap();
            let _ = overtaken.send(());
        });
    });
    assert!(network.status().ready, "{:?}", network.status());
}
