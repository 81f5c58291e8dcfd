//! CPU time of a process, to the nanosecond; /proc/PID/stat counts in ticks of ten milliseconds.

use std::time::Duration;

/// Above all pids: PID_MAX_LIMIT of Linux.
const PID_LIMIT: i32 = 1 << 22;

/// What all threads of process `pid` have used of the CPUs, those that have ended too. None when there is no such process.
pub fn of(pid: i32) -> Option<Duration> {
    let mut clock: libc::clockid_t = 0;
    // The clock's number holds the pid shifted: one that cannot be would name another clock.
    if !(1..PID_LIMIT).contains(&pid) {
        return None;
    }
    // SAFETY: writes one clockid_t to the place that is given, and keeps nothing.
    if unsafe { libc::clock_getcpuclockid(pid, &mut clock) } != 0 {
        return None;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec to the place that is given, and keeps nothing.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return None;
    }
    Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_this_process_grows_with_its_work() {
        let own = std::process::id() as i32;
        let before = of(own).unwrap();
        let mut number = 1u64;
        // Until a millisecond of work shows, which a busy host may take long to give.
        while of(own).unwrap() < before + Duration::from_millis(1) {
            number = std::hint::black_box(number.wrapping_mul(3));
        }
        assert_eq!([-1, 0, PID_LIMIT, i32::MAX].map(of), [None; 4]);
    }
}
