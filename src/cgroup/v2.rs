//! Facts of the unified hierarchy (Documentation/admin-guide/cgroup-v2.rst).

use std::path::Path;

use super::parse;

/// OOM kills in `dir` and below: memory.events counts the whole subtree. None where there is no such file.
pub fn oom_kills(dir: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(dir.join("memory.events")).ok()?;
    parse::flat_keyed(&text, "oom_kill")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_kill_counter() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(oom_kills(dir.path()), None);
        std::fs::write(dir.path().join("memory.events"), "low 0\nhigh 0\nmax 30\noom 3\noom_kill 2\noom_group_kill 0\n").unwrap();
        assert_eq!(oom_kills(dir.path()), Some(2));
    }
}
