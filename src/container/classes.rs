//! Block I/O and RDT classes that annotations ask for, under the names that other runtimes know: the container's own annotation first,
//! then the sandbox's for this container, then the sandbox's for all.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::blockio::BlockIoClasses;
use crate::api::runtime::ContainerConfig;
use crate::error::{Error, Result};
use crate::spec;

/// Annotations of one kind of class.
struct Names {
    container: &'static str,
    /// Followed by `pod` or `container.NAME`.
    sandbox: &'static str,
}

const BLOCK_IO: Names = Names { container: "io.kubernetes.cri.blockio-class", sandbox: "blockio.resources.beta.kubernetes.io/" };
const RDT: Names = Names { container: "io.kubernetes.cri.rdt-class", sandbox: "rdt.resources.beta.kubernetes.io/" };

/// Directories of resctrl that are no groups of tasks.
const RESCTRL_OWN: [&str; 3] = ["info", "mon_groups", "mon_data"];

/// What the configuration says of classes.
#[derive(Clone, Debug, Default)]
pub struct Classes {
    /// None: there are none.
    pub block_io: Option<BlockIoClasses>,
    /// Whether RDT classes may be asked for.
    pub rdt: bool,
    /// A class where none are configured: left out with a warning instead of refused.
    pub ignore_unconfigured: bool,
}

impl Classes {
    /// What the annotations of a container ask for, found on this host. FAILED_PRECONDITION where no classes are
    /// configured or the host has no resctrl, INVALID_ARGUMENT for a class that is not there.
    pub fn resolve(&self, sandbox: &BTreeMap<String, String>, config: &ContainerConfig) -> Result<(spec::Classes, Vec<String>)> {
        let (mut classes, mut warnings) = (spec::Classes::default(), Vec::new());
        if let Some((key, class)) = BLOCK_IO.asked(sandbox, config) {
            match &self.block_io {
                Some(known) => {
                    let Some((block_io, more)) = known.resolve(class) else {
                        let names = known.names().collect::<Vec<_>>().join(", ");
                        return Err(Error::invalid(format!("annotation {key}: no block I/O class {class:?}; known: {names}")));
                    };
                    classes.block_io = Some(block_io);
                    warnings.extend(more);
                }
                None => warnings.push(self.unconfigured(&key, class, "no block I/O classes are configured")?),
            }
        }
        if let Some((key, class)) = RDT.asked(sandbox, config) {
            match self.rdt {
                true => classes.rdt = Some(rdt_group(key, class, resctrl()?)?),
                false => warnings.push(self.unconfigured(&key, class, "RDT classes are not configured")?),
            }
        }
        Ok((classes, warnings))
    }

    fn unconfigured(&self, key: &str, class: &str, why: &str) -> Result<String> {
        match self.ignore_unconfigured {
            true => Ok(format!("annotation {key}: class {class:?} ignored: {why}")),
            false => Err(Error::precondition(format!("annotation {key}: class {class:?}: {why}"))),
        }
    }
}

impl Names {
    /// The annotation that counts, and the class; an empty one asks for none.
    fn asked<'a>(&self, sandbox: &'a BTreeMap<String, String>, config: &'a ContainerConfig) -> Option<(String, &'a str)> {
        let of_container = format!("{}container.{}", self.sandbox, config.metadata.name);
        let of_all = format!("{}pod", self.sandbox);
        let own = config.annotations.get(self.container).map(|class| (self.container.to_owned(), class));
        let ours = || sandbox.get(&of_container).map(|class| (of_container.clone(), class));
        let all = || sandbox.get(&of_all).map(|class| (of_all.clone(), class));
        own.or_else(ours).or_else(all).map(|(key, class)| (key, class.as_str())).filter(|(_, class)| !class.is_empty())
    }

    fn has(&self, key: &str) -> bool {
        key == self.container || key.starts_with(self.sandbox)
    }
}

/// Whether an annotation asks for a class.
pub fn is_class(key: &str) -> bool {
    BLOCK_IO.has(key) || RDT.has(key)
}

/// Where resctrl is mounted.
fn resctrl() -> Result<Option<PathBuf>> {
    Ok(crate::sys::mount::table_of(&["resctrl"])?.into_iter().next().map(|mount| mount.target))
}

/// An RDT class is a group of resctrl that the administrator has made.
fn rdt_group(key: String, class: &str, resctrl: Option<PathBuf>) -> Result<String> {
    let Some(resctrl) = resctrl else {
        return Err(Error::precondition(format!("annotation {key}: RDT class {class:?}: resctrl is not mounted on this host")));
    };
    let plain = !class.contains(['/', '\0']) && !class.starts_with('.') && !RESCTRL_OWN.contains(&class);
    match plain && resctrl.join(class).join("schemata").is_file() {
        true => Ok(class.to_owned()),
        false => Err(Error::invalid(format!("annotation {key}: no RDT class {class:?} in {}", resctrl.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::ContainerMetadata;
    use crate::error::Code;

    fn config(annotations: &[(&str, &str)]) -> ContainerConfig {
        let metadata = ContainerMetadata { name: "app".into(), ..Default::default() };
        ContainerConfig { metadata: protobuf::MessageField::some(metadata), annotations: map(annotations), ..Default::default() }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn configured() -> Classes {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("classes.yaml");
        std::fs::write(&path, "Classes:\n  a: [{Weight: 50}]\n  b: [{Weight: 60}]\n  c: [{Weight: 70}]\n").unwrap();
        Classes { block_io: Some(BlockIoClasses::load(&path).unwrap()), ..Default::default() }
    }

    #[test]
    fn the_nearest_annotation_wins() {
        let sandbox = map(&[
            ("blockio.resources.beta.kubernetes.io/pod", "a"),
            ("blockio.resources.beta.kubernetes.io/container.app", "b"),
            ("blockio.resources.beta.kubernetes.io/container.other", "unknown"),
        ]);
        let weight = |sandbox: &BTreeMap<String, String>, own: &[(&str, &str)]| {
            configured().resolve(sandbox, &config(own)).unwrap().0.block_io.and_then(|block_io| block_io.weight())
        };
        assert_eq!(weight(&sandbox, &[("io.kubernetes.cri.blockio-class", "c")]), Some(70));
        assert_eq!(weight(&sandbox, &[]), Some(60));
        assert_eq!(weight(&map(&[("blockio.resources.beta.kubernetes.io/pod", "a")]), &[]), Some(50));
        assert_eq!(weight(&sandbox, &[("io.kubernetes.cri.blockio-class", "")]), None, "an empty class is none");
        assert_eq!(weight(&map(&[]), &[]), None);
    }

    #[test]
    fn classes_that_are_not_there_are_refused_by_name() {
        let own = config(&[("io.kubernetes.cri.blockio-class", "gold")]);
        let unknown = configured().resolve(&map(&[]), &own).unwrap_err();
        assert_eq!(unknown.code(), Code::InvalidArgument);
        assert_eq!(unknown.message(), "annotation io.kubernetes.cri.blockio-class: no block I/O class \"gold\"; known: a, b, c");
        let none = Classes::default().resolve(&map(&[]), &own).unwrap_err();
        assert!(none.code() == Code::FailedPrecondition && none.message().contains("\"gold\""), "{none}");
        let lenient = Classes { ignore_unconfigured: true, ..Default::default() };
        let (classes, warnings) = lenient.resolve(&map(&[("rdt.resources.beta.kubernetes.io/pod", "x")]), &own).unwrap();
        assert_eq!((classes, warnings.len()), (spec::Classes::default(), 2));
        assert!(Classes { ignore_unconfigured: true, ..configured() }.resolve(&map(&[]), &own).is_err(), "configured, but unknown");
    }

    #[test]
    fn rdt_classes_are_groups_of_resctrl() {
        let key = || RDT.container.to_owned();
        let error = rdt_group(key(), "gold", None).unwrap_err();
        assert!(error.code() == Code::FailedPrecondition && error.message().contains("resctrl is not mounted"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        for name in ["gold", "info"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("schemata"), "L3:0=f\n").unwrap();
        }
        let at = || Some(dir.path().to_owned());
        assert_eq!(rdt_group(key(), "gold", at()).unwrap(), "gold");
        for bad in ["silver", "../gold", "gold/", ".", "info", "gold\0"] {
            assert_eq!(rdt_group(key(), bad, at()).unwrap_err().code(), Code::InvalidArgument, "{bad:?}");
        }
    }

    #[test]
    fn annotations_of_classes() {
        for key in
            ["io.kubernetes.cri.rdt-class", "rdt.resources.beta.kubernetes.io/pod", "blockio.resources.beta.kubernetes.io/container.a"]
        {
            assert!(is_class(key), "{key}");
        }
        assert!(!is_class("io.kubernetes.cri.image-name") && !is_class("example.com/rdt-class"));
    }
}
