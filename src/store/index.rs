//! Objects by id. An id may be given as a unique prefix; an ambiguous one is an error; names are not ids.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::sys::lock::{Rank, SharedLock};

/// A map from id to object, of one noun (for errors).
pub struct Index<T> {
    noun: &'static str,
    map: SharedLock<BTreeMap<String, Arc<T>>>,
}

impl<T> Index<T> {
    pub fn new(noun: &'static str) -> Index<T> {
        Index { noun, map: SharedLock::new(Rank::Index, BTreeMap::new()) }
    }

    pub fn insert(&self, id: &str, object: Arc<T>) {
        self.insert_and(id, object, || {});
    }

    /// `insert`; `then` runs before anybody can see it, under a lock of rank index.
    pub fn insert_and(&self, id: &str, object: Arc<T>, then: impl FnOnce()) {
        let mut map = self.map.write();
        map.insert(id.to_owned(), object);
        then();
    }

    pub fn remove(&self, id: &str) -> Option<Arc<T>> {
        self.remove_and(id, || {})
    }

    /// `remove`; if it was there, `then` runs before anybody can see that it is gone, under a lock of rank index.
    pub fn remove_and(&self, id: &str, then: impl FnOnce()) -> Option<Arc<T>> {
        let mut map = self.map.write();
        let removed = map.remove(id)?;
        then();
        Some(removed)
    }

    /// The object of that id or unique prefix; None when there is none. An empty id is INVALID_ARGUMENT, as is an
    /// ambiguous one.
    pub fn find(&self, id: &str) -> Result<Option<Arc<T>>> {
        if id.is_empty() {
            return Err(Error::invalid(format!("{} id is empty", self.noun)));
        }
        let map = self.map.read();
        if let Some(object) = map.get(id) {
            return Ok(Some(object.clone()));
        }
        let mut matches = map.range(id.to_owned()..).take_while(|(k, _)| k.starts_with(id));
        match (matches.next(), matches.next()) {
            (Some((a, _)), Some((b, _))) => {
                Err(Error::invalid(format!("{} id {id} is ambiguous: {} and {}", self.noun, &a[..16.min(a.len())], &b[..16.min(b.len())])))
            }
            (found, _) => Ok(found.map(|(_, object)| object.clone())),
        }
    }

    /// `find`, with NOT_FOUND for none.
    pub fn get(&self, id: &str) -> Result<Arc<T>> {
        self.find(id)?.ok_or_else(|| Error::not_found(format!("{} {id} is not known", self.noun)))
    }

    /// Those that are `wanted`, in the order of their ids.
    pub fn select(&self, wanted: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        self.map.read().values().filter(|object| wanted(object)).cloned().collect()
    }

    /// All, in the order of their ids.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.map.read().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn prefixes() {
        let index = Index::new("container");
        for id in ["aa11", "aa22", "bb"] {
            index.insert(id, Arc::new(id));
        }
        assert_eq!(*index.get("b").unwrap(), "bb");
        assert_eq!(*index.get("aa22").unwrap(), "aa22");
        assert_eq!(index.get("aa").unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(index.get("").unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(index.get("zz").unwrap_err().code(), Code::NotFound);
        assert!(index.find("c").unwrap().is_none());
        index.remove("aa11");
        assert_eq!(*index.get("aa").unwrap(), "aa22");
        assert_eq!(index.all().len(), 2);
        assert_eq!(index.select(|id| id.starts_with('b')).len(), 1);
        let mut told = 0;
        for _ in 0..2 {
            index.remove_and("bb", || told += 1);
        }
        assert_eq!(told, 1, "only when it goes");
    }
}
