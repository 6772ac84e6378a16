//! Activations as integers of 16 bits, so that a product of quantised weights is a product of integers.
//!
//! Each *span* of 32 inputs, or on AMX of 128, gets a scale of its own (its largest magnitude over the largest integer); rounding
//! errors then stay below what single-precision references differ by among themselves, even with outliers, where 8 bits change
//! the text. The order in which the integers lie in memory is what the instruction set wants; see [`Codes`].

use std::marker::PhantomData;

use super::format::BLOCK;
use super::isa::Isa;
use super::pack::Shared;
use super::pool::Pool;

/// The largest integer: 127 * 256, so that both bytes of `256 * high + low` fit signed bytes.
const LARGEST: f32 = 32_512.0;
/// Spans below this are taken for zero; their scale's reciprocal would overflow.
const SMALLEST: f32 = 1e-30;

/// Runs of a row that share a scale on AMX, as blocks of weights do there. The last of a row may be fewer. Twice as many would be a
/// tenth faster with many rows, but three times as far from f32 (mean divergence 1.5e-6 for 5e-7 nats).
pub(in crate::kernels) const SPAN: usize = 4;

/// Values that are worth another thread.
const WORTH: usize = 3072;

/// 32 integers `v`.
/// - AVX-512 and NEON: 32 bytes `high`, then 32 bytes `low`, both signed, `v = 256 * high + low`; on AVX-512 low ones are at
///   least -127, see [`x86::bytes`];
/// - AMX, in tiles: the same bytes, but those of two blocks together: 64 bytes `high` of each of 16 rows, then `low`;
/// - AVX2: i16, in each four those with even index first: 0, 2, 1, 3;
/// - portable: i16 in order.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Codes(pub [u8; 64]);

/// What the integers of a run mean.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct RunScale {
    /// A value is `scale * v`.
    pub scale: f32,
    /// Sum of the run: `scale * sum of v`.
    pub sum: f32,
    /// Sum of `v`.
    pub integer_sum: i32,
    /// On AMX the sum of `high` and that of `low`, in the upper half of 32 bits.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX needs them"))]
    pub upper: [i32; 2],
    /// There the same sums times -8, which makes codes of 4 bits signed.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX needs them"))]
    pub centre: [i32; 2],
}

/// What the integers of a block mean, for each of a tile's rows; see [`RunScale`].
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct TileScales {
    pub scale: [f32; TILE_ROWS],
    pub sum: [f32; TILE_ROWS],
}

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;

/// From so many rows on products are by tiles. With AMX it takes some until that is faster, as a part of the last one is
/// idle; with AVX2 it is when opening blocks is cheaper than to unpack them for each four.
fn worth_tiles(isa: Isa) -> usize {
    match isa {
        Isa::Amx => 9,
        Isa::Avx2 => 8,
        _ => usize::MAX,
    }
}

/// Quantised activations `[rows, blocks]`, or, if there are enough rows, `[tiles of 16 rows, blocks, 16]` for AVX2 and
/// `[tiles of 16 rows, pairs of blocks, 2, 16]` for AMX. The vectors only grow: a model's products differ in width, and memory that
/// came and went with them would be zeroed each time.
#[derive(Default)]
pub struct Activations {
    pub(super) rows: usize,
    pub(super) blocks: usize,
    pub(super) codes: Vec<Codes>,
    /// Where rows are not in tiles.
    pub(super) scales: Vec<RunScale>,
    /// Where they are: `[tiles, blocks]`.
    pub(super) tiles: Vec<TileScales>,
    pub(super) tiled: bool,
}

impl Activations {
    /// Makes room for `[rows, cols]` activations, which are then quantised part by part, as they become known: that way they are
    /// still in the cache, and no pass over them is needed in which threads wait for one another.
    ///
    /// # Panics
    /// If `cols` is no multiple of 32.
    fn begin(&mut self, pool: &Pool, rows: usize, cols: usize) -> Quantiser<'_> {
        assert!(cols > 0 && cols.is_multiple_of(BLOCK), "{cols} columns are no runs of {BLOCK}");
        let blocks = cols / BLOCK;
        (self.rows, self.blocks) = (rows, blocks);
        self.tiled = rows >= worth_tiles(pool.isa());
        // What the last tile holds beyond the rows is never looked at.
        if self.tiled {
            let tiles = rows.div_ceil(TILE_ROWS);
            grow(&mut self.codes, tiles * TILE_ROWS * blocks.next_multiple_of(2), Codes([0; 64]));
            grow(&mut self.tiles, tiles * blocks, TileScales::default());
        } else {
            grow(&mut self.codes, rows * blocks, Codes([0; 64]));
            grow(&mut self.scales, rows * blocks, RunScale::default());
        }
        let places = Places {
            codes: Shared(self.codes.as_mut_ptr()),
            scales: Shared(self.scales.as_mut_ptr()),
            tiles: Shared(self.tiles.as_mut_ptr()),
            blocks,
            span: if pool.isa() == Isa::Amx { SPAN } else { 1 },
        };
        let (kernel, values) = (kernel(pool.isa(), self.tiled), rows * cols);
        Quantiser { places, kernel, values, activations: PhantomData }
    }

    /// [`begin`](Self::begin), where that is worth it: what a single thread quantises once it is asked for takes no pass of its own,
    /// and the thread has it at hand. `None` also where rows are no whole runs.
    pub fn begin_if_worth(&mut self, pool: &Pool, rows: usize, cols: usize) -> Option<Quantiser<'_>> {
        let is_worth = rows * cols >= 2 * WORTH && cols.is_multiple_of(BLOCK);
        is_worth.then(|| self.begin(pool, rows, cols))
    }

    /// Quantises `x`, whole rows of `cols` values, for kernels of the pool's instruction set.
    ///
    /// # Panics
    /// If `x` is no whole rows, or `cols` no multiple of 32.
    pub(super) fn quantise(&mut self, pool: &Pool, x: &[f32], cols: usize) {
        let rows = x.len() / cols.max(1);
        let to = self.begin(pool, rows, cols);
        assert_eq!(x.len(), to.values);
        pool.split(rows, WORTH.div_ceil(cols), |rows| {
            let values = rows.start * cols..rows.end * cols;
            // SAFETY: tasks have rows of their own.
            unsafe { to.put(values.start, &x[values]) }
        });
    }
}

/// Quantises parts of activations, see [`Activations::begin_if_worth`].
pub struct Quantiser<'a> {
    places: Places,
    kernel: Kernel,
    /// How many there are in all.
    values: usize,
    activations: PhantomData<&'a mut Activations>,
}

impl Quantiser<'_> {
    /// Values of a row.
    pub(super) fn cols(&self) -> usize {
        self.places.blocks * BLOCK
    }

    /// Quantises `x`, which are whole spans of activations, the first of which is number `first`, counted row by row.
    ///
    /// # Panics
    /// If they are no spans, or there are not so many.
    ///
    /// # Safety
    /// Nobody else quantises the same ones at the same time.
    pub(super) unsafe fn put(&self, first: usize, x: &[f32]) {
        let is_bound = |value: usize| (value % self.cols()).is_multiple_of(self.places.span * BLOCK);
        assert!(is_bound(first) && is_bound(first + x.len()) && first + x.len() <= self.values);
        // SAFETY: `begin` made room for the runs, for kernels of an instruction set that is there; the rest is the caller's promise.
        unsafe { (self.kernel)(x, first / BLOCK, &self.places) }
    }
}

/// Makes room for `len` elements.
pub(super) fn grow<T: Clone>(vector: &mut Vec<T>, len: usize, value: T) {
    if vector.len() < len {
        vector.resize(len, value);
    }
}

/// Scale and its reciprocal of a span whose largest magnitude is `largest`.
#[inline(always)]
pub(super) fn scale_of(largest: f32) -> (f32, f32) {
    if largest < SMALLEST { (0.0, 0.0) } else { (largest / LARGEST, LARGEST / largest) }
}

/// Where a run's integers go, and what they mean.
struct Places {
    codes: Shared<Codes>,
    scales: Shared<RunScale>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only there are rows in tiles"))]
    tiles: Shared<TileScales>,
    blocks: usize,
    /// Runs that share a scale.
    span: usize,
}

impl Places {
    /// Splits `x`, whole spans, the first run of which is number `first`, into these: row and block that each begins with, and
    /// its values.
    #[inline(always)]
    fn spans<'x>(
        &self,
        mut x: &'x [f32],
        first: usize,
    ) -> impl Iterator<Item = (usize, usize, &'x [f32])> + use<'x> {
        let (blocks, span) = (self.blocks, self.span);
        // Divided once, not for each.
        let (mut row, mut block) = (first / blocks, first % blocks);
        std::iter::from_fn(move || {
            let runs = span.min(blocks - block).min(x.len() / BLOCK);
            let values;
            (values, x) = x.split_at(runs * BLOCK);
            let place = (row, block);
            block += runs;
            if block == blocks {
                (row, block) = (row + 1, 0);
            }
            (runs > 0).then_some((place.0, place.1, values))
        })
    }

    /// The place for the codes of block `block` of row `row`, once its scale is put where it belongs.
    ///
    /// # Safety
    /// There is such a run, nobody else has its places, and rows are not in tiles.
    #[inline(always)]
    unsafe fn put(&self, row: usize, block: usize, scale: RunScale) -> *mut Codes {
        let run = row * self.blocks + block;
        // SAFETY: the caller's promise; `begin` made room for all runs.
        unsafe { *self.scales.at(run) = scale };
        self.codes.at(run)
    }

    /// Puts the scale of a run where it belongs if rows are in tiles.
    ///
    /// # Safety
    /// As for [`Places::put`], but rows are in tiles.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn put_in_tile(&self, row: usize, block: usize, scale: f32, sum: f32) {
        let (index, row) = (row / TILE_ROWS * self.blocks + block, row % TILE_ROWS);
        // SAFETY: the caller's promise; `begin` made room for all tiles. Of a tile's scales each row has its own; a
        // reference to all would claim the others'.
        unsafe {
            let tile = self.tiles.at(index);
            (&raw mut (*tile).scale[row]).write(scale);
            (&raw mut (*tile).sum[row]).write(sum);
        }
    }
}

/// Quantises spans, the first run of which is number `first`, to where they belong.
type Kernel = unsafe fn(&[f32], usize, &Places);

fn kernel(isa: Isa, tiled: bool) -> Kernel {
    // Only some of x86's processors take rows in tiles.
    let _ = tiled;
    match isa {
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => planes,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if tiled => x86::avx2::<true>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::avx2::<false>,
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if tiled => x86::amx::<true>,
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => x86::amx::<false>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => x86::avx512,
        _ => portable,
    }
}

/// # Safety
/// As for [`Places::put`].
unsafe fn portable(x: &[f32], first: usize, to: &Places) {
    let put = |v: &[i16; BLOCK], codes: &mut Codes| {
        for (bytes, v) in codes.0.chunks_exact_mut(2).zip(v) {
            bytes.copy_from_slice(&v.to_le_bytes());
        }
    };
    // SAFETY: the caller's promise.
    unsafe { each_run(x, first, to, put) }
}

/// Bytes apart, as instructions for products of bytes want them.
///
/// # Safety
/// As for [`Places::put`].
#[cfg(target_arch = "aarch64")]
unsafe fn planes(x: &[f32], first: usize, to: &Places) {
    let put = |v: &[i16; BLOCK], codes: &mut Codes| {
        let (high, low) = codes.0.split_at_mut(BLOCK);
        for ((high, low), v) in high.iter_mut().zip(low).zip(v) {
            // The low byte counts as signed, so the high one is that of v + 128.
            (*high, *low) = ((v.wrapping_add(128) >> 8) as u8, *v as u8);
        }
    };
    // SAFETY: the caller's promise.
    unsafe { each_run(x, first, to, put) }
}

/// Quantises runs and hands the integers to `put`, with the place for them. In plain operations, which compilers turn into
/// vectors.
///
/// # Safety
/// As for [`Places::put`].
#[inline(always)]
unsafe fn each_run(x: &[f32], first: usize, to: &Places, put: impl Fn(&[i16; BLOCK], &mut Codes)) {
    for (row, block, x) in to.spans(x, first) {
        // Magnitudes compared as integers: a NaN is the largest and so spoils its span, as it should.
        let mut largest = 0;
        for value in x {
            largest = largest.max(value.to_bits() & 0x7fff_ffff);
        }
        let (scale, inverse) = scale_of(f32::from_bits(largest));
        for (run, x) in x.chunks_exact(BLOCK).enumerate() {
            let mut v = [0i16; BLOCK];
            let mut sum = 0i32;
            for (v, x) in v.iter_mut().zip(x) {
                // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
                let integer =
                    ((x * inverse + 12_582_912.0).to_bits() as i32).wrapping_sub(0x4b40_0000) as i16;
                *v = integer;
                sum += i32::from(integer);
            }
            let run_scale =
                RunScale { scale, sum: scale * sum as f32, integer_sum: sum, ..RunScale::default() };
            // SAFETY: the caller's promise.
            put(&v, unsafe { &mut *to.put(row, block + run, run_scale) });
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// Sum of eight integers.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn sum(v: __m256i) -> i32 {
        let four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
    }

    /// # Safety
    /// As for [`Places::put`] or [`Places::put_in_tile`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<const TILED: bool>(x: &[f32], first: usize, to: &Places) {
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        // In each four of 16 bits, those with even index first.
        let even_first =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
        for (row, block, x) in to.spans(x, first) {
            let mut largest = [_mm256_setzero_si256(); 4];
            for x in x.chunks_exact(BLOCK) {
                for (i, largest) in largest.iter_mut().enumerate() {
                    // SAFETY: a run is 32 values.
                    let bits = unsafe { _mm256_loadu_si256(x.as_ptr().add(8 * i).cast()) };
                    *largest = _mm256_max_epi32(*largest, _mm256_and_si256(bits, magnitude));
                }
            }
            let largest = _mm256_max_epi32(
                _mm256_max_epi32(largest[0], largest[1]),
                _mm256_max_epi32(largest[2], largest[3]),
            );
            let largest =
                _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
            let largest = _mm_max_epi32(largest, _mm_shuffle_epi32::<0b01_00_11_10>(largest));
            let largest = _mm_max_epi32(largest, _mm_shuffle_epi32::<0b10_11_00_01>(largest));
            let (scale, inverse) = scale_of(f32::from_bits(_mm_cvtsi128_si32(largest) as u32));
            let inverse = _mm256_set1_ps(inverse);
            for (run, x) in x.chunks_exact(BLOCK).enumerate() {
                // SAFETY: a run is 32 values, and codes are 64 bytes; the rest is the caller's promise.
                unsafe {
                    let load = |i: usize| _mm256_loadu_ps(x.as_ptr().add(8 * i));
                    let x = [load(0), load(1), load(2), load(3)];
                    let v = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
                    let sum =
                        sum(_mm256_add_epi32(_mm256_add_epi32(v[0], v[1]), _mm256_add_epi32(v[2], v[3])));
                    let (block, sum_of_values) = (block + run, scale * sum as f32);
                    let codes = if TILED {
                        to.put_in_tile(row, block, scale, sum_of_values);
                        let tile = row / TILE_ROWS * to.blocks + block;
                        to.codes.at(tile * TILE_ROWS + row % TILE_ROWS)
                    } else {
                        let scale =
                            RunScale { scale, sum: sum_of_values, integer_sum: sum, ..RunScale::default() };
                        to.put(row, block, scale)
                    };
                    for (i, v) in v.chunks_exact(2).enumerate() {
                        // Packing joins the halves of its operands in turn.
                        let packed =
                            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
                        let v = _mm256_shuffle_epi8(packed, even_first);
                        _mm256_store_si256(codes.cast::<__m256i>().add(i), v);
                    }
                }
            }
        }
    }

    /// The larger of corresponding lanes of four vectors, as magnitudes: those of the first vector of each four in the first
    /// lane, and so on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn largest_of_each(v: [__m512i; 4]) -> __m128i {
        let pair = |a, b| _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (a, b) = (pair(v[0], v[1]), pair(v[2], v[3]));
        let four = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        let two = _mm256_max_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64::<1>(four));
        _mm_max_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256::<1>(two))
    }

    /// Sums of four vectors' lanes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn sum_of_each(v: [__m256i; 4]) -> __m128i {
        let four = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256::<1>(four))
    }

    /// For spans of one run and rows that are not in tiles: four runs share what a processor does on single numbers, which is
    /// most of it. Without [`RunScale::upper`] and what follows it.
    ///
    /// # Safety
    /// As for [`Places::put`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) unsafe fn avx512(x: &[f32], first: usize, to: &Places) {
        debug_assert!(to.span == 1);
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let count = x.len() / BLOCK;
        for start in (0..count).step_by(4) {
            // The last is done again where there are no four.
            let runs = [start, start + 1, start + 2, start + 3].map(|run| run.min(count - 1));
            let mut largest = [_mm512_setzero_si512(); 4];
            for (largest, run) in largest.iter_mut().zip(runs) {
                // SAFETY: a run is 32 values.
                let bits = |i: usize| unsafe {
                    let bits = _mm512_loadu_si512(x.as_ptr().add(run * BLOCK + 16 * i).cast());
                    _mm512_and_si512(bits, magnitude)
                };
                *largest = _mm512_max_epi32(bits(0), bits(1));
            }
            let largest = _mm_castsi128_ps(largest_of_each(largest));
            let is_zero = _mm_cmp_ps_mask::<_CMP_LT_OQ>(largest, _mm_set1_ps(SMALLEST));
            let scale = _mm_maskz_mov_ps(!is_zero, _mm_div_ps(largest, _mm_set1_ps(LARGEST)));
            let inverse = _mm_maskz_mov_ps(!is_zero, _mm_div_ps(_mm_set1_ps(LARGEST), largest));
            let mut inverses = [0.0; 4];
            // SAFETY: four values.
            unsafe { _mm_storeu_ps(inverses.as_mut_ptr(), inverse) };
            let (mut highs, mut lows) = ([_mm256_setzero_si256(); 4], [_mm256_setzero_si256(); 4]);
            for (k, run) in runs.into_iter().enumerate() {
                let inverse = _mm512_set1_ps(inverses[k]);
                // SAFETY: a run is 32 values, and codes are 64 bytes; the rest is the caller's promise.
                unsafe {
                    let (high, low) = bytes(x.as_ptr().add(run * BLOCK), inverse);
                    highs[k] = _mm256_dpbusd_epi32(highs[k], _mm256_set1_epi8(1), high);
                    lows[k] = _mm256_dpbusd_epi32(lows[k], _mm256_set1_epi8(1), low);
                    let codes = to.codes.at(first + run).cast::<__m256i>();
                    _mm256_store_si256(codes, high);
                    _mm256_store_si256(codes.add(1), low);
                }
            }
            let integers = _mm_add_epi32(_mm_slli_epi32::<8>(sum_of_each(highs)), sum_of_each(lows));
            let (mut scales, mut sums, mut integer_sums) = ([0.0; 4], [0.0; 4], [0; 4]);
            // SAFETY: four values each.
            unsafe {
                _mm_storeu_ps(scales.as_mut_ptr(), scale);
                _mm_storeu_ps(sums.as_mut_ptr(), _mm_mul_ps(scale, _mm_cvtepi32_ps(integers)));
                _mm_storeu_si128(integer_sums.as_mut_ptr().cast(), integers);
            }
            for (k, run) in runs.into_iter().enumerate() {
                // SAFETY: the caller's promise; `begin` made room for all runs.
                unsafe {
                    let to = to.scales.at(first + run);
                    (&raw mut (*to).scale).write(scales[k]);
                    (&raw mut (*to).sum).write(sums[k]);
                    (&raw mut (*to).integer_sum).write(integer_sums[k]);
                }
            }
        }
    }

    /// The integers of a run, `x` times `inverse`, as their high and low bytes, which are signed: the high one is that of `v + 128`.
    /// Low ones are at least -127, which is off by one where -128 would be nearest: 32 products of them with codes of 4 bits less 8
    /// are 16-bit integers then.
    ///
    /// # Safety
    /// 32 values at `x`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn bytes(x: *const f32, inverse: __m512) -> (__m256i, __m256i) {
        let in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        // SAFETY: the caller's promise.
        let integers =
            |i: usize| unsafe { _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x.add(16 * i)), inverse)) };
        let v = _mm512_permutexvar_epi64(in_order, _mm512_packs_epi32(integers(0), integers(1)));
        let high = _mm512_srai_epi16::<8>(_mm512_add_epi16(v, _mm512_set1_epi16(128)));
        (_mm512_cvtepi16_epi8(high), _mm256_max_epi8(_mm512_cvtepi16_epi8(v), _mm256_set1_epi8(-127)))
    }

    /// Transposes four vectors of four lanes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn transposed(v: [__m128i; 4]) -> [__m128i; 4] {
        let (a, b) = (_mm_unpacklo_epi32(v[0], v[1]), _mm_unpackhi_epi32(v[0], v[1]));
        let (c, d) = (_mm_unpacklo_epi32(v[2], v[3]), _mm_unpackhi_epi32(v[2], v[3]));
        [
            _mm_unpacklo_epi64(a, c),
            _mm_unpackhi_epi64(a, c),
            _mm_unpacklo_epi64(b, d),
            _mm_unpackhi_epi64(b, d),
        ]
    }

    /// For spans of four runs: their sums are taken together.
    ///
    /// # Safety
    /// As for [`Places::put`] or [`Places::put_in_tile`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) unsafe fn amx<const TILED: bool>(x: &[f32], first: usize, to: &Places) {
        debug_assert!(to.span == SPAN && SPAN == 4);
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        for (row, block, x) in to.spans(x, first) {
            let count = x.len() / BLOCK;
            // The last is done again where there are no four.
            let runs = [0, 1, 2, 3].map(|run: usize| run.min(count - 1));
            let mut largest = [_mm512_setzero_si512(); 2];
            for run in runs {
                for (i, largest) in largest.iter_mut().enumerate() {
                    // SAFETY: a run is 32 values.
                    let bits = unsafe { _mm512_loadu_si512(x.as_ptr().add(run * BLOCK + 16 * i).cast()) };
                    *largest = _mm512_max_epi32(*largest, _mm512_and_si512(bits, magnitude));
                }
            }
            let largest = _mm512_reduce_max_epi32(_mm512_max_epi32(largest[0], largest[1]));
            let (scale, inverse) = scale_of(f32::from_bits(largest as u32));
            let inverse = _mm512_set1_ps(inverse);
            let (mut highs, mut lows) = ([_mm256_setzero_si256(); SPAN], [_mm256_setzero_si256(); SPAN]);
            for (k, run) in runs.into_iter().enumerate() {
                // SAFETY: a run is 32 values, and codes are 64 bytes; the rest is the caller's promise.
                unsafe {
                    let (high, low) = bytes(x.as_ptr().add(run * BLOCK), inverse);
                    highs[k] = _mm256_dpbusd_epi32(highs[k], _mm256_set1_epi8(1), high);
                    lows[k] = _mm256_dpbusd_epi32(lows[k], _mm256_set1_epi8(1), low);
                    let block = block + run;
                    let (high_to, low_to) = if TILED {
                        let pair = row / TILE_ROWS * to.blocks.div_ceil(2) + block / 2;
                        let codes = to.codes.at(2 * TILE_ROWS * pair + row % TILE_ROWS).cast::<__m256i>();
                        (codes.add(block % 2), codes.add(2 * TILE_ROWS + block % 2))
                    } else {
                        let codes = to.codes.at(row * to.blocks + block).cast::<__m256i>();
                        (codes, codes.add(1))
                    };
                    _mm256_store_si256(high_to, high);
                    _mm256_store_si256(low_to, low);
                }
            }
            let (highs, lows) = (sum_of_each(highs), sum_of_each(lows));
            let integers = _mm_add_epi32(_mm_slli_epi32::<8>(highs), lows);
            let sums = _mm_mul_ps(_mm_set1_ps(scale), _mm_cvtepi32_ps(integers));
            if TILED {
                let mut each = [0.0; SPAN];
                // SAFETY: four values; the rest is the caller's promise.
                unsafe {
                    _mm_storeu_ps(each.as_mut_ptr(), sums);
                    for (run, sum) in each.into_iter().enumerate().take(count) {
                        to.put_in_tile(row, block + run, scale, sum);
                    }
                }
                continue;
            }
            let eighth = |v| _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32::<3>(v));
            let (upper_high, upper_low) = (_mm_slli_epi32::<16>(highs), _mm_slli_epi32::<16>(lows));
            let scales = _mm_castps_si128(_mm_set1_ps(scale));
            let begins = transposed([scales, _mm_castps_si128(sums), integers, upper_high]);
            let ends = transposed([upper_low, eighth(highs), eighth(lows), _mm_setzero_si128()]);
            for (run, (begin, end)) in begins.into_iter().zip(ends).enumerate().take(count) {
                // SAFETY: the caller's promise; the fields of a scale, in order.
                unsafe {
                    let to = to.scales.at(row * to.blocks + block + run).cast::<i32>();
                    _mm_storeu_si128(to.cast(), begin);
                    _mm_mask_storeu_epi32(to.add(4), 0b0111, end);
                }
            }
        }
    }

    const _: () = assert!(size_of::<RunScale>() == 28 && std::mem::offset_of!(RunScale, upper) == 12);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_sets_agree_on_the_integers() {
        // As many rows of three runs as are put into tiles, and then some.
        let (rows, blocks) = (TILE_ROWS + 2, 3);
        let x: Vec<f32> = (0..BLOCK * rows * blocks)
            .map(|i| ((i * 7919 % 1009) as f32 - 504.0) * [1e-3, 1.0, 0.0][i / BLOCK % 3])
            .collect();
        let mut reference = Activations::default();
        reference.quantise(&Pool::with_isa(1, Isa::Portable), &x, blocks * BLOCK);
        let integers = |a: &Activations, run: usize, isa| -> Vec<i32> {
            let (row, block) = (run / blocks, run % blocks);
            let (tile, in_tile) = (row / TILE_ROWS, row % TILE_ROWS);
            let place = match isa {
                Isa::Amx => (tile * blocks.div_ceil(2) + block / 2) * 2 * TILE_ROWS + in_tile,
                Isa::Avx2 => (tile * blocks + block) * TILE_ROWS + in_tile,
                _ => run,
            };
            let b = &a.codes[place].0;
            let wide = |i: usize| i32::from(i16::from_le_bytes([b[2 * i], b[2 * i + 1]]));
            let bytes = |high: u8, low: u8| 256 * i32::from(high as i8) + i32::from(low as i8);
            (0..BLOCK)
                .map(|i| match isa {
                    Isa::Portable => wide(i),
                    Isa::Avx2 => wide(i / 4 * 4 + [0, 2, 1, 3][i % 4]),
                    Isa::Neon | Isa::Avx512 => bytes(b[i], b[32 + i]),
                    Isa::Amx => {
                        let at = block % 2 * BLOCK + i;
                        bytes(b[at], a.codes[place + TILE_ROWS].0[at])
                    }
                })
                .collect()
        };
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let mut other = Activations::default();
            other.quantise(&Pool::with_isa(2, isa), &x, blocks * BLOCK);
            assert_eq!(other.tiled, matches!(isa, Isa::Amx | Isa::Avx2));
            for run in 0..rows * blocks {
                let (row, block) = (run / blocks, run % blocks);
                let got = integers(&other, run, isa);
                let sum: i32 = got.iter().sum();
                let scale = if other.tiled {
                    let tile = other.tiles[row / TILE_ROWS * blocks + block];
                    assert_eq!(tile.sum[row % TILE_ROWS], tile.scale[row % TILE_ROWS] * sum as f32);
                    tile.scale[row % TILE_ROWS]
                } else {
                    let scale = other.scales[run];
                    assert_eq!((scale.sum, scale.integer_sum), (scale.scale * sum as f32, sum));
                    scale.scale
                };
                // With AMX the largest of a span is that of the row; low bytes of -128 are avoided there and on AVX-512.
                let (widest, off) = match isa {
                    Isa::Amx => (row * blocks..(row + 1) * blocks, 1),
                    Isa::Avx512 => (run..run + 1, 1),
                    _ => (run..run + 1, 0),
                };
                let want = reference.scales[widest].iter().map(|run| run.scale).fold(0.0, f32::max);
                assert_eq!(scale, want, "{isa}, run {run}");
                for (i, (v, x)) in got.iter().zip(&x[run * BLOCK..]).enumerate() {
                    let limit = (0.502 + off as f32) * scale;
                    assert!((*v as f32 * scale - x).abs() <= limit, "{isa}: {v} for {x}");
                    if isa != Isa::Amx {
                        let want = integers(&reference, run, Isa::Portable)[i];
                        assert!((v - want).abs() <= off, "{isa}, run {run}: {v}, not {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_nan_spoils_its_run() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            // Two spans at least.
            let mut x = vec![1.0; 2 * SPAN * BLOCK];
            x[5] = f32::NAN;
            let mut a = Activations::default();
            a.quantise(&Pool::with_isa(1, isa), &x, x.len());
            assert!(a.scales[0].scale.is_nan() && !a.scales[SPAN].scale.is_nan(), "{isa}");
        }
    }
}
