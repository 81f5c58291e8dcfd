//! Calls by their path on the wire: under any package name, and abandoned half way.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crisp::api::runtime::{VersionRequest, VersionResponse};
use crisp::cli::failure::CallError;
use grpcio::{CallOption, ChannelBuilder, ClientUnaryReceiver, EnvBuilder, Marshaller, Method, MethodType};
use protobuf::Message;

pub struct Raw {
    client: grpcio::Client,
}

/// A call under way.
pub struct Pending<R>(ClientUnaryReceiver<R>);

impl Raw {
    pub fn connect(socket: &Path) -> Raw {
        let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
        let channel = ChannelBuilder::new(environment).default_authority("localhost").connect(&format!("unix:{}", socket.display()));
        Raw { client: grpcio::Client::new(channel) }
    }

    pub fn begin<Q: Message, R: Message>(&self, path: &'static str, request: &Q) -> Pending<R> {
        let method = Method { ty: MethodType::Unary, name: path, req_mar: marshaller(), resp_mar: marshaller() };
        let options = CallOption::default().timeout(Duration::from_secs(120));
        Pending(self.client.unary_call_async(&method, request, options).expect("begin a call"))
    }

    /// Abandons a call; returns when the daemon knows, for it reads what comes on one connection in order.
    pub fn abandon<R: Message>(&self, call: Pending<R>) {
        call.cancel();
        let _: VersionResponse = self.call("/runtime.v1.RuntimeService/Version", &VersionRequest::default()).expect("version");
    }

    pub fn call<Q: Message, R: Message>(&self, path: &'static str, request: &Q) -> Result<R, CallError> {
        self.begin(path, request).wait()
    }
}

impl<R: Message> Pending<R> {
    pub fn wait(mut self) -> Result<R, CallError> {
        self.0.receive_sync().map(|(_, answer, _)| answer).map_err(CallError::from)
    }

    pub fn cancel(mut self) {
        self.0.cancel();
        // The answer says that the cancellation has been sent.
        let _ = self.0.receive_sync();
    }
}

fn marshaller<M: Message>() -> Marshaller<M> {
    Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de }
}
