//! The lists in pieces: StreamPodSandboxes, StreamContainers, StreamImages and those of stats and metrics. Each takes the objects
//! of this moment, makes their messages piece by piece as the client takes them, and ends. What is removed meanwhile is sent as
//! it was at last.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Call, Service};
use crate::api::runtime::{
    ContainerFilter, ContainerStatsFilter, ImageFilter, PodSandboxFilter, PodSandboxStatsFilter, StreamContainerStatsResponse,
    StreamContainersResponse, StreamImagesResponse, StreamPodSandboxMetricsResponse, StreamPodSandboxStatsResponse,
    StreamPodSandboxesResponse,
};
use crate::error::{Code, Error, Result};
use protobuf::Message;

/// Encoded bytes of the items of one message; a single item may be larger. Clients take 4 MiB at least, and less memory is held
/// at a time.
const PIECE: u64 = 256 << 10;
/// Objects measured at a time for stats and metrics: enough to keep all threads at work.
const BATCH: usize = 64;
/// Bytes in front of an item: tag and length.
const FRAME: u64 = 6;

/// Lists that are sent at a time, each of which holds a worker for as long as its client takes.
pub struct Seats {
    free: AtomicUsize,
}

/// One of them, until it is dropped.
struct Seat<'a>(&'a Seats);

impl Seats {
    pub fn new(count: usize) -> Seats {
        Seats { free: AtomicUsize::new(count) }
    }

    fn take(&self) -> Result<Seat<'_>> {
        let taken = self.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| free.checked_sub(1));
        taken.map(|_| Seat(self)).map_err(|_| Error::new(Code::ResourceExhausted, "too many lists are being streamed to clients"))
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, Ordering::AcqRel);
    }
}

/// Sends `items` in messages made by `wrap`, in their order, each once. No item: no message.
fn in_pieces<I: Message, R>(
    items: impl Iterator<Item = I>,
    call: &Call,
    wrap: impl Fn(Vec<I>) -> R,
    send: &mut dyn FnMut(R) -> Result<()>,
) -> Result<()> {
    let (mut piece, mut size) = (Vec::new(), 0);
    for item in items {
        let more = item.compute_size() + FRAME;
        if size + more > PIECE && !piece.is_empty() {
            call.cancel.check()?;
            send(wrap(std::mem::take(&mut piece)))?;
            size = 0;
        }
        piece.push(item);
        size += more;
    }
    if !piece.is_empty() {
        send(wrap(piece))?;
    }
    Ok(())
}

impl Service {
    pub(super) fn stream_sandboxes(
        &self,
        filter: &PodSandboxFilter,
        call: &Call,
        send: &mut dyn FnMut(StreamPodSandboxesResponse) -> Result<()>,
    ) -> Result<()> {
        let _seat = self.lists.take()?;
        let wrap = |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes, ..Default::default() };
        in_pieces(self.selected_sandboxes(filter)?, call, wrap, send)
    }

    pub(super) fn stream_containers_list(
        &self,
        filter: &ContainerFilter,
        call: &Call,
        send: &mut dyn FnMut(StreamContainersResponse) -> Result<()>,
    ) -> Result<()> {
        let _seat = self.lists.take()?;
        let wrap = |containers| StreamContainersResponse { containers, ..Default::default() };
        in_pieces(self.selected_containers(filter)?, call, wrap, send)
    }

    pub(super) fn stream_stats_of_containers(
        &self,
        filter: Option<&ContainerStatsFilter>,
        call: &Call,
        send: &mut dyn FnMut(StreamContainerStatsResponse) -> Result<()>,
    ) -> Result<()> {
        let _seat = self.lists.take()?;
        let wrap = |container_stats| StreamContainerStatsResponse { container_stats, ..Default::default() };
        in_pieces(self.container_stats_by(BATCH, filter), call, wrap, send)
    }

    pub(super) fn stream_stats_of_sandboxes(
        &self,
        filter: Option<&PodSandboxStatsFilter>,
        call: &Call,
        send: &mut dyn FnMut(StreamPodSandboxStatsResponse) -> Result<()>,
    ) -> Result<()> {
        let _seat = self.lists.take()?;
        let wrap = |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats, ..Default::default() };
        in_pieces(self.sandbox_stats_by(BATCH, filter), call, wrap, send)
    }

    pub(super) fn stream_metrics(&self, call: &Call, send: &mut dyn FnMut(StreamPodSandboxMetricsResponse) -> Result<()>) -> Result<()> {
        let _seat = self.lists.take()?;
        let wrap = |pod_sandbox_metrics| StreamPodSandboxMetricsResponse { pod_sandbox_metrics, ..Default::default() };
        in_pieces(self.sandbox_metrics_by(BATCH), call, wrap, send)
    }

    pub(super) fn stream_images_list(
        &self,
        filter: &ImageFilter,
        call: &Call,
        send: &mut dyn FnMut(StreamImagesResponse) -> Result<()>,
    ) -> Result<()> {
        let _seat = self.lists.take()?;
        let wrap = |images| StreamImagesResponse { images, ..Default::default() };
        in_pieces(self.selected_images(filter)?, call, wrap, send)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::Image;
    use crate::sys::cancel::Cancel;

    fn image(id: usize, bytes: usize) -> Image {
        Image { id: id.to_string(), username: "x".repeat(bytes), ..Default::default() }
    }

    fn sent(items: Vec<Image>) -> Vec<StreamImagesResponse> {
        let (call, mut sent) = (Call::new(Cancel::never()), Vec::new());
        let wrap = |images| StreamImagesResponse { images, ..Default::default() };
        in_pieces(items.into_iter(), &call, wrap, &mut |message| {
            sent.push(message);
            Ok(())
        })
        .unwrap();
        sent
    }

    #[test]
    fn pieces_are_small_and_whole() {
        let messages = sent((0..1000).map(|n| image(n, n * 7 % 5000)).collect());
        assert!(messages.len() > 5 && messages.iter().all(|m| m.compute_size() <= PIECE));
        let ids: Vec<String> = messages.iter().flat_map(|m| &m.images).map(|i| i.id.clone()).collect();
        assert_eq!(ids, (0..1000).map(|n| n.to_string()).collect::<Vec<_>>());
        assert!(sent(Vec::new()).is_empty());
    }

    #[test]
    fn a_large_item_is_alone() {
        let large = 2 * PIECE as usize;
        let counts: Vec<usize> =
            sent(vec![image(0, 1), image(1, large), image(2, 1), image(3, 1)]).iter().map(|m| m.images.len()).collect();
        assert_eq!(counts, [1, 1, 2]);
    }

    #[test]
    fn a_client_that_is_gone_ends_it() {
        let cancel = Cancel::never();
        let (call, mut made, mut count) = (Call::new(cancel.clone()), 0, 0);
        let items = std::iter::repeat_with(|| image(0, 100_000)).take(1000).inspect(|_| made += 1);
        let wrap = |images| StreamImagesResponse { images, ..Default::default() };
        let result = in_pieces(items, &call, wrap, &mut |_| {
            count += 1;
            cancel.set();
            Ok(())
        });
        assert_eq!(result.unwrap_err().code(), Code::Cancelled);
        assert_eq!(count, 1);
        assert!(made < 10);
    }

    #[test]
    fn seats_are_given_back() {
        let seats = Seats::new(1);
        let first = seats.take().unwrap();
        assert_eq!(seats.take().err().map(|e| e.code()), Some(Code::ResourceExhausted));
        drop(first);
        assert!(seats.take().is_ok());
    }
}
