//! The first process of a container, and those of exec.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, Process, User};

use super::{security, HostFacts, Inputs, Rlimit};
use crate::error::{Context, Error, Result};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The kernel's, its end mark included.
pub const PATH_MAX: usize = 4096;

/// The range of /proc/PID/oom_score_adj.
const OOM_SCORE_ADJ: std::ops::RangeInclusive<i64> = -1000..=1000;

pub(super) fn process(inputs: &Inputs, warnings: &mut Vec<String>) -> Result<Process> {
    let security = inputs.security();
    let mut user = User::default();
    user.set_uid(inputs.user.uid).set_gid(inputs.user.gid).set_additional_gids(Some(inputs.user.additional_gids.clone()));

    // Every member is set: the defaults of the type are somebody's taste.
    let mut process = Process::default();
    process
        .set_terminal(Some(inputs.config.tty))
        .set_user(user)
        .set_args(Some(args(inputs)?))
        .set_env(Some(env(inputs)?))
        .set_cwd(working_dir(inputs.config.working_dir.as_str(), image_working_dir(inputs))?)
        .set_capabilities(Some(security::capabilities(security, inputs.host, warnings)?))
        .set_rlimits(rlimits(inputs, warnings)?)
        .set_no_new_privileges(Some(security.no_new_privs))
        .set_apparmor_profile(inputs.confinement.apparmor.clone())
        .set_selinux_label(inputs.confinement.labels.as_ref().and_then(|labels| labels.process.clone()))
        .set_oom_score_adj(Some(oom_score_adj(inputs.config.linux.resources.oom_score_adj, inputs.host, warnings)?));
    Ok(process)
}

/// The process of an exec, made from the container's own: its user, environment, directory, capabilities and limits.
pub fn exec_process(mut process: Process, cmd: &[String], tty: bool) -> Process {
    process.set_args(Some(cmd.to_vec())).set_terminal(Some(tty));
    if tty {
        let env = process.env_mut().get_or_insert_with(Vec::new);
        if !env.iter().any(|entry| entry.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
    }
    process
}

/// command replaces the entrypoint, args replaces cmd; a command alone drops the image's cmd too.
fn args(inputs: &Inputs) -> Result<Vec<String>> {
    let image = inputs.image.config().as_ref();
    let (command, args) = (&inputs.config.command, &inputs.config.args);
    let mut all = Vec::new();
    if command.is_empty() {
        all.extend(image.and_then(|image| image.entrypoint().clone()).unwrap_or_default());
        match args.is_empty() {
            true => all.extend(image.and_then(|image| image.cmd().clone()).unwrap_or_default()),
            false => all.extend_from_slice(args),
        }
    } else {
        all.extend_from_slice(command);
        all.extend_from_slice(args);
    }
    match all.first() {
        None => return Err(Error::invalid("command: empty, and the image has no entrypoint and no cmd")),
        Some(program) if program.is_empty() => return Err(Error::invalid("command: the program's name is empty")),
        Some(_) => {}
    }
    match all.iter().find(|arg| arg.contains('\0')) {
        Some(_) => Err(Error::invalid("command: a NUL byte in an argument")),
        None => Ok(all),
    }
}

/// The image's, then HOSTNAME, TERM with a terminal, then the request's; a later one replaces an earlier one in its
/// place. PATH and HOME get a default.
fn env(inputs: &Inputs) -> Result<Vec<String>> {
    let mut env = Environment::default();
    for entry in inputs.image.config().as_ref().and_then(|image| image.env().as_ref()).into_iter().flatten() {
        // An entry without "=" sets nothing; image builders leave such behind.
        if let Some((key, value)) = entry.split_once('=').filter(|(key, _)| !key.is_empty()) {
            env.set(key, value)?;
        }
    }
    env.set("HOSTNAME", inputs.hostname)?;
    if inputs.config.tty {
        env.set("TERM", "xterm")?;
    }
    for entry in &inputs.config.envs {
        if entry.key.is_empty() || entry.key.contains('=') {
            return Err(Error::invalid(format!("envs: {:?} is not a variable's name", entry.key)));
        }
        let value = std::str::from_utf8(&entry.value)
            .map_err(|_| Error::invalid(format!("envs: the value of {} is not UTF-8, which config.json cannot carry", entry.key)))?;
        env.set(&entry.key, value)?;
    }
    env.set_default("PATH", DEFAULT_PATH)?;
    env.set_default("HOME", if inputs.user.home.is_empty() { "/" } else { &inputs.user.home })?;
    Ok(env.entries)
}

#[derive(Default)]
struct Environment {
    entries: Vec<String>,
}

impl Environment {
    fn find(&mut self, key: &str) -> Option<&mut String> {
        self.entries.iter_mut().find(|entry| entry.split_once('=').is_some_and(|(name, _)| name == key))
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        if key.contains('\0') || value.contains('\0') {
            return Err(Error::invalid(format!("envs: a NUL byte in {key:?}")));
        }
        let entry = format!("{key}={value}");
        match self.find(key) {
            Some(present) => *present = entry,
            None => self.entries.push(entry),
        }
        Ok(())
    }

    fn set_default(&mut self, key: &str, value: &str) -> Result<()> {
        match self.find(key) {
            Some(_) => Ok(()),
            None => self.set(key, value),
        }
    }
}

fn image_working_dir<'a>(inputs: &Inputs<'a>) -> &'a str {
    inputs.image.config().as_ref().and_then(|image| image.working_dir().as_deref()).unwrap_or_default()
}

/// The working directory: the request's, else the image's, else "/"; cleaned. An image's relative one starts at "/", as
/// its builder meant. `container::mounts::make_directories` creates it.
pub fn working_dir(requested: &str, image: &str) -> Result<PathBuf> {
    if !requested.is_empty() && !requested.starts_with('/') {
        return Err(Error::invalid(format!("working_dir: {requested} is not absolute")));
    }
    let chosen = if requested.is_empty() { image } else { requested };
    if chosen.contains('\0') {
        return Err(Error::invalid("working_dir: a NUL byte in it"));
    }
    if chosen.len() >= PATH_MAX {
        return Err(Error::invalid(format!("working_dir: longer than {} bytes", PATH_MAX - 1)));
    }
    let path = clean(Path::new(chosen));
    match leads_out(&path) {
        true => Err(Error::invalid(format!("working_dir: {} is a process's own view of the host", path.display()))),
        false => Ok(path),
    }
}

/// Whether a directory is one of the links by which a process reaches files that it or its runtime has open
/// (CVE-2024-21626): below /proc/PID, /proc/self or /dev/fd.
pub fn leads_out(path: &Path) -> bool {
    let mut parts = path.components().skip_while(|part| *part == Component::RootDir).map(|part| part.as_os_str().to_string_lossy());
    match (parts.next().as_deref(), parts.next().as_deref()) {
        (Some("proc"), Some(process)) => {
            matches!(process, "self" | "thread-self") || (!process.is_empty() && process.bytes().all(|b| b.is_ascii_digit()))
        }
        (Some("dev"), Some("fd")) => true,
        _ => false,
    }
}

/// An absolute path without ".", ".." and empty parts, by its letters alone.
pub fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

fn rlimits(inputs: &Inputs, warnings: &mut Vec<String>) -> Result<Option<Vec<PosixRlimit>>> {
    let mut limits = inputs.defaults.rlimits.clone();
    for limit in &mut limits {
        let highest = inputs.host.hard_rlimits.iter().find(|(kind, _)| *kind == limit.kind).map_or(u64::MAX, |(_, hard)| *hard);
        if limit.hard > highest {
            warnings.push(format!("rlimit {} lowered from {} to {highest}, the daemon's own", limit.kind, limit.hard));
            (limit.hard, limit.soft) = (highest, limit.soft.min(highest));
        }
    }
    if limits.is_empty() {
        return Ok(None);
    }
    let build = |limit: Rlimit| PosixRlimitBuilder::default().typ(limit.kind).soft(limit.soft).hard(limit.hard).build();
    limits.into_iter().map(build).collect::<std::result::Result<_, _>>().context(|| "set rlimits").map(Some)
}

/// The number, if it is in range.
pub(super) fn check_oom_score_adj(asked: i64) -> Result<i32> {
    match OOM_SCORE_ADJ.contains(&asked) {
        // In range, so it fits.
        true => Ok(asked as i32),
        false => Err(Error::invalid(format!("oom_score_adj: {asked} is not in -1000 to 1000"))),
    }
}

pub(super) fn oom_score_adj(asked: i64, host: &HostFacts, warnings: &mut Vec<String>) -> Result<i32> {
    let asked = check_oom_score_adj(asked)?;
    if asked < host.oom_score_adj_floor {
        warnings.push(format!("oom_score_adj raised from {asked} to {}, the lowest the daemon may set", host.oom_score_adj_floor));
    }
    Ok(asked.max(host.oom_score_adj_floor))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::PosixRlimitType;

    use super::super::fixture::Fixture;
    use super::*;
    use crate::api::runtime::KeyValue;
    use crate::error::Code;

    fn process_of(fixture: &mut Fixture) -> Process {
        fixture.build().0.process().clone().unwrap()
    }

    fn args_of(command: &[&str], args: &[&str], entrypoint: &[&str], cmd: &[&str]) -> Result<Vec<String>> {
        let list = |items: &[&str]| items.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let mut fixture = Fixture::new();
        fixture.config.command = list(command);
        fixture.config.args = list(args);
        fixture.image.set_entrypoint(Some(list(entrypoint))).set_cmd(Some(list(cmd)));
        fixture.try_build().map(|(spec, _)| spec.process().clone().unwrap().args().clone().unwrap())
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_cmd() {
        assert_eq!(args_of(&[], &[], &["e"], &["c"]).unwrap(), ["e", "c"]);
        assert_eq!(args_of(&["x"], &[], &["e"], &["c"]).unwrap(), ["x"]);
        assert_eq!(args_of(&[], &["a"], &["e"], &["c"]).unwrap(), ["e", "a"]);
        assert_eq!(args_of(&["x"], &["a"], &["e"], &["c"]).unwrap(), ["x", "a"]);
        assert_eq!(args_of(&[], &[], &[], &["c"]).unwrap(), ["c"]);
        for bad in [args_of(&[], &[], &[], &[]), args_of(&[""], &[], &[], &[]), args_of(&["a\0b"], &[], &[], &[])] {
            assert_eq!(bad.unwrap_err().code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn environment_order_and_defaults() {
        let mut fixture = Fixture::new();
        fixture.image.set_env(Some(vec!["A=1".into(), "B=2".into(), "HOSTNAME=x".into(), "junk".into(), "=y".into()]));
        let pair = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into(), ..Default::default() };
        fixture.config.envs = vec![pair("A", "one\ntwo"), pair("C", ""), pair("C", "3=3")];
        fixture.config.tty = true;
        let process = process_of(&mut fixture);
        let path = format!("PATH={DEFAULT_PATH}");
        let expected = ["A=one\ntwo", "B=2", "HOSTNAME=web-host", "TERM=xterm", "C=3=3", &path, "HOME=/root"];
        assert_eq!(process.env().as_ref().unwrap(), &expected);
        assert_eq!(process.terminal(), Some(true));
    }

    #[test]
    fn given_path_and_home_stay() {
        let mut fixture = Fixture::new();
        fixture.image.set_env(Some(vec!["PATH=/opt".into(), "HOME=/h".into()]));
        assert_eq!(process_of(&mut fixture).env().as_ref().unwrap(), &["PATH=/opt", "HOME=/h", "HOSTNAME=web-host"]);
    }

    #[test]
    fn variables_that_cannot_be_set_are_refused() {
        for (key, value) in [("", "a".as_bytes()), ("A=B", b"a"), ("A", b"\xff"), ("A", b"a\0b")] {
            let mut fixture = Fixture::new();
            fixture.config.envs = vec![KeyValue { key: key.into(), value: value.into(), ..Default::default() }];
            let error = fixture.error();
            assert!(error.code() == Code::InvalidArgument && error.message().starts_with("envs:"), "{error}");
        }
    }

    #[test]
    fn working_dir_is_the_requests_then_the_images() {
        assert_eq!(working_dir("", "").unwrap(), Path::new("/"));
        assert_eq!(working_dir("", "app").unwrap(), Path::new("/app"));
        assert_eq!(working_dir("/w/./x/../y/", "app").unwrap(), Path::new("/w/y"));
        assert!(working_dir("w", "").is_err());
    }

    #[test]
    fn working_dir_may_not_lead_out() {
        for bad in ["/proc/self/fd/7", "/proc/self/cwd", "/proc/12/root", "/a/../proc/thread-self/fd", "/dev/fd/3", "//proc/self"] {
            assert_eq!(working_dir(bad, "").unwrap_err().code(), Code::InvalidArgument, "{bad}");
        }
        assert!(working_dir("", "proc/self/fd/8").is_err());
        for fine in ["/proc", "/proc/sys/net", "/proc/1a", "/dev/fdx", "/procself"] {
            working_dir(fine, "").unwrap();
        }
    }

    #[test]
    fn oom_score_adj_is_checked_and_raised_to_the_floor() {
        let mut fixture = Fixture::new();
        fixture.resources().oom_score_adj = -998;
        assert_eq!(process_of(&mut fixture).oom_score_adj(), Some(-998));
        fixture.host.oom_score_adj_floor = -5;
        let (spec, warnings) = fixture.build();
        assert_eq!(spec.process().as_ref().unwrap().oom_score_adj(), Some(-5));
        assert!(warnings[0].contains("-998"), "{warnings:?}");
        fixture.resources().oom_score_adj = 1001;
        assert_eq!(fixture.error().code(), Code::InvalidArgument);
    }

    #[test]
    fn rlimits_are_lowered_to_the_hosts() {
        let mut fixture = Fixture::new();
        assert_eq!(process_of(&mut fixture).rlimits(), &None);
        fixture.defaults.rlimits = vec![Rlimit { kind: PosixRlimitType::RlimitNofile, soft: 1 << 20, hard: 1 << 20 }];
        fixture.host.hard_rlimits = vec![(PosixRlimitType::RlimitNofile, 20_000)];
        let (spec, warnings) = fixture.build();
        let limits = spec.process().as_ref().unwrap().rlimits().clone().unwrap();
        assert_eq!((limits[0].soft(), limits[0].hard(), warnings.len()), (20_000, 20_000, 1));
    }

    #[test]
    fn exec_inherits_all_but_args_and_terminal() {
        let mut fixture = Fixture::new();
        fixture.user = super::super::ResolvedUser { uid: 7, gid: 8, additional_gids: vec![8, 9], ..Default::default() };
        let spec = fixture.build().0;
        let exec = exec_process(spec.process().clone().unwrap(), &["ls".into()], true);
        assert_eq!((exec.args().as_ref().unwrap().join(" "), exec.terminal()), ("ls".into(), Some(true)));
        assert!(exec.env().as_ref().unwrap().contains(&"TERM=xterm".to_string()));
        assert_eq!((exec.user().uid(), exec.user().additional_gids().clone()), (7, Some(vec![8, 9])));
        assert_eq!(exec.capabilities(), spec.process().as_ref().unwrap().capabilities());
        let plain = exec_process(spec.process().clone().unwrap(), &["ls".into()], false);
        assert_eq!(plain.env(), spec.process().as_ref().unwrap().env());
    }
}
