//! Rows of requests that cost no worker anything: answered from the cache, or by another request's job.
//!
//! Each still gets an `llm_requests` row of its own, so that usage is complete. Answers never wait for it: the rows are
//! collected here and committed in batches, and kept while the ledger is down.

use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use stoker_shared::job::Job;
use stoker_shared::ports::{Ending, Ports, RequestRow};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::BACKOFF;
use crate::inbox::End;
use crate::outcome::{Story, outcome};

/// Rows that are kept while the ledger is down.
const WAITING: usize = 65_536;
/// Most rows in one transaction.
const BATCH: usize = 256;
/// How long rows are collected.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the ledger remembers such a request's outcome, seconds: nobody can ask for it.
const EXPIRES_IN_S: u64 = 60;

/// A request that had no job of its own.
pub struct Free {
    /// Its key.
    pub key: Uuid,
    /// What it asked for.
    pub job: Job,
    /// Who pays.
    pub tenant: String,
    /// Key used, if any.
    pub api_key_id: Option<String>,
    /// What it got.
    pub text: String,
    /// How that ended.
    pub end: End,
    /// How long it took.
    pub story: Story,
}

/// Takes rows in.
#[derive(Clone)]
pub struct Billing {
    rows: mpsc::Sender<Box<Free>>,
}

impl Billing {
    /// Where rows are handed in, and where they come out for [`run`].
    pub fn new() -> (Self, mpsc::Receiver<Box<Free>>) {
        let (rows, queue) = mpsc::channel(WAITING);
        (Self { rows }, queue)
    }

    /// Hands a row in.
    pub fn hand_in(&self, free: Free) {
        if let Err(e) = self.rows.try_send(Box::new(free)) {
            tracing::error!("a row of a request answered without a job is lost: {e}");
        }
    }
}

/// Commits rows until `last_call`, then those that were handed in before. A stream that was cut off may go on to hold its
/// [`Billing`]: that they are gone can't be waited for.
pub async fn run(
    ports: Ports,
    store_prompts: bool,
    mut queue: mpsc::Receiver<Box<Free>>,
    last_call: CancellationToken,
) {
    let mut batch = Vec::new();
    loop {
        let taken = tokio::select! {
            taken = queue.recv_many(&mut batch, BATCH) => taken,
            () = last_call.cancelled(), if !queue.is_closed() => {
                queue.close();
                continue;
            }
        };
        if taken == 0 {
            return;
        }
        if batch.len() < BATCH {
            tokio::time::sleep(PAUSE).await;
            while batch.len() < BATCH
                && let Ok(free) = queue.try_recv()
            {
                batch.push(free);
            }
        }
        let endings: Vec<Ending> = batch.drain(..).map(|free| ending(*free, store_prompts)).collect();
        commit(&ports, endings).await;
    }
}

async fn commit(ports: &Ports, endings: Vec<Ending>) {
    let mut backoff = BACKOFF;
    loop {
        match ports.ledger.commit(endings.clone()).await {
            Ok(_) => return,
            Err(e) if e.is_transient() => tracing::warn!("rows wait for the ledger: {e}"),
            Err(e) => {
                tracing::error!("{} rows are lost, the ledger refuses them: {e}", endings.len());
                return;
            }
        }
        backoff.pause().await;
    }
}

fn ending(free: Free, store_prompts: bool) -> Ending {
    let Free { key, mut job, tenant, api_key_id, text, end, story } = free;
    job.id = Some(key.to_string());
    let outcome = outcome(&job, text, &end, &story);
    let bytes = serde_json::to_vec(&outcome).unwrap_or_default();
    let request = RequestRow {
        user_id: job.user_id.clone(),
        prompt: if store_prompts { job.prompt_text() } else { String::new() },
        response: outcome.text,
        model: outcome.model,
        tokens: end.usage.completion_tokens,
        execution_time_ms: u32::try_from(story.execution_ms).unwrap_or(u32::MAX),
        metadata: Value::Object(outcome.metadata),
        api_key_id,
        prompt_tokens: end.usage.prompt_tokens,
        cached: true,
        finish_reason: end.reason.as_str().into(),
        error_code: end.error.map(|e| e.code),
        worker: String::new(),
        attempts: 0,
        queued_ms_ago: Some(story.execution_ms),
        started_ms_ago: None,
        first_token_ms_ago: story.first_token_ms.map(|ms| story.execution_ms.saturating_sub(ms)),
    };
    Ending {
        key,
        tenant,
        job_id: key.to_string(),
        body_hash: String::new(),
        epoch: 1,
        outcome: Bytes::from(bytes),
        request,
        cache: None,
        dead: None,
        expires_in_s: EXPIRES_IN_S,
    }
}
