//! Names in use. kubelet retries a call whose answer it did not get: an equal retry joins the first call while it runs, and
//! takes over its result when nobody received it. Everything else about a used name is ALREADY_EXISTS.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Condvar;

use crate::error::{Code, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::lock::{Lock, Rank};

/// What a caller must do about the name it asked for.
pub enum Claim<'a> {
    /// It is yours: make the object, then `finish`. Dropping it gives the name back.
    Make(Making<'a>),
    /// An equal call has already made this id; hand it over if it is still fresh, else refuse with `taken`.
    Made(String),
}

struct Entry {
    id: String,
    /// What the request asked for, to compare a retry with.
    request: Arc<[u8]>,
    flight: Arc<Flight>,
    /// Whether an equal retry may have the finished object: its maker's client did not get the answer.
    unclaimed: Option<Cancel>,
}

struct Flight {
    result: Lock<Option<Result<String>>>,
    done: Condvar,
}

/// The names of one noun.
pub struct Names {
    noun: &'static str,
    map: Lock<HashMap<String, Entry>>,
}

/// A name being filled.
pub struct Making<'a> {
    names: &'a Names,
    name: String,
    flight: Arc<Flight>,
    finished: bool,
}

impl Names {
    pub fn new(noun: &'static str) -> Names {
        Names { noun, map: Lock::new(Rank::Names, HashMap::new()) }
    }

    /// Takes `name` for `id`, or joins the call that is making it. `request` are the bytes of what was asked for. A joined
    /// call waits here, until the maker has finished or its own client is gone.
    pub fn claim(&self, name: &str, id: &str, request: &[u8], cancel: &Cancel) -> Result<Claim<'_>> {
        let flight = {
            let mut map = self.map.lock();
            match map.get(name) {
                None => {
                    let flight = Arc::new(Flight { result: Lock::new(Rank::Status, None), done: Condvar::new() });
                    let entry =
                        Entry { id: id.to_owned(), request: request.into(), flight: flight.clone(), unclaimed: Some(cancel.clone()) };
                    map.insert(name.to_owned(), entry);
                    return Ok(Claim::Make(Making { names: self, name: name.to_owned(), flight, finished: false }));
                }
                Some(entry) if *entry.request != *request => return Err(self.taken(name, &entry.id)),
                Some(entry) => {
                    if entry.flight.result.lock().is_some() {
                        if entry.unclaimed.as_ref().is_some_and(|c| c.is_cancelled()) {
                            return Ok(Claim::Made(entry.id.clone()));
                        }
                        return Err(self.taken(name, &entry.id));
                    }
                    entry.flight.clone()
                }
            }
        };
        let mut result = flight.result.lock();
        loop {
            if let Some(result) = &*result {
                return result.clone().map(Claim::Made);
            }
            cancel.check()?;
            // The slice only bounds how late a gone client is noticed; the result itself wakes us.
            result.wait_for(&flight.done, Duration::from_millis(200));
        }
    }

    /// Enters a restored object. Nobody knows whether its maker's client got the answer, so an equal retry may have it.
    pub fn restore(&self, name: &str, id: &str, request: &[u8]) {
        let gone = Cancel::never();
        gone.set();
        let flight = Arc::new(Flight { result: Lock::new(Rank::Status, Some(Ok(id.to_owned()))), done: Condvar::new() });
        self.map.lock().insert(name.to_owned(), Entry { id: id.to_owned(), request: request.into(), flight, unclaimed: Some(gone) });
    }

    /// Gives a name back, if it is `id`'s.
    pub fn release(&self, name: &str, id: &str) {
        let mut map = self.map.lock();
        if map.get(name).is_some_and(|e| e.id == id) {
            map.remove(name);
        }
    }

    /// The error for a name that is in use.
    pub fn taken(&self, name: &str, id: &str) -> Error {
        Error::new(Code::AlreadyExists, format!("{} name {name:?} is in use by {id}", self.noun))
    }
}

impl Making<'_> {
    /// Ends the making: joined calls get `result`. The name stays taken after success, and after an error whose object
    /// stays (`keep`) for a later removal.
    pub fn finish(mut self, result: Result<String>, keep: bool) {
        self.end(result, keep);
    }

    fn end(&mut self, result: Result<String>, keep: bool) {
        self.finished = true;
        if result.is_err() && !keep {
            self.names.map.lock().remove(&self.name);
        }
        *self.flight.result.lock() = Some(result);
        self.flight.done.notify_all();
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.end(Err(Error::internal("the call that made this was ended by a panic")), false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make<'a>(names: &'a Names, cancel: &Cancel) -> Making<'a> {
        match names.claim("n", "id1", b"r", cancel).unwrap() {
            Claim::Make(m) => m,
            Claim::Made(_) => panic!("not new"),
        }
    }

    #[test]
    fn equal_retry_joins() {
        let names = Names::new("sandbox");
        std::thread::scope(|s| {
            let making = make(&names, &Cancel::never());
            let joined = s.spawn(|| match names.claim("n", "id2", b"r", &Cancel::never()).unwrap() {
                Claim::Made(id) => id,
                Claim::Make(_) => panic!("made twice"),
            });
            assert_eq!(names.claim("n", "id3", b"other", &Cancel::never()).err().unwrap().code(), Code::AlreadyExists);
            // The entry's, the maker's, and that of the call that has joined.
            while Arc::strong_count(&making.flight) < 3 && !joined.is_finished() {
                std::thread::yield_now();
            }
            making.finish(Ok("id1".into()), false);
            assert_eq!(joined.join().unwrap(), "id1");
        });
        // The first client got its answer: a new equal call is a conflict that names the holder.
        let e = names.claim("n", "id4", b"r", &Cancel::never()).err().unwrap();
        assert!(e.message().contains("id1"), "{e}");
    }

    #[test]
    fn unreceived_result_is_handed_over() {
        let names = Names::new("sandbox");
        let client = Cancel::never();
        let making = make(&names, &client);
        client.set();
        making.finish(Ok("id1".into()), false);
        assert!(matches!(names.claim("n", "id2", b"r", &Cancel::never()).unwrap(), Claim::Made(id) if id == "id1"));
    }

    #[test]
    fn failure_gives_the_name_back_unless_kept() {
        let names = Names::new("sandbox");
        make(&names, &Cancel::never()).finish(Err(Error::internal("x")), false);
        drop(make(&names, &Cancel::never()));
        make(&names, &Cancel::never()).finish(Err(Error::internal("x")), true);
        assert!(names.claim("n", "id2", b"q", &Cancel::never()).is_err());
        names.release("n", "other");
        assert!(names.claim("n", "id2", b"q", &Cancel::never()).is_err());
        names.release("n", "id1");
        make(&names, &Cancel::never());
    }
}
