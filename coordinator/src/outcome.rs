//! Outcomes that a coordinator itself writes: of jobs that no worker ended, and of requests that cost no worker anything.

use stoker_shared::frame::VERSION;
use stoker_shared::job::Job;
use stoker_shared::outcome::Outcome;
use time::OffsetDateTime;

use crate::inbox::End;
use crate::prepare::rfc3339;

/// How long things took, as far as this coordinator knows, and who was at work.
#[derive(Clone, Debug, Default)]
pub struct Story {
    /// Milliseconds from acceptance to the end.
    pub execution_ms: u64,
    /// Milliseconds to the first text, if there was any.
    pub first_token_ms: Option<u64>,
    /// No worker ran for it.
    pub cached: bool,
    /// Attempts started.
    pub attempts: u32,
    /// Last worker.
    pub worker: String,
}

/// The outcome of a job.
pub fn outcome(job: &Job, text: String, end: &End, story: &Story) -> Outcome {
    let model = job.model_name().unwrap_or_default().to_owned();
    let mut metadata = job.own_metadata();
    metadata.insert("model".into(), model.clone().into());
    metadata.insert("executionTime".into(), story.execution_ms.into());
    if let Some(ms) = story.first_token_ms {
        metadata.insert("timeToFirstToken".into(), ms.into());
    }
    metadata.insert("cached".into(), story.cached.into());
    if !story.worker.is_empty() {
        metadata.insert("worker".into(), story.worker.clone().into());
    }
    metadata.insert("attempts".into(), story.attempts.into());
    Outcome {
        v: VERSION,
        id: job.id.clone().unwrap_or_default(),
        success: end.error.is_none(),
        text,
        tokens: end.usage.completion_tokens,
        usage: end.usage,
        finish_reason: end.reason,
        model,
        user_id: job.user_id.clone(),
        metadata,
        error: end.error.clone(),
        timestamp: rfc3339(OffsetDateTime::now_utc()),
    }
}
