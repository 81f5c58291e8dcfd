//! The ImageService and imports.

use crisp::api::admin::{CheckImagesRequest, ImportImageRequest, InfoRequest, PullRequest};
use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;

use crate::archive;
use crate::node::{refused, Answer, Node, Options};
use crate::registry::Registry;

fn spec(image: &str) -> MessageField<ImageSpec> {
    MessageField::some(ImageSpec { image: image.into(), ..Default::default() })
}

fn pull(node: &Node, image: &str) -> Answer<String> {
    node.images().pull_image(&PullImageRequest { image: spec(image), ..Default::default() }, SHORT).map(|answer| answer.image_ref)
}

fn find(node: &Node, image: &str) -> Option<Image> {
    node.images().image_status(&ImageStatusRequest { image: spec(image), ..Default::default() }, SHORT).expect("status").image.into_option()
}

fn list(node: &Node, image: &str) -> Vec<Image> {
    let filter = ImageFilter { image: spec(image), ..Default::default() };
    let request = ListImagesRequest { filter: MessageField::some(filter), ..Default::default() };
    node.images().list_images(&request, SHORT).expect("list").images
}

fn remove(node: &Node, image: &str) -> Answer<RemoveImageResponse> {
    node.images().remove_image(&RemoveImageRequest { image: spec(image), ..Default::default() }, SHORT)
}

#[test]
fn pulled_by_tag_known_by_every_name() {
    let node = Node::start();
    let registry = Registry::start();
    let tag = registry.image();
    assert_eq!(pull(&node, &tag).expect("pull"), registry.id);
    let image = find(&node, &registry.id).expect("by id");
    let by_digest = format!("{}/a/b@{}", registry.address, registry.digest);
    assert_eq!((image.repo_tags.as_slice(), image.repo_digests.as_slice()), ([tag.clone()].as_slice(), [by_digest.clone()].as_slice()));
    assert!(image.size > 0 && image.spec.is_some() && !image.pinned);
    assert_eq!((image.uid.is_none(), image.username.as_str()), (true, "app"));
    for name in [&tag, &by_digest, &registry.id["sha256:".len()..].to_owned()] {
        assert_eq!(find(&node, name).as_ref(), Some(&image), "{name}");
        assert_eq!(list(&node, name), [image.clone()], "{name}");
    }
    assert_eq!(list(&node, "").len(), 2);
    assert_eq!(list(&node, "localhost/nothing:1"), []);
    assert_eq!(pull(&node, &by_digest).expect("pull by digest"), registry.id);
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "true");
    config.image = spec(&registry.id);
    let container = node.create(&sandbox, &config).expect("create");
    let status = node.status(&container).expect("status");
    assert_eq!(
        (status.image_id.as_str(), status.image_ref.as_str(), status.image.image.as_str()),
        (registry.id.as_str(), by_digest.as_str(), tag.as_str())
    );
    assert_eq!(status.user.linux.uid, 1000);
    remove(&node, &by_digest).expect("remove by digest");
    assert!(find(&node, &tag).is_none() && find(&node, &registry.id).is_none());
    assert_eq!(list(&node, "").len(), 1);
    remove(&node, &tag).expect("remove again");
}

#[test]
fn a_pull_by_digest_has_no_tag() {
    let node = Node::start();
    let registry = Registry::start();
    let name = format!("{}/a/b@{}", registry.address, registry.digest);
    assert_eq!(pull(&node, &name).expect("pull"), registry.id);
    let image = find(&node, &name).expect("it is there");
    assert!(image.repo_tags.is_empty());
    assert_eq!(image.repo_digests, [name]);
}

#[test]
fn refused_pulls() {
    let node = Node::start();
    let registry = Registry::start();
    refused(pull(&node, ""), Code::INVALID_ARGUMENT, "image");
    refused(pull(&node, "UPPER CASE"), Code::INVALID_ARGUMENT, "UPPER CASE");
    refused(pull(&node, &format!("{}/a/b:none", registry.address)), Code::NOT_FOUND, "none");
    let wrong = format!("{}/a/b@sha256:{}", registry.address, "0".repeat(64));
    refused(pull(&node, &wrong), Code::NOT_FOUND, "");
    let mut request = PullImageRequest { image: spec(&registry.image()), ..Default::default() };
    request.image.mut_or_insert_default().runtime_handler = "kata".into();
    refused(node.images().pull_image(&request, SHORT), Code::INVALID_ARGUMENT, "runtime_handler");
    // Nobody listens there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let message = refused(pull(&node, &format!("{address}/a/b:v1")), Code::UNKNOWN, "");
    assert!(message.starts_with("RegistryUnavailable"), "{message}");
    assert_eq!(list(&node, "").len(), 1);
}

/// As kubelet asks with RuntimeClassInImageCriApi: the images of one handler are those of all.
#[test]
fn any_handlers_name_will_do_for_an_image() {
    let node = Node::start();
    let registry = Registry::start();
    let asked = |handler: &str| {
        let mut image = spec(&registry.image());
        image.mut_or_insert_default().runtime_handler = handler.into();
        image
    };
    let filter = |handler: &str| ListImagesRequest {
        filter: MessageField::some(ImageFilter { image: asked(handler), ..Default::default() }),
        ..Default::default()
    };
    let pull = |handler: &str| node.images().pull_image(&PullImageRequest { image: asked(handler), ..Default::default() }, SHORT);
    let status = |handler: &str| node.images().image_status(&ImageStatusRequest { image: asked(handler), ..Default::default() }, SHORT);
    let remove = |handler: &str| node.images().remove_image(&RemoveImageRequest { image: asked(handler), ..Default::default() }, SHORT);
    pull("second").expect("pull");
    for handler in ["", "second"] {
        let shown = status(handler).expect("status").image;
        assert!(shown.is_some() && shown.spec.runtime_handler.is_empty(), "{handler}: {shown:?}");
        let listed = node.images().list_images(&filter(handler), SHORT).expect("list").images;
        assert_eq!(listed.len(), 1, "{handler}");
        assert_eq!(listed[0].spec.runtime_handler, "", "{handler}");
    }

    let sandbox = node.run_with(&node.sandbox_config("web"), "second").expect("run");
    let mut config = node.container_config("app", "true");
    config.image = asked("second");
    let mut volume = Mount { container_path: "/data".into(), readonly: true, ..Default::default() };
    volume.image = asked("second");
    config.mounts.push(volume);
    let id = node.create(&sandbox, &config).expect("create");
    // kubelet finds out by these which images are in use.
    let shown = node.status(&id).expect("status");
    assert_eq!((shown.image.runtime_handler.as_str(), shown.mounts[0].image.runtime_handler.as_str()), ("", ""));
    assert_eq!(shown.mounts[0].image.image_ref, status("").expect("status").image.id);

    let unknown = "runtime_handler: no handler \"kata\"";
    refused(pull("kata"), Code::INVALID_ARGUMENT, unknown);
    refused(status("kata"), Code::INVALID_ARGUMENT, unknown);
    refused(remove("kata"), Code::INVALID_ARGUMENT, unknown);
    refused(node.images().list_images(&filter("kata"), SHORT), Code::INVALID_ARGUMENT, unknown);
    remove("second").expect("remove");
    assert!(status("").expect("status").image.is_none());
}

#[test]
fn credentials() {
    let node = Node::start();
    // me:secret
    let registry = Registry::with_password(Some("bWU6c2VjcmV0"));
    let with = |auth: AuthConfig| {
        let request = PullImageRequest {
            image: spec(&registry.image()),
            auth: MessageField::some(auth),
            // Without metadata, as crictl sends it.
            sandbox_config: MessageField::some(PodSandboxConfig::default()),
            ..Default::default()
        };
        node.images().pull_image(&request, SHORT).map(|answer| answer.image_ref)
    };
    refused(pull(&node, &registry.image()), Code::PERMISSION_DENIED, "");
    let wrong = with(AuthConfig { username: "me".into(), password: "hunter2-wrong".into(), ..Default::default() });
    let message = refused(wrong, Code::PERMISSION_DENIED, "");
    assert!(!message.contains("hunter2"), "{message}");
    let right = || AuthConfig { username: "me".into(), password: "secret".into(), ..Default::default() };
    refused(with(AuthConfig { server_address: "elsewhere.example".into(), ..right() }), Code::PERMISSION_DENIED, "");
    assert_eq!(with(right()).expect("pull"), registry.id);
    remove(&node, &registry.id).expect("remove");
    let encoded = AuthConfig { auth: "bWU6c2VjcmV0".into(), server_address: registry.address.clone(), ..Default::default() };
    assert_eq!(with(encoded).expect("pull"), registry.id);
}

#[test]
fn the_nodes_own_credentials_and_hosts() {
    let registry = Registry::with_password(Some("bWU6c2VjcmV0"));
    let tables = format!("[images.auth.{:?}]\nusername = \"me\"\npassword = \"secret\"\n", registry.address);
    let node = Node::with(Options { tables, ..Default::default() });
    let dir = node.path("certs").join(&registry.address);
    std::fs::create_dir_all(&dir).expect("make the directory of the registry");
    std::fs::write(dir.join("hosts.toml"), "server = \"http://x\"\nca = 1\n").expect("write hosts.toml");
    let message = refused(pull(&node, &registry.image()), Code::FAILED_PRECONDITION, "hosts.toml: line 2: ca: expected");
    assert!(!message.contains("secret"), "{message}");
    std::fs::write(dir.join("hosts.toml"), format!("[host.\"http://{}\"]\n", registry.address)).expect("write hosts.toml");
    assert_eq!(pull(&node, &registry.image()).expect("pull"), registry.id);
}

#[test]
fn one_image_with_many_names_goes_with_all_of_them() {
    let node = Node::start();
    let id = node.import("localhost/two:1", "two", serde_json::json!({}));
    assert_eq!(node.import("localhost/other/two:2", "two", serde_json::json!({})), id);
    let image = find(&node, &id).expect("it is there");
    assert_eq!(image.repo_tags.len(), 2);
    std::thread::scope(|scope| {
        for name in ["localhost/two:1", "localhost/other/two:2", id.as_str()].repeat(3) {
            let node = &node;
            scope.spawn(move || remove(node, name).expect("all removals succeed"));
        }
    });
    assert_eq!(list(&node, "").len(), 1);
}

#[test]
fn a_tag_that_moves() {
    let node = Node::start();
    let old = node.image.clone();
    let new = node.import(archive::IMAGE, "new content", serde_json::json!({}));
    assert_ne!(old, new);
    assert_eq!(find(&node, archive::IMAGE).expect("it is there").id, new);
    if let Some(left) = find(&node, &old) {
        assert!(left.repo_tags.is_empty());
    }
}

#[test]
fn verbose_status_and_file_systems() {
    let node = Node::start();
    let request = ImageStatusRequest { image: spec(archive::IMAGE), verbose: true, ..Default::default() };
    let answer = node.images().image_status(&request, SHORT).expect("status");
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).expect("info is JSON");
    assert_eq!(info["imageSpec"]["config"]["Env"][0], "FROM_IMAGE=yes");
    assert!(find(&node, "localhost/absent:1").is_none());
    let info = node.images().image_fs_info(&ImageFsInfoRequest::default(), SHORT).expect("info");
    for fs in [&info.image_filesystems, &info.container_filesystems] {
        assert!(fs.len() == 1 && fs[0].timestamp > 0 && !fs[0].fs_id.mountpoint.is_empty());
        assert!(fs[0].used_bytes.is_some() && fs[0].inodes_used.is_some());
    }
    let used =
        |info: &ImageFsInfoResponse| (info.container_filesystems[0].used_bytes.value, info.container_filesystems[0].inodes_used.value);
    assert_eq!(used(&info), (0, 0), "there is no container");
    assert!(info.image_filesystems[0].used_bytes.value > 4096 && info.image_filesystems[0].inodes_used.value >= 4);
    assert_eq!(info.image_filesystems[0].fs_id, info.container_filesystems[0].fs_id);
    let sandbox = node.sandbox("web");
    let container = node.create(&sandbox, &node.container_config("app", "true")).expect("create");
    let with = node.images().image_fs_info(&ImageFsInfoRequest::default(), SHORT).expect("info");
    assert!(used(&with).0 > 0 && used(&with).1 > 0, "a writable layer is used space");
    assert_eq!(with.image_filesystems[0].used_bytes, info.image_filesystems[0].used_bytes);
    node.remove(&container).expect("remove");
    assert_eq!(used(&node.images().image_fs_info(&ImageFsInfoRequest::default(), SHORT).expect("info")), (0, 0));
}

#[test]
fn images_come_back_after_a_restart() {
    let mut node = Node::start();
    let registry = Registry::start();
    pull(&node, &registry.image()).expect("pull");
    let before = list(&node, "");
    node.restart();
    assert_eq!(list(&node, ""), before);
}

#[test]
fn the_admin_service() {
    let node = Node::start();
    let admin = node.client().admin();
    let import = |path: &str| admin.import_image(&ImportImageRequest { path: path.into(), ..Default::default() }, SHORT);
    refused(import("relative.tar"), Code::INVALID_ARGUMENT, "path");
    std::fs::write(node.path("rubbish"), "not a tar file at all").expect("write");
    let error = import(&node.path("rubbish").display().to_string()).expect_err("rubbish");
    assert_ne!(error.code, Code::OK);
    let info = admin.info(&InfoRequest::default(), SHORT).expect("info");
    assert_eq!(info.root, node.path("root").display().to_string());
    let registry = Registry::start();
    let messages = admin.pull_image(&PullRequest { image: registry.image(), ..Default::default() }, SHORT).expect("a stream");
    let all: Vec<_> = messages.collect::<Result<_, _>>().expect("no error");
    let last = all.last().expect("a last message");
    assert_eq!((last.image_ref.as_str(), last.layers.len()), (registry.id.as_str(), 1));
    assert_eq!(last.layers[0].state, "done");
}

#[test]
fn a_check_of_all_images_and_a_repair() {
    let mut node = Node::start();
    let registry = Registry::start();
    assert_eq!(pull(&node, &registry.image()).expect("pull"), registry.id);
    let check = |node: &Node, repair: bool| {
        let request = CheckImagesRequest { repair, ..Default::default() };
        let all: Vec<_> =
            node.client().admin().check_images(&request, SHORT).expect("a stream").collect::<Result<_, _>>().expect("no error");
        assert!(all.last().is_some_and(|end| end.finished && end.images == 2 && end.layers == 2));
        all.into_iter().flat_map(|message| message.problems).collect::<Vec<_>>()
    };
    assert_eq!(check(&node, false), []);
    let layer = std::fs::read_dir(node.path("root/layers"))
        .expect("layers")
        .map(|e| e.expect("entry").path())
        .find(|p| std::fs::read(p.join("diff/mark")).is_ok_and(|mark| mark == b"pulled"));
    let layer = layer.expect("the pulled layer");
    std::fs::write(layer.join("diff/mark"), "something else").expect("damage it");
    let problems = check(&node, false);
    assert_eq!((problems.len(), problems[0].kind.as_str(), problems[0].action.as_str()), (1, "layer", ""));
    assert_eq!(problems[0].images, [registry.image()]);
    assert!(find(&node, &registry.id).is_some());
    assert_eq!(check(&node, true)[0].action, "marked for the next pull");
    assert!(find(&node, &registry.id).is_none() && list(&node, "").len() == 1);
    let info = node.client().admin().info(&InfoRequest::default(), SHORT).expect("info");
    assert_eq!((info.incomplete.len(), info.incomplete[0].id.as_str()), (1, registry.id.as_str()));
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "true");
    config.image = spec(&registry.id);
    refused(node.create(&sandbox, &config), Code::FAILED_PRECONDITION, "incomplete");
    node.restart();
    assert!(find(&node, &registry.id).is_none());
    let blobs = registry.count("/blobs/");
    assert_eq!(pull(&node, &registry.image()).expect("pull again"), registry.id);
    // The configuration and the one layer.
    assert_eq!(registry.count("/blobs/"), blobs + 2);
    assert_eq!(check(&node, false), []);
}

#[test]
fn image_verifiers() {
    use std::os::unix::fs::PermissionsExt;
    let node = Node::start();
    let registry = Registry::start();
    let dir = node.path("verifiers");
    std::fs::create_dir(&dir).expect("make a directory");
    let script = dir.join("policy");
    std::fs::write(&script, "#!/bin/sh\ncat > /dev/null\necho not signed by us\nexit 1\n").expect("write");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let message = refused(pull(&node, &registry.image()), Code::UNKNOWN, "");
    let image = registry.image();
    let expected = format!("SignatureValidationFailed: pull {image}: image verifier policy rejects {image} (exit 1): not signed by us");
    assert_eq!(message, expected);
    let stream = node.client().admin().pull_image(&PullRequest { image: registry.image(), ..Default::default() }, SHORT).expect("a stream");
    let error = stream.collect::<Result<Vec<_>, _>>().expect_err("refused here too");
    assert!(error.to_string().contains("SignatureValidationFailed"), "{error}");
    assert_eq!(registry.count("/blobs/"), 0, "nothing of the image was fetched");
    std::fs::write(dir.join(".hidden"), "").expect("write");
    std::fs::remove_file(&script).expect("remove");
    assert_eq!(pull(&node, &registry.image()).expect("nobody objects"), registry.id);
}
