//! seccomp: the profile of RuntimeDefault, profile files, and filters made from both.

/// Filters (classic BPF) made from profiles.
pub mod bpf;
/// The profile of RuntimeDefault.
mod default;
/// Numbers of system calls by name.
mod numbers;
/// Profile files: JSON.
pub mod profile;

/// Runs filters, for tests.
#[cfg(any(test, feature = "fuzz"))]
#[path = "../../../tests/host/bpf.rs"]
pub(crate) mod interpreter;

pub use default::runtime_default;
pub use profile::Profile;

use std::path::Path;

use oci_spec::runtime::{Capabilities, LinuxSeccomp, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator};

use super::Inputs;
use crate::api::runtime::security_profile::ProfileType;
use crate::api::runtime::LinuxContainerSecurityContext;
use crate::error::{Context, Error, Result};

/// What a profile may depend on, beside the machine.
#[derive(Clone, Copy, Debug)]
pub struct Conditions<'a> {
    /// The container's bounding set.
    pub bounding: &'a Capabilities,
    /// A name of `std::env::consts::ARCH`.
    pub arch: &'a str,
    /// The kernel's version: (6, 1).
    pub kernel: (u32, u32),
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    Unconfined,
    Default,
    /// The file of a Localhost profile: absolute.
    File(&'a Path),
}

/// The new field wins; without it the deprecated path counts, and without both there is no filter, as there is none for a privileged
/// container. INVALID_ARGUMENT names the field.
pub fn asked(security: &LinuxContainerSecurityContext) -> Result<Asked<'_>> {
    if security.privileged {
        return Ok(Asked::Unconfined);
    }
    if let Some(profile) = security.seccomp.as_ref() {
        return match profile.profile_type.enum_value() {
            Ok(ProfileType::RuntimeDefault) => Ok(Asked::Default),
            Ok(ProfileType::Unconfined) => Ok(Asked::Unconfined),
            Ok(ProfileType::Localhost) => profile::path_of("seccomp.localhost_ref", &profile.localhost_ref).map(Asked::File),
            Err(number) => Err(Error::invalid(format!("seccomp: profile type {number} is not known"))),
        };
    }
    let field = "seccomp_profile_path";
    match security.seccomp_profile_path.as_str() {
        "" | "unconfined" => Ok(Asked::Unconfined),
        "runtime/default" | "docker/default" => Ok(Asked::Default),
        path if path.starts_with("localhost/") => profile::path_of(field, path).map(Asked::File),
        path => Err(Error::invalid(format!("{field}: expected runtime/default, unconfined or localhost/<path>, found {path:?}"))),
    }
}

/// The filter of a container with these capabilities in its bounding set; None: unconfined.
pub(super) fn filter(inputs: &Inputs, bounding: &Capabilities, warnings: &mut Vec<String>) -> Result<Option<LinuxSeccomp>> {
    let asked = asked(inputs.security())?;
    if asked == Asked::Unconfined {
        return Ok(None);
    }
    let host = inputs.host;
    if !host.seccomp {
        return Err(Error::precondition("seccomp: the kernel has no seccomp filters"));
    }
    let conditions = Conditions { bounding, arch: &host.arch, kernel: host.kernel };
    let Asked::File(path) = asked else { return Ok(Some(runtime_default(&conditions))) };
    let Some(profile) = &inputs.confinement.seccomp else {
        return Err(Error::internal(format!("seccomp profile {} was not read", path.display())));
    };
    let (filter, lines) = profile.resolve(&conditions).context(|| format!("seccomp profile {}", path.display()))?;
    warnings.extend(lines.into_iter().map(|line| format!("seccomp profile {}: {line}", path.display())));
    Ok(Some(filter))
}

fn argument(index: usize, op: LinuxSeccompOperator, value: u64, value_two: u64) -> LinuxSeccompArg {
    let argument = LinuxSeccompArgBuilder::default().index(index).op(op).value(value).value_two(value_two).build();
    argument.expect("every field of the builder has a default")
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::super::fixture::Fixture;
    use super::*;
    use crate::api::runtime::SecurityProfile;
    use crate::error::Code;

    fn with_profile(kind: ProfileType, localhost_ref: &str) -> LinuxContainerSecurityContext {
        let profile = SecurityProfile { profile_type: kind.into(), localhost_ref: localhost_ref.into(), ..Default::default() };
        LinuxContainerSecurityContext { seccomp: MessageField::some(profile), ..Default::default() }
    }

    #[test]
    fn field_wins_over_the_deprecated_path() {
        let mut security = with_profile(ProfileType::Unconfined, "");
        security.seccomp_profile_path = "runtime/default".into();
        assert_eq!(asked(&security).unwrap(), Asked::Unconfined);
        security.seccomp = MessageField::none();
        for (path, expected) in [
            ("runtime/default", Asked::Default),
            ("docker/default", Asked::Default),
            ("unconfined", Asked::Unconfined),
            ("", Asked::Unconfined),
            ("localhost//var/lib/p.json", Asked::File(Path::new("/var/lib/p.json"))),
        ] {
            security.seccomp_profile_path = path.into();
            assert_eq!(asked(&security).unwrap(), expected, "{path}");
        }
        for bad in ["x", "/var/lib/p.json", "localhost/", "localhost/p.json", "localhost//a\0b"] {
            security.seccomp_profile_path = bad.into();
            let error = asked(&security).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().starts_with("seccomp_profile_path: "), "{error}");
        }
        assert_eq!(asked(&with_profile(ProfileType::RuntimeDefault, "")).unwrap(), Asked::Default);
    }

    #[test]
    fn localhost_ref_is_an_absolute_path() {
        for reference in ["/p.json", "localhost//p.json"] {
            assert_eq!(asked(&with_profile(ProfileType::Localhost, reference)).unwrap(), Asked::File(Path::new("/p.json")));
        }
        for bad in ["", "p.json", "localhost/p.json", "../p.json"] {
            let error = asked(&with_profile(ProfileType::Localhost, bad)).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().contains("localhost_ref"), "{error}");
        }
        let mut unknown = with_profile(ProfileType::Localhost, "/p");
        unknown.seccomp.as_mut().unwrap().profile_type = protobuf::EnumOrUnknown::from_i32(7);
        assert_eq!(asked(&unknown).unwrap_err().code(), Code::InvalidArgument);
    }

    fn filter_of(fixture: &mut Fixture) -> Option<LinuxSeccomp> {
        fixture.build().0.linux().as_ref().unwrap().seccomp().clone()
    }

    #[test]
    fn privileged_containers_have_none() {
        let mut fixture = Fixture::new();
        *fixture.security() = with_profile(ProfileType::RuntimeDefault, "");
        assert!(filter_of(&mut fixture).is_some());
        fixture.host.seccomp = false;
        assert_eq!(fixture.error().code(), Code::FailedPrecondition);
        fixture.set_privileged();
        assert!(filter_of(&mut fixture).is_none());
        *fixture.security() = with_profile(ProfileType::Localhost, "not absolute");
        fixture.set_privileged();
        assert!(filter_of(&mut fixture).is_none());
    }

    #[test]
    fn default_profile_sees_the_bounding_set_and_the_kernel() {
        let allows = |fixture: &mut Fixture, name: &str| {
            let filter = filter_of(fixture).unwrap();
            filter.syscalls().as_ref().unwrap().iter().any(|s| s.args().is_none() && s.names().iter().any(|n| n == name))
        };
        let mut fixture = Fixture::new();
        *fixture.security() = with_profile(ProfileType::RuntimeDefault, "");
        assert!(!allows(&mut fixture, "mount") && allows(&mut fixture, "chroot") && allows(&mut fixture, "ptrace"));
        fixture.security().capabilities.mut_or_insert_default().add_capabilities.push("SYS_ADMIN".into());
        assert!(allows(&mut fixture, "mount"));
        fixture.host.kernel = (4, 7);
        assert!(!allows(&mut fixture, "ptrace"));
    }

    #[test]
    fn file_is_resolved_for_the_container() {
        let text = br#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrno": "ENOSYS", "surprise": 1, "syscalls": [
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"name": "read", "action": "SCMP_ACT_ALLOW"}]}"#;
        let mut fixture = Fixture::new();
        *fixture.security() = with_profile(ProfileType::Localhost, "/etc/p.json");
        assert_eq!(fixture.error().code(), Code::Internal, "a profile that nobody read is no reason to go without");
        fixture.confinement.seccomp = Some(Profile::parse(text).unwrap());
        let (spec, warnings) = fixture.build();
        let filter = spec.linux().as_ref().unwrap().seccomp().clone().unwrap();
        assert_eq!((filter.default_errno_ret(), filter.syscalls().as_ref().unwrap().len()), (Some(38), 1));
        assert_eq!(warnings, ["seccomp profile /etc/p.json: surprise is not known, and not used"]);
    }
}
