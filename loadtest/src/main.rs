//! Load for a running fleet, and faults: from outside, over the interfaces that clients use.

mod check;
mod client;
mod prompts;
mod report;
mod run;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures and strains a running fleet.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Concurrent streaming clients over HTTP for a bounded time.
    Http(run::HttpArgs),
}

#[tokio::main]
async fn main() -> Result<()> {
    // The HTTP client leaves the choice of a TLS provider to its user; an error means that there is one already.
    drop(rustls::crypto::ring::default_provider().install_default());
    match Cli::parse().command {
        Command::Http(args) => run::http(args).await,
    }
}
