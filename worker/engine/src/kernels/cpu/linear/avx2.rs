//! The kernels on AVX2, which has no dot product of bytes that cannot overflow: codes are widened to 16 bits, those with
//! even index apart from those with odd index, and multiplied in pairs with the 16-bit activations.
//!
//! A product of pairs and its addition take two of the slots that a processor has for such work, three a cycle on a Zen 3,
//! so 24 products a cycle are the limit there. What else would take slots is kept from the inner loop: with many rows a
//! block's codes are widened once for all of them, and a broadcast of activations serves all 16 rows of weights.

use std::arch::asm;
use std::arch::x86_64::*;

use super::instances::{HALVES, NESTED, OFFSET, PLAIN, Product, Tile, check_layout, layout_of, prefetch};
use super::{Group, PASS, Problem, TILE};
use crate::kernels::cpu::activations::x86::sum;
use crate::kernels::cpu::activations::{Activations, TILE_ROWS};
use crate::kernels::cpu::pack::LANES;

/// Pairs of a block's inputs.
const PAIRS: usize = 16;
/// Vectors of 8 rows of weights in a group.
const SIDES: usize = 2;

pub(super) struct Avx2;

impl Product for Avx2 {
    unsafe fn run<const BITS: u32, const SCALES: u8>(problem: &Problem<'_>) {
        let x = problem.x;
        if !x.tiled {
            // SAFETY: the caller's promise.
            return unsafe { FewRows::run::<BITS, SCALES>(problem) };
        }
        let tiles = problem.rows.end.div_ceil(TILE_ROWS);
        assert!(problem.rows.start.is_multiple_of(TILE_ROWS) && problem.rows.end <= x.rows);
        assert!(problem.rows.len() <= PASS);
        assert!(x.codes.len() >= tiles * x.blocks * TILE_ROWS && x.tiles.len() >= tiles * x.blocks);
        check_layout::<BITS, SCALES>(problem);
        // SAFETY: the caller's promise, and what was just checked.
        unsafe { groups::<BITS, SCALES>(problem) }
    }
}

/// A block of 16 rows of weights, ready to be multiplied.
struct Block {
    /// Codes less their bias, `[pair][side]`, pairs as [`Codes`](crate::kernels::cpu::activations::Codes) has them.
    codes: [[__m256i; SIDES]; PAIRS],
    /// See [`block_scales`], `[side]`.
    scales: [[__m256; 2]; SIDES],
}

/// See [`Product::run`], with activations in tiles.
///
/// # Safety
/// The instruction set is there. The rows are at most [`PASS`] and begin with a tile.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn groups<const BITS: u32, const SCALES: u8>(problem: &Problem<'_>) {
    let (x, rows) = (problem.x, problem.rows.clone());
    let mut sums = [[0.0f32; LANES]; PASS];
    // A few rows beyond the last are computed, too, from what a tile happens to hold there.
    let sums = &mut sums[..rows.len().next_multiple_of(TILE)];
    let at = |first: usize, block: usize| (first / TILE_ROWS * x.blocks + block, first % TILE_ROWS);
    for index in problem.groups.clone() {
        let group = problem.group(index, rows.start);
        sums.as_flattened_mut().fill(0.0);
        for block in 0..x.blocks {
            // SAFETY: the caller's promise; a group has as many blocks as the activations.
            let weights = unsafe { open::<BITS, SCALES>(&group, block) };
            for (first, sums) in (rows.start..).step_by(TILE).zip(sums.as_chunks_mut().0) {
                let (tile, row) = at(first, block);
                // What comes next is asked for: it lies elsewhere if it is another tile's.
                let (next, next_row) = at(first + TILE, block);
                let next = x.codes.as_ptr().wrapping_add(next * TILE_ROWS + next_row);
                for row in 0..TILE {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(row).cast());
                }
                let scales = &x.tiles[tile];
                // SAFETY: the caller's promise; whole tiles of 16 rows are there, and so are four of them.
                unsafe {
                    let values = x.codes.as_ptr().add(tile * TILE_ROWS + row).cast();
                    let (scale, sum) = (scales.scale.as_ptr().add(row), scales.sum.as_ptr().add(row));
                    add::<SCALES>(&weights, values, scale.cast(), sum.cast(), sums);
                }
            }
        }
        for (row, values) in rows.clone().zip(sums.iter()) {
            problem.put(row, index, values);
        }
    }
}

/// Adds the products of a block with [`TILE`] rows of activations, pairs of integers with their scales and sums.
///
/// # Safety
/// [`PAIRS`] pairs for each row at `values`, and what they mean at `scales` and `run_sums`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add<const SCALES: u8>(
    weights: &Block,
    values: *const [i32; PAIRS],
    scales: *const [f32; TILE],
    run_sums: *const [f32; TILE],
    sums: &mut [[f32; LANES]; TILE],
) {
    let parts = if SCALES == HALVES { 2 } else { 1 };
    // SAFETY: the caller's promise.
    let (scales, run_sums) = unsafe { (&*scales, &*run_sums) };
    for part in 0..parts {
        let pairs = part * PAIRS / parts..(part + 1) * PAIRS / parts;
        // SAFETY: the caller's promise.
        let dots = unsafe { dots(&weights.codes[pairs.clone()], values.cast::<i32>().add(pairs.start)) };
        // Indexed: iterators over arrays of vectors leave registers.
        for row in 0..TILE {
            for side in 0..SIDES {
                let at = sums[row][8 * side..].as_mut_ptr();
                let run = (scales[row], run_sums[row]);
                // SAFETY: 8 floats.
                unsafe {
                    let sum = _mm256_loadu_ps(at);
                    let sum = scaled::<SCALES>(dots[row][side], &weights.scales[side], part, run, sum);
                    _mm256_storeu_ps(at, sum);
                }
            }
        }
    }
}

/// `dot * weight * scale + sum`, and what the weights' offset makes of the run's sum. `weights` as [`block_scales`] has them.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scaled<const SCALES: u8>(
    dot: __m256i,
    weights: &[__m256; 2],
    part: usize,
    (scale, run_sum): (f32, f32),
    sum: __m256,
) -> __m256 {
    let scale = _mm256_mul_ps(weights[part], _mm256_set1_ps(scale));
    let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum);
    match SCALES {
        OFFSET | NESTED => _mm256_fmadd_ps(weights[1], _mm256_set1_ps(run_sum), sum),
        _ => sum,
    }
}

/// Products of an even number of pairs of inputs with [`TILE`] rows, `[row][side]`.
///
/// In assembly since compilers unroll this loop, and then keep sums apart, copy the codes and run out of registers: a fifth
/// slower (Zen 3).
///
/// # Safety
/// As many pairs for each row at `values`, [`PAIRS`] from row to row.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots(codes: &[[__m256i; SIDES]], values: *const i32) -> [[__m256i; SIDES]; TILE] {
    let mut d = [[_mm256_setzero_si256(); SIDES]; TILE];
    macro_rules! row {
        ($at:literal, $first:literal, $a:literal, $b:literal) => {
            concat!(
                "vpbroadcastd {pair}, dword ptr [{x} + ",
                $at,
                " + ",
                $first,
                "]\n",
                "vpmaddwd {product}, {left}, {pair}\n",
                "vpmaddwd {pair}, {right}, {pair}\n",
                "vpaddd {",
                $a,
                "}, {",
                $a,
                "}, {product}\n",
                "vpaddd {",
                $b,
                "}, {",
                $b,
                "}, {pair}\n",
            )
        };
    }
    macro_rules! pair {
        ($w:literal, $x:literal) => {
            concat!(
                "vmovdqa {left}, ymmword ptr [{w} + ",
                $w,
                "]\n",
                "vmovdqa {right}, ymmword ptr [{w} + ",
                $w,
                " + 32]\n",
                row!($x, 0, "a0", "b0"),
                row!($x, 64, "a1", "b1"),
                row!($x, 128, "a2", "b2"),
                row!($x, 192, "a3", "b3"),
            )
        };
    }
    let codes = codes.as_ptr_range();
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "2:",
            pair!(0, 0),
            pair!(64, 4),
            "add {x}, 8",
            "add {w}, 128",
            "cmp {w}, {end}",
            "jne 2b",
            w = inout(reg) codes.start => _,
            end = in(reg) codes.end,
            x = inout(reg) values => _,
            left = out(ymm_reg) _,
            right = out(ymm_reg) _,
            pair = out(ymm_reg) _,
            product = out(ymm_reg) _,
            a0 = inout(ymm_reg) d[0][0],
            b0 = inout(ymm_reg) d[0][1],
            a1 = inout(ymm_reg) d[1][0],
            b1 = inout(ymm_reg) d[1][1],
            a2 = inout(ymm_reg) d[2][0],
            b2 = inout(ymm_reg) d[2][1],
            a3 = inout(ymm_reg) d[3][0],
            b3 = inout(ymm_reg) d[3][1],
            options(pure, readonly, nostack)
        );
    }
    d
}

const _: () = assert!(TILE == 4 && SIDES == 2 && PAIRS * size_of::<i32>() == 64);

/// Widens the codes of a block.
///
/// # Safety
/// There is such a block in the group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn open<const BITS: u32, const SCALES: u8>(group: &Group<'_>, block: usize) -> Block {
    let layout = const { layout_of::<BITS, SCALES>() };
    prefetch::<BITS, SCALES, TILE>(group.codes.as_ptr(), block);
    let mut opened =
        Block { codes: [[_mm256_setzero_si256(); SIDES]; PAIRS], scales: [[_mm256_setzero_ps(); 2]; SIDES] };
    // SAFETY: the caller's promise.
    unsafe {
        let codes = group.codes.as_ptr().add(block * layout.code_bytes());
        for side in 0..SIDES {
            opened.scales[side] = block_scales::<BITS, SCALES>(group.scales.as_ptr(), block, side);
            for quad in 0..PAIRS / 2 {
                for (odd, codes) in unpack::<BITS>(codes.add(32 * side), quad).into_iter().enumerate() {
                    let bias = _mm256_set1_epi16(layout.bias as i16);
                    opened.codes[2 * quad + odd][side] = _mm256_sub_epi16(codes, bias);
                }
            }
        }
    }
    opened
}

/// The kernel for few rows, which stay in registers.
struct FewRows;

impl Tile for FewRows {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn rows<const BITS: u32, const SCALES: u8, const T: usize>(
        group: &Group<'_>,
        x: &Activations,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        let layout = const { layout_of::<BITS, SCALES>() };
        let parts = if SCALES == HALVES { 2 } else { 1 };
        let mut sums = [[_mm256_setzero_ps(); SIDES]; T];
        for block in 0..x.blocks {
            // SAFETY: the caller's promise; all accesses lie in block `block` of the group and of `T` rows.
            unsafe {
                if group.fetch {
                    prefetch::<BITS, SCALES, T>(group.codes.as_ptr(), block);
                }
                let codes = group.codes.as_ptr().add(block * layout.code_bytes());
                let scales: [[__m256; 2]; SIDES] = [
                    block_scales::<BITS, SCALES>(group.scales.as_ptr(), block, 0),
                    block_scales::<BITS, SCALES>(group.scales.as_ptr(), block, 1),
                ];
                let at = first * x.blocks + block;
                let values = x.codes.as_ptr().add(at).cast::<i32>();
                for part in 0..parts {
                    let mut dots = [[_mm256_setzero_si256(); SIDES]; T];
                    for quad in part * PAIRS / 2 / parts..(part + 1) * PAIRS / 2 / parts {
                        let sides = [unpack::<BITS>(codes, quad), unpack::<BITS>(codes.add(32), quad)];
                        for (t, dots) in dots.iter_mut().enumerate() {
                            let row = values.add(t * x.blocks * PAIRS + 2 * quad);
                            for odd in [0, 1] {
                                let pair = _mm256_set1_epi32(row.add(odd).read());
                                for side in 0..SIDES {
                                    let product = _mm256_madd_epi16(sides[side][odd], pair);
                                    dots[side] = _mm256_add_epi32(dots[side], product);
                                }
                            }
                        }
                    }
                    for t in 0..T {
                        let run = &*x.scales.as_ptr().add(at + t * x.blocks);
                        let integers = match SCALES {
                            HALVES => half_sum(values.add(t * x.blocks * PAIRS + PAIRS / 2 * part)),
                            _ => run.integer_sum,
                        };
                        let bias = _mm256_set1_epi32(-layout.bias * integers);
                        for side in 0..SIDES {
                            let dot = _mm256_add_epi32(dots[t][side], bias);
                            let run = (run.scale, run.sum);
                            sums[t][side] = scaled::<SCALES>(dot, &scales[side], part, run, sums[t][side]);
                        }
                    }
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            for (side, sum) in sums.into_iter().enumerate() {
                // SAFETY: 8 of 16 floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * side), sum) }
            }
        }
    }
}

/// Sum of the 16 integers at `values`.
///
/// # Safety
/// 32 bytes at `values`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn half_sum(values: *const i32) -> i32 {
    // SAFETY: the caller's promise.
    sum(unsafe { _mm256_madd_epi16(_mm256_loadu_si256(values.cast()), _mm256_set1_epi16(1)) })
}

/// Quad `q` of a block for 8 rows, widened: the codes with even index, then those with odd index.
///
/// # Safety
/// A block of codes at `codes`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const BITS: u32>(codes: *const u8, q: usize) -> [__m256i; 2] {
    // SAFETY: the caller's promise; vector `v` is within the block for every `v` used.
    let vector = |v: usize| unsafe { _mm256_load_si256(codes.add(64 * v).cast()) };
    let shifted = |v: __m256i, by: usize| _mm256_srl_epi16(v, _mm_cvtsi32_si128(by as i32));
    let (low, high) = (_mm256_set1_epi16(15), |v: __m256i, by: usize, mask: i8| {
        _mm256_slli_epi16::<4>(_mm256_and_si256(shifted(v, by), _mm256_set1_epi8(mask)))
    });
    let bytes = match BITS {
        4 => {
            let v = vector(q % 4);
            // The uppermost code needs no mask.
            return match q / 4 {
                0 => [_mm256_and_si256(v, low), _mm256_and_si256(_mm256_srli_epi16::<8>(v), low)],
                _ => [_mm256_and_si256(_mm256_srli_epi16::<4>(v), low), _mm256_srli_epi16::<12>(v)],
            };
        }
        8 => vector(q),
        _ => {
            let low = _mm256_and_si256(shifted(vector(q % 4), q / 4 * 4), _mm256_set1_epi8(15));
            _mm256_or_si256(
                low,
                match BITS {
                    5 => high(vector(4), q, 1),
                    _ => high(vector(4 + q / 4), q % 4 * 2, 3),
                },
            )
        }
    };
    [_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(bytes)]
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
