//! The sampler's long loops, over a whole vocabulary.
//!
//! Each is written in 16 lanes that do not depend on each other, so that the compiler puts them into vectors, and is compiled
//! twice: for any processor and for those with AVX2. The operations and their order are the same (the compiler does not fuse
//! multiplications and additions by itself), so the results are too, bit for bit.

/// Defines functions that run as compiled for the widest vectors there are.
macro_rules! widest {
    ($($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$doc])*
        pub fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $result)? { plain($($arg),*) }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    return unsafe { avx2($($arg),*) };
                }
            }
            plain($($arg),*)
        }
    )*};
}

widest! {
    /// The greatest value; what is no number does not count. Negative infinity if there is none.
    pub fn max(values: &[f32]) -> f32 {
        let (lanes, rest) = values.as_chunks::<16>();
        let mut best = [f32::NEG_INFINITY; 16];
        for lane in lanes {
            for (b, x) in best.iter_mut().zip(lane) {
                *b = if *x > *b { *x } else { *b };
            }
        }
        best.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
    }

    /// Logits to probabilities, up to a common factor: the likeliest, `max`, gets 1.
    pub fn to_weights(logits: &mut [f32], max: f32, temperature: f32) {
        for x in logits {
            *x = exp((*x - max) / temperature);
        }
    }

    /// The sum.
    pub fn sum(values: &[f32]) -> f64 {
        let (lanes, rest) = values.as_chunks::<16>();
        let mut sums = [0f32; 16];
        for lane in lanes {
            for (s, x) in sums.iter_mut().zip(lane) {
                *s += x;
            }
        }
        sums.iter().chain(rest).map(|x| f64::from(*x)).sum()
    }

    /// How many values are at least `least`, and their sum.
    pub fn count_and_sum(values: &[f32], least: f32) -> (u64, f64) {
        let (lanes, rest) = values.as_chunks::<16>();
        let (mut counts, mut sums) = ([0u32; 16], [0f32; 16]);
        for lane in lanes {
            for ((n, s), x) in counts.iter_mut().zip(&mut sums).zip(lane) {
                *n += u32::from(*x >= least);
                *s += if *x >= least { *x } else { 0.0 };
            }
        }
        let rest = rest.iter().filter(|x| **x >= least);
        let count = counts.iter().map(|n| u64::from(*n)).sum::<u64>() + rest.clone().count() as u64;
        (count, sums.iter().chain(rest).map(|x| f64::from(*x)).sum())
    }

    /// Zeroes what is less than `least`.
    pub fn zero_below(values: &mut [f32], least: f32) {
        for x in values {
            *x = if *x < least { 0.0 } else { *x };
        }
    }
}

/// `e^x` for `x ≤ 0`, within 2 units in the last place; 0 where the result would be below the normal numbers, and for
/// what is no number. Branchless: `2^n` by the exponent's bits, times a Taylor polynomial on half an octave around 1.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    // Adding it leaves no bits for a fraction: the sum is rounded to a whole number.
    const ROUND: f32 = 12_582_912.0;
    // The logarithm of 2 in two parts, the first with so few bits that its multiples are exact.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN_2.0 - n * LN_2.1;
    let mut y = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y * r + c;
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x > LOWEST { y * scale } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (got, want) = (exp(x), f64::from(x).exp());
            let error = (f64::from(got) - want).abs() / want;
            assert!(error <= 2.0 * f64::from(f32::EPSILON) || x <= -87.0, "e^{x}: {got}, not {want}");
        }
        assert_eq!((exp(0.0), exp(-1e9), exp(f32::NEG_INFINITY), exp(f32::NAN)), (1.0, 0.0, 0.0, 0.0));
    }

    #[test]
    fn the_loops_count_every_value() {
        let values: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!((max(&values), sum(&values)), (36.0, 666.0));
        assert_eq!(count_and_sum(&values, 30.0), (7, 231.0));
        let mut cut = values.clone();
        zero_below(&mut cut, 35.0);
        assert_eq!(sum(&cut), 71.0);
    }
}
