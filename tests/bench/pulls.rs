//! Pulls from one registry on loopback: time, CPU, the daemon's peak of memory, and what is on disk afterwards.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crisp::api::runtime::{ImageSpec, PullImageRequest, RemoveImageRequest};
use crisp::cli::bench::report::{Cell, Report};
use crisp::cli::bench::samples::{millis, timed, Samples};
use protobuf::MessageField;

use crate::daemon::Daemon;
use crate::images::{self, Compression, Made, Recipe};
use crate::registry::Registry;
use crate::{progress, Peer, Plan};

const LIMIT: Option<Duration> = Some(Duration::from_secs(900));
/// For what a removed image had to be deleted.
const SETTLE: Duration = Duration::from_secs(30);
const MIB: f64 = (1 << 20) as f64;

/// `columns`: the first peer of each daemon.
pub fn measure(daemons: &[Daemon], peers: &[Peer], columns: &[usize], plan: &Plan, report: &mut Report) {
    let recipes = [
        ("20 layers, gzip", Recipe { name: "gzip", layers: 20, bytes: plan.image_bytes, compression: Compression::Gzip }),
        ("1 layer, zstd", Recipe { name: "zstd", layers: 1, bytes: plan.image_bytes * 500 / 1024, compression: Compression::Zstd }),
    ];
    let made = recipes.map(|(words, recipe)| (format!("{words}, {} MiB", recipe.bytes >> 20), images::make(recipe)));
    let registry = Registry::serving(&images::storage());
    for (words, image) in &made {
        let mut pulls = vec![Pulls::default(); columns.len()];
        // The first round brings the registry's files into memory and is not counted.
        for round in 0..=plan.pulls {
            for (at, &column) in columns.iter().enumerate() {
                progress(&format!("pull of {words}: {}, {round}/{}", peers[column].name, plan.pulls));
                let one = pull(&daemons[at], &peers[column], &registry, image);
                if round > 0 {
                    pulls[at].add(one);
                }
            }
        }
        for (pulls, &column) in pulls.iter().zip(columns) {
            let title = format!("pull of an image: {words}");
            report.set(&title, "time", "ms", column, Cell::of(&pulls.times));
            report.set(&title, "CPU of daemon and helpers", "ms", column, Cell::of(&pulls.cpu));
            report.set(&title, "peak RSS of the daemon", "MiB", column, Some(pulls.peak.into()));
            report.set(&title, "on disk afterwards / unpacked", "x", column, Some(pulls.disk.into()));
        }
    }
}

#[derive(Clone, Default)]
struct Pulls {
    times: Samples,
    cpu: Samples,
    /// MiB, the worst of all.
    peak: f64,
    disk: f64,
}

struct Pull {
    time: Duration,
    cpu: Duration,
    peak: f64,
    disk: f64,
}

impl Pulls {
    fn add(&mut self, pull: Pull) {
        self.times.add(pull.time);
        self.cpu.add(pull.cpu);
        self.peak = self.peak.max(pull.peak);
        self.disk = self.disk.max(pull.disk);
    }
}

fn pull(daemon: &Daemon, peer: &Peer, registry: &Registry, image: &Made) -> Pull {
    let root = daemon.layout.path("root");
    let before = disk(&root);
    let spec = ImageSpec { image: format!("{}/{}", registry.host, image.reference), ..Default::default() };
    let spec = MessageField::some(spec);
    // Writes of the round before are not this one's.
    rustix::fs::sync();
    let pid = daemon.pid();
    fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("reset the peak of memory");
    let mut meter = peer.server.meter();
    let request = PullImageRequest { image: spec.clone(), ..Default::default() };
    let (answer, time) = timed(|| peer.client.images().pull_image(&request, LIMIT));
    let cpu = meter.take();
    answer.unwrap_or_else(|e| panic!("{}: pull {}: {e}\n{}", peer.name, image.reference, daemon.log_tail()));
    let peak = peak(pid);
    rustix::fs::sync();
    let used = disk(&root).saturating_sub(before);
    let remove = RemoveImageRequest { image: spec, ..Default::default() };
    peer.client.images().remove_image(&remove, LIMIT).unwrap_or_else(|e| panic!("{}: remove {}: {e}", peer.name, image.reference));
    let begin = Instant::now();
    while disk(&root) > before + image.compressed / 10 && begin.elapsed() < SETTLE {
        std::thread::sleep(Duration::from_millis(100));
    }
    progress(&format!("{}: {:.1} s, {:.0} ms of CPU", peer.name, time.as_secs_f64(), millis(cpu)));
    Pull { time, cpu, peak, disk: used as f64 / image.unpacked as f64 }
}

/// MiB since the last reset.
fn peak(pid: i32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("read the daemon's status");
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak of memory");
    let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse().expect("a number");
    kib * 1024.0 / MIB
}

/// Allocated bytes below a directory; what goes away meanwhile is not counted.
fn disk(dir: &Path) -> u64 {
    let mut sum = 0;
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.path().symlink_metadata() else { continue };
            sum += meta.blocks() * 512;
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    sum
}
