//! Profile files of Localhost: JSON in the form of the OCI runtime spec, or in that of Docker, Podman and CRI-O, which adds
//! conditions (`includes`, `excludes`), `archMap`, and errnos by name. Errors name the field.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator as Operator, LinuxSyscall,
};
use serde::Deserialize;

use super::{argument, Conditions};
use crate::error::{Error, Result};

/// A profile as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    file: File,
    /// Members that mean nothing to us, as paths.
    unknown: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    default_action: Action,
    default_errno_ret: Option<u32>,
    /// A name of errno(3); wins over the number.
    default_errno: Option<String>,
    #[serde(default)]
    architectures: Option<Vec<Arch>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchMap>>,
    #[serde(default)]
    flags: Option<Vec<LinuxSeccompFilterFlag>>,
    listener_path: Option<PathBuf>,
    listener_metadata: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<Entry>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: Action,
    errno_ret: Option<u32>,
    errno: Option<String>,
    #[serde(default)]
    args: Option<Vec<Arg>>,
    #[serde(default)]
    includes: Option<Filter>,
    #[serde(default)]
    excludes: Option<Filter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Arg {
    index: usize,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: Operator,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Filter {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

/// Members by place; what else is there is told, since a misspelt one would change what is allowed.
const TOP: &[&str] = &[
    "defaultAction",
    "defaultErrnoRet",
    "defaultErrno",
    "architectures",
    "archMap",
    "flags",
    "listenerPath",
    "listenerMetadata",
    "syscalls",
    "comment",
    "$schema",
];
const ENTRY: &[&str] = &["name", "names", "action", "errnoRet", "errno", "args", "includes", "excludes", "comment"];
const ARG: &[&str] = &["index", "value", "valueTwo", "op"];
const FILTER: &[&str] = &["caps", "arches", "minKernel"];
const ARCH_MAP: &[&str] = &["architecture", "subArchitectures"];
/// Unknown members told, at most.
const TOLD: usize = 8;

/// errno(3) names that profiles use, and their numbers on all architectures but those with numbers of their own (alpha, mips,
/// parisc, sparc), for the ones beyond 34.
const ERRNOS: &[(&str, u32)] = &[
    ("EPERM", 1),
    ("ENOENT", 2),
    ("ESRCH", 3),
    ("EINTR", 4),
    ("EIO", 5),
    ("ENXIO", 6),
    ("E2BIG", 7),
    ("ENOEXEC", 8),
    ("EBADF", 9),
    ("ECHILD", 10),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("EFAULT", 14),
    ("ENOTBLK", 15),
    ("EBUSY", 16),
    ("EEXIST", 17),
    ("EXDEV", 18),
    ("ENODEV", 19),
    ("ENOTDIR", 20),
    ("EISDIR", 21),
    ("EINVAL", 22),
    ("ENFILE", 23),
    ("EMFILE", 24),
    ("ENOTTY", 25),
    ("ETXTBSY", 26),
    ("EFBIG", 27),
    ("ENOSPC", 28),
    ("ESPIPE", 29),
    ("EROFS", 30),
    ("EMLINK", 31),
    ("EPIPE", 32),
    ("EDOM", 33),
    ("ERANGE", 34),
    ("EDEADLK", 35),
    ("ENAMETOOLONG", 36),
    ("ENOLCK", 37),
    ("ENOSYS", 38),
    ("ENOTEMPTY", 39),
    ("ELOOP", 40),
    ("ENODATA", 61),
    ("EPROTO", 71),
    ("EOVERFLOW", 75),
    ("ENOTSOCK", 88),
    ("EPROTONOSUPPORT", 93),
    ("EOPNOTSUPP", 95),
    ("ENOTSUP", 95),
    ("EAFNOSUPPORT", 97),
    ("ENETDOWN", 100),
    ("ENOBUFS", 105),
    ("ETIMEDOUT", 110),
    ("ECONNREFUSED", 111),
];
/// MAX_ERRNO of the kernel.
const MOST_ERRNO: u32 = 4095;

impl Profile {
    /// Reads a file's text. INVALID_ARGUMENT names the field, the caller adds the file.
    pub fn parse(text: &[u8]) -> Result<Profile> {
        let mut json = serde_json::Deserializer::from_slice(text);
        let file: File = serde_path_to_error::deserialize(&mut json).map_err(|e| {
            let path = e.path().to_string();
            let place = if path == "." || path.is_empty() { String::new() } else { format!("{path}: ") };
            Error::invalid(format!("{place}{}", e.inner()))
        })?;
        json.end().map_err(|e| Error::invalid(e.to_string()))?;
        check(&file)?;
        let mut unknown = Vec::new();
        if let Ok(value) = serde_json::from_slice(text) {
            find_unknown(&value, &mut unknown);
        }
        Ok(Profile { file, unknown })
    }

    /// What a container gets of it. The second value has a line for each thing that had no effect.
    pub fn resolve(&self, conditions: &Conditions) -> Result<(LinuxSeccomp, Vec<String>)> {
        let file = &self.file;
        let mut warnings: Vec<String> = self.unknown.iter().map(|path| format!("{path} is not known, and not used")).collect();
        let mut syscalls = Vec::new();
        for (n, entry) in file.syscalls.iter().flatten().enumerate() {
            let place = format!("syscalls[{n}]");
            let excluded = |filter: &Filter| filter.excludes(&format!("{place}.excludes"), conditions);
            let included = |filter: &Filter| filter.includes(&format!("{place}.includes"), conditions);
            if entry.excludes.as_ref().map(excluded).transpose()?.unwrap_or(false)
                || !entry.includes.as_ref().map(included).transpose()?.unwrap_or(true)
            {
                continue;
            }
            let mut syscall = LinuxSyscall::default();
            let names = entry.names.iter().flatten().chain(&entry.name).cloned().collect();
            let args: Vec<LinuxSeccompArg> =
                entry.args.iter().flatten().map(|arg| argument(arg.index, arg.op, arg.value, arg.value_two)).collect();
            let errno = errno(&format!("{place}.errno"), &entry.errno, entry.errno_ret, entry.action, &mut warnings)?;
            syscall.set_names(names).set_action(entry.action).set_errno_ret(errno).set_args((!args.is_empty()).then_some(args));
            syscalls.push(syscall);
        }
        let mut seccomp = LinuxSeccomp::default();
        let errno = errno("defaultErrno", &file.default_errno, file.default_errno_ret, file.default_action, &mut warnings)?;
        seccomp
            .set_default_action(file.default_action)
            .set_default_errno_ret(errno)
            .set_architectures(file.architectures(conditions.arch))
            .set_flags(file.flags.clone())
            .set_listener_path(file.listener_path.clone())
            .set_listener_metadata(file.listener_metadata.clone())
            .set_syscalls(Some(syscalls));
        Ok((seccomp, warnings))
    }
}

impl File {
    fn architectures(&self, native: &str) -> Option<Vec<Arch>> {
        let listed = self.architectures.clone().filter(|list| !list.is_empty());
        let native = scmp_arch(native)?;
        let mapped = || {
            let map = self.arch_map.iter().flatten().find(|map| map.architecture == native)?;
            Some([map.architecture].into_iter().chain(map.sub_architectures.iter().flatten().copied()).collect())
        };
        listed.or_else(mapped)
    }
}

/// What serde cannot see.
fn check(file: &File) -> Result<()> {
    let not_empty = |list: &Option<Vec<Arch>>| list.as_ref().is_some_and(|list| !list.is_empty());
    if not_empty(&file.architectures) && file.arch_map.as_ref().is_some_and(|map| !map.is_empty()) {
        return Err(Error::invalid("architectures and archMap exclude each other"));
    }
    let listens =
        file.default_action == Action::ScmpActNotify || file.syscalls.iter().flatten().any(|entry| entry.action == Action::ScmpActNotify);
    match &file.listener_path {
        None if listens => return Err(Error::invalid("listenerPath: SCMP_ACT_NOTIFY needs it")),
        Some(path) if !path.is_absolute() => {
            return Err(Error::invalid(format!("listenerPath: {} is not an absolute path", path.display())));
        }
        _ => {}
    }
    for (n, entry) in file.syscalls.iter().flatten().enumerate() {
        let place = format!("syscalls[{n}]");
        match (&entry.name, entry.names.as_deref().unwrap_or_default()) {
            (Some(_), [_, ..]) => return Err(Error::invalid(format!("{place}: name and names exclude each other"))),
            (None, []) => return Err(Error::invalid(format!("{place}.names: empty"))),
            (name, names) => {
                if name.iter().chain(names).any(|name| name.is_empty() || name.bytes().any(|b| b.is_ascii_control())) {
                    return Err(Error::invalid(format!("{place}.names: an empty name, or one with control characters")));
                }
            }
        }
        if let Some(at) = entry.args.iter().flatten().position(|arg| arg.index > 5) {
            return Err(Error::invalid(format!("{place}.args[{at}].index: calls have arguments 0 to 5")));
        }
        if entry.args.as_ref().is_some_and(|args| args.len() > 6) {
            return Err(Error::invalid(format!("{place}.args: more than 6 conditions")));
        }
    }
    Ok(())
}

/// The errno to answer with: by its name, else by its number. Actions without one have it dropped, as runc does; crun would fail.
fn errno(place: &str, name: &Option<String>, number: Option<u32>, action: Action, warnings: &mut Vec<String>) -> Result<Option<u32>> {
    let errno = match name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => match name.parse::<u32>().ok().or_else(|| ERRNOS.iter().find(|(known, _)| *known == name).map(|(_, n)| *n)) {
            Some(number) => Some(number),
            None => return Err(Error::invalid(format!("{place}: {name:?} is no name of an errno that is known here"))),
        },
        None => number,
    };
    if !matches!(action, Action::ScmpActErrno | Action::ScmpActTrace) {
        if errno.is_some() {
            warnings.push(format!("{place}: {action} returns none, not used"));
        }
        return Ok(None);
    }
    match errno {
        Some(number) if action == Action::ScmpActErrno && number > MOST_ERRNO => {
            Err(Error::invalid(format!("{place}: {number} is more than {MOST_ERRNO}")))
        }
        errno => Ok(errno),
    }
}

impl Filter {
    /// Any of them is there.
    fn excludes(&self, place: &str, conditions: &Conditions) -> Result<bool> {
        let by_arch = self.arches.iter().flatten().any(|arch| is_arch(arch, conditions.arch));
        let by_capability = self.capabilities(place)?.iter().any(|capability| conditions.bounding.contains(capability));
        Ok(by_arch || by_capability || self.kernel(place)?.is_some_and(|least| conditions.kernel >= least))
    }

    /// One of the architectures, all of the capabilities, and the kernel are there; what is not named does not count.
    fn includes(&self, place: &str, conditions: &Conditions) -> Result<bool> {
        let arches = self.arches.as_deref().unwrap_or_default();
        let by_arch = arches.is_empty() || arches.iter().any(|arch| is_arch(arch, conditions.arch));
        let by_capability = self.capabilities(place)?.iter().all(|capability| conditions.bounding.contains(capability));
        Ok(by_arch && by_capability && self.kernel(place)?.is_none_or(|least| conditions.kernel >= least))
    }

    fn capabilities(&self, place: &str) -> Result<Vec<Capability>> {
        let parse = |(n, name): (usize, &String)| {
            let bare = name.strip_prefix("CAP_").unwrap_or(name);
            bare.parse().map_err(|_| Error::invalid(format!("{place}.caps[{n}]: {name:?} is not a capability")))
        };
        self.caps.iter().flatten().enumerate().map(parse).collect()
    }

    fn kernel(&self, place: &str) -> Result<Option<(u32, u32)>> {
        let Some(text) = self.min_kernel.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
        let parsed = text.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) =
            parsed.ok_or_else(|| Error::invalid(format!("{place}.minKernel: expected a version as 4.8, found {text:?}")))?;
        Ok(Some((major, minor)))
    }
}

/// Profiles call architectures as Go and libseccomp do.
fn is_arch(name: &str, native: &str) -> bool {
    let names: &[&str] = match native {
        "x86_64" => &["amd64"],
        "aarch64" => &["arm64"],
        "powerpc64" => &["ppc64le"],
        "loongarch64" => &["loong64", "loongarch64"],
        other => &[other],
    };
    names.contains(&name)
}

fn scmp_arch(native: &str) -> Option<Arch> {
    Some(match native {
        "x86_64" => Arch::ScmpArchX86_64,
        "x86" => Arch::ScmpArchX86,
        "aarch64" => Arch::ScmpArchAarch64,
        "arm" => Arch::ScmpArchArm,
        "powerpc64" => Arch::ScmpArchPpc64le,
        "s390x" => Arch::ScmpArchS390x,
        "riscv64" => Arch::ScmpArchRiscv64,
        "loongarch64" => Arch::ScmpArchLoongarch64,
        _ => return None,
    })
}

fn find_unknown(value: &serde_json::Value, unknown: &mut Vec<String>) {
    fn of(value: &serde_json::Value, place: &str, known: &[&str], unknown: &mut Vec<String>) {
        for key in value.as_object().into_iter().flat_map(|object| object.keys()) {
            if !known.contains(&key.as_str()) && unknown.len() < TOLD {
                unknown.push(format!("{place}{}", key.chars().filter(|c| !c.is_control()).take(64).collect::<String>()));
            }
        }
    }
    let list = |value: &serde_json::Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    of(value, "", TOP, unknown);
    for (n, map) in list(value, "archMap").iter().enumerate() {
        of(map, &format!("archMap[{n}]."), ARCH_MAP, unknown);
    }
    for (n, entry) in list(value, "syscalls").iter().enumerate() {
        of(entry, &format!("syscalls[{n}]."), ENTRY, unknown);
        for (at, arg) in list(entry, "args").iter().enumerate() {
            of(arg, &format!("syscalls[{n}].args[{at}]."), ARG, unknown);
        }
        for filter in ["includes", "excludes"] {
            of(&entry[filter], &format!("syscalls[{n}].{filter}."), FILTER, unknown);
        }
    }
}

/// The path of a Localhost profile: absolute, maybe with the prefix that only the deprecated field has. INVALID_ARGUMENT names `field`.
pub fn path_of<'a>(field: &str, reference: &'a str) -> Result<&'a Path> {
    let path = Path::new(reference.strip_prefix("localhost/").unwrap_or(reference));
    match path.is_absolute() && !reference.contains('\0') {
        true => Ok(path),
        false => Err(Error::invalid(format!("{field}: expected the absolute path of a profile, found {reference:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Capabilities;

    use super::*;
    use crate::error::Code;

    fn parse(text: &str) -> Result<Profile> {
        Profile::parse(text.as_bytes())
    }

    fn resolve_with(text: &str, bounding: &[Capability], arch: &str, kernel: (u32, u32)) -> (LinuxSeccomp, Vec<String>) {
        let bounding: Capabilities = bounding.iter().copied().collect();
        parse(text).unwrap().resolve(&Conditions { bounding: &bounding, arch, kernel }).unwrap()
    }

    fn resolve(text: &str) -> LinuxSeccomp {
        let (profile, warnings) = resolve_with(text, &[], "x86_64", (6, 1));
        assert!(warnings.is_empty(), "{warnings:?}");
        profile
    }

    /// The names of the entries that are left.
    fn names(profile: &LinuxSeccomp) -> Vec<&str> {
        profile.syscalls().iter().flatten().flat_map(|entry| entry.names()).map(String::as_str).collect()
    }

    #[test]
    fn form_of_the_runtime_spec_comes_back_as_it_was() {
        let text = r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X32"],
            "flags":["SECCOMP_FILTER_FLAG_LOG"],"listenerPath":"/run/agent","listenerMetadata":"m","syscalls":[
            {"names":["read","write"],"action":"SCMP_ACT_ALLOW"},{"names":["mount"],"action":"SCMP_ACT_NOTIFY"},
            {"names":["clone"],"action":"SCMP_ACT_ERRNO","errnoRet":1,"args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#;
        let ours = serde_json::to_value(resolve(text)).unwrap();
        assert_eq!(ours, serde_json::from_str::<serde_json::Value>(text).unwrap());
    }

    #[test]
    fn conditions_of_containers() {
        let text = r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrno": "ENOSYS", "comment": "x",
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}, {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": null}],
            "syscalls": [
              {"name": "always", "names": [], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "", "includes": {}, "excludes": null},
              {"names": ["admin"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
              {"names": ["both"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN", "CAP_KILL"]}},
              {"names": ["not_admin"], "action": "SCMP_ACT_ERRNO", "errno": "EPERM", "errnoRet": 9, "excludes": {"caps": ["CAP_KILL", "CAP_SYS_ADMIN"]}},
              {"names": ["arm"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm", "arm64"]}},
              {"names": ["not_arm"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["arm64"]}},
              {"names": ["young"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "5.10"}},
              {"names": ["old"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "5.10"}}]}"#;
        let of = |bounding: &[Capability], arch: &str, kernel: (u32, u32)| resolve_with(text, bounding, arch, kernel).0;
        let plain = of(&[], "x86_64", (6, 1));
        assert_eq!(names(&plain), ["always", "not_admin", "not_arm", "young"]);
        assert_eq!(plain.default_errno_ret(), Some(38));
        assert_eq!(plain.architectures().as_ref().unwrap(), &[Arch::ScmpArchX86_64, Arch::ScmpArchX86]);
        assert_eq!(plain.syscalls().as_ref().unwrap()[1].errno_ret(), Some(1), "the name wins");
        assert_eq!(names(&of(&[Capability::SysAdmin], "x86_64", (5, 9))), ["always", "admin", "not_arm", "old"]);
        assert_eq!(
            names(&of(&[Capability::SysAdmin, Capability::Kill], "x86_64", (5, 10))),
            ["always", "admin", "both", "not_arm", "young"]
        );
        let arm = of(&[], "aarch64", (6, 1));
        assert_eq!(names(&arm), ["always", "not_admin", "arm", "young"]);
        assert_eq!(arm.architectures().as_ref().unwrap(), &[Arch::ScmpArchAarch64]);
        assert_eq!(of(&[], "riscv64", (6, 1)).architectures(), &None, "not in the map: the runtime's own");
    }

    #[test]
    fn errors_name_the_field() {
        for (text, words) in [
            ("", "EOF"),
            ("[]", "expected"),
            ("{} {}", "missing field `defaultAction`"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW"} x"#, "trailing"),
            (r#"{"defaultAction": 1}"#, "defaultAction: "),
            (r#"{"defaultAction": "ALLOW"}"#, "defaultAction: unknown variant `ALLOW`"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["X86"]}"#, "architectures[0]: unknown variant `X86`"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["TSYNC"]}"#, "flags[0]: "),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {}}"#, "syscalls: "),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"]}]}"#, "syscalls[0]: missing field `action`"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW"}]}"#, "syscalls[0].names: empty"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"name": "a", "names": ["b"], "action": "SCMP_ACT_LOG"}]}"#,
                "exclude each other",
            ),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [""], "action": "SCMP_ACT_LOG"}]}"#, "syscalls[0].names"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "args": [{"index": 0, "value": -1, "op": "SCMP_CMP_EQ"}]}]}"#,
                "syscalls[0].args[0].value: ",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]}"#,
                "syscalls[0].args[0].index",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "args": [{"index": 0, "value": 1, "op": "=="}]}]}"#,
                "syscalls[0].args[0].op: ",
            ),
            (r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, "listenerPath"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "agent"}"#, "listenerPath: agent"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"], "archMap": [{"architecture": "SCMP_ARCH_X86"}]}"#,
                "architectures and archMap",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().contains(words), "{text}: {error}");
        }
        let entry = |members: &str| {
            format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": ["a"], "action": "SCMP_ACT_ERRNO", {members}}}]}}"#)
        };
        for (members, words) in [
            (r#""includes": {"caps": ["CAP_NOPE"]}"#, "syscalls[0].includes.caps[0]: \"CAP_NOPE\""),
            (r#""excludes": {"minKernel": "six"}"#, "syscalls[0].excludes.minKernel"),
            (r#""errno": "ENOPE""#, "syscalls[0].errno: \"ENOPE\""),
            (r#""errnoRet": 4096"#, "syscalls[0].errno: 4096"),
        ] {
            let profile = parse(&entry(members)).unwrap();
            let error = profile.resolve(&Conditions { bounding: &Capabilities::new(), arch: "x86_64", kernel: (6, 1) }).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().contains(words), "{members}: {error}");
        }
    }

    #[test]
    fn what_has_no_effect_is_told() {
        let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1, "defaultAktion": "", "archMap": [{"architecture": "SCMP_ARCH_X86", "sub": []}],
            "syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", "errnoRet": 1, "include": {}, "includes": {"cap": []},
            "args": [{"index": 0, "value": 1, "value2": 3, "op": "SCMP_CMP_EQ"}]}]}"#;
        let (profile, warnings) = resolve_with(text, &[], "x86_64", (6, 1));
        assert_eq!((profile.default_errno_ret(), profile.syscalls().as_ref().unwrap()[0].errno_ret()), (None, None));
        let places: Vec<&str> = warnings.iter().filter_map(|line| line.split([' ', ':']).next()).collect();
        let mut expected =
            vec!["defaultAktion", "archMap[0].sub", "syscalls[0].include", "syscalls[0].args[0].value2", "syscalls[0].includes.cap"];
        expected.extend(["syscalls[0].errno", "defaultErrno"]);
        assert_eq!(places, expected);
        let many: String = (0..50).map(|n| format!(r#""x{n}": 1,"#)).collect();
        let (_, warnings) = resolve_with(&format!(r#"{{{many} "defaultAction": "SCMP_ACT_ALLOW"}}"#), &[], "x86_64", (6, 1));
        assert_eq!(warnings.len(), TOLD);
    }

    #[test]
    fn values_are_of_64_bits() {
        let profile = resolve(
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG",
            "args": [{"index": 5, "value": 18446744073709551615, "valueTwo": 4294967296, "op": "SCMP_CMP_NE"}]}]}"#,
        );
        let arg = profile.syscalls().as_ref().unwrap()[0].args().as_ref().unwrap()[0];
        assert_eq!((arg.index(), arg.value(), arg.value_two(), arg.op()), (5, u64::MAX, Some(1 << 32), Operator::ScmpCmpNe));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "[\\[\\]{}\",:a-zA-Z_0-9 ]{0,200}") {
            if let Err(error) = parse(&text) {
                proptest::prop_assert_eq!(error.code(), Code::InvalidArgument);
            }
        }
    }
}
