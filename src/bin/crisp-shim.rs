//! The monitor of one container, and PID 1 of sandboxes that share a PID namespace.

fn main() -> std::process::ExitCode {
    crisp::shim::main()
}
