//! The engine's own measurements: what a model says, and how fast.

mod speed;

pub use speed::{Measurement, SpeedOptions, speed};

use crate::batch::Batch;
use crate::engine::Ready;
use crate::kernels::BLOCK;
use crate::{LoadError, LoadOptions, ModelInfo, setup};

/// A model without an engine, for looking at its logits.
pub struct Probe {
    ready: Ready,
}

impl Probe {
    /// Loads a model onto the calling thread.
    pub fn load(options: LoadOptions) -> Result<Self, LoadError> {
        Ok(Self { ready: setup::set_up(options)? })
    }

    /// What it is.
    pub fn info(&self) -> &ModelInfo {
        &self.ready.info
    }

    /// Logits behind each of the last `rows` of `tokens`, in one pass.
    ///
    /// # Panics
    /// If there are more tokens than the cache has room for, or fewer than `rows`.
    pub fn logits(&mut self, tokens: &[u32], rows: usize) -> Vec<Vec<f32>> {
        let blocks: Vec<u32> = (0..tokens.len().div_ceil(BLOCK) as u32).collect();
        assert!(blocks.len() <= self.ready.blocks && rows <= tokens.len());
        let mut batch = Batch::default();
        batch.push(tokens, 0, &blocks, rows);
        let logits = self.ready.model.forward(&batch);
        logits.chunks_exact(self.ready.model.vocabulary()).map(<[f32]>::to_vec).collect()
    }
}
