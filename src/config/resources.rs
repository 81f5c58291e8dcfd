//! `[resources]`: limits of every container, and the classes that containers may ask for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::PosixRlimitType as Kind;
use serde::Deserialize;
use toml::Spanned;

use super::{at, text, Checker};
use crate::error::Result;
use crate::spec::Rlimit;

/// Names as setrlimit(2) has them, without RLIMIT_.
const KINDS: [(&str, Kind); 16] = [
    ("as", Kind::RlimitAs),
    ("core", Kind::RlimitCore),
    ("cpu", Kind::RlimitCpu),
    ("data", Kind::RlimitData),
    ("fsize", Kind::RlimitFsize),
    ("locks", Kind::RlimitLocks),
    ("memlock", Kind::RlimitMemlock),
    ("msgqueue", Kind::RlimitMsgqueue),
    ("nice", Kind::RlimitNice),
    ("nofile", Kind::RlimitNofile),
    ("nproc", Kind::RlimitNproc),
    ("rss", Kind::RlimitRss),
    ("rtprio", Kind::RlimitRtprio),
    ("rttime", Kind::RlimitRttime),
    ("sigpending", Kind::RlimitSigpending),
    ("stack", Kind::RlimitStack),
];

/// What every container is given.
#[derive(Clone, Debug)]
pub struct Resources {
    /// Processes and threads of one container, at most.
    pub pids_limit: Option<i64>,
    pub rlimits: Vec<Rlimit>,
    /// The file of block I/O classes.
    pub blockio_classes: Option<PathBuf>,
    /// Whether RDT classes may be asked for.
    pub rdt_classes: bool,
    /// A class where none are configured is left out instead of refused.
    pub ignore_unconfigured_classes: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    pids_limit: Spanned<i64>,
    rlimits: BTreeMap<String, Spanned<String>>,
    blockio_classes: Spanned<String>,
    rdt_classes: bool,
    ignore_unconfigured_classes: bool,
}

impl Default for Raw {
    fn default() -> Raw {
        Raw {
            pids_limit: at(0),
            rlimits: BTreeMap::new(),
            blockio_classes: text(""),
            rdt_classes: false,
            ignore_unconfigured_classes: false,
        }
    }
}

impl Raw {
    pub(super) fn check(&self, c: &Checker) -> Result<Resources> {
        let pids_limit = c.number("resources.pids_limit", &self.pids_limit, 0, 1 << 22)?;
        Ok(Resources {
            pids_limit: Some(pids_limit).filter(|limit| *limit > 0),
            rlimits: self.rlimits.iter().map(|(name, value)| rlimit(c, name, value)).collect::<Result<_>>()?,
            blockio_classes: c.optional_path("resources.blockio_classes", &self.blockio_classes)?,
            rdt_classes: self.rdt_classes,
            ignore_unconfigured_classes: self.ignore_unconfigured_classes,
        })
    }
}

/// `SOFT:HARD`, or one value for both.
fn rlimit(c: &Checker, name: &str, value: &Spanned<String>) -> Result<Rlimit> {
    let Some((_, kind)) = KINDS.into_iter().find(|(known, _)| *known == name) else {
        let known = KINDS.map(|(name, _)| name).join(", ");
        return Err(c.error(value, format!("resources.rlimits.{name}: no such limit; known: {known}")));
    };
    let number = |text: &str| match text {
        "unlimited" => Some(u64::MAX),
        text => text.parse::<u64>().ok(),
    };
    let given = value.get_ref();
    let (soft, hard) = given.split_once(':').unwrap_or((given, given));
    match (number(soft), number(hard)) {
        (Some(soft), Some(hard)) if soft <= hard => Ok(Rlimit { kind, soft, hard }),
        _ => Err(c.error(value, format!("resources.rlimits.{name}: expected SOFT:HARD of numbers or unlimited, found {given:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Overrides};
    use super::*;

    fn parse(source: &str) -> Result<Resources> {
        Config::parse("c.toml", &format!("[resources]\n{source}"), &Overrides::default()).map(|config| config.resources)
    }

    #[test]
    fn values() {
        let resources = parse(
            "pids_limit = 100\nblockio_classes = \"/etc/c.yaml\"\nrdt_classes = true\n\
             rlimits = { nofile = \"1024:4096\", core = \"0\", memlock = \"64:unlimited\" }",
        )
        .unwrap();
        assert_eq!(resources.pids_limit, Some(100));
        let limits: Vec<_> = resources.rlimits.iter().map(|l| (l.kind, l.soft, l.hard)).collect();
        let expected = [(Kind::RlimitCore, 0, 0), (Kind::RlimitMemlock, 64, u64::MAX), (Kind::RlimitNofile, 1024, 4096)];
        assert_eq!(limits, expected);
        assert!(resources.rdt_classes && !resources.ignore_unconfigured_classes && resources.blockio_classes.is_some());
        assert_eq!(parse("").unwrap().pids_limit, None);
    }

    #[test]
    fn mistakes_are_named() {
        for (source, expected) in [
            ("pids_limit = -1", "c.toml: line 2: resources.pids_limit: expected 0"),
            ("rlimits = { files = \"1\" }", "c.toml: line 2: resources.rlimits.files: no such limit"),
            ("rlimits = { nofile = \"2:1\" }", "c.toml: line 2: resources.rlimits.nofile: expected SOFT:HARD"),
            ("rlimits = { nofile = \"many\" }", "c.toml: line 2: resources.rlimits.nofile: expected SOFT:HARD"),
            ("rlimits = { nofile = 5 }", "c.toml: line 2: invalid type"),
            ("blockio_classes = \"c.yaml\"", "c.toml: line 2: resources.blockio_classes: expected an absolute path"),
            ("blockio = \"\"", "c.toml: line 2: unknown field"),
        ] {
            let error = parse(source).unwrap_err();
            assert!(error.message().starts_with(expected), "{source:?}: {error}");
        }
    }
}
