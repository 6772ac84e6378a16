//! An engine without a model: it gives the prompt's words back, in turn, as often as tokens are asked for.
//!
//! The fleet around an engine is measured and tested with it: it costs nothing, its text is a function of the prompt
//! alone, so that a mixed-up, lost or repeated token shows, and it keeps every promise of [`Engine`]: requests step
//! together, resume, stop, expire and are cancelled as in a real one. Only constraints are not its business: it says what
//! the prompt says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use crate::stop::StopMatcher;
use crate::{
    EchoOptions, Engine, Event, Finish, FinishReason, ModelInfo, Priority, Prompt, Request, RequestError,
    RequestErrorKind, SequenceId, Sink, Stats, Usage,
};

/// Longest prompt, words.
const CONTEXT: u32 = 1 << 20;
/// Most tokens of one event where there is no delay. A request's events carry 1, 2, 4, … tokens up to this: the first
/// one comes as early as it can, and whoever reads them is not buried in events of one token each.
const BURST: u32 = 16;

/// Starts the engine without a model.
pub fn echo(options: EchoOptions, sink: Sink) -> Box<dyn Engine> {
    let slots = options.slots.max(1);
    let info = ModelInfo {
        name: options.name.clone(),
        revision: "echo-1".into(),
        architecture: "echo".into(),
        format: "none".into(),
        context: CONTEXT,
        backend: "echo".into(),
        device: "none".into(),
        slots,
    };
    let (commands, inbox) = channel();
    let counters = Arc::new(Counters::default());
    let runner = Runner {
        options: EchoOptions { slots, ..options },
        inbox,
        sink,
        counters: counters.clone(),
        waiting: Default::default(),
        active: Vec::new(),
        events: Vec::new(),
    };
    std::thread::Builder::new()
        .name("echo-engine".into())
        .spawn(move || runner.run())
        .expect("the system can start one more thread");
    Box::new(Echo { info, commands, counters })
}

struct Echo {
    info: ModelInfo,
    commands: Sender<Command>,
    counters: Arc<Counters>,
}

enum Command {
    Submit(Box<Request>),
    Cancel(SequenceId),
}

#[derive(Default)]
struct Counters {
    active: AtomicU32,
    waiting: AtomicU32,
    tokens: AtomicU64,
    steps: AtomicU64,
}

impl Engine for Echo {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    // A send fails only if the thread died; its sink is gone then, by which its owner knows.
    fn submit(&self, request: Request) {
        let _ = self.commands.send(Command::Submit(Box::new(request)));
    }

    fn cancel(&self, id: SequenceId) {
        let _ = self.commands.send(Command::Cancel(id));
    }

    fn stats(&self) -> Stats {
        let c = &self.counters;
        Stats {
            active: c.active.load(Relaxed),
            waiting: c.waiting.load(Relaxed),
            kv_used: 0,
            kv_total: 0,
            tokens: c.tokens.load(Relaxed),
            steps: c.steps.load(Relaxed),
            drafted: 0,
            accepted: 0,
        }
    }
}

/// The engine's thread.
struct Runner {
    options: EchoOptions,
    inbox: Receiver<Command>,
    sink: Sink,
    counters: Arc<Counters>,
    /// By priority.
    waiting: [VecDeque<Request>; 2],
    active: Vec<Sequence>,
    /// Of the coming call of the sink.
    events: Vec<Event>,
}

impl Runner {
    fn run(mut self) {
        let mut next_step = Instant::now();
        while self.listen(next_step) {
            self.admit();
            self.step();
            let c = &self.counters;
            c.active.store(self.active.len() as u32, Relaxed);
            c.waiting.store(self.waiting.iter().map(|q| q.len() as u32).sum(), Relaxed);
            if !self.events.is_empty() {
                (self.sink)(std::mem::take(&mut self.events));
            }
            next_step = Instant::now() + self.options.delay;
            if self.options.delay.is_zero() {
                // On a machine with few cores the reader of the events must get its turn.
                std::thread::yield_now();
            }
        }
    }

    /// Takes commands until the next step is due; with nothing to do, until one comes. False: the engine was dropped.
    fn listen(&mut self, next_step: Instant) -> bool {
        loop {
            let idle = self.active.is_empty() && self.waiting.iter().all(VecDeque::is_empty);
            if !self.events.is_empty() {
                return true;
            }
            let command = if idle {
                self.inbox.recv().map_err(|_| ())
            } else {
                match next_step.saturating_duration_since(Instant::now()) {
                    Duration::ZERO => match self.inbox.try_recv() {
                        Ok(command) => Ok(command),
                        Err(TryRecvError::Empty) => return true,
                        Err(TryRecvError::Disconnected) => Err(()),
                    },
                    pause => match self.inbox.recv_timeout(pause) {
                        Ok(command) => Ok(command),
                        Err(RecvTimeoutError::Timeout) => return true,
                        Err(RecvTimeoutError::Disconnected) => Err(()),
                    },
                }
            };
            match command {
                Ok(Command::Submit(r)) => {
                    self.waiting[(r.priority == Priority::Batch) as usize].push_back(*r)
                }
                Ok(Command::Cancel(id)) => self.cancel(id),
                Err(()) => return false,
            }
        }
    }

    fn cancel(&mut self, id: SequenceId) {
        if let Some(i) = self.active.iter().position(|s| s.id == id) {
            let mut sequence = self.active.swap_remove(i);
            self.events.push(sequence.end(Vec::new(), FinishReason::Cancelled));
            return;
        }
        for queue in &mut self.waiting {
            if let Some(i) = queue.iter().position(|r| r.id == id) {
                queue.remove(i);
                self.events.push(never_ran(id, FinishReason::Cancelled));
                return;
            }
        }
    }

    /// Fills free slots, interactive requests first.
    fn admit(&mut self) {
        while self.active.len() < self.options.slots as usize {
            let Some(request) = self.waiting.iter_mut().find_map(|queue| queue.pop_front()) else { break };
            let id = request.id;
            match Sequence::new(request, self.options.tokens) {
                Ok(sequence) => self.active.push(sequence),
                Err(e) => self.events.push(never_ran(id, FinishReason::Error(e))),
            }
        }
        let now = Instant::now();
        for queue in &mut self.waiting {
            while let Some(i) = queue.iter().position(|r| r.deadline.is_some_and(|d| d <= now)) {
                let id = queue.remove(i).expect("its position was just found").id;
                self.events.push(never_ran(id, FinishReason::Deadline));
            }
        }
    }

    fn step(&mut self) {
        if self.active.is_empty() {
            return;
        }
        let now = Instant::now();
        let most = if self.options.delay.is_zero() { BURST } else { 1 };
        let mut tokens = 0;
        for mut sequence in std::mem::take(&mut self.active) {
            let event = sequence.step(now, most);
            tokens += event.tokens.len() as u64;
            if event.finish.is_none() {
                self.active.push(sequence);
            }
            self.events.push(event);
        }
        self.counters.tokens.fetch_add(tokens, Relaxed);
        self.counters.steps.fetch_add(1, Relaxed);
    }
}

fn never_ran(id: SequenceId, reason: FinishReason) -> Event {
    let finish = Some(Finish { reason, usage: Usage::default() });
    Event { id, tokens: Vec::new(), text: String::new(), finish }
}

/// A running request.
struct Sequence {
    id: SequenceId,
    prompt: String,
    /// Where the prompt's words are.
    words: Vec<(u32, u32)>,
    max_tokens: u32,
    /// Tokens so far, resumed ones included.
    position: u32,
    /// Tokens of its next event where there is no delay.
    burst: u32,
    stop: StopMatcher,
    deadline: Option<Instant>,
}

impl Sequence {
    fn new(request: Request, default_tokens: u32) -> Result<Self, RequestError> {
        let prompt = match request.prompt {
            Prompt::Text(text) => text,
            Prompt::Chat(mut messages) => messages.pop().map(|m| m.content).unwrap_or_default(),
        };
        let start = prompt.as_ptr() as usize;
        let words: Vec<_> = prompt
            .split_whitespace()
            .map(|w| ((w.as_ptr() as usize - start) as u32, w.len() as u32))
            .collect();
        let fail = |kind, message: String| Err(RequestError { kind, message });
        if words.is_empty() {
            return fail(RequestErrorKind::Invalid, "the prompt has no words to give back".into());
        }
        if words.len() >= CONTEXT as usize {
            let message = format!(
                "the prompt has {} words; with at least one to come they must fit into {CONTEXT}",
                words.len()
            );
            return fail(RequestErrorKind::ContextLength, message);
        }
        let room = CONTEXT - words.len() as u32;
        let mut sequence = Self {
            id: request.id,
            prompt,
            words,
            max_tokens: request.max_tokens.unwrap_or(default_tokens).clamp(1, room),
            position: 0,
            burst: 1,
            stop: StopMatcher::new(&request.stop),
            deadline: request.deadline,
        };
        for _ in &request.resume.tokens {
            // What is released again here was emitted by the attempt that is resumed.
            sequence.next_word(&mut String::new());
        }
        Ok(sequence)
    }

    fn step(&mut self, now: Instant, most: u32) -> Event {
        if self.deadline.is_some_and(|d| d <= now) {
            return self.end(Vec::new(), FinishReason::Deadline);
        }
        let count = self.burst.min(most);
        self.burst = (self.burst * 2).min(BURST);
        let mut tokens = Vec::with_capacity(count as usize);
        let mut text = String::new();
        for _ in 0..count {
            if self.stop.matched() || self.position >= self.max_tokens {
                break;
            }
            tokens.push(self.next_word(&mut text));
        }
        let reason = if self.stop.matched() {
            FinishReason::Stop
        } else if self.position >= self.max_tokens {
            FinishReason::Length
        } else {
            return Event { id: self.id, tokens, text, finish: None };
        };
        let end = self.end(tokens, reason);
        Event { text: text + &end.text, ..end }
    }

    /// Takes the next word, whose id is its index in the prompt, and releases what can be.
    fn next_word(&mut self, text: &mut String) -> u32 {
        let index = self.position as usize % self.words.len();
        let (start, length) = self.words[index];
        if self.position > 0 {
            text.push_str(&self.stop.push(" ").0);
        }
        text.push_str(&self.stop.push(&self.prompt[start as usize..(start + length) as usize]).0);
        self.position += 1;
        index as u32
    }

    /// The last event, with what is still held.
    fn end(&mut self, tokens: Vec<u32>, reason: FinishReason) -> Event {
        let usage = Usage {
            prompt_tokens: self.words.len() as u32,
            completion_tokens: self.position,
            cached_prompt_tokens: 0,
        };
        Event { id: self.id, tokens, text: self.stop.flush(), finish: Some(Finish { reason, usage }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChatMessage, Resume, Sampling};
    use std::sync::mpsc;

    fn start(delay: Duration, slots: u32) -> (Box<dyn Engine>, mpsc::Receiver<Vec<Event>>) {
        let (to, from) = mpsc::channel();
        let options = EchoOptions { name: "echo".into(), tokens: 8, delay, slots };
        (echo(options, Box::new(move |events| drop(to.send(events)))), from)
    }

    fn request(id: u64, prompt: &str, max_tokens: u32) -> Request {
        Request {
            id: SequenceId(id),
            prompt: Prompt::Text(prompt.into()),
            sampling: Sampling::default(),
            max_tokens: Some(max_tokens),
            stop: Vec::new(),
            constraint: None,
            resume: Resume::default(),
            priority: Priority::Interactive,
            deadline: None,
            user: 0,
        }
    }

    /// All that comes of one request.
    fn collect(from: &mpsc::Receiver<Vec<Event>>, id: u64) -> (String, Vec<u32>, Finish) {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        loop {
            let events = from.recv_timeout(Duration::from_secs(10)).expect("the engine goes on");
            for event in events.into_iter().filter(|e| e.id == SequenceId(id)) {
                text.push_str(&event.text);
                tokens.extend(event.tokens);
                if let Some(finish) = event.finish {
                    return (text, tokens, finish);
                }
            }
        }
    }

    #[test]
    fn gives_the_words_back_in_turn() {
        let (engine, from) = start(Duration::ZERO, 4);
        engine.submit(request(1, " one  two\nthree ", 7));
        let (text, tokens, finish) = collect(&from, 1);
        assert_eq!(text, "one two three one two three one");
        assert_eq!(tokens, [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(finish.reason, FinishReason::Length);
        let usage = Usage { prompt_tokens: 3, completion_tokens: 7, cached_prompt_tokens: 0 };
        assert_eq!(finish.usage, usage);

        let messages = ["you are", "a b"].map(|t| ChatMessage { role: "user".into(), content: t.into() });
        let chat = Request { prompt: Prompt::Chat(messages.into()), max_tokens: None, ..request(2, "", 1) };
        engine.submit(chat);
        assert_eq!(collect(&from, 2).0, "a b a b a b a b");
    }

    #[test]
    fn resumed_anywhere_it_says_the_same() {
        let (engine, from) = start(Duration::ZERO, 4);
        let stop = vec!["b c d a b X".to_owned(), "d a b c d a b c d a".to_owned()];
        let whole = Request { stop: stop.clone(), ..request(0, "a b c d", 40) };
        engine.submit(whole.clone());
        let (mut events, mut end) = (Vec::new(), false);
        while !end {
            for event in from.recv_timeout(Duration::from_secs(10)).unwrap() {
                end |= event.finish.is_some();
                events.push(event);
            }
        }
        let text: String = events.iter().map(|e| e.text.as_str()).collect();
        let tokens: Vec<u32> = events.iter().flat_map(|e| e.tokens.clone()).collect();
        assert_eq!(text, "a b c ");
        for cut in 0..events.len() {
            let before = &events[..cut];
            let had: Vec<u32> = before.iter().flat_map(|e| e.tokens.clone()).collect();
            let said: String = before.iter().map(|e| e.text.as_str()).collect();
            let resume = Resume { tokens: had.clone(), text: said.clone() };
            let resumed = Request { id: SequenceId(1 + cut as u64), resume, ..whole.clone() };
            engine.submit(resumed);
            let (rest, new, finish) = collect(&from, 1 + cut as u64);
            assert_eq!(said + &rest, text);
            assert_eq!([had, new].concat(), tokens);
            assert_eq!(finish.reason, FinishReason::Stop);
            assert_eq!(finish.usage.completion_tokens, tokens.len() as u32);
        }
    }

    #[test]
    fn a_stop_string_may_span_words_and_what_only_looked_like_one_is_released() {
        let (engine, from) = start(Duration::ZERO, 4);
        engine.submit(Request { stop: vec!["o th".into()], ..request(1, "one two three", 9) });
        let (text, _, finish) = collect(&from, 1);
        assert_eq!((text.as_str(), finish.reason), ("one tw", FinishReason::Stop));
        engine.submit(Request { stop: vec!["two X".into()], ..request(2, "one two", 4) });
        let (text, _, finish) = collect(&from, 2);
        assert_eq!((text.as_str(), finish.reason), ("one two one two", FinishReason::Length));
    }

    #[test]
    fn requests_step_together_and_wait_for_slots() {
        let (engine, from) = start(Duration::from_millis(2), 2);
        for id in 0..3 {
            engine.submit(request(id, "a b", 3));
        }
        let mut ended = Vec::new();
        while ended.len() < 3 {
            let events = from.recv_timeout(Duration::from_secs(10)).unwrap();
            assert!(events.len() <= 2);
            assert!(events.iter().all(|e| e.tokens.len() == 1));
            ended.extend(events.iter().filter(|e| e.finish.is_some()).map(|e| e.id.0));
        }
        assert_eq!(ended.last(), Some(&2));
        assert_eq!(engine.stats().tokens, 9);
    }

    #[test]
    fn cancelled_or_expired_while_running_or_waiting() {
        let (engine, from) = start(Duration::from_millis(5), 1);
        engine.submit(request(1, "a", 1_000_000));
        engine.submit(request(2, "a", 1_000_000));
        let expired = Request { deadline: Some(Instant::now()), ..request(3, "a", 1) };
        engine.submit(expired);
        assert_eq!(collect(&from, 3).2.reason, FinishReason::Deadline);
        engine.cancel(SequenceId(2));
        assert_eq!(collect(&from, 2).2.reason, FinishReason::Cancelled);
        engine.cancel(SequenceId(1));
        assert_eq!(collect(&from, 1).2.reason, FinishReason::Cancelled);
        let soon = Instant::now() + Duration::from_millis(20);
        engine.submit(Request { deadline: Some(soon), ..request(4, "a", 1_000_000) });
        let (_, tokens, finish) = collect(&from, 4);
        assert_eq!(finish.reason, FinishReason::Deadline);
        assert_eq!(finish.usage.completion_tokens, tokens.len() as u32);
    }

    #[test]
    fn what_cannot_run_is_told_and_hurts_nobody() {
        let (engine, from) = start(Duration::ZERO, 1);
        engine.submit(request(1, " \n ", 3));
        let FinishReason::Error(e) = collect(&from, 1).2.reason else { panic!() };
        assert_eq!(e.kind, RequestErrorKind::Invalid);
        engine.submit(request(2, "fine", 1));
        assert_eq!(collect(&from, 2).0, "fine");
        engine.submit(request(3, &"x ".repeat(CONTEXT as usize), 3));
        let FinishReason::Error(e) = collect(&from, 3).2.reason else { panic!() };
        assert_eq!(e.kind, RequestErrorKind::ContextLength);
    }

    #[test]
    fn dropping_it_ends_its_thread() {
        let (engine, from) = start(Duration::ZERO, 1);
        engine.submit(request(1, "a", u32::MAX));
        from.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(engine);
        while from.recv_timeout(Duration::from_secs(10)).is_ok() {}
        assert!(matches!(from.try_recv(), Err(mpsc::TryRecvError::Disconnected)));
    }
}
