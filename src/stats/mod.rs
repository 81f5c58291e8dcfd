//! Stats of containers and sandboxes, and cAdvisor metrics, read from kernel files in parallel.
