//! Signals by name: CRI's enum and the image's StopSignal, which may also be a number.

use crate::api::runtime::Signal;
use crate::error::{Error, Result};

/// The number of a name such as `SIGTERM`, `TERM`, `SIGRTMIN+3` or `15`.
pub fn number(text: &str) -> Result<i32> {
    let bad = || Error::invalid(format!("stop signal: expected a name or 1 to {}, found {text:?}", libc::SIGRTMAX()));
    if let Ok(n) = text.parse::<i32>() {
        return if (1..=libc::SIGRTMAX()).contains(&n) { Ok(n) } else { Err(bad()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return offset(rest, '+').map(|n| libc::SIGRTMIN() + n).filter(|n| *n <= libc::SIGRTMAX()).ok_or_else(bad);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return offset(rest, '-').map(|n| libc::SIGRTMAX() - n).filter(|n| *n >= libc::SIGRTMIN()).ok_or_else(bad);
    }
    match name {
        "CLD" => Ok(libc::SIGCHLD),
        "POLL" => Ok(libc::SIGIO),
        "IOT" => Ok(libc::SIGABRT),
        _ => format!("SIG{name}").parse::<nix::sys::signal::Signal>().map(|s| s as i32).map_err(|_| bad()),
    }
}

fn offset(text: &str, sign: char) -> Option<i32> {
    match text.strip_prefix(sign) {
        Some(n) => n.parse().ok().filter(|n| *n >= 0),
        None => text.is_empty().then_some(0),
    }
}

/// The number of a CRI signal; None for the default of runtime or image.
pub fn of_cri(signal: Signal) -> Result<Option<i32>> {
    if signal == Signal::SIGNAL_RUNTIME_DEFAULT {
        return Ok(None);
    }
    let name = format!("{signal:?}").replace("SIGNAL_", "").replace("PLUS", "+").replace("MINUS", "-");
    number(&name).map(Some)
}

/// CRI's name of a number; RUNTIME_DEFAULT for one it has no name for.
pub fn to_cri(wanted: i32) -> Signal {
    use protobuf::Enum;
    Signal::VALUES.iter().copied().find(|s| of_cri(*s).ok().flatten() == Some(wanted)).unwrap_or(Signal::SIGNAL_RUNTIME_DEFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Enum;

    #[test]
    fn names_and_numbers() {
        for (text, n) in [
            ("SIGTERM", 15),
            ("quit", 3),
            ("9", 9),
            ("SIGRTMIN+3", libc::SIGRTMIN() + 3),
            ("RTMAX-1", libc::SIGRTMAX() - 1),
            ("SIGRTMIN", libc::SIGRTMIN()),
        ] {
            assert_eq!(number(text).unwrap(), n, "{text}");
        }
        for bad in ["", "0", "99", "SIGFOO", "SIGRTMIN+99", "RTMAX+1", "-9"] {
            assert!(number(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_cri_signal_has_a_number() {
        for signal in Signal::VALUES {
            assert!(of_cri(*signal).is_ok(), "{signal:?}");
        }
        assert_eq!(to_cri(15), Signal::SIGNAL_SIGTERM);
    }
}
