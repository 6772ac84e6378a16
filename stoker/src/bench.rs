//! `stoker bench`: how fast the engine alone is, how far from the device's limits, and how true to plain arithmetic.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand};
use stoker_engine::bench::{Measurement, Quality, SpeedOptions, TEXT, quality, speed, speed_of_shape};
use stoker_engine::weights::{DType, Shape};
use stoker_shared::config::Config;

use crate::fleet::{Backend, load_options};
use crate::model;

/// `stoker bench`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    #[command(flatten)]
    subject: Subject,
    /// Random weights in the shape of a known model, e.g. `llama-3-8b`: speed can be measured without a file.
    #[arg(long, value_name = "NAME", conflicts_with = "model", value_parser = shape)]
    shape: Option<&'static Shape>,
    /// Number format of the random weights, e.g. `bf16`, `q4_1`, `q8_0` (default: q4_1 on the CPU, bf16 elsewhere).
    #[arg(long, requires = "shape", value_parser = format)]
    format: Option<DType>,
    /// Prompt lengths to prefill, tokens; decoding starts behind the last.
    #[arg(long, value_delimiter = ',', default_value = "128,512", value_parser = at_least_one())]
    prompt: Vec<usize>,
    /// Sequences that decode together.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32", value_parser = at_least_one())]
    batch: Vec<usize>,
    /// New tokens per sequence.
    #[arg(long, default_value_t = 64, value_parser = at_least_one())]
    tokens: usize,
    /// Runs per measurement; the median is printed.
    #[arg(long, default_value_t = 5, value_parser = at_least_one())]
    repetitions: usize,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// How often the kernels predict what plain f32 does, and how far apart their predictions are.
    Quality(QualityArgs),
}

/// What is measured, and where.
#[derive(Debug, Args)]
struct Subject {
    /// A model's file, folder or name (default: SmolLM2-135M-Instruct).
    #[arg(long, value_name = "FILE|NAME")]
    model: Option<String>,
    /// Where it runs (default: the best there is; for quality, all there are).
    #[arg(long, value_enum)]
    backend: Option<Backend>,
    /// CPU threads (default: all cores).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// `stoker bench quality`
#[derive(Debug, Args)]
struct QualityArgs {
    #[command(flatten)]
    subject: Subject,
    /// A text to score instead of the beginning of Moby-Dick.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

fn shape(name: &str) -> Result<&'static Shape, String> {
    let names = || Shape::ALL.map(|shape| shape.name).join(", ");
    Shape::find(name).ok_or_else(|| format!("known shapes are {}", names()))
}

fn format(name: &str) -> Result<DType, String> {
    let names = || DType::ALL.map(|format| format.name().to_ascii_lowercase()).join(", ");
    DType::find(name).ok_or_else(|| format!("known formats are {}", names()))
}

/// Measures and prints.
pub async fn run(args: BenchArgs, config: Config) -> Result<()> {
    match args.command {
        Some(BenchCommand::Quality(args)) => run_quality(args, config).await,
        None => run_speed(args, config).await,
    }
}

impl Subject {
    /// The model's file or folder.
    async fn path(&self, config: &Config) -> Result<PathBuf> {
        match &self.model {
            Some(name) => model::resolve(name, config).await,
            None => model::default(config).await,
        }
    }

    /// The configuration with what the command line says.
    fn set(&self, mut config: Config) -> Config {
        config.worker.backend = self.backend.map(Into::into).or(config.worker.backend);
        config.worker.threads = self.threads.or(config.worker.threads);
        config
    }
}

async fn run_speed(args: BenchArgs, config: Config) -> Result<()> {
    let path = match args.shape {
        Some(shape) => shape.name.into(),
        None => args.subject.path(&config).await?,
    };
    let load = load_options(path, &args.subject.set(config));
    let options = SpeedOptions {
        prompts: args.prompt,
        batches: args.batch,
        tokens: args.tokens,
        repetitions: args.repetitions,
    };
    let json = args.subject.json;
    let measured = tokio::task::spawn_blocking(move || {
        // Not before the first row: what can't be measured has no table.
        let mut header = !json;
        let report = &mut |m| {
            if std::mem::take(&mut header) {
                println!(
                    "{:<8} {:>7} {:>6} {:>12} {:>10} {:>8}",
                    "test", "prompt", "batch", "tokens/s", "bandwidth", "flops"
                );
            }
            print_speed(&m, json);
        };
        match args.shape {
            Some(shape) => speed_of_shape(shape, args.format, load, &options, report),
            None => speed(load, &options, report),
        }
    });
    let info = measured.await.context("the benchmark panicked")??;
    if !json {
        println!("\n{} ({}) on {}: {}", info.name, info.format, info.backend, info.device);
    }
    Ok(())
}

fn print_speed(m: &Measurement, json: bool) {
    if json {
        println!("{}", serde_json::to_string(m).unwrap_or_default());
        return;
    }
    let share = |s: Option<f64>| s.map_or("-".into(), |s| format!("{:.0} %", s * 100.0));
    println!(
        "{:<8} {:>7} {:>6} {:>12.1} {:>10} {:>8}",
        m.test,
        m.prompt,
        m.batch,
        m.tokens_per_second,
        share(m.bandwidth_share),
        share(m.flops_share)
    );
}

async fn run_quality(args: QualityArgs, config: Config) -> Result<()> {
    let text = match &args.text {
        Some(file) => {
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?
        }
        None => TEXT.into(),
    };
    let path = args.subject.path(&config).await?;
    let load = load_options(path, &args.subject.set(config));
    let json = args.subject.json;
    let scored = tokio::task::spawn_blocking(move || {
        let mut last = None;
        quality(&load, &text, &mut |q| {
            if last.is_none() && !json {
                println!(
                    "{:<8} {:<10} {:>7} {:>10} {:>12} {:>12} {:>11}",
                    "backend", "kernels", "tokens", "agreement", "mean KL", "max KL", "perplexity"
                );
            }
            print_quality(&q, json);
            last = Some(q);
        })?;
        Ok::<_, stoker_engine::LoadError>(last)
    });
    match scored.await.context("the benchmark panicked")?? {
        Some(q) if q.tokens == 0 => bail!("the text is too short: there is nothing to predict"),
        Some(q) if !json => println!("\nplain f32: perplexity {:.4}", q.reference_perplexity),
        _ => {}
    }
    Ok(())
}

fn print_quality(q: &Quality, json: bool) {
    if json {
        println!("{}", serde_json::to_string(q).unwrap_or_default());
        return;
    }
    println!(
        "{:<8} {:<10} {:>7} {:>8.2} % {:>12.2e} {:>12.2e} {:>11.4}",
        q.backend,
        q.kernels,
        q.tokens,
        q.agreement * 100.0,
        q.mean_kl,
        q.max_kl,
        q.perplexity
    );
}
