//! Configuration: `Raw` is what the file says, `Config` is what was checked. Unknown keys and bad values are errors with
//! their line. `DEFAULT` is the commented file that `crispd config default` prints; a test keeps it equal to the defaults.

/// `[images]`.
mod images;
/// `[stats]` and `[metrics]`.
mod observe;
/// [resources].
mod resources;
/// [streaming].
mod streaming;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use crate::error::{Error, Result};
use crate::runtime::{Handler, Kind};

pub use images::{Images, RegistryAuth};
pub use observe::{Metrics, MetricsGroup, Stats};
pub use resources::Resources;
pub use streaming::{Streaming, Tls};

/// The commented default configuration.
pub const DEFAULT: &str = include_str!("default.toml");

/// Where `crispd` looks when no `--config` is given.
pub const PATH: &str = "/etc/crisp/config.toml";

/// Checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    pub socket: PathBuf,
    /// Group that may use the socket (mode 0660); None: root alone (0600).
    pub socket_group: Option<u32>,
    pub root: PathBuf,
    pub run: PathBuf,
    pub netns_dir: PathBuf,
    pub log_level: log::LevelFilter,
    pub systemd_cgroup: bool,
    /// Containers get SELinux labels where the kernel has it enabled.
    pub selinux: bool,
    pub shim: PathBuf,
    /// Name of the default runtime handler; None: the first of crun, runc that passes a probe.
    pub default_runtime: Option<String>,
    pub runtimes: BTreeMap<String, Handler>,
    pub snapshotter: Snapshotter,
    /// Whether writable layers may stay unsynced.
    pub volatile_layers: bool,
    pub userns_rootfs: UsernsRootfs,
    /// Kept from image garbage collection; sandboxes of this version need none.
    pub sandbox_image: Option<String>,
    pub sysctls: BTreeMap<String, String>,
    /// CDI spec files, in rising priority.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// OCI hooks, in rising priority.
    pub hooks_dirs: Vec<PathBuf>,
    /// Annotations that reach the OCI runtime: names, or prefixes with a `*` at their end.
    pub allowed_annotations: Vec<String>,
    pub cni: Cni,
    pub images: Images,
    pub limits: Limits,
    pub resources: Resources,
    pub streaming: Streaming,
    pub stats: Stats,
    pub metrics: Metrics,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Snapshotter {
    Auto,
    Overlay,
    Copy,
}

/// How the files of an image come to be those of a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UsernsRootfs {
    Auto,
    Idmap,
    Chown,
}

#[derive(Clone, Debug)]
pub struct Cni {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    pub cache_dir: PathBuf,
    pub plugin_timeout: Duration,
    pub conf_template: Option<PathBuf>,
    /// Whether the annotation `crisp.dev/networks` is obeyed.
    pub extra_networks: bool,
}

#[derive(Clone, Debug)]
pub struct Limits {
    /// Worker threads for calls that may block, at most.
    pub slow_threads: usize,
    /// Calls waiting for a worker, at most, per lane.
    pub queue: usize,
    /// Time for the OCI runtime's own commands.
    pub runtime_timeout: Duration,
    /// Bytes of one ExecSync's stdout and stderr together that are kept.
    pub exec_output: usize,
    /// Events that wait for one subscriber, at most; the oldest are dropped.
    pub event_queue: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    socket: Spanned<String>,
    socket_group: Spanned<String>,
    root: Spanned<String>,
    run: Spanned<String>,
    netns_dir: Spanned<String>,
    log_level: Spanned<String>,
    cgroup_driver: Spanned<String>,
    selinux: bool,
    shim: Spanned<String>,
    default_runtime: Spanned<String>,
    snapshotter: Snapshotter,
    volatile_layers: bool,
    userns_rootfs: UsernsRootfs,
    sandbox_image: String,
    cdi_spec_dirs: Vec<Spanned<String>>,
    hooks_dirs: Vec<Spanned<String>>,
    allowed_annotations: Vec<Spanned<String>>,
    runtimes: BTreeMap<String, RawRuntime>,
    sysctls: BTreeMap<String, Spanned<String>>,
    cni: RawCni,
    images: images::Raw,
    limits: RawLimits,
    resources: resources::Raw,
    streaming: streaming::Raw,
    stats: observe::RawStats,
    metrics: observe::RawMetrics,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRuntime {
    path: Spanned<String>,
    #[serde(rename = "type", default)]
    kind: Option<Spanned<String>>,
    #[serde(default)]
    root: Option<Spanned<String>>,
    #[serde(default)]
    sandbox: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCni {
    conf_dir: Spanned<String>,
    bin_dirs: Vec<Spanned<String>>,
    cache_dir: Spanned<String>,
    plugin_timeout_seconds: Spanned<u64>,
    conf_template: Spanned<String>,
    extra_networks: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    slow_threads: Spanned<usize>,
    queue: Spanned<usize>,
    runtime_timeout_seconds: Spanned<u64>,
    exec_output_bytes: Spanned<usize>,
    event_queue: Spanned<usize>,
}

fn at<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

fn text(value: &str) -> Spanned<String> {
    at(value.to_owned())
}

impl Default for Raw {
    fn default() -> Raw {
        Raw {
            socket: text("/run/crisp/crisp.sock"),
            socket_group: text(""),
            root: text("/var/lib/crisp"),
            run: text("/run/crisp"),
            netns_dir: text("/run/netns"),
            log_level: text("info"),
            cgroup_driver: text("cgroupfs"),
            selinux: false,
            shim: text(""),
            default_runtime: text(""),
            snapshotter: Snapshotter::Auto,
            volatile_layers: true,
            userns_rootfs: UsernsRootfs::Auto,
            sandbox_image: String::new(),
            cdi_spec_dirs: vec![text("/etc/cdi"), text("/var/run/cdi")],
            hooks_dirs: vec![text("/usr/share/containers/oci/hooks.d"), text("/etc/containers/oci/hooks.d")],
            allowed_annotations: Vec::new(),
            runtimes: BTreeMap::new(),
            sysctls: BTreeMap::from([
                ("net.ipv4.ip_unprivileged_port_start".to_owned(), text("0")),
                ("net.ipv4.ping_group_range".to_owned(), text("0 2147483647")),
            ]),
            cni: RawCni::default(),
            images: images::Raw::default(),
            limits: RawLimits::default(),
            resources: resources::Raw::default(),
            streaming: streaming::Raw::default(),
            stats: observe::RawStats::default(),
            metrics: observe::RawMetrics::default(),
        }
    }
}

impl Default for RawCni {
    fn default() -> RawCni {
        RawCni {
            conf_dir: text("/etc/cni/net.d"),
            bin_dirs: vec![text("/opt/cni/bin"), text("/usr/lib/cni"), text("/usr/libexec/cni")],
            cache_dir: text("/var/lib/cni/crisp"),
            plugin_timeout_seconds: at(90),
            conf_template: text(""),
            extra_networks: false,
        }
    }
}

impl Default for RawLimits {
    fn default() -> RawLimits {
        RawLimits {
            slow_threads: at(512),
            queue: at(4096),
            runtime_timeout_seconds: at(120),
            exec_output_bytes: at(15 << 20),
            event_queue: at(2048),
        }
    }
}

/// Says what is wrong with a value and on which line.
struct Checker<'a> {
    file: &'a str,
    source: &'a str,
}

impl Checker<'_> {
    fn error<T>(&self, value: &Spanned<T>, what: impl std::fmt::Display) -> Error {
        let start = value.span().start;
        if value.span().is_empty() {
            return Error::invalid(format!("{}: {what}", self.file));
        }
        let line = self.source.as_bytes()[..start.min(self.source.len())].iter().filter(|b| **b == b'\n').count() + 1;
        Error::invalid(format!("{}: line {line}: {what}", self.file))
    }

    fn path(&self, key: &str, value: &Spanned<String>) -> Result<PathBuf> {
        let path = Path::new(value.get_ref());
        if path.is_absolute() && !path.components().any(|c| c == std::path::Component::ParentDir) {
            return Ok(path.components().collect());
        }
        Err(self.error(value, format!("{key}: expected an absolute path without .., found {:?}", value.get_ref())))
    }

    fn optional_path(&self, key: &str, value: &Spanned<String>) -> Result<Option<PathBuf>> {
        if value.get_ref().is_empty() {
            return Ok(None);
        }
        self.path(key, value).map(Some)
    }

    fn number<T: PartialOrd + std::fmt::Display + Copy>(&self, key: &str, value: &Spanned<T>, least: T, most: T) -> Result<T> {
        let n = *value.get_ref();
        if n >= least && n <= most {
            return Ok(n);
        }
        Err(self.error(value, format!("{key}: expected {least} to {most}, found {n}")))
    }
}

/// What flags say over the file.
#[derive(Default)]
pub struct Overrides {
    pub socket: Option<String>,
    pub root: Option<String>,
    pub run: Option<String>,
    pub log_level: Option<String>,
}

impl Config {
    /// Reads `path`. A missing file is an error only when it was named.
    pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Config> {
        let (name, source) = match (path, std::fs::read_to_string(path.unwrap_or(Path::new(PATH)))) {
            (p, Ok(source)) => (p.unwrap_or(Path::new(PATH)).display().to_string(), source),
            (None, Err(e)) if e.kind() == std::io::ErrorKind::NotFound => ("built-in defaults".to_owned(), String::new()),
            (p, Err(e)) => return Err(Error::invalid(format!("read {}: {e}", p.unwrap_or(Path::new(PATH)).display()))),
        };
        Config::parse(&name, &source, overrides)
    }

    /// Checks `source`; `file` is its name in errors.
    pub fn parse(file: &str, source: &str, overrides: &Overrides) -> Result<Config> {
        let mut raw: Raw = toml::from_str(source).map_err(|e| {
            let line = e.span().map(|s| source[..s.start.min(source.len())].matches('\n').count() + 1);
            let place = line.map_or(String::new(), |l| format!(" line {l}:"));
            Error::invalid(format!("{file}:{place} {}", e.message()))
        })?;
        for (slot, value) in [
            (&mut raw.socket, &overrides.socket),
            (&mut raw.root, &overrides.root),
            (&mut raw.run, &overrides.run),
            (&mut raw.log_level, &overrides.log_level),
        ] {
            if let Some(value) = value {
                *slot = text(value);
            }
        }
        // A moved run directory takes the socket with it unless the socket was placed too.
        if raw.socket.span().is_empty() && overrides.socket.is_none() {
            raw.socket = text(&format!("{}/crisp.sock", raw.run.get_ref()));
        }
        check(&Checker { file, source }, raw)
    }
}

fn check(c: &Checker, raw: Raw) -> Result<Config> {
    let root = c.path("root", &raw.root)?;
    let run = c.path("run", &raw.run)?;
    if root.starts_with(&run) || run.starts_with(&root) {
        return Err(c.error(&raw.run, format!("run: {} and root {} must not lie in one another", run.display(), root.display())));
    }
    let log_level = raw.log_level.get_ref().parse().map_err(|_| {
        c.error(&raw.log_level, format!("log_level: expected error, warn, info, debug or trace, found {:?}", raw.log_level.get_ref()))
    })?;
    let systemd_cgroup = match raw.cgroup_driver.get_ref().as_str() {
        "cgroupfs" => false,
        "systemd" => true,
        other => return Err(c.error(&raw.cgroup_driver, format!("cgroup_driver: expected cgroupfs or systemd, found {other:?}"))),
    };
    let shim = match c.optional_path("shim", &raw.shim)? {
        Some(path) => path,
        None => beside_us("crisp-shim"),
    };
    let mut runtimes = BTreeMap::new();
    for (name, runtime) in &raw.runtimes {
        runtimes.insert(name.clone(), check_runtime(c, name, runtime, &run, systemd_cgroup)?);
    }
    for (name, kind) in [("crun", Kind::Crun), ("runc", Kind::Runc)] {
        runtimes.entry(name.to_owned()).or_insert_with(|| Handler {
            name: name.to_owned(),
            path: find_program(name),
            root: run.join("runtime").join(name),
            kind,
            systemd_cgroup,
        });
    }
    let default_runtime = Some(raw.default_runtime.get_ref().clone()).filter(|n| !n.is_empty());
    if let Some(name) = default_runtime.as_ref().filter(|n| !runtimes.contains_key(*n)) {
        let known = runtimes.keys().cloned().collect::<Vec<_>>().join(", ");
        return Err(c.error(&raw.default_runtime, format!("default_runtime: no [runtimes.{name}]; known: {known}")));
    }
    let mut sysctls = BTreeMap::new();
    for (key, value) in &raw.sysctls {
        sysctls.insert(key.clone(), value.get_ref().clone());
    }
    Ok(Config {
        socket: c.path("socket", &raw.socket)?,
        socket_group: check_group(c, &raw.socket_group)?,
        netns_dir: c.path("netns_dir", &raw.netns_dir)?,
        log_level,
        systemd_cgroup,
        selinux: raw.selinux,
        shim,
        default_runtime,
        runtimes,
        snapshotter: raw.snapshotter,
        volatile_layers: raw.volatile_layers,
        userns_rootfs: raw.userns_rootfs,
        sandbox_image: Some(raw.sandbox_image).filter(|i| !i.is_empty()),
        sysctls,
        cdi_spec_dirs: raw.cdi_spec_dirs.iter().map(|d| c.path("cdi_spec_dirs", d)).collect::<Result<_>>()?,
        hooks_dirs: raw.hooks_dirs.iter().map(|d| c.path("hooks_dirs", d)).collect::<Result<_>>()?,
        allowed_annotations: raw.allowed_annotations.iter().map(|a| check_annotation(c, a)).collect::<Result<_>>()?,
        cni: Cni {
            conf_dir: c.path("cni.conf_dir", &raw.cni.conf_dir)?,
            bin_dirs: raw.cni.bin_dirs.iter().map(|d| c.path("cni.bin_dirs", d)).collect::<Result<_>>()?,
            cache_dir: c.path("cni.cache_dir", &raw.cni.cache_dir)?,
            plugin_timeout: Duration::from_secs(c.number("cni.plugin_timeout_seconds", &raw.cni.plugin_timeout_seconds, 1, 3600)?),
            conf_template: c.optional_path("cni.conf_template", &raw.cni.conf_template)?,
            extra_networks: raw.cni.extra_networks,
        },
        images: raw.images.check(c)?,
        limits: Limits {
            slow_threads: c.number("limits.slow_threads", &raw.limits.slow_threads, 4, 8192)?,
            queue: c.number("limits.queue", &raw.limits.queue, 16, 1 << 20)?,
            runtime_timeout: Duration::from_secs(c.number(
                "limits.runtime_timeout_seconds",
                &raw.limits.runtime_timeout_seconds,
                1,
                3600,
            )?),
            exec_output: c.number("limits.exec_output_bytes", &raw.limits.exec_output_bytes, 1024, 15 << 20)?,
            event_queue: c.number("limits.event_queue", &raw.limits.event_queue, 16, 1 << 20)?,
        },
        resources: raw.resources.check(c)?,
        streaming: raw.streaming.check(c)?,
        stats: raw.stats.check(c)?,
        metrics: raw.metrics.check(c)?,
        root,
        run,
    })
}

fn check_runtime(c: &Checker, name: &str, raw: &RawRuntime, run: &Path, systemd_cgroup: bool) -> Result<Handler> {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        return Err(c.error(&raw.path, format!("[runtimes.{name}]: expected a name of letters, digits, - and _")));
    }
    let path = match raw.path.get_ref() {
        p if p.contains('/') => c.path(&format!("runtimes.{name}.path"), &raw.path)?,
        p if !p.is_empty() => find_program(p),
        _ => return Err(c.error(&raw.path, format!("runtimes.{name}.path: expected a program, found nothing"))),
    };
    let kind = match raw.kind.as_ref().map(|k| k.get_ref().as_str()) {
        Some("crun") => Kind::Crun,
        Some("runc") => Kind::Runc,
        Some("other") => Kind::Other,
        None => match path.file_name().and_then(|f| f.to_str()) {
            Some("crun") => Kind::Crun,
            Some("runc") => Kind::Runc,
            _ => Kind::Other,
        },
        Some(other) => {
            let value = raw.kind.as_ref().unwrap_or(&raw.path);
            return Err(c.error(value, format!("runtimes.{name}.type: expected crun, runc or other, found {other:?}")));
        }
    };
    if let Some(sandbox) = raw.sandbox.as_ref().filter(|s| s.get_ref() != "pinned") {
        let found = sandbox.get_ref();
        return Err(c.error(sandbox, format!("runtimes.{name}.sandbox: expected pinned (the only mode of this version), found {found:?}")));
    }
    let root = match &raw.root {
        Some(root) => c.path(&format!("runtimes.{name}.root"), root)?,
        None => run.join("runtime").join(name),
    };
    Ok(Handler { name: name.to_owned(), path, root, kind, systemd_cgroup })
}

fn check_annotation(c: &Checker, raw: &Spanned<String>) -> Result<String> {
    let pattern = raw.get_ref();
    let name = pattern.strip_suffix('*').unwrap_or(pattern);
    if pattern.is_empty() || name.contains('*') || name.contains(char::is_whitespace) {
        let what = format!("allowed_annotations: expected an annotation's name, or its begin and a * at the end, found {pattern:?}");
        return Err(c.error(raw, what));
    }
    Ok(pattern.clone())
}

fn check_group(c: &Checker, raw: &Spanned<String>) -> Result<Option<u32>> {
    let name = raw.get_ref();
    if name.is_empty() {
        return Ok(None);
    }
    if let Ok(gid) = name.parse() {
        return Ok(Some(gid));
    }
    match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(Some(group.gid.as_raw())),
        _ => Err(c.error(raw, format!("socket_group: no group {name:?} on this host"))),
    }
}

/// `name` on PATH, else `/usr/bin/name` (whose absence is reported when it is used).
fn find_program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file()).unwrap_or_else(|| Path::new("/usr/bin").join(name))
}

/// The shim as installed: beside the daemon or in ../libexec/crisp.
fn beside_us(name: &str) -> PathBuf {
    let us = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/usr/local/bin/crispd"));
    let dir = us.parent().unwrap_or(Path::new("/usr/local/bin"));
    let places = [dir.join("../libexec/crisp").join(name), dir.join(name), dir.join("..").join(name)];
    places.iter().find(|p| p.is_file()).and_then(|p| p.canonicalize().ok()).unwrap_or_else(|| dir.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(source: &str) -> Result<Config> {
        Config::parse("c.toml", source, &Overrides::default())
    }

    #[test]
    fn the_default_file_says_the_defaults() {
        let uncommented: String = DEFAULT.lines().map(|l| l.strip_prefix("#= ").unwrap_or(l)).collect::<Vec<_>>().join("\n");
        let (file, none) = (parse(&uncommented).unwrap(), parse("").unwrap());
        assert_eq!(format!("{file:?}"), format!("{none:?}"));
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (source, expected) in [
            ("root = \"/a\"\nrot = 1", "c.toml: line 2: unknown field `rot`"),
            ("\nroot = \"a\"", "c.toml: line 2: root: expected an absolute path"),
            ("log_level = \"loud\"", "c.toml: line 1: log_level: expected error, warn"),
            ("[cni]\nplugin_timeout_seconds = 0", "c.toml: line 2: cni.plugin_timeout_seconds: expected 1 to 3600, found 0"),
            ("default_runtime = \"kata\"", "c.toml: line 1: default_runtime: no [runtimes.kata]; known: crun, runc"),
            ("[runtimes.a]\npath = \"/x\"\nsandbox = \"container\"", "c.toml: line 3: runtimes.a.sandbox"),
            ("cgroup_driver = 3", "c.toml: line 1: invalid type"),
            ("run = \"/var/lib/crisp/run\"", "c.toml: line 1: run: /var/lib/crisp/run and root"),
            ("socket_group = \"no such group\"", "c.toml: line 1: socket_group"),
            ("[images]\npinned = [\"a\",\n \"b c\"]", "c.toml: line 3: images.pinned: expected a reference"),
            ("allowed_annotations = [\"a\",\n\"b*c\"]", "c.toml: line 2: allowed_annotations: expected an annotation's name"),
            ("[images]\nverifier_timeout_seconds = 0", "c.toml: line 2: images.verifier_timeout_seconds: expected 1"),
            ("a = ", "c.toml: line 1:"),
        ] {
            let e = parse(source).unwrap_err();
            assert!(e.message().starts_with(expected), "{source:?}: {e}");
        }
    }

    #[test]
    fn flags_win_and_the_socket_follows_run() {
        let o = Overrides { run: Some("/tmp/r".into()), root: Some("/tmp/s".into()), ..Default::default() };
        let c = Config::parse("c", "", &o).unwrap();
        assert_eq!(c.socket, Path::new("/tmp/r/crisp.sock"));
        assert_eq!(c.runtimes["runc"].root, Path::new("/tmp/r/runtime/runc"));
    }
}
