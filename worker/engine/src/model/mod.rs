//! The models: what turns a batch of tokens into logits.
//!
//! One file per architecture, or family of architectures that differ by settings, generic over the backend. Behind [`Model`] neither backend nor architecture shows, so that
//! the scheduler is compiled once and can be tested with a model that is none.

mod decoder;
mod embedding;
mod layers;
mod rope;

use crate::LoadError;
use crate::batch::Batch;
use crate::kernels::{Kernels, Limits};
use crate::sampler::{self, Choice};
use crate::weights::Checkpoint;

pub(crate) use decoder::{heads, rope_of, ropes};
pub(crate) use rope::Rope;

/// A model with its KV cache.
pub(crate) trait Model {
    /// Runs the batch's rows through the model, which also caches their keys and values. Returns the logits of
    /// [`Batch::outputs`], one row of [`vocabulary`](Self::vocabulary) numbers after another.
    fn forward(&mut self, batch: &Batch) -> Vec<f32>;

    /// Takes back what [`forward`](Self::forward) gave: at many sequences, fresh memory for it would show.
    fn recycle(&mut self, logits: Vec<f32>);

    /// Like [`forward`](Self::forward), for when of each output only the token is wanted that a choice makes of it: what leaves
    /// the device is one number instead of a row.
    fn choose(&mut self, batch: &Batch, choices: &[Choice]) -> Vec<u32> {
        let mut logits = self.forward(batch);
        let rows = logits.chunks_exact_mut(self.vocabulary()).zip(choices);
        rows.map(|(logits, choice)| sampler::choose(logits, choice)).collect()
    }

    /// See [`Kernels::SAMPLES`].
    fn samples(&self) -> bool;

    /// See [`Kernels::STEPS`].
    fn steps(&self) -> &'static [(usize, usize)] {
        &[]
    }

    /// Width of a row of logits.
    fn vocabulary(&self) -> usize;

    /// Runs `task(0)` to `task(tasks - 1)` on the model's threads, if it has any on this side of the device.
    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));

    /// What a pass takes.
    fn cost(&self) -> Cost;

    /// What the device can do at most, where that can be measured.
    fn limits(&self) -> Option<Limits>;

    /// Brings the model into order after a panic in [`forward`](Self::forward); what was cached is lost.
    fn reset(&mut self);
}

/// What a forward pass takes, to compare with what the device can do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Bytes of weights that every pass reads.
    pub weight_bytes: usize,
    /// Multiplications with weights per row.
    pub multiplications: usize,
    /// Bytes of keys and values per cached position.
    pub cache_bytes: usize,
}

/// Where and how a model is set up.
pub(crate) struct Setup<'a, B: Kernels> {
    /// Kernels' context.
    pub context: B::Context,
    /// Where tensors go.
    pub device: B::Device,
    /// Blocks of the KV cache.
    pub blocks: usize,
    /// Told the bytes of each tensor that has been taken over.
    pub progress: &'a mut dyn FnMut(u64),
}

/// Takes over a checkpoint's weights.
pub(crate) fn load<B: Kernels>(
    checkpoint: Checkpoint,
    setup: Setup<'_, B>,
) -> Result<Box<dyn Model>, LoadError> {
    Ok(Box::new(decoder::Decoder::<B>::load(checkpoint, setup)?))
}
