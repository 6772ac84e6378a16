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
const WORTH: usize = 1024;

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
}

/// Puts the keys and values of a step's rows, both `[rows, heads * head_dim]`, into the cache.
///
/// # Panics
/// If lengths or positions do not fit.
pub fn kv_write<E: Element>(
    pool: &super::Pool,
    shape: &KvShape,
    keys: &mut [E],
    values: &mut [E],
    rows: &Rows<'_>,
    new_keys: &[f32],
    new_values: &[f32],
) {
    let blocks = keys.len() / shape.key_block::<E>().max(1);
    assert!(values.len() / shape.value_block::<E>().max(1) >= blocks);
    rows.check(shape, blocks);
    let width = shape.heads * shape.head_dim;
    assert_eq!(new_keys.len(), rows.len() * width);
    assert_eq!(new_values.len(), rows.len() * width);
    let to = (Shared(keys.as_mut_ptr()), Shared(values.as_mut_ptr()));
    // A head at a time, so that a block's keys stay in the first-level cache while its positions are written.
    pool.split(shape.heads * rows.len(), WORTH.div_ceil(shape.head_dim), |range| {
        write(pool.isa(), shape, rows, range, new_keys, new_values, to);
    });
}

on_isa!(
    /// Writes a range of the step's heads, counted head by head and row by row within.
    fn write<E: Element>(
        shape: &KvShape,
        rows: &Rows<'_>,
        range: Range<usize>,
        new_keys: &[f32],
        new_values: &[f32],
        to: (Shared<E>, Shared<E>),
    ) = write_body
);

#[inline(always)]
fn write_body<L: Lanes, E: Element>(
    shape: &KvShape,
    rows: &Rows<'_>,
    range: Range<usize>,
    new_keys: &[f32],
    new_values: &[f32],
    (keys, values): (Shared<E>, Shared<E>),
) {
    let (dim, value_dim) = (shape.head_dim, shape.value_dim());
    for index in range {
        let (head, row) = (index / rows.len(), index % rows.len());
        let position = rows.positions[row] as usize;
        let block = rows.tables[rows.sequences[row] as usize][position / shape.block] as usize;
        let place = position % shape.block;
        let from = (row * shape.heads + head) * dim;
        let key = keys.at((block * shape.heads + head) * shape.key_head::<E>());
        let value = values.at((block * shape.heads + head) * shape.value_head::<E>());
        // SAFETY: `Rows::check` made sure that the block is there; a head of a position belongs to one row of a step and
        // so to one task.
        unsafe {
            put(&new_keys[from..from + dim], key.add(place), shape.block, key.add(dim * shape.block), place);
            let to = value.add(place * value_dim);
            put(&new_values[from..from + dim], to, 1, value.add(value_dim * shape.block), place);
            for d in dim..value_dim {
                to.add(d).write(E::store(0.0));
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
