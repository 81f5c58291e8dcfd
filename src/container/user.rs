//! Who the processes of a container run as: the request's words and the image's, looked up in the /etc/passwd and
//! /etc/group of the root filesystem.

use std::collections::HashSet;
use std::path::Path;

use crate::api::runtime::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use crate::error::{Error, Result};
use crate::spec::ResolvedUser;
use crate::sys::inroot::Root;

/// Larger databases are not read.
const MAX_DATABASE: u64 = 1 << 20;

/// Ids are used as signed ints by too many programs.
const MAX_ID: i64 = i32::MAX as i64;

/// NGROUPS_MAX of the kernel.
const MAX_GROUPS: usize = 65_536;

/// Resolves the user: run_as_user or run_as_username with run_as_group, else the USER of the image (`user[:group]`).
/// INVALID_ARGUMENT for ids out of range and contradictions, FAILED_PRECONDITION for names the image does not know.
pub fn resolve(rootfs: &Path, security: &LinuxContainerSecurityContext, image_user: &str) -> Result<ResolvedUser> {
    let root = Root::open(rootfs)?;
    let read = |path: &str| -> Result<String> {
        let data = root.read(Path::new(path), MAX_DATABASE)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&data).into_owned())
    };
    look_up(security, image_user, &read("/etc/passwd")?, &read("/etc/group")?)
}

enum Asked {
    Id(u32),
    Name(String),
}

impl Asked {
    /// Digits are an id; all else is a name, signs and hexadecimal included, which no database has.
    fn parse(field: &str, text: &str) -> Result<Asked> {
        match !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            true => text.parse().map_err(|_| too_large(field, text)).and_then(|number| id(field, number)).map(Asked::Id),
            false => Ok(Asked::Name(text.to_owned())),
        }
    }
}

fn id(field: &str, number: i64) -> Result<u32> {
    match (0..=MAX_ID).contains(&number) {
        true => Ok(number as u32), // in range, so it fits
        false => Err(too_large(field, &number.to_string())),
    }
}

fn too_large(field: &str, number: &str) -> Error {
    Error::invalid(format!("{field}: {number} is not in 0 to {MAX_ID}"))
}

fn asked(security: &LinuxContainerSecurityContext, image_user: &str) -> Result<(Asked, Option<Asked>)> {
    let group = |value: i64| id("run_as_group", value).map(Asked::Id);
    let run_as_group = security.run_as_group.as_ref().map(|gid| group(gid.value)).transpose()?;
    match (security.run_as_user.as_ref(), security.run_as_username.as_str()) {
        (Some(_), name) if !name.is_empty() => Err(Error::invalid("run_as_user and run_as_username exclude each other")),
        (Some(uid), _) => Ok((Asked::Id(id("run_as_user", uid.value)?), run_as_group)),
        (None, "") if run_as_group.is_some() => Err(Error::invalid("run_as_group: needs run_as_user or run_as_username")),
        (None, "") => {
            let (user, group) = image_user.split_once(':').map_or((image_user, ""), |(user, group)| (user, group));
            let user = if user.is_empty() { Asked::Id(0) } else { Asked::parse("user of the image", user)? };
            let group = if group.is_empty() { None } else { Some(Asked::parse("group of the image", group)?) };
            Ok((user, group))
        }
        (None, name) => Ok((Asked::Name(name.to_owned()), run_as_group)),
    }
}

fn look_up(security: &LinuxContainerSecurityContext, image_user: &str, passwd: &str, group: &str) -> Result<ResolvedUser> {
    let (user, primary) = asked(security, image_user)?;
    let mut accounts = passwd.lines().filter_map(Account::parse);
    let (uid, account) = match user {
        Asked::Id(uid) => (uid, accounts.find(|account| account.uid == uid)),
        Asked::Name(name) => {
            let unknown = || Error::precondition(format!("user {name:?} is not in /etc/passwd of the image"));
            let account = accounts.find(|account| account.name == name).ok_or_else(unknown)?;
            (account.uid, Some(account))
        }
    };
    let groups = || group.lines().filter_map(Group::parse);
    let gid = match primary {
        Some(Asked::Id(gid)) => gid,
        Some(Asked::Name(name)) => {
            let unknown = || Error::precondition(format!("group {name:?} is not in /etc/group of the image"));
            groups().find(|group| group.name == name).ok_or_else(unknown)?.gid
        }
        None => account.as_ref().map_or(0, |account| account.gid),
    };
    let username = account.as_ref().map_or("", |account| account.name);

    let mut gids = vec![gid];
    for asked in &security.supplemental_groups {
        gids.push(id("supplemental_groups", *asked)?);
    }
    match security.supplemental_groups_policy.enum_value() {
        Ok(SupplementalGroupsPolicy::Strict) => {}
        Ok(SupplementalGroupsPolicy::Merge) if username.is_empty() => {}
        Ok(SupplementalGroupsPolicy::Merge) => gids.extend(groups().filter(|group| group.has(username)).map(|group| group.gid)),
        Err(number) => return Err(Error::invalid(format!("supplemental_groups_policy: {number} is not known"))),
    }
    let mut seen = HashSet::new();
    gids.retain(|gid| seen.insert(*gid));
    if gids.len() > MAX_GROUPS {
        return Err(Error::precondition(format!("user {username:?} is in more than {MAX_GROUPS} groups")));
    }

    let home = account.as_ref().map_or("", |account| account.home);
    Ok(ResolvedUser {
        uid,
        gid,
        additional_gids: gids,
        home: if home.is_empty() { "/" } else { home }.to_owned(),
        username: username.to_owned(),
    })
}

/// A line of passwd(5); lines that are none are skipped, as the C library does.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Account<'a>> {
        let mut fields = line.trim_end_matches('\r').split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = number(fields.nth(1)?)?;
        let gid = number(fields.next()?)?;
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    }
}

/// A line of group(5).
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Group<'a>> {
        let mut fields = line.trim_end_matches('\r').split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?)?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    }

    fn has(&self, user: &str) -> bool {
        self.members.split(',').any(|member| member.trim() == user)
    }
}

fn number(text: &str) -> Option<u32> {
    match Asked::parse("", text) {
        Ok(Asked::Id(number)) => Some(number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::Int64Value;
    use crate::error::Code;
    use protobuf::MessageField;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:100:App:/home/app:/bin/sh\n:x:5:5::/:\nbig:x:4294967295:0::/:\n\
                          hex:x:0x10:0::/:\nplus:x:+7:0::/:\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nwheel:x:10:root, app\ndata:x:20:app\nalso:x:20:app\nbad:x:-1:app\nbig:x:2147483648:app\n";

    fn by_id(uid: i64) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext { run_as_user: MessageField::some(int(uid)), ..Default::default() }
    }

    fn by_name(name: &str) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext { run_as_username: name.into(), ..Default::default() }
    }

    fn int(value: i64) -> Int64Value {
        Int64Value { value, ..Default::default() }
    }

    fn found(security: &LinuxContainerSecurityContext, image: &str) -> ResolvedUser {
        look_up(security, image, PASSWD, GROUP).unwrap()
    }

    fn refused(security: &LinuxContainerSecurityContext, image: &str, code: Code) {
        let error = look_up(security, image, PASSWD, GROUP).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }

    fn ids(user: &ResolvedUser) -> (u32, u32, &[u32]) {
        (user.uid, user.gid, &user.additional_gids)
    }

    #[test]
    fn nothing_said_is_root() {
        let user = found(&Default::default(), "");
        assert_eq!((ids(&user), user.home.as_str(), user.username.as_str()), ((0, 0, &[0, 10][..]), "/root", "root"));
        let bare = look_up(&Default::default(), "", "", "").unwrap();
        assert_eq!((ids(&bare), bare.home.as_str(), bare.username.as_str()), ((0, 0, &[0][..]), "/", ""));
    }

    #[test]
    fn users_of_images() {
        assert_eq!(ids(&found(&Default::default(), "app")), (1000, 100, &[100, 10, 20][..]));
        assert_eq!(ids(&found(&Default::default(), "1000")), (1000, 100, &[100, 10, 20][..]));
        assert_eq!(ids(&found(&Default::default(), "app:data")), (1000, 20, &[20, 10][..]));
        assert_eq!(ids(&found(&Default::default(), "77:88")), (77, 88, &[88][..]));
        assert_eq!(ids(&found(&Default::default(), "77")), (77, 0, &[0][..]));
        assert_eq!(found(&Default::default(), "77").home, "/");
        assert_eq!(found(&Default::default(), ":data").gid, 20);
        for unknown in ["nobody", "app:nogroup", "+1", "-1", "0x10", "hex", "plus", "big"] {
            refused(&Default::default(), unknown, Code::FailedPrecondition);
        }
        refused(&Default::default(), "2147483648", Code::InvalidArgument);
        refused(&Default::default(), "99999999999999999999", Code::InvalidArgument);
        refused(&Default::default(), "1:2147483648", Code::InvalidArgument);
    }

    #[test]
    fn run_as_wins_over_the_image_whole() {
        assert_eq!(ids(&found(&by_id(1000), "77:88")), (1000, 100, &[100, 10, 20][..]));
        assert_eq!(ids(&found(&by_id(0), "app")), (0, 0, &[0, 10][..]));
        assert_eq!(ids(&found(&by_name("app"), "77")), (1000, 100, &[100, 10, 20][..]));
        refused(&by_name("1000"), "", Code::FailedPrecondition);
        refused(&by_id(-1), "", Code::InvalidArgument);
        refused(&by_id(1 << 31), "", Code::InvalidArgument);
        assert_eq!(found(&by_id((1 << 31) - 1), "").uid, 0x7fff_ffff);
        let mut both = by_id(1);
        both.run_as_username = "app".into();
        refused(&both, "", Code::InvalidArgument);
    }

    #[test]
    fn run_as_group_needs_a_user() {
        let mut security = by_id(1000);
        security.run_as_group = MessageField::some(int(50));
        assert_eq!(ids(&found(&security, "")), (1000, 50, &[50, 10, 20][..]));
        security.run_as_user = MessageField::none();
        refused(&security, "app", Code::InvalidArgument);
        security.run_as_username = "app".into();
        security.run_as_group = MessageField::some(int(-5));
        refused(&security, "", Code::InvalidArgument);
    }

    #[test]
    fn supplemental_groups_merge_or_strict() {
        let mut security = by_id(1000);
        security.supplemental_groups = vec![7, 20, 7];
        assert_eq!(ids(&found(&security, "")).2, [100, 7, 20, 10]);
        security.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
        assert_eq!(ids(&found(&security, "")).2, [100, 7, 20]);
        security.supplemental_groups_policy = protobuf::EnumOrUnknown::from_i32(9);
        refused(&security, "", Code::InvalidArgument);
        security.supplemental_groups = vec![-1];
        refused(&security, "", Code::InvalidArgument);
    }

    #[test]
    fn the_primary_group_is_among_the_others() {
        let user = found(&by_id(1000), "");
        assert_eq!((user.uid, user.gid, user.additional_gids.as_slice()), (1000, 100, &[100, 10, 20][..]));
    }

    #[test]
    fn databases_are_read_inside_the_rootfs_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/real", dir.path().join("etc/passwd")).unwrap();
        assert_eq!(resolve(dir.path(), &Default::default(), "").unwrap().home, "/", "dangling inside");
        std::fs::write(dir.path().join("etc/real"), PASSWD).unwrap();
        assert_eq!(resolve(dir.path(), &by_name("app"), "").unwrap().uid, 1000);
        std::fs::create_dir(dir.path().join("etc/group")).unwrap();
        assert!(resolve(dir.path(), &by_name("app"), "").unwrap_err().message().contains("not a regular file"));
    }

    proptest::proptest! {
        #[test]
        fn any_database_is_parsed_and_ids_stay_in_range(
            passwd in "([a-c]{0,2}:?x?:?[0-9+-]{0,11}:?[0-9]{0,11}:?\\PC{0,3}\n?){0,8}", group in "\\PC{0,80}", image in "[a-c0-9:+-]{0,8}",
        ) {
            if let Ok(user) = look_up(&Default::default(), &image, &passwd, &group) {
                proptest::prop_assert!(i64::from(user.uid) <= MAX_ID && i64::from(user.gid) <= MAX_ID);
                proptest::prop_assert_eq!(user.additional_gids[0], user.gid);
                proptest::prop_assert!(!user.home.is_empty());
            }
        }

        #[test]
        fn a_written_account_is_found_again(name in "[a-z_][a-z0-9_-]{0,15}", uid in 0u32..=0x7fff_ffff, gid in 0u32..=0x7fff_ffff) {
            let passwd = format!("other:x:1:1::/:\n{name}:x:{uid}:{gid}::/h/{name}:\n");
            let group = format!("g:x:77:x,{name}\n");
            proptest::prop_assume!(name != "other");
            let user = look_up(&by_name(&name), "", &passwd, &group).unwrap();
            proptest::prop_assert_eq!((user.uid, user.gid, user.home), (uid, gid, format!("/h/{name}")));
            proptest::prop_assert!(user.additional_gids.contains(&77));
        }
    }
}
