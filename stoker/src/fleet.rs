//! `stoker up`, `stoker coordinator`, `stoker worker`: builds the parts, and runs them until told to stop.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use stoker_coordinator::Coordinator;
use stoker_engine::{BackendKind, EchoOptions, LoadOptions};
use stoker_shared::config::{BackendChoice, Config, EngineChoice};
use stoker_shared::ports::bring_up_schema;
use stoker_shared::telemetry;
use stoker_worker::{Model, Worker};
use tokio_util::sync::CancellationToken;

use crate::{ask, model};

/// Most echo jobs that run together unless `--slots` says otherwise.
const ECHO_SLOTS: u32 = 256;
/// What the first run asks.
const FIRST_QUESTION: &str = "What is the capital of France?";

/// `stoker up`
#[derive(Debug, Default, Args)]
pub struct UpArgs {
    /// Use RabbitMQ, Redis and Postgres instead of the embedded ports.
    #[arg(long)]
    real: bool,
    /// Ask this once the fleet is up, and print the answer as it comes.
    #[arg(long, value_name = "QUESTION")]
    ask: Option<String>,
    /// HTTP port.
    #[arg(long)]
    port: Option<u16>,
    #[command(flatten)]
    serve: ServeArgs,
}

impl UpArgs {
    /// What `stoker` without a command does.
    pub fn first_run() -> Self {
        Self { ask: Some(FIRST_QUESTION.into()), ..Self::default() }
    }
}

/// `stoker coordinator`
#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    /// HTTP port; 0: any free one.
    #[arg(long)]
    port: Option<u16>,
}

impl CoordinatorArgs {
    /// Flags win over the configuration.
    pub fn apply(&self, config: &mut Config) {
        config.http.port = self.port.or(config.http.port);
    }
}

/// `stoker worker`
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// HTTP port of /healthz and /metrics; 0: any free one.
    #[arg(long)]
    port: Option<u16>,
    #[command(flatten)]
    serve: ServeArgs,
}

impl WorkerArgs {
    /// Flags win over the configuration.
    pub fn apply(&self, config: &mut Config) {
        config.http.port = self.port.or(config.http.port);
        self.serve.apply(config);
    }
}

/// What a worker serves, and how.
#[derive(Debug, Default, Args)]
struct ServeArgs {
    /// A model's file, folder or name (repeatable; default: SmolLM2-135M-Instruct). With the echo engine: a name.
    #[arg(long = "model", value_name = "FILE|NAME")]
    models: Vec<String>,
    /// Where models run (default: the best there is).
    #[arg(long, value_enum)]
    backend: Option<Backend>,
    /// Most jobs that decode together, per model.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    slots: Option<u32>,
    /// CPU threads (default: all cores).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// What runs the jobs: models on Burn, or an echo that needs none.
    #[arg(long, value_enum)]
    engine: Option<EngineName>,
    /// Echo: tokens per job that names no limit.
    #[arg(long)]
    echo_tokens: Option<u32>,
    /// Echo: milliseconds between tokens.
    #[arg(long)]
    echo_delay_ms: Option<u64>,
}

/// Where models run.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Backend {
    /// SIMD on the CPU.
    Cpu,
    /// Vulkan, Metal, DX12.
    Wgpu,
    /// NVIDIA.
    Cuda,
}

impl From<Backend> for BackendChoice {
    fn from(backend: Backend) -> Self {
        match backend {
            Backend::Cpu => Self::Cpu,
            Backend::Wgpu => Self::Wgpu,
            Backend::Cuda => Self::Cuda,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EngineName {
    Burn,
    Echo,
}

impl ServeArgs {
    fn apply(&self, config: &mut Config) {
        let w = &mut config.worker;
        if !self.models.is_empty() {
            w.models.clone_from(&self.models);
        }
        w.backend = self.backend.map(Into::into).or(w.backend);
        w.slots = self.slots.or(w.slots);
        w.threads = self.threads.or(w.threads);
        match self.engine {
            Some(EngineName::Echo) => w.engine = EngineChoice::Echo,
            Some(EngineName::Burn) => w.engine = EngineChoice::Burn,
            None => {}
        }
        w.echo_tokens = self.echo_tokens.unwrap_or(w.echo_tokens);
        w.echo_delay_ms = self.echo_delay_ms.unwrap_or(w.echo_delay_ms);
    }
}

/// The whole fleet in one process.
pub async fn up(mut config: Config, args: UpArgs) -> Result<()> {
    args.serve.apply(&mut config);
    config.http.port = args.port.or(config.http.port);
    let stop = stop_signal()?;
    let ports = if args.real {
        stoker_shared::connect(&config.services).await?
    } else {
        let file = embedded_file(&config)?;
        stoker_shared::embedded::ports(Some(&file))
            .with_context(|| format!("cannot open {}", file.display()))?
    };
    let starting = Coordinator::start(config.clone(), ports.clone(), Some(telemetry::init_metrics()));
    let Some(coordinator) = stop.run_until_cancelled(starting).await.transpose()? else { return Ok(()) };
    let addr = coordinator.addr();
    let url = match addr.ip() {
        ip if ip.is_unspecified() || ip == Ipv4Addr::LOCALHOST => format!("http://localhost:{}", addr.port()),
        _ => format!("http://{addr}"),
    };
    // The worker's own pages would say the same as the coordinator's: any port will do.
    config.http.port = Some(0);
    config.http.host = "127.0.0.1".into();
    let worker = Worker::open(config.clone(), ports, None).await?;
    let serving = async {
        worker.serve(models(&config).await?).await?;
        if let Some(question) = args.ask {
            worker.announced().await;
            if let Err(error) = ask::ask(&url, &question).await {
                eprintln!("the question was not answered: {error:#}");
            }
        }
        ask::say_how_to_call(&url);
        Ok(worker.wait().await?)
    };
    let ended = stop.run_until_cancelled(serving).await.unwrap_or(Ok(()));
    worker.drain().await;
    coordinator.shutdown().await;
    ended
}

/// The process's SQLite file. The lock that the ledger takes on it keeps a second fleet away.
fn embedded_file(config: &Config) -> Result<PathBuf> {
    let folder = config.data_dir();
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    Ok(folder.join("stoker.db"))
}

/// A coordinator on the real services.
pub async fn coordinator(config: Config) -> Result<()> {
    let stop = stop_signal()?;
    let ports = stoker_shared::connect(&config.services).await?;
    let starting = Coordinator::start(config, ports, Some(telemetry::init_metrics()));
    let Some(coordinator) = stop.run_until_cancelled(starting).await.transpose()? else { return Ok(()) };
    tracing::info!("coordinator {} listens on {}", coordinator.id(), coordinator.addr());
    stop.cancelled().await;
    coordinator.shutdown().await;
    Ok(())
}

/// A worker on the real services.
pub async fn worker(config: Config) -> Result<()> {
    let stop = stop_signal()?;
    let ports = stoker_shared::connect(&config.services).await?;
    let ledger = ports.ledger.clone();
    tokio::spawn(async move { bring_up_schema(&*ledger).await });
    // It answers probes while it fetches and loads, so that nobody takes it for hung.
    let worker = Worker::open(config.clone(), ports, Some(telemetry::init_metrics())).await?;
    tracing::info!("worker {} has its probes and metrics on {}", worker.id(), worker.addr());
    let serving = async {
        worker.serve(models(&config).await?).await?;
        Ok(worker.wait().await?)
    };
    let ended = stop.run_until_cancelled(serving).await.unwrap_or(Ok(()));
    worker.drain().await;
    ended
}

/// What the worker is to run.
async fn models(config: &Config) -> Result<Vec<Model>> {
    let w = &config.worker;
    if w.engine == EngineChoice::Echo {
        let names = if w.models.is_empty() { vec!["echo".to_owned()] } else { w.models.clone() };
        let echo = |name| {
            Model::Echo(EchoOptions {
                name,
                tokens: w.echo_tokens,
                delay: Duration::from_millis(w.echo_delay_ms),
                slots: w.slots.unwrap_or(ECHO_SLOTS),
            })
        };
        return Ok(names.into_iter().map(echo).collect());
    }
    let mut paths = Vec::new();
    for name in &w.models {
        paths.push(model::resolve(name, config).await?);
    }
    if paths.is_empty() {
        paths.push(model::default(config).await?);
    }
    let count = u32::try_from(paths.len()).ok();
    let load = |path| Model::Burn(LoadOptions { models: count, ..load_options(path, config) });
    Ok(paths.into_iter().map(load).collect())
}

/// How the engine is to load a model's files.
pub fn load_options(path: PathBuf, config: &Config) -> LoadOptions {
    let name = model::catalogue::MODELS
        .iter()
        .find(|m| path.file_name().is_some_and(|f| f == m.file))
        .map(|m| m.name.to_owned())
        .or_else(|| file_stem(&path));
    let bar = model::pull::progress(0, "loading");
    LoadOptions {
        name,
        backend: config.worker.backend.map(backend),
        slots: config.worker.slots,
        threads: config.worker.threads,
        context: config.worker.context,
        kv_positions: config.worker.kv_positions,
        speculation: Some(config.worker.speculation),
        progress: Some(Box::new(move |done, all| {
            bar.set_length(all);
            bar.set_position(done);
            if done >= all {
                bar.finish_and_clear();
            }
        })),
        ..LoadOptions::new(path)
    }
}

/// Models are served under the name of their file or folder.
fn file_stem(path: &Path) -> Option<String> {
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    name.map(|n| n.to_string_lossy().into_owned())
}

/// The engine's word for a configured backend.
fn backend(choice: BackendChoice) -> BackendKind {
    match choice {
        BackendChoice::Cpu => BackendKind::Cpu,
        BackendChoice::Wgpu => BackendKind::Wgpu,
        BackendChoice::Cuda => BackendKind::Cuda,
    }
}

/// Cancelled by SIGTERM or SIGINT; a second one ends the process at once. To be called before anything that takes time: the
/// system keeps signals without a handler from the first process of a container.
fn stop_signal() -> Result<CancellationToken> {
    #[cfg(unix)]
    let mut signal = {
        use tokio::signal::unix::{SignalKind, signal};
        let mut term = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut int = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        async move || tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    };
    #[cfg(not(unix))]
    let mut signal = async || drop(tokio::signal::ctrl_c().await);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        signal().await;
        tracing::info!("stopping: running jobs are finished or handed over (again: at once)");
        token.cancel();
        signal().await;
        std::process::exit(130);
    });
    Ok(stop)
}
