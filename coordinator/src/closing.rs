//! Ends jobs that no worker will end: what the broker gave up, what is cancelled before anyone started it, what is
//! answered from the cache.
//!
//! It goes the way that a worker would go (claim an epoch, take the log over, last frame, commit, outcome), so that the
//! invariants hold whoever ends a job: a worker that still runs it is fenced off by the newer epoch, and what an earlier
//! attempt had said is part of the text. If an attempt had finished and died before it could commit, that end stands.

use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use stoker_shared::envelope::Envelope;
use stoker_shared::frame::{Assembly, Frame, VERSION};
use stoker_shared::job::{Job, token_channel};
use stoker_shared::outcome::{JobError, code};
use stoker_shared::ports::{
    Append, CacheRow, Claim, Claimed, Committed, DeadLetter, Destination, Ending, JobRow, JobState, Liveness,
    LogHeader, Message, Opened, Opening, PortError, PortResult, Ports, RequestRow, publish_patiently,
};
use time::OffsetDateTime;

use crate::dispatch::Dispatch;
use crate::inbox::End;
use crate::outcome::{Story, outcome};
use crate::prepare::Prepared;
use crate::stored::Restored;

/// How long the log of a job that was ended here is kept, for readers that are behind.
const LOG_TTL: Duration = Duration::from_secs(600);
/// How often the claim is tried against others.
const CLAIMS: usize = 5;

/// A job to be ended.
pub struct Closing<'a> {
    /// The job as it was on the work queue.
    pub job: &'a Job,
    /// What stood beside it.
    pub envelope: &'a Envelope,
    /// Where its submitter wants the outcome.
    pub reply_to: Option<&'a str>,
    /// For the reply.
    pub correlation_id: Option<&'a str>,
    /// The text, where it is known; else what the log has.
    pub text: Option<String>,
    /// How it ends.
    pub end: End,
    /// It is given up: the message as it came.
    pub dead: Option<Bytes>,
}

impl Closing<'_> {
    /// Where its tokens go.
    fn channel(&self) -> String {
        let id = self.job.id.as_deref().unwrap_or_default();
        self.job.stream_to.clone().unwrap_or_else(|| token_channel(id))
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closed {
    /// It is final now. Attempts started and the last worker, for the record.
    Done {
        /// Attempts started.
        attempts: u32,
        /// Last worker; empty: none.
        worker: String,
    },
    /// It was final before.
    Already,
    /// A worker that is alive runs it: left alone.
    Running,
}

/// What [`take_over`] found.
enum TakenOver {
    Ours(Box<Attempt>),
    Other(Closed),
}

/// The attempt that ends it, and what was there before.
struct Attempt {
    epoch: u64,
    attempts: u32,
    interruptions: u32,
    worker: String,
    text: Assembly,
}

/// Ends a job.
pub async fn close(dispatch: &Dispatch, closing: Closing<'_>) -> PortResult<Closed> {
    let attempt = match take_over(dispatch, &closing).await? {
        TakenOver::Ours(attempt) => attempt,
        TakenOver::Other(closed) => return Ok(closed),
    };
    let end = last_word(&attempt, &closing);
    let text = closing.text.clone().unwrap_or_else(|| attempt.text.text.clone());
    if attempt.text.last.is_none() {
        speak(&dispatch.ports, &closing, &attempt, &text, &end).await?;
    }
    let ending = ending(dispatch, &closing, &attempt, text, &end);
    let bytes = ending.outcome.clone();
    let bytes = match dispatch.ports.ledger.commit(vec![ending]).await?.pop() {
        Some(Committed::Superseded) => return Ok(Closed::Running),
        Some(Committed::Already(theirs)) => theirs,
        Some(Committed::Done) | None => bytes,
    };
    let id = closing.job.id.clone().unwrap_or_default();
    announce(
        &dispatch.ports,
        &id,
        bytes,
        closing.envelope.front_door,
        closing.reply_to,
        closing.correlation_id,
    )
    .await;
    Ok(Closed::Done { attempts: attempt.attempts, worker: attempt.worker })
}

/// Ends an accepted job that nobody has started with a kept answer.
pub async fn answer_from_cache(
    dispatch: &Dispatch,
    prepared: &Prepared,
    text: String,
    end: End,
) -> PortResult<()> {
    let closing = Closing {
        job: &prepared.job,
        envelope: &prepared.envelope,
        reply_to: None,
        correlation_id: None,
        text: Some(text),
        end,
        dead: None,
    };
    close(dispatch, closing).await.map(drop)
}

/// Ends an accepted job that nobody runs with an error.
pub async fn give_up(dispatch: &Dispatch, restored: &Restored, error: JobError) -> PortResult<Closed> {
    let Restored { job, envelope, message } = restored;
    let closing = Closing {
        job,
        envelope,
        reply_to: message.reply_to.as_deref(),
        correlation_id: message.correlation_id.as_deref(),
        text: None,
        end: End::failed(error),
        dead: None,
    };
    close(dispatch, closing).await
}

/// Sends an outcome to whoever asked for it, however long the broker takes nothing: the ledger has it, but services that enqueue
/// can't ask for it.
pub async fn announce(
    ports: &Ports,
    id: &str,
    outcome: Bytes,
    responses: bool,
    reply_to: Option<&str>,
    correlation_id: Option<&str>,
) {
    let reply = reply_to.map(|name| Destination::Reply(name.to_owned()));
    for to in responses.then_some(Destination::Responses).into_iter().chain(reply) {
        let message = Message {
            id: id.to_owned(),
            body: outcome.clone(),
            correlation_id: correlation_id.map(str::to_owned),
            ..Message::default()
        };
        publish_patiently(&*ports.queue, &to, message, || false).await;
    }
}

/// Claims an epoch in the ledger, then the log with it.
async fn take_over(dispatch: &Dispatch, closing: &Closing<'_>) -> PortResult<TakenOver> {
    let key = closing.envelope.key;
    let mut row = dispatch.ports.ledger.find(key).await?;
    let mut at_least = 2;
    for _ in 0..CLAIMS {
        if let Some(closed) = hands_off(dispatch, closing, row.as_ref()).await? {
            return Ok(TakenOver::Other(closed));
        }
        let claim = claim(dispatch, closing, row.as_ref(), at_least);
        match dispatch.ports.ledger.claim(&claim).await? {
            Claimed::Won => {}
            Claimed::Lost(theirs) => {
                row = Some(*theirs);
                continue;
            }
            Claimed::Gone => {
                row = None;
                continue;
            }
        }
        let header = LogHeader {
            epoch: claim.epoch,
            worker: dispatch.id.clone(),
            seed: closing.job.options.seed.unwrap_or_default().cast_unsigned(),
            revision: closing.envelope.revision.clone().unwrap_or_default(),
            channel: closing.channel(),
        };
        let opened = dispatch.ports.bus.open(&[Opening { key, header, ttl: LOG_TTL }]).await?.pop();
        match opened {
            Some(Opened::Started { frames, .. }) => {
                return Ok(TakenOver::Ours(Box::new(attempt(&claim, row.as_ref(), &frames))));
            }
            Some(Opened::Superseded { epoch }) => {
                at_least = epoch + 1;
                row = dispatch.ports.ledger.find(key).await?;
            }
            None => break,
        }
    }
    Err(PortError::Unavailable {
        service: "the ledger",
        message: "others keep claiming the job; trying again later".into(),
    })
}

/// Whether a job must be left as it is.
async fn hands_off(
    dispatch: &Dispatch,
    closing: &Closing<'_>,
    row: Option<&JobRow>,
) -> PortResult<Option<Closed>> {
    let Some(row) = row else { return Ok(None) };
    if row.body_hash != closing.envelope.body_hash {
        // The id belongs to another job: whatever becomes of this one, that one is not ours to end.
        return Ok(Some(Closed::Already));
    }
    match (row.state, &row.owner) {
        (JobState::Done, _) => Ok(Some(Closed::Already)),
        (JobState::Running, Some(owner)) if *owner != dispatch.id => {
            match dispatch.ports.bus.worker_liveness(owner).await? {
                Liveness::Gone => Ok(None),
                Liveness::Alive => Ok(Some(Closed::Running)),
                Liveness::Unknown => Err(PortError::Unavailable {
                    service: "the bus",
                    message: "it can't say yet whether the job's worker is there".into(),
                }),
            }
        }
        _ => Ok(None),
    }
}

fn claim(dispatch: &Dispatch, closing: &Closing<'_>, row: Option<&JobRow>, at_least: u64) -> Claim {
    let Envelope { key, tenant, body_hash, .. } = closing.envelope;
    Claim {
        key: *key,
        tenant: tenant.clone(),
        job_id: closing.job.id.clone().unwrap_or_default(),
        body_hash: body_hash.clone(),
        expected: row.map(|r| r.epoch),
        epoch: row.map_or(0, |r| r.epoch + 1).max(at_least),
        worker: dispatch.id.clone(),
        interruptions: row.map_or(0, |r| r.interruptions),
        delivered: false,
        expires_in_s: dispatch.config.coordinator.job_retention_s,
    }
}

fn attempt(claim: &Claim, row: Option<&JobRow>, frames: &[Frame]) -> Attempt {
    let mut text = Assembly::default();
    for frame in frames {
        text.push(frame);
    }
    let started = row.is_some_and(|r| r.epoch > 0) || !frames.is_empty();
    Attempt {
        epoch: claim.epoch,
        attempts: claim.interruptions + u32::from(started),
        interruptions: claim.interruptions,
        worker: row.and_then(|r| r.owner.clone()).filter(|w| *w != claim.worker).unwrap_or_default(),
        text,
    }
}

/// How it ends: as an earlier attempt said, if it had come to its end.
fn last_word(attempt: &Attempt, closing: &Closing<'_>) -> End {
    match &attempt.text.last {
        Some(last) => End::new(
            last.finish_reason.unwrap_or(stoker_shared::outcome::FinishReason::Error),
            last.usage.unwrap_or_default(),
            last.error.clone(),
        ),
        // What an earlier attempt made of the text has been paid for.
        None if closing.text.is_none() => {
            let mut end = closing.end.clone();
            end.usage.completion_tokens = end.usage.completion_tokens.max(attempt.text.tokens);
            end
        }
        None => closing.end.clone(),
    }
}

/// Appends the last frame, with what the text still lacks.
async fn speak(
    ports: &Ports,
    closing: &Closing<'_>,
    attempt: &Attempt,
    text: &str,
    end: &End,
) -> PortResult<()> {
    let key = closing.envelope.key;
    let id = closing.job.id.clone().unwrap_or_default();
    let at = attempt.text.end();
    let frame = Frame {
        v: VERSION,
        key: (id.parse() != Ok(key)).then_some(key),
        epoch: attempt.epoch,
        seq: attempt.text.tokens,
        at,
        text: text.get(at..).unwrap_or_default().to_owned(),
        tokens: end.usage.completion_tokens.saturating_sub(attempt.text.tokens),
        finish_reason: Some(end.reason),
        usage: Some(end.usage),
        error: end.error.clone(),
        id: id.clone(),
        ..Frame::default()
    };
    let append = Append {
        key,
        epoch: attempt.epoch,
        channel: closing.channel(),
        record: Bytes::from(serde_json::to_vec(&frame).unwrap_or_default()),
        opening: None,
    };
    let step = [append];
    match ports.bus.append(&step).await {
        // The first step over a new connection fails, whatever was lost before it. This log has just been opened.
        Err(e) if e.is_transient() => ports.bus.append(&step).await.map(drop),
        appended => appended.map(drop),
    }
}

fn ending(dispatch: &Dispatch, closing: &Closing<'_>, attempt: &Attempt, text: String, end: &End) -> Ending {
    let settings = &dispatch.config.coordinator;
    let Envelope { key, tenant, body_hash, accepted_ms, .. } = closing.envelope;
    let now_ms =
        u64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
    let age_ms = now_ms.saturating_sub(*accepted_ms);
    let story = Story {
        execution_ms: age_ms,
        first_token_ms: None,
        cached: closing.text.is_some(),
        attempts: attempt.attempts,
        worker: attempt.worker.clone(),
    };
    let outcome = outcome(closing.job, text, end, &story);
    let bytes = Bytes::from(serde_json::to_vec(&outcome).unwrap_or_default());
    let dead = closing.dead.clone().zip(end.error.as_ref()).map(|(body, error)| DeadLetter {
        key: Some(*key),
        job_id: closing.job.id.clone(),
        tenant: tenant.clone(),
        body,
        code: error.code.clone(),
        reason: error.message.clone(),
        attempts: attempt.attempts.max(attempt.interruptions),
        worker: attempt.worker.clone(),
    });
    let request = RequestRow {
        user_id: closing.job.user_id.clone(),
        prompt: if settings.store_prompts { closing.job.prompt_text() } else { String::new() },
        response: outcome.text,
        model: outcome.model,
        tokens: end.usage.completion_tokens,
        execution_time_ms: u32::try_from(age_ms).unwrap_or(u32::MAX),
        metadata: Value::Object(outcome.metadata),
        api_key_id: None,
        prompt_tokens: end.usage.prompt_tokens,
        cached: closing.text.is_some(),
        finish_reason: end.reason.as_str().into(),
        error_code: end.error.as_ref().map(|e| e.code.clone()),
        worker: attempt.worker.clone(),
        attempts: attempt.attempts,
        queued_ms_ago: Some(age_ms),
        started_ms_ago: None,
        first_token_ms_ago: None,
    };
    Ending {
        key: *key,
        tenant: tenant.clone(),
        job_id: closing.job.id.clone().unwrap_or_default(),
        body_hash: body_hash.clone(),
        epoch: attempt.epoch,
        outcome: bytes,
        request,
        cache: None::<CacheRow>,
        dead,
        expires_in_s: settings.job_retention_s,
    }
}

/// The error of a job that the broker gave up.
pub fn undeliverable(why: &str) -> End {
    End::failed(JobError::new(code::UNDELIVERABLE, format!("the broker gave the job up ({why})")))
}
