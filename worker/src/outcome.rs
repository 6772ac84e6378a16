//! Writes down how a job ended: the outcome that its submitter gets, and the rows that stay.

use bytes::Bytes;
use serde_json::{Value, json};
use stoker_shared::job::Job;
use stoker_shared::outcome::{FinishReason, JobError, Outcome, Usage};
use stoker_shared::ports::{CacheRow, DeadLetter, Ending, RequestRow};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::commit::Ended;
use crate::shared::Shared;

/// The version of the format of outcomes that this build writes.
const VERSION: u32 = 1;

/// An outcome, serialized once.
pub(crate) struct Written {
    pub bytes: Bytes,
    pub metadata: Value,
}

/// The outcome of a job that ended here.
pub(crate) fn write(shared: &Shared, ended: &Ended) -> Written {
    let Ended { ticket, end, .. } = ended;
    let model = &ticket.served.info().name;
    let mut metadata = ticket.job.own_metadata();
    let execution = ended.ended.saturating_duration_since(ended.started);
    let queue_ms = ticket.age_ms().saturating_sub(ended.started.elapsed().as_millis() as u64);
    metadata.insert("model".into(), model.as_str().into());
    metadata.insert("executionTime".into(), (execution.as_millis() as u64).into());
    metadata.insert("queueTime".into(), queue_ms.into());
    if let Some(first) = ended.first_token {
        let waited = first.saturating_duration_since(ended.started).as_millis() as u64;
        metadata.insert("timeToFirstToken".into(), waited.into());
    }
    metadata.insert("cached".into(), false.into());
    metadata.insert("worker".into(), shared.id.as_str().into());
    metadata.insert("attempts".into(), attempts(ended).into());
    let outcome = Outcome {
        v: VERSION,
        id: ticket.id.clone(),
        success: end.reason.is_success(),
        text: ended.text.clone(),
        tokens: end.usage.completion_tokens,
        usage: end.usage,
        finish_reason: end.reason,
        model: model.clone(),
        user_id: ticket.job.user_id.clone(),
        metadata,
        error: end.error.clone(),
        timestamp: now(),
    };
    Written { bytes: to_bytes(&outcome), metadata: Value::Object(outcome.metadata) }
}

/// The outcome of a message that never ran: it is no job, or its id is another's.
pub(crate) fn failure(shared: &Shared, id: &str, model: &str, job: Option<&Job>, error: JobError) -> Bytes {
    let mut metadata = job.map(Job::own_metadata).unwrap_or_default();
    metadata.insert("model".into(), model.into());
    metadata.insert("cached".into(), false.into());
    metadata.insert("worker".into(), shared.id.as_str().into());
    metadata.insert("attempts".into(), 0.into());
    to_bytes(&Outcome {
        v: VERSION,
        id: id.to_owned(),
        success: false,
        text: String::new(),
        tokens: 0,
        usage: Usage::default(),
        finish_reason: FinishReason::Error,
        model: model.to_owned(),
        user_id: job.and_then(|j| j.user_id.clone()),
        metadata,
        error: Some(error),
        timestamp: now(),
    })
}

/// What the ledger is to make final. Made anew for every try, since the ledger takes times as ages.
pub(crate) fn ending(shared: &Shared, ended: &Ended, written: &Written) -> Ending {
    let Ended { ticket, end, .. } = ended;
    let config = &shared.config.coordinator;
    let prompt = if config.store_prompts { ticket.job.prompt_text() } else { String::new() };
    let execution = ended.ended.saturating_duration_since(ended.started).as_millis();
    let request = RequestRow {
        user_id: ticket.job.user_id.clone(),
        prompt,
        response: ended.text.clone(),
        model: ticket.served.info().name.clone(),
        tokens: end.usage.completion_tokens,
        execution_time_ms: u32::try_from(execution).unwrap_or(u32::MAX),
        metadata: written.metadata.clone(),
        api_key_id: None,
        prompt_tokens: end.usage.prompt_tokens,
        cached: false,
        finish_reason: end.reason.as_str().into(),
        error_code: end.error.as_ref().map(|e| e.code.clone()),
        worker: shared.id.clone(),
        attempts: attempts(ended),
        queued_ms_ago: Some(ticket.age_ms()),
        started_ms_ago: Some(ended.started.elapsed().as_millis() as u64),
        first_token_ms_ago: ended.first_token.map(|at| at.elapsed().as_millis() as u64),
    };
    Ending {
        key: ticket.key(),
        tenant: ticket.envelope.tenant.clone(),
        job_id: ticket.id.clone(),
        body_hash: ticket.envelope.body_hash.clone(),
        epoch: ended.epoch,
        outcome: written.bytes.clone(),
        request,
        cache: cache_row(shared, ended),
        dead: end.dead.then(|| dead_letter(shared, ended)),
        expires_in_s: ticket.row_ttl_s(config.job_retention_s),
    }
}

/// The answer to keep, if the coordinator wants it kept, and all of it was made by the weights that it asked for. One that the
/// context's end cut is not kept: another worker's may be longer.
fn cache_row(shared: &Shared, ended: &Ended) -> Option<CacheRow> {
    let Ended { ticket, end, .. } = ended;
    let cache_key = ticket.envelope.cache_key.clone()?;
    let info = ticket.served.info();
    let is_ours = ticket.envelope.revision.as_ref().is_none_or(|revision| *revision == info.revision);
    let wanted = ticket.job.options.max_tokens.unwrap_or(u64::MAX);
    let is_cut = end.reason == FinishReason::Length && u64::from(end.usage.completion_tokens) < wanted;
    let is_pure = is_ours && !ended.is_resumed;
    (is_pure && !is_cut && end.reason.is_success()).then(|| CacheRow {
        cache_key,
        prompt_hash: ticket.job.prompt_hash(),
        response: ended.text.clone(),
        model: info.name.clone(),
        metadata: json!({ "usage": end.usage, "finishReason": end.reason }),
        expires_in_s: shared.config.coordinator.cache_ttl_s,
    })
}

/// The record of a job that is given up.
pub(crate) fn dead_letter(shared: &Shared, ended: &Ended) -> DeadLetter {
    let Ended { ticket, end, .. } = ended;
    let (code, reason) = end.error.as_ref().map(|e| (e.code.clone(), e.message.clone())).unwrap_or_default();
    DeadLetter {
        key: Some(ticket.key()),
        job_id: Some(ticket.id.clone()),
        tenant: ticket.envelope.tenant.clone(),
        body: ticket.body.clone(),
        code,
        reason,
        attempts: ended.interruptions,
        worker: shared.id.clone(),
    }
}

/// Attempts that were started, this one included if it ran.
fn attempts(ended: &Ended) -> u32 {
    if ended.end.dead { ended.interruptions } else { ended.interruptions + 1 }
}

fn to_bytes(outcome: &Outcome) -> Bytes {
    // Serializing maps with text keys into memory can't fail.
    serde_json::to_vec(outcome).map(Bytes::from).unwrap_or_default()
}

fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}
