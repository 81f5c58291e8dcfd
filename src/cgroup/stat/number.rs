//! Numbers in kernel files, strictly: what is not exactly a number of 64 bits is absent, never zero and never an error.

/// A decimal number with nothing around it but white space. Signs, fractions, `max` and what does not fit are absent.
pub fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    // parse() would take a plus sign.
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// `KEY VALUE` lines; those with another shape are left out.
pub fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, number(value)?))
    })
}

/// `MAJOR:MINOR` of a device.
pub fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((number(major)?.try_into().ok()?, number(minor)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict() {
        assert_eq!(number("0\n"), Some(0));
        assert_eq!(number(" 18446744073709551615"), Some(u64::MAX));
        for wrong in ["", "\n", "max", "-1", "+1", "1.5", "18446744073709551616", "1 2", "0x10", "١"] {
            assert_eq!(number(wrong), None, "{wrong:?}");
        }
        assert_eq!(pairs("a 1\nb\nc -1\nd 2 3\n e 4\nf 5").collect::<Vec<_>>(), [("a", 1), ("f", 5)]);
        assert_eq!(device("253:0"), Some((253, 0)));
        assert_eq!((device("253"), device("253:"), device("4294967296:0")), (None, None, None));
    }
}
