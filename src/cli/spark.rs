//! A line of small bars: how something went.

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One bar per value, oldest first, from 0 to the greatest of them.
pub fn line(values: impl IntoIterator<Item = f64> + Clone) -> String {
    let most = values.clone().into_iter().fold(0.0, f64::max);
    let bar = |value: f64| if most > 0.0 { BARS[((value / most).clamp(0.0, 1.0) * 7.0).round() as usize] } else { BARS[0] };
    values.into_iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_go_from_zero_to_the_greatest() {
        assert_eq!(line([0.0, 1.0, 4.0, 8.0]), "▁▂▅█");
        assert_eq!(line([0.0, 0.0]), "▁▁");
        assert_eq!(line([]), "");
        assert_eq!(line([f64::NAN, 1.0]), "▁█");
    }
}
