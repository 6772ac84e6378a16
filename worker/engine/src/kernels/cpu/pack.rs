//! Weights rearranged for the kernels: sixteen output rows interleaved, so that one vector holds four consecutive inputs
//! of sixteen rows and a product needs neither shuffles nor horizontal sums.
//!
//! A group of 16 rows is one run of memory, read from front to back. For the block formats it is first the codes, then
//! the scales. A block (32 inputs) of codes is eight *quads*, each 16 rows of 4 bytes (inputs `4 q .. 4 q + 4`):
//! - 8 bits: the quads, 64 bytes each;
//! - fewer: four vectors of 64 bytes, vector `v` with the low four bits of quad `v` in its low nibbles and of quad
//!   `v + 4` in its high ones. Then, for 5 bits, one vector with the fifth bit of quad `q` in bit `q` of its bytes; for 6,
//!   two vectors, with the two high bits of quads `4 h .. 4 h + 4` in bits `2 (q % 4)` of vector `h`.
//!
//! Where weights are multiples of units, see [`Packed::is_fixed`], scales are pairs of integers, a row's scale below its offset,
//! those of a block in a vector of 64 bytes; then come the exponents of the units, 16 bytes for each [`SPAN`] blocks.
//!
//! Float formats keep each input's 16 rows together. The last group is filled up with zero rows.

use super::activations::SPAN;
use super::format::{BLOCK, Layout, SUPER, Scales, decode, fix, float, layout};
use super::isa::Isa;
use super::memory::Piece;
use super::pool::Pool;
use crate::weights::DType;

/// Rows of a group.
pub(super) const LANES: usize = 16;

/// A matrix of weights `[rows = outputs, cols = inputs]`, in the precision of its file and about its size.
pub struct Packed {
    dtype: DType,
    rows: usize,
    cols: usize,
    group_bytes: usize,
    is_fixed: bool,
    data: Piece,
}

/// What is wrong with the bytes that were to be packed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Rows of this format are whole blocks.
    #[error("{cols} columns are no whole number of {dtype:?} blocks")]
    Columns {
        /// Of the matrix.
        cols: usize,
        /// Of the matrix.
        dtype: DType,
    },
    /// More or fewer bytes than the shape needs.
    #[error("{got} bytes where the shape needs {expected}")]
    Length {
        /// Bytes that there should be.
        expected: usize,
        /// Bytes that there are.
        got: usize,
    },
}

impl Packed {
    /// Rearranges `bytes`, a matrix in the layout of a GGUF file.
    ///
    /// # Errors
    /// If the shape does not go with the format or the number of bytes.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn pack(
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        pool: &Pool,
    ) -> Result<Packed, PackError> {
        let row_bytes = dtype.row_bytes(cols).ok_or(PackError::Columns { cols, dtype })?;
        let expected = rows * row_bytes;
        if bytes.len() != expected {
            return Err(PackError::Length { expected, got: bytes.len() });
        }
        let blocks = cols / BLOCK;
        let is_fixed = pool.isa() == Isa::Amx
            && layout(dtype).is_some_and(|l| (l.bits, l.scales) == (4, Scales::Offset));
        let units = if is_fixed { exponents(blocks, blocks.next_multiple_of(SPAN)) } else { 0 };
        let group_bytes = match layout(dtype) {
            Some(layout) => blocks * layout.code_bytes() + layout.scale_bytes(blocks).max(units),
            None => LANES * row_bytes,
        }
        .next_multiple_of(64);
        let groups = rows.div_ceil(LANES);
        let data = pool.arena.piece(groups * group_bytes, |data| {
            let out = Shared(data.as_mut_ptr());
            pool.split(groups, 1, |range| {
                for group in range {
                    // SAFETY: each group is a range of its own within `data`, and is given to one task.
                    let out =
                        unsafe { std::slice::from_raw_parts_mut(out.at(group * group_bytes), group_bytes) };
                    for lane in 0..LANES.min(rows - group * LANES) {
                        let row = &bytes[(group * LANES + lane) * row_bytes..][..row_bytes];
                        match layout(dtype) {
                            Some(layout) => pack_blocks(dtype, layout, is_fixed, row, blocks, lane, out),
                            None => pack_floats(dtype.block_bytes(), row, lane, out),
                        }
                    }
                }
            });
        });
        Ok(Packed { dtype, rows, cols, group_bytes, is_fixed, data })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The format it came in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether weights are multiples of units, see [`fix`]: those with codes of 4 bits and an offset are for AMX.
    pub(super) fn is_fixed(&self) -> bool {
        self.is_fixed
    }

    /// Memory it takes.
    pub fn bytes(&self) -> usize {
        self.data.as_slice().len()
    }

    pub(super) fn groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    pub(super) fn group(&self, index: usize) -> &[u8] {
        &self.data.as_slice()[index * self.group_bytes..][..self.group_bytes]
    }
}

/// A pointer that tasks share; each writes a part of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub *mut T);

// SAFETY: it is only a number; whoever dereferences it states why that is sound.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    pub fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

fn pack_floats(size: usize, row: &[u8], lane: usize, out: &mut [u8]) {
    for (values, value) in out.chunks_exact_mut(LANES * size).zip(row.chunks_exact(size)) {
        values[lane * size..][..size].copy_from_slice(value);
    }
}

/// Where the exponents of the unit of `block` are, of `blocks`, among the scales of a group.
pub(super) const fn exponents(blocks: usize, block: usize) -> usize {
    64 * blocks + 16 * (block / SPAN)
}

fn pack_blocks(
    dtype: DType,
    layout: Layout,
    is_fixed: bool,
    row: &[u8],
    blocks: usize,
    lane: usize,
    out: &mut [u8],
) {
    let (codes, scales) = out.split_at_mut(blocks * layout.code_bytes());
    let mut unit = [[half::f16::ZERO; 2]; SPAN];
    for (block, codes) in codes.chunks_exact_mut(layout.code_bytes()).enumerate() {
        let decoded = decode(dtype, row, block);
        for (i, &code) in decoded.codes.iter().enumerate() {
            put_code(layout.bits, codes, lane, i, code);
        }
        let mut wide = |at: usize, bits: u16| {
            scales[at + 2 * lane..][..2].copy_from_slice(&bits.to_le_bytes());
        };
        match layout.scales {
            Scales::Plain => wide(block * 32, decoded.wide[0]),
            Scales::Offset if !is_fixed => {
                wide(block * 64, decoded.wide[0]);
                wide(block * 64 + 32, decoded.wide[1]);
            }
            Scales::Offset => {
                unit[block % SPAN] = decoded.wide.map(half::f16::from_bits);
                if block % SPAN == SPAN - 1 || block + 1 == blocks {
                    let first = block - block % SPAN;
                    let fixed = fix(layout.bits, &unit[..=block % SPAN]);
                    for (block, pair) in (first..=block).zip(fixed.blocks) {
                        let to = &mut scales[block * 64 + 4 * lane..][..4];
                        to.copy_from_slice(pair.map(i16::to_le_bytes).as_flattened());
                    }
                    scales[exponents(blocks, block) + lane] = fixed.exponent;
                }
            }
            Scales::Nested | Scales::Halves => {
                let (head, own) = layout.nested(block);
                if block % SUPER == 0 {
                    wide(head, decoded.wide[0]);
                    if layout.scales == Scales::Nested {
                        wide(head + 32, decoded.wide[1]);
                    }
                }
                scales[own + lane] = decoded.narrow[0];
                scales[own + 16 + lane] = decoded.narrow[1];
            }
        }
    }
}

/// Stores the code of input `i` of row `lane` in a zeroed block.
fn put_code(bits: u32, codes: &mut [u8], lane: usize, i: usize, code: u8) {
    let (quad, at) = (i / 4, 4 * lane + i % 4);
    if bits == 8 {
        codes[64 * quad + at] = code;
        return;
    }
    codes[64 * (quad % 4) + at] |= (code & 15) << (quad / 4 * 4);
    match bits {
        5 => codes[256 + at] |= (code >> 4) << quad,
        6 => codes[256 + 64 * (quad / 4) + at] |= (code >> 4) << (2 * (quad % 4)),
        _ => {}
    }
}

/// The code that [`put_code`] stored.
fn get_code(bits: u32, codes: &[u8], lane: usize, i: usize) -> u8 {
    let (quad, at) = (i / 4, 4 * lane + i % 4);
    if bits == 8 {
        return codes[64 * quad + at];
    }
    let low = codes[64 * (quad % 4) + at] >> (quad / 4 * 4) & 15;
    match bits {
        5 => low | (codes[256 + at] >> quad & 1) << 4,
        6 => low | (codes[256 + 64 * (quad / 4) + at] >> (2 * (quad % 4)) & 3) << 4,
        _ => low,
    }
}

/// The scales of a block of 16 rows, as floats: for the two halves of the block, and the offset.
pub(super) struct BlockScales {
    pub halves: [[f32; LANES]; 2],
    pub offset: [f32; LANES],
}

/// Reads the scales of `block` from a group's scales, which are not fixed.
pub(super) fn block_scales(layout: Layout, scales: &[u8], block: usize) -> BlockScales {
    let wide = |at: usize, lane: usize| {
        half::f16::from_le_bytes([scales[at + 2 * lane], scales[at + 2 * lane + 1]]).to_f32()
    };
    let all = |f: &dyn Fn(usize) -> f32| -> [f32; LANES] { std::array::from_fn(f) };
    let same = |scale: [f32; LANES], offset| BlockScales { halves: [scale, scale], offset };
    match layout.scales {
        Scales::Plain => same(all(&|l| wide(block * 32, l)), [0.0; LANES]),
        Scales::Offset => same(all(&|l| wide(block * 64, l)), all(&|l| wide(block * 64 + 32, l))),
        Scales::Nested => {
            let (head, own) = layout.nested(block);
            same(
                all(&|l| wide(head, l) * f32::from(scales[own + l])),
                all(&|l| -(wide(head + 32, l) * f32::from(scales[own + 16 + l]))),
            )
        }
        Scales::Halves => {
            let (head, own) = layout.nested(block);
            let half = |h: usize| all(&|l| wide(head, l) * f32::from(scales[own + 16 * h + l] as i8));
            BlockScales { halves: [half(0), half(1)], offset: [0.0; LANES] }
        }
    }
}

/// The same where they are multiples of units.
fn fixed_scales(scales: &[u8], blocks: usize, block: usize) -> BlockScales {
    let all = |at: usize| -> [f32; LANES] {
        std::array::from_fn(|lane| {
            let unit = f32::from_bits(u32::from(scales[exponents(blocks, block) + lane]) << 23);
            let at = block * 64 + 4 * lane + at;
            f32::from(i16::from_le_bytes([scales[at], scales[at + 1]])) * unit
        })
    };
    BlockScales { halves: [all(0); 2], offset: all(2) }
}

/// Codes less bias of a block: `[input][row]`.
pub(super) fn block_codes(layout: Layout, codes: &[u8]) -> [[i16; LANES]; BLOCK] {
    std::array::from_fn(|i| {
        std::array::from_fn(|lane| i16::from(get_code(layout.bits, codes, lane, i)) - layout.bias as i16)
    })
}

/// Writes row `row` of the matrix, the embedding of a token, to `out`.
///
/// # Panics
/// If there is no such row, or `out` does not have [`Packed::cols`] elements.
pub fn embedding_row(weights: &Packed, row: usize, out: &mut [f32]) {
    assert!(row < weights.rows, "row {row} of {}", weights.rows);
    assert_eq!(out.len(), weights.cols);
    let (group, lane) = (weights.group(row / LANES), row % LANES);
    let Some(layout) = layout(weights.dtype) else {
        for (i, value) in out.iter_mut().enumerate() {
            *value = float(weights.dtype, group, i * LANES + lane);
        }
        return;
    };
    let blocks = weights.cols / BLOCK;
    let (codes, scales) = group.split_at(blocks * layout.code_bytes());
    for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
        let codes = &codes[block * layout.code_bytes()..][..layout.code_bytes()];
        let s = match weights.is_fixed {
            true => fixed_scales(scales, blocks, block),
            false => block_scales(layout, scales, block),
        };
        for (i, value) in out.iter_mut().enumerate() {
            let code = i32::from(get_code(layout.bits, codes, lane, i)) - layout.bias;
            *value = s.halves[i / 16][lane] * code as f32 + s.offset[lane];
        }
    }
}
