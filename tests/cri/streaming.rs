//! The streaming server: what it refuses, how it is bounded, and exec over SPDY as clients of any age do it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crisp::api::runtime::{AttachRequest, ContainerState, ExecRequest, NamespaceMode, PortForwardRequest};
use crisp::cli::client::SHORT;
use crisp::cli::stream::connect::{spdy as connect_spdy, Trust};
use crisp::cli::stream::forward::Forwarder;
use crisp::streaming::spdy::frame;
use crisp::sys::cancel::Cancel;
use crisp::sys::process::{Output, Program};
use grpcio::RpcStatusCode as Code;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};

use crate::node::{alive, eventually, refused, Answer, Node, Options, PATIENCE};
use crate::spdy::{connect, open, request, split, upgrade, Client, Session, PROTOCOLS};

/// A running container in a node.
fn start(tables: &str) -> (Node, String) {
    let node = Node::with(Options { tables: tables.into(), ..Default::default() });
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    (node, id)
}

/// The URL of an exec of a shell script; `wanted` as in `spdy::open`, t for a terminal.
fn url(node: &Node, id: &str, wanted: &str, script: &str) -> Answer<String> {
    let request = ExecRequest {
        container_id: id.into(),
        cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        stdin: wanted.contains('i'),
        stdout: wanted.contains('o'),
        stderr: wanted.contains('e'),
        tty: wanted.contains('t'),
        ..Default::default()
    };
    node.runtime().exec(&request, SHORT).map(|answer| answer.url)
}

fn exec(node: &Node, id: &str, wanted: &str, script: &str) -> Session<TcpStream> {
    let url = url(node, id, wanted, script).expect("exec");
    open(connect(&url), &split(&url).1, wanted)
}

/// Status and head of a single request.
fn ask(url: &str, method: &str, headers: &str) -> (u16, String) {
    request(&mut connect(url), method, &split(url).1, headers)
}

/// Threads of this process that serve sessions.
fn session_threads() -> usize {
    let names = fs::read_dir("/proc/self/task").expect("list threads").flatten();
    names.filter(|t| fs::read_to_string(t.path().join("comm")).is_ok_and(|n| n.starts_with("stream-"))).count()
}

#[test]
fn calls_refuse_what_cannot_be() {
    let (node, id) = start("");
    refused(url(&node, &id, "oet", "true"), Code::INVALID_ARGUMENT, "tty");
    refused(url(&node, &id, "", "true"), Code::INVALID_ARGUMENT, "stdin");
    refused(url(&node, "nothing", "o", "true"), Code::NOT_FOUND, "nothing");
    let empty = ExecRequest { container_id: id.clone(), stdout: true, ..Default::default() };
    refused(node.runtime().exec(&empty, SHORT), Code::INVALID_ARGUMENT, "cmd");
    let attach = |tty, stderr| AttachRequest { container_id: id.clone(), tty, stderr, ..Default::default() };
    refused(node.runtime().attach(&attach(true, true), SHORT), Code::INVALID_ARGUMENT, "tty");
    refused(node.runtime().attach(&attach(false, false), SHORT), Code::INVALID_ARGUMENT, "stdin");
    let sandbox = node.sandbox_ids().remove(0);
    let forward = |id: &str, port| PortForwardRequest { pod_sandbox_id: id.into(), port: vec![port], ..Default::default() };
    for port in [0, -1, 65536] {
        refused(node.runtime().port_forward(&forward(&sandbox, port), SHORT), Code::INVALID_ARGUMENT, "port");
    }
    let answer = node.runtime().port_forward(&forward(&sandbox, 80), SHORT).expect("port-forward");
    assert!(answer.url.starts_with("http://127.0.0.1:") && answer.url.contains("/portforward/"), "{}", answer.url);
    node.stop(&id, 0).expect("stop");
    refused(url(&node, &id, "o", "true"), Code::FAILED_PRECONDITION, "EXITED");
    refused(node.runtime().attach(&attach(false, true), SHORT), Code::FAILED_PRECONDITION, "EXITED");
    node.stop_sandbox(&sandbox).expect("stop");
    refused(node.runtime().port_forward(&forward(&sandbox, 80), SHORT), Code::FAILED_PRECONDITION, "not ready");
}

#[test]
fn a_token_is_good_for_one_request() {
    let (node, id) = start("");
    let fresh = || url(&node, &id, "o", "echo done").expect("exec");
    let other = |url: &str, verb: &str| url.replace("/exec/", &format!("/{verb}/"));
    let good = upgrade(PROTOCOLS);
    // Unknown tokens, paths and verbs; the token of another verb is used up.
    let one = fresh();
    assert_eq!(ask(&format!("{}x", &one[..one.len() - 1]), "POST", &good).0, 404);
    assert_eq!(ask(&other(&one, "nothing"), "POST", &good).0, 404);
    assert_eq!(ask(&other(&one, "attach"), "POST", &good).0, 404);
    assert_eq!(ask(&one, "POST", &good).0, 404);
    // Without an upgrade: it was named, so it is used.
    let two = fresh();
    assert_eq!(ask(&two, "PUT", &good).0, 405);
    assert_eq!(ask(&two, "GET", "").0, 400);
    assert_eq!(ask(&two, "GET", &good).0, 404);
    // Nothing in common.
    let (status, head) = ask(&fresh(), "POST", &upgrade("v9.channel.k8s.io"));
    assert_eq!(status, 403, "{head}");
    for version in ["v4.", "v3.", "v2.", ""] {
        assert!(head.contains(&format!("X-Accepted-Stream-Protocol-Versions: {version}channel.k8s.io\r\n")), "{head}");
    }
    // GET and POST; used after.
    for method in ["GET", "POST"] {
        let url = fresh();
        assert_eq!(ask(&url, method, &good).0, 101);
        assert_eq!(ask(&url, method, &good).0, 404);
    }
    let (status, _) = ask(&fresh(), "POST", &format!("{good}Content-Length: 5\r\n"));
    assert_eq!(status, 400);
    let (status, _) = ask(&fresh(), "POST", &format!("{good}Long: {}\r\n", "x".repeat(20000)));
    assert_eq!(status, 431);
}

#[test]
fn output_exit_code_and_half_closed_stdin() {
    let (node, id) = start("");
    let mut session = exec(&node, &id, "ioe", "cat; echo err >&2; exit 7");
    let stdin = session.stdin;
    assert!(session.stderr > 0 && session.resize == 0);
    session.client.send(stdin, b"one ", false);
    session.client.until("the first word", |c| c.streams.values().any(|s| s.bytes == b"one "));
    session.client.send(stdin, b"\0\xfftwo", true);
    let end = session.end();
    assert_eq!((end.stdout.as_slice(), end.stderr.as_slice(), end.code), (&b"one \0\xfftwo"[..], &b"err\n"[..], Some(7)));
    assert_eq!(end.status["reason"], "NonZeroExitCode");
    let end = exec(&node, &id, "o", "exit 0").end();
    assert_eq!(end.status, serde_json::json!({"metadata": {}, "status": "Success"}));
    assert_eq!(exec(&node, &id, "e", "kill -9 $$").end().code, Some(137));
    // Who keeps the output open does not keep the client.
    let end = exec(&node, &id, "o", "sleep 1000 & echo started").end();
    assert_eq!((end.stdout.as_slice(), end.code), (&b"started\n"[..], Some(0)));
}

/// A terminal cannot be half closed: it gets its end-of-file character, also within a line.
#[test]
fn a_terminal_hears_of_the_end_of_stdin() {
    let (node, id) = start("");
    for text in ["word\n", "word"] {
        let mut session = exec(&node, &id, "iotr", "cat; echo; echo end; exit 4");
        let stdin = session.stdin;
        session.client.send(stdin, text.as_bytes(), true);
        let end = session.end();
        let said = String::from_utf8_lossy(&end.stdout).into_owned();
        assert!(said.contains("word") && said.ends_with("end\r\n") && end.code == Some(4), "{said:?} {:?}", end.code);
    }
}

/// A container with stdin that runs `script`.
fn reader(node: &Node, name: &str, script: &str, tty: bool, once: bool) -> String {
    let sandbox = node.sandbox_ids().remove(0);
    let mut config = node.container_config(name, script);
    (config.stdin, config.stdin_once, config.tty) = (true, once, tty);
    let id = node.create(&sandbox, &config).expect("create");
    node.start_container(&id).expect("start");
    id
}

fn attach(node: &Node, id: &str, wanted: &str) -> Session<TcpStream> {
    let request = AttachRequest {
        container_id: id.into(),
        stdin: wanted.contains('i'),
        stdout: wanted.contains('o'),
        tty: wanted.contains('r'),
        ..Default::default()
    };
    let url = node.runtime().attach(&request, SHORT).expect("attach").url;
    open(connect(&url), &split(&url).1, wanted)
}

#[test]
fn an_attach_ends_with_its_input_where_stdin_stays_open() {
    let (node, _) = start("");
    let open = reader(&node, "open", "cat; echo over", false, false);
    for text in ["one\n", "two\n"] {
        let mut session = attach(&node, &open, "io");
        let (stdin, stdout) = (session.stdin, session.stdout);
        session.client.send(stdin, text.as_bytes(), false);
        session.client.until("the echo", |c| c.streams[&stdout].bytes == text.as_bytes());
        session.client.send(stdin, b"", true);
        assert_eq!(session.end().code, Some(0));
        assert_eq!(node.state(&open), ContainerState::CONTAINER_RUNNING);
    }
    // Everything reaches one that reads late, more than the pipes on the way hold.
    let late = reader(&node, "late", "sleep 1; head -c 300000 > /dev/null; exit 5", false, false);
    let mut session = attach(&node, &late, "io");
    let stdin = session.stdin;
    (0..30).for_each(|_| session.client.send(stdin, &[b'x'; 10_000], false));
    session.client.send(stdin, b"", true);
    assert_eq!(session.end().code, Some(0));
    assert_eq!(node.wait_exit(&late).exit_code, 5);
    // With stdin_once the end is the container's, and the session sees it out.
    let once = reader(&node, "once", "cat; echo over; exit 3", false, true);
    let mut session = attach(&node, &once, "io");
    let stdin = session.stdin;
    session.client.send(stdin, b"all\n", true);
    let end = session.end();
    assert_eq!((end.stdout.as_slice(), end.code), (&b"all\nover\n"[..], Some(0)));
    assert_eq!(node.wait_exit(&once).exit_code, 3);
}

/// A network that drops the connection ends no shell; a client that says so does.
#[test]
fn a_terminal_attached_once_outlives_a_lost_connection() {
    let (node, _) = start("");
    let id = reader(&node, "shell", "while read line; do echo \"got $line\"; done; exit 6", true, true);
    let mut session = attach(&node, &id, "ior");
    let (stdin, stdout) = (session.stdin, session.stdout);
    session.client.send(stdin, b"one\n", false);
    session.client.until("an answer", |c| String::from_utf8_lossy(&c.streams[&stdout].bytes).contains("got one"));
    drop(session);
    let mut session = attach(&node, &id, "ior");
    let (stdin, stdout) = (session.stdin, session.stdout);
    session.client.send(stdin, b"two\n", false);
    session.client.until("an answer", |c| String::from_utf8_lossy(&c.streams[&stdout].bytes).contains("got two"));
    session.client.send(stdin, b"", true);
    assert_eq!(session.end().code, Some(0));
    assert_eq!(node.wait_exit(&id).exit_code, 6);
}

#[test]
fn the_first_protocol_says_errors_in_words() {
    let (node, id) = start("");
    for (protocols, script, words) in [("", "exit 3", "exit code 3"), ("v2.channel.k8s.io", "exit 4", "exit code 4"), ("", "true", "")] {
        let url = url(&node, &id, "o", script).expect("exec");
        let mut socket = connect(&url);
        let (status, head) = request(&mut socket, "POST", &split(&url).1, &upgrade(protocols));
        assert_eq!((status, head.contains("X-Stream-Protocol-Version")), (101, !protocols.is_empty()), "{head}");
        let mut client = Client::new(socket);
        let (error, stdout) = (client.stream("error"), client.stream("stdout"));
        client.until("the end", |c| c.streams[&error].finished && c.streams[&stdout].finished);
        let said = String::from_utf8_lossy(&client.streams[&error].bytes).into_owned();
        assert!(said.ends_with(words) && said.is_empty() == words.is_empty(), "{said:?}");
    }
}

#[test]
fn sessions_are_bounded() {
    let (node, id) = start("[streaming]\nsessions = 1\n");
    let first = exec(&node, &id, "i", "cat");
    let url = url(&node, &id, "o", "echo done").expect("exec");
    let (status, head) = ask(&url, "POST", &upgrade(PROTOCOLS));
    assert!(status == 429 && head.contains("Retry-After: "), "{head}");
    drop(first);
    // The refusals have not used the token.
    let socket = eventually("the first session ends", || {
        let mut socket = connect(&url);
        (request(&mut socket, "POST", &split(&url).1, &upgrade(PROTOCOLS)).0 == 101).then_some(socket)
    });
    let mut client = Client::new(socket);
    let (error, stdout) = (client.stream("error"), client.stream("stdout"));
    client.until("the end", |c| c.streams[&error].finished);
    assert_eq!(client.streams[&stdout].bytes, b"done\n");
}

#[test]
fn slow_heads_cost_no_threads_and_no_sessions() {
    let (node, id) = start("[streaming]\nsessions = 1\n");
    let address = url(&node, &id, "o", "true").expect("exec");
    let mut slow: Vec<TcpStream> = Vec::new();
    for _ in 0..300 {
        let mut socket = connect(&address);
        socket.write_all(b"POST /exec/").expect("send");
        slow.push(socket);
    }
    // Those of tests beside this one.
    assert!(session_threads() < 50);
    assert_eq!(exec(&node, &id, "o", "echo done").end().stdout, b"done\n");
    // For each one over the limit the oldest went.
    let mut byte = [0];
    assert!(matches!(slow[0].read(&mut byte), Ok(0) | Err(_)));
    let newest = slow.last_mut().expect("one");
    newest.set_read_timeout(Some(Duration::from_millis(100))).expect("set a timeout");
    assert!(newest.read(&mut byte).is_err_and(|e| e.kind() == ErrorKind::WouldBlock));
}

#[test]
fn an_idle_session_ends() {
    let (node, id) = start("[streaming]\nidle_timeout_seconds = 4\n");
    let end = exec(&node, &id, "o", "sleep 1000").end();
    assert_eq!(end.code, None);
    assert!(end.status["message"].as_str().is_some_and(|m| m.contains("nothing moved for 4 s")), "{}", end.status);
    // One on which something moves does not, though it lasts longer; a busy machine may stretch each of its steps.
    let end = exec(&node, &id, "o", "n=10; while [ $n -lt 26 ]; do echo $n; n=$((n+1)); sleep 0.3; done").end();
    assert_eq!((end.stdout.len(), end.code), (3 * 16, Some(0)));
}

#[test]
fn the_daemon_stops_with_words() {
    let (mut node, id) = start("");
    let mut session = exec(&node, &id, "oi", "echo $$; sleep 1000");
    let stdout = session.stdout;
    session.client.until("a pid", |c| c.streams[&stdout].bytes.ends_with(b"\n"));
    let pid: i32 = session.said().trim().parse().expect("a pid");
    let begin = Instant::now();
    node.stop_daemon();
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    let end = session.end();
    assert!(end.status["message"].as_str().is_some_and(|m| m.contains("the runtime is stopping")), "{}", end.status);
    assert!(alive(pid));
    node.start_daemon();
}

#[test]
fn the_clients_windows_are_kept() {
    let (node, id) = start("");
    let url = url(&node, &id, "o", "head -c 100000 /dev/zero").expect("exec");
    let mut socket = connect(&url);
    assert_eq!(request(&mut socket, "POST", &split(&url).1, &upgrade(PROTOCOLS)).0, 101);
    let mut client = Client::new(socket);
    client.socket.write_all(&frame::settings(1000)).expect("send");
    let (error, stdout) = (client.stream("error"), client.stream("stdout"));
    for round in 1..5 {
        client.until("a window full", |c| c.streams[&stdout].count >= 1000 * round);
        client.socket.set_read_timeout(Some(Duration::from_millis(200))).expect("set a timeout");
        assert!(client.socket.read(&mut [0]).is_err_and(|e| e.kind() == ErrorKind::WouldBlock), "more than the window");
        client.socket.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
        assert_eq!(client.streams[&stdout].count, 1000 * round);
        client.socket.write_all(&frame::window_update(stdout, 1000)).expect("send");
    }
    client.socket.write_all(&frame::window_update(stdout, 1 << 20)).expect("send");
    client.until("the end", |c| c.streams[&stdout].finished);
    assert_eq!(client.streams[&stdout].count, 100000);
    // The last word has a window too: 1000 bytes are enough for it.
    client.until("the end", |c| c.streams[&error].finished);
}

#[test]
fn a_command_that_does_not_read_makes_the_client_wait() {
    let (node, id) = start("");
    let gate = node.path("gate");
    let script = format!("while [ ! -f {} ]; do sleep 0.02; done; exec wc -c > /dev/null", gate.display());
    let mut session = exec(&node, &id, "i", &script);
    let (stdin, chunk) = (session.stdin, vec![7; 1 << 20]);
    session.client.socket.set_write_timeout(Some(Duration::from_millis(300))).expect("set a timeout");
    session.client.socket.write_all(&frame::data_head(stdin, frame::DATA_LIMIT, false)).expect("send");
    let mut sent = 0;
    while sent < frame::DATA_LIMIT {
        match session.client.socket.write(&chunk[..chunk.len().min(frame::DATA_LIMIT - sent)]) {
            Ok(n) => sent += n,
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    assert!(sent < frame::DATA_LIMIT, "all of it was buffered");
    // It goes on once the command reads, and the windows open.
    fs::write(&gate, "").expect("open the gate");
    session.client.socket.set_write_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
    while sent < frame::DATA_LIMIT {
        let n = chunk.len().min(frame::DATA_LIMIT - sent);
        session.client.socket.write_all(&chunk[..n]).expect("send");
        sent += n;
    }
    session.client.send(stdin, b"", true);
    session.client.until("the windows", |c| c.opened.get(&stdin).is_some_and(|n| *n > frame::DATA_LIMIT / 2) && c.opened.contains_key(&0));
    assert_eq!(session.end().code, Some(0));
}

/// Takes any certificate: which one came is compared afterwards.
#[derive(Debug)]
struct Any(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn tls(url: &str) -> rustls::StreamOwned<rustls::ClientConnection, TcpStream> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Any(provider)))
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("a name");
    rustls::StreamOwned::new(rustls::ClientConnection::new(Arc::new(config), name).expect("a client"), connect(url))
}

#[test]
fn tls_and_a_certificate_that_is_replaced() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls");
    let dir = tempfile::tempdir().expect("make a directory");
    let put = |name: &str, file: &str| {
        let new = dir.path().join("new");
        fs::copy(fixtures.join(name), &new).and_then(|_| fs::rename(&new, dir.path().join(file))).expect("put a file");
    };
    let der = |name: &str| CertificateDer::from_pem_file(fixtures.join(name)).expect("a certificate");
    put("one.crt", "crt");
    put("one.key", "key");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (node, id) = start(&format!("[streaming]\ntls_certificate = {:?}\ntls_key = {:?}\n", path("crt"), path("key")));
    let talk = |expected: &str| {
        let url = url(&node, &id, "io", "cat").expect("exec");
        assert!(url.starts_with("https://127.0.0.1:"), "{url}");
        let mut session = open(tls(&url), &split(&url).1, "io");
        let shown = session.client.socket.conn.peer_certificates().expect("certificates")[0].clone();
        assert_eq!(shown, der(expected), "not {expected}");
        let (stdin, much) = (session.stdin, vec![b'x'; 300_000]);
        // In pieces: nobody reads the echo while we write.
        for piece in much.chunks(30_000) {
            session.client.send(stdin, piece, false);
            let all = session.client.streams[&session.stdout].count + piece.len();
            let stdout = session.stdout;
            session.client.until("the echo", |c| c.streams[&stdout].count == all);
        }
        session.client.send(stdin, b"", true);
        let end = session.end();
        assert_eq!((end.stdout == much, end.code), (true, Some(0)));
    };
    talk("one.crt");
    // Between the two files the old pair stays.
    put("two.crt", "crt");
    talk("one.crt");
    put("two.key", "key");
    talk("two.crt");
    // Plain text is no TLS.
    let url = url(&node, &id, "o", "true").expect("exec");
    let mut plain = connect(&url);
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("send");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

/// Runs our own client.
fn crisp(node: &Node, arguments: &[&str], stdin: &str) -> Output {
    let program = Program::new(env!("CARGO_BIN_EXE_crisp")).arg("--socket").arg(&node.config().socket).args(arguments);
    program.stdin(stdin.into()).run(&Cancel::never(), Duration::from_secs(60)).expect("run crisp")
}

/// Input from a pipe ends, and so does what reads it: without a terminal, whatever the command line says.
#[test]
fn our_own_client_with_an_input_that_ends() {
    let (node, id) = start("");
    let output = crisp(&node, &["exec", "-it", &id, "sh"], "echo word; exit 3\n");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.stdout.as_slice(), output.status.code()), (&b"word\n"[..], Some(3)), "{words}");
    assert!(words.contains("stdin is no terminal"), "{words}");
    let open = reader(&node, "open", "cat", false, false);
    let output = crisp(&node, &["attach", "-i", &open], "word\n");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(node.state(&open), ContainerState::CONTAINER_RUNNING);
}

/// `crisp port-forward`: many connections in one session, over TLS with a self-signed certificate; each end of them is the end it looks
/// like.
#[test]
fn our_own_client_forwards_ports() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls");
    let path = |name: &str| fixtures.join(name).display().to_string();
    let tables = format!("[streaming]\ntls_certificate = {:?}\ntls_key = {:?}\n", path("one.crt"), path("one.key"));
    let node = Node::with(Options { tables, ..Default::default() });
    let mut config = node.sandbox_config("web");
    let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    context.namespace_options.mut_or_insert_default().network = NamespaceMode::NODE.into();
    let sandbox = node.run(&config).expect("run");
    let server = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = server.local_addr().expect("an address").port();
    // Answers at the end of what it is sent.
    std::thread::spawn(move || {
        for socket in server.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut socket, mut all) = (socket, Vec::new());
                socket.read_to_end(&mut all).and_then(|_| socket.write_all(&all))
            });
        }
    });
    let (client, trust) = (node.client().clone(), Trust::new(Some(&path("one.crt"))));
    let mut forwarder = Forwarder::new(move || {
        let request = PortForwardRequest { pod_sandbox_id: sandbox.clone(), ..Default::default() };
        let url = client.runtime().port_forward(&request, SHORT).expect("port-forward").url;
        assert!(url.starts_with("https://"), "{url}");
        connect_spdy(&url, &trust)
    });
    let local = forwarder.listen(&IpAddr::from([127, 0, 0, 1]), 0, port).expect("listen");
    forwarder.start().expect("start");
    // Those that go without waiting for an answer.
    (0..30).for_each(|_| TcpStream::connect(local).and_then(|mut socket| socket.write_all(b"x")).expect("send"));
    let data: Vec<u8> = (0..3_000_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let (mut socket, mut back) = (TcpStream::connect(local).expect("connect"), Vec::new());
                socket.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
                socket.write_all(&data).expect("send");
                socket.shutdown(Shutdown::Write).expect("shut down");
                socket.read_to_end(&mut back).expect("an answer");
                assert!(back == data, "{} bytes", back.len());
            });
        }
    });
}
