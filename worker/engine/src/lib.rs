//! Inference on Burn: loads a model, and decodes many sequences together in one running batch.
//!
//! A library of its own: it knows nothing of brokers, databases or HTTP. A caller gives it [`Request`]s and gets back
//! one batch of [`Event`]s per decoding step.

mod api;
mod load;

pub use api::*;
pub use load::*;
