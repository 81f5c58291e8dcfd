//! A daemon made of prepared answers on a socket of its own, and the tests of whole commands against it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use futures_util::{FutureExt, SinkExt};
use grpcio::{
    EnvBuilder, Marshaller, Method, MethodType, RpcContext, RpcStatus, RpcStatusCode, Server, ServerBuilder, ServerCredentials,
    ServerStreamingSink, ServiceBuilder, UnarySink, WriteFlags,
};
use nix::sys::signal::Signal;

use super::args::stream::Exec;
use super::args::Run;
use super::bench::workload::Workload;
use super::client::{Client, SHORT};
use super::failure::{Failure, Outcome};
use super::prune::Which;
use super::request::LOG_FILE;
use super::{fsck, image, list, prune, pull, run, stream};
use crate::api::admin::{
    CheckImagesRequest, CheckProgress, ImportImageRequest, ImportImageResponse, ImportedImage, IncompleteImage, InfoRequest, InfoResponse,
    LayerProgress, Problem, PullProgress, PullRequest,
};
use crate::api::runtime::*;

/// What the daemon does and has been asked.
#[derive(Default)]
struct Script {
    calls: Vec<String>,
    /// The method that answers FAILED_PRECONDITION.
    fails: &'static str,
    /// Directory the last sandbox logs to.
    logs: PathBuf,
    /// Whether sandboxes are listed: a run finds its own that way.
    sandbox: bool,
    images: Vec<Image>,
    incomplete: Vec<IncompleteImage>,
    /// What a check tells.
    check: Vec<CheckProgress>,
}

type Shared = Arc<Mutex<Script>>;

struct Fake {
    _server: Server,
    _dir: tempfile::TempDir,
    client: Client,
    script: Shared,
}

fn method<Q: protobuf::Message, R: protobuf::Message>(ty: MethodType, name: &'static str) -> Method<Q, R> {
    fn marshaller<M: protobuf::Message>() -> Marshaller<M> {
        Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de }
    }
    Method { ty, name, req_mar: marshaller(), resp_mar: marshaller() }
}

fn unary<Q: protobuf::Message, R: protobuf::Message>(
    builder: ServiceBuilder,
    script: &Shared,
    name: &'static str,
    answer: fn(&mut Script, Q) -> R,
) -> ServiceBuilder {
    let script = script.clone();
    let handler = move |context: RpcContext<'_>, request: Q, sink: UnarySink<R>| {
        let mut script = script.lock().unwrap();
        let short = name.rsplit('/').next().unwrap();
        script.calls.push(short.to_owned());
        if script.fails == short {
            let status = RpcStatus::with_message(RpcStatusCode::FAILED_PRECONDITION, "no\nway".to_owned());
            return context.spawn(sink.fail(status).map(drop));
        }
        context.spawn(sink.success(answer(&mut script, request)).map(drop));
    };
    builder.add_unary_handler(&method(MethodType::Unary, name), handler)
}

impl Fake {
    fn start(
        fails: &'static str,
        pull: impl FnMut(RpcContext<'_>, PullRequest, ServerStreamingSink<PullProgress>) + Send + Clone + 'static,
    ) -> Fake {
        let script = Shared::default();
        script.lock().unwrap().fails = fails;
        let mut builder = ServiceBuilder::new();
        builder = unary(builder, &script, "/runtime.v1.ImageService/ImageStatus", |_, request: ImageStatusRequest| {
            let mut answer = ImageStatusResponse::new();
            if request.image.image == "here" {
                answer.image.mut_or_insert_default().id = "sha256:1".into();
            }
            answer
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/RunPodSandbox", |script, request: RunPodSandboxRequest| {
            script.logs = PathBuf::from(&request.config.log_directory);
            script.sandbox = true;
            RunPodSandboxResponse { pod_sandbox_id: "s1".into(), ..Default::default() }
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/CreateContainer", |script, _: CreateContainerRequest| {
            std::fs::write(script.logs.join(LOG_FILE), "").unwrap();
            CreateContainerResponse { container_id: "c1".into(), ..Default::default() }
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/StartContainer", |_, _: StartContainerRequest| {
            StartContainerResponse::new()
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/ContainerStatus", |_, _: ContainerStatusRequest| {
            let mut answer = ContainerStatusResponse::new();
            let status = answer.status.mut_or_insert_default();
            status.state = ContainerState::CONTAINER_EXITED.into();
            status.exit_code = 3;
            answer
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/ListPodSandbox", |script, request: ListPodSandboxRequest| {
            // Whoever is about to remove asks for what is its own.
            assert!(request.filter.is_none() || request.filter.label_selector.len() == 1);
            let mut answer = ListPodSandboxResponse::new();
            if script.sandbox {
                answer.items.push(PodSandbox { id: "s1".into(), ..Default::default() });
            }
            answer
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/ListContainers", |_, _: ListContainersRequest| {
            let mut answer = ListContainersResponse::new();
            let image = "sha256:used".to_owned();
            answer.containers.push(Container { id: "c1".into(), pod_sandbox_id: "s1".into(), image_ref: image, ..Default::default() });
            answer
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/ExecSync", |_, request: ExecSyncRequest| {
            assert_eq!((request.container_id.as_str(), request.cmd.as_slice()), ("c1", &["ls".to_owned()][..]));
            ExecSyncResponse { exit_code: 7, ..Default::default() }
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/StopPodSandbox", |_, _: StopPodSandboxRequest| {
            StopPodSandboxResponse::new()
        });
        builder = unary(builder, &script, "/runtime.v1.RuntimeService/RemovePodSandbox", |_, _: RemovePodSandboxRequest| {
            RemovePodSandboxResponse::new()
        });
        builder = unary(builder, &script, "/runtime.v1.ImageService/ListImages", |script, _: ListImagesRequest| ListImagesResponse {
            images: script.images.clone(),
            ..Default::default()
        });
        builder = unary(builder, &script, "/runtime.v1.ImageService/RemoveImage", |script, request: RemoveImageRequest| {
            script.images.retain(|image| image.id != request.image.image);
            RemoveImageResponse::new()
        });
        builder = unary(builder, &script, "/crisp.v1.Admin/Info", |script, _: InfoRequest| InfoResponse {
            incomplete: script.incomplete.clone(),
            ..Default::default()
        });
        let checks = script.clone();
        builder = builder.add_server_streaming_handler(
            &method(MethodType::ServerStreaming, "/crisp.v1.Admin/CheckImages"),
            move |context: RpcContext<'_>, request: CheckImagesRequest, mut sink: ServerStreamingSink<CheckProgress>| {
                let mut script = checks.lock().unwrap();
                script.calls.push(format!("CheckImages repair={}", request.repair));
                let messages = script.check.clone();
                context.spawn(async move {
                    for message in messages {
                        sink.send((message, WriteFlags::default())).await.unwrap();
                    }
                    sink.close().await.unwrap();
                });
            },
        );
        builder = unary(builder, &script, "/crisp.v1.Admin/ImportImage", |_, request: ImportImageRequest| {
            let image = ImportedImage { id: "sha256:1".into(), tags: vec![request.path, request.reference], ..Default::default() };
            ImportImageResponse { images: vec![image], ..Default::default() }
        });
        let service = builder.add_server_streaming_handler(&method(MethodType::ServerStreaming, "/crisp.v1.Admin/PullImage"), pull).build();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("crisp.sock");
        let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
        let mut server = ServerBuilder::new(environment).register_service(service).build().unwrap();
        server.add_listening_port(format!("unix:{}", socket.display()), ServerCredentials::insecure()).unwrap();
        server.start();
        let client = Client::connect(&socket).unwrap();
        Fake { _server: server, _dir: dir, client, script }
    }

    /// What was asked, without repetitions.
    fn calls(&self) -> Vec<String> {
        let mut calls = self.script.lock().unwrap().calls.clone();
        calls.dedup();
        calls
    }

    fn run(&self, image: &str) -> Outcome<u8> {
        run::run(&self.client, &Run { image: image.into(), ..Run::default() }, false, &crossbeam_channel::never())
    }
}

/// Half a layer, then all, then `end`.
fn pull_with(context: &RpcContext<'_>, mut sink: ServerStreamingSink<PullProgress>, end: Result<&str, RpcStatusCode>) {
    let end = end.map(str::to_owned);
    context.spawn(async move {
        for (bytes, state) in [(5, "downloading"), (10, "done")] {
            let layer = LayerProgress { digest: "sha256:a".into(), state: state.into(), bytes, total: 10, ..Default::default() };
            let progress = PullProgress { layers: vec![layer], ..Default::default() };
            sink.send((progress, WriteFlags::default())).await.unwrap();
        }
        match end {
            Ok(id) => {
                sink.send((PullProgress { image_ref: id, ..Default::default() }, WriteFlags::default())).await.unwrap();
                sink.close().await.unwrap();
            }
            Err(code) => sink.fail(RpcStatus::with_message(code, "broken".into())).await.unwrap(),
        }
    });
}

fn text(outcome: Outcome<impl std::fmt::Debug>) -> String {
    match outcome {
        Err(Failure::Failed(text)) => text,
        other => format!("{other:?}"),
    }
}

#[test]
fn a_run_ends_with_the_code_of_the_container_and_leaves_nothing() {
    let fake = Fake::start("", |context, request, sink| {
        assert_eq!(request.image, "elsewhere");
        pull_with(&context, sink, Ok("sha256:1"));
    });
    assert_eq!(text(fake.run("elsewhere")), "Ok(3)");
    let tail = ["ContainerStatus", "ListPodSandbox", "StopPodSandbox", "RemovePodSandbox"];
    assert_eq!(fake.calls(), [&["ImageStatus", "RunPodSandbox", "CreateContainer", "StartContainer"], &tail[..]].concat());
    assert!(!fake.script.lock().unwrap().logs.exists());
}

#[test]
fn a_step_that_fails_is_undone() {
    for (step, what) in [
        ("RunPodSandbox", "run sandbox"),
        ("CreateContainer", "create container"),
        ("StartContainer", "start container c1"),
        ("ContainerStatus", "read status of container c1"),
    ] {
        let fake = Fake::start(step, |_, _, _| unreachable!("the image is here"));
        assert_eq!(text(fake.run("here")), format!("{what}: FAILED_PRECONDITION: no\nway"), "{step}");
        let removed = fake.calls().contains(&"RemovePodSandbox".to_owned());
        assert_eq!(removed, step != "RunPodSandbox", "{step}");
        assert!(!fake.script.lock().unwrap().logs.exists(), "{step}");
    }
}

#[test]
fn a_pull_that_fails_makes_no_sandbox() {
    let fake = Fake::start("", |context, _, sink| pull_with(&context, sink, Err(RpcStatusCode::UNAVAILABLE)));
    assert_eq!(text(fake.run("elsewhere")), "pull elsewhere: UNAVAILABLE: broken");
    assert_eq!(fake.calls(), ["ImageStatus"]);
}

#[test]
fn a_pull_without_an_id_is_not_a_success() {
    let fake = Fake::start("", |context, _, sink| pull_with(&context, sink, Ok("")));
    assert!(text(pull::pull(&fake.client, "x", None, &crossbeam_channel::never())).contains("did not name"));
}

#[test]
fn a_signal_abandons_a_pull() {
    let held = Arc::new(Mutex::new(Vec::new()));
    let keep = held.clone();
    let fake = Fake::start("", move |_, _, sink| keep.lock().unwrap().push(sink));
    let (sender, signals) = crossbeam_channel::unbounded();
    sender.send(Signal::SIGINT).unwrap();
    let outcome = pull::pull(&fake.client, "x", None, &signals);
    assert!(matches!(outcome, Err(Failure::Silent(130))), "{outcome:?}");
}

#[test]
fn imports_name_the_whole_path() {
    let fake = Fake::start("", |_, _, _| {});
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("i.tar");
    std::fs::write(&file, "").unwrap();
    let path = std::fs::canonicalize(&file).unwrap();
    let odd = dir.path().join("./i.tar");
    let out = image::import(&fake.client, &[odd.to_str().unwrap().to_owned()], Some("name"), false).unwrap();
    assert_eq!(out, format!("sha256:1 {} name\n", path.display()));
    let missing = image::import(&fake.client, &["/nonexistent.tar".to_owned()], None, false);
    assert!(text(missing).starts_with("import /nonexistent.tar: No such file"));
}

/// One that a container has, one that is pinned, one that nobody needs.
fn with_images() -> Fake {
    let fake = Fake::start("", |_, _, _| {});
    let image = |id: &str, tag: &str, pinned| Image {
        id: format!("sha256:{id}"),
        repo_tags: vec![tag.to_owned()],
        size: 1_000_000,
        pinned,
        ..Default::default()
    };
    fake.script.lock().unwrap().images =
        vec![image("used", "q.io/a:1", false), image("pin", "q.io/b:1", true), image("free", "q.io/c:1", false)];
    fake
}

fn left(fake: &Fake) -> Vec<String> {
    fake.script.lock().unwrap().images.iter().map(|image| image.id.clone()).collect()
}

#[test]
fn images_that_nobody_needs_are_removed() {
    let fake = with_images();
    let (text, code) = prune::prune(&fake.client, true, false).unwrap();
    assert_eq!(text, "ID    SIZE     NAME\nfree  1.00 MB  q.io/c:1\n1 image would be removed, 1.00 MB as pulled\n");
    assert_eq!((code, left(&fake).len()), (0, 3));
    let (text, _) = prune::prune(&fake.client, false, true).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((json["removed"][0]["id"].as_str(), json["size"].as_str()), (Some("sha256:free"), Some("1000000")));
    assert_eq!(left(&fake), ["sha256:used", "sha256:pin"]);
    assert_eq!(prune::prune(&fake.client, false, false).unwrap().0, "no unused images\n");
}

#[test]
fn a_removal_that_fails_is_told_and_not_counted() {
    let fake = with_images();
    fake.script.lock().unwrap().fails = "RemoveImage";
    assert_eq!(prune::prune(&fake.client, false, false).unwrap(), ("no unused images\n".to_owned(), 1));
    // Without the list of containers nothing is known to be free.
    fake.script.lock().unwrap().fails = "ListContainers";
    assert!(text(prune::prune(&fake.client, false, false)).starts_with("list containers: FAILED_PRECONDITION"));
    assert_eq!(left(&fake).len(), 3);
}

#[test]
fn rmi_of_all_and_of_unused_leaves_pinned_ones() {
    let fake = with_images();
    assert_eq!(prune::ids(&fake.client, Which::Unused).unwrap(), ["sha256:free"]);
    assert_eq!(prune::ids(&fake.client, Which::All).unwrap(), ["sha256:used", "sha256:free"]);
    fake.script.lock().unwrap().images.clear();
    assert!(matches!(prune::ids(&fake.client, Which::All), Err(Failure::Silent(0))));
}

#[test]
fn incomplete_images_are_shown() {
    let fake = with_images();
    let lacking = IncompleteImage {
        id: "sha256:broken".into(),
        names: vec!["q.io/d:1".into(), "q.io/d@sha256:0".into()],
        reason: "layer x is damaged:\nbad".into(),
        ..Default::default()
    };
    fake.script.lock().unwrap().incomplete.push(lacking);
    let text = list::images(&fake.client, list::Form::Table).unwrap();
    let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        lines,
        [
            "IMAGE TAG ID SIZE PINNED",
            "q.io/a 1 used 1.00 MB -",
            "q.io/b 1 pin 1.00 MB yes",
            "q.io/c 1 free 1.00 MB -",
            "q.io/d 1 broken incomplete -",
            "broken: layer x is damaged: bad; pull it again"
        ]
    );
    assert!(!list::images(&fake.client, list::Form::Json).unwrap().contains("broken"));
}

#[test]
fn a_check_ends_with_what_stays() {
    let fake = Fake::start("", |_, _, _| {});
    let problem = |action: &str| Problem { kind: "layer".into(), subject: "x".into(), action: action.into(), ..Default::default() };
    let end = CheckProgress { finished: true, images: 1, ..Default::default() };
    let found = |problem| vec![CheckProgress { problems: vec![problem], ..Default::default() }, end.clone()];
    fake.script.lock().unwrap().check = found(problem(""));
    assert_eq!(fsck::fsck(&fake.client, false, false).unwrap().1, 1);
    fake.script.lock().unwrap().check = found(problem("marked"));
    let (text_of, code) = fsck::fsck(&fake.client, true, true).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text_of).unwrap();
    assert_eq!((json["problems"][0]["action"].as_str(), json["images"].as_i64(), code), (Some("marked"), Some(1), 0));
    // A stream that just ends has not said that all is well.
    fake.script.lock().unwrap().check.clear();
    assert!(text(fsck::fsck(&fake.client, false, false)).contains("ended it in between"));
    assert_eq!(fake.calls(), ["CheckImages repair=false", "CheckImages repair=true", "CheckImages repair=false"]);
}

#[test]
fn an_exec_needs_no_streams_unless_it_asks_for_them() {
    let fake = Fake::start("", |_, _, _| {});
    let mut wanted = Exec { container: "c".into(), command: vec!["ls".into()], ..Exec::default() };
    assert_eq!(text(stream::exec(&fake.client, &wanted, None)), "Ok(7)");
    assert_eq!(fake.calls(), ["ListPodSandbox", "ListContainers", "ExecSync"]);
    wanted.stdin = true;
    assert!(text(stream::exec(&fake.client, &wanted, None)).contains("Exec is not implemented"));
}

#[test]
fn a_benchmark_removes_what_carries_its_label() {
    let logs = tempfile::tempdir().unwrap();
    let workload = Workload {
        socket: PathBuf::from("/nonexistent"),
        handler: String::new(),
        image: "here".into(),
        command: Vec::new(),
        host_network: false,
        cgroup_parent: String::new(),
        logs: logs.path().to_owned(),
        token: "0123456789abcdef".into(),
    };
    let fake = Fake::start("", |_, _, _| unreachable!("the image is here"));
    workload.prepare(&fake.client).unwrap();
    let (pair, _) = workload.up(&fake.client, "one").unwrap();
    assert_eq!((pair.sandbox.as_str(), pair.container.as_str()), ("s1", "c1"));
    workload.clean(&fake.client).unwrap();
    let calls = fake.calls();
    assert_eq!(calls[calls.len() - 3..], ["ListPodSandbox", "StopPodSandbox", "RemovePodSandbox"]);
}

#[test]
fn a_method_the_daemon_lacks_is_unimplemented() {
    let fake = Fake::start("", |_, _, _| {});
    let error = fake.client.runtime().version(&VersionRequest::new(), SHORT).unwrap_err();
    assert!(error.is_unimplemented(), "{error}");
}
