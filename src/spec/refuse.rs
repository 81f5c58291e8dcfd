//! What is refused by name: contradictions (INVALID_ARGUMENT), what this host cannot do (FAILED_PRECONDITION) and what is
//! not built yet (UNIMPLEMENTED). Pure, so a caller can ask before it makes anything.

use super::mounts::OPTIONS;
use super::{apparmor, seccomp, selinux, HostFacts};
use crate::api::runtime::{ContainerConfig, Mount, MountPropagation, PodSandboxConfig};
use crate::error::{Code, Error, Result};

/// Everything of a container's request that is not honoured, but for its mounts: see [`mount`].
pub fn container(config: &ContainerConfig, sandbox: &PodSandboxConfig, host: &HostFacts) -> Result<()> {
    if config.windows.is_some() {
        return Err(Error::invalid("windows: this is a Linux host"));
    }
    let Some(security) = config.linux.security_context.as_ref() else { return Ok(()) };
    if security.privileged && !sandbox.linux.security_context.privileged {
        return Err(Error::invalid("privileged: the sandbox is not privileged"));
    }
    if let Some(options) = security.selinux_options.as_ref() {
        selinux::check(options)?;
    }
    seccomp::asked(security)?;
    apparmor::asked(security, host.apparmor).map(drop)
}

/// A mount that cannot be made as asked. Called before its host path is created. `recursive_read_only`: whether the OCI runtime can.
pub fn mount(mount: &Mount, _host: &HostFacts, recursive_read_only: bool) -> Result<()> {
    let place = || format!("mount {}", mount.container_path);
    let invalid = |what: &str| Err(Error::invalid(format!("{}: {what}", place())));
    let propagation = mount.propagation.enum_value();
    if propagation.is_err() {
        return invalid("unknown propagation");
    }
    match mount.image.is_some() {
        true if !mount.host_path.is_empty() => return invalid("host_path and image exclude each other"),
        true if !mount.readonly => return invalid("readonly is not set, and an image can only be read"),
        true if propagation == Ok(MountPropagation::PROPAGATION_BIDIRECTIONAL) => {
            return invalid("propagation is bidirectional, and nothing can be mounted in an image");
        }
        false if !mount.image_sub_path.is_empty() => return invalid("image_sub_path without image"),
        _ => {}
    }
    if let Some(option) = mount.mount_options.iter().find(|option| !OPTIONS.contains(&option.as_str())) {
        return invalid(&format!("mount_options: {option:?} is not one of {}", OPTIONS.join(", ")));
    }
    if mount.recursive_read_only {
        if !mount.readonly || propagation != Ok(MountPropagation::PROPAGATION_PRIVATE) {
            return invalid("recursive_read_only needs readonly and private propagation");
        }
        if !recursive_read_only {
            // kubelet knows this one by code UNKNOWN and by the first word of the whole message.
            let why = "recursive_read_only: the OCI runtime or the kernel cannot do it";
            return Err(Error::new(Code::Unknown, format!("RROUnsupported: {}: {why}", place())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::super::fixture::{host, Fixture};
    use super::*;
    use crate::api::runtime::{ImageSpec, SELinuxOption, WindowsContainerConfig};

    fn refused(change: impl FnOnce(&mut Fixture), code: Code, word: &str) {
        let mut fixture = Fixture::new();
        change(&mut fixture);
        let error = container(&fixture.config, &fixture.sandbox, &fixture.host).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(word), "{error}");
    }

    fn accepted(change: impl FnOnce(&mut Fixture)) {
        let mut fixture = Fixture::new();
        change(&mut fixture);
        container(&fixture.config, &fixture.sandbox, &fixture.host).unwrap();
    }

    #[test]
    fn absent_linux_is_fine() {
        accepted(|f| f.config.linux = MessageField::none());
    }

    #[test]
    fn windows() {
        refused(|f| f.config.windows = MessageField::some(WindowsContainerConfig::default()), Code::InvalidArgument, "windows");
    }

    #[test]
    fn privileged_container_in_a_sandbox_that_is_not() {
        refused(|f| f.security().privileged = true, Code::InvalidArgument, "privileged");
        accepted(|f| f.set_privileged());
    }

    fn mount_refused(change: impl FnOnce(&mut Mount), code: Code, word: &str) {
        let mut asked = Mount { container_path: "/data".into(), host_path: "/srv".into(), ..Default::default() };
        change(&mut asked);
        let error = mount(&asked, &HostFacts { selinux: true, ..host() }, false).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(word), "{error}");
    }

    #[test]
    fn mounts_of_images() {
        mount_refused(|m| m.image = MessageField::some(ImageSpec::default()), Code::InvalidArgument, "exclude");
        let image = |m: &mut Mount| {
            m.host_path.clear();
            m.image = MessageField::some(ImageSpec::default());
        };
        mount_refused(image, Code::InvalidArgument, "readonly");
        let both_ways = |m: &mut Mount| {
            image(m);
            m.readonly = true;
            m.propagation = MountPropagation::PROPAGATION_BIDIRECTIONAL.into();
        };
        mount_refused(both_ways, Code::InvalidArgument, "bidirectional");
        mount_refused(|m| m.image_sub_path = "a".into(), Code::InvalidArgument, "image_sub_path");
        let mut good = Mount { container_path: "/i".into(), readonly: true, image_sub_path: "a".into(), ..Default::default() };
        good.image = MessageField::some(ImageSpec::default());
        mount(&good, &host(), false).unwrap();
    }

    #[test]
    fn recursive_read_only() {
        mount_refused(|m| m.recursive_read_only = true, Code::InvalidArgument, "needs readonly");
        let asked = |m: &mut Mount| (m.readonly, m.recursive_read_only) = (true, true);
        mount_refused(asked, Code::Unknown, "RROUnsupported: ");
        let mut good = Mount { container_path: "/r".into(), host_path: "/srv".into(), ..Default::default() };
        asked(&mut good);
        mount(&good, &host(), true).unwrap();
        let slave = |m: &mut Mount| {
            (m.readonly, m.recursive_read_only) = (true, true);
            m.propagation = MountPropagation::PROPAGATION_HOST_TO_CONTAINER.into();
        };
        mount_refused(slave, Code::InvalidArgument, "private");
    }

    #[test]
    fn options_labels_and_unknown_propagation() {
        for option in ["rw", "exec", "bind", "remount", "idmap", "context=x", "noexec,nodev", ""] {
            mount_refused(|m| m.mount_options.push(option.into()), Code::InvalidArgument, &format!("mount_options: {option:?}"));
        }
        mount_refused(|m| m.propagation = protobuf::EnumOrUnknown::from_i32(9), Code::InvalidArgument, "propagation");
        let relabel = Mount { selinux_relabel: true, ..Default::default() };
        mount(&relabel, &host(), false).unwrap();
        let options = OPTIONS.map(str::to_owned).to_vec();
        mount(&Mount { mount_options: options, ..Default::default() }, &host(), false).unwrap();
    }

    #[test]
    fn confinement_is_checked_before_anything_is_made() {
        let level = |level: &'static str| {
            move |f: &mut Fixture| {
                f.security().selinux_options = MessageField::some(SELinuxOption { level: level.into(), ..Default::default() });
            }
        };
        accepted(level("s0:c1,c2"));
        refused(level("s0:1"), Code::InvalidArgument, "level");
        refused(|f| f.security().apparmor_profile = "localhost/q".into(), Code::FailedPrecondition, "q");
        refused(|f| f.security().seccomp_profile_path = "localhost/q".into(), Code::InvalidArgument, "seccomp_profile_path");
        accepted(|f| f.security().apparmor_profile = "unconfined".into());
    }
}
