//! What confines a container beside namespaces and cgroups, made ready for its spec: the file of a Localhost seccomp profile read,
//! the AppArmor profile loaded, SELinux labels chosen; and filters compiled for runtimes that would compile at each start.

use std::path::Path;
use std::sync::Arc;

use base64::prelude::{Engine, BASE64_STANDARD};
use oci_spec::runtime::{LinuxSeccomp, Spec};

use super::apparmor::AppArmor;
use crate::api::runtime::{LinuxContainerSecurityContext, LinuxSandboxSecurityContext, SELinuxOption};
use crate::error::{Code, Context, Error, Result};
use crate::selinux::SeLinux;
use crate::spec::seccomp::{self, bpf, Profile};
use crate::spec::{apparmor, Confinement, HostFacts};
use crate::sys::file;
use crate::sys::lock::{Lock, Rank};

/// A larger profile is none.
const PROFILE_LIMIT: u64 = 4 << 20;
/// Compiled filters kept: one per profile and set of capabilities that changes it.
const KEPT: usize = 32;
/// crun loads the filter in here instead of compiling linux.seccomp, which stays in the spec: for whoever reads it, and for a
/// runtime that does not know the annotation.
const FILTER_ANNOTATION: &str = "run.oci.seccomp_bpf_data";

/// A profile and its filter in base64, None for what only the runtime can compile.
type Compiled = (LinuxSeccomp, Option<Arc<str>>);

/// All of it, for the life of the daemon.
pub struct Confiner {
    apparmor: AppArmor,
    /// None: off, or not there.
    selinux: Option<SeLinux>,
    /// The one used last at the end.
    filters: Lock<Vec<Compiled>>,
}

impl Confiner {
    pub fn new(apparmor: AppArmor, selinux: Option<SeLinux>) -> Confiner {
        Confiner { apparmor, selinux, filters: Lock::new(Rank::Leaf, Vec::new()) }
    }

    /// Reads, loads and chooses for one container. `level` is the SELinux level of its sandbox.
    pub fn prepare(
        &self,
        security: &LinuxContainerSecurityContext,
        sandbox: &LinuxSandboxSecurityContext,
        level: &str,
        host: &HostFacts,
        warnings: &mut Vec<String>,
    ) -> Result<Confinement> {
        let seccomp = match seccomp::asked(security)? {
            seccomp::Asked::File(path) if host.seccomp => Some(read_profile(path)?),
            _ => None,
        };
        let apparmor = self.apparmor.profile(apparmor::asked(security, host.apparmor)?, warnings)?;
        // Options that say nothing are none.
        let options = security.selinux_options.as_ref().filter(|options| **options != SELinuxOption::default());
        let options = options.unwrap_or(&sandbox.selinux_options);
        let labels = self.selinux.as_ref().map(|selinux| selinux.labels(options, level, security.privileged)).transpose()?;
        Ok(Confinement { seccomp, apparmor, labels })
    }

    /// Gives the spec a compiled filter, when its profile can be compiled here.
    pub fn precompile(&self, spec: &mut Spec, arch: &str) {
        let Some(profile) = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) else { return };
        if let Some(filter) = self.filter(profile, arch) {
            spec.annotations_mut().get_or_insert_default().insert(FILTER_ANNOTATION.to_owned(), filter.to_string());
        }
    }

    fn filter(&self, profile: &LinuxSeccomp, arch: &str) -> Option<Arc<str>> {
        let mut kept = self.filters.lock();
        if let Some(at) = kept.iter().position(|(known, _)| known == profile) {
            let found = kept.remove(at);
            kept.push(found.clone());
            return found.1;
        }
        // Under the lock: a fraction of a millisecond, and the next one wants the same.
        let filter = bpf::compile(profile, arch).map(|program| Arc::from(BASE64_STANDARD.encode(program)));
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push((profile.clone(), filter.clone()));
        filter
    }
}

/// FAILED_PRECONDITION for a file that cannot be read, INVALID_ARGUMENT for one that is no profile; both name it.
fn read_profile(path: &Path) -> Result<Profile> {
    let unreadable = |e: Error| e.with_code(Code::FailedPrecondition);
    let text = file::read(path, PROFILE_LIMIT).map_err(unreadable).context(|| "seccomp profile")?;
    Profile::parse(&text).context(|| format!("seccomp profile {}", path.display()))
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::*;
    use crate::api::runtime::security_profile::ProfileType;
    use crate::api::runtime::SecurityProfile;
    use crate::spec::seccomp::Conditions;

    fn confiner(selinux: Option<SeLinux>) -> Confiner {
        Confiner::new(AppArmor::at(Path::new("/nonexistent"), Path::new("/nonexistent"), &[]), selinux)
    }

    fn host() -> HostFacts {
        HostFacts { seccomp: true, apparmor: false, ..super::super::host::detect().unwrap() }
    }

    fn localhost(path: &Path) -> LinuxContainerSecurityContext {
        let profile = SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: path.display().to_string(),
            ..Default::default()
        };
        LinuxContainerSecurityContext { seccomp: MessageField::some(profile), ..Default::default() }
    }

    fn prepare(confiner: &Confiner, security: &LinuxContainerSecurityContext) -> Result<Confinement> {
        confiner.prepare(security, &Default::default(), "s0:c1,c2", &host(), &mut Vec::new())
    }

    #[test]
    fn profile_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        let confiner = confiner(None);
        let error = prepare(&confiner, &localhost(&path)).unwrap_err();
        assert!(error.code() == Code::FailedPrecondition && error.message().contains("p.json"), "{error}");
        for (text, words) in [
            ("{", "line 1"),
            (r#"{"defaultAction": "SCMP_ACT_NOPE"}"#, "defaultAction: unknown variant `SCMP_ACT_NOPE`"),
            (r#"{"syscalls": []}"#, "missing field `defaultAction`"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = prepare(&confiner, &localhost(&path)).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().contains("p.json: "), "{error}");
            assert!(error.message().contains(words), "{error}");
        }
        std::fs::write(&path, r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap();
        assert!(prepare(&confiner, &localhost(&path)).unwrap().seccomp.is_some());
        // A FIFO would be waited for, a privileged container needs no file.
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(prepare(&confiner, &localhost(&fifo)).unwrap_err().code(), Code::FailedPrecondition);
        let privileged = LinuxContainerSecurityContext { privileged: true, ..localhost(&fifo) };
        assert_eq!(prepare(&confiner, &privileged).unwrap(), Confinement::default());
    }

    #[test]
    fn labels_only_where_selinux_is_on() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [("enforce", "1"), ("context", "")] {
            std::fs::write(dir.path().join(file), text).unwrap();
        }
        let security = LinuxContainerSecurityContext::default();
        assert_eq!(prepare(&confiner(None), &security).unwrap().labels, None);
        let on = confiner(SeLinux::detect(dir.path(), dir.path()));
        let labels = prepare(&on, &security).unwrap().labels.unwrap();
        assert_eq!(labels.process.as_deref(), Some("system_u:system_r:container_t:s0:c1,c2"));
        let sandbox = LinuxSandboxSecurityContext {
            selinux_options: MessageField::some(SELinuxOption { type_: "spc_t".into(), ..Default::default() }),
            ..Default::default()
        };
        let labels = on.prepare(&security, &sandbox, "s0:c1,c2", &host(), &mut Vec::new()).unwrap().labels.unwrap();
        assert_eq!(labels.process.as_deref(), Some("system_u:system_r:spc_t:s0:c1,c2"), "the sandbox's options");
        let security =
            LinuxContainerSecurityContext { selinux_options: MessageField::some(SELinuxOption::default()), ..Default::default() };
        let labels = on.prepare(&security, &sandbox, "s0:c1,c2", &host(), &mut Vec::new()).unwrap().labels.unwrap();
        assert_eq!(labels.process.as_deref(), Some("system_u:system_r:spc_t:s0:c1,c2"), "options that say nothing");
    }

    fn profile_with(bounding: &oci_spec::runtime::Capabilities) -> LinuxSeccomp {
        seccomp::runtime_default(&Conditions { bounding, arch: "x86_64", kernel: (6, 1) })
    }

    #[test]
    fn filters_are_compiled_once_per_profile() {
        let confiner = confiner(None);
        let with = |seccomp: LinuxSeccomp| {
            let mut spec = Spec::default();
            spec.linux_mut().get_or_insert_default().set_seccomp(Some(seccomp));
            confiner.precompile(&mut spec, "x86_64");
            spec
        };
        let (none, all) = (Default::default(), host().bounding);
        let first = with(profile_with(&none));
        let filter = &first.annotations().as_ref().unwrap()[FILTER_ANNOTATION];
        assert_eq!(BASE64_STANDARD.decode(filter).unwrap().len() % 8, 0);
        assert!(first.linux().as_ref().unwrap().seccomp().is_some(), "for runtimes that do not know the annotation");
        assert_eq!(with(profile_with(&none)), first);
        assert_eq!(confiner.filters.lock().len(), 1);
        assert_ne!(with(profile_with(&all)).annotations(), first.annotations());
        assert_eq!(confiner.filters.lock().len(), 2);
        // One that only the runtime can compile is known as such.
        let mut flags = profile_with(&none);
        flags.set_flags(Some(vec![oci_spec::runtime::LinuxSeccompFilterFlag::SeccompFilterFlagLog]));
        assert!(with(flags).annotations().as_ref().is_none_or(|all| !all.contains_key(FILTER_ANNOTATION)));
        for errno in 100..100 + KEPT as u32 {
            let mut other = profile_with(&none);
            other.set_default_errno_ret(Some(errno));
            with(other);
        }
        assert_eq!(confiner.filters.lock().len(), KEPT);
        let mut unconfined = Spec::default();
        unconfined.set_linux(None);
        confiner.precompile(&mut unconfined, "x86_64");
        assert!(unconfined.annotations().as_ref().is_none_or(|all| all.is_empty()));
    }
}
