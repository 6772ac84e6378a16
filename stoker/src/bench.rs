//! `stoker bench`: how fast the engine alone is, and how far from the device's limits.

use anyhow::{Context, Result};
use clap::Args;
use stoker_engine::bench::{Measurement, SpeedOptions, speed};
use stoker_shared::config::Config;

use crate::fleet::{Backend, load_options};
use crate::model;

/// `stoker bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A model's file, folder or name (default: SmolLM2-135M-Instruct).
    #[arg(long, value_name = "FILE|NAME")]
    model: Option<String>,
    /// Where it runs (default: the best there is).
    #[arg(long, value_enum)]
    backend: Option<Backend>,
    /// CPU threads (default: all cores).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Prompt lengths to prefill, tokens; decoding starts behind the last.
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    prompt: Vec<usize>,
    /// Sequences that decode together.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32")]
    batch: Vec<usize>,
    /// New tokens per sequence.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Runs per measurement; the median is printed.
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
pub async fn run(args: BenchArgs, mut config: Config) -> Result<()> {
    let path = match &args.model {
        Some(name) => model::resolve(name, &config).await?,
        None => model::default(&config).await?,
    };
    config.worker.backend = args.backend.map(Into::into).or(config.worker.backend);
    config.worker.threads = args.threads.or(config.worker.threads);
    let load = load_options(path, &config);
    let options = SpeedOptions {
        prompts: args.prompt,
        batches: args.batch,
        tokens: args.tokens,
        repetitions: args.repetitions,
    };
    let json = args.json;
    let measured = tokio::task::spawn_blocking(move || {
        if !json {
            println!(
                "{:<8} {:>7} {:>6} {:>12} {:>10} {:>8}",
                "test", "prompt", "batch", "tokens/s", "bandwidth", "flops"
            );
        }
        speed(load, &options, &mut |m| print(&m, json))
    });
    let info = measured.await.context("the benchmark panicked")??;
    if !json {
        println!("\n{} ({}) on {}: {}", info.name, info.format, info.backend, info.device);
    }
    Ok(())
}

fn print(m: &Measurement, json: bool) {
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
