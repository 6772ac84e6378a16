//! Models by their sizes alone, with random weights: to measure speed without a file.
//!
//! All matrices are cut from one run of random blocks, each from a place of its own, so that a model of any size costs no more
//! than its largest matrix until a backend takes its weights over. The scales are such that numbers keep their
//! magnitude from layer to layer, as in a trained model.

use std::path::Path;

use half::{bf16, f16};
use memmap2::MmapMut;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use super::checkpoint::{Entry, Place, Tensors, fault};
use super::{Checkpoint, DType, Fault, ModelConfig, layout};
use crate::LoadError;

/// The sizes of a known model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// As people write it.
    pub name: &'static str,
    architecture: &'static str,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn: usize,
    vocab: usize,
    tied: bool,
}

const fn shape(
    name: &'static str,
    architecture: &'static str,
    [layers, hidden, ffn]: [usize; 3],
    [heads, kv_heads, head_dim]: [usize; 3],
    vocab: usize,
    tied: bool,
) -> Shape {
    Shape { name, architecture, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied }
}

/// Context of all shapes, tokens: no less than anybody measures.
const CONTEXT: usize = 32_768;
/// Of the layers with a sliding window, where there are some.
const WINDOW: usize = 512;

impl Shape {
    /// All of them: layers, hidden size, feed-forward size; heads, key and value heads, width of a head; vocabulary; whether
    /// the output projection is the embedding.
    pub const ALL: [Shape; 13] = [
        shape("smollm2-135m", "llama", [30, 576, 1536], [9, 3, 64], 49_152, true),
        shape("smollm2-360m", "llama", [32, 960, 2560], [15, 5, 64], 49_152, true),
        shape("gemma-3-270m", "gemma3", [18, 640, 2048], [4, 1, 256], 262_144, true),
        shape("gemma-3-1b", "gemma3", [26, 1152, 6912], [4, 1, 256], 262_144, true),
        shape("qwen2.5-0.5b", "qwen2", [24, 896, 4864], [14, 2, 64], 151_936, true),
        shape("qwen2.5-7b", "qwen2", [28, 3584, 18_944], [28, 4, 128], 152_064, false),
        shape("qwen3-0.6b", "qwen3", [28, 1024, 3072], [16, 8, 128], 151_936, true),
        shape("qwen3-4b", "qwen3", [36, 2560, 9728], [32, 8, 128], 151_936, true),
        shape("tinyllama-1.1b", "llama", [22, 2048, 5632], [32, 4, 64], 32_000, false),
        shape("llama-3.2-1b", "llama", [16, 2048, 8192], [32, 8, 64], 128_256, true),
        shape("llama-3.2-3b", "llama", [28, 3072, 8192], [24, 8, 128], 128_256, true),
        shape("llama-3-8b", "llama", [32, 4096, 14_336], [32, 8, 128], 128_256, false),
        shape("mistral-7b", "llama", [32, 4096, 14_336], [32, 8, 128], 32_768, false),
    ];

    /// By name, whatever its case.
    pub fn find(name: &str) -> Option<&'static Shape> {
        Self::ALL.iter().find(|shape| shape.name.eq_ignore_ascii_case(name))
    }

    /// Bytes of memory that the weights take on the CPU: the matrices in `format`, and the run of blocks that they are cut
    /// from.
    ///
    /// # Errors
    /// If the shape's rows are no whole number of blocks.
    pub fn memory(&self, format: DType) -> Result<u64, LoadError> {
        let wrong = |f| fault(Path::new(self.name), f);
        let tensors = layout::tensors(&self.config()?);
        let sizes =
            tensors.iter().filter(|(_, shape)| shape.len() == 2).map(|(_, shape)| size(format, shape));
        let sizes = sizes.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        // An embedding that is no output projection stays where it is.
        let embedding = if self.tied { 0 } else { sizes[0] };
        let largest = sizes.iter().max().copied().unwrap_or_default();
        Ok((sizes.iter().sum::<usize>() - embedding + largest) as u64)
    }

    /// The model's sizes, as a file would state them.
    ///
    /// # Errors
    /// None for the shapes in [`ALL`](Self::ALL).
    pub(crate) fn config(&self) -> Result<ModelConfig, LoadError> {
        self.complete().map_err(|f| fault(Path::new(self.name), f))
    }

    fn complete(&self) -> Result<ModelConfig, Fault> {
        let mut c = ModelConfig::of_architecture(self.architecture)?;
        (c.layers, c.hidden, c.ffn) = (self.layers, self.hidden, self.ffn);
        (c.heads, c.kv_heads, c.head_dim) = (self.heads, self.kv_heads, self.head_dim);
        (c.vocab, c.tied_embeddings, c.context) = (self.vocab, self.tied, CONTEXT);
        c.qkv_bias = self.architecture == "qwen2";
        c.sliding_window = c.sliding_pattern.map(|_| WINDOW);
        c.norm_eps = 1e-6;
        c.finish(None)
    }
}

impl Checkpoint {
    /// A model of `shape` whose matrices are random blocks of `format`, the same each time.
    ///
    /// # Errors
    /// If the shape's rows are no whole number of blocks.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn random(shape: &Shape, format: DType) -> Result<Self, LoadError> {
        let wrong = |f| fault(Path::new(shape.name), f);
        let config = shape.config()?;
        let mut tensors = Tensors::new();
        let (mut largest, block) = (0, format.block_bytes());
        for (index, (name, shape)) in layout::tensors(&config).into_iter().enumerate() {
            if shape.len() == 1 {
                tensors.insert(name.clone(), vector(&name, shape));
                continue;
            }
            let range = index * block..index * block + size(format, &shape).map_err(wrong)?;
            largest = largest.max(range.end);
            tensors.insert(name, Entry { dtype: format, shape, place: Place::Mapped { file: 0, range } });
        }
        let mut noise = MmapMut::map_anon(largest).expect("memory for the largest matrix");
        fill(format, &mut noise, 1.0 / (config.hidden as f32).sqrt());
        let noise = noise.make_read_only().expect("the protection of our own memory can be changed");
        Ok(Self::of_parts(shape.name, config, noise, tensors))
    }
}

/// Bytes of a matrix.
fn size(format: DType, shape: &[usize]) -> Result<usize, Fault> {
    format.row_bytes(shape[1]).map(|row| shape[0] * row).ok_or_else(|| {
        let (cols, name) = (shape[1], format.name());
        Fault::Unsupported(format!("rows of {cols} weights are no whole number of {name} blocks"))
    })
}

/// A norm that changes nothing, or a bias of nothing.
fn vector(name: &str, shape: Vec<usize>) -> Entry {
    let value = if name.ends_with(".bias") { 0.0f32 } else { 1.0 };
    let bytes = value.to_le_bytes().repeat(shape[0]);
    Entry { dtype: DType::F32, shape, place: Place::Owned(bytes) }
}

/// Fills `bytes` with random blocks whose values are spread around 0 by about `deviation`.
fn fill(format: DType, bytes: &mut [u8], deviation: f32) {
    let mut random = StdRng::seed_from_u64(1);
    random.fill_bytes(bytes);
    let blocks = bytes.chunks_exact_mut(format.block_bytes());
    // Random bits of a float may be anything, an infinity too: the numbers are made of them, evenly spread.
    let even = |b: &[u8]| f32::from(i16::from_le_bytes([b[0], b[1]])) / 32_768.0 * 3f32.sqrt() * deviation;
    match format {
        DType::F32 => blocks.for_each(|b| b.copy_from_slice(&even(b).to_le_bytes())),
        DType::F16 => blocks.for_each(|b| b.copy_from_slice(&f16::from_f32(even(b)).to_le_bytes())),
        DType::BF16 => blocks.for_each(|b| b.copy_from_slice(&bf16::from_f32(even(b)).to_le_bytes())),
        _ => {
            let Scales { at, minimum, spread, middle } = scales(format);
            let scale = deviation / spread;
            let put = |b: &mut [u8], at: usize, x: f32| {
                b[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
            };
            blocks.for_each(|b| {
                put(b, at, scale);
                minimum.into_iter().for_each(|at| put(b, at, middle * scale));
            });
        }
    }
}

/// The f16 fields of a block format, and what its integers come to when they are random.
struct Scales {
    /// Where the scale is.
    at: usize,
    /// Where the minimum is, if there is one.
    minimum: Option<usize>,
    /// Standard deviation of a value whose scale is 1.
    spread: f32,
    /// The minimum that puts the values around 0, for a scale of 1.
    middle: f32,
}

fn scales(format: DType) -> Scales {
    let of = |at, minimum, spread, middle| Scales { at, minimum, spread, middle };
    match format {
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("not a block format"),
        DType::Q4_0 => of(0, None, 4.6, 0.0),
        DType::Q4_1 => of(0, Some(2), 4.6, -7.5),
        DType::Q5_0 => of(0, None, 9.2, 0.0),
        DType::Q5_1 => of(0, Some(2), 9.2, -15.5),
        DType::Q8_0 => of(0, None, 73.9, 0.0),
        // Sub-blocks have scales of their own, 6 bits each, and so have their minima; in the last one, 8 bits with a sign.
        DType::Q4K => of(0, Some(2), 258.0, 7.5),
        DType::Q5K => of(0, Some(2), 526.0, 15.5),
        DType::Q6K => of(208, None, 1366.0, 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_are_spread_as_asked_in_every_format() {
        for format in DType::ALL {
            let count = 1 << 16;
            let mut bytes = vec![0; format.row_bytes(count).unwrap()];
            fill(format, &mut bytes, 0.02);
            let values =
                super::super::TensorView { dtype: format, shape: vec![count], data: &bytes }.dequantize();
            let mean = values.iter().sum::<f32>() / count as f32;
            let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / count as f32).sqrt();
            // Codes with a sign have one value more below 0 than above.
            assert!(mean.abs() < 3e-3, "{}: mean {mean}", format.name());
            assert!((0.018..0.022).contains(&deviation), "{}: deviation {deviation}", format.name());
        }
    }

    #[test]
    fn every_shape_is_a_model() {
        for shape in Shape::ALL {
            let config = shape.config().unwrap();
            let tensors = layout::tensors(&config);
            let find =
                |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, shape)| shape.as_slice());
            layout::check(&config, tensors.iter().map(|(name, _)| name.as_str()), find).unwrap();
        }
        let count = |name| {
            let tensors = layout::tensors(&Shape::find(name).unwrap().config().unwrap());
            tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>()
        };
        // As their makers count them.
        assert_eq!(count("SmolLM2-135M"), 134_515_008);
        assert_eq!(count("qwen2.5-0.5b"), 494_032_768);
        assert_eq!(count("gemma-3-270m"), 268_098_176);
        assert_eq!(count("llama-3-8b"), 8_030_261_248);
    }

    #[test]
    fn a_format_that_does_not_fit_is_refused() {
        let refused = Checkpoint::random(Shape::find("smollm2-135m").unwrap(), DType::Q4K).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "smollm2-135m: rows of 576 weights are no whole number of Q4_K blocks"
        );
    }
}
