//! The client `crisp`; everything is in `crisp::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(crisp::cli::main(std::env::args_os().skip(1)))
}
