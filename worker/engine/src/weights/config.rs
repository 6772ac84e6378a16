//! What a model is made of: sizes and the choices that tell one architecture from another.

use super::Fault;
use super::gguf::Gguf;

/// Which coordinates rotary position embedding turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: GGUF files of the `llama` architecture, whose query and key rows were permuted for it.
    Interleaved,
    /// `(i, i + head_dim / 2)`: the others.
    Half,
}

/// The feed-forward network's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// A decoder-only transformer with RMS norms, rotary positions, grouped-query attention and a gated feed-forward network.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `llama`, `qwen2`, `qwen3` or `gemma3`. Mistral, SmolLM2 and TinyLlama are `llama`.
    pub architecture: String,
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even. `heads · head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Context length that the model was trained for, tokens.
    pub context: usize,
    /// Base of the rotary frequencies: pair `i` turns by `position · base^(−2i / head_dim)`.
    pub rope_base: f32,
    /// Base in the layers with a sliding window, where it is another.
    pub rope_base_local: Option<f32>,
    /// Which coordinates are turned together.
    pub rope_style: RopeStyle,
    /// What the angle of each pair is divided by (Llama 3's scaling, linear scaling); `head_dim / 2` of them. Not applied in
    /// layers that use `rope_base_local`.
    pub rope_factors: Option<Vec<f32>>,
    /// Added to the mean square in RMS norms.
    pub norm_eps: f32,
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Queries and keys are RMS-normalised per head.
    pub qk_norm: bool,
    /// The outputs of attention and feed-forward network are RMS-normalised too (Gemma).
    pub post_norms: bool,
    /// A token sees only so many positions, its own included, in the layers that [`ModelConfig::is_local`] names.
    pub sliding_window: Option<usize>,
    /// Every so-many-th layer has no sliding window; `None`: all have one (if there is one at all).
    pub sliding_pattern: Option<usize>,
    /// The gate's function.
    pub activation: Activation,
    /// What embeddings are multiplied by: 1, or the root of `hidden` (Gemma).
    pub embedding_scale: f32,
    /// What the products of queries and keys are multiplied by.
    pub attention_scale: f32,
}

/// Architectures that run.
const ARCHITECTURES: [&str; 4] = ["llama", "qwen2", "qwen3", "gemma3"];

impl ModelConfig {
    /// Whether a layer has the sliding window.
    pub fn is_local(&self, layer: usize) -> bool {
        self.sliding_window.is_some() && self.sliding_pattern.is_none_or(|n| !(layer + 1).is_multiple_of(n))
    }

    /// What an architecture fixes, with sizes still to be filled in.
    pub(super) fn of_architecture(architecture: &str) -> Result<Self, Fault> {
        if !ARCHITECTURES.contains(&architecture) {
            return Err(Fault::Unsupported(format!(
                "architecture {architecture:?}; supported are {}",
                ARCHITECTURES.join(", ")
            )));
        }
        let gemma = architecture == "gemma3";
        Ok(Self {
            architecture: architecture.into(),
            layers: 0,
            hidden: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            ffn: 0,
            vocab: 0,
            context: 0,
            rope_base: if gemma { 1e6 } else { 1e4 },
            rope_base_local: gemma.then_some(1e4),
            rope_style: RopeStyle::Half,
            rope_factors: None,
            norm_eps: 0.0,
            tied_embeddings: false,
            qkv_bias: false,
            qk_norm: matches!(architecture, "qwen3" | "gemma3"),
            post_norms: gemma,
            sliding_window: None,
            sliding_pattern: gemma.then_some(6),
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            embedding_scale: 1.0,
            attention_scale: 0.0,
        })
    }

    /// From GGUF metadata. Llama 3's rope factors are a tensor, which the caller adds.
    pub(super) fn from_gguf(gguf: &Gguf, data: &[u8]) -> Result<Self, Fault> {
        let Some(arch) = gguf.str(data, "general.architecture") else {
            return Err(Fault::Malformed("metadata has no general.architecture".into()));
        };
        let mut c = Self::of_architecture(arch)?;
        let key = |name: &str| format!("{arch}.{name}");
        let size = |name: &str| size(name, gguf.uint(&key(name)));
        c.layers = size("block_count")?;
        c.hidden = size("embedding_length")?;
        c.ffn = size("feed_forward_length")?;
        c.context = size("context_length")?;
        c.heads = size("attention.head_count")?;
        c.kv_heads = match gguf.has_key(&key("attention.head_count_kv")) {
            true => size("attention.head_count_kv")?,
            false => c.heads,
        };
        c.head_dim = match gguf.has_key(&key("attention.key_length")) {
            true => size("attention.key_length")?,
            false => c.hidden / c.heads,
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if gguf.uint(&key(name)).is_some_and(|n| n != c.head_dim as u64) {
                return Err(Fault::Unsupported(format!("{} differs from the heads' width", key(name))));
            }
        }
        if gguf.uint(&key("expert_count")).is_some_and(|n| n > 0) {
            return Err(Fault::Unsupported("a mixture of experts".into()));
        }
        for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if gguf.float(&key(name)).is_some_and(|cap| cap != 0.0) {
                return Err(Fault::Unsupported(key(name)));
            }
        }
        if let Some(base) = gguf.float(&key("rope.freq_base")) {
            c.rope_base = base as f32;
        }
        if let (Some(base), Some(local)) = (gguf.float(&key("rope.freq_base_swa")), &mut c.rope_base_local) {
            *local = base as f32;
        }
        c.rope_style = if arch == "llama" { RopeStyle::Interleaved } else { RopeStyle::Half };
        c.norm_eps = gguf.float(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-5) as f32;
        if arch == "gemma3" {
            c.sliding_window =
                gguf.uint(&key("attention.sliding_window")).filter(|n| *n > 0).map(|n| n as usize);
            let pattern = key("attention.sliding_window_pattern");
            match gguf.uint(&pattern) {
                Some(n) => c.sliding_pattern = Some(n as usize).filter(|n| *n > 0),
                None if gguf.has_key(&pattern) => {
                    return Err(Fault::Unsupported(format!("{pattern} is a list")));
                }
                None => {}
            }
        }
        let mut c = c.finish(None)?;
        // As llama.cpp reads it: old files have a factor without a type, which is linear, or by another name.
        let factor =
            ["rope.scaling.factor", "rope.scale_linear"].iter().find_map(|name| gguf.float(&key(name)));
        let factor = factor.filter(|factor| *factor != 0.0);
        let by_default = if factor.is_none_or(|factor| factor == 1.0) { "none" } else { "linear" };
        c.scale_positions(gguf.str(data, &key("rope.scaling.type")).unwrap_or(by_default), factor)?;
        Ok(c)
    }

    /// Sets what the pairs' angles are divided by.
    pub(super) fn set_rope_factors(&mut self, factors: Vec<f32>) -> Result<(), Fault> {
        if factors.len() != self.head_dim / 2 || !factors.iter().all(|f| f.is_finite() && *f > 0.0) {
            return Err(Fault::Malformed("the rotary scaling factors do not fit the heads".into()));
        }
        self.rope_factors = Some(factors);
        Ok(())
    }

    /// Checks that the bases of the rotary frequencies are bases.
    pub(super) fn check_rope_bases(&self) -> Result<(), Fault> {
        for base in [Some(self.rope_base), self.rope_base_local].into_iter().flatten() {
            if !(base.is_finite() && base > 0.0) {
                return Err(Fault::Malformed(format!("the rotary base is {base}")));
            }
        }
        Ok(())
    }

    /// Linear position scaling, or none.
    pub(super) fn scale_positions(&mut self, kind: &str, factor: Option<f64>) -> Result<(), Fault> {
        match (kind, factor) {
            ("none" | "default", _) => Ok(()),
            ("linear", Some(factor)) if factor >= 1.0 => {
                self.set_rope_factors(vec![factor as f32; self.head_dim / 2])
            }
            ("linear", _) => Err(Fault::Malformed("linear position scaling without a factor".into())),
            (other, _) => Err(Fault::Unsupported(format!("position scaling {other:?}"))),
        }
    }

    /// Fills in what follows from the sizes, and checks that they make sense. `query_scalar`: what attention divides by
    /// the root of, if not the heads' width.
    pub(super) fn finish(mut self, query_scalar: Option<f64>) -> Result<Self, Fault> {
        // Far above any model, and low enough that products of any three of them can't overflow.
        let limits = [
            ("layers", self.layers, 1 << 12),
            ("hidden size", self.hidden, 1 << 18),
            ("heads", self.heads, 1 << 12),
            ("key and value heads", self.kv_heads, 1 << 12),
            ("head width", self.head_dim, 1 << 12),
            ("width of all heads", self.heads.saturating_mul(self.head_dim), 1 << 17),
            ("feed-forward size", self.ffn, 1 << 20),
            ("context", self.context, 1 << 28),
        ];
        for (what, n, limit) in limits {
            if !(1..=limit).contains(&n) {
                return Err(Fault::Malformed(format!("{what}: {n} is not from 1 to {limit}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Fault::Malformed(format!(
                "{} heads can't share {} key and value heads",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Fault::Malformed(format!("heads of odd width {}", self.head_dim)));
        }
        if self.sliding_window == Some(0) {
            return Err(Fault::Malformed("a sliding window of 0".into()));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return Err(Fault::Malformed(format!("the norms' epsilon is {}", self.norm_eps)));
        }
        self.check_rope_bases()?;
        if self.architecture == "gemma3" {
            self.embedding_scale = (self.hidden as f32).sqrt();
        }
        // The 27B model alone divides by the width that heads would have if they made up the residual stream.
        let big_gemma = self.architecture == "gemma3" && self.layers == 62;
        let derived = if big_gemma { self.hidden / self.heads } else { self.head_dim };
        self.attention_scale = 1.0 / (query_scalar.unwrap_or(derived as f64) as f32).sqrt();
        Ok(self)
    }
}

/// A size that must be there; bounds are checked later.
fn size(name: &str, value: Option<u64>) -> Result<usize, Fault> {
    match value.map(usize::try_from) {
        Some(Ok(n)) if n > 0 => Ok(n),
        Some(_) => Err(Fault::Malformed(format!("metadata: {name} is out of range"))),
        None => Err(Fault::Malformed(format!("metadata: {name} is missing or no number"))),
    }
}

#[cfg(test)]
mod tests {
    use super::ModelConfig;
    use crate::LoadError;
    use crate::common::TempDir;
    use crate::common::gguf::{Gguf, Value};
    use crate::weights::Checkpoint;

    /// The configuration of a tiny file of an architecture with these entries besides.
    fn read(architecture: &str, entries: &[(&str, Value)]) -> Result<ModelConfig, LoadError> {
        let mut file = Gguf::tiny(&["a"]);
        file.set("general.architecture", Value::String(architecture.into()));
        for (name, _) in &mut file.metadata {
            *name = name.replace("llama.", &format!("{architecture}."));
        }
        if architecture == "gemma3" {
            for (name, width) in
                [("attn_q_norm", 16), ("attn_k_norm", 16), ("post_attention_norm", 32), ("post_ffw_norm", 32)]
            {
                file.tensor(&format!("blk.0.{name}.weight"), &[width], &vec![1.0; width]);
            }
        }
        for (name, value) in entries {
            file.set(&format!("{architecture}.{name}"), value.clone());
        }
        let directory = TempDir::new();
        Ok(Checkpoint::open(&directory.write("model.gguf", &file.bytes()))?.config().clone())
    }

    #[test]
    fn a_factor_without_a_type_is_linear_scaling_as_in_old_files() {
        let factor = |entries: &[(&str, Value)]| {
            read("llama", entries).unwrap().rope_factors.map(|factors| factors[0])
        };
        let none = Value::String("none".into());
        assert_eq!(factor(&[]), None);
        assert_eq!(factor(&[("rope.scale_linear", Value::F32(4.0))]), Some(4.0));
        assert_eq!(factor(&[("rope.scaling.factor", Value::F32(2.0))]), Some(2.0));
        assert_eq!(factor(&[("rope.scaling.factor", Value::F32(2.0)), ("rope.scaling.type", none)]), None);
        for nothing in [0.0, 1.0] {
            assert_eq!(factor(&[("rope.scale_linear", Value::F32(nothing))]), None);
        }
    }

    #[test]
    fn gemmas_windows_are_read_as_llama_cpp_reads_them() {
        let windows = |entries: &[(&str, Value)]| {
            let c = read("gemma3", entries).unwrap();
            (c.sliding_window, c.sliding_pattern)
        };
        let (window, pattern) = ("attention.sliding_window", "attention.sliding_window_pattern");
        assert_eq!(windows(&[(window, Value::U32(512))]), (Some(512), Some(6)));
        assert_eq!(windows(&[(window, Value::U32(0))]), (None, Some(6)), "0: no window");
        assert_eq!(windows(&[(window, Value::U32(8)), (pattern, Value::U32(3))]), (Some(8), Some(3)));
        assert_eq!(
            windows(&[(window, Value::U32(8)), (pattern, Value::U32(0))]),
            (Some(8), None),
            "0: in all"
        );
        let list = read("gemma3", &[(pattern, Value::I32s(vec![1, 0]))]);
        assert!(matches!(list, Err(LoadError::Unsupported { .. })));
    }

    #[test]
    fn caps_on_logits_are_refused_unless_they_are_none() {
        let cap = |cap| read("gemma3", &[("final_logit_softcapping", Value::F32(cap))]);
        assert!(cap(0.0).is_ok());
        let error = cap(30.0).unwrap_err();
        assert!(matches!(&error, LoadError::Unsupported { .. }), "{error}");
    }
}
