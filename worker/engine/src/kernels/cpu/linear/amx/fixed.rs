//! The kernel for weights that are multiples of a unit, see [`fix`](crate::kernels::cpu::format::fix): they become 16-bit
//! integers, as activations are, and the products of both's bytes are summed on tiles over all the inputs that share a unit.
//!
//! A step is 64 inputs of 16 rows of weights and of activations: four products of tiles, into three sums (of the high bytes, of
//! high and low ones, of the low bytes). A span's weights, four tiles, stay in registers while rows of activations pass by, which
//! are loaded to one more: loading tiles is what takes long where another thread uses the same core. A product occupies the unit for
//! tiles for 16 cycles. Meanwhile the sums of the 16 rows before are added up, and the weights of the next span are opened, a part
//! after each two products.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

use super::super::avx512::{or_and, unpack};
use super::super::instances::{OFFSET, Product, Tile, check_layout, layout_of, prefetch};
use super::super::{Group, PASS, Problem, WIDE, announce};
use super::{PAIR, Rows};
use crate::kernels::cpu::activations::{Activations, SPAN, TILE_ROWS};
use crate::kernels::cpu::lanes::hidden;
use crate::kernels::cpu::pack::{LANES, exponents};
use crate::kernels::cpu::tiles::{Configured, PLANES, TILE_BYTES, clear_sums, store_sums, sums_of_row};

/// Pairs of blocks of a span: steps.
const STEPS: usize = SPAN / 2;
/// Parts that a tile's work is done in, one after each two products.
const PARTS: usize = 2 * STEPS;
/// Vectors of codes of a block.
const QUARTERS: usize = 4;

/// A thread's memory.
#[repr(C, align(64))]
struct Memory {
    /// Opened weights of a span, and of the next one: tiles of high bytes and of low ones, which are unsigned.
    panels: [[[[u8; TILE_BYTES]; 2]; STEPS]; 2],
    /// Sums from tiles.
    staged: [Rows<TILE_ROWS>; PLANES],
    /// Sums over the spans so far.
    sums: Rows<PASS>,
}

thread_local! {
    static MEMORY: RefCell<Option<Box<Memory>>> = RefCell::default();
}

/// Computes a [`Problem`] whose weights are fixed. Results are the same, bit for bit, by tiles and by few rows: all sums of
/// integers are exact, and scaled in the same way.
///
/// # Safety
/// The instruction set is there.
pub(in super::super) unsafe fn run(problem: &Problem<'_>) {
    let (x, rows) = (problem.x, &problem.rows);
    assert!(problem.w.is_fixed() && rows.end <= x.rows);
    check_layout::<4, OFFSET>(problem);
    if rows.is_empty() || problem.groups.is_empty() || x.blocks == 0 {
        return;
    }
    if !x.tiled {
        // SAFETY: the caller's promise.
        return unsafe { Few::run::<4, OFFSET>(problem) };
    }
    let tiles = rows.end.div_ceil(TILE_ROWS);
    assert!(rows.start.is_multiple_of(TILE_ROWS) && rows.len() <= PASS);
    assert!(size_of_val(&x.codes[..]) >= tiles * x.blocks.div_ceil(2) * PAIR);
    assert!(x.tiles.len() >= tiles * x.blocks);
    MEMORY.with_borrow_mut(|memory| {
        // SAFETY: numbers, of which zeros are some.
        let memory = memory.get_or_insert_with(|| unsafe { Box::<Memory>::new_zeroed().assume_init() });
        // SAFETY: the caller's promise, and what was just checked.
        unsafe {
            by_tiles(problem, memory);
        }
    });
}

/// See [`run`], by tiles.
///
/// # Safety
/// As for [`run`]; the activations are in tiles, the problem is not empty and its rows, [`PASS`] at most, begin with a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn by_tiles(problem: &Problem<'_>, memory: &mut Memory) {
    let (x, rows) = (problem.x, &problem.rows);
    let tiles = rows.len().div_ceil(TILE_ROWS);
    // So many parts with each of a tile's have the next piece open in time.
    let each = (SPAN * QUARTERS).div_ceil(tiles * PARTS);
    let activations = x.codes.as_ptr().cast::<u8>();
    let Memory { panels, staged, sums } = memory;
    let panels = panels.each_mut().map(|panel| panel.as_mut_ptr().cast::<u8>());
    let staged = staged.as_mut_ptr().cast::<u8>();
    let sums = sums.0.as_mut_ptr().cast::<f32>();
    // SAFETY: the caller's promise: all pointers stay within a panel, a tile's activations and the staged sums.
    unsafe {
        let _in_use = Configured::new(64, 4);
        let mut piece = Piece::new(problem, problem.groups.start, 0, panels[0]);
        piece.open(0, SPAN * QUARTERS);
        let mut before = Sums { rows: 0, ..Sums::new(problem, &piece, rows.start, staged, sums) };
        let mut panel = 0;
        loop {
            panel = 1 - panel;
            let next = piece.next(problem, panels[panel]);
            let mut opened = 0;
            for first in rows.clone().step_by(TILE_ROWS) {
                let at = first / TILE_ROWS * x.blocks.div_ceil(2) + piece.span / 2;
                let current = Sums::new(problem, &piece, first, staged, sums);
                let open = || {
                    if let Some(next) = &next {
                        next.open(opened, opened + each);
                        opened += each;
                    }
                };
                if first == rows.start {
                    tile::<true>(&piece, activations.add(at * PAIR), &current, &before, open);
                } else {
                    tile::<false>(&piece, activations.add(at * PAIR), &current, &before, open);
                }
                before = current;
            }
            match next {
                Some(next) => piece = next,
                None => break,
            }
        }
        (0..PARTS).for_each(|part| before.add(part));
    }
}

/// Adds the products of a tile of activations with high and low bytes of weights to two sums.
macro_rules! multiply {
    ($activations:ident, $at:literal, $high:literal, $low:literal, $by_high:literal, $by_low:literal) => {
        asm!(
            concat!("tileloadd tmm3, [{x} + {line} + ", $at, "]"),
            concat!("tdpbssd ", $by_high, ", tmm3, ", $high),
            concat!("tdpbsud ", $by_low, ", tmm3, ", $low),
            x = in(reg) $activations,
            line = in(reg) 64usize,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Loads a step's weights, high and low bytes.
macro_rules! load_weights {
    ($piece:ident, $at:literal, $high:literal, $low:literal) => {
        asm!(
            concat!("tileloadd ", $high, ", [{w} + {line} + ", $at, "]"),
            concat!("tileloadd ", $low, ", [{w} + {line} + 1024 + ", $at, "]"),
            w = in(reg) $piece.panel,
            line = in(reg) 64usize,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Multiplies a piece with 16 rows of activations, the sums being `current`; adds up the sums of `before`, and opens what comes
/// next. The piece's weights are loaded if it is the `FIRST` to use them.
///
/// # Safety
/// The instruction set is there and the tiles are configured; there are as many activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<const FIRST: bool>(
    piece: &Piece,
    activations: *const u8,
    current: &Sums,
    before: &Sums,
    mut open: impl FnMut(),
) {
    let whole = piece.blocks.div_ceil(2) == STEPS;
    let mut meanwhile = |part: usize| {
        open();
        current.announce(part);
        // SAFETY: the caller's promise.
        unsafe { before.add(part) }
    };
    // SAFETY: the caller's promise. Steps are written out, so that nothing is left to decide.
    unsafe {
        clear_sums();
        if FIRST {
            load_weights!(piece, "0", "tmm4", "tmm5");
        }
        multiply!(activations, "0", "tmm4", "tmm5", "tmm0", "tmm1");
        meanwhile(0);
        multiply!(activations, "1024", "tmm4", "tmm5", "tmm1", "tmm2");
        meanwhile(1);
        if whole {
            // Not before, or products would have to wait for these, too.
            if FIRST {
                load_weights!(piece, "2048", "tmm6", "tmm7");
            }
            multiply!(activations, "2048", "tmm6", "tmm7", "tmm0", "tmm1");
        }
        meanwhile(2);
        if whole {
            multiply!(activations, "3072", "tmm6", "tmm7", "tmm1", "tmm2");
        }
        meanwhile(3);
        store_sums(current.tiles);
    }
}

const _: () = assert!(STEPS == 2 && PARTS == 4);

/// Few rows of activations, which are not in tiles. Products of a block's codes, less 8, with bytes of activations are 16-bit
/// integers, and are multiplied with the scale as such.
struct Few;

impl Tile for Few {
    const MOST: usize = WIDE;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn rows<const BITS: u32, const SCALES: u8, const T: usize>(
        group: &Group<'_>,
        x: &Activations,
        first: usize,
        out: &mut [[f32; LANES]],
    ) {
        const { assert!(BITS == 4 && SCALES == OFFSET) };
        let layout = const { layout_of::<BITS, SCALES>() };
        let lower = _mm512_set1_epi32(0xffff);
        for span in (0..x.blocks).step_by(SPAN) {
            let mut high = [_mm512_setzero_si512(); T];
            let mut low = [_mm512_setzero_si512(); T];
            for block in span..x.blocks.min(span + SPAN) {
                // SAFETY: the caller's promise; all accesses lie in block `block` of the group and of `T` rows.
                unsafe {
                    if group.fetch {
                        prefetch::<BITS, SCALES, T>(group.codes.as_ptr(), block);
                    }
                    let weights = unpack::<BITS>(group.codes.as_ptr().add(block * layout.code_bytes()));
                    let pairs = _mm512_loadu_si512(group.scales.as_ptr().add(64 * block).cast());
                    // The offset of codes less 8.
                    let pairs = _mm512_add_epi32(pairs, _mm512_slli_epi32::<{ 16 + 3 }>(pairs));
                    macro_rules! rows {
                        ($($t:literal)*) => {$(if $t < T {
                            let at = (first + $t) * x.blocks + block;
                            // Addresses of one register, as in AVX-512's kernel.
                            let quads = hidden(x.codes.as_ptr().add(at)).cast::<i32>();
                            let run = &*hidden(x.scales.as_ptr().add(at));
                            let mut dots = [_mm512_set1_epi32(run.centre[0]), _mm512_set1_epi32(run.centre[1])];
                            for (q, &weights) in weights.iter().enumerate() {
                                let (h, l) = (quads.add(q).read(), quads.add(8 + q).read());
                                dots[0] = _mm512_dpbusd_epi32(dots[0], weights, _mm512_set1_epi32(h));
                                dots[1] = _mm512_dpbusd_epi32(dots[1], weights, _mm512_set1_epi32(l));
                            }
                            // A dot product for the scale, the sum of activations for the offset.
                            let upper = [_mm512_set1_epi32(run.upper[0]), _mm512_set1_epi32(run.upper[1])];
                            high[$t] = _mm512_dpwssd_epi32(high[$t], or_and(upper[0], dots[0], lower), pairs);
                            low[$t] = _mm512_dpwssd_epi32(low[$t], or_and(upper[1], dots[1], lower), pairs);
                        })*};
                    }
                    // Written out, so that the sums stay in registers.
                    rows!(0 1 2 3 4 5 6 7);
                }
            }
            // SAFETY: the caller's promise.
            let unit = unsafe { unit(group.scales.as_ptr(), x.blocks, span) };
            for (t, (out, (high, low))) in out.iter_mut().zip(high.into_iter().zip(low)).enumerate() {
                let sum = _mm512_add_epi32(high, _mm512_srai_epi32::<8>(low));
                // SAFETY: as above; 16 floats. Sums are kept there, or there were too few registers.
                unsafe {
                    let run = &*x.scales.as_ptr().add((first + t) * x.blocks + span);
                    let scale = _mm512_mul_ps(unit, _mm512_set1_ps(run.scale));
                    let before = if span == 0 { _mm512_setzero_ps() } else { _mm512_loadu_ps(out.as_ptr()) };
                    let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, before);
                    _mm512_storeu_ps(out.as_mut_ptr(), sum);
                }
            }
        }
    }
}

/// 256 units of the blocks from `span` on: what a sum counts of which the low byte is dropped.
///
/// # Safety
/// The scales of a group of `blocks` blocks at `scales`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn unit(scales: *const u8, blocks: usize, span: usize) -> __m512 {
    let at = exponents(blocks, span);
    // SAFETY: the caller's promise.
    let exponents = unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.add(at).cast())) };
    let unit = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponents));
    _mm512_mul_ps(unit, _mm512_set1_ps(256.0))
}

/// A span of the inputs of a group.
struct Piece {
    group: usize,
    /// First block, and how many.
    span: usize,
    blocks: usize,
    /// Of the group.
    codes: *const u8,
    pairs: *const u8,
    unit: __m512,
    /// Where the weights are opened to.
    panel: *mut u8,
}

impl Piece {
    /// # Safety
    /// The instruction set is there, and so are the group and the span.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn new(problem: &Problem<'_>, group: usize, span: usize, panel: *mut u8) -> Piece {
        let blocks = problem.x.blocks;
        let weights = problem.group(group, problem.rows.start);
        Piece {
            group,
            span,
            blocks: SPAN.min(blocks - span),
            codes: weights.codes.as_ptr(),
            pairs: weights.scales.as_ptr(),
            // SAFETY: the caller's promise.
            unit: unsafe { unit(weights.scales.as_ptr(), blocks, span) },
            panel,
        }
    }

    /// What comes next: another span of the same group, or another group.
    ///
    /// # Safety
    /// The instruction set is there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn next(&self, problem: &Problem<'_>, panel: *mut u8) -> Option<Piece> {
        let (mut group, mut span) = (self.group, self.span + self.blocks);
        if span == problem.x.blocks {
            (group, span) = (group + 1, 0);
        }
        // SAFETY: the caller's promise.
        (group < problem.groups.end).then(|| unsafe { Piece::new(problem, group, span, panel) })
    }

    /// Opens the quarters of blocks from `first` to `end`, or as many as there are.
    ///
    /// # Safety
    /// The instruction set is there, and there is room at `panel`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn open(&self, first: usize, end: usize) {
        for quarter in first..end.min(self.blocks * QUARTERS) {
            let (block, quarter) = (quarter / QUARTERS, quarter % QUARTERS);
            let at = self.span + block;
            if quarter == 0 {
                prefetch::<4, OFFSET, TILE_ROWS>(self.codes, at);
            }
            // SAFETY: the caller's promise; the panel's tiles are `[step][high, low]`, of 64 inputs each.
            unsafe {
                let codes = self.codes.add(at * const { layout_of::<4, OFFSET>() }.code_bytes());
                let pairs = _mm512_loadu_si512(self.pairs.add(at * 64).cast());
                let tile = self.panel.add(block / 2 * 2 * TILE_BYTES);
                let to = tile.add(block % 2 * (TILE_BYTES / 2) + 64 * quarter);
                open_quarter(codes.add(64 * quarter), pairs, to);
                if block + 1 == self.blocks && block % 2 == 0 {
                    // Whatever activations are thought to be there, they count nothing.
                    for line in [quarter, QUARTERS + quarter] {
                        let to = tile.add(TILE_BYTES / 2 + 64 * line);
                        _mm512_store_si512(to.cast(), _mm512_setzero_si512());
                        _mm512_store_si512(to.add(TILE_BYTES).cast(), _mm512_setzero_si512());
                    }
                }
            }
        }
    }
}

/// Weights of 4 bits that a vector of a block holds, two quads, `scale * code + offset`, to bytes: high ones to `to`, low ones a
/// tile behind, those of the second quad half a block behind. In `pairs` a row's scale lies below its offset.
///
/// # Safety
/// A vector of codes at `codes`, and room at `to`, both on cache lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn open_quarter(codes: *const u8, pairs: __m512i, to: *mut u8) {
    let (low_words, nibble) = (_mm512_set1_epi32(0xffff), _mm512_set1_epi16(15));
    let upper_bytes = _mm512_set1_epi16(0xff00u16 as i16);
    let scale = _mm512_or_si512(_mm512_and_si512(pairs, low_words), _mm512_slli_epi32::<16>(pairs));
    let offset = _mm512_or_si512(_mm512_andnot_si512(low_words, pairs), _mm512_srli_epi32::<16>(pairs));
    let weight = |code| _mm512_add_epi16(_mm512_mullo_epi16(code, scale), offset);
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm512_load_si512(codes.cast());
        // Codes with even index, and those with odd index.
        let first = [_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_srli_epi16::<8>(v), nibble)];
        let second = [_mm512_and_si512(_mm512_srli_epi16::<4>(v), nibble), _mm512_srli_epi16::<12>(v)];
        for (quad, [even, odd]) in [first, second].into_iter().enumerate() {
            let (even, odd) = (weight(even), weight(odd));
            // a & mask | b & !mask
            let high = _mm512_ternarylogic_epi32::<0xac>(upper_bytes, _mm512_srli_epi16::<8>(even), odd);
            let low = _mm512_ternarylogic_epi32::<0xac>(upper_bytes, even, _mm512_slli_epi16::<8>(odd));
            let to = to.add(quad * QUARTERS * 64);
            _mm512_store_si512(to.cast(), high);
            _mm512_store_si512(to.add(TILE_BYTES).cast(), low);
        }
    }
}

/// Sums of a piece for 16 rows of activations, on their way from tiles to the outputs.
struct Sums {
    /// Rows that there are.
    rows: usize,
    /// Tiles, `[plane]`: always the same, but as an argument of its own, which compilers see through, products of many rows took a
    /// sixth longer (measured on an Emerald Rapids).
    tiles: *mut u8,
    unit: __m512,
    /// Scales of the rows of activations.
    scales: *const f32,
    /// What to add to, where the sum goes, and how far the next row's are from there.
    from: *const f32,
    to: *mut f32,
    from_stride: usize,
    to_stride: usize,
    /// Rows of weights that there are.
    lanes: __mmask16,
    /// Whether this is the output.
    is_last: bool,
}

/// What the first sums are added to.
static ZEROS: Rows<1> = Rows([[0; LANES]]);

impl Sums {
    /// For the rows from `first` on. Sums over spans lie at `sums`.
    #[inline(always)]
    fn new(problem: &Problem<'_>, piece: &Piece, first: usize, tiles: *mut u8, sums: *mut f32) -> Sums {
        let (x, width) = (problem.x, problem.w.rows());
        let is_last = piece.span + piece.blocks == x.blocks;
        let sums = sums.wrapping_add((first - problem.rows.start) * LANES);
        let (from, from_stride) = match piece.span {
            0 => (ZEROS.0.as_ptr().cast(), 0),
            _ => (sums.cast_const(), LANES),
        };
        let (to, to_stride) = match is_last {
            true => (problem.y.at(first * width + piece.group * LANES), width),
            false => (sums, LANES),
        };
        let left = width - piece.group * LANES;
        Sums {
            rows: (problem.rows.end - first).min(TILE_ROWS),
            tiles,
            unit: piece.unit,
            scales: x.tiles[first / TILE_ROWS * x.blocks + piece.span].scale.as_ptr(),
            from,
            to,
            from_stride,
            to_stride,
            lanes: if is_last && left < LANES { (1 << left) - 1 } else { u16::MAX },
            is_last,
        }
    }

    /// Asks for a part of the outputs' memory.
    #[inline(always)]
    fn announce(&self, part: usize) {
        if self.is_last {
            for row in part * TILE_ROWS / PARTS..(part + 1) * TILE_ROWS / PARTS {
                announce(self.to.wrapping_add(row * self.to_stride + LANES - 1));
            }
        }
    }

    /// Adds a part of the sums to the sums over spans.
    ///
    /// # Safety
    /// The instruction set is there, and nobody else has to do with the outputs.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(&self, part: usize) {
        let rows = part * TILE_ROWS / PARTS..(part + 1) * TILE_ROWS / PARTS;
        // SAFETY: the caller's promise.
        unsafe {
            if self.rows == TILE_ROWS {
                // As many as are known when this is compiled.
                rows.for_each(|row| self.add_row(row));
            } else {
                (rows.start..rows.end.min(self.rows)).for_each(|row| self.add_row(row));
            }
        }
    }

    /// # Safety
    /// As for [`Sums::add`]; there is such a row.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_row(&self, row: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let sum = sums_of_row(self.tiles, row);
            let scale = _mm512_mul_ps(self.unit, _mm512_set1_ps(*self.scales.add(row)));
            let before = _mm512_loadu_ps(self.from.add(row * self.from_stride));
            let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, before);
            _mm512_mask_storeu_ps(self.to.add(row * self.to_stride), self.lanes, sum);
        }
    }
}
