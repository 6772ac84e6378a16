//! Opens logs, and gives the engine what is to run.
//!
//! A first attempt that nobody else can make has nothing to learn from its log: the engine has it while the log is being
//! opened, and should its first tokens be quicker, they open the log themselves. All others wait for what the log says.
//!
//! Attempts that come while one round trip is under way are opened together in the next: under load a round trip serves
//! many, and alone none waits.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use stoker_engine::{ChatMessage, Constraint, Priority, Prompt, Request, Resume, Sampling, SequenceId};
use stoker_shared::backoff::Backoff;
use stoker_shared::job::{DEFAULT_TEMPERATURE, Job, Lane};
use stoker_shared::outcome::{FinishReason, code};
use stoker_shared::ports::{LogHeader, Opened, Opening};
use stoker_shared::response_format::ResponseFormat;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tracing::{info, warn};

use crate::attempt::{self, Attempt, Phase};
use crate::replay::Replay;
use crate::shared::Shared;
use crate::ticket::Ticket;
use crate::{claim, outbox};

/// Most attempts that are opened in one round trip.
const BATCH: usize = 256;
/// How often is looked whether an attempt that waits for its preparation is still to run.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A longer body is not tokenized among others, bytes.
const LONG_BODY: usize = 16 << 10;

/// Opens what is sent to it, as long as the worker lives.
pub(crate) async fn run(shared: Arc<Shared>, mut inbox: mpsc::UnboundedReceiver<u64>) {
    let mut numbers = Vec::with_capacity(BATCH);
    let mut backoff = Backoff::new();
    while inbox.recv_many(&mut numbers, BATCH).await > 0 {
        loop {
            let (mut openings, old) = openings(&shared, &mut numbers);
            if old {
                let all = std::mem::take(&mut numbers);
                (numbers, openings) = claim::not_overtaken(&shared, all, openings).await;
            }
            match shared.ports.bus.open(&openings).await {
                Ok(answers) => {
                    start(&shared, &numbers, answers);
                    break;
                }
                Err(error) => warn!(%error, jobs = numbers.len(), "can't open logs yet"),
            }
            backoff.pause().await;
            while let Ok(number) = inbox.try_recv() {
                numbers.push(number);
            }
        }
        numbers.clear();
        backoff.reset();
    }
}

/// The openings of the attempts that are still to be opened, and whether one of them is old; forgets the others.
fn openings(shared: &Shared, numbers: &mut Vec<u64>) -> (Vec<Opening>, bool) {
    let mut openings = Vec::with_capacity(numbers.len());
    let mut old = false;
    let mut table = shared.table();
    numbers.retain(|number| match table.get(*number) {
        Some(attempt) if is_opening(attempt) => {
            openings.push(opening_of(shared, attempt));
            old |= claim::is_old(attempt);
            true
        }
        _ => false,
    });
    (openings, old)
}

/// Whether an attempt that was sent here is still to be answered: it waits for its log, or runs meanwhile.
fn is_opening(attempt: &Attempt) -> bool {
    matches!(attempt.phase, Phase::Opening | Phase::Running)
}

/// Whether an attempt may run while its log is being opened, if nobody else can have made one before: not if it would
/// end at once, and not if what its engine does with it first takes long.
pub(crate) fn may_start_unopened(ticket: &Ticket) -> bool {
    ticket.fault.is_none() && !ticket.has_expired() && !is_long(ticket)
}

/// Gives the engine attempts in [`Phase::Running`] whose logs are being opened.
pub(crate) fn start_unopened(shared: &Arc<Shared>, attempts: Vec<(u64, Arc<Ticket>)>) {
    for (_, ticket) in &attempts {
        ticket.served.meter.started(ticket.lane, ticket.age_ms());
    }
    submit(
        shared,
        attempts.into_iter().map(|(number, ticket)| (number, ticket, Resume::default())).collect(),
    );
}

/// The opening of an attempt's log, for the first time or again.
pub(crate) fn opening_of(shared: &Shared, attempt: &Attempt) -> Opening {
    let ticket = &attempt.ticket;
    let header = LogHeader {
        epoch: attempt.epoch,
        worker: shared.id.clone(),
        seed: ticket.seed(),
        revision: ticket.served.info().revision.clone(),
        channel: ticket.channel.clone(),
    };
    Opening { key: ticket.key(), header, ttl: ticket.log_ttl() }
}

fn start(shared: &Arc<Shared>, numbers: &[u64], answers: Vec<Opened>) {
    let mut superseded = Vec::new();
    let mut to_submit = Vec::new();
    let mut ended = Vec::new();
    let mut table = shared.table();
    for (&number, answer) in numbers.iter().zip(answers) {
        let Some(attempt) = table.get(number).filter(|a| is_opening(a)) else { continue };
        match answer {
            Opened::Superseded { epoch } => superseded.push((number, epoch)),
            // The records, if any, are its own: they opened the log.
            Opened::Started { cancelled, .. } if attempt.phase == Phase::Running => {
                attempt.opened = true;
                if cancelled {
                    outbox::cancel(shared, attempt, number);
                }
            }
            Opened::Started { frames, cancelled } => {
                attempt.cancelled |= cancelled;
                attempt.phase = Phase::Running;
                attempt.resume(Replay::of(frames));
                let ticket = &attempt.ticket;
                ticket.served.meter.started(ticket.lane, ticket.age_ms());
                end_early(attempt);
                match attempt.end {
                    Some(_) => ended.push(number),
                    None => to_submit.push((number, attempt.ticket.clone(), attempt.so_far())),
                }
            }
        }
    }
    drop(table);
    shared.steps.touch(&ended);
    submit(shared, to_submit);
    for (number, epoch) in superseded {
        claim::superseded(shared, number, epoch);
    }
}

/// Ends an attempt that must not run.
fn end_early(attempt: &mut Attempt) {
    if let Some(end) = &mut attempt.end {
        info!(job = %attempt.ticket.id, "its text was whole already: only its end is left to be done");
        // Whoever wrote that end did not come to bury it.
        let is_poison = end.error.as_ref().is_some_and(|error| error.code == code::POISON);
        end.dead = attempt.ticket.fault.is_some() || attempt.doom.is_some() && is_poison;
    } else if let Some(error) = attempt.doom.take().or_else(|| attempt.ticket.fault.clone()) {
        attempt.end_now(FinishReason::Error, error, true);
    } else if attempt.cancelled {
        attempt.end_now(FinishReason::Cancelled, attempt::cancelled(), false);
    } else if attempt.ticket.has_expired() {
        attempt.end_now(FinishReason::Deadline, attempt::expired(), false);
    }
}

/// Gives attempts to their engines. An engine tokenizes the prompt and compiles the response format on the thread that
/// brings it: long prompts and formats go to threads of their own, so that nobody waits for them.
fn submit(shared: &Arc<Shared>, attempts: Vec<(u64, Arc<Ticket>, Resume)>) {
    let (long, short): (Vec<_>, Vec<_>) = attempts.into_iter().partition(|(_, t, _)| is_long(t));
    for (number, ticket, resume) in &short {
        ticket.served.engine.submit(request(ticket, *number, resume.clone()));
    }
    confirm_submitted(shared, short.iter().map(|(number, ticket, _)| (*number, ticket)));
    for (number, ticket, resume) in long {
        shared.spawn(submit_long(shared.clone(), number, ticket, resume));
    }
}

/// Gives the engine an attempt on a thread of its own, of which there are only so many: an attempt that ends meanwhile makes
/// room for another delivery, but its thread goes on. The engine sees to deadlines of what it has; until then this does.
async fn submit_long(shared: Arc<Shared>, number: u64, ticket: Arc<Ticket>, resume: Resume) {
    let deadline = ticket.deadline_instant();
    let submitting = async {
        let Some(permit) = permit_for(&shared, number).await else { return };
        let ours = shared.clone();
        let submit = move || {
            let _permit = permit;
            ticket.served.engine.submit(request(&ticket, number, resume));
            confirm_submitted(&ours, std::iter::once((number, &ticket)));
        };
        // A panic is the engine's to tell.
        let _ = tokio::task::spawn_blocking(submit).await;
    };
    let Some(deadline) = deadline else { return submitting.await };
    if tokio::time::timeout_at(deadline.into(), submitting).await.is_err()
        && let Some(attempt) = shared.table().get(number)
        && attempt.waits_for_engine()
    {
        outbox::end_unsubmitted(&shared, attempt, number, FinishReason::Deadline, attempt::expired());
    }
}

/// A place among those that are being prepared; `None` once the attempt is not to run any more.
async fn permit_for(shared: &Shared, number: u64) -> Option<OwnedSemaphorePermit> {
    loop {
        let permit = tokio::time::timeout(LOOK_AGAIN, shared.preparing.clone().acquire_owned()).await;
        if !shared.table().get(number).is_some_and(|attempt| attempt.waits_for_engine()) {
            return None;
        }
        if let Ok(permit) = permit {
            return permit.ok();
        }
    }
}

fn is_long(ticket: &Ticket) -> bool {
    ticket.body.len() > LONG_BODY || ticket.job.options.response_format.is_some()
}

/// From now on a cancellation is passed to the engine; one that came a moment ago is passed now.
fn confirm_submitted<'a>(shared: &Shared, submitted: impl Iterator<Item = (u64, &'a Arc<Ticket>)>) {
    let mut table = shared.table();
    for (number, ticket) in submitted {
        let is_wanted = match table.get(number) {
            Some(attempt) => {
                attempt.submitted = true;
                !attempt.cancelled && !attempt.handover && attempt.end.is_none()
            }
            // It was superseded before the engine had it (or has ended: then this changes nothing).
            None => false,
        };
        if !is_wanted {
            ticket.served.engine.cancel(SequenceId(number));
        }
    }
}

fn request(ticket: &Ticket, number: u64, resume: Resume) -> Request {
    let options = &ticket.job.options;
    let sampling = Sampling {
        temperature: options.temperature.unwrap_or(DEFAULT_TEMPERATURE) as f32,
        top_p: options.top_p.unwrap_or(1.0) as f32,
        top_k: options.top_k.unwrap_or(0),
        min_p: options.min_p.unwrap_or(0.0) as f32,
        presence_penalty: options.presence_penalty.unwrap_or(0.0) as f32,
        frequency_penalty: options.frequency_penalty.unwrap_or(0.0) as f32,
        seed: ticket.seed(),
    };
    Request {
        id: SequenceId(number),
        prompt: prompt(&ticket.job),
        sampling,
        max_tokens: options.max_tokens.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
        stop: options.stop.as_ref().map(|s| s.strings()).unwrap_or_default(),
        constraint: constraint(&ticket.job),
        resume,
        priority: match ticket.lane {
            Lane::Interactive => Priority::Interactive,
            Lane::Batch => Priority::Batch,
        },
        deadline: ticket.deadline_instant(),
        user: user(ticket),
    }
}

/// What the response format, which was checked when the job was read, asks of the text.
fn constraint(job: &Job) -> Option<Constraint> {
    match ResponseFormat::parse(job.options.response_format.as_ref()?).ok()? {
        ResponseFormat::Text => None,
        ResponseFormat::JsonObject => Some(Constraint::JsonObject),
        ResponseFormat::JsonSchema(schema) => {
            Some(Constraint::JsonSchema(serde_json::Value::Object(schema).to_string()))
        }
        ResponseFormat::Regex(regex) => Some(Constraint::Regex(regex)),
        ResponseFormat::Grammar(grammar) => Some(Constraint::Lark(grammar)),
    }
}

/// Among whom turns are shared: a tenant's users, by the names it gives them.
fn user(ticket: &Ticket) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&ticket.envelope.tenant, &ticket.job.user_id).hash(&mut hasher);
    hasher.finish()
}

fn prompt(job: &Job) -> Prompt {
    match (&job.prompt, &job.messages) {
        (None, Some(messages)) => {
            let message = |m: &stoker_shared::job::ChatMessage| ChatMessage {
                role: m.role.clone(),
                content: m.content.text(),
            };
            Prompt::Chat(messages.iter().map(message).collect())
        }
        (prompt, _) => Prompt::Text(prompt.clone().unwrap_or_default()),
    }
}
