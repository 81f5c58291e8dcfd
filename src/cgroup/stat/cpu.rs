//! CPU time: v1 cpuacct and cpu, v2 cpu.stat.

use super::number::{number, pairs};

/// Time in user and kernel mode, and throttling. Nanoseconds; what the kernel does not say is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    pub user: Option<u64>,
    pub system: Option<u64>,
    /// Periods in which the cgroup could be throttled, those in which it was, and for how long in total.
    pub periods: Option<u64>,
    pub throttled_periods: Option<u64>,
    pub throttled: Option<u64>,
}

/// Shares and quota as set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// v1 scale (2 to 262144); v2 weights are converted back as the OCI runtimes converted them.
    pub shares: Option<u64>,
    /// Microseconds; absent without a quota.
    pub quota: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
}

/// v1 cpuacct.usage: nanoseconds.
pub fn usage_v1(text: &str) -> Option<u64> {
    number(text)
}

/// v2 cpu.stat, usage_usec: nanoseconds.
pub fn usage_v2(text: &str) -> Option<u64> {
    let (_, micros) = pairs(text).find(|(key, _)| *key == "usage_usec")?;
    micros.checked_mul(1000)
}

/// v1 cpuacct.stat (in ticks of `hz` a second) and cpu.stat (throttled_time in nanoseconds).
pub fn times_v1(cpuacct_stat: &str, cpu_stat: &str, hz: u64) -> Times {
    let nanos = |ticks: u64| ticks.checked_mul(1_000_000_000 / hz.max(1));
    let mut times = Times::default();
    for (key, value) in pairs(cpuacct_stat) {
        match key {
            "user" => times.user = nanos(value),
            "system" => times.system = nanos(value),
            _ => {}
        }
    }
    throttling(&mut times, cpu_stat);
    times
}

/// v2 cpu.stat.
pub fn times_v2(cpu_stat: &str) -> Times {
    let mut times = Times::default();
    for (key, value) in pairs(cpu_stat) {
        match key {
            "user_usec" => times.user = value.checked_mul(1000),
            "system_usec" => times.system = value.checked_mul(1000),
            _ => {}
        }
    }
    throttling(&mut times, cpu_stat);
    times
}

fn throttling(times: &mut Times, cpu_stat: &str) {
    for (key, value) in pairs(cpu_stat) {
        match key {
            "nr_periods" => times.periods = Some(value),
            "nr_throttled" => times.throttled_periods = Some(value),
            "throttled_time" => times.throttled = Some(value),
            "throttled_usec" => times.throttled = value.checked_mul(1000),
            _ => {}
        }
    }
}

/// v1 cpu.shares, cpu.cfs_quota_us (-1: none) and cpu.cfs_period_us.
pub fn limits_v1(shares: &str, quota: &str, period: &str) -> Limits {
    Limits { shares: number(shares), quota: number(quota), period: number(period) }
}

/// v2 cpu.weight and cpu.max (`QUOTA|max PERIOD`).
pub fn limits_v2(weight: &str, max: &str) -> Limits {
    let (quota, period) = max.trim().split_once(' ').unwrap_or((max, ""));
    // 2..262144 to 1..10000 and back (KEP-2254).
    let shares = number(weight).filter(|w| (1..=10000).contains(w)).map(|w| 2 + (w - 1) * 262_142 / 9999);
    Limits { shares, quota: number(quota), period: number(period) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux 6.18, cgroup v2 without the cpu controller has no throttling.
    const V2: &str = "usage_usec 4321\nuser_usec 4000\nsystem_usec 321\nnice_usec 0\nnr_periods 7\nnr_throttled 2\nthrottled_usec 55\n";

    #[test]
    fn v1() {
        assert_eq!(usage_v1("123456789\n"), Some(123_456_789));
        let times = times_v1("user 150\nsystem 25\n", "nr_periods 7\nnr_throttled 2\nthrottled_time 5500\nnr_bursts 0\n", 100);
        assert_eq!((times.user, times.system), (Some(1_500_000_000), Some(250_000_000)));
        assert_eq!((times.periods, times.throttled_periods, times.throttled), (Some(7), Some(2), Some(5500)));
        assert_eq!(limits_v1("1024\n", "-1\n", "100000\n"), Limits { shares: Some(1024), quota: None, period: Some(100_000) });
    }

    #[test]
    fn v2() {
        assert_eq!(usage_v2(V2), Some(4_321_000));
        let times = times_v2(V2);
        assert_eq!((times.user, times.system, times.throttled), (Some(4_000_000), Some(321_000), Some(55_000)));
        assert_eq!(limits_v2("100\n", "max 100000\n"), Limits { shares: Some(2597), quota: None, period: Some(100_000) });
        assert_eq!(limits_v2("1\n", "50000 100000\n"), Limits { shares: Some(2), quota: Some(50_000), period: Some(100_000) });
    }

    #[test]
    fn wrong_shapes_are_absent() {
        for text in ["", "usage_usec", "usage_usec -5\n", "usage_usec 18446744073709551615\n", "usage_us"] {
            assert_eq!(usage_v2(text), None, "{text:?}");
        }
        assert_eq!(times_v1("user x\n", "", 100), Times::default());
        assert_eq!(times_v1("user 1", "", 0).user, Some(1_000_000_000));
        assert_eq!(limits_v2("0", "max"), Limits::default());
    }

    proptest::proptest! {
        #[test]
        fn any_text(a in "\\PC*", b in "\\PC*", hz in proptest::num::u64::ANY) {
            usage_v1(&a);
            usage_v2(&a);
            times_v1(&a, &b, hz);
            times_v2(&a);
            limits_v1(&a, &b, &a);
            limits_v2(&a, &b);
        }

        #[test]
        fn what_is_written_is_read(usage in 0..u64::MAX / 1000, user in 0..u64::MAX / 1000, throttled in 0..u64::MAX / 1000) {
            let text = format!("usage_usec {usage}\nuser_usec {user}\nsystem_usec 0\nthrottled_usec {throttled}\n");
            proptest::prop_assert_eq!(usage_v2(&text), Some(usage * 1000));
            let times = times_v2(&text);
            proptest::prop_assert_eq!((times.user, times.throttled), (Some(user * 1000), Some(throttled * 1000)));
        }
    }
}
