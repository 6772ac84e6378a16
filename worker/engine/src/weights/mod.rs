//! A model's files: sizes, weights, tokenizer and chat template, from a GGUF file or a Hugging Face directory.
//!
//! Files are memory-mapped: opening one costs its header, and weights are read when something asks for them. Tensors go
//! by GGUF's names whatever the file calls them.
//!
//! A mapped file that someone truncates while it is in use kills the process (SIGBUS), as with every program that maps
//! files: replace models by renaming, never in place.

mod config;
pub mod dequant;
mod dtype;
pub(crate) mod gguf;
mod layout;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

pub use config::{Activation, ModelConfig, RopeStyle};
pub use dtype::DType;
pub(crate) use gguf::Fault;
use gguf::Gguf;

use crate::{LoadError, Tokenizer};

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

/// Where a tensor is.
#[derive(Debug)]
struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    /// Which of [`Checkpoint::maps`].
    file: usize,
    range: Range<usize>,
}

/// An opened model.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    maps: Vec<Mmap>,
    tensors: HashMap<String, Entry>,
    gguf: Gguf,
}

impl Checkpoint {
    /// Opens a GGUF file, or a directory with `config.json`, `tokenizer.json` and `*.safetensors`, and checks that it is a
    /// whole model that the engine runs.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() {
            return Err(fault(path, Fault::Unsupported("a directory".into())));
        }
        Self::open_gguf(path)
    }

    fn open_gguf(path: &Path) -> Result<Self, LoadError> {
        let map = map(path)?;
        let build = || -> Result<_, Fault> {
            let gguf = Gguf::parse(&map)?;
            if gguf.uint("split.count").is_some_and(|n| n > 1) {
                return Err(Fault::Unsupported(
                    "one part of a split GGUF file; merge the parts first".into(),
                ));
            }
            let mut config = ModelConfig::from_gguf(&gguf, &map)?;
            config.vocab = gguf.tensors.get("token_embd.weight").map_or(0, |t| t.shape[0]);
            config.tied_embeddings = !gguf.tensors.contains_key("output.weight");
            config.qkv_bias = gguf.tensors.contains_key("blk.0.attn_q.bias");
            config.qk_norm |= gguf.tensors.contains_key("blk.0.attn_q_norm.weight");
            let shape_of = |name: &str| gguf.tensors.get(name).map(|t| t.shape.as_slice());
            layout::check(&config, gguf.tensors.keys().map(String::as_str), shape_of)?;
            if let Some(t) = gguf.tensors.get("rope_freqs.weight") {
                if t.dtype != DType::F32 || t.shape != [config.head_dim / 2] {
                    return Err(Fault::Malformed(
                        "tensor rope_freqs.weight does not fit the heads' width".into(),
                    ));
                }
                let view = TensorView { dtype: t.dtype, shape: t.shape.clone(), data: &map[t.range.clone()] };
                config.rope_factors = Some(view.dequantize());
            }
            Ok((gguf, config))
        };
        let (mut gguf, config) = build().map_err(|f| fault(path, f))?;
        let entry = |t: gguf::TensorInfo| Entry { dtype: t.dtype, shape: t.shape, file: 0, range: t.range };
        let tensors = gguf.tensors.drain().map(|(name, t)| (name, entry(t))).collect();
        Ok(Self { path: path.to_owned(), config, maps: vec![map], tensors, gguf })
    }

    /// Sizes and architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A tensor by GGUF's name, e.g. `blk.0.attn_q.weight`. Those that the architecture needs are all there, with the
    /// shapes that follow from [`Checkpoint::config`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| fault(&self.path, Fault::Malformed(format!("tensor {name} is missing"))))?;
        Ok(TensorView {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            data: &self.maps[entry.file][entry.range.clone()],
        })
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The names of all tensors, in no particular order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        let tokenizer =
            crate::tokenizer::from_gguf(&self.gguf, &self.maps[0]).map_err(|f| fault(&self.path, f))?;
        if tokenizer.vocab_size() > self.config.vocab {
            let (tokens, rows) = (tokenizer.vocab_size(), self.config.vocab);
            let message = format!("{tokens} tokens, but an embedding of {rows} rows");
            return Err(fault(&self.path, Fault::Malformed(message)));
        }
        Ok(tokenizer)
    }

    /// Bytes of all tensors, as stored.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.values().map(|e| e.range.len() as u64).sum()
    }
}

/// Maps a file into memory.
fn map(path: &Path) -> Result<Mmap, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only and private to us; that nobody truncates or rewrites the file meanwhile is the
    // condition that the module's documentation states.
    unsafe { Mmap::map(&file) }.map_err(io)
}

fn fault(path: &Path, fault: Fault) -> LoadError {
    let path = path.to_owned();
    match fault {
        Fault::Malformed(message) => LoadError::Malformed { path, message },
        Fault::Unsupported(message) => LoadError::Unsupported { path, message },
    }
}
