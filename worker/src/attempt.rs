//! A job while it is in this worker, from its delivery to its acknowledgement, and the table of all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use stoker_engine as engine;
use stoker_shared::frame::{Frame, VERSION};
use stoker_shared::outcome::{FinishReason, JobError, Usage, code};
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use crate::replay::Replay;
use crate::ticket::{Ticket, Waiter};

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Being claimed, or held because another worker runs it.
    Claiming,
    /// Its log is being opened.
    Opening,
    /// In the engine. The log of a first attempt may still be being opened.
    Running,
    /// Its end is being made final, or it is being handed over.
    Ending,
}

/// How a text ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub reason: FinishReason,
    pub usage: Usage,
    pub error: Option<JobError>,
    /// It is given up: a dead letter.
    pub dead: bool,
}

/// A job in this worker.
pub(crate) struct Attempt {
    pub ticket: Arc<Ticket>,
    /// Its deliveries: more than one after a broken connection, or if it was published twice.
    pub waiters: Vec<Waiter>,
    /// When the first of them came.
    pub delivered: Instant,
    pub phase: Phase,
    pub epoch: u64,
    /// Earlier attempts that a worker's death ended.
    pub interruptions: u32,
    /// Held by a suspect while it runs.
    pub suspect: Option<OwnedSemaphorePermit>,
    /// Why it must end without running.
    pub doom: Option<JobError>,
    pub started: Instant,
    pub first_token: Option<Instant>,
    /// Tokens that earlier attempts generated.
    pub resumed: usize,
    pub ids: Vec<u32>,
    pub text: String,
    /// Of `ids` and `text`, what was handed to the bus.
    sent: (usize, usize),
    pub end: Option<End>,
    /// The log holds the last frame.
    pub end_is_logged: bool,
    /// It is on the outbox's list.
    pub dirty: bool,
    /// The bus has said that its log is open.
    pub opened: bool,
    /// The bus may have lost its log: open it again before anything is appended.
    pub reopen: bool,
    /// The engine has it.
    pub submitted: bool,
    pub cancelled: bool,
    /// It is to go on elsewhere;
    pub handover: bool,
    /// and the engine has stopped it.
    pub halted: bool,
    /// Nobody listens to its channel.
    pub unheard: bool,
}

impl Attempt {
    pub fn new(ticket: Arc<Ticket>, waiters: Vec<Waiter>, phase: Phase) -> Self {
        let now = Instant::now();
        Self {
            ticket,
            waiters,
            delivered: now,
            phase,
            epoch: 1,
            interruptions: 0,
            suspect: None,
            doom: None,
            started: now,
            first_token: None,
            resumed: 0,
            ids: Vec::new(),
            text: String::new(),
            sent: (0, 0),
            end: None,
            end_is_logged: false,
            dirty: false,
            opened: false,
            reopen: false,
            submitted: false,
            cancelled: false,
            handover: false,
            halted: false,
            unheard: false,
        }
    }

    /// The same job, no longer running here.
    pub fn held_again(self) -> Self {
        Self { delivered: self.delivered, ..Self::new(self.ticket, self.waiters, Phase::Claiming) }
    }

    /// Starts from what the log holds.
    pub fn resume(&mut self, replay: Replay) {
        self.opened = true;
        self.started = Instant::now();
        self.resumed = replay.ids.len();
        self.sent = (replay.ids.len(), replay.text.len());
        (self.ids, self.text) = (replay.ids, replay.text);
        if let Some(last) = replay.last {
            let usage = last.usage.unwrap_or_default();
            let reason = last.finish_reason.unwrap_or(FinishReason::Error);
            self.end = Some(End { reason, usage, error: last.error, dead: false });
            self.end_is_logged = true;
        }
    }

    /// What there is of its text, for the engine that goes on with it.
    pub fn so_far(&self) -> engine::Resume {
        engine::Resume { tokens: self.ids.clone(), text: self.text.clone() }
    }

    /// The bus holds so much of what was handed to it.
    pub fn resync(&mut self, replay: &Replay) {
        (self.opened, self.reopen) = (true, false);
        let bytes = replay.text.len().min(self.text.len());
        self.sent = match self.text.is_char_boundary(bytes) {
            true => (replay.ids.len().min(self.ids.len()), bytes),
            false => (0, 0),
        };
        self.end_is_logged = replay.last.is_some() && self.end.is_some();
    }

    /// Takes in what a step of the engine did.
    pub fn absorb(&mut self, event: engine::Event, now: Instant) {
        if self.phase != Phase::Running || self.end.is_some() || self.halted {
            return;
        }
        let reason = event.finish.as_ref().map(|f| &f.reason);
        if self.handover && !self.cancelled && reason == Some(&engine::FinishReason::Cancelled) {
            // The text that an engine releases when it is stopped is not what it would have released.
            self.halted = true;
            return;
        }
        if !event.tokens.is_empty() {
            self.first_token.get_or_insert(now);
            self.ids.extend_from_slice(&event.tokens);
        }
        self.text.push_str(&event.text);
        if let Some(finish) = event.finish {
            self.end = Some(End::from(finish));
        }
    }

    /// Whether it is to run and its engine does not have it yet.
    pub fn waits_for_engine(&self) -> bool {
        self.phase == Phase::Running && !self.submitted && self.end.is_none()
    }

    /// Ends it without the engine.
    pub fn end_now(&mut self, reason: FinishReason, error: JobError, dead: bool) {
        let usage = Usage { completion_tokens: self.ids.len() as u32, ..Usage::default() };
        self.end = Some(End { reason, usage, error: Some(error), dead });
    }

    /// The frame of all that the bus has not been given yet; `None` if there is nothing.
    pub fn next_frame(&mut self) -> Option<Frame> {
        let (seq, at) = self.sent;
        if self.end.is_none() && self.ids.len() == seq && self.text.len() == at {
            return None;
        }
        self.sent = (self.ids.len(), self.text.len());
        let mut frame = Frame {
            v: VERSION,
            id: self.ticket.id.clone(),
            key: self.ticket.frame_key,
            epoch: self.epoch,
            seq: seq as u32,
            at,
            text: self.text[at..].to_owned(),
            tokens: (self.ids.len() - seq) as u32,
            ids: self.ids[seq..].to_vec(),
            ..Frame::default()
        };
        if let Some(end) = &self.end {
            frame.finish_reason = Some(end.reason);
            frame.usage = Some(end.usage);
            frame.error = end.error.clone();
        }
        Some(frame)
    }

    /// Whether the bus has all of it and its engine has let go of it.
    pub fn is_handed_out(&self) -> bool {
        self.halted && self.sent == (self.ids.len(), self.text.len())
    }
}

impl From<engine::Finish> for End {
    fn from(finish: engine::Finish) -> Self {
        let (reason, error) = match finish.reason {
            engine::FinishReason::Stop => (FinishReason::Stop, None),
            engine::FinishReason::Length => (FinishReason::Length, None),
            engine::FinishReason::Cancelled => (FinishReason::Cancelled, Some(cancelled())),
            engine::FinishReason::Deadline => (FinishReason::Deadline, Some(expired())),
            engine::FinishReason::Error(e) => (FinishReason::Error, Some(failed(e))),
        };
        let usage = Usage {
            prompt_tokens: finish.usage.prompt_tokens,
            completion_tokens: finish.usage.completion_tokens,
            cached_prompt_tokens: finish.usage.cached_prompt_tokens,
        };
        Self { reason, usage, error, dead: false }
    }
}

fn failed(error: engine::RequestError) -> JobError {
    let code = match error.kind {
        engine::RequestErrorKind::ContextLength => code::CONTEXT_LENGTH,
        engine::RequestErrorKind::Invalid => code::INVALID_REQUEST,
        engine::RequestErrorKind::Internal => code::INTERNAL,
    };
    JobError::new(code, error.message)
}

/// Why a cancelled job has not succeeded.
pub(crate) fn cancelled() -> JobError {
    JobError::new(code::CANCELLED, "the job was cancelled")
}

/// Why a job whose deadline passed has not succeeded.
pub(crate) fn expired() -> JobError {
    JobError::new(code::DEADLINE, "the job's deadline passed before it ended")
}

/// All jobs in this worker: by number, which names them in engines and is new for every attempt, and by key.
#[derive(Default)]
pub(crate) struct Table {
    attempts: HashMap<u64, Attempt>,
    numbers: HashMap<Uuid, u64>,
    next: u64,
}

impl Table {
    pub fn insert(&mut self, attempt: Attempt) -> u64 {
        self.next += 1;
        self.numbers.insert(attempt.ticket.key(), self.next);
        self.attempts.insert(self.next, attempt);
        self.next
    }

    pub fn get(&mut self, number: u64) -> Option<&mut Attempt> {
        self.attempts.get_mut(&number)
    }

    pub fn number_of(&self, key: Uuid) -> Option<u64> {
        self.numbers.get(&key).copied()
    }

    pub fn remove(&mut self, number: u64) -> Option<Attempt> {
        let attempt = self.attempts.remove(&number)?;
        self.numbers.remove(&attempt.ticket.key());
        Some(attempt)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Attempt)> {
        self.attempts.iter_mut().map(|(number, attempt)| (*number, attempt))
    }

    pub fn is_empty(&self) -> bool {
        self.attempts.is_empty()
    }

    pub fn clear(&mut self) {
        self.attempts.clear();
        self.numbers.clear();
    }
}
