//! The kernel for weights that are multiples of a unit, see [`fix`](crate::kernels::cpu::format::fix): they become 16-bit
//! integers, as activations are, and the products of both's bytes are summed on tiles over all the inputs that share a unit.
//!
//! A step is 64 inputs of 16 rows of weights and of activations: four products of tiles, into three sums (of the high bytes, of
//! high and low ones, of the low bytes). A product occupies the unit for tiles for 16 cycles. Meanwhile the sums of the 16 rows
//! before are stored and added up, and the weights of the next group are opened, a part with each step. What is in use has to
//! stay in the first-level cache, or loading tiles takes longer than multiplying them: hence one group at a time.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

use super::super::avx512::{or_and, unpack};
use super::super::instances::{OFFSET, check_layout, layout_of, prefetch};
use super::super::{Group, PASS, Problem, TILE, announce, each_tile};
use super::{Configured, PAIR, Rows};
use crate::kernels::cpu::activations::{Activations, SPAN, TILE_ROWS};
use crate::kernels::cpu::pack::{LANES, exponents};

/// Pairs of blocks of a span: steps.
const STEPS: usize = SPAN / 2;
/// Bytes of a tile.
const TILE_BYTES: usize = 1024;
/// Tiles of sums.
const PLANES: usize = 3;

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
        assert!(x.codes.len() >= x.rows * x.blocks && x.scales.len() >= x.rows * x.blocks);
        return each_tile(problem, TILE, |group, first, out| {
            let group = &problem.group(group, first);
            // SAFETY: the caller's promise, what was just checked, and what a group is.
            unsafe {
                match out.len() {
                    1 => few::<1>(group, x, first, out),
                    2 => few::<2>(group, x, first, out),
                    3 => few::<3>(group, x, first, out),
                    _ => few::<TILE>(group, x, first, out),
                }
            }
        });
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
            // A tile that is half empty takes half the time.
            if x.rows <= TILE_ROWS / 2 {
                by_tiles::<{ TILE_ROWS / 2 }>(problem, memory);
            } else {
                by_tiles::<TILE_ROWS>(problem, memory);
            }
        }
    });
}

/// See [`run`], with tiles of which `ROWS` rows are used.
///
/// # Safety
/// As for [`run`]; the activations are in tiles, the problem is not empty and its rows, [`PASS`] at most, begin with a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn by_tiles<const ROWS: usize>(problem: &Problem<'_>, memory: &mut Memory) {
    let (x, rows) = (problem.x, &problem.rows);
    let tiles = rows.len().div_ceil(TILE_ROWS);
    // So many blocks a step have the next piece open in time.
    let each = SPAN.div_ceil(tiles * STEPS);
    let activations = x.codes.as_ptr().cast::<u8>();
    let Memory { panels, staged, sums } = memory;
    let panels = panels.each_mut().map(|panel| panel.as_mut_ptr().cast::<u8>());
    let staged = staged.as_mut_ptr().cast::<u8>();
    let sums = sums.0.as_mut_ptr().cast::<f32>();
    // SAFETY: the caller's promise: all pointers stay within a panel, a tile's activations and the staged sums.
    unsafe {
        let _in_use = Configured::new(ROWS as u8, 64, 7);
        let mut piece = Piece::new(problem, problem.groups.start, 0, panels[0]);
        piece.open(0, SPAN);
        let mut before = Sums { rows: 0, ..Sums::new(problem, &piece, rows.start, staged, sums) };
        // Two sets of tiles in turn, so that one is stored while the other is added to.
        let mut set = 0;
        let mut panel = 0;
        loop {
            panel = 1 - panel;
            let next = piece.next(problem, panels[panel]);
            let mut opened = 0;
            for first in rows.clone().step_by(TILE_ROWS) {
                let at = first / TILE_ROWS * x.blocks.div_ceil(2) + piece.span / 2;
                let activations = activations.add(at * PAIR);
                let current = Sums::new(problem, &piece, first, staged, sums);
                let open = || {
                    if let Some(next) = &next {
                        next.open(opened, opened + each);
                        opened += each;
                    }
                };
                match set {
                    0 => tile::<0, ROWS>(&piece, activations, &current, &before, open),
                    _ => tile::<1, ROWS>(&piece, activations, &current, &before, open),
                }
                before = current;
                set = 1 - set;
            }
            match next {
                Some(next) => piece = next,
                None => break,
            }
        }
        match set {
            0 => store::<1>(staged),
            _ => store::<0>(staged),
        }
        (0..STEPS).for_each(|step| before.add::<ROWS>(step));
    }
}

/// Multiplies a piece with 16 rows of activations, the sums being `current`; adds up the sums of `before`, and opens what comes next.
///
/// # Safety
/// The instruction set is there and the tiles are configured; there are as many activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<const SET: usize, const ROWS: usize>(
    piece: &Piece,
    activations: *const u8,
    current: &Sums,
    before: &Sums,
    mut open: impl FnMut(),
) {
    let steps = piece.blocks.div_ceil(2);
    macro_rules! steps {
        ($($step:literal)*) => {$(
            // SAFETY: the caller's promise.
            unsafe {
                if $step < steps {
                    multiply::<SET>(activations.add($step * PAIR), piece.panel.add($step * 2 * TILE_BYTES));
                }
                if $step == 0 {
                    // The other set's.
                    match SET {
                        0 => store::<1>(before.tiles),
                        _ => store::<0>(before.tiles),
                    }
                }
                open();
                current.announce::<ROWS>($step);
                before.add::<ROWS>($step);
            }
        )*};
    }
    // SAFETY: the caller's promise.
    unsafe { zero::<SET>() }
    // Written out, so that nothing is left to decide.
    steps!(0 1);
}

const _: () = assert!(STEPS == 2);

/// See [`Tile::rows`](super::super::instances::Tile::rows): few rows of activations, which stay in registers. Products of a block's
/// codes, less 8, with bytes of activations are 16-bit integers, and are multiplied with the scale as such.
///
/// # Safety
/// As for [`Tile::rows`](super::super::instances::Tile::rows), with fixed weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn few<const T: usize>(group: &Group<'_>, x: &Activations, first: usize, out: &mut [[f32; LANES]]) {
    let layout = const { layout_of::<4, OFFSET>() };
    let lower = _mm512_set1_epi32(0xffff);
    let mut sums = [_mm512_setzero_ps(); T];
    for span in (0..x.blocks).step_by(SPAN) {
        let mut high = [_mm512_setzero_si512(); T];
        let mut low = [_mm512_setzero_si512(); T];
        for block in span..x.blocks.min(span + SPAN) {
            // SAFETY: the caller's promise; all accesses lie in block `block` of the group and of `T` rows.
            unsafe {
                if group.fetch {
                    prefetch::<4, OFFSET, T>(group.codes.as_ptr(), block);
                }
                let weights = unpack::<4>(group.codes.as_ptr().add(block * layout.code_bytes()));
                let pairs = _mm512_loadu_si512(group.scales.as_ptr().add(64 * block).cast());
                // The offset of codes less 8.
                let pairs = _mm512_add_epi32(pairs, _mm512_slli_epi32::<{ 16 + 3 }>(pairs));
                for t in 0..T {
                    let at = (first + t) * x.blocks + block;
                    let quads = x.codes.as_ptr().add(at).cast::<i32>();
                    let run = &*x.scales.as_ptr().add(at);
                    let mut dots = run.centre.map(|sum| _mm512_set1_epi32(sum));
                    for (q, &weights) in weights.iter().enumerate() {
                        let (h, l) = (quads.add(q).read(), quads.add(8 + q).read());
                        dots[0] = _mm512_dpbusd_epi32(dots[0], weights, _mm512_set1_epi32(h));
                        dots[1] = _mm512_dpbusd_epi32(dots[1], weights, _mm512_set1_epi32(l));
                    }
                    // A dot product for the scale, the sum of activations for the offset.
                    let both = |plane: usize| {
                        let sum = _mm512_set1_epi32(run.upper[plane]);
                        or_and(sum, dots[plane], lower)
                    };
                    high[t] = _mm512_dpwssd_epi32(high[t], both(0), pairs);
                    low[t] = _mm512_dpwssd_epi32(low[t], both(1), pairs);
                }
            }
        }
        // SAFETY: the caller's promise.
        let unit = unsafe { unit(group.scales.as_ptr(), x.blocks, span) };
        for t in 0..T {
            let sum = _mm512_add_epi32(high[t], _mm512_srai_epi32::<8>(low[t]));
            // SAFETY: as above.
            let run = unsafe { &*x.scales.as_ptr().add((first + t) * x.blocks + span) };
            let scale = _mm512_mul_ps(unit, _mm512_set1_ps(run.scale));
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[t]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        // SAFETY: 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) }
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

    /// Opens the blocks from `first` to `end`, or as many as there are.
    ///
    /// # Safety
    /// The instruction set is there, and there is room at `panel`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn open(&self, first: usize, end: usize) {
        for block in first..end.min(self.blocks) {
            let at = self.span + block;
            prefetch::<4, OFFSET, TILE_ROWS>(self.codes, at);
            // SAFETY: the caller's promise; the panel's tiles are `[step][high, low]`, of 64 inputs each.
            unsafe {
                let codes = self.codes.add(at * const { layout_of::<4, OFFSET>() }.code_bytes());
                let pairs = _mm512_loadu_si512(self.pairs.add(at * 64).cast());
                let tile = self.panel.add(block / 2 * 2 * TILE_BYTES);
                open_block(codes, pairs, tile.add(block % 2 * (TILE_BYTES / 2)));
                if block + 1 == self.blocks && block % 2 == 0 {
                    // Whatever activations are thought to be there, they count nothing.
                    for line in 0..TILE_BYTES / 2 / 64 {
                        let to = tile.add(TILE_BYTES / 2 + 64 * line);
                        _mm512_store_si512(to.cast(), _mm512_setzero_si512());
                        _mm512_store_si512(to.add(TILE_BYTES).cast(), _mm512_setzero_si512());
                    }
                }
            }
        }
    }
}

/// Quad `quad` of a block of 4 bits as 16-bit integers: the codes with even index, then those with odd index.
///
/// # Safety
/// A block of codes at `codes`, on a cache line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack_words(codes: *const u8, quad: usize) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi16(15);
    // SAFETY: the caller's promise.
    let v = unsafe { _mm512_load_si512(codes.add(64 * (quad % 4)).cast()) };
    match quad / 4 {
        0 => [_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_srli_epi16::<8>(v), nibble)],
        _ => [_mm512_and_si512(_mm512_srli_epi16::<4>(v), nibble), _mm512_srli_epi16::<12>(v)],
    }
}

/// The weights of a block, `scale * code + offset`, to bytes: high ones to `to`, low ones a tile behind. In `pairs` a row's scale
/// lies below its offset.
///
/// # Safety
/// A block of codes at `codes`, and room at `to`, on a cache line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn open_block(codes: *const u8, pairs: __m512i, to: *mut u8) {
    let low_words = _mm512_set1_epi32(0xffff);
    let upper_bytes = _mm512_set1_epi16(0xff00u16 as i16);
    let scale = _mm512_or_si512(_mm512_and_si512(pairs, low_words), _mm512_slli_epi32::<16>(pairs));
    let offset = _mm512_or_si512(_mm512_andnot_si512(low_words, pairs), _mm512_srli_epi32::<16>(pairs));
    let weight = |code| _mm512_add_epi16(_mm512_mullo_epi16(code, scale), offset);
    // SAFETY: the caller's promise.
    unsafe {
        for quad in 0..8 {
            let [even, odd] = unpack_words(codes, quad);
            let (even, odd) = (weight(even), weight(odd));
            // a & mask | b & !mask
            let high = _mm512_ternarylogic_epi32::<0xac>(upper_bytes, _mm512_srli_epi16::<8>(even), odd);
            let low = _mm512_ternarylogic_epi32::<0xac>(upper_bytes, even, _mm512_slli_epi16::<8>(odd));
            _mm512_store_si512(to.add(64 * quad).cast(), high);
            _mm512_store_si512(to.add(TILE_BYTES + 64 * quad).cast(), low);
        }
    }
}

/// Sums of a piece for 16 rows of activations, on their way from tiles to the outputs.
struct Sums {
    /// Rows that there are.
    rows: usize,
    /// Tiles, `[plane]`.
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

    /// Asks for a part of the outputs' memory, that of step `step`.
    #[inline(always)]
    fn announce<const ROWS: usize>(&self, step: usize) {
        if self.is_last {
            for row in step * ROWS / STEPS..(step + 1) * ROWS / STEPS {
                announce(self.to.wrapping_add(row * self.to_stride + LANES - 1));
            }
        }
    }

    /// Adds a part of the sums, that of step `step`, to the sums over spans.
    ///
    /// # Safety
    /// The instruction set is there, and nobody else has to do with the outputs.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add<const ROWS: usize>(&self, step: usize) {
        let rows = step * ROWS / STEPS..(step + 1) * ROWS / STEPS;
        // SAFETY: the caller's promise.
        unsafe {
            if self.rows == ROWS {
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
            let tile = |plane: usize| _mm512_load_si512(self.tiles.add(plane * TILE_BYTES + 64 * row).cast());
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(tile(0)), tile(1));
            let sum = _mm512_add_epi32(sum, _mm512_srai_epi32::<8>(tile(2)));
            let scale = _mm512_mul_ps(self.unit, _mm512_set1_ps(*self.scales.add(row)));
            let before = _mm512_loadu_ps(self.from.add(row * self.from_stride));
            let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, before);
            _mm512_mask_storeu_ps(self.to.add(row * self.to_stride), self.lanes, sum);
        }
    }
}

/// Makes the sums of a set zero.
///
/// # Safety
/// The tiles are configured.
#[inline(always)]
unsafe fn zero<const SET: usize>() {
    // SAFETY: the caller's promise. No other code uses the tiles' registers.
    unsafe {
        match SET {
            0 => {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    options(nostack, nomem, preserves_flags)
                )
            }
            _ => {
                asm!(
                    "tilezero tmm3",
                    "tilezero tmm4",
                    "tilezero tmm5",
                    options(nostack, nomem, preserves_flags)
                )
            }
        }
    }
}

/// Adds the products of 64 inputs to the sums of a set.
///
/// # Safety
/// The tiles are configured; there are tiles of high and low bytes at `activations` and `weights`.
#[inline(always)]
unsafe fn multiply<const SET: usize>(activations: *const u8, weights: *const u8) {
    macro_rules! multiply {
        ($high:literal, $mixed:literal, $low:literal) => {
            asm!(
                "tileloadd tmm6, [{x} + {line}]",
                "tileloadd tmm7, [{w} + {line}]",
                concat!("tdpbssd ", $high, ", tmm6, tmm7"),
                "tileloadd tmm7, [{w} + {line} + 1024]",
                concat!("tdpbsud ", $mixed, ", tmm6, tmm7"),
                "tileloadd tmm6, [{x} + {line} + 1024]",
                concat!("tdpbsud ", $low, ", tmm6, tmm7"),
                "tileloadd tmm7, [{w} + {line}]",
                concat!("tdpbssd ", $mixed, ", tmm6, tmm7"),
                x = in(reg) activations,
                w = in(reg) weights,
                line = in(reg) 64usize,
                options(nostack, readonly, preserves_flags),
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match SET {
            0 => multiply!("tmm0", "tmm1", "tmm2"),
            _ => multiply!("tmm3", "tmm4", "tmm5"),
        }
    }
}

/// Stores the sums of a set.
///
/// # Safety
/// The tiles are configured, and there is room for all of them at `to`.
#[inline(always)]
unsafe fn store<const SET: usize>(to: *mut u8) {
    macro_rules! store {
        ($high:literal, $mixed:literal, $low:literal) => {
            asm!(
                concat!("tilestored [{to} + {line}], ", $high),
                concat!("tilestored [{to} + {line} + 1024], ", $mixed),
                concat!("tilestored [{to} + {line} + 2048], ", $low),
                to = in(reg) to,
                line = in(reg) 64usize,
                options(nostack, preserves_flags),
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match SET {
            0 => store!("tmm0", "tmm1", "tmm2"),
            _ => store!("tmm3", "tmm4", "tmm5"),
        }
    }
}
