//! Which tensors a model must have, under GGUF's names, and with which shapes.
//!
//! Checked when a checkpoint is opened, so that nothing after it needs to doubt a shape. A tensor that is not in the list
//! is refused too: a bias or a norm that the engine left out would give wrong texts without a word.

use super::{Fault, ModelConfig};

/// Tensors that may be there and that the engine does without: tables that it computes itself.
const IGNORED: [&str; 3] = ["rope_freqs.weight", ".attn_rot_embd", ".attn_rot_embd.weight"];

/// All tensors of a model, with their shapes.
pub fn tensors(c: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let mut all = vec![
        ("token_embd.weight".to_owned(), vec![c.vocab, c.hidden]),
        ("output_norm.weight".to_owned(), vec![c.hidden]),
    ];
    if !c.tied_embeddings {
        all.push(("output.weight".to_owned(), vec![c.vocab, c.hidden]));
    }
    for layer in 0..c.layers {
        let mut add = |name: &str, shape: &[usize]| all.push((format!("blk.{layer}.{name}"), shape.to_vec()));
        add("attn_norm.weight", &[c.hidden]);
        add("attn_q.weight", &[queries, c.hidden]);
        add("attn_k.weight", &[keys, c.hidden]);
        add("attn_v.weight", &[keys, c.hidden]);
        add("attn_output.weight", &[c.hidden, queries]);
        add("ffn_norm.weight", &[c.hidden]);
        add("ffn_gate.weight", &[c.ffn, c.hidden]);
        add("ffn_up.weight", &[c.ffn, c.hidden]);
        add("ffn_down.weight", &[c.hidden, c.ffn]);
        if c.qkv_bias {
            add("attn_q.bias", &[queries]);
            add("attn_k.bias", &[keys]);
            add("attn_v.bias", &[keys]);
        }
        if c.qk_norm {
            add("attn_q_norm.weight", &[c.head_dim]);
            add("attn_k_norm.weight", &[c.head_dim]);
        }
        if c.post_norms {
            add("post_attention_norm.weight", &[c.hidden]);
            add("post_ffw_norm.weight", &[c.hidden]);
        }
    }
    all
}

/// Holds `shape_of` (the shape of a tensor that is there) and `names` (of all that are) against the model's sizes.
pub fn check<'a>(
    c: &ModelConfig,
    names: impl Iterator<Item = &'a str>,
    shape_of: impl Fn(&str) -> Option<&'a [usize]>,
) -> Result<(), Fault> {
    let wanted = tensors(c);
    for (name, shape) in &wanted {
        match shape_of(name) {
            Some(found) if found == shape => {}
            Some(found) => {
                return Err(Fault::Malformed(format!(
                    "tensor {name} has shape {found:?}; the model's is {shape:?}"
                )));
            }
            None => return Err(Fault::Malformed(format!("tensor {name} is missing"))),
        }
    }
    let wanted: std::collections::HashSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
    let unknown = names.filter(|n| !wanted.contains(n) && !IGNORED.iter().any(|i| n.ends_with(i))).min();
    match unknown {
        Some(name) => {
            Err(Fault::Unsupported(format!("tensor {name} does not belong to a {} model", c.architecture)))
        }
        None => Ok(()),
    }
}
