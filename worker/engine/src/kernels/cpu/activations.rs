//! Activations as 16-bit integers, so that a product of quantised weights is a product of integers.
//!
//! Each run of 32 inputs gets a scale of its own (its largest magnitude over 32,512); rounding errors then stay below
//! what single-precision references differ by among themselves, even with outliers, where 8 bits change the text. The
//! order in which the integers lie in memory is what the instruction set wants; see [`Codes`].

use super::format::BLOCK;
use super::isa::Isa;
use super::pack::Shared;
use super::pool::Pool;

/// The largest integer: 127 * 256, so that both bytes of `256 * high + low` fit signed bytes.
const LARGEST: f32 = 32_512.0;
/// Runs below this are taken for zero; their scale's reciprocal would overflow.
const SMALLEST: f32 = 1e-30;

/// 32 integers `v`.
/// - AVX-512 and NEON: 32 bytes `high`, then 32 bytes `low`, both signed, `v = 256 * high + low`;
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

/// Quantised activations `[rows, blocks]`. The vectors only grow: a model's products differ in width, and memory that came
/// and went with them would be zeroed each time.
#[derive(Default)]
pub(super) struct Activations {
    pub rows: usize,
    pub blocks: usize,
    pub codes: Vec<Codes>,
    pub scales: Vec<RunScale>,
}

impl Activations {
    /// Quantises `x`, `[rows, blocks * 32]`, for kernels of the pool's instruction set.
    pub fn quantise(&mut self, pool: &Pool, x: &[f32], blocks: usize) {
        let rows = x.len() / (blocks * BLOCK).max(1);
        assert_eq!(x.len(), rows * blocks * BLOCK);
        (self.rows, self.blocks) = (rows, blocks);
        if self.codes.len() < rows * blocks {
            self.codes.resize(rows * blocks, Codes([0; 64]));
            self.scales.resize(rows * blocks, RunScale::default());
        }
        let (codes, scales) = (Shared(self.codes.as_mut_ptr()), Shared(self.scales.as_mut_ptr()));
        let run = kernel(pool.isa());
        // Some three thousand values are worth another thread.
        pool.split(rows * blocks, 96, |range| {
            // SAFETY: tasks get ranges of their own within the two vectors.
            let (codes, scales) = unsafe {
                (
                    std::slice::from_raw_parts_mut(codes.at(range.start), range.len()),
                    std::slice::from_raw_parts_mut(scales.at(range.start), range.len()),
                )
            };
            // SAFETY: the pool's instruction set is there.
            unsafe { run(&x[range.start * BLOCK..range.end * BLOCK], codes, scales) }
        });
    }
}

type Kernel = unsafe fn(&[f32], &mut [Codes], &mut [RunScale]);

fn kernel(isa: Isa) -> Kernel {
    match isa {
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => planes,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::avx2,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => x86::avx512,
        _ => portable,
    }
}

fn portable(x: &[f32], codes: &mut [Codes], scales: &mut [RunScale]) {
    each_run(x, codes, scales, |v, codes| {
        for (bytes, v) in codes.0.chunks_exact_mut(2).zip(v) {
            bytes.copy_from_slice(&v.to_le_bytes());
        }
    });
}

/// Bytes apart, as instructions for products of bytes want them.
#[cfg(target_arch = "aarch64")]
fn planes(x: &[f32], codes: &mut [Codes], scales: &mut [RunScale]) {
    each_run(x, codes, scales, |v, codes| {
        let (high, low) = codes.0.split_at_mut(BLOCK);
        for ((high, low), v) in high.iter_mut().zip(low).zip(v) {
            // The low byte counts as signed, so the high one is that of v + 128.
            (*high, *low) = ((v.wrapping_add(128) >> 8) as u8, *v as u8);
        }
    });
}

/// Quantises runs and hands the integers to `put`. In plain operations, which compilers turn into vectors.
#[inline(always)]
fn each_run(
    x: &[f32],
    codes: &mut [Codes],
    scales: &mut [RunScale],
    put: impl Fn(&[i16; BLOCK], &mut Codes),
) {
    for ((x, codes), out) in x.chunks_exact(BLOCK).zip(codes).zip(scales) {
        // Magnitudes compared as integers: a NaN is the largest and so spoils its run, as it should.
        let mut largest = 0;
        for value in x {
            largest = largest.max(value.to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(largest);
        let (scale, inverse) =
            if largest < SMALLEST { (0.0, 0.0) } else { (largest / LARGEST, LARGEST / largest) };
        let mut v = [0i16; BLOCK];
        let mut sum = 0i32;
        for (v, x) in v.iter_mut().zip(x) {
            // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
            let integer = ((x * inverse + 12_582_912.0).to_bits() as i32).wrapping_sub(0x4b40_0000) as i16;
            *v = integer;
            sum += i32::from(integer);
        }
        put(&v, codes);
        *out = RunScale { scale, sum: scale * sum as f32, integer_sum: sum };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(x: &[f32], codes: &mut [Codes], scales: &mut [RunScale]) {
        each_run(x, codes, scales, |v, codes| {
            for (bytes, v) in codes.0.chunks_exact_mut(8).zip(v.chunks_exact(4)) {
                for (bytes, i) in bytes.chunks_exact_mut(2).zip([0, 2, 1, 3]) {
                    bytes.copy_from_slice(&v[i].to_le_bytes());
                }
            }
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub fn avx512(x: &[f32], codes: &mut [Codes], scales: &mut [RunScale]) {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        for ((x, codes), out) in x.chunks_exact(BLOCK).zip(codes).zip(scales) {
            // SAFETY: a run is 32 values, and codes are 64 bytes.
            unsafe {
                let (a, b) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
                let largest = _mm512_max_epi32(
                    _mm512_and_si512(_mm512_castps_si512(a), magnitude),
                    _mm512_and_si512(_mm512_castps_si512(b), magnitude),
                );
                let largest = f32::from_bits(_mm512_reduce_max_epi32(largest) as u32);
                let (scale, inverse) =
                    if largest < SMALLEST { (0.0, 0.0) } else { (largest / LARGEST, LARGEST / largest) };
                let inverse = _mm512_set1_ps(inverse);
                let a = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
                let b = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
                let to = codes.0.as_mut_ptr().cast::<__m128i>();
                for (i, v) in [a, b].into_iter().enumerate() {
                    // The low byte counts as signed, so the high one is that of v + 128.
                    let high = _mm512_srai_epi32::<8>(_mm512_add_epi32(v, _mm512_set1_epi32(128)));
                    _mm_store_si128(to.add(i), _mm512_cvtepi32_epi8(high));
                    _mm_store_si128(to.add(2 + i), _mm512_cvtepi32_epi8(v));
                }
                let sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
                *out = RunScale { scale, sum: scale * sum as f32, integer_sum: sum };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_sets_agree_on_the_integers() {
        let x: Vec<f32> = (0..BLOCK * 9)
            .map(|i| ((i * 7919 % 1009) as f32 - 504.0) * [1e-3, 1.0, 0.0][i / BLOCK % 3])
            .collect();
        let mut reference = Activations::default();
        reference.quantise(&Pool::with_isa(1, Isa::Portable), &x, 9);
        let integers = |a: &Activations, run: usize, isa| -> Vec<i32> {
            let b = &a.codes[run].0;
            let wide = |i: usize| i32::from(i16::from_le_bytes([b[2 * i], b[2 * i + 1]]));
            (0..BLOCK)
                .map(|i| match isa {
                    Isa::Portable => wide(i),
                    Isa::Avx2 => wide(i / 4 * 4 + [0, 2, 1, 3][i % 4]),
                    Isa::Neon | Isa::Avx512 => 256 * i32::from(b[i] as i8) + i32::from(b[32 + i] as i8),
                })
                .collect()
        };
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let mut other = Activations::default();
            other.quantise(&Pool::with_isa(2, isa), &x, 9);
            for run in 0..9 {
                let (got, want) = (integers(&other, run, isa), integers(&reference, run, Isa::Portable));
                assert_eq!(got, want, "{isa}, run {run}");
                let (a, b) = (other.scales[run], reference.scales[run]);
                assert_eq!((a.scale, a.sum, a.integer_sum), (b.scale, b.sum, b.integer_sum));
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
            a.quantise(&Pool::with_isa(1, isa), &x, 2);
            assert!(a.scales[0].scale.is_nan() && !a.scales[1].scale.is_nan(), "{isa}");
        }
    }
}
