//! Counters and histograms of the daemon itself, and the endpoint that shows them to Prometheus.
