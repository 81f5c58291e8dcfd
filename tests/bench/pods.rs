//! Many sandboxes at once: time up and down with four clients, memory at some counts, lists and statistics when all are
//! there.

use std::time::Duration;

use crisp::api::runtime::{ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest, VersionRequest};
use crisp::cli::bench::density;
use crisp::cli::bench::process::Server;
use crisp::cli::bench::report::{Cell, Report};
use crisp::cli::bench::samples::{millis, timed, Samples};
use crisp::cli::bench::stats::{self, Effort, Query};
use crisp::cli::bench::workload::{Pair, Workload};
use crisp::cli::client::{Client, LONG, SHORT};
use crisp::sys::cancel::Cancel;

use crate::{must, progress, Plan};

const CLIENTS: usize = 4;
const FEW: usize = 10;
const LISTS: usize = 200;
/// Callers of statistics at once.
const RIVALS: usize = 8;
const DENSITY: &str = "many pods of one container, CNI";
const STATS: &str = "statistics";

/// A daemon with nothing on it, and where its numbers go.
pub struct Subject<'a> {
    pub workload: &'a Workload,
    pub client: &'a Client,
    pub server: &'a Server,
    pub report: &'a mut Report,
    pub column: usize,
}

impl Subject<'_> {
    pub fn measure(&mut self, plan: &Plan) {
        let settle = || std::thread::sleep(Duration::from_secs(1));
        settle();
        // In the order of the table, not of the measurement: the pods come and go, whatever is measured between.
        let empty = self.server.halves();
        let few = self.up("few", FEW);
        settle();
        let with_few = self.server.halves();
        self.cost(Query::ContainerStats, FEW, plan.effort);
        self.growth(plan);
        self.down(few.pairs);
        let all = self.up("dense", plan.pods);
        settle();
        let with_all = self.server.halves();
        self.lists(plan.pods, &all.pairs[0]);
        for query in stats::QUERIES {
            self.cost(query, plan.pods, plan.effort);
        }
        self.rivals(plan);
        let more = self.up("more", plan.pods);
        self.cost(Query::ContainerStats, 2 * plan.pods, plan.effort);
        self.cost(Query::SandboxStats, 2 * plan.pods, plan.effort);
        self.down(more.pairs);
        progress("and down again");
        let down = self.down(all.pairs);
        for (what, time) in [("up", all.time), ("down", down)] {
            let label = format!("{} pods {what}, {CLIENTS} clients", plan.pods);
            self.report.set(DENSITY, &label, "s", self.column, Some(time.as_secs_f64().into()));
        }
        for (pods, memory) in [(0, empty), (FEW, with_few), (plan.pods, with_all)] {
            self.report.memory(DENSITY, self.column, pods, memory);
        }
    }

    fn up(&self, name: &str, count: usize) -> density::Up {
        progress(&format!("{count} pods by {CLIENTS} clients"));
        must(density::up(self.workload, name, count, CLIENTS, &Cancel::never()))
    }

    fn down(&self, pairs: Vec<Pair>) -> Duration {
        must(density::down(self.workload, pairs, CLIENTS, &Cancel::never())).time
    }

    fn lists(&mut self, pods: usize, pair: &Pair) {
        let runtime = self.client.runtime();
        let status = ContainerStatusRequest { container_id: pair.container.clone(), ..Default::default() };
        let mut queries: [(&str, Samples); 4] =
            ["ListContainers", "ListPodSandbox", "ContainerStatus", "Version"].map(|name| (name, Samples::default()));
        for _ in 0..LISTS {
            let (answer, time) = timed(|| runtime.list_containers(&ListContainersRequest::default(), SHORT).expect("list containers"));
            assert_eq!(answer.containers.len(), pods);
            queries[0].1.add(time);
            queries[1].1.add(timed(|| runtime.list_pod_sandbox(&ListPodSandboxRequest::default(), SHORT).expect("list sandboxes")).1);
            queries[2].1.add(timed(|| runtime.container_status(&status, SHORT).expect("read status")).1);
            queries[3].1.add(timed(|| runtime.version(&VersionRequest::default(), LONG).expect("read version")).1);
        }
        for (name, samples) in queries {
            self.report.set(DENSITY, &format!("{name} at {pods}"), "ms", self.column, Cell::of(&samples));
        }
    }

    /// Time and CPU of a call with `pods` sandboxes of one container.
    fn cost(&mut self, query: Query, pods: usize, effort: Effort) {
        progress(&format!("{} at {pods}", query.name()));
        let cost = must(stats::cost(query, self.client, self.server, effort, &Cancel::never()));
        if let Some(cost) = &cost {
            assert_eq!(cost.items, pods, "{}", query.name());
        }
        let (times, cpu) = (cost.as_ref().and_then(|cost| Cell::of(&cost.times)), cost.map(|cost| millis(cost.cpu).into()));
        self.report.set(STATS, &format!("{} at {pods}", query.name()), "ms", self.column, times);
        self.report.set(STATS, &format!("{} at {pods}: CPU", query.name()), "ms", self.column, cpu);
    }

    fn rivals(&mut self, plan: &Plan) {
        for callers in [1, RIVALS] {
            progress(&format!("ListContainerStats by {callers}"));
            let rate = must(stats::rate(Query::ContainerStats, self.workload, callers, plan.effort.time / 3, &Cancel::never()));
            let label = format!("ListContainerStats at {}, {callers} callers", plan.pods);
            self.report.set_rate(STATS, &label, "1/s", self.column, Some(rate));
        }
    }

    /// Growth of RSS over ten thousand calls, or over as many as there is time for.
    fn growth(&mut self, plan: &Plan) {
        progress("many calls of ListContainerStats");
        let growth = must(stats::growth(Query::ContainerStats, self.client, self.server, plan.growth, &Cancel::never()));
        let label = format!("RSS growth, ListContainerStats at {FEW}");
        self.report.set(STATS, &label, "KiB", self.column, Some((growth.rss as f64).into()));
        self.report.set_rate(STATS, &format!("{label}: calls"), "", self.column, Some(growth.calls as f64));
    }
}
