//! Kernels for the CPU, on plain slices: products with packed weights, attention over a paged cache, and what lies
//! between them. They are as exact as single precision needs (see [`linear`]) and independent of batching and threads.

mod activations;
mod attention;
mod cache;
pub(super) mod format;
mod isa;
mod lanes;
mod limits;
mod linear;
mod memory;
mod pack;
mod pool;
mod rows;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles;

pub use activations::{Activations, Quantiser};
pub use attention::{AttentionSpec, attention};
pub use cache::{Element, KvShape, Rows, append};
pub use isa::Isa;
pub use limits::{float_peak, read_bandwidth};
pub use linear::{linear, linear_many};
pub use pack::{PackError, Packed, embedding_row};
pub use pool::Pool;
pub use rows::{Angles, add, add_rms_norm, gated, rms_norm};
