//! What is asked for at a scrape.

use std::collections::BTreeMap;

use prometheus::{CounterVec, GaugeVec, Opts, Registry};

/// Values of one moment.
#[derive(Default)]
pub struct Gauges {
    families: BTreeMap<&'static str, Family>,
}

struct Family {
    help: &'static str,
    counter: bool,
    labels: Vec<&'static str>,
    values: Vec<(Vec<String>, f64)>,
}

impl Gauges {
    /// A value that goes up and down.
    pub fn set(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.add(name, help, false, labels, value);
    }

    /// A value that only grows; its name ends in `_total`.
    pub fn count(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.add(name, help, true, labels, value);
    }

    fn add(&mut self, name: &'static str, help: &'static str, counter: bool, labels: &[(&'static str, &str)], value: f64) {
        let names = || labels.iter().map(|(name, _)| *name).collect();
        let family = self.families.entry(name).or_insert_with(|| Family { help, counter, labels: names(), values: Vec::new() });
        family.values.push((labels.iter().map(|(_, value)| (*value).to_owned()).collect(), value));
    }

    pub(super) fn register(self, registry: &Registry) -> prometheus::Result<()> {
        for (name, family) in self.families {
            let options = Opts::new(name, family.help);
            if family.counter {
                let made = CounterVec::new(options, &family.labels)?;
                for (labels, value) in &family.values {
                    made.get_metric_with_label_values(labels)?.inc_by(value.max(0.0));
                }
                registry.register(Box::new(made))?;
            } else {
                let made = GaugeVec::new(options, &family.labels)?;
                for (labels, value) in &family.values {
                    made.get_metric_with_label_values(labels)?.set(*value);
                }
                registry.register(Box::new(made))?;
            }
        }
        Ok(())
    }
}
