//! A registry on loopback with one image, whose answers can be held back.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::json;

use crate::archive;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A server whose threads end with the test's process.
pub struct Registry {
    pub address: String,
    /// The image's id, which is the digest of its configuration.
    pub id: String,
    /// Of the manifest.
    pub digest: String,
    shared: Arc<Shared>,
}

struct Shared {
    answers: HashMap<String, (&'static str, Vec<u8>)>,
    seen: Mutex<Vec<String>>,
    held: Mutex<bool>,
    released: Condvar,
    hung_up: AtomicUsize,
    /// `user:password` in base64 that every request must bring.
    password: Option<String>,
}

impl Registry {
    /// Serves `ADDRESS/a/b:v1`.
    pub fn start() -> Registry {
        Registry::with_password(None)
    }

    pub fn with_password(password: Option<&str>) -> Registry {
        let layer = archive::layer("pulled");
        let configuration = archive::configuration(&layer, json!({"User": "app", "StopSignal": "SIGUSR1"}));
        let descriptor = |kind: &str, data: &[u8]| json!({"mediaType": kind, "digest": archive::digest(data), "size": data.len()});
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &configuration),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
        });
        let manifest = manifest.to_string().into_bytes();
        let (id, digest) = (archive::digest(&configuration), archive::digest(&manifest));
        let answers = HashMap::from([
            ("/v2/".to_owned(), ("application/json", b"{}".to_vec())),
            ("/v2/a/b/manifests/v1".to_owned(), (MANIFEST, manifest.clone())),
            (format!("/v2/a/b/manifests/{digest}"), (MANIFEST, manifest)),
            (format!("/v2/a/b/blobs/{id}"), ("application/octet-stream", configuration)),
            (format!("/v2/a/b/blobs/{}", archive::digest(&layer)), ("application/octet-stream", layer)),
        ]);
        let (seen, held, released) = (Mutex::new(Vec::new()), Mutex::new(false), Condvar::new());
        let hung_up = AtomicUsize::new(0);
        let shared = Arc::new(Shared { answers, seen, held, released, hung_up, password: password.map(str::to_owned) });
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let theirs = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = theirs.clone();
                std::thread::spawn(move || shared.serve(stream));
            }
        });
        Registry { address, id, digest, shared }
    }

    pub fn image(&self) -> String {
        format!("{}/a/b:v1", self.address)
    }

    /// From now on blobs are not answered.
    pub fn hold(&self) {
        *self.shared.held.lock().expect("no thread panics with it") = true;
    }

    pub fn release(&self) {
        *self.shared.held.lock().expect("no thread panics with it") = false;
        self.shared.released.notify_all();
    }

    /// Clients so far that went away while their answer was held back.
    pub fn hung_up(&self) -> usize {
        self.shared.hung_up.load(Ordering::SeqCst)
    }

    /// Requests so far whose path contains `part`.
    pub fn count(&self, part: &str) -> usize {
        self.shared.seen.lock().expect("no thread panics with it").iter().filter(|path| path.contains(part)).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.release();
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let mut words = line.split_whitespace();
        let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut authorization = None;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim().split_once(':') else { break };
            if name.eq_ignore_ascii_case("authorization") {
                authorization = value.trim().strip_prefix("Basic ").map(str::to_owned);
            }
        }
        self.seen.lock().expect("no thread panics with it").push(path.clone());
        if path.contains("/blobs/") {
            let mut held = self.held.lock().expect("no thread panics with it");
            while *held {
                held = self.released.wait_timeout(held, Duration::from_millis(20)).expect("no thread panics with it").0;
                if has_hung_up(&stream) {
                    self.hung_up.fetch_add(1, Ordering::SeqCst);
                    return None;
                }
            }
        }
        let mut stream = stream;
        if self.password.is_some() && self.password != authorization {
            let head = "HTTP/1.1 401 X\r\nWWW-Authenticate: Basic realm=\"test\"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";
            return stream.write_all(head.as_bytes()).ok();
        }
        let (status, kind, body) = match self.answers.get(&path) {
            Some((kind, body)) => (200, *kind, body.as_slice()),
            None => (404, "application/json", b"{\"errors\": [{\"code\": \"MANIFEST_UNKNOWN\"}]}".as_slice()),
        };
        let length = body.len();
        let head = format!("HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        if method == "HEAD" {
            return Some(());
        }
        stream.write_all(body).ok()
    }
}

/// Whether the client has closed the connection. What it has asked for is read.
fn has_hung_up(stream: &TcpStream) -> bool {
    let flags = nix::sys::socket::MsgFlags::MSG_PEEK | nix::sys::socket::MsgFlags::MSG_DONTWAIT;
    !matches!(nix::sys::socket::recv(stream.as_raw_fd(), &mut [0], flags), Ok(1) | Err(nix::errno::Errno::EAGAIN))
}
