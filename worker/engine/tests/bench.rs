//! The engine's measurements of itself: truth on a real model, speed on random weights.

mod common;

use common::listener::options;
use stoker_engine::bench::{SpeedOptions, TEXT, quality, speed_of_shape};
use stoker_engine::weights::{Checkpoint, DType, Shape};
use stoker_engine::*;

#[test]
fn every_kind_of_kernels_predicts_what_plain_f32_does() {
    let load = LoadOptions { backend: Some(BackendKind::Cpu), ..options() };
    let mut kinds = Vec::new();
    quality(&load, &TEXT[..700], &mut |q| {
        assert!(q.tokens > 100 && q.agreement > 0.98, "{q:?}");
        assert!((0.0..1e-6).contains(&q.mean_kl) && q.max_kl < 1e-4, "{q:?}");
        // English is no surprise to it: the reference is a language model, not a fault that both share.
        assert!((5.0..200.0).contains(&q.reference_perplexity), "{q:?}");
        assert!((q.perplexity / q.reference_perplexity - 1.0).abs() < 1e-2, "{q:?}");
        kinds.push(q.kernels);
    })
    .unwrap();
    assert_eq!(kinds.last().map(String::as_str), Some("portable"));
}

#[test]
fn a_shape_is_measured_without_a_file() {
    let shape = Shape::find("smollm2-135m").unwrap();
    let run = SpeedOptions { prompts: vec![40], batches: vec![2], tokens: 3, repetitions: 1 };
    let mut tests = Vec::new();
    let info = speed_of_shape(shape, None, LoadOptions { kv_positions: None, ..options() }, &run, &mut |m| {
        assert!(m.tokens_per_second.is_finite() && m.tokens_per_second > 0.0, "{m:?}");
        tests.push((m.test, m.prompt, m.batch));
    });
    let info = info.unwrap();
    assert_eq!(tests, [("prefill", 40, 1), ("decode", 40, 2)]);
    assert_eq!((info.name.as_str(), info.format.as_str()), ("smollm2-135m", "Q4_1"));
}

#[test]
fn a_shape_that_does_not_fit_the_memory_is_refused() {
    let shape = Shape::find("llama-3-8b").unwrap();
    let run = SpeedOptions { prompts: vec![1 << 24], batches: vec![32], tokens: 1, repetitions: 1 };
    let load = LoadOptions { kv_positions: None, ..options() };
    let refused = speed_of_shape(shape, Some(DType::Q4_1), load, &run, &mut |m| panic!("{m:?}"));
    let Err(LoadError::Memory(message)) = refused else { panic!("{refused:?}") };
    assert!(message.starts_with("llama-3-8b in Q4_1 takes "), "{message}");
}

#[test]
fn random_weights_are_the_same_each_time_and_different_in_each_layer() {
    let shape = Shape::find("smollm2-135m").unwrap();
    let [one, two] = [0, 1].map(|_| Checkpoint::random(shape, DType::Q8_0).unwrap());
    let row = |checkpoint: &Checkpoint, name: &str| checkpoint.tensor(name).unwrap().row(5).to_vec();
    assert_eq!(row(&one, "blk.3.attn_q.weight"), row(&two, "blk.3.attn_q.weight"));
    assert_ne!(row(&one, "blk.3.attn_q.weight"), row(&one, "blk.4.attn_q.weight"));
}
