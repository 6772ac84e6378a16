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
use crate::memory::free_memory;
use crate::model::{self, Model, Setup};
use crate::sampler::Choice;
use crate::weights::{Checkpoint, ModelConfig};
use crate::{BackendKind, LoadError, LoadOptions, ModelInfo};

/// Requests that decode together, unless the options say otherwise.
const DEFAULT_SLOTS: u32 = 16;
/// Most memory for the caches of all models, as a share of what is free.
const CACHE_SHARE: u64 = 4;
/// What is taken to be free where nobody can say, bytes.
const ASSUMED_FREE: u64 = 8 << 30;
/// Positions below which a cache is of no use to a model whose context is longer.
const LEAST_POSITIONS: usize = 256;

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
    let config = checkpoint.config();
    let language = Language::new(checkpoint.tokenizer()?, checkpoint.template()?, config.vocab);
    let slots = options.slots.unwrap_or(DEFAULT_SLOTS).max(1);
    let wanted =
        options.context.map_or(config.context, |context| config.context.min(context as usize)).max(1);
    let backend = options.backend.unwrap_or_else(best_backend);
    let speculation = options.speculation.unwrap_or(true);
    let blocks = match options.kv_positions {
        Some(positions) => (positions as usize).div_ceil(BLOCK).max(1),
        None => {
            let share = free_memory().unwrap_or(ASSUMED_FREE) / CACHE_SHARE;
            let share = share / u64::from(options.models.unwrap_or(1).max(1));
            affordable_blocks(share, position_bytes(config, backend), wanted, slots as usize)?
        }
    };
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
            check_heads(&checkpoint, &options)?;
            load_on::<gpu::wgpu::Wgpu>((), Default::default(), checkpoint, options, blocks)
        }
        #[cfg(feature = "cuda")]
        BackendKind::Cuda => {
            info.backend = "cuda".into();
            info.device = gpu::cuda::device().map_err(|reason| no_device("cuda", &reason))?.name;
            check_heads(&checkpoint, &options)?;
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

/// Heads that the GPUs' attention does not take.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn check_heads(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<(), LoadError> {
    let width = checkpoint.config().head_dim;
    if gpu::takes_heads(width) {
        return Ok(());
    }
    let message = format!("heads of {width} elements are too wide for the GPU kernels: use the cpu backend");
    Err(LoadError::Unsupported { path: options.path.clone(), message })
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

/// How many blocks the cache gets where nobody has said: what `slots` contexts could need, within `share` bytes of memory.
/// `position`: bytes of a position.
///
/// # Errors
/// If that is too little for a conversation.
fn affordable_blocks(share: u64, position: usize, context: usize, slots: usize) -> Result<usize, LoadError> {
    let blocks = (share as usize / (BLOCK * position)).min(context.div_ceil(BLOCK) * slots);
    let least = context.min(LEAST_POSITIONS);
    if blocks * BLOCK < least {
        return Err(LoadError::Memory(format!(
            "{} MB of memory are left for the KV cache, its part of a {CACHE_SHARE}th of what is free, and {least} positions take \
             {} MB: free memory, raise the container's limit, choose a smaller model, serve fewer in one process, or say how many \
             positions there shall be",
            share >> 20,
            (least * position).div_ceil(1 << 20),
        )));
    }
    Ok(blocks)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::TempDir;
    use crate::common::gguf::{Gguf, Value};

    #[test]
    fn a_cache_is_as_large_as_memory_allows_and_slots_need() {
        let blocks = |share, context, slots| affordable_blocks(share, 1 << 10, context, slots);
        assert_eq!(blocks(1 << 38, 1000, 3).unwrap(), 3 * 1000_usize.div_ceil(BLOCK));
        // 16 MB hold 16384 positions, less than one whole context.
        assert_eq!(blocks(16 << 20, 100_000, 3).unwrap() * BLOCK, 16_384);
        assert_eq!(blocks(1 << 18, 256, 1).unwrap() * BLOCK, 256);
        assert_eq!(
            blocks(1 << 17, 100, 1).unwrap(),
            100_usize.div_ceil(BLOCK),
            "a short context needs no more"
        );
        let LoadError::Memory(message) = blocks(1 << 17, 100_000, 3).unwrap_err() else { panic!() };
        assert!(message.starts_with("0 MB of memory") && message.contains("256 positions"), "{message}");
        assert!(blocks(0, 1, 1).is_err());
    }

    /// The file's number is all that there is of this context.
    #[test]
    fn a_file_that_claims_a_huge_context_gets_a_cache_that_fits() {
        let mut file = Gguf::tiny(&["H", "e"]);
        file.set("llama.context_length", Value::U32(1 << 28));
        let directory = TempDir::new();
        let path = directory.write("model.gguf", &file.bytes());
        let config = Checkpoint::open(&path).unwrap().config().clone();
        let free = free_memory().unwrap_or(ASSUMED_FREE);
        // Other tests may have given memory back meanwhile.
        for (models, most) in [(None, free / 2), (Some(4), free / 8)] {
            let options = LoadOptions {
                backend: Some(BackendKind::Cpu),
                threads: Some(1),
                models,
                ..LoadOptions::new(&path)
            };
            let engine = crate::load(options, Box::new(drop)).unwrap();
            let positions = engine.stats().kv_total;
            let bytes = positions * position_bytes(&config, BackendKind::Cpu) as u64;
            assert!(bytes < most, "{bytes} bytes of cache in {free} for one of {models:?} models");
            assert!(u64::from(engine.info().context) <= positions);
        }
    }
}
