//! The engine's thread: takes requests in, steps, and reports.
//!
//! One thread owns model, cache and scheduler, so none of them needs a lock. Prompts are rendered and tokenized on the caller's
//! thread, where a long one delays nobody's tokens. With nothing to do the thread sleeps on its channel, and the first request to
//! come starts at once. A panic in a step ends the request that it is due to, and the engine goes on; where the model does
//! nothing any more, the thread ends without a word about its requests, and they can be run elsewhere.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::batch::Batch;
use crate::kernels::BLOCK;
use crate::language::Language;
use crate::model::Model;
use crate::pace::Pace;
use crate::sampler::Choice;
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
use crate::{
    Engine, Event, Finish, FinishReason, ModelInfo, Request, RequestError, RequestErrorKind, SequenceId,
};
use crate::{Sink, Stats, Tokenizer, Usage};

enum Command {
    Submit(Box<Sequence>),
    /// A request that could not be understood.
    Refuse(SequenceId, RequestError),
    Cancel(SequenceId),
}

/// A running engine's numbers, written by its thread.
#[derive(Default)]
struct Gauges {
    active: AtomicU64,
    waiting: AtomicU64,
    kv_used: AtomicU64,
    kv_total: AtomicU64,
    tokens: AtomicU64,
    steps: AtomicU64,
    drafted: AtomicU64,
    accepted: AtomicU64,
}

/// The engine as its users hold it.
pub(crate) struct Handle {
    info: ModelInfo,
    language: Arc<Language>,
    gauges: Arc<Gauges>,
    /// `None` only while it is dropped.
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

/// A model that is ready, with what its engine must know.
pub(crate) struct Ready {
    /// The model.
    pub model: Box<dyn Model>,
    /// Its tokenizer and chat template.
    pub language: Arc<Language>,
    /// What it is.
    pub info: ModelInfo,
    /// Blocks of its cache.
    pub blocks: usize,
    /// Whether tokens are guessed ahead.
    pub speculation: bool,
}

/// Starts the thread: it calls `load` for the model, since devices prefer to be used from one thread, and runs it.
pub(crate) fn start<E: Send + 'static>(
    load: impl FnOnce() -> Result<Ready, E> + Send + 'static,
    sink: Sink,
) -> Result<Handle, E> {
    let (commands, inbox) = mpsc::channel();
    let (ready, loaded) = mpsc::channel();
    let gauges = Arc::new(Gauges::default());
    let thread_gauges = gauges.clone();
    let run = move || {
        let loaded = match load() {
            Ok(loaded) => loaded,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let known = (loaded.language.clone(), loaded.info.clone());
        let runner = Runner::new(loaded, thread_gauges, sink);
        let _ = ready.send(Ok(known));
        runner.run(inbox);
    };
    let thread =
        std::thread::Builder::new().name("engine".into()).spawn(run).expect("the system can start a thread");
    match loaded.recv() {
        Ok(Ok((language, info))) => {
            Ok(Handle { info, language, gauges, commands: Some(commands), thread: Some(thread) })
        }
        Ok(Err(error)) => Err(error),
        // Nothing was sent: loading panicked.
        Err(_) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("a thread that ends without a panic has reported"),
        },
    }
}

impl Handle {
    /// Hands over a sequence that was made elsewhere.
    pub fn submit_sequence(&self, sequence: Sequence) {
        self.send(Command::Submit(Box::new(sequence)));
    }

    /// What turns text into tokens.
    pub fn language(&self) -> &Language {
        &self.language
    }

    fn send(&self, command: Command) {
        // Only a thread whose model is broken ends before the handle; that it drops the sink tells.
        let _ = self.commands.as_ref().map(|commands| commands.send(command));
    }
}

impl Engine for Handle {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit(&self, request: Request) {
        let id = request.id;
        let prepared =
            catch_unwind(AssertUnwindSafe(|| self.language.prepare(request, self.info.context as usize)));
        self.send(match prepared {
            Ok(Ok(sequence)) => Command::Submit(Box::new(sequence)),
            Ok(Err(error)) => Command::Refuse(id, error),
            Err(panic) => Command::Refuse(id, internal("preparing the prompt", &*panic)),
        });
    }

    fn cancel(&self, id: SequenceId) {
        self.send(Command::Cancel(id));
    }

    fn stats(&self) -> Stats {
        let gauges = &self.gauges;
        Stats {
            active: gauges.active.load(Relaxed) as u32,
            waiting: gauges.waiting.load(Relaxed) as u32,
            kv_used: gauges.kv_used.load(Relaxed),
            kv_total: gauges.kv_total.load(Relaxed),
            tokens: gauges.tokens.load(Relaxed),
            steps: gauges.steps.load(Relaxed),
            drafted: gauges.drafted.load(Relaxed),
            accepted: gauges.accepted.load(Relaxed),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // Dropped from inside the sink it can't wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

fn internal(doing: &str, panic: &(dyn std::any::Any + Send)) -> RequestError {
    let said = panic.downcast_ref::<&str>().map(|text| text.to_string());
    let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    tracing::error!(doing, panic = said, "the engine panicked");
    RequestError {
        kind: RequestErrorKind::Internal,
        message: format!("the engine failed while {doing}: {said}"),
    }
}

/// Hands each sequence that is all computed its part of what the model gave: `width` numbers for its last row, and for each
/// guess behind it.
fn split<'a, T>(
    numbers: &'a mut [T],
    width: usize,
    due: impl Iterator<Item = &'a mut Sequence>,
) -> Vec<(&'a mut [T], &'a mut Sequence)> {
    let mut rest = numbers;
    let parts = due.map(|sequence| {
        let rows = 1 + sequence.draft.tokens.len();
        let part = rest.split_off_mut(..rows * width);
        (part.expect("rows for each sequence that is all computed"), sequence)
    });
    let parts = parts.collect();
    assert!(rest.is_empty(), "nothing for any other sequence");
    parts
}

/// Lets a sequence take its next tokens, and counts them.
fn advance(
    sequence: &mut Sequence,
    tokenizer: &Tokenizer,
    gauges: &Gauges,
    choose: impl FnMut(&Sequence, usize) -> Result<u32, RequestError>,
) {
    let guessed = sequence.draft.tokens.len();
    let right = sequence.advance(tokenizer, choose);
    gauges.drafted.fetch_add(guessed as u64, Relaxed);
    gauges.accepted.fetch_add(right as u64, Relaxed);
    gauges.tokens.fetch_add(sequence.new_tokens() as u64, Relaxed);
}

/// The so-many-th failed step ends those in it, if nobody has turned out to be the reason and none in company went well.
const STRIKES: u32 = 3;

/// What the thread owns.
struct Runner {
    model: Box<dyn Model>,
    language: Arc<Language>,
    scheduler: Scheduler,
    batch: Batch,
    pace: Pace,
    events: Vec<Event>,
    gauges: Arc<Gauges>,
    sink: Sink,
}

impl Runner {
    fn new(ready: Ready, gauges: Arc<Gauges>, sink: Sink) -> Self {
        let Ready { model, language, info, blocks, speculation } = ready;
        gauges.kv_total.store((blocks * BLOCK) as u64, Relaxed);
        let scheduler = Scheduler::new(info.slots as usize, blocks, speculation);
        let batch = Batch::default();
        Self { model, language, scheduler, batch, pace: Pace::default(), events: Vec::new(), gauges, sink }
    }

    /// Until the handle is dropped, or a panic when the model is broken.
    fn run(mut self, inbox: Receiver<Command>) {
        loop {
            if self.scheduler.is_idle() {
                match inbox.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            loop {
                match inbox.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.turn())) {
                self.start_over(internal("scheduling", &*panic));
            }
        }
    }

    /// One step, and all that goes with it.
    fn turn(&mut self) {
        self.expire();
        self.dismiss();
        self.step();
        self.report();
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(sequence) => self.scheduler.submit(*sequence),
            Command::Refuse(id, error) => {
                let finish = Finish { reason: FinishReason::Error(error), usage: Usage::default() };
                self.events.push(Event { id, tokens: Vec::new(), text: String::new(), finish: Some(finish) });
            }
            Command::Cancel(id) => {
                if let Some(sequence) = self.scheduler.find(id) {
                    sequence.end(FinishReason::Cancelled);
                }
            }
        }
    }

    /// Ends what is past its deadline.
    fn expire(&mut self) {
        let now = Instant::now();
        for sequence in self.scheduler.all() {
            if sequence.deadline.is_some_and(|deadline| deadline <= now) {
                sequence.end(FinishReason::Deadline);
            }
        }
    }

    /// One forward pass, if there is anything to pass.
    fn step(&mut self) {
        let start = Instant::now();
        self.scheduler.plan(&mut self.batch, &self.pace);
        if self.batch.rows() == 0 {
            return;
        }
        let streams = self.scheduler.stream_rows();
        // Logits stay on the device if it can choose for everybody.
        let choices = self.scheduler.choices();
        let choices = choices.filter(|choices| self.model.samples() || choices.iter().all(Choice::is_greedy));
        let result = catch_unwind(AssertUnwindSafe(|| match choices {
            Some(choices) => Ok(self.model.choose(&self.batch, &choices)),
            None => Err(self.forward()),
        }));
        match result {
            Ok(Ok(mut tokens)) => self.take(&mut tokens),
            Ok(Err(mut logits)) => {
                self.sample(&mut logits);
                self.model.recycle(logits);
            }
            // What it took says nothing of steps that go well.
            Err(panic) => return self.recover(internal("computing", &*panic)),
        }
        self.pace.record(streams, self.batch.rows() - streams, start.elapsed());
        self.gauges.steps.fetch_add(1, Relaxed);
    }

    /// The model's work, and beside it that of grammars: which tokens they allow depends on the tokens before alone, so it is
    /// found out while the device is busy.
    fn forward(&mut self) -> Vec<f32> {
        let guides = self.scheduler.stepped().filter_map(Sequence::guide);
        let mut guides: Vec<_> = guides.filter(|guide| !guide.is_ready()).collect();
        if guides.is_empty() {
            return self.model.forward(&self.batch);
        }
        std::thread::scope(|scope| {
            scope.spawn(move || guides.iter_mut().for_each(|guide| guide.look_ahead()));
            self.model.forward(&self.batch)
        })
    }

    /// Gives each sequence whose last token was computed its next one, or several where guesses were right. Tokens are chosen
    /// side by side: at 16 sequences of a large vocabulary it is a tenth of a step.
    fn sample(&mut self, logits: &mut [f32]) {
        let vocabulary = self.model.vocabulary();
        self.scheduler.computed();
        let due = split(logits, vocabulary, self.scheduler.due());
        let due: Vec<_> = due.into_iter().map(Mutex::new).collect();
        let (gauges, tokenizer) = (&self.gauges, &self.language.tokenizer);
        self.model.parallel(due.len(), &|index| {
            // Only this task takes the lock, so nobody has poisoned it.
            let mut due = due[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let (logits, sequence) = &mut *due;
            let advanced = catch_unwind(AssertUnwindSafe(|| {
                advance(sequence, tokenizer, gauges, |sequence, row| {
                    sequence.choose(&mut logits[row * vocabulary..][..vocabulary])
                });
            }));
            if let Err(panic) = advanced {
                sequence.end(FinishReason::Error(internal("choosing a token", &*panic)));
            }
        });
    }

    /// Gives them the tokens that the model chose.
    fn take(&mut self, tokens: &mut [u32]) {
        self.scheduler.computed();
        for (tokens, sequence) in split(tokens, 1, self.scheduler.due()) {
            advance(sequence, &self.language.tokenizer, &self.gauges, |_, row| Ok(tokens[row]));
        }
    }

    /// After a panic in the model all are computed again, and each one's rows of the failed step with nobody beside them.
    /// Whoever makes it panic alone ends; where nobody does, see [`STRIKES`].
    fn recover(&mut self, error: RequestError) {
        self.restore();
        self.scheduler.strike();
        let alone = self.scheduler.stepped().count() == 1;
        for sequence in self.scheduler.stepped().filter(|sequence| alone || sequence.strikes >= STRIKES) {
            sequence.end(FinishReason::Error(error.clone()));
        }
        if alone {
            self.scheduler.all().for_each(|sequence| sequence.strikes = 0);
        }
        self.dismiss();
        self.scheduler.forget_cache();
    }

    /// Brings the model into order after a panic; what was cached must be computed again. Panics if it does not even compute a
    /// single token then: it is broken, and no request is the reason.
    fn restore(&mut self) {
        self.model.reset();
        let mut batch = Batch::default();
        batch.push(&[0], 0, &[0], 1);
        let logits = self.model.forward(&batch);
        self.model.recycle(logits);
    }

    /// After a panic outside the model, when nothing can be trusted: everybody ends. Or after one in [`restore`](Self::restore),
    /// which then comes again, and ends the thread.
    fn start_over(&mut self, error: RequestError) {
        self.restore();
        for mut sequence in self.scheduler.dissolve() {
            sequence.end(FinishReason::Error(error.clone()));
            self.events.extend(sequence.take_event());
        }
        self.report();
    }

    /// Lets go of what has ended.
    fn dismiss(&mut self) {
        for mut sequence in self.scheduler.take_ended() {
            self.events.extend(sequence.take_event());
        }
    }

    /// Tells the sink what the step did.
    fn report(&mut self) {
        self.dismiss();
        self.events.extend(self.scheduler.all().filter_map(Sequence::take_event));
        self.measure();
        if self.events.is_empty() {
            return;
        }
        let events = std::mem::take(&mut self.events);
        if catch_unwind(AssertUnwindSafe(|| (self.sink)(events))).is_err() {
            tracing::error!("the receiver of the engine's events panicked; a step's events are lost");
        }
    }

    fn measure(&self) {
        let (used, _) = self.scheduler.blocks();
        self.gauges.active.store(self.scheduler.running_count() as u64, Relaxed);
        self.gauges.waiting.store(self.scheduler.waiting_count() as u64, Relaxed);
        self.gauges.kv_used.store((used * BLOCK) as u64, Relaxed);
    }
}

#[cfg(test)]
mod tests;
