//! From stored numbers back to `f32`, block by block.
//!
//! The layouts are those of the GGUF format: the specification (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>)
//! numbers the types, and ggml's `block_q…` structures define them. All numbers are little-endian. `d` is a block's scale
//! and `m` its minimum, both `f16`:
//!
//! | format | bytes of a block, in order | value |
//! | --- | --- | --- |
//! | `Q4_0` | `d`, 16 bytes of nibbles | `(q − 8)·d` |
//! | `Q4_1` | `d`, `m`, 16 bytes of nibbles | `q·d + m` |
//! | `Q5_0` | `d`, 32 fifth bits, 16 bytes of nibbles | `(q − 16)·d` |
//! | `Q5_1` | `d`, `m`, 32 fifth bits, 16 bytes of nibbles | `q·d + m` |
//! | `Q8_0` | `d`, 32 signed bytes | `q·d` |
//! | `Q4_K` | `d`, `m`, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles | `q·d·s − m·t` |
//! | `Q5_K` | `d`, `m`, 12 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles | `q·d·s − m·t` |
//! | `Q6_K` | 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed scales, `d` | `(q − 32)·d·s` |
//!
//! In the formats of 32, value `j < 16` is the low nibble of byte `j` and value `j + 16` its high nibble. In the formats of
//! 256, sub-block `i` (of 32 values in `Q4_K` and `Q5_K`, of 16 in `Q6_K`) has the scale `s = s[i]` and the minimum `t = t[i]`.
//!
//! This is the plain, portable path: the reference for the kernels, and what reads rows of an embedding.

use half::{bf16, f16};

use super::DType;

/// Turns whole blocks into values.
///
/// # Panics
/// If `data` and `out` are not the same whole number of blocks.
pub fn dequantize(dtype: DType, data: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.row_bytes(out.len()), Some(data.len()), "{} blocks and their values", dtype.name());
    match dtype {
        DType::F32 => each::<4, 1>(data, out, |b, y| y[0] = f32::from_le_bytes(*b)),
        DType::F16 => each::<2, 1>(data, out, |b, y| y[0] = f16::from_le_bytes(*b).to_f32()),
        DType::BF16 => each::<2, 1>(data, out, |b, y| y[0] = bf16::from_le_bytes(*b).to_f32()),
        DType::Q4_0 => each::<18, 32>(data, out, q4_0),
        DType::Q4_1 => each::<20, 32>(data, out, q4_1),
        DType::Q5_0 => each::<22, 32>(data, out, q5_0),
        DType::Q5_1 => each::<24, 32>(data, out, q5_1),
        DType::Q8_0 => each::<34, 32>(data, out, q8_0),
        DType::Q4K => each::<144, 256>(data, out, q4_k),
        DType::Q5K => each::<176, 256>(data, out, q5_k),
        DType::Q6K => each::<210, 256>(data, out, q6_k),
    }
}

/// Applies `block` to each block of `BYTES` bytes and `LEN` values.
fn each<const BYTES: usize, const LEN: usize>(
    data: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, _) = data.as_chunks::<BYTES>();
    let (values, _) = out.as_chunks_mut::<LEN>();
    for (b, y) in blocks.iter().zip(values) {
        block(b, y);
    }
}

/// The `f16` at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The fifth bits of a block of 32.
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for (j, &q) in block[2..].iter().enumerate() {
        y[j] = (i32::from(q & 0xF) - 8) as f32 * d;
        y[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (j, &q) in block[4..].iter().enumerate() {
        y[j] = f32::from(q & 0xF) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half(block, 0), fifth_bits(block, 2));
    for (j, &q) in block[6..].iter().enumerate() {
        let low = i32::from(q & 0xF) | ((high >> j & 1) << 4) as i32;
        let upper = i32::from(q >> 4) | ((high >> (j + 16) & 1) << 4) as i32;
        y[j] = (low - 16) as f32 * d;
        y[j + 16] = (upper - 16) as f32 * d;
    }
}

fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (half(block, 0), half(block, 2), fifth_bits(block, 4));
    for (j, &q) in block[8..].iter().enumerate() {
        let low = u32::from(q & 0xF) | (high >> j & 1) << 4;
        let upper = u32::from(q >> 4) | (high >> (j + 16) & 1) << 4;
        y[j] = low as f32 * d + m;
        y[j + 16] = upper as f32 * d + m;
    }
}

fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for (y, &q) in y.iter_mut().zip(&block[2..]) {
        *y = f32::from(q as i8) * d;
    }
}

/// Scale and minimum of sub-block `i` of 8, six bits each, from their 12 bytes: those of the first four lie in the low
/// six bits of bytes 0–3 and 4–7; those of the last four have their low nibbles in bytes 8–11 and their upper two bits
/// above the first four's.
pub(crate) fn scale_and_min(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        let low = packed[i + 4];
        ((low & 0xF) | (packed[i - 4] >> 6) << 4, (low >> 4) | (packed[i] >> 6) << 4)
    }
}

fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for i in 0..8 {
        let (s, t) = scale_and_min(&block[4..16], i);
        let (scale, min) = (d * f32::from(s), m * f32::from(t));
        let nibbles = &block[16 + i / 2 * 32..][..32];
        for (y, &q) in y[i * 32..][..32].iter_mut().zip(nibbles) {
            *y = f32::from(q >> (i % 2 * 4) & 0xF) * scale - min;
        }
    }
}

fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let fifth = &block[16..48];
    for i in 0..8 {
        let (s, t) = scale_and_min(&block[4..16], i);
        let (scale, min) = (d * f32::from(s), m * f32::from(t));
        let nibbles = &block[48 + i / 2 * 32..][..32];
        for (j, y) in y[i * 32..][..32].iter_mut().enumerate() {
            let q = nibbles[j] >> (i % 2 * 4) & 0xF | (fifth[j] >> i & 1) << 4;
            *y = f32::from(q) * scale - min;
        }
    }
}

fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let d = half(block, 208);
    for (i, y) in y.iter_mut().enumerate() {
        // Two halves of 128 values; in each, four groups of 32 share 64 bytes of nibbles and 32 bytes of bit pairs.
        let (half, group, j) = (i / 128, i % 128 / 32, i % 32);
        let nibble = block[half * 64 + group % 2 * 32 + j] >> (group / 2 * 4) & 0xF;
        let pair = block[128 + half * 32 + j] >> (group * 2) & 3;
        let scale = f32::from(block[192 + i / 16] as i8);
        *y = (i32::from(nibble | pair << 4) - 32) as f32 * (d * scale);
    }
}
