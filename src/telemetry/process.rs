//! This process, as the kernel sees it (proc(5)).

use super::Gauges;

/// Adds what /proc/self tells; what cannot be read is left out.
pub(super) fn observe(gauges: &mut Gauges) {
    if let Some(stat) = std::fs::read_to_string("/proc/self/stat").ok().and_then(|text| parse(&text)) {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let page = rustix::param::page_size() as f64;
        let set = &mut |name, help, value: f64| gauges.set(name, help, &[], value);
        set("crisp_process_resident_memory_bytes", "Resident memory of the daemon.", stat.resident_pages as f64 * page);
        set("crisp_process_virtual_memory_bytes", "Address space of the daemon.", stat.virtual_bytes as f64);
        set("crisp_process_threads", "Threads of the daemon.", stat.threads as f64);
        gauges.count("crisp_process_cpu_seconds_total", "Processor time of the daemon.", &[], stat.cpu_ticks as f64 / ticks);
    }
    if let Ok(list) = std::fs::read_dir("/proc/self/fd") {
        // Without the one that lists them.
        let open = list.count().saturating_sub(1);
        gauges.set("crisp_process_open_fds", "File descriptors that the daemon has open.", &[], open as f64);
    }
    if let Some(most) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        gauges.set("crisp_process_max_fds", "File descriptors that the daemon may open.", &[], most as f64);
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    threads: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

/// Fields of /proc/PID/stat, counted behind the name, which may have spaces and parentheses in it.
fn parse(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // The first one there is field 3 of the manual.
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    Some(Stat { cpu_ticks: field(14)? + field(15)?, threads: field(20)?, virtual_bytes: field(23)?, resident_pages: field(24)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_process_with_an_odd_name() {
        let text = "12 (a) b) S 1 12 12 0 -1 4194304 500 0 1 0 7 5 0 0 20 0 9 0 100 1000000 300 18446744073709551615 1 1\n";
        assert_eq!(parse(text), Some(Stat { cpu_ticks: 12, threads: 9, virtual_bytes: 1_000_000, resident_pages: 300 }));
        assert_eq!(parse("12 (x) S 1"), None);
        assert_eq!(parse(""), None);
        assert!(parse(&std::fs::read_to_string("/proc/self/stat").unwrap()).unwrap().threads >= 1);
    }
}
