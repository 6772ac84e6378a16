//! The last of a job: its outcome goes to those who asked for it, then the queue may forget it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use stoker_shared::ports::{Destination, Message, publish_patiently};
use tracing::debug;
use uuid::Uuid;

use crate::attempt::Attempt;
use crate::commit::Ended;
use crate::shared::Shared;
use crate::ticket::Waiter;
use crate::{dead, outcome};

/// How long the log of an ended job is kept, for readers that are behind.
const LOG_AFTER_END: Duration = Duration::from_secs(30);

/// A final job, and who waits for it.
pub(crate) struct Answer {
    pub key: Uuid,
    pub id: String,
    pub waiters: Vec<Waiter>,
    pub outcome: Bytes,
    /// It was given up: it also goes to the feed of dead letters.
    pub dead: Option<Ended>,
}

impl Answer {
    /// To all who wait for an attempt.
    pub fn of(attempt: Attempt, outcome: Bytes) -> Self {
        let (key, id) = (attempt.ticket.key(), attempt.ticket.id.clone());
        Self { key, id, waiters: attempt.waiters, outcome, dead: None }
    }
}

/// Answers a batch in the background.
pub(crate) fn spawn(shared: &Arc<Shared>, answers: Vec<Answer>) {
    if answers.is_empty() {
        return;
    }
    let ours = shared.clone();
    shared.tasks.spawn_settling(async move { settle(&ours, answers).await });
}

async fn settle(shared: &Arc<Shared>, answers: Vec<Answer>) {
    // Most jobs have nobody to publish to: their client reads the token channel. Those are acknowledged first.
    let (to_publish, silent): (Vec<_>, Vec<_>) = answers.iter().partition(|a| a.wants_outcome());
    for answer in &silent {
        acknowledge(answer).await;
    }
    let publishing = join_all(to_publish.iter().map(|answer| async {
        publish(shared, answer).await;
        acknowledge(answer).await;
    }));
    // The queue may take its time.
    tokio::join!(publishing, expire_logs(shared, &answers));
}

async fn expire_logs(shared: &Shared, answers: &[Answer]) {
    let keys: Vec<_> = answers.iter().map(|a| a.key).collect();
    if let Err(error) = shared.ports.bus.expire_logs(&keys, LOG_AFTER_END).await {
        debug!(%error, "logs of ended jobs are kept until their deadlines");
    }
}

impl Answer {
    fn wants_outcome(&self) -> bool {
        self.dead.is_some() || self.waiters.iter().any(|w| w.front_door || w.reply_to.is_some())
    }
}

async fn acknowledge(answer: &Answer) {
    for waiter in &answer.waiters {
        if let Err(error) = waiter.receipt.ack().await {
            debug!(%error, job = %answer.id, "not acknowledged");
        }
    }
}

async fn publish(shared: &Arc<Shared>, answer: &Answer) {
    let mut sent: Vec<(Destination, &Option<String>)> = Vec::new();
    for waiter in &answer.waiters {
        for to in destinations(shared, waiter) {
            // Several deliveries of one message ask for one answer.
            if !sent.contains(&(to.clone(), &waiter.correlation_id)) {
                let message = message(&answer.id, answer.outcome.clone(), waiter);
                send(shared, &to, message, &answer.waiters).await;
                sent.push((to, &waiter.correlation_id));
            }
        }
    }
    if let Some(ended) = &answer.dead {
        dead::feed(shared, &outcome::dead_letter(shared, ended), &answer.waiters).await;
    }
}

/// Where a delivery's outcome goes.
fn destinations(shared: &Shared, waiter: &Waiter) -> Vec<Destination> {
    let mut all = Vec::new();
    if waiter.front_door {
        all.push(Destination::Responses);
    }
    if let Some(queue) = waiter.reply_to.as_ref().filter(|q| is_allowed(shared, q)) {
        all.push(Destination::Reply(queue.clone()));
    }
    all
}

/// Whether a submitter may have its answer there: not in the fleet's own queues.
fn is_allowed(shared: &Shared, queue: &str) -> bool {
    !queue.is_empty()
        && !queue.starts_with(stoker_shared::config::DEFAULT_PREFIX)
        && !queue.starts_with(&shared.config.services.prefix)
}

/// Answers one delivery of a message that is no job here.
pub(crate) async fn answer(shared: &Shared, id: &str, outcome: Bytes, waiter: &Waiter) {
    for to in destinations(shared, waiter) {
        send(shared, &to, message(id, outcome.clone(), waiter), std::slice::from_ref(waiter)).await;
    }
}

fn message(id: &str, outcome: Bytes, waiter: &Waiter) -> Message {
    let traceparent = waiter.traceparent.iter().map(|t| ("traceparent".to_owned(), t.clone()));
    Message {
        id: id.to_owned(),
        body: outcome,
        correlation_id: waiter.correlation_id.clone(),
        headers: traceparent.collect(),
        ..Message::default()
    }
}

/// Publishes, however long it takes: as long as deliveries stay unacknowledged, the broker delivers no more than there is room
/// for. Once all of them are stale, the answer is left to those
/// that come in their place: the outcome is in the ledger.
pub(crate) async fn send(shared: &Shared, to: &Destination, message: Message, waiters: &[Waiter]) {
    let is_stale = || waiters.iter().all(|waiter| waiter.receipt.is_stale());
    publish_patiently(&*shared.ports.queue, to, message, is_stale).await;
}
