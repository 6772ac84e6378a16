//! The operations of inference in Burn's own tensor operations: the reference that runs everywhere.
//!
//! Written for clearness. It handles spans one after another, and copies the blocks that a span attends to.

use burn::tensor::activation::{gelu_approximate, sigmoid, softmax};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Shape, Tensor, TensorData, TensorPrimitive};

use super::{BLOCK, HeadNorms, Heads, KvLayer, Step};
use crate::batch::Span;
use crate::weights::{Activation, RopeStyle, TensorView};

/// Scores of positions that a row must not see. Not infinite: shading languages don't promise infinities.
const MASKED: f32 = -1e30;

/// A dequantised matrix.
pub(crate) struct Dense<B: Backend>(Tensor<B, 2>);

impl<B: Backend> Dense<B> {
    /// Dequantises `matrix`.
    pub fn new(device: &B::Device, matrix: &TensorView<'_>) -> Self {
        Self(Tensor::from_data(TensorData::new(matrix.dequantize(), matrix.shape.clone()), device))
    }

    /// See [`Weight::apply`](super::Weight::apply).
    pub fn multiply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        x.matmul(self.0.clone().transpose())
    }
}

/// See [`Kernels::rms_norm`]; norms along the last dimension.
pub(crate) fn rms_norm<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weight: &Tensor<B, 1>,
    eps: f32,
) -> Tensor<B, D> {
    let mean_square = x.clone().square().mean_dim(D - 1);
    x / (mean_square + eps).sqrt() * weight.clone().unsqueeze()
}

/// See [`Kernels::gated`].
pub(crate) fn gated<B: Backend>([gate, up]: [Tensor<B, 2>; 2], activation: Activation) -> Tensor<B, 2> {
    let gate = match activation {
        Activation::Silu => gate.clone() * sigmoid(gate),
        Activation::GeluTanh => gelu_approximate(gate),
    };
    gate * up
}

/// See [`Kernels::cache`]; keys and values are `[blocks, heads, BLOCK, dim]`.
pub(crate) fn cache<B: Backend>(device: &B::Device, heads: &Heads, blocks: usize) -> KvLayer<B> {
    let zeros =
        || B::float_zeros(Shape::new([blocks, heads.keys, BLOCK, heads.dim]), device, DType::F32.into());
    KvLayer { keys: zeros(), values: zeros() }
}

/// See [`Kernels::rope_append`].
pub(crate) fn rope_append<B: Backend>(
    [q, k, v]: [Tensor<B, 2>; 3],
    heads: &Heads,
    norms: Option<&HeadNorms<B>>,
    rope: usize,
    step: &Step<B>,
    cache: &mut KvLayer<B>,
) -> Tensor<B, 2> {
    let [rows, width] = q.dims();
    let split = |x: Tensor<B, 2>, count: usize| x.reshape([rows, count, heads.dim]);
    let (mut q, mut k, v) = (split(q, heads.queries), split(k, heads.keys), split(v, heads.keys));
    if let Some(norms) = norms {
        q = rms_norm(q, &norms.query, norms.eps);
        k = rms_norm(k, &norms.key, norms.eps);
    }
    let (cos, sin) = &step.tensors().rotations[rope];
    let style = step.rotations[rope].style;
    let q = rotate(q, cos, sin, style);
    let k = rotate(k, cos, sin, style);
    append(&mut cache.keys, k, step);
    append(&mut cache.values, v, step);
    q.reshape([rows, width])
}

/// Rotates each pair of elements of `x` `[rows, heads, dim]` by its row's angle.
fn rotate<B: Backend>(
    x: Tensor<B, 3>,
    cos: &Tensor<B, 2>,
    sin: &Tensor<B, 2>,
    style: RopeStyle,
) -> Tensor<B, 3> {
    let [rows, heads, dim] = x.dims();
    let half = dim / 2;
    // Pairs along a dimension of their own: the last for neighbours, the one before for halves.
    let (shape, pair) = match style {
        RopeStyle::Interleaved => ([rows, heads, half, 2], 3),
        RopeStyle::Half => ([rows, heads, 2, half], 2),
    };
    let mut angles = [rows, 1, half, half];
    angles[pair] = 1;
    let (cos, sin) = (cos.clone().reshape(angles), sin.clone().reshape(angles));
    let x = x.reshape(shape);
    let (a, b) = (x.clone().narrow(pair, 0, 1), x.narrow(pair, 1, 1));
    let rotated = vec![a.clone() * cos.clone() - b.clone() * sin.clone(), a * sin + b * cos];
    Tensor::cat(rotated, pair).reshape([rows, heads, dim])
}

/// Writes `x` `[rows, heads, dim]` to the rows' places in the cache.
fn append<B: Backend>(cache: &mut B::FloatTensorPrimitive, x: Tensor<B, 3>, step: &Step<B>) {
    // Taken out meanwhile: a tensor without other owners is written in place.
    let empty = B::float_empty(Shape::new([0]), &step.device, DType::F32.into());
    let mut tensor = wrap::<B, 4>(std::mem::replace(cache, empty));
    let [_, heads, _, dim] = tensor.dims();
    let x = x.swap_dims(0, 1);
    for span in &step.batch.spans {
        let mut position = span.start;
        while position < span.len() {
            let (block, offset) = (step.batch.blocks(span)[position / BLOCK] as usize, position % BLOCK);
            let run = (BLOCK - offset).min(span.len() - position);
            let row = span.rows.start + position - span.start;
            let part = x.clone().narrow(1, row, run).unsqueeze();
            let place = [block..block + 1, 0..heads, offset..offset + run, 0..dim];
            tensor = tensor.slice_assign(place, part);
            position += run;
        }
    }
    *cache = tensor.into_primitive().tensor();
}

/// See [`Kernels::attend`].
pub(crate) fn attend<B: Backend>(
    q: Tensor<B, 2>,
    heads: &Heads,
    step: &Step<B>,
    cache: &KvLayer<B>,
) -> Tensor<B, 2> {
    let results = step.batch.spans.iter().zip(&step.tensors().blocks).map(|(span, blocks)| {
        let q = q.clone().narrow(0, span.rows.start, span.rows.len());
        let gather = |cache: &B::FloatTensorPrimitive| {
            let tiles = wrap::<B, 4>(cache.clone()).select(0, blocks.clone());
            let [count, kv, _, dim] = tiles.dims();
            tiles.swap_dims(0, 1).reshape([kv, count * BLOCK, dim])
        };
        attend_span(q, gather(&cache.keys), gather(&cache.values), heads, span, &step.device)
    });
    Tensor::cat(results.collect(), 0)
}

/// Attention of one span: `q` `[rows, queries * dim]` over `k`, `v` `[keys, positions, dim]`.
fn attend_span<B: Backend>(
    q: Tensor<B, 2>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    heads: &Heads,
    span: &Span,
    device: &B::Device,
) -> Tensor<B, 2> {
    let (rows, group) = (span.rows.len(), heads.queries / heads.keys);
    let [_, positions, _] = k.dims();
    // All query heads of a group, and all rows, as rows of one matrix per key head.
    let q = q.reshape([rows, heads.keys, group, heads.dim]).permute([1, 2, 0, 3]);
    let q = q.reshape([heads.keys, group * rows, heads.dim]);
    let scores = q.matmul(k.transpose()) * heads.scale;
    let scores = scores.reshape([heads.keys, group, rows, positions]);
    let scores = scores + mask(span, positions, heads.window, device).unsqueeze();
    let weights = softmax(scores, 3).reshape([heads.keys, group * rows, positions]);
    let out = weights.matmul(v).reshape([heads.keys, group, rows, heads.dim]);
    out.permute([2, 0, 1, 3]).reshape([rows, heads.queries * heads.dim])
}

/// `[rows, positions]`: 0 where a row may look, [`MASKED`] elsewhere.
fn mask<B: Backend>(
    span: &Span,
    positions: usize,
    window: Option<usize>,
    device: &B::Device,
) -> Tensor<B, 2> {
    let mut mask = vec![MASKED; span.rows.len() * positions];
    for (i, row) in mask.chunks_exact_mut(positions).enumerate() {
        let end = span.start + i + 1;
        let begin = window.map_or(0, |window| end.saturating_sub(window));
        row[begin..end].fill(0.0);
    }
    Tensor::from_data(TensorData::new(mask, [span.rows.len(), positions]), device)
}

/// See [`Kernels::read`].
pub(crate) fn read<B: Backend>(logits: Tensor<B, 2>) -> Vec<f32> {
    logits.into_data().into_vec().expect("logits are f32")
}

fn wrap<B: Backend, const D: usize>(primitive: B::FloatTensorPrimitive) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}
