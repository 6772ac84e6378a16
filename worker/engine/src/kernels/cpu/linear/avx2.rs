//! The kernels on AVX2, which has no dot product of bytes that cannot overflow: codes are widened to 16 bits, those with
//! even index apart from those with odd index, and multiplied in pairs with the activations' integers.
//!
//! Two of four units do products on Zen 3 and 4, two a cycle. Sums are taken by any of the four, often by one of these two, and
//! then 1.6 products a cycle are left, whatever the order. So what else takes slots is kept from the inner loop: with many rows
//! a block's codes are widened once for all of them, a broadcast of activations serves all 16 rows of weights, and the weights'
//! offsets are multiplied apart. Sums below 2^24 could be added as floats below the normal ones, which are integers in all but
//! name. On Zen 4 all products are done then, but on Zen 3 a third less, since there one unit does both.

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
    /// What a dot product times a run's scale is multiplied by, `[part][side]`.
    scales: [[__m256; SIDES]; 2],
}

/// Whether there is something that a run's sum is multiplied by.
const fn has_offset(scales: u8) -> bool {
    matches!(scales, OFFSET | NESTED)
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
    let mut offsets = vec![[_mm256_setzero_ps(); SIDES]; x.blocks];
    // SAFETY: any bits are a vector.
    let mut weights: Block = unsafe { std::mem::zeroed() };
    let (first, tiles) = (rows.start / TILE_ROWS, rows.len().div_ceil(TILE_ROWS));
    for index in problem.groups.clone() {
        let group = problem.group(index, rows.start);
        sums.as_flattened_mut().fill(0.0);
        for (block, offsets) in offsets.iter_mut().enumerate() {
            // SAFETY: the caller's promise; a group has as many blocks as the activations.
            unsafe { open::<BITS, SCALES>(&group, block, &mut weights, offsets) };
            for (tile, sums) in sums.chunks_mut(TILE_ROWS).enumerate() {
                let at = (first + tile) * x.blocks + block;
                // What comes next is asked for.
                let ahead = if tile + 1 < tiles { at + x.blocks } else { first * x.blocks + block + 1 };
                let ahead = x.codes.as_ptr().wrapping_add(ahead * TILE_ROWS);
                let scales = &x.tiles[at].scale;
                for (few, sums) in sums.as_chunks_mut().0.iter_mut().enumerate() {
                    let few = few * TILE;
                    for row in few..few + TILE {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(row).cast());
                    }
                    // SAFETY: the caller's promise; whole tiles of 16 rows are there, and so are four of them.
                    unsafe {
                        let values = x.codes.as_ptr().add(at * TILE_ROWS + few).cast();
                        add::<SCALES>(&weights, values, scales.as_ptr().add(few).cast(), sums);
                    }
                }
            }
        }
        if const { has_offset(SCALES) } {
            for (first, sums) in (rows.start..).step_by(TILE).zip(sums.as_chunks_mut().0) {
                add_offsets(x, first, &offsets, sums);
            }
        }
        for (row, values) in rows.clone().zip(sums.iter()) {
            problem.put(row, index, values);
        }
    }
}

/// Adds what the weights' offsets, one of each block, make of the sums of [`TILE`] rows from `first`, a multiple of that, on.
///
/// # Panics
/// If the activations have no such rows or fewer blocks.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::needless_range_loop, reason = "iterators over arrays of vectors leave registers")]
fn add_offsets(x: &Activations, first: usize, offsets: &[[__m256; SIDES]], sums: &mut [[f32; LANES]; TILE]) {
    let mut all = [[_mm256_setzero_ps(); SIDES]; TILE];
    for (block, offsets) in offsets.iter().enumerate() {
        let run_sums = x.tiles[first / TILE_ROWS * x.blocks + block].sum.as_ptr();
        for row in 0..TILE {
            // SAFETY: rows begin with a multiple of as many, so all are of that tile.
            let sum = _mm256_set1_ps(unsafe { run_sums.add(first % TILE_ROWS + row).read() });
            for side in 0..SIDES {
                all[row][side] = _mm256_fmadd_ps(offsets[side], sum, all[row][side]);
            }
        }
    }
    for row in 0..TILE {
        for side in 0..SIDES {
            let at = sums[row][8 * side..].as_mut_ptr();
            // SAFETY: 8 floats.
            unsafe { _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), all[row][side])) }
        }
    }
}

/// Adds the products of a block with [`TILE`] rows of activations, pairs of integers with their scales.
///
/// # Safety
/// [`PAIRS`] pairs for each row at `values`, and what they mean at `scales`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add<const SCALES: u8>(
    weights: &Block,
    values: *const [i32; PAIRS],
    scales: *const [f32; TILE],
    sums: &mut [[f32; LANES]; TILE],
) {
    let parts = if SCALES == HALVES { 2 } else { 1 };
    // SAFETY: the caller's promise.
    let scales = unsafe { &*scales };
    for part in 0..parts {
        let first = part * PAIRS / parts;
        // SAFETY: the caller's promise.
        let dots =
            unsafe { dots::<SCALES>(weights.codes.as_ptr().add(first), values.cast::<i32>().add(first)) };
        // Indexed: iterators over arrays of vectors leave registers.
        for row in 0..TILE {
            let scale = _mm256_set1_ps(scales[row]);
            for side in 0..SIDES {
                let at = sums[row][8 * side..].as_mut_ptr();
                let dot = _mm256_cvtepi32_ps(dots[row][side]);
                let scale = _mm256_mul_ps(weights.scales[part][side], scale);
                // SAFETY: 8 floats.
                unsafe { _mm256_storeu_ps(at, _mm256_fmadd_ps(dot, scale, _mm256_loadu_ps(at))) }
            }
        }
    }
}

/// Products of a block's pairs of inputs, or those of a half of it if halves have scales of their own, with [`TILE`] rows,
/// `[row][side]`.
///
/// In assembly since compilers keep sums apart, copy the codes and run out of registers.
///
/// # Safety
/// As many pairs for each row at `values`, [`PAIRS`] from row to row.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<const SCALES: u8>(
    codes: *const [__m256i; SIDES],
    values: *const i32,
) -> [[__m256i; SIDES]; TILE] {
    let mut d = [[_mm256_undefined_si256(); SIDES]; TILE];
    macro_rules! row {
        (first, $pair:literal, $row:literal, $a:literal, $b:literal) => {
            concat!(
                "vpbroadcastd {pair}, dword ptr [{x} + 4 * ",
                $pair,
                " + ",
                $row,
                "]\n",
                "vpmaddwd {",
                $a,
                "}, {left}, {pair}\n",
                "vpmaddwd {",
                $b,
                "}, {right}, {pair}\n",
            )
        };
        (next, $pair:literal, $row:literal, $a:literal, $b:literal) => {
            concat!(
                "vpbroadcastd {pair}, dword ptr [{x} + 4 * ",
                $pair,
                " + ",
                $row,
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
        ($which:ident, $pair:literal) => {
            concat!(
                "vmovdqa {left}, ymmword ptr [{w} + 64 * ",
                $pair,
                "]\n",
                "vmovdqa {right}, ymmword ptr [{w} + 64 * ",
                $pair,
                " + 32]\n",
                row!($which, $pair, 0, "a0", "b0"),
                row!($which, $pair, 64, "a1", "b1"),
                row!($which, $pair, 128, "a2", "b2"),
                row!($which, $pair, 192, "a3", "b3"),
            )
        };
    }
    macro_rules! run {
        ($($pair:literal)*) => {
            asm!(
                pair!(first, 0),
                $(pair!(next, $pair),)*
                w = in(reg) codes,
                x = in(reg) values,
                left = out(ymm_reg) _,
                right = out(ymm_reg) _,
                pair = out(ymm_reg) _,
                product = out(ymm_reg) _,
                a0 = out(ymm_reg) d[0][0],
                b0 = out(ymm_reg) d[0][1],
                a1 = out(ymm_reg) d[1][0],
                b1 = out(ymm_reg) d[1][1],
                a2 = out(ymm_reg) d[2][0],
                b2 = out(ymm_reg) d[2][1],
                a3 = out(ymm_reg) d[3][0],
                b3 = out(ymm_reg) d[3][1],
                options(pure, readonly, nostack)
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        if SCALES == HALVES {
            run!(1 2 3 4 5 6 7);
        } else {
            run!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        }
    }
    d
}

const _: () = assert!(TILE == 4 && SIDES == 2 && PAIRS * size_of::<i32>() == 64);

/// Gets a block ready, and its offsets.
///
/// # Safety
/// There is such a block in the group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn open<const BITS: u32, const SCALES: u8>(
    group: &Group<'_>,
    block: usize,
    opened: &mut Block,
    offsets: &mut [__m256; SIDES],
) {
    let layout = const { layout_of::<BITS, SCALES>() };
    prefetch::<BITS, SCALES, TILE>(group.codes.as_ptr(), block);
    let parts = if SCALES == HALVES { 2 } else { 1 };
    let bias = _mm256_set1_epi16(layout.bias as i16);
    // SAFETY: the caller's promise.
    unsafe {
        let codes = group.codes.as_ptr().add(block * layout.code_bytes());
        for (side, offset) in offsets.iter_mut().enumerate() {
            let scales = block_scales::<BITS, SCALES>(group.scales.as_ptr(), block, side);
            *offset = scales[1];
            for (part, scale) in scales.into_iter().enumerate().take(parts) {
                opened.scales[part][side] = scale;
                for quad in part * PAIRS / 2 / parts..(part + 1) * PAIRS / 2 / parts {
                    let [even, odd] = unpack::<BITS>(codes.add(32 * side), quad);
                    opened.codes[2 * quad][side] = _mm256_sub_epi16(even, bias);
                    opened.codes[2 * quad + 1][side] = _mm256_sub_epi16(odd, bias);
                }
            }
        }
    }
}

/// Keeps compilers from computing one row after the other, for which they would put all codes aside and fetch them again.
#[inline]
#[target_feature(enable = "avx2")]
fn keep_order(dots: &mut [__m256i; SIDES]) {
    let [a, b] = dots;
    // SAFETY: nothing is done.
    unsafe {
        asm!(
            "/* {0} {1} */",
            inout(ymm_reg) * a,
            inout(ymm_reg) * b,
            options(nomem, nostack, preserves_flags)
        )
    }
}

/// The kernel for few rows, which stay in registers.
struct FewRows;

impl Tile for FewRows {
    const MOST: usize = TILE;

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
        let mut offsets = [[_mm256_setzero_ps(); SIDES]; T];
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
                            if T > 1 {
                                keep_order(dots);
                            }
                        }
                    }
                    for t in 0..T {
                        let run = &*x.scales.as_ptr().add(at + t * x.blocks);
                        let integers = match SCALES {
                            HALVES => half_sum(values.add(t * x.blocks * PAIRS + PAIRS / 2 * part)),
                            _ => run.integer_sum,
                        };
                        let bias = _mm256_set1_epi32((-layout.bias).wrapping_mul(integers));
                        for side in 0..SIDES {
                            if const { has_offset(SCALES) } {
                                offsets[t][side] = _mm256_fmadd_ps(
                                    scales[side][1],
                                    _mm256_set1_ps(run.sum),
                                    offsets[t][side],
                                );
                            }
                            let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dots[t][side], bias));
                            let scale = _mm256_mul_ps(scales[side][part], _mm256_set1_ps(run.scale));
                            sums[t][side] = _mm256_fmadd_ps(dot, scale, sums[t][side]);
                        }
                    }
                }
            }
        }
        for (out, (sums, offsets)) in out.iter_mut().zip(sums.into_iter().zip(offsets)) {
            for side in 0..SIDES {
                let sum = _mm256_add_ps(sums[side], offsets[side]);
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
