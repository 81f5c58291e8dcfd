//! What `--help` says.

/// One command.
#[derive(Debug, PartialEq, Eq)]
pub struct Topic {
    pub name: &'static str,
    /// After `crisp NAME`.
    pub synopsis: &'static str,
    /// One line for the list of commands.
    pub about: &'static str,
    /// Flags and what there is to know.
    pub text: &'static str,
    /// It understands `-o json`.
    pub json: bool,
}

const GENERAL: &str = "\
crisp: pods, containers and images of a node without crictl

Usage: crisp [-s SOCKET] [-o json] COMMAND [ARGUMENTS]

Commands:
";

const GENERAL_END: &str = "
Flags of every command:
  -s, --socket PATH   the daemon's socket; else $CRISP_SOCKET, else $CONTAINER_RUNTIME_ENDPOINT,
                      else /run/crisp/crisp.sock
  -o, --output FORMAT table (for people) or json (for programs: the fields of the CRI, as crictl names them)
  -h, --help          this text; after a command, more about it
  -V, --version       the version of this program

Containers and sandboxes are named by their id, the start of it, or their name.
Exit codes: 0 fine, 1 it did not work, 2 wrong usage; run, exec and attach end with the code of what they ran.
";

const IDS: &str = "
An ID is an id, the start of one, or a name. A name that a sandbox shares with its only container means the
sandbox here. A word that fits several things is an error that names them.
";

/// Every command, in the order of the list.
pub const TOPICS: &[Topic] = &[
    Topic {
        name: "run",
        synopsis: "[FLAGS] IMAGE [-- COMMAND…]",
        about: "run a container in a sandbox of its own and show its output",
        json: true,
        text: "\
Pulls IMAGE if it is not here, makes a sandbox with one container in it, follows the container's output and ends with
its exit code. COMMAND replaces the image's default command (its entrypoint stays). Ctrl-C or a TERM signal stops the
container (10 s of grace; a second one kills it). At the end, whatever it was, container and sandbox are removed.

  --name NAME          name of the sandbox and of the container (else: run- and random letters)
  --runtime HANDLER    runtime handler; `crisp info` lists them
  --host-network       share the host's network
  -e, --env KEY=VALUE  environment variable; KEY alone takes over the value it has here
  -v, --volume HOST:PATH[:ro]
                       mount a file or directory of the host
  -p, --publish [IP:]HOSTPORT:PORT[/PROTOCOL]
                       forward a port of the host; protocol tcp, udp or sctp
  --creds USER:PASS    credentials for the registry; better in $CRISP_CREDS, which other users cannot see
  --rm                 remove at the end; this is the default
  -d, --detach         print the ids of container and sandbox, and leave them running; `crisp rm -f` removes them

On a node with a kubelet, the kubelet removes sandboxes that it has not asked for.
",
    },
    Topic {
        name: "ps",
        synopsis: "[-a] [-q]",
        about: "list containers",
        json: true,
        text: "\
Lists running containers, the youngest first.

  -a, --all            those that do not run too
  -q, --quiet          whole ids alone
",
    },
    Topic {
        name: "pods",
        synopsis: "[-q]",
        about: "list sandboxes",
        json: true,
        text: "\
Lists sandboxes, the youngest first.

  -q, --quiet          whole ids alone
",
    },
    Topic {
        name: "images",
        synopsis: "[-q]",
        about: "list images",
        json: true,
        text: "\
Lists the images that are here, one line per name. Images that must be pulled again, because parts of them are missing,
are marked; -o json lists whole ones alone.

  -q, --quiet          whole ids alone
",
    },
    Topic {
        name: "pull",
        synopsis: "[--creds USER:PASS] IMAGE…",
        about: "pull images from a registry",
        json: true,
        text: "\
Pulls each IMAGE and prints its id. Progress goes to stderr: bars with speed and time left on a terminal, lines
otherwise.

  --creds USER:PASS    credentials for the registry; better in $CRISP_CREDS, which other users cannot see
",
    },
    Topic {
        name: "import",
        synopsis: "[--name REFERENCE] FILE…",
        about: "take images from files, without a registry",
        json: true,
        text: "\
Takes in the images of each FILE: an OCI or docker archive (tar, also gzip or zstd) or an OCI layout directory. The
daemon reads the file, so it must be on the daemon's host.

  --name REFERENCE     name for the image, if there is one FILE with one image; else the names in the archive
",
    },
    Topic {
        name: "logs",
        synopsis: "[-f] [--tail N] [-t] CONTAINER",
        about: "show the output of a container",
        json: false,
        text: "\
Shows what the container has written, stdout to stdout and stderr to stderr.

  -f, --follow         go on until the container has ended
  --tail N             the last N lines
  -t, --timestamps     the time before each line
",
    },
    Topic {
        name: "exec",
        synopsis: "[-i] [-t] [--sync] [--timeout S] CONTAINER COMMAND…",
        about: "run a command in a container",
        json: false,
        text: "\
Runs COMMAND in a running container, shows its output as it comes, and ends with its exit code. All words after
CONTAINER belong to COMMAND.

  -i, --stdin          hand over stdin; its end ends the command's
  -t, --tty            give the command a terminal of the size of this one
  --detach-keys KEYS   with -t: end the connection (default ctrl-p,ctrl-q; empty: never). The command lives on,
                       without a terminal
  --sync               in one call, without streams: the output comes at the end
  --timeout S          --sync, and kill it after S seconds
  --ca FILE            if the daemon's streams speak TLS: believe the authorities in this PEM file too
",
    },
    Topic {
        name: "attach",
        synopsis: "[-i] [-t] CONTAINER",
        about: "connect to the main process of a container",
        json: false,
        text: "\
Shows what the container writes from now on. Ends with the container, with its exit code, or by the detach keys or
Ctrl-C, which leave it running (with -i -t, Ctrl-C is for the container).

  -i, --stdin          hand over stdin, if the container was made to have one
  -t, --tty            the container has a terminal
  --detach-keys KEYS   with -t: end the connection (default ctrl-p,ctrl-q; empty: never)
  --ca FILE            if the daemon's streams speak TLS: believe the authorities in this PEM file too
",
    },
    Topic {
        name: "port-forward",
        synopsis: "[--address IP] SANDBOX [LOCAL:]PORT…",
        about: "make ports of a sandbox reachable here",
        json: false,
        text: "\
Listens on each LOCAL port (default: the same number; 0 or none before the colon: any that is free) and connects what
comes to PORT in the sandbox, until Ctrl-C.

  --address IP         listen here instead of on 127.0.0.1
  --ca FILE            if the daemon's streams speak TLS: believe the authorities in this PEM file too
",
    },
    Topic {
        name: "stop",
        synopsis: "[--timeout S] ID…",
        about: "stop containers or sandboxes",
        json: false,
        text: "\
Stops containers, and sandboxes with all their containers; what is stopped already is fine.

  --timeout S          seconds between the stop signal and KILL (default 10)
",
    },
    Topic {
        name: "rm",
        synopsis: "[-f] ID…",
        about: "remove containers or sandboxes",
        json: false,
        text: "\
Removes containers, and sandboxes with all their containers.

  -f, --force          stop what still runs
",
    },
    Topic {
        name: "rmi",
        synopsis: "IMAGE…|--all|--prune",
        about: "remove images",
        json: false,
        text: "\
Removes images with all their names. Layers that a container has stay until it is removed.

  -a, --all            all images but pinned ones
  -q, --prune          all images that no container has, but pinned ones
",
    },
    Topic {
        name: "prune",
        synopsis: "[-n]",
        about: "remove images that nobody needs",
        json: true,
        text: "\
Removes the images that no container has, running or not, and shows them; pinned images stay.

  -n, --dry-run        show them, remove nothing
",
    },
    Topic {
        name: "image",
        synopsis: "fsck [--repair]",
        about: "verify and repair what is stored of images",
        json: true,
        text: "\
Reads all that is stored of images: the index, manifests and configs against their digests, and each unpacked layer,
file by file, against the digest that the image has for it. It takes as long as the disk needs to read it all, and
disturbs nobody. Ends with 1 if there is damage that stays.

  --repair             a damaged layer is marked: images that need it are incomplete until the next pull of one, which
                       fetches this layer alone; damaged documents go to the quarantine directory; the index is
                       written anew; what nobody needs is removed
",
    },
    Topic {
        name: "inspect",
        synopsis: "ID|IMAGE…",
        about: "show all about a container, sandbox or image",
        json: true,
        text: "Shows a container, a sandbox or an image as JSON, with what the daemon adds to it.\n",
    },
    Topic {
        name: "stats",
        synopsis: "[-a] [-p] [-w] [--id C] [--pod P] [-l KEY=VALUE]",
        about: "show what containers or pods use",
        json: true,
        text: "\
Shows CPU (100 % is one core), memory (the working set), the writable layer's bytes and files, and swap.

  -a, --all            containers that do not run too
  -p, --pods           pods instead of containers
  -w, --watch          again and again in place, with bars of how CPU and memory went; Ctrl-C ends it
  --interval S         seconds between two looks of --watch (default 2)
  --id CONTAINER       this container alone
  --pod POD            this pod, or its containers, alone
  -l, --label KEY=VALUE
                       those with this label; several must all fit
",
    },
    Topic {
        name: "bench",
        synopsis: "stats|lifecycle|density|clean [FLAGS] [-- COMMAND…]",
        about: "measure what calls of a CRI server cost",
        json: true,
        text: "\
Measures the server behind --socket, this one or another: time of calls (p50, p95, p99), CPU time of the server and
its helpers (monitors, OCI runtimes, plugins) per call, and memory by kind of process. It must run as root on the same
host. What it makes is gone at the end, also after Ctrl-C, and carries the label crisp.bench/token.

  stats                ListContainerStats, ListPodSandboxStats and ListPodSandboxMetrics, of the pods that are there or
                       of --pods new ones
  lifecycle            one pod after another from RunPodSandbox to RemovePodSandbox
  density              many pods at once up and down
  clean                remove what runs that were killed have left

  --image IMAGE        image of the containers; pulled if it is not there. COMMAND (default: sleep 1000000) replaces its
                       entrypoint
  -n, --pods N         pods to make (density: 100, stats: 0)
  --rounds N           rounds of lifecycle (20), calls of stats (200, at most 20 s)
  --callers N          callers at once (density: one per pod, stats: 8)
  --runtime HANDLER    runtime handler
  --host-network       share the host's network: without CNI
  --cgroup-parent PATH cgroup of the pods
  --monitor NAME       count processes of this name as the server's monitors too
  --svg FILE           a picture as well
",
    },
    Topic {
        name: "info",
        synopsis: "",
        about: "show the state of the daemon and its runtime handlers",
        json: true,
        text: "Shows whether runtime and network are ready, and the runtime handlers with what they can do.\n",
    },
    Topic {
        name: "version",
        synopsis: "",
        about: "show the versions of client and daemon",
        json: true,
        text: "Shows the version of this program, of the daemon and of the interface between them.\n",
    },
];

/// The command of that name.
pub fn topic(name: &str) -> Option<&'static Topic> {
    TOPICS.iter().find(|topic| topic.name == name)
}

/// The text of `crisp --help` or `crisp COMMAND --help`.
pub fn text(topic: Option<&Topic>) -> String {
    match topic {
        None => {
            let list: String = TOPICS.iter().map(|topic| format!("  {:<13}{}\n", topic.name, topic.about)).collect();
            format!("{GENERAL}{list}{GENERAL_END}")
        }
        Some(topic) => {
            let usage = format!("Usage: crisp {} {}", topic.name, topic.synopsis);
            let ids = if topic.synopsis.contains("ID") { IDS } else { "" };
            format!("{}\n\n{}{ids}\nFlags of every command: crisp --help\n", usage.trim_end(), topic.text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_fit_a_terminal_and_name_every_command() {
        let general = text(None);
        for topic in TOPICS {
            assert!(general.contains(&format!("\n  {} ", topic.name)), "{}", topic.name);
            let own = text(Some(topic));
            assert!(own.starts_with(&format!("Usage: crisp {}", topic.name)), "{own}");
            assert!(own.lines().all(|line| line.chars().count() <= 120), "{own}");
        }
    }
}
