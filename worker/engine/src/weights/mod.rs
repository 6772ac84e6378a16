//! A model's files: sizes, weights, tokenizer and chat template, from a GGUF file or a Hugging Face directory.
//!
//! Files are memory-mapped: opening one costs its header, and weights are read when something asks for them. Tensors go
//! by GGUF's names whatever the file calls them.
//!
//! A mapped file that someone truncates while it is in use kills the process (SIGBUS), as with every program that maps
//! files: replace models by renaming, never in place.

mod checkpoint;
mod config;
pub mod dequant;
mod directory;
mod dtype;
pub(crate) mod gguf;
mod hf_config;
mod layout;
mod names;
mod shape;

pub use checkpoint::Checkpoint;
pub use config::{Activation, ModelConfig, RopeStyle};
pub use dtype::DType;
pub use shape::Shape;

/// What is wrong with a model's files; [`crate::LoadError`] without the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// They are damaged.
    Malformed(String),
    /// They hold something that the engine does not run.
    Unsupported(String),
}

/// A tensor's bytes, and what they mean.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Number format.
    pub dtype: DType,
    /// Row-major, outermost first: a weight matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// As stored; no alignment is promised.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// How many values it has.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no values; no tensor of a [`Checkpoint`] is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All values, row after row.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        dequant::dequantize(self.dtype, self.data, &mut out);
        out
    }

    /// One row of a matrix.
    ///
    /// # Panics
    /// If there is no such row or `out` is not as long as a row.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        dequant::dequantize(self.dtype, self.row(row), out);
    }

    /// The stored bytes of one row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        let bytes = self.data.len() / self.rows();
        &self.data[row * bytes..][..bytes]
    }

    /// How many rows it has: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }
}
