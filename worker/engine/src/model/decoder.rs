//! Decoder-only transformers of Llama's kind: Llama 2 and 3, SmolLM2, TinyLlama, Mistral, and what differs from them by a
//! setting: Qwen2 (biases on queries, keys and values), Qwen3 (norms on query and key heads), Gemma 3 (norms behind the
//! layers too, most layers with a sliding window and a rope of their own).
//!
//! Each layer is attention, then a gated feed-forward network, each behind a norm and added to the residual stream. With the norm
//! fused into the addition before it, that is eight operations a layer.

use burn::tensor::Tensor;

use super::embedding::Embedding;
use super::layers::{Linear, Source};
use super::{Cost, Model, Rope, Setup};
use crate::LoadError;
use crate::batch::Batch;
use crate::kernels::{HeadNorms, Heads, Kernels, KvLayer, Limits, Step};
use crate::sampler::Choice;
use crate::weights::{Activation, Checkpoint, ModelConfig};

struct Layer<B: Kernels> {
    attention_norm: Tensor<B, 1>,
    qkv: Linear<B, 3>,
    heads: Heads,
    head_norms: Option<HeadNorms<B>>,
    /// Which of the model's ropes.
    rope: usize,
    output: Linear<B, 1>,
    post_attention_norm: Option<Tensor<B, 1>>,
    feed_forward_norm: Tensor<B, 1>,
    gate_up: Linear<B, 2>,
    down: Linear<B, 1>,
    post_feed_forward_norm: Option<Tensor<B, 1>>,
    cache: KvLayer<B>,
}

/// The model on one backend.
pub(crate) struct Decoder<B: Kernels> {
    context: B::Context,
    device: B::Device,
    eps: f32,
    activation: Activation,
    vocabulary: usize,
    blocks: usize,
    ropes: Vec<Rope>,
    embedding: Embedding,
    layers: Vec<Layer<B>>,
    norm: Tensor<B, 1>,
    head: Linear<B, 1>,
}

impl<B: Kernels> Decoder<B> {
    /// Takes over the weights of `checkpoint`.
    pub fn load(checkpoint: Checkpoint, mut setup: Setup<'_, B>) -> Result<Self, LoadError> {
        let config = checkpoint.config().clone();
        let mut source = Source { checkpoint: &checkpoint, setup: &mut setup };
        let layers = (0..config.layers).map(|index| Layer::load(index, &config, &mut source));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let norm = source.vector("output_norm.weight")?;
        let head = if config.tied_embeddings { "token_embd" } else { "output" };
        let head = source.linear([head.into()])?;
        Ok(Self {
            eps: config.norm_eps,
            activation: config.activation,
            vocabulary: config.vocab,
            blocks: setup.blocks,
            ropes: ropes(&config),
            embedding: Embedding::new(checkpoint, "token_embd.weight", config.embedding_scale)?,
            layers,
            norm,
            head,
            context: setup.context,
            device: setup.device,
        })
    }
}

/// The model's ropes: that of all layers, and that of layers with a window where it is another.
pub(crate) fn ropes(config: &ModelConfig) -> Vec<Rope> {
    let global =
        Rope::new(config.rope_style, config.rope_base, config.head_dim, config.rope_factors.as_deref());
    let local = config.rope_base_local.map(|base| Rope::new(config.rope_style, base, config.head_dim, None));
    std::iter::once(global).chain(local).collect()
}

/// Shape of a layer's attention.
pub(crate) fn heads(config: &ModelConfig, layer: usize) -> Heads {
    Heads {
        queries: config.heads,
        keys: config.kv_heads,
        dim: config.head_dim,
        scale: config.attention_scale,
        window: config.sliding_window.filter(|_| config.is_local(layer)),
    }
}

/// Which of the model's [`ropes`] a layer has.
pub(crate) fn rope_of(config: &ModelConfig, layer: usize) -> usize {
    usize::from(config.is_local(layer) && config.rope_base_local.is_some())
}

impl<B: Kernels> Layer<B> {
    fn load(index: usize, config: &ModelConfig, source: &mut Source<'_, '_, B>) -> Result<Self, LoadError> {
        let name = |part: &str| format!("blk.{index}.{part}");
        let heads = heads(config, index);
        let head_norms = match config.qk_norm {
            true => Some(HeadNorms {
                query: source.vector(&name("attn_q_norm.weight"))?,
                key: source.vector(&name("attn_k_norm.weight"))?,
                eps: config.norm_eps,
            }),
            false => None,
        };
        let mut post_norm = |part: &str| match config.post_norms {
            true => source.vector(&name(part)).map(Some),
            false => Ok(None),
        };
        let post_attention_norm = post_norm("post_attention_norm.weight")?;
        let post_feed_forward_norm = post_norm("post_ffw_norm.weight")?;
        Ok(Self {
            attention_norm: source.vector(&name("attn_norm.weight"))?,
            qkv: source.linear(["attn_q", "attn_k", "attn_v"].map(name))?,
            cache: B::cache(&source.setup.context, &source.setup.device, &heads, source.setup.blocks),
            heads,
            head_norms,
            rope: rope_of(config, index),
            output: source.linear([name("attn_output")])?,
            post_attention_norm,
            feed_forward_norm: source.vector(&name("ffn_norm.weight"))?,
            gate_up: source.linear(["ffn_gate", "ffn_up"].map(name))?,
            down: source.linear([name("ffn_down")])?,
            post_feed_forward_norm,
        })
    }
}

impl<B: Kernels> Decoder<B> {
    /// The logits of [`Batch::outputs`]; `None` if there are none.
    fn logits(&mut self, batch: &Batch) -> Option<Tensor<B, 2>> {
        let Self { context, eps, layers, .. } = self;
        let (context, eps) = (&*context, *eps);
        let step = Step::<B>::new(batch, &self.ropes, &self.device);
        let mut x = self.embedding.lookup(&batch.tokens, &self.device);
        let mut normed = B::rms_norm(context, x.clone(), &layers[0].attention_norm, eps);
        let last = layers.len() - 1;
        for index in 0..layers.len() {
            let layer = &mut layers[index];
            let norms = layer.head_norms.as_ref();
            let qkv = layer.qkv.apply(context, normed);
            let q = B::rope_append(context, qkv, &layer.heads, norms, layer.rope, &step, &mut layer.cache);
            if index == last && batch.outputs.is_empty() {
                return None;
            }
            let mut attended = B::attend(context, q, &layer.heads, &step, &layer.cache);
            if index == last && batch.outputs.len() < batch.rows() {
                // All keys and values are there; from here on only these rows are of interest.
                let outputs = step.outputs();
                (x, attended) = (x.select(0, outputs.clone()), attended.select(0, outputs));
            }
            let [mut attended] = layer.output.apply(context, attended);
            if let Some(norm) = &layer.post_attention_norm {
                attended = B::rms_norm(context, attended, norm, eps);
            }
            (x, normed) = B::add_rms_norm(context, x, attended, &layer.feed_forward_norm, eps);
            let gated = B::gated(context, layer.gate_up.apply(context, normed), self.activation);
            let [mut down] = layer.down.apply(context, gated);
            if let Some(norm) = &layer.post_feed_forward_norm {
                down = B::rms_norm(context, down, norm, eps);
            }
            let next = layers.get(index + 1).map_or(&self.norm, |next| &next.attention_norm);
            (x, normed) = B::add_rms_norm(context, x, down, next, eps);
        }
        let [logits] = self.head.apply(context, normed);
        Some(logits)
    }
}

impl<B: Kernels> Model for Decoder<B> {
    fn forward(&mut self, batch: &Batch) -> Vec<f32> {
        self.logits(batch).map_or(Vec::new(), |logits| B::read(&self.context, logits))
    }

    fn choose(&mut self, batch: &Batch, choices: &[Choice]) -> Vec<u32> {
        self.logits(batch).map_or(Vec::new(), |logits| B::choose(&self.context, logits, choices))
    }

    fn samples(&self) -> bool {
        B::SAMPLES
    }

    fn steps(&self) -> &'static [(usize, usize)] {
        B::STEPS
    }

    fn recycle(&mut self, logits: Vec<f32>) {
        B::recycle(&self.context, logits);
    }

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        B::parallel(&self.context, tasks, task);
    }

    fn cost(&self) -> Cost {
        let mut cost = Cost::default();
        for layer in &self.layers {
            layer.qkv.add_to(&mut cost);
            layer.output.add_to(&mut cost);
            layer.gate_up.add_to(&mut cost);
            layer.down.add_to(&mut cost);
            cost.cache_bytes += B::cache_bytes(layer.heads.keys, layer.heads.dim);
        }
        self.head.add_to(&mut cost);
        cost
    }

    fn limits(&self) -> Option<Limits> {
        B::limits(&self.context)
    }

    fn reset(&mut self) {
        for layer in &mut self.layers {
            layer.cache = B::cache(&self.context, &self.device, &layer.heads, self.blocks);
        }
    }
}
