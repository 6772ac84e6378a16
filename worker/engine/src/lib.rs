//! Inference on Burn: loads a model, and decodes many sequences together in one running batch.
//!
//! A library of its own: it knows nothing of brokers, databases or HTTP. A caller gives it [`Request`]s and gets back
//! one batch of [`Event`]s per decoding step.

mod api;
mod batch;
pub mod bench;
mod deep;
mod detokenize;
mod echo;
mod engine;
mod fairness;
mod guide;
pub mod kernels;
mod kv;
mod language;
mod load;
mod memory;
mod model;
mod pace;
mod sampler;
mod scheduler;
mod sequence;
mod setup;
mod speculation;
mod stop;
mod template;
mod tokenizer;
pub mod weights;

pub use api::*;
pub use detokenize::Detokenizer;
pub use echo::echo;
pub use load::*;
pub use sampler::{TokenCounts, argmax, sample, uniform};
pub use stop::StopMatcher;
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;

// What integration tests share is there for unit tests too, and names the crate from outside.
#[cfg(test)]
extern crate self as stoker_engine;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
