#!/usr/bin/python3 -SE
"""Takes the place of an OCI runtime: the command line of runc, without namespaces, mounts or users.

The container's program runs on the host, in a session and a cgroup of its own. Every call is a line of `calls` beside this
file (but that for its features). What it should do wrong stands in `switch/VERB` beside it, or in FAKE_VERB of the process's environment:

    fail WORDS     says WORDS in the log as runc does, and exits with 1
    stderr WORDS   says WORDS on stderr alone, and exits with 1
    hang           never ends
    slow SECONDS   waits, then goes on
    gate FILE      waits for as long as FILE is there, then goes on
    die            is killed by a signal
    nopid          says that all is well, having done nothing
"""
import fcntl
import json
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(sys.argv[0]))
FLAGS = ("--detach", "--force", "--systemd-cgroup", "--version")


def parse(arguments):
    options, words = {}, []
    rest = iter(arguments)
    for word in rest:
        if word in FLAGS:
            options[word] = True
        elif word.startswith("--"):
            options[word] = next(rest)
        else:
            words.append(word)
    return options, words


OPTIONS, WORDS = parse(sys.argv[1:])


def record():
    line = json.dumps({"verb": WORDS[0], "id": WORDS[1], "args": sys.argv[1:]}) + "\n"
    calls = os.open(os.path.join(HERE, "calls"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(calls, line.encode())
    os.close(calls)


def fail(words):
    log = OPTIONS.get("--log")
    if log:
        with open(log, "a") as file:
            file.write(json.dumps({"level": "error", "msg": words, "time": "2026-01-02T03:04:05Z"}) + "\n")
    else:
        sys.stderr.write(words + "\n")
    sys.exit(1)


def misbehave(environment=()):
    verb = WORDS[0]
    key = "FAKE_%s=" % verb.upper()
    asked = [entry[len(key):] for entry in environment if entry.startswith(key)]
    try:
        with open(os.path.join(HERE, "switch", verb)) as file:
            asked.append(file.read())
    except FileNotFoundError:
        pass
    for text in asked:
        kind, _, words = text.strip().partition(" ")
        if kind == "fail":
            fail(words)
        elif kind == "stderr":
            sys.stderr.write(words + "\n")
            sys.exit(1)
        elif kind == "hang":
            time.sleep(3600)
        elif kind == "slow":
            time.sleep(float(words))
        elif kind == "gate":
            while os.path.exists(words):
                time.sleep(0.02)
        elif kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "nopid":
            sys.exit(0)


def cgroup_dir(path):
    base = "/sys/fs/cgroup"
    if not os.path.exists(base + "/cgroup.controllers"):
        base += "/pids"
    return os.path.join(base, path.lstrip("/"))


def start_time(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rsplit(")", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def state_path(id):
    return os.path.join(OPTIONS["--root"], id + ".json")


def load(id):
    with open(state_path(id)) as file:
        return json.load(file)


def alive(state):
    return start_time(state["pid"]) == state["start"]


def open_terminal():
    """A terminal as the container's stdio; its other end goes to the console socket."""
    import array
    import pty
    import socket
    master, slave = pty.openpty()
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(OPTIONS["--console-socket"])
        console.sendmsg([b"/dev/ptmx"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
    os.close(master)
    return slave


def spawn(process, cgroup, bound=()):
    """Starts the process; its pid, or the error of its exec as runc words it."""
    bound = dict(bound)
    args = process["args"]
    environment = dict(entry.partition("=")[::2] for entry in process.get("env", ()))
    terminal = open_terminal() if process.get("terminal") and "--console-socket" in OPTIONS else None
    error, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.umask(0o022)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            if terminal is not None:
                import termios
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
                for fd in range(3):
                    os.dup2(terminal, fd)
            with open(os.path.join(cgroup, "cgroup.procs"), "w") as file:
                file.write("0")
            os.execvpe(bound.get(args[0], args[0]), args, environment)
        except BaseException as e:
            os.write(sink, ("exec: %r: %s" % (args[0], e)).encode())
        os._exit(127)
    os.close(sink)
    words = os.read(error, 4096)
    if words:
        os.waitpid(pid, 0)
        fail("unable to start container process: " + words.decode())
    return pid


def write_pid(pid):
    path = OPTIONS["--pid-file"]
    with open(path + ".new", "w") as file:
        file.write(str(pid))
    os.rename(path + ".new", path)


def run(id):
    with open(os.path.join(OPTIONS["--bundle"], "config.json")) as file:
        spec = json.load(file)
    if os.path.exists(state_path(id)):
        fail("container with given ID already exists")
    misbehave(spec["process"].get("env", ()))
    cgroup = cgroup_dir(spec["linux"]["cgroupsPath"])
    os.makedirs(cgroup, exist_ok=True)
    os.makedirs(OPTIONS["--root"], exist_ok=True)
    bound = [(m["destination"], m.get("source")) for m in spec.get("mounts", ()) if m.get("type") == "bind"]
    pid = spawn(spec["process"], cgroup, bound)
    with open(state_path(id), "w") as file:
        json.dump({"pid": pid, "start": start_time(pid), "cgroup": cgroup, "bundle": OPTIONS["--bundle"]}, file)
    write_pid(pid)
    if "--detach" not in OPTIONS:
        _, status = os.waitpid(pid, 0)
        sys.exit(os.waitstatus_to_exitcode(status) & 255)


def exec_(id):
    with open(OPTIONS["--process"]) as file:
        process = json.load(file)
    misbehave(process.get("env", ()))
    cgroup = load(id)["cgroup"]
    if "--cgroup" in OPTIONS:
        cgroup = os.path.join(cgroup, OPTIONS["--cgroup"].rpartition(":")[2])
    write_pid(spawn(process, cgroup))


def kill(id, number):
    misbehave()
    state = load(id)
    if not alive(state):
        fail("container not running")
    os.kill(state["pid"], int(number))


def environment_of(id):
    try:
        with open(os.path.join(load(id)["bundle"], "config.json")) as file:
            return json.load(file)["process"].get("env", ())
    except FileNotFoundError:
        return ()


def delete(id):
    misbehave(environment_of(id))
    try:
        state = load(id)
    except FileNotFoundError:
        if "--force" in OPTIONS:
            return
        fail("container does not exist")
    if alive(state):
        os.kill(state["pid"], signal.SIGKILL)
        for _ in range(200):
            if not alive(state):
                break
            time.sleep(0.005)
    try:
        os.rmdir(state["cgroup"])
    except OSError:
        pass
    os.unlink(state_path(id))


def update(id):
    misbehave()
    with open(OPTIONS["--resources"]) as file:
        resources = file.read()
    with open(os.path.join(HERE, "updated"), "w") as file:
        file.write(resources)


def state(id):
    misbehave()
    found = load(id)
    status = "running" if alive(found) else "stopped"
    print(json.dumps({"ociVersion": "1.0.2", "id": id, "status": status, "pid": found["pid"], "bundle": found["bundle"]}))


if "--version" in OPTIONS:
    print("fake version 1.2.3")
    sys.exit(0)
if WORDS[0] == "features":
    try:
        with open(os.path.join(HERE, "features")) as file:
            print(file.read())
    except FileNotFoundError:
        print(json.dumps({"ociVersionMin": "1.0.0", "ociVersionMax": "1.1.0", "mountOptions": ["bind", "ro", "rro", "rw"],
                          "linux": {"namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"]}}))
    sys.exit(0)
record()
VERBS = {"run": run, "exec": exec_, "kill": kill, "delete": delete, "update": update, "state": state}
VERBS[WORDS[0]](*WORDS[1:])
