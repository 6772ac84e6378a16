//! Publishes again what was accepted but never confirmed (a coordinator died, or the broker was down), and deletes what
//! has expired. Every coordinator sweeps; what two of them publish runs once, by the claim in the ledger.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use stoker_shared::job::Job;
use stoker_shared::ports::{Message, Retention, Unpublished};

use crate::dispatch::Dispatch;
use crate::routing::Patience;

/// Between two sweeps.
const PAUSE: Duration = Duration::from_secs(2);
/// A job waits so long for its confirm before it is published again, milliseconds.
const OLDER_THAN_MS: u64 = 10_000;
/// Jobs per sweep.
const BATCH: u32 = 500;
/// Sweeps between two purges.
const PURGE_EVERY: u32 = 30;
/// After so many failures a sweep ends.
const FAILURES: u32 = 10;
/// The broker has so long for each.
const PUBLISH_LIMIT: Duration = Duration::from_secs(5);

/// Sweeps until dropped.
pub async fn run(dispatch: Arc<Dispatch>) {
    let settings = &dispatch.config.coordinator;
    let retention = Retention {
        requests_s: settings.request_retention_s,
        dead_letters_s: settings.dead_letter_retention_s,
    };
    for turn in 1_u32.. {
        sweep(&dispatch).await;
        if turn % PURGE_EVERY == 0 {
            match dispatch.ports.ledger.purge(retention).await {
                Ok(0) => {}
                Ok(rows) => tracing::info!(rows, "deleted what had expired"),
                Err(e) => tracing::debug!("can't delete what has expired: {e}"),
            }
        }
        tokio::time::sleep(PAUSE.mul_f64(rand::random_range(0.75..1.25))).await;
    }
}

async fn sweep(dispatch: &Arc<Dispatch>) {
    let waiting = match dispatch.ports.ledger.unpublished(OLDER_THAN_MS, BATCH).await {
        Ok(waiting) => waiting,
        Err(e) => return tracing::debug!("can't ask which jobs were never published: {e}"),
    };
    let mut failures = 0;
    for job in waiting {
        let key = job.key;
        match publish(dispatch, job).await {
            Ok(()) => {
                tracing::info!(job = %key, "published again");
                dispatch.confirm(key);
            }
            Err(e) => {
                tracing::warn!(job = %key, "still not on its queue: {e}");
                failures += 1;
                if failures == FAILURES {
                    // One model's queue may be full; so many failures are the broker's.
                    return;
                }
            }
        }
    }
}

async fn publish(dispatch: &Dispatch, waiting: Unpublished) -> Result<(), String> {
    let job: Job =
        serde_json::from_slice(&waiting.body).map_err(|e| format!("its body can't be read: {e}"))?;
    let model = dispatch.router.route(job.model_name(), Patience::Queued).await.map_err(|e| e.message)?;
    let headers: BTreeMap<String, String> = match waiting.headers {
        Value::Object(map) => {
            map.into_iter().filter_map(|(k, v)| Some((k, v.as_str()?.to_owned()))).collect()
        }
        _ => return Err("its headers can't be read".into()),
    };
    let id = job.id.clone().unwrap_or_default();
    let message = Message { id, body: waiting.body, headers, ..Message::default() };
    let published = dispatch.publish(&model, job.lane, message, PUBLISH_LIMIT).await;
    published.map_err(|e| e.to_string())
}
