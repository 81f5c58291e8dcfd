//! Streams of messages that a test can read on a thread, leave in the middle, or not read at all.

use std::future::poll_fn;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use crisp::api::runtime::*;
use crisp::cli::failure::CallError;
use futures_util::stream::StreamExt;
use grpcio::{CallOption, ChannelBuilder, ClientSStreamReceiver, EnvBuilder, Marshaller, Method, MethodType};
use protobuf::Message;

use crate::node::{eventually, Node};

pub const EVENTS: &str = "/runtime.v1.RuntimeService/GetContainerEvents";

/// Begins a streaming call on a connection of its own. What is not read stays with the server; dropping it cancels.
pub fn open<Q: Message, R: Message>(socket: &Path, path: &'static str, request: &Q) -> Unread<R> {
    let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
    let channel = ChannelBuilder::new(environment).default_authority("localhost").connect(&format!("unix:{}", socket.display()));
    let client = grpcio::Client::new(channel);
    let marshaller = Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de };
    let method = Method {
        ty: MethodType::ServerStreaming,
        name: path,
        req_mar: marshaller,
        resp_mar: Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de },
    };
    let receiver = client.server_streaming(&method, request, CallOption::default()).expect("begin a call");
    Unread { receiver, _client: client }
}

/// A stream nobody reads yet.
pub struct Unread<R> {
    receiver: ClientSStreamReceiver<R>,
    _client: grpcio::Client,
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// What a stream says next, or None when `leave` was set meanwhile.
fn next<R>(stream: &mut ClientSStreamReceiver<R>, leave: &AtomicBool) -> Option<Option<Result<R, grpcio::Error>>> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut next = pin!(poll_fn(|context| stream.poll_next_unpin(context)));
    loop {
        if let Poll::Ready(found) = std::future::Future::poll(next.as_mut(), &mut context) {
            return Some(found);
        }
        if leave.load(Ordering::SeqCst) {
            return None;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

impl<R: Message + Unpin> Unread<R> {
    /// Reads what is left on this thread.
    pub fn read_all(mut self) -> (Vec<R>, Option<CallError>) {
        let (mut all, stay) = (Vec::new(), AtomicBool::new(false));
        loop {
            match next(&mut self.receiver, &stay).flatten() {
                Some(Ok(message)) => all.push(message),
                Some(Err(error)) => return (all, Some(error.into())),
                None => return (all, None),
            }
        }
    }

    /// Reads one message.
    pub fn read(&mut self) -> R {
        let found = next(&mut self.receiver, &AtomicBool::new(false)).flatten();
        found.expect("a message, not the end").expect("a message")
    }
}

/// A subscriber of events that reads all the time.
pub struct Subscriber {
    seen: Arc<Mutex<Vec<ContainerEventResponse>>>,
    leave: Arc<AtomicBool>,
    reader: Option<JoinHandle<Option<CallError>>>,
}

impl Subscriber {
    /// Subscribes; nothing says when the daemon has heard of it.
    pub fn join(node: &Node) -> Subscriber {
        let Unread { mut receiver, _client } = open(&node.config().socket, EVENTS, &GetEventsRequest::default());
        let (seen, leave) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (theirs, end) = (seen.clone(), leave.clone());
        let reader = std::thread::spawn(move || {
            let _client = _client;
            loop {
                match next(&mut receiver, &end)?? {
                    Ok(event) => theirs.lock().expect("no thread panics with it").push(event),
                    Err(error) => return Some(error.into()),
                }
            }
        });
        Subscriber { seen, leave, reader: Some(reader) }
    }

    /// Subscribes, and makes sandboxes until it hears of one.
    pub fn start(node: &Node) -> Subscriber {
        let subscriber = Subscriber::join(node);
        subscriber.wait_heard(node);
        subscriber
    }

    /// Makes sandboxes until it hears of one.
    pub fn wait_heard(&self, node: &Node) {
        let mut name = 0;
        eventually("a subscriber hears something", || {
            name += 1;
            let id = node.sandbox(&format!("probe-{:p}-{name}", self));
            node.remove_sandbox(&id).expect("remove a sandbox");
            // The last of its events: none of them follows later.
            self.events().iter().any(|e| e.container_id == id && kind(e) == DELETED).then_some(())
        });
    }

    pub fn events(&self) -> Vec<ContainerEventResponse> {
        self.seen.lock().expect("no thread panics with it").clone()
    }

    /// Waits until an event of that kind and object has come.
    pub fn wait(&self, id: &str, wanted: ContainerEventType) -> ContainerEventResponse {
        eventually(&format!("{wanted:?} of {id}"), || self.events().into_iter().find(|e| e.container_id == id && kind(e) == wanted))
    }

    /// Cancels the call.
    pub fn leave(mut self) -> Vec<ContainerEventResponse> {
        self.leave.store(true, Ordering::SeqCst);
        let error = self.reader.take().expect("it is left once").join().expect("the reader did not panic");
        assert!(error.is_none(), "{}", error.map(|e| e.to_string()).unwrap_or_default());
        self.events()
    }

    /// How the daemon ended the call.
    pub fn end(mut self) -> Option<CallError> {
        self.reader.take().expect("it is left once").join().expect("the reader did not panic")
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.leave.store(true, Ordering::SeqCst);
    }
}

pub const CREATED: ContainerEventType = ContainerEventType::CONTAINER_CREATED_EVENT;
pub const STARTED: ContainerEventType = ContainerEventType::CONTAINER_STARTED_EVENT;
pub const STOPPED: ContainerEventType = ContainerEventType::CONTAINER_STOPPED_EVENT;
pub const DELETED: ContainerEventType = ContainerEventType::CONTAINER_DELETED_EVENT;

pub fn kind(event: &ContainerEventResponse) -> ContainerEventType {
    event.container_event_type.enum_value().expect("a known kind")
}
