//! How true the kernels are: their predictions for a text against those of plain f32.
//!
//! Teacher-forced: every token of the text is predicted from the true ones before it, so one early difference does not
//! colour all that follows. What counts is how often the likeliest token is the same, and how far the two
//! distributions are apart (Kullback and Leibler's divergence of the reference from the kernels, in nats).

use serde::Serialize;

use super::{Probe, reference};
use crate::kernels::cpu::Isa;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use crate::kernels::gpu;
use crate::weights::Checkpoint;
use crate::{BackendKind, LoadError, LoadOptions, argmax};

/// Scored if no other text is given: the beginning of Herman Melville's Moby-Dick (1851).
pub const TEXT: &str = include_str!("quality.txt");

/// Most tokens that are predicted in a row; a longer text is scored in pieces, each from nothing.
const PIECE: usize = 512;

/// How true one backend's kernels are.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quality {
    /// Backend.
    pub backend: String,
    /// The CPU's instruction set; elsewhere the device.
    pub kernels: String,
    /// Predictions that were compared.
    pub tokens: usize,
    /// Share of them with the same likeliest token.
    pub agreement: f64,
    /// Divergence of the reference's distribution from the kernels', nats: its mean.
    pub mean_kl: f64,
    /// Its maximum.
    pub max_kl: f64,
    /// Perplexity of the text.
    pub perplexity: f64,
    /// The reference's.
    pub reference_perplexity: f64,
}

/// Scores kernels on `text`, and reports each result when it is there. Of `load`, the model's path and the number of threads
/// are used, and the backend: without one, all that are compiled in and have a device of their own.
///
/// # Errors
/// If the model can't be loaded, or a backend is named that can't be used.
pub fn quality(load: &LoadOptions, text: &str, report: &mut dyn FnMut(Quality)) -> Result<(), LoadError> {
    let checkpoint = Checkpoint::open(&load.path)?;
    let piece = PIECE.min(checkpoint.config().context);
    let tokens = checkpoint.tokenizer()?.encode(text, false, true);
    let pieces: Vec<&[u32]> = tokens.chunks(piece).filter(|piece| piece.len() > 1).collect();
    let expected = pieces.iter().map(|tokens| reference::logits(&checkpoint, tokens));
    let expected = expected.collect::<Result<Vec<_>, _>>()?;
    for (backend, isa) in kernels(load.backend) {
        let load = LoadOptions {
            backend: Some(backend),
            slots: Some(1),
            threads: load.threads,
            kv_positions: Some(piece as u64),
            ..LoadOptions::new(&load.path)
        };
        let mut probe = Probe::load_on(isa, load)?;
        let mut score = Score::default();
        for (tokens, expected) in pieces.iter().zip(&expected) {
            let got = probe.logits(tokens, tokens.len());
            let expected = expected.chunks_exact(checkpoint.config().vocab);
            // What follows the last token is not known.
            for ((got, expected), &next) in got.iter().zip(expected).zip(&tokens[1..]) {
                score.add(got, expected, next);
            }
        }
        let info = probe.info();
        let kernels = if backend == BackendKind::Cpu { isa.to_string() } else { info.device.clone() };
        report(score.result(info.backend.clone(), kernels));
    }
    Ok(())
}

/// The backends to score, the CPU once for each of its instruction sets.
fn kernels(only: Option<BackendKind>) -> Vec<(BackendKind, Isa)> {
    let wanted = |backend| only.map_or_else(|| has_device(backend), |only| only == backend);
    let isas = Isa::ALL.into_iter().rev().filter(|isa| isa.supported());
    let cpu = isas.map(|isa| (BackendKind::Cpu, isa));
    let gpus = [BackendKind::Wgpu, BackendKind::Cuda].map(|gpu| (gpu, Isa::best()));
    cpu.chain(gpus).filter(|(backend, _)| wanted(*backend)).collect()
}

/// Whether a backend is compiled in and has a device that is not a program on the CPU.
fn has_device(backend: BackendKind) -> bool {
    match backend {
        BackendKind::Cpu => true,
        #[cfg(feature = "wgpu")]
        BackendKind::Wgpu => gpu::wgpu::device().is_ok_and(|device| !device.software),
        #[cfg(feature = "cuda")]
        BackendKind::Cuda => gpu::cuda::device().is_ok(),
        #[allow(unreachable_patterns)] // with all features
        _ => false,
    }
}

#[derive(Default)]
struct Score {
    tokens: usize,
    same: usize,
    kl: f64,
    max_kl: f64,
    /// Logarithms of the true tokens' probabilities, summed.
    own: f64,
    reference: f64,
}

impl Score {
    /// Takes in one prediction; `next` is the token that the text has there.
    fn add(&mut self, got: &[f32], expected: &[f32], next: u32) {
        let (own, reference) = (logprobs(got), logprobs(expected));
        let kl: f64 = reference.iter().zip(&own).map(|(p, q)| p.exp() * (p - q)).sum();
        self.tokens += 1;
        self.same += usize::from(argmax(got) == argmax(expected));
        self.kl += kl;
        self.max_kl = self.max_kl.max(kl);
        self.own += own[next as usize];
        self.reference += reference[next as usize];
    }

    fn result(self, backend: String, kernels: String) -> Quality {
        let tokens = self.tokens.max(1) as f64;
        Quality {
            backend,
            kernels,
            tokens: self.tokens,
            agreement: self.same as f64 / tokens,
            mean_kl: self.kl / tokens,
            max_kl: self.max_kl,
            perplexity: (-self.own / tokens).exp(),
            reference_perplexity: (-self.reference / tokens).exp(),
        }
    }
}

fn logprobs(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - max - sum.ln()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_what_they_are_called() {
        let (half, quarter) = ([1.0, 1.0], [0.0, 3f32.ln()]);
        let mut score = Score::default();
        score.add(&half, &half, 1);
        score.add(&quarter, &half, 0);
        let result = score.result(String::new(), String::new());
        let kl = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert_eq!((result.tokens, result.agreement), (2, 0.5));
        assert!((result.max_kl - kl).abs() < 1e-7 && (result.mean_kl - kl / 2.0).abs() < 1e-7);
        assert!((result.perplexity - 8f64.sqrt()).abs() < 1e-6, "{}", result.perplexity);
        assert!((result.reference_perplexity - 2.0).abs() < 1e-9);
    }
}
