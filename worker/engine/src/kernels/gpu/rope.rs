//! Rotary positions: norms and rotates query and key heads, and puts keys and values into the paged cache.

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::reduce::cube_sum;
use super::{BLOCK, cubes, dims, empty};
use crate::kernels::Heads;
use crate::weights::RopeStyle;

/// Units of a cube.
const UNITS: usize = 32;

/// Norms of the heads, before they are rotated.
pub(super) struct Norms<R: CubeRuntime> {
    /// Weight for query heads, `[dim]`.
    pub query: CubeTensor<R>,
    /// Weight for key heads, `[dim]`.
    pub key: CubeTensor<R>,
    /// Added to the mean square.
    pub eps: f32,
}

/// How the rows are rotated, and where they belong; see [`Tables`](super::Tables).
pub(super) struct Rotation<R: CubeRuntime> {
    /// Which elements pair up.
    pub style: RopeStyle,
    /// Cosines and sines.
    pub angles: CubeTensor<R>,
    /// Positions and block tables.
    pub index: CubeTensor<R>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    queries: usize,
    keys: usize,
    dim: usize,
    interleaved: bool,
}

/// Rotates the head that starts at `from` in `x`, after its norm if it has one, and writes it to `out` from `to` on.
#[cube]
#[allow(clippy::too_many_arguments)]
fn rotate(
    x: &Array<f32>,
    from: usize,
    angles: &Array<f32>,
    row: usize,
    norm: &ComptimeOption<Array<f32>>,
    eps: f32,
    out: &mut Array<f32>,
    to: usize,
    #[comptime] shape: Shape,
) {
    let pairs = comptime!(shape.dim / 2);
    let mut factor = 1.0f32;
    if norm.is_some() {
        let mut squares = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < shape.dim {
            squares += x[from + i] * x[from + i];
            i += UNITS;
        }
        let mean = cube_sum(squares, UNITS) / f32::cast_from(shape.dim);
        factor = 1.0 / (mean + eps).sqrt();
    }
    let mut pair = UNIT_POS as usize;
    while pair < pairs {
        let (first, second) =
            if comptime!(shape.interleaved) { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
        let mut a = x[from + first] * factor;
        let mut b = x[from + second] * factor;
        #[comptime]
        if let ComptimeOption::Some(weight) = norm {
            a *= weight[first];
            b *= weight[second];
        }
        let cos = angles[row * 2 * pairs + pair];
        let sin = angles[row * 2 * pairs + pairs + pair];
        out[to + first] = a * cos - b * sin;
        out[to + second] = a * sin + b * cos;
        pair += UNITS;
    }
}

/// A cube per head of a row: query heads first, then key heads, then value heads.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rope_append_kernel(
    q: &Array<f32>,
    k: &Array<f32>,
    v: &Array<f32>,
    angles: &Array<f32>,
    index: &Array<u32>,
    query_norm: &ComptimeOption<Array<f32>>,
    key_norm: &ComptimeOption<Array<f32>>,
    rotated: &mut Array<f32>,
    keys: &mut Array<f32>,
    values: &mut Array<f32>,
    rows: usize,
    eps: f32,
    #[comptime] shape: Shape,
) {
    let row = CUBE_POS_Y as usize;
    let head = CUBE_POS_X as usize;
    if head < shape.queries {
        let at = (row * shape.queries + head) * shape.dim;
        rotate(q, at, angles, row, query_norm, eps, rotated, at, shape);
    } else {
        let position = index[row] as usize;
        let block = index[index[rows + row] as usize + position / BLOCK] as usize;
        let key_head = (head - shape.queries) % shape.keys;
        let from = (row * shape.keys + key_head) * shape.dim;
        let to = ((block * shape.keys + key_head) * BLOCK + position % BLOCK) * shape.dim;
        if head < shape.queries + shape.keys {
            rotate(k, from, angles, row, key_norm, eps, keys, to, shape);
        } else {
            let mut i = UNIT_POS as usize;
            while i < shape.dim {
                values[to + i] = v[from + i];
                i += UNITS;
            }
        }
    }
}

/// See [`rope_append`](super::Kernels::rope_append). Writes to `keys` and `values` in place, whoever else holds them.
pub(super) fn rope_append<R: CubeRuntime>(
    [q, k, v]: [CubeTensor<R>; 3],
    heads: &Heads,
    norms: Option<Norms<R>>,
    Rotation { style, angles, index }: Rotation<R>,
    keys: CubeTensor<R>,
    values: CubeTensor<R>,
) -> CubeTensor<R> {
    let [rows, width] = dims(&q);
    let out = empty(&q, [rows, width]);
    let shape = Shape {
        queries: heads.queries,
        keys: heads.keys,
        dim: heads.dim,
        interleaved: style == RopeStyle::Interleaved,
    };
    let (eps, query_norm, key_norm) = match norms {
        Some(norms) => (norms.eps, Some(norms.query), Some(norms.key)),
        None => (0.0, None, None),
    };
    // SAFETY: a cube per row and head, which stays within the head's `dim` numbers; the scheduler gives every position
    // of a row a block of the cache.
    unsafe {
        rope_append_kernel::launch_unchecked::<R>(
            &out.client,
            cubes(heads.queries + 2 * heads.keys, rows, 1),
            CubeDim::new_1d(UNITS as u32),
            q.into_array_arg(),
            k.into_array_arg(),
            v.into_array_arg(),
            angles.into_array_arg(),
            index.into_array_arg(),
            query_norm.map(CubeTensor::into_array_arg).into(),
            key_norm.map(CubeTensor::into_array_arg).into(),
            out.clone().into_array_arg(),
            keys.into_array_arg(),
            values.into_array_arg(),
            rows,
            eps,
            shape,
        );
    }
    out
}
