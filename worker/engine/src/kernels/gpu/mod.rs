//! GPUs: Burn's CubeCL backends (wgpu and CUDA) with kernels of their own for all that a step spends its time on.
//!
//! One implementation, generic over CubeCL's runtime. The backends are taken without Burn's fusion: these kernels fuse what
//! a transformer has to fuse, and launch at once. They use shared memory and barriers only, no plane (subgroup)
//! operations and no 16-bit types, so that they are the same on every device that has 32 KiB of shared memory.
//!
//! Tensors between the kernels are contiguous and in f32. A step sends the device its tokens' embeddings and the
//! [`Tables`], and waits for nothing but its result.

mod attention;
mod choose;
mod device;
mod gate;
mod linear;
mod matrix;
mod norm;
mod reduce;
mod rope;
mod tables;
mod unpack;

pub(crate) use attention::takes_heads;

use burn::tensor::{DType, Shape, Tensor, TensorPrimitive};
use burn_cubecl::cubecl::prelude::CubeCount;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime};

#[cfg(feature = "cuda")]
pub(crate) use device::cuda;
#[cfg(feature = "wgpu")]
pub(crate) use device::wgpu;
pub(super) use tables::Tables;

use super::{BLOCK, HeadNorms, Heads, Kernels, KvLayer, Step};
use crate::sampler::Choice;
use crate::weights::Activation;
use matrix::Matrix;

/// Burn's CubeCL backend, with its element types; `T` is how it stores truth values.
type Gpu<R, T> = CubeBackend<R, f32, i32, T>;

impl<R: CubeRuntime, T: BoolElement> Kernels for Gpu<R, T> {
    type Context = ();
    type Weight = Matrix;

    const STEPS: &'static [(usize, usize)] = &[(1, BLOCK), (4, BLOCK), (8, BLOCK), (1, attention::CHUNK)];
    const SAMPLES: bool = true;

    fn rms_norm((): &(), x: Tensor<Self, 2>, weight: &Tensor<Self, 1>, eps: f32) -> Tensor<Self, 2> {
        wrap(norm::rms_norm(bare(x), bare(weight.clone()), eps))
    }

    fn add_rms_norm(
        (): &(),
        residual: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weight: &Tensor<Self, 1>,
        eps: f32,
    ) -> (Tensor<Self, 2>, Tensor<Self, 2>) {
        let (sum, normed) = norm::add_rms_norm(bare(residual), bare(x), bare(weight.clone()), eps);
        (wrap(sum), wrap(normed))
    }

    /// Keys and values `[blocks, heads, BLOCK, dim]`, as one dimension: rows of others might be padded.
    fn cache((): &(), device: &Self::Device, heads: &Heads, blocks: usize) -> KvLayer<Self> {
        let zeros = || bare(Tensor::<Self, 1>::zeros([blocks * heads.keys * BLOCK * heads.dim], device));
        KvLayer { keys: zeros(), values: zeros() }
    }

    fn rope_append(
        (): &(),
        qkv: [Tensor<Self, 2>; 3],
        heads: &Heads,
        norms: Option<&HeadNorms<Self>>,
        rope: usize,
        step: &Step<Self>,
        cache: &mut KvLayer<Self>,
    ) -> Tensor<Self, 2> {
        let tables = step.tables();
        let norms = norms.map(|norms| rope::Norms {
            query: bare(norms.query.clone()),
            key: bare(norms.key.clone()),
            eps: norms.eps,
        });
        let rotation = rope::Rotation {
            style: step.rotations[rope].style,
            angles: bare(tables.angles[rope].clone()),
            index: bare_index(tables.index.clone()),
        };
        wrap(rope::rope_append(
            qkv.map(bare),
            heads,
            norms,
            rotation,
            cache.keys.clone(),
            cache.values.clone(),
        ))
    }

    fn attend(
        (): &(),
        q: Tensor<Self, 2>,
        heads: &Heads,
        step: &Step<Self>,
        cache: &KvLayer<Self>,
    ) -> Tensor<Self, 2> {
        let tables = step.tables();
        let index = bare_index(tables.index.clone());
        wrap(attention::attend(bare(q), heads, index, &tables.work, cache.keys.clone(), cache.values.clone()))
    }

    fn gated((): &(), [gate, up]: [Tensor<Self, 2>; 2], activation: Activation) -> Tensor<Self, 2> {
        wrap(gate::gated(bare(gate), bare(up), activation))
    }

    fn choose((): &(), logits: Tensor<Self, 2>, choices: &[Choice]) -> Vec<u32> {
        choose::choose(bare(logits), choices)
    }
}

/// A tensor as kernels take it.
fn bare<R: CubeRuntime, T: BoolElement, const D: usize>(tensor: Tensor<Gpu<R, T>, D>) -> CubeTensor<R> {
    into_contiguous(tensor.into_primitive().tensor())
}

/// The same for whole numbers, whose bits kernels read as `u32`.
fn bare_index<R: CubeRuntime, T: BoolElement>(
    tensor: Tensor<Gpu<R, T>, 1, burn::tensor::Int>,
) -> CubeTensor<R> {
    into_contiguous(tensor.into_primitive())
}

fn wrap<R: CubeRuntime, T: BoolElement, const D: usize>(tensor: CubeTensor<R>) -> Tensor<Gpu<R, T>, D> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

/// A contiguous tensor of f32 whose numbers are yet to be written, on the device of `like`.
fn empty<R: CubeRuntime, const D: usize>(like: &CubeTensor<R>, shape: [usize; D]) -> CubeTensor<R> {
    let handle = like.client.empty(shape.iter().product::<usize>() * size_of::<f32>());
    let (client, device) = (like.client.clone(), like.device.clone());
    CubeTensor::new_contiguous(client, device, Shape::new(shape), handle, DType::F32)
}

/// Rows and columns of a matrix.
fn dims<R: CubeRuntime>(tensor: &CubeTensor<R>) -> [usize; 2] {
    let shape = tensor.meta.shape();
    [shape[0], shape[1]]
}

/// Cubes of a launch, at most 65,535 in any direction.
fn cubes(x: usize, y: usize, z: usize) -> CubeCount {
    CubeCount::Static(x as u32, y as u32, z as u32)
}

/// How many neighbouring numbers a unit loads at once where rows have `width` of them.
fn lanes(width: usize) -> usize {
    [4, 2].into_iter().find(|lanes| width.is_multiple_of(*lanes)).unwrap_or(1)
}
