//! An opened model, whichever form its files have.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::directory::Directory;
use super::gguf::{self, Gguf};
use super::{DType, Fault, ModelConfig, TensorView, layout};
use crate::{ChatTemplate, LoadError, Tokenizer, tokenizer};

/// Where a tensor's bytes are.
#[derive(Debug)]
pub(super) enum Place {
    /// In one of the mapped files.
    Mapped { file: usize, range: Range<usize> },
    /// In memory, because the file has them in another form.
    Owned(Vec<u8>),
}

/// A tensor.
#[derive(Debug)]
pub(super) struct Entry {
    pub dtype: DType,
    /// Row-major, outermost first.
    pub shape: Vec<usize>,
    pub place: Place,
}

/// Tensors by GGUF's names.
pub(super) type Tensors = HashMap<String, Entry>;

/// What the files are, and what they say beside the weights.
#[derive(Debug)]
enum Source {
    Gguf(Gguf),
    Directory(Directory),
    /// There are no files: the weights are random.
    Shape,
}

/// An opened model.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    maps: Vec<Mmap>,
    tensors: Tensors,
    source: Source,
}

impl Checkpoint {
    /// Opens a GGUF file, or a directory with Hugging Face's `config.json`, `tokenizer.json` and `*.safetensors`, and
    /// checks that it is a whole model that the engine runs.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() { Self::open_directory(path) } else { Self::open_gguf(path) }
    }

    fn open_gguf(path: &Path) -> Result<Self, LoadError> {
        let map = map(path)?;
        let (config, gguf, tensors) = read_gguf(&map).map_err(|f| fault(path, f))?;
        Ok(Self { path: path.to_owned(), config, maps: vec![map], tensors, source: Source::Gguf(gguf) })
    }

    fn open_directory(path: &Path) -> Result<Self, LoadError> {
        let mut directory = Directory::open(path)?;
        let (tensors, maps) = directory.tensors()?;
        let config = directory.config().clone();
        check(&config, &tensors).map_err(|f| fault(path, f))?;
        Ok(Self { path: path.to_owned(), config, maps, tensors, source: Source::Directory(directory) })
    }

    /// A model without files, whose tensors lie in `weights`.
    pub(super) fn of_parts(name: &str, config: ModelConfig, weights: Mmap, tensors: Tensors) -> Self {
        Self { path: name.into(), config, maps: vec![weights], tensors, source: Source::Shape }
    }

    /// Sizes and architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A tensor by GGUF's name, e.g. `blk.0.attn_q.weight`. Those that the architecture needs are all there, with the
    /// shapes that follow from [`Checkpoint::config`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let missing = || fault(&self.path, Fault::Malformed(format!("tensor {name} is missing")));
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        Ok(TensorView { dtype: entry.dtype, shape: entry.shape.clone(), data: self.bytes(entry) })
    }

    fn bytes<'a>(&'a self, entry: &'a Entry) -> &'a [u8] {
        match &entry.place {
            Place::Mapped { file, range } => &self.maps[*file][range.clone()],
            Place::Owned(bytes) => bytes,
        }
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The names of all tensors, in no particular order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors, as stored.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.values().map(|e| self.bytes(e).len() as u64).sum()
    }

    /// The model's tokenizer; its ids are all below [`ModelConfig::vocab`].
    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        let rows = self.config.vocab;
        let tokenizer = match &self.source {
            Source::Gguf(gguf) => {
                tokenizer::from_gguf(gguf, &self.maps[0]).map_err(|f| fault(&self.path, f))?
            }
            Source::Directory(directory) => directory.tokenizer(rows)?,
            Source::Shape => Tokenizer::placeholder(rows),
        };
        if tokenizer.vocab_size() > rows {
            let message = format!("{} tokens, but an embedding of {rows} rows", tokenizer.vocab_size());
            return Err(fault(&self.path, Fault::Malformed(message)));
        }
        Ok(tokenizer)
    }

    /// The model's chat template; ChatML if it brings none.
    pub fn template(&self) -> Result<ChatTemplate, LoadError> {
        match &self.source {
            Source::Gguf(gguf) => {
                let data = &self.maps[0];
                let token = |key| tokenizer::named_token(gguf, data, key).unwrap_or_default();
                let (bos, eos) = (token("tokenizer.ggml.bos_token_id"), token("tokenizer.ggml.eos_token_id"));
                ChatTemplate::new(gguf.str(data, "tokenizer.chat_template"), bos, eos)
                    .map_err(|f| fault(&self.path, f))
            }
            Source::Directory(directory) => directory.template(),
            Source::Shape => ChatTemplate::new(None, "", "").map_err(|f| fault(&self.path, f)),
        }
    }

    /// Identifies the weights, and what else makes the text: 32 hex digits.
    ///
    /// A hash of everything small (a GGUF file's header, a directory's JSON files) and of every tensor's name, format, size
    /// and three samples of its bytes, so it takes milliseconds whatever the model's size. Models that differ by training
    /// differ in it; a change of single weights by hand may not.
    pub fn revision(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"stoker weights 1\n");
        match &self.source {
            Source::Gguf(gguf) => {
                hash.update(&self.maps[0][..gguf.header_len.min(self.maps[0].len())]);
                // Scaling that the header leaves unsaid is what its reader takes it for, and earlier versions took it for none.
                let said = gguf.has_key(&format!("{}.rope.scaling.type", self.config.architecture));
                if !said && !self.has("rope_freqs.weight") {
                    let factors = self.config.rope_factors.iter().flatten();
                    factors.for_each(|factor| hash.update(factor.to_le_bytes()));
                }
            }
            Source::Directory(directory) => directory.hash(&mut hash),
            Source::Shape => {}
        }
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_unstable_by_key(|(name, _)| *name);
        for (name, entry) in tensors {
            let data = self.bytes(entry);
            hash.update(format!("{name} {} {:?}\n", entry.dtype.name(), entry.shape));
            let sample = data.len().min(64);
            for start in [0, (data.len() - sample) / 2, data.len() - sample] {
                hash.update(&data[start..start + sample]);
            }
        }
        hash.finalize()[..16].iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The number format of most weights in the blocks' matrices, e.g. `Q4_1`.
    pub fn format(&self) -> String {
        let mut values: HashMap<DType, usize> = HashMap::new();
        for (name, entry) in &self.tensors {
            if name.starts_with("blk.") && entry.shape.len() > 1 {
                *values.entry(entry.dtype).or_default() += entry.shape.iter().product::<usize>();
            }
        }
        values
            .into_iter()
            .max_by_key(|(dtype, n)| (*n, dtype.name()))
            .map_or("", |(dtype, _)| dtype.name())
            .into()
    }

    /// The model's name: a directory's, or a file's without extension and number format.
    pub fn name(&self) -> String {
        let path = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        match &self.source {
            Source::Gguf(_) => {
                let stem = path.file_stem().unwrap_or_default().to_string_lossy();
                without_format(&stem).to_owned()
            }
            Source::Directory(_) | Source::Shape => {
                path.file_name().unwrap_or_default().to_string_lossy().into_owned()
            }
        }
    }
}

/// `model.Q4_1` or `model-q4_k_m` without the number format.
fn without_format(stem: &str) -> &str {
    let Some((model, last)) = stem.rsplit_once(['.', '-']) else { return stem };
    let last = last.to_ascii_uppercase();
    let quantised = last.strip_prefix("IQ").or(last.strip_prefix('Q'));
    let is_format = quantised.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        || ["F32", "F16", "BF16", "FP16", "FP32"].contains(&last.as_str());
    if is_format && !model.is_empty() { model } else { stem }
}

/// A GGUF file's sizes, metadata and tensors.
fn read_gguf(data: &[u8]) -> Result<(ModelConfig, Gguf, Tensors), Fault> {
    let (gguf, infos) = Gguf::parse(data)?;
    if gguf.uint("split.count").is_some_and(|n| n > 1) {
        return Err(Fault::Unsupported("one part of a split GGUF file; merge the parts first".into()));
    }
    let mut config = ModelConfig::from_gguf(&gguf, data)?;
    config.vocab = infos.get("token_embd.weight").map_or(0, |t| t.shape[0]);
    config.tied_embeddings = !infos.contains_key("output.weight");
    config.qkv_bias = infos.contains_key("blk.0.attn_q.bias");
    config.qk_norm |= infos.contains_key("blk.0.attn_q_norm.weight");
    if let Some(t) = infos.get("rope_freqs.weight") {
        if t.dtype != DType::F32 || t.shape != [config.head_dim / 2] {
            return Err(Fault::Malformed("tensor rope_freqs.weight does not fit the heads' width".into()));
        }
        let view = TensorView { dtype: t.dtype, shape: t.shape.clone(), data: &data[t.range.clone()] };
        config.set_rope_factors(view.dequantize())?;
    }
    let entry = |t: gguf::TensorInfo| Entry {
        dtype: t.dtype,
        shape: t.shape,
        place: Place::Mapped { file: 0, range: t.range },
    };
    let tensors = infos.into_iter().map(|(name, t)| (name, entry(t))).collect();
    check(&config, &tensors)?;
    Ok((config, gguf, tensors))
}

/// Checks that all tensors are there, and no others.
fn check(config: &ModelConfig, tensors: &Tensors) -> Result<(), Fault> {
    let shape_of = |name: &str| tensors.get(name).map(|t| t.shape.as_slice());
    layout::check(config, tensors.keys().map(String::as_str), shape_of)
}

/// Maps a file into memory.
pub(super) fn map(path: &Path) -> Result<Mmap, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only and private to us; that nobody truncates or rewrites the file meanwhile is the
    // condition that the module's documentation states.
    unsafe { Mmap::map(&file) }.map_err(io)
}

/// A fault of the file at `path`.
pub(super) fn fault(path: &Path, fault: Fault) -> LoadError {
    let path = path.to_owned();
    match fault {
        Fault::Malformed(message) => LoadError::Malformed { path, message },
        Fault::Unsupported(message) => LoadError::Unsupported { path, message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_name_is_the_models_without_the_format() {
        for (stem, name) in [
            ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
            ("gemma-3-270m-it-Q4_K_M", "gemma-3-270m-it"),
            ("model-iq3_xs", "model"),
            ("llama-2-7b.f16", "llama-2-7b"),
            ("Qwen2.5-0.5B", "Qwen2.5-0.5B"),
            ("phi-Quiet", "phi-Quiet"),
            ("Q4_0", "Q4_0"),
        ] {
            assert_eq!(without_format(stem), name);
        }
    }
}
