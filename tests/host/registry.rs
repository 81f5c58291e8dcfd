//! Debian's docker-registry on a loopback port, with its files in a directory of its own.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crisp::sys::process::Program;
use tempfile::TempDir;

use crate::daemon::find;

pub struct Registry {
    child: Child,
    /// `127.0.0.1:PORT`
    pub host: String,
    _dir: TempDir,
    /// Storage that goes with it.
    pub _storage: Option<TempDir>,
}

impl Registry {
    /// With the files of a directory that stays.
    pub fn serving(data: &Path) -> Registry {
        let program = find("docker-registry").expect("docker-registry is not installed: run scripts/install-deps");
        let dir = tempfile::tempdir().expect("make a directory");
        // A port that was free a moment ago.
        let host = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("find a port").to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n\
             http: {{addr: {host}}}\n",
            data.display()
        );
        let path = dir.path().join("config.yml");
        fs::write(&path, config).expect("write the registry's configuration");
        let child = Program::new(program).arg("serve").arg(&path).spawn().expect("start the registry");
        let registry = Registry { child, host, _storage: None, _dir: dir };
        let begin = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(20), "the registry does not listen on {}", registry.host);
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
