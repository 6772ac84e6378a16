//! RMS norms: a cube per row.

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::reduce::{cube_sum, sum_of};
use super::{cubes, dims, empty, lanes};

/// Units of a cube.
const UNITS: usize = 256;

/// One over the root mean square of a row of `width` vectors, from each unit's share of the squares.
#[cube]
fn inverse_rms<N: Size>(squares: Vector<f32, N>, width: usize, eps: f32) -> f32 {
    let total = cube_sum(sum_of(squares), UNITS);
    let mean = total / f32::cast_from(width * N::value());
    1.0 / (mean + eps).sqrt()
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rms_norm_kernel<N: Size>(
    x: &Array<Vector<f32, N>>,
    weight: &Array<Vector<f32, N>>,
    out: &mut Array<Vector<f32, N>>,
    width: usize,
    eps: f32,
) {
    let row = CUBE_POS_X as usize * width;
    let mut squares = Vector::<f32, N>::new(0.0);
    let mut i = UNIT_POS as usize;
    while i < width {
        let value = x[row + i];
        squares += value * value;
        i += UNITS;
    }
    let factor = Vector::<f32, N>::new(inverse_rms::<N>(squares, width, eps));
    let mut i = UNIT_POS as usize;
    while i < width {
        out[row + i] = x[row + i] * factor * weight[i];
        i += UNITS;
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn add_rms_norm_kernel<N: Size>(
    residual: &Array<Vector<f32, N>>,
    x: &Array<Vector<f32, N>>,
    weight: &Array<Vector<f32, N>>,
    sum: &mut Array<Vector<f32, N>>,
    out: &mut Array<Vector<f32, N>>,
    width: usize,
    eps: f32,
) {
    let row = CUBE_POS_X as usize * width;
    let mut squares = Vector::<f32, N>::new(0.0);
    let mut i = UNIT_POS as usize;
    while i < width {
        let value = residual[row + i] + x[row + i];
        sum[row + i] = value;
        squares += value * value;
        i += UNITS;
    }
    let factor = Vector::<f32, N>::new(inverse_rms::<N>(squares, width, eps));
    let mut i = UNIT_POS as usize;
    while i < width {
        // Each unit reads what it wrote itself.
        out[row + i] = sum[row + i] * factor * weight[i];
        i += UNITS;
    }
}

/// See [`rms_norm`](super::Kernels::rms_norm).
pub(super) fn rms_norm<R: CubeRuntime>(x: CubeTensor<R>, weight: CubeTensor<R>, eps: f32) -> CubeTensor<R> {
    let [rows, width] = dims(&x);
    let lanes = lanes(width);
    let out = empty(&x, [rows, width]);
    // SAFETY: a cube per row, whose units stay within its `width`; the weight has as many numbers.
    unsafe {
        rms_norm_kernel::launch_unchecked::<R>(
            &out.client,
            cubes(rows, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            lanes,
            x.into_array_arg(),
            weight.into_array_arg(),
            out.clone().into_array_arg(),
            width / lanes,
            eps,
        );
    }
    out
}

/// See [`add_rms_norm`](super::Kernels::add_rms_norm).
pub(super) fn add_rms_norm<R: CubeRuntime>(
    residual: CubeTensor<R>,
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    eps: f32,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [rows, width] = dims(&x);
    let lanes = lanes(width);
    let (sum, out) = (empty(&x, [rows, width]), empty(&x, [rows, width]));
    // SAFETY: as above; all four matrices have the same shape.
    unsafe {
        add_rms_norm_kernel::launch_unchecked::<R>(
            &out.client,
            cubes(rows, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            lanes,
            residual.into_array_arg(),
            x.into_array_arg(),
            weight.into_array_arg(),
            sum.clone().into_array_arg(),
            out.clone().into_array_arg(),
            width / lanes,
            eps,
        );
    }
    (sum, out)
}
