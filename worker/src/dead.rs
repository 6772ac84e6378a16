//! Messages that can't become jobs, and the feed of dead letters.

use std::collections::BTreeMap;
use std::sync::Arc;

use metrics::counter;
use serde_json::Value;
use stoker_shared::backoff::Backoff;
use stoker_shared::job::{self, Job};
use stoker_shared::outcome::{JobError, code};
use stoker_shared::ports::{DeadLetter, Delivery, Destination, Message};
use stoker_shared::telemetry::metric;
use tracing::warn;

use crate::shared::{Served, Shared};
use crate::ticket::{Ticket, Waiter};
use crate::{outcome, settle};

/// Sees to a message on a work queue that no coordinator published: it is buried, and answered if it says whose it is.
pub(crate) fn refuse(shared: &Arc<Shared>, served: &Served, delivery: Delivery) {
    let message = delivery.message.clone();
    // What is wrong with its body is more use to its sender than that it took the wrong door.
    let parsed = job::parse_json::<Job>(&message.body).and_then(|job| job.check().map(|()| job));
    let error = match &parsed {
        Err(error) => error.clone(),
        Ok(_) => JobError::new(
            code::INVALID_REQUEST,
            "a message on a work queue must come from a coordinator; publish jobs with the routing key llm.requests",
        ),
    };
    let id = match parsed.as_ref().ok().and_then(|job| job.id.clone()) {
        Some(id) => Some(id),
        None => id_in(&message.body).or_else(|| Some(message.id.clone()).filter(|id| !id.is_empty())),
    };
    let letter = DeadLetter {
        key: None,
        job_id: id.clone(),
        tenant: message.user_id.clone().unwrap_or_else(|| shared.config.coordinator.default_tenant.clone()),
        body: message.body.clone(),
        code: error.code.clone(),
        reason: error.message.clone(),
        attempts: 0,
        worker: shared.id.clone(),
    };
    // Its sender meant to enqueue a job: it listens where outcomes are published.
    let waiter = Waiter { front_door: true, ..Waiter::unread(delivery) };
    let model = &served.info().name;
    let answer = id.map(|id| (outcome::failure(shared, &id, model, parsed.as_ref().ok(), error), id));
    spawn(shared, letter, waiter, answer);
}

/// Sees to a message whose id belongs to a job with another body.
pub(crate) fn taken(shared: &Arc<Shared>, ticket: &Ticket, waiter: Waiter) {
    let message =
        format!("the id {:?} belongs to a job with another body; give this one an id of its own", ticket.id);
    let error = JobError::field(code::ID_TAKEN, "id", message);
    let letter = DeadLetter {
        key: Some(ticket.key()),
        job_id: Some(ticket.id.clone()),
        tenant: ticket.envelope.tenant.clone(),
        body: ticket.body.clone(),
        code: error.code.clone(),
        reason: error.message.clone(),
        attempts: 0,
        worker: shared.id.clone(),
    };
    let model = &ticket.served.info().name;
    let outcome = outcome::failure(shared, &ticket.id, model, Some(&ticket.job), error);
    spawn(shared, letter, waiter, Some((outcome, ticket.id.clone())));
}

/// Buries a letter in the background.
fn spawn(shared: &Arc<Shared>, letter: DeadLetter, waiter: Waiter, answer: Option<(bytes::Bytes, String)>) {
    let ours = shared.clone();
    shared.tasks.spawn_settling(async move { bury(&ours, letter, waiter, answer).await });
}

/// Records a letter for good, then tells those who may care, then lets the queue forget it.
async fn bury(shared: &Shared, letter: DeadLetter, waiter: Waiter, answer: Option<(bytes::Bytes, String)>) {
    let mut backoff = Backoff::new();
    while let Err(error) = shared.ports.ledger.bury(&letter).await {
        warn!(%error, "can't record a dead letter yet");
        if !error.is_transient() {
            // The ledger won't hold it, the feed will: nothing is lost, and nothing is stuck.
            break;
        }
        backoff.pause().await;
        if waiter.receipt.is_stale() {
            // It is delivered again, and then buried.
            return;
        }
    }
    feed(shared, &letter, std::slice::from_ref(&waiter)).await;
    if let Some((outcome, id)) = answer {
        settle::answer(shared, &id, outcome, &waiter).await;
    }
    let _ = waiter.receipt.ack().await;
}

/// Publishes a letter to the feed of dead letters. `waiters`: the message's deliveries.
pub(crate) async fn feed(shared: &Shared, letter: &DeadLetter, waiters: &[Waiter]) {
    warn!(job = ?letter.job_id, code = %letter.code, reason = %letter.reason, "dead letter");
    counter!(metric::DEAD_LETTERS, "code" => letter.code.clone()).increment(1);
    let headers = [
        ("x-stoker-reason", letter.reason.clone()),
        ("x-stoker-code", letter.code.clone()),
        ("x-stoker-attempts", letter.attempts.to_string()),
        ("x-stoker-worker", letter.worker.clone()),
        ("x-stoker-job", letter.job_id.clone().unwrap_or_default()),
    ];
    let message = Message {
        id: letter.job_id.clone().unwrap_or_default(),
        body: letter.body.clone(),
        headers: headers
            .map(|(name, value)| (name.to_owned(), value))
            .into_iter()
            .collect::<BTreeMap<_, _>>(),
        ..Message::default()
    };
    settle::send(shared, &Destination::Errors, message, waiters).await;
}

/// The id in a body that is JSON but no job.
fn id_in(body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let id = value.get("id")?.as_str()?;
    (1..=job::MAX_ID_BYTES).contains(&id.len()).then(|| id.to_owned())
}
