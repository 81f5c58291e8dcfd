//! The words of `crisp bench` and `crisp stats`.

use super::{set, Command};
use crate::cli::flags;
use crate::cli::words::{Stop, Word, Words};

/// `crisp stats`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// Containers that do not run too.
    pub all: bool,
    /// Pods instead of containers.
    pub pods: bool,
    pub id: Option<String>,
    pub pod: Option<String>,
    pub labels: Vec<(String, String)>,
    pub watch: bool,
    /// Seconds between two looks.
    pub interval: u32,
}

/// `crisp bench`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bench {
    pub what: What,
    pub image: String,
    /// What containers run.
    pub command: Vec<String>,
    pub handler: String,
    pub host_network: bool,
    pub cgroup_parent: String,
    /// Pods to make; 0 with `stats`: as many as are there.
    pub pods: usize,
    /// Calls or rounds.
    pub rounds: usize,
    /// At once.
    pub callers: usize,
    /// Names of more monitors.
    pub monitors: Vec<String>,
    pub svg: Option<String>,
}

/// What `crisp bench` measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Stats,
    Lifecycle,
    Density,
    /// Nothing: remove what earlier runs have left.
    Clean,
}

pub(super) fn stats(words: &mut Words) -> Result<Command, Stop> {
    let mut stats = Stats { interval: 2, ..Stats::default() };
    words.flags(|flag, words| match flag {
        "-a" | "--all" => set(&mut stats.all),
        "-p" | "--pods" => set(&mut stats.pods),
        "-w" | "--watch" => set(&mut stats.watch),
        "--id" => words.value().map(|text| super::put(&mut stats.id, text)),
        "--pod" => words.value().map(|text| super::put(&mut stats.pod, text)),
        "-l" | "--label" => {
            stats.labels.push(label(&words.value()?)?);
            Ok(true)
        }
        "--interval" => {
            stats.interval = positive(flag, words)?;
            Ok(true)
        }
        _ => Ok(false),
    })?;
    if stats.pods && stats.id.is_some() {
        return Err(words.wrong("--id names a container; use --pod with --pods"));
    }
    if stats.watch && words.json == Some(true) {
        return Err(words.wrong("--watch and -o json exclude each other"));
    }
    Ok(Command::Stats(stats))
}

fn label(text: &str) -> Result<(String, String), Stop> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Stop::Usage(format!("--label {text}: expected KEY=VALUE"))),
    }
}

fn positive(flag: &str, words: &mut Words) -> Result<u32, Stop> {
    let text = words.value()?;
    match flags::number(flag, &text)? {
        0 => Err(Stop::Usage(format!("{flag} {text}: expected 1 or more"))),
        number => Ok(number),
    }
}

pub(super) fn bench(words: &mut Words) -> Result<Command, Stop> {
    let what = match words.read()? {
        Some(Word::Value(name)) => match name.as_str() {
            "stats" => What::Stats,
            "lifecycle" => What::Lifecycle,
            "density" => What::Density,
            "clean" => What::Clean,
            _ => return Err(words.wrong(&format!("unknown benchmark {name:?}; expected stats, lifecycle, density or clean"))),
        },
        Some(Word::Flag(flag)) => return Err(words.unknown(&flag)),
        Some(Word::Rest(_)) | None => return Err(words.wrong("no benchmark; expected stats, lifecycle, density or clean")),
    };
    let mut bench = Bench {
        what,
        image: String::new(),
        command: vec!["sleep".to_owned(), "1000000".to_owned()],
        handler: String::new(),
        host_network: false,
        cgroup_parent: String::new(),
        pods: if what == What::Stats { 0 } else { 100 },
        rounds: if what == What::Stats { 200 } else { 20 },
        callers: 0,
        monitors: Vec::new(),
        svg: None,
    };
    while let Some(word) = words.read()? {
        let flag = match word {
            Word::Flag(flag) => flag,
            Word::Value(value) => return Err(words.wrong(&format!("unexpected {value:?}"))),
            Word::Rest(command) => {
                bench.command = command;
                break;
            }
        };
        match flag.as_str() {
            "--image" => bench.image = words.value()?,
            "--runtime" => bench.handler = words.value()?,
            "--host-network" => bench.host_network = true,
            "--cgroup-parent" => bench.cgroup_parent = words.value()?,
            "-n" | "--pods" => {
                let text = words.value()?;
                bench.pods = flags::number(&flag, &text)? as usize;
            }
            "--rounds" => bench.rounds = positive(&flag, words)? as usize,
            "--callers" => bench.callers = positive(&flag, words)? as usize,
            "--monitor" => bench.monitors.push(words.value()?),
            "--svg" => bench.svg = Some(words.value()?),
            _ => return Err(words.unknown(&flag)),
        }
    }
    let makes = match what {
        What::Stats => bench.pods > 0,
        What::Lifecycle | What::Density => true,
        What::Clean => false,
    };
    if makes && bench.image.is_empty() {
        return Err(words.wrong("no --image"));
    }
    if what == What::Density && bench.pods == 0 {
        return Err(words.wrong("--pods is 0"));
    }
    Ok(Command::Bench(bench))
}
