//! The tile kernel for weights that are floats: they are widened to f32 and multiplied as such, so activations lose
//! nothing.

use half::{bf16, f16};

use super::TILE;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::lanes::{Lanes, Stored, on_isa};
use crate::kernels::cpu::pack::LANES;
use crate::weights::DType;

/// Partial sums of an output element, over inputs `i % CHAINS`: one sum alone would wait for itself.
const CHAINS: usize = 4;

/// `out[t]` becomes the outputs of a group of weights (`cols` times 16 of `format`) for row `t` of `x`.
pub(super) fn tile(isa: Isa, format: DType, group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    match format {
        DType::F32 => tile_f32(isa, group, x, cols, out),
        DType::F16 => tile_f16(isa, group, x, cols, out),
        DType::BF16 => tile_bf16(isa, group, x, cols, out),
        other => unreachable!("{other:?} is no float format"),
    }
}

on_isa!(fn tile_f32(group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) = tile_of_f32);
on_isa!(fn tile_f16(group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) = tile_of_f16);
on_isa!(fn tile_bf16(group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) = tile_of_bf16);

#[inline(always)]
fn tile_of_f32<L: Lanes>(group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    any_rows::<L, f32>(group, x, cols, out);
}
#[inline(always)]
fn tile_of_f16<L: Lanes>(group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    any_rows::<L, f16>(group, x, cols, out);
}
#[inline(always)]
fn tile_of_bf16<L: Lanes>(group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    any_rows::<L, bf16>(group, x, cols, out);
}

#[inline(always)]
fn any_rows<L: Lanes, W: Stored>(group: &[u8], x: &[f32], cols: usize, out: &mut [[f32; LANES]]) {
    assert!(group.len() >= cols * LANES * size_of::<W>());
    assert!(group.as_ptr().align_offset(align_of::<W>()) == 0);
    assert_eq!(x.len(), out.len() * cols);
    let weights = group.as_ptr().cast::<W>();
    // SAFETY: lengths and alignment were just checked; every bit pattern is a float.
    unsafe {
        match out.len() {
            1 => rows::<L, W, 1>(weights, x, cols, out),
            2 => rows::<L, W, 2>(weights, x, cols, out),
            3 => rows::<L, W, 3>(weights, x, cols, out),
            4 => rows::<L, W, 4>(weights, x, cols, out),
            n => unreachable!("a tile of {n} rows of at most {TILE}"),
        }
    }
}

/// # Safety
/// `cols * 16` weights; `T * cols` values in `x`.
#[inline(always)]
unsafe fn rows<L: Lanes, W: Stored, const T: usize>(
    weights: *const W,
    x: &[f32],
    cols: usize,
    out: &mut [[f32; LANES]],
) {
    let mut sums = [[L::splat(0.0); CHAINS]; T];
    let whole = cols / CHAINS * CHAINS;
    // SAFETY: the caller's promise.
    unsafe {
        for i in (0..whole).step_by(CHAINS) {
            for chain in 0..CHAINS {
                step::<L, W, T>(weights, x, cols, i + chain, chain, &mut sums);
            }
        }
        for i in whole..cols {
            step::<L, W, T>(weights, x, cols, i, i - whole, &mut sums);
        }
    }
    for (out, [a, b, c, d]) in out.iter_mut().zip(sums) {
        *out = a.add(b).add(c.add(d)).to_array();
    }
}

/// Adds the products of input `i` to the sums of `chain`.
///
/// # Safety
/// As for [`rows`]; `i < cols`.
#[inline(always)]
unsafe fn step<L: Lanes, W: Stored, const T: usize>(
    weights: *const W,
    x: &[f32],
    cols: usize,
    i: usize,
    chain: usize,
    sums: &mut [[L; CHAINS]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let weight: L = W::load(weights.add(i * LANES));
        for (t, sums) in sums.iter_mut().enumerate() {
            sums[chain] = weight.mul_add(L::splat(*x.get_unchecked(t * cols + i)), sums[chain]);
        }
    }
}
