//! Tokens: the only key to a session. 128 random bits, good for one request within a minute.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use base64::Engine;

use crate::error::{Error, Result};
use crate::sys::lock::{Lock, Rank};

/// How long a token is good.
pub const LIFE: Duration = Duration::from_secs(60);
/// Most tokens at a time: the oldest goes for a new one.
pub const OUTSTANDING: usize = 1000;

/// What was promised to whom.
pub struct Tokens<T> {
    table: Lock<Table<T>>,
    life: Duration,
}

struct Table<T> {
    values: HashMap<String, T>,
    /// Oldest first; those that were used stay until their time is over.
    order: VecDeque<(Instant, String)>,
}

impl<T> Tokens<T> {
    pub fn new(life: Duration) -> Tokens<T> {
        Tokens { table: Lock::new(Rank::Leaf, Table { values: HashMap::new(), order: VecDeque::new() }), life }
    }

    /// Remembers `value`; the token is 22 characters of URL-safe base64.
    pub fn insert(&self, value: T) -> Result<String> {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).map_err(|e| Error::internal(format!("read random bytes: {e}")))?;
        let token = URL_SAFE_NO_PAD.encode(bits);
        let mut table = self.table.lock();
        table.expire(self.life);
        while table.order.len() >= OUTSTANDING {
            table.drop_oldest();
        }
        table.order.push_back((Instant::now(), token.clone()));
        table.values.insert(token.clone(), value);
        Ok(token)
    }

    /// Whether `take` would give something.
    pub fn is_known(&self, token: &str) -> bool {
        let mut table = self.table.lock();
        table.expire(self.life);
        table.values.contains_key(token)
    }

    /// The value of a token, once; None when it is unknown, used or too old.
    pub fn take(&self, token: &str) -> Option<T> {
        let mut table = self.table.lock();
        table.expire(self.life);
        table.values.remove(token)
    }
}

impl<T> Table<T> {
    fn expire(&mut self, life: Duration) {
        while self.order.front().is_some_and(|(made, _)| made.elapsed() >= life) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((_, token)) = self.order.pop_front() {
            self.values.remove(&token);
        }
    }
}

/// The token in the path of a request for `verb` (`/exec/TOKEN`); None for any other path.
pub fn of_path<'a>(path: &'a str, verb: &str) -> Option<&'a str> {
    let token = path.strip_prefix('/')?.strip_prefix(verb)?.strip_prefix('/')?;
    let good = token.len() == 22 && token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    good.then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_and_not_too_late() {
        let tokens = Tokens::new(LIFE);
        let (a, b) = (tokens.insert(1).unwrap(), tokens.insert(2).unwrap());
        assert_eq!((tokens.take(&a), tokens.take(&a), tokens.take("x"), tokens.take(&b)), (Some(1), None, None, Some(2)));
        let short = Tokens::new(Duration::ZERO);
        let token = short.insert(1).unwrap();
        assert_eq!(short.take(&token), None);
    }

    #[test]
    fn the_oldest_goes_first() {
        let tokens = Tokens::new(LIFE);
        let made: Vec<_> = (0..OUTSTANDING + 1).map(|n| tokens.insert(n).unwrap()).collect();
        assert_eq!((tokens.take(&made[0]), tokens.take(&made[1]), tokens.take(&made[OUTSTANDING])), (None, Some(1), Some(OUTSTANDING)));
        let table = tokens.table.lock();
        assert!(table.values.len() <= OUTSTANDING && table.order.len() <= OUTSTANDING);
    }

    #[test]
    fn paths() {
        let token = Tokens::new(LIFE).insert(()).unwrap();
        assert_eq!(of_path(&format!("/exec/{token}"), "exec"), Some(token.as_str()));
        for path in
            ["", "/", "/exec", "/exec/", "exec/0123456789012345678901", "/exec/0123456789012345678901/", "/exec/../0123456789012345678"]
        {
            assert_eq!(of_path(path, "exec"), None, "{path}");
        }
        assert_eq!(of_path(&format!("/attach/{token}"), "exec"), None);
    }

    proptest::proptest! {
        #[test]
        fn hostile_paths_never_panic(path in ".*") {
            let _ = of_path(&path, "exec");
        }
    }
}
