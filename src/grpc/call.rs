//! From an arrived request to its answer. Every call is run under catch_unwind and leaves one log line: method, id, duration,
//! code.

use std::future::Future;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::Instant;

use futures_util::sink::{Sink, SinkExt};
use grpcio::{RpcContext, RpcStatus, RpcStatusCode, ServerStreamingSink, UnarySink, WriteFlags};

use super::lane::Lane;
use super::way;
use crate::error::{Code, Error, Result};
use crate::service::Call;
use crate::sys::cancel::Cancel;
use crate::telemetry::{self, CallMeter};

/// What is known of a method.
#[derive(Clone, Copy)]
pub(super) struct Method {
    pub name: &'static str,
    /// Lists and status calls are logged at debug: kubelet makes several a second.
    pub quiet: bool,
    pub meter: &'static CallMeter,
}

impl Method {
    pub fn new(name: &'static str, quiet: bool) -> Method {
        Method { name, quiet, meter: telemetry::call_meter(name) }
    }
}

/// Runs `body` and logs; a panic is INTERNAL.
fn run<T>(method: Method, call: &Call, body: impl FnOnce(&Call) -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| body(call))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::internal(format!("{} panicked: {}", method.name, text.unwrap_or("no message"))))
    });
    let id = call.subject();
    let took = begin.elapsed();
    method.meter.record(result.as_ref().map_or_else(Error::code, |_| Code::Ok), took);
    let ms = took.as_secs_f64() * 1e3;
    match &result {
        Ok(_) if method.quiet => log::debug!("{} {id} {ms:.1} ms OK", method.name),
        Ok(_) => log::info!("{} {id} {ms:.1} ms OK", method.name),
        Err(e) if method.quiet && matches!(e.code(), Code::NotFound | Code::Unimplemented) => {
            log::debug!("{} {id} {ms:.1} ms {}: {e}", method.name, e.code().name())
        }
        Err(e) => log::warn!("{} {id} {ms:.1} ms {}: {e}", method.name, e.code().name()),
    }
    result
}

fn status(error: &Error) -> RpcStatus {
    RpcStatus::with_message(RpcStatusCode::from(error.code() as i32), error.message().to_owned())
}

fn full(lane: &str) -> Error {
    Error::new(Code::ResourceExhausted, format!("too many calls wait in the {lane} lane"))
}

/// Sees a refusal on its way. Dropped before it is sent it would reach the client as CANCELLED, and the completion queue's own
/// thread, which calls this, must not wait for it.
fn refuse(context: &RpcContext, sending: impl Future<Output = grpcio::Result<()>> + Send + 'static) {
    context.spawn(async {
        // A client that is gone does not need it.
        let _ = sending.await;
    });
}

/// Serves a call that reads memory only.
pub(super) fn fast<P: Send + 'static, Q: Send + 'static>(
    context: &RpcContext,
    lane: &Arc<Lane>,
    method: Method,
    request: P,
    sink: UnarySink<Q>,
    body: impl FnOnce(P, &Call) -> Result<Q> + Send + 'static,
) {
    // The sink goes along with the job, so a refused job gives it back.
    let sink = Arc::new(parking_lot::Mutex::new(Some(sink)));
    let theirs = sink.clone();
    let job = Box::new(move || {
        let call = Call::new(Cancel::never());
        let result = run(method, &call, |call| body(request, call));
        if let Some(sink) = theirs.lock().take() {
            way::see_off(match result {
                Ok(answer) => sink.success(answer),
                Err(e) => sink.fail(status(&e)),
            });
        }
    });
    if let Err(job) = lane.submit(job) {
        drop(job);
        if let Some(sink) = sink.lock().take() {
            refuse(context, sink.fail(status(&full("fast"))));
        }
    }
}

/// Serves a call that may block. It is registered as server-streaming, which has the same form on the wire: only that sink
/// shows a cancellation before the answer. `body` sends its answers through the closure it gets.
pub(super) fn slow<P: Send + 'static, Q: Send + 'static>(
    context: &RpcContext,
    lane: &Arc<Lane>,
    method: Method,
    request: P,
    sink: ServerStreamingSink<Q>,
    body: impl FnOnce(P, &Call, &mut dyn FnMut(Q) -> Result<()>) -> Result<()> + Send + 'static,
) {
    let cancel = Cancel::never();
    let alarm = Arc::new(OnCancel { cancel: cancel.clone(), armed: AtomicBool::new(true) });
    let waker = Waker::from(alarm.clone());
    let mut sink = sink;
    // Registers the waker: nothing is buffered yet, so it is woken by the end of the call alone.
    let mut task = std::task::Context::from_waker(&waker);
    if let std::task::Poll::Ready(Err(_)) = Pin::new(&mut sink).poll_ready(&mut task) {
        return;
    }
    let sink = Arc::new(parking_lot::Mutex::new(Some(sink)));
    let theirs = sink.clone();
    let job = Box::new(move || {
        let Some(mut sink) = theirs.lock().take() else { return };
        let call = Call::new(cancel.clone());
        let mut gone = false;
        let result = run(method, &call, |call| {
            let mut send = |answer: Q| {
                let sent = futures_executor::block_on(sink.send((answer, WriteFlags::default())));
                // Sending has put its own waker in the place of ours.
                let mut task = std::task::Context::from_waker(&waker);
                if sent.is_err() || matches!(Pin::new(&mut sink).poll_ready(&mut task), std::task::Poll::Ready(Err(_))) {
                    gone = true;
                    cancel.set();
                    return Err(Error::cancelled("the client is gone before its answer"));
                }
                Ok(())
            };
            body(request, call, &mut send)
        });
        // A sink that has told of the call's end must not be asked again; dropped it cancels what is cancelled.
        if gone {
            return;
        }
        // From here on the end of the call is ours.
        alarm.armed.store(false, Ordering::SeqCst);
        let ended = match result {
            Ok(()) => futures_executor::block_on(sink.close()),
            Err(e) => futures_executor::block_on(sink.fail(status(&e))),
        };
        if ended.is_err() {
            // Whoever made something for this client must know that it never heard of it.
            cancel.set();
        }
    });
    if let Err(job) = lane.submit(job) {
        drop(job);
        if let Some(sink) = sink.lock().take() {
            refuse(context, sink.fail(status(&full("slow"))));
        }
    }
}

/// Woken by the end of a call.
struct OnCancel {
    cancel: Cancel,
    armed: AtomicBool,
}

impl Wake for OnCancel {
    fn wake(self: Arc<Self>) {
        if self.armed.load(Ordering::SeqCst) {
            self.cancel.set();
        }
    }
}
