//! Each backend's operations against the plain ones on the CPU.

use burn::tensor::{Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
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
}

impl<B: Kernels> Subject<'_, B> {
    /// Random numbers, on the subject's device and on the reference's.
    fn both<const D: usize>(&mut self, shape: [usize; D]) -> (Tensor<B, D>, Tensor<Flex, D>) {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| self.random.random_range(-1.0..1.0)).collect();
        let data = TensorData::new(values, shape);
        (Tensor::from_data(data.clone(), &self.device), Tensor::from_data(data, &FlexDevice))
    }

    fn assert_close<const D: usize>(&self, got: Tensor<B, D>, expected: Tensor<Flex, D>, tolerance: f32) {
        assert_eq!(got.dims(), expected.dims());
        let (got, expected) =
            (got.into_data().into_vec::<f32>().unwrap(), expected.into_data().into_vec::<f32>().unwrap());
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= tolerance, "{got} where {expected} is right");
        }
    }

    fn rows(&mut self) {
        let (x, x0) = self.both([5, 96]);
        let (y, y0) = self.both([5, 96]);
        let (w, w0) = self.both([96]);
        let normed = B::rms_norm(self.context, x.clone(), &w, 1e-5);
        self.assert_close(normed, plain::rms_norm(x0.clone(), &w0, 1e-5), 1e-5);
        let (sum, normed) = B::add_rms_norm(self.context, x.clone(), y.clone(), &w, 1e-5);
        self.assert_close(sum, x0.clone() + y0.clone(), 1e-6);
        self.assert_close(normed, plain::rms_norm(x0.clone() + y0.clone(), &w0, 1e-5), 1e-5);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gated = B::gated(self.context, [x.clone(), y.clone()], activation);
            self.assert_close(gated, plain::gated([x0.clone(), y0.clone()], activation), 1e-5);
        }
    }

    fn products(&mut self) {
        let (x, x0) = self.both([3, 64]);
        let bytes: Vec<u8> =
            (0..48 * 64).flat_map(|_| self.random.random_range(-1.0f32..1.0).to_le_bytes()).collect();
        let view = TensorView { dtype: DType::F32, shape: vec![48, 64], data: &bytes };
        let [one, two] = [0, 1].map(|_| B::Weight::load(self.context, &self.device, &view));
        let expected = Dense::<Flex>::new(&FlexDevice, &view).multiply(x0);
        assert_eq!(one.elements(), 48 * 64);
        for y in B::project(self.context, x, [&one, &two]) {
            self.assert_close(y, expected.clone(), 1e-4);
        }
    }

    /// Several sequences over several steps, with blocks all over the cache.
    fn attention(&mut self, style: RopeStyle, window: Option<usize>, normed: bool) {
        let heads = Heads { queries: 6, keys: 2, dim: 16, scale: 0.25, window };
        let ropes = [Rope::new(style, 10_000.0, heads.dim, None)];
        let mut cache = B::cache(self.context, &self.device, &heads, 8);
        let mut cache0 = plain::cache::<Flex>(&FlexDevice, &heads, 8);
        let (query, query0) = self.both([heads.dim]);
        let (key, key0) = self.both([heads.dim]);
        let norms = HeadNorms { query, key, eps: 1e-6 };
        let norms0 = HeadNorms { query: query0, key: key0, eps: 1e-6 };
        let tables: [&[u32]; 3] = [&[7, 2, 5], &[0], &[3, 6]];
        for spans in
            [&[(0, 0, 40), (1, 0, 7)][..], &[(0, 40, 1), (1, 7, 1), (2, 0, 33)], &[(2, 33, 1), (0, 41, 30)]]
        {
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
            let q = B::rope_append(self.context, [q, k, v], &heads, norms, 0, &step, &mut cache);
            let q0 = plain::rope_append([q0, k0, v0], &heads, norms0, 0, &step0, &mut cache0);
            self.assert_close(q.clone(), q0.clone(), 1e-5);
            let out = B::attend(self.context, q, &heads, &step, &cache);
            self.assert_close(out, plain::attend(q0, &heads, &step0, &cache0), 1e-4);
        }
    }
}

fn check<B: Kernels>(context: &B::Context, device: B::Device) {
    let mut subject = Subject::<B> { context, device, random: StdRng::seed_from_u64(11) };
    subject.rows();
    subject.products();
    subject.attention(RopeStyle::Interleaved, None, false);
    subject.attention(RopeStyle::Half, None, true);
    subject.attention(RopeStyle::Half, Some(9), false);
}

#[test]
fn the_cpus_operations_are_the_plain_ones() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
        check::<Flex>(&Cpu::with_isa(2, isa), FlexDevice);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpus_operations_are_the_plain_ones() {
    assert!(gpu::wgpu::device().is_ok(), "a Vulkan device, at least a software one, is there");
    check::<gpu::wgpu::Wgpu>(&(), Default::default());
}
