//! Traffic of the links of a network namespace, by rtnetlink(7) on a socket kept open: a socket belongs to the namespace it
//! was made in, whoever uses it, so that a reading needs neither a thread in there nor a process.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{recv, send, socket, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};

use super::lock::{Lock, Rank};
use super::namespace;
use crate::error::{Context, Error, Result};

/// One link and what went through it since it exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    /// Switched on (IFF_UP).
    pub up: bool,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// A socket in a network namespace; it holds the namespace until it is dropped.
pub struct Links {
    socket: OwnedFd,
    /// Sequence number of the last request. Held for one exchange with the kernel: two would get each other's answers.
    exchange: Lock<u32>,
}

/// The kernel's own messages have at most 32 KiB.
const BUFFER: usize = 32 << 10;
/// sizeof(struct nlmsghdr), sizeof(struct ifinfomsg).
const HEADER: usize = 16;
const LINK_HEADER: usize = 16;
/// Of the flags in struct ifinfomsg.
const FLAGS: usize = 8;
/// if_link.h: leave out the long statistics of address families.
const SKIP_STATS: u32 = 8;

impl Links {
    /// Opens a socket inside the pinned network namespace.
    pub fn open(pin: &Path) -> Result<Links> {
        let socket = namespace::in_netns(pin, || {
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
                .context(|| "make a netlink socket")
        })?;
        Ok(Links { socket, exchange: Lock::new(Rank::Leaf, 0) })
    }

    /// All links, in the order of their indexes.
    pub fn read(&self) -> Result<Vec<Link>> {
        let what = || "list the links of a network namespace";
        let mut sequence = self.exchange.lock();
        *sequence = sequence.wrapping_add(1);
        send(self.socket.as_raw_fd(), &request(*sequence), MsgFlags::empty()).context(what)?;
        let (mut links, mut buffer) = (Vec::new(), [0; BUFFER]);
        loop {
            // The kernel answers while it is asked: there is nothing to wait for.
            let size = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.context(what)?,
            };
            if size == 0 {
                return Err(Error::internal(format!("{}: the answer is empty", what())));
            }
            if parse(&buffer[..size], *sequence, &mut links).context(what)? {
                return Ok(links);
            }
        }
    }
}

/// RTM_GETLINK for all links.
fn request(sequence: u32) -> [u8; HEADER + LINK_HEADER + 8] {
    let mut bytes = [0; HEADER + LINK_HEADER + 8];
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..6].copy_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    bytes[6..8].copy_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    let attribute = HEADER + LINK_HEADER;
    bytes[attribute..attribute + 2].copy_from_slice(&8u16.to_ne_bytes());
    bytes[attribute + 2..attribute + 4].copy_from_slice(&libc::IFLA_EXT_MASK.to_ne_bytes());
    bytes[attribute + 4..].copy_from_slice(&SKIP_STATS.to_ne_bytes());
    bytes
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Takes the links out of one datagram; true when it has the end of the list. Messages of an older request are passed over.
fn parse(mut bytes: &[u8], sequence: u32, links: &mut Vec<Link>) -> Result<bool> {
    let torn = || Error::internal("the answer of the kernel is torn");
    while !bytes.is_empty() {
        let length = u32_at(bytes, 0).ok_or_else(torn)? as usize;
        let (kind, theirs) = (u16_at(bytes, 4).ok_or_else(torn)?, u32_at(bytes, 8).ok_or_else(torn)?);
        if length < HEADER || length > bytes.len() {
            return Err(torn());
        }
        let body = &bytes[HEADER..length];
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
        if theirs != sequence {
            continue;
        }
        match i32::from(kind) {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                let code = u32_at(body, 0).ok_or_else(torn)? as i32;
                return Err(std::io::Error::from_raw_os_error(code.wrapping_neg())).context(|| "answer of the kernel");
            }
            _ if kind == libc::RTM_NEWLINK => {
                let up = u32_at(body, FLAGS).is_some_and(|flags| flags & libc::IFF_UP as u32 != 0);
                links.extend(body.get(LINK_HEADER..).and_then(link).map(|link| Link { up, ..link }));
            }
            _ => {}
        }
    }
    Ok(false)
}

/// A link from its attributes; None without a name.
fn link(mut attributes: &[u8]) -> Option<Link> {
    let (mut name, mut link) = (None, Link::default());
    while let Some(length) = u16_at(attributes, 0).map(usize::from) {
        let kind = u16_at(attributes, 2)?;
        let value = attributes.get(4..length)?;
        match kind {
            libc::IFLA_IFNAME => name = Some(String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into_owned()),
            libc::IFLA_STATS64 => count(&mut link, value),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    link.name = name?;
    Some(link)
}

/// struct rtnl_link_stats64 (if_link.h): received and sent in turns.
fn count(link: &mut Link, stats: &[u8]) {
    let Link { rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped, .. } = link;
    for (n, slot) in [rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped].into_iter().enumerate() {
        *slot = u64_at(stats, n * 8).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((body.len() + HEADER) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    }

    fn new_link(sequence: u32, name: &str) -> Vec<u8> {
        let stats: Vec<u8> = (1u64..=24).flat_map(u64::to_ne_bytes).collect();
        let mut body = vec![0; LINK_HEADER];
        body[FLAGS] = libc::IFF_UP as u8;
        body.extend(attribute(libc::IFLA_IFNAME, format!("{name}\0").as_bytes()));
        body.extend(attribute(libc::IFLA_STATS64, &stats));
        message(libc::RTM_NEWLINK, sequence, &body)
    }

    #[test]
    fn a_list_of_links() {
        let mut links = Vec::new();
        let mut bytes = new_link(6, "old");
        bytes.extend(new_link(7, "eth0"));
        assert!(!parse(&bytes, 7, &mut links).unwrap());
        assert!(parse(&message(libc::NLMSG_DONE as u16, 7, &[0; 4]), 7, &mut links).unwrap());
        let expected = Link {
            name: "eth0".into(),
            up: true,
            rx_packets: 1,
            tx_packets: 2,
            rx_bytes: 3,
            tx_bytes: 4,
            rx_errors: 5,
            tx_errors: 6,
            rx_dropped: 7,
            tx_dropped: 8,
        };
        assert_eq!(links, [expected]);
    }

    #[test]
    fn refusals_and_torn_answers_are_errors() {
        let refused = message(libc::NLMSG_ERROR as u16, 1, &(-libc::EPERM).to_ne_bytes());
        assert!(parse(&refused, 1, &mut Vec::new()).unwrap_err().message().contains("not permitted"));
        let whole = new_link(1, "eth0");
        for end in 1..whole.len() {
            assert!(parse(&whole[..end], 1, &mut Vec::new()).is_err(), "{end}");
        }
    }

    #[test]
    fn the_links_of_this_namespace() {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute).unwrap();
        let links = Links { socket, exchange: Lock::new(Rank::Leaf, 0) };
        for _ in 0..3 {
            let names: Vec<String> = links.read().unwrap().into_iter().map(|l| l.name).collect();
            assert!(names.contains(&"lo".to_owned()), "{names:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), cut in 0usize..300, noise in proptest::num::u8::ANY) {
            let _ = parse(&bytes, 0, &mut Vec::new());
            let mut whole = new_link(1, "eth0");
            let at = cut % whole.len();
            whole[at] = noise;
            let _ = parse(&whole, 1, &mut Vec::new());
        }
    }
}
