//! Registries with their own authority, client certificates, passwords and tokens: Debian's docker-registry on loopback, and a
//! token server of this test.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use base64::Engine;
use crisp::error::Code;
use crisp::image::{Auth, Images, Proxies, Settings};
use crisp::sys::cancel::Cancel;
use crisp::sys::process::Program;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;

use crate::daemon::{find, image, tool};

/// An authority and what it signs, in files.
struct Authority {
    dir: PathBuf,
}

impl Authority {
    fn new(dir: &Path) -> Authority {
        let dir = dir.join("pki");
        fs::create_dir(&dir).unwrap();
        let this = Authority { dir };
        let (key, certificate) = (this.file("ca.key"), this.file("ca.crt"));
        tool(
            "openssl",
            &["req", "-x509", "-days", "2", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ca", "-keyout", &key, "-out", &certificate],
        );
        this
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// NAME.key and NAME.crt for 127.0.0.1 and registry.test.
    fn issue(&self, name: &str) -> (String, String) {
        let (key, request, certificate) = (self.file(&format!("{name}.key")), self.file("csr"), self.file(&format!("{name}.crt")));
        fs::write(self.file("names"), "subjectAltName=IP:127.0.0.1,DNS:registry.test\n").unwrap();
        let subject = format!("/CN={name}");
        tool("openssl", &["req", "-newkey", "rsa:2048", "-nodes", "-subj", &subject, "-keyout", &key, "-out", &request]);
        let (ca, ca_key, names) = (self.file("ca.crt"), self.file("ca.key"), self.file("names"));
        let sign = ["x509", "-req", "-days", "2", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial"];
        tool("openssl", &[&sign[..], &["-extfile", &names, "-out", &certificate]].concat());
        (key, certificate)
    }
}

/// docker-registry with sections of its configuration.
struct Registry {
    child: Child,
    host: String,
}

impl Registry {
    /// `http` goes into the section of that name, `rest` stands below all.
    fn start(storage: &Path, http: &str, rest: &str) -> Registry {
        let program = find("docker-registry").expect("docker-registry is not installed: run scripts/install-deps");
        let host = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("find a port").to_string();
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: {host}\n{http}\n{rest}\n",
            storage.display()
        );
        let path = storage.with_extension(format!("{}.yml", host.replace(':', "_")));
        fs::write(&path, text).unwrap();
        let child = Program::new(program).arg("serve").arg(&path).spawn().expect("start the registry");
        let registry = Registry { child, host };
        let begin = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(60), "the registry does not listen on {}", registry.host);
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    fn reference(&self) -> String {
        format!("{}/test/box:1", self.host)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A storage directory with `test/box:1` in it, pushed by skopeo.
fn storage(dir: &Path) -> PathBuf {
    let storage = dir.join("storage");
    let registry = Registry::start(&storage, "", "");
    let source = format!("oci-archive:{}", image("busybox").display());
    tool("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &source, &format!("docker://{}", registry.reference())]);
    storage
}

/// A store with a `certs.d` of its own.
fn store(dir: &TempDir, name: &str, change: impl FnOnce(&mut Settings)) -> Images {
    let mut settings = Settings::new(&dir.path().join(name));
    settings.registry.certs_dir = Some(dir.path().join("certs.d"));
    settings.registry.retries.first_wait = Duration::from_millis(20);
    settings.registry.proxies = Proxies::default();
    change(&mut settings);
    Images::open(settings).unwrap()
}

fn pull(images: &Images, reference: &str, auth: Option<Auth>) -> crisp::error::Result<String> {
    images.pull(reference, auth, &Cancel::never(), None).map(|image| image.id.clone())
}

fn hosts(dir: &TempDir, registry: &str, text: &str) {
    let (host, port) = registry.split_once(':').unwrap();
    let place = dir.path().join(format!("certs.d/{host}_{port}_"));
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("hosts.toml"), text).unwrap();
}

fn login(password: &str) -> Option<Auth> {
    Some(Auth { username: "me".into(), password: password.into(), ..Auth::default() })
}

#[test]
fn a_registry_that_wants_client_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Authority::new(dir.path());
    let ((key, certificate), (client_key, client)) = (pki.issue("server"), pki.issue("client"));
    let ca = pki.file("ca.crt");
    let tls = format!("  tls: {{certificate: {certificate}, key: {key}, clientcas: [{ca}]}}");
    let registry = Registry::start(&storage(dir.path()), &tls, "");
    let images = store(&dir, "root", |_| {});
    let refused = |words: &str| {
        let e = pull(&images, &registry.reference(), None).unwrap_err();
        assert!(e.message().starts_with("RegistryUnavailable") && e.message().contains(words), "{e}");
    };
    let server = format!("server = \"https://{}\"\n", registry.host);
    hosts(&dir, &registry.host, &server);
    refused("ertificate");
    hosts(&dir, &registry.host, &format!("{server}ca = \"{ca}\"\n"));
    refused("ertificate");
    hosts(&dir, &registry.host, &format!("{server}ca = [\"{ca}\"]\nclient = [[\"{client}\", \"{client_key}\"]]\n"));
    let id = pull(&images, &registry.reference(), None).unwrap();
    images.remove(&id).unwrap();
    hosts(&dir, &registry.host, &format!("{server}skip_verify = true\nclient = [[\"{client}\", \"{client_key}\"]]\n"));
    assert_eq!(pull(&images, &registry.reference(), None).unwrap(), id);
    images.remove(&id).unwrap();
    // Docker's files in place of hosts.toml.
    let place = dir.path().join(format!("certs.d/{}_", registry.host.replace(':', "_")));
    fs::remove_file(place.join("hosts.toml")).unwrap();
    for (from, to) in [(&ca, "ca.crt"), (&client, "c.cert"), (&client_key, "c.key")] {
        fs::copy(from, place.join(to)).unwrap();
    }
    assert_eq!(pull(&images, &registry.reference(), None).unwrap(), id);
}

/// The certificate that registries' own documentation makes: self-signed, and an authority by its own words.
#[test]
fn a_registry_with_a_certificate_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let [key, certificate, other] = ["own.key", "own.crt", "other.crt"].map(file);
    let make = |key: &str, certificate: &str| {
        let words = ["req", "-x509", "-days", "2", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=registry"];
        let names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate];
        tool("openssl", &[&words[..], &names].concat());
    };
    make(&file("other.key"), &other);
    make(&key, &certificate);
    let registry = Registry::start(&storage(dir.path()), &format!("  tls: {{certificate: {certificate}, key: {key}}}"), "");
    let images = store(&dir, "root", |_| {});
    let server = format!("server = \"https://{}\"\n", registry.host);
    hosts(&dir, &registry.host, &format!("{server}ca = \"{other}\"\n"));
    let e = pull(&images, &registry.reference(), None).unwrap_err();
    assert!(e.message().starts_with("RegistryUnavailable") && e.message().contains("ertificate"), "{e}");
    hosts(&dir, &registry.host, &format!("{server}ca = \"{certificate}\"\n"));
    let id = pull(&images, &registry.reference(), None).unwrap();
    images.remove(&id).unwrap();
    let place = dir.path().join(format!("certs.d/{}_", registry.host.replace(':', "_")));
    fs::remove_file(place.join("hosts.toml")).unwrap();
    fs::copy(&certificate, place.join("ca.crt")).unwrap();
    assert_eq!(pull(&images, &registry.reference(), None).unwrap(), id);
}

#[test]
fn a_registry_that_wants_a_password() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Authority::new(dir.path());
    let (key, certificate) = pki.issue("server");
    let passwords = dir.path().join("htpasswd");
    // "secret", as bcrypt has it.
    fs::write(&passwords, "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n").unwrap();
    let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}", passwords.display());
    let registry = Registry::start(&storage(dir.path()), &format!("  tls: {{certificate: {certificate}, key: {key}}}"), &auth);
    hosts(&dir, &registry.host, &format!("server = \"https://{}\"\nca = \"{}\"\n", registry.host, pki.file("ca.crt")));
    let images = store(&dir, "root", |_| {});
    let e = pull(&images, &registry.reference(), None).unwrap_err();
    assert!(e.code() == Code::PermissionDenied && e.message().contains("without credentials"), "{e}");
    let e = pull(&images, &registry.reference(), login("wrong")).unwrap_err();
    assert!(e.code() == Code::PermissionDenied && !e.message().contains("wrong"), "{e}");
    pull(&images, &registry.reference(), login("secret")).unwrap();
    // The node's own credentials, of Docker's file by way of a program, and of the configuration.
    let program = dir.path().join("config.json");
    fs::write(&program, format!(r#"{{"auths": {{"{}": {{"auth": "bWU6c2VjcmV0"}}}}}}"#, registry.host)).unwrap();
    let docker = store(&dir, "docker", |settings| settings.registry.credentials.docker_config = Some(program));
    pull(&docker, &registry.reference(), None).unwrap();
    let node = store(&dir, "node", |settings| {
        settings.registry.credentials.hosts.insert(registry.host.clone(), login("secret").unwrap());
    });
    pull(&node, &registry.reference(), None).unwrap();
}

/// Signs tokens for whoever knows the password or the refresh token.
struct TokenServer {
    host: String,
    /// Heads and bodies of what was asked.
    seen: Arc<Mutex<Vec<String>>>,
}

impl TokenServer {
    fn start(pki: &Authority) -> TokenServer {
        let (key, certificate) = pki.issue("tokens");
        let chain: Vec<_> = CertificateDer::pem_file_iter(&certificate).unwrap().map(|c| c.unwrap()).collect();
        let signer = Arc::new(Signer { key: key.clone(), certificate: STANDARD.encode(&chain[0]), dir: pki.dir.clone() });
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_no_client_auth().with_single_cert(chain, PrivateKeyDer::from_pem_file(&key).unwrap()).unwrap();
        let (config, seen) = (Arc::new(config), Arc::new(Mutex::new(Vec::new())));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let log = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, signer, log) = (config.clone(), signer.clone(), log.clone());
                std::thread::spawn(move || {
                    let connection = rustls::ServerConnection::new(config).unwrap();
                    answer(rustls::StreamOwned::new(connection, stream), &signer, &log);
                });
            }
        });
        TokenServer { host, seen }
    }
}

fn answer(mut stream: impl Read + Write, signer: &Signer, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(&mut stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let asked = format!("{head}{}", String::from_utf8_lossy(&body));
    log.lock().unwrap().push(asked.clone());
    let known = asked.contains(&STANDARD.encode("me:secret")) || asked.contains("refresh_token=idt");
    let scope = asked.contains("repository%3Atest%2Fbox%3Apull") && asked.contains("test-service");
    let (status, body) = match known && scope {
        true => (200, format!(r#"{{"token": "{}", "expires_in": 300}}"#, signer.token())),
        false => (401, r#"{"errors": [{"code": "UNAUTHORIZED", "message": "who are you"}]}"#.to_owned()),
    };
    let text = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).ok()?;
    stream.flush().ok()
}

struct Signer {
    key: String,
    certificate: String,
    dir: PathBuf,
}

impl Signer {
    /// A JWT as docker-registry takes it: RS256, with the certificate in its header.
    fn token(&self) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [self.certificate]});
        let claims = serde_json::json!({
            "iss": "test-issuer", "sub": "me", "aud": "test-service", "exp": now + 300, "nbf": now - 10, "iat": now - 10, "jti": "1",
            "access": [{"type": "repository", "name": "test/box", "actions": ["pull"]}],
        });
        let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!("{}.{}", part(header), part(claims));
        let file = tempfile::NamedTempFile::new_in(&self.dir).unwrap();
        fs::write(file.path(), &text).unwrap();
        let signature = tempfile::NamedTempFile::new_in(&self.dir).unwrap();
        let (input, output) = (file.path().display().to_string(), signature.path().display().to_string());
        tool("openssl", &["dgst", "-sha256", "-sign", &self.key, "-out", &output, &input]);
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(fs::read(signature.path()).unwrap()))
    }
}

#[test]
fn a_registry_with_a_token_server() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Authority::new(dir.path());
    let (key, certificate) = pki.issue("server");
    let tokens = TokenServer::start(&pki);
    let ca = pki.file("ca.crt");
    let auth = format!(
        "auth: {{token: {{realm: \"https://{}/token\", service: test-service, issuer: test-issuer, rootcertbundle: {ca}}}}}",
        tokens.host
    );
    let registry = Registry::start(&storage(dir.path()), &format!("  tls: {{certificate: {certificate}, key: {key}}}"), &auth);
    hosts(&dir, &registry.host, &format!("server = \"https://{}\"\nca = \"{ca}\"\n", registry.host));
    let images = store(&dir, "root", |_| {});
    for auth in [None, login("wrong")] {
        let e = pull(&images, &registry.reference(), auth).unwrap_err();
        assert!(e.code() == Code::PermissionDenied && e.message().contains("who are you"), "{e}");
    }
    let id = pull(&images, &registry.reference(), login("secret")).unwrap();
    images.remove(&id).unwrap();
    let asked = tokens.seen.lock().unwrap().len();
    pull(&images, &registry.reference(), login("secret")).unwrap();
    assert_eq!(tokens.seen.lock().unwrap().len(), asked, "a token that is still good is used again");
    images.remove(&id).unwrap();
    pull(&images, &registry.reference(), Some(Auth { identity_token: "idt".into(), ..Auth::default() })).unwrap();
    assert!(tokens.seen.lock().unwrap().iter().any(|asked| asked.starts_with("POST ") && asked.contains("grant_type=refresh_token")));
}

/// Lets connections to `target` pass, and cuts the first one that brings more than `limit` bytes.
fn cutting(target: String, limit: u64) -> (String, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, cut) = (listener.local_addr().unwrap().to_string(), Arc::new(AtomicBool::new(false)));
    let done = cut.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = TcpStream::connect(&target).unwrap();
            let (mut up, mut down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut up, &mut down));
            let (done, mut client) = (done.clone(), client);
            std::thread::spawn(move || {
                let brought = std::io::copy(&mut (&server).take(limit), &mut client).unwrap_or(0);
                if brought == limit && !done.swap(true, Ordering::SeqCst) {
                    let _ = client.shutdown(std::net::Shutdown::Both);
                    return;
                }
                let _ = std::io::copy(&mut &server, &mut client);
            });
        }
    });
    (address, cut)
}

#[test]
fn a_real_registry_goes_on_in_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(&storage(dir.path()), "", "");
    let (address, cut) = cutting(registry.host.clone(), 300_000);
    let images = store(&dir, "root", |settings| settings.registry.plain_http = vec![address.clone()]);
    pull(&images, &format!("{address}/test/box:1"), None).unwrap();
    assert!(cut.load(Ordering::SeqCst), "nothing was cut");
}

/// A proxy that leads every tunnel to `target`, whatever was asked; the heads of what was asked.
fn proxy(target: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, heads) = (listener.local_addr().unwrap().to_string(), Arc::new(Mutex::new(Vec::new())));
    let log = heads.clone();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let (target, log) = (target.clone(), log.clone());
            std::thread::spawn(move || {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && client.read_exact(&mut byte).is_ok() {
                    head.push(byte[0]);
                }
                log.lock().unwrap().push(String::from_utf8_lossy(&head).into_owned());
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
                let mut server = TcpStream::connect(target).unwrap();
                let (mut up, mut down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut up, &mut down));
                let _ = std::io::copy(&mut server, &mut client);
            });
        }
    });
    (address, heads)
}

#[test]
fn tls_through_a_proxy() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Authority::new(dir.path());
    let (key, certificate) = pki.issue("server");
    let registry = Registry::start(&storage(dir.path()), &format!("  tls: {{certificate: {certificate}, key: {key}}}"), "");
    let (address, heads) = proxy(registry.host.clone());
    hosts(&dir, "registry.test:443", &format!("ca = \"{}\"\n", pki.file("ca.crt")));
    // The name is the proxy's to find: here is no server that knows it.
    let images = store(&dir, "root", |settings| settings.registry.proxies = Proxies::new(&format!("http://{address}"), "", ""));
    pull(&images, "registry.test:443/test/box:1", None).unwrap();
    let heads = heads.lock().unwrap();
    assert!(!heads.is_empty() && heads.iter().all(|head| head.starts_with("CONNECT registry.test:443 ")), "{heads:?}");
}
