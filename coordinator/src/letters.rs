//! Dead letters: messages that never became jobs, or jobs that were given up. The record that lasts is in the ledger;
//! `llm.errors` is a feed of the same, with the message as it came.

use std::collections::BTreeMap;

use metrics::counter;
use stoker_shared::outcome::JobError;
use stoker_shared::ports::{DeadLetter, Destination, Message, Ports};
use stoker_shared::telemetry::metric;

use crate::BACKOFF;

/// Records a message that never became a job, and passes it on to `llm.errors`. Returns once the ledger has it, or
/// refuses it for good.
pub async fn bury(ports: &Ports, letter: &DeadLetter) {
    let mut backoff = BACKOFF;
    loop {
        match ports.ledger.bury(letter).await {
            Ok(()) => break,
            Err(e) if e.is_transient() => tracing::warn!("a dead letter waits for the ledger: {e}"),
            Err(e) => {
                tracing::error!(
                    job = letter.job_id,
                    "the ledger refuses a dead letter, it is only fed on: {e}"
                );
                break;
            }
        }
        backoff.pause().await;
    }
    feed(ports, letter).await;
}

/// Passes a dead letter on to `llm.errors`, as best it can.
pub async fn feed(ports: &Ports, letter: &DeadLetter) {
    counter!(metric::DEAD_LETTERS, "code" => letter.code.clone()).increment(1);
    let mut headers = BTreeMap::new();
    let mut put = |name: &str, value: &str| headers.insert(format!("x-stoker-{name}"), value.to_owned());
    put("reason", &letter.reason);
    put("code", &letter.code);
    put("attempts", &letter.attempts.to_string());
    put("worker", &letter.worker);
    let job = letter.job_id.as_deref().unwrap_or_default();
    put("job", job);
    let message = Message { id: job.to_owned(), body: letter.body.clone(), headers, ..Message::default() };
    if let Err(e) = ports.queue.publish(&Destination::Errors, message).await {
        tracing::warn!(job, "a dead letter did not reach the feed of errors: {e}");
    }
}

/// The letter for a message that is wrong.
pub fn refused(message: &Message, id: Option<&str>, tenant: &str, error: &JobError) -> DeadLetter {
    DeadLetter {
        key: id.map(|id| stoker_shared::envelope::key_of(tenant, id)),
        job_id: id.map(str::to_owned),
        tenant: tenant.to_owned(),
        body: message.body.clone(),
        code: error.code.clone(),
        reason: error.message.clone(),
        attempts: 0,
        worker: String::new(),
    }
}
