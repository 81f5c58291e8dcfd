//! Numbered steps at which a debug build can be made to die (`CRISP_CRASH_AT=run:3`), as if killed by SIGKILL: the restart
//! suite goes through all of them. Release builds contain none of it.

/// Every step, in the order of a container's life.
pub const STEPS: &[&str] = &[
    "pull:1-manifest",
    "pull:2-begun",
    "pull:3-unpacked",
    "pull:4-moved",
    "pull:5-synced",
    "pull:6-committed",
    "pull:7-layers",
    "pull:8-recorded",
    "run:1-recorded",
    "run:2-files",
    "run:3-user-namespace",
    "run:3-namespaces",
    "run:4-network-intent",
    "run:5-network",
    "run:6-ready",
    "create:1-recorded",
    "create:1-mapped-layers",
    "create:2-snapshot",
    "create:3-volumes",
    "create:4-spec",
    "create:5-created",
    "start:1-intent",
    "start:2-started",
    "start:3-running",
    "update:1-intent",
    "update:2-applied",
    "update:3-spec",
    "update:4-recorded",
    "stop:1-signalled",
    "stop:2-exited",
    "stop-sandbox:1-stopping",
    "stop-sandbox:2-containers",
    "stop-sandbox:3-network",
    "stop-sandbox:4-namespaces",
    "remove:1-volumes",
    "remove:2-snapshot",
    "remove:3-files",
    "remove-sandbox:1-containers",
    "remove-sandbox:2-files",
];

/// Dies here when the environment names this step.
#[inline]
pub fn step(name: &'static str) {
    #[cfg(debug_assertions)]
    {
        use std::sync::OnceLock;
        static AT: OnceLock<Option<String>> = OnceLock::new();
        debug_assert!(STEPS.contains(&name), "{name} is not in STEPS");
        let at = AT.get_or_init(|| std::env::var("CRISP_CRASH_AT").ok());
        if at.as_deref() == Some(name) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        }
    }
    let _ = name;
}
