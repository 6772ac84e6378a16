//! `stoker`: the command people run. It parses, builds and runs; what there is to decide is decided elsewhere.

mod ask;
mod bench;
mod dead;
mod fleet;
mod http;
mod job;
mod model;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde_json::json;
use stoker_shared::config::{self, Config};
use stoker_shared::telemetry;

/// A durable queue in front of live token streams: a fleet of workers that serve language models.
///
/// Without a command: starts the whole fleet in this process, asks it one question, and keeps serving.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Configuration file (TOML; default: the one that STOKER_CONFIG names); the environment wins over it.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole fleet in one process: no RabbitMQ, Redis or Postgres needed.
    Up(fleet::UpArgs),
    /// A coordinator: HTTP in, jobs to RabbitMQ, tokens back.
    Coordinator(fleet::CoordinatorArgs),
    /// A worker: runs models, takes jobs from RabbitMQ.
    Worker(fleet::WorkerArgs),
    /// The engine alone: tokens per second, and the share of what the device can do.
    Bench(bench::BenchArgs),
    /// Fetch, list and inspect models.
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Submit, show, watch and cancel jobs; list dead letters.
    #[command(subcommand)]
    Job(job::JobCommand),
    /// Bring the database schema up to date.
    Migrate {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("stoker: cannot start: {e}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(run(cli));
    // Nothing is worth waiting for any more, such as a model that was being loaded when we were told to stop.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("stoker: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let mut config = Config::load(cli.config.as_deref(), config::environment())?;
    telemetry::init_logs(&config.log);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    match cli.command {
        None => fleet::up(config, fleet::UpArgs::first_run()).await,
        Some(Command::Up(args)) => fleet::up(config, args).await,
        Some(Command::Coordinator(args)) => {
            args.apply(&mut config);
            fleet::coordinator(config).await
        }
        Some(Command::Worker(args)) => {
            args.apply(&mut config);
            fleet::worker(config).await
        }
        Some(Command::Bench(args)) => bench::run(args, config).await,
        Some(Command::Model(command)) => model::run(command, &config).await,
        Some(Command::Job(command)) => job::run(command, &config).await,
        Some(Command::Migrate { json }) => migrate(&config, json).await,
    }
}

async fn migrate(config: &Config, as_json: bool) -> Result<()> {
    let ledger = stoker_shared::postgres::PostgresLedger::connect(&config.services).await?;
    let url = redact(&config.services.postgres_url);
    stoker_shared::ports::Ledger::migrate(&ledger).await.with_context(|| format!("cannot migrate {url}"))?;
    if as_json {
        println!("{}", json!({"database": url, "schema": "up to date"}));
    } else {
        println!("the schema is up to date");
    }
    Ok(())
}

/// A database's address without its password, which may stand before the host, or among what follows.
fn redact(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "the configured database".into() };
    let address = rest.split('?').next().unwrap_or_default();
    match address.rsplit_once('@') {
        Some((_, place)) => format!("{scheme}://…@{place}"),
        None => format!("{scheme}://{address}"),
    }
}
