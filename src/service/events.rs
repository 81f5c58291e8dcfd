//! GetContainerEvents: from changes on the bus to CRI's events, each with the statuses of its sandbox and of all its containers as
//! they were when it happened.
//!
//! Managers put nothing but the changed object and its status on the bus. Whoever sends an event adds the rest: it reads what the
//! sandbox has now and undoes, newest first, the changes that wait behind the event. So a change costs little, nothing without
//! subscribers, and an event that is sent late does not tell of its future. Only a subscriber that has lost events may see a
//! sandbox's other containers in newer states than they had.
//!
//! What a daemon finds at its start that ended while none ran is no event: nobody can have subscribed before. Clients list first
//! after they have connected.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{container_status, sandbox_status, Call, Service};
use crate::api::runtime::{ContainerEventResponse, ContainerEventType, ContainerStatus};
use crate::container::{self, Container};
use crate::error::{Code, Result};
use crate::event::{Event, Kind, Subscription};
use crate::sandbox::{self, Sandbox};
use crate::store::now_ns;

/// What is on the bus.
pub enum Fact {
    Sandbox(sandbox::Change),
    Container(container::Change),
}

impl From<sandbox::Change> for Fact {
    fn from(change: sandbox::Change) -> Fact {
        Fact::Sandbox(change)
    }
}

impl From<container::Change> for Fact {
    fn from(change: container::Change) -> Fact {
        Fact::Container(change)
    }
}

impl Fact {
    fn sandbox_id(&self) -> &str {
        match self {
            Fact::Sandbox(change) => &change.object.meta.id,
            Fact::Container(change) => &change.object.meta.sandbox_id,
        }
    }
}

/// A sandbox with all it has, at one moment.
#[derive(Default)]
struct Picture {
    sandbox: Option<(Arc<Sandbox>, sandbox::Status)>,
    containers: BTreeMap<String, (Arc<Container>, container::Status)>,
}

impl Picture {
    /// Goes back before a change.
    fn undo(&mut self, fact: &Fact) {
        match fact {
            Fact::Sandbox(change) => self.put_sandbox(&change.object, change.before.as_ref()),
            Fact::Container(change) => self.put_container(&change.object, change.before.as_ref()),
        }
    }

    /// Makes sure of the change that the event is about. A sandbox that was deleted is shown as it was at last: clients know only
    /// from it whose event that is.
    fn assert(&mut self, fact: &Fact) {
        match fact {
            Fact::Sandbox(change) => self.put_sandbox(&change.object, change.after.as_ref().or(change.before.as_ref())),
            Fact::Container(change) => self.put_container(&change.object, change.after.as_ref()),
        }
    }

    fn put_sandbox(&mut self, sandbox: &Arc<Sandbox>, status: Option<&sandbox::Status>) {
        self.sandbox = status.map(|status| (sandbox.clone(), status.clone()));
    }

    fn put_container(&mut self, container: &Arc<Container>, status: Option<&container::Status>) {
        match status {
            Some(status) => drop(self.containers.insert(container.id().to_owned(), (container.clone(), status.clone()))),
            None => drop(self.containers.remove(container.id())),
        }
    }

    fn statuses(&self) -> Vec<ContainerStatus> {
        self.containers.values().map(|(container, status)| container_status::full(container, status)).collect()
    }
}

/// None: CRI has no event for it.
fn kind(fact: &Fact) -> Option<ContainerEventType> {
    let kind = match fact {
        Fact::Sandbox(change) => change.kind,
        Fact::Container(change) => change.kind,
    };
    Some(match kind {
        Kind::Stopping => return None,
        Kind::Created => ContainerEventType::CONTAINER_CREATED_EVENT,
        Kind::Started => ContainerEventType::CONTAINER_STARTED_EVENT,
        Kind::Stopped => ContainerEventType::CONTAINER_STOPPED_EVENT,
        Kind::Deleted => ContainerEventType::CONTAINER_DELETED_EVENT,
    })
}

fn message(event: &Event<Fact>, kind: ContainerEventType, picture: &Picture) -> ContainerEventResponse {
    let id = match &event.change {
        Fact::Sandbox(change) => &change.object.meta.id,
        Fact::Container(change) => &change.object.meta.id,
    };
    ContainerEventResponse {
        container_id: id.clone(),
        container_event_type: kind.into(),
        created_at: event.at,
        pod_sandbox_status: picture.sandbox.as_ref().map(|(sandbox, status)| sandbox_status::full(sandbox, status)).into(),
        containers_statuses: picture.statuses(),
        ..Default::default()
    }
}

impl Service {
    /// Serves one subscriber until it goes, or the daemon does.
    pub(super) fn container_events(&self, call: &Call, send: &mut dyn FnMut(ContainerEventResponse) -> Result<()>) -> Result<()> {
        let subscription = self.events.subscribe()?;
        loop {
            let event = match subscription.next(&call.cancel) {
                Ok(event) => event,
                // The usual end of a subscription.
                Err(e) if e.code() == Code::Cancelled => return Ok(()),
                Err(e) => return Err(e),
            };
            let Some(kind) = kind(&event.change) else { continue };
            let picture = self.picture_at(&subscription, &event);
            match send(message(&event, kind, &picture)) {
                Err(e) if e.code() == Code::Cancelled => return Ok(()),
                sent => sent?,
            }
        }
    }

    /// First the present, then back: a change that comes between the two looks is among those that wait.
    fn picture_at(&self, subscription: &Subscription<Fact>, event: &Event<Fact>) -> Picture {
        let sandbox_id = event.change.sandbox_id();
        let mut picture = self.picture(sandbox_id);
        subscription.look_back(|fact| {
            if fact.sandbox_id() == sandbox_id {
                picture.undo(fact);
            }
        });
        picture.assert(&event.change);
        picture
    }

    fn picture(&self, sandbox_id: &str) -> Picture {
        let mut picture = Picture::default();
        if let Some(sandbox) = self.sandboxes.find(sandbox_id).ok().flatten() {
            let status = sandbox.status();
            picture.sandbox = Some((sandbox, status));
        }
        for container in self.containers.of_sandbox(sandbox_id) {
            let status = container.status();
            picture.containers.insert(container.id().to_owned(), (container, status));
        }
        picture
    }

    /// The statuses of a sandbox's containers, and a time that none of them is older than: clients that follow events take the
    /// newer of these and an event's.
    pub(super) fn statuses_of(&self, sandbox: &Sandbox) -> (Vec<ContainerStatus>, i64) {
        let at = now_ns();
        (self.picture(sandbox.id()).statuses(), at)
    }
}
