//! Hugging Face's `config.json`.

use serde_json::Value;

use super::{Fault, ModelConfig};

/// Sizes and architecture, all but what the tensors tell.
pub fn read(json: &Value) -> Result<ModelConfig, Fault> {
    // Models that see pictures too keep their text model's sizes one level down.
    let text = json.get("text_config").filter(|t| t.is_object()).unwrap_or(json);
    if json.get("quantization_config").is_some_and(|q| !q.is_null()) {
        return Err(Fault::Unsupported("config.json: weights quantised in another way than GGUF's".into()));
    }
    let kind = text["model_type"].as_str().or(json["model_type"].as_str()).unwrap_or("");
    let architecture = match kind {
        "mistral" => "llama",
        "gemma3_text" => "gemma3",
        other => other,
    };
    let mut c = ModelConfig::of_architecture(architecture)?;
    let size = |name: &str| match text[name].as_u64().map(usize::try_from) {
        Some(Ok(n)) if n > 0 => Ok(n),
        _ => Err(Fault::Malformed(format!("config.json: {name} is missing or no size"))),
    };
    c.layers = size("num_hidden_layers")?;
    c.hidden = size("hidden_size")?;
    c.ffn = size("intermediate_size")?;
    let size_or = |name: &str, default: Option<usize>| match default {
        Some(default) if text[name].is_null() => Ok(default),
        _ => size(name),
    };
    // Google's files for Gemma 3 leave out what is as in Hugging Face's Gemma3TextConfig.
    let gemma = architecture == "gemma3";
    c.context = size_or("max_position_embeddings", gemma.then_some(131_072))?;
    c.heads = size_or("num_attention_heads", gemma.then_some(8))?;
    c.kv_heads = size_or("num_key_value_heads", Some(if gemma { 4 } else { c.heads }))?;
    let head_dim = match architecture {
        "gemma3" => 256,
        "qwen3" => 128,
        _ => c.hidden / c.heads,
    };
    c.head_dim = size_or("head_dim", Some(head_dim))?;
    c.norm_eps = text["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32;
    let activation = text["hidden_activation"].as_str().or(text["hidden_act"].as_str());
    match (architecture, activation) {
        ("gemma3", None | Some("gelu_pytorch_tanh")) | (_, None | Some("silu")) => {}
        (_, Some(other)) => return Err(Fault::Unsupported(format!("config.json: activation {other:?}"))),
    }
    // What some models of these families have, or could have, and the engine has not.
    for name in ["attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"] {
        if !matches!(text[name], Value::Null | Value::Bool(false)) {
            return Err(Fault::Unsupported(format!("config.json: {name} is {}", text[name])));
        }
    }
    read_window(&mut c, text)?;
    let query_scalar = text["query_pre_attn_scalar"].as_f64().filter(|s| *s > 0.0);
    let mut c = c.finish(query_scalar)?;
    read_positions(&mut c, text)?;
    Ok(c)
}

/// The sliding window, and which layers have it.
fn read_window(c: &mut ModelConfig, text: &Value) -> Result<(), Fault> {
    // Qwen's files name a window that they then switch off.
    if text["use_sliding_window"].as_bool() == Some(false) {
        return Ok(());
    }
    c.sliding_window = text["sliding_window"].as_u64().map(|n| n as usize);
    if c.architecture.starts_with("qwen") && c.sliding_window.is_some() {
        return Err(Fault::Unsupported(
            "config.json: a sliding window in some layers of a Qwen model".into(),
        ));
    }
    if let Some(n) = text["sliding_window_pattern"].as_u64() {
        c.sliding_pattern = Some(n as usize);
    } else if let Some(types) = text["layer_types"].as_array()
        && c.sliding_window.is_some()
    {
        c.sliding_pattern = types.iter().position(|t| t == "full_attention").map(|n| n + 1);
        if (0..types.len()).any(|layer| c.is_local(layer) != (types[layer] == "sliding_attention")) {
            return Err(Fault::Unsupported("config.json: an irregular pattern of layer types".into()));
        }
    }
    if c.sliding_pattern == Some(0) {
        return Err(Fault::Malformed("config.json: sliding_window_pattern is 0".into()));
    }
    Ok(())
}

/// Rotary positions, in the older form (`rope_theta`, `rope_scaling`) or the newer (`rope_parameters`, which for Gemma 3
/// has an entry per type of layer).
fn read_positions(c: &mut ModelConfig, text: &Value) -> Result<(), Fault> {
    let newer = &text["rope_parameters"];
    let global = if newer["full_attention"].is_object() { &newer["full_attention"] } else { newer };
    let number = |from: &Value, name: &str| from[name].as_f64();
    if let Some(base) = number(global, "rope_theta").or(number(text, "rope_theta")) {
        c.rope_base = base as f32;
    }
    let local = number(&newer["sliding_attention"], "rope_theta").or(number(text, "rope_local_base_freq"));
    if let (Some(base), Some(own)) = (local, &mut c.rope_base_local) {
        *own = base as f32;
    }
    c.check_rope_bases()?;
    let scaling = if global.is_object() { global } else { &text["rope_scaling"] };
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("none");
    if kind != "llama3" {
        return c.scale_positions(kind, number(scaling, "factor"));
    }
    let get = |name: &str| match number(scaling, name) {
        Some(x) if x > 0.0 => Ok(x),
        _ => Err(Fault::Malformed(format!("config.json: rope scaling without {name}"))),
    };
    let factors = llama3_factors(
        f64::from(c.rope_base),
        c.head_dim,
        get("factor")?,
        (get("low_freq_factor")?, get("high_freq_factor")?),
        get("original_max_position_embeddings")?,
    );
    c.set_rope_factors(factors)
}

/// Llama 3's scaling: pairs that turn slowly (less than `low` times in the original context) are slowed by `factor`, those
/// that turn fast (more than `high` times) are left alone, and between them it changes smoothly. As Meta published it with
/// Llama 3.1.
fn llama3_factors(
    base: f64,
    head_dim: usize,
    factor: f64,
    (low, high): (f64, f64),
    context: f64,
) -> Vec<f32> {
    let pair = |i: usize| {
        let frequency = base.powf(-2.0 * i as f64 / head_dim as f64);
        let turns = context * frequency / std::f64::consts::TAU;
        let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - share) / factor + share)) as f32
    };
    (0..head_dim / 2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
            "max_position_embeddings": 131072, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        })
    }

    #[test]
    fn llama_3_slows_the_slow_pairs() {
        let mut json = llama();
        json["head_dim"] = 128.into();
        json["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let c = read(&json).unwrap();
        let factors = c.rope_factors.unwrap();
        assert_eq!((factors.len(), factors[0], factors[63]), (64, 1.0, 8.0));
        // From Hugging Face's formula in double precision.
        for (i, want) in [(28, 1.0), (29, 1.207_484), (31, 2.026_313), (34, 5.257_327), (35, 8.0)] {
            assert!((factors[i] - want).abs() < 1e-5, "{i}: {} {want}", factors[i]);
        }
    }

    #[test]
    fn families_differ() {
        let mut json = llama();
        json["model_type"] = "mistral".into();
        json["sliding_window"] = 4096.into();
        let c = read(&json).unwrap();
        assert_eq!((c.architecture.as_str(), c.sliding_window, c.is_local(1)), ("llama", Some(4096), true));

        let mut json = llama();
        json["model_type"] = "gemma3_text".into();
        json["hidden_activation"] = "gelu_pytorch_tanh".into();
        json["hidden_act"] = Value::Null;
        json["sliding_window"] = 512.into();
        json["query_pre_attn_scalar"] = 256.into();
        json["rope_local_base_freq"] = 10000.0.into();
        json["layer_types"] = json!(["sliding_attention", "sliding_attention", "full_attention"]);
        let c = read(&json).unwrap();
        assert_eq!(
            (c.is_local(1), c.is_local(2), c.attention_scale, c.embedding_scale),
            (true, false, 0.0625, 8.0)
        );
        assert_eq!((c.rope_base, c.rope_base_local), (500_000.0, Some(10_000.0)));
    }

    /// The texts' part of gemma-3-4b-it's file.
    #[test]
    fn gemma_3_leaves_out_what_is_as_in_hugging_faces_class() {
        let c = read(&json!({
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024,
            },
        }))
        .unwrap();
        assert_eq!((c.heads, c.kv_heads, c.head_dim, c.context), (8, 4, 256, 131_072));
        assert_eq!((c.norm_eps, c.rope_base, c.rope_base_local), (1e-6, 1e6, Some(1e4)));
        assert_eq!((c.sliding_window, c.sliding_pattern, c.attention_scale), (Some(1024), Some(6), 0.0625));
        assert_eq!(c.rope_factors, Some(vec![8.0; 128]));
    }

    #[test]
    fn what_does_not_run_is_refused() {
        for (key, value) in [
            ("model_type", json!("mamba")),
            ("hidden_act", json!("relu")),
            ("rope_scaling", json!({"type": "yarn", "factor": 4.0})),
            ("quantization_config", json!({"quant_method": "gptq"})),
            ("final_logit_softcapping", json!(30.0)),
            ("use_bidirectional_attention", json!(true)),
        ] {
            let mut json = llama();
            json[key] = value;
            assert!(matches!(read(&json), Err(Fault::Unsupported(_))), "{key}");
        }
        for (key, value) in [
            ("hidden_size", json!(-1)),
            ("num_attention_heads", json!(3)),
            ("head_dim", json!(1u64 << 60)),
            ("head_dim", json!(1u64 << 18)),
            ("num_hidden_layers", json!(1u64 << 40)),
            ("rope_theta", json!(0.0)),
            ("rope_scaling", json!({"type": "linear"})),
        ] {
            let mut json = llama();
            json[key] = value;
            assert!(matches!(read(&json), Err(Fault::Malformed(_))), "{key}");
        }
    }
}
