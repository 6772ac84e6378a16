//! What inference needs of a backend beyond Burn's own operations.
//!
//! [`Kernels`] stands beside Burn's `Backend`: the few fused operations in which a language model spends its time. Each has
//! a plain implementation in Burn's tensor operations as default ([`plain`]), so that every model runs on every backend; a
//! backend overrides what it can do better. Only the form of the weights has no default, because a backend that multiplies
//! packed weights never wants to see them dequantised.

pub mod cpu;
pub(crate) mod flex;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod gpu;
pub(crate) mod plain;
mod step;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

pub(crate) use step::{KvLayer, Rotation, Step};

use crate::sampler::{self, Choice};
use crate::weights::{Activation, TensorView};

/// Positions in one block of the KV cache.
pub(crate) const BLOCK: usize = 32;

/// A matrix by which rows are multiplied, in the backend's own form.
pub(crate) trait Weight<B: Kernels>: Send + Sized {
    /// Takes over a matrix `[out, in]`.
    fn load(context: &B::Context, device: &B::Device, matrix: &TensorView<'_>) -> Self;

    /// `x` `[rows, in]` times the transposed matrix: `[rows, out]`.
    fn apply(&self, context: &B::Context, x: Tensor<B, 2>) -> Tensor<B, 2>;

    /// Bytes that one pass over the matrix reads.
    fn bytes(&self) -> usize;

    /// Its elements: the multiplications that a row takes.
    fn elements(&self) -> usize;
}

/// Shape of an attention layer.
#[derive(Clone, Debug)]
pub(crate) struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key and value heads; each serves `queries / keys` query heads.
    pub keys: usize,
    /// Width of a head.
    pub dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// A position sees only so many positions, itself included; `None`: all before it.
    pub window: Option<usize>,
}

/// Norms over each query and key head, before they are rotated (Qwen3, Gemma 3).
pub(crate) struct HeadNorms<B: Backend> {
    /// Weight for query heads, `[dim]`.
    pub query: Tensor<B, 1>,
    /// Weight for key heads, `[dim]`.
    pub key: Tensor<B, 1>,
    /// Added to the mean square.
    pub eps: f32,
}

/// What a device can do at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes read from memory a second.
    pub bandwidth: f64,
    /// Multiplications and additions in f32 a second.
    pub flops: f64,
}

/// Operations of inference, with plain implementations as defaults. Tensors are `[rows, features]` in f32.
pub(crate) trait Kernels: Backend {
    /// What kernels need besides their operands, e.g. the CPU's threads. Lives on the engine's thread.
    type Context: Send;
    /// A matrix in this backend's form.
    type Weight: Weight<Self>;

    /// Decoding steps for which the backend compiles kernels of their own: numbers of rows, and the position that they are
    /// at.
    const STEPS: &'static [(usize, usize)] = &[(1, BLOCK - 1)];

    /// Whether [`choose`](Self::choose) draws tokens where the logits are. If not, they are on the host anyway, and it serves
    /// for the likeliest only: for any other, the engine's tasks choose beside what else they do for their sequences.
    const SAMPLES: bool = false;

    /// `x` over its root mean square, times `weight` `[features]`.
    fn rms_norm(
        _: &Self::Context,
        x: Tensor<Self, 2>,
        weight: &Tensor<Self, 1>,
        eps: f32,
    ) -> Tensor<Self, 2> {
        plain::rms_norm(x, weight, eps)
    }

    /// Adds a layer's result to the residual stream, and norms the sum for the next layer: `(sum, normed)`.
    fn add_rms_norm(
        _: &Self::Context,
        residual: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weight: &Tensor<Self, 1>,
        eps: f32,
    ) -> (Tensor<Self, 2>, Tensor<Self, 2>) {
        let sum = residual + x;
        (sum.clone(), plain::rms_norm(sum, weight, eps))
    }

    /// One input through several matrices.
    fn project<const N: usize>(
        context: &Self::Context,
        x: Tensor<Self, 2>,
        weights: [&Self::Weight; N],
    ) -> [Tensor<Self, 2>; N] {
        weights.map(|weight| weight.apply(context, x.clone()))
    }

    /// An empty cache of `blocks` blocks for one layer.
    fn cache(_: &Self::Context, device: &Self::Device, heads: &Heads, blocks: usize) -> KvLayer<Self> {
        plain::cache(device, heads, blocks)
    }

    /// Bytes that [`cache`](Self::cache) takes for one position of a layer with `heads` key heads of width `dim`.
    fn cache_bytes(heads: usize, dim: usize) -> usize {
        2 * heads * dim * size_of::<f32>()
    }

    /// Norms and rotates queries and keys, puts keys and values into the cache, and returns the queries.
    fn rope_append(
        _: &Self::Context,
        qkv: [Tensor<Self, 2>; 3],
        heads: &Heads,
        norms: Option<&HeadNorms<Self>>,
        rope: usize,
        step: &Step<Self>,
        cache: &mut KvLayer<Self>,
    ) -> Tensor<Self, 2> {
        plain::rope_append(qkv, heads, norms, rope, step, cache)
    }

    /// Causal attention of each row's query heads over its own sequence's cached positions: `[rows, queries * dim]`.
    fn attend(
        _: &Self::Context,
        q: Tensor<Self, 2>,
        heads: &Heads,
        step: &Step<Self>,
        cache: &KvLayer<Self>,
    ) -> Tensor<Self, 2> {
        plain::attend(q, heads, step, cache)
    }

    /// The gated middle of a feed-forward layer: activation(gate) · up.
    fn gated(_: &Self::Context, gate_up: [Tensor<Self, 2>; 2], activation: Activation) -> Tensor<Self, 2> {
        plain::gated(gate_up, activation)
    }

    /// Runs `task(0)` to `task(tasks - 1)` on the host, on the backend's threads if it has some.
    fn parallel(_: &Self::Context, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }

    /// What this device can do at most, where that can be measured.
    fn limits(_: &Self::Context) -> Option<Limits> {
        None
    }

    /// A token for each row of `logits`, `[choices.len(), vocabulary]`: what [`sampler::choose`] chooses, but for rounding.
    fn choose(context: &Self::Context, logits: Tensor<Self, 2>, choices: &[Choice]) -> Vec<u32> {
        let [_, width] = logits.dims();
        let mut values = Self::read(context, logits);
        let rows = values.chunks_exact_mut(width).zip(choices);
        let rows: Vec<_> = rows.map(|(logits, choice)| Mutex::new((logits, choice, 0))).collect();
        Self::parallel(context, rows.len(), &|row| {
            let mut row = rows[row].lock().unwrap_or_else(PoisonError::into_inner);
            let (logits, choice, token) = &mut *row;
            *token = sampler::choose(logits, choice);
        });
        let token = |row: Mutex<(_, _, u32)>| row.into_inner().unwrap_or_else(PoisonError::into_inner).2;
        let tokens = rows.into_iter().map(token).collect();
        Self::recycle(context, values);
        tokens
    }

    /// Brings rows of logits to the host, one after another.
    fn read(_: &Self::Context, logits: Tensor<Self, 2>) -> Vec<f32> {
        plain::read(logits)
    }

    /// Takes back what [`read`](Self::read) gave, whose memory may serve again.
    fn recycle(_: &Self::Context, logits: Vec<f32>) {
        drop(logits);
    }
}
