//! Each method is a few instructions. They are unsafe to call without their features, which [`Lanes`] demands.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::arch::asm;
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Lanes;

/// The same place, but compilers do not know that it is.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is done with it")]
pub fn hidden<T>(mut at: *const T) -> *const T {
    unsafe { asm!("/* {0} */", inout(reg) at, options(nomem, nostack, preserves_flags)) };
    at
}

/// AVX-512.
#[derive(Clone, Copy)]
pub struct V512(pub __m512);

/// Joins one half of sixteen lanes with the other until one is left: the order of [`Lanes::sum`]. A macro, since a function
/// that takes functions would be compiled without the instruction set.
macro_rules! halved {
    ($lanes:expr, $join_eight:ident, $join_four:ident) => {
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd($lanes)));
            let eight = $join_eight(_mm512_castps512_ps256($lanes), high);
            let four = $join_four(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = $join_four(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32($join_four(two, _mm_movehdup_ps(two)))
        }
    };
}

impl Lanes for V512 {
    const REGISTERS: usize = 32;
    #[inline(always)]
    fn again<T>(at: *const T) -> *const T {
        hidden(at)
    }
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        V512(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        V512(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        V512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        let wide = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())) };
        V512(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)) })
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        V512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(from.cast()))) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        V512(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        V512(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        V512(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        V512(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        V512(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        V512(unsafe { _mm512_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        V512(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        V512(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        halved!(self.0, _mm256_add_ps, _mm_add_ps)
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        halved!(self.0, _mm256_max_ps, _mm_max_ps)
    }
    #[inline(always)]
    fn zero_below(self, of: Self, limit: f32) -> Self {
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(of.0, _mm512_set1_ps(limit));
            V512(_mm512_maskz_mov_ps(keep, self.0))
        }
    }
}

/// AVX2 with FMA and F16C.
#[derive(Clone, Copy)]
pub struct V256(__m256, __m256);

impl Lanes for V256 {
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[inline(always)]
    fn again<T>(at: *const T) -> *const T {
        hidden(at)
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        let all = unsafe { _mm256_set1_ps(value) };
        V256(all, all)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { V256(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        unsafe {
            V256(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        unsafe {
            let (a, b) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            let a = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(a));
            let b = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(b));
            V256(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b))
        }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        unsafe {
            let (a, b) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            let wide = |half| _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
            V256(wide(a), wide(b))
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { V256(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        unsafe { V256(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        unsafe { V256(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        unsafe { V256(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        unsafe { V256(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        unsafe { V256(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        unsafe {
            V256(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1))
        }
    }
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.0), bias));
            let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.1), bias));
            self.mul(V256(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)))
        }
    }
    #[inline(always)]
    fn zero_below(self, of: Self, limit: f32) -> Self {
        unsafe {
            let limit = _mm256_set1_ps(limit);
            V256(
                _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_NLT_UQ>(of.0, limit)),
                _mm256_and_ps(self.1, _mm256_cmp_ps::<_CMP_NLT_UQ>(of.1, limit)),
            )
        }
    }
}
