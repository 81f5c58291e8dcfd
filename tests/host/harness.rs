//! A daemon for one test, alone on the host: what the test makes is taken away, and the host compared with what it was.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crisp::api::runtime::{
    ContainerConfig, ContainerState, ContainerStatus, ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest,
    PodSandboxConfig, PodSandboxStatus, PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest,
};
use grpcio::RpcStatusCode;
use parking_lot::{Mutex, MutexGuard};

use crate::client::{Call, Client};
use crate::daemon::{find, image, patience, shim, Daemon, Kind, Options};
use crate::logs::Log;
use crate::objects::{container_config, create_request, exec_request, run_request, sandbox_config};
use crate::snapshot::Snapshot;

/// Hosts have one mount table, one list of links, one cgroup tree: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// How long an exit, an address or a log line may take (see `patience`).
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Host {
    pub daemon: Daemon,
    pub client: Client,
    before: Snapshot,
    forwarding: Vec<u8>,
    finished: bool,
    _alone: MutexGuard<'static, ()>,
}

/// A sandbox that runs.
pub struct Sandbox {
    pub id: String,
    pub config: PodSandboxConfig,
    /// Empty on the host's network.
    pub ip: String,
}

/// A container that was created.
pub struct Container {
    pub id: String,
    pub log: Log,
}

pub fn kind() -> Kind {
    match std::env::var("CRISP_TEST_DAEMON").as_deref() {
        Ok("containerd") => Kind::Containerd,
        Ok("") | Ok("crispd") | Err(_) => Kind::Crispd,
        Ok(other) => panic!("CRISP_TEST_DAEMON={other}: crispd or containerd"),
    }
}

/// The runtime handlers every test of containers is repeated with.
pub fn handlers() -> Vec<String> {
    match kind() {
        Kind::Crispd => runtimes().into_iter().map(|(name, _)| name).collect(),
        Kind::Containerd => vec![String::new()],
    }
}

/// runc and crun, which must both work here; CRISP_TEST_RUNTIMES may name one of them.
fn runtimes() -> Vec<(String, PathBuf)> {
    let hybrid = Path::new("/sys/fs/cgroup/unified/cgroup.controllers").exists();
    let mounts = fs::read_to_string("/proc/mounts").expect("read the mount table");
    assert!(
        !hybrid || mounts.contains(" /sys/fs/cgroup/hugetlb "),
        "crun 1.8 refuses this host's hybrid cgroups unless hugetlb is mounted: run make host, or scripts/with-hugetlb cargo test …"
    );
    let named = |name: &str| (name.to_owned(), find(name).unwrap_or_else(|| panic!("{name} is not installed: run scripts/install-deps")));
    wanted_runtimes().into_iter().map(named).collect()
}

/// The OCI runtimes to test with.
pub fn wanted_runtimes() -> Vec<&'static str> {
    let wanted = std::env::var("CRISP_TEST_RUNTIMES").unwrap_or_else(|_| "runc,crun".into());
    let found: Vec<_> = ["runc", "crun"].into_iter().filter(|name| wanted.split(',').any(|w| w == *name)).collect();
    assert!(!found.is_empty(), "CRISP_TEST_RUNTIMES={wanted}: runc, crun or both");
    found
}

fn require() {
    assert!(nix::unistd::geteuid().is_root(), "tests/host makes sandboxes: run it as root");
    for program in ["ip", "iptables", "busybox"] {
        assert!(find(program).is_some(), "{program} is not installed: run scripts/install-deps");
    }
    assert!(kind() == Kind::Containerd || shim().exists(), "{} is missing: make shim, or set CRISP_SHIM", shim().display());
}

impl Host {
    pub fn start() -> Host {
        Host::start_with(|_| {})
    }

    /// Starts a daemon of its own with busybox and pause imported; `adjust` may change what it is told.
    pub fn start_with(adjust: impl FnOnce(&mut Options)) -> Host {
        let alone = ALONE.lock();
        require();
        let mut options = Options::default();
        if kind() == Kind::Crispd {
            options.runtimes = runtimes();
        }
        adjust(&mut options);
        // The bridge plugin turns it on, and nobody off.
        let forwarding = fs::read("/proc/sys/net/ipv4/ip_forward").expect("read ip_forward");
        let daemon = Daemon::start(kind(), options);
        daemon.import(&image("busybox"));
        daemon.import(&image("pause"));
        let before = Snapshot::take(&daemon);
        Host { client: daemon.client(), daemon, before, forwarding, finished: false, _alone: alone }
    }

    /// A call that must succeed.
    pub fn call<Q: Call>(&self, request: &Q) -> Q::Response {
        self.client.call(request).unwrap_or_else(|e| panic!("{}: {e}\nthe daemon's log:\n{}", Q::NAME, self.daemon.log_tail()))
    }

    /// A call that must fail: its code and message.
    pub fn refused<Q: Call>(&self, request: &Q) -> (RpcStatusCode, String) {
        match self.client.call(request) {
            Ok(_) => panic!("{} succeeded", Q::NAME),
            Err(grpcio::Error::RpcFailure(status)) => (status.code(), status.message().to_owned()),
            Err(e) => panic!("{}: {e}", Q::NAME),
        }
    }

    pub fn sandbox(&self, name: &str, handler: &str) -> Sandbox {
        self.run(sandbox_config(&self.daemon.layout, name, false), handler)
    }

    pub fn run(&self, config: PodSandboxConfig, handler: &str) -> Sandbox {
        fs::create_dir_all(&config.log_directory).expect("make the log directory");
        let id = self.call(&run_request(&config, handler)).pod_sandbox_id;
        let ip = self.sandbox_status(&id).network.ip.clone();
        Sandbox { id, config, ip }
    }

    pub fn sandbox_status(&self, id: &str) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.into(), ..Default::default() };
        self.call(&request).status.unwrap_or_default()
    }

    pub fn create(&self, sandbox: &Sandbox, name: &str, command: &[&str]) -> Container {
        self.create_with(sandbox, name, command, |_| {})
    }

    pub fn create_with(&self, sandbox: &Sandbox, name: &str, command: &[&str], adjust: impl FnOnce(&mut ContainerConfig)) -> Container {
        let mut config = container_config(&sandbox.config, name, command);
        adjust(&mut config);
        let id = self.call(&create_request(&sandbox.id, &sandbox.config, &config)).container_id;
        Container { id, log: Log(Path::new(&sandbox.config.log_directory).join(&config.log_path)) }
    }

    pub fn start_container(&self, container: &Container) {
        self.call(&StartContainerRequest { container_id: container.id.clone(), ..Default::default() });
    }

    /// Create and start.
    pub fn launch(&self, sandbox: &Sandbox, name: &str, command: &[&str]) -> Container {
        let container = self.create(sandbox, name, command);
        self.start_container(&container);
        container
    }

    pub fn status(&self, container: &Container) -> ContainerStatus {
        let request = ContainerStatusRequest { container_id: container.id.clone(), ..Default::default() };
        self.call(&request).status.unwrap_or_default()
    }

    /// Waits for the end of the container and its exit record.
    pub fn wait_exit(&self, container: &Container) -> ContainerStatus {
        let begin = Instant::now();
        loop {
            let status = self.status(container);
            if status.state.enum_value() == Ok(ContainerState::CONTAINER_EXITED) {
                return status;
            }
            assert!(begin.elapsed() < patience(PATIENCE), "{} does not exit: {status}", container.id);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Exit code, stdout and stderr of a command in the container.
    pub fn exec(&self, container: &Container, command: &[&str]) -> (i32, String, String) {
        let answer = self.call(&exec_request(&container.id, command, patience(Duration::from_secs(10)).as_secs() as i64));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (answer.exit_code, text(answer.stdout), text(answer.stderr))
    }

    pub fn stop(&self, container: &Container, seconds: i64) {
        self.call(&StopContainerRequest { container_id: container.id.clone(), timeout: seconds, ..Default::default() });
    }

    pub fn remove(&self, container: &Container) {
        self.call(&RemoveContainerRequest { container_id: container.id.clone(), ..Default::default() });
    }

    pub fn stop_sandbox(&self, id: &str) {
        self.call(&StopPodSandboxRequest { pod_sandbox_id: id.into(), ..Default::default() });
    }

    pub fn remove_sandbox(&self, id: &str) {
        self.call(&RemovePodSandboxRequest { pod_sandbox_id: id.into(), ..Default::default() });
    }

    /// Stops and removes every sandbox, as a kubelet does with those it does not know.
    pub fn remove_all(&self) {
        for sandbox in self.call(&ListPodSandboxRequest::default()).items {
            self.stop_sandbox(&sandbox.id);
            self.remove_sandbox(&sandbox.id);
        }
    }

    /// Compares with what the host was when the test began.
    pub fn assert_clean(&self) {
        self.before.assert_same(&self.daemon);
    }

    /// The good end of a test: all objects go, and nothing else is left.
    pub fn finish(mut self) {
        self.remove_all();
        assert!(self.call(&ListPodSandboxRequest::default()).items.is_empty());
        assert!(self.call(&ListContainersRequest::default()).containers.is_empty());
        self.assert_clean();
        let end = self.daemon.stop(nix::sys::signal::Signal::SIGTERM);
        assert!(end.is_some_and(|end| end.success()), "the daemon did not end well on SIGTERM: {end:?}\n{}", self.daemon.log_tail());
        assert!(self.daemon.monitors().is_empty(), "monitors live on");
        self.finished = true;
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !self.finished {
            // The test has failed already: what can be removed in an orderly way is, the rest by Daemon's drop.
            for sandbox in self.client.call(&ListPodSandboxRequest::default()).map(|list| list.items).unwrap_or_default() {
                let _ = self.client.call(&StopPodSandboxRequest { pod_sandbox_id: sandbox.id.clone(), ..Default::default() });
                let _ = self.client.call(&RemovePodSandboxRequest { pod_sandbox_id: sandbox.id, ..Default::default() });
            }
        }
        let _ = fs::write("/proc/sys/net/ipv4/ip_forward", &self.forwarding);
    }
}

/// One GET; the body, or why there is none. For servers that close after the answer.
pub fn http_get(address: &str, port: u16, path: &str) -> std::io::Result<String> {
    let address: SocketAddr = format!("{address}:{port}").parse().expect("an address");
    let mut stream = TcpStream::connect_timeout(&address, patience(Duration::from_secs(2)))?;
    stream.set_read_timeout(Some(patience(Duration::from_secs(5))))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: test\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

/// The same, again until there is an answer: a server listens a moment after its start.
pub fn http_get_soon(address: &str, port: u16, path: &str) -> String {
    let begin = Instant::now();
    loop {
        match http_get(address, port, path) {
            Ok(body) => return body,
            Err(e) => assert!(begin.elapsed() < patience(PATIENCE), "{address}:{port}{path}: {e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
