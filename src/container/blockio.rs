//! Block I/O classes: a file that gives each class weights and throttles for devices by pattern, in the form that goresctrl, and
//! with it other runtimes, read (YAML, or TOML when the file's name ends so). Devices are looked for when a container asks:
//! disks come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice, LinuxThrottleDeviceBuilder, LinuxWeightDeviceBuilder};
use serde::de::{Deserializer, Visitor};
use serde::Deserialize;

use crate::cdi::yaml;
use crate::error::{Context, Error, Result};
use crate::sys::file;

/// Bytes of a file of classes, at most.
const FILE_LIMIT: u64 = 1 << 20;
/// What weights may be (OCI runtime spec, config-linux, "Block IO").
const WEIGHTS: std::ops::RangeInclusive<u64> = 10..=1000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "Classes", default)]
    classes: BTreeMap<String, Vec<Parameters>>,
}

/// What one item of a class says: of these devices, or of all.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase", default)]
struct Parameters {
    devices: Option<Vec<String>>,
    throttle_read_bps: Option<Quantity>,
    throttle_write_bps: Option<Quantity>,
    #[serde(rename = "ThrottleReadIOPS")]
    throttle_read_iops: Option<Quantity>,
    #[serde(rename = "ThrottleWriteIOPS")]
    throttle_write_iops: Option<Quantity>,
    weight: Option<Quantity>,
}

/// All classes of a file.
#[derive(Clone, Debug, Default)]
pub struct BlockIoClasses {
    classes: BTreeMap<String, Vec<Parameters>>,
}

impl BlockIoClasses {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<BlockIoClasses> {
        let what = || format!("read block I/O classes from {}", path.display());
        let text = String::from_utf8(file::read(path, FILE_LIMIT).context(what)?).context(what)?;
        let toml = path.extension().is_some_and(|end| end == "toml");
        BlockIoClasses::parse(&text, toml).context(what).map_err(|e| e.with_code(crate::error::Code::InvalidArgument))
    }

    fn parse(text: &str, toml: bool) -> Result<BlockIoClasses> {
        let file: File = match toml {
            true => toml::from_str(text).map_err(|e| Error::invalid(format!("parse TOML: {e}")))?,
            false if text.trim().is_empty() => File { classes: BTreeMap::new() },
            false => serde_json::from_value(yaml::parse(text).map_err(|e| Error::invalid(format!("parse YAML: {e}")))?)
                .context(|| "parse YAML")?,
        };
        for (class, items) in &file.classes {
            items.iter().try_for_each(Parameters::check).context(|| format!("class {class}"))?;
        }
        Ok(BlockIoClasses { classes: file.classes })
    }

    /// What a class means on this host now: later items win. None: there is no such class. The lines say which patterns found nothing.
    pub fn resolve(&self, class: &str) -> Option<(LinuxBlockIo, Vec<String>)> {
        self.classes.get(class).map(|items| resolve(class, items, &find_devices))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.classes.keys().map(String::as_str)
    }
}

impl Parameters {
    fn throttles(&self) -> [Option<Quantity>; 4] {
        [self.throttle_read_bps, self.throttle_write_bps, self.throttle_read_iops, self.throttle_write_iops]
    }

    fn check(&self) -> Result<()> {
        if let Some(weight) = self.weight.filter(|weight| !WEIGHTS.contains(&weight.0)) {
            return Err(Error::invalid(format!("Weight: expected {} to {}, found {}", WEIGHTS.start(), WEIGHTS.end(), weight.0)));
        }
        match &self.devices {
            None if self.throttles().iter().any(Option::is_some) => Err(Error::invalid("throttles need Devices")),
            None => Ok(()),
            Some(patterns) => patterns.iter().try_for_each(|pattern| {
                if !pattern.starts_with("/dev/") || pattern.split('/').any(|part| part == "..") {
                    return Err(Error::invalid(format!("Devices: expected paths below /dev, found {pattern:?}")));
                }
                glob::Pattern::new(pattern).map(drop).map_err(|e| Error::invalid(format!("Devices: {pattern:?}: {e}")))
            }),
        }
    }
}

type Device = (i64, i64);

fn resolve(class: &str, items: &[Parameters], find: &dyn Fn(&str) -> BTreeSet<Device>) -> (LinuxBlockIo, Vec<String>) {
    let mut block_io = LinuxBlockIo::default();
    let mut weights: BTreeMap<Device, u16> = BTreeMap::new();
    let mut throttles: [BTreeMap<Device, u64>; 4] = Default::default();
    let mut warnings = Vec::new();
    for item in items {
        // Checked: it fits.
        let weight = item.weight.map(|weight| weight.0 as u16);
        let Some(patterns) = &item.devices else {
            if weight.is_some() {
                block_io.set_weight(weight);
            }
            continue;
        };
        for pattern in patterns {
            let devices = find(pattern);
            if devices.is_empty() {
                warnings.push(format!("block I/O class {class}: no disk is {pattern}"));
            }
            for device in devices {
                weights.extend(weight.map(|weight| (device, weight)));
                for (all, asked) in throttles.iter_mut().zip(item.throttles()) {
                    all.extend(asked.map(|rate| (device, rate.0)));
                }
            }
        }
    }
    let weight =
        |((major, minor), weight): (Device, u16)| LinuxWeightDeviceBuilder::default().major(major).minor(minor).weight(weight).build().ok();
    block_io.set_weight_device(some(weights.into_iter().filter_map(weight).collect()));
    let [read_bps, write_bps, read_iops, write_iops] = throttles.map(throttle_devices);
    block_io.set_throttle_read_bps_device(read_bps).set_throttle_write_bps_device(write_bps);
    block_io.set_throttle_read_iops_device(read_iops).set_throttle_write_iops_device(write_iops);
    (block_io, warnings)
}

fn throttle_devices(rates: BTreeMap<Device, u64>) -> Option<Vec<LinuxThrottleDevice>> {
    // All members have defaults: it cannot fail.
    let throttle =
        |((major, minor), rate): (Device, u64)| LinuxThrottleDeviceBuilder::default().major(major).minor(minor).rate(rate).build().ok();
    some(rates.into_iter().filter_map(throttle).collect())
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    Some(list).filter(|list| !list.is_empty())
}

/// The whole disks that a pattern names, links followed. The kernel limits disks, not their partitions.
fn find_devices(pattern: &str) -> BTreeSet<Device> {
    let paths = glob::glob(pattern).into_iter().flatten().flatten();
    let numbers = paths.filter_map(|path| {
        let meta = std::fs::metadata(path).ok().filter(|meta| meta.file_type().is_block_device())?;
        Some((rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())))
    });
    let disks = numbers.filter(|(major, minor)| !Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists());
    disks.map(|(major, minor)| (i64::from(major), i64::from(minor))).collect()
}

/// A number as Kubernetes writes it: `80`, `"10M"`, `1.5Gi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quantity(u64);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Quantity, D::Error> {
        struct Wanted;
        impl Visitor<'_> for Wanted {
            type Value = Quantity;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a quantity like 80, 10M or 4Ki")
            }

            fn visit_u64<E>(self, value: u64) -> std::result::Result<Quantity, E> {
                Ok(Quantity(value))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> std::result::Result<Quantity, E> {
                u64::try_from(value).map(Quantity).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(value), &self))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Quantity, E> {
                quantity(text).map(Quantity).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Wanted)
    }
}

/// Digits, perhaps a fraction, a suffix; rounded up.
fn quantity(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let power = |base: u128| {
        let letters = if base == 1024 { "KMGTPE" } else { "kMGTPE" };
        let letter = suffix.chars().next()?;
        letters.find(letter).map(|n| base.pow(n as u32 + 1))
    };
    let factor = match suffix.len() {
        0 => 1,
        1 => power(1000)?,
        2 if suffix.ends_with('i') => power(1024)?,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 {
        return None;
    }
    let digits = format!("{whole}{fraction}").parse::<u128>().ok()?;
    let value = digits.checked_mul(factor)?.div_ceil(10u128.pow(fraction.len() as u32));
    u64::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
Classes:
  slow:
    - Weight: 80
    - Devices:
        - /dev/sd[a-z]
        - /dev/vd?
      ThrottleReadBps: 50M
      ThrottleWriteBps: \"10Mi\"
      ThrottleReadIOPS: 10k
      ThrottleWriteIOPS: 5000
      Weight: 50
    - Devices:
        - /dev/disk/by-id/*SSD*
      ThrottleReadBps: 100M
  fast:
    - Weight: 400
";

    fn found(pattern: &str) -> BTreeSet<Device> {
        match pattern {
            "/dev/sd[a-z]" => [(8, 0), (8, 16)].into(),
            "/dev/disk/by-id/*SSD*" => [(8, 16)].into(),
            _ => BTreeSet::new(),
        }
    }

    #[test]
    fn classes_of_a_file() {
        let classes = BlockIoClasses::parse(FILE, false).unwrap();
        assert_eq!(classes.names().collect::<Vec<_>>(), ["fast", "slow"]);
        assert!(classes.resolve("medium").is_none());
        assert_eq!(classes.resolve("fast").unwrap().0.weight(), Some(400));

        let (block_io, warnings) = resolve("slow", &classes.classes["slow"], &found);
        let json = serde_json::to_value(block_io).unwrap();
        let device = |minor: u32, name: &str, value: u64| serde_json::json!({"major": 8, "minor": minor, name: value});
        assert_eq!(json["weight"], 80);
        assert_eq!(json["weightDevice"], serde_json::json!([device(0, "weight", 50), device(16, "weight", 50)]));
        assert_eq!(json["throttleReadBpsDevice"], serde_json::json!([device(0, "rate", 50_000_000), device(16, "rate", 100_000_000)]));
        assert_eq!(json["throttleWriteBpsDevice"][0]["rate"], 10 << 20);
        assert_eq!(
            (&json["throttleReadIOPSDevice"][1]["rate"], &json["throttleWriteIOPSDevice"][1]["rate"]),
            (&10_000.into(), &5_000.into())
        );
        assert_eq!(warnings, ["block I/O class slow: no disk is /dev/vd?"]);
    }

    #[test]
    fn toml_says_the_same() {
        let text = "[[Classes.slow]]\nWeight = 80\n[[Classes.slow]]\nDevices = [\"/dev/sd[a-z]\"]\nThrottleReadBps = \"50M\"\n";
        let classes = BlockIoClasses::parse(text, true).unwrap();
        let (block_io, _) = resolve("slow", &classes.classes["slow"], &found);
        assert_eq!((block_io.weight(), block_io.throttle_read_bps_device().as_ref().unwrap()[0].rate()), (Some(80), 50_000_000));
    }

    #[test]
    fn an_empty_file_has_no_classes() {
        for text in ["", "\n", "Classes: {}"] {
            assert_eq!(BlockIoClasses::parse(text, false).unwrap().names().count(), 0);
        }
    }

    #[test]
    fn wrong_files_say_what_is_wrong() {
        for (text, word) in [
            ("Classes:\n  a:\n  - Weight: 5", "class a: Weight: expected 10 to 1000, found 5"),
            ("Classes:\n  a:\n  - ThrottleReadBps: 5M", "class a: throttles need Devices"),
            ("Classes:\n  a:\n  - Devices: [sda]\n    Weight: 50", "below /dev"),
            ("Classes:\n  a:\n  - Devices: [/dev/../x]\n    Weight: 50", "below /dev"),
            ("Classes:\n  a:\n  - Devices: ['/dev/[']\n    Weight: 50", "/dev/["),
            ("Classes:\n  a:\n  - Weight: many", "many"),
            ("Classes:\n  a:\n  - Weight: -5", "-5"),
            ("Classes:\n  a:\n  - Wait: 50", "Wait"),
            ("classes: {}", "classes"),
            ("- a", "YAML"),
        ] {
            let error = BlockIoClasses::parse(text, false).unwrap_err();
            assert!(error.message().contains(word), "{text:?}: {error}");
        }
        let missing = BlockIoClasses::load(Path::new("/nonexistent/classes.yaml")).unwrap_err();
        assert!(missing.message().contains("/nonexistent/classes.yaml"), "{missing}");
    }

    #[test]
    fn quantities() {
        for (text, value) in
            [("0", 0), ("80", 80), ("10M", 10_000_000), ("4k", 4_000), ("4Ki", 4096), ("1.5Gi", 3 << 29), ("0.5", 1), ("1E", 10u64.pow(18))]
        {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for bad in ["", "M", "1 M", "-1", "1Mb", "1ki", "1K", "1e3", "1.2.3", ".5", "99E", "1Zi", "1é"] {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }

    #[test]
    fn devices_of_this_host_are_whole_disks() {
        for (major, minor) in find_devices("/dev/*") {
            assert!(Path::new(&format!("/sys/dev/block/{major}:{minor}")).exists());
            assert!(!Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists());
        }
        assert!(find_devices("/dev/null").is_empty() && find_devices("/dev/none*").is_empty());
    }
}
