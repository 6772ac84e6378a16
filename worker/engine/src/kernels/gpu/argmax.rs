//! The greatest of each row, found where the logits are: a greedy step brings one word a row to the host.

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::{cubes, dims};

/// Units of a cube.
const UNITS: usize = 256;

/// A cube per row. The first of several greatest; 0 where nothing is greater than the least f32.
#[cube(launch_unchecked)]
fn argmax_kernel(x: &Array<f32>, out: &mut Array<u32>, width: usize) {
    let unit = UNIT_POS as usize;
    let row = CUBE_POS_X as usize;
    let mut best = f32::MIN.runtime();
    let mut place = 0u32;
    let mut i = unit;
    while i < width {
        let value = x[row * width + i];
        if value > best {
            best = value;
            place = u32::cast_from(i);
        }
        i += UNITS;
    }
    let mut values = SharedMemory::<f32>::new(UNITS);
    let mut places = SharedMemory::<u32>::new(UNITS);
    values[unit] = best;
    places[unit] = place;
    sync_cube();
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        if unit < half {
            let (value, other) = (values[unit + half], places[unit + half]);
            if value > values[unit] || (value == values[unit] && other < places[unit]) {
                values[unit] = value;
                places[unit] = other;
            }
        }
        sync_cube();
        half /= 2;
    }
    if unit == 0 {
        out[row] = places[0];
    }
}

/// See [`argmax`](super::Kernels::argmax).
pub(super) fn argmax<R: CubeRuntime>(x: CubeTensor<R>) -> Vec<u32> {
    let [rows, width] = dims(&x);
    let client = x.client.clone();
    let out = client.empty(rows * size_of::<u32>());
    // SAFETY: a cube per row, whose units stay within its `width`.
    unsafe {
        argmax_kernel::launch_unchecked::<R>(
            &client,
            cubes(rows, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            x.into_array_arg(),
            ArrayArg::from_raw_parts(out.clone(), rows),
            width,
        );
    }
    let bytes = client.read_one(out).expect("the device answers");
    bytes.as_chunks().0.iter().map(|bytes| u32::from_ne_bytes(*bytes)).collect()
}
