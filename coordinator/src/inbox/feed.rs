//! One job's text on its way to those who wait for it.
//!
//! The inbox pushes frames in; readers take text out at their own pace and are woken when there is more. Nothing here
//! waits for a client: a reader that is slow finds several frames' text at once, and one that is further behind than
//! [`WINDOW`] is told to read the log. So a stream costs bounded memory, and there is no channel between the
//! subscription and the client's connection.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use stoker_shared::frame::{Assembly, Frame, Pushed};
use stoker_shared::outcome::{FinishReason, JobError, Usage, code};
use tokio::task::AbortHandle;
use uuid::Uuid;

/// Most text that is kept of one stream, bytes. What came earlier is in the log.
pub const WINDOW: usize = 64 << 10;
/// A reader hears [`Heard::Idle`] after so long without anything else.
pub const IDLE: Duration = Duration::from_secs(10);
/// A text that has begun, or a job just published, is silent for so long: read the log.
const SILENCE: Duration = Duration::from_secs(1);
/// The longest pause between two looks at the log, for a text that has begun and for a job that still waits: a thousand
/// queued jobs must not hammer the bus.
const LONGEST_PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));

/// How a job's text ended, for its readers.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Why.
    pub reason: FinishReason,
    /// What it took; zero where nobody could say.
    pub usage: Usage,
    /// Set unless the text is whole.
    pub error: Option<JobError>,
}

impl End {
    /// An end that this process decided on.
    pub fn failed(error: JobError) -> Self {
        let reason = match error.code.as_str() {
            code::DEADLINE => FinishReason::Deadline,
            code::CANCELLED => FinishReason::Cancelled,
            _ => FinishReason::Error,
        };
        Self { reason, usage: Usage::default(), error: Some(error) }
    }

    /// What a last frame (or an outcome) says. An unsuccessful end without an error gets one.
    pub fn new(reason: FinishReason, usage: Usage, error: Option<JobError>) -> Self {
        let missing = || match reason {
            FinishReason::Stop | FinishReason::Length | FinishReason::ToolCalls => None,
            FinishReason::Cancelled => Some(JobError::new(code::CANCELLED, "the job was cancelled")),
            FinishReason::Deadline => Some(deadline_passed()),
            FinishReason::Error => Some(JobError::new(code::INTERNAL, "the worker failed without a word")),
        };
        Self { reason, usage, error: error.or_else(missing) }
    }
}

/// The error of a job whose time is up.
pub fn deadline_passed() -> JobError {
    JobError::new(code::DEADLINE, "the job's deadline passed before it was done")
}

/// What a reader is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// There was new text.
    Text,
    /// There has been nothing for [`IDLE`].
    Idle,
    /// The text is at its end; there may have been new text too.
    End(End),
    /// The text that comes next is no longer here: read the log.
    Behind,
}

/// What the clock found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tick {
    /// It has been silent: read the log.
    pub silent: bool,
    /// Its time is up.
    pub expired: bool,
}

/// A job's text and who reads it.
#[derive(Debug)]
pub struct Feed {
    /// Job key.
    pub key: Uuid,
    /// What equal requests have in common; `None`: nobody may join.
    pub identity: Option<String>,
    /// When it must be done.
    pub deadline: Instant,
    /// Whether the last reader to leave cancels the job.
    pub owned: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    text: Assembly,
    /// A worker has said something, be it what can't be put behind the text yet.
    heard: bool,
    end: Option<End>,
    /// One per reader, `None` once it has left.
    readers: Vec<Option<Slot>>,
    /// All readers have left; nobody may join any more.
    abandoned: bool,
    first_text: Option<Instant>,
    next_look: Instant,
    pause: Duration,
    looks: u32,
    next_beat: Instant,
    beats: u32,
    rescue: Rescue,
    pump: Option<AbortHandle>,
}

/// A reader that waits.
#[derive(Debug, Default)]
struct Slot {
    waker: Option<Waker>,
    only_end: bool,
}

/// Whether the log is being read for this feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rescue {
    No,
    Running,
    /// Something was missed while it ran: once more.
    Again,
}

impl Feed {
    /// A feed without text and without readers.
    pub fn new(key: Uuid, identity: Option<String>, deadline: Instant, owned: bool) -> Arc<Self> {
        let now = Instant::now();
        let state = State {
            text: Assembly::default(),
            heard: false,
            end: None,
            readers: Vec::with_capacity(1),
            abandoned: false,
            first_text: None,
            next_look: now + SILENCE,
            pause: SILENCE,
            looks: 0,
            next_beat: now + IDLE,
            beats: 0,
            rescue: Rescue::No,
            pump: None,
        };
        Arc::new(Self { key, identity, deadline, owned, state: Mutex::new(state) })
    }

    /// A feed that is complete from the start.
    pub fn finished(key: Uuid, text: String, end: End) -> Arc<Self> {
        let feed = Self::new(key, None, Instant::now(), false);
        let mut state = feed.lock();
        state.text.text = text;
        state.first_text = Some(Instant::now());
        state.end = Some(end);
        drop(state);
        feed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a frame, and wakes whoever waits for it.
    pub fn push(&self, frame: &Frame, now: Instant) -> Pushed {
        let mut state = self.lock();
        if state.end.is_some() {
            return Pushed::Nothing;
        }
        state.heard = true;
        let pushed = state.text.push(frame);
        match pushed {
            Pushed::Nothing => {}
            Pushed::Gap => {
                if state.rescue == Rescue::Running {
                    state.rescue = Rescue::Again;
                }
            }
            Pushed::Advanced => {
                state.advanced(now);
                let ended = state.end.is_some();
                let wakers = state.wakers(ended);
                drop(state);
                wakers.into_iter().for_each(Waker::wake);
            }
        }
        pushed
    }

    /// Ends it here, whatever the worker may still say.
    pub fn fail(&self, error: JobError) {
        self.finish(None, End::failed(error));
    }

    /// Ends it with what the ledger knows.
    pub fn finish(&self, text: Option<&str>, end: End) {
        let mut state = self.lock();
        if state.end.is_some() {
            return;
        }
        let have = state.text.end();
        if let Some(rest) = text.and_then(|t| t.get(have..)) {
            state.text.text.push_str(rest);
        }
        state.end = Some(end);
        let wakers = state.wakers(true);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Whether a worker has said anything.
    pub fn begun(&self) -> bool {
        let state = self.lock();
        state.heard || state.end.is_some()
    }

    /// When its first text came.
    pub fn first_text(&self) -> Option<Instant> {
        self.lock().first_text
    }

    /// How often the log was looked at since the last frame.
    pub fn looks(&self) -> u32 {
        self.lock().looks
    }

    /// What the clock has to do about it now.
    pub fn tick(&self, now: Instant) -> Tick {
        let mut state = self.lock();
        if state.end.is_some() {
            return Tick::default();
        }
        let mut tick = Tick { silent: false, expired: now >= self.deadline };
        if now >= state.next_look {
            tick.silent = true;
            let longest = if state.heard { LONGEST_PAUSE.0 } else { LONGEST_PAUSE.1 };
            state.pause = (state.pause * 2).min(longest);
            state.next_look = now + state.pause;
            state.looks += 1;
        }
        if now >= state.next_beat {
            state.beats += 1;
            state.next_beat = now + IDLE;
            let wakers = state.wakers(false);
            drop(state);
            wakers.into_iter().for_each(Waker::wake);
        }
        tick
    }

    /// Asks for a reading of the log; false if one runs already (it will be repeated).
    pub fn start_rescue(&self) -> bool {
        let mut state = self.lock();
        let idle = state.rescue == Rescue::No;
        state.rescue = if idle { Rescue::Running } else { Rescue::Again };
        idle
    }

    /// A reading of the log is over; whether another one is needed.
    pub fn rescued(&self) -> bool {
        let mut state = self.lock();
        let again = state.rescue == Rescue::Again && state.end.is_none();
        state.rescue = if again { Rescue::Running } else { Rescue::No };
        again
    }

    /// Takes a reader's place; `None` if it has ended or everybody has left.
    pub fn join(&self, only_end: bool) -> Option<usize> {
        let mut state = self.lock();
        if state.abandoned {
            return None;
        }
        state.readers.push(Some(Slot { waker: None, only_end }));
        Some(state.readers.len() - 1)
    }

    /// Gives a reader's place up; whether it was the last one.
    pub fn leave(&self, slot: usize) -> bool {
        let mut state = self.lock();
        state.readers[slot] = None;
        state.abandoned = state.readers.iter().all(Option::is_none);
        if state.abandoned
            && let Some(pump) = state.pump.take()
        {
            pump.abort();
        }
        state.abandoned
    }

    /// Ties a task that feeds it to its readers: aborted when the last one leaves.
    pub fn hold(&self, pump: AbortHandle) {
        self.lock().pump = Some(pump);
    }

    /// Gives a reader the text from `at` on, or has it woken when there is some.
    pub fn poll(
        &self,
        cx: &mut Context<'_>,
        slot: usize,
        at: &mut usize,
        beats: &mut u32,
        out: &mut String,
    ) -> Poll<Heard> {
        let mut state = self.lock();
        let only_end = state.readers[slot].as_ref().is_some_and(|s| s.only_end);
        if state.end.is_some() || !only_end {
            if *at < state.text.start {
                return Poll::Ready(Heard::Behind);
            }
            let new = state.text.text.get(*at - state.text.start..).unwrap_or_default();
            out.push_str(new);
            *at += new.len();
            let any = !new.is_empty();
            if let Some(end) = &state.end {
                return Poll::Ready(Heard::End(end.clone()));
            }
            if any {
                *beats = state.beats;
                return Poll::Ready(Heard::Text);
            }
        }
        if *beats != state.beats {
            *beats = state.beats;
            return Poll::Ready(Heard::Idle);
        }
        if let Some(place) = &mut state.readers[slot] {
            match &mut place.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
        }
        Poll::Pending
    }
}

impl State {
    /// New text, or the end, has come.
    fn advanced(&mut self, now: Instant) {
        if self.first_text.is_none() && self.text.end() > 0 {
            self.first_text = Some(now);
        }
        if let Some(last) = &mut self.text.last {
            let reason = last.finish_reason.unwrap_or(FinishReason::Error);
            self.end = Some(End::new(reason, last.usage.unwrap_or_default(), last.error.take()));
        } else if self.text.text.len() > WINDOW {
            self.text.forget(WINDOW / 2);
        }
        self.next_look = now + SILENCE;
        self.pause = SILENCE;
        self.looks = 0;
        self.next_beat = now + IDLE;
    }

    fn wakers(&mut self, ended: bool) -> Vec<Waker> {
        let waiting = self.readers.iter_mut().flatten();
        waiting.filter(|r| ended || !r.only_end).filter_map(|r| r.waker.take()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(at: usize, text: &str) -> Frame {
        Frame { v: 1, epoch: 1, at, text: text.into(), tokens: 1, ..Frame::default() }
    }

    fn poll(feed: &Feed, slot: usize, at: &mut usize) -> (Poll<Heard>, String) {
        let mut out = String::new();
        let mut cx = Context::from_waker(Waker::noop());
        (feed.poll(&mut cx, slot, at, &mut 0, &mut out), out)
    }

    #[test]
    fn a_slow_reader_gets_everything_at_once_and_a_late_one_is_sent_to_the_log() {
        let now = Instant::now();
        let feed = Feed::new(Uuid::now_v7(), None, now + IDLE, true);
        let (fast, slow) = (feed.join(false).unwrap(), feed.join(false).unwrap());
        let (mut a, mut b) = (0, 0);
        assert_eq!(poll(&feed, fast, &mut a).0, Poll::Pending);
        feed.push(&frame(0, "one "), now);
        feed.push(&frame(4, "two "), now);
        assert_eq!(poll(&feed, fast, &mut a), (Poll::Ready(Heard::Text), "one two ".into()));
        feed.push(&frame(8, &"x".repeat(WINDOW)), now);
        assert_eq!(poll(&feed, slow, &mut b).0, Poll::Ready(Heard::Behind));
        let last = Frame { finish_reason: Some(FinishReason::Stop), ..frame(8 + WINDOW, "") };
        feed.push(&last, now);
        b = 7 + WINDOW;
        let (heard, text) = poll(&feed, slow, &mut b);
        assert!(matches!(heard, Poll::Ready(Heard::End(End { error: None, .. }))));
        assert_eq!(text, "x");
    }

    #[test]
    fn silence_is_noticed_with_growing_pauses_until_something_comes() {
        let feed = Feed::new(Uuid::now_v7(), None, Instant::now() + Duration::from_secs(3600), true);
        let start = Instant::now();
        let looks = |from: u64, to: u64| {
            (from * 4..to * 4)
                .filter(|quarter| feed.tick(start + Duration::from_millis(250 * quarter)).silent)
                .count()
        };
        assert_eq!(looks(0, 16), 4, "at 1, 3, 7 and 15 s");
        assert!(looks(16, 616) <= 21, "then every 30 s");
        feed.push(&frame(0, "a"), start + Duration::from_secs(616));
        assert!(looks(616, 626) >= 3);
    }

    #[test]
    fn nobody_joins_what_everybody_has_left() {
        let feed = Feed::new(Uuid::now_v7(), None, Instant::now(), true);
        let (a, b) = (feed.join(true).unwrap(), feed.join(true).unwrap());
        assert!(!feed.leave(a));
        assert!(feed.leave(b));
        assert_eq!(feed.join(false), None);
    }
}
