//! Huge pages by size, and which sizes a host has.

use std::path::Path;

use super::number::{number, pairs};

/// Huge pages of one size. Bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// As in names of files: `2MB`, `1GB`.
    pub size: String,
    pub usage: Option<u64>,
    /// v1 alone.
    pub max_usage: Option<u64>,
    /// How often the limit was hit.
    pub failures: Option<u64>,
}

/// v1: hugetlb.SIZE.usage_in_bytes, .max_usage_in_bytes, .failcnt.
pub fn v1(size: &str, usage: &str, max_usage: &str, failcnt: &str) -> Pages {
    Pages { size: size.to_owned(), usage: number(usage), max_usage: number(max_usage), failures: number(failcnt) }
}

/// v2: hugetlb.SIZE.current, .events.
pub fn v2(size: &str, current: &str, events: &str) -> Pages {
    let failures = pairs(events).find(|(key, _)| *key == "max").map(|(_, n)| n);
    Pages { size: size.to_owned(), usage: number(current), max_usage: None, failures }
}

/// The sizes in `dir` (/sys/kernel/mm/hugepages), smallest first, as cgroup files name them.
pub fn sizes(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut kilobytes: Vec<u64> = names.filter_map(|n| number(n.strip_prefix("hugepages-")?.strip_suffix("kB")?)).collect();
    kilobytes.sort_unstable();
    kilobytes.into_iter().map(name).collect()
}

fn name(kilobytes: u64) -> String {
    match kilobytes {
        k if k >= 1 << 20 => format!("{}GB", k >> 20),
        k if k >= 1 << 10 => format!("{}MB", k >> 10),
        k => format!("{k}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sizes() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["hugepages-1048576kB", "hugepages-2048kB", "hugepages-64kB", "hugepages-xkB", "other"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(sizes(dir.path()), ["64KB", "2MB", "1GB"]);
        assert!(sizes(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn both_versions() {
        let pages = v1("2MB", "4194304\n", "6291456\n", "1\n");
        assert_eq!((pages.usage, pages.max_usage, pages.failures), (Some(4_194_304), Some(6_291_456), Some(1)));
        let pages = v2("2MB", "4194304\n", "max 3\n");
        assert_eq!((pages.usage, pages.max_usage, pages.failures), (Some(4_194_304), None, Some(3)));
        assert_eq!(v2("2MB", "max", "").usage, None);
    }
}
