//! Attention as products of integers, where there are tiles (AMX) and the cache holds 16-bit integers.
//!
//! Queries become such integers, too, each with a scale of its own, and so do the weights of a chunk's values, once these' scales
//! are in them. A product of a query and a key, or of weights and values, is a sum of integers then, of which the lowest 8 bits are
//! dropped. It is exact but for that, so it is the same whether tiles compute it, of 16 queries with 16 positions or dimensions, or
//! dot products of words, which few queries take: a row's result does not depend on its company here, either.
//!
//! With `256 * high + low` for both factors, the high bytes signed and the low ones not, tiles sum up the products of the high
//! bytes, the mixed ones and those of the low bytes. Dot products of words sum up those with the high and with the low bytes of a
//! query or a weight.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::chunk::{CHUNK, MOST, Pages, Scratch, WIDTH, covering, largest_scores, weigh};
use super::{Problem, Unit};
use crate::kernels::cpu::activations::{TILE_ROWS, grow, scale_of};
use crate::kernels::cpu::cache::{Element, KvShape};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::lanes::{Lanes, V512, hidden};
use crate::kernels::cpu::tiles::{Configured, PLANES, TILE_BYTES, clear_sums, store_sums, sums_of_row};

/// So many queries are taken without tiles.
const FEW: usize = 6;
/// Most dimensions whose products' sums are 32-bit integers for certain.
const MOST_DIMENSIONS: usize = 256;
/// Weights are not negative, so they have twice as many integers, and then some: 65,532.
const FINER: f32 = 65_532.0 / 32_512.0;
/// Columns of a line of words: positions of keys, or dimensions of values.
const COLUMNS: usize = 32;
/// Inputs of a tile.
const INPUTS: usize = 64;
/// Vectors of positions that are inputs of a tile.
const VECTORS: usize = INPUTS / WIDTH;
/// Vectors of a chunk.
const CHUNK_VECTORS: usize = CHUNK / WIDTH;

/// Whether attention is computed so.
pub(super) fn suits<E: Element>(isa: Isa, shape: &KvShape) -> bool {
    let dim = shape.head_dim;
    isa == Isa::Amx
        && E::integers(std::ptr::null()).is_some()
        && shape.block.is_multiple_of(COLUMNS)
        && dim.is_multiple_of(4)
        && dim <= MOST_DIMENSIONS
}

/// A row of a tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A thread's memory, beside [`Scratch`]. Planes are those of the high and of the low bytes.
#[derive(Default)]
pub(super) struct Memory {
    /// What 256 times an integer of a query means.
    units: Vec<f32>,
    /// Queries' bytes as words, `[query][plane][dimension]`.
    query_words: Vec<i16>,
    /// Queries in tiles, `[16 queries][64 dimensions][plane]`.
    queries: Vec<Line>,
    /// A chunk's keys in tiles, `[16 positions][64 dimensions][plane]`.
    keys: Vec<Line>,
    /// A chunk's values in tiles, `[64 positions][16 dimensions][plane]`.
    values: Vec<Line>,
    /// Weights of 16 queries in tiles, `[64 positions][plane]`.
    weights: Vec<Line>,
    /// Bytes of few queries' weights as words, `[query][plane][position]`.
    weight_words: Vec<i16>,
    /// Sums from tiles, `[plane]`, of two products in turn.
    staged: Vec<Line>,
    /// Scales of a chunk's keys and values.
    scales: [Vec<f32>; 2],
}

const _: () = assert!(MOST == TILE_ROWS && FEW <= MOST);

/// Lines of a tile of high bytes and one of low bytes.
const PAIR: usize = 2 * TILE_ROWS;

/// Gets ready for a unit.
///
/// # Panics
/// Where this does not suit.
pub(super) fn begin<E: Element>(problem: &Problem<'_, E>, unit: &Unit, memory: &mut Memory) {
    assert!(suits::<E>(Isa::Amx, problem.shape));
    let (dim, count) = (problem.shape.head_dim, problem.queries(unit));
    let line = Line([0; 64]);
    grow(&mut memory.units, count.next_multiple_of(TILE_ROWS), 0.0);
    if count <= FEW {
        grow(&mut memory.query_words, count * 2 * dim.next_multiple_of(WIDTH), 0);
        grow(&mut memory.weight_words, FEW * 2 * CHUNK, 0);
    } else {
        let (steps, dims) = (dim.div_ceil(INPUTS), problem.shape.value_dim() / WIDTH);
        grow(&mut memory.queries, count.div_ceil(TILE_ROWS) * steps * PAIR, line);
        grow(&mut memory.keys, CHUNK_VECTORS * steps * PAIR, line);
        grow(&mut memory.values, CHUNK / INPUTS * dims * PAIR, line);
        grow(&mut memory.weights, CHUNK / INPUTS * PAIR, line);
        grow(&mut memory.staged, 2 * PLANES * TILE_ROWS, line);
        memory.scales.iter_mut().for_each(|scales| grow(scales, CHUNK, 0.0));
    }
    // SAFETY: the instruction set is there, or `suits` would be false.
    unsafe { quantise_queries(problem, unit, memory) }
}

/// # Safety
/// The instruction set is there, and room for the queries.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn quantise_queries<E: Element>(problem: &Problem<'_, E>, unit: &Unit, memory: &mut Memory) {
    let (dim, count) = (problem.shape.head_dim, problem.queries(unit));
    let (steps, words) = (dim.div_ceil(INPUTS), dim.next_multiple_of(WIDTH));
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    for query in 0..count {
        let place = problem.place(unit, query);
        let q = &problem.q[place..place + dim];
        let load = |d: usize| {
            let lanes = u16::MAX >> (WIDTH - (dim - d).min(WIDTH));
            // SAFETY: as many values.
            let q = unsafe { _mm512_maskz_loadu_ps(lanes, q.as_ptr().add(d)) };
            _mm512_mul_ps(q, _mm512_set1_ps(problem.spec.scale))
        };
        let mut largest = _mm512_setzero_si512();
        for d in (0..dim).step_by(WIDTH) {
            largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(load(d)), magnitude));
        }
        let (scale, inverse) = scale_of(f32::from_bits(_mm512_reduce_max_epi32(largest) as u32));
        memory.units[query] = 256.0 * scale;
        for d in (0..dim).step_by(WIDTH) {
            let [high, low] = split(_mm512_mul_ps(load(d), _mm512_set1_ps(inverse)));
            // SAFETY: `begin` made room: 16 values each.
            unsafe {
                if count <= FEW {
                    let to = memory.query_words.as_mut_ptr().add(query * 2 * words + d);
                    _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(high));
                    _mm256_storeu_si256(to.add(words).cast(), _mm512_cvtepi32_epi16(low));
                } else {
                    let tile = (query / TILE_ROWS * steps + d / INPUTS) * PAIR;
                    let to = memory.queries.as_mut_ptr().add(tile + query % TILE_ROWS);
                    put_bytes([high, low], to.cast::<u8>().add(d % INPUTS));
                }
            }
        }
    }
}

/// The nearest integers, of 16 bits, as their high and low bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn split(values: __m512) -> [__m512i; 2] {
    let v = _mm512_cvtps_epi32(values);
    [_mm512_srai_epi32::<8>(v), _mm512_and_si512(v, _mm512_set1_epi32(255))]
}

/// Puts 16 high bytes to `to`, and 16 low ones a tile behind.
///
/// # Safety
/// There is room.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn put_bytes([high, low]: [__m512i; 2], to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128(to.add(TILE_BYTES).cast(), _mm512_cvtepi32_epi8(low));
    }
}

/// Puts a tile's weights of a query to a line: their integers' high bytes, and low ones a tile behind. Fours of positions come as
/// [`place_of_four`] says.
///
/// # Safety
/// The instruction set is there, and room for both.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn put_weights(weights: &[f32], inverse: f32, line: *mut Line) {
    let low_bytes = _mm512_set1_epi16(255);
    let integers = |v: usize| {
        // SAFETY: 16 weights.
        let weight = unsafe { _mm512_loadu_ps(weights[v * WIDTH..][..WIDTH].as_ptr()) };
        _mm512_cvtps_epi32(_mm512_mul_ps(weight, _mm512_set1_ps(inverse)))
    };
    // Words, then bytes of two vectors side by side in each 128 bits.
    let a = _mm512_packus_epi32(integers(0), integers(1));
    let b = _mm512_packus_epi32(integers(2), integers(3));
    let high = _mm512_packus_epi16(_mm512_srli_epi16::<8>(a), _mm512_srli_epi16::<8>(b));
    let low = _mm512_packus_epi16(_mm512_and_si512(a, low_bytes), _mm512_and_si512(b, low_bytes));
    // SAFETY: the caller's promise.
    unsafe {
        _mm512_store_si512(line.cast(), high);
        _mm512_store_si512(line.add(TILE_ROWS).cast(), low);
    }
}

/// Where the `four`th four of a tile's positions lie in a line of [`put_weights`], and so in which row of a tile of values: the second
/// four of the third vector lie where the third of the second would.
const fn place_of_four(four: usize) -> usize {
    four % VECTORS * VECTORS + four / VECTORS
}

/// Adds the positions of chunk `chunk` to the states of a unit's queries. This thread's next unit is `next`.
pub(super) fn run_chunk<E: Element>(
    problem: &Problem<'_, E>,
    unit: &Unit,
    next: Option<&Unit>,
    chunk: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: the instruction set is there, or `begin` would have refused the unit, for which it made room.
    unsafe {
        match problem.queries(unit) {
            1 => few::<E, 1>(problem, unit, next, chunk, scratch),
            2 => few::<E, 2>(problem, unit, next, chunk, scratch),
            3 => few::<E, 3>(problem, unit, next, chunk, scratch),
            4 => few::<E, 4>(problem, unit, next, chunk, scratch),
            5 => few::<E, 5>(problem, unit, next, chunk, scratch),
            FEW => few::<E, FEW>(problem, unit, next, chunk, scratch),
            _ => by_tiles(problem, unit, chunk, scratch),
        }
    }
}

/// The vectors that hold the positions of all spans, as whole lines of words; `None` if there are no positions.
fn lines_of(spans: impl Iterator<Item = Range<usize>>) -> Option<Range<usize>> {
    let all = covering(spans)?;
    Some(all.start / COLUMNS * 2..all.end.div_ceil(COLUMNS) * 2)
}

/// What a query's scores have become.
struct Weighed {
    /// Sum of the weights.
    sum: f32,
    /// With what a weight that a value's scale is in becomes an integer.
    inverse: f32,
    /// What 256 times such an integer means.
    unit: f32,
}

/// Turns a query's scores at `span`, of which `largest` is the largest, into weights with the values' scales in them.
///
/// # Safety
/// The instruction set is there; `span` lies within a chunk, and there are scales of its vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn weigh_values(
    scores: &mut [f32],
    scales: impl Fn(usize) -> *const f32,
    span: &Range<usize>,
    largest: f32,
) -> Weighed {
    let mut heaviest = _mm512_setzero_si512();
    let sum = weigh::<V512>(scores, span, largest, |v, weight| {
        // SAFETY: the caller's promise: 16 scales.
        let scales = unsafe { _mm512_loadu_ps(scales(v)) };
        let weight = if span.start <= v * WIDTH && (v + 1) * WIDTH <= span.end {
            _mm512_mul_ps(weight.0, scales)
        } else {
            let first = span.start.saturating_sub(v * WIDTH);
            let end = (span.end - v * WIDTH).min(WIDTH);
            _mm512_maskz_mul_ps((u16::MAX << first) & (u16::MAX >> (WIDTH - end)), weight.0, scales)
        };
        // As integers, of which one that is not finite is the largest.
        let bits = _mm512_and_si512(_mm512_castps_si512(weight), _mm512_set1_epi32(0x7fff_ffff));
        heaviest = _mm512_max_epi32(heaviest, bits);
        V512(weight)
    });
    let (scale, inverse) = scale_of(f32::from_bits(_mm512_reduce_max_epi32(heaviest) as u32));
    Weighed { sum, inverse: inverse * FINER, unit: scale * (256.0 / FINER) }
}

/// Few queries, with dot products of words.
///
/// # Safety
/// The instruction set is there, and [`begin`] was called for the unit, which has `Q` queries.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn few<E: Element, const Q: usize>(
    problem: &Problem<'_, E>,
    unit: &Unit,
    next: Option<&Unit>,
    chunk: usize,
    scratch: &mut Scratch,
) {
    let spans: [Range<usize>; Q] = std::array::from_fn(|query| problem.span_in(unit, chunk, query));
    let Some(whole) = lines_of(spans.iter().cloned()) else { return };
    let pages = Pages::new(problem, unit, chunk, &whole, true, next);
    // SAFETY: the caller's promise; the cache has blocks for whole lines of words.
    unsafe {
        for v in whole.clone().step_by(2) {
            few_scores::<E, Q>(&pages, v, scratch);
        }
        let Scratch { weights, current, state, .. } = scratch;
        largest_scores::<V512>(weights, current, *state, &spans, &whole, problem.spec.softcap);
        let mut units = [0.0; Q];
        for (query, span) in spans.iter().enumerate() {
            let weights = &mut scratch.weights[query * CHUNK..][..CHUNK];
            let state = &mut scratch.current[query * scratch.state..][..2];
            let words = scratch.integers.weight_words[query * 2 * CHUNK..][..2 * CHUNK].as_mut_ptr();
            let Weighed { sum, inverse, unit } =
                weigh_values(weights, |v| pages.value_scales(v), span, state[0]);
            state[1] = sum;
            units[query] = unit;
            for v in whole.clone() {
                let weight = _mm512_loadu_ps(weights[v * WIDTH..][..WIDTH].as_ptr());
                let [high, low] = split(_mm512_mul_ps(weight, _mm512_set1_ps(inverse)));
                _mm256_storeu_si256(words.add(v * WIDTH).cast(), _mm512_cvtepi32_epi16(high));
                _mm256_storeu_si256(words.add(CHUNK + v * WIDTH).cast(), _mm512_cvtepi32_epi16(low));
            }
        }
        let groups = problem.shape.value_dim().div_ceil(COLUMNS);
        let mut group = 0;
        while group < groups {
            if Q <= 3 && group + 1 < groups {
                few_values::<E, Q, 2>(&pages, group, &units, scratch);
                group += 2;
            } else {
                few_values::<E, Q, 1>(&pages, group, &units, scratch);
                group += 1;
            }
        }
    }
    scratch.join::<V512>(&spans, 0);
}

/// Words of two lines in turn, of the first and of the second four columns of each eight.
///
/// # Safety
/// 32 words at each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn in_turn(a: *const i16, b: *const i16) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast())) };
    [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)]
}

/// The first and the second 16 columns of what [`in_turn`] has mixed.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order([first, second]: [__m512i; 2]) -> [__m512i; 2] {
    let lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    let upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    [_mm512_permutex2var_epi64(first, lower, second), _mm512_permutex2var_epi64(first, upper, second)]
}

/// Adds the products of two lines' words with two words each of high and of low bytes.
///
/// # Safety
/// Two words at `high` and at `low`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_products(sums: &mut [[__m512i; 2]; 2], words: [__m512i; 2], high: *const i16, low: *const i16) {
    // SAFETY: the caller's promise.
    let (high, low) = unsafe { (high.cast::<i32>().read_unaligned(), low.cast::<i32>().read_unaligned()) };
    for (sums, words) in sums.iter_mut().zip(words) {
        sums[0] = _mm512_dpwssd_epi32(sums[0], words, _mm512_set1_epi32(high));
        sums[1] = _mm512_dpwssd_epi32(sums[1], words, _mm512_set1_epi32(low));
    }
}

/// Sums of products with high and with low bytes, joined, less their lowest 8 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn joined(sums: [[__m512i; 2]; 2]) -> [__m512i; 2] {
    let [a, b] = sums;
    let join = |[high, low]: [__m512i; 2]| _mm512_add_epi32(high, _mm512_srai_epi32::<8>(low));
    in_order([join(a), join(b)])
}

/// What sums, less their lowest 8 bits, mean, times `scales`.
#[inline]
#[target_feature(enable = "avx512f")]
fn scores_of(sums: __m512i, unit: f32, scales: __m512) -> __m512 {
    _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(unit)), scales)
}

/// Scores of `Q` queries with the vectors of positions `v` and `v + 1`.
///
/// # Safety
/// As for [`few`]; both lie in one line of words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn few_scores<E: Element, const Q: usize>(pages: &Pages<'_, E>, v: usize, scratch: &mut Scratch) {
    let (dim, block) = (pages.problem.shape.head_dim, pages.problem.shape.block);
    let keys = pages.keys(v);
    let next = pages.ahead_of_keys::<V512, 2>(v, keys);
    let words = dim.next_multiple_of(WIDTH);
    let mut sums = [[[_mm512_setzero_si512(); 2]; 2]; Q];
    for d in (0..dim).step_by(2) {
        for line in [d, d + 1] {
            V512::prefetch(next.wrapping_add(line * COLUMNS));
        }
        // SAFETY: the caller's promise; there are words for all dimensions.
        unsafe {
            let keys = E::integers(keys).expect("integers").add(d * block);
            let keys = in_turn(keys, keys.add(block));
            let queries = hidden(scratch.integers.query_words.as_ptr().add(d));
            for (q, sums) in sums.iter_mut().enumerate() {
                let query = queries.add(q * 2 * words);
                add_products(sums, keys, query, query.add(words));
            }
        }
    }
    for (q, sums) in sums.into_iter().enumerate() {
        for (i, sums) in joined(sums).into_iter().enumerate() {
            let at = q * CHUNK + (v + i) * WIDTH;
            // SAFETY: 16 scales and 16 scores.
            unsafe {
                let scales = _mm512_loadu_ps(pages.key_scales(v + i));
                let scores = scores_of(sums, scratch.integers.units[q], scales);
                _mm512_storeu_ps(scratch.weights[at..at + WIDTH].as_mut_ptr(), scores);
            }
        }
    }
}

/// Sums of values, weighted, for `G` groups of 32 dimensions, into the current states.
///
/// # Safety
/// As for [`few`]; weights are there, which mean `units`, and so are the groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn few_values<E: Element, const Q: usize, const G: usize>(
    pages: &Pages<'_, E>,
    group: usize,
    units: &[f32; Q],
    scratch: &mut Scratch,
) {
    let dim = pages.problem.shape.value_dim();
    let mut sums = [[[[_mm512_setzero_si512(); 2]; 2]; G]; Q];
    for v in pages.whole.clone() {
        let values = pages.values(v);
        let next = pages.ahead_of_values::<V512>(v, values, group == 0);
        for p in (0..WIDTH).step_by(2) {
            if group == 0 {
                for line in (0..2 * dim).step_by(COLUMNS) {
                    V512::prefetch(next.wrapping_add(p * dim + line));
                }
            }
            // SAFETY: the caller's promise. A last group of 16 dimensions is followed by other numbers of its head.
            unsafe {
                let weights = hidden(scratch.integers.weight_words.as_ptr().add(v * WIDTH + p));
                for g in 0..G {
                    let values = E::integers(values).expect("integers").add(p * dim + (group + g) * COLUMNS);
                    let values = in_turn(values, values.add(dim));
                    for (q, sums) in sums.iter_mut().enumerate() {
                        let weight = weights.add(q * 2 * CHUNK);
                        add_products(&mut sums[g], values, weight, weight.add(CHUNK));
                    }
                }
            }
        }
    }
    for (q, sums) in sums.into_iter().enumerate() {
        for (g, sums) in sums.into_iter().enumerate() {
            for (i, sums) in joined(sums).into_iter().enumerate() {
                let at = (group + g) * COLUMNS + i * WIDTH;
                if at < dim {
                    let to = &mut scratch.current[q * scratch.state + 2 + at..][..WIDTH];
                    let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(units[q]));
                    // SAFETY: 16 values.
                    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), sums) }
                }
            }
        }
    }
}

/// Puts lines of words, each `stride` from the one before, into tiles: four lines' bytes of a column lie together, 16 columns side
/// by side, high bytes in one tile, low ones in the next. `tiles` are those of the first and of the second 16 columns, of which `ROWS`
/// rows are filled, with zeros where there are no lines; the `four`th is row `place(four)`.
///
/// # Safety
/// The instruction set is there; `count` lines of 32 words, a multiple of four, and room for two tiles at each of `tiles`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn put_in_tiles<const ROWS: usize>(
    lines: *const i16,
    stride: usize,
    count: usize,
    tiles: [Option<*mut Line>; 2],
    place: impl Fn(usize) -> usize,
) {
    let by_plane = _mm512_set4_epi32(0x0f0d_0e0c, 0x0b09_0a08, 0x0705_0604, 0x0301_0200);
    let lower = _mm512_set1_epi32(0xffff);
    for four in 0..ROWS {
        let mut planes = [[_mm512_setzero_si512(); 2]; 2];
        if 4 * four < count {
            // SAFETY: the caller's promise.
            let (first, second) = unsafe {
                let line = |i: usize| lines.add((4 * four + i) * stride);
                (in_turn(line(0), line(1)), in_turn(line(2), line(3)))
            };
            let (mut highs, mut lows) = ([_mm512_setzero_si512(); 2], [_mm512_setzero_si512(); 2]);
            for half in 0..2 {
                // Two low bytes, then two high ones.
                let a = _mm512_shuffle_epi8(first[half], by_plane);
                let b = _mm512_shuffle_epi8(second[half], by_plane);
                // a & mask | b & !mask
                highs[half] = _mm512_ternarylogic_epi32::<0xca>(lower, _mm512_srli_epi32::<16>(a), b);
                lows[half] = _mm512_ternarylogic_epi32::<0xca>(lower, a, _mm512_slli_epi32::<16>(b));
            }
            planes = [in_order(highs), in_order(lows)];
        }
        for (i, to) in tiles.into_iter().enumerate() {
            let Some(to) = to else { continue };
            for (plane, bytes) in planes.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { _mm512_store_si512(to.add(plane * TILE_ROWS + place(four)).cast(), bytes[i]) }
            }
        }
    }
}

/// Loads a pair of tiles of queries or weights.
///
/// # Safety
/// The tiles are configured, and there is such a pair.
#[inline(always)]
unsafe fn load(rows: *const Line) {
    // SAFETY: the caller's promise. No other code uses the tiles' registers.
    unsafe {
        asm!(
            "tileloadd tmm4, [{rows} + {line}]",
            "tileloadd tmm5, [{rows} + {line} + 1024]",
            rows = in(reg) rows,
            line = in(reg) 64usize,
            options(nostack, readonly, preserves_flags),
        )
    }
}

/// Adds the products of what is loaded, of which the high bytes are signed or not, with a pair of tiles of keys or values to the
/// sums.
///
/// # Safety
/// The tiles are configured, and there is such a pair.
#[inline(always)]
unsafe fn multiply<const SIGNED: bool>(columns: *const Line) {
    macro_rules! multiply {
        ($high:literal, $mixed:literal) => {
            asm!(
                // The two that add to the same tile as far apart as can be.
                "tileloadd tmm7, [{columns} + {line} + 1024]",
                concat!($mixed, " tmm1, tmm4, tmm7"),
                "tileloadd tmm6, [{columns} + {line}]",
                concat!($high, " tmm0, tmm4, tmm6"),
                "tdpbuud tmm2, tmm5, tmm7",
                "tdpbusd tmm1, tmm5, tmm6",
                columns = in(reg) columns,
                line = in(reg) 64usize,
                options(nostack, readonly, preserves_flags),
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match SIGNED {
            true => multiply!("tdpbssd", "tdpbsud"),
            false => multiply!("tdpbusd", "tdpbuud"),
        }
    }
}

/// Many queries, by tiles.
///
/// # Safety
/// The instruction set is there, and [`begin`] was called for the unit.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn by_tiles<E: Element>(problem: &Problem<'_, E>, unit: &Unit, chunk: usize, scratch: &mut Scratch) {
    let count = problem.queries(unit);
    let spans = (0..count).map(|query| problem.span_in(unit, chunk, query));
    let Some(whole) = lines_of(spans) else { return };
    // SAFETY: the caller's promise.
    unsafe {
        fill(problem, unit, chunk, whole, &mut scratch.integers);
        let _in_use = Configured::new(INPUTS as u8, 4);
        for first in (0..count).step_by(TILE_ROWS) {
            sixteen(problem, unit, chunk, first..count.min(first + TILE_ROWS), scratch);
        }
    }
}

/// Puts a chunk's keys and values into tiles.
///
/// # Safety
/// As for [`by_tiles`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn fill<E: Element>(
    problem: &Problem<'_, E>,
    unit: &Unit,
    chunk: usize,
    whole: Range<usize>,
    memory: &mut Memory,
) {
    let pages = Pages::new(problem, unit, chunk, &whole, false, None);
    let (dim, block, value_dim) = (problem.shape.head_dim, problem.shape.block, problem.shape.value_dim());
    let (steps, dims) = (dim.div_ceil(INPUTS), value_dim / WIDTH);
    let (key_tiles, value_tiles) = (memory.keys.as_mut_ptr(), memory.values.as_mut_ptr());
    // SAFETY: `begin` made room; the cache has blocks for whole lines of words.
    unsafe {
        for v in whole.clone() {
            for (to, from) in memory.scales.iter_mut().zip([pages.key_scales(v), pages.value_scales(v)]) {
                _mm512_storeu_ps(to[v * WIDTH..][..WIDTH].as_mut_ptr(), _mm512_loadu_ps(from));
            }
        }
        for v in whole.clone().step_by(2) {
            let keys = E::integers(pages.keys(v)).expect("integers");
            for step in 0..steps {
                let tile = |v: usize| Some(key_tiles.add((v * steps + step) * PAIR));
                let first = step * INPUTS;
                let tiles = [tile(v), tile(v + 1)];
                let count = (dim - first).min(INPUTS);
                put_in_tiles::<TILE_ROWS>(keys.add(first * block), block, count, tiles, |four| four);
            }
        }
        // Blocks may be of 32 positions: half a tile.
        for v in whole.clone().step_by(2) {
            let values = E::integers(pages.values(v)).expect("integers");
            let place = |four: usize| place_of_four(v % VECTORS * (WIDTH / 4) + four);
            for at in (0..dims).step_by(2) {
                let tile = |at: usize| (at < dims).then(|| value_tiles.add((v / VECTORS * dims + at) * PAIR));
                let (from, tiles) = (values.add(at * WIDTH), [tile(at), tile(at + 1)]);
                put_in_tiles::<{ TILE_ROWS / 2 }>(from, value_dim, COLUMNS, tiles, place);
            }
        }
    }
}

/// Up to 16 queries with a chunk that is in tiles.
///
/// # Safety
/// As for [`by_tiles`]; the tiles are configured.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sixteen<E: Element>(
    problem: &Problem<'_, E>,
    unit: &Unit,
    chunk: usize,
    queries: Range<usize>,
    scratch: &mut Scratch,
) {
    let (steps, dims) = (problem.shape.head_dim.div_ceil(INPUTS), problem.shape.value_dim() / WIDTH);
    let (first, count) = (queries.start, queries.len());
    let mut spans = [const { 0..0 }; TILE_ROWS];
    for (query, span) in queries.zip(&mut spans) {
        *span = problem.span_in(unit, chunk, query);
    }
    let spans = &spans[..count];
    let Some(whole) = lines_of(spans.iter().cloned()) else { return };
    let Scratch { weights, current, integers, state, .. } = &mut *scratch;
    let staged = integers.staged.as_mut_ptr().cast::<u8>();
    let staged = [staged, staged.wrapping_add(PLANES * TILE_BYTES)];
    // SAFETY: the caller's promise; `begin` made room, for whole tiles of queries.
    unsafe {
        // Sums of one product are added up while the next is computed.
        let (scores, units) = (weights.as_mut_ptr(), integers.units.as_ptr().add(first));
        let put_scores = |v: usize| {
            let scales = _mm512_loadu_ps(integers.scales[0][v * WIDTH..][..WIDTH].as_ptr());
            for q in 0..TILE_ROWS {
                let score = scores_of(sums_of_row(staged[v % 2], q), *units.add(q), scales);
                _mm512_storeu_ps(scores.add(q * CHUNK + v * WIDTH), score);
            }
        };
        for v in whole.clone() {
            clear_sums();
            for step in 0..steps {
                if steps > 1 || v == whole.start {
                    load(integers.queries.as_ptr().add((first / TILE_ROWS * steps + step) * PAIR));
                }
                multiply::<true>(integers.keys.as_ptr().add((v * steps + step) * PAIR));
            }
            if v > whole.start {
                put_scores(v - 1);
            }
            store_sums(staged[v % 2]);
        }
        put_scores(whole.end - 1);

        let tiles = whole.start / VECTORS..whole.end.div_ceil(VECTORS);
        let all = tiles.start * VECTORS..tiles.end * VECTORS;
        largest_scores::<V512>(weights, current, *state, spans, &all, problem.spec.softcap);
        let (mut units, mut inverses) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
        for (q, span) in spans.iter().enumerate() {
            let weights = &mut weights[q * CHUNK..][..CHUNK];
            let state = &mut current[q * *state..][..2];
            let scales = integers.scales[1].as_ptr();
            let weighed = weigh_values(weights, |v| scales.add(v * WIDTH), span, state[0]);
            (state[1], units[q], inverses[q]) = (weighed.sum, weighed.unit, weighed.inverse);
        }
        // Not in the loop above, or one query would wait for another.
        for (q, &inverse) in inverses[..count].iter().enumerate() {
            let weights = &weights[q * CHUNK..][..CHUNK];
            for tile in tiles.clone() {
                let line = integers.weights.as_mut_ptr().add(tile * PAIR + q);
                put_weights(&weights[tile * INPUTS..][..INPUTS], inverse, line);
            }
        }

        let current = current.as_mut_ptr();
        let put_values = |at: usize| {
            for (q, &unit) in units.iter().enumerate() {
                let sums = _mm512_cvtepi32_ps(sums_of_row(staged[at % 2], q));
                let to = current.add(q * *state + 2 + at * WIDTH);
                _mm512_storeu_ps(to, _mm512_mul_ps(sums, _mm512_set1_ps(unit)));
            }
        };
        for at in 0..dims {
            clear_sums();
            for tile in tiles.clone() {
                load(integers.weights.as_ptr().add(tile * PAIR));
                multiply::<false>(integers.values.as_ptr().add((tile * dims + at) * PAIR));
            }
            if at > 0 {
                put_values(at - 1);
            }
            store_sums(staged[at % 2]);
        }
        put_values(dims - 1);
    }
    scratch.join::<V512>(spans, first);
}
