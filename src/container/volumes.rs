//! Mounts with mappings: the owners of what is mounted are others inside. Some OCI runtimes ignore the mappings of a mount in silence
//! (runc before 1.2), and none can look below a directory that only the host's root may enter once it is in a user namespace; so the
//! id-mapped mount is ours, at `run/containers/ID/volumes/N`, and an ordinary source for the runtime.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::api::runtime::{IDMapping, Mount};
use crate::error::{Context, Error, ErrorList, Result};
use crate::spec::{Propagation, ResolvedMount, UserNamespace};
use crate::sys::idmap::{self, Flow, IdMap};
use crate::sys::{file, mount, pin};

/// Lines that the kernel takes of one map.
const LINES: usize = 340;

/// Of user ids and of group ids.
type Maps = (Vec<IdMap>, Vec<IdMap>);

/// Mounts what has mappings below `dir` (the container's) and makes it the source of its mount; `mounts` are those requested. On an error what was mounted stays, for
/// [`remove`]. INVALID_ARGUMENT names a bad mapping, FAILED_PRECONDITION a file system that cannot be mapped.
pub fn place(dir: &Path, requested: &[Mount], mounts: &mut [ResolvedMount], own: Option<&UserNamespace>, shim: &Path) -> Result<()> {
    let mut kept: Vec<(Maps, File)> = Vec::new();
    for (number, asked) in requested.iter().enumerate() {
        let what = || format!("mount {}", asked.container_path);
        let Some(maps) = mappings(asked).context(what)? else { continue };
        // The layers of an image have been mapped for the sandbox.
        if asked.image.is_some() {
            continue;
        }
        let resolved = &mut mounts[number];
        let known = kept.iter().position(|(known, _)| *known == maps);
        let index = match known {
            Some(index) => index,
            None => {
                let namespace = match own.filter(|own| maps == (vec![own.maps.uids], vec![own.maps.gids])) {
                    Some(own) => File::open(&own.path).context(|| format!("open {}", own.path.display())),
                    // Others than the sandbox's, or no user namespace at all: as peers do, what is asked for counts.
                    None => pin::open_mapped(shim, &maps.0, &maps.1),
                };
                kept.push((maps, namespace.context(what)?));
                kept.len() - 1
            }
        };
        resolved.host_path = mapped(dir, number, resolved, &kept[index].1).context(what)?;
    }
    Ok(())
}

fn mapped(dir: &Path, number: usize, resolved: &ResolvedMount, namespace: &File) -> Result<PathBuf> {
    let at = dir.join("volumes").join(number.to_string());
    file::make_dir(&dir.join("volumes"), 0o711)?;
    let source = &resolved.host_path;
    match source.is_dir() {
        true => file::make_dir(&at, 0o711)?,
        false => drop(File::create(&at).context(|| format!("create {}", at.display()))?),
    }
    let flow = match resolved.propagation {
        Propagation::Private => Flow::Private,
        // What a container in a user namespace mounts cannot come out of it: the kernel makes its mounts slaves.
        Propagation::HostToContainer | Propagation::Bidirectional => Flow::FromSource,
    };
    let tree = idmap::detached(source, namespace.as_fd(), true, false, flow).map_err(|e| {
        let table = mount::table().unwrap_or_default();
        let kind = mount::holding(&table, source)
            .map_or_else(|| "its file system".to_owned(), |m| format!("{} ({})", m.target.display(), m.fstype));
        Error::precondition(format!("uidMappings and gidMappings: {kind} cannot be mounted with mapped owners: {e}"))
    })?;
    idmap::attach(tree, &at)?;
    Ok(at)
}

/// The maps of a mount; None without any.
fn mappings(mount: &Mount) -> Result<Option<Maps>> {
    match (mount.uidMappings.is_empty(), mount.gidMappings.is_empty()) {
        (true, true) => Ok(None),
        (false, true) => Err(Error::invalid("gidMappings: none beside uidMappings")),
        (true, false) => Err(Error::invalid("uidMappings: none beside gidMappings")),
        (false, false) => Ok(Some((checked("uidMappings", &mount.uidMappings)?, checked("gidMappings", &mount.gidMappings)?))),
    }
}

fn checked(field: &str, list: &[IDMapping]) -> Result<Vec<IdMap>> {
    if list.len() > LINES {
        return Err(Error::invalid(format!("{field}: expected at most {LINES}, found {}", list.len())));
    }
    let maps: Vec<IdMap> = list.iter().map(|m| IdMap { container: m.container_id, host: m.host_id, length: m.length }).collect();
    if let Some(bad) = maps.iter().find(|map| !map.fits()) {
        return Err(Error::invalid(format!("{field}: {} ids from {} and {} on", bad.length, bad.container, bad.host)));
    }
    // The kernel says no more than EINVAL to ranges that meet.
    for (index, map) in maps.iter().enumerate() {
        let meets = |a: u32, b: u32, other: &IdMap| a < b.saturating_add(other.length) && b < a.saturating_add(map.length);
        if maps[..index].iter().any(|o| meets(map.container, o.container, o) || meets(map.host, o.host, o)) {
            return Err(Error::invalid(format!("{field}: two mappings have ids in common")));
        }
    }
    Ok(maps)
}

/// Undoes `place`, whatever of it there is. A mount that stays is an error: deleting below it would delete the volume's files.
pub fn remove(dir: &Path) -> Result<()> {
    let place = dir.join("volumes");
    let Ok(entries) = std::fs::read_dir(&place) else { return Ok(()) };
    let mut errors = ErrorList::default();
    for entry in entries.flatten() {
        let path = entry.path();
        if errors.keep(mount::unmount(&path)).is_none() {
            continue;
        }
        // Neither works on what is still mounted, and neither looks below.
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        errors.keep(if is_dir { file::remove_dir(&path) } else { file::remove_file(&path) });
    }
    errors.keep(file::remove_dir(&place));
    errors.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn mapping(container_id: u32, host_id: u32, length: u32) -> IDMapping {
        IDMapping { container_id, host_id, length, ..Default::default() }
    }

    fn asked(uids: Vec<IDMapping>, gids: Vec<IDMapping>) -> Mount {
        Mount { container_path: "/data".into(), host_path: "/srv".into(), uidMappings: uids, gidMappings: gids, ..Default::default() }
    }

    #[test]
    fn mappings_come_in_both_kinds_and_do_not_meet() {
        assert_eq!(mappings(&asked(vec![], vec![])).unwrap(), None);
        let one = || vec![mapping(0, 100_000, 65536)];
        let map = IdMap { container: 0, host: 100_000, length: 65536 };
        assert_eq!(mappings(&asked(one(), one())).unwrap(), Some((vec![map], vec![map])));
        let two = vec![mapping(0, 1000, 10), mapping(10, 2000, 1)];
        assert_eq!(mappings(&asked(two, one())).unwrap().unwrap().0.len(), 2);
        for (bad, field) in [
            (asked(one(), vec![]), "gidMappings"),
            (asked(vec![], one()), "uidMappings"),
            (asked(vec![mapping(0, 0, 0)], one()), "uidMappings"),
            (asked(one(), vec![mapping(0, u32::MAX, 2)]), "gidMappings"),
            (asked(vec![mapping(0, 1000, 10), mapping(9, 2000, 1)], one()), "uidMappings"),
            (asked(one(), vec![mapping(0, 1000, 10), mapping(10, 1009, 1)]), "gidMappings"),
            (asked(vec![mapping(0, 1000, 1); 341], one()), "uidMappings"),
        ] {
            let error = mappings(&bad).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().starts_with(field), "{error}");
        }
    }

    #[test]
    fn nothing_placed_is_nothing_to_remove() {
        let dir = tempfile::tempdir().unwrap();
        remove(dir.path()).unwrap();
        std::fs::create_dir_all(dir.path().join("volumes/0")).unwrap();
        std::fs::write(dir.path().join("volumes/1"), "").unwrap();
        remove(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    proptest::proptest! {
        #[test]
        fn accepted_mappings_are_the_kernels(raw in proptest::collection::vec((0u32..40, 0u32..40, 0u32..9), 0..5)) {
            let list: Vec<IDMapping> = raw.iter().map(|(c, h, l)| mapping(*c, *h, *l)).collect();
            if let Ok(maps) = checked("f", &list) {
                let ids: Vec<u32> = maps.iter().flat_map(|m| m.container..m.container + m.length).collect();
                let distinct: std::collections::BTreeSet<u32> = ids.iter().copied().collect();
                proptest::prop_assert_eq!(ids.len(), distinct.len());
            }
        }
    }
}
