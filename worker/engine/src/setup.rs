//! From options to a model that is ready: backend, memory, weights, warm-up.

use std::sync::Arc;

use burn_flex::{Flex, FlexDevice};

use crate::batch::Batch;
use crate::engine::Ready;
use crate::kernels::cpu::Isa;
use crate::kernels::flex::Cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use crate::kernels::gpu;
use crate::kernels::{BLOCK, Kernels};
use crate::language::Language;
use crate::model::{self, Model, Setup};
use crate::sampler::Choice;
use crate::weights::{Checkpoint, ModelConfig};
use crate::{BackendKind, LoadError, LoadOptions, ModelInfo};

/// Requests that decode together, unless the options say otherwise.
const DEFAULT_SLOTS: u32 = 16;
/// Most memory for the cache, as a share of what is free.
const CACHE_SHARE: u64 = 4;
/// What is taken to be free where nobody can say, bytes.
const ASSUMED_FREE: u64 = 8 << 30;

/// Does all that [`load`](crate::load) promises, on the engine's thread.
pub(crate) fn set_up(options: LoadOptions) -> Result<Ready, LoadError> {
    set_up_checkpoint(Checkpoint::open(&options.path)?, Isa::best(), options)
}

/// The same for weights that are there already, with the CPU's kernels of one instruction set.
pub(crate) fn set_up_checkpoint(
    checkpoint: Checkpoint,
    isa: Isa,
    options: LoadOptions,
) -> Result<Ready, LoadError> {
    let language = Language::new(checkpoint.tokenizer()?, checkpoint.template()?);
    let config = checkpoint.config();
    let slots = options.slots.unwrap_or(DEFAULT_SLOTS).max(1);
    let wanted =
        options.context.map_or(config.context, |context| config.context.min(context as usize)).max(1);
    let backend = options.backend.unwrap_or_else(best_backend);
    let speculation = options.speculation.unwrap_or(true);
    let blocks = blocks(config, backend, &options, wanted, slots as usize);
    let context = wanted.min(blocks * BLOCK);
    let mut info = ModelInfo {
        name: options.name.clone().unwrap_or_else(|| checkpoint.name()),
        revision: checkpoint.revision(),
        architecture: config.architecture.clone(),
        format: checkpoint.format(),
        context: context as u32,
        backend: String::new(),
        device: String::new(),
        slots,
    };
    let mut model = on_backend(backend, isa, checkpoint, options, blocks, &mut info)?;
    warm_up(&mut *model);
    Ok(Ready { model, language: Arc::new(language), info, blocks, speculation })
}

/// The best backend that is compiled in and has a device of its own.
pub(crate) fn best_backend() -> BackendKind {
    #[cfg(feature = "cuda")]
    if gpu::cuda::device().is_ok() {
        return BackendKind::Cuda;
    }
    #[cfg(feature = "wgpu")]
    if gpu::wgpu::device().is_ok_and(|device| !device.software) {
        return BackendKind::Wgpu;
    }
    BackendKind::Cpu
}

/// Loads the weights on the chosen backend.
fn on_backend(
    backend: BackendKind,
    isa: Isa,
    checkpoint: Checkpoint,
    options: LoadOptions,
    blocks: usize,
    info: &mut ModelInfo,
) -> Result<Box<dyn Model>, LoadError> {
    match backend {
        BackendKind::Cpu => {
            info.backend = "cpu".into();
            info.device = cpu_name();
            load_on::<Flex>(Cpu::with_isa(threads(&options), isa), FlexDevice, checkpoint, options, blocks)
        }
        #[cfg(feature = "wgpu")]
        BackendKind::Wgpu => {
            info.backend = "wgpu".into();
            info.device = gpu::wgpu::device().map_err(|reason| no_device("wgpu", &reason))?.name;
            load_on::<gpu::wgpu::Wgpu>((), Default::default(), checkpoint, options, blocks)
        }
        #[cfg(feature = "cuda")]
        BackendKind::Cuda => {
            info.backend = "cuda".into();
            info.device = gpu::cuda::device().map_err(|reason| no_device("cuda", &reason))?.name;
            load_on::<gpu::cuda::Cuda>((), Default::default(), checkpoint, options, blocks)
        }
        #[allow(unreachable_patterns)] // with all features
        BackendKind::Wgpu | BackendKind::Cuda => {
            let name = if backend == BackendKind::Wgpu { "wgpu" } else { "cuda" };
            let message =
                format!("the {name} backend is not compiled in: build with the {name} feature, or use cpu");
            Err(LoadError::Backend(message))
        }
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn no_device(backend: &str, reason: &str) -> LoadError {
    LoadError::Backend(format!("there is no device for the {backend} backend ({reason}); use cpu"))
}

fn load_on<B: Kernels>(
    context: B::Context,
    device: B::Device,
    checkpoint: Checkpoint,
    options: LoadOptions,
    blocks: usize,
) -> Result<Box<dyn Model>, LoadError> {
    let total = checkpoint.data_bytes();
    let mut done = 0;
    let mut report = options.progress;
    let mut progress = |bytes: u64| {
        // A tied embedding is taken over twice, but counted once.
        done = (done + bytes).min(total);
        if let Some(report) = &mut report {
            report(done, total);
        }
    };
    let model = model::load::<B>(checkpoint, Setup { context, device, blocks, progress: &mut progress })?;
    progress(total);
    Ok(model)
}

/// How many blocks the cache gets: what was asked for, or what all slots could need, within a share of free memory; in any
/// case room for one whole context if it was not asked for less.
fn blocks(
    config: &ModelConfig,
    backend: BackendKind,
    options: &LoadOptions,
    context: usize,
    slots: usize,
) -> usize {
    if let Some(positions) = options.kv_positions {
        return (positions as usize).div_ceil(BLOCK).max(1);
    }
    let block_bytes = BLOCK * position_bytes(config, backend);
    let affordable = (free_memory().unwrap_or(ASSUMED_FREE) / CACHE_SHARE) as usize / block_bytes;
    let one = context.div_ceil(BLOCK);
    affordable.clamp(one, one * slots)
}

/// Bytes of cache that one position takes in all layers together.
pub(crate) fn position_bytes(config: &ModelConfig, backend: BackendKind) -> usize {
    let layer = match backend {
        BackendKind::Cpu => Flex::cache_bytes,
        #[cfg(feature = "wgpu")]
        BackendKind::Wgpu => gpu::wgpu::Wgpu::cache_bytes,
        #[cfg(feature = "cuda")]
        BackendKind::Cuda => gpu::cuda::Cuda::cache_bytes,
        // Loading will say that it is not there.
        #[allow(unreachable_patterns)]
        _ => Flex::cache_bytes,
    };
    config.layers * layer(config.kv_heads, config.head_dim)
}

/// Bytes of memory that are available, where the system says.
pub(crate) fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

/// The processor, for people.
fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split(": ").nth(1)).map_or(std::env::consts::ARCH, str::trim);
    name.to_string()
}

/// Makes the steps that requests will make: a prompt, then tokens, so that every kernel is compiled. The first block is
/// written, but nobody will read it.
fn warm_up(model: &mut dyn Model) {
    let mut batch = Batch::default();
    batch.push(&[0; BLOCK - 1], 0, &[0], 1);
    model.forward(&batch);
    for &(rows, position) in model.steps() {
        batch.clear();
        let blocks = vec![0; position / BLOCK + 1];
        (0..rows).for_each(|_| batch.push(&[0], position, &blocks, 1));
        model.choose(&batch, &vec![Choice::LIKELIEST; rows]);
    }
}

fn threads(options: &LoadOptions) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    options.threads.map_or_else(cores, |threads| threads as usize).max(1)
}
