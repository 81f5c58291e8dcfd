//! Facts of the unified hierarchy (Documentation/admin-guide/cgroup-v2.rst).

use std::path::Path;

use super::parse;

/// OOM kills in `dir` and below: memory.events counts the whole subtree.
pub fn oom_kills(dir: &Path) -> u64 {
    let text = std::fs::read_to_string(dir.join("memory.events")).unwrap_or_default();
    parse::flat_keyed(&text, "oom_kill").unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_kill_counter() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(oom_kills(dir.path()), 0);
        std::fs::write(dir.path().join("memory.events"), "low 0\nhigh 0\nmax 30\noom 3\noom_kill 2\noom_group_kill 0\n").unwrap();
        assert_eq!(oom_kills(dir.path()), 2);
    }
}
