//! The tile kernel on AVX-512 with its integer dot products: four products of bytes a lane and instruction.
//!
//! The unpacked codes of a block stay in registers while several rows of activations pass by; a row's integers come from
//! memory as broadcasts that the dot product does itself.

use std::arch::x86_64::*;

use super::instances::{HALVES, NESTED, OFFSET, PLAIN, Tile, layout_of, prefetch};
use super::{Group, WIDE};
use crate::kernels::cpu::activations::{Activations, RunScale};
use crate::kernels::cpu::format::BLOCK;
use crate::kernels::cpu::lanes::hidden;
use crate::kernels::cpu::pack::LANES;

pub(super) struct Avx512;

impl Tile for Avx512 {
    const MOST: usize = WIDE;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn rows<const BITS: u32, const SCALES: u8, const T: usize>(
        group: &Group<'_>,
        x: &Activations,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        let layout = const { layout_of::<BITS, SCALES>() };
        let mut sums = [_mm512_setzero_ps(); T];
        for block in 0..x.blocks {
            // SAFETY: the caller's promise; all accesses lie in block `block` of the group and of `T` rows.
            unsafe {
                if group.fetch {
                    prefetch::<BITS, SCALES, T>(group.codes.as_ptr(), block);
                }
                let codes = group.codes.as_ptr().add(block * layout.code_bytes());
                let weights = unpack::<BITS>(codes);
                let scales = block_scales::<BITS, SCALES>(group.scales.as_ptr(), block);
                for (t, sum) in sums.iter_mut().enumerate() {
                    let at = (first + t) * x.blocks + block;
                    // Addresses of one register: with two, Intel's processors split each product from its load, and half as
                    // many of them are under way at once.
                    let quads = hidden(x.codes.as_ptr().add(at)).cast::<i32>();
                    let run = &*hidden(x.scales.as_ptr().add(at));
                    if SCALES == HALVES {
                        let half = |h: usize| {
                            let bias = half_bias(quads, h, layout.bias);
                            _mm512_cvtepi32_ps(dot::<4>(&weights, quads, 4 * h, bias))
                        };
                        let scale = _mm512_set1_ps(run.scale);
                        *sum = _mm512_fmadd_ps(half(0), _mm512_mul_ps(scales[0], scale), *sum);
                        *sum = _mm512_fmadd_ps(half(1), _mm512_mul_ps(scales[1], scale), *sum);
                    } else {
                        let product = dot::<8>(&weights, quads, 0, bias::<BITS, SCALES>(run));
                        let scale = _mm512_mul_ps(scales[0], _mm512_set1_ps(run.scale));
                        *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, *sum);
                        if SCALES != PLAIN {
                            *sum = _mm512_fmadd_ps(scales[1], _mm512_set1_ps(run.sum), *sum);
                        }
                    }
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            // SAFETY: 16 floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) }
        }
    }
}

/// What the codes' bias adds to a dot product of a whole block: minus the bias times the sum of the integers.
#[inline]
#[target_feature(enable = "avx512f")]
fn bias<const BITS: u32, const SCALES: u8>(run: &RunScale) -> __m512i {
    match const { layout_of::<BITS, SCALES>().bias } {
        0 => _mm512_setzero_si512(),
        bias => _mm512_set1_epi32(-bias * run.integer_sum),
    }
}

/// The same for one half of a block.
///
/// # Safety
/// 64 bytes of codes at `quads`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512vnni")]
unsafe fn half_bias(quads: *const i32, half: usize, bias: i32) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let sum = |at: *const i32| {
            let bytes = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), _mm_loadu_si128(at.cast()));
            let pairs = _mm_add_epi32(bytes, _mm_shuffle_epi32::<0b01_00_11_10>(bytes));
            _mm_add_epi32(pairs, _mm_shuffle_epi32::<0b10_11_00_01>(pairs))
        };
        let all = _mm_add_epi32(_mm_slli_epi32::<8>(sum(quads.add(4 * half))), sum(quads.add(8 + 4 * half)));
        _mm512_broadcastd_epi32(_mm_mullo_epi32(all, _mm_set1_epi32(-bias)))
    }
}

/// `start` plus the products of `N` quads of codes from `from` on with a row's integers.
///
/// # Safety
/// 64 bytes of codes at `quads`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot<const N: usize>(
    weights: &[__m512i; 8],
    quads: *const i32,
    from: usize,
    start: __m512i,
) -> __m512i {
    let (mut high, mut low) = (_mm512_setzero_si512(), start);
    for (q, &weights) in weights.iter().enumerate().skip(from).take(N) {
        // SAFETY: the caller's promise.
        let (h, l) = unsafe { (quads.add(q).read(), quads.add(8 + q).read()) };
        high = _mm512_dpbusd_epi32(high, weights, _mm512_set1_epi32(h));
        low = _mm512_dpbusd_epi32(low, weights, _mm512_set1_epi32(l));
    }
    _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low)
}

/// The eight quads of a block, a code a byte.
///
/// # Safety
/// A block of codes at `codes`, on a cache line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn unpack<const BITS: u32>(codes: *const u8) -> [__m512i; 8] {
    // SAFETY: the caller's promise; vector `v` is within the block for every `v` used.
    let vector = |v: usize| unsafe { _mm512_load_si512(codes.add(64 * v).cast()) };
    let mut quads = [_mm512_setzero_si512(); 8];
    if BITS == 8 {
        for (q, quad) in quads.iter_mut().enumerate() {
            *quad = vector(q);
        }
        return quads;
    }
    let nibble = _mm512_set1_epi8(15);
    for v in 0..4 {
        quads[v] = _mm512_and_si512(vector(v), nibble);
        quads[v + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(vector(v)), nibble);
    }
    if BITS == 5 {
        let (fifth, bit) = (vector(4), _mm512_set1_epi8(16));
        quads[0] = or_and(quads[0], _mm512_slli_epi16::<4>(fifth), bit);
        quads[1] = or_and(quads[1], _mm512_slli_epi16::<3>(fifth), bit);
        quads[2] = or_and(quads[2], _mm512_slli_epi16::<2>(fifth), bit);
        quads[3] = or_and(quads[3], _mm512_slli_epi16::<1>(fifth), bit);
        quads[4] = or_and(quads[4], fifth, bit);
        quads[5] = or_and(quads[5], _mm512_srli_epi16::<1>(fifth), bit);
        quads[6] = or_and(quads[6], _mm512_srli_epi16::<2>(fifth), bit);
        quads[7] = or_and(quads[7], _mm512_srli_epi16::<3>(fifth), bit);
    }
    if BITS == 6 {
        let bits = _mm512_set1_epi8(0x30);
        for h in 0..2 {
            let high = vector(4 + h);
            quads[4 * h] = or_and(quads[4 * h], _mm512_slli_epi16::<4>(high), bits);
            quads[4 * h + 1] = or_and(quads[4 * h + 1], _mm512_slli_epi16::<2>(high), bits);
            quads[4 * h + 2] = or_and(quads[4 * h + 2], high, bits);
            quads[4 * h + 3] = or_and(quads[4 * h + 3], _mm512_srli_epi16::<2>(high), bits);
        }
    }
    quads
}

/// `a | b & mask`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn or_and(a: __m512i, b: __m512i, mask: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0xf8>(a, b, mask)
}

/// Scale and offset of a block, or the scales of its halves.
///
/// # Safety
/// The scales of a group at `scales`, with more than `block` blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn block_scales<const BITS: u32, const SCALES: u8>(
    scales: *const u8,
    block: usize,
) -> [__m512; 2] {
    // SAFETY: the caller's promise; offsets are those that `pack` wrote to.
    unsafe {
        let wide = |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(at).cast()));
        let (head, own) = const { layout_of::<BITS, SCALES>() }.nested(block);
        let narrow = |at: usize| _mm_loadu_si128(scales.add(at).cast());
        match SCALES {
            PLAIN => [wide(block * 32), _mm512_setzero_ps()],
            OFFSET => [wide(block * 64), wide(block * 64 + 32)],
            NESTED => {
                let byte = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(narrow(at)));
                let offset = _mm512_mul_ps(wide(head + 32), byte(own + 16));
                [_mm512_mul_ps(wide(head), byte(own)), _mm512_sub_ps(_mm512_setzero_ps(), offset)]
            }
            _ => {
                let byte = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow(at)));
                [_mm512_mul_ps(wide(head), byte(own)), _mm512_mul_ps(wide(head), byte(own + 16))]
            }
        }
    }
}

const _: () = assert!(BLOCK == 32 && LANES == 16);
