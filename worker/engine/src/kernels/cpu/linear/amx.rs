//! The kernel on AMX, whose instructions multiply a matrix of 16 rows of bytes with one of 16 columns.
//!
//! A block of 32 inputs has a scale of its own, so its products are wanted apart: for each 16 rows of activations and 16 of
//! weights two tiles of sums, those of the high and of the low bytes, are stored and added up by AVX-512 as the kernel of
//! that instruction set does, in the same order. So results are the same, bit for bit, and few rows take that kernel.
//!
//! Two things are due to how these processors work (measured on a Granite Rapids):
//! - A product of tiles takes some 50 cycles. So the sums of one block are stored while the next one's are computed, and the
//!   codes of the next 16 rows of weights are unpacked meanwhile.
//! - While tiles are in use, only one port multiplies, converts and shifts vectors of 512 bits, while two add them. So sums
//!   begin not with zero but as the bits of 1.5 * 2^31 and 1.5 * 2^23 in f32. What is added to such a number as an integer
//!   counts 256 and 1 in it as a float: both planes are joined by additions alone.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

pub(super) mod fixed;

use super::avx512::{Avx512, block_scales, unpack};
use super::instances::{HALVES, PLAIN, Product, check_layout, layout_of, prefetch};
use super::{PASS, Problem, announce};
use crate::kernels::cpu::activations::{Codes, TILE_ROWS, TileScales};
use crate::kernels::cpu::format::BLOCK;
use crate::kernels::cpu::pack::LANES;
use crate::kernels::cpu::tiles::Configured;

pub(super) struct Amx;

/// Bytes of a block's codes as bytes, and so of the tile that they are.
const PANEL: usize = 512;

/// Bytes of 16 rows of a pair of blocks: high bytes, then low ones.
const PAIR: usize = 2 * TILE_ROWS * size_of::<Codes>();

/// Rows of tiles of sums.
#[repr(C, align(64))]
struct Rows<const N: usize>([[u32; LANES]; N]);

thread_local! {
    /// The codes of two groups: of the one in use, and of the next.
    static PANELS: RefCell<Vec<Codes>> = RefCell::default();
}

impl Product for Amx {
    unsafe fn run<const BITS: u32, const SCALES: u8>(problem: &Problem<'_>) {
        assert!(!problem.w.is_fixed());
        if !problem.x.tiled {
            // SAFETY: the caller's promise: where there is AMX, there is AVX-512.
            return unsafe { Avx512::run::<BITS, SCALES>(problem) };
        }
        let x = problem.x;
        let tiles = problem.rows.end.div_ceil(TILE_ROWS);
        assert!(problem.rows.start.is_multiple_of(TILE_ROWS) && problem.rows.end <= x.rows);
        assert!(problem.rows.len() <= PASS);
        let pairs = tiles * x.blocks.div_ceil(2);
        assert!(size_of_val(&x.codes[..]) >= pairs * PAIR && x.tiles.len() >= tiles * x.blocks);
        check_layout::<BITS, SCALES>(problem);
        if problem.rows.is_empty() || problem.groups.is_empty() || x.blocks == 0 {
            return;
        }
        PANELS.with_borrow_mut(|panels| {
            let codes = x.blocks * PANEL / size_of::<Codes>();
            if panels.len() < 2 * codes {
                panels.resize(2 * codes, Codes([0; 64]));
            }
            let (a, b) = panels.split_at_mut(codes);
            // SAFETY: the caller's promise, and what was just checked.
            unsafe {
                let panels = [a.as_mut_ptr().cast(), b.as_mut_ptr().cast()];
                groups::<BITS, SCALES>(problem, panels);
            }
        });
    }
}

/// See [`Product::run`], by tiles.
///
/// # Safety
/// The instruction set is there. The activations are in tiles, the problem is not empty and its rows begin with a tile;
/// each of `panels` has room for the codes of a group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn groups<const BITS: u32, const SCALES: u8>(problem: &Problem<'_>, panels: [*mut u8; 2]) {
    let (x, rows) = (problem.x, &problem.rows);
    // Halves of blocks have scales of their own in one format.
    let parts = if SCALES == HALVES { 2 } else { 1 };
    // Where a tile's are.
    let activations = |row: usize| {
        let pair = row / TILE_ROWS * x.blocks.div_ceil(2);
        x.codes.as_ptr().cast::<u8>().wrapping_add(pair * PAIR)
    };
    // High and low, of two blocks in turn.
    let mut staged = [const { Rows([[0; LANES]; 2 * TILE_ROWS]) }; 2];
    let staged = staged.each_mut().map(|sums| sums.0.as_mut_ptr().cast::<u8>());
    let weights = |group| {
        let group = problem.group(group, rows.start);
        (group.codes.as_ptr(), group.scales.as_ptr())
    };
    // SAFETY: the caller's promise: all pointers stay within a panel, a tile's activations and the staged sums.
    unsafe {
        let _in_use = Configured::new(32 / parts as u8, 6);
        let mut next = Next { panel: panels[0], activations: activations(rows.start) };
        let (codes, mut scales) = weights(problem.groups.start);
        for block in 0..x.blocks {
            open::<BITS, SCALES>(codes, block, panels[0]);
        }
        next.multiply(0, staged[1]);
        let mut count = 0;
        for (g, group) in problem.groups.clone().enumerate() {
            let last_group = group + 1 == problem.groups.end;
            let following = (!last_group).then(|| weights(group + 1));
            for first in rows.clone().step_by(TILE_ROWS) {
                let last_tile = first + TILE_ROWS >= rows.end;
                let tile = x.tiles[first / TILE_ROWS * x.blocks..].as_ptr();
                for row in (first..rows.end).take(TILE_ROWS) {
                    announce(problem.y.at(row * problem.w.rows() + (group + 1) * LANES - 1));
                }
                let mut sums = [_mm512_setzero_ps(); TILE_ROWS];
                for block in 0..x.blocks {
                    let scales = block_scales::<BITS, SCALES>(scales, block);
                    // Of the next group, so that its memory is waited for while there is something to compute.
                    if let Some((codes, _)) = following.filter(|_| first == rows.start) {
                        open::<BITS, SCALES>(codes, block, panels[(g + 1) % 2]);
                    }
                    for part in 0..parts {
                        let last = block + 1 == x.blocks && part + 1 == parts;
                        next.advance(parts, part, block);
                        if last {
                            next.panel = panels[(g + usize::from(last_tile)) % 2];
                            next.activations =
                                activations(if last_tile { rows.start } else { first + TILE_ROWS });
                        }
                        if last && last_tile && last_group {
                            Next::store(count, staged[count % 2]);
                        } else {
                            next.multiply(count + 1, staged[count % 2]);
                        }
                        add::<SCALES>(&mut sums, staged[count % 2].cast(), scales, part, &*tile.add(block));
                        count += 1;
                    }
                }
                macro_rules! put {
                    ($($t:literal)*) => {$(
                        if first + $t < rows.end {
                            let mut out = [0.0; LANES];
                            _mm512_storeu_ps(out.as_mut_ptr(), sums[$t]);
                            problem.put(first + $t, group, &out);
                        }
                    )*};
                }
                put!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            }
            scales = following.map_or(scales, |(_, scales)| scales);
        }
    }
}

/// Unpacks the codes of a block of the group whose codes are `codes`, less their bias, to signed bytes.
///
/// # Safety
/// The instruction set is there; there is such a block, and room for the group at `panel`, on a cache line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn open<const BITS: u32, const SCALES: u8>(codes: *const u8, block: usize, panel: *mut u8) {
    let layout = const { layout_of::<BITS, SCALES>() };
    prefetch::<BITS, SCALES, TILE_ROWS>(codes, block);
    // SAFETY: the caller's promise, and what a group is.
    unsafe {
        let quads = unpack::<BITS>(codes.add(block * layout.code_bytes()));
        for (q, quad) in quads.into_iter().enumerate() {
            let quad = match layout.bias {
                0 => quad,
                bias => _mm512_sub_epi8(quad, _mm512_set1_epi8(bias as i8)),
            };
            _mm512_store_si512(panel.add(block * PANEL + 64 * q).cast(), quad);
        }
    }
}

/// Adds the products of a block, or of a part of it, to the sums of a tile's rows.
///
/// # Safety
/// The instruction set is there, and the tiles of sums at `staged`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add<const SCALES: u8>(
    sums: &mut [__m512; TILE_ROWS],
    staged: *const f32,
    scales: [__m512; 2],
    part: usize,
    run: &TileScales,
) {
    // Of the high bytes' sums what both began with is taken away, which is a multiple of 256, too: nothing is rounded before
    // the sum of both.
    let begin = _mm512_set1_ps(f32::from_bits(BEGIN[0]) + f32::from_bits(BEGIN[1]));
    macro_rules! rows {
        ($($t:literal)*) => {$({
            // SAFETY: the caller's promise.
            let (high, low) = unsafe {
                (_mm512_load_ps(staged.add(LANES * $t)), _mm512_load_ps(staged.add(LANES * (TILE_ROWS + $t))))
            };
            let product = _mm512_add_ps(_mm512_sub_ps(high, begin), low);
            let scale = _mm512_mul_ps(scales[part], _mm512_set1_ps(run.scale[$t]));
            sums[$t] = _mm512_fmadd_ps(product, scale, sums[$t]);
            if SCALES != PLAIN && SCALES != HALVES {
                sums[$t] = _mm512_fmadd_ps(scales[1], _mm512_set1_ps(run.sum[$t]), sums[$t]);
            }
        })*};
    }
    // Written out, so that the sums stay in registers.
    rows!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
}

/// What sums begin with: 1.5 * 2^31 and 1.5 * 2^23 as bits of f32.
const BEGIN: [u32; 2] = [0x4f40_0000, 0x4b40_0000];

/// A row of a tile for each, which all its rows are loaded from.
static BEGINNINGS: Rows<2> = Rows([[BEGIN[0]; LANES], [BEGIN[1]; LANES]]);

/// What is multiplied next: 16 rows of weights, and of activations.
struct Next {
    panel: *const u8,
    activations: *const u8,
}

/// Multiplies on the tiles that are named: sums of the high and of the low bytes, weights; then stores the sums of before.
macro_rules! multiply {
    ($next:ident, $staged:ident, $high:literal, $low:literal, $weights:literal, $old_high:literal, $old_low:literal) => {
        asm!(
            concat!("tileloadd ", $weights, ", [{weights} + {line} * 1]"),
            "tileloadd tmm4, [{activations} + {line} * 1]",
            "tileloadd tmm5, [{activations} + {line} * 1 + 1024]",
            concat!("tileloadd ", $high, ", [{begin} + {same} * 1]"),
            concat!("tdpbssd ", $high, ", tmm4, ", $weights),
            concat!("tilestored [{staged} + {line} * 1], ", $old_high),
            concat!("tileloadd ", $low, ", [{begin} + {same} * 1 + 64]"),
            concat!("tdpbssd ", $low, ", tmm5, ", $weights),
            concat!("tilestored [{staged} + {line} * 1 + 1024], ", $old_low),
            weights = in(reg) $next.panel,
            activations = in(reg) $next.activations,
            staged = in(reg) $staged,
            begin = in(reg) BEGINNINGS.0.as_ptr(),
            line = in(reg) 64usize,
            same = in(reg) 0usize,
            options(nostack, preserves_flags),
        )
    };
}

impl Next {
    /// Goes on from part `part` of block `block` to what lies behind it.
    #[inline(always)]
    fn advance(&mut self, parts: usize, part: usize, block: usize) {
        // A pair of blocks lies in the same cache lines, and so do the halves of a block.
        let bytes = BLOCK / parts;
        let activations = match part + 1 == parts && block % 2 == 1 {
            true => PAIR - 2 * BLOCK + bytes,
            false => bytes,
        };
        self.activations = self.activations.wrapping_add(activations);
        self.panel = self.panel.wrapping_add(PANEL / parts);
    }

    /// Multiplication number `count`; the sums of the one before are stored to `staged`.
    ///
    /// # Safety
    /// The tiles are configured; there is a tile of weights and one of activations, and room for two tiles at `staged`.
    #[inline(always)]
    unsafe fn multiply(&self, count: usize, staged: *mut u8) {
        // SAFETY: the caller's promise. No other code uses the tiles' registers.
        unsafe {
            match count % 2 {
                0 => multiply!(self, staged, "tmm0", "tmm1", "tmm6", "tmm2", "tmm3"),
                _ => multiply!(self, staged, "tmm2", "tmm3", "tmm7", "tmm0", "tmm1"),
            }
        }
    }

    /// Stores the sums of multiplication number `count`.
    ///
    /// # Safety
    /// As for [`Next::multiply`].
    #[inline(always)]
    unsafe fn store(count: usize, staged: *mut u8) {
        macro_rules! store {
            ($high:literal, $low:literal) => {
                asm!(
                    concat!("tilestored [{staged} + {line} * 1], ", $high),
                    concat!("tilestored [{staged} + {line} * 1 + 1024], ", $low),
                    staged = in(reg) staged,
                    line = in(reg) 64usize,
                    options(nostack, preserves_flags),
                )
            };
        }
        // SAFETY: the caller's promise.
        unsafe {
            match count % 2 {
                0 => store!("tmm0", "tmm1"),
                _ => store!("tmm2", "tmm3"),
            }
        }
    }
}
