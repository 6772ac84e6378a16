//! `loadtest http`: N clients, each with one request in flight, for a bounded time.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::check::{Check, Checker};
use crate::client::{Ask, Route};
use crate::prompts::Prompts;
use crate::report::Report;

/// `loadtest http`
#[derive(Debug, Args)]
pub struct HttpArgs {
    /// Where the coordinators are; clients are spread over them.
    #[arg(long = "url", default_value = "http://localhost:8080")]
    urls: Vec<String>,
    /// Clients, each with one request in flight.
    #[arg(long, short, default_value_t = 32)]
    clients: usize,
    /// For so many seconds; requests in flight are then seen to their end.
    #[arg(long, short, default_value_t = 10)]
    duration: u64,
    /// Stop after so many requests, if that is earlier.
    #[arg(long)]
    requests: Option<u64>,
    /// Interface to call.
    #[arg(long, value_enum, default_value = "chat")]
    route: Route,
    /// Model.
    #[arg(long, default_value = "auto")]
    model: String,
    /// Tokens per request.
    #[arg(long, default_value_t = 32)]
    max_tokens: u64,
    /// File with one prompt a line. Default: unique words with `--check echo`, else a few questions.
    #[arg(long)]
    prompts: Option<PathBuf>,
    /// How answers are checked.
    #[arg(long, value_enum, default_value = "none")]
    check: Check,
    /// Write the ids of the answered jobs here, one a line.
    #[arg(long)]
    ids: Option<PathBuf>,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// What all clients share.
struct Load {
    args: HttpArgs,
    prompts: Prompts,
    checker: Checker,
    next: AtomicU64,
    until: Instant,
}

/// Runs the load; fails if any request did.
pub async fn http(args: HttpArgs) -> Result<()> {
    let prompts = match (&args.prompts, args.check) {
        (Some(file), _) => Prompts::from_file(file)?,
        (None, Check::Echo) => Prompts::Unique,
        (None, _) => Prompts::questions(),
    };
    let started = Instant::now();
    let load = Arc::new(Load {
        prompts,
        checker: Checker::new(args.check),
        next: AtomicU64::new(0),
        until: started + Duration::from_secs(args.duration),
        args,
    });
    let clients: Vec<_> = (0..load.args.clients).map(|i| tokio::spawn(client(load.clone(), i))).collect();
    let mut report = Report::default();
    for client in clients {
        report.merge(client.await.context("a client panicked")??);
    }
    report.print(started.elapsed(), load.args.json);
    if let Some(path) = &load.args.ids {
        std::fs::write(path, report.ids.join("\n") + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if report.error_count() > 0 {
        bail!("{} requests failed", report.error_count());
    }
    Ok(())
}

async fn client(load: Arc<Load>, index: usize) -> Result<Report> {
    let args = &load.args;
    let client =
        reqwest::Client::builder().tcp_nodelay(true).build().context("cannot make an HTTP client")?;
    let url = args.urls[index % args.urls.len()].trim_end_matches('/');
    let mut report = Report::default();
    while Instant::now() < load.until {
        let n = load.next.fetch_add(1, Ordering::Relaxed);
        if args.requests.is_some_and(|max| n >= max) {
            break;
        }
        let ask = Ask {
            route: args.route,
            model: args.model.clone(),
            max_tokens: args.max_tokens,
            prompt: load.prompts.get(n),
        };
        match ask.send(&client, url).await {
            Ok(answer) => match load.checker.verify(&ask.prompt, args.max_tokens, &answer.text) {
                Ok(()) => report.answer(answer),
                Err(e) => report.error(e),
            },
            Err(e) => {
                report.error(e);
                tokio::time::sleep(Duration::from_millis(50)).await; // a fleet that refuses is not to be flooded
            }
        }
    }
    Ok(report)
}
