//! Logs and metrics of a process.

use std::io::IsTerminal;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Names of metrics. Durations are seconds.
pub mod metric {
    /// Counter; `route`, `model`, `status`.
    pub const REQUESTS: &str = "stoker_requests_total";
    /// Histogram; `model`, `lane`: from acceptance to an attempt's start.
    pub const QUEUE_TIME: &str = "stoker_queue_time_seconds";
    /// Histogram; `model`: on coordinators from acceptance, on workers from an attempt's start.
    pub const TIME_TO_FIRST_TOKEN: &str = "stoker_time_to_first_token_seconds";
    /// Histogram; `model`: mean of a job's tokens after its first.
    pub const TIME_PER_OUTPUT_TOKEN: &str = "stoker_time_per_output_token_seconds";
    /// Counter; `model`, `kind` (`prompt`, `completion`, `cached_prompt`).
    pub const TOKENS: &str = "stoker_tokens_total";
    /// Counter; `model`, `kind`: tokens that were guessed ahead (`drafted`), and those of them that were right (`accepted`).
    pub const SPECULATION: &str = "stoker_speculation_tokens_total";
    /// Counter; `model`, `finish_reason`.
    pub const JOBS: &str = "stoker_jobs_total";
    /// Gauge; `model`: jobs that decode together now.
    pub const BATCH_SIZE: &str = "stoker_batch_size";
    /// Gauge; `model`: jobs that wait for a slot in the worker.
    pub const ENGINE_WAITING: &str = "stoker_engine_waiting";
    /// Gauge; `model`: share of the KV cache in use, 0 to 1.
    pub const KV_USE: &str = "stoker_kv_cache_use_ratio";
    /// Counter; `model`.
    pub const CACHE_HITS: &str = "stoker_cache_hits_total";
    /// Counter; `code`.
    pub const DEAD_LETTERS: &str = "stoker_dead_letters_total";
    /// Counter; `model`: attempts that took over a dead worker's job.
    pub const TAKEOVERS: &str = "stoker_takeovers_total";
    /// Gauge; `model`, `lane`: messages ready in a work queue.
    pub const QUEUE_DEPTH: &str = "stoker_queue_depth";
}

/// Starts logging; later calls change nothing.
pub fn init_logs(log: &Log) {
    let mut filter = EnvFilter::try_new(&log.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    // lapin logs returned messages with their bodies, and as errors what callers ask for and handle. What matters of it
    // is logged where it is handled.
    if let (false, Ok(quiet)) = (log.filter.contains("lapin"), "lapin=off".parse()) {
        filter = filter.add_directive(quiet);
    }
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = match log.format {
        LogFormat::Human => builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Installs the process's metrics recorder; its handle renders what `/metrics` answers.
///
/// # Panics
/// If called twice in a process.
pub fn init_metrics() -> PrometheusHandle {
    const SECONDS: &[f64] = &[
        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        300.0,
    ];
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
        .expect("the list of buckets is not empty")
        .install_recorder()
        .expect("metrics are initialised once")
}
