//! What the daemon remembers: records on disk, names in use, objects by id.

/// Objects by id or unique id prefix.
pub mod index;
/// Names: reserved once, joined by equal retries.
pub mod names;
/// Versioned records, replaced atomically, quarantined when torn.
pub mod record;

pub use index::Index;
pub use names::{Claim, Names};
pub use record::Records;

/// A new id: 64 hexadecimal digits of randomness, as peers make them.
pub fn new_id() -> crate::error::Result<String> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| crate::error::Error::internal(format!("read random bytes: {e}")))?;
    let mut id = String::with_capacity(64);
    for b in bytes {
        id.push(char::from_digit(u32::from(b >> 4), 16).unwrap_or('0'));
        id.push(char::from_digit(u32::from(b & 15), 16).unwrap_or('0'));
    }
    Ok(id)
}

/// Nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}
