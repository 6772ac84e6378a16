//! Publishes again what was accepted but never confirmed (a coordinator died, the broker was down, a queue was full), ends
//! what nobody ran in time, and deletes what has expired. Every coordinator sweeps; what two of them publish runs once, by
//! the claim in the ledger.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_shared::job::Lane;
use stoker_shared::ports::{PublishError, Retention};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::closing::{self, Closed};
use crate::dispatch::Dispatch;
use crate::inbox::deadline_passed;
use crate::routing::Patience;
use crate::stored::{Restored, restore};

/// Overdue jobs that are ended in one sweep.
const OVERDUE: u32 = 500;
/// Between two sweeps.
const PAUSE: Duration = Duration::from_secs(2);
/// A sweep that has taken so long is continued by the next one.
const LONGEST_SWEEP: Duration = Duration::from_secs(5);
/// A job waits so long for its confirm before it is published again, milliseconds.
const OLDER_THAN_MS: u64 = 10_000;
/// Jobs that are read at once: few, because another coordinator may be publishing them meanwhile.
const BATCH: u32 = 50;
/// Sweeps between two purges.
const PURGE_EVERY: u32 = 30;
/// A purge that deletes so many rows has probably left some.
const MANY: u64 = 10_000;
/// The broker has so long for each.
const PUBLISH_LIMIT: Duration = Duration::from_secs(5);
/// A worker may say so much later than the deadline itself that it has passed.
const GRACE: Duration = Duration::from_secs(5);

/// Sweeps until dropped.
pub async fn run(dispatch: Arc<Dispatch>) {
    let settings = &dispatch.config.coordinator;
    let retention = Retention {
        requests_s: settings.request_retention_s,
        dead_letters_s: settings.dead_letter_retention_s,
    };
    let mut place = None;
    let mut until_purge = PURGE_EVERY;
    loop {
        place = sweep(&dispatch, place).await;
        end_overdue(&dispatch).await;
        until_purge -= 1;
        if until_purge == 0 {
            let deleted = dispatch.ports.ledger.purge(retention).await.unwrap_or_else(|e| {
                tracing::debug!("can't delete what has expired: {e}");
                0
            });
            if deleted > 0 {
                tracing::info!(rows = deleted, "deleted what had expired");
            }
            // There is more than one purge deletes.
            until_purge = if deleted >= MANY { 1 } else { PURGE_EVERY };
        }
        tokio::time::sleep(PAUSE.mul_f64(rand::random_range(0.75..1.25))).await;
    }
}

/// Publishes what the queue never confirmed, from behind `place` on; where the next sweep goes on, `None` for the beginning.
async fn sweep(dispatch: &Arc<Dispatch>, mut place: Option<Uuid>) -> Option<Uuid> {
    let started = Instant::now();
    // Queues that took nothing: they are not asked for each of their jobs.
    let mut closed: HashSet<(String, Lane)> = HashSet::new();
    while started.elapsed() < LONGEST_SWEEP {
        let waiting = match dispatch.ports.ledger.unpublished(OLDER_THAN_MS, place, BATCH).await {
            Ok(waiting) => waiting,
            Err(e) => {
                tracing::debug!("can't ask which jobs were never published: {e}");
                return place;
            }
        };
        if waiting.is_empty() {
            return None;
        }
        for stored in waiting {
            if started.elapsed() > LONGEST_SWEEP {
                return place;
            }
            place = Some(stored.key);
            let Some(restored) = restore(stored) else { continue };
            let queue = (restored.job.model_name().unwrap_or_default().to_owned(), restored.job.lane);
            if closed.contains(&queue) {
                continue;
            }
            let key = restored.envelope.key;
            match publish(dispatch, restored).await {
                Ok(()) => {
                    tracing::info!(job = %key, "published again");
                    dispatch.confirm(key);
                }
                Err(e) => {
                    if !matches!(e, PublishError::Full) {
                        tracing::warn!(job = %key, "still not on its queue: {e}");
                    }
                    closed.insert(queue);
                }
            }
        }
    }
    place
}

async fn publish(dispatch: &Dispatch, restored: Restored) -> Result<(), PublishError> {
    let Restored { mut job, mut message, .. } = restored;
    let routed = dispatch.router.route(job.model_name(), Patience::Queued).await;
    let model = routed.map_err(|_| PublishError::Unroutable)?;
    if job.model_name().is_none() {
        job.model = Some(model.name.to_string());
        message.body = serde_json::to_vec(&job).unwrap_or_default().into();
    }
    dispatch.publish(&model, job.lane, message, PUBLISH_LIMIT).await
}

/// Ends jobs whose time is up and that no worker has: nobody may ever come for them.
async fn end_overdue(dispatch: &Dispatch) {
    let kept_s = dispatch.config.coordinator.job_retention_s;
    let expiring = match dispatch.ports.ledger.expiring(kept_s, OVERDUE).await {
        Ok(expiring) => expiring,
        Err(e) => return tracing::debug!("can't ask whose time is up: {e}"),
    };
    for restored in expiring.into_iter().filter_map(restore) {
        let key = restored.envelope.key;
        if restored.job.deadline_at().is_none_or(|deadline| OffsetDateTime::now_utc() < deadline + GRACE) {
            continue;
        }
        match closing::give_up(dispatch, &restored, deadline_passed()).await {
            Ok(Closed::Done { .. }) => tracing::info!(job = %key, "nobody ran it before its deadline"),
            Ok(Closed::Already | Closed::Running) => {}
            Err(e) => tracing::debug!(job = %key, "can't end a job whose time is up yet: {e}"),
        }
    }
}
