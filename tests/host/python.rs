//! A gRPC client of someone else: Python's grpcio with proto/ drives the whole life of a pod (tests/host/client.py).

use std::path::Path;
use std::time::Duration;

use crisp::sys::cancel::Cancel;
use crisp::sys::process::Program;

use crate::daemon::BUSYBOX;
use crate::harness::Host;

#[test]
fn python_grpcio_drives_the_life_of_a_sandbox() {
    let host = Host::start();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/python/bin/python");
    assert!(python.exists(), "{} is missing: run scripts/install-deps", python.display());
    let layout = &host.daemon.layout;
    let output = Program::new(python)
        .arg(root.join("tests/host/client.py"))
        .arg(root.join("proto"))
        .arg(layout.socket())
        .arg(BUSYBOX)
        .arg(layout.path("logs/python"))
        .arg(layout.cgroup_parent())
        .run(&Cancel::never(), Duration::from_secs(120))
        .expect("run the client");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}:\n{out}\n{err}\nthe daemon's log:\n{}", output.describe(), host.daemon.log_tail());
    assert!(out.ends_with("gone\n"), "{out}");
    host.assert_clean();
    host.finish();
}
