//! Pulls from a small registry in this process: authentication, damage, redirects, sharing.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::tests::layer_tar;
use super::tests_fake::{bearer, content, login, site, site_with, Fake, Gate, Reply, BASIC};
use super::*;
use crate::error::Code;

#[test]
fn by_tag_and_digest() {
    let c = content(&[layer_tar("a"), layer_tar("b"), layer_tar("c"), layer_tar("d")]);
    let answers = c.answers.clone();
    let fake = Fake::start(move |r| answers.get(&r.target).cloned());
    let site = site(&[&fake]);
    let image = site.pull(&fake, &format!("@{}", c.digest), None).unwrap();
    assert_eq!((image.id.as_str(), image.repo_tags.len()), (c.id.as_str(), 0));
    assert_eq!(image.repo_digests, [format!("{}/a/b@{}", fake.address, c.digest)]);
    let events = Arc::new(Mutex::new(Vec::new()));
    let (sink, name) = (events.clone(), format!("{}/a/b:v1", fake.address));
    let image =
        site.images.pull(&name, None, &Cancel::never(), Some(Arc::new(move |p: &Progress| sink.lock().unwrap().push(p.clone())))).unwrap();
    assert_eq!(image.repo_tags, [name]);
    assert_eq!(image.repo_digests.len(), 1);
    assert!(events.lock().unwrap().iter().filter(|p| p.done == p.total).count() >= 4);
    assert!(c.blobs.iter().all(|b| fake.count(b) == 1), "layers that are here are not fetched again");
    assert_eq!(site.images.list().len(), 1);
    let e = site.pull(&fake, ":absent", None).unwrap_err();
    assert_eq!(e.code(), Code::NotFound, "{e}");
}

#[test]
fn registries_by_ipv6_address() {
    let c = content(&[layer_tar("a")]);
    let fake = Fake::honest(&c.answers);
    // Mapped, so that hosts without IPv6 on loopback have it too.
    let host = format!("[::ffff:127.0.0.1]:{}", fake.address.rsplit(':').next().unwrap());
    let site = site(&[]);
    site.hosts(&format!("{}_", host.replace("]:", "]_")), &format!("server = \"http://{host}\""));
    let image = site.images.pull(&format!("{host}/a/b:v1"), None, &Cancel::never(), None).unwrap();
    assert_eq!(image.repo_tags, [format!("{host}/a/b:v1")]);
    assert!(fake.seen.lock().unwrap().iter().all(|r| r.header("host") == Some(host.as_str())));
}

#[test]
fn basic_authentication() {
    let answers = content(&[layer_tar("a")]).answers;
    let fake = Fake::start(move |r| {
        if r.authorization() != Some(BASIC) {
            return Some(Reply::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\""));
        }
        answers.get(&r.target).cloned()
    });
    let site = site(&[&fake]);
    let e = site.pull(&fake, ":v1", None).unwrap_err();
    assert!(e.code() == Code::PermissionDenied && e.message().contains("without credentials"), "{e}");
    let wrong = Some(Auth { username: "me".into(), password: "other".into(), ..Auth::default() });
    let e = site.pull(&fake, ":v1", wrong).unwrap_err();
    assert!(e.code() == Code::PermissionDenied && !e.message().contains("other"), "{e}");
    let elsewhere = login().map(|a| Auth { server_address: "q.io".into(), ..a });
    assert!(site.pull(&fake, ":v1", elsewhere).is_err());
    site.pull(&fake, ":v1", Some(Auth { auth: "bWU6c2VjcmV0".into(), ..Auth::default() })).unwrap();
    site.pull(&fake, ":v1", login()).unwrap();
}

#[test]
fn bearer_tokens() {
    let (registry, tokens) = bearer("Bearer t1", |r| match r.authorization() {
        Some(BASIC) => Reply::new(200, r#"{"token":"t1"}"#),
        _ => Reply::new(200, r#"{"access_token":"anonymous"}"#),
    });
    let site = site(&[&registry]);
    site.pull(&registry, ":v1", login()).unwrap();
    let asked = tokens.seen.lock().unwrap()[0].clone();
    assert!(asked.target.contains("service=reg") && asked.target.contains("scope=repository"), "{asked:?}");
    assert!(registry.seen.lock().unwrap().iter().all(|r| r.authorization() != Some(BASIC)), "the password is for the realm");
    assert!(site.pull(&registry, ":v1", None).is_err());
    site.pull(&registry, ":v1", Some(Auth { registry_token: "t1".into(), ..Auth::default() })).unwrap();
}

#[test]
fn identity_tokens_are_exchanged() {
    let (registry, tokens) = bearer("Bearer t2", |r| {
        let good = r.method == "POST" && r.body.contains("refresh_token=idt") && r.body.contains("grant_type=refresh_token");
        Reply::new(if good { 200 } else { 400 }, r#"{"access_token":"t2"}"#)
    });
    let site = site(&[&registry]);
    site.pull(&registry, ":v1", Some(Auth { identity_token: "idt".into(), ..Auth::default() })).unwrap();
    assert!(tokens.count("token") > 0 && registry.seen.lock().unwrap().iter().all(|r| !format!("{r:?}").contains("idt")));
}

#[test]
fn identity_tokens_are_passwords_where_there_is_no_oauth() {
    for code in [400, 401, 404, 405] {
        let (registry, tokens) = bearer("Bearer t3", move |r| match (r.method.as_str(), r.authorization()) {
            ("GET", Some(login)) if login == crate::image::auth::basic("me", "idt") => Reply::new(200, r#"{"token":"t3"}"#),
            ("POST", _) => Reply::new(code, "{}"),
            _ => Reply::new(403, "{}"),
        });
        let auth = Auth { username: "me".into(), identity_token: "idt".into(), ..Auth::default() };
        site(&[&registry]).pull(&registry, ":v1", Some(auth)).unwrap_or_else(|e| panic!("{code}: {e}"));
        assert!(tokens.count("token") > 1, "{code}");
    }
}

#[test]
fn redirects_do_not_carry_credentials() {
    let c = content(&[layer_tar("a")]);
    let (answers, blob) = (c.answers.clone(), c.blobs[0].clone());
    let elsewhere = Fake::start(move |r| r.target.strip_prefix("/cdn").and_then(|t| answers.get(t).cloned()));
    let (answers, cdn) = (c.answers, elsewhere.address.clone());
    let fake = Fake::start(move |r| {
        if r.authorization() != Some(BASIC) {
            return Some(Reply::new(401, "{}").header("WWW-Authenticate", "Basic"));
        }
        match r.target == blob {
            true => Some(Reply::new(307, "").header("Location", format!("http://{cdn}/cdn{}", r.target))),
            false => answers.get(&r.target).cloned(),
        }
    });
    let site = site(&[&fake]);
    site.pull(&fake, ":v1", login()).unwrap();
    let seen = elsewhere.seen.lock().unwrap();
    assert!(!seen.is_empty() && seen.iter().all(|r| r.authorization().is_none()), "{seen:?}");
}

#[test]
fn redirect_loops_end() {
    let fake = Fake::start(|r| Some(Reply::new(302, "").header("Location", r.target.clone())));
    let e = site(&[&fake]).pull(&fake, ":v1", None).unwrap_err();
    assert!(e.message().contains("redirects"), "{e}");
}

#[test]
fn damaged_answers_commit_nothing() {
    let c = content(&[layer_tar("a")]);
    let damage = |change: fn(&mut Reply)| {
        let (mut answers, blob) = (c.answers.clone(), c.blobs[0].clone());
        change(answers.get_mut(&blob).unwrap());
        let fake = Fake::start(move |r| answers.get(&r.target).cloned());
        let site = site(&[&fake]);
        let e = site.pull(&fake, ":v1", None).unwrap_err();
        assert!(site.images.list().is_empty() && site.layers() == 0);
        e
    };
    let e = damage(|r| {
        let middle = r.body.len() / 2;
        r.body[middle] ^= 1;
    });
    assert!(e.code() == Code::FailedPrecondition && e.message().contains("received sha256"), "{e}");
    let e = damage(|r| r.cut = 20);
    assert!(e.code() == Code::Unknown && e.message().starts_with("RegistryUnavailable"), "{e}");
    let e = damage(|r| r.body.push(0));
    assert!(e.message().contains("the manifest says"), "{e}");
    let e = damage(|r| r.status = 503);
    assert!(e.code() == Code::Unknown && e.message().starts_with("RegistryUnavailable"), "{e}");
    let e = damage(|r| r.status = 404);
    assert_eq!(e.code(), Code::NotFound, "{e}");
}

#[test]
fn wrong_and_giant_manifests() {
    let c = content(&[layer_tar("a")]);
    let other = format!("/v2/a/b/manifests/{}", Digest::of(b"other"));
    let reply = c.answers["/v2/a/b/manifests/v1"].clone();
    let fake = Fake::start(move |r| match r.target.as_str() {
        t if t == other => Some(reply.clone()),
        t if t.ends_with("big") => Some(Reply::new(200, vec![b' '; 9 << 20])),
        t if t.ends_with("v1") => Some(Reply::new(200, r#"{"schemaVersion":1,"fsLayers":[]}"#)),
        _ => None,
    });
    let site = site(&[&fake]);
    assert!(site.pull(&fake, &format!("@{}", Digest::of(b"other")), None).unwrap_err().message().contains("received"));
    let e = site.pull(&fake, ":big", None).unwrap_err();
    assert!(e.message().contains("more than the 8388608 bytes"), "{e}");
    assert!(site.pull(&fake, ":v1", None).unwrap_err().message().contains("schema 1"));
}

#[test]
fn an_absent_registry_is_unavailable() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for name in [format!("127.0.0.1:{port}/a"), format!("localhost:{port}/a")] {
        let e = site(&[]).images.pull(&name, None, &Cancel::never(), None).unwrap_err();
        assert!(e.code() == Code::Unknown && e.message().starts_with("RegistryUnavailable"), "{e}");
    }
}

#[test]
fn many_pulls_share_one_fetch() {
    let c = content(&[layer_tar("a"), layer_tar("b"), layer_tar("c")]);
    let (answers, gate) = (c.answers.clone(), Gate::default());
    let held = gate.clone();
    let fake = Arc::new(Fake::start(move |r| {
        if r.target.contains("/blobs/") {
            held.pass();
        }
        answers.get(&r.target).cloned()
    }));
    let site = Arc::new(site(&[&fake]));
    let threads: Vec<_> = (0..8)
        .map(|i| {
            let (site, fake, digest) = (site.clone(), fake.clone(), c.digest.clone());
            // Half by tag, half by digest: two pulls, but each layer once.
            let version = if i % 2 == 0 { ":v1".to_owned() } else { format!("@{digest}") };
            std::thread::spawn(move || site.pull(&fake, &version, None).unwrap().id.clone())
        })
        .collect();
    while site.images.inner.flights.waiters() < 8 && !threads.iter().any(|t| t.is_finished()) {
        std::thread::sleep(Duration::from_millis(5));
    }
    gate.open();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), c.id);
    }
    assert!(c.blobs.iter().all(|b| fake.count(b) == 1));
    assert!(fake.count("manifests") <= 3, "{}", fake.count("manifests"));
    assert_eq!(site.images.list().len(), 1);
}

#[test]
fn a_cancelled_pull_leaves_nothing_half_made() {
    let c = content(&[layer_tar("a"), layer_tar("b")]);
    let (answers, blob, gate) = (c.answers.clone(), c.blobs[1].clone(), Gate::default());
    let held = gate.clone();
    let fake = Fake::start(move |r| {
        if r.target == blob {
            held.pass();
        }
        answers.get(&r.target).cloned()
    });
    let site = site_with(&[&fake], |_, settings| settings.stall = Duration::from_secs(300));
    let cancel = Cancel::never();
    let (other, images, name) = (cancel.clone(), site.images.clone(), format!("{}/a/b:v1", fake.address));
    let thread = std::thread::spawn(move || images.pull(&name, None, &other, None));
    while fake.count(&c.blobs[1]) == 0 && !thread.is_finished() {
        std::thread::sleep(Duration::from_millis(5));
    }
    cancel.set();
    assert_eq!(thread.join().unwrap().unwrap_err().code(), Code::Cancelled);
    // The registry has not answered yet.
    let end = std::time::Instant::now() + Duration::from_secs(20);
    let temp = || {
        std::fs::read_dir(site.dir.path().join("root/layers")).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().contains("tmp"))
    };
    while temp() {
        assert!(std::time::Instant::now() < end);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(site.images.list().is_empty() && site.layers() <= 1, "a finished layer may stay for the next try");
    gate.open();
    site.pull(&fake, ":v1", None).unwrap();
}
