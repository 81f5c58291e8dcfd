//! Pressure stall information (Documentation/accounting/psi.rst): cpu.pressure, memory.pressure, io.pressure of the v2
//! hierarchy, which hosts with v1 controllers have too.

use super::number::number;

/// Stalls of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// Nanoseconds since the cgroup exists.
    pub total: u64,
    /// Percent of the last 10, 60, 300 seconds.
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
}

/// Pressure on one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// At least one task stalled.
    pub some: Option<Stall>,
    /// All tasks stalled. Kernels before 5.13 do not have it for CPU.
    pub full: Option<Stall>,
}

/// A pressure file; none of its lines is understood: absent.
pub fn parse(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    for line in text.lines() {
        match line.split_once(' ') {
            Some(("some", rest)) => pressure.some = stall(rest),
            Some(("full", rest)) => pressure.full = stall(rest),
            _ => {}
        }
    }
    (pressure.some.is_some() || pressure.full.is_some()).then_some(pressure)
}

fn stall(text: &str) -> Option<Stall> {
    let (mut stall, mut total) = (Stall::default(), None);
    for word in text.split_ascii_whitespace() {
        match word.split_once('=')? {
            // The kernel counts microseconds.
            ("total", value) => total = Some(number(value)?.checked_mul(1000)?),
            ("avg10", value) => stall.avg10 = percent(value)?,
            ("avg60", value) => stall.avg60 = percent(value)?,
            ("avg300", value) => stall.avg300 = percent(value)?,
            _ => {}
        }
    }
    stall.total = total?;
    Some(stall)
}

/// `12.34`. The kernel's rounding may go a little over 100.
fn percent(text: &str) -> Option<f64> {
    text.parse::<f64>().ok().filter(|p| p.is_finite() && *p >= 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_linux_6_18() {
        let text = "some avg10=26.82 avg60=20.30 avg300=7.93 total=3392810619\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let pressure = parse(text).unwrap();
        let some = Stall { total: 3_392_810_619_000, avg10: 26.82, avg60: 20.30, avg300: 7.93 };
        assert_eq!((pressure.some, pressure.full.unwrap().total), (Some(some), 7000));
        assert_eq!(parse(text.lines().next().unwrap()).unwrap().full, None);
    }

    #[test]
    fn wrong_shapes_are_absent() {
        for text in
            ["", "some", "some total", "some avg10=0.00", "some total=-1", "some total=18446744073709551615", "some avg10=nan total=1"]
        {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text(a in "((some|full) (avg10=[0-9.e-]{0,9} ){0,2}(total=[0-9-]{0,21})?\n|\\PC*){0,4}") {
            if let Some(stall) = parse(&a).and_then(|p| p.some) {
                proptest::prop_assert!(stall.avg10.is_finite() && stall.avg10 >= 0.0);
            }
        }
    }
}
