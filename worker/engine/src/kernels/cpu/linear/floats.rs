//! The tile kernel for weights that are floats: they are widened to f32 and multiplied as such, so activations lose
//! nothing.

use half::{bf16, f16};

use super::{AHEAD, TILE};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::lanes::{Lanes, Stored, on_isa};
use crate::kernels::cpu::pack::LANES;
use crate::weights::DType;

/// Inputs that are taken in one go.
const STEP: usize = 4;

/// `out[t]` becomes the outputs of a group of weights (`cols` times 16 of `format`) for row `t` of `x`. With `fetch` the memory
/// ahead is asked for.
pub(super) fn tile(
    isa: Isa,
    format: DType,
    group: &[u8],
    fetch: bool,
    x: &[f32],
    cols: usize,
    out: &mut [[f32; LANES]],
) {
    match format {
        DType::F32 => tile_f32(isa, group, fetch, x, cols, out),
        DType::F16 => tile_f16(isa, group, fetch, x, cols, out),
        DType::BF16 => tile_bf16(isa, group, fetch, x, cols, out),
        other => unreachable!("{other:?} is no float format"),
    }
}

on_isa!(fn tile_f32(group: &[u8], fetch: bool, x: &[f32], cols: usize, out: &mut [[f32; LANES]]) = tile_of_f32);
on_isa!(fn tile_f16(group: &[u8], fetch: bool, x: &[f32], cols: usize, out: &mut [[f32; LANES]]) = tile_of_f16);
on_isa!(fn tile_bf16(group: &[u8], fetch: bool, x: &[f32], cols: usize, out: &mut [[f32; LANES]]) = tile_of_bf16);

#[inline(always)]
fn tile_of_f32<L: Lanes>(group: &[u8], fetch: bool, x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    any_rows::<L, f32>(group, fetch, x, cols, out);
}
#[inline(always)]
fn tile_of_f16<L: Lanes>(group: &[u8], fetch: bool, x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    any_rows::<L, f16>(group, fetch, x, cols, out);
}
#[inline(always)]
fn tile_of_bf16<L: Lanes>(group: &[u8], fetch: bool, x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    any_rows::<L, bf16>(group, fetch, x, cols, out);
}

#[inline(always)]
fn any_rows<L: Lanes, W: Stored>(
    group: &[u8],
    fetch: bool,
    x: &[f32],
    cols: usize,
    out: &mut [[f32; LANES]],
) {
    assert!(group.len() >= cols * LANES * size_of::<W>());
    assert!(group.as_ptr().align_offset(align_of::<W>()) == 0);
    assert_eq!(x.len(), out.len() * cols);
    let weights = group.as_ptr().cast::<W>();
    // SAFETY: lengths and alignment were just checked; every bit pattern is a float.
    unsafe {
        match out.len() {
            1 => chained::<L, W, 1>(weights, fetch, x, cols, out),
            2 => chained::<L, W, 2>(weights, fetch, x, cols, out),
            3 => chained::<L, W, 3>(weights, fetch, x, cols, out),
            4 => chained::<L, W, 4>(weights, fetch, x, cols, out),
            n => unreachable!("a tile of {n} rows of at most {TILE}"),
        }
    }
}

/// [`rows`] with as many partial sums of an output element as registers hold, the same for any number of rows: one alone waits
/// for itself.
///
/// # Safety
/// As for [`rows`].
#[inline(always)]
unsafe fn chained<L: Lanes, W: Stored, const T: usize>(
    weights: *const W,
    fetch: bool,
    x: &[f32],
    cols: usize,
    out: &mut [[f32; LANES]],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if L::REGISTERS >= 32 {
            rows::<L, W, T, 4>(weights, fetch, x, cols, out);
        } else {
            rows::<L, W, T, 1>(weights, fetch, x, cols, out);
        }
    }
}

/// Products with `T` rows, in `C` partial sums of each output element, over inputs `i % C`.
///
/// # Safety
/// `cols * 16` weights; `T * cols` values in `x`.
#[inline(always)]
unsafe fn rows<L: Lanes, W: Stored, const T: usize, const C: usize>(
    weights: *const W,
    fetch: bool,
    x: &[f32],
    cols: usize,
    out: &mut [[f32; LANES]],
) {
    let mut sums = [[L::splat(0.0); C]; T];
    let whole = cols / STEP * STEP;
    // SAFETY: the caller's promise.
    unsafe {
        for i in (0..whole).step_by(STEP) {
            if fetch {
                let ahead = weights.wrapping_add(i * LANES).cast::<u8>().wrapping_add(AHEAD);
                for line in (0..STEP * LANES * size_of::<W>()).step_by(64) {
                    L::prefetch(ahead.wrapping_add(line));
                }
            }
            steps::<L, W, T, C>(weights.add(i * LANES), &x[i..], cols, STEP, &mut sums);
        }
        steps::<L, W, T, C>(weights.add(whole * LANES), &x[whole..], cols, cols - whole, &mut sums);
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        *out = match C {
            1 => sums[0],
            _ => sums[0].add(sums[1]).add(sums[2].add(sums[3])),
        }
        .to_array();
    }
}

/// Adds the products of `count` inputs, of each row those that `x` begins with, to the sums.
///
/// # Safety
/// `count * 16` weights, and `count` values of each row in `x`.
#[inline(always)]
unsafe fn steps<L: Lanes, W: Stored, const T: usize, const C: usize>(
    weights: *const W,
    x: &[f32],
    cols: usize,
    count: usize,
    sums: &mut [[L; C]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let x: [*const f32; T] = std::array::from_fn(|t| L::again(x.as_ptr().wrapping_add(t * cols)));
        for i in 0..count {
            let weight: L = W::load(weights.add(i * LANES));
            for (x, sums) in x.iter().zip(sums.iter_mut()) {
                sums[i % C] = weight.mul_add(L::splat(x.add(i).read()), sums[i % C]);
            }
        }
    }
}
