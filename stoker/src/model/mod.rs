//! `stoker model`, and how the name of a model becomes a file.

pub mod catalogue;
pub mod pull;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use serde_json::json;
use stoker_engine::weights::Checkpoint;
use stoker_shared::config::Config;

/// What can be done with models.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Fetch a model (default: SmolLM2-135M-Instruct) into the models folder.
    Pull {
        /// Name, see `stoker model list`.
        name: Option<String>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The models that can be pulled, and the files that are there.
    List {
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// What a model's file says of itself.
    Inspect {
        /// File, folder or name.
        model: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Where models are kept.
pub fn folder(config: &Config) -> PathBuf {
    config.data_dir().join("models")
}

/// Runs the command.
pub async fn run(command: ModelCommand, config: &Config) -> Result<()> {
    match command {
        ModelCommand::Pull { name, json } => {
            let entry = known(name.as_deref())?;
            let path = pull::pull(entry, &folder(config)).await?.display().to_string();
            if json {
                println!("{}", json!({"name": entry.name, "path": path, "bytes": entry.size}));
            } else {
                println!("{path}");
            }
            Ok(())
        }
        ModelCommand::List { json } => {
            list(&folder(config), json);
            Ok(())
        }
        ModelCommand::Inspect { model, json } => inspect(&resolve(&model, config).await?, json),
    }
}

/// The model that can be pulled under a name; without one, the default.
fn known(name: Option<&str>) -> Result<&'static catalogue::Entry> {
    match name {
        None => Ok(catalogue::default()),
        Some(name) => catalogue::find(name).with_context(|| {
            format!("no model is known by the name {name:?}; `stoker model list` shows those that are")
        }),
    }
}

/// The file or folder of a model: a path, the name of a file in the models folder, or a name that can be pulled.
pub async fn resolve(model: &str, config: &Config) -> Result<PathBuf> {
    let folder = folder(config);
    let candidates = [PathBuf::from(model), folder.join(model), folder.join(format!("{model}.gguf"))];
    if let Some(path) = candidates.into_iter().find(|p| p.exists()) {
        return Ok(path);
    }
    if let Some(entry) = catalogue::find(model) {
        return pull::pull(entry, &folder).await;
    }
    bail!(
        "the model {model:?} is neither a file, nor in {}, nor a name that can be pulled (`stoker model list`)",
        folder.display()
    )
}

/// The default model's file, fetched if it is missing.
pub async fn default(config: &Config) -> Result<PathBuf> {
    pull::pull(catalogue::default(), &folder(config)).await
}

fn list(folder: &Path, as_json: bool) {
    let files = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| !e.file_name().to_string_lossy().starts_with('.'))
        .filter(|e| e.path().is_dir() || e.path().extension().is_some_and(|x| x == "gguf"));
    let files: Vec<_> = files.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    if as_json {
        for m in catalogue::MODELS {
            let here = files.iter().any(|f| f == m.file);
            println!(
                "{}",
                json!({"name": m.name, "file": m.file, "bytes": m.size, "licence": m.licence, "present": here})
            );
        }
        for f in files.iter().filter(|f| catalogue::MODELS.iter().all(|m| m.file != **f)) {
            println!("{}", json!({"name": f.trim_end_matches(".gguf"), "file": f, "present": true}));
        }
        return;
    }
    println!("{:<28} {:>8}  {:<13} FILE", "NAME", "SIZE", "HERE");
    for m in catalogue::MODELS {
        let here = if files.iter().any(|f| f == m.file) { "yes" } else { "can be pulled" };
        println!("{:<28} {:>6} MB  {here:<13} {}", m.name, m.size / 1_000_000, m.file);
    }
    for f in files.iter().filter(|f| catalogue::MODELS.iter().all(|m| m.file != **f)) {
        println!("{:<28} {:>8}  {:<13} {f}", f.trim_end_matches(".gguf"), "", "yes");
    }
    println!("\nFiles are kept in {}.", folder.display());
}

fn inspect(path: &Path, as_json: bool) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let c = checkpoint.config();
    let facts = json!({
        "name": checkpoint.name(), "architecture": c.architecture, "format": checkpoint.format(),
        "bytes": checkpoint.data_bytes(), "tensors": checkpoint.tensor_names().count(), "layers": c.layers,
        "hidden": c.hidden, "heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim, "ffn": c.ffn,
        "vocabulary": c.vocab, "context": c.context, "revision": checkpoint.revision(),
    });
    if as_json {
        println!("{facts}");
        return Ok(());
    }
    for (name, value) in facts.as_object().into_iter().flatten() {
        println!("{name:<13} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    }
    Ok(())
}
