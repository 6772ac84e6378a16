//! Makes ends final: the ledger's transactions, batched.
//!
//! Jobs that end within a few milliseconds share a transaction, and those that end while one is under way share the
//! next. A ledger that is down is waited for: ended jobs stay here, unacknowledged, until the queue gives this worker
//! no more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoker_shared::backoff::Backoff;
use stoker_shared::ports::{Committed, Ending};
use tokio::sync::mpsc;
use tracing::{error, warn};

use crate::attempt::{Attempt, End};
use crate::meter::Sample;
use crate::settle::{self, Answer};
use crate::shared::Shared;
use crate::ticket::Ticket;
use crate::{claim, outcome};

/// How long a lone end waits for others.
const GATHER: Duration = Duration::from_millis(2);
/// Most ends of one transaction.
const BATCH: usize = 256;

/// A job whose last frame is on the bus.
pub(crate) struct Ended {
    pub number: u64,
    pub ticket: Arc<Ticket>,
    pub epoch: u64,
    pub interruptions: u32,
    pub text: String,
    pub end: End,
    /// Tokens that this attempt generated.
    pub generated: usize,
    /// Earlier attempts have a part in the text.
    pub is_resumed: bool,
    pub started: Instant,
    pub first_token: Option<Instant>,
    pub ended: Instant,
}

impl Ended {
    /// Takes what is needed of an attempt; `None` if it has not ended.
    pub fn of(attempt: &mut Attempt, number: u64) -> Option<Self> {
        Some(Self {
            number,
            ticket: attempt.ticket.clone(),
            epoch: attempt.epoch,
            interruptions: attempt.interruptions,
            end: attempt.end.take()?,
            text: std::mem::take(&mut attempt.text),
            generated: attempt.ids.len() - attempt.resumed,
            is_resumed: attempt.resumed > 0,
            started: attempt.started,
            first_token: attempt.first_token,
            ended: Instant::now(),
        })
    }

    fn sample(&self) -> Sample {
        let times = self.first_token.map(|first| {
            let until_first = first.saturating_duration_since(self.started);
            let after = self.ended.saturating_duration_since(first);
            (until_first.as_secs_f64(), after.as_secs_f64())
        });
        Sample { reason: self.end.reason, usage: self.end.usage, generated: self.generated, times }
    }
}

/// An end with its outcome, whose bytes never change any more.
struct Final {
    ended: Ended,
    outcome: outcome::Written,
}

/// Commits what is sent to it, as long as the worker lives.
pub(crate) async fn run(shared: Arc<Shared>, mut inbox: mpsc::UnboundedReceiver<Ended>) {
    let mut waiting: Vec<Final> = Vec::new();
    let mut arrived = Vec::new();
    let mut backoff = Backoff::new();
    let mut last_commit = Instant::now();
    loop {
        if waiting.is_empty() {
            if inbox.recv_many(&mut arrived, BATCH).await == 0 {
                return;
            }
            // Ends that came while the last transaction was under way have had their time to gather.
            if last_commit.elapsed() > GATHER && arrived.len() < BATCH {
                tokio::time::sleep(GATHER).await;
            }
        }
        while waiting.len() + arrived.len() < BATCH
            && let Ok(ended) = inbox.try_recv()
        {
            arrived.push(ended);
        }
        waiting
            .extend(arrived.drain(..).map(|ended| Final { outcome: outcome::write(&shared, &ended), ended }));
        if commit(&shared, &mut waiting).await {
            backoff.reset();
        } else {
            backoff.pause().await;
        }
        last_commit = Instant::now();
    }
}

/// Commits what waits; what could not be committed stays. Whether all went well.
async fn commit(shared: &Arc<Shared>, waiting: &mut Vec<Final>) -> bool {
    match shared.ports.ledger.commit(endings(shared, waiting)).await {
        Ok(answers) => {
            conclude(shared, waiting.drain(..), answers);
            true
        }
        Err(error) if error.is_transient() || waiting.len() == 1 => {
            warn!(%error, jobs = waiting.len(), "can't commit yet");
            false
        }
        // One of them may be to blame: the others must not wait for it.
        Err(error) => {
            error!(%error, jobs = waiting.len(), "the ledger refuses a batch; its jobs are committed one by one");
            let mut refused = Vec::new();
            for one in std::mem::take(waiting) {
                match shared.ports.ledger.commit(endings(shared, std::slice::from_ref(&one))).await {
                    Ok(answers) => conclude(shared, std::iter::once(one), answers),
                    Err(error) => {
                        error!(%error, job = %one.ended.ticket.id, "the ledger refuses this job's end");
                        refused.push(one);
                    }
                }
            }
            *waiting = refused;
            waiting.is_empty()
        }
    }
}

fn endings(shared: &Shared, waiting: &[Final]) -> Vec<Ending> {
    waiting.iter().map(|f| outcome::ending(shared, &f.ended, &f.outcome)).collect()
}

fn conclude(shared: &Arc<Shared>, batch: impl Iterator<Item = Final>, answers: Vec<Committed>) {
    let mut to_answer = Vec::new();
    let mut superseded = Vec::new();
    let mut table = shared.table();
    for (Final { ended, outcome }, answer) in batch.zip(answers) {
        let bytes: Bytes = match answer {
            Committed::Superseded => {
                superseded.push((ended.number, ended.epoch + 1));
                continue;
            }
            Committed::Done => {
                ended.ticket.served.meter.ended(&ended.sample());
                outcome.bytes
            }
            Committed::Already(bytes) => bytes,
        };
        if let Some(attempt) = table.remove(ended.number) {
            let dead = ended.end.dead.then_some(ended);
            to_answer.push(Answer { dead, ..Answer::of(attempt, bytes) });
        }
    }
    // Before anybody can see that these jobs are no longer in the table.
    settle::spawn(shared, to_answer);
    drop(table);
    superseded.into_iter().for_each(|(number, epoch)| claim::superseded(shared, number, epoch));
}
