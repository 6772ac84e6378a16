//! How many jobs a second the ledger can end: `cargo run --release -p stoker-shared --example ledger_rate [URL | FILE]`.
//! With a Postgres URL the tables are created in that database if need be, and the rows stay: give it one of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use stoker_shared::config::Services;
use stoker_shared::embedded::SqliteLedger;
use stoker_shared::ports::{CacheRow, Ending, Ledger, RequestRow};
use stoker_shared::postgres::PostgresLedger;
use uuid::Uuid;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let target = std::env::args().nth(1);
    let ledger: Arc<dyn Ledger> = match target {
        Some(url) if url.starts_with("postgres") => {
            Arc::new(PostgresLedger::connect(&Services { postgres_url: url, ..Services::default() }).await?)
        }
        file => Arc::new(SqliteLedger::open(file.as_deref().map(Path::new))?),
    };
    ledger.migrate().await?;
    for cached in [false, true] {
        for batch in [1, 32, 256] {
            for writers in [1, 4] {
                let rate = measure(&ledger, batch, writers, cached).await;
                println!(
                    "batches of {batch:3}, {writers} at a time, cache rows: {cached:5}  {rate:8.0} endings/s"
                );
            }
        }
    }
    Ok(())
}

async fn measure(ledger: &Arc<dyn Ledger>, batch: usize, writers: usize, cached: bool) -> f64 {
    let start = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                let mut ended = 0;
                while start.elapsed() < Duration::from_secs(4) {
                    let endings = (0..batch).map(|_| ending(cached)).collect();
                    ended += ledger.commit(endings).await.expect("the ledger is there").len();
                }
                ended
            })
        })
        .collect();
    let mut ended = 0;
    for task in tasks {
        ended += task.await.expect("no panic");
    }
    ended as f64 / start.elapsed().as_secs_f64()
}

/// A job of ordinary size: some 500 bytes of prompt and of text.
fn ending(cached: bool) -> Ending {
    let key = Uuid::now_v7();
    let text = "Once upon a time there was a queue that nobody wanted to wait in. ".repeat(8);
    let metadata = json!({"model": "smol", "executionTime": 640, "queueTime": 3, "timeToFirstToken": 41,
        "cached": false, "worker": "w-0192f0c1", "attempts": 1, "request": {"app": "shop", "trace": key.to_string()}});
    let outcome = json!({"v": 1, "id": key, "success": true, "text": text, "metadata": metadata});
    Ending {
        key,
        tenant: "default".into(),
        job_id: key.to_string(),
        body_hash: "00".repeat(32),
        epoch: 1,
        outcome: outcome.to_string().into(),
        request: RequestRow {
            user_id: Some("ann".into()),
            prompt: text.clone(),
            response: text.clone(),
            model: "smol".into(),
            tokens: 128,
            execution_time_ms: 640,
            metadata: metadata.clone(),
            prompt_tokens: 120,
            finish_reason: "stop".into(),
            worker: "w-0192f0c1".into(),
            attempts: 1,
            queued_ms_ago: Some(650),
            started_ms_ago: Some(640),
            first_token_ms_ago: Some(600),
            ..RequestRow::default()
        },
        cache: cached.then(|| CacheRow {
            cache_key: format!("{key}{key}"),
            prompt_hash: "ab".repeat(32),
            response: text,
            model: "smol".into(),
            metadata: json!({"finishReason": "stop"}),
            expires_in_s: 3600,
        }),
        dead: None,
        expires_in_s: 7 * 86_400,
    }
}
