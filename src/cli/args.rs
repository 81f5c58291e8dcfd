//! The command line: words in, one `Command` out. Nothing is looked up or opened here.

use std::ffi::OsString;
use std::path::PathBuf;

use super::flags::{self, Credentials, Port, Volume};
use super::help;
use super::prune::Which;
use super::words::{Stop, Word, Words};

/// `crisp bench` and `crisp stats`.
pub mod bench;
/// `crisp exec`, `crisp attach` and `crisp port-forward`.
pub mod stream;

/// Where crispd listens.
const SOCKET: &str = "/run/crisp/crisp.sock";
/// Seconds of grace of a stop.
pub const GRACE: u32 = 10;

/// A command line that was understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Invocation {
    pub socket: PathBuf,
    /// `-o json`
    pub json: bool,
    pub command: Command,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Run(Run),
    Ps {
        all: bool,
        quiet: bool,
    },
    Pods {
        quiet: bool,
    },
    Images {
        quiet: bool,
    },
    Pull {
        images: Vec<String>,
        credentials: Option<Credentials>,
    },
    Import {
        files: Vec<String>,
        name: Option<String>,
    },
    Logs {
        container: String,
        follow: bool,
        tail: Option<usize>,
        times: bool,
    },
    Exec(stream::Exec),
    Attach(stream::Attach),
    PortForward(stream::Forward),
    Stop {
        ids: Vec<String>,
        timeout: u32,
    },
    Rm {
        ids: Vec<String>,
        force: bool,
    },
    /// The images named, or those of a kind.
    Rmi {
        images: Vec<String>,
        which: Option<Which>,
    },
    Prune {
        dry_run: bool,
    },
    Fsck {
        repair: bool,
    },
    Inspect {
        ids: Vec<String>,
    },
    Stats(bench::Stats),
    Bench(bench::Bench),
    Info,
    Version,
}

/// `crisp run`
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Run {
    pub image: String,
    pub command: Vec<String>,
    pub name: Option<String>,
    pub runtime: String,
    pub host_network: bool,
    pub environment: Vec<(String, String)>,
    pub volumes: Vec<Volume>,
    pub ports: Vec<Port>,
    pub credentials: Option<Credentials>,
    pub detach: bool,
}

/// The variables of the environment.
type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads the words after the program's name.
pub fn parse<I>(words: I, environment: Environment<'_>) -> Result<Invocation, Stop>
where
    I: IntoIterator<Item = OsString>,
    I::IntoIter: 'static,
{
    let mut words = Words::new(words);
    let name = match words.read()? {
        Some(Word::Value(name)) => name,
        Some(Word::Flag(flag)) => return Err(words.unknown(&flag)),
        Some(Word::Rest(_)) | None => return Err(Stop::Usage("no command; crisp --help lists them".to_owned())),
    };
    if name == "help" {
        let Some(Word::Value(name)) = words.read()? else { return Err(Stop::Help(None)) };
        return Err(help::topic(&name).map_or_else(|| unknown_command(&name), |topic| Stop::Help(Some(topic))));
    }
    let topic = help::topic(&name).ok_or_else(|| unknown_command(&name))?;
    words.topic = Some(topic);
    let command = command(&mut words, topic.name, environment)?;
    let json = words.json.unwrap_or(false);
    if json && !topic.json {
        return Err(Stop::Usage(format!("{name}: -o json has no meaning here")));
    }
    Ok(Invocation { socket: socket(words.socket, environment)?, json, command })
}

fn unknown_command(name: &str) -> Stop {
    Stop::Usage(format!("unknown command {name:?}; crisp --help lists them"))
}

/// The flag, else the variables, else the default.
fn socket(flag: Option<String>, environment: Environment<'_>) -> Result<PathBuf, Stop> {
    let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
    let named = flag.or_else(|| variable("CRISP_SOCKET")).or_else(|| variable("CONTAINER_RUNTIME_ENDPOINT"));
    let named = named.unwrap_or_else(|| SOCKET.to_owned());
    let path = named.strip_prefix("unix://").or_else(|| named.strip_prefix("unix:")).unwrap_or(&named);
    if path.is_empty() || path.contains("://") {
        return Err(Stop::Usage(format!("socket {named}: expected a path or unix://PATH")));
    }
    std::path::absolute(path).map_err(|error| Stop::Usage(format!("socket {named}: {error}")))
}

fn command(words: &mut Words, name: &str, environment: Environment<'_>) -> Result<Command, Stop> {
    Ok(match name {
        "run" => Command::Run(run(words, environment)?),
        "ps" => {
            let (mut all, mut quiet) = (false, false);
            words.flags(|flag, _| match flag {
                "-a" | "--all" => set(&mut all),
                "-q" | "--quiet" => set(&mut quiet),
                _ => Ok(false),
            })?;
            Command::Ps { all, quiet }
        }
        "pods" => Command::Pods { quiet: words.quiet()? },
        "images" => Command::Images { quiet: words.quiet()? },
        "pull" => {
            let mut credentials = None;
            let images = words.values("IMAGE", |flag, words| match flag {
                "--creds" => words.value().and_then(|text| Ok(put(&mut credentials, flags::credentials(&text)?))),
                _ => Ok(false),
            })?;
            Command::Pull { images, credentials: default_credentials(credentials, environment)? }
        }
        "import" => {
            let mut name = None;
            let files = words.values("FILE", |flag, words| match flag {
                "--name" => words.value().map(|text| put(&mut name, text)),
                _ => Ok(false),
            })?;
            if name.is_some() && files.len() > 1 {
                return Err(words.wrong("--name goes with one FILE"));
            }
            Command::Import { files, name }
        }
        "logs" => {
            let (mut follow, mut tail, mut times) = (false, None, false);
            let mut ids = words.values("CONTAINER", |flag, words| match flag {
                "-f" | "--follow" => set(&mut follow),
                "-t" | "--timestamps" => set(&mut times),
                "--tail" => words.value().and_then(|text| Ok(put(&mut tail, flags::number(flag, &text)? as usize))),
                _ => Ok(false),
            })?;
            let container = ids.remove(0);
            words.only(ids)?;
            Command::Logs { container, follow, tail, times }
        }
        "exec" => stream::exec(words)?,
        "attach" => stream::attach(words)?,
        "port-forward" => stream::forward(words)?,
        "stats" => bench::stats(words)?,
        "bench" => bench::bench(words)?,
        "stop" => {
            let mut timeout = GRACE;
            let ids = words.values("ID", |flag, words| match flag {
                "--timeout" => words.value().and_then(|text| {
                    timeout = flags::number(flag, &text)?;
                    Ok(true)
                }),
                _ => Ok(false),
            })?;
            Command::Stop { ids, timeout }
        }
        "rm" => {
            let mut force = false;
            let ids = words.values("ID", |flag, _| match flag {
                "-f" | "--force" => set(&mut force),
                _ => Ok(false),
            })?;
            Command::Rm { ids, force }
        }
        "rmi" => rmi(words)?,
        "prune" => {
            let mut dry_run = false;
            words.flags(|flag, _| match flag {
                "-n" | "--dry-run" => set(&mut dry_run),
                _ => Ok(false),
            })?;
            Command::Prune { dry_run }
        }
        "image" => {
            let mut repair = false;
            let what = words.values("fsck", |flag, _| match flag {
                "--repair" => set(&mut repair),
                _ => Ok(false),
            })?;
            match what.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["fsck"] => Command::Fsck { repair },
                _ => return Err(words.wrong(&format!("unexpected {:?}; it is crisp image fsck", what.join(" ")))),
            }
        }
        "inspect" => Command::Inspect { ids: words.values("ID", |_, _| Ok(false))? },
        "info" => words.flags(|_, _| Ok(false)).map(|()| Command::Info)?,
        _ => words.flags(|_, _| Ok(false)).map(|()| Command::Version)?,
    })
}

fn rmi(words: &mut Words) -> Result<Command, Stop> {
    let (mut images, mut all, mut unused) = (Vec::new(), false, false);
    while let Some(word) = words.read()? {
        match word {
            Word::Value(image) => images.push(image),
            Word::Rest(rest) => images.extend(rest),
            Word::Flag(flag) => match flag.as_str() {
                "-a" | "--all" => all = true,
                "-q" | "--prune" => unused = true,
                _ => return Err(words.unknown(&flag)),
            },
        }
    }
    let which = match (all, unused) {
        (true, true) => return Err(words.wrong("--all and --prune exclude each other")),
        (true, false) => Some(Which::All),
        (false, true) => Some(Which::Unused),
        (false, false) => None,
    };
    match (images.is_empty(), which) {
        (true, None) => Err(words.wrong("no IMAGE")),
        (false, Some(_)) => Err(words.wrong("--all and --prune take no IMAGE")),
        _ => Ok(Command::Rmi { images, which }),
    }
}

fn run(words: &mut Words, environment: Environment<'_>) -> Result<Run, Stop> {
    let mut run = Run::default();
    let (mut images, mut remove) = (Vec::new(), false);
    while let Some(word) = words.read()? {
        let flag = match word {
            Word::Value(image) => {
                images.push(image);
                continue;
            }
            Word::Rest(command) => {
                run.command = command;
                break;
            }
            Word::Flag(flag) => flag,
        };
        match flag.as_str() {
            "--name" => run.name = Some(words.value()?),
            "--runtime" => run.runtime = words.value()?,
            "--host-network" => run.host_network = true,
            "-e" | "--env" => run.environment.push(flags::variable(&words.value()?, environment)?),
            "-v" | "--volume" => run.volumes.push(flags::volume(&words.value()?)?),
            "-p" | "--publish" => run.ports.push(flags::port(&words.value()?)?),
            "--creds" => run.credentials = Some(flags::credentials(&words.value()?)?),
            "--rm" => remove = true,
            "-d" | "--detach" => run.detach = true,
            _ => return Err(words.unknown(&flag)),
        }
    }
    match images.len() {
        0 => return Err(words.wrong("no IMAGE")),
        1 => run.image = images.remove(0),
        _ => return Err(words.wrong(&format!("unexpected {:?}; the command goes after --", images[1]))),
    }
    if run.name.as_deref() == Some("") {
        return Err(words.wrong("--name is empty"));
    }
    if remove && run.detach {
        return Err(words.wrong("--rm and --detach exclude each other"));
    }
    if run.host_network && !run.ports.is_empty() {
        return Err(words.wrong("-p has no meaning with --host-network"));
    }
    run.credentials = default_credentials(run.credentials, environment)?;
    Ok(run)
}

fn default_credentials(flag: Option<Credentials>, environment: Environment<'_>) -> Result<Option<Credentials>, Stop> {
    match (flag, environment("CRISP_CREDS").filter(|value| !value.is_empty())) {
        (None, Some(text)) => Ok(Some(flags::credentials(&text).map_err(|error| format!("CRISP_CREDS: {error}"))?)),
        (flag, _) => Ok(flag),
    }
}

fn set(flag: &mut bool) -> Result<bool, Stop> {
    *flag = true;
    Ok(true)
}

fn put<T>(place: &mut Option<T>, value: T) -> bool {
    *place = Some(value);
    true
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
