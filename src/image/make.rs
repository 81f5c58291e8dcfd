//! One layer from its stream to its files. Two threads work on it: one downloads, hashes and decompresses, the other hashes
//! what comes out and unpacks it. Nothing of it is anybody's before everything has been verified.

use std::io::Read;
use std::path::Path;

use super::decompress::Decompress;
use super::digest::{Digest, Verifier};
use super::layers::{DIFF, TAPE};
use super::pipe::{pipe, Reader, Writer};
use super::room::Room;
use super::unpack::{self, Limits, Unpacked};
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::thread;

/// Bytes after the archive's end mark. tar pads to some KiB, and a bomb may hide there.
const TAIL: u64 = 64 << 20;

/// A layer to make: its place in the chain and how its stream must turn out.
pub struct Wanted<'a> {
    pub diff_id: &'a Digest,
    /// Chain IDs from the lowest layer to this one.
    pub chain: &'a [Digest],
    /// Digest of the stream as it comes; None where only the diff ID is known.
    pub digest: Option<&'a Digest>,
    /// Bytes of the stream as it comes.
    pub size: u64,
}

type Blob = Verifier<Box<dyn Read + Send>>;

/// Downloads, verifies, decompresses, verifies, unpacks: all in one pass.
pub fn make(stream: Box<dyn Read + Send>, wanted: &Wanted, dir: &Path, limits: &Limits, room: &Room, cancel: &Cancel) -> Result<Unpacked> {
    // Headers and padding come on top of the files' bytes, never more than twice as much in earnest.
    let bound = limits.max_bytes.saturating_mul(2).saturating_add(TAIL);
    let (writer, mut reader) = pipe(bound, cancel);
    let blob = Verifier::new(stream, wanted.size);
    let stop = cancel.clone();
    let bringer = thread::spawn("bring", move || bring(blob, writer, &stop))?;
    let result = unpack::unpack(&mut reader, &dir.join(DIFF), &dir.join(TAPE), limits, room, cancel)
        .and_then(|unpacked| check(reader, wanted, unpacked));
    if let Err(e) = &result {
        cancel.check()?;
        if e.code() != Code::FailedPrecondition {
            // Our own trouble. The other thread may wait for the network: it finds out by itself that nobody reads any more.
            return result;
        }
    }
    let blob = bringer.join().map_err(|_| Error::internal("the thread that brings a layer panicked"))?;
    // Of a stream that could not be used, the digest says whether the image is bad or the transfer was.
    match (blob.finish(), wanted.digest) {
        (Ok((digest, size)), Some(want)) if digest != *want || size != wanted.size => {
            Err(Error::precondition(format!("received {digest} ({size} bytes), want {want} ({} bytes)", wanted.size)))
        }
        (Err(e), _) if result.is_ok() => Err(e).context(|| "read to the end").map_err(unusable),
        _ => result,
    }
}

/// Fills the pipe from the stream as it comes, and gives that back with what it has seen so far.
fn bring(mut blob: Blob, writer: Writer, cancel: &Cancel) -> Blob {
    match Decompress::new(&mut blob, cancel) {
        Ok(plain) => writer.pass(plain),
        Err(e) => writer.fail(e),
    }
    blob
}

/// Whether what was unpacked is what the image's config speaks of.
fn check(reader: Reader, wanted: &Wanted, unpacked: Unpacked) -> Result<Unpacked> {
    let (diff_id, _) = reader.finish(TAIL).context(|| "read layer archive").map_err(unusable)?;
    if diff_id != *wanted.diff_id {
        return Err(Error::precondition(format!("content is {diff_id}, the image config says {}", wanted.diff_id)));
    }
    Ok(unpacked)
}

fn unusable(error: Error) -> Error {
    error.with_code(Code::FailedPrecondition)
}
