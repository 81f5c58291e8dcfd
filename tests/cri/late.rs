//! A start that the daemon gives up, of a shim that does not listen yet: a kill that nobody heard undoes nothing.

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use crisp::cgroup::{Cgroup, Layout};
use crisp::error::Code;
use crisp::runtime::{Handler, Kind};
use crisp::shim::client;
use crisp::shim::protocol::{ShimConfig, VERSION};
use crisp::sys::cancel::Cancel;
use serde_json::json;

use crate::node::eventually;

const SHIM: &str = env!("CARGO_BIN_EXE_crisp-shim");

/// Gives up the start of a container at once; its shim is `script`, which gets the shim's words. Nothing is left then.
fn give_up(name: &str, script: &str, environment: &[&str]) {
    let dir = tempfile::Builder::new().prefix("cl.").tempdir().expect("make a directory");
    let (oci, bundle, shim) = (dir.path().join("oci"), dir.path().join("bundle"), dir.path().join("shim"));
    for path in [&oci, &bundle] {
        fs::create_dir(path).expect("make a directory");
    }
    symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cri/fake/runtime.py"), oci.join("runtime")).expect("link the runtime");
    fs::write(&shim, format!("#!/bin/sh\n{script}")).expect("write the shim");
    fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).expect("make it a program");
    let cgroup = format!("/crisp-late-{}-{name}", std::process::id());
    let spec = json!({"process": {"args": ["sleep", "1000"], "env": environment}, "linux": {"cgroupsPath": cgroup}});
    fs::write(bundle.join("config.json"), spec.to_string()).expect("write the spec");
    let handler =
        Handler { name: "fake".into(), path: oci.join("runtime"), root: oci.join("state"), kind: Kind::Other, systemd_cgroup: false };
    let config = ShimConfig {
        version: VERSION,
        id: name.to_owned(),
        handler,
        cgroup: cgroup.clone(),
        log_path: None,
        tty: false,
        stdin: false,
        stdin_once: false,
        stdio_uid: None,
        stdio_gid: None,
        runtime_timeout_ms: 10_000,
    };
    let error = client::start(&shim, &bundle, &config, &Cancel::never(), Duration::from_millis(1)).expect_err("given up");
    if script.contains("came") {
        eventually("the shim has come", || dir.path().join("came").exists().then_some(()));
    }
    let cgroup = Cgroup::at(&Layout::detect().expect("cgroups"), &cgroup).expect("a cgroup");
    let there = cgroup.dirs().iter().any(|dir| dir.path.exists());
    let left = (cgroup.procs(), there, oci.join("state").join(format!("{name}.json")).exists());
    let _ = cgroup.kill_all(Duration::from_secs(5)).and_then(|()| cgroup.remove(Duration::from_secs(5)));
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    assert_eq!(left, (Vec::new(), false, false), "{error}");
    assert!(fs::read_to_string(oci.join("calls")).unwrap_or_default().contains("\"delete\""), "{error}");
}

#[test]
fn a_shim_that_listens_late_hears_that_its_start_is_given_up() {
    give_up("late", &format!("sleep 0.5; exec {SHIM} \"$@\""), &["PATH=/usr/bin:/bin", "FAKE_RUN=slow 1"]);
}

#[test]
fn a_container_that_runs_before_its_shim_hears_of_it_is_killed() {
    // The socket of the shim is found only when it is done.
    let script = format!(
        "cp -r \"$2\" \"$2.real\"; {SHIM} container \"$2.real\" > \"$2.answer\"
        while ! [ -s \"$2.answer\" ]; do sleep 0.05; done
        ln -s \"$2.real/shim.sock\" \"$2/shim.sock\"; cat \"$2.answer\""
    );
    give_up("early", &script, &["PATH=/usr/bin:/bin"]);
}

/// It may get so far only when all waiting is over.
#[test]
fn a_shim_that_comes_when_all_is_over_starts_nothing() {
    let script = format!(
        "sleep 0.2; (sleep 1; {SHIM} \"$@\" > \"$2/../answer\"
        while ! [ -s \"$2/../answer\" ]; do sleep 0.05; done; touch \"$2/../came\") > /dev/null 2>&1 &"
    );
    give_up("over", &script, &["PATH=/usr/bin:/bin"]);
}
