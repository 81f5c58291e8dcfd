//! Starts a CRI daemon that shares nothing with the host's: its directories, socket, CNI network and bridge are its own.
//! crispd is what is tested; containerd is what the benchmark compares with, and what the tests are checked against.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crisp::api::admin::ImportImageRequest;
use crisp::api::runtime::VersionRequest;
use crisp::sys::cancel::Cancel;
use crisp::sys::process::Program;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

use crate::client::Client;

const CALL_TIMEOUT: Duration = Duration::from_secs(60);
const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
pub const BUSYBOX: &str = "localhost/busybox:latest";
pub const PAUSE: &str = "localhost/pause:latest";

/// How many times slower than real this machine is: CRISP_TEST_PATIENCE, for machines that are emulated.
pub fn slowness() -> u32 {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| match std::env::var("CRISP_TEST_PATIENCE") {
        Ok(text) => text.parse().expect("CRISP_TEST_PATIENCE is a whole number"),
        Err(_) => 1,
    });
    *FACTOR
}

/// Whether systemd makes the cgroups: CRISP_TEST_CGROUP_DRIVER=systemd, for machines where it is PID 1.
pub fn systemd() -> bool {
    std::env::var("CRISP_TEST_CGROUP_DRIVER").is_ok_and(|driver| driver == "systemd")
}

/// A limit of time on this machine.
pub fn patience(limit: Duration) -> Duration {
    limit * slowness()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Crispd,
    Containerd,
}

/// Names that no other daemon on the host uses.
pub struct Layout {
    dir: TempDir,
    /// Part of the names of the cgroup, the bridge and the CNI network.
    pub tag: String,
    subnet: u8,
}

impl Layout {
    pub fn new() -> Layout {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = std::process::id().wrapping_add(COUNT.fetch_add(1, Ordering::Relaxed).wrapping_mul(101));
        // Short: the names of unix sockets below it end at 107 bytes.
        let dir = tempfile::Builder::new().prefix("cr.").tempdir().expect("make a directory under TMPDIR");
        // Root of a user namespace must be able to pass through, as through /run and /var/lib.
        let passable = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        fs::set_permissions(dir.path(), passable).expect("open the directory");
        let layout = Layout { dir, tag: format!("crt{:x}", number & 0xfff_ffff), subnet: (number % 254 + 1) as u8 };
        for name in ["bin", "root", "run", "cni", "cache", "leases", "logs", "preload"] {
            fs::create_dir(layout.path(name)).expect("make a directory");
        }
        layout
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("cri.sock")
    }

    pub fn bridge(&self) -> String {
        self.tag.clone()
    }

    pub fn cgroup_parent(&self) -> String {
        match systemd() {
            true => format!("{}.slice", self.tag),
            false => format!("/{}", self.tag),
        }
    }

    /// The default network: a bridge of its own with addresses of its own, port mappings, and a cheap third plugin.
    pub fn write_network(&self) {
        let range = json!([{ "subnet": format!("10.213.{}.0/24", self.subnet) }]);
        let conflist = json!({
            "cniVersion": "1.0.0",
            "name": self.tag,
            "plugins": [
                {
                    "type": "bridge", "bridge": self.bridge(), "isGateway": true, "ipMasq": false,
                    "ipam": { "type": "host-local", "dataDir": self.path("leases"), "ranges": [range], "routes": [{ "dst": "0.0.0.0/0" }] },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
                { "type": "tuning" },
            ],
        });
        fs::write(self.path("cni/10-test.conflist"), conflist.to_string()).expect("write the network's configuration");
    }
}

/// What a daemon is told beside its directories.
#[derive(Clone, Default)]
pub struct Options {
    /// Handler name and program; the first is the default.
    pub runtimes: Vec<(String, PathBuf)>,
    /// Registries spoken to without TLS.
    pub plain_http: Vec<String>,
    pub environment: Vec<(String, String)>,
    /// Keys of crispd's configuration outside of any table, as TOML.
    pub top: String,
    /// Further tables of crispd's configuration, as TOML.
    pub tables: String,
}

pub struct Daemon {
    pub kind: Kind,
    pub layout: Layout,
    pub options: Options,
    child: Option<Child>,
    /// Directories to remove at the end, for they were not there before.
    strays: Vec<&'static str>,
}

/// containerd's shims and its CNI library have fixed places, whatever its configuration says.
const CONTAINERD_PLACES: [&str; 2] = ["/run/containerd", "/var/lib/cni"];

impl Daemon {
    /// Starts the daemon and waits until it answers.
    pub fn start(kind: Kind, options: Options) -> Daemon {
        let layout = Layout::new();
        layout.write_network();
        let places = if kind == Kind::Containerd { &CONTAINERD_PLACES[..] } else { &[] };
        let strays = places.iter().copied().filter(|place| !Path::new(place).exists()).collect();
        let mut daemon = Daemon { kind, layout, options, child: None, strays };
        if kind == Kind::Crispd {
            // A path of its own tells this daemon's shims from all others.
            fs::copy(shim(), daemon.layout.path("bin/crisp-shim")).unwrap_or_else(|e| panic!("{}: {e} (make shim)", shim().display()));
        }
        daemon.run();
        daemon.wait_ready();
        daemon
    }

    /// Starts the process alone, with the configuration `options` say now.
    pub fn run(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_path()).expect("open the daemon's log");
        let (program, config) = match self.kind {
            Kind::Crispd => (crispd(), self.crispd_config()),
            Kind::Containerd => (find("containerd").expect("containerd is not installed"), self.containerd_config()),
        };
        fs::write(self.layout.path("config.toml"), config).expect("write the daemon's configuration");
        let mut program = Program::new(program).arg("--config").arg(self.layout.path("config.toml"));
        program = program.env("PATH", search_path()).env("RUST_BACKTRACE", "1");
        for (key, value) in &self.options.environment {
            program = program.env(key, value);
        }
        let error = OwnedFd::from(log.try_clone().expect("copy a descriptor"));
        self.child = Some(program.stdout_to(log.into()).stderr_to(error).spawn().expect("start the daemon"));
    }

    pub fn wait_ready(&mut self) {
        let begin = Instant::now();
        let client = self.client();
        loop {
            match client.call(&VersionRequest { version: "0.1.0".into(), ..Default::default() }) {
                Ok(_) => return,
                Err(error) => {
                    assert!(begin.elapsed() < patience(START_TIMEOUT), "the daemon does not answer: {error}\n{}", self.log_tail())
                }
            }
            if let Some(status) = self.ended() {
                panic!("the daemon ended with {status}:\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn client(&self) -> Client {
        Client::new(&self.layout.socket(), patience(CALL_TIMEOUT))
    }

    /// 0 when it does not run.
    pub fn pid(&self) -> i32 {
        self.child.as_ref().map_or(0, |child| child.id() as i32)
    }

    /// The end of the process, if it has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().expect("wait for the daemon"))
    }

    /// Sends `signal` and waits for the end, `None` if it does not come within `STOP_TIMEOUT` (the daemon is killed then).
    pub fn stop(&mut self, signal: Signal) -> Option<ExitStatus> {
        let mut child = self.child.take()?;
        let begin = Instant::now();
        let _ = kill(Pid::from_raw(child.id() as i32), signal);
        while begin.elapsed() < patience(STOP_TIMEOUT) {
            if let Some(status) = child.try_wait().expect("wait for the daemon") {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = child.kill();
        let _ = child.wait();
        None
    }

    pub fn log_path(&self) -> PathBuf {
        self.layout.path("daemon.log")
    }

    /// The last of the daemon's own log, for failures.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Takes the images of an archive in.
    pub fn import(&self, archive: &Path) {
        match self.kind {
            Kind::Crispd => {
                let request = ImportImageRequest { path: archive.display().to_string(), ..Default::default() };
                self.client().call(&request).unwrap_or_else(|e| panic!("import {}: {e}\n{}", archive.display(), self.log_tail()));
            }
            Kind::Containerd => {
                let socket = self.layout.socket().display().to_string();
                tool("ctr", &["-a", &socket, "-n", "k8s.io", "images", "import", &archive.display().to_string()]);
            }
        }
    }

    /// Pids of the daemon's monitors (shims): their program or an argument lies in the daemon's directory.
    pub fn monitors(&self) -> Vec<i32> {
        let dir = self.layout.dir().display().to_string();
        let mut pids = Vec::new();
        for pid in processes() {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let named = exe.starts_with(&dir) || String::from_utf8_lossy(&arguments).contains(&dir);
            if named && pid != self.pid() && pid != std::process::id() as i32 {
                pids.push(pid);
            }
        }
        pids
    }

    fn crispd_config(&self) -> String {
        let path = |name: &str| toml_text(&self.layout.path(name).display().to_string());
        let mut text = format!(
            "socket = {}\nroot = {}\nrun = {}\nshim = {}\nlog_level = \"{}\"\ncgroup_driver = \"{}\"\n\
             cdi_spec_dirs = [{}]\nhooks_dirs = [{}]\n",
            path("cri.sock"),
            path("root"),
            path("run"),
            path("bin/crisp-shim"),
            // As in use when it is measured; as much as there is when it is tested.
            if cfg!(debug_assertions) { "debug" } else { "info" },
            if systemd() { "systemd" } else { "cgroupfs" },
            path("cdi"),
            path("hooks"),
        );
        if let Some((name, _)) = self.options.runtimes.first() {
            text += &format!("default_runtime = {}\n", toml_text(name));
        }
        text += &self.options.top;
        text += &format!("[cni]\nconf_dir = {}\ncache_dir = {}\n", path("cni"), path("cache"));
        text += &format!("bin_dirs = [{}]\n", toml_text(&plugin_dir().display().to_string()));
        let hosts: Vec<_> = self.options.plain_http.iter().map(|host| toml_text(host)).collect();
        text += &format!("[images]\npreload_dir = {}\nplain_http = [{}]\n", path("preload"), hosts.join(", "));
        text += &format!("verifier_dir = {}\n", path("verifiers"));
        for (name, program) in &self.options.runtimes {
            text += &format!("[runtimes.{name}]\npath = {}\n", toml_text(&program.display().to_string()));
        }
        text + &self.options.tables
    }

    fn containerd_config(&self) -> String {
        let path = |name: &str| toml_text(&self.layout.path(name).display().to_string());
        let unused = ["aufs", "btrfs", "devmapper", "zfs"].map(|name| format!("\"io.containerd.snapshotter.v1.{name}\""));
        let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
        let mut text = format!(
            "version = 2\nroot = {}\nstate = {}\ndisabled_plugins = [{}, \"io.containerd.internal.v1.opt\"]\n\
             [debug]\nlevel = \"{}\"\n[grpc]\naddress = {}\n",
            path("root"),
            path("run"),
            unused.join(", "),
            if cfg!(debug_assertions) { "warn" } else { "info" },
            path("cri.sock"),
        );
        text += &format!("[{cri}]\nsandbox_image = \"{PAUSE}\"\ndisable_tcp_service = true\nrestrict_oom_score_adj = true\n");
        text += &format!("[{cri}.containerd]\nsnapshotter = \"overlayfs\"\ndefault_runtime_name = \"runc\"\n");
        text += &format!("[{cri}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n");
        text += &format!("[{cri}.cni]\nconf_dir = {}\nbin_dir = {}\n", path("cni"), toml_text(&plugin_dir().display().to_string()));
        for host in &self.options.plain_http {
            text += &format!("[{cri}.registry.mirrors.{}]\nendpoint = [\"http://{host}\"]\n", toml_text(host));
        }
        text
    }
}

impl Drop for Daemon {
    /// Ends what still runs and takes away what the plugins leave: the bridge, and the cgroup parent, which is the
    /// client's.
    fn drop(&mut self) {
        self.stop(Signal::SIGTERM);
        for pid in self.monitors() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        for pid in cgroup_processes(&self.layout.tag) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        for point in crisp::sys::mount::below(self.layout.dir()).unwrap_or_default() {
            let _ = crisp::sys::mount::unmount(&point);
        }
        if Path::new("/sys/class/net").join(self.layout.bridge()).exists() {
            tool("ip", &["link", "del", &self.layout.bridge()]);
        }
        remove_cgroups(&self.layout.tag);
        for place in &self.strays {
            let _ = fs::remove_dir_all(place);
        }
    }
}

/// The daemon of this build, or the one CRISPD names.
pub fn crispd() -> PathBuf {
    std::env::var_os("CRISPD").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_crispd")), PathBuf::from)
}

/// The static shim: CRISP_SHIM, or where `make shim` puts it.
pub fn shim() -> PathBuf {
    std::env::var_os("CRISP_SHIM").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/crisp-shim"), PathBuf::from)
}

/// An archive made by scripts/image.
pub fn image(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/images").join(format!("{name}.tar"));
    if !path.exists() {
        tool(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/image"), &[]);
    }
    path
}

/// Runs a program that must succeed; its output.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let path = if program.contains('/') { Some(PathBuf::from(program)) } else { find(program) };
    let path = path.unwrap_or_else(|| panic!("{program} is not installed: run scripts/install-deps"));
    let output = Program::new(path).env("PATH", search_path()).args(arguments).run_ok(&Cancel::never(), patience(Duration::from_secs(120)));
    String::from_utf8_lossy(&output.unwrap_or_else(|e| panic!("{program} {}: {e}", arguments.join(" "))).stdout).into_owned()
}

/// PATH, sbin, and what scripts/install-deps unpacked.
fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin:{}/target/peers/usr/bin", env!("CARGO_MANIFEST_DIR"))
}

pub fn find(program: &str) -> Option<PathBuf> {
    search_path().split(':').map(|dir| Path::new(dir).join(program)).find(|path| path.is_file())
}

pub fn plugin_dir() -> PathBuf {
    let dirs = ["/usr/lib/cni", "/opt/cni/bin"].map(PathBuf::from);
    dirs.into_iter().find(|dir| dir.join("bridge").exists()).expect("no CNI plugins: run scripts/install-deps")
}

pub fn processes() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Processes whose cgroup has `tag` in its path.
pub fn cgroup_processes(tag: &str) -> Vec<i32> {
    let part = format!("/{tag}");
    processes().filter(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(&part))).collect()
}

/// Directories in every cgroup hierarchy with `tag` in their name, parents first.
pub fn cgroup_dirs(tag: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, tag: &str, inside: bool, depth: u32, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let inside = inside || entry.file_name().to_string_lossy().contains(tag);
                if inside {
                    found.push(entry.path());
                }
                walk(&entry.path(), tag, inside, depth - 1, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), tag, false, 6, &mut found);
    found
}

fn remove_cgroups(tag: &str) {
    let begin = Instant::now();
    // A cgroup is busy until its last process is reaped.
    while begin.elapsed() < patience(Duration::from_secs(2)) {
        let dirs = cgroup_dirs(tag);
        if dirs.is_empty() {
            return;
        }
        for dir in dirs.iter().rev() {
            let _ = fs::remove_dir(dir);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn toml_text(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
