//! The layout of the paged cache of keys and values, and who reads which part of it.
//!
//! A cache of one layer is two buffers, keys and values, of equally many blocks of `block` positions each. A sequence
//! owns blocks anywhere in them; its block table lists them in order, so that position `p` lies in block
//! `table[p / block]` at `p % block`.
//!
//! Within a block, a head's **keys are transposed**: `[head][dim][position]`, so that one vector holds one dimension of
//! sixteen positions and scores need no horizontal sums. **Values** are `[head][position][dim]`, with `dim` padded to
//! whole vectors: [`KvShape::value_dim`].
//!
//! Numbers are f32, or 16-bit integers with one scale for each head of a position: half the memory to read, and since
//! the scale is that head's own, several times nearer to f32 than half precision is (an error of 1e-5 of the head's
//! largest value, where f16 has up to 5e-4 of each). The scales of a head, `[position]` in f32, lie behind its numbers,
//! and are applied to sixteen scores or weights at a time.

use std::ops::Range;

use super::lanes::{Lanes, Stored, on_isa};
use super::pack::Shared;
use super::rows::Angles;
use crate::weights::RopeStyle;

/// Shape of one layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Positions of a block: a multiple of 16.
    pub block: usize,
    /// Heads of keys and values.
    pub heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Dimensions of a head's value in memory.
    pub fn value_dim(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }
    /// Elements of one block of keys.
    pub fn key_block<E: Element>(&self) -> usize {
        self.heads * self.key_head::<E>()
    }
    /// Elements of one block of values.
    pub fn value_block<E: Element>(&self) -> usize {
        self.heads * self.value_head::<E>()
    }
    /// Elements of one head's keys in a block, scales included.
    pub(super) fn key_head<E: Element>(&self) -> usize {
        (self.head_dim + E::SCALE) * self.block
    }
    /// Elements of one head's values in a block, scales included.
    pub(super) fn value_head<E: Element>(&self) -> usize {
        (self.value_dim() + E::SCALE) * self.block
    }
}

/// Numbers that are worth another thread.
const WORTH: usize = 2048;

/// Which sequence each row of a step belongs to, and at which position it stands.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Per row: index into `tables`.
    pub sequences: &'a [u32],
    /// Per row: its position in its sequence. A row attends to the positions up to its own.
    pub positions: &'a [u32],
    /// Per sequence: its blocks, in order; as many as its last row's position needs.
    pub tables: &'a [&'a [u32]],
}

impl Rows<'_> {
    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Checks that every row's positions lie in blocks that are there.
    ///
    /// # Panics
    /// If they do not.
    pub(super) fn check(&self, shape: &KvShape, blocks: usize) {
        assert_eq!(self.sequences.len(), self.positions.len());
        assert!(shape.block > 0 && shape.block.is_multiple_of(16), "blocks of {} positions", shape.block);
        for table in self.tables {
            assert!(table.iter().all(|&block| (block as usize) < blocks), "a block beyond {blocks}");
        }
        for (&sequence, &position) in self.sequences.iter().zip(self.positions) {
            let blocks = self.tables[sequence as usize].len();
            assert!((position as usize) < blocks * shape.block, "position {position} in {blocks} blocks");
        }
    }
}

/// A number that keys and values are stored as.
pub trait Element: Copy + Send + Sync + Stored {
    /// Elements that a position's scale takes up beside a head's numbers; 0 if there is none.
    const SCALE: usize;
    /// The scale for a head whose largest magnitude is `largest`, and what its numbers are multiplied by to be stored.
    fn scale(largest: f32) -> (f32, f32);
    /// A scaled number as it is stored.
    fn store(value: f32) -> Self;
    /// The same place, if these are 16-bit integers.
    fn integers(at: *const Self) -> Option<*const i16>;
}

impl Element for f32 {
    const SCALE: usize = 0;
    #[inline(always)]
    fn scale(_: f32) -> (f32, f32) {
        (1.0, 1.0)
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn integers(_: *const Self) -> Option<*const i16> {
        None
    }
}

impl Element for i16 {
    const SCALE: usize = size_of::<f32>() / size_of::<i16>();
    #[inline(always)]
    fn scale(largest: f32) -> (f32, f32) {
        const MOST: f32 = i16::MAX as f32;
        // Below this the reciprocal would overflow. What is not finite stays so, by way of the scale.
        if largest < 1e-30 { (0.0, 0.0) } else { (largest / MOST, MOST / largest) }
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        (value + 12_582_912.0).to_bits() as i16
    }
    #[inline(always)]
    fn integers(at: *const Self) -> Option<*const i16> {
        Some(at)
    }
}

/// Rotates the queries and keys of a step's rows, and puts keys and values into the cache; all three are `[rows, heads *
/// head_dim]`, of as many query heads as there are.
///
/// # Panics
/// If lengths or positions do not fit.
#[allow(clippy::too_many_arguments)]
pub fn append<E: Element>(
    pool: &super::Pool,
    shape: &KvShape,
    keys: &mut [E],
    values: &mut [E],
    rows: &Rows<'_>,
    (style, angles): (RopeStyle, &Angles<'_>),
    q: &mut [f32],
    k: &mut [f32],
    v: &[f32],
) {
    let blocks = keys.len() / shape.key_block::<E>().max(1);
    assert!(values.len() / shape.value_block::<E>().max(1) >= blocks);
    rows.check(shape, blocks);
    let width = shape.heads * shape.head_dim;
    assert_eq!(k.len(), rows.len() * width);
    assert_eq!(v.len(), rows.len() * width);
    assert!(q.len().is_multiple_of((rows.len() * shape.head_dim).max(1)));
    let new = (Shared(q.as_mut_ptr()), q.len() / rows.len().max(1), Shared(k.as_mut_ptr()), v);
    let to = (Shared(keys.as_mut_ptr()), Shared(values.as_mut_ptr()));
    pool.split(rows.len(), WORTH.div_ceil(new.1 + 2 * width), |range| {
        append_rows(pool.isa(), shape, rows, range, style, angles, new, to);
    });
}

on_isa!(
    /// Rotates and writes a range of the step's rows. `new`: queries and their width, keys, values.
    fn append_rows<E: Element>(
        shape: &KvShape,
        rows: &Rows<'_>,
        range: Range<usize>,
        style: RopeStyle,
        angles: &Angles<'_>,
        new: (Shared<f32>, usize, Shared<f32>, &[f32]),
        to: (Shared<E>, Shared<E>),
    ) = append_body
);

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn append_body<L: Lanes, E: Element>(
    shape: &KvShape,
    rows: &Rows<'_>,
    range: Range<usize>,
    style: RopeStyle,
    angles: &Angles<'_>,
    (q, width, k, v): (Shared<f32>, usize, Shared<f32>, &[f32]),
    (keys, values): (Shared<E>, Shared<E>),
) {
    let (dim, value_dim) = (shape.head_dim, shape.value_dim());
    for row in range.clone() {
        // SAFETY: a row of the queries, which belongs to one task.
        let q = unsafe { std::slice::from_raw_parts_mut(q.at(row * width), width) };
        q.chunks_exact_mut(dim).for_each(|head| angles.rotate(style, row, head));
    }
    // A head at a time, so that a block's keys stay in the first-level cache while its positions are written.
    for head in 0..shape.heads {
        for row in range.clone() {
            let position = rows.positions[row] as usize;
            let block = rows.tables[rows.sequences[row] as usize][position / shape.block] as usize;
            let place = position % shape.block;
            let from = (row * shape.heads + head) * dim;
            let key = keys.at((block * shape.heads + head) * shape.key_head::<E>());
            let value = values.at((block * shape.heads + head) * shape.value_head::<E>());
            // SAFETY: `Rows::check` made sure that the block is there; a row of a step, and so a head of its position,
            // belongs to one task.
            unsafe {
                let k = std::slice::from_raw_parts_mut(k.at(from), dim);
                angles.rotate(style, row, k);
                put(k, key.add(place), shape.block, key.add(dim * shape.block), place);
                let to = value.add(place * value_dim);
                put(&v[from..from + dim], to, 1, value.add(value_dim * shape.block), place);
                for d in dim..value_dim {
                    to.add(d).write(E::store(0.0));
                }
            }
        }
    }
}

/// Stores the numbers of a position's head at `to`, `stride` apart, and their scale as number `place` of `scales`.
///
/// # Safety
/// There is room for all that.
#[inline(always)]
unsafe fn put<E: Element>(numbers: &[f32], to: *mut E, stride: usize, scales: *mut E, place: usize) {
    let mut factor = 1.0;
    if E::SCALE > 0 {
        // Magnitudes compared as integers: a NaN is the largest.
        let mut largest = 0;
        for number in numbers {
            largest = largest.max(number.to_bits() & 0x7fff_ffff);
        }
        let (scale, inverse) = E::scale(f32::from_bits(largest));
        factor = inverse;
        // SAFETY: the caller's promise.
        unsafe { scales.cast::<f32>().add(place).write_unaligned(scale) };
    }
    for (d, number) in numbers.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(d * stride).write(E::store(number * factor)) };
    }
}
