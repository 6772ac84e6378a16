//! Attention over the paged cache, with the softmax computed as the keys go by (Milakov and Gimelshein, arXiv:1805.02867;
//! Dao et al., FlashAttention, arXiv:2205.14135).
//!
//! A cube takes a tile: either one row and the query heads that share a key head, or several rows of a span and one query
//! head. It goes through the positions in *spans* that lie within a block of the cache: keys into shared memory, scores,
//! values into the same memory, and the weighted values on top of what each unit has in registers.
//!
//! A long context of a single row is divided into chunks at fixed positions, for cubes to work on side by side, and their
//! parts are put together at the end. Where a row's chunks begin depends on nothing but positions, so its order of additions is
//! the same in any company.

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::reduce::sum_of;
use super::tables::{TILE_ROWS, Tiles, Work};
use super::{BLOCK, cubes, dims, empty, lanes};
use crate::kernels::Heads;

/// Units of a cube.
const UNITS: usize = 128;
/// Shared memory that every device has, bytes.
const SHARED: usize = 32 << 10;
/// Positions of a chunk; a multiple of [`BLOCK`].
pub(super) const CHUNK: usize = 256;
/// Most query heads that a cube handles of one row.
const MOST_HEADS: usize = 16;
/// Most numbers of the keys that lie in shared memory at once.
const KEY_NUMBERS: usize = 2048;
/// The score of what a row must not see. Not infinite: shading languages don't promise infinities.
const MASKED: f32 = -1e30;
/// More positions than any context has.
const NO_WINDOW: u32 = 1 << 30;

/// What a kernel is compiled for. Widths are in vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    /// Query heads of the model.
    queries: usize,
    /// Key heads of the model.
    keys: usize,
    /// Width of a head.
    dim: usize,
    /// Query heads of a cube.
    heads: usize,
    /// Rows of a cube; one of the two is 1.
    rows: usize,
    /// Positions that are loaded at once; they divide a block.
    span: usize,
    /// Whether the context is divided into chunks.
    chunked: bool,
}

/// Positions whose keys or values a cube keeps at once, where heads have so many elements.
fn span(width: usize) -> usize {
    1 << (KEY_NUMBERS / width).clamp(1, BLOCK).ilog2()
}

/// Whether there are enough units and shared memory for heads of so many elements.
pub(crate) fn takes_heads(width: usize) -> bool {
    let (lanes, span, count) = (lanes(width), span(width), TILE_ROWS.max(MOST_HEADS));
    let numbers = count * width + span * (width + lanes) + count * span + 2 * count;
    lanes > 1 && width / lanes <= UNITS && size_of::<f32>() * numbers <= SHARED
}

impl Plan {
    fn new(heads: &Heads, lanes: usize, rows: usize, chunked: bool) -> Self {
        let group = heads.queries / heads.keys;
        let most = if rows == 1 { MOST_HEADS.min(group) } else { 1 };
        Self {
            queries: heads.queries,
            keys: heads.keys,
            dim: heads.dim / lanes,
            heads: (1..=most).rev().find(|heads| group.is_multiple_of(*heads)).unwrap_or(1),
            rows,
            span: span(heads.dim),
            chunked,
        }
    }
}

/// A cube per tile (x), query heads that share a key head (y) and chunk (z). See [`Tables`](super::Tables) for the index.
///
/// The result of a row's head is written to `out` as `[rows, queries, dim]`; if the context is chunked, as
/// `[chunks, tiles, queries, dim + 1]`, not yet divided by the sum of the weights, with a last vector of greatest score and
/// sum.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn attend_kernel<N: Size>(
    q: &Array<Vector<f32, N>>,
    keys: &Array<Vector<f32, N>>,
    values: &Array<Vector<f32, N>>,
    index: &Array<u32>,
    out: &mut Array<Vector<f32, N>>,
    tables: usize,
    tiles: usize,
    window: usize,
    scale: f32,
    #[comptime] plan: Plan,
) {
    let unit = UNIT_POS as usize;
    let dim = comptime!(plan.dim);
    let span = comptime!(plan.span);
    // The tile's queries: pairs of a row and a head.
    let count = comptime!(plan.rows * plan.heads);
    // Rows of keys and values in shared memory are padded, so that neighbouring units read from different banks.
    let pitch = comptime!(plan.dim + 1);

    let tile = tiles + 2 * CUBE_POS_X as usize;
    let first = index[tile] as usize;
    let rows = index[tile + 1] as usize;
    let head = CUBE_POS_Y as usize * plan.heads;
    let key_head = head / comptime!(plan.queries / plan.keys);
    let table = index[tables + first] as usize;
    let position = index[first] as usize;
    let mut begin = 0usize;
    if position + 1 > window {
        begin = position + 1 - window;
    }
    let mut end = position + rows;
    if comptime!(plan.chunked) {
        let chunk = CUBE_POS_Z as usize * CHUNK;
        begin = max(begin, chunk);
        end = min(end, chunk + CHUNK);
    }

    let mut query = SharedMemory::<Vector<f32, N>>::new(count * dim);
    let mut cached = SharedMemory::<Vector<f32, N>>::new(span * pitch);
    let mut scores = SharedMemory::<f32>::new(count * span);
    let mut peak = SharedMemory::<f32>::new(count);
    let mut fading = SharedMemory::<f32>::new(count);
    let mut i = unit;
    while i < count * dim {
        // Rows that the tile does not have are the last one once more.
        let row = first + min(i / dim / plan.heads, rows - 1);
        let at = (row * plan.queries + head + i / dim % plan.heads) * dim + i % dim;
        query[i] = q[at] * Vector::new(scale);
        i += UNITS;
    }
    if unit < count {
        peak[unit] = MASKED;
    }
    sync_cube();

    // Each unit keeps one column of several queries: the first is `part`, the next ones `across` further.
    let across = comptime!(UNITS / plan.dim);
    let slots = comptime!((plan.rows * plan.heads).div_ceil(UNITS / plan.dim));
    let column = unit % dim;
    let part = unit / dim;
    let mut sums = Array::<f32>::new(slots);
    let mut outs = Array::<Vector<f32, N>>::new(slots);
    #[unroll]
    for slot in 0..slots {
        sums[slot] = 0.0;
        outs[slot] = Vector::new(0.0);
    }

    let mut start = begin / span * span;
    while start < end {
        let block = index[table + start / BLOCK] as usize;
        let base = ((block * plan.keys + key_head) * BLOCK + start % BLOCK) * dim;
        let mut i = unit;
        while i < span * dim {
            cached[i / dim * pitch + i % dim] = keys[base + i];
            i += UNITS;
        }
        sync_cube();

        let mut i = unit;
        while i < count * span {
            let key = i % span;
            let mut products = Vector::<f32, N>::new(0.0);
            for d in 0..dim {
                products += query[i / span * dim + d] * cached[key * pitch + d];
            }
            let row = position + i / span / plan.heads;
            let visible = start + key <= row && start + key + window > row;
            scores[i] = select(visible, sum_of(products), MASKED);
            i += UNITS;
        }
        sync_cube();

        if unit < count {
            let before = peak[unit];
            let mut greatest = before;
            for key in 0..span {
                greatest = max(greatest, scores[unit * span + key]);
            }
            peak[unit] = greatest;
            fading[unit] = (before - greatest).exp();
        }
        let mut i = unit;
        while i < span * dim {
            let mut value = Vector::<f32, N>::new(0.0);
            // What lies behind the end is another sequence's remains, which may be no numbers.
            if start + i / dim < end {
                value = values[base + i];
            }
            cached[i / dim * pitch + i % dim] = value;
            i += UNITS;
        }
        sync_cube();

        let mut i = unit;
        while i < count * span {
            scores[i] = (scores[i] - peak[i / span]).exp();
            i += UNITS;
        }
        sync_cube();

        #[unroll]
        for slot in 0..slots {
            let fading = fading[min(part + slot * across, count - 1)];
            sums[slot] *= fading;
            outs[slot] *= Vector::new(fading);
        }
        for key in 0..span {
            let value = cached[key * pitch + column];
            #[unroll]
            for slot in 0..slots {
                let weight = scores[min(part + slot * across, count - 1) * span + key];
                sums[slot] += weight;
                outs[slot] += value * Vector::new(weight);
            }
        }
        sync_cube();
        start += span;
    }

    #[unroll]
    for slot in 0..slots {
        let pair = part + slot * across;
        if part < across && pair < rows * plan.heads {
            let head = head + pair % plan.heads;
            if comptime!(plan.chunked) {
                let tile = CUBE_POS_Z * CUBE_COUNT_X + CUBE_POS_X;
                let at = (tile as usize * plan.queries + head) * pitch;
                out[at + column] = outs[slot];
                if column == 0 {
                    let mut state = Vector::<f32, N>::new(peak[pair]);
                    state[1] = sums[slot];
                    out[at + dim] = state;
                }
            } else {
                let row = first + pair / plan.heads;
                out[(row * plan.queries + head) * dim + column] = outs[slot] / Vector::new(sums[slot]);
            }
        }
    }
}

/// Puts the chunks' parts together: a cube per tile (x) and query head (y), a unit per column.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn combine_kernel<N: Size>(
    parts: &Array<Vector<f32, N>>,
    index: &Array<u32>,
    out: &mut Array<Vector<f32, N>>,
    tiles: usize,
    chunks: usize,
    #[comptime] plan: Plan,
) {
    let dim = comptime!(plan.dim);
    let pitch = comptime!(plan.dim + 1);
    let head = CUBE_POS_Y as usize;
    let row = index[tiles + 2 * CUBE_POS_X as usize] as usize;
    let first = CUBE_POS_X as usize * plan.queries + head;
    let step = CUBE_COUNT_X as usize * plan.queries;
    let mut peak = MASKED.runtime();
    for chunk in 0..chunks {
        peak = max(peak, parts[(first + chunk * step) * pitch + dim][0]);
    }
    let mut sum = 0.0f32;
    let mut total = Vector::<f32, N>::new(0.0);
    let column = UNIT_POS as usize;
    for chunk in 0..chunks {
        let at = (first + chunk * step) * pitch;
        let state = parts[at + dim];
        let fading = (state[0] - peak).exp();
        sum += state[1] * fading;
        total += parts[at + column] * Vector::new(fading);
    }
    out[(row * plan.queries + head) * dim + column] = total / Vector::new(sum);
}

/// See [`attend`](super::Kernels::attend).
pub(super) fn attend<R: CubeRuntime>(
    q: CubeTensor<R>,
    heads: &Heads,
    index: CubeTensor<R>,
    work: &Work,
    keys: CubeTensor<R>,
    values: CubeTensor<R>,
) -> CubeTensor<R> {
    let out = empty(&q, dims(&q));
    let call = Call { q, heads, index, keys, values };
    if work.multiple.count > 0 {
        call.launch(out.clone(), work.multiple, TILE_ROWS, 1);
    }
    let chunks = work.longest.div_ceil(CHUNK);
    if chunks == 1 {
        call.launch(out.clone(), work.single, 1, 1);
    } else if chunks > 1 {
        call.launch_in_chunks(out.clone(), work.single, chunks);
    }
    out
}

struct Call<'a, R: CubeRuntime> {
    q: CubeTensor<R>,
    heads: &'a Heads,
    index: CubeTensor<R>,
    keys: CubeTensor<R>,
    values: CubeTensor<R>,
}

impl<R: CubeRuntime> Call<'_, R> {
    /// Attention of `tiles` of up to `rows` rows.
    fn launch(&self, out: CubeTensor<R>, tiles: Tiles, rows: usize, chunks: usize) {
        let lanes = lanes(self.heads.dim);
        let plan = Plan::new(self.heads, lanes, rows, chunks > 1);
        assert!(takes_heads(self.heads.dim), "loading refuses other heads");
        let window = self.heads.window.map_or(NO_WINDOW, |window| (window as u32).min(NO_WINDOW));
        // SAFETY: tiles are rows of the step, every position of which has a block; `out` has room for each row's heads, or
        // for each chunk's.
        unsafe {
            attend_kernel::launch_unchecked::<R>(
                &self.q.client,
                cubes(tiles.count, plan.queries / plan.heads, chunks),
                CubeDim::new_1d(UNITS as u32),
                lanes,
                self.q.clone().into_array_arg(),
                self.keys.clone().into_array_arg(),
                self.values.clone().into_array_arg(),
                self.index.clone().into_array_arg(),
                out.into_array_arg(),
                dims(&self.q)[0],
                tiles.start,
                window as usize,
                self.heads.scale,
                plan,
            );
        }
    }

    /// The same for tiles of one row, whose context is divided into `chunks`.
    fn launch_in_chunks(&self, out: CubeTensor<R>, tiles: Tiles, chunks: usize) {
        let lanes = lanes(self.heads.dim);
        let plan = Plan::new(self.heads, lanes, 1, true);
        let parts = empty(&out, [chunks * tiles.count * plan.queries, (plan.dim + 1) * lanes]);
        self.launch(parts.clone(), tiles, 1, chunks);
        // SAFETY: a cube per row and head, and a unit per column; all parts were written.
        unsafe {
            combine_kernel::launch_unchecked::<R>(
                &out.client,
                cubes(tiles.count, plan.queries, 1),
                CubeDim::new_1d(plan.dim as u32),
                lanes,
                parts.into_array_arg(),
                self.index.clone().into_array_arg(),
                out.clone().into_array_arg(),
                tiles.start,
                chunks,
                plan,
            );
        }
    }
}
