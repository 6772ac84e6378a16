//! Sixteen floats at once, on each instruction set, so that kernels of floats are written once.
//!
//! A kernel is a generic `#[inline(always)]` function over [`Lanes`], and is compiled once per instruction set by
//! [`on_isa!`], inside a function that enables its features.

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::{bf16, f16};

#[cfg(target_arch = "aarch64")]
pub(super) use arm::V128;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{V256, V512, hidden};

/// Sixteen lanes of f32. Loads and stores need no alignment.
///
/// Methods are safe to call only where the instruction set is there: in what [`on_isa!`] compiles.
pub(super) trait Lanes: Copy {
    /// How many of these the processor's registers hold.
    const REGISTERS: usize;
    fn splat(value: f32) -> Self;
    #[inline(always)]
    fn from_array(values: &[f32; 16]) -> Self {
        // SAFETY: 16 values; the instruction set is there, as for every method.
        unsafe { Self::load(values.as_ptr()) }
    }
    #[inline(always)]
    fn to_array(self) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: room for 16 values.
        unsafe { self.store(out.as_mut_ptr()) };
        out
    }
    /// # Safety
    /// 16 values at `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// 16 values at `from`.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// # Safety
    /// 16 values at `from`.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// # Safety
    /// 16 values at `from`.
    unsafe fn load_i16(from: *const i16) -> Self;
    /// # Safety
    /// Room for 16 values at `to`.
    unsafe fn store(self, to: *mut f32);
    /// Asks for the cache line at `at`, which need not be there, to be brought into the second-level cache: of requests for
    /// the first, a processor keeps too few under way to read memory at its full speed.
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        let _ = at;
    }
    /// The same place, but on x86 compilers are not told so. They read from it again where registers are few, and do not put sums
    /// aside to keep what they have read; and they address it by one register, which costs less there.
    #[inline(always)]
    fn again<T>(at: *const T) -> *const T {
        at
    }
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    fn min(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once where the processor can.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// `self * 2^n`; `n` are integers from -126 to 127.
    fn times_power_of_two(self, n: Self) -> Self;

    /// e to the power of each lane, to about one unit in the last place; 0 below -87.
    #[inline(always)]
    fn exp(self) -> Self {
        // x86 answers with the second where one is a NaN.
        let clamped = Self::splat(88.3).min(Self::splat(-87.3).max(self));
        // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, the first with few bits so that its product is exact.
        let magic = Self::splat(12_582_912.0);
        let n = clamped.mul_add(Self::splat(std::f32::consts::LOG2_E), magic).sub(magic);
        let r = n.mul_add(Self::splat(-0.693_359_4), clamped);
        let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
        // Taylor's coefficients, adjusted to the interval (Cephes).
        let mut p = Self::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = p.mul_add(r, Self::splat(c));
        }
        let e = p.mul_add(r.mul(r), r).add(Self::splat(1.0));
        e.times_power_of_two(n).zero_below(self, -87.3)
    }

    /// Zero in the lanes where `of` is less than `limit`; a NaN stays.
    fn zero_below(self, of: Self, limit: f32) -> Self;

    /// Sum of the lanes, always in the same order.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut a = self.to_array();
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                a[i] += a[i + width];
            }
        }
        a[0]
    }

    /// Largest lane.
    #[inline(always)]
    fn largest(self) -> f32 {
        let mut a = self.to_array();
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                a[i] = a[i].max(a[i + width]);
            }
        }
        a[0]
    }
}

/// A number that lanes can be loaded from; public only because the public trait of the cache's numbers builds on it.
pub trait Stored: Copy {
    #[allow(private_bounds)]
    /// # Safety
    /// 16 values at `from`, and the instruction set of `L`.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

macro_rules! stored {
    ($type:ty, $load:ident) => {
        impl Stored for $type {
            #[allow(private_bounds)]
            #[inline(always)]
            unsafe fn load<L: Lanes>(from: *const Self) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::$load(from) }
            }
        }
    };
}
stored!(f32, load);
stored!(f16, load_f16);
stored!(bf16, load_bf16);
stored!(i16, load_i16);

/// The portable lanes: an array, for the compiler to vectorise.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Array([f32; 16]);

impl Array {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Array(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Array {
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Array([value; 16])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise; arrays of floats need no more alignment than floats.
        Array(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the caller's promise.
        Array(std::array::from_fn(|i| unsafe { from.add(i).read() }.to_f32()))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        Array(std::array::from_fn(|i| unsafe { from.add(i).read() }.to_f32()))
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        // SAFETY: the caller's promise.
        Array(std::array::from_fn(|i| f32::from(unsafe { from.add(i).read() })))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Two roundings: where the target has no fused instruction, fusing is a library call per lane.
        Array(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        self.zip(n, |value, n| value * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn zero_below(self, of: Self, limit: f32) -> Self {
        self.zip(of, |value, of| if of < limit { 0.0 } else { value })
    }
}

/// Defines `fn name(isa, arguments…)` that runs the generic function `body::<L, …>(arguments…)` with the lanes of `isa`,
/// compiled with its features. `isa` must be one that the processor has, as a pool's always is.
macro_rules! on_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$($g:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($g: $bound),+>)? (isa: $crate::kernels::cpu::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) {
                    $body::<$crate::kernels::cpu::lanes::V512 $(, $($g),+)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) {
                    $body::<$crate::kernels::cpu::lanes::V256 $(, $($g),+)?>($($arg),*)
                }
                match isa {
                    // SAFETY: a pool uses only what the processor has.
                    $crate::kernels::cpu::Isa::Avx512 | $crate::kernels::cpu::Isa::Amx => {
                        return unsafe { avx512($($arg),*) }
                    }
                    // SAFETY: as above.
                    $crate::kernels::cpu::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            if isa == $crate::kernels::cpu::Isa::Neon {
                return $body::<$crate::kernels::cpu::lanes::V128 $(, $($g),+)?>($($arg),*);
            }
            let _ = isa;
            $body::<$crate::kernels::cpu::lanes::Array $(, $($g),+)?>($($arg),*)
        }
    };
}
pub(super) use on_isa;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Isa;

    #[inline(always)]
    fn exp_body<L: Lanes>(x: &[f32; 16], out: &mut [f32; 16]) {
        *out = L::from_array(x).exp().to_array();
    }
    on_isa!(fn exp(x: &[f32; 16], out: &mut [f32; 16]) = exp_body);

    #[test]
    fn exp_is_accurate_everywhere() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            for step in 0..20_000 {
                let x: [f32; 16] = std::array::from_fn(|i| (step * 16 + i) as f32 * 5.5e-4 - 88.0);
                let mut y = [0.0; 16];
                exp(isa, &x, &mut y);
                for (x, y) in x.iter().zip(y) {
                    let want = f64::from(*x).exp();
                    let limit = if *x < -87.2 { 1.3e-38 } else { 3e-7 * want };
                    assert!((f64::from(y) - want).abs() <= limit, "{isa}: exp({x}) = {y}, not {want}");
                }
            }
            let mut y = [0.0; 16];
            exp(isa, &[f32::NEG_INFINITY; 16], &mut y);
            assert_eq!(y, [0.0; 16]);
            exp(isa, &[0.0; 16], &mut y);
            assert_eq!(y, [1.0; 16]);
        }
    }
}
