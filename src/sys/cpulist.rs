//! Lists of CPUs and memory nodes as the kernel writes them: `0-3,8` (cpuset(7), "List format").

use std::fmt;

/// Highest number that is taken: far above what any kernel is built for.
const HIGHEST: u32 = u16::MAX as u32;

/// A set of numbers, as ranges in rising order that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList {
    ranges: Vec<(u32, u32)>,
}

impl CpuList {
    /// The numbers of a list; None when it is not one. An empty text (or a newline alone, as in files) is the empty list.
    pub fn parse(text: &str) -> Option<CpuList> {
        let text = text.trim_end_matches('\n');
        if text.is_empty() {
            return Some(CpuList::default());
        }
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u32>().ok().filter(|n| digits && *n <= HIGHEST)
        };
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (from, to) = match part.split_once('-') {
                Some((from, to)) => (number(from)?, number(to)?),
                None => (number(part)?, number(part)?),
            };
            if from > to {
                return None;
            }
            ranges.push((from, to));
        }
        Some(CpuList::of(ranges))
    }

    fn of(mut ranges: Vec<(u32, u32)>) -> CpuList {
        ranges.sort_unstable();
        let mut joined: Vec<(u32, u32)> = Vec::new();
        for (from, to) in ranges {
            match joined.last_mut() {
                Some(last) if from <= last.1 + 1 => last.1 = last.1.max(to),
                _ => joined.push((from, to)),
            }
        }
        CpuList { ranges: joined }
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether every number here is in `other` too.
    pub fn is_within(&self, other: &CpuList) -> bool {
        self.ranges.iter().all(|(from, to)| other.ranges.iter().any(|(low, high)| low <= from && to <= high))
    }

    /// The numbers of both.
    pub fn union(&self, other: &CpuList) -> CpuList {
        CpuList::of(self.ranges.iter().chain(&other.ranges).copied().collect())
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (from, to)) in self.ranges.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            match from == to {
                true => write!(f, "{comma}{from}")?,
                false => write!(f, "{comma}{from}-{to}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> CpuList {
        CpuList::parse(text).unwrap_or_else(|| panic!("{text:?}"))
    }

    #[test]
    fn lists_are_read_and_written() {
        for (text, plain) in [("0", "0"), ("3,1-2,0", "0-3"), ("8,0-3\n", "0-3,8"), ("2-4,3-9", "2-9"), ("", ""), ("\n", "")] {
            assert_eq!(list(text).to_string(), plain, "{text:?}");
        }
        for bad in ["x", "0-", "-1", "3-1", "0,,1", ",", "0-1-2", "1 ", "+1", "65536", "0\n1", "0-7:1/2"] {
            assert_eq!(CpuList::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn subsets_and_unions() {
        assert!(list("1,3").is_within(&list("0-3")) && list("").is_within(&list("0")));
        assert!(!list("0-4").is_within(&list("0-3")) && !list("1-3").is_within(&list("1,3")));
        assert_eq!(list("0,5").union(&list("1-2")).to_string(), "0-2,5");
        assert!(list("").is_empty() && !list("0").is_empty());
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read_again(text in "[0-9,-]{0,12}") {
            if let Some(read) = CpuList::parse(&text) {
                proptest::prop_assert_eq!(CpuList::parse(&read.to_string()), Some(read));
            }
        }
    }
}
