//! Tasks: pids.current and pids.max of both versions, and processes by cgroup.procs.

use super::number::number;

/// Threads of all processes in the cgroup and below.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pids {
    pub threads: Option<u64>,
    /// Absent without a limit.
    pub limit: Option<u64>,
}

/// pids.current and pids.max (`max`: none).
pub fn parse(current: &str, max: &str) -> Pids {
    Pids { threads: number(current), limit: number(max) }
}

/// Lines of cgroup.procs. A process of another PID namespace above ours is a 0, and counts.
pub fn processes(procs: &str) -> u64 {
    procs.lines().filter(|line| number(line).is_some()).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both() {
        assert_eq!(parse("3\n", "max\n"), Pids { threads: Some(3), limit: None });
        assert_eq!(parse("3\n", "100\n"), Pids { threads: Some(3), limit: Some(100) });
        assert_eq!(parse("", "-1"), Pids::default());
        assert_eq!(processes("1\n22\n0\nx\n\n"), 3);
        assert_eq!(processes(""), 0);
    }
}
