//! Plugins: finding their executables and running them, one verb at a time.

use std::collections::HashMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::conflist::{check_plugin_name, Version};
use super::result::{excerpt, failure};
use crate::error::{Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::lock::{Lock, Rank};
use crate::sys::process::Program;
use crate::telemetry;

/// Bytes kept of a plugin's stdout and of its stderr.
const OUTPUT_LIMIT: usize = 1 << 20;

/// What a plugin is asked to do (specification, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub fn name(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
            Verb::Version => "VERSION",
        }
    }
}

/// The sandbox side of a call: one interface of one sandbox.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    pub container_id: &'a str,
    /// Empty when the namespace is gone.
    pub netns: &'a str,
    pub ifname: &'a str,
    /// KEY=VALUE pairs joined by ';'.
    pub args: &'a str,
}

/// The plugins of this host.
pub struct Plugins {
    dirs: Vec<PathBuf>,
    timeout: Duration,
    /// What VERSION answered, by executable; asked again when the file changes.
    versions: Lock<HashMap<PathBuf, (Stamp, Vec<Version>)>>,
}

/// Tells one content of a file from the next: device, inode, mtime in ns.
type Stamp = (u64, u64, i64, i64);

impl Plugins {
    /// `timeout` is for each run of one plugin.
    pub fn new(dirs: Vec<PathBuf>, timeout: Duration) -> Plugins {
        Plugins { dirs, timeout, versions: Lock::new(Rank::Leaf, HashMap::new()) }
    }

    /// The executable of the plugin `kind`, from the first directory that has it.
    pub fn find(&self, kind: &str) -> Result<PathBuf> {
        check_plugin_name(kind)?;
        let mut refused = None;
        for dir in &self.dirs {
            let path = dir.join(kind);
            match std::fs::metadata(&path) {
                Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Ok(path),
                Ok(_) => refused = Some(path),
                Err(_) => {}
            }
        }
        let dirs = self.dirs.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", ");
        let why = refused.map_or(String::new(), |p| format!(" ({} is not an executable file)", p.display()));
        Err(Error::precondition(format!("plugin {kind}: not found in {dirs}{why}")))
    }

    /// Runs `verb` of the plugin `kind` with `request` on stdin; gives its stdout. Its JSON error, or whatever it printed,
    /// is in our error. The environment is PATH and CNI_* alone.
    pub fn run(&self, kind: &str, verb: Verb, target: Option<Target<'_>>, request: &[u8], cancel: &Cancel) -> Result<Vec<u8>> {
        let path = self.find(kind)?;
        let what = || format!("plugin {kind}: {}", verb.name());
        let begin = Instant::now();
        let output = self.run_path(&path, verb, target, request, cancel);
        telemetry::cni_ran(kind, verb.name(), output.as_ref().is_ok_and(|o| o.status.success()), begin.elapsed());
        let output = output.context(what)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(failure(&output.describe(), &output.stdout, &output.stderr)).context(what)
    }

    fn run_path(
        &self,
        path: &Path,
        verb: Verb,
        target: Option<Target<'_>>,
        request: &[u8],
        cancel: &Cancel,
    ) -> Result<crate::sys::process::Output> {
        let dirs = std::env::join_paths(&self.dirs).map_err(|_| Error::invalid("a plugin directory has ':' in its path"))?;
        let mut tries = 0;
        loop {
            let mut program = Program::new(path).env("CNI_COMMAND", verb.name()).env("CNI_PATH", &dirs).output_limit(OUTPUT_LIMIT);
            if let Some(t) = target {
                program = program
                    .env("CNI_CONTAINERID", t.container_id)
                    .env("CNI_NETNS", t.netns)
                    .env("CNI_IFNAME", t.ifname)
                    .env("CNI_ARGS", t.args);
            }
            match program.stdin(request.to_vec()).run(cancel, self.timeout) {
                // An installer that copies over the executable is done in a moment.
                Err(e) if tries < 20 && e.message().contains("Text file busy") => {
                    tries += 1;
                    cancel.sleep(Duration::from_millis(50))?;
                }
                result => return result,
            }
        }
    }

    /// The versions that the plugin `kind` says it speaks.
    pub fn versions(&self, kind: &str, cancel: &Cancel) -> Result<Vec<Version>> {
        let path = self.find(kind)?;
        let meta = std::fs::metadata(&path).context(|| format!("read {}", path.display()))?;
        let stamp = (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec());
        if let Some((_, known)) = self.versions.lock().get(&path).filter(|(s, _)| *s == stamp) {
            return Ok(known.clone());
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Answer {
            supported_versions: Vec<String>,
        }
        let request = format!("{{\"cniVersion\":\"{}\"}}", Version::V1_1_0);
        let stdout = self.run(kind, Verb::Version, None, request.as_bytes(), cancel)?;
        let answer: Answer = serde_json::from_slice(&stdout)
            .context(|| "parse JSON")
            .context(|| format!("plugin {kind}: VERSION: answer {}", excerpt(&stdout)))?;
        let found: Vec<Version> = answer.supported_versions.iter().filter_map(|v| Version::parse(v)).collect();
        self.versions.lock().insert(path, (stamp, found.clone()));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugins(script: &str) -> (tempfile::TempDir, Plugins) {
        plugins_within(script, Duration::from_secs(20))
    }

    fn plugins_within(script: &str, timeout: Duration) -> (tempfile::TempDir, Plugins) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fake");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let plugins = Plugins::new(vec!["/nonexistent/cni".into(), dir.path().to_owned()], timeout);
        (dir, plugins)
    }

    const TARGET: Target = Target { container_id: "c1", netns: "/n", ifname: "eth0", args: "A=1;B=2" };

    #[test]
    fn environment_and_input() {
        let (_dir, p) = plugins("env | grep -v -e ^_= -e ^PWD= -e ^SHLVL= -e ^PATH= -e ^CNI_PATH= | sort; cat");
        let out = p.run("fake", Verb::Add, Some(TARGET), b"{}", &Cancel::never()).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "CNI_ARGS=A=1;B=2\nCNI_COMMAND=ADD\nCNI_CONTAINERID=c1\nCNI_IFNAME=eth0\nCNI_NETNS=/n\n{}"
        );
    }

    #[test]
    fn missing_or_not_executable_names_the_directories() {
        let (dir, p) = plugins("");
        let e = p.run("gone", Verb::Add, None, b"", &Cancel::never()).unwrap_err();
        assert_eq!(e.message(), format!("plugin gone: not found in /nonexistent/cni, {}", dir.path().display()));
        std::fs::write(dir.path().join("gone"), "").unwrap();
        assert!(p.find("gone").unwrap_err().message().contains("is not an executable file"));
        assert!(p.find("../fake").is_err());
    }

    #[test]
    fn a_hanging_plugin_leaves_no_process() {
        // A busy machine may not have begun with it within the first timeout.
        let hang = |ms: u64| {
            let script = "sleep 61.5 & echo $! > \"$(dirname $0)/pid\"; sleep 61.5";
            let (dir, p) = plugins_within(script, Duration::from_millis(ms));
            let begin = Instant::now();
            let e = p.run("fake", Verb::Add, None, b"{}", &Cancel::never()).unwrap_err();
            assert_eq!(e.code(), crate::error::Code::DeadlineExceeded, "{e}");
            assert!(begin.elapsed() < Duration::from_millis(ms) + Duration::from_secs(20));
            std::fs::read_to_string(dir.path().join("pid")).ok().filter(|pid| pid.ends_with('\n'))
        };
        let pid = [500, 4000, 16_000].into_iter().find_map(hang).expect("it begins");
        let begin = Instant::now();
        // Killed with the group. A busy machine lets it die a moment later, and an init that is slow to reap may show a zombie.
        let dead = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        while !dead() {
            assert!(begin.elapsed() < Duration::from_secs(20), "it lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn children_left_behind_are_not_waited_for() {
        let (_dir, p) = plugins_within("sleep 60 & echo '{}'", Duration::from_secs(50));
        let begin = Instant::now();
        assert_eq!(p.run("fake", Verb::Add, None, b"{}", &Cancel::never()).unwrap(), b"{}\n");
        assert!(begin.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn versions_are_asked_once() {
        let (dir, p) =
            plugins("echo x >> \"$(dirname $0)/asked\"; echo '{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.4.0\",\"1.1.0\"]}'");
        for _ in 0..3 {
            assert_eq!(p.versions("fake", &Cancel::never()).unwrap(), [Version::V0_4_0, Version::V1_1_0]);
        }
        assert_eq!(std::fs::read(dir.path().join("asked")).unwrap(), b"x\n");
        let (_dir, p) = plugins("echo hello");
        assert!(p.versions("fake", &Cancel::never()).unwrap_err().message().contains("answer \"hello\""));
    }
}
