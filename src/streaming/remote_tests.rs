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

    fn ready(&mut self, flags: PollFlags) -> Result<()> {
        if flags.contains(PollFlags::POLLHUP) {
            return Err(Error::cancelled("the client has hung up"));
        }
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
    client: UnixStream,
    shim: UnixStream,
    stdin: File,
    stdout: File,
}

impl Peers {
    /// The process ends.
    fn end(&mut self) {
        let record = ExitRecord { version: VERSION, exit_code: 3, signal: None, oom: false, finished_at: 0 };
        socket::send(&self.shim, &serde_json::to_vec(&Event::Exit(record)).unwrap(), &[]).unwrap();
    }

    /// What the process gets, until the end.
    fn input(&mut self) -> String {
        let mut text = String::new();
        self.stdin.read_to_string(&mut text).unwrap();
        text
    }
}

const ENDED: Over = Over::Ended(Ended::ContainerEnded(Some(3)));

/// Pumps for a client in `state`, while `play` is everybody else. Whatever it gives back stays open until the session is over.
fn pump<T: Send>(state: State, input_end: InputEnd, play: impl FnOnce(Peers) -> T + Send) -> (Result<Over>, State) {
    let cancel = Cancel::never();
    let wanted = Wanted { stdin: true, stdout: true, ..Wanted::default() };
    let terms = Terms { wanted, protocol: Protocol::V4, idle: Duration::ZERO, cancel: &cancel };
    let (client, socket) = UnixStream::pair().unwrap();
    let (shim, attached) = UnixStream::pair().unwrap();
    let ((read, stdin), (stdout, write)) = (monitor::pipe().unwrap(), monitor::pipe().unwrap());
    process::set_nonblocking(&stdout).unwrap();
    process::set_nonblocking(&stdin).unwrap();
    let peers = Peers { client, shim, stdin: read.into(), stdout: write.into() };
    let state = Arc::new(Mutex::new(state));
    let mut session = Session::new(Box::new(Client { socket, state: state.clone() }), terms, input_end);
    (session.stdin, session.stdout) = (Some(STDIN), Some(STDOUT));
    let control = Control::attached(Attachment::over(attached));
    let over = std::thread::scope(|scope| {
        let played = scope.spawn(|| play(peers));
        let over = session.pump(Streams { stdin: Some(stdin), stdout: Some(stdout), stderr: None, control });
        drop(played.join().unwrap());
        over
    });
    drop(session);
    (over, Arc::into_inner(state).unwrap().into_inner().unwrap())
}

/// As long as the client has no room the output is not polled: what became of it meanwhile is not known.
#[test]
fn output_that_nobody_asked_for_is_not_over() {
    for opens in [Opens::Waiting, Opens::After] {
        let slow = State { opens: Some(opens), ..State::default() };
        let output = vec![b'x'; 60_000];
        let (over, state) = pump(slow, InputEnd::Close, |mut peers| {
            peers.stdout.write_all(&output).unwrap();
            peers.end();
            peers
        });
        assert_eq!((over.unwrap(), state.got.len()), (ENDED, output.len()));
    }
}

fn typed(text: &str) -> State {
    let data = Input::Data { stream: STDIN, bytes: text.into() };
    State { room: usize::MAX, inputs: [data, Input::Finished { stream: STDIN }].into(), ..State::default() }
}

#[test]
fn a_client_without_more_input_leaves_a_container_that_waits_for_others() {
    let begin = Instant::now();
    let (over, state) = pump(typed("input"), InputEnd::Leave, |mut peers| {
        // Not before the shim has it all.
        std::thread::sleep(QUIET * 3);
        peers.stdout.write_all(b"before").unwrap();
        peers.stdin.read_exact(&mut [0; 5]).unwrap();
        // One that is never quiet; nobody reads the last of it.
        while peers.stdout.write_all(b".").is_ok() {
            std::thread::sleep(QUIET / 20);
        }
    });
    assert_eq!(over.unwrap(), Over::InputGiven);
    assert!(begin.elapsed() >= QUIET * 3, "{:?}", begin.elapsed());
    assert!(state.got.starts_with(b"before.") && state.got.len() > 8, "{} bytes", state.got.len());
}

#[test]
fn the_end_of_input_is_a_key_to_a_terminal() {
    for (text, expected) in [("line\n", "line\n\x04"), ("line\nmore", "line\nmore\x04\x04"), ("", "\x04")] {
        let (over, _) = pump(typed(text), InputEnd::Type, |mut peers| {
            assert_eq!(peers.input(), expected);
            peers.end();
            peers
        });
        assert_eq!(over.unwrap(), ENDED);
    }
    // Who hangs up has typed nothing.
    let mut state = typed("line\n");
    state.inputs.pop_back();
    let (over, _) = pump(state, InputEnd::Type, |mut peers| {
        let mut line = [0; 5];
        peers.stdin.read_exact(&mut line).unwrap();
        peers.client.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(peers.input(), "");
    });
    assert_eq!(over.unwrap_err().code(), Code::Cancelled);
}
