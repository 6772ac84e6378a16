//! Token embeddings, looked up on the host.
//!
//! A row per token is little to send to a device, and the table may be the largest tensor of all: it stays where it is, in
//! the mapped file, and rows are dequantised as they are asked for.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use crate::LoadError;
use crate::weights::Checkpoint;

/// The embedding table of a checkpoint.
pub(crate) struct Embedding {
    checkpoint: Checkpoint,
    name: &'static str,
    width: usize,
    scale: f32,
}

impl Embedding {
    /// Keeps the checkpoint for its tensor `name`, whose rows are multiplied by `scale`.
    pub fn new(checkpoint: Checkpoint, name: &'static str, scale: f32) -> Result<Self, LoadError> {
        let width = checkpoint.tensor(name)?.shape[1];
        Ok(Self { checkpoint, name, width, scale })
    }

    /// The rows of `tokens`: `[rows, width]`.
    pub fn lookup<B: Backend>(&self, tokens: &[u32], device: &B::Device) -> Tensor<B, 2> {
        let table = self.checkpoint.tensor(self.name).expect("was there when the model was loaded");
        let mut values = vec![0.0; tokens.len() * self.width];
        for (row, &token) in values.chunks_exact_mut(self.width).zip(tokens) {
            table.dequantize_row(token as usize, row);
        }
        if self.scale != 1.0 {
            values.iter_mut().for_each(|value| *value *= self.scale);
        }
        Tensor::from_data(TensorData::new(values, [tokens.len(), self.width]), device)
    }
}
