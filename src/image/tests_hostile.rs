//! Registries that break, stall, lie, or are after credentials.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::tests::layer_tar;
use super::tests_fake::{bearer, content, content_with, large_layer, login, site, site_with, Fake, Reply, Request, Site, BASIC};
use super::*;
use crate::error::Code;

/// Serves the content; `change` may change the n-th answer (from 0) to a request for the first layer.
fn breaking(c: &super::tests_fake::Content, change: impl Fn(usize, &Request, Reply) -> Reply + Send + Sync + 'static) -> Fake {
    let (answers, blob, count) = (c.answers.clone(), c.blobs[0].clone(), AtomicUsize::new(0));
    Fake::start(move |r| {
        let reply = answers.get(r.path())?.clone();
        if r.path() != blob {
            return Some(reply);
        }
        Some(change(count.fetch_add(1, Ordering::SeqCst), r, reply))
    })
}

fn offsets(fake: &Fake, blob: &str) -> Vec<Option<usize>> {
    fake.requests(blob).iter().map(Request::offset).collect()
}

#[test]
fn a_broken_download_goes_on_where_it_was() {
    let c = content(&[large_layer(300_000)]);
    let fake = breaking(&c, |n, r, reply| match n {
        0 => Reply { cut: 100_000, ..reply },
        1 => Reply { cut: 50_000, ..reply.ranged(r) },
        _ => reply.ranged(r),
    });
    let site = site(&[&fake]);
    assert_eq!(site.pull(&fake, ":v1", None).unwrap().id, c.id);
    assert_eq!(offsets(&fake, &c.blobs[0]), [None, Some(100_000), Some(150_000)]);
}

#[test]
fn a_server_without_ranges_starts_over() {
    let c = content(&[large_layer(300_000)]);
    let fake = breaking(&c, |n, _, reply| if n == 0 { Reply { cut: 100_000, ..reply } } else { reply });
    assert_eq!(site(&[&fake]).pull(&fake, ":v1", None).unwrap().id, c.id);
    assert_eq!(offsets(&fake, &c.blobs[0]), [None, Some(100_000)]);
    // Without a length, the early end shows by the size alone.
    let fake = breaking(&c, |n, r, reply| {
        let reply = Reply { length: false, ..reply };
        if n == 0 {
            Reply { cut: 100_000, ..reply }
        } else {
            reply.ranged(r)
        }
    });
    assert_eq!(site(&[&fake]).pull(&fake, ":v1", None).unwrap().id, c.id);
    assert_eq!(fake.count(&c.blobs[0]), 2);
}

#[test]
fn one_that_never_gets_further_is_given_up() {
    let c = content(&[large_layer(300_000)]);
    for step in [0, 1] {
        let fake = breaking(&c, move |n, r, reply| Reply { cut: if n == 0 { 1000 } else { step }, ..reply.ranged(r) });
        let site = site(&[&fake]);
        let e = site.pull(&fake, ":v1", None).unwrap_err();
        assert!(e.code() == Code::Unknown && e.message().starts_with("RegistryUnavailable") && e.message().contains("at byte 100"), "{e}");
        assert_eq!(fake.count(&c.blobs[0]), 5, "{step}");
        assert!(site.images.list().is_empty() && site.layers() == 0);
    }
}

#[test]
fn wrong_ranges_are_not_taken() {
    let c = content(&[large_layer(300_000)]);
    let total = c.answers[&c.blobs[0]].body.len();
    let last = total - 1;
    for range in [
        format!("bytes 0-{last}/{total}"),
        format!("bytes 1000-{last}/{}", total + 1),
        format!("bytes 999-{last}/{total}"),
        "junk".to_owned(),
    ] {
        // Who cannot send a part well sends it all.
        let fake = breaking(&c, move |n, r, reply| match (n, r.offset()) {
            (0, _) => Reply { cut: 1000, ..reply },
            (_, Some(offset)) => Reply { status: 206, body: reply.body[offset..].to_vec(), ..reply }.header("Content-Range", range.clone()),
            (_, None) => reply,
        });
        assert_eq!(site(&[&fake]).pull(&fake, ":v1", None).unwrap().id, c.id);
        assert_eq!(offsets(&fake, &c.blobs[0]), [None, Some(1000), None]);
    }
    // One that has no parts at all; then one that refuses for a moment what it has begun.
    for status in [416, 403, 404] {
        let fake = breaking(&c, move |n, r, reply| match (n, r.offset()) {
            (0, _) => Reply { cut: 1000, ..reply },
            (1, Some(_)) => Reply::new(status, "{}"),
            _ => reply.ranged(r),
        });
        assert_eq!(site(&[&fake]).pull(&fake, ":v1", None).unwrap().id, c.id, "{status}");
        assert_eq!(fake.count(&c.blobs[0]), 3, "{status}");
    }
    // A part that nobody asked for.
    let fake = breaking(&c, move |_, _, reply| Reply { status: 206, ..reply });
    assert!(site(&[&fake]).pull(&fake, ":v1", None).is_err());
    // The right range with wrong bytes in it.
    let fake = breaking(&c, |n, r, reply| match n {
        0 => Reply { cut: 1000, ..reply },
        _ => {
            let mut reply = reply.ranged(r);
            reply.body[5] ^= 1;
            reply
        }
    });
    let site = site(&[&fake]);
    let e = site.pull(&fake, ":v1", None).unwrap_err();
    assert!(e.code() == Code::FailedPrecondition && e.message().contains("received sha256"), "{e}");
    assert!(site.images.list().is_empty() && site.layers() == 0);
}

fn impatient(fake: &Fake) -> Site {
    site_with(&[fake], |_, settings| settings.stall = Duration::from_secs(2))
}

#[test]
fn stalls_and_trickles_are_broken_off() {
    let c = content(&[large_layer(300_000)]);
    let begin = Instant::now();
    let fake = breaking(&c, |n, r, reply| match n {
        0 => Reply { cut: 100_000, hang: true, ..reply },
        1 => Reply { drip: Duration::from_millis(30), ..reply.ranged(r) },
        _ => reply.ranged(r),
    });
    assert_eq!(impatient(&fake).pull(&fake, ":v1", None).unwrap().id, c.id);
    // A busy machine may make one more of them stall.
    assert!(fake.count(&c.blobs[0]) >= 3);
    // A manifest that trickles, and one that never comes.
    let answers = c.answers.clone();
    let fake = Fake::start(move |r| {
        let reply = answers.get(r.path())?.clone();
        Some(if r.target.ends_with("slow") {
            Reply { drip: Duration::from_millis(30), ..reply }
        } else {
            Reply { delay: Duration::from_secs(60), ..reply }
        })
    });
    let e = impatient(&fake).pull(&fake, ":v1", None).unwrap_err();
    assert!(e.message().starts_with("RegistryUnavailable") && e.message().contains("no answer for 2 s"), "{e}");
    // The first answer never ends, a byte of the second comes each 30 ms.
    assert!(begin.elapsed() < Duration::from_secs(120));
}

#[test]
fn a_cancelled_pull_ends_while_the_registry_stalls() {
    let c = content(&[large_layer(300_000)]);
    let fake = breaking(&c, |_, _, reply| Reply { cut: 1000, hang: true, ..reply });
    let site = site_with(&[&fake], |_, settings| settings.stall = Duration::from_secs(300));
    let cancel = Cancel::never();
    let (other, images, name) = (cancel.clone(), site.images.clone(), format!("{}/a/b:v1", fake.address));
    let thread = std::thread::spawn(move || images.pull(&name, None, &other, None));
    while fake.count(&c.blobs[0]) == 0 || site.layers() == 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let begin = Instant::now();
    cancel.set();
    assert_eq!(thread.join().unwrap().unwrap_err().code(), Code::Cancelled);
    // Not only the caller: what the pull had begun is gone as soon, long before the stall would end.
    while site.layers() > 0 {
        assert!(begin.elapsed() < Duration::from_secs(60), "the download goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn busy_registries_are_asked_again() {
    let c = content(&[layer_tar("a")]);
    let busy = |status: u16, after: &'static str, times: usize| {
        let (answers, count) = (c.answers.clone(), AtomicUsize::new(0));
        Fake::start(move |r| {
            if count.fetch_add(1, Ordering::SeqCst) < times {
                return Some(
                    Reply::new(status, r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#).header("Retry-After", after),
                );
            }
            answers.get(r.path()).cloned()
        })
    };
    for status in [429, 500, 502, 503, 504] {
        let fake = busy(status, "0", 2);
        assert_eq!(site(&[&fake]).pull(&fake, ":v1", None).unwrap().id, c.id);
    }
    let begin = Instant::now();
    let fake = busy(429, "1", 1);
    site(&[&fake]).pull(&fake, ":v1", None).unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(1));
    let begin = Instant::now();
    let fake = busy(429, "3600", usize::MAX);
    let e = site(&[&fake]).pull(&fake, ":v1", None).unwrap_err();
    assert!(e.code() == Code::Unknown && e.message().starts_with("RegistryUnavailable"), "{e}");
    assert!(e.message().contains("slow down") && e.message().contains("3600 s"), "{e}");
    assert!(begin.elapsed() < Duration::from_secs(60) && fake.seen.lock().unwrap().len() == 1);
    let fake = busy(503, "0", usize::MAX);
    let e = site(&[&fake]).pull(&fake, ":v1", None).unwrap_err();
    assert!(e.message().starts_with("RegistryUnavailable") && e.message().contains("503"), "{e}");
    assert_eq!(fake.seen.lock().unwrap().len(), 5);
}

#[test]
fn a_registry_that_is_never_content_is_left() {
    let (registry, tokens) = bearer("Bearer never", |_| Reply::new(200, r#"{"token":"t"}"#));
    let e = site(&[&registry]).pull(&registry, ":v1", login()).unwrap_err();
    assert!(e.code() == Code::PermissionDenied && e.message().contains("with the credentials given"), "{e}");
    assert!(registry.seen.lock().unwrap().len() <= 2 && tokens.seen.lock().unwrap().len() <= 2);
    let fake = Fake::start(|_| Some(Reply::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\"")));
    let e = site(&[&fake]).pull(&fake, ":v1", login()).unwrap_err();
    assert!(e.code() == Code::PermissionDenied && fake.seen.lock().unwrap().len() == 2, "{e}");
    let fake = Fake::start(|_| Some(Reply::new(401, "{}").header("WWW-Authenticate", "Negotiate")));
    let e = site(&[&fake]).pull(&fake, ":v1", login()).unwrap_err();
    assert!(e.message().contains("wants negotiate, which is not supported"), "{e}");
}

#[test]
fn one_of_several_challenges_is_enough() {
    let answers = content(&[layer_tar("a")]).answers;
    let tokens = Fake::start(|_| Some(Reply::new(403, "{}")));
    let realm = tokens.address.clone();
    let fake = Fake::start(move |r| match r.authorization() {
        Some(BASIC) => answers.get(r.path()).cloned(),
        _ => {
            let bearer = format!("Bearer realm=\"http://{realm}/t\"");
            Some(Reply::new(401, "{}").header("WWW-Authenticate", "Negotiate, Basic realm=\"x\"").header("WWW-Authenticate", bearer))
        }
    });
    site(&[&fake]).pull(&fake, ":v1", login()).unwrap();
    assert_eq!(tokens.count("/t"), 1);
}

#[test]
fn tokens_are_renewed_in_the_middle() {
    let (valid, asked) = (Arc::new(AtomicUsize::new(1)), Arc::new(AtomicUsize::new(0)));
    let count = asked.clone();
    let tokens = Fake::start(move |_| {
        let n = count.fetch_add(1, Ordering::SeqCst) + 1;
        Some(Reply::new(200, format!("{{\"token\":\"t{n}\",\"expires_in\":300}}")))
    });
    let c = content(&[layer_tar("a"), layer_tar("b")]);
    let (answers, blob, realm, good) = (c.answers.clone(), c.blobs[0].clone(), tokens.address.clone(), valid.clone());
    let fake = Fake::start(move |r| {
        if r.path() == blob && good.load(Ordering::SeqCst) == 1 {
            // From now on the first token is no longer good.
            good.store(2, Ordering::SeqCst);
        }
        let number = r.authorization().and_then(|a| a.strip_prefix("Bearer t")?.parse::<usize>().ok());
        if number.is_none_or(|n| n < good.load(Ordering::SeqCst)) {
            return Some(Reply::new(401, "{}").header("WWW-Authenticate", format!("Bearer realm=\"http://{realm}/t\",service=\"s\"")));
        }
        answers.get(r.path()).cloned()
    });
    let site = site(&[&fake]);
    site.pull(&fake, ":v1", login()).unwrap();
    // Both layers may have found the first one refused.
    let needed = asked.load(Ordering::SeqCst);
    assert!((2..=3).contains(&needed), "{needed}");
    assert!(tokens.requests("/t").iter().all(|r| r.target.contains("scope=repository%3Aa%2Fb%3Apull") && r.target.contains("account=me")));
    // Another pull with the same credentials needs no new one, others do.
    site.pull(&fake, ":v1", login()).unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), needed);
    let _ = site.pull(&fake, ":v1", None);
    assert_eq!(asked.load(Ordering::SeqCst), needed + 1);
}

#[test]
fn tokens_run_out() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let (registry, _tokens) = bearer("Bearer t", move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Reply::new(200, r#"{"token":"t","expires_in":1}"#)
    });
    let site = site(&[&registry]);
    site.pull(&registry, ":v1", login()).unwrap();
    let first = asked.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(1100));
    site.pull(&registry, ":v1", login()).unwrap();
    assert!(asked.load(Ordering::SeqCst) > first);
}

#[test]
fn token_servers_with_one_way_only() {
    let (registry, tokens) = bearer("Bearer t", |r| match (r.method.as_str(), r.authorization()) {
        ("GET", Some("Basic OmlkdA==")) => Reply::new(200, r#"{"access_token":"t"}"#),
        _ => Reply::new(404, "{}"),
    });
    site(&[&registry]).pull(&registry, ":v1", Some(Auth { identity_token: "idt".into(), ..Auth::default() })).unwrap();
    assert!(tokens.count("/token") >= 2);
    let (registry, _tokens) = bearer("Bearer t", |r| match r.method.as_str() {
        "POST" if r.body.contains("grant_type=password") && r.body.contains("password=secret") => {
            Reply::new(200, r#"{"access_token":"t"}"#)
        }
        _ => Reply::new(405, "{}"),
    });
    site(&[&registry]).pull(&registry, ":v1", login()).unwrap();
}

#[test]
fn a_redirect_cannot_ask_for_credentials() {
    let c = content(&[layer_tar("a")]);
    let (answers, blob) = (c.answers.clone(), c.blobs[0].clone());
    // Where the redirect leads, both kinds of challenge are tried, and a way back.
    let home = Arc::new(std::sync::OnceLock::<String>::new());
    let back = home.clone();
    let evil = Fake::start(move |r| {
        let address = r.header("host").unwrap_or_default().to_owned();
        Some(match r.path() {
            "/basic" => Reply::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\""),
            "/back" => Reply::new(307, "").header("Location", format!("http://{}/stolen", back.get().unwrap())),
            "/token" => Reply::new(200, r#"{"token":"t"}"#),
            _ => Reply::new(401, "{}").header("WWW-Authenticate", format!("Bearer realm=\"http://{address}/token\",service=\"x\"")),
        })
    });
    for way in ["basic", "bearer", "back"] {
        let (answers, blob, to) = (answers.clone(), blob.clone(), format!("http://{}/{way}", evil.address));
        let fake = Fake::start(move |r| {
            if r.path() == "/stolen" {
                return Some(Reply::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\""));
            }
            if r.authorization() != Some(BASIC) {
                return Some(Reply::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\""));
            }
            if r.path() == blob {
                return Some(Reply::new(302, "").header("Location", to.clone()));
            }
            answers.get(r.path()).cloned()
        });
        let _ = home.set(fake.address.clone());
        let e = site(&[&fake]).pull(&fake, ":v1", login()).unwrap_err();
        assert!(e.code() == Code::PermissionDenied || way == "back", "{way}: {e}");
        assert!(fake.requests("/stolen").iter().all(|r| r.authorization().is_none()), "{way}");
    }
    let seen = evil.seen.lock().unwrap();
    // A token may be had by anybody: it says who we are not.
    assert!(seen.len() >= 3 && seen.iter().all(|r| matches!(r.authorization(), None | Some("Bearer t"))), "{seen:?}");
    assert!(seen.iter().filter(|r| r.path() == "/token").all(|r| r.authorization().is_none() && !r.target.contains("account")), "{seen:?}");
}

/// A name in front of another registry: all it does is to send everybody there.
#[test]
fn a_registry_elsewhere_gives_tokens_to_anybody() {
    let (registry, tokens) = bearer("Bearer t", |_| Reply::new(200, r#"{"token":"t"}"#));
    let address = registry.address.clone();
    let front = Fake::start(move |r| Some(Reply::new(307, "").header("Location", format!("http://{address}{}", r.target))));
    site(&[&front]).pull(&front, ":v1", login()).unwrap();
    assert!(tokens.seen.lock().unwrap().iter().all(|r| r.authorization().is_none()));
    assert!(registry.seen.lock().unwrap().iter().all(|r| matches!(r.authorization(), None | Some("Bearer t"))));
}

#[test]
fn token_servers_may_have_moved() {
    let passwords = |fake: &Fake| fake.seen.lock().unwrap().iter().filter(|r| r.authorization() == Some(BASIC)).count();
    let (registry, tokens) = bearer("Bearer t", |r| match (r.path(), r.authorization()) {
        ("/token", _) => Reply::new(307, "").header("Location", "/moved?again"),
        ("/moved", Some(BASIC)) => Reply::new(200, r#"{"token":"t"}"#),
        _ => Reply::new(401, "{}"),
    });
    site(&[&registry]).pull(&registry, ":v1", login()).unwrap();
    assert!(passwords(&tokens) >= 2);
    // To another host without the password, which here is not missed.
    let other = Fake::start(|_| Some(Reply::new(200, r#"{"token":"t"}"#)));
    let address = other.address.clone();
    let (registry, tokens) = bearer("Bearer t", move |_| Reply::new(302, "").header("Location", format!("http://{address}/")));
    site(&[&registry]).pull(&registry, ":v1", login()).unwrap();
    assert!(passwords(&tokens) >= 1 && passwords(&other) == 0 && other.count("/") >= 1);
    let (registry, tokens) = bearer("Bearer t", |_| Reply::new(302, "").header("Location", "/token"));
    let e = site(&[&registry]).pull(&registry, ":v1", login()).unwrap_err();
    assert!(e.message().contains("redirects") && tokens.count("/token") < 20, "{e}");
}

/// The first challenge leads to a token server that is not there.
#[test]
fn a_dead_token_server_is_not_the_only_way() {
    let dead = { TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    let answers = content(&[layer_tar("a")]).answers;
    let fake = Fake::start(move |r| match r.authorization() {
        Some(BASIC) => answers.get(r.path()).cloned(),
        _ => Some(
            Reply::new(401, "{}")
                .header("WWW-Authenticate", format!("Bearer realm=\"http://{dead}/token\""))
                .header("WWW-Authenticate", "Basic realm=\"x\""),
        ),
    });
    site(&[&fake]).pull(&fake, ":v1", login()).unwrap();
    let e = site(&[&fake]).pull(&fake, ":v1", None).unwrap_err();
    assert!(e.message().contains(&dead.to_string()), "{e}");
}

/// Descriptors with addresses, or of foreign types, whose blobs the registry has all the same.
#[test]
fn foreign_layers_that_are_here() {
    for media_type in ["application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"] {
        let c = content_with(&[layer_tar("a")], |layer| {
            layer.media_type = media_type.to_owned();
            if !media_type.contains("nondistributable") {
                layer.urls = vec!["http://127.0.0.1:1/absent".to_owned()];
            }
        });
        let fake = Fake::honest(&c.answers);
        assert_eq!(site(&[&fake]).pull(&fake, ":v1", None).unwrap().id, c.id);
    }
}

/// Indexes that leave the platform to the configs of their images.
#[test]
fn indexes_without_platforms() {
    let ours = content(&[layer_tar("a")]);
    let theirs = content(&[layer_tar("b")]);
    let foreign = {
        let mut config = super::tests::config(&[&layer_tar("c")], "");
        let arch = Platform::host().architecture;
        config = String::from_utf8(config).unwrap().replace(&format!("\"{arch}\""), "\"s390x\"").into_bytes();
        let layer = manifest::Descriptor::new(manifest::OCI_LAYER, Digest::of(b"c"), 1);
        let manifest =
            manifest::compose(&manifest::Descriptor::new(manifest::OCI_CONFIG, Digest::of(&config), config.len() as u64), &[layer])
                .unwrap();
        (manifest, config)
    };
    let index = |entries: &[&[u8]]| {
        let entry = |data: &&[u8]| serde_json::json!({"mediaType": "", "digest": Digest::of(data).to_string(), "size": data.len()});
        let attested = serde_json::json!({"digest": Digest::of(b"x").to_string(), "size": 1, "platform": {"os": "unknown", "architecture": "unknown"}});
        let entries: Vec<_> = entries.iter().map(entry).chain([attested]).collect();
        serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string().into_bytes()
    };
    let of = |c: &super::tests_fake::Content| c.answers["/v2/a/b/manifests/v1"].body.clone();
    let inner = index(&[&foreign.0, &of(&ours), &of(&theirs)]);
    let foreign_index = index(&[&foreign.0]);
    let mut answers = ours.answers.clone();
    answers.extend(theirs.answers.clone());
    for document in [&foreign.0, &inner, &foreign_index] {
        answers.insert(format!("/v2/a/b/manifests/{}", Digest::of(document)), Reply::new(200, document.clone()));
    }
    answers.insert(format!("/v2/a/b/blobs/{}", Digest::of(&foreign.1)), Reply::new(200, foreign.1.clone()));
    let mut tag = |name: &str, document: Vec<u8>| answers.insert(format!("/v2/a/b/manifests/{name}"), Reply::new(200, document));
    tag("one", index(&[&of(&ours)]));
    tag("several", index(&[&foreign.0, &of(&ours)]));
    tag("nested", index(&[&foreign_index, &inner]));
    tag("none", index(&[&foreign.0, &foreign.0]));
    let fake = Fake::honest(&answers);
    let site = site(&[&fake]);
    for name in ["one", "several", "nested"] {
        // An index within that is the only one of its kind is believed; with another beside it, its config was asked.
        assert_eq!(site.pull(&fake, &format!(":{name}"), None).unwrap().id, ours.id, "{name}");
    }
    let e = site.pull(&fake, ":none", None).unwrap_err();
    assert!(e.code() == Code::NotFound && e.message().contains("s390x"), "{e}");
}

#[test]
fn foreign_layers_only_when_allowed_and_without_credentials() {
    let c = content(&[layer_tar("a")]);
    let answers = c.answers.clone();
    let elsewhere = Fake::start(move |r| answers.get(r.path().strip_prefix("/files")?).cloned());
    let address = elsewhere.address.clone();
    let foreign = content_with(&[layer_tar("a")], |layer| {
        layer.media_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".to_owned();
        layer.urls = vec![format!("http://{address}/absent"), format!("http://{address}/files/v2/a/b/blobs/{}", layer.digest)];
    });
    let (answers, blob) = (foreign.answers.clone(), foreign.blobs[0].clone());
    let fake = Fake::start(move |r| match r.authorization() {
        Some(BASIC) if r.path() != blob => answers.get(r.path()).cloned(),
        Some(BASIC) => None,
        _ => Some(Reply::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\"")),
    });
    let e = site(&[&fake]).pull(&fake, ":v1", login()).unwrap_err();
    assert!(e.code() == Code::FailedPrecondition && e.message().contains("images.foreign_layers"), "{e}");
    assert!(elsewhere.seen.lock().unwrap().is_empty());
    let site = site_with(&[&fake], |_, settings| settings.foreign_layers = true);
    assert_eq!(site.pull(&fake, ":v1", login()).unwrap().id, foreign.id);
    let seen = elsewhere.seen.lock().unwrap();
    assert!(seen.len() == 2 && seen.iter().all(|r| r.authorization().is_none()), "{seen:?}");
}

#[test]
fn documents_that_are_no_image() {
    let c = content(&[layer_tar("a")]);
    let manifest = String::from_utf8(c.answers["/v2/a/b/manifests/v1"].body.clone()).unwrap();
    let both = manifest.replacen('{', "{\"manifests\":[],", 1);
    let artifact = manifest.replace(manifest::OCI_CONFIG, "application/vnd.cncf.helm.config.v1+json");
    let nested = |n: u8| {
        let inner = Digest::of(&[n]);
        format!(r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"x","digest":"{inner}","size":1}}]}}"#)
    };
    for (body, kind, words) in [
        (both.clone(), manifest::OCI_MANIFEST, "both"),
        (both, manifest::OCI_INDEX, "both"),
        (artifact, manifest::OCI_MANIFEST, "artifact of type \"application/vnd.cncf.helm"),
        (manifest, manifest::OCI_INDEX, "does not look like"),
        ("<html>".to_owned(), "text/html", "parse manifest"),
        (nested(1), manifest::OCI_INDEX, "404"),
    ] {
        let fake = Fake::start(move |r| r.target.ends_with("v1").then(|| Reply::new(200, body.clone()).header("Content-Type", kind)));
        let e = site(&[&fake]).pull(&fake, ":v1", None).unwrap_err();
        assert!(e.message().contains(words), "{words}: {e}");
    }
}

#[test]
fn through_a_proxy() {
    let c = content(&[layer_tar("a")]);
    let registry = Fake::honest(&c.answers);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (proxy, target) = (listener.local_addr().unwrap(), registry.address.clone());
    let heads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = heads.clone();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let (target, log) = (target.clone(), log.clone());
            std::thread::spawn(move || {
                let mut head = Vec::new();
                let mut byte = [0];
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
    let site = site_with(&[], |_, settings| {
        settings.plain_http = vec!["registry.test:5000".into()];
        settings.proxies = Proxies::new("", &format!("http://me:pw@{proxy}"), "other.test");
    });
    let image = site.images.pull("registry.test:5000/a/b:v1", None, &Cancel::never(), None).unwrap();
    assert_eq!(image.id, c.id);
    let heads = heads.lock().unwrap();
    assert!(
        heads.iter().all(|h| h.starts_with("CONNECT registry.test:5000 ") && h.contains("Proxy-Authorization: Basic bWU6cHc=")),
        "{heads:?}"
    );
    assert!(registry.seen.lock().unwrap().iter().all(|r| r.header("proxy-authorization").is_none()));
}
