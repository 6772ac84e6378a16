//! How weights are stored in GGUF files, block by block, and how they are stored here.
//!
//! The integer kernels know one shape: a weight is `scale * code + offset`, with an unsigned code of 4, 5, 6 or 8 bits,
//! and scales for runs of 32 or 16 consecutive inputs. Every block format of GGUF fits it exactly: no value changes, but where
//! [`fix`] says so.

use half::f16;

use super::activations::SPAN;
use crate::weights::DType;

/// Inputs that share a scale in the simple formats; also the inputs of one step of a kernel.
pub(in crate::kernels) const BLOCK: usize = 32;
/// Blocks in one block of the formats whose names end in K.
pub(in crate::kernels) const SUPER: usize = 8;

/// How the integer kernels see a format; `None` for the float formats.
pub(in crate::kernels) fn layout(dtype: DType) -> Option<Layout> {
    let layout = |bits, scales, bias| Some(Layout { bits, scales, bias });
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => None,
        DType::Q4_0 => layout(4, Scales::Plain, 8),
        DType::Q4_1 => layout(4, Scales::Offset, 0),
        DType::Q5_0 => layout(5, Scales::Plain, 16),
        DType::Q5_1 => layout(5, Scales::Offset, 0),
        DType::Q8_0 => layout(8, Scales::Plain, 128),
        DType::Q4K => layout(4, Scales::Nested, 0),
        DType::Q5K => layout(5, Scales::Nested, 0),
        DType::Q6K => layout(6, Scales::Halves, 32),
    }
}

/// How codes and scales of a matrix are laid out; see [`super::pack`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernels) struct Layout {
    /// Of a code: 4, 5, 6 or 8.
    pub bits: u32,
    pub scales: Scales,
    /// Subtracted from each code: the weight is `scale * (code - bias) + offset`.
    pub bias: i32,
}

/// Kinds of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::kernels) enum Scales {
    /// One f16 a block.
    Plain,
    /// One f16 a block, and an f16 offset.
    Offset,
    /// Two f16 a super-block, `d` and `m`; per block two unsigned bytes, `s` and `o`: scale `d * s`, offset `-m * o`.
    Nested,
    /// One f16 a super-block, `d`; a signed byte `s` for each half of a block: scale `d * s`.
    Halves,
}

impl Layout {
    /// Bytes of the codes of one block of 16 rows.
    pub const fn code_bytes(self) -> usize {
        16 * BLOCK * self.bits as usize / 8
    }

    /// Bytes of the scales of 16 rows of `blocks` blocks.
    pub const fn scale_bytes(self, blocks: usize) -> usize {
        match self.scales {
            Scales::Plain => blocks * 32,
            Scales::Offset => blocks * 64,
            Scales::Nested => blocks.div_ceil(SUPER) * (64 + SUPER * 32),
            Scales::Halves => blocks.div_ceil(SUPER) * (32 + SUPER * 32),
        }
    }

    /// Where the scales of `block` are, for the nested kinds: those of its super-block and its own.
    pub const fn nested(self, block: usize) -> (usize, usize) {
        let head = match self.scales {
            Scales::Nested => 64,
            _ => 32,
        };
        let start = block / SUPER * (head + SUPER * 32);
        (start, start + head + block % SUPER * 32)
    }
}

/// A row's scale and offset of up to [`SPAN`] blocks as integers: how many *units* they are. So sums of their products are
/// integers, too, and need be scaled once for all of these blocks, as the kernel on AMX does with 4-bit codes.
pub(in crate::kernels) struct Fixed {
    /// The unit's exponent as f32 has it, 127 more than that of two: 0 if all weights are zero, 255 if one is no number.
    pub exponent: u8,
    /// Scale and offset of each block.
    pub blocks: [[i16; 2]; SPAN],
}

/// The largest weight in units: with half a unit of rounding for an offset, and for each step of a code, still a 16-bit integer.
const LARGEST: f32 = 32_512.0;

/// Chooses the unit: the least power of two with which all weights, whose codes have `bits` bits, are 16-bit integers. An f16 has
/// 11 bits, so scales and offsets near the largest stay what they are (those of 99 in 100 blocks of a model in Q4_1); others
/// are rounded to the nearest unit, 1/32,512 or less of the largest weight.
pub(in crate::kernels) fn fix(bits: u32, blocks: &[[f16; 2]]) -> Fixed {
    let top = ((1 << bits) - 1) as f32;
    let ends = blocks.iter().flat_map(|[scale, offset]| {
        let (scale, offset) = (scale.to_f32(), offset.to_f32());
        [offset.abs(), (offset + top * scale).abs()]
    });
    // A NaN must not get lost, as it would in `max`.
    let largest = ends.fold(0.0f32, |largest, end| if end > largest || end.is_nan() { end } else { largest });
    let mut fixed = Fixed { exponent: 0, blocks: [[0; 2]; SPAN] };
    if !largest.is_finite() {
        fixed.exponent = u8::MAX;
    } else if largest > 0.0 {
        let unit = (largest / LARGEST).log2().ceil();
        fixed.exponent = (unit + 127.0) as u8;
        let inverse = (-unit).exp2();
        for (fixed, block) in fixed.blocks.iter_mut().zip(blocks) {
            *fixed = block.map(|value| (value.to_f32() * inverse).round_ties_even() as i16);
        }
    }
    fixed
}

/// The codes of 32 consecutive weights of a row and their scales, read from a file's block.
pub(in crate::kernels) struct Decoded {
    pub codes: [u8; BLOCK],
    /// f16 bits: scale or `d`, and offset or `m`.
    pub wide: [u16; 2],
    /// The bytes of the nested kinds.
    pub narrow: [u8; 2],
}

/// Reads block `block` (of 32 weights) of a row in a block format.
pub(in crate::kernels) fn decode(format: DType, row: &[u8], block: usize) -> Decoded {
    let bytes = format.block_bytes();
    let group = BLOCK * block / format.block_len();
    let b = &row[group * bytes..][..bytes];
    let sub = block % SUPER;
    let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
    let mut out = Decoded { codes: [0; BLOCK], wide: [0; 2], narrow: [0; 2] };
    // Four low bits of a code: the low nibbles of 16 bytes, then the high ones.
    let nibble = |at: usize, i: usize| if i < 16 { b[at + i] & 15 } else { b[at + i - 16] >> 4 };
    match format {
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("not a block format"),
        DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 => {
            let offset = matches!(format, DType::Q4_1 | DType::Q5_1);
            let five = matches!(format, DType::Q5_0 | DType::Q5_1);
            out.wide = [half(0), if offset { half(2) } else { 0 }];
            let high = if offset { 4 } else { 2 };
            let low = if five { high + 4 } else { high };
            for (i, code) in out.codes.iter_mut().enumerate() {
                let fifth = if five { b[high + i / 8] >> (i % 8) & 1 } else { 0 };
                *code = nibble(low, i) | fifth << 4;
            }
        }
        DType::Q8_0 => {
            out.wide[0] = half(0);
            for (code, &value) in out.codes.iter_mut().zip(&b[2..]) {
                *code = value ^ 0x80;
            }
        }
        DType::Q4K | DType::Q5K => {
            out.wide = [half(0), half(2)];
            out.narrow = six_bit_pair(&b[4..16], sub);
            let (low, high) = if format == DType::Q5K { (48, Some(16)) } else { (16, None) };
            for (i, code) in out.codes.iter_mut().enumerate() {
                let byte = b[low + sub / 2 * 32 + i];
                let fifth = high.map_or(0, |at: usize| b[at + i] >> sub & 1);
                *code = (if sub.is_multiple_of(2) { byte & 15 } else { byte >> 4 }) | fifth << 4;
            }
        }
        DType::Q6K => {
            // Low bits, high bits, scales, d; two halves of 128 weights, each four runs of 32.
            let (side, run) = (sub / 4, sub % 4);
            out.wide[0] = half(208);
            out.narrow = [b[192 + 2 * sub], b[192 + 2 * sub + 1]];
            for (i, code) in out.codes.iter_mut().enumerate() {
                let byte = b[side * 64 + run % 2 * 32 + i];
                let low = if run < 2 { byte & 15 } else { byte >> 4 };
                *code = low | (b[128 + side * 32 + i] >> (2 * run) & 3) << 4;
            }
        }
    }
    out
}

/// Scale and offset of sub-block `sub` from the twelve bytes that hold eight pairs of six bits.
fn six_bit_pair(b: &[u8], sub: usize) -> [u8; 2] {
    if sub < 4 {
        [b[sub] & 63, b[sub + 4] & 63]
    } else {
        [b[sub + 4] & 15 | b[sub - 4] >> 6 << 4, b[sub + 4] >> 4 | b[sub] >> 6 << 4]
    }
}

/// Reads one weight of a float format.
pub(super) fn float(format: DType, row: &[u8], index: usize) -> f32 {
    match format {
        DType::F32 => f32::from_le_bytes(std::array::from_fn(|i| row[4 * index + i])),
        DType::F16 => f16::from_le_bytes([row[2 * index], row[2 * index + 1]]).to_f32(),
        _ => half::bf16::from_le_bytes([row[2 * index], row[2 * index + 1]]).to_f32(),
    }
}

impl Decoded {
    /// The weights, as the format defines them, in f64: the reference that kernels are tested against.
    #[cfg(test)]
    pub fn weights(&self, layout: Layout) -> [f64; BLOCK] {
        let wide = self.wide.map(|bits| f64::from(f16::from_bits(bits).to_f32()));
        std::array::from_fn(|i| {
            let code = f64::from(i32::from(self.codes[i]) - layout.bias);
            match layout.scales {
                Scales::Plain => wide[0] * code,
                Scales::Offset => wide[0] * code + wide[1],
                Scales::Nested => {
                    wide[0] * f64::from(self.narrow[0]) * code - wide[1] * f64::from(self.narrow[1])
                }
                Scales::Halves => wide[0] * f64::from(self.narrow[i / 16] as i8) * code,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_keep_what_an_f16_says_near_the_largest() {
        let half = f16::from_f32;
        let blocks = [[half(0.0123), half(-0.0987)], [half(0.0071), half(-0.0457)], [half(0.0), half(0.0)]];
        let fixed = fix(4, &blocks);
        let unit = f32::from_bits(u32::from(fixed.exponent) << 23);
        for (fixed, block) in fixed.blocks.iter().zip(blocks) {
            assert_eq!(fixed.map(|value| f32::from(value) * unit), block.map(f16::to_f32));
        }
        let ends = |[scale, offset]: [i16; 2]| [i32::from(offset), i32::from(offset) + 15 * i32::from(scale)];
        let largest = fixed.blocks.into_iter().flat_map(ends).map(i32::abs).max();
        assert!((16_257..=32_528).contains(&largest.unwrap()), "{largest:?}");
        // What is far smaller is rounded to whole units.
        let fixed = fix(4, &[[half(1.0), half(0.0)], [half(1.7e-4), half(0.0)]]);
        assert_eq!((fixed.exponent, fixed.blocks[1]), (127 - 11, [0, 0]));
    }

    #[test]
    fn weights_that_are_zero_or_no_numbers_stay_that() {
        assert_eq!(fix(4, &[[f16::ZERO; 2]]).exponent, 0);
        for bad in [f16::NAN, f16::INFINITY] {
            assert_eq!(fix(4, &[[f16::ONE, f16::ZERO], [bad, f16::ZERO]]).exponent, u8::MAX);
            assert_eq!(fix(4, &[[f16::ONE, bad]]).exponent, u8::MAX);
        }
    }
}
