//! One fuzzer for all targets of tests/fuzz/targets.rs: FUZZ_TARGET names the one to run. scripts/fuzz builds and runs it.

#![no_main]

use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let names = crisp::fuzz::TARGETS.map(|(name, _)| name);
    let found = crisp::fuzz::TARGETS.iter().find(|(name, _)| *name == wanted);
    found.unwrap_or_else(|| panic!("FUZZ_TARGET={wanted:?}: one of {}", names.join(", "))).1
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET(bytes));
