//! Real CNI plugins: bridge, host-local, portmap, bandwidth and firewall of the distribution. What the plugins take for the
//! host is a network namespace of the test, so that the machine's own links and iptables are not touched.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crisp::error::{Context, Error, Result};
use crisp::network::{Attachment, Bandwidth, Network, PortMapping, Settings};
use crisp::sys::cancel::Cancel;
use crisp::sys::namespace::{self, NewNamespaces};
use crisp::sys::process::Program;
use crisp::sys::thread;
use serde_json::json;

use crate::daemon::patience;

const BRIDGE: &str = "crtest0";
const HOST_PORT: u16 = 18080;
const PORT: u16 = 8080;

/// Where distributions keep the plugins.
const BIN_DIRS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// A pinned network namespace, gone when dropped.
struct Netns(PathBuf);

impl Netns {
    fn new(path: PathBuf) -> Netns {
        namespace::create(NewNamespaces { net: Some(path.clone()), ..Default::default() }).expect("make a network namespace (root?)");
        Netns(path)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        namespace::unpin(&self.0).unwrap();
    }
}

fn ready_host() {
    assert!(nix::unistd::geteuid().is_root(), "these tests need root");
    for plugin in ["bridge", "host-local", "portmap", "bandwidth", "firewall"] {
        let found = BIN_DIRS.iter().any(|d| Path::new(d).join(plugin).exists());
        assert!(found, "CNI plugin {plugin} is missing: apt-get install containernetworking-plugins");
    }
    let iptables = ["/usr/sbin/iptables-save", "/sbin/iptables-save"].iter().any(|p| Path::new(p).exists());
    assert!(iptables, "iptables-save is missing: apt-get install iptables");
}

fn settings(dir: &Path, more_plugins: &[&str]) -> Settings {
    let conf = dir.join("conf");
    std::fs::create_dir_all(&conf).unwrap();
    let ranges = json!([[{"subnet": "10.231.77.0/24"}], [{"subnet": "fd00:231:77::/64"}]]);
    let mut plugins = vec![
        json!({"type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": true,
            "ipam": {"type": "host-local", "dataDir": dir.join("leases"),
            "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}),
        json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
        json!({"type": "firewall"}),
    ];
    plugins.extend(more_plugins.iter().map(|p| json!({"type": p})));
    let list = json!({"cniVersion": "1.0.0", "name": "crtest", "plugins": plugins});
    std::fs::write(conf.join("10-crtest.conflist"), list.to_string()).unwrap();
    Settings {
        conf_dir: conf,
        bin_dirs: BIN_DIRS.iter().map(PathBuf::from).chain([dir.join("bin")]).collect(),
        cache_dir: dir.join("cache"),
        plugin_timeout: Duration::from_secs(60),
        template: None,
        max_networks: 8,
    }
}

fn attachment(id: &str, netns: &Path) -> Attachment {
    Attachment {
        sandbox_id: id.into(),
        name: "web".into(),
        namespace: "default".into(),
        uid: "6c1d".into(),
        netns: netns.to_owned(),
        port_mappings: vec![
            PortMapping { protocol: "tcp".into(), container_port: PORT, host_port: HOST_PORT, host_ip: String::new() },
            PortMapping { protocol: "udp".into(), container_port: 53, host_port: 0, host_ip: String::new() },
        ],
        bandwidth: Some(Bandwidth { ingress_rate: 1_000_000_000, egress_rate: 1_000_000_000, ..Default::default() }),
        ..Default::default()
    }
}

/// Names of the links in the calling thread's network namespace.
fn links() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let mut names: Vec<String> = text.lines().skip(2).filter_map(|l| Some(l.split_once(':')?.0.trim().to_owned())).collect();
    names.retain(|n| n != "lo");
    names
}

/// Rules of the calling thread's network namespace that name a chain or an address of a sandbox.
fn rules() -> Vec<String> {
    let mut rules = Vec::new();
    for program in ["iptables-save", "ip6tables-save"] {
        let out = Program::new(program).run_ok(&Cancel::never(), patience(Duration::from_secs(20))).unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        rules.extend(
            text.lines().filter(|l| l.contains("CNI-DN-") || l.contains("10.231.77.") || l.contains("fd00:231:77:")).map(str::to_owned),
        );
    }
    rules
}

fn leases(dir: &Path) -> Vec<String> {
    let Ok(names) = std::fs::read_dir(dir.join("leases/crtest")) else { return Vec::new() };
    let names = names.map(|n| n.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.starts_with("10.") || n.starts_with("fd00")).collect()
}

/// Answers one byte per connection from inside the namespace, until the listener's thread ends with the test's process.
fn serve(netns: &Path, ip: IpAddr) {
    let end = Instant::now() + patience(Duration::from_secs(10));
    // An IPv6 address can be bound once the kernel has seen that nobody else has it.
    let listener = loop {
        let bound = namespace::in_netns(netns, move || TcpListener::bind((ip, PORT)).context(|| format!("listen on {ip}")));
        match bound {
            Ok(listener) => break listener,
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            Err(e) => panic!("{e}"),
        }
    };
    thread::spawn("serve", move || {
        for connection in listener.incoming() {
            let _ = connection.and_then(|mut c| c.write_all(b"x"));
        }
    })
    .unwrap();
}

/// The kernel lets an IPv6 address of a new bridge speak after a second or two: duplicate address detection.
fn eventually(test: impl Fn() -> Result<()>) {
    let end = Instant::now() + patience(Duration::from_secs(15));
    loop {
        match test() {
            Ok(()) => return,
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            Err(e) => panic!("{e}"),
        }
    }
}

fn answers(address: SocketAddr) -> Result<()> {
    let what = || format!("reach {address}");
    let mut connection = TcpStream::connect_timeout(&address, patience(Duration::from_secs(1))).context(what)?;
    connection.set_read_timeout(Some(patience(Duration::from_secs(1)))).context(what)?;
    let mut byte = [0];
    connection.read_exact(&mut byte).context(what)?;
    if byte == *b"x" {
        Ok(())
    } else {
        Err(Error::internal("it answers something else"))
    }
}

/// Runs `body` in a fresh "host" with a directory and the namespace of a sandbox.
fn on_a_host(body: impl FnOnce(PathBuf, PathBuf) + Send + 'static) {
    ready_host();
    let dir = tempfile::tempdir().unwrap();
    let host = Netns::new(dir.path().join("host-ns"));
    let pin = dir.path().join("sandbox-ns");
    let _sandbox = Netns::new(pin.clone());
    let root = dir.path().to_owned();
    // A panic of the body is reported by its thread; the namespaces go away here in any case.
    let result = namespace::in_netns(&host.0, move || {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context(|| "set ip_forward")?;
        body(root, pin);
        Ok(())
    });
    result.unwrap();
}

#[test]
fn a_sandbox_is_reachable_and_leaves_nothing() {
    on_a_host(|dir, netns| {
        let network = Network::start(settings(&dir, &[])).unwrap();
        assert!(network.status().ready, "{:?}", network.status());
        let a = attachment("crtest-a", &netns);
        let setup = network.setup(&a, &Cancel::never()).unwrap();
        assert_eq!(setup.ips.len(), 2, "{setup:?}");
        assert!(setup.ips[0].is_ipv4() && setup.ips[1].is_ipv6(), "{setup:?}");
        assert_eq!(leases(&dir).len(), 2);
        assert!(setup.networks[0].mac.is_some());
        for ip in &setup.ips {
            serve(&netns, *ip);
            eventually(|| answers((*ip, PORT).into()));
        }
        eventually(|| answers(([127, 0, 0, 1], HOST_PORT).into()));
        assert!(links().contains(&BRIDGE.to_owned()) && links().len() >= 2, "{:?}", links());
        assert!(!rules().is_empty());

        network.teardown(&a).unwrap();
        assert_eq!(links(), [BRIDGE]);
        assert_eq!(leases(&dir), [""; 0]);
        assert_eq!(rules(), [""; 0]);
        assert!(network.cached_sandboxes().is_empty());
        let inside = namespace::in_netns(&netns, || Ok(links())).unwrap();
        assert_eq!(inside, [""; 0]);
        network.teardown(&a).unwrap();
    });
}

#[test]
fn a_chain_that_fails_at_its_end_leaves_nothing() {
    on_a_host(|dir, netns| {
        std::fs::create_dir(dir.join("bin")).unwrap();
        let plugin = dir.join("bin/refuse");
        std::fs::write(&plugin, "#!/bin/sh\n[ $CNI_COMMAND = ADD ] || exit 0\necho '{\"code\":100,\"msg\":\"refused\"}'; exit 1\n")
            .unwrap();
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
        let network = Network::start(settings(&dir, &["refuse"])).unwrap();
        let e = network.setup(&attachment("crtest-b", &netns), &Cancel::never()).unwrap_err();
        assert_eq!(e.message(), "set up network of sandbox crtest-b: network crtest: plugin refuse: ADD: refused (code 100)");
        assert_eq!(links(), [BRIDGE]);
        assert_eq!((leases(&dir), rules()), (Vec::new(), Vec::new()));
        assert!(network.cached_sandboxes().is_empty());
    });
}

#[test]
fn what_a_killed_daemon_left_is_freed_by_the_next() {
    on_a_host(|dir, netns| {
        let network = Network::start(settings(&dir, &[])).unwrap();
        // Older portmap plugins cannot CHECK two families.
        let a = Attachment { port_mappings: Vec::new(), ..attachment("crtest-c", &netns) };
        network.setup(&a, &Cancel::never()).unwrap();
        network.check(&a).unwrap();
        drop(network);
        let settings = settings(&dir, &[]);
        std::fs::remove_file(settings.conf_dir.join("10-crtest.conflist")).unwrap();
        let network = Network::start(settings).unwrap();
        assert_eq!(network.cached_sandboxes(), ["crtest-c"]);
        network.gc(&[]).unwrap();
        assert_eq!((leases(&dir), rules(), links()), (Vec::new(), Vec::new(), vec![BRIDGE.to_owned()]));
        assert!(network.cached_sandboxes().is_empty());
    });
}

#[test]
fn leases_of_a_namespace_that_is_gone_are_freed() {
    on_a_host(|dir, netns| {
        let network = Network::start(settings(&dir, &[])).unwrap();
        let a = attachment("crtest-d", &netns);
        network.setup(&a, &Cancel::never()).unwrap();
        namespace::unpin(&netns).unwrap();
        network.check(&a).unwrap_err();
        network.teardown(&a).unwrap();
        assert_eq!(leases(&dir), [""; 0]);
        // Older bridge plugins cannot undo ipMasq then (they ask the namespace for its addresses); the rest they can.
        assert!(!rules().iter().any(|r| r.contains("CNI-DN-") || r.contains("CNI-FORWARD")), "{:?}", rules());
        // The kernel ends a namespace's links in its own time.
        eventually(|| if links() == [BRIDGE] { Ok(()) } else { Err(Error::internal(format!("{:?}", links()))) });
        assert!(network.cached_sandboxes().is_empty());
    });
}

#[test]
fn sandboxes_are_set_up_at_the_same_time() {
    on_a_host(|dir, _| {
        let network = Network::start(settings(&dir, &[])).unwrap();
        let pins: Vec<Netns> = (0..8).map(|i| Netns::new(dir.join(format!("ns-{i}")))).collect();
        // The firewall plugin's first call on a host makes its chains, and two first calls fail one another (plugins 1.1.1).
        let first = Netns::new(dir.join("ns-first"));
        let only = Attachment { port_mappings: Vec::new(), bandwidth: None, ..attachment("crtest-first", &first.0) };
        network.setup(&only, &Cancel::never()).unwrap();
        network.teardown(&only).unwrap();
        let plain =
            |i: usize, pin: &Netns| Attachment { port_mappings: Vec::new(), bandwidth: None, ..attachment(&format!("crtest-{i}"), &pin.0) };
        let threads: Vec<_> = pins
            .iter()
            .enumerate()
            .map(|(i, pin)| {
                let (network, a): (Arc<Network>, _) = (network.clone(), plain(i, pin));
                thread::spawn("setup", move || network.setup(&a, &Cancel::never())).unwrap()
            })
            .collect();
        let mut ips: Vec<IpAddr> = threads.into_iter().map(|t| t.join().unwrap().unwrap().ips[0]).collect();
        ips.sort();
        ips.dedup();
        assert_eq!(ips.len(), 8);
        for (i, pin) in pins.iter().enumerate() {
            network.teardown(&plain(i, pin)).unwrap();
        }
        assert_eq!((leases(&dir), rules(), links()), (Vec::new(), Vec::new(), vec![BRIDGE.to_owned()]));
    });
}
