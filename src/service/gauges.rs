//! What a scrape of the metrics asks the nouns.

use super::Service;
use crate::container::State;
use crate::telemetry::Gauges;

impl Service {
    /// Objects by state; memory is read, nothing else.
    pub fn observe(&self, gauges: &mut Gauges) {
        let (mut created, mut running, mut exited, mut shims) = (0u32, 0u32, 0u32, 0u32);
        for container in self.containers.all() {
            let status = container.status();
            shims += u32::from(status.shim_alive);
            match status.state {
                State::Making => {}
                State::Created => created += 1,
                State::Running => running += 1,
                State::Exited => exited += 1,
            }
        }
        let sandboxes = self.sandboxes.all();
        let ready = sandboxes.iter().filter(|s| s.status().is_ready()).count();
        for (state, count) in [("created", created), ("running", running), ("exited", exited)] {
            gauges.set("crisp_containers", "Containers by state.", &[("state", state)], f64::from(count));
        }
        for (state, count) in [("ready", ready), ("notready", sandboxes.len() - ready)] {
            gauges.set("crisp_sandboxes", "Sandboxes by state.", &[("state", state)], count as f64);
        }
        for (state, count) in [("complete", self.images.list().len()), ("incomplete", self.images.incomplete().len())] {
            gauges.set("crisp_images", "Images by state; an incomplete one must be pulled again.", &[("state", state)], count as f64);
        }
        let (layers, bytes) = self.images.layers();
        gauges.set("crisp_image_layers", "Unpacked layers.", &[], layers as f64);
        gauges.set("crisp_image_layers_bytes", "What they take on disk.", &[], bytes as f64);
        gauges.set("crisp_event_subscribers", "Clients of GetContainerEvents.", &[], self.events.subscribers() as f64);
        gauges.set("crisp_shims", "Shims that are alive.", &[], f64::from(shims));
    }
}
