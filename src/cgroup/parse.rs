//! Formats of kernel files: flat keyed, and /proc/PID/cgroup.

/// The value of `key` in a flat keyed file (`KEY VALUE` a line).
pub fn flat_keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The lines of /proc/PID/cgroup: controllers (empty for v2) and path. `cgroups(7)`.
pub fn proc_cgroup(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        fields.next()?.parse::<u32>().ok()?;
        Some((fields.next()?, fields.next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux 6.18, cgroup v1.
    const OOM_CONTROL: &str = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n";
    /// Linux 6.18, cgroup v2.
    const MEMORY_EVENTS: &str = "low 0\nhigh 0\nmax 30\noom 3\noom_kill 2\noom_group_kill 0\n";

    #[test]
    fn flat_keyed_values() {
        assert_eq!(flat_keyed(OOM_CONTROL, "oom_kill"), Some(1));
        assert_eq!(flat_keyed(MEMORY_EVENTS, "oom_kill"), Some(2));
        assert_eq!(flat_keyed(MEMORY_EVENTS, "oom"), Some(3));
        assert_eq!(flat_keyed("max\n", "max"), None);
        assert_eq!(flat_keyed("oom_kill many", "oom_kill"), None);
        assert_eq!(flat_keyed("", "oom_kill"), None);
    }

    #[test]
    fn proc_cgroup_lines() {
        let text = "9:name=systemd:/a\n1:cpu,cpuacct:/a:b\nrubbish\n0::/\n";
        let all: Vec<_> = proc_cgroup(text).collect();
        assert_eq!(all, [("name=systemd", "/a"), ("cpu,cpuacct", "/a:b"), ("", "/")]);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in "\\PC*", key in "[a-z_]{0,6}") {
            flat_keyed(&text, &key);
            proc_cgroup(&text).count();
        }
    }
}
