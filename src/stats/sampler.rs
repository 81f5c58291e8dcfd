//! Many readings at once: a pool of threads for long lists, the caller's own for short ones. Results keep the order.

use std::sync::OnceLock;

use rayon::prelude::*;
use rayon::ThreadPool;

use crate::error::{Context, Result};
use crate::sys::thread;

/// Lists up to this length are read by the caller: waking threads would take longer.
const ALONE: usize = 32;
/// Items that a thread takes at least.
const SHARE: usize = 16;

/// The pool, made when the first long list is read.
pub struct Sampler {
    threads: usize,
    pool: OnceLock<Option<ThreadPool>>,
    host_memory: u64,
}

impl Sampler {
    /// `threads` of 0: one per core.
    pub fn new(threads: usize) -> Sampler {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let info = rustix::system::sysinfo();
        // The type of totalram is the kernel's long.
        let host_memory = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit.max(1)));
        Sampler { threads: if threads == 0 { cores() } else { threads }, pool: OnceLock::new(), host_memory }
    }

    /// Memory of this host in bytes.
    pub fn host_memory(&self) -> u64 {
        self.host_memory
    }

    /// `work` for each item, in parallel when that pays; the results in the order of the items. No lock may be held.
    pub fn each<T: Sync, R: Send>(&self, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
        let pool = if items.len() > ALONE && self.threads > 1 { self.pool() } else { None };
        match pool {
            Some(pool) => pool.install(|| items.par_iter().with_min_len(SHARE).map(&work).collect()),
            None => items.iter().map(work).collect(),
        }
    }

    fn pool(&self) -> Option<&ThreadPool> {
        let make = || start(self.threads).map_err(|e| log::warn!("{e}; lists are read by one thread")).ok();
        self.pool.get_or_init(make).as_ref()
    }
}

fn start(threads: usize) -> Result<ThreadPool> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).spawn_handler(|worker| {
        let name = format!("stats-{}", worker.index());
        thread::spawn(&name, move || worker.run()).map(drop).map_err(|e| std::io::Error::other(e.to_string()))
    });
    builder.build().map_err(|e| std::io::Error::other(e.to_string())).context(|| "start the stats threads")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_and_threads_have_names() {
        for threads in [0, 1, 3] {
            let sampler = Sampler::new(threads);
            for length in [0, 1, ALONE, ALONE + 1, 500] {
                let items: Vec<usize> = (0..length).collect();
                let results = sampler.each(&items, |n| (n * 2, std::thread::current().name().unwrap_or_default().to_owned()));
                assert!(results.iter().map(|r| r.0).eq((0..length).map(|n| n * 2)));
                let pooled = results.iter().filter(|r| r.1.starts_with("stats-")).count();
                assert_eq!(pooled, if length > ALONE && sampler.threads > 1 { length } else { 0 });
            }
        }
    }

    #[test]
    fn the_memory_of_this_host() {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let kilobytes: u64 = text.lines().next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
        assert_eq!(Sampler::new(1).host_memory(), kilobytes << 10);
    }
}
