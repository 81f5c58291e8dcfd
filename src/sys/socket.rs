//! Unix stream sockets between our own processes: owner-only, peer checked, messages with a length in front and file
//! descriptors beside them (unix(7), SCM_RIGHTS).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags};

use crate::error::{Context, Error, Result};

/// Longest message accepted, bytes.
pub const MESSAGE_LIMIT: usize = 1 << 20;
/// Most descriptors beside one message.
const FDS: usize = 4;

/// Listens at `path` with mode `mode`. A file in the way is removed: the caller has made sure that nobody lives on it.
pub fn listen(path: &Path, mode: u32) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    crate::sys::file::remove_file(path)?;
    // sun_path holds 107 bytes; deeper paths go through the directory's descriptor.
    let (address, _dir) = short(path)?;
    let listener = UnixListener::bind(&address).context(what)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).context(what)?;
    Ok(listener)
}

/// Connects to the socket at `path`.
pub fn connect(path: &Path) -> Result<UnixStream> {
    let (address, _dir) = short(path)?;
    UnixStream::connect(&address).context(|| format!("connect to {}", path.display()))
}

/// `path`, or the same through /proc/self/fd when it is too long for sun_path. Keep the descriptor while using it.
fn short(path: &Path) -> Result<(std::path::PathBuf, Option<std::fs::File>)> {
    if path.as_os_str().len() < 108 {
        return Ok((path.to_owned(), None));
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::internal(format!("socket path {}: no file name", path.display())));
    };
    let dir = std::fs::File::open(dir).context(|| format!("open {}", dir.display()))?;
    Ok((Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name), Some(dir)))
}

/// Refuses a peer that is neither root nor our own user (SO_PEERCRED).
pub fn check_peer(stream: &UnixStream) -> Result<()> {
    let peer = nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerCredentials).context(|| "read peer credentials")?;
    if peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    Err(Error::new(crate::error::Code::PermissionDenied, format!("peer of user {} on a private socket", peer.uid())))
}

/// The process at the other end; of a client's stream, the one that called listen(2).
pub fn peer_pid(stream: &UnixStream) -> Result<i32> {
    let peer = nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerCredentials).context(|| "read peer credentials")?;
    Ok(peer.pid())
}

/// Sends one message: u32 little-endian length, then the bytes, with `fds` beside the first byte.
pub fn send(stream: &UnixStream, message: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<()> {
    let length = u32::try_from(message.len())
        .ok()
        .filter(|n| *n as usize <= MESSAGE_LIMIT)
        .ok_or_else(|| Error::internal(format!("message of {} bytes", message.len())))?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(message);
    let raw: Vec<i32> = fds.iter().map(|f| f.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let mut sent = 0;
    while sent < bytes.len() {
        let control: &[ControlMessage] = if sent == 0 && !raw.is_empty() { &rights } else { &[] };
        match sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&bytes[sent..])], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(n) => sent += n,
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e).context(|| "send message"),
        }
    }
    Ok(())
}

/// Receives one message with its descriptors (close-on-exec); None at end of file between messages.
pub fn receive(stream: &UnixStream) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut fds = Vec::new();
    let mut head = [0; 4];
    if !fill(stream, &mut head, &mut fds)? {
        return Ok(None);
    }
    let length = u32::from_le_bytes(head) as usize;
    if length > MESSAGE_LIMIT {
        return Err(Error::internal(format!("receive message: {length} bytes announced")));
    }
    let mut message = vec![0; length];
    if length > 0 && !fill(stream, &mut message, &mut fds)? {
        return Err(Error::internal("receive message: the peer hung up in the middle"));
    }
    Ok(Some((message, fds)))
}

/// Takes the one descriptor that an OCI runtime sends over a console socket, with whatever text beside it. None when a
/// non-blocking socket has nothing yet.
pub fn receive_descriptor(stream: &UnixStream) -> Result<Option<OwnedFd>> {
    let mut text = [0; 256];
    match receive_some(stream, &mut text)? {
        None => Ok(None),
        Some((_, mut fds)) if !fds.is_empty() => Ok(Some(fds.swap_remove(0))),
        Some(_) => Err(Error::internal("receive descriptor: none came")),
    }
}

/// One recvmsg(2): bytes and descriptors. None when a non-blocking socket has nothing.
pub(super) fn receive_some(stream: &UnixStream, buffer: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>> {
    loop {
        let mut control = nix::cmsg_space!([i32; FDS]);
        let mut slices = [IoSliceMut::new(buffer)];
        let got = match recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(got) => got,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            // A peer that died with something unread: its end like any other.
            Err(nix::errno::Errno::ECONNRESET) => return Ok(Some((0, Vec::new()))),
            Err(e) => return Err(e).context(|| "receive message"),
        };
        let mut fds = Vec::new();
        for part in got.cmsgs().context(|| "receive message: control data")? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        return Ok(Some((got.bytes, fds)));
    }
}

/// Fills `buffer`; false at end of file before the first byte.
fn fill(stream: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        let (bytes, mut more) =
            receive_some(stream, &mut buffer[filled..])?.ok_or_else(|| Error::deadline("receive message: the peer does not answer"))?;
        fds.append(&mut more);
        match bytes {
            0 if filled == 0 => return Ok(false),
            0 => return Err(Error::internal("receive message: the peer hung up in the middle")),
            n => filled += n,
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn message_with_descriptor() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&a, b"hello", &[file.as_fd()]).unwrap();
        send(&a, b"", &[]).unwrap();
        drop(a);
        let (bytes, fds) = receive(&b).unwrap().unwrap();
        assert_eq!((bytes.as_slice(), fds.len()), (&b"hello"[..], 1));
        assert_eq!(receive(&b).unwrap().unwrap().0, b"");
        assert!(receive(&b).unwrap().is_none());
    }

    #[test]
    fn torn_message_is_an_error() {
        let (a, b) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &a, &[9, 0, 0, 0, 1]).unwrap();
        drop(a);
        assert!(receive(&b).is_err());
    }

    #[test]
    fn long_socket_path() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("s.sock");
        let listener = listen(&path, 0o600).unwrap();
        let client = connect(&path).unwrap();
        check_peer(&client).unwrap();
        drop(listener);
    }
}
