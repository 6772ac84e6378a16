//! Gives jobs to other workers: at the end of a drain, and when an attempt has lasted as long as the broker lets one.
//!
//! The engine stops, what it generated is in the log, the ledger says that nobody holds the job, and only then does the
//! delivery go back: whoever gets it goes on at once, at the next token.

use std::sync::Arc;
use std::time::Duration;

use stoker_engine::SequenceId;
use stoker_shared::backoff::Backoff;
use tracing::{info, warn};

use crate::attempt::{Attempt, Phase};
use crate::claim;
use crate::shared::Shared;

/// How long a delivery may be kept: RabbitMQ closes a channel that holds one for 30 minutes.
pub(crate) const LONGEST_ATTEMPT: Duration = Duration::from_secs(25 * 60);

/// Begins to hand over the running attempts that are chosen.
pub(crate) fn begin(shared: &Arc<Shared>, chosen: impl Fn(&Attempt) -> bool) {
    let mut unsubmitted = Vec::new();
    for (number, attempt) in shared.table().iter_mut().filter(|(_, a)| !a.handover && chosen(a)) {
        match attempt.phase {
            Phase::Opening => {
                attempt.handover = true;
                attempt.phase = Phase::Ending;
                unsubmitted.push(number);
            }
            // Its engine does not have it yet, and may not for a while.
            Phase::Running if attempt.waits_for_engine() => {
                attempt.handover = true;
                attempt.phase = Phase::Ending;
                unsubmitted.push(number);
            }
            Phase::Running => {
                attempt.handover = true;
                if attempt.end.is_none() {
                    attempt.ticket.served.engine.cancel(SequenceId(number));
                }
            }
            Phase::Claiming | Phase::Ending => {}
        }
    }
    for number in unsubmitted {
        shared.spawn(release(shared.clone(), number));
    }
}

/// Writes down that nobody holds an attempt any more, and gives its deliveries back.
pub(crate) async fn release(shared: Arc<Shared>, number: u64) {
    let claim = {
        let mut table = shared.table();
        let Some(attempt) = table.get(number) else { return };
        let (epoch, interruptions) = (attempt.epoch, attempt.interruptions);
        claim::claim_of(&shared, &attempt.ticket, Some(epoch), epoch, interruptions)
    };
    let mut backoff = Backoff::new();
    while let Err(error) = shared.ports.ledger.release(&claim).await {
        warn!(%error, job = %claim.job_id, "can't hand the job over yet");
        backoff.pause().await;
    }
    info!(job = %claim.job_id, epoch = claim.epoch, "handed over");
    let attempt = shared.table().remove(number);
    give_back(attempt).await;
}

/// Puts an attempt's deliveries back into the queue.
pub(crate) async fn give_back(attempt: Option<Attempt>) {
    for waiter in attempt.into_iter().flat_map(|a| a.waiters) {
        // A stale one is in the queue already.
        let _ = waiter.receipt.nack(true).await;
    }
}
