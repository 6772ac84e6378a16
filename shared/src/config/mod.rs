//! What an operator can set: one TOML file plus environment, and the environment wins.

mod directories;
mod environment;
mod error;
mod load;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::job::Limits;

pub use environment::environment;
pub use error::ConfigError;

/// Everything that can be set. Sections are the file's tables.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The HTTP listener of this process.
    pub http: Http,
    /// Where the services are.
    pub services: Services,
    /// What the coordinator decides by.
    pub coordinator: Coordinator,
    /// Bounds on what may be asked for.
    pub limits: Limits,
    /// What a worker serves, and how.
    pub worker: Worker,
    /// Logs.
    pub log: Log,
    /// Embedded database and downloaded models; absent: the platform's data directory.
    pub data_dir: Option<PathBuf>,
    /// What [`Config::load`] found odd but not wrong; for the log, once there is one.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// The HTTP listener of this process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Address to bind.
    pub host: String,
    /// Port; absent: 8080 for a coordinator; for a worker 8081, or any free one if that is taken. 0: any free one.
    pub port: Option<u16>,
    /// Origins that browsers may call from; `*`: all.
    pub allowed_origins: Vec<String>,
}

impl Default for Http {
    fn default() -> Self {
        Self { host: "0.0.0.0".into(), port: None, allowed_origins: vec!["http://localhost:3000".into()] }
    }
}

/// Where the services are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Services {
    /// RabbitMQ; several URLs separated by commas are tried in turn.
    pub amqp_url: String,
    /// Redis.
    pub redis_url: String,
    /// Postgres.
    pub postgres_url: String,
    /// What the names of exchanges, queues, keys and channels start with, in place of `llm.`: lets several fleets share
    /// services.
    pub prefix: String,
}

/// The prefix of all names unless configured otherwise.
pub const DEFAULT_PREFIX: &str = "llm.";

impl Default for Services {
    fn default() -> Self {
        Self {
            amqp_url: "amqp://guest:guest@localhost:5672/%2f".into(),
            redis_url: "redis://localhost:6379".into(),
            postgres_url: "postgres://postgres:postgres@localhost:5432/postgres".into(),
            prefix: DEFAULT_PREFIX.into(),
        }
    }
}

impl Services {
    /// A name of the contract (`llm.…`) under the configured prefix.
    pub fn name(&self, contract: &str) -> String {
        prefixed(&self.prefix, contract)
    }
}

/// A name of the contract (`llm.…`) under another prefix; other names are left as they are.
pub fn prefixed(prefix: &str, contract: &str) -> String {
    match contract.strip_prefix(DEFAULT_PREFIX) {
        Some(rest) => format!("{prefix}{rest}"),
        None => contract.to_owned(),
    }
}

/// How a model is chosen for a job that names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Most free slots in proportion to all, then the larger context.
    #[default]
    Balanced,
    /// The first of the configured models that is served.
    QualityFirst,
    /// The last of the configured models that is served.
    CostOptimized,
    /// The most tokens a second.
    SpeedPriority,
    /// Each in turn.
    RoundRobin,
    /// Fewest running jobs.
    LeastLoaded,
    /// Any.
    Random,
}

/// What the coordinator decides by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Coordinator {
    /// Models that are known whether or not a worker serves them now; their queues take jobs.
    pub models: Vec<String>,
    /// How a model is chosen for a job that names none.
    pub strategy: Strategy,
    /// Whether answers of deterministic jobs are kept and used again.
    pub caching: bool,
    /// How long an answer is kept, seconds.
    pub cache_ttl_s: u64,
    /// Who pays for front-door jobs whose message carries no `user_id`, and for HTTP requests without a key.
    pub default_tenant: String,
    /// Whether prompts are stored in `llm_requests`.
    pub store_prompts: bool,
    /// How long `llm_jobs` rows of ended jobs are kept, seconds: so long can a redelivery be recognised.
    pub job_retention_s: u64,
    /// How long rows of `llm_requests` are kept, whoever wrote them, seconds; 0: for ever, because they are the bills.
    pub request_retention_s: u64,
    /// How long rows of `dead_letters` are kept, seconds; 0: for ever.
    pub dead_letter_retention_s: u64,
    /// Deadline of an interactive job that names none, seconds from acceptance.
    pub interactive_deadline_s: u64,
    /// The same for the batch lane.
    pub batch_deadline_s: u64,
}

impl Default for Coordinator {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            strategy: Strategy::default(),
            caching: true,
            cache_ttl_s: 3600,
            default_tenant: "default".into(),
            store_prompts: true,
            job_retention_s: 7 * 86_400,
            request_retention_s: 0,
            dead_letter_retention_s: 90 * 86_400,
            interactive_deadline_s: 600,
            batch_deadline_s: 86_400,
        }
    }
}

/// Where a model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// Always there.
    Cpu,
    /// Vulkan, Metal, DX12; the `wgpu` feature.
    Wgpu,
    /// NVIDIA; the `cuda` feature.
    Cuda,
}

/// What runs a worker's jobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// Models, on Burn.
    #[default]
    Burn,
    /// No model: gives the prompt back, to measure the fleet itself.
    Echo,
}

/// What a worker serves, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Worker {
    /// Files, directories, or names of models that `stoker model pull` knows; empty: the default model.
    pub models: Vec<String>,
    /// Absent: the best there is.
    pub backend: Option<BackendChoice>,
    /// Most jobs that decode together, per model; absent: the engine's default.
    pub slots: Option<u32>,
    /// CPU threads; absent: all cores.
    pub threads: Option<u32>,
    /// Longest context, tokens; absent: the model's, as far as memory goes.
    pub context: Option<u32>,
    /// Positions of the KV cache, of all jobs of a model together; absent: what a quarter of the free memory holds, divided by
    /// the number of models, as far as slots could need it.
    pub kv_positions: Option<u64>,
    /// Whether tokens are guessed from what a text repeats, which changes nothing but speed.
    pub speculation: bool,
    /// What runs the jobs.
    pub engine: EngineChoice,
    /// `echo`: tokens per job where the job names no limit.
    pub echo_tokens: u32,
    /// `echo`: milliseconds between tokens.
    pub echo_delay_ms: u64,
    /// How long running jobs may go on after SIGTERM before they are handed over, seconds.
    pub drain_s: u64,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            backend: None,
            slots: None,
            threads: None,
            context: None,
            kv_positions: None,
            speculation: true,
            engine: EngineChoice::default(),
            echo_tokens: 32,
            echo_delay_ms: 0,
            drain_s: 20,
        }
    }
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Form.
    pub format: LogFormat,
    /// A `tracing` filter, e.g. `info,stoker_worker=debug`.
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::default(), filter: "info".into() }
    }
}
