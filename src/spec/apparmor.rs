//! AppArmor: which profile a container gets, and the text of the default one. Loading is `container::apparmor`'s.

use crate::api::runtime::security_profile::ProfileType;
use crate::api::runtime::LinuxContainerSecurityContext;
use crate::error::{Error, Result};

/// The name of the default profile.
pub const DEFAULT: &str = "crisp-default";
/// Longest name of a profile that is taken, bytes.
const LONGEST_NAME: usize = 4096;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    Unconfined,
    /// `by_name`: it was said, not merely left open.
    Default {
        by_name: bool,
    },
    Profile(&'a str),
}

/// The new field wins over the deprecated one; nothing said is the default profile. Without AppArmor (`enabled` false) what is asked for
/// by name is FAILED_PRECONDITION. A privileged container has the default one never, but the one that it names.
pub fn asked(security: &LinuxContainerSecurityContext, enabled: bool) -> Result<Asked<'_>> {
    let asked = match security.apparmor.as_ref() {
        Some(profile) => match profile.profile_type.enum_value() {
            Ok(ProfileType::Unconfined) => Asked::Unconfined,
            Ok(ProfileType::RuntimeDefault) => Asked::Default { by_name: true },
            Ok(ProfileType::Localhost) => Asked::Profile(name("apparmor.localhost_ref", &profile.localhost_ref)?),
            Err(number) => return Err(Error::invalid(format!("apparmor: profile type {number} is not known"))),
        },
        None => match security.apparmor_profile.as_str() {
            "" => Asked::Default { by_name: false },
            "unconfined" => Asked::Unconfined,
            "runtime/default" => Asked::Default { by_name: true },
            profile if profile.starts_with("localhost/") => Asked::Profile(name("apparmor_profile", profile)?),
            other => {
                return Err(Error::invalid(format!(
                    "apparmor_profile: expected runtime/default, unconfined or localhost/<name>, found {other:?}"
                )))
            }
        },
    };
    let refused = |what: &str| Err(Error::precondition(format!("apparmor: {what} is asked for, and AppArmor is not enabled on this host")));
    match asked {
        Asked::Profile(name) if !enabled => refused(&format!("profile {name}")),
        Asked::Default { by_name: true } if !enabled => refused("the default profile"),
        Asked::Default { .. } if !enabled || security.privileged => Ok(Asked::Unconfined),
        asked => Ok(asked),
    }
}

fn name<'a>(field: &str, reference: &'a str) -> Result<&'a str> {
    let name = reference.strip_prefix("localhost/").unwrap_or(reference);
    // It is written to a file of the kernel, after a word.
    match name.is_empty() || name.len() > LONGEST_NAME || name.bytes().any(|b| b.is_ascii_control()) {
        true => Err(Error::invalid(format!("{field}: expected the name of a profile, found {reference:?}"))),
        false => Ok(name),
    }
}

/// Which of AppArmor's own files the host has, for the profile to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Present {
    /// tunables/global
    pub tunables: bool,
    /// abstractions/base
    pub base: bool,
    /// abi/3.0; newer rules would deny unix sockets where older kernels had none to give.
    pub abi: bool,
}

/// The default profile, for apparmor_parser. It allows what the other layers allow, and holds back what they could miss: writes to
/// /proc and /sys beyond a process's own and the namespaced, mounts, signals and traces across containers' borders.
pub fn default_profile(present: Present) -> String {
    let abi = if present.abi { "abi <abi/3.0>,\n" } else { "" };
    let tunables = if present.tunables { "include <tunables/global>\n" } else { "@{PROC}=/proc/\n" };
    let base = if present.base { "  include <abstractions/base>\n" } else { "" };
    format!(
        "{abi}{tunables}
profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
{base}
  file,
  network,
  capability,
  umount,
  deny mount,

  # From the daemon, its monitors and the OCI runtimes, confined or not, and among the containers.
  signal (receive) peer=unconfined,
  signal (receive) peer={{runc,crun,crispd,crisp-shim}},
  signal (send, receive) peer={DEFAULT},
  ptrace (trace, read, tracedby, readby) peer={DEFAULT},

  # Of /proc: the directories of processes, and of /proc/sys kernel/shm*, which belongs to the IPC namespace.
  deny @{{PROC}}/* w,
  deny @{{PROC}}/[^1-9s]*/** w,
  deny @{{PROC}}/s[^y]*/** w,
  deny @{{PROC}}/sy[^s]*/** w,
  deny @{{PROC}}/sys[^/]*/** w,
  deny @{{PROC}}/sys/[^k]** w,
  deny @{{PROC}}/sys/k[^e]** w,
  deny @{{PROC}}/sys/ke[^r]** w,
  deny @{{PROC}}/sys/kernel/[^s]** w,
  deny @{{PROC}}/sys/kernel/s[^h]** w,
  deny @{{PROC}}/sys/kernel/sh[^m]** w,
  deny @{{PROC}}/sysrq-trigger rwklx,
  deny @{{PROC}}/kcore rwklx,

  # Of /sys: the cgroups.
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/security/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
}}
"
    )
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::*;
    use crate::api::runtime::SecurityProfile;
    use crate::error::Code;

    fn security(kind: Option<ProfileType>, localhost_ref: &str, deprecated: &str) -> LinuxContainerSecurityContext {
        let profile =
            kind.map(|kind| SecurityProfile { profile_type: kind.into(), localhost_ref: localhost_ref.into(), ..Default::default() });
        LinuxContainerSecurityContext { apparmor: profile.into(), apparmor_profile: deprecated.into(), ..Default::default() }
    }

    #[test]
    fn enabled() {
        let of = |security: LinuxContainerSecurityContext| format!("{:?}", asked(&security, true).unwrap());
        let (unset, said) = ("Default { by_name: false }", "Default { by_name: true }");
        assert_eq!(of(security(None, "", "")), unset);
        assert_eq!(of(security(None, "", "runtime/default")), said);
        assert_eq!(of(security(None, "", "unconfined")), "Unconfined");
        assert_eq!(of(security(None, "", "localhost/web")), "Profile(\"web\")");
        assert_eq!(of(security(Some(ProfileType::RuntimeDefault), "", "unconfined")), said);
        assert_eq!(of(security(Some(ProfileType::Unconfined), "", "localhost/web")), "Unconfined");
        assert_eq!(of(security(Some(ProfileType::Localhost), "web", "unconfined")), "Profile(\"web\")");
        assert_eq!(of(security(Some(ProfileType::Localhost), "localhost/a//b", "")), "Profile(\"a//b\")");
    }

    #[test]
    fn disabled() {
        for unset in [security(None, "", ""), security(None, "", "unconfined"), security(Some(ProfileType::Unconfined), "", "")] {
            assert_eq!(asked(&unset, false).unwrap(), Asked::Unconfined);
        }
        for (by_name, word) in [
            (security(None, "", "runtime/default"), "default profile"),
            (security(None, "", "localhost/web"), "web"),
            (security(Some(ProfileType::RuntimeDefault), "", ""), "default profile"),
            (security(Some(ProfileType::Localhost), "localhost/web", ""), "web"),
        ] {
            let error = asked(&by_name, false).unwrap_err();
            assert!(error.code() == Code::FailedPrecondition && error.message().contains(word), "{error}");
        }
    }

    #[test]
    fn privileged_containers_have_only_what_they_name() {
        let of = |mut security: LinuxContainerSecurityContext| {
            security.privileged = true;
            format!("{:?}", asked(&security, true).unwrap())
        };
        assert_eq!(of(security(None, "", "")), "Unconfined");
        assert_eq!(of(security(Some(ProfileType::RuntimeDefault), "", "")), "Unconfined");
        assert_eq!(of(security(Some(ProfileType::Localhost), "web", "")), "Profile(\"web\")");
    }

    #[test]
    fn what_is_no_profile() {
        let mut unknown = security(Some(ProfileType::Localhost), "x", "");
        unknown.apparmor = MessageField::some(SecurityProfile { profile_type: protobuf::EnumOrUnknown::from_i32(9), ..Default::default() });
        let line = security(Some(ProfileType::Localhost), "a\nb", "");
        let empty = security(Some(ProfileType::Localhost), "localhost/", "");
        for bad in [unknown, line, empty, security(None, "", "web"), security(None, "", "localhost/")] {
            assert_eq!(asked(&bad, true).unwrap_err().code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn profile_uses_what_the_host_has() {
        let bare = default_profile(Present::default());
        assert!(bare.starts_with("@{PROC}=/proc/\n\nprofile crisp-default flags=(") && !bare.contains("include"), "{bare}");
        let full = default_profile(Present { tunables: true, base: true, abi: true });
        assert!(full.starts_with("abi <abi/3.0>,\ninclude <tunables/global>\n") && full.contains("{\n  include <abstractions/base>\n"));
        assert!(full.contains("\n  signal (receive) peer={runc,crun,crispd,crisp-shim},\n"), "{full}");
    }
}
