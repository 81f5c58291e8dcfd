//! The daemon of one test with directories of its own, and the look for what it left: mounts, namespaces, leases, cgroups,
//! processes, files.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crisp::api::admin::ImportImageRequest;
use crisp::api::runtime::*;
use crisp::cli::client::{Client, Images, Runtime, SHORT};
use crisp::cli::failure::CallError;
use crisp::config::{Config, Overrides};
use crisp::daemon::Daemon;
use grpcio::RpcStatusCode;
use protobuf::MessageField;
use serde_json::{json, Value};
use tempfile::TempDir;

use crate::{archive, metric};

pub type Answer<T> = Result<T, CallError>;

/// How long an exit, a log line or a call of a fake may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a daemon is told beside its directories: lines of its configuration, by table.
#[derive(Default)]
pub struct Options {
    pub top: String,
    pub limits: String,
    pub cni: String,
    /// Further tables.
    pub tables: String,
    /// Instead of the one that cargo has built.
    pub shim: Option<PathBuf>,
}

pub struct Node {
    dir: TempDir,
    config: Config,
    /// In a lock, because gRPC servers may not be shared between threads.
    daemon: Mutex<Option<Daemon>>,
    client: Option<Client>,
    /// Id of the image that was imported.
    pub image: String,
    /// Sandboxes that were made, to look for their cgroups.
    sandboxes: Mutex<BTreeSet<String>>,
}

/// One call of the fake OCI runtime.
#[derive(Debug)]
pub struct RuntimeCall {
    pub verb: String,
    pub id: String,
    pub args: Vec<String>,
}

impl Node {
    pub fn start() -> Node {
        Node::with(Options::default())
    }

    pub fn with(options: Options) -> Node {
        assert!(nix::unistd::geteuid().is_root(), "tests/cri makes namespaces and mounts: run it as root");
        // Short: names of unix sockets below it end at 107 bytes.
        let dir = tempfile::Builder::new().prefix("cc.").tempdir().expect("make a directory under TMPDIR");
        for name in ["oci/switch", "cni/bin", "cni/conf", "cni/leases", "cni/requests", "logs", "netns"] {
            fs::create_dir_all(dir.path().join(name)).expect("make a directory");
        }
        // Links: a program that was just written could be busy in a child that another test is starting.
        let fake = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cri/fake").join(name);
        symlink(fake("runtime.py"), dir.path().join("oci/runtime")).expect("link the runtime");
        for name in ["first", "second", "third"] {
            symlink(fake("plugin.sh"), dir.path().join("cni/bin").join(name)).expect("link a plugin");
        }
        let config = configuration(dir.path(), &options);
        let config = Config::parse("test", &config, &Overrides::default()).unwrap_or_else(|e| panic!("{e}\n{config}"));
        let sandboxes = Mutex::new(BTreeSet::new());
        let mut node = Node { dir, config, daemon: Mutex::new(None), client: None, image: String::new(), sandboxes };
        node.write_network(&["first", "second", "third"]);
        node.start_daemon();
        node.image = node.import(archive::IMAGE, "one", json!({"Env": ["FROM_IMAGE=yes"], "Cmd": ["/bin/true"]}));
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Writes the default network as a chain of these plugins.
    pub fn write_network(&self, plugins: &[&str]) {
        let plugins: Vec<Value> =
            plugins.iter().map(|p| json!({"type": p, "capabilities": {"portMappings": true, "bandwidth": true}})).collect();
        let conflist = json!({"cniVersion": "1.0.0", "name": "test-net", "plugins": plugins});
        fs::write(self.path("cni/conf/10-test.conflist"), conflist.to_string()).expect("write the network");
    }

    pub fn start_daemon(&mut self) {
        let daemon = start(&self.config).unwrap_or_else(|e| panic!("start the daemon: {e}"));
        self.daemon = Mutex::new(Some(daemon));
        self.client = Some(Client::connect(&self.config.socket).unwrap_or_else(|_| panic!("connect to the daemon")));
    }

    /// Stops the daemon; containers go on.
    pub fn stop_daemon(&mut self) {
        self.client = None;
        if let Some(mut daemon) = self.daemon.get_mut().ok().and_then(Option::take) {
            daemon.stop();
        }
    }

    pub fn restart(&mut self) {
        self.stop_daemon();
        self.start_daemon();
    }

    pub fn client(&self) -> &Client {
        self.client.as_ref().expect("the daemon runs")
    }

    pub fn runtime(&self) -> Runtime<'_> {
        self.client().runtime()
    }

    pub fn images(&self) -> Images<'_> {
        self.client().images()
    }

    /// Imports an image of one layer; its id.
    pub fn import(&self, tag: &str, mark: &str, config: Value) -> String {
        let path = self.path("import.tar");
        let id = archive::write(&path, tag, mark, config);
        let request = ImportImageRequest { path: path.display().to_string(), ..Default::default() };
        let answer = self.client().admin().import_image(&request, SHORT).expect("import an image");
        assert_eq!((answer.images.len(), &answer.images[0].id), (1, &id));
        assert!(answer.images[0].tags.iter().any(|known| known == tag), "{:?}", answer.images[0].tags);
        id
    }

    /// What the fake OCI runtime does wrong from now on (see fake/runtime.py); "" for nothing.
    pub fn switch(&self, verb: &str, how: &str) {
        write_switch(&self.path("oci/switch").join(verb), how);
    }

    /// Shell text that a fake plugin runs first; "" for none.
    pub fn plugin_switch(&self, plugin_and_verb: &str, script: &str) {
        write_switch(&self.path("cni/bin").join(plugin_and_verb), script);
    }

    pub fn runtime_calls(&self) -> Vec<RuntimeCall> {
        let text = fs::read_to_string(self.path("oci/calls")).unwrap_or_default();
        let parse = |line: &str| {
            let call: Value = serde_json::from_str(line).expect("a line of the fake runtime");
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let args = call["args"].as_array().expect("a list").iter().map(text).collect();
            RuntimeCall { verb: text(&call["verb"]), id: text(&call["id"]), args }
        };
        // Without the probe's.
        text.lines().map(parse).filter(|c| !c.id.starts_with("crisp-probe")).collect()
    }

    /// Lines `TYPE VERB SANDBOX IFNAME NETNS ARGS`.
    pub fn plugin_calls(&self) -> Vec<String> {
        fs::read_to_string(self.path("cni/calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// `first ADD`, `second ADD` …, of all sandboxes.
    pub fn plugin_verbs(&self) -> Vec<String> {
        let short = |line: &String| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
        self.plugin_calls().iter().map(short).collect()
    }

    /// What a plugin read from stdin.
    pub fn plugin_request(&self, plugin_and_verb: &str) -> Value {
        let text = fs::read(self.path("cni/requests").join(plugin_and_verb)).expect("the plugin was called");
        serde_json::from_slice(&text).expect("a plugin's request is JSON")
    }

    pub fn sandbox_config(&self, name: &str) -> PodSandboxConfig {
        let metadata =
            PodSandboxMetadata { name: name.into(), uid: format!("uid-{name}"), namespace: "default".into(), ..Default::default() };
        PodSandboxConfig {
            metadata: MessageField::some(metadata),
            log_directory: self.path("logs").join(name).display().to_string(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                // What kubelet sends for an ordinary pod.
                security_context: MessageField::some(LinuxSandboxSecurityContext {
                    namespace_options: MessageField::some(NamespaceOption { pid: NamespaceMode::CONTAINER.into(), ..Default::default() }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub fn run(&self, config: &PodSandboxConfig) -> Answer<String> {
        self.run_with(config, "")
    }

    pub fn run_with(&self, config: &PodSandboxConfig, handler: &str) -> Answer<String> {
        let id = self.runtime().run_pod_sandbox(&run_request(config, handler), SHORT)?.pod_sandbox_id;
        self.sandboxes.lock().expect("no thread panics with it").insert(id.clone());
        Ok(id)
    }

    /// A sandbox that is READY.
    pub fn sandbox(&self, name: &str) -> String {
        self.run(&self.sandbox_config(name)).unwrap_or_else(|e| panic!("run sandbox {name}: {e}"))
    }

    pub fn sandbox_status(&self, id: &str) -> Answer<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.into(), ..Default::default() };
        self.runtime().pod_sandbox_status(&request, SHORT).map(|answer| answer.status.unwrap_or_default())
    }

    pub fn stop_sandbox(&self, id: &str) -> Answer<()> {
        self.runtime().stop_pod_sandbox(&StopPodSandboxRequest { pod_sandbox_id: id.into(), ..Default::default() }, SHORT).map(drop)
    }

    pub fn remove_sandbox(&self, id: &str) -> Answer<()> {
        self.runtime().remove_pod_sandbox(&RemovePodSandboxRequest { pod_sandbox_id: id.into(), ..Default::default() }, SHORT).map(drop)
    }

    /// A container that runs `script`.
    pub fn container_config(&self, name: &str, script: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: MessageField::some(ContainerMetadata { name: name.into(), ..Default::default() }),
            image: MessageField::some(ImageSpec { image: archive::IMAGE.into(), ..Default::default() }),
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            linux: MessageField::some(LinuxContainerConfig {
                resources: MessageField::some(LinuxContainerResources::default()),
                security_context: MessageField::some(LinuxContainerSecurityContext {
                    namespace_options: MessageField::some(NamespaceOption { pid: NamespaceMode::CONTAINER.into(), ..Default::default() }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub fn create(&self, sandbox: &str, config: &ContainerConfig) -> Answer<String> {
        self.runtime().create_container(&create_request(sandbox, config), SHORT).map(|answer| answer.container_id)
    }

    pub fn start_container(&self, id: &str) -> Answer<()> {
        self.runtime().start_container(&StartContainerRequest { container_id: id.into(), ..Default::default() }, SHORT).map(drop)
    }

    /// Create and start.
    pub fn launch(&self, sandbox: &str, name: &str, script: &str) -> String {
        let id = self.create(sandbox, &self.container_config(name, script)).unwrap_or_else(|e| panic!("create {name}: {e}"));
        self.start_container(&id).unwrap_or_else(|e| panic!("start {name}: {e}"));
        id
    }

    /// A container with the shell's `traps` set, which then waits for ever. A signal that came before would find none of them.
    pub fn launch_with_traps(&self, sandbox: &str, name: &str, traps: &str) -> String {
        let id = self.launch(sandbox, name, &format!("{traps}; echo trapped; while :; do sleep 0.05; done"));
        self.wait_trapped(&id);
        id
    }

    /// Waits until the container has said `trapped`.
    pub fn wait_trapped(&self, id: &str) {
        let log = self.status(id).expect("status").log_path;
        eventually("traps are set", || std::fs::read_to_string(&log).ok().filter(|text| text.contains("trapped")));
    }

    pub fn stop(&self, id: &str, seconds: i64) -> Answer<()> {
        let request = StopContainerRequest { container_id: id.into(), timeout: seconds, ..Default::default() };
        self.runtime().stop_container(&request, SHORT).map(drop)
    }

    pub fn remove(&self, id: &str) -> Answer<()> {
        self.runtime().remove_container(&RemoveContainerRequest { container_id: id.into(), ..Default::default() }, SHORT).map(drop)
    }

    pub fn status(&self, id: &str) -> Answer<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.into(), ..Default::default() };
        self.runtime().container_status(&request, SHORT).map(|answer| answer.status.unwrap_or_default())
    }

    pub fn state(&self, id: &str) -> ContainerState {
        self.status(id).expect("status").state.enum_value_or_default()
    }

    pub fn wait_exit(&self, id: &str) -> ContainerStatus {
        eventually(&format!("{id} exits"), || self.status(id).ok().filter(|s| s.state.enum_value() == Ok(ContainerState::CONTAINER_EXITED)))
    }

    /// Host pid of a running container, from the verbose status.
    pub fn pid(&self, id: &str) -> i32 {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: true, ..Default::default() };
        let answer = self.runtime().container_status(&request, SHORT).expect("status");
        let info: Value = serde_json::from_str(&answer.info["info"]).expect("info is JSON");
        info["pid"].as_i64().expect("a pid") as i32
    }

    /// The OCI spec of a container, from the verbose status.
    pub fn spec(&self, id: &str) -> Value {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: true, ..Default::default() };
        let answer = self.runtime().container_status(&request, SHORT).expect("status");
        let info: Value = serde_json::from_str(&answer.info["info"]).expect("info is JSON");
        info["runtimeSpec"].clone()
    }

    pub fn exec(&self, id: &str, script: &str, timeout: i64) -> Answer<ExecSyncResponse> {
        self.runtime().exec_sync(&exec_request(id, script, timeout), SHORT)
    }

    pub fn sandbox_ids(&self) -> Vec<String> {
        let answer = self.runtime().list_pod_sandbox(&ListPodSandboxRequest::default(), SHORT).expect("list sandboxes");
        answer.items.into_iter().map(|s| s.id).collect()
    }

    pub fn container_ids(&self) -> Vec<String> {
        let answer = self.runtime().list_containers(&ListContainersRequest::default(), SHORT).expect("list containers");
        answer.containers.into_iter().map(|c| c.id).collect()
    }

    /// Every sandbox this node has ever had, those that failed included as far as plugins saw them.
    fn known_sandboxes(&self) -> BTreeSet<String> {
        let mut ids = self.sandboxes.lock().map(|ids| ids.clone()).unwrap_or_default();
        ids.extend(self.plugin_calls().iter().filter_map(|line| line.split(' ').nth(2)).map(str::to_owned));
        ids
    }

    /// What stays on the host of everything this node made; empty when all is well. Given time: a shim's socket is closed before
    /// its process has gone, and a reaped process stays in /proc for a moment.
    pub fn leftovers(&self) -> Vec<String> {
        let begin = Instant::now();
        loop {
            let left = self.left_now();
            if left.is_empty() || begin.elapsed() > PATIENCE {
                return left;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn left_now(&self) -> Vec<String> {
        let mut left = Vec::new();
        for mount in crisp::sys::mount::below(self.dir.path()).expect("read the mount table") {
            left.push(format!("mount {}", mount.display()));
        }
        for dir in [
            "netns",
            "cni/leases",
            "cache/results",
            "run/sandboxes",
            "run/containers",
            "root/sandboxes",
            "root/containers",
            "root/snapshots",
        ] {
            for entry in fs::read_dir(self.path(dir)).into_iter().flatten().flatten() {
                left.push(format!("file {}", entry.path().display()));
            }
        }
        let ids = self.known_sandboxes();
        for dir in ids.iter().flat_map(|id| cgroups(id)) {
            left.push(format!("cgroup {}", dir.display()));
        }
        for (pid, what) in self.processes() {
            left.push(format!("process {pid}: {what}"));
        }
        left
    }

    /// Processes of this node but for the test's own: with its directory in their arguments, or in a cgroup of its sandboxes.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let (dir, ids) = (self.dir.path().display().to_string(), self.known_sandboxes());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("list processes").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
            let cgroup = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            let ours = arguments.contains(&dir) || ids.iter().any(|id| cgroup.contains(id.as_str()));
            if ours && pid != std::process::id() as i32 {
                found.push((pid, arguments));
            }
        }
        found
    }

    fn clean_by_force(&self) {
        for (pid, _) in self.processes() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(50));
        let mut mounts = crisp::sys::mount::below(self.dir.path()).unwrap_or_default();
        mounts.reverse();
        for mount in mounts {
            let _ = crisp::sys::mount::unmount(&mount);
        }
        for dir in self.known_sandboxes().iter().flat_map(|id| cgroups(id)) {
            for below in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(below.path());
            }
            let _ = fs::remove_dir(dir);
        }
    }
}

impl Drop for Node {
    /// A test that did not fail must leave its host as it was; one that did is cleaned up after.
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        let mut problems = Vec::new();
        if let Some(client) = &self.client {
            let runtime = client.runtime();
            for sandbox in runtime.list_pod_sandbox(&ListPodSandboxRequest::default(), SHORT).map(|l| l.items).unwrap_or_default() {
                let request = RemovePodSandboxRequest { pod_sandbox_id: sandbox.id.clone(), ..Default::default() };
                if let Err(e) = runtime.remove_pod_sandbox(&request, SHORT) {
                    problems.push(format!("remove sandbox {}: {e}", sandbox.id));
                }
            }
        }
        self.stop_daemon();
        if !failed {
            problems.extend(self.leftovers());
        }
        self.clean_by_force();
        if !failed && !problems.is_empty() {
            panic!("left behind:\n  {}", problems.join("\n  "));
        }
    }
}

/// A user namespace with these maps (container's id, host's, length).
pub fn users(uids: &[(u32, u32, u32)], gids: &[(u32, u32, u32)]) -> UserNamespace {
    let list = |maps: &[(u32, u32, u32)]| {
        let mapping = |&(container_id, host_id, length): &_| IDMapping { container_id, host_id, length, ..Default::default() };
        maps.iter().map(mapping).collect()
    };
    UserNamespace { mode: NamespaceMode::POD.into(), uids: list(uids), gids: list(gids), ..Default::default() }
}

/// Starts a daemon. A child that another test is starting may hold a copy of the former daemon's lock until its exec.
pub fn start(config: &Config) -> crisp::error::Result<Daemon> {
    let begin = Instant::now();
    loop {
        match Daemon::start(config) {
            Err(e) if e.message().contains("another crispd") && begin.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

fn configuration(dir: &Path, options: &Options) -> String {
    let path = |name: &str| format!("{:?}", dir.join(name).display().to_string());
    let shim = options.shim.clone().unwrap_or_else(|| env!("CARGO_BIN_EXE_crisp-shim").into());
    let mut text = options.top.clone();
    for (key, name) in [("root", "root"), ("run", "run"), ("netns_dir", "netns")] {
        text += &format!("{key} = {}\n", path(name));
    }
    text += &format!("cdi_spec_dirs = [{}]\nhooks_dirs = [{}]\n", path("cdi"), path("hooks"));
    text += &format!("shim = {:?}\ndefault_runtime = \"fake\"\n", shim.display().to_string());
    // Of type runc it starts an exec in a cgroup of its own.
    text += &format!("[runtimes.fake]\npath = {}\ntype = \"runc\"\n", path("oci/runtime"));
    text += &format!("[runtimes.second]\npath = {}\ntype = \"other\"\n", path("oci/runtime"));
    // Not the host's: what is tested must not depend on it, and their probes take time.
    text += &format!("[runtimes.crun]\npath = {}\n[runtimes.runc]\npath = {}\n", path("no-crun"), path("no-runc"));
    text += &format!("[cni]\nconf_dir = {}\nbin_dirs = [{}]\ncache_dir = {}\n", path("cni/conf"), path("cni/bin"), path("cache"));
    text += &options.cni;
    text += &format!("\n[images]\nregistry_dir = {}\npreload_dir = {}\n", path("certs"), path("preload"));
    text += &format!("verifier_dir = {}\n", path("verifiers"));
    text += &format!("[limits]\n{}\n", options.limits);
    text += &format!("[metrics]\naddress = \"{}\"\n", metric::address());
    text + &options.tables
}

fn write_switch(path: &Path, text: &str) {
    match text {
        "" => fs::remove_file(path).expect("remove a switch"),
        text => {
            // Renamed into place: it may be read at any time.
            let new = path.with_extension("new");
            fs::write(&new, text).and_then(|()| fs::rename(&new, path)).expect("write a switch");
        }
    }
}

/// Directories of a sandbox without a cgroup parent of its own, in every hierarchy.
fn cgroups(id: &str) -> Vec<PathBuf> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let places = hierarchies.chain(["/sys/fs/cgroup".into()]).map(|dir| dir.join("crisp").join(id));
    places.filter(|dir| dir.exists()).collect()
}

/// Asks until there is an answer.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The error of a call that must fail, with this code and these words.
#[track_caller]
pub fn refused<T>(answer: Answer<T>, code: RpcStatusCode, words: &str) -> String {
    let Err(error) = answer else { panic!("the call succeeded; expected {code} with {words:?}") };
    assert_eq!(error.code, code, "{error}");
    assert!(error.message.contains(words), "{words:?} is not in: {error}");
    error.message
}

pub fn run_request(config: &PodSandboxConfig, handler: &str) -> RunPodSandboxRequest {
    RunPodSandboxRequest { config: MessageField::some(config.clone()), runtime_handler: handler.into(), ..Default::default() }
}

pub fn create_request(sandbox: &str, config: &ContainerConfig) -> CreateContainerRequest {
    CreateContainerRequest { pod_sandbox_id: sandbox.into(), config: MessageField::some(config.clone()), ..Default::default() }
}

pub fn exec_request(id: &str, script: &str, timeout: i64) -> ExecSyncRequest {
    let cmd = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    ExecSyncRequest { container_id: id.into(), cmd, timeout, ..Default::default() }
}

/// Whether a process with that pid is there and is no zombie.
pub fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z")
}
