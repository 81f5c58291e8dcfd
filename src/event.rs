//! What happened to sandboxes and containers, for subscribers. Queues are bounded: a slow subscriber loses its oldest events, which
//! are counted, and never makes anybody wait.
