//! Block I/O by device: v1 blkio.throttle.*_recursive, v2 io.stat.

use super::number::{device, number};

/// Counters of one device. v1 counts I/O that was not throttled too, despite the files' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub discard_bytes: u64,
    pub reads: u64,
    pub writes: u64,
    pub discards: u64,
}

/// Adds one counter to the device `at`.
fn of(devices: &mut Vec<Device>, (major, minor): (u32, u32)) -> &mut Device {
    let found = devices.iter().position(|d| (d.major, d.minor) == (major, minor));
    let index = found.unwrap_or_else(|| {
        devices.push(Device { major, minor, ..Device::default() });
        devices.len() - 1
    });
    &mut devices[index]
}

/// v1: blkio.throttle.io_service_bytes_recursive and blkio.throttle.io_serviced_recursive (`8:0 Read 123`).
pub fn v1(bytes: &str, operations: &str) -> Vec<Device> {
    let mut devices = Vec::new();
    for (text, in_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(name), Some(kind), Some(value), None) = (words.next(), words.next(), words.next(), words.next()) else { continue };
            let (Some(name), Some(value)) = (device(name), number(value)) else { continue };
            // Sync and Async split the same again, Total is the sum.
            if !["Read", "Write", "Discard"].contains(&kind) {
                continue;
            }
            let d = of(&mut devices, name);
            let slot = match (kind, in_bytes) {
                ("Read", true) => &mut d.read_bytes,
                ("Write", true) => &mut d.write_bytes,
                (_, true) => &mut d.discard_bytes,
                ("Read", false) => &mut d.reads,
                ("Write", false) => &mut d.writes,
                (_, false) => &mut d.discards,
            };
            *slot = value;
        }
    }
    devices
}

/// v2 io.stat (`8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`).
pub fn v2(stat: &str) -> Vec<Device> {
    let mut devices = Vec::new();
    for line in stat.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(name) = words.next().and_then(device) else { continue };
        for word in words {
            let Some((key, value)) = word.split_once('=') else { continue };
            let Some(value) = number(value) else { continue };
            let d = of(&mut devices, name);
            match key {
                "rbytes" => d.read_bytes = value,
                "wbytes" => d.write_bytes = value,
                "dbytes" => d.discard_bytes = value,
                "rios" => d.reads = value,
                "wios" => d.writes = value,
                "dios" => d.discards = value,
                _ => {}
            }
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_say_the_same() {
        let expected = [Device { major: 254, minor: 16, read_bytes: 4096, write_bytes: 8192, reads: 1, writes: 2, ..Device::default() }];
        let bytes =
            "254:16 Read 4096\n254:16 Write 8192\n254:16 Sync 12288\n254:16 Async 0\n254:16 Discard 0\n254:16 Total 12288\nTotal 12288\n";
        let operations = "254:16 Read 1\n254:16 Write 2\n254:16 Sync 3\n254:16 Async 0\n254:16 Discard 0\n254:16 Total 3\nTotal 3\n";
        assert_eq!(v1(bytes, operations), expected);
        assert_eq!(v2("254:16 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n"), expected);
    }

    #[test]
    fn wrong_shapes_are_absent() {
        for text in
            ["", "Total 0\n", "8:0 Read\n", "8:0 Read -1\n", "8 Read 1\n", "8:0 Read 1 2\n", "8:0\n", "8:0 rbytes\n", "8:0 rbytes=-1\n"]
        {
            assert!(v1(text, text).is_empty() && v2(text).is_empty(), "{text:?}");
        }
        assert_eq!(v2("8:0 rbytes=7 cost.usage=1 wby").len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn any_text(a in "([0-9]{1,3}:[0-9]{1,3} (Read|Write|rbytes=|x) [0-9-]{0,21}\n|\\PC*){0,6}") {
            v1(&a, &a);
            v2(&a);
        }
    }
}
