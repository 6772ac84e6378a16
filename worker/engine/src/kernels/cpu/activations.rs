//! Activations as 16-bit integers, so that a product of quantised weights is a product of integers.
//!
//! Each run of 32 inputs gets a scale of its own (its largest magnitude over 32,512); rounding errors then stay below
//! what single-precision references differ by among themselves, even with outliers, where 8 bits change the text. The
//! order in which the integers lie in memory is what the instruction set wants; see [`Codes`].

use std::marker::PhantomData;

use super::format::BLOCK;
use super::isa::Isa;
use super::pack::Shared;
use super::pool::Pool;

/// The largest integer: 127 * 256, so that both bytes of `256 * high + low` fit signed bytes.
const LARGEST: f32 = 32_512.0;
/// Runs below this are taken for zero; their scale's reciprocal would overflow.
const SMALLEST: f32 = 1e-30;

/// Values that are worth another thread.
pub(crate) const WORTH: usize = 3072;

/// 32 integers `v`.
/// - AVX-512, AMX and NEON: 32 bytes `high`, then 32 bytes `low`, both signed, `v = 256 * high + low`;
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
/// idle; with AVX2 it is as many as do not stay in registers.
fn worth_tiles(isa: Isa) -> usize {
    match isa {
        Isa::Amx => 6,
        Isa::Avx2 => 3,
        _ => usize::MAX,
    }
}

/// Quantised activations `[rows, blocks]`, or, for AMX and AVX2 if there are enough rows, `[tiles of 16 rows, blocks, 16]`. The
/// vectors only grow: a model's products differ in width, and memory that came and went with them would be zeroed each
/// time.
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
    pub fn begin(&mut self, pool: &Pool, rows: usize, cols: usize) -> Quantiser<'_> {
        assert!(cols > 0 && cols.is_multiple_of(BLOCK), "{cols} columns are no runs of {BLOCK}");
        let blocks = cols / BLOCK;
        (self.rows, self.blocks) = (rows, blocks);
        self.tiled = rows >= worth_tiles(pool.isa());
        // What the last tile holds beyond the rows is never looked at.
        let runs = blocks * if self.tiled { rows.next_multiple_of(TILE_ROWS) } else { rows };
        grow(&mut self.codes, runs, Codes([0; 64]));
        if self.tiled {
            grow(&mut self.tiles, runs / TILE_ROWS, TileScales::default());
        } else {
            grow(&mut self.scales, runs, RunScale::default());
        }
        let places = Places {
            codes: Shared(self.codes.as_mut_ptr()),
            scales: Shared(self.scales.as_mut_ptr()),
            tiles: Shared(self.tiles.as_mut_ptr()),
            blocks,
        };
        let (kernel, values) = (kernel(pool.isa(), self.tiled), rows * cols);
        Quantiser { places, kernel, values, activations: PhantomData }
    }

    /// Quantises `x`, whole rows of `cols` values, for kernels of the pool's instruction set.
    ///
    /// # Panics
    /// If `x` is no whole rows, or `cols` no multiple of 32.
    pub(super) fn quantise(&mut self, pool: &Pool, x: &[f32], cols: usize) {
        let to = self.begin(pool, x.len() / cols.max(1), cols);
        assert_eq!(x.len(), to.values);
        pool.split(x.len() / BLOCK, WORTH / BLOCK, |runs| {
            let values = runs.start * BLOCK..runs.end * BLOCK;
            // SAFETY: tasks have runs of their own.
            unsafe { to.put(values.start, &x[values]) }
        });
    }
}

/// Quantises parts of activations, see [`Activations::begin`].
pub struct Quantiser<'a> {
    places: Places,
    kernel: Kernel,
    /// How many there are in all.
    values: usize,
    activations: PhantomData<&'a mut Activations>,
}

impl Quantiser<'_> {
    /// Quantises `x`, which are whole runs of activations, the first of which is number `first`, counted row by row.
    ///
    /// # Panics
    /// If they are no runs, or there are not so many.
    ///
    /// # Safety
    /// Nobody else quantises the same ones at the same time.
    pub(super) unsafe fn put(&self, first: usize, x: &[f32]) {
        assert!(
            first.is_multiple_of(BLOCK) && x.len().is_multiple_of(BLOCK) && first + x.len() <= self.values
        );
        // SAFETY: `begin` made room for the runs, for kernels of an instruction set that is there; the rest is the caller's promise.
        unsafe { (self.kernel)(x, first / BLOCK, &self.places) }
    }
}

/// Makes room for `len` elements.
fn grow<T: Clone>(vector: &mut Vec<T>, len: usize, value: T) {
    if vector.len() < len {
        vector.resize(len, value);
    }
}

/// Scale and its reciprocal of a run whose largest magnitude is `largest`.
#[inline(always)]
fn scale_of(largest: f32) -> (f32, f32) {
    if largest < SMALLEST { (0.0, 0.0) } else { (largest / LARGEST, LARGEST / largest) }
}

/// Where a run's integers go, and what they mean.
struct Places {
    codes: Shared<Codes>,
    scales: Shared<RunScale>,
    tiles: Shared<TileScales>,
    blocks: usize,
}

impl Places {
    /// The place for the codes of run `run`, counted row by row, once its scale is put where it belongs.
    ///
    /// # Safety
    /// There is such a run, nobody else has its places, and rows are not in tiles.
    #[inline(always)]
    unsafe fn put(&self, run: usize, scale: RunScale) -> *mut Codes {
        // SAFETY: the caller's promise; `quantise` made room for all runs.
        unsafe { *self.scales.at(run) = scale };
        self.codes.at(run)
    }

    /// The same for block `block` of row `row`, if rows are in tiles.
    ///
    /// # Safety
    /// There is such a run, nobody else has its places, and rows are in tiles.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only AMX and AVX2 have tiles"))]
    #[inline(always)]
    unsafe fn put_in_tile(&self, row: usize, block: usize, scale: RunScale) -> *mut Codes {
        let (index, row) = (row / TILE_ROWS * self.blocks + block, row % TILE_ROWS);
        // SAFETY: the caller's promise; `quantise` made room for all tiles. Of a tile's scales each row has its own; a
        // reference to all would claim the others'.
        unsafe {
            let tile = self.tiles.at(index);
            (&raw mut (*tile).scale[row]).write(scale.scale);
            (&raw mut (*tile).sum[row]).write(scale.sum);
        }
        self.codes.at(index * TILE_ROWS + row)
    }
}

/// Quantises runs, the first of which is number `first`, to where they belong.
type Kernel = unsafe fn(&[f32], usize, &Places);

fn kernel(isa: Isa, tiled: bool) -> Kernel {
    match isa {
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => planes,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if tiled => x86::avx2::<true>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::avx2::<false>,
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if tiled => x86::avx512::<true>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => x86::avx512::<false>,
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
    for (run, x) in x.chunks_exact(BLOCK).enumerate() {
        // Magnitudes compared as integers: a NaN is the largest and so spoils its run, as it should.
        let mut largest = 0;
        for value in x {
            largest = largest.max(value.to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(largest);
        let (scale, inverse) = scale_of(largest);
        let mut v = [0i16; BLOCK];
        let mut sum = 0i32;
        for (v, x) in v.iter_mut().zip(x) {
            // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
            let integer = ((x * inverse + 12_582_912.0).to_bits() as i32).wrapping_sub(0x4b40_0000) as i16;
            *v = integer;
            sum += i32::from(integer);
        }
        let run_scale = RunScale { scale, sum: scale * sum as f32, integer_sum: sum };
        // SAFETY: the caller's promise.
        put(&v, unsafe { &mut *to.put(first + run, run_scale) });
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
        let (mut row, mut block) = (first / to.blocks, first % to.blocks);
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        // In each four of 16 bits, those with even index first.
        let even_first =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
        for (run, x) in x.chunks_exact(BLOCK).enumerate() {
            // SAFETY: a run is 32 values, and codes are 64 bytes; the rest is the caller's promise.
            unsafe {
                let load = |i: usize| _mm256_loadu_ps(x.as_ptr().add(8 * i));
                let x = [load(0), load(1), load(2), load(3)];
                let bits = |x: __m256| _mm256_and_si256(_mm256_castps_si256(x), magnitude);
                let max = |a, b| _mm256_max_epi32(a, b);
                let largest = max(max(bits(x[0]), bits(x[1])), max(bits(x[2]), bits(x[3])));
                let largest =
                    _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
                let largest = _mm_max_epi32(largest, _mm_shuffle_epi32::<0b01_00_11_10>(largest));
                let largest = _mm_max_epi32(largest, _mm_shuffle_epi32::<0b10_11_00_01>(largest));
                let largest = f32::from_bits(_mm_cvtsi128_si32(largest) as u32);
                let (scale, inverse) = scale_of(largest);
                let inverse = _mm256_set1_ps(inverse);
                let v = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
                let sum = sum(_mm256_add_epi32(_mm256_add_epi32(v[0], v[1]), _mm256_add_epi32(v[2], v[3])));
                let run_scale = RunScale { scale, sum: scale * sum as f32, integer_sum: sum };
                let codes = match TILED {
                    true => to.put_in_tile(row, block, run_scale),
                    false => to.put(first + run, run_scale),
                };
                for (i, v) in v.chunks_exact(2).enumerate() {
                    // Packing joins the halves of its operands in turn.
                    let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
                    let v = _mm256_shuffle_epi8(packed, even_first);
                    _mm256_store_si256(codes.cast::<__m256i>().add(i), v);
                }
            }
            block += 1;
            if block == to.blocks {
                (row, block) = (row + 1, 0);
            }
        }
    }

    /// # Safety
    /// As for [`Places::put`] or [`Places::put_in_tile`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn avx512<const TILED: bool>(x: &[f32], first: usize, to: &Places) {
        // Divided once, not for each run.
        let (mut row, mut block) = (first / to.blocks, first % to.blocks);
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        for (run, x) in x.chunks_exact(BLOCK).enumerate() {
            // SAFETY: a run is 32 values, and codes are 64 bytes; the rest is the caller's promise.
            unsafe {
                let (a, b) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
                let largest = _mm512_max_epi32(
                    _mm512_and_si512(_mm512_castps_si512(a), magnitude),
                    _mm512_and_si512(_mm512_castps_si512(b), magnitude),
                );
                let largest = f32::from_bits(_mm512_reduce_max_epi32(largest) as u32);
                let (scale, inverse) = scale_of(largest);
                let inverse = _mm512_set1_ps(inverse);
                let a = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
                let b = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
                let sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
                let run_scale = RunScale { scale, sum: scale * sum as f32, integer_sum: sum };
                let codes = match TILED {
                    true => to.put_in_tile(row, block, run_scale),
                    false => to.put(first + run, run_scale),
                };
                let codes = codes.cast::<__m128i>();
                for (i, v) in [a, b].into_iter().enumerate() {
                    // The low byte counts as signed, so the high one is that of v + 128.
                    let high = _mm512_srai_epi32::<8>(_mm512_add_epi32(v, _mm512_set1_epi32(128)));
                    _mm_store_si128(codes.add(i), _mm512_cvtepi32_epi8(high));
                    _mm_store_si128(codes.add(2 + i), _mm512_cvtepi32_epi8(v));
                }
            }
            block += 1;
            if block == to.blocks {
                (row, block) = (row + 1, 0);
            }
        }
    }
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
        let integers = |a: &Activations, place: usize, isa| -> Vec<i32> {
            let b = &a.codes[place].0;
            let wide = |i: usize| i32::from(i16::from_le_bytes([b[2 * i], b[2 * i + 1]]));
            (0..BLOCK)
                .map(|i| match isa {
                    Isa::Portable => wide(i),
                    Isa::Avx2 => wide(i / 4 * 4 + [0, 2, 1, 3][i % 4]),
                    Isa::Neon | Isa::Avx512 | Isa::Amx => {
                        256 * i32::from(b[i] as i8) + i32::from(b[32 + i] as i8)
                    }
                })
                .collect()
        };
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let mut other = Activations::default();
            other.quantise(&Pool::with_isa(2, isa), &x, blocks * BLOCK);
            assert_eq!(other.tiled, matches!(isa, Isa::Amx | Isa::Avx2));
            for run in 0..rows * blocks {
                let a = reference.scales[run];
                let mut place = run;
                if other.tiled {
                    let (row, block) = (run / blocks, run % blocks);
                    let (tile, row) = (row / TILE_ROWS * blocks + block, row % TILE_ROWS);
                    place = tile * TILE_ROWS + row;
                    let b = other.tiles[tile];
                    assert_eq!((a.scale, a.sum), (b.scale[row], b.sum[row]), "{isa}, run {run}");
                } else {
                    let b = other.scales[run];
                    assert_eq!((a.scale, a.sum, a.integer_sum), (b.scale, b.sum, b.integer_sum));
                }
                let (got, want) = (integers(&other, place, isa), integers(&reference, run, Isa::Portable));
                assert_eq!(got, want, "{isa}, run {run}");
                for (v, x) in got.iter().zip(&x[run * BLOCK..]) {
                    assert!((*v as f32 * a.scale - x).abs() <= 0.502 * a.scale, "{v} for {x}");
                }
            }
        }
    }

    #[test]
    fn a_nan_spoils_its_run() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let mut x = vec![1.0; 2 * BLOCK];
            x[5] = f32::NAN;
            let mut a = Activations::default();
            a.quantise(&Pool::with_isa(1, isa), &x, 2 * BLOCK);
            assert!(a.scales[0].scale.is_nan() && !a.scales[1].scale.is_nan(), "{isa}");
        }
    }
}
