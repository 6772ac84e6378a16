//! Decides whether a job may run here: what is final is answered again, what another worker runs is held, what nobody
//! runs any more is claimed, by compare-and-set on its epoch in the ledger.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::join_all;
use stoker_shared::backoff::Backoff;
use stoker_shared::outcome::{JobError, code};
use stoker_shared::ports::{Claim, Claimed, JobRow, JobState, Liveness, Opening, PortResult};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::attempt::{Attempt, Phase};
use crate::shared::{Shared, WORKER_ID_PREFIX};
use crate::ticket::Ticket;
use crate::{dead, handover, settle};

/// A held job is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Nobody is taken for dead sooner after a claim.
const OLD: Duration = Duration::from_secs(1);
/// How long the ledger may take to say whether an attempt was overtaken.
const LEDGER_PATIENCE: Duration = Duration::from_millis(500);
/// The first epoch that is claimed; 1 is that of first deliveries of messages marked once.
const FIRST_CLAIMED: u64 = 2;
/// From so many deaths on, a job runs alone among suspects;
const SUSPECT: u32 = 2;
/// and at so many it is given up.
const POISON: u32 = 3;

/// What is to be done with a job.
enum Verdict {
    /// It is ours.
    Start { epoch: u64, interruptions: u32, suspect: Option<OwnedSemaphorePermit> },
    /// It is final; this is its outcome.
    Done(Bytes),
    /// Its id belongs to another body.
    Taken,
    /// Somebody else runs it, or may; or it has to wait for another suspect.
    Hold,
    /// Something changed meanwhile: look again.
    Again,
}

/// Who holds an epoch.
enum Owner {
    /// Nobody: it was handed over, or is this worker's, which does not run it.
    Nobody,
    /// A worker that is there, or may be.
    Somebody,
    /// A worker that is gone.
    Dead,
}

/// Sees to a job in [`Phase::Claiming`] until it starts here, ends, or is given back. `floor`: an epoch that is known
/// to be taken.
pub(crate) async fn run(shared: Arc<Shared>, number: u64, ticket: Arc<Ticket>, is_first: bool, floor: u64) {
    let delivered = match shared.table().get(number) {
        Some(attempt) => attempt.delivered,
        None => return,
    };
    let mut look = Look { shared: &shared, ticket: &ticket, floor, unsure: false };
    let mut optimistic = is_first;
    let mut backoff = Backoff::new();
    loop {
        if shared.draining.is_cancelled() || delivered.elapsed() > handover::LONGEST_ATTEMPT {
            look.let_go().await;
            let attempt = shared.table().remove(number);
            return handover::give_back(attempt).await;
        }
        let verdict = match std::mem::take(&mut optimistic) {
            true => look.claim_unseen().await,
            false => look.at_row().await,
        };
        match verdict {
            Ok(Verdict::Start { epoch, interruptions, suspect }) => {
                return start(&shared, number, epoch, interruptions, suspect);
            }
            Ok(Verdict::Done(outcome)) => {
                debug!(job = %ticket.id, "was final already");
                if let Some(attempt) = shared.table().remove(number) {
                    settle::spawn(&shared, vec![settle::Answer::of(attempt, outcome)]);
                }
                return;
            }
            Ok(Verdict::Taken) => {
                // Under the table's lock: a drain that finds it empty waits for what is being buried.
                let mut table = shared.table();
                for waiter in table.remove(number).into_iter().flat_map(|a| a.waiters) {
                    dead::taken(&shared, &ticket, waiter);
                }
                return;
            }
            Ok(Verdict::Again) => continue,
            Ok(Verdict::Hold) => {
                backoff.reset();
                tokio::select! {
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                    () = shared.draining.cancelled() => {}
                }
            }
            Err(error) => {
                warn!(%error, job = %ticket.id, "can't tell yet whether the job may run here");
                tokio::select! {
                    () = backoff.pause() => {}
                    () = shared.draining.cancelled() => {}
                }
            }
        }
    }
}

fn start(
    shared: &Shared,
    number: u64,
    epoch: u64,
    interruptions: u32,
    suspect: Option<OwnedSemaphorePermit>,
) {
    let mut table = shared.table();
    let Some(attempt) = table.get(number) else { return };
    attempt.phase = Phase::Opening;
    attempt.started = Instant::now();
    attempt.epoch = epoch;
    attempt.interruptions = interruptions;
    attempt.suspect = suspect;
    if interruptions >= POISON {
        let message = format!("{interruptions} workers died while they ran this job; it is given up");
        attempt.doom = Some(JobError::new(code::POISON, message));
    }
    let _ = shared.to_open.send(number);
}

struct Look<'a> {
    shared: &'a Shared,
    ticket: &'a Ticket,
    floor: u64,
    /// A claim was not answered: it may have been won.
    unsure: bool,
}

impl Look<'_> {
    /// Claims a job that has probably no history: one round trip where looking first would take two.
    async fn claim_unseen(&mut self) -> PortResult<Verdict> {
        // A job from the front door seldom has a row; one that was accepted over HTTP waits in the ledger.
        let expected = if self.ticket.envelope.front_door { None } else { Some(0) };
        match self.claim(expected, FIRST_CLAIMED, 0).await? {
            Claimed::Won => Ok(Verdict::Start { epoch: FIRST_CLAIMED, interruptions: 0, suspect: None }),
            Claimed::Lost(row) => self.judge(*row).await,
            Claimed::Gone => self.judge_without_row().await,
        }
    }

    async fn at_row(&mut self) -> PortResult<Verdict> {
        match self.shared.ports.ledger.find(self.ticket.key()).await? {
            Some(row) => self.judge(row).await,
            None => self.judge_without_row().await,
        }
    }

    async fn judge(&mut self, row: JobRow) -> PortResult<Verdict> {
        if !self.ticket.means(&row.body_hash) {
            return Ok(Verdict::Taken);
        }
        if row.state == JobState::Done {
            return Ok(Verdict::Done(row.outcome.unwrap_or_default()));
        }
        let owner = self.owner(row.owner.as_deref()).await?;
        self.take(owner, Some(row.epoch), row.epoch, row.interruptions).await
    }

    /// A job without a row: one marked once, whose log says who started it; or one that never started.
    async fn judge_without_row(&mut self) -> PortResult<Verdict> {
        let header = self.shared.ports.bus.read_log(self.ticket.key()).await?.map(|log| log.header);
        let (owner, epoch) = match &header {
            Some(header) => (self.owner(Some(&header.worker)).await?, header.epoch),
            // A bus that came back empty may have forgotten who runs it, until its worker has opened the log again. Other
            // jobs run only with a row.
            None if self.ticket.envelope.once && self.shared.ports.bus.may_have_forgotten().await? => {
                (Owner::Somebody, 0)
            }
            None => (Owner::Nobody, 0),
        };
        self.take(owner, None, epoch, 0).await
    }

    async fn owner(&self, worker: Option<&str>) -> PortResult<Owner> {
        match worker {
            None => Ok(Owner::Nobody),
            // It is not running here: this job's place in the table is the caller's.
            Some(id) if id == self.shared.id => Ok(Owner::Nobody),
            // A coordinator that began to end it and could not: no worker, and no death.
            Some(id) if !id.starts_with(WORKER_ID_PREFIX) => Ok(Owner::Nobody),
            Some(id) => match self.shared.ports.bus.worker_liveness(id).await? {
                Liveness::Gone => Ok(Owner::Dead),
                Liveness::Alive | Liveness::Unknown => Ok(Owner::Somebody),
            },
        }
    }

    /// Claims what nobody holds.
    async fn take(
        &mut self,
        owner: Owner,
        expected: Option<u64>,
        epoch: u64,
        deaths: u32,
    ) -> PortResult<Verdict> {
        let interruptions = match owner {
            Owner::Somebody => return Ok(Verdict::Hold),
            Owner::Nobody => deaths,
            Owner::Dead => deaths + 1,
        };
        // A suspect that waits for its turn is not claimed: should the other one kill this worker, it is innocent.
        let suspect = if (SUSPECT..POISON).contains(&interruptions) && self.would_run().await? {
            let Ok(permit) = self.shared.suspects.clone().try_acquire_owned() else {
                return Ok(Verdict::Hold);
            };
            Some(permit)
        } else {
            None
        };
        let epoch = (epoch.max(self.floor) + 1).max(FIRST_CLAIMED);
        match self.claim(expected, epoch, interruptions).await? {
            Claimed::Won => {
                if matches!(owner, Owner::Dead) {
                    info!(job = %self.ticket.id, epoch, interruptions, "taking over a dead worker's job");
                    self.ticket.served.meter.took_over();
                }
                Ok(Verdict::Start { epoch, interruptions, suspect })
            }
            Claimed::Lost(_) | Claimed::Gone => Ok(Verdict::Again),
        }
    }

    /// Whether the engine would get it: a job that only has to be ended can kill nobody, and waits for nobody.
    async fn would_run(&self) -> PortResult<bool> {
        let is_over = self.ticket.fault.is_some() || self.ticket.has_expired();
        Ok(!is_over && !self.shared.ports.bus.is_cancelled(self.ticket.key()).await?)
    }

    async fn claim(&mut self, expected: Option<u64>, epoch: u64, interruptions: u32) -> PortResult<Claimed> {
        let claim = self.claim_of(expected, epoch, interruptions);
        let answer = self.shared.ports.ledger.claim(&claim).await;
        self.unsure |= answer.is_err();
        answer
    }

    /// Releases what an unanswered claim may have won: its next owner would take this worker for dead, and count a death.
    async fn let_go(&self) {
        let ledger = &self.shared.ports.ledger;
        if self.unsure
            && let Ok(Some(row)) = ledger.find(self.ticket.key()).await
            && row.owner.as_ref() == Some(&self.shared.id)
        {
            let _ = ledger.release(&self.claim_of(Some(row.epoch), row.epoch, row.interruptions)).await;
        }
    }

    fn claim_of(&self, expected: Option<u64>, epoch: u64, interruptions: u32) -> Claim {
        claim_of(self.shared, self.ticket, expected, epoch, interruptions)
    }
}

/// Whether an attempt was claimed so long ago that, had its process been frozen since, another might have overtaken it.
pub(crate) fn is_old(attempt: &Attempt) -> bool {
    attempt.started.elapsed() > OLD
}

/// Those whose logs may be opened. Where the bus has lost a log, or never had it, it does not know which epoch is the newest:
/// the ledger is asked, so that an attempt that was overtaken (its process was frozen, say) does not speak once more. A
/// ledger that does not answer is not waited for: streams go on without it.
pub(crate) async fn not_overtaken(
    shared: &Arc<Shared>,
    numbers: Vec<u64>,
    openings: Vec<Opening>,
) -> (Vec<u64>, Vec<Opening>) {
    let finds = join_all(openings.iter().map(|opening| shared.ports.ledger.find(opening.key)));
    let rows = timeout(LEDGER_PATIENCE, finds).await.unwrap_or_default();
    let mut rows = rows.into_iter().map(|row| row.ok().flatten());
    let (mut kept, mut to_open) = (Vec::new(), Vec::new());
    for (number, opening) in numbers.into_iter().zip(openings) {
        match rows.next().flatten() {
            Some(row) if row.epoch > opening.header.epoch => superseded(shared, number, row.epoch),
            _ => {
                kept.push(number);
                to_open.push(opening);
            }
        }
    }
    (kept, to_open)
}

/// A claim by this worker.
pub(crate) fn claim_of(
    shared: &Shared,
    ticket: &Ticket,
    expected: Option<u64>,
    epoch: u64,
    interruptions: u32,
) -> Claim {
    Claim {
        key: ticket.key(),
        tenant: ticket.envelope.tenant.clone(),
        job_id: ticket.id.clone(),
        body_hash: ticket.envelope.body_hash.clone(),
        expected,
        epoch,
        worker: shared.id.clone(),
        interruptions,
        delivered: true,
        expires_in_s: ticket.row_ttl_s(shared.config.coordinator.job_retention_s),
    }
}

/// Another worker holds a newer epoch of this job: it stops here without a word, and is looked after until it is final,
/// so that its deliveries are acknowledged.
pub(crate) fn superseded(shared: &Arc<Shared>, number: u64, by: u64) {
    let mut table = shared.table();
    let Some(attempt) = table.remove(number) else { return };
    let ticket = attempt.ticket.clone();
    info!(job = %ticket.id, epoch = attempt.epoch, by, "superseded");
    if attempt.submitted {
        ticket.served.engine.cancel(stoker_engine::SequenceId(number));
    }
    let floor = by.max(attempt.epoch);
    let held = attempt.held_again();
    let number = table.insert(held);
    drop(table);
    shared.spawn(run(shared.clone(), number, ticket, false, floor));
}
