//! How an engine is brought up: from a model's files, or without any.

use std::path::PathBuf;
use std::time::Duration;

use crate::{Engine, Sink, engine, setup};

/// Where a model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// SIMD on the CPU; always there.
    Cpu,
    /// Vulkan, Metal, DX12; needs the `wgpu` feature.
    Wgpu,
    /// NVIDIA; needs the `cuda` feature.
    Cuda,
}

/// Called while weights are loaded, with bytes done and bytes in all.
pub type Progress = Box<dyn FnMut(u64, u64) + Send>;

/// What to load and how to run it.
pub struct LoadOptions {
    /// A GGUF file, or a directory with Hugging Face's `config.json`, `tokenizer.json` and `*.safetensors`.
    pub path: PathBuf,
    /// Name under which it is served; absent: the file's.
    pub name: Option<String>,
    /// `None`: the best that is compiled in and has a device.
    pub backend: Option<BackendKind>,
    /// Most requests that decode together; `None`: 16.
    pub slots: Option<u32>,
    /// CPU threads; `None`: all cores.
    pub threads: Option<u32>,
    /// Context length, no longer than the model's and than what the cache holds; `None`: as long as both allow.
    pub context: Option<u32>,
    /// Cached positions (all requests together), taken as they are; `None`: what a share of the host's free memory holds, as far
    /// as slots could need it.
    pub kv_positions: Option<u64>,
    /// Models that are to run in this process, which divide that share among them; `None`: this one.
    pub models: Option<u32>,
    /// Whether tokens are guessed from what the text repeats, and checked several in a step; it changes only speed, and is
    /// done only where it pays. `None`: yes.
    pub speculation: Option<bool>,
    /// Told how loading goes.
    pub progress: Option<Progress>,
}

impl LoadOptions {
    /// The model of these files, with all that can be left open left open.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            name: None,
            backend: None,
            slots: None,
            threads: None,
            context: None,
            kv_positions: None,
            models: None,
            speculation: None,
            progress: None,
        }
    }
}

/// Why a model could not be loaded; says what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Reading failed.
    #[error("{path}: {source}")]
    Io {
        /// File.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is damaged or not what it claims to be.
    #[error("{path}: {message}")]
    Malformed {
        /// File.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The file is fine, but holds something that this engine does not run.
    #[error("{path}: {message}")]
    Unsupported {
        /// File.
        path: PathBuf,
        /// What, and what is supported.
        message: String,
    },
    /// The backend is not compiled in or has no device.
    #[error("{0}")]
    Backend(String),
    /// There is too little memory.
    #[error("{0}")]
    Memory(String),
}

/// Settings of the engine without a model.
#[derive(Clone, Debug)]
pub struct EchoOptions {
    /// Name under which it is served.
    pub name: String,
    /// Tokens per request where it names no limit.
    pub tokens: u32,
    /// Pause between tokens; zero: as fast as it can.
    pub delay: Duration,
    /// Most requests that run together.
    pub slots: u32,
}

/// Loads a model and starts its thread. Returns once the model has made a first step, so that nothing is left to be set up
/// when the first request comes.
pub fn load(options: LoadOptions, sink: Sink) -> Result<Box<dyn Engine>, LoadError> {
    let handle = engine::start(move || setup::set_up(options), sink)?;
    Ok(Box::new(handle))
}
