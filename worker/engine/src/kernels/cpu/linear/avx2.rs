//! The tile kernel on AVX2, which has no dot product of bytes that cannot overflow: codes are widened to 16 bits, those
//! with even index apart from those with odd index, and multiplied in pairs with the 16-bit activations.

use std::arch::x86_64::*;

use super::Group;
use super::instances::{HALVES, NESTED, OFFSET, PLAIN, Tile, layout_of};
use crate::kernels::cpu::activations::Activations;
use crate::kernels::cpu::pack::LANES;

pub(super) struct Avx2;

impl Tile for Avx2 {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn rows<const BITS: u32, const SCALES: u8, const T: usize>(
        group: &Group<'_>,
        x: &Activations,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        let layout = const { layout_of::<BITS, SCALES>() };
        // Eight of the sixteen rows at a time: as many as a vector holds.
        for side in 0..2 {
            let mut sums = [_mm256_setzero_ps(); T];
            for block in 0..x.blocks {
                // SAFETY: the caller's promise; all accesses lie in block `block` of the group and of `T` rows.
                unsafe {
                    let codes = group.codes.as_ptr().add(block * layout.code_bytes() + 32 * side);
                    let scales = block_scales::<BITS, SCALES>(group.scales.as_ptr(), block, side);
                    let at = first * x.blocks + block;
                    let values = x.codes.as_ptr().add(at).cast::<i32>();
                    let row = x.blocks * 16;
                    if SCALES == HALVES {
                        for (half, scale) in scales.into_iter().enumerate() {
                            let dots = dot::<BITS, T, 4>(codes, values, row, 4 * half);
                            for (t, (sum, dot)) in sums.iter_mut().zip(dots).enumerate() {
                                let bias = half_sum(values.add(t * row + 8 * half)) * -layout.bias;
                                let run = &*x.scales.as_ptr().add(at + t * x.blocks);
                                *sum = scaled(dot, bias, scale, run.scale, *sum);
                            }
                        }
                    } else {
                        let dots = dot::<BITS, T, 8>(codes, values, row, 0);
                        for (t, (sum, dot)) in sums.iter_mut().zip(dots).enumerate() {
                            let run = &*x.scales.as_ptr().add(at + t * x.blocks);
                            *sum = scaled(dot, -layout.bias * run.integer_sum, scales[0], run.scale, *sum);
                            if SCALES != PLAIN {
                                *sum = _mm256_fmadd_ps(scales[1], _mm256_set1_ps(run.sum), *sum);
                            }
                        }
                    }
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                // SAFETY: 8 of 16 floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * side), sum) }
            }
        }
    }
}

/// `(dot + bias) * (weight * run) + sum`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scaled(dot: __m256i, bias: i32, weight: __m256, run: f32, sum: __m256) -> __m256 {
    let whole = _mm256_cvtepi32_ps(_mm256_add_epi32(dot, _mm256_set1_epi32(bias)));
    _mm256_fmadd_ps(whole, _mm256_mul_ps(weight, _mm256_set1_ps(run)), sum)
}

/// Sum of the 16 integers at `values`.
///
/// # Safety
/// 32 bytes at `values`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn half_sum(values: *const i32) -> i32 {
    // SAFETY: the caller's promise.
    let pairs = unsafe { _mm256_madd_epi16(_mm256_loadu_si256(values.cast()), _mm256_set1_epi16(1)) };
    let four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
}

/// Products of `N` quads from `from` on with the integers of `T` rows that are `row` i32 apart.
///
/// # Safety
/// A block of codes at `codes`; 64 bytes of integers at each row.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot<const BITS: u32, const T: usize, const N: usize>(
    codes: *const u8,
    values: *const i32,
    row: usize,
    from: usize,
) -> [__m256i; T] {
    let mut dots = [_mm256_setzero_si256(); T];
    for q in from..from + N {
        // SAFETY: the caller's promise.
        let quad = unsafe { unpack::<BITS>(codes, q) };
        let even = _mm256_and_si256(quad, _mm256_set1_epi16(255));
        let odd = _mm256_srli_epi16::<8>(quad);
        for (t, dot) in dots.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let (a, b) =
                unsafe { (values.add(t * row + 2 * q).read(), values.add(t * row + 2 * q + 1).read()) };
            *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(even, _mm256_set1_epi32(a)));
            *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(odd, _mm256_set1_epi32(b)));
        }
    }
    dots
}

/// Quad `q` of a block, a code a byte, for 8 rows.
///
/// # Safety
/// A block of codes at `codes`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const BITS: u32>(codes: *const u8, q: usize) -> __m256i {
    // SAFETY: the caller's promise; vector `v` is within the block for every `v` used.
    let vector = |v: usize| unsafe { _mm256_load_si256(codes.add(64 * v).cast()) };
    if BITS == 8 {
        return vector(q);
    }
    let shifted = |v: __m256i, by: usize| _mm256_srl_epi16(v, _mm_cvtsi32_si128(by as i32));
    let low = _mm256_and_si256(shifted(vector(q % 4), q / 4 * 4), _mm256_set1_epi8(15));
    let high = |v: __m256i, by: usize, mask: i8| {
        _mm256_slli_epi16::<4>(_mm256_and_si256(shifted(v, by), _mm256_set1_epi8(mask)))
    };
    match BITS {
        5 => _mm256_or_si256(low, high(vector(4), q, 1)),
        6 => _mm256_or_si256(low, high(vector(4 + q / 4), q % 4 * 2, 3)),
        _ => low,
    }
}

/// Scale and offset of a block, or the scales of its halves, for 8 rows.
///
/// # Safety
/// The scales of a group at `scales`, with more than `block` blocks.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn block_scales<const BITS: u32, const SCALES: u8>(
    scales: *const u8,
    block: usize,
    side: usize,
) -> [__m256; 2] {
    // SAFETY: the caller's promise; offsets are those that `pack` wrote to.
    unsafe {
        let wide = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(scales.add(at + 16 * side).cast()));
        let (head, own) = const { layout_of::<BITS, SCALES>() }.nested(block);
        let narrow = |at: usize| _mm_loadl_epi64(scales.add(at + 8 * side).cast());
        match SCALES {
            PLAIN => [wide(block * 32), _mm256_setzero_ps()],
            OFFSET => [wide(block * 64), wide(block * 64 + 32)],
            NESTED => {
                let byte = |at: usize| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(narrow(at)));
                let offset = _mm256_mul_ps(wide(head + 32), byte(own + 16));
                [_mm256_mul_ps(wide(head), byte(own)), _mm256_sub_ps(_mm256_setzero_ps(), offset)]
            }
            _ => {
                let byte = |at: usize| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow(at)));
                [_mm256_mul_ps(wide(head), byte(own)), _mm256_mul_ps(wide(head), byte(own + 16))]
            }
        }
    }
}
