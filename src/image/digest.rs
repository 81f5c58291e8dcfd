//! Content digests: `sha256:<64 hex>`, and readers that compute them while bytes stream through.

use std::fmt;
use std::io::Read;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::error::{Error, Result};

/// A checked SHA-256 digest. The text is safe as a file name but for its colon: `hex` gives the part after it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Takes `sha256:` and 64 lower-case hexadecimal digits. Other algorithms are refused by name.
    pub fn parse(text: &str) -> Result<Digest> {
        match text.split_once(':') {
            Some(("sha256", hex)) if is_hex(hex, 64) => Ok(Digest(text.to_owned())),
            Some((algorithm, _)) if algorithm != "sha256" => {
                Err(Error::invalid(format!("digest {text:?}: algorithm {algorithm:?} is not supported, only sha256")))
            }
            _ => Err(Error::invalid(format!("digest {text:?}: want sha256: and 64 lower-case hexadecimal digits"))),
        }
    }

    /// The digest of `data`.
    pub fn of(data: &[u8]) -> Digest {
        Hasher::default().update(data).finish()
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn hex(&self) -> &str {
        &self.0[7..]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(text: String) -> Result<Digest> {
        Digest::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

/// `length` digits, lower case.
pub fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// SHA-256 in progress.
#[derive(Default)]
pub struct Hasher(sha2::Sha256);

impl Hasher {
    pub fn update(mut self, data: &[u8]) -> Hasher {
        self.0.update(data);
        self
    }

    pub fn add(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    pub fn finish(self) -> Digest {
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in self.0.finalize() {
            text.push_str(&format!("{byte:02x}"));
        }
        Digest(text)
    }
}

/// The chain ID of a layer: the diff ID for the lowest, else SHA-256 over the chain ID below and the diff ID (OCI
/// image-spec, config.md, "Layer ChainID"). One per diff ID, lowest first.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
        };
        chain.push(next);
    }
    chain
}

/// Hashes and counts what is read through it. `limit` bytes at most: one more is an error of the stream, so that a
/// server that lies about a size is stopped at once.
pub struct Verifier<R> {
    inner: R,
    hasher: Hasher,
    count: u64,
    limit: u64,
}

impl<R: Read> Verifier<R> {
    pub fn new(inner: R, limit: u64) -> Verifier<R> {
        Verifier { inner, hasher: Hasher::default(), count: 0, limit }
    }

    /// Reads to the end, then gives back the digest and the number of bytes.
    pub fn finish(mut self) -> std::io::Result<(Digest, u64)> {
        std::io::copy(&mut self, &mut std::io::sink())?;
        Ok((self.hasher.finish(), self.count))
    }
}

impl<R: Read> Read for Verifier<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count += n as u64;
        if self.count > self.limit {
            return Err(std::io::Error::other(format!("more than the {} bytes announced", self.limit)));
        }
        self.hasher.add(&buffer[..n]);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn parses_and_refuses() {
        assert_eq!(Digest::of(b"").as_str(), EMPTY);
        assert_eq!(Digest::parse(EMPTY).unwrap().hex().len(), 64);
        for bad in ["", "sha256:", "sha256:abc", &EMPTY.to_uppercase(), &format!("{EMPTY}0"), "sha512:00", "sha256:../../etc/passwd"] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Digest>("\"sha256:../x\"").is_err());
    }

    #[test]
    fn chains() {
        let d = |s: &str| Digest::of(s.as_bytes());
        let chain = chain_ids(&[d("a"), d("b")]);
        assert_eq!(chain[0], d("a"));
        assert_eq!(chain[1], Digest::of(format!("{} {}", d("a"), d("b")).as_bytes()));
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn verifier_stops_at_its_limit() {
        assert_eq!(Verifier::new(&b"abc"[..], 3).finish().unwrap(), (Digest::of(b"abc"), 3));
        assert!(Verifier::new(&b"abcd"[..], 3).finish().is_err());
    }
}
