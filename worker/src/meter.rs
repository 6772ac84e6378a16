//! A model's metrics, looked up once.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use stoker_engine::Stats;
use stoker_shared::job::Lane;
use stoker_shared::outcome::{FinishReason, Usage};
use stoker_shared::telemetry::metric;

/// Handles of one model's metrics.
pub(crate) struct Meter {
    queue_time: [Histogram; 2],
    time_to_first_token: Histogram,
    time_per_output_token: Histogram,
    /// Prompt, completion, cached prompt.
    tokens: [Counter; 3],
    /// Drafted, accepted.
    speculation: [Counter; 2],
    jobs: [Counter; 6],
    takeovers: Counter,
    batch_size: Gauge,
    waiting: Gauge,
    kv_use: Gauge,
}

const REASONS: [FinishReason; 6] = [
    FinishReason::Stop,
    FinishReason::Length,
    FinishReason::ToolCalls,
    FinishReason::Cancelled,
    FinishReason::Deadline,
    FinishReason::Error,
];

/// What is measured of a job that ended.
pub(crate) struct Sample {
    pub reason: FinishReason,
    pub usage: Usage,
    /// Tokens that this attempt generated.
    pub generated: usize,
    /// Seconds from the attempt's start to its first token, and from there to the end.
    pub times: Option<(f64, f64)>,
}

impl Meter {
    pub fn new(model: &str) -> Self {
        let model = || model.to_owned();
        let tokens = |kind| counter!(metric::TOKENS, "model" => model(), "kind" => kind);
        Self {
            queue_time: Lane::ALL
                .map(|lane| histogram!(metric::QUEUE_TIME, "model" => model(), "lane" => lane.as_str())),
            time_to_first_token: histogram!(metric::TIME_TO_FIRST_TOKEN, "model" => model()),
            time_per_output_token: histogram!(metric::TIME_PER_OUTPUT_TOKEN, "model" => model()),
            tokens: ["prompt", "completion", "cached_prompt"].map(tokens),
            speculation: ["drafted", "accepted"]
                .map(|kind| counter!(metric::SPECULATION, "model" => model(), "kind" => kind)),
            jobs: REASONS.map(|r| counter!(metric::JOBS, "model" => model(), "finish_reason" => r.as_str())),
            takeovers: counter!(metric::TAKEOVERS, "model" => model()),
            batch_size: gauge!(metric::BATCH_SIZE, "model" => model()),
            waiting: gauge!(metric::ENGINE_WAITING, "model" => model()),
            kv_use: gauge!(metric::KV_USE, "model" => model()),
        }
    }

    /// An attempt starts so many milliseconds after its job was accepted.
    pub fn started(&self, lane: Lane, queued_ms: u64) {
        let index = Lane::ALL.iter().position(|l| *l == lane).unwrap_or_default();
        self.queue_time[index].record(queued_ms as f64 / 1000.0);
    }

    /// A dead worker's job goes on here.
    pub fn took_over(&self) {
        self.takeovers.increment(1);
    }

    /// A job is final.
    pub fn ended(&self, sample: &Sample) {
        let index = REASONS.iter().position(|r| *r == sample.reason).unwrap_or_default();
        self.jobs[index].increment(1);
        let usage = &sample.usage;
        let counts = [usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens];
        self.tokens.iter().zip(counts).for_each(|(counter, n)| counter.increment(n.into()));
        if let Some((first, rest)) = sample.times {
            self.time_to_first_token.record(first);
            if sample.generated > 1 {
                self.time_per_output_token.record(rest / (sample.generated - 1) as f64);
            }
        }
    }

    /// How the engine is doing.
    pub fn observe(&self, stats: &Stats) {
        self.batch_size.set(stats.active);
        self.waiting.set(stats.waiting);
        self.speculation[0].absolute(stats.drafted);
        self.speculation[1].absolute(stats.accepted);
        if stats.kv_total > 0 {
            self.kv_use.set(stats.kv_used as f64 / stats.kv_total as f64);
        }
    }
}
