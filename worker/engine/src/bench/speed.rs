//! How fast an engine is, all of it: scheduler, model, sampling, text.
//!
//! Prompts are random tokens, so that nothing is found in the cache, nothing is guessed ahead, and sequences end at nothing
//! but their length. Speeds are given beside what the device's measured bandwidth and arithmetic would allow.

use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::engine::{self, Handle, Ready};
use crate::kernels::cpu::Isa;
use crate::kernels::{BLOCK, Limits};
use crate::memory::free_memory;
use crate::model::Cost;
use crate::sequence::Sequence;
use crate::weights::{Checkpoint, DType, Shape};
use crate::{
    BackendKind, Engine, Event, LoadError, LoadOptions, ModelInfo, Priority, Prompt, Request, Resume,
    Sampling, SequenceId, setup,
};

/// What to measure.
#[derive(Clone, Debug)]
pub struct SpeedOptions {
    /// Prompt lengths, tokens; decoding starts behind the last of them.
    pub prompts: Vec<usize>,
    /// How many sequences decode together.
    pub batches: Vec<usize>,
    /// New tokens per sequence.
    pub tokens: usize,
    /// Each measurement is the median of so many.
    pub repetitions: usize,
}

/// A measured speed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// `prefill` or `decode`.
    pub test: &'static str,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Sequences together.
    pub batch: usize,
    /// Of all sequences together: of the prompt, or new ones.
    pub tokens_per_second: f64,
    /// Bytes of weights and cache that were read, as a share of what the device can read; absent where nobody knows.
    pub bandwidth_share: Option<f64>,
    /// Multiplications and additions with weights, as a share of what the device can do in f32.
    pub flops_share: Option<f64>,
    /// How many runs this is the median of.
    pub repetitions: usize,
}

/// Measures the model that `load` names, and reports each result when it is there.
///
/// # Errors
/// If the model can't be loaded.
pub fn speed(
    load: LoadOptions,
    options: &SpeedOptions,
    report: &mut dyn FnMut(Measurement),
) -> Result<ModelInfo, LoadError> {
    measure(setup::set_up, load, options, report)
}

/// The same for a model of random weights; the path in `load` is ignored. `format`: of its matrices; `None`: Q4_1 on the
/// CPU, BF16 elsewhere.
///
/// # Errors
/// If the format does not fit the shape, or the memory is too small for both.
pub fn speed_of_shape(
    shape: &'static Shape,
    format: Option<DType>,
    load: LoadOptions,
    options: &SpeedOptions,
    report: &mut dyn FnMut(Measurement),
) -> Result<ModelInfo, LoadError> {
    let set_up = move |mut load: LoadOptions| {
        let backend = *load.backend.get_or_insert_with(setup::best_backend);
        let on_cpu = backend == BackendKind::Cpu;
        let format = format.unwrap_or(if on_cpu { DType::Q4_1 } else { DType::BF16 });
        if on_cpu {
            check_memory(shape, format, backend, load.kv_positions.unwrap_or_default())?;
        }
        load.name = Some(shape.name.into());
        setup::set_up_checkpoint(Checkpoint::random(shape, format)?, Isa::best(), load)
    };
    measure(set_up, load, options, report)
}

/// Refuses what would drive the system out of memory.
fn check_memory(shape: &Shape, format: DType, backend: BackendKind, positions: u64) -> Result<(), LoadError> {
    let needed = memory(shape, format, backend, positions)?;
    let Some(free) = free_memory().filter(|&free| free < needed) else { return Ok(()) };
    let gb = |bytes: u64| bytes as f64 / 1e9;
    Err(LoadError::Memory(format!(
        "{} in {} takes {:.1} GB of memory with its cache, and {:.1} GB are free: choose a smaller shape or format, or fewer \
         or shorter sequences",
        shape.name,
        format.name(),
        gb(needed),
        gb(free)
    )))
}

/// Bytes of memory that measuring takes: weights, keys and values of `positions` positions, and the measurements themselves.
fn memory(shape: &Shape, format: DType, backend: BackendKind, positions: u64) -> Result<u64, LoadError> {
    let cache = setup::position_bytes(&shape.config()?, backend) as u64 * positions;
    Ok(shape.memory(format)? + cache + MEASURING)
}

fn measure(
    set_up: impl FnOnce(LoadOptions) -> Result<Ready, LoadError> + Send + 'static,
    mut load: LoadOptions,
    options: &SpeedOptions,
    report: &mut dyn FnMut(Measurement),
) -> Result<ModelInfo, LoadError> {
    let most = options.batches.iter().copied().max().unwrap_or(1).max(1);
    let longest = options.prompts.iter().copied().max().unwrap_or(1) + options.tokens + SLACK + 2 * BLOCK;
    load.slots = Some(most as u32);
    load.speculation = Some(false);
    // Not what was set for serving: what is measured must fit.
    load.context = None;
    load.kv_positions = Some((most * longest.next_multiple_of(BLOCK) + most * BLOCK) as u64);
    let (sender, events) = mpsc::channel();
    let (facts, known) = mpsc::channel();
    let set_up = move || {
        let ready = set_up(load)?;
        let _ = facts.send((ready.model.cost(), ready.model.limits()));
        Ok(ready)
    };
    let sink = Box::new(move |step| drop(sender.send((Instant::now(), step))));
    let handle = engine::start(set_up, sink)?;
    let (cost, limits) = known.recv().expect("sent before the engine started");
    let mut bench = Bench { handle, events, cost, limits, random: StdRng::seed_from_u64(1), next: 0 };
    bench.prefill(options.prompts.iter().copied().max().unwrap_or(1).min(BLOCK));
    for &prompt in &options.prompts {
        let speeds = (0..options.repetitions).map(|_| bench.prefill(prompt)).collect();
        report(bench.measurement("prefill", prompt, 1, speeds));
    }
    let prompt = options.prompts.last().copied().unwrap_or(1);
    for &batch in &options.batches {
        let speeds = (0..options.repetitions).map(|_| bench.decode(prompt, batch, options.tokens)).collect();
        report(bench.measurement("decode", prompt, batch, speeds));
    }
    Ok(bench.handle.info().clone())
}

/// Memory that the measurements take themselves, bytes: what the device's bandwidth is read from.
const MEASURING: u64 = 1 << 29;
/// Tokens that a sequence goes on for longer than is measured, since not all begin in the same step.
const SLACK: usize = 16;

/// What a step of the engine brought.
struct Step {
    when: Instant,
    tokens: usize,
    ended: usize,
}

struct Bench {
    handle: Handle,
    events: Receiver<(Instant, Vec<Event>)>,
    cost: Cost,
    limits: Option<Limits>,
    random: StdRng,
    next: u64,
}

impl Bench {
    /// A prompt that nobody has seen before.
    fn prompt(&mut self, length: usize) -> Vec<u32> {
        let ids = self.handle.language().tokenizer.vocab_size() as u32;
        (0..length).map(|_| self.random.random_range(0..ids)).collect()
    }

    /// Hands over a sequence that goes on for `tokens` tokens.
    fn submit(&mut self, prompt: Vec<u32>, tokens: usize) {
        self.next += 1;
        let request = Request {
            id: SequenceId(self.next),
            prompt: Prompt::Text(String::new()),
            sampling: Sampling::default(),
            max_tokens: Some(tokens as u32),
            stop: Vec::new(),
            constraint: None,
            resume: Resume::default(),
            priority: Priority::Interactive,
            deadline: None,
            user: 0,
        };
        let tokenizer = &self.handle.language().tokenizer;
        let context = self.handle.info().context as usize;
        let mut sequence = Sequence::new(request, prompt, None, tokenizer, context);
        sequence.endless = true;
        self.handle.submit_sequence(sequence);
    }

    /// Waits for the next step.
    fn step(&self) -> Step {
        let (when, events) = self.events.recv().expect("the engine goes on");
        Step {
            when,
            tokens: events.iter().map(|event| event.tokens.len()).sum(),
            ended: events.iter().filter(|event| event.finish.is_some()).count(),
        }
    }

    /// Tokens of a prompt a second, from its arrival to its first token.
    fn prefill(&mut self, length: usize) -> f64 {
        let prompt = self.prompt(length);
        let start = Instant::now();
        self.submit(prompt, 1);
        length as f64 / (self.step().when - start).as_secs_f64()
    }

    /// New tokens a second of `batch` sequences behind prompts of `length` tokens.
    fn decode(&mut self, length: usize, batch: usize, tokens: usize) -> f64 {
        // Prompts are computed beforehand, one by one, and found in the cache when all sequences start together.
        let prompts: Vec<_> = (0..batch).map(|_| self.prompt(length.next_multiple_of(BLOCK) + 1)).collect();
        for prompt in &prompts {
            self.submit(prompt.clone(), 1);
            self.step();
        }
        prompts.into_iter().for_each(|prompt| self.submit(prompt, tokens + SLACK));
        let mut last = self.step();
        while last.tokens < batch {
            last = self.step();
        }
        let (start, mut new) = (last.when, 0);
        for _ in 0..tokens {
            last = self.step();
            new += last.tokens;
        }
        let speed = new as f64 / (last.when - start).as_secs_f64();
        let mut ended = 0;
        while ended < batch {
            ended += self.step().ended;
        }
        speed
    }

    fn measurement(
        &self,
        test: &'static str,
        prompt: usize,
        batch: usize,
        mut speeds: Vec<f64>,
    ) -> Measurement {
        speeds.sort_by(f64::total_cmp);
        let tokens_per_second = speeds[speeds.len() / 2];
        // A prompt reads the weights once per chunk, about once for all its tokens; a decoding step once for all sequences,
        // and each one's cache.
        let bytes = match test {
            "prefill" => self.cost.weight_bytes as f64 / prompt as f64,
            _ => self.cost.weight_bytes as f64 / batch as f64 + (self.cost.cache_bytes * prompt) as f64,
        };
        let flops = 2.0 * self.cost.multiplications as f64;
        Measurement {
            test,
            prompt,
            batch,
            tokens_per_second,
            bandwidth_share: self.limits.map(|limits| tokens_per_second * bytes / limits.bandwidth),
            flops_share: self.limits.map(|limits| tokens_per_second * flops / limits.flops),
            repetitions: speeds.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_counted_as_the_backend_keeps_it() {
        let shape = Shape::find("smollm2-135m").unwrap();
        let of = |positions| memory(shape, DType::Q4_1, BackendKind::Cpu, positions).unwrap();
        // 30 layers, keys and values, 3 heads of 64 numbers in 16 bits, and a scale in 32.
        assert_eq!(of(1000) - of(0), 1000 * 30 * 2 * 3 * (64 * 2 + 4));
    }
}
