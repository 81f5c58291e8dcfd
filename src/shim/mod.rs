//! The monitor of one container: a small process of its own that starts the container, holds its stdio, writes its log, knows
//! how it ended, and lives on when the daemon does not. Also PID 1 of sandboxes that share a PID namespace.

mod attach;
/// The daemon's side.
pub mod client;
mod exec;
/// PID 1 of a sandbox.
pub mod init;
mod life;
/// The container log.
pub mod log;
mod oom;
/// The messages.
pub mod protocol;
/// The exit record.
pub mod record;
mod requests;
mod server;
mod stdio;
mod task;

use std::path::Path;
use std::process::ExitCode;

use crate::error::Result;
use crate::sys::userns;

const HELP: &str = "crisp-shim: monitors one container; started by crispd

usage:
  crisp-shim container DIR   run the container whose config.json and shim.json are in DIR
  crisp-shim init            be PID 1 of a sandbox, inside its namespaces
  crisp-shim pin new|join    make or enter a user namespace for crispd, which talks to it
  crisp-shim --version
  crisp-shim --help
";

/// The shim program.
pub fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = args.iter().map(|a| a.to_string_lossy()).collect();
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    let result: Result<()> = match words[..] {
        ["container", _] => server::run(Path::new(&args[1])),
        ["init"] => init::run(),
        [init::CONFINED] => init::run_confined(),
        [userns::ROLE, userns::NEW] => userns::serve(true),
        [userns::ROLE, userns::JOIN] => userns::serve(false),
        ["--version"] => {
            println!("crisp-shim {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        ["--help"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crisp-shim: {error}");
            ExitCode::FAILURE
        }
    }
}
