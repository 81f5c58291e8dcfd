//! crispd: reads flags and configuration, then hands over to `crisp::daemon`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crisp::config::{self, Config, Overrides};
use crisp::{check, daemon};
use lexopt::prelude::*;

const HELP: &str = "\
crispd - a Kubernetes CRI runtime

usage: crispd [--config FILE] [--socket PATH] [--root DIR] [--run DIR] [--log-level LEVEL]
       crispd config default        print the commented default configuration
       crispd config check FILE     check a configuration; exit 2 when it is wrong
       crispd check [-o json]       tell what this host has and lacks for containers; exit 1 when it cannot run any
       crispd debug steps           print the crash points of debug builds

Without --config, /etc/crisp/config.toml is read when it is there. SIGHUP reloads the log level and the CNI
configuration; SIGTERM and SIGINT stop the daemon and leave the containers running.
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, message)) => {
            eprintln!("crispd: {message}");
            ExitCode::from(code)
        }
    }
}

/// Prints `words`; a reader that has gone away is its own business.
fn say(words: &str) -> Result<(), (u8, String)> {
    use std::io::Write;
    let _ = std::io::stdout().write_all(words.as_bytes());
    Ok(())
}

/// Exit code 1 when something is missing; the report has said what.
fn check(config: &Config, json: bool) -> Result<(), (u8, String)> {
    let report = check::look(config, None);
    say(&match json {
        true => serde_json::to_string_pretty(&report).map_err(|e| (1, e.to_string()))? + "\n",
        false => report.to_string(),
    })?;
    match report.ready {
        true => Ok(()),
        false => Err((1, "this host cannot run containers as configured".to_owned())),
    }
}

fn text(parser: &mut lexopt::Parser) -> Result<String, lexopt::Error> {
    parser.value()?.string()
}

fn run() -> Result<(), (u8, String)> {
    let usage = |e: lexopt::Error| (2, format!("{e}; see crispd --help"));
    let (mut file, mut overrides, mut words, mut json) = (None::<PathBuf>, Overrides::default(), Vec::new(), false);
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next().map_err(usage)? {
        match arg {
            Short('h') | Long("help") => return say(HELP),
            Short('V') | Long("version") => return say(concat!("crispd ", env!("CARGO_PKG_VERSION"), "\n")),
            Short('c') | Long("config") => file = Some(text(&mut parser).map_err(usage)?.into()),
            Long("socket") => overrides.socket = Some(text(&mut parser).map_err(usage)?),
            Long("root") => overrides.root = Some(text(&mut parser).map_err(usage)?),
            Long("run") => overrides.run = Some(text(&mut parser).map_err(usage)?),
            Long("log-level") => overrides.log_level = Some(text(&mut parser).map_err(usage)?),
            Long("json") => json = true,
            Short('o') | Long("output") => match text(&mut parser).map_err(usage)?.as_str() {
                "json" => json = true,
                "text" => json = false,
                other => return Err((2, format!("-o {other}: expected text or json"))),
            },
            Value(word) => words.push(word.string().map_err(usage)?),
            other => return Err(usage(other.unexpected())),
        }
    }
    let load = |path: Option<&Path>| Config::load(path, &overrides).map_err(|e| (2, e.to_string()));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if json && words != ["check"] {
        return Err((2, "-o and --json belong to crispd check".to_owned()));
    }
    match words[..] {
        [] => daemon::run(load(file.as_deref())?, file, overrides).map_err(|e| (1, e.to_string())),
        ["config", "default"] => say(config::DEFAULT),
        ["config", "check", path] => load(Some(Path::new(path))).and_then(|_| say(&format!("{path}: good\n"))),
        ["check"] => check(&load(file.as_deref())?, json),
        ["debug", "steps"] => say(&(crisp::sys::crash::STEPS.join("\n") + "\n")),
        _ => Err((2, format!("unknown command {:?}; see crispd --help", words.join(" ")))),
    }
}
