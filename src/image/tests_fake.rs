//! A registry in this process that answers as a test says, honestly or not.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::tests::{self, gzip};
use super::*;

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub fn authorization(&self) -> Option<&str> {
        self.header("authorization")
    }

    /// The target without its query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// First byte of a Range header.
    pub fn offset(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }
}

#[derive(Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Bytes of the body really sent.
    pub cut: usize,
    /// Before the answer.
    pub delay: Duration,
    /// Between the bytes of the body.
    pub drip: Duration,
    /// Whether Content-Length is told.
    pub length: bool,
    /// Keeps the connection open after the cut.
    pub hang: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        let none = Duration::ZERO;
        Reply { status, headers: Vec::new(), body: body.into(), cut: usize::MAX, delay: none, drip: none, length: true, hang: false }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// From the byte that a request asks for.
    pub fn ranged(self, request: &Request) -> Reply {
        let Some(offset) = request.offset() else { return self };
        let total = self.body.len();
        let body = self.body[offset..].to_vec();
        Reply { status: 206, body, ..self }.header("Content-Range", format!("bytes {offset}-{}/{total}", total - 1))
    }
}

/// Holds answers back until it is opened.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn pass(&self) {
        let (open, opened) = &*self.0;
        drop(opened.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
    }

    pub fn open(&self) {
        *self.0 .0.lock().unwrap() = true;
        self.0 .1.notify_all();
    }
}

type Handler = dyn Fn(&Request) -> Option<Reply> + Send + Sync;

/// A server whose threads end with the test's process.
pub struct Fake {
    pub address: String,
    pub seen: Arc<Mutex<Vec<Request>>>,
}

impl Fake {
    pub fn start(handler: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, handler): (_, Arc<Handler>) = (seen.clone(), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, handler) = (log.clone(), handler.clone());
                std::thread::spawn(move || serve(stream, &log, &*handler));
            }
        });
        Fake { address, seen }
    }

    /// Serves the answers as they are, ranges included.
    pub fn honest(answers: &HashMap<String, Reply>) -> Fake {
        let answers = answers.clone();
        Fake::start(move |r| answers.get(r.path()).map(|reply| reply.clone().ranged(r)))
    }

    pub fn count(&self, part: &str) -> usize {
        self.requests(part).len()
    }

    pub fn requests(&self, part: &str) -> Vec<Request> {
        self.seen.lock().unwrap().iter().filter(|r| r.target.contains(part)).cloned().collect()
    }
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Request>>, handler: &Handler) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").map_or(Some(0), |l| l.parse().ok())?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let request = Request { method, target, headers, body: String::from_utf8_lossy(&body).into_owned() };
    log.lock().unwrap().push(request.clone());
    let reply = handler(&request).unwrap_or_else(|| Reply::new(404, "{}"));
    std::thread::sleep(reply.delay);
    let mut stream = stream;
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    if reply.length {
        head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    let body = &reply.body[..reply.cut.min(reply.body.len())];
    if reply.drip.is_zero() {
        stream.write_all(body).ok()?;
    } else {
        for byte in body {
            stream.write_all(&[*byte]).ok()?;
            std::thread::sleep(reply.drip);
        }
    }
    if reply.hang {
        // Until the client goes.
        let _ = stream.read(&mut [0]);
    }
    Some(())
}

/// The answers of a registry with one image `a/b:v1` of `layers`.
pub struct Content {
    pub answers: HashMap<String, Reply>,
    pub id: String,
    pub digest: String,
    pub blobs: Vec<String>,
}

pub fn content(layers: &[Vec<u8>]) -> Content {
    content_with(layers, |_| {})
}

/// As `content`; `change` may change the layers' descriptors.
pub fn content_with(layers: &[Vec<u8>], change: impl Fn(&mut manifest::Descriptor)) -> Content {
    let refs: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    let config = tests::config(&refs, "");
    let blobs: Vec<Vec<u8>> = layers.iter().map(|l| gzip(l)).collect();
    let descriptor = |t: &str, d: &[u8]| manifest::Descriptor::new(t, Digest::of(d), d.len() as u64);
    let mut layer_descriptors: Vec<_> = blobs.iter().map(|b| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", b)).collect();
    layer_descriptors.iter_mut().for_each(change);
    let manifest = manifest::compose(&descriptor(manifest::OCI_CONFIG, &config), &layer_descriptors).unwrap();
    let digest = Digest::of(&manifest).to_string();
    let reply = Reply::new(200, manifest).header("Content-Type", manifest::OCI_MANIFEST).header("Docker-Content-Digest", &digest);
    let mut answers = HashMap::from([
        ("/v2/a/b/manifests/v1".to_owned(), reply.clone()),
        (format!("/v2/a/b/manifests/{digest}"), reply),
        (format!("/v2/a/b/blobs/{}", Digest::of(&config)), Reply::new(200, config.clone())),
    ]);
    let paths: Vec<String> = blobs.iter().map(|b| format!("/v2/a/b/blobs/{}", Digest::of(b))).collect();
    answers.extend(paths.iter().cloned().zip(blobs.into_iter().map(|b| Reply::new(200, b))));
    Content { answers, id: Digest::of(&config).to_string(), digest, blobs: paths }
}

/// A layer whose blob has at least `size` bytes: nothing in it can be compressed.
pub fn large_layer(size: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let noise: Vec<u8> = (0..size.div_ceil(8))
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    tests::tar(&[("noise", &noise)])
}

/// An image store of a test, and its `certs.d`.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub images: Images,
}

pub fn site(fakes: &[&Fake]) -> Site {
    site_with(fakes, |_, _| {})
}

/// As `site`; `change` may write files into the directory and change the settings.
pub fn site_with(fakes: &[&Fake], change: impl FnOnce(&Path, &mut RegistrySettings)) -> Site {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings::new(&dir.path().join("root"));
    settings.registry.certs_dir = Some(dir.path().join("certs.d"));
    settings.registry.plain_http = fakes.iter().map(|f| f.address.clone()).collect();
    settings.registry.stall = Duration::from_secs(5);
    settings.registry.retries.first_wait = Duration::from_millis(10);
    settings.registry.proxies = Proxies::default();
    change(dir.path(), &mut settings.registry);
    Site { images: Images::open(settings).unwrap(), dir }
}

impl Site {
    pub fn pull(&self, fake: &Fake, version: &str, auth: Option<Auth>) -> Result<Arc<Image>> {
        self.images.pull(&format!("{}/a/b{version}", fake.address), auth, &Cancel::never(), None)
    }

    /// Directories below `layers`, half-made ones included.
    pub fn layers(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("root/layers")).unwrap().count()
    }

    /// Writes the hosts.toml of a registry.
    pub fn hosts(&self, registry: &str, text: &str) {
        let dir = self.dir.path().join("certs.d").join(registry);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }
}

pub fn login() -> Option<Auth> {
    Some(Auth { username: "me".into(), password: "secret".into(), ..Auth::default() })
}

/// What `login` becomes.
pub const BASIC: &str = "Basic bWU6c2VjcmV0";

/// A registry that wants the token `expected`, and a token server that answers by `token`.
pub fn bearer(expected: &'static str, token: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> (Fake, Fake) {
    let tokens = Fake::start(move |r| Some(token(r)));
    let (answers, realm) = (content(&[tests::layer_tar("a"), tests::layer_tar("b")]).answers, tokens.address.clone());
    let registry = Fake::start(move |r| {
        if r.authorization() != Some(expected) {
            let challenge = format!("Bearer realm=\"http://{realm}/token\",service=\"reg\",scope=\"repository:a/b:pull\"");
            return Some(Reply::new(401, "{}").header("WWW-Authenticate", challenge));
        }
        answers.get(&r.target).cloned()
    });
    (registry, tokens)
}
