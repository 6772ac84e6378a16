//! The engine's own measurements: what a model says, and how fast.

mod quality;
mod reference;
mod speed;

pub use quality::{Quality, TEXT, quality};
pub use speed::{Measurement, SpeedOptions, speed, speed_of_shape};

use crate::batch::Batch;
use crate::engine::Ready;
use crate::kernels::BLOCK;
use crate::kernels::cpu::Isa;
use crate::weights::Checkpoint;
use crate::{LoadError, LoadOptions, ModelInfo, setup};

/// A model without an engine, for looking at its logits.
pub struct Probe {
    ready: Ready,
}

impl Probe {
    /// Loads a model onto the calling thread.
    pub fn load(options: LoadOptions) -> Result<Self, LoadError> {
        Self::load_on(Isa::best(), options)
    }

    /// The same, with the CPU's kernels of one instruction set.
    pub(crate) fn load_on(isa: Isa, options: LoadOptions) -> Result<Self, LoadError> {
        let checkpoint = Checkpoint::open(&options.path)?;
        Ok(Self { ready: setup::set_up_checkpoint(checkpoint, isa, options)? })
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
