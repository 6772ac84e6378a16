//! GGUF's names for the tensors of a Hugging Face checkpoint.

/// What lies in a transformer block, at Hugging Face and in GGUF.
const IN_BLOCK: [(&str, &str); 14] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("self_attn.rotary_emb.inv_freq", "attn_rot_embd"),
];

/// GGUF's name for a tensor; one that has none keeps its own. `post_norms`: the architecture has norms before and after
/// both halves of a block (Gemma 3), which changes what `post_attention_layernorm` means.
pub fn gguf_name(name: &str, post_norms: bool) -> String {
    // Models that see pictures too keep their text model one level down.
    let inner = name.strip_prefix("language_model.").unwrap_or(name);
    let inner = inner.strip_prefix("model.language_model.").or(inner.strip_prefix("model.")).unwrap_or(inner);
    match inner {
        "embed_tokens.weight" => return "token_embd.weight".into(),
        "norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let in_block = inner.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = in_block else { return name.to_owned() };
    let known = match (part, post_norms) {
        ("post_attention_layernorm.weight", false) | ("pre_feedforward_layernorm.weight", true) => {
            Some("ffn_norm.weight")
        }
        ("post_attention_layernorm.weight", true) => Some("post_attention_norm.weight"),
        ("post_feedforward_layernorm.weight", true) => Some("post_ffw_norm.weight"),
        _ => IN_BLOCK.iter().find(|(theirs, _)| *theirs == part).map(|(_, ours)| *ours),
    };
    match known {
        Some(part) => format!("blk.{layer}.{part}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::gguf_name;

    #[test]
    fn names_are_ggufs() {
        for (theirs, post_norms, ours) in [
            ("model.embed_tokens.weight", false, "token_embd.weight"),
            ("lm_head.weight", false, "output.weight"),
            ("model.layers.11.self_attn.q_proj.bias", false, "blk.11.attn_q.bias"),
            ("model.layers.0.post_attention_layernorm.weight", false, "blk.0.ffn_norm.weight"),
            ("model.layers.0.post_attention_layernorm.weight", true, "blk.0.post_attention_norm.weight"),
            ("model.layers.0.pre_feedforward_layernorm.weight", true, "blk.0.ffn_norm.weight"),
            ("language_model.model.norm.weight", true, "output_norm.weight"),
            ("model.layers.0.mlp.experts.0.weight", false, "model.layers.0.mlp.experts.0.weight"),
            ("vision_tower.x", true, "vision_tower.x"),
        ] {
            assert_eq!(gguf_name(theirs, post_norms), ours);
        }
    }
}
