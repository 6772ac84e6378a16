//! The default model on wgpu against the reference. Slow on a software device, so a few tokens only.
#![cfg(feature = "wgpu")]

mod common;

use common::cases::{Case, cases};
use common::listener::{Listener, options};
use stoker_engine::bench::Probe;
use stoker_engine::*;

fn on_wgpu() -> LoadOptions {
    LoadOptions { backend: Some(BackendKind::Wgpu), kv_positions: Some(512), context: Some(512), ..options() }
}

#[test]
fn wgpus_logits_are_the_cpus() {
    let tokens: Vec<u32> = cases()[0].prompt_tokens.clone();
    let wgpu = Probe::load(on_wgpu()).unwrap().logits(&tokens, 3);
    let cpu = Probe::load(options()).unwrap().logits(&tokens, 3);
    for (wgpu, cpu) in wgpu.iter().zip(&cpu) {
        let largest = wgpu.iter().zip(cpu).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 2e-2, "{largest} apart");
        assert_eq!(argmax(wgpu), argmax(cpu));
    }
}

#[test]
fn wgpus_greedy_texts_are_the_references() {
    let listener = Listener::load(on_wgpu());
    assert_eq!(listener.engine.info().backend, "wgpu");
    let cases: Vec<_> = cases().into_iter().rev().take(3).collect();
    let requests =
        cases.iter().zip(0..).map(|(case, id)| Request { max_tokens: Some(6), ..case.request(id) });
    for (case, heard) in cases.iter().zip(listener.run(requests.collect())) {
        assert_eq!(heard.tokens, case.tokens[..6]);
        assert!(case.text.starts_with(&heard.text));
    }
}

#[test]
fn wgpus_drawn_texts_are_the_cpus() {
    let sampling = Sampling { temperature: 0.8, top_p: 0.9, seed: 7, ..Sampling::default() };
    let requests = || {
        let drawn = |(case, id): (Case, u64)| Request { sampling: sampling.clone(), ..case.request(id) };
        let requests = cases().into_iter().rev().take(2).zip(0..).map(drawn);
        requests.map(|request| Request { max_tokens: Some(6), ..request }).collect()
    };
    let texts = |options| {
        let heard = Listener::load(options).run(requests());
        heard.into_iter().map(|heard| heard.tokens).collect::<Vec<_>>()
    };
    let cpu = texts(options());
    assert!(cpu.iter().all(|tokens| tokens.len() > 3));
    assert_eq!(texts(on_wgpu()), cpu);
}
