//! Attention of a ragged batch over a paged cache: each row attends to the cached positions of its own sequence.
//!
//! Scores of a chunk of positions are computed, turned into weights and applied to the values while they are in the
//! first-level cache; chunks are joined by rescaling (the online softmax of FlashAttention). Chunks are of fixed size and
//! joined in order, so a row's result does not depend on the rows beside it, on how the work is split, or on threads.
//! Rows of one sequence are taken sixteen or more at a time, and query heads that share a key head together, so that keys and
//! values are read once for all of them. Rows whose context is long beside the others' are split by chunks among the threads.
//! Where there are tiles, products are those of integers.

mod chunk;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod integers;

use std::cell::RefCell;
use std::ops::Range;

use super::activations::Quantiser;
use super::cache::{Element, KvShape, Rows};
use super::isa::Isa;
use super::pack::Shared;
use super::pool::{Pool, share};
use chunk::{CHUNK, Scratch, run_chunk};

/// Rows of one sequence that are taken together, at least.
const ROWS: usize = 16;
/// Most numbers that are kept of chunks until they are joined, 64 MB; in tests so few that there are several groups of chunks.
const PARTIAL: usize = if cfg!(test) { 1 << 14 } else { 1 << 24 };

/// What attention is to be computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads: a multiple of the cache's heads; consecutive ones share a head of the cache.
    pub heads: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A row attends to this many positions, its own included; `None`: to all.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
}

/// Rows of one sequence, with one head of the cache.
struct Unit {
    rows: Range<usize>,
    kv_head: usize,
    /// Chunks of positions that any of the rows attends to.
    chunks: Range<usize>,
}

/// What the threads need to know.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a, E> {
    spec: &'a AttentionSpec,
    shape: &'a KvShape,
    keys: &'a [E],
    values: &'a [E],
    rows: &'a Rows<'a>,
    q: &'a [f32],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// States of chunks until they are joined.
    static PARTIAL_STATES: RefCell<Vec<f32>> = RefCell::default();
}

/// `out = softmax(q K^T) V`; `q` and `out` are `[rows, heads * head_dim]`, queries are rotated, and the rows' own keys and
/// values are already in the cache. `out` is quantised, too, if it is told where to.
///
/// # Panics
/// If lengths, heads or positions do not fit.
#[allow(clippy::too_many_arguments)]
pub fn attention<E: Element>(
    pool: &Pool,
    spec: &AttentionSpec,
    shape: &KvShape,
    keys: &[E],
    values: &[E],
    rows: &Rows<'_>,
    q: &[f32],
    out: &mut [f32],
    quantised: Option<&Quantiser<'_>>,
) {
    assert!(
        shape.heads > 0 && spec.heads.is_multiple_of(shape.heads),
        "{} heads on {}",
        spec.heads,
        shape.heads
    );
    assert!(spec.window != Some(0));
    let width = spec.heads * shape.head_dim;
    assert_eq!(q.len(), rows.len() * width);
    assert_eq!(out.len(), q.len());
    let blocks = keys.len() / shape.key_block::<E>();
    assert!(values.len() / shape.value_block::<E>() >= blocks);
    rows.check(shape, blocks);
    let problem = Problem { spec, shape, keys, values, rows, q };
    let units = units(&problem, rows_together::<E>(pool.isa(), shape));
    let cost = |unit: &Unit| unit.chunks.len() * problem.queries(unit);
    // What is more than a quarter of a thread's part would keep the others waiting.
    let most = units.iter().map(cost).sum::<usize>() / (4 * pool.threads());
    let is_long = |unit: &Unit| pool.threads() > 1 && unit.chunks.len() > 1 && cost(unit) > most;
    let (long, units): (Vec<_>, Vec<_>) = units.into_iter().partition(is_long);
    let out = Shared(out.as_mut_ptr());
    // Rows whose heads are all there.
    let quantise = |rows: Range<usize>| {
        if let Some(quantised) = quantised {
            let values = rows.start * width..rows.end * width;
            // SAFETY: they are within `out`, and nobody else has to do with these rows any more.
            unsafe {
                quantised.put(values.start, std::slice::from_raw_parts(out.at(values.start), values.len()))
            }
        }
    };
    if !long.is_empty() {
        let mut rest = long.as_slice();
        while !rest.is_empty() {
            let (group, others) = rest.split_at(fitting(&problem, rest));
            by_chunks(pool, &problem, group, out);
            rest = others;
        }
        long.iter().step_by(shape.heads).for_each(|unit| quantise(unit.rows.clone()));
    }
    if !units.is_empty() {
        // A thread's costliest units are usually the last, so they are begun first. Heads of the same rows stay on one thread
        // where there are enough for all, and each asks for the next one's memory.
        let together = if units.len() < 8 * pool.threads() { 1 } else { shape.heads };
        let runs = units.len() / together;
        pool.run(runs, |run| {
            let mine = &units[share(units.len(), runs, pool.backwards(runs, run))];
            for (index, unit) in mine.iter().enumerate() {
                by_unit(pool, &problem, unit, mine.get(index + 1), out);
            }
            if together == shape.heads {
                quantise(mine[0].rows.clone());
            }
        });
        if together != shape.heads {
            pool.run(units.len() / shape.heads, |tile| quantise(units[tile * shape.heads].rows.clone()));
        }
    }
}

/// Rows of one sequence that are taken together. With tiles as many more as are worth it for a chunk's keys and values to be put there
/// less often.
fn rows_together<E: Element>(isa: Isa, shape: &KvShape) -> usize {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if integers::suits::<E>(isa, shape) {
        return 2 * ROWS;
    }
    let _ = (isa, shape);
    ROWS
}

fn units<E>(problem: &Problem<'_, E>, most: usize) -> Vec<Unit> {
    let rows = problem.rows;
    let mut units = Vec::new();
    let mut first = 0;
    while first < rows.len() {
        let same = |&row: &usize| rows.sequences[row] == rows.sequences[first];
        let last = (first..rows.len().min(first + most)).take_while(same).last().unwrap_or(first);
        let spans = (first..last + 1).map(|row| problem.span(row));
        let (start, end) = spans.fold((usize::MAX, 0), |(s, e), span| (s.min(span.start), e.max(span.end)));
        for kv_head in 0..problem.shape.heads {
            units.push(Unit { rows: first..last + 1, kv_head, chunks: start / CHUNK..end.div_ceil(CHUNK) });
        }
        first = last + 1;
    }
    units
}

impl<E> Problem<'_, E> {
    /// Positions that a row attends to.
    fn span(&self, row: usize) -> Range<usize> {
        let end = self.rows.positions[row] as usize + 1;
        end - self.spec.window.map_or(end, |window| window.min(end))..end
    }

    /// Positions of a chunk that a query of a unit attends to, counted from the chunk's start.
    fn span_in(&self, unit: &Unit, chunk: usize, query: usize) -> Range<usize> {
        let span = self.span(unit.rows.start + query / self.sharing());
        let clip = |p: usize| p.clamp(chunk * CHUNK, (chunk + 1) * CHUNK) - chunk * CHUNK;
        clip(span.start)..clip(span.end)
    }

    /// Query heads that share a head of the cache.
    fn sharing(&self) -> usize {
        self.spec.heads / self.shape.heads
    }

    /// Where the output of query `query` (row by row, then head by head) of a unit begins.
    fn place(&self, unit: &Unit, query: usize) -> usize {
        let sharing = self.sharing();
        let row = unit.rows.start + query / sharing;
        (row * self.spec.heads + unit.kv_head * sharing + query % sharing) * self.shape.head_dim
    }

    fn queries(&self, unit: &Unit) -> usize {
        unit.rows.len() * self.sharing()
    }

    /// Numbers of the states of all queries of a unit.
    fn states(&self, unit: &Unit) -> usize {
        self.queries(unit) * self.state()
    }

    /// Numbers of a query's state.
    fn state(&self) -> usize {
        self.shape.value_dim() + 2
    }
}

/// How many of the first units have room for the states of all their chunks; at least one.
fn fitting<E>(problem: &Problem<'_, E>, units: &[Unit]) -> usize {
    let mut kept = 0;
    let fits = |unit: &&Unit| {
        kept += unit.chunks.len() * problem.states(unit);
        kept <= PARTIAL
    };
    units.iter().take_while(fits).count().max(1)
}

/// All chunks of a unit on one thread.
fn by_unit<E: Element>(
    pool: &Pool,
    problem: &Problem<'_, E>,
    unit: &Unit,
    next: Option<&Unit>,
    out: Shared<f32>,
) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.begin(pool.isa(), problem, unit);
        for chunk in unit.chunks.clone() {
            run_chunk(pool.isa(), problem, unit, next, chunk, scratch);
        }
        for query in 0..problem.queries(unit) {
            finish(problem, unit, query, scratch.state(query), out);
        }
    });
}

/// Chunks spread over the threads, their results joined afterwards, in the order in which one thread would have.
fn by_chunks<E: Element>(pool: &Pool, problem: &Problem<'_, E>, units: &[Unit], out: Shared<f32>) {
    // Each with where its states are kept.
    let (mut tasks, mut starts, mut end) = (Vec::new(), Vec::new(), 0);
    for unit in units {
        starts.push(end);
        for chunk in unit.chunks.clone() {
            tasks.push((unit, chunk, end));
            end += problem.states(unit);
        }
    }
    PARTIAL_STATES.with_borrow_mut(|partial| {
        partial.resize(end, 0.0);
        let parts = Shared(partial.as_mut_ptr());
        let runs = tasks.len().min(8 * pool.threads());
        pool.run(runs, |run| {
            SCRATCH.with_borrow_mut(|scratch| {
                for &(unit, chunk, start) in &tasks[share(tasks.len(), runs, run)] {
                    scratch.begin(pool.isa(), problem, unit);
                    run_chunk(pool.isa(), problem, unit, None, chunk, scratch);
                    // SAFETY: a range of its own for each task, within `partial`.
                    let to = unsafe { std::slice::from_raw_parts_mut(parts.at(start), problem.states(unit)) };
                    to.copy_from_slice(scratch.states());
                }
            });
        });
        let partial = partial.as_slice();
        pool.run(units.len(), |index| join(pool, problem, &units[index], &partial[starts[index]..], out));
    });
}

/// Joins the states of a unit's chunks, which lie one chunk's behind another's.
fn join<E>(pool: &Pool, problem: &Problem<'_, E>, unit: &Unit, parts: &[f32], out: Shared<f32>) {
    let state = problem.state();
    let mut joined = vec![0.0; state];
    for query in 0..problem.queries(unit) {
        chunk::clear(&mut joined);
        for part in parts.chunks_exact(problem.states(unit)).take(unit.chunks.len()) {
            chunk::join(pool.isa(), &mut joined, &part[query * state..][..state]);
        }
        finish(problem, unit, query, &joined, out);
    }
}

/// Writes a query's output: its weighted sum over the sum of its weights.
fn finish<E>(problem: &Problem<'_, E>, unit: &Unit, query: usize, state: &[f32], to: Shared<f32>) {
    let dim = problem.shape.head_dim;
    let place = problem.place(unit, query);
    // SAFETY: the output of a query belongs to one unit, and a unit to one task; `place` is within `out`.
    let out = unsafe { std::slice::from_raw_parts_mut(to.at(place), dim) };
    let factor = 1.0 / state[1];
    for (out, value) in out.iter_mut().zip(&state[2..]) {
        *out = value * factor;
    }
}

#[cfg(test)]
mod tests;
