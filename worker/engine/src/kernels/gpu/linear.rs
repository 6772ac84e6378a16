//! Products with packed weights, in f32.
//!
//! For few rows, where reading the weights is what takes time, [`few_kernel`]: a cube per 32 outputs, whose units divide the
//! inputs among themselves. For many, where arithmetic does, [`many_kernel`]: a cube per 64 rows and 64 outputs, for which
//! inputs and unpacked weights go through shared memory block by block. A row's order of additions depends on which of the
//! two it is, but not on the other rows.

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::matrix::{Form, Matrix, OUTPUTS};
use super::unpack::unpack;
use super::{cubes, dims, empty};

/// Outputs that a unit loads at once, and inputs.
const LANES: usize = 4;
/// Units side by side, each with [`LANES`] outputs, in [`few_kernel`].
const COLUMNS: usize = 8;
/// Units among which the inputs are divided.
const PARTS: usize = 32;
/// Rows of a cube, for which the kernel is compiled; a multiple of the last is done by several.
const FEW: [usize; 3] = [1, 4, 8];
/// At more rows the other kernel is taken.
const MOST_FEW: usize = 16;

/// Units of a cube of [`many_kernel`]: 16 side by side with [`LANES`] outputs each, times 8 with [`ROWS`] rows each.
const UNITS: usize = 128;
/// Rows of a unit.
const ROWS: usize = 8;
/// Rows of a cube.
const TILE: usize = 64;
/// Inputs of a step: a block.
const INPUTS: usize = 32;

type Four = Const<LANES>;

/// Vectors of `outputs` and `inputs` are in fours; `rows` is how many there are at all.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn few_kernel(
    x: &Array<Vector<f32, Four>>,
    words: &Array<Vector<u32, Four>>,
    scales: &Array<Vector<u32, Four>>,
    out: &mut Array<f32>,
    rows: usize,
    outputs: usize,
    padded: usize,
    blocks: usize,
    #[comptime] few: usize,
    #[comptime] form: Form,
) {
    let column = CUBE_POS_X as usize * COLUMNS + UNIT_POS_X as usize;
    let first = CUBE_POS_Y as usize * few;
    let mut sums = Array::<Vector<f32, Four>>::new(few);
    #[unroll]
    for row in 0..few {
        sums[row] = Vector::new(0.0);
    }
    let mut block = UNIT_POS_Y as usize;
    while block < blocks {
        #[unroll]
        for part in 0..4usize {
            let weights = unpack::<Four>(words, scales, block, part, column, padded, form);
            #[unroll]
            for row in 0..few {
                // Rows that are not there are the last one once more.
                let at = min(first + row, rows - 1) * blocks * 8 + block * 8 + part * 2;
                #[unroll]
                for half in 0..2usize {
                    let inputs = x[at + half];
                    #[unroll]
                    for i in 0..4usize {
                        sums[row] += weights[half * 4 + i] * Vector::new(inputs[i]);
                    }
                }
            }
        }
        block += PARTS;
    }
    let unit = UNIT_POS as usize;
    let mut shared = SharedMemory::<Vector<f32, Four>>::new(COLUMNS * PARTS);
    #[unroll]
    for row in 0..few {
        shared[unit] = sums[row];
        sync_cube();
        let mut half = comptime!(PARTS * COLUMNS / 2).runtime();
        while half >= COLUMNS {
            if unit < half {
                let other = shared[unit + half];
                shared[unit] += other;
            }
            sync_cube();
            half /= 2;
        }
        if unit < COLUMNS && first + row < rows {
            store(out, shared[unit], first + row, column, outputs);
        }
        sync_cube();
    }
}

/// Writes four outputs of a row, as far as they are there.
#[cube]
fn store(out: &mut Array<f32>, values: Vector<f32, Four>, row: usize, column: usize, outputs: usize) {
    #[unroll]
    for i in 0..4usize {
        if column * 4 + i < outputs {
            out[row * outputs + column * 4 + i] = values[i];
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn many_kernel(
    x: &Array<Vector<f32, Four>>,
    words: &Array<Vector<u32, Four>>,
    scales: &Array<Vector<u32, Four>>,
    out: &mut Array<f32>,
    rows: usize,
    outputs: usize,
    padded: usize,
    blocks: usize,
    #[comptime] form: Form,
) {
    let unit = UNIT_POS as usize;
    let first = CUBE_POS_Y as usize * TILE;
    // Inputs as they are, weights with outputs side by side.
    let mut inputs = SharedMemory::<Vector<f32, Four>>::new(comptime!(TILE * INPUTS / LANES));
    let mut weights = SharedMemory::<Vector<f32, Four>>::new(comptime!(INPUTS * OUTPUTS / LANES));
    let column = unit % 16;
    let row = unit / 16 * ROWS;
    let mut sums = Array::<Vector<f32, Four>>::new(ROWS);
    #[unroll]
    for i in 0..ROWS {
        sums[i] = Vector::new(0.0);
    }
    for block in 0..blocks {
        // Half of the units unpack weights, the others bring inputs.
        if unit < 64 {
            let part = unit / 16;
            let tile = CUBE_POS_X as usize * 16 + column;
            let unpacked = unpack::<Four>(words, scales, block, part, tile, padded, form);
            #[unroll]
            for i in 0..8usize {
                weights[(part * 8 + i) * 16 + column] = unpacked[i];
            }
        } else {
            #[unroll]
            for i in 0..8usize {
                let at = unit - 64 + i * 64;
                let from = min(first + at / 8, rows - 1) * blocks * 8 + block * 8 + at % 8;
                inputs[at] = x[from];
            }
        }
        sync_cube();
        for four in 0..8usize {
            let mut right = Array::<Vector<f32, Four>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                right[i] = weights[(four * 4 + i) * 16 + column];
            }
            #[unroll]
            for r in 0..ROWS {
                let left = inputs[(row + r) * 8 + four];
                #[unroll]
                for i in 0..4usize {
                    sums[r] += right[i] * Vector::new(left[i]);
                }
            }
        }
        sync_cube();
    }
    #[unroll]
    for r in 0..ROWS {
        if first + row + r < rows {
            store(out, sums[r], first + row + r, CUBE_POS_X as usize * 16 + column, outputs);
        }
    }
}

/// `x` `[rows, inputs]` times the transposed matrix: `[rows, outputs]`. Inputs are whole blocks.
pub(super) fn linear<R: CubeRuntime>(x: CubeTensor<R>, matrix: &Matrix) -> CubeTensor<R> {
    let [rows, inputs] = dims(&x);
    assert_eq!(inputs, matrix.blocks() * INPUTS, "as many inputs as weights");
    let out = empty(&x, [rows, matrix.outputs]);
    let (outputs, padded, blocks) = (matrix.outputs, matrix.padded_outputs(), matrix.blocks());
    let client = out.client.clone();
    // SAFETY: outputs and inputs are padded to whole tiles and blocks, so units read only what is there; rows beyond the
    // last are not read, and neither they nor the padding are written.
    unsafe {
        let words = ArrayArg::from_raw_parts(matrix.words.clone(), blocks * matrix.form.words() * padded);
        let scales = ArrayArg::from_raw_parts(matrix.scales.clone(), matrix.scale_words());
        let (x, result) = (x.into_array_arg(), out.clone().into_array_arg());
        if rows <= MOST_FEW {
            let few = FEW.into_iter().find(|few| *few >= rows).unwrap_or(FEW[FEW.len() - 1]);
            few_kernel::launch_unchecked::<R>(
                &client,
                cubes(padded / (COLUMNS * LANES), rows.div_ceil(few), 1),
                CubeDim::new_2d(COLUMNS as u32, PARTS as u32),
                x,
                words,
                scales,
                result,
                rows,
                outputs,
                padded / LANES,
                blocks,
                few,
                matrix.form,
            );
        } else {
            many_kernel::launch_unchecked::<R>(
                &client,
                cubes(padded / OUTPUTS, rows.div_ceil(TILE), 1),
                CubeDim::new_1d(UNITS as u32),
                x,
                words,
                scales,
                result,
                rows,
                outputs,
                padded / LANES,
                blocks,
                matrix.form,
            );
        }
    }
    out
}
