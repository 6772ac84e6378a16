//! Each backend's operations against the plain ones on the CPU.

use burn::tensor::{Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::cpu::Isa;
use super::flex::Cpu;
use super::plain::{self, Dense};
use super::*;
use crate::batch::Batch;
use crate::model::Rope;
use crate::weights::{DType, RopeStyle};

struct Subject<'a, B: Kernels> {
    context: &'a B::Context,
    device: B::Device,
    random: StdRng,
    q4_1: f32,
}

impl<B: Kernels> Subject<'_, B> {
    /// Random numbers, on the subject's device and on the reference's.
    fn both<const D: usize>(&mut self, shape: [usize; D]) -> (Tensor<B, D>, Tensor<Flex, D>) {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| self.random.random_range(-1.0..1.0)).collect();
        let data = TensorData::new(values, shape);
        (Tensor::from_data(data.clone(), &self.device), Tensor::from_data(data, &FlexDevice))
    }

    /// Within `tolerance` of the largest expected number, or of 1.
    fn assert_close<const D: usize>(&self, got: Tensor<B, D>, expected: Tensor<Flex, D>, tolerance: f32) {
        assert_eq!(got.dims(), expected.dims());
        let (got, expected) =
            (got.into_data().into_vec::<f32>().unwrap(), expected.into_data().into_vec::<f32>().unwrap());
        let largest = expected.iter().fold(1.0f32, |largest, x| largest.max(x.abs()));
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= tolerance * largest, "{got} where {expected} is right");
        }
    }

    /// A matrix in a block format for inputs of such a width, if the format can have it.
    fn matrix(&mut self, width: usize) -> Option<B::Weight> {
        const ROWS: usize = 48;
        let data = self.weights(DType::Q8_0, ROWS * width);
        let matrix = TensorView { dtype: DType::Q8_0, shape: vec![ROWS, width], data: &data };
        width.is_multiple_of(32).then(|| B::Weight::load(self.context, &self.device, &matrix))
    }

    /// What an operation has just computed, and may have made ready for a product, gives the same one as any other tensor.
    fn assert_ready(&self, x: &Tensor<B, 2>, matrix: &Option<B::Weight>) {
        let Some(matrix) = matrix else { return };
        let copy = Tensor::from_data(x.to_data(), &self.device);
        let [ready] = B::project(self.context, x.clone(), [matrix]);
        let [other] = B::project(self.context, copy, [matrix]);
        assert_eq!(ready.into_data(), other.into_data());
    }

    fn rows(&mut self, rows: usize, width: usize) {
        let matrix = self.matrix(width);
        let (x, x0) = self.both([rows, width]);
        let (y, y0) = self.both([rows, width]);
        let (w, w0) = self.both([width]);
        let normed = B::rms_norm(self.context, x.clone(), &w, 1e-5);
        self.assert_close(normed, plain::rms_norm(x0.clone(), &w0, 1e-5), 1e-5);
        // Not any more what was normed.
        let (_, normed) = B::add_rms_norm(self.context, x.clone(), y.clone(), &w, 1e-5);
        self.assert_ready(&(normed * 2.0), &matrix);
        let (sum, normed) = B::add_rms_norm(self.context, x.clone(), y.clone(), &w, 1e-5);
        self.assert_ready(&normed, &matrix);
        self.assert_close(sum, x0.clone() + y0.clone(), 1e-6);
        self.assert_close(normed, plain::rms_norm(x0.clone() + y0.clone(), &w0, 1e-5), 1e-5);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            // Far enough out that an exponential would overflow.
            let (x, x0) = (x.clone() * 100.0, x0.clone() * 100.0);
            let gated = B::gated(self.context, [x, y.clone()], activation);
            self.assert_ready(&gated, &matrix);
            self.assert_close(gated, plain::gated([x0, y0.clone()], activation), 1e-5);
        }
    }

    fn chosen(&self, logits: &[f32], choices: &[Choice]) -> Vec<u32> {
        let shape = [choices.len(), logits.len() / choices.len()];
        let logits = Tensor::from_data(TensorData::new(logits.to_vec(), shape), &self.device);
        B::choose(self.context, logits, choices)
    }

    fn greatest(&mut self) {
        let mut logits: Vec<f32> = (0..4 * 1000).map(|_| self.random.random_range(-9.0..9.0)).collect();
        // Ties, the last place, no number.
        (logits[300], logits[301], logits[700]) = (20.0, 20.0, 20.0);
        (logits[1000], logits[1999]) = (f32::NAN, 10.0);
        logits[2000..3000].fill(-2.5);
        let expected: Vec<u32> = logits.chunks_exact(1000).map(crate::argmax).collect();
        assert_eq!(self.chosen(&logits, &[Choice::LIKELIEST; 4]), expected);
        // Of ties, the lowest ids are kept, and chosen from in their order; what is no number is not.
        let choice = |top_k, random| Choice { temperature: 0.5, top_k, random, ..Choice::LIKELIEST };
        logits[1000..1999].fill(f32::NAN);
        logits[3000..].fill(f32::NAN);
        let choices = [choice(2, 0.6), choice(0, 0.6), choice(100, 0.505), choice(0, 0.6)];
        assert_eq!(self.chosen(&logits, &choices), [301, 999, 50, 0]);
    }

    /// Rows with many ties and rows with none, with filters of all kinds.
    fn choices(&mut self, width: usize) {
        const ROWS: usize = 48;
        let random = &mut self.random;
        let mut logits = Vec::new();
        for row in 0..ROWS {
            let coarse = row % 3 > 0;
            let logit = |_| match random.random_range(-20.0f32..20.0) / 4.0 {
                logit if coarse => (logit * 4.0).round() / 4.0,
                logit => logit,
            };
            logits.extend((0..width).map(logit));
            // Like a model's: a few are far likelier than all others.
            for place in 0..width.min(5 * (row % 2)) {
                logits[row * width + place * width / 5] += 12.0;
            }
            logits[row * width + row % width] = [f32::NAN, f32::NEG_INFINITY, 2.0][random.random_range(0..3)];
        }
        let choices: Vec<Choice> = (0..ROWS)
            .map(|_| Choice {
                temperature: [0.0, 0.3, 1.0, 1.7][random.random_range(0..4)],
                top_k: [0, 0, 1, 2, 20, 5000][random.random_range(0..6)],
                min_p: [0.0, 0.0, 0.05, 0.5, 1.0][random.random_range(0..5)],
                // None that of twenty equal tokens is some exactly: where such a limit lies is a matter of rounding.
                top_p: [0.13, 0.71, 0.93, 1.0][random.random_range(0..4)],
                random: random.random(),
            })
            .collect();
        let chosen = self.chosen(&logits, &choices);
        assert_eq!(self.chosen(&logits, &choices), chosen, "chosen again");
        for ((logits, choice), token) in logits.chunks_exact(width).zip(&choices).zip(chosen) {
            let expected = sampler::choose(&mut logits.to_vec(), choice);
            let right = token == expected || is_on_the_border(logits, choice, token);
            assert!(right, "{token}, not {expected} of {width}, with {choice:?}");
        }
    }

    /// One input through two matrices, at numbers of rows for which different kernels may be chosen.
    fn products(&mut self, dtype: DType, outputs: usize, inputs: usize) {
        let tolerance = if dtype == DType::Q4_1 { self.q4_1 } else { 1e-4 };
        let bytes = self.weights(dtype, outputs * inputs);
        let view = TensorView { dtype, shape: vec![outputs, inputs], data: &bytes };
        let [one, two] = [0, 1].map(|_| B::Weight::load(self.context, &self.device, &view));
        let plain = Dense::<Flex>::new(&FlexDevice, &view);
        assert_eq!(one.elements(), outputs * inputs);
        for rows in [1, 3, 13, 70] {
            let (x, x0) = self.both([rows, inputs]);
            let expected = plain.multiply(x0);
            for y in B::project(self.context, x, [&one, &two]) {
                self.assert_close(y, expected.clone(), tolerance);
            }
        }
    }

    /// Bytes of so many weights: any codes, scales of a useful size and some that are hardly one.
    fn weights(&mut self, dtype: DType, count: usize) -> Vec<u8> {
        let random = &mut self.random;
        let size = dtype.block_bytes();
        let mut bytes: Vec<u8> = (0..count / dtype.block_len() * size).map(|_| random.random()).collect();
        for block in bytes.chunks_exact_mut(size) {
            let value = random.random_range(-1.0f32..1.0);
            let scale = f16::from_f32(if random.random_ratio(1, 4) { value * 3e-5 } else { value / 16.0 });
            match dtype {
                DType::F32 => block.copy_from_slice(&value.to_le_bytes()),
                DType::F16 => block.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                DType::BF16 => block.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => block[..2].copy_from_slice(&scale.to_le_bytes()),
                DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => {
                    block[..2].copy_from_slice(&scale.to_le_bytes());
                    block[2..4].copy_from_slice(&f16::from_f32(value / 8.0).to_le_bytes());
                }
                DType::Q6K => block[208..].copy_from_slice(&scale.to_le_bytes()),
            }
        }
        bytes
    }

    /// Several sequences over several steps, with blocks all over the cache.
    fn attention(&mut self, heads: &Heads, style: RopeStyle, normed: bool) {
        let ropes = [Rope::new(style, 10_000.0, heads.dim, None)];
        let matrix = self.matrix(heads.queries * heads.dim);
        let mut cache = B::cache(self.context, &self.device, heads, BLOCKS);
        let mut cache0 = plain::cache::<Flex>(&FlexDevice, heads, BLOCKS);
        let (query, query0) = self.both([heads.dim]);
        let (key, key0) = self.both([heads.dim]);
        let norms = HeadNorms { query, key, eps: 1e-6 };
        let norms0 = HeadNorms { query: query0, key: key0, eps: 1e-6 };
        const BLOCKS: usize = 24;
        let tables: [&[u32]; 4] =
            [&[7, 2, 5], &[0], &[3, 6], &[23, 8, 22, 9, 21, 10, 20, 11, 19, 12, 18, 13, 17, 14, 16, 15]];
        // Sequence, first position and rows. In the fourth step a long context meets a short one.
        let steps = [
            &[(0, 0, 40), (1, 0, 7), (3, 0, 290)][..],
            &[(0, 40, 1), (1, 7, 1), (2, 0, 33)],
            &[(2, 33, 1), (0, 41, 30)],
            &[(3, 290, 1), (1, 8, 1), (0, 71, 2)],
            &[(3, 291, 210)],
            &[(3, 501, 1), (2, 34, 1)],
        ];
        for spans in steps {
            let mut batch = Batch::default();
            for &(sequence, start, count) in spans {
                batch.push(&vec![0; count], start, tables[sequence], 0);
            }
            let step = Step::<B>::new(&batch, &ropes, &self.device);
            let step0 = Step::<Flex>::new(&batch, &ropes, &FlexDevice);
            let (q, q0) = self.both([batch.rows(), heads.queries * heads.dim]);
            let (k, k0) = self.both([batch.rows(), heads.keys * heads.dim]);
            let (v, v0) = self.both([batch.rows(), heads.keys * heads.dim]);
            let (norms, norms0) = (normed.then_some(&norms), normed.then_some(&norms0));
            let q = B::rope_append(self.context, [q, k, v], heads, norms, 0, &step, &mut cache);
            let q0 = plain::rope_append([q0, k0, v0], heads, norms0, 0, &step0, &mut cache0);
            self.assert_close(q.clone(), q0.clone(), 1e-5);
            let out = B::attend(self.context, q, heads, &step, &cache);
            self.assert_ready(&out, &matrix);
            self.assert_close(out, plain::attend(q0, heads, &step0, &cache0), 1e-4);
        }
    }
}

/// Whether rounding may be why a token is chosen: its part of the running sum of the weights is next to the random number, or
/// would be if rounding had not left it out, as likely as the last that were kept.
fn is_on_the_border(logits: &[f32], choice: &Choice, token: u32) -> bool {
    const NEAR: f64 = 1e-4;
    if choice.is_greedy() {
        return false;
    }
    let mut kept = sampler::tests::kept(logits, choice);
    let least = kept.last().expect("one is kept").0;
    kept.sort_by_key(|(id, _)| *id);
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let before: f64 = kept.iter().take_while(|(id, _)| *id < token).map(|(_, weight)| weight).sum();
    let own = kept.iter().find(|(id, _)| *id == token).map(|(_, weight)| *weight);
    let begin = before / total - NEAR;
    let end = (before + own.unwrap_or(0.0)) / total + NEAR;
    let known = own.is_some() || logits[token as usize] == logits[least as usize];
    known && (begin..=end).contains(&choice.random)
}

/// Products with weights in Q4_1 are right up to `q4_1`.
fn check<B: Kernels>(context: &B::Context, device: B::Device, q4_1: f32) {
    let mut subject = Subject::<B> { context, device, q4_1, random: StdRng::seed_from_u64(11) };
    for (rows, width) in [(5, 96), (1, 1), (3, 1030), (2, 577), (40, 288)] {
        subject.rows(rows, width);
    }
    subject.greatest();
    [3, 50, 3000, 50_000].into_iter().for_each(|width| subject.choices(width));
    for dtype in DType::ALL {
        subject.products(dtype, 48, 512);
        subject.products(dtype, 131, 768);
    }
    for dtype in [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::BF16] {
        subject.products(dtype, 20, 96);
    }
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        subject.products(dtype, 7, 45);
    }
    let heads = |queries, keys, dim, window| Heads { queries, keys, dim, scale: 0.25, window };
    subject.attention(&heads(6, 2, 16, None), RopeStyle::Interleaved, false);
    subject.attention(&heads(6, 2, 16, None), RopeStyle::Half, true);
    subject.attention(&heads(9, 3, 64, Some(9)), RopeStyle::Half, false);
    subject.attention(&heads(4, 4, 80, Some(300)), RopeStyle::Interleaved, true);
    subject.attention(&heads(17, 1, 32, None), RopeStyle::Half, false);
    subject.attention(&heads(4, 1, 256, Some(33)), RopeStyle::Half, true);
}

#[test]
fn the_cpus_operations_are_the_plain_ones() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
        // For AMX scales are rounded to units, see `format::fix`: half of one, for codes up to 15, is a 4,000th of the largest weight
        // of these, whose scales are as different as no model's.
        let q4_1 = if isa == Isa::Amx { 1e-3 } else { 1e-4 };
        check::<Flex>(&Cpu::with_isa(2, isa), FlexDevice, q4_1);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpus_operations_are_the_plain_ones() {
    assert!(gpu::wgpu::device().is_ok(), "a Vulkan device, at least a software one, is there");
    check::<gpu::wgpu::Wgpu>(&(), Default::default(), 1e-4);
}
