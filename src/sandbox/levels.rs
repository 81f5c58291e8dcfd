//! SELinux levels: each sandbox has a pair of categories that no other has, so that containers of two sandboxes cannot touch each
//! other's files. The pair is part of the sandbox's record; it is free again when the sandbox is gone.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Code, Error, Result};
use crate::sys::lock::{Lock, Rank};

/// Categories of a policy with MCS: c0 to c1023.
const CATEGORIES: u32 = 1024;
/// Pairs of two different ones.
const PAIRS: u32 = CATEGORIES * (CATEGORIES - 1) / 2;

/// Levels in use, each with the number of sandboxes that have it: one may be asked for by several.
type Used = Lock<HashMap<String, usize>>;

/// All levels of this daemon.
pub struct Levels {
    used: Arc<Used>,
}

impl Default for Levels {
    fn default() -> Levels {
        Levels { used: Arc::new(Lock::new(Rank::Leaf, HashMap::new())) }
    }
}

/// A level that is in use as long as this lives.
pub struct Level {
    level: String,
    used: Arc<Used>,
}

impl Level {
    pub fn as_str(&self) -> &str {
        &self.level
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        let mut used = self.used.lock();
        if let Some(count) = used.get_mut(&self.level) {
            *count -= 1;
            if *count == 0 {
                used.remove(&self.level);
            }
        }
    }
}

impl Levels {
    /// One that nobody has: `s0:c1,c2` with the sensitivity of `policy`. RESOURCE_EXHAUSTED when all are taken.
    pub fn choose(&self, policy: &str) -> Result<Level> {
        let sensitivity = policy.split([':', '-']).next().filter(|s| !s.is_empty()).unwrap_or("s0");
        let start = random()? % PAIRS;
        let mut used = self.used.lock();
        // Bounded by what is used: the first free one is at most that far away.
        for step in 0..PAIRS.min(used.len() as u32 + 1) {
            let (low, high) = pair((start + step) % PAIRS);
            let level = format!("{sensitivity}:c{low},c{high}");
            if !used.contains_key(&level) {
                used.insert(level.clone(), 1);
                return Ok(Level { level, used: self.used.clone() });
            }
        }
        Err(Error::new(Code::ResourceExhausted, format!("selinux: all {PAIRS} pairs of categories are in use")))
    }

    /// The one that was asked for, or that a sandbox had before a restart.
    pub fn take(&self, level: &str) -> Level {
        *self.used.lock().entry(level.to_owned()).or_default() += 1;
        Level { level: level.to_owned(), used: self.used.clone() }
    }
}

fn random() -> Result<u32> {
    getrandom::u32().map_err(|e| Error::internal(format!("choose an SELinux level: {e}")))
}

/// The pair with this number, counted (0,1), (0,2), (1,2), (0,3), …
fn pair(number: u32) -> (u32, u32) {
    // The largest `high` with high * (high - 1) / 2 <= number.
    let mut high = ((f64::from(number) * 2.0).sqrt()) as u32;
    while high * (high + 1) / 2 <= number {
        high += 1;
    }
    while high * (high - 1) / 2 > number {
        high -= 1;
    }
    (number - high * (high - 1) / 2, high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::selinux::is_level;

    #[test]
    fn pairs_are_all_there_and_all_different() {
        let mut seen = std::collections::HashSet::new();
        for number in 0..PAIRS {
            let (low, high) = pair(number);
            assert!(low < high && high < CATEGORIES, "{number}: {low} {high}");
            assert!(seen.insert((low, high)));
        }
    }

    #[test]
    fn no_two_sandboxes_share_one_until_it_is_free_again() {
        let levels = Levels::default();
        let held: Vec<Level> = (0..2000).map(|_| levels.choose("s0").unwrap()).collect();
        let mut names: Vec<&str> = held.iter().map(Level::as_str).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 2000);
        assert!(names.iter().all(|name| is_level(name)));
        drop(held);
        assert!(levels.used.lock().is_empty());
        assert!(levels.choose("s3-s15:c0.c1023").unwrap().as_str().starts_with("s3:c"));
    }

    #[test]
    fn one_that_is_asked_for_may_be_shared_and_is_not_chosen() {
        let levels = Levels::default();
        let all: Vec<Level> =
            (0..PAIRS).map(pair).filter(|pair| *pair != (3, 7)).map(|(low, high)| levels.take(&format!("s0:c{low},c{high}"))).collect();
        let last = levels.choose("s0").unwrap();
        assert_eq!(last.as_str(), "s0:c3,c7");
        let again = levels.take("s0:c3,c7");
        drop(last);
        assert_eq!(levels.choose("s0").map(drop).unwrap_err().code(), Code::ResourceExhausted);
        drop(again);
        assert_eq!(levels.choose("s0").unwrap().as_str(), "s0:c3,c7");
        drop(all);
    }
}
