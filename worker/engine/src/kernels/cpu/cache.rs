//! The layout of the paged cache of keys and values, and who reads which part of it.
//!
//! A cache of one layer is two buffers, keys and values, of equally many blocks of `block` positions each. A sequence
//! owns blocks anywhere in them; its block table lists them in order, so that position `p` lies in block
//! `table[p / block]` at `p % block`.
//!
//! Within a block, a head's **keys are transposed**: `[head][dim][position]`, so that one vector holds one dimension of
//! sixteen positions and scores need no horizontal sums. **Values** are `[head][position][dim]`, with `dim` padded to
//! whole vectors: [`KvShape::value_dim`].

use half::{bf16, f16};

use super::lanes::Lanes;
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
    pub fn key_block(&self) -> usize {
        self.heads * self.head_dim * self.block
    }
    /// Elements of one block of values.
    pub fn value_block(&self) -> usize {
        self.heads * self.value_dim() * self.block
    }
}

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
    /// The nearest to an f32.
    fn from_f32(value: f32) -> Self;
}

/// How sixteen numbers are read; not for use outside.
#[doc(hidden)]
pub trait Stored: Copy {
    #[allow(private_bounds)]
    /// # Safety
    /// 16 values at `from`, and the instruction set of `L`.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

macro_rules! element {
    ($type:ty, $load:ident, $from:expr) => {
        impl Element for $type {
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                $from(value)
            }
        }
        impl Stored for $type {
            #[allow(private_bounds)]
            #[inline(always)]
            unsafe fn load<L: Lanes>(from: *const Self) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::$load(from) }
            }
        }
    };
}
element!(f32, load, std::convert::identity);
element!(f16, load_f16, f16::from_f32);
element!(bf16, load_bf16, bf16::from_f32);

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
    let blocks = keys.len() / shape.key_block().max(1);
    assert!(values.len() / shape.value_block().max(1) >= blocks);
    rows.check(shape, blocks);
    let width = shape.heads * shape.head_dim;
    assert_eq!(new_keys.len(), rows.len() * width);
    assert_eq!(new_values.len(), rows.len() * width);
    let (keys, values) = (Shared(keys.as_mut_ptr()), Shared(values.as_mut_ptr()));
    let (dim, value_dim) = (shape.head_dim, shape.value_dim());
    let write = |head: usize, row: usize| {
        let position = rows.positions[row] as usize;
        let block = rows.tables[rows.sequences[row] as usize][position / shape.block] as usize;
        let place = position % shape.block;
        let from = row * width + head * dim;
        let key = block * shape.key_block() + head * dim * shape.block + place;
        let value = block * shape.value_block() + (head * shape.block + place) * value_dim;
        for d in 0..dim {
            // SAFETY: `check` made sure that the block is there; a head of a position belongs to one row of a step
            // and so to one task.
            unsafe {
                keys.at(key + d * shape.block).write(E::from_f32(new_keys[from + d]));
                values.at(value + d).write(E::from_f32(new_values[from + d]));
            }
        }
        for d in dim..value_dim {
            // SAFETY: as above.
            unsafe { values.at(value + d).write(E::from_f32(0.0)) };
        }
    };
    // A head at a time, so that a block's keys stay in the first-level cache while its positions are written. Few rows
    // are not worth other threads.
    let tasks = if rows.len() * width < 16_384 { 1 } else { shape.heads };
    pool.run(tasks, |task| {
        for head in super::pool::share(shape.heads, tasks, task) {
            (0..rows.len()).for_each(|row| write(head, row));
        }
    });
}
