//! What lies between products and attention, a row at a time: norms, rotary positions, the gated unit, sums.

use std::ops::Range;

use super::activations::{Quantiser, SPAN};
use super::format::BLOCK;
use super::lanes::{Lanes, on_isa};
use super::pack::Shared;
use super::pool::Pool;
use crate::weights::{Activation, RopeStyle};

/// Values that are worth another thread.
const WORTH: usize = 4096;
/// Values that stay in the first-level cache between two passes over them: whole spans.
const PART: usize = 1024;
const _: () = assert!(PART.is_multiple_of(SPAN * BLOCK));

/// Adds `y` to the residual stream `x`, then norms it: `x += y; out = rms_norm(x)`, and quantises it, too, if it is told where to.
///
/// # Panics
/// If `x`, `y` and `out` are not equally many whole rows.
pub fn add_rms_norm(
    pool: &Pool,
    x: &mut [f32],
    y: &[f32],
    (weight, epsilon): (&[f32], f32),
    out: &mut [f32],
    quantised: Option<&Quantiser<'_>>,
) {
    let cols = weight.len();
    assert_eq!(x.len(), y.len());
    assert_eq!(x.len(), out.len());
    let x = Shared(x.as_mut_ptr());
    by_rows(pool, cols, out, |from, out| {
        // SAFETY: `x` is as long as `out`, and tasks get ranges of their own.
        let x = unsafe { std::slice::from_raw_parts_mut(x.at(from), out.len()) };
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            let x = &mut x[row * cols..][..cols];
            add_to(pool.isa(), x, &y[from + row * cols..][..cols]);
            norm(pool.isa(), x, weight, epsilon, out);
            quantise(quantised, from + row * cols, out);
        }
    });
}

/// `out = x / sqrt(mean(x^2) + epsilon) * weight`, for each row of `weight.len()` values.
///
/// # Panics
/// If `x` and `out` are not equally many whole rows.
pub fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let cols = weight.len();
    assert_eq!(x.len(), out.len());
    by_rows(pool, cols, out, |from, out| {
        for (x, out) in x[from..from + out.len()].chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            norm(pool.isa(), x, weight, epsilon, out);
        }
    });
}

on_isa!(fn norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) = norm_body);

#[inline(always)]
fn norm_body<L: Lanes>(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut squares = [L::splat(0.0); 4];
    for (index, at) in vectors(x.len()).enumerate() {
        let v = load_part::<L>(&x[at]);
        squares[index % 4] = v.mul_add(v, squares[index % 4]);
    }
    let [a, b, c, d] = squares;
    let mean = a.add(b).add(c.add(d)).sum() / x.len() as f32;
    let factor = L::splat(1.0 / (mean + epsilon).sqrt());
    for at in vectors(x.len()) {
        let scaled = load_part::<L>(&x[at.clone()]).mul(factor);
        store_part(scaled.mul(load_part::<L>(&weight[at.clone()])), &mut out[at]);
    }
}

/// `out = activation(gate) * up`, quantised, too, if it is told where to.
///
/// # Panics
/// If the lengths differ.
pub fn gated(
    pool: &Pool,
    activation: Activation,
    (gate, up): (&[f32], &[f32]),
    out: &mut [f32],
    quantised: Option<&Quantiser<'_>>,
) {
    assert_eq!(gate.len(), up.len());
    assert_eq!(gate.len(), out.len());
    // Whole rows where they are quantised.
    let unit = quantised.map_or(1, Quantiser::cols);
    by_rows(pool, unit, out, |mut from, out| {
        let row = if quantised.is_some() { unit } else { out.len().max(1) };
        for out in out.chunks_mut(row).flat_map(|row| row.chunks_mut(PART)) {
            let (gate, up) = (&gate[from..from + out.len()], &up[from..from + out.len()]);
            match activation {
                Activation::Silu => silu_times(pool.isa(), gate, up, out),
                Activation::GeluTanh => gelu_times(pool.isa(), gate, up, out),
            }
            quantise(quantised, from, out);
            from += out.len();
        }
    });
}

/// Quantises what a task has just computed.
fn quantise(to: Option<&Quantiser<'_>>, first: usize, values: &[f32]) {
    if let Some(to) = to {
        // SAFETY: a task's values are nobody else's.
        unsafe { to.put(first, values) }
    }
}

on_isa!(fn silu_times(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_body);
on_isa!(fn gelu_times(gate: &[f32], up: &[f32], out: &mut [f32]) = gelu_body);

#[inline(always)]
fn silu_body<L: Lanes>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for at in vectors(out.len()) {
        let (g, u) = (load_part::<L>(&gate[at.clone()]), load_part::<L>(&up[at.clone()]));
        store_part(sigmoid(g).mul(g).mul(u), &mut out[at]);
    }
}

#[inline(always)]
fn gelu_body<L: Lanes>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    // (1 + tanh(z)) / 2 is the sigmoid of 2 z, with z = sqrt(2 / pi) (x + 0.044715 x^3).
    let (linear, cubic) = (L::splat(1.595_769), L::splat(1.595_769 * 0.044_715));
    for at in vectors(out.len()) {
        let (g, u) = (load_part::<L>(&gate[at.clone()]), load_part::<L>(&up[at.clone()]));
        let double = g.mul(g.mul(g).mul_add(cubic, linear));
        store_part(sigmoid(double).mul(g).mul(u), &mut out[at]);
    }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
fn sigmoid<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    one.div(one.add(L::splat(0.0).sub(x).exp()))
}

/// `x += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &Pool, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    by_rows(pool, 1, x, |from, x| add_to(pool.isa(), x, &y[from..from + x.len()]));
}

on_isa!(fn add_to(x: &mut [f32], y: &[f32]) = add_body);

#[inline(always)]
fn add_body<L: Lanes>(x: &mut [f32], y: &[f32]) {
    for at in vectors(x.len()) {
        let sum = load_part::<L>(&x[at.clone()]).add(load_part::<L>(&y[at.clone()]));
        store_part(sum, &mut x[at]);
    }
}

/// Cosines and sines of a step's positions, `[row][pair]`: computed once a step, used by all layers.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// Pairs that are rotated.
    pub pairs: usize,
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

impl Angles<'_> {
    /// Rotates the first `2 * pairs` elements of a head by the angles of `row`.
    #[inline(always)]
    pub(super) fn rotate(&self, style: RopeStyle, row: usize, head: &mut [f32]) {
        let angles = row * self.pairs..(row + 1) * self.pairs;
        let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
        let head = &mut head[..2 * self.pairs];
        match style {
            RopeStyle::Interleaved => {
                for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * c - b * s;
                    pair[1] = a * s + b * c;
                }
            }
            RopeStyle::Half => {
                let (first, second) = head.split_at_mut(self.pairs);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
                }
            }
        }
    }
}

/// Runs `task(offset, part)` on parts of `out` that are whole rows of `cols` values; on several threads if it is worth it.
fn by_rows(pool: &Pool, cols: usize, out: &mut [f32], task: impl Fn(usize, &mut [f32]) + Sync) {
    assert!(cols > 0 && out.len().is_multiple_of(cols), "{} values are no rows of {cols}", out.len());
    let shared = Shared(out.as_mut_ptr());
    pool.split(out.len() / cols, WORTH.div_ceil(cols), |range| {
        let from = range.start * cols;
        // SAFETY: tasks get ranges of rows of their own, within `out`.
        task(from, unsafe { std::slice::from_raw_parts_mut(shared.at(from), range.len() * cols) });
    });
}

/// The ranges of `len` values that fill vectors; the last may be short. A loop over ranges and not a function that takes
/// a closure: a closure is compiled without the instruction set of the kernel around it.
#[inline(always)]
fn vectors(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(16)).map(move |v| v * 16..len.min(v * 16 + 16))
}

/// At most 16 values, the rest zero.
#[inline(always)]
fn load_part<L: Lanes>(from: &[f32]) -> L {
    if from.len() >= 16 {
        // SAFETY: 16 values are there.
        return unsafe { L::load(from.as_ptr()) };
    }
    let mut values = [0.0; 16];
    values[..from.len()].copy_from_slice(from);
    L::from_array(&values)
}

/// Stores as many lanes as fit.
#[inline(always)]
fn store_part<L: Lanes>(lanes: L, to: &mut [f32]) {
    if to.len() >= 16 {
        // SAFETY: room for 16 values.
        unsafe { lanes.store(to.as_mut_ptr()) }
    } else {
        to.copy_from_slice(&lanes.to_array()[..to.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Isa;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 7919 % 2003) as f32 - 1000.0) / 250.0).collect()
    }

    fn close(got: &[f32], want: &[f64]) {
        for (got, want) in got.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() <= 2e-6 * want.abs().max(1.0), "{got}, not {want}");
        }
    }

    fn pools() -> impl Iterator<Item = Pool> {
        Isa::ALL
            .into_iter()
            .filter(|isa| isa.supported())
            .flat_map(|isa| [1, 3].map(|n| Pool::with_isa(n, isa)))
    }

    #[test]
    fn norm_agrees_with_f64() {
        for pool in pools() {
            for (rows, cols) in [(1, 576), (3, 37), (90, 576)] {
                let (x, w) = (values(rows * cols, 1), values(cols, 5));
                let mut out = vec![f32::NAN; rows * cols];
                rms_norm(&pool, &x, &w, 1e-5, &mut out);
                for (x, out) in x.chunks(cols).zip(out.chunks(cols)) {
                    let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / cols as f64;
                    let factor = 1.0 / (mean + 1e-5).sqrt();
                    let want: Vec<f64> =
                        x.iter().zip(&w).map(|(&x, &w)| f64::from(x) * factor * f64::from(w)).collect();
                    close(out, &want);
                }
                let (mut sum, y) = (x.clone(), values(rows * cols, 9));
                let mut fused = vec![f32::NAN; rows * cols];
                add_rms_norm(&pool, &mut sum, &y, (&w, 1e-5), &mut fused, None);
                let mut x = x.clone();
                add(&pool, &mut x, &y);
                rms_norm(&pool, &x, &w, 1e-5, &mut out);
                assert_eq!((&sum, &fused), (&x, &out));
            }
        }
    }

    #[test]
    fn gated_unit_and_sum_agree_with_f64() {
        for pool in pools() {
            for n in [1, 15, 16, 1536, 70_001] {
                let (g, u) = (values(n, 3), values(n, 11));
                let mut out = vec![f32::NAN; n];
                let each = |f: fn(f64) -> f64| -> Vec<f64> {
                    g.iter().zip(&u).map(|(&g, &u)| f(f64::from(g)) * f64::from(u)).collect()
                };
                gated(&pool, Activation::GeluTanh, (&g, &u), &mut out, None);
                close(
                    &out,
                    &each(|g| {
                        0.5 * g
                            * (1.0
                                + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh())
                    }),
                );
                gated(&pool, Activation::Silu, (&g, &u), &mut out, None);
                let want = each(|g| g / (1.0 + (-g).exp()));
                close(&out, &want);
                add(&pool, &mut out, &u);
                close(&out, &want.iter().zip(&u).map(|(w, u)| w + f64::from(*u)).collect::<Vec<_>>());
            }
            let mut out = [f32::NAN; 3];
            gated(&pool, Activation::Silu, (&[-200.0, 200.0, 0.0], &[1.0; 3]), &mut out, None);
            assert!(out[0].abs() < 1e-30 && out[1] == 200.0 && out[2] == 0.0, "{out:?}");
        }
    }

    #[test]
    fn rotation_turns_pairs_by_their_angle() {
        let (heads, dim, rotated) = (3, 20, 16);
        let positions = [0, 7, 4000];
        let frequencies: Vec<f32> = (0..rotated / 2).map(|i| 1e4f32.powf(-(i as f32) / 8.0)).collect();
        let all = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = all.map(|a: f32| (a.cos(), a.sin())).unzip();
        let angles = Angles { pairs: rotated / 2, cos: &cos, sin: &sin };
        let x = values(3 * heads * dim, 2);
        for style in [RopeStyle::Interleaved, RopeStyle::Half] {
            let mut got = x.clone();
            for (row, x) in got.chunks_exact_mut(heads * dim).enumerate() {
                x.chunks_exact_mut(dim).for_each(|head| angles.rotate(style, row, head));
            }
            let mut want: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            for (row, position) in positions.into_iter().enumerate() {
                for head in 0..heads {
                    for (i, f) in frequencies.iter().enumerate() {
                        let (first, second) = match style {
                            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                            RopeStyle::Half => (i, i + rotated / 2),
                        };
                        let at = (row * heads + head) * dim;
                        let (a, b) = (f64::from(x[at + first]), f64::from(x[at + second]));
                        let angle = f64::from(position as f32 * f);
                        want[at + first] = a * angle.cos() - b * angle.sin();
                        want[at + second] = a * angle.sin() + b * angle.cos();
                    }
                }
            }
            close(&got, &want);
        }
    }
}
