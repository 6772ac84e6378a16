//! What the broker itself gave up (`llm.dead`): each becomes a proper failure, so that whoever waits for it hears of it.

use std::sync::Arc;

use stoker_shared::envelope::Envelope;
use stoker_shared::job::Job;
use stoker_shared::outcome::{JobError, code};
use stoker_shared::ports::{DeadLetter, Delivery, PortResult, Source};
use tokio_util::sync::CancellationToken;

use crate::BACKOFF;
use crate::closing::{Closed, Closing, close, undeliverable};
use crate::dispatch::Dispatch;
use crate::letters;

/// Dead deliveries that are held at a time.
const HELD: u16 = 16;

/// Handles dead deliveries until told to stop.
pub async fn run(dispatch: Arc<Dispatch>, stop: CancellationToken) {
    let mut backoff = BACKOFF;
    while !stop.is_cancelled() {
        match dispatch.ports.queue.consume(&Source::Dead, HELD).await {
            Ok(mut consumer) => {
                backoff.reset();
                loop {
                    let next = tokio::select! {
                        next = consumer.deliveries.recv() => next,
                        () = stop.cancelled() => None,
                    };
                    let Some(delivery) = next else { break };
                    handle(&dispatch, delivery).await;
                }
            }
            Err(e) => tracing::warn!("can't take in what the broker gave up yet: {e}"),
        }
        backoff.pause().await;
    }
}

async fn handle(dispatch: &Dispatch, delivery: Delivery) {
    let mut backoff = BACKOFF;
    while let Err(e) = settle(dispatch, &delivery).await {
        tracing::warn!(job = delivery.message.id, "a dead delivery waits: {e}");
        backoff.pause().await;
    }
    if let Err(e) = delivery.receipt.ack().await {
        tracing::debug!(job = delivery.message.id, "a dead delivery was not settled: {e}");
    }
}

async fn settle(dispatch: &Dispatch, delivery: &Delivery) -> PortResult<()> {
    let message = &delivery.message;
    let why = message.headers.get("x-first-death-reason").map_or("dead-lettered", String::as_str);
    let envelope = Envelope::from_headers(&message.headers);
    let job: Option<Job> = serde_json::from_slice(&message.body).ok();
    let (Some(envelope), Some(job)) = (envelope, job) else {
        let error =
            JobError::new(code::UNDELIVERABLE, "the broker gave up a message that is not a job of ours");
        let id = Some(message.id.as_str()).filter(|id| !id.is_empty());
        let tenant = &dispatch.config.coordinator.default_tenant;
        letters::bury(&dispatch.ports, &letters::refused(message, id, tenant, &error)).await;
        return Ok(());
    };
    let end = undeliverable(why);
    let error = end.error.clone();
    let closing = Closing {
        job: &job,
        envelope: &envelope,
        reply_to: message.reply_to.as_deref(),
        correlation_id: message.correlation_id.as_deref(),
        text: None,
        end,
        dead: Some(message.body.clone()),
    };
    let Closed::Done { attempts, worker } = close(dispatch, closing).await? else { return Ok(()) };
    tracing::error!(job = job.id, why, "the broker gave a job up");
    let letter = DeadLetter {
        key: Some(envelope.key),
        job_id: job.id.clone(),
        tenant: envelope.tenant.clone(),
        body: message.body.clone(),
        code: code::UNDELIVERABLE.into(),
        reason: error.map(|e| e.message).unwrap_or_default(),
        attempts,
        worker,
    };
    letters::feed(&dispatch.ports, &letter).await;
    Ok(())
}
