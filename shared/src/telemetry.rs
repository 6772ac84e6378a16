//! Logs and metrics: `tracing` for people or as JSON, Prometheus at `/metrics`.
