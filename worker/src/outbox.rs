//! Carries what engines generate to the bus.
//!
//! An engine's thread never waits: it leaves what a step did in [`Steps`]. One task takes all that is there, makes one
//! frame per job of it, and appends the frames in one round trip; what comes meanwhile goes into the next. So a lone
//! token leaves at once, and under load a round trip carries many.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use bytes::Bytes;
use stoker_engine::{Event, Sink};
use stoker_shared::backoff::Backoff;
use stoker_shared::frame::Frame;
use stoker_shared::outcome::{FinishReason, JobError};
use stoker_shared::ports::{Append, AppendReport, Appended, Opened, Opening, PortResult};
use tokio::sync::Notify;
use tracing::{error, warn};

use crate::attempt::{self, Attempt, Phase};
use crate::commit::Ended;
use crate::replay::Replay;
use crate::shared::Shared;
use crate::{claim, handover, opening};

/// Most frames of one step, so that a bus with one thread is not kept from others for long.
const STEP: usize = 512;

/// What engines did and the outbox has not looked at.
#[derive(Default)]
pub(crate) struct Steps {
    round: Mutex<Round>,
    signal: Notify,
}

#[derive(Default)]
struct Round {
    events: Vec<Event>,
    /// Attempts that changed without an engine.
    touched: Vec<u64>,
}

impl Steps {
    fn push(&self, mut events: Vec<Event>) {
        let mut round = self.lock();
        let was_empty = round.events.is_empty() && round.touched.is_empty();
        match round.events.is_empty() {
            true => round.events = events,
            false => round.events.append(&mut events),
        }
        drop(round);
        if was_empty {
            self.signal.notify_one();
        }
    }

    /// These attempts have something to write.
    pub fn touch(&self, numbers: &[u64]) {
        if !numbers.is_empty() {
            self.lock().touched.extend_from_slice(numbers);
            self.signal.notify_one();
        }
    }

    fn take(&self) -> Round {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sink of an engine. An engine drops it when its thread ends, by which its death shows.
pub(crate) fn sink(shared: &Arc<Shared>) -> Sink {
    let steps = shared.steps.clone();
    let alarm = Alarm(Arc::downgrade(shared));
    Box::new(move |events| {
        let _alive = &alarm;
        steps.push(events);
    })
}

struct Alarm(Weak<Shared>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            shared.engine_died();
        }
    }
}

/// One round trip to the bus.
#[derive(Default)]
struct Step {
    /// Logs that may be lost, by attempt.
    reopened: Vec<u64>,
    openings: Vec<Opening>,
    /// Frames by attempt.
    numbers: Vec<u64>,
    frames: Vec<Frame>,
    appends: Vec<Append>,
}

/// Writes as long as the worker lives.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut dirty = Vec::new();
    let mut backoff = Backoff::new();
    loop {
        if dirty.is_empty() {
            shared.steps.signal.notified().await;
        }
        let step = collect(&shared, &mut dirty);
        match write(&shared, step, &mut dirty).await {
            Ok(()) => backoff.reset(),
            Err(error) => {
                warn!(%error, "the bus takes no tokens; they are kept until it does");
                doubt_everything(&shared, &mut dirty);
                backoff.pause().await;
            }
        }
    }
}

/// Takes in what engines did, and gathers what is to be written. What stays on the list comes in the next step.
fn collect(shared: &Arc<Shared>, dirty: &mut Vec<u64>) -> Step {
    let round = shared.steps.take();
    let now = Instant::now();
    let mut step = Step::default();
    let mut table = shared.table();
    for event in round.events {
        let number = event.id.0;
        if let Some(attempt) = table.get(number) {
            attempt.absorb(event, now);
            mark(attempt, number, dirty);
        }
    }
    for number in round.touched {
        if let Some(attempt) = table.get(number) {
            mark(attempt, number, dirty);
        }
    }
    dirty.retain(|&number| match table.get(number) {
        Some(attempt) => gather(shared, attempt, number, &mut step),
        None => false,
    });
    step
}

fn mark(attempt: &mut Attempt, number: u64, dirty: &mut Vec<u64>) {
    if !std::mem::replace(&mut attempt.dirty, true) {
        dirty.push(number);
    }
}

/// Whether the attempt stays on the list.
fn gather(shared: &Arc<Shared>, attempt: &mut Attempt, number: u64, step: &mut Step) -> bool {
    if attempt.phase != Phase::Running {
        attempt.dirty = false;
        return false;
    }
    // One that could not open its log for so long may have been frozen, and overtaken.
    if attempt.reopen || !attempt.opened && claim::is_old(attempt) {
        step.reopened.push(number);
        step.openings.push(opening::opening_of(shared, attempt));
        return true;
    }
    if step.frames.len() >= STEP {
        return true;
    }
    attempt.dirty = false;
    if attempt.end_is_logged {
        finish(shared, attempt, number);
    } else if let Some(frame) = attempt.next_frame() {
        step.numbers.push(number);
        step.frames.push(frame);
        step.appends.push(Append {
            key: attempt.ticket.key(),
            epoch: attempt.epoch,
            channel: attempt.ticket.channel.clone(),
            record: Bytes::new(),
            opening: (!attempt.opened).then(|| opening::opening_of(shared, attempt)),
        });
    } else if attempt.is_handed_out() {
        hand_over(shared, attempt, number);
    }
    false
}

async fn write(shared: &Arc<Shared>, mut step: Step, dirty: &mut Vec<u64>) -> PortResult<()> {
    if !step.openings.is_empty() {
        reopen(shared, std::mem::take(&mut step.reopened), std::mem::take(&mut step.openings)).await?;
    }
    if !step.appends.is_empty() {
        for (append, frame) in step.appends.iter_mut().zip(&step.frames) {
            match serde_json::to_vec(frame) {
                Ok(record) => append.record = record.into(),
                Err(error) => error!(%error, job = %frame.id, "a frame could not be written"),
            }
        }
        let report = shared.ports.bus.append(&step.appends).await?;
        appended(shared, &step, report, dirty);
    }
    Ok(())
}

/// After an error nobody knows what was recorded, and the service may have lost what it had: every log is opened again
/// before it is written to, which tells what it holds.
fn doubt_everything(shared: &Shared, dirty: &mut Vec<u64>) {
    for (number, attempt) in shared.table().iter_mut().filter(|(_, a)| a.phase == Phase::Running) {
        attempt.reopen = true;
        mark(attempt, number, dirty);
    }
}

/// Opens logs again, as far as nobody has overtaken their attempts.
async fn reopen(shared: &Arc<Shared>, numbers: Vec<u64>, openings: Vec<Opening>) -> PortResult<()> {
    let (numbers, openings) = claim::not_overtaken(shared, numbers, openings).await;
    let answers = shared.ports.bus.open(&openings).await?;
    reopened(shared, &numbers, answers);
    Ok(())
}

fn reopened(shared: &Arc<Shared>, numbers: &[u64], answers: Vec<Opened>) {
    let mut superseded = Vec::new();
    let mut table = shared.table();
    for (&number, answer) in numbers.iter().zip(answers) {
        let Some(attempt) = table.get(number) else { continue };
        match answer {
            Opened::Superseded { epoch } => superseded.push((number, epoch)),
            Opened::Started { frames, cancelled } => {
                attempt.resync(&Replay::of(frames));
                if cancelled {
                    cancel(shared, attempt, number);
                }
            }
        }
    }
    drop(table);
    superseded.into_iter().for_each(|(number, epoch)| claim::superseded(shared, number, epoch));
}

fn appended(shared: &Arc<Shared>, step: &Step, report: AppendReport, dirty: &mut Vec<u64>) {
    let mut superseded = Vec::new();
    let mut table = shared.table();
    for ((&number, frame), answer) in step.numbers.iter().zip(&step.frames).zip(report.jobs) {
        let Some(attempt) = table.get(number) else { continue };
        match answer {
            Appended::Accepted => {
                attempt.opened = true;
                attempt.unheard =
                    !report.unheard.is_empty() && report.unheard.contains(&attempt.ticket.channel);
                if frame.is_last() {
                    finish(shared, attempt, number);
                } else if attempt.is_handed_out() {
                    hand_over(shared, attempt, number);
                }
            }
            Appended::Superseded => superseded.push((number, attempt.epoch + 1)),
            Appended::Missing => {
                attempt.reopen = true;
                mark(attempt, number, dirty);
            }
        }
    }
    drop(table);
    superseded.into_iter().for_each(|(number, epoch)| claim::superseded(shared, number, epoch));
}

/// Its end is on the bus: now it is to be made final.
fn finish(shared: &Shared, attempt: &mut Attempt, number: u64) {
    attempt.phase = Phase::Ending;
    if let Some(ended) = Ended::of(attempt, number) {
        let _ = shared.to_commit.send(ended);
    }
}

fn hand_over(shared: &Arc<Shared>, attempt: &mut Attempt, number: u64) {
    attempt.phase = Phase::Ending;
    shared.spawn(handover::release(shared.clone(), number));
}

/// Ends an attempt because its submitter wants it to.
pub(crate) fn cancel(shared: &Shared, attempt: &mut Attempt, number: u64) {
    attempt.cancelled = true;
    if attempt.phase == Phase::Running && attempt.end.is_none() {
        match attempt.submitted {
            true => attempt.ticket.served.engine.cancel(stoker_engine::SequenceId(number)),
            false => end_unsubmitted(shared, attempt, number, FinishReason::Cancelled, attempt::cancelled()),
        }
    }
}

/// Ends an attempt that its engine does not have yet: a long prompt or a response format may take it a while.
pub(crate) fn end_unsubmitted(
    shared: &Shared,
    attempt: &mut Attempt,
    number: u64,
    reason: FinishReason,
    error: JobError,
) {
    attempt.end_now(reason, error, false);
    shared.steps.touch(&[number]);
}

/// Ends a job by its key.
pub(crate) fn cancel_key(shared: &Shared, key: uuid::Uuid) {
    let mut table = shared.table();
    if let Some(number) = table.number_of(key)
        && let Some(attempt) = table.get(number)
    {
        cancel(shared, attempt, number);
    }
}
