//! The gate of a feed-forward layer, element by element.

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::{dims, empty, lanes};
use crate::weights::Activation;

/// Units of a cube.
const UNITS: u32 = 256;
/// e to this is still finite in f32; shading languages don't promise what comes behind.
const LARGEST_EXPONENT: f32 = 80.0;

/// `x · sigmoid(z)`, where `z` is `x` for SiLU; the tanh approximation of GELU has this form too.
#[cube]
fn activate<N: Size>(x: Vector<f32, N>, #[comptime] gelu: bool) -> Vector<f32, N> {
    let z = if comptime!(gelu) {
        // 2 · sqrt(2 / π) · (x + 0.044715 · x³)
        let cubic = x * x * x * Vector::new(0.044715f32);
        (x + cubic) * Vector::new(1.595_769f32)
    } else {
        x
    };
    let exponent = min(Vector::new(0.0f32) - z, Vector::new(LARGEST_EXPONENT));
    x / (Vector::new(1.0f32) + exponent.exp())
}

#[cube(launch_unchecked)]
fn gated_kernel<N: Size>(
    gate: &Array<Vector<f32, N>>,
    up: &Array<Vector<f32, N>>,
    out: &mut Array<Vector<f32, N>>,
    count: usize,
    #[comptime] gelu: bool,
) {
    if ABSOLUTE_POS < count {
        out[ABSOLUTE_POS] = activate::<N>(gate[ABSOLUTE_POS], gelu) * up[ABSOLUTE_POS];
    }
}

/// See [`gated`](super::Kernels::gated).
pub(super) fn gated<R: CubeRuntime>(
    gate: CubeTensor<R>,
    up: CubeTensor<R>,
    activation: Activation,
) -> CubeTensor<R> {
    let [rows, width] = dims(&gate);
    let lanes = lanes(width);
    let out = empty(&gate, [rows, width]);
    let (count, units) = (rows * width / lanes, CubeDim::new_1d(UNITS));
    // SAFETY: no unit goes beyond `count`, and all three have as many vectors.
    unsafe {
        gated_kernel::launch_unchecked::<R>(
            &out.client,
            calculate_cube_count_elemwise(&out.client, count, units),
            units,
            lanes,
            gate.into_array_arg(),
            up.into_array_arg(),
            out.clone().into_array_arg(),
            count,
            activation == Activation::GeluTanh,
        );
    }
    out
}
