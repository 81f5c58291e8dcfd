//! The client `crisp`: the CRI for people on a node without crictl, on the daemon's own socket.
//!
//! Words become one command in `args`; each command is one function that gives back text or an exit code; errors
//! are one line and an exit code (`failure`).

use std::ffi::OsString;
use std::io::Write;

/// The command line.
pub mod args;
/// Benchmarks of CRI servers.
pub mod bench;
/// The connection and its calls.
pub mod client;
/// Errors and exit codes.
pub mod failure;
/// A daemon made of answers, for tests of whole commands.
#[cfg(test)]
mod fake;
/// Values of flags.
pub mod flags;
/// Log files that grow.
pub mod follow;
/// `crisp image fsck`.
pub mod fsck;
/// `--help`.
pub mod help;
/// Commands on images.
pub mod image;
/// Signals as messages.
pub mod interrupt;
/// `-o json`.
pub mod json;
/// Listings.
pub mod list;
/// The CRI log format.
pub mod log;
/// Commands on containers and sandboxes.
pub mod object;
/// Images that nobody needs.
pub mod prune;
/// Pulls with progress.
pub mod pull;
/// Requests of `crisp run`.
pub mod request;
/// From names to objects.
pub mod resolve;
/// `crisp run`.
pub mod run;
/// Sparklines.
pub mod spark;
/// `crisp stats`.
pub mod stats;
/// `exec`, `attach` and `port-forward`.
pub mod stream;
/// Tables for people.
pub mod table;
/// Words of the command line.
pub mod words;

use args::{Command, Invocation};
use client::Client;
use failure::{Failure, Outcome};
use list::Form;
use words::Stop;

/// Runs the command line `words` (without the program's name) and gives the exit code.
pub fn main<I>(words: I) -> u8
where
    I: IntoIterator<Item = OsString>,
    I::IntoIter: 'static,
{
    let result = match args::parse(words, &|name| std::env::var(name).ok()) {
        Ok(invocation) => dispatch(invocation),
        Err(Stop::Help(topic)) => print(&help::text(topic)).map(|()| 0),
        Err(Stop::Version) => print(concat!("crisp ", env!("CARGO_PKG_VERSION"), "\n")).map(|()| 0),
        Err(Stop::Usage(message)) => Err(Failure::Usage(message)),
    };
    result.unwrap_or_else(|failure| failure.report())
}

fn dispatch(invocation: Invocation) -> Outcome<u8> {
    let Invocation { socket, json, command } = invocation;
    // Before the connection, which starts threads.
    let signals = match command {
        Command::Run(_) | Command::Bench(_) | Command::PortForward(_) => interrupt::receive()?,
        Command::Stats(ref stats) if stats.watch => interrupt::receive()?,
        _ => crossbeam_channel::never(),
    };
    let descriptor = match command {
        Command::Exec(_) | Command::Attach(_) => Some(interrupt::descriptor()?),
        _ => None,
    };
    let client = match Client::connect(&socket) {
        Err(failure) if command == Command::Version && !json => {
            print(concat!("client  crisp ", env!("CARGO_PKG_VERSION"), "\n"))?;
            return Err(failure);
        }
        other => other?,
    };
    let form = |quiet| match (quiet, json) {
        (true, _) => Form::Quiet,
        (false, true) => Form::Json,
        (false, false) => Form::Table,
    };
    let text = match command {
        Command::Run(run) => return run::run(&client, &run, json, &signals),
        Command::Stats(stats) => return stats::run(&client, &stats, json, &signals),
        Command::Bench(bench) => return bench::run(&client, &socket, &bench, json, &signals),
        Command::Exec(exec) => return stream::exec(&client, &exec, descriptor.as_ref()),
        Command::Attach(attach) => return stream::attach(&client, &attach, descriptor.as_ref()),
        Command::PortForward(forward) => return stream::port_forward(&client, &forward, &signals),
        Command::Logs { container, follow, tail, times } => return object::logs(&client, &container, follow, tail, times).map(|()| 0),
        Command::Stop { ids, timeout } => {
            let objects = resolve::objects(&client)?;
            return each(&ids, |id| object::stop(&client, &objects, id, timeout));
        }
        Command::Rm { ids, force } => {
            let objects = resolve::objects(&client)?;
            return each(&ids, |id| object::remove(&client, &objects, id, force));
        }
        Command::Rmi { images, which: None } => return each(&images, |name| image::remove(&client, name)),
        Command::Rmi { which: Some(which), .. } => {
            return each(&prune::ids(&client, which)?, |id| prune::remove(&client, id).map(|()| id.to_owned()))
        }
        Command::Prune { dry_run } => return finish(prune::prune(&client, dry_run, json)?),
        Command::Fsck { repair } => return finish(fsck::fsck(&client, repair, json)?),
        Command::Ps { all, quiet } => list::containers(&client, all, form(quiet))?,
        Command::Pods { quiet } => list::sandboxes(&client, form(quiet))?,
        Command::Images { quiet } => list::images(&client, form(quiet))?,
        Command::Pull { images, credentials } => image::pull_all(&client, &images, credentials.as_ref(), json)?,
        Command::Import { files, name } => image::import(&client, &files, name.as_deref(), json)?,
        Command::Inspect { ids } => object::inspect(&client, &ids)?,
        Command::Info => list::info(&client, json)?,
        Command::Version => list::version(&client, json)?,
    };
    print(&text).map(|()| 0)
}

/// Prints the text and ends with the code.
fn finish((text, code): (String, u8)) -> Outcome<u8> {
    print(&text).map(|()| code)
}

/// Does something to each word and prints the id it gives. One that fails does not stop the others, nor does a reader
/// of the ids that has gone.
fn each(words: &[String], mut act: impl FnMut(&str) -> Outcome<String>) -> Outcome<u8> {
    let (mut worst, mut printed) = (0, Ok(()));
    for word in words {
        match act(word) {
            Ok(id) => printed = printed.and(print(&format!("{id}\n"))),
            Err(failure) => worst = worst.max(failure.report()),
        }
    }
    printed.map(|()| worst)
}

/// Writes to stdout.
pub(crate) fn print(text: &str) -> Outcome<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_fails_does_not_stop_the_others() {
        let words = ["a", "b", "c"].map(str::to_owned);
        let mut seen = Vec::new();
        let code = each(&words, |word| {
            seen.push(word.to_owned());
            if word == "b" {
                Err(Failure::Silent(1))
            } else {
                Err(Failure::Silent(0))
            }
        });
        assert_eq!((code.unwrap(), seen), (1, words.to_vec()));
    }
}
