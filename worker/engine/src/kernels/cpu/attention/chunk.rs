//! One chunk of positions for the queries of a unit.

use std::ops::Range;

use super::{Problem, Unit};
use crate::kernels::cpu::cache::Element;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::lanes::{Lanes, on_isa};

/// Positions of a chunk.
pub(super) const CHUNK: usize = 256;
/// Most queries that are computed together: as many as registers can hold sums for, of two vectors each.
const QUERIES: usize = 12;
/// The same, where they are computed by tiles.
pub(super) const MOST: usize = 16;
/// Positions and dimensions of a vector.
pub(super) const WIDTH: usize = 16;
/// Keys and values are asked for as many bytes of each dimension before they are used: some ten thousand in all, as
/// memory's latency wants it.
const AHEAD: usize = 128;

/// Dimensions of a query that lie together: a piece.
const PIECE: usize = 256;

/// A thread's memory for one unit.
#[derive(Default)]
pub(super) struct Scratch {
    /// Scaled queries, `[piece][query][PIECE]`: neighbours lie as far apart whatever the dimension is, so that kernels find all
    /// of a batch from one address.
    queries: Vec<f32>,
    /// Per query its state so far: largest score, sum of weights, weighted sum of values.
    states: Vec<f32>,
    /// The same, of the current chunk.
    pub current: Vec<f32>,
    /// Scores, then weights, `[query][CHUNK]`.
    pub weights: Vec<f32>,
    /// Numbers of a state.
    pub state: usize,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub integers: super::integers::Memory,
}

impl Scratch {
    /// Gets ready for a unit.
    pub fn begin<E: Element>(&mut self, isa: Isa, problem: &Problem<'_, E>, unit: &Unit) {
        let (dim, count) = (problem.shape.head_dim, problem.queries(unit));
        self.state = problem.shape.value_dim() + 2;
        self.states.resize(count * self.state, 0.0);
        self.states.chunks_exact_mut(self.state).for_each(clear);
        self.current.resize(MOST * self.state, 0.0);
        self.weights.resize(MOST * CHUNK, 0.0);
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if super::integers::suits::<E>(isa, problem.shape) {
            return super::integers::begin(problem, unit, &mut self.integers);
        }
        let _ = isa;
        self.queries.resize(dim.div_ceil(PIECE) * count * PIECE, 0.0);
        for query in 0..count {
            let place = problem.place(unit, query);
            for (piece, from) in problem.q[place..place + dim].chunks(PIECE).enumerate() {
                let to = &mut self.queries[(piece * count + query) * PIECE..];
                to.iter_mut().zip(from).for_each(|(to, q)| *to = q * problem.spec.scale);
            }
        }
    }

    /// Adds the current states of queries, the first of which is `first`, to their states: of those that attend to some position.
    #[inline(always)]
    pub fn join<L: Lanes>(&mut self, spans: &[Range<usize>], first: usize) {
        for (q, _) in spans.iter().enumerate().filter(|(_, span)| !span.is_empty()) {
            let state = &mut self.states[(first + q) * self.state..][..self.state];
            join_body::<L>(state, &self.current[q * self.state..][..self.state]);
        }
    }

    /// The states of all the unit's queries, one after another.
    pub fn states(&self) -> &[f32] {
        &self.states
    }

    /// State of a query: largest score, sum of weights, weighted sum of values.
    pub fn state(&self, query: usize) -> &[f32] {
        &self.states[query * self.state..][..self.state]
    }
}

/// The state of a query that has seen no position.
pub(super) fn clear(state: &mut [f32]) {
    state.fill(0.0);
    state[0] = f32::NEG_INFINITY;
}

on_isa!(
    /// Adds what `part` has seen to `state`.
    pub(super) fn join(state: &mut [f32], part: &[f32]) = join_body
);

#[inline(always)]
fn join_body<L: Lanes>(state: &mut [f32], part: &[f32]) {
    let largest = state[0].max(part[0]);
    if largest == f32::NEG_INFINITY {
        return;
    }
    // Of the two factors one is 1, so the first part joined to an empty state is taken over as it is.
    let factors = L::from_array(&std::array::from_fn(|i| match i {
        0 => state[0] - largest,
        1 => part[0] - largest,
        _ => 0.0,
    }))
    .exp()
    .to_array();
    let (old, new) = (L::splat(factors[0]), L::splat(factors[1]));
    state[0] = largest;
    state[1] = state[1] * factors[0] + part[1] * factors[1];
    for (state, part) in state[2..].chunks_exact_mut(WIDTH).zip(part[2..].chunks_exact(WIDTH)) {
        // SAFETY: both are 16 values.
        unsafe {
            let kept = L::load(state.as_ptr()).mul(old);
            L::load(part.as_ptr()).mul_add(new, kept).store(state.as_mut_ptr());
        }
    }
}

/// From the first to the last position of all spans, if there are some.
#[inline(always)]
pub(super) fn covering(spans: impl Iterator<Item = Range<usize>>) -> Option<Range<usize>> {
    spans.filter(|span| !span.is_empty()).reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
}

/// The vectors that hold a span's positions.
#[inline(always)]
pub(super) fn vectors_of(span: &Range<usize>) -> Range<usize> {
    if span.is_empty() { 0..0 } else { span.start / WIDTH..span.end.div_ceil(WIDTH) }
}

/// Adds the positions of chunk `chunk` to the states of a unit's queries. This thread's next unit is `next`.
pub(super) fn run_chunk<E: Element>(
    isa: Isa,
    problem: &Problem<'_, E>,
    unit: &Unit,
    next: Option<&Unit>,
    chunk: usize,
    scratch: &mut Scratch,
) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if super::integers::suits::<E>(isa, problem.shape) {
        return super::integers::run_chunk(problem, unit, next, chunk, scratch);
    }
    floats(isa, problem, unit, next, chunk, scratch);
}

on_isa!(
    /// See [`run_chunk`].
    fn floats<E: Element>(
        problem: &Problem<'_, E>,
        unit: &Unit,
        next: Option<&Unit>,
        chunk: usize,
        scratch: &mut Scratch,
    ) = floats_body
);

#[inline(always)]
fn floats_body<L: Lanes, E: Element>(
    problem: &Problem<'_, E>,
    unit: &Unit,
    next: Option<&Unit>,
    chunk: usize,
    scratch: &mut Scratch,
) {
    let count = problem.queries(unit);
    let mut first = 0;
    while first < count {
        let batch = batch::<L>(count - first);
        match batch {
            1 => run_batch::<L, E, 1>(problem, unit, next, chunk, first, scratch),
            2 => run_batch::<L, E, 2>(problem, unit, next, chunk, first, scratch),
            3 => run_batch::<L, E, 3>(problem, unit, next, chunk, first, scratch),
            4 => run_batch::<L, E, 4>(problem, unit, next, chunk, first, scratch),
            5 => run_batch::<L, E, 5>(problem, unit, next, chunk, first, scratch),
            6 => run_batch::<L, E, 6>(problem, unit, next, chunk, first, scratch),
            8 => run_batch::<L, E, 8>(problem, unit, next, chunk, first, scratch),
            _ => run_batch::<L, E, QUERIES>(problem, unit, next, chunk, first, scratch),
        }
        first += batch;
    }
}

/// How many of `left` queries are computed together.
#[inline(always)]
fn batch<L: Lanes>(left: usize) -> usize {
    match (L::REGISTERS >= 32, left) {
        (true, 24.. | 12) => QUERIES,
        // Even batches: 14 queries are better split 8 + 6 than 12 + 2.
        (true, 13..24 | 8) => 8,
        (true, 7..) => left.div_ceil(2),
        (true, _) => left,
        // As many as share what it takes to widen a vector of keys or values, and leave registers for it.
        (false, _) => left.min(6),
    }
}

#[inline(always)]
fn run_batch<L: Lanes, E: Element, const Q: usize>(
    problem: &Problem<'_, E>,
    unit: &Unit,
    next: Option<&Unit>,
    chunk: usize,
    first: usize,
    scratch: &mut Scratch,
) {
    // Positions that each query attends to, and all of them together; counted from the chunk's start.
    let spans: [Range<usize>; Q] = std::array::from_fn(|q| problem.span_in(unit, chunk, first + q));
    let Some(all) = covering(spans.iter().cloned()) else { return };
    let whole = vectors_of(&all);
    let pages = Pages::new(problem, unit, chunk, &whole, first == 0, next);

    // Two vectors of positions at a time, so that additions need not wait for each other; with many queries they do not.
    let pairs = L::REGISTERS >= 32 || Q <= 3;
    let queries = (&scratch.queries[first * PIECE..], problem.queries(unit) * PIECE);
    let mut v = whole.start;
    while v < whole.end {
        // SAFETY: vectors `v` and `v + 1` hold positions that `Rows::check` found blocks for.
        unsafe {
            if pairs && v + 1 < whole.end {
                scores::<L, E, Q, 2>(&pages, queries, &mut scratch.weights, v);
                v += 2;
            } else {
                scores::<L, E, Q, 1>(&pages, queries, &mut scratch.weights, v);
                v += 1;
            }
        }
    }
    let Scratch { weights, current, state, .. } = scratch;
    largest_scores::<L>(weights, current, *state, &spans, &whole, problem.spec.softcap);
    for (q, span) in spans.iter().enumerate() {
        let weights = &mut scratch.weights[q * CHUNK..][..CHUNK];
        let current = &mut scratch.current[q * scratch.state..][..2];
        current[1] = weigh::<L>(weights, span, current[0], |v, weight| {
            // SAFETY: as above.
            if E::SCALE > 0 { weight.mul(unsafe { L::load(pages.value_scales(v)) }) } else { weight }
        });
    }
    let slab = match (L::REGISTERS >= 32, Q) {
        (true, ..=6) => 4,
        (true, _) | (false, ..=3) => 2,
        (false, _) => 1,
    };
    let vectors = problem.shape.value_dim() / WIDTH;
    for at in (0..vectors).step_by(slab) {
        // SAFETY: as above, and the slab's vectors are within a value.
        unsafe {
            match slab.min(vectors - at) {
                1 => values::<L, E, Q, 1>(&pages, all.clone(), at, scratch),
                2 => values::<L, E, Q, 2>(&pages, all.clone(), at, scratch),
                3 => values::<L, E, Q, 3>(&pages, all.clone(), at, scratch),
                _ => values::<L, E, Q, 4>(&pages, all.clone(), at, scratch),
            }
        }
    }
    scratch.join::<L>(&spans, first);
}

/// Finds the positions of a chunk in the cache.
pub(super) struct Pages<'a, E> {
    pub problem: &'a Problem<'a, E>,
    table: &'a [u32],
    kv_head: usize,
    chunk: usize,
    /// Vectors of positions that are used.
    pub whole: &'a Range<usize>,
    /// Whether the chunk is read for the first time, and so comes from memory.
    fetch: bool,
    /// Whether it is the first of its unit, and so nothing was asked for ahead of it.
    begins: bool,
    /// What this thread does next.
    next: Option<&'a Unit>,
}

impl<E> Problem<'_, E> {
    fn table(&self, unit: &Unit) -> &[u32] {
        self.rows.tables[self.rows.sequences[unit.rows.start] as usize]
    }
}

impl<'a, E: Element> Pages<'a, E> {
    /// The vectors `whole` of a unit's chunk; whether they are read for the first time; and the thread's next unit.
    #[inline(always)]
    pub fn new(
        problem: &'a Problem<'a, E>,
        unit: &Unit,
        chunk: usize,
        whole: &'a Range<usize>,
        fetch: bool,
        next: Option<&'a Unit>,
    ) -> Self {
        let begins = fetch && chunk == unit.chunks.start;
        let table = problem.table(unit);
        Pages { problem, table, kv_head: unit.kv_head, chunk, whole, fetch, begins, next }
    }

    /// Block and place in it of the first position of vector `v`.
    #[inline(always)]
    fn find(&self, v: usize) -> (usize, usize) {
        let position = self.chunk * CHUNK + v * WIDTH;
        (self.table[position / self.problem.shape.block] as usize, position % self.problem.shape.block)
    }

    /// Keys of the 16 positions of vector `v`; dimensions are a block's positions apart.
    #[inline(always)]
    pub fn keys(&self, v: usize) -> *const E {
        let (block, place) = self.find(v);
        let shape = self.problem.shape;
        let at = (block * shape.heads + self.kv_head) * shape.key_head::<E>() + place;
        self.problem.keys[at..].as_ptr()
    }

    /// Scales of the keys of vector `v`, if they have some.
    #[inline(always)]
    pub fn key_scales(&self, v: usize) -> *const f32 {
        let (block, place) = self.find(v);
        let shape = self.problem.shape;
        let head = (block * shape.heads + self.kv_head) * shape.key_head::<E>();
        let at = head + shape.head_dim * shape.block + E::SCALE * place;
        self.problem.keys.as_ptr().wrapping_add(at).cast()
    }

    /// Scales of the values of vector `v`, if they have some.
    #[inline(always)]
    pub fn value_scales(&self, v: usize) -> *const f32 {
        let (block, place) = self.find(v);
        let shape = self.problem.shape;
        let head = (block * shape.heads + self.kv_head) * shape.value_head::<E>();
        let at = head + shape.value_dim() * shape.block + E::SCALE * place;
        self.problem.values.as_ptr().wrapping_add(at).cast()
    }

    /// What to ask for while using the `step`th vector of this chunk, keys first, then values: the memory of the vector
    /// [`AHEAD`] of it, from the next chunk's or the next unit's keys in the end. `instead` where there is nothing to ask for.
    #[inline(always)]
    fn ahead(&self, step: usize, instead: *const E) -> *const E {
        let (shape, count) = (self.problem.shape, self.whole.len());
        let step = step + AHEAD / (WIDTH * size_of::<E>());
        let v = self.whole.start + step % count + step / (2 * count) * CHUNK / WIDTH;
        let end = self.table.len() * shape.block / WIDTH - self.chunk * CHUNK / WIDTH;
        if !self.fetch {
            instead
        } else if step / count == 1 && v < end {
            self.value_memory(v)
        } else if v < end {
            self.key_memory(self.table, self.kv_head, self.chunk * CHUNK + v * WIDTH)
        } else if let Some(next) = self.next {
            let position = next.chunks.start * CHUNK + (step % count) * WIDTH;
            let table = self.problem.table(next);
            if position < table.len() * shape.block {
                self.key_memory(table, next.kv_head, position)
            } else {
                instead
            }
        } else {
            instead
        }
    }

    /// [`ahead`](Self::ahead) of the keys, `keys`, of `V` vectors from `v` on. The scales there, which lie behind the last
    /// dimension, are asked for.
    #[inline(always)]
    pub fn ahead_of_keys<L: Lanes, const V: usize>(&self, v: usize, keys: *const E) -> *const E {
        let step = v - self.whole.start;
        if E::SCALE > 0 && self.begins && step < AHEAD / (WIDTH * size_of::<E>()) {
            for i in 0..V {
                L::prefetch(self.key_scales(v + i));
            }
        }
        let next = self.ahead(step, keys);
        for line in (0..V * WIDTH * E::SCALE * size_of::<E>()).step_by(64) {
            let at = V * WIDTH * self.problem.shape.head_dim * size_of::<E>() + line;
            L::prefetch(next.cast::<u8>().wrapping_add(at));
        }
        next
    }

    /// The same for the values, `values`, of vector `v`, whose scales are asked for the first time only.
    #[inline(always)]
    pub fn ahead_of_values<L: Lanes>(&self, v: usize, values: *const E, is_first: bool) -> *const E {
        let next = self.ahead(self.whole.len() + v - self.whole.start, values);
        if is_first {
            for line in (0..WIDTH * E::SCALE * size_of::<E>()).step_by(64) {
                let at = WIDTH * self.problem.shape.value_dim() * size_of::<E>() + line;
                L::prefetch(next.cast::<u8>().wrapping_add(at));
            }
        }
        next
    }

    /// A block's keys and their scales lie together; each vector of positions counts for an equal share of them.
    #[inline(always)]
    fn key_memory(&self, table: &[u32], kv_head: usize, position: usize) -> *const E {
        let shape = self.problem.shape;
        let (block, place) = (table[position / shape.block] as usize, position % shape.block);
        let head = (block * shape.heads + kv_head) * shape.key_head::<E>();
        self.problem.keys[head + place * (shape.head_dim + E::SCALE)..].as_ptr()
    }

    /// The same for the values of vector `v`.
    #[inline(always)]
    fn value_memory(&self, v: usize) -> *const E {
        let (block, place) = self.find(v);
        let shape = self.problem.shape;
        let head = (block * shape.heads + self.kv_head) * shape.value_head::<E>();
        self.problem.values[head + place * (shape.value_dim() + E::SCALE)..].as_ptr()
    }

    /// Values of the 16 positions of vector `v`, one after the other.
    #[inline(always)]
    pub fn values(&self, v: usize) -> *const E {
        let (block, place) = self.find(v);
        let shape = self.problem.shape;
        let at = (block * shape.heads + self.kv_head) * shape.value_head::<E>() + place * shape.value_dim();
        self.problem.values[at..].as_ptr()
    }
}

/// Scores of `Q` queries with `V` vectors of positions from vector `v` on. Pieces of the queries are `apart`.
///
/// # Safety
/// The vectors' positions are in the cache, and the queries in all pieces.
#[inline(always)]
unsafe fn scores<L: Lanes, E: Element, const Q: usize, const V: usize>(
    pages: &Pages<'_, E>,
    (queries, apart): (&[f32], usize),
    out: &mut [f32],
    v: usize,
) {
    let dim = pages.problem.shape.head_dim;
    let keys: [*const E; V] = std::array::from_fn(|i| pages.keys(v + i));
    let next = pages.ahead_of_keys::<L, V>(v, keys[0]);
    let mut sums = [[L::splat(0.0); V]; Q];
    for piece in 0..dim.div_ceil(PIECE) {
        let queries = &queries[piece * apart..];
        for d in piece * PIECE..dim.min((piece + 1) * PIECE) {
            for line in (0..V * WIDTH * size_of::<E>()).step_by(64) {
                L::prefetch(next.cast::<u8>().wrapping_add(d * V * WIDTH * size_of::<E>() + line));
            }
            // SAFETY: the caller's promise.
            unsafe {
                for i in 0..V {
                    let key: L = E::load(keys[i].add(d * pages.problem.shape.block));
                    let queries = L::again(queries.as_ptr().add(d % PIECE));
                    for (q, sums) in sums.iter_mut().enumerate() {
                        sums[i] = key.mul_add(L::splat(queries.add(q * PIECE).read()), sums[i]);
                    }
                }
            }
        }
    }
    for i in 0..V {
        // SAFETY: the caller's promise; scales are used only where there are some.
        let scale = if E::SCALE > 0 { unsafe { L::load(pages.key_scales(v + i)) } } else { L::splat(1.0) };
        for (q, sums) in sums.iter().enumerate() {
            let at = q * CHUNK + (v + i) * WIDTH;
            let score = if E::SCALE > 0 { sums[i].mul(scale) } else { sums[i] };
            // SAFETY: 16 values.
            unsafe { score.store(out[at..at + WIDTH].as_mut_ptr()) }
        }
    }
}

/// [`largest_score`] of each of the queries, to its current state: of all of them before anything else, so that one does not wait for
/// another. States are `state` numbers.
#[inline(always)]
pub(super) fn largest_scores<L: Lanes>(
    scores: &mut [f32],
    current: &mut [f32],
    state: usize,
    spans: &[Range<usize>],
    whole: &Range<usize>,
    softcap: Option<f32>,
) {
    for (q, span) in spans.iter().enumerate() {
        current[q * state] = largest_score::<L>(&mut scores[q * CHUNK..][..CHUNK], span, whole, softcap);
    }
}

/// Gets a query's scores at `span` ready for [`weigh`], puts zeros everywhere else in the vectors `whole`, and returns the largest
/// score.
#[inline(always)]
fn largest_score<L: Lanes>(
    scores: &mut [f32],
    span: &Range<usize>,
    whole: &Range<usize>,
    softcap: Option<f32>,
) -> f32 {
    let own = vectors_of(span);
    for v in whole.clone().filter(|v| !own.contains(v)) {
        scores[v * WIDTH..][..WIDTH].fill(0.0);
    }
    if own.is_empty() {
        return f32::NEG_INFINITY;
    }
    if let Some(cap) = softcap {
        for scores in scores[own.start * WIDTH..own.end * WIDTH].chunks_exact_mut(WIDTH) {
            // SAFETY: 16 values.
            unsafe { cap_scores(L::load(scores.as_ptr()), cap).store(scores.as_mut_ptr()) };
        }
    }
    scores[own.start * WIDTH..span.start].fill(f32::NEG_INFINITY);
    scores[span.end..own.end * WIDTH].fill(f32::NEG_INFINITY);
    let mut largest = L::splat(f32::NEG_INFINITY);
    for scores in scores[own.start * WIDTH..own.end * WIDTH].chunks_exact(WIDTH) {
        // SAFETY: as above.
        largest = unsafe { L::load(scores.as_ptr()) }.max(largest);
    }
    largest.largest()
}

/// Turns a query's scores at `span`, of which `largest` is the largest, into weights, and keeps what `applied` makes of these.
/// Returns their sum.
#[inline(always)]
pub(super) fn weigh<L: Lanes>(
    scores: &mut [f32],
    span: &Range<usize>,
    largest: f32,
    mut applied: impl FnMut(usize, L) -> L,
) -> f32 {
    let own = vectors_of(span);
    let scores = &mut scores[own.start * WIDTH..own.end * WIDTH];
    let mut sum = L::splat(0.0);
    for (v, scores) in own.zip(scores.chunks_exact_mut(WIDTH)) {
        // SAFETY: 16 values.
        unsafe {
            let weight = L::load(scores.as_ptr()).sub(L::splat(largest)).exp();
            sum = sum.add(weight);
            applied(v, weight).store(scores.as_mut_ptr());
        }
    }
    sum.sum()
}

/// `cap * tanh(score / cap)`.
#[inline(always)]
fn cap_scores<L: Lanes>(score: L, cap: f32) -> L {
    // tanh(x) = 1 - 2 / (e^2x + 1)
    let e = score.mul(L::splat(2.0 / cap)).exp();
    let tanh = L::splat(1.0).sub(L::splat(2.0).div(e.add(L::splat(1.0))));
    tanh.mul(L::splat(cap))
}

/// Sums of values, weighted, for `S` vectors of dimensions from vector `at` on, into the current states.
///
/// # Safety
/// The vectors are within a value; the chunk's positions `span` are in the cache.
#[inline(always)]
unsafe fn values<L: Lanes, E: Element, const Q: usize, const S: usize>(
    pages: &Pages<'_, E>,
    span: Range<usize>,
    at: usize,
    scratch: &mut Scratch,
) {
    let dim = pages.problem.shape.value_dim();
    let weights = &scratch.weights[..Q * CHUNK];
    let mut sums = [[L::splat(0.0); S]; Q];
    let mut position = span.start;
    while position < span.end {
        let v = position / WIDTH;
        let end = span.end.min((v + 1) * WIDTH);
        let base = pages.values(v);
        let next = pages.ahead_of_values::<L>(v, base, at == 0);
        for p in position..end {
            if at == 0 {
                for line in (0..dim * size_of::<E>()).step_by(64) {
                    L::prefetch(
                        next.cast::<u8>().wrapping_add((p - v * WIDTH) * dim * size_of::<E>() + line),
                    );
                }
            }
            // SAFETY: the caller's promise; weights are `Q * CHUNK`, and `p < CHUNK`.
            unsafe {
                let from = base.add((p - v * WIDTH) * dim + at * WIDTH);
                for i in 0..S {
                    let value: L = E::load(from.add(i * WIDTH));
                    let weights = L::again(weights.as_ptr().add(p));
                    for (q, sums) in sums.iter_mut().enumerate() {
                        sums[i] = value.mul_add(L::splat(weights.add(q * CHUNK).read()), sums[i]);
                    }
                }
            }
        }
        position = end;
    }
    for (q, sums) in sums.into_iter().enumerate() {
        for (i, sum) in sums.into_iter().enumerate() {
            let to = q * scratch.state + 2 + (at + i) * WIDTH;
            // SAFETY: 16 values.
            unsafe { sum.store(scratch.current[to..to + WIDTH].as_mut_ptr()) }
        }
    }
}
