//! What kernels are held against: the model once more, on dequantised weights, in f32, in Burn's plain operations.
//!
//! All positions go through one layer after another, and only one layer's weights are there at a time: the reference of a
//! quantised model that fills the memory fits into it too.

use burn::tensor::{Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};

use crate::LoadError;
use crate::batch::Batch;
use crate::kernels::plain::{self, Dense};
use crate::kernels::{BLOCK, HeadNorms, Step};
use crate::model::{heads, rope_of, ropes};
use crate::weights::{Checkpoint, ModelConfig};

type Rows = Tensor<Flex, 2>;

/// Logits behind each of `tokens`, one row of the vocabulary's width after another.
pub(super) fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, LoadError> {
    let config = checkpoint.config();
    let reference = Reference { checkpoint, config };
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(BLOCK) as u32).collect();
    let mut batch = Batch::default();
    batch.push(tokens, 0, &blocks, tokens.len());
    let step = Step::new(&batch, &ropes(config), &FlexDevice);
    let mut x = reference.embed(tokens)?;
    for layer in 0..config.layers {
        x = x.clone() + reference.attention(layer, x, &step, blocks.len())?;
        x = x.clone() + reference.feed_forward(layer, x)?;
    }
    let head = if config.tied_embeddings { "token_embd" } else { "output" };
    let x = reference.norm("output_norm", x)?;
    Ok(plain::read(reference.linear(head, x)?))
}

struct Reference<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
}

impl Reference<'_> {
    fn embed(&self, tokens: &[u32]) -> Result<Rows, LoadError> {
        let (table, width) = (self.checkpoint.tensor("token_embd.weight")?, self.config.hidden);
        let mut values = vec![0.0; tokens.len() * width];
        for (row, &token) in values.chunks_exact_mut(width).zip(tokens) {
            table.dequantize_row(token as usize, row);
        }
        let rows = Rows::from_data(TensorData::new(values, [tokens.len(), width]), &FlexDevice);
        Ok(rows * self.config.embedding_scale)
    }

    fn attention(
        &self,
        layer: usize,
        x: Rows,
        step: &Step<'_, Flex>,
        blocks: usize,
    ) -> Result<Rows, LoadError> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let heads = heads(self.config, layer);
        let x = self.norm(&name("attn_norm"), x)?;
        let project = |part: &str| self.linear(&name(part), x.clone());
        let qkv = [project("attn_q")?, project("attn_k")?, project("attn_v")?];
        let norms = match self.config.qk_norm {
            true => Some(HeadNorms {
                query: self.vector(&name("attn_q_norm.weight"))?,
                key: self.vector(&name("attn_k_norm.weight"))?,
                eps: self.config.norm_eps,
            }),
            false => None,
        };
        let rope = rope_of(self.config, layer);
        let mut cache = plain::cache(&FlexDevice, &heads, blocks);
        let q = plain::rope_append(qkv, &heads, norms.as_ref(), rope, step, &mut cache);
        let x = self.linear(&name("attn_output"), plain::attend(q, &heads, step, &cache))?;
        self.post_norm(&name("post_attention_norm"), x)
    }

    fn feed_forward(&self, layer: usize, x: Rows) -> Result<Rows, LoadError> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let x = self.norm(&name("ffn_norm"), x)?;
        let gate_up = [self.linear(&name("ffn_gate"), x.clone())?, self.linear(&name("ffn_up"), x)?];
        let x = self.linear(&name("ffn_down"), plain::gated(gate_up, self.config.activation))?;
        self.post_norm(&name("post_ffw_norm"), x)
    }

    fn linear(&self, name: &str, x: Rows) -> Result<Rows, LoadError> {
        let weight = self.checkpoint.tensor(&format!("{name}.weight"))?;
        let y = Dense::<Flex>::new(&FlexDevice, &weight).multiply(x);
        let bias = format!("{name}.bias");
        Ok(if self.checkpoint.has(&bias) { y + self.vector(&bias)?.unsqueeze() } else { y })
    }

    fn norm(&self, name: &str, x: Rows) -> Result<Rows, LoadError> {
        Ok(plain::rms_norm(x, &self.vector(&format!("{name}.weight"))?, self.config.norm_eps))
    }

    fn post_norm(&self, name: &str, x: Rows) -> Result<Rows, LoadError> {
        if self.config.post_norms { self.norm(name, x) } else { Ok(x) }
    }

    fn vector(&self, name: &str) -> Result<Tensor<Flex, 1>, LoadError> {
        let values = self.checkpoint.tensor(name)?.dequantize();
        let shape = [values.len()];
        Ok(Tensor::from_data(TensorData::new(values, shape), &FlexDevice))
    }
}
