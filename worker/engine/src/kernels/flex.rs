//! The CPU: Burn's flex backend, with the kernels of [`cpu`](super::cpu) on its tensors' memory.
//!
//! Weights stay packed, keys and values are written in place, and the buffers of tensors that an operation uses up
//! become the results of later ones: at the pace of a small model's layers, zeroing fresh memory would show.

use std::cell::{Cell, RefCell};

use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_flex::{Flex, FlexDevice, FlexTensor};

use super::cpu::{self, Activations, Angles, AttentionSpec, Isa, KvShape, Packed, Pool, Quantiser};
use super::{BLOCK, HeadNorms, Heads, Kernels, KvLayer, Limits, Rotation, Step, Weight};
use crate::weights::{Activation, TensorView};

/// What keys and values are stored as.
type Stored = i16;

/// Most buffers that are kept for reuse; a step has fewer tensors at once.
const SPARE_BUFFERS: usize = 16;

/// Threads, and memory for results.
pub(crate) struct Cpu {
    pool: Pool,
    spare: RefCell<Vec<Vec<f32>>>,
    /// Whether there are weights that are multiplied with quantised activations.
    quantises: Cell<bool>,
    ready: RefCell<Ready>,
}

/// The last result, quantised on the way for the product that takes it next.
#[derive(Default)]
struct Ready {
    activations: Activations,
    /// That result. Held, so that nobody can change it, nor another tensor be where it was.
    of: Option<FlexTensor>,
}

impl Cpu {
    /// With so many threads, the calling one included, whose kernels use `isa`.
    ///
    /// # Panics
    /// If this processor lacks it.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self {
            pool: Pool::with_isa(threads, isa),
            spare: RefCell::default(),
            quantises: Cell::new(false),
            ready: RefCell::default(),
        }
    }

    /// A tensor whose numbers `compute` writes, and quantises on the way if it is given a quantiser.
    fn ready(
        &self,
        shape: [usize; 2],
        compute: impl FnOnce(&mut [f32], Option<&Quantiser<'_>>),
    ) -> Tensor<Flex, 2> {
        let [rows, cols] = shape;
        let mut out = self.buffer(rows * cols);
        let mut ready = self.ready.borrow_mut();
        ready.of = None;
        let quantiser = match self.quantises.get() {
            true => ready.activations.begin_if_worth(&self.pool, rows, cols),
            false => None,
        };
        let quantises = quantiser.is_some();
        compute(&mut out, quantiser.as_ref());
        let tensor = FlexTensor::from_data(TensorData::new(out, shape));
        ready.of = quantises.then(|| tensor.clone());
        Tensor::from_primitive(TensorPrimitive::Float(tensor))
    }

    /// A buffer of `len` numbers, whatever they are: one that had as many, which need not be filled again, or a new one.
    fn buffer(&self, len: usize) -> Vec<f32> {
        let mut spare = self.spare.borrow_mut();
        match spare.iter().rposition(|buffer| buffer.len() == len) {
            Some(index) => spare.remove(index),
            None => vec![0.0; len],
        }
    }

    /// Keeps a tensor's memory for later, if nobody else has the tensor.
    fn recycle(&self, tensor: FlexTensor) {
        if !tensor.is_unique() {
            return;
        }
        if let Ok(buffer) = tensor.into_data().into_vec() {
            self.keep(buffer);
        }
    }

    /// Keeps memory for later.
    fn keep(&self, buffer: Vec<f32>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() == SPARE_BUFFERS {
            // The one that nobody has wanted for the longest time.
            spare.remove(0);
        }
        spare.push(buffer);
    }
}

fn bare<const D: usize>(tensor: Tensor<Flex, D>) -> FlexTensor {
    tensor.into_primitive().tensor()
}

/// Its numbers. Kernels' tensors are never views, so nothing is copied but in tests.
fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.as_slice::<f32>().is_some() { tensor } else { tensor.to_contiguous() }
}

fn numbers(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("a contiguous tensor of f32")
}

fn wrap(values: Vec<f32>, shape: [usize; 2]) -> Tensor<Flex, 2> {
    let tensor = FlexTensor::from_data(TensorData::new(values, shape));
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

impl Weight<Flex> for Packed {
    fn load(context: &Cpu, _: &FlexDevice, matrix: &TensorView<'_>) -> Self {
        if cpu::format::layout(matrix.dtype).is_some() {
            context.quantises.set(true);
        }
        Packed::pack(matrix.dtype, matrix.shape[0], matrix.shape[1], matrix.data, &context.pool)
            .expect("a checkpoint's tensors have the bytes that their shapes need")
    }

    fn apply(&self, context: &Cpu, x: Tensor<Flex, 2>) -> Tensor<Flex, 2> {
        let [y] = Flex::project(context, x, [self]);
        y
    }

    fn bytes(&self) -> usize {
        Packed::bytes(self)
    }

    fn elements(&self) -> usize {
        self.rows() * self.cols()
    }
}

impl Kernels for Flex {
    type Context = Cpu;
    type Weight = Packed;

    fn rms_norm(context: &Cpu, x: Tensor<Self, 2>, weight: &Tensor<Self, 1>, eps: f32) -> Tensor<Self, 2> {
        let shape = x.dims();
        let (x, weight) = (contiguous(bare(x)), bare(weight.clone()));
        let mut out = context.buffer(shape[0] * shape[1]);
        cpu::rms_norm(&context.pool, numbers(&x), numbers(&weight), eps, &mut out);
        context.recycle(x);
        wrap(out, shape)
    }

    fn add_rms_norm(
        context: &Cpu,
        residual: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weight: &Tensor<Self, 1>,
        eps: f32,
    ) -> (Tensor<Self, 2>, Tensor<Self, 2>) {
        let shape = residual.dims();
        let (mut sum, x, weight) = (contiguous(bare(residual)), contiguous(bare(x)), bare(weight.clone()));
        let normed = context.ready(shape, |out, quantiser| {
            let norm = (numbers(&weight), eps);
            cpu::add_rms_norm(&context.pool, sum.storage_mut(), numbers(&x), norm, out, quantiser);
        });
        context.recycle(x);
        (Tensor::from_primitive(TensorPrimitive::Float(sum)), normed)
    }

    fn project<const N: usize>(
        context: &Cpu,
        x: Tensor<Self, 2>,
        weights: [&Packed; N],
    ) -> [Tensor<Self, 2>; N] {
        let [rows, _] = x.dims();
        let x = contiguous(bare(x));
        let mut outs = weights.map(|weight| context.buffer(rows * weight.rows()));
        let mut ready = context.ready.borrow_mut();
        let is_ready =
            ready.of.take().is_some_and(|of| numbers(&of).as_ptr_range() == numbers(&x).as_ptr_range());
        let quantised = is_ready.then_some(&ready.activations);
        let ys = &mut outs.each_mut().map(Vec::as_mut_slice);
        cpu::linear_many(&context.pool, numbers(&x), quantised, &weights, ys);
        context.recycle(x);
        let mut widths = weights.iter().map(|weight| weight.rows());
        outs.map(|out| wrap(out, [rows, widths.next().expect("as many as outputs")]))
    }

    /// As 16-bit integers with their scales, `[blocks, elements of a block]`; see [`KvShape`].
    fn cache(_: &Cpu, _: &FlexDevice, heads: &Heads, blocks: usize) -> KvLayer<Self> {
        let shape = kv_shape(heads);
        // A zeroed vector costs no memory until it is written. Burn's own zeros are copied to where they are aligned, which
        // touches all of a cache that may be gigabytes: seconds at start. Nor on large pages, though a step would be a fortieth
        // faster: all layers come to a new one in the same step, and clearing them holds the streams up for a tenth of a second.
        let zeros = |block: usize| {
            FlexTensor::from_data(TensorData::new(vec![0 as Stored; blocks * block], [blocks, block]))
        };
        KvLayer { keys: zeros(shape.key_block::<Stored>()), values: zeros(shape.value_block::<Stored>()) }
    }

    fn cache_bytes(heads: usize, dim: usize) -> usize {
        let shape = KvShape { block: BLOCK, heads, head_dim: dim };
        (shape.key_block::<Stored>() + shape.value_block::<Stored>()) * size_of::<Stored>() / BLOCK
    }

    fn rope_append(
        context: &Cpu,
        [q, k, v]: [Tensor<Self, 2>; 3],
        heads: &Heads,
        norms: Option<&HeadNorms<Self>>,
        rope: usize,
        step: &Step<Self>,
        cache: &mut KvLayer<Self>,
    ) -> Tensor<Self, 2> {
        let [rows, width] = q.dims();
        let normed = |x: Tensor<Self, 2>, count: usize, norm: Option<&Tensor<Self, 1>>| {
            let x = match norms.zip(norm) {
                Some((norms, weight)) => {
                    Self::rms_norm(context, x.reshape([rows * count, heads.dim]), weight, norms.eps)
                }
                None => x,
            };
            contiguous(bare(x))
        };
        let mut q = normed(q, heads.queries, norms.map(|norms| &norms.query));
        let mut k = normed(k, heads.keys, norms.map(|norms| &norms.key));
        let v = contiguous(bare(v));
        let Rotation { style, cos, sin } = &step.rotations[rope];
        cpu::append::<Stored>(
            &context.pool,
            &kv_shape(heads),
            cache.keys.storage_mut(),
            cache.values.storage_mut(),
            &step.rows(),
            (*style, &Angles { pairs: heads.dim / 2, cos, sin }),
            q.storage_mut(),
            k.storage_mut(),
            numbers(&v),
        );
        context.recycle(k);
        context.recycle(v);
        Tensor::<Self, 2>::from_primitive(TensorPrimitive::Float(q)).reshape([rows, width])
    }

    fn attend(
        context: &Cpu,
        q: Tensor<Self, 2>,
        heads: &Heads,
        step: &Step<Self>,
        cache: &KvLayer<Self>,
    ) -> Tensor<Self, 2> {
        let shape = q.dims();
        let q = contiguous(bare(q));
        let spec =
            AttentionSpec { heads: heads.queries, scale: heads.scale, window: heads.window, softcap: None };
        let attended = context.ready(shape, |out, quantiser| {
            cpu::attention::<Stored>(
                &context.pool,
                &spec,
                &kv_shape(heads),
                cache.keys.storage(),
                cache.values.storage(),
                &step.rows(),
                numbers(&q),
                out,
                quantiser,
            );
        });
        context.recycle(q);
        attended
    }

    fn gated(context: &Cpu, [gate, up]: [Tensor<Self, 2>; 2], activation: Activation) -> Tensor<Self, 2> {
        let shape = gate.dims();
        let (gate, up) = (contiguous(bare(gate)), contiguous(bare(up)));
        let gated = context.ready(shape, |out, quantiser| {
            cpu::gated(&context.pool, activation, (numbers(&gate), numbers(&up)), out, quantiser);
        });
        context.recycle(gate);
        context.recycle(up);
        gated
    }

    fn recycle(context: &Cpu, logits: Vec<f32>) {
        context.keep(logits);
    }

    fn parallel(context: &Cpu, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        context.pool.run(tasks, task);
    }

    fn limits(context: &Cpu) -> Option<Limits> {
        let (bandwidth, flops) = (cpu::read_bandwidth(&context.pool), cpu::float_peak(&context.pool));
        Some(Limits { bandwidth, flops })
    }
}

fn kv_shape(heads: &Heads) -> KvShape {
    KvShape { block: BLOCK, heads: heads.keys, head_dim: heads.dim }
}
