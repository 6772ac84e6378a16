//! What a step's kernels share: the batch, its rotations, and the cache they work on.

use std::cell::OnceCell;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

use super::BLOCK;
use super::cpu::Rows;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use super::gpu::Tables;
use crate::batch::Batch;
use crate::model::Rope;
use crate::weights::RopeStyle;

/// How a batch's rows are rotated, by one of a model's ropes.
pub(crate) struct Rotation {
    /// Which elements pair up.
    pub style: RopeStyle,
    /// Cosines, `[rows, dim / 2]`.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// One forward pass, as kernels see it.
pub(crate) struct Step<'a, B: Backend> {
    /// The rows.
    pub batch: &'a Batch,
    /// One per rope of the model (most have one; Gemma 3 has two).
    pub rotations: Vec<Rotation>,
    /// Where tensors are made.
    pub device: B::Device,
    /// Span of each row.
    sequences: Vec<u32>,
    /// Blocks of each span.
    tables: Vec<&'a [u32]>,
    /// For plain kernels: made when first asked for, shared by all layers.
    tensors: OnceCell<StepTensors<B>>,
    /// For kernels on GPUs: likewise.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    on_device: OnceCell<Tables<B>>,
}

/// The step's tables as tensors.
pub(crate) struct StepTensors<B: Backend> {
    /// Cosine and sine per rope, `[rows, dim / 2]`.
    pub rotations: Vec<(Tensor<B, 2>, Tensor<B, 2>)>,
    /// Block numbers per span.
    pub blocks: Vec<Tensor<B, 1, Int>>,
}

impl<'a, B: Backend> Step<'a, B> {
    /// Prepares a pass over `batch`.
    pub fn new(batch: &'a Batch, ropes: &[Rope], device: &B::Device) -> Self {
        let sequences =
            batch.spans.iter().zip(0..).flat_map(|(span, index)| span.rows.clone().map(move |_| index));
        Self {
            batch,
            rotations: ropes.iter().map(|rope| rope.rotation(&batch.positions)).collect(),
            device: device.clone(),
            sequences: sequences.collect(),
            tables: batch.spans.iter().map(|span| batch.blocks(span)).collect(),
            tensors: OnceCell::new(),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            on_device: OnceCell::new(),
        }
    }

    /// Whose each row is, as the CPU's kernels want it.
    pub fn rows(&self) -> Rows<'_> {
        Rows { sequences: &self.sequences, positions: &self.batch.positions, tables: &self.tables }
    }

    /// The rows whose logits are wanted.
    pub fn outputs(&self) -> Tensor<B, 1, Int> {
        let rows: Vec<i32> = self.batch.outputs.iter().map(|&row| row as i32).collect();
        let shape = [rows.len()];
        Tensor::from_data(TensorData::new(rows, shape), &self.device)
    }

    /// The step's tables as tensors.
    pub fn tensors(&self) -> &StepTensors<B> {
        self.tensors.get_or_init(|| self.make_tensors())
    }

    /// The step's tables as GPUs' kernels take them.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub fn tables(&self) -> &Tables<B> {
        self.on_device.get_or_init(|| Tables::new(self))
    }

    fn make_tensors(&self) -> StepTensors<B> {
        let rows = self.batch.rows();
        let table = |values: &[f32]| {
            let shape = [rows, values.len() / rows];
            Tensor::from_data(TensorData::new(values.to_vec(), shape), &self.device)
        };
        let rotations = self.rotations.iter().map(|Rotation { cos, sin, .. }| (table(cos), table(sin)));
        let blocks = self.batch.spans.iter().map(|span| {
            let used = &self.batch.blocks(span)[..span.len().div_ceil(BLOCK)];
            let used: Vec<i32> = used.iter().map(|&block| block as i32).collect();
            let shape = [used.len()];
            Tensor::from_data(TensorData::new(used, shape), &self.device)
        });
        StepTensors { rotations: rotations.collect(), blocks: blocks.collect() }
    }
}

/// One layer's keys and values of all sequences, in blocks; how they lie in a block is the backend's choice.
///
/// Bare primitives, so that a backend which can write in place gets at its own tensor type.
pub(crate) struct KvLayer<B: Backend> {
    /// Rotated keys.
    pub keys: B::FloatTensorPrimitive,
    /// Values.
    pub values: B::FloatTensorPrimitive,
}
