//! Every architecture against Hugging Face's implementation: tiny random models, made by `data/make_tiny_models.py`, in the
//! layout and with the settings of real ones.

mod common;

use std::path::PathBuf;

use common::listener::Listener;
use serde::Deserialize;
use stoker_engine::bench::{Probe, quality};
use stoker_engine::weights::Checkpoint;
use stoker_engine::*;

/// What transformers made of a prompt.
#[derive(Deserialize)]
struct Reference {
    prompt: String,
    prompt_tokens: Vec<u32>,
    /// Greedy, by a margin.
    tokens: Vec<u32>,
    text: String,
    /// Of the first new token.
    logits: Vec<f32>,
}

fn folder(model: &str) -> PathBuf {
    common::data("tiny").join(model)
}

fn options(model: &str) -> LoadOptions {
    LoadOptions {
        backend: Some(BackendKind::Cpu),
        slots: Some(2),
        threads: Some(2),
        kv_positions: Some(512),
        ..LoadOptions::new(folder(model))
    }
}

fn request(id: u64, reference: &Reference, prompt: &str) -> Request {
    Request {
        id: SequenceId(id),
        prompt: Prompt::Text(prompt.into()),
        sampling: Sampling::default(),
        max_tokens: Some(reference.tokens.len() as u32),
        stop: Vec::new(),
        constraint: None,
        resume: Resume::default(),
        priority: Priority::Interactive,
        user: 0,
        deadline: None,
    }
}

fn check(model: &str) {
    let text = std::fs::read_to_string(folder(model).join("reference.json")).unwrap();
    let reference: Reference = serde_json::from_str(&text).unwrap();
    let config = Checkpoint::open(&folder(model)).unwrap().config().clone();
    assert!(config.sliding_window.is_none_or(|window| window < reference.prompt_tokens.len() / 2));

    // The whole prompt in one pass.
    let logits = Probe::load(options(model)).unwrap().logits(&reference.prompt_tokens, 1).remove(0);
    assert_eq!(logits.len(), reference.logits.len());
    let largest = reference.logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    for (token, (got, expected)) in logits.iter().zip(&reference.logits).enumerate() {
        let off = (got - expected).abs();
        assert!(off < 1e-4 * largest, "token {token} has {got}, not {expected}");
    }

    // And with every kind of kernels, against what quality is measured by.
    quality(&options(model), &reference.prompt, &mut |q| {
        assert_eq!(q.tokens + 1, reference.prompt_tokens.len());
        assert!(q.agreement > 0.97 && q.max_kl < 1e-6, "{q:?}");
    })
    .unwrap();

    // Token by token behind it, alone and beside another text.
    let listener = Listener::load(options(model));
    let alone = listener.run_one(request(1, &reference, &reference.prompt));
    let other = request(3, &reference, &reference.prompt[..20]);
    let together = listener.run(vec![request(2, &reference, &reference.prompt), other]).remove(0);
    for heard in [alone, together] {
        assert_eq!(heard.finish.unwrap().usage.prompt_tokens as usize, reference.prompt_tokens.len());
        assert_eq!((heard.tokens, heard.text), (reference.tokens.clone(), reference.text.clone()));
    }
}

/// An untied head, Llama 3's scaling of positions, bf16.
#[test]
fn llama() {
    check("llama");
}

/// A sliding window in all layers, f16.
#[test]
fn mistral() {
    check("mistral");
}

/// Biases, f32.
#[test]
fn qwen2() {
    check("qwen2");
}

/// Norms on heads that are wider than the residual stream's share, in shards.
#[test]
fn qwen3() {
    assert!(folder("qwen3").join("model.safetensors.index.json").is_file());
    check("qwen3");
}

/// Layers with and without window, each with a rope of its own, one of them scaled; norms behind the layers.
#[test]
fn gemma3() {
    check("gemma3");
}
