"""Drives a CRI runtime with Python's grpcio and the messages of our proto/: nothing here is generated beforehand.

usage: client.py PROTO_DIR SOCKET IMAGE LOG_DIR CGROUP_PARENT
"""

import os
import sys
import threading
import time
import urllib.request

import grpc

proto_dir, socket, image, log_dir, cgroup_parent = sys.argv[1:]
sys.path.insert(0, proto_dir)
cri, services = grpc.protos_and_services("runtime/v1/api.proto")

channel = grpc.insecure_channel(f"unix:{socket}")
runtime, images = services.RuntimeServiceStub(channel), services.ImageServiceStub(channel)
TIMEOUT = 30


def until(what, check):
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        value = check()
        if value:
            return value
        time.sleep(0.02)
    sys.exit(f"not in {TIMEOUT} s: {what}")


def fetch(url):
    try:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2).read()
    except OSError:
        return None


version = runtime.Version(cri.VersionRequest(version="0.1.0"), timeout=TIMEOUT)
assert version.version == "0.1.0" and version.runtime_name and version.runtime_api_version, version
conditions = {c.type: c.status for c in runtime.Status(cri.StatusRequest(), timeout=TIMEOUT).status.conditions}
assert conditions.get("RuntimeReady") and conditions.get("NetworkReady"), conditions
found = images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=image)), timeout=TIMEOUT).image
assert found.id.startswith("sha256:") and found.size > 0, found
print("ready", version.runtime_name, version.runtime_version)

os.makedirs(log_dir, exist_ok=True)
events, streams = [], version.runtime_name == "crisp"


def follow(stream):
    try:
        for event in stream:
            events.append((event.container_id, event.container_event_type, event.pod_sandbox_status.state, len(event.containers_statuses)))
    except grpc.RpcError as error:
        events.append(error.code())


if streams:
    subscription = runtime.GetContainerEvents(cri.GetEventsRequest())
    follower = threading.Thread(target=follow, args=(subscription,), daemon=True)
    follower.start()
namespaces = cri.NamespaceOption(pid=cri.CONTAINER)
config = cri.PodSandboxConfig(
    metadata=cri.PodSandboxMetadata(name="python", uid="uid-python", namespace="test"),
    hostname="python", log_directory=log_dir, labels={"by": "python"},
    linux=cri.LinuxPodSandboxConfig(
        cgroup_parent=cgroup_parent, security_context=cri.LinuxSandboxSecurityContext(namespace_options=namespaces)),
)
sandbox = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config), timeout=TIMEOUT).pod_sandbox_id
status = runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox), timeout=TIMEOUT).status
assert status.state == cri.SANDBOX_READY and status.network.ip and status.labels["by"] == "python", status
print("sandbox", status.network.ip)

script = "echo serving on $(hostname); echo to stderr >&2; exec httpd -f -p 8080 -h /www"
container_config = cri.ContainerConfig(
    metadata=cri.ContainerMetadata(name="web"), image=cri.ImageSpec(image=image), command=["sh", "-c", script], log_path="web.log",
    envs=[cri.KeyValue(key="GREETING", value=b"salve")],
    linux=cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=namespaces)),
)
request = cri.CreateContainerRequest(pod_sandbox_id=sandbox, config=container_config, sandbox_config=config)
container = runtime.CreateContainer(request, timeout=TIMEOUT).container_id
runtime.StartContainer(cri.StartContainerRequest(container_id=container), timeout=TIMEOUT)


def container_status():
    return runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container), timeout=TIMEOUT).status


assert container_status().state == cri.CONTAINER_RUNNING
body = until("an answer from the sandbox", lambda: fetch(f"http://{status.network.ip}:8080/"))
assert body == b"hello from a sandbox\n", body
print("container", body.decode().strip())

exec_request = cri.ExecSyncRequest(container_id=container, cmd=["sh", "-c", "echo $GREETING; exit 3"], timeout=10)
answer = runtime.ExecSync(exec_request, timeout=TIMEOUT)
assert (answer.stdout, answer.exit_code) == (b"salve\n", 3), answer
log = until("both lines in the log", lambda: (lambda text: text if text.count("\n") >= 2 else None)(open(f"{log_dir}/web.log").read()))
assert " stdout F serving on python\n" in log and " stderr F to stderr\n" in log, log
listed = runtime.ListContainers(cri.ListContainersRequest(filter=cri.ContainerFilter(pod_sandbox_id=sandbox)), timeout=TIMEOUT)
assert [c.id for c in listed.containers] == [container], listed
print("exec and log")

if streams:
    # Each ends by itself: a list() of a stream that did not would hang until its deadline, which is an error.
    pieces = list(runtime.StreamContainers(cri.StreamContainersRequest(), timeout=TIMEOUT))
    assert [c.id for piece in pieces for c in piece.containers] == [container], pieces
    pieces = list(runtime.StreamPodSandboxes(cri.StreamPodSandboxesRequest(), timeout=TIMEOUT))
    assert [s.id for piece in pieces for s in piece.pod_sandboxes] == [sandbox], pieces
    known = {i.id for i in images.ListImages(cri.ListImagesRequest(), timeout=TIMEOUT).images}
    pieces = list(images.StreamImages(cri.StreamImagesRequest(), timeout=TIMEOUT))
    assert {i.id for piece in pieces for i in piece.images} == known and known, pieces
    nothing = cri.ContainerFilter(id="absent")
    assert list(runtime.StreamContainers(cri.StreamContainersRequest(filter=nothing), timeout=TIMEOUT)) == []
    print("streams")

try:
    runtime.ContainerStatus(cri.ContainerStatusRequest(container_id="absent"), timeout=TIMEOUT)
    sys.exit("the status of an unknown container was answered")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND, error

runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=1), timeout=TIMEOUT)
stopped = container_status()
assert stopped.state == cri.CONTAINER_EXITED and stopped.exit_code in (0, 137, 143) and stopped.finished_at >= stopped.started_at, stopped
runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container), timeout=TIMEOUT)
runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=TIMEOUT)
runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=TIMEOUT)
assert not runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=TIMEOUT).items
if streams:
    ready, not_ready = cri.SANDBOX_READY, cri.SANDBOX_NOTREADY
    expected = [
        (container, cri.CONTAINER_CREATED_EVENT, ready, 1), (container, cri.CONTAINER_STARTED_EVENT, ready, 1),
        (container, cri.CONTAINER_STOPPED_EVENT, ready, 1), (container, cri.CONTAINER_DELETED_EVENT, ready, 0),
        (sandbox, cri.CONTAINER_STOPPED_EVENT, not_ready, 0), (sandbox, cri.CONTAINER_DELETED_EVENT, not_ready, 0),
    ]
    # The sandbox may have been there before the subscription was.
    until("the last event", lambda: expected[-1] in events)
    assert events[-len(expected):] == expected, events
    subscription.cancel()
    follower.join(timeout=TIMEOUT)
    assert not follower.is_alive() and events[-1] == grpc.StatusCode.CANCELLED, events
print("gone")
