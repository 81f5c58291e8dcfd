//! Command lines of the OCI runtimes, and their errors.

use std::ffi::OsString;
use std::path::Path;

use super::handler::{Handler, Kind};
use crate::error::{ErrorList, Result};
use crate::sys::process::Program;
use crate::sys::{file, mount};

/// Arguments of one call.
pub type Args = Vec<OsString>;

/// The program of `handler` with these arguments, in the directory `dir` of the container.
pub fn program(handler: &Handler, args: Args, dir: &Path) -> Program {
    let program = Program::new(&handler.path).args(args).current_dir(dir);
    match handler.kind {
        // Where it binds its own binary for a moment, so that no container can change that; /tmp without it. runc takes its state directory.
        Kind::Crun => program.env("_LIBCONTAINER_STATEDIR", dir),
        Kind::Runc | Kind::Other => program,
    }
}

/// Removes what crun and runc leave when they are killed while they protect their own binary: a file, or a mount of the binary on it, in
/// the container's directory `dir` or in the runtime's own, which `delete` then takes for no container's. None of it is fine.
pub fn remove_leftovers(handler: &Handler, id: &str, dir: &Path) -> Result<()> {
    let state = handler.root.join(id);
    let (place, prefix) = match handler.kind {
        Kind::Crun => (dir, "crun."),
        Kind::Runc => (state.as_path(), "runc."),
        Kind::Other => return Ok(()),
    };
    let mut errors = ErrorList::default();
    for entry in std::fs::read_dir(place).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()) {
            errors.keep(mount::unmount(&entry.path()).and_then(|()| file::remove_file(&entry.path())));
        }
    }
    errors.finish()
}

/// The global options: state directory, cgroup driver, and the file for errors (JSON lines).
fn global(handler: &Handler, log: Option<&Path>) -> Args {
    let mut args: Args = vec!["--root".into(), handler.root.clone().into()];
    if let Some(log) = log {
        args.extend(["--log".into(), log.into(), "--log-format".into(), "json".into()]);
    }
    if handler.systemd_cgroup {
        args.push("--systemd-cgroup".into());
    }
    args
}

/// Create and start in one process, which returns once the container's program runs.
pub fn run(handler: &Handler, log: &Path, bundle: &Path, pid_file: &Path, console: Option<&Path>, id: &str) -> Args {
    let mut args = global(handler, Some(log));
    args.extend(["run".into(), "--detach".into(), "--bundle".into(), bundle.into(), "--pid-file".into(), pid_file.into()]);
    if let Some(console) = console {
        args.extend(["--console-socket".into(), console.into()]);
    }
    args.push(id.into());
    args
}

/// A further process.
#[derive(Clone, Copy, Debug)]
pub struct Exec<'a> {
    /// For errors.
    pub log: &'a Path,
    pub pid_file: &'a Path,
    /// The file with the OCI process object.
    pub process: &'a Path,
    /// The child cgroup, as the runtime wants it named.
    pub cgroup: Option<&'a str>,
    /// Where the terminal is to be sent, if the process object asks for one.
    pub console: Option<&'a Path>,
}

/// Starts a further process in container `id`; returns once it runs.
pub fn exec(handler: &Handler, call: &Exec, id: &str) -> Args {
    let mut args = global(handler, Some(call.log));
    args.extend(["exec".into(), "--detach".into(), "--pid-file".into(), call.pid_file.into(), "--process".into(), call.process.into()]);
    if let Some(cgroup) = call.cgroup {
        args.extend(["--cgroup".into(), cgroup.into()]);
    }
    if let Some(console) = call.console {
        args.extend(["--console-socket".into(), console.into()]);
    }
    args.push(id.into());
    args
}

/// Signal number `signal` for the container's first process.
pub fn kill(handler: &Handler, id: &str, signal: i32) -> Args {
    let mut args = global(handler, None);
    args.extend(["kill".into(), id.into(), signal.to_string().into()]);
    args
}

/// Removes what the runtime keeps of the container, killing it if it lives. One that is not there is fine.
pub fn delete(handler: &Handler, log: Option<&Path>, id: &str) -> Args {
    let mut args = global(handler, log);
    args.extend(["delete".into(), "--force".into(), id.into()]);
    args
}

/// New limits, as OCI resources in the file `resources`.
pub fn update(handler: &Handler, log: &Path, resources: &Path, id: &str) -> Args {
    let mut args = global(handler, Some(log));
    args.extend(["update".into(), "--resources".into(), resources.into(), id.into()]);
    args
}

/// The state document.
pub fn state(handler: &Handler, id: &str) -> Args {
    let mut args = global(handler, None);
    args.extend(["state".into(), id.into()]);
    args
}

/// The features document (runc 1.1, crun 1.9 and later).
pub fn features() -> Args {
    vec!["features".into()]
}

/// The last error that a runtime left in its log, or the last line if none calls itself an error.
pub fn last_error(log: &str) -> Option<String> {
    let lines = || log.lines().rev().map(str::trim).filter(|l| !l.is_empty());
    let parsed = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
    let says = |v: &serde_json::Value| v["msg"].as_str().is_some_and(|msg| !msg.trim().is_empty());
    // crun that detaches adds an error without words.
    let error = lines().filter_map(parsed).find(|v| matches!(v["level"].as_str(), Some("error" | "fatal")) && says(v));
    let text = match error {
        Some(value) => value["msg"].as_str()?.to_owned(),
        None => {
            let line = lines().next()?;
            parsed(line).and_then(|v| v["msg"].as_str().map(str::to_owned)).unwrap_or_else(|| line.to_owned())
        }
    };
    let text = text.trim();
    let end = text.char_indices().nth(2048).map_or(text.len(), |(i, _)| i);
    Some(text[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handler_of(kind: Kind, root: &Path) -> Handler {
        Handler { name: "x".into(), path: "/usr/bin/env".into(), root: root.into(), kind, systemd_cgroup: false }
    }

    #[test]
    fn crun_has_its_copies_where_we_look_for_them() {
        use crate::sys::cancel::Cancel;
        let dir = tempfile::tempdir().unwrap();
        for (kind, is_set) in [(Kind::Crun, true), (Kind::Runc, false), (Kind::Other, false)] {
            let program = program(&handler_of(kind, dir.path()), vec![], dir.path());
            let out = program.run_ok(&Cancel::never(), std::time::Duration::from_secs(60)).unwrap();
            let line = format!("_LIBCONTAINER_STATEDIR={}", dir.path().display());
            assert_eq!(String::from_utf8_lossy(&out.stdout).lines().any(|l| l == line), is_set, "{kind:?}");
        }
    }

    #[test]
    fn leftovers_of_killed_runtimes_go_and_nothing_else() {
        for (kind, name) in [(Kind::Crun, "crun.Xy12ab"), (Kind::Runc, "runc.Xy12ab")] {
            let (dir, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let handler = handler_of(kind, root.path());
            remove_leftovers(&handler, "c", &dir.path().join("absent")).unwrap();
            let state = root.path().join("c");
            std::fs::create_dir(&state).unwrap();
            let (ours, other) = if kind == Kind::Crun { (dir.path(), state.as_path()) } else { (state.as_path(), dir.path()) };
            for file in [ours.join(name), ours.join("config.json"), ours.join("crunch"), other.join(name)] {
                std::fs::write(file, b"x").unwrap();
            }
            if rustix::process::geteuid().is_root() {
                mount::bind(Path::new("/bin/sh"), &ours.join(name), false).unwrap();
            }
            remove_leftovers(&handler, "c", dir.path()).unwrap();
            assert!(!ours.join(name).exists() && other.join(name).exists(), "{kind:?}");
            assert!(ours.join("config.json").exists() && ours.join("crunch").exists() && Path::new("/bin/sh").exists());
        }
    }
    use crate::runtime::Kind;

    fn handler() -> Handler {
        Handler { name: "runc".into(), path: "/usr/sbin/runc".into(), root: "/run/r".into(), kind: Kind::Runc, systemd_cgroup: false }
    }

    fn words(args: Args) -> String {
        args.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn command_lines() {
        let h = handler();
        assert_eq!(
            words(run(&h, Path::new("/b/log"), Path::new("/b"), Path::new("/b/pid"), None, "c1")),
            "--root /run/r --log /b/log --log-format json run --detach --bundle /b --pid-file /b/pid c1"
        );
        let path = Path::new;
        let call = Exec { log: path("/l"), pid_file: path("/p"), process: path("/x"), cgroup: Some("pids:exec-1"), console: None };
        assert_eq!(
            words(exec(&h, &call, "c1")),
            "--root /run/r --log /l --log-format json exec --detach --pid-file /p --process /x --cgroup pids:exec-1 c1"
        );
        let terminal = words(exec(&h, &Exec { console: Some(path("/t")), cgroup: None, ..call }, "c1"));
        assert!(terminal.ends_with("exec --detach --pid-file /p --process /x --console-socket /t c1"), "{terminal}");
        let systemd = Handler { systemd_cgroup: true, ..h };
        assert_eq!(words(delete(&systemd, None, "c1")), "--root /run/r --systemd-cgroup delete --force c1");
    }

    /// Captured from runc 1.1.5 and crun 1.8.1.
    #[test]
    fn errors_of_the_runtimes() {
        let runc = concat!(
            "{\"level\":\"warning\",\"msg\":\"x\",\"time\":\"t\"}\n",
            "{\"level\":\"error\",\"msg\":\"runc run failed: no such file\",\"time\":\"t\"}\n",
        );
        assert_eq!(last_error(runc).as_deref(), Some("runc run failed: no such file"));
        let crun = "{\"msg\":\"executable file `nope` not found in $PATH\",\"level\":\"error\",\"time\":\"t\"}\n";
        assert_eq!(last_error(crun).as_deref(), Some("executable file `nope` not found in $PATH"));
        let hook = "{\"msg\":\"error executing hook `/bin/sh` (exit code: 3)\",\"level\":\"error\"}\n{\"msg\":\"\",\"level\":\"error\"}\n";
        assert_eq!(last_error(hook).as_deref(), Some("error executing hook `/bin/sh` (exit code: 3)"));
        assert_eq!(last_error("panic: runtime error\n\n").as_deref(), Some("panic: runtime error"));
        assert_eq!(last_error("\n"), None);
    }
}
