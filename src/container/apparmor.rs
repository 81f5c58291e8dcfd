//! AppArmor on this host: which profiles are loaded, and loading the default one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::spec::apparmor::{default_profile, Asked, Present, DEFAULT};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::process::Program;

/// For one run of apparmor_parser, which compiles.
const LIMIT: Duration = Duration::from_secs(60);
/// A list of more profiles than any host has, bytes.
const LIST_LIMIT: u64 = 16 << 20;

/// Where things are.
pub struct AppArmor {
    /// One line per loaded profile: `name (mode)`.
    profiles: PathBuf,
    /// AppArmor's configuration: tunables, abstractions.
    etc: PathBuf,
    /// Places of apparmor_parser.
    parsers: Vec<PathBuf>,
    /// The default profile was loaded by this daemon: what an older one left may be another text.
    loaded: AtomicBool,
}

impl Default for AppArmor {
    fn default() -> AppArmor {
        AppArmor::at(
            Path::new("/sys/kernel/security/apparmor/profiles"),
            Path::new("/etc/apparmor.d"),
            &["/sbin/apparmor_parser", "/usr/sbin/apparmor_parser", "/usr/bin/apparmor_parser"],
        )
    }
}

impl AppArmor {
    /// With other paths, for tests.
    pub fn at(profiles: &Path, etc: &Path, parsers: &[&str]) -> AppArmor {
        let parsers = parsers.iter().map(PathBuf::from).collect();
        AppArmor { profiles: profiles.to_owned(), etc: etc.to_owned(), parsers, loaded: AtomicBool::new(false) }
    }

    /// The profile for a container, loaded. None: none. FAILED_PRECONDITION for a named one that is not loaded. A host that has AppArmor
    /// but not its parser has no default profile either; that is a line in `warnings`, and an error for who asked for it by name.
    pub fn profile(&self, asked: Asked, warnings: &mut Vec<String>) -> Result<Option<String>> {
        match asked {
            Asked::Unconfined => Ok(None),
            Asked::Profile(name) if self.is_loaded(name)? => Ok(Some(name.to_owned())),
            Asked::Profile(name) => Err(Error::precondition(format!("apparmor: profile {name:?} is not loaded on this host"))),
            Asked::Default { by_name } => match self.load_default() {
                Ok(()) => Ok(Some(DEFAULT.to_owned())),
                Err(e) if !by_name && self.parser().is_none() => {
                    warnings.push(format!("no AppArmor profile: {e}"));
                    Ok(None)
                }
                Err(e) => Err(e),
            },
        }
    }

    /// Loads the default profile if this daemon has not yet, or somebody has unloaded it since. Two at a time do no harm.
    fn load_default(&self) -> Result<()> {
        let loaded = self.is_loaded(DEFAULT)?;
        if loaded && self.loaded.load(Ordering::Acquire) {
            return Ok(());
        }
        let what = || format!("load AppArmor profile {DEFAULT}");
        let Some(parser) = self.parser() else {
            // Good enough, if perhaps of another version.
            return match loaded {
                true => Ok(()),
                false => Err(Error::precondition(format!("{}: apparmor_parser is not installed", what()))),
            };
        };
        let has = |file: &str| self.etc.join(file).is_file();
        let present = Present { tunables: has("tunables/global"), base: has("abstractions/base"), abi: has("abi/3.0") };
        // Replace, and leave the cache alone: it is by file name. The text comes by stdin, its includes from `etc`.
        let program = Program::new(parser).args(["--replace", "--skip-cache", "--base"]).arg(&self.etc);
        program.stdin(default_profile(present).into_bytes()).run_ok(&Cancel::never(), LIMIT).context(what)?;
        if !self.is_loaded(DEFAULT)? {
            return Err(Error::precondition(format!(
                "{}: {} says it is, and it is not in {}",
                what(),
                parser.display(),
                self.profiles.display()
            )));
        }
        self.loaded.store(true, Ordering::Release);
        log::info!("AppArmor profile {DEFAULT} loaded");
        Ok(())
    }

    fn parser(&self) -> Option<&Path> {
        self.parsers.iter().find(|path| path.is_file()).map(PathBuf::as_path)
    }

    fn is_loaded(&self, name: &str) -> Result<bool> {
        let list = file::read(&self.profiles, LIST_LIMIT).context(|| "look for AppArmor profiles")?;
        let list = String::from_utf8_lossy(&list);
        Ok(list.lines().any(|line| line.rsplit_once(" (").is_some_and(|(loaded, _)| loaded == name)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::error::Code;

    /// A host whose parser notes its call and its input, and "loads".
    struct Host {
        dir: tempfile::TempDir,
    }

    impl Host {
        fn new(loaded: &str) -> Host {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("profiles"), loaded).unwrap();
            std::fs::create_dir(dir.path().join("etc")).unwrap();
            Host { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn install_parser(&self, then: &str) {
            let (parser, dir) = (self.path("parser"), self.dir.path().display());
            std::fs::write(&parser, format!("#!/bin/sh\necho \"$@\" >>{dir}/calls\ncat >{dir}/text\n{then}\n")).unwrap();
            std::fs::set_permissions(&parser, std::fs::Permissions::from_mode(0o755)).unwrap();
        }

        fn installed(&self) {
            self.install_parser(&format!("echo 'crisp-default (enforce)' >>{}", self.path("profiles").display()));
        }

        fn apparmor(&self) -> AppArmor {
            AppArmor::at(&self.path("profiles"), &self.path("etc"), &["/nonexistent", self.path("parser").to_str().unwrap()])
        }

        fn calls(&self) -> usize {
            std::fs::read_to_string(self.path("calls")).unwrap_or_default().lines().count()
        }
    }

    const UNSET: Asked = Asked::Default { by_name: false };
    const SAID: Asked = Asked::Default { by_name: true };

    fn profile(apparmor: &AppArmor, asked: Asked) -> Result<Option<String>> {
        apparmor.profile(asked, &mut Vec::new())
    }

    #[test]
    fn default_profile_is_loaded_once_and_again_when_it_is_gone() {
        let host = Host::new("man_filter (enforce)\n");
        host.installed();
        let apparmor = host.apparmor();
        for asked in [UNSET, SAID, UNSET] {
            assert_eq!(profile(&apparmor, asked).unwrap().as_deref(), Some("crisp-default"));
        }
        assert_eq!(host.calls(), 1);
        let call = std::fs::read_to_string(host.path("calls")).unwrap();
        assert_eq!(call.trim(), format!("--replace --skip-cache --base {}", host.path("etc").display()));
        assert!(std::fs::read_to_string(host.path("text")).unwrap().starts_with("@{PROC}=/proc/"));
        std::fs::write(host.path("profiles"), "").unwrap();
        profile(&apparmor, UNSET).unwrap();
        assert_eq!(host.calls(), 2);
        // Another daemon may have another text.
        profile(&host.apparmor(), UNSET).unwrap();
        assert_eq!(host.calls(), 3);
    }

    #[test]
    fn includes_follow_what_is_there() {
        let host = Host::new("");
        host.installed();
        for file in ["tunables/global", "abstractions/base", "abi/3.0"] {
            std::fs::create_dir_all(host.path("etc").join(file).parent().unwrap()).unwrap();
            std::fs::write(host.path("etc").join(file), "").unwrap();
        }
        profile(&host.apparmor(), UNSET).unwrap();
        let text = std::fs::read_to_string(host.path("text")).unwrap();
        assert!(text.starts_with("abi <abi/3.0>,\ninclude <tunables/global>\n") && text.contains("<abstractions/base>"), "{text}");
    }

    #[test]
    fn named_profiles_must_be_loaded() {
        let host = Host::new("web (complain)\n/usr/bin/a b (enforce)\nweb//hat (enforce)\n");
        let apparmor = host.apparmor();
        for name in ["web", "/usr/bin/a b", "web//hat"] {
            assert_eq!(profile(&apparmor, Asked::Profile(name)).unwrap().as_deref(), Some(name));
        }
        for name in ["we", "web (complain)", "other"] {
            let error = profile(&apparmor, Asked::Profile(name)).unwrap_err();
            assert!(error.code() == Code::FailedPrecondition && error.message().contains(name), "{error}");
        }
        assert_eq!(profile(&apparmor, Asked::Unconfined).unwrap(), None);
    }

    #[test]
    fn without_a_parser_only_who_asks_fails() {
        let host = Host::new("");
        let (apparmor, mut warnings) = (host.apparmor(), Vec::new());
        assert_eq!(apparmor.profile(UNSET, &mut warnings).unwrap(), None);
        assert!(warnings.len() == 1 && warnings[0].contains("apparmor_parser is not installed"), "{warnings:?}");
        assert_eq!(profile(&apparmor, SAID).unwrap_err().code(), Code::FailedPrecondition);
        std::fs::write(host.path("profiles"), "crisp-default (enforce)\n").unwrap();
        assert_eq!(profile(&apparmor, UNSET).unwrap().as_deref(), Some("crisp-default"));
    }

    #[test]
    fn a_failed_load_is_no_container_without_a_profile() {
        let host = Host::new("");
        host.install_parser("echo 'syntax error' >&2; exit 1");
        let error = profile(&host.apparmor(), UNSET).unwrap_err();
        assert!(error.message().contains("load AppArmor profile crisp-default") && error.message().contains("syntax error"), "{error}");
        host.install_parser("true");
        assert_eq!(profile(&host.apparmor(), UNSET).unwrap_err().code(), Code::FailedPrecondition);
    }

    #[test]
    fn an_unreadable_list_is_an_error() {
        let apparmor = AppArmor::at(Path::new("/nonexistent/profiles"), Path::new("/nonexistent"), &[]);
        let error = profile(&apparmor, SAID).unwrap_err();
        assert!(error.code() != Code::NotFound && error.message().contains("/nonexistent/profiles"), "{error}");
    }
}
