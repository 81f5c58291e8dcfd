//! hosts.toml at work: mirrors in order, what they get, and what happens when they fail.

use std::time::Duration;

use super::tests::layer_tar;
use super::tests_fake::{content, large_layer, login, site, site_with, Fake, Reply, BASIC};
use super::*;
use crate::error::Code;

#[test]
fn mirrors_in_order_and_the_registry_last() {
    let c = content(&[layer_tar("a")]);
    let (first, second, registry) = (Fake::start(|_| None), Fake::honest(&c.answers), Fake::honest(&c.answers));
    let site = site(&[&registry]);
    // z before a: the order of the file counts, not that of the names.
    site.hosts(&registry.address, &format!("[host.\"http://{}\"]\n[host.\"http://{}\"]\n", first.address, second.address));
    site.pull(&registry, ":v1", None).unwrap();
    assert!(first.count("manifests") == 1 && second.count("blobs") == 2 && registry.seen.lock().unwrap().is_empty());
    let space = format!("ns={}", registry.address.replace(':', "%3A"));
    assert!(first.seen.lock().unwrap().iter().chain(second.seen.lock().unwrap().iter()).all(|r| r.target.ends_with(&space)));
    // Read anew for each pull: now there is one that nobody listens on.
    site.images.remove(&c.id).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    site.hosts(&registry.address, &format!("[host.\"http://127.0.0.1:{port}\"]\n"));
    site.pull(&registry, ":v1", None).unwrap();
    assert!(registry.count("blobs") == 2 && registry.count("ns=") == 0);
}

#[test]
fn capabilities() {
    let c = content(&[layer_tar("a")]);
    let (mirror, registry) = (Fake::honest(&c.answers), Fake::honest(&c.answers));
    let site = site(&[&registry]);
    site.hosts(&registry.address, &format!("[host.\"http://{}\"]\ncapabilities = [\"pull\"]", mirror.address));
    site.pull(&registry, ":v1", None).unwrap();
    assert_eq!((mirror.count("manifests"), mirror.count("blobs")), (0, 2));
    assert_eq!((registry.count("manifests"), registry.count("blobs")), (1, 0));
    site.pull(&registry, &format!("@{}", c.digest), None).unwrap();
    assert_eq!(mirror.count("manifests"), 1);
    site.hosts(&registry.address, &format!("server = \"http://{}\"\ncapabilities = [\"push\"]", registry.address));
    let e = site.pull(&registry, ":v1", None).unwrap_err();
    assert!(e.code() == Code::FailedPrecondition && e.message().contains("leaves no host"), "{e}");
}

#[test]
fn the_next_one_goes_on_in_the_middle_of_a_layer() {
    let c = content(&[large_layer(300_000)]);
    let (answers, blob) = (c.answers.clone(), c.blobs[0].clone());
    let seen = std::sync::atomic::AtomicBool::new(false);
    let mirror = Fake::start(move |r| {
        let reply = answers.get(r.path())?.clone();
        if r.path() != blob {
            return Some(reply);
        }
        // Half a layer, and then it is gone for good.
        match seen.swap(true, std::sync::atomic::Ordering::SeqCst) {
            false => Some(Reply { cut: 150_000, ..reply }),
            true => Some(Reply::new(503, "{}")),
        }
    });
    let registry = Fake::honest(&c.answers);
    let site = site(&[&registry]);
    site.hosts(&registry.address, &format!("[host.\"http://{}\"]", mirror.address));
    assert_eq!(site.pull(&registry, ":v1", None).unwrap().id, c.id);
    assert_eq!(registry.requests(&c.blobs[0])[0].offset(), Some(150_000));
}

#[test]
fn mirrors_get_what_is_theirs_alone() {
    let c = content(&[layer_tar("a")]);
    let challenge = || Some(Reply::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\""));
    let mirror = Fake::start(move |_| challenge());
    let answers = c.answers.clone();
    let registry = Fake::start(move |r| if r.authorization() == Some(BASIC) { answers.get(r.path()).cloned() } else { challenge() });
    let text = |address: &str| format!("[host.\"http://{address}\"]\n[host.\"http://{address}\".header]\nX-Key = \"k1\"\n");
    let site = site(&[&registry]);
    site.hosts(&registry.address, &text(&mirror.address));
    site.pull(&registry, ":v1", login()).unwrap();
    let e = site.pull(&registry, ":absent", login()).unwrap_err();
    assert!(e.message().contains("without credentials") && e.message().contains("belong into images.auth"), "{e}");
    assert!(mirror.seen.lock().unwrap().iter().all(|r| r.authorization().is_none() && r.header("x-key") == Some("k1")));
    assert!(registry.seen.lock().unwrap().iter().all(|r| r.header("x-key").is_none()));
    // Credentials that the node's configuration has for it are its own, and the registry's are another's.
    let other = site_with(&[&registry], |_, settings| {
        let auth = Auth { username: "mirror".into(), password: "p".into(), ..Auth::default() };
        settings.credentials.hosts.insert(mirror.address.clone(), auth);
        settings.credentials.hosts.insert(registry.address.clone(), login().unwrap());
    });
    other.hosts(&registry.address, &text(&mirror.address));
    other.pull(&registry, ":v1", None).unwrap();
    let sent: Vec<_> = mirror.seen.lock().unwrap().iter().filter_map(|r| r.authorization().map(str::to_owned)).collect();
    assert!(!sent.is_empty() && sent.iter().all(|a| a == "Basic bWlycm9yOnA="), "{sent:?}");
    // And Docker's.
    let docker = site_with(&[&registry], |dir, settings| {
        let path = dir.join("config.json");
        std::fs::write(&path, format!(r#"{{"auths": {{"http://{}/v2/": {{"auth": "bWU6c2VjcmV0"}}}}}}"#, registry.address)).unwrap();
        settings.credentials.docker_config = Some(path);
    });
    docker.pull(&registry, ":v1", None).unwrap();
}

#[test]
fn a_broken_file_fails_the_pull() {
    let c = content(&[layer_tar("a")]);
    let registry = Fake::honest(&c.answers);
    let site = site(&[&registry]);
    site.hosts(&registry.address, "server = \"http://a\"\nskip_verify = 1\n");
    let e = site.pull(&registry, ":v1", None).unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition);
    assert!(e.message().contains("hosts.toml: line 2: skip_verify: expected true or false"), "{e}");
    site.hosts(&registry.address, "ca = \"absent.pem\"\n");
    let e = site.pull(&registry, ":v1", None).unwrap_err();
    assert!(e.message().contains("absent.pem"), "{e}");
    assert!(registry.seen.lock().unwrap().is_empty());
}

#[test]
fn the_error_tells_of_all_hosts() {
    let (mirror, registry) = (Fake::start(|_| Some(Reply::new(403, "{}"))), Fake::start(|_| None));
    let site = site(&[&registry]);
    site.hosts(&registry.address, &format!("[host.\"http://{}/proxy/x\"]\noverride_path = true\ndial_timeout = \"3s\"", mirror.address));
    let e = site.pull(&registry, ":v1", None).unwrap_err();
    assert_eq!(e.code(), Code::NotFound, "the registry's own answer counts");
    assert!(e.message().contains("answered 404") && e.message().contains(&format!("; before that {}: ", mirror.address)), "{e}");
    assert!(e.message().contains("403"), "{e}");
    assert_eq!(mirror.count("/proxy/x/a/b/manifests/v1"), 1);
}

#[test]
fn a_wrong_manifest_of_a_mirror_is_passed_over() {
    let c = content(&[layer_tar("a")]);
    let registry = Fake::honest(&c.answers);
    let mirror = Fake::start(|_| Some(Reply::new(200, "{\"schemaVersion\":2}")));
    let site = site_with(&[&registry], |_, settings| settings.stall = Duration::from_secs(2));
    site.hosts("_default", &format!("[host.\"http://{}\"]", mirror.address));
    let image = site.pull(&registry, &format!("@{}", c.digest), None).unwrap();
    assert_eq!(image.id, c.id);
    assert!(mirror.count("manifests") == 1 && mirror.count("blobs") == 2, "{:?}", mirror.seen);
}

#[test]
fn wrong_bytes_of_a_mirror_are_fetched_from_the_registry() {
    let c = content(&[layer_tar("a"), layer_tar("b")]);
    let (answers, blob) = (c.answers.clone(), c.blobs[1].clone());
    let mirror = Fake::start(move |r| {
        let mut reply = answers.get(r.path())?.clone();
        if r.path() == blob {
            reply.body[12] ^= 1;
        }
        Some(reply)
    });
    let registry = Fake::honest(&c.answers);
    let site = site(&[&registry]);
    site.hosts(&registry.address, &format!("[host.\"http://{}\"]", mirror.address));
    assert_eq!(site.pull(&registry, ":v1", None).unwrap().id, c.id);
    assert_eq!(registry.count(&c.blobs[1]), 1);
    // Where the registry is wrong too, its error is told.
    let wrong = Fake::start(|_| Some(Reply::new(200, r#"{"schemaVersion":1,"fsLayers":[]}"#)));
    site.hosts(&wrong.address, &format!("server = \"http://{}\"\n[host.\"http://{}\"]", wrong.address, wrong.address));
    assert!(site.pull(&wrong, ":v1", None).unwrap_err().message().contains("schema 1"));
}
