//! Detach keys: a sequence that is not for the process but for us.

/// Ctrl-P Ctrl-Q, as other clients have it.
pub const DEFAULT: [u8; 2] = [0x10, 0x11];

/// Reads `ctrl-p,ctrl-q`: keys with commas between, each a character or `ctrl-` and one of a–z @ [ \ ] ^ _. An empty
/// text means none.
pub fn parse(text: &str) -> Result<Vec<u8>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let key = |word: &str| -> Option<u8> {
        let (control, letter) = word.strip_prefix("ctrl-").map_or((false, word), |letter| (true, letter));
        let &[byte] = letter.as_bytes() else { return None };
        match (control, byte) {
            (false, b' '..=b'~') => Some(byte),
            (true, b'a'..=b'z') => Some(byte - b'a' + 1),
            (true, b'@' | b'['..=b'_') => Some(byte - b'@'),
            _ => None,
        }
    };
    text.split(',').map(|word| key(word).ok_or_else(|| format!("--detach-keys {text}: {word:?} is no key; expected a, ctrl-a…"))).collect()
}

/// Looks for the sequence in what is typed. What may be its beginning is held back until it is known.
#[derive(Debug)]
pub struct Keys {
    sequence: Vec<u8>,
    matched: usize,
}

impl Keys {
    pub fn new(sequence: Vec<u8>) -> Keys {
        Keys { sequence, matched: 0 }
    }

    /// Adds to `out` what is for the process; true once the sequence is complete.
    pub fn feed(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        if self.sequence.is_empty() {
            out.extend_from_slice(typed);
            return false;
        }
        for &byte in typed {
            // A key that does not go on may still go on from a later beginning of what is held.
            while self.matched > 0 && self.sequence[self.matched] != byte {
                let held = &self.sequence[..self.matched];
                let kept = (1..held.len()).find(|&from| self.sequence.starts_with(&held[from..])).map_or(0, |from| held.len() - from);
                out.extend_from_slice(&held[..held.len() - kept]);
                self.matched = kept;
            }
            if self.sequence[self.matched] != byte {
                out.push(byte);
                continue;
            }
            self.matched += 1;
            if self.matched == self.sequence.len() {
                self.matched = 0;
                return true;
            }
        }
        false
    }

    /// What is held back, when nothing more is typed.
    pub fn held(&mut self) -> &[u8] {
        let held = &self.sequence[..self.matched];
        self.matched = 0;
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences() {
        assert_eq!(parse("ctrl-p,ctrl-q").unwrap(), DEFAULT);
        assert_eq!(parse("a,ctrl-@,ctrl-[,~").unwrap(), [b'a', 0, 27, b'~']);
        assert!(parse("").unwrap().is_empty());
        for bad in ["ctrl-", "ab", "ctrl-P", "a,,b", "ctrl-1", "ä", ","] {
            assert!(parse(bad).unwrap_err().starts_with(&format!("--detach-keys {bad}: ")), "{bad}");
        }
    }

    #[test]
    fn all_but_the_sequence_goes_through() {
        // Fed in one piece, and byte by byte.
        for (sequence, typed, expected, found) in [
            ("ctrl-p,ctrl-q", &b"ab\x10c\x10\x10\x11zz"[..], &b"ab\x10c\x10"[..], true),
            ("a,a,b", b"aaab", b"a", true),
            ("a,b,a,c", b"ababac", b"ab", true),
            ("x", b"abc", b"abc", false),
            ("", b"\x10\x11", b"\x10\x11", false),
        ] {
            for chunk in [1, typed.len()] {
                let (mut keys, mut out) = (Keys::new(parse(sequence).unwrap()), Vec::new());
                let got = typed.chunks(chunk).any(|part| keys.feed(part, &mut out));
                assert_eq!((out.as_slice(), got), (expected, found), "{sequence} {chunk}");
            }
        }
        let (mut keys, mut out) = (Keys::new(DEFAULT.to_vec()), Vec::new());
        assert!(!keys.feed(b"a\x10", &mut out));
        assert_eq!((keys.held(), out.as_slice()), (&b"\x10"[..], &b"a"[..]));
    }
}
