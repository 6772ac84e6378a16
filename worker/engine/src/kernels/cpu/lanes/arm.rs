//! NEON, which every 64-bit Arm has. Each method is a few instructions.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;

use half::{bf16, f16};

use super::Lanes;

/// Four vectors.
#[derive(Clone, Copy)]
pub struct V128(pub [float32x4_t; 4]);

impl V128 {
    /// Sixteen integers, eight a vector.
    #[inline(always)]
    pub fn from_integers([a, b]: [int16x8_t; 2]) -> Self {
        unsafe {
            let wide = [
                vmovl_s16(vget_low_s16(a)),
                vmovl_high_s16(a),
                vmovl_s16(vget_low_s16(b)),
                vmovl_high_s16(b),
            ];
            V128(wide.map(|v| vcvtq_f32_s32(v)))
        }
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        V128(from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for V128 {
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        // The intrinsic is not stable.
        unsafe { asm!("prfm pldl2keep, [{}]", in(reg) at, options(readonly, nostack, preserves_flags)) };
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        V128([unsafe { vdupq_n_f32(value) }; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        V128(from_fn(|i| unsafe { vld1q_f32(from.add(4 * i)) }))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        unsafe {
            let [a, b] = [0, 8].map(|i| vreinterpretq_f16_u16(vld1q_u16(from.add(i).cast())));
            V128([
                vcvt_f32_f16(vget_low_f16(a)),
                vcvt_high_f32_f16(a),
                vcvt_f32_f16(vget_low_f16(b)),
                vcvt_high_f32_f16(b),
            ])
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        let wide = |i| unsafe { vshll_n_u16::<16>(vld1_u16(from.add(4 * i).cast())) };
        V128(from_fn(|i| unsafe { vreinterpretq_f32_u32(wide(i)) }))
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        Self::from_integers([0, 8].map(|i| unsafe { vld1q_s16(from.add(i)) }))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (i, v) in self.0.into_iter().enumerate() {
            unsafe { vst1q_f32(to.add(4 * i), v) }
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vmaxq_f32(a, b) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vminq_f32(a, b) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        V128(from_fn(|i| unsafe { vfmaq_f32(addend.0[i], self.0[i], factor.0[i]) }))
    }
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        self.zip(n, |value, n| unsafe {
            let exponent = vshlq_n_s32::<23>(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)));
            vmulq_f32(value, vreinterpretq_f32_s32(exponent))
        })
    }
    #[inline(always)]
    fn zero_below(self, of: Self, limit: f32) -> Self {
        self.zip(of, |value, of| unsafe {
            let below = vcltq_f32(of, vdupq_n_f32(limit));
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), below))
        })
    }
}
