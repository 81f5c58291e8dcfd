//! The connection to the daemon, and a blocking method for every call of the three services, made from the tables of
//! `crate::api`.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use grpcio::{CallOption, ChannelBuilder, EnvBuilder, Marshaller, Method, MethodType};

use super::failure::{CallError, Failure, Outcome};
use crate::api::{self, admin, runtime};

/// For calls that only look: a daemon that takes longer is ill.
pub const SHORT: Option<Duration> = Some(Duration::from_secs(30));
/// For calls that make, start or remove something.
pub const LONG: Option<Duration> = Some(Duration::from_secs(300));
/// For calls that take as long as they take.
pub const FOREVER: Option<Duration> = None;

/// Longest answer accepted, bytes: what the daemon takes as a request.
const MESSAGE_LIMIT: i32 = 64 << 20;

/// A connection. Clones share it.
#[derive(Clone)]
pub struct Client {
    grpc: Arc<grpcio::Client>,
}

/// The RuntimeService of a connection.
pub struct Runtime<'a>(&'a grpcio::Client);
/// The ImageService of a connection.
pub struct Images<'a>(&'a grpcio::Client);
/// crisp's own service; other runtimes answer UNIMPLEMENTED.
pub struct Admin<'a>(&'a grpcio::Client);

impl Client {
    /// Connects to the daemon's socket at `path`. A socket that is not there, or that nobody listens on, is told now
    /// and in words, not by the first call.
    pub fn connect(path: &Path) -> Outcome<Client> {
        let shown = path.display();
        UnixStream::connect(path).map_err(|error| {
            Failure::Failed(match error.kind() {
                ErrorKind::NotFound => format!(
                    "no socket at {shown}: start the daemon (systemctl start crispd, or run crispd), or name its socket with --socket"
                ),
                ErrorKind::ConnectionRefused => {
                    format!("nobody listens on {shown}: start the daemon (systemctl start crispd, or run crispd)")
                }
                ErrorKind::PermissionDenied => format!("connect to {shown}: permission denied: be root or in the socket's group"),
                _ => format!("connect to {shown}: {error}"),
            })
        })?;
        let environment = Arc::new(EnvBuilder::new().cq_count(1).name_prefix("grpc").build());
        let channel = ChannelBuilder::new(environment)
            // Servers in Go refuse the path that would be sent otherwise.
            .default_authority("localhost")
            .max_receive_message_len(MESSAGE_LIMIT)
            .max_send_message_len(MESSAGE_LIMIT)
            // Channels with equal arguments would share one connection, and the callers of a benchmark be one.
            .use_local_subchannel_pool(true)
            // A daemon that restarts is back soon.
            .initial_reconnect_backoff(Duration::from_millis(50))
            .max_reconnect_backoff(Duration::from_secs(1))
            .connect(&format!("unix:{shown}"));
        Ok(Client { grpc: Arc::new(grpcio::Client::new(channel)) })
    }

    pub fn runtime(&self) -> Runtime<'_> {
        Runtime(&self.grpc)
    }

    pub fn images(&self) -> Images<'_> {
        Images(&self.grpc)
    }

    pub fn admin(&self) -> Admin<'_> {
        Admin(&self.grpc)
    }
}

fn option(limit: Option<Duration>) -> CallOption {
    limit.map_or_else(CallOption::default, |limit| CallOption::default().timeout(limit))
}

fn unary<Q: protobuf::Message, R: protobuf::Message + Unpin>(
    client: &grpcio::Client,
    name: &'static str,
    request: &Q,
    limit: Option<Duration>,
) -> Result<R, CallError> {
    let method = Method { ty: MethodType::Unary, name, req_mar: marshaller(), resp_mar: marshaller() };
    client.unary_call(&method, request, option(limit)).map_err(CallError::from)
}

/// The messages of a streaming answer, in the order they come; the thread that asks for the next one waits for it.
pub struct Messages<R>(futures_executor::BlockingStream<grpcio::ClientSStreamReceiver<R>>);

impl<R> Iterator for Messages<R> {
    type Item = Result<R, CallError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|message| message.map_err(CallError::from))
    }
}

fn stream<Q: protobuf::Message, R: protobuf::Message>(
    client: &grpcio::Client,
    name: &'static str,
    request: &Q,
    limit: Option<Duration>,
) -> Result<Messages<R>, CallError> {
    let method = Method { ty: MethodType::ServerStreaming, name, req_mar: marshaller(), resp_mar: marshaller() };
    let receiver = client.server_streaming(&method, request, option(limit))?;
    Ok(Messages(futures_executor::block_on_stream(receiver)))
}

fn marshaller<M: protobuf::Message>() -> Marshaller<M> {
    Marshaller { ser: grpcio::pb_ser, de: grpcio::pb_de }
}

macro_rules! method {
    (unary $module:ident $name:ident $request:ident $response:ident $paths:expr) => {
        #[doc = concat!("Calls `", stringify!($request), "` of at most `limit`.")]
        pub fn $name(&self, request: &$module::$request, limit: Option<Duration>) -> Result<$module::$response, CallError> {
            const PATHS: &[&str] = &$paths;
            unary(self.0, PATHS[0], request, limit)
        }
    };
    (stream $module:ident $name:ident $request:ident $response:ident $paths:expr) => {
        #[doc = concat!("Calls `", stringify!($request), "` of at most `limit`.")]
        pub fn $name(&self, request: &$module::$request, limit: Option<Duration>) -> Result<Messages<$module::$response>, CallError> {
            const PATHS: &[&str] = &$paths;
            stream(self.0, PATHS[0], request, limit)
        }
    };
}

macro_rules! service {
    ($noun:ident, $module:ident $(($method:ident, $name:ident, $request:ident, $response:ident, $kind:ident, $paths:expr))*) => {
        impl $noun<'_> {
            $(method! { $kind $module $name $request $response $paths })*
        }
    };
}

api::for_each_runtime_rpc!(service; Runtime, runtime);
api::for_each_image_rpc!(service; Images, runtime);
api::for_each_admin_rpc!(service; Admin, admin);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_socket_says_how_to_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crisp.sock");
        let Err(Failure::Failed(text)) = Client::connect(&path) else { panic!() };
        assert!(text.starts_with(&format!("no socket at {}: start", path.display())), "{text}");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let Err(Failure::Failed(text)) = Client::connect(&path) else { panic!() };
        assert!(text.starts_with("nobody listens"), "{text}");
    }
}
