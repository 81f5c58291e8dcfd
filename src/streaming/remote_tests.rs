//! Sessions with a client and a shim that are tests.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::*;
use crate::shim::client::Attachment;
use crate::shim::protocol::{Event, ExitRecord, VERSION};
use crate::sys::{monitor, process, socket};

/// What the client of a session does and has got.
#[derive(Default)]
struct State {
    room: usize,
    /// When there is room without limit, which it takes longer than a silence to find out.
    opens: Option<Opens>,
    waits: usize,
    inputs: VecDeque<Input>,
    got: Vec<u8>,
}

enum Opens {
    /// In the second wait, at its end.
    Waiting,
    /// After the first wait.
    After,
}

impl State {
    fn open(&mut self) {
        std::thread::sleep(QUIET * 2);
        self.opens = None;
        self.room = usize::MAX;
    }
}

struct Client {
    socket: UnixStream,
    state: Arc<Mutex<State>>,
}

const STDIN: StreamId = 1;
const STDOUT: StreamId = 2;

impl Wire for Client {
    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn interest(&self) -> PollFlags {
        let mut state = self.state.lock().unwrap();
        state.waits += 1;
        let unsent = matches!(state.opens, Some(Opens::Waiting)) && state.waits == 2;
        PollFlags::POLLIN | if unsent { PollFlags::POLLOUT } else { PollFlags::empty() }
    }

    fn ready(&mut self, _: PollFlags) -> Result<()> {
        self.state.lock().unwrap().open();
        Ok(())
    }

    fn next(&mut self) -> Option<Input> {
        let mut state = self.state.lock().unwrap();
        if matches!(state.opens, Some(Opens::After)) && state.waits == 1 {
            state.open();
        }
        state.inputs.pop_front()
    }

    fn room(&self, _: StreamId) -> usize {
        self.state.lock().unwrap().room
    }

    fn send(&mut self, stream: StreamId, bytes: &[u8]) -> Result<()> {
        assert_eq!(stream, STDOUT);
        let mut state = self.state.lock().unwrap();
        assert!(bytes.len() <= state.room);
        state.room -= bytes.len();
        state.got.extend_from_slice(bytes);
        Ok(())
    }

    fn accept(&mut self, _: StreamId) -> Result<()> {
        Ok(())
    }

    fn consumed(&mut self, _: StreamId, _: usize) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self, _: StreamId) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, _: StreamId) -> Result<()> {
        Ok(())
    }

    fn goodbye(&mut self) -> Result<()> {
        Ok(())
    }

    fn is_flushed(&self) -> bool {
        true
    }

    fn keep_alive(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The other ends of what a session has.
struct Peers {
    _client: UnixStream,
    shim: UnixStream,
    /// Kept open: somebody has the output beyond the end of the process.
    stdout: File,
}

/// Pumps for a client in `state`. `begin` plays the process before.
fn pump(state: State, begin: impl FnOnce(&mut Peers)) -> (Result<Ended>, State) {
    let cancel = Cancel::never();
    let wanted = Wanted { stdin: true, stdout: true, ..Wanted::default() };
    let terms = Terms { wanted, protocol: Protocol::V4, idle: Duration::ZERO, cancel: &cancel };
    let (client, socket) = UnixStream::pair().unwrap();
    let (shim, attached) = UnixStream::pair().unwrap();
    let (stdout, theirs) = monitor::pipe().unwrap();
    process::set_nonblocking(&stdout).unwrap();
    let mut peers = Peers { _client: client, shim, stdout: theirs.into() };
    begin(&mut peers);
    let state = Arc::new(Mutex::new(state));
    let mut session = Session::new(Box::new(Client { socket, state: state.clone() }), terms);
    (session.stdin, session.stdout) = (Some(STDIN), Some(STDOUT));
    let control = Control::attached(Attachment::over(attached));
    let ended = session.pump(Streams { stdin: None, stdout: Some(stdout), stderr: None, control });
    drop((session, peers));
    (ended, Arc::into_inner(state).unwrap().into_inner().unwrap())
}

/// The process writes `output` and ends.
fn ends(peers: &mut Peers, output: &[u8]) {
    peers.stdout.write_all(output).unwrap();
    let record = ExitRecord { version: VERSION, exit_code: 3, signal: None, oom: false, finished_at: 0 };
    socket::send(&peers.shim, &serde_json::to_vec(&Event::Exit(record)).unwrap(), &[]).unwrap();
}

/// As long as the client has no room the output is not polled: what became of it meanwhile is not known.
#[test]
fn output_that_nobody_asked_for_is_not_over() {
    let output = vec![b'x'; 60_000];
    for opens in [Opens::Waiting, Opens::After] {
        let slow = State { opens: Some(opens), ..State::default() };
        let (ended, state) = pump(slow, |peers| ends(peers, &output));
        assert_eq!((ended.unwrap(), state.got.len()), (Ended::ContainerEnded(Some(3)), output.len()));
    }
}
