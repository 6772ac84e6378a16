//! The tile kernel on NEON with its dot products of bytes: four products a lane and instruction.
//!
//! A vector has room for the sums of four of the sixteen rows. Their unpacked codes, less the bias and so signed bytes,
//! stay in registers while several rows of activations pass by; the dot product itself picks the four integers that a
//! quad is multiplied with from a vector of sixteen.

use std::arch::aarch64::*;
use std::arch::asm;

use super::instances::{HALVES, NESTED, OFFSET, PLAIN, Tile, layout_of};
use super::{Group, TILE};
use crate::kernels::cpu::activations::Activations;
use crate::kernels::cpu::lanes::{Lanes, V128};
use crate::kernels::cpu::pack::LANES;

pub(super) struct Neon;

impl Tile for Neon {
    const MOST: usize = TILE;

    #[target_feature(enable = "neon,dotprod")]
    unsafe fn rows<const BITS: u32, const SCALES: u8, const T: usize>(
        group: &Group<'_>,
        x: &Activations,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        let layout = const { layout_of::<BITS, SCALES>() };
        let mut sums = [V128::splat(0.0); T];
        for block in 0..x.blocks {
            // SAFETY: the caller's promise; all accesses lie in block `block` of the group and of `T` rows.
            unsafe {
                let codes = group.codes.as_ptr().add(block * layout.code_bytes());
                let scales = block_scales::<BITS, SCALES>(group.scales.as_ptr(), block);
                for part in 0..4 {
                    let weights = unpack::<BITS, SCALES>(codes.add(16 * part));
                    for (t, V128(sums)) in sums.iter_mut().enumerate() {
                        let at = (first + t) * x.blocks + block;
                        let values = x.codes.as_ptr().add(at).cast();
                        let run = &*x.scales.as_ptr().add(at);
                        let scale = |i: usize| vmulq_n_f32(scales[i].0[part], run.scale);
                        let mut sum = sums[part];
                        if SCALES == HALVES {
                            for half in 0..2 {
                                let product = whole(dot(&weights, values, half, [vdupq_n_s32(0); 2]));
                                sum = vfmaq_f32(sum, product, scale(half));
                            }
                        } else {
                            let first = dot(&weights, values, 0, [vdupq_n_s32(0); 2]);
                            sum = vfmaq_f32(sum, whole(dot(&weights, values, 1, first)), scale(0));
                            if SCALES != PLAIN {
                                sum = vfmaq_n_f32(sum, scales[1].0[part], run.sum);
                            }
                        }
                        sums[part] = sum;
                    }
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(&sums) {
            *out = sum.to_array();
        }
    }
}

/// `start`, of the high and of the low bytes of a row's integers, plus the products of half `half` of a block with them.
///
/// # Safety
/// 64 bytes of integers at `values`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot(
    weights: &[[int8x16_t; 4]; 2],
    values: *const i8,
    half: usize,
    start: [int32x4_t; 2],
) -> [int32x4_t; 2] {
    // SAFETY: the caller's promise.
    let (high, low) = unsafe { (vld1q_s8(values.add(16 * half)), vld1q_s8(values.add(32 + 16 * half))) };
    let [a, b, c, d] = weights[half];
    let [mut h, mut l] = start;
    (h, l) = (sdot::<0>(h, a, high), sdot::<0>(l, a, low));
    (h, l) = (sdot::<1>(h, b, high), sdot::<1>(l, b, low));
    (h, l) = (sdot::<2>(h, c, high), sdot::<2>(l, c, low));
    (h, l) = (sdot::<3>(h, d, high), sdot::<3>(l, d, low));
    [h, l]
}

/// `sum` plus, in each lane, the products of its four weights with the four integers at `4 * QUAD`. The intrinsic for it
/// is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const QUAD: u32>(mut sum: int32x4_t, weights: int8x16_t, values: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes the registers it names.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {weights:v}.16b, {values:v}.4b[{quad}]",
            sum = inout(vreg) sum,
            weights = in(vreg) weights,
            values = in(vreg) values,
            quad = const QUAD,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// `256 * high + low`.
#[inline]
#[target_feature(enable = "neon")]
fn whole([high, low]: [int32x4_t; 2]) -> float32x4_t {
    vcvtq_f32_s32(vaddq_s32(vshlq_n_s32::<8>(high), low))
}

/// The quads of the two halves of a block for 4 rows, codes less bias.
///
/// # Safety
/// A block of codes, from these rows on, at `codes`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn unpack<const BITS: u32, const SCALES: u8>(codes: *const u8) -> [[int8x16_t; 4]; 2] {
    // SAFETY: the caller's promise; vector `v` is within the block for every `v` used.
    let vector = |v: usize| unsafe { vld1q_u8(codes.add(64 * v)) };
    let high = |v: uint8x16_t, by: usize, mask: u8| {
        vandq_u8(vshlq_u8(v, vdupq_n_s8(4 - by as i8)), vdupq_n_u8(mask << 4))
    };
    let bias = vdupq_n_u8(const { layout_of::<BITS, SCALES>().bias as u8 });
    let mut quads = [[vdupq_n_s8(0); 4]; 2];
    for (half, quads) in quads.iter_mut().enumerate() {
        for (q, quad) in quads.iter_mut().enumerate() {
            let low = match (BITS, half) {
                (8, _) => vector(4 * half + q),
                (_, 0) => vandq_u8(vector(q), vdupq_n_u8(15)),
                _ => vshrq_n_u8::<4>(vector(q)),
            };
            let code = match BITS {
                5 => vorrq_u8(low, high(vector(4), 4 * half + q, 1)),
                6 => vorrq_u8(low, high(vector(4 + half), 2 * q, 3)),
                _ => low,
            };
            *quad = vreinterpretq_s8_u8(vsubq_u8(code, bias));
        }
    }
    quads
}

/// Scale and offset of a block, or the scales of its halves.
///
/// # Safety
/// The scales of a group at `scales`, with more than `block` blocks.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn block_scales<const BITS: u32, const SCALES: u8>(scales: *const u8, block: usize) -> [V128; 2] {
    // SAFETY: the caller's promise; offsets are those that `pack` wrote to.
    unsafe {
        let wide = |at: usize| V128::load_f16(scales.add(at).cast());
        let (head, own) = const { layout_of::<BITS, SCALES>() }.nested(block);
        match SCALES {
            PLAIN => [wide(block * 32), V128::splat(0.0)],
            OFFSET => [wide(block * 64), wide(block * 64 + 32)],
            NESTED => {
                let byte = |at: usize| {
                    let bytes = vld1q_u8(scales.add(at));
                    let wide = [vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)];
                    V128::from_integers(wide.map(|v| vreinterpretq_s16_u16(v)))
                };
                let offset = wide(head + 32).mul(byte(own + 16));
                [wide(head).mul(byte(own)), V128::splat(0.0).sub(offset)]
            }
            _ => {
                let byte = |at: usize| {
                    let bytes = vld1q_s8(scales.add(at).cast());
                    V128::from_integers([vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)])
                };
                [wide(head).mul(byte(own)), wide(head).mul(byte(own + 16))]
            }
        }
    }
}
